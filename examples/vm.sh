#!/usr/bin/env bash
# A virtual machine writes to its disk without pause, the disk moves to another image meanwhile, and afterwards every file
# that the machine wrote is found on the new image.
#
# QEMU runs as another user (as libvirt has it), with cache=none and with its image locks. Needs root, a Debian system, and:
#   apt-get install qemu-system-x86 e2fsprogs
# A kernel and a busybox for the guest are downloaded once, as Debian packages.
set -euo pipefail

livemirror=${LIVEMIRROR:-livemirror}
user=${VM_USER:-nobody}
cache=${VM_CACHE:-$(dirname "$0")/../target/vm}

for program in qemu-system-x86_64 mkfs.ext4 apt-get dpkg-deb runuser; do
    command -v "$program" >/dev/null || { echo "SKIPPED: $program is not installed"; exit 0; }
done
((EUID == 0)) || { echo "SKIPPED: this example needs root"; exit 0; }

work=$(mktemp -d)
vm=
mounted=
loop=
clean_up() {
    [[ -z $vm ]] || kill "$vm" 2>/dev/null || true
    wait
    ! mountpoint -q "$work/check" || umount "$work/check"
    [[ -z $loop ]] || losetup -d "$loop"
    [[ -z $mounted ]] || "$livemirror" unmount "$work/mnt" --wait 10s || "$livemirror" unmount "$work/mnt" --abort
    rm -rf "$work"
}
trap clean_up EXIT
chmod 755 "$work"
mkdir "$work"/{old,new,mnt,check}

# --- A guest: a kernel, and a busybox as its whole system ---------------------------------------------------------------

fetch_guest() {
    mkdir -p "$cache"
    [[ ! -e $cache/complete ]] || return 0
    local kernel
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p' | head -n 1)
    (cd "$cache" && apt-get -q download "$kernel" busybox-static >/dev/null 2>&1) || return 1
    for package in "$cache"/*.deb; do
        dpkg-deb -x "$package" "$cache/unpacked"
    done
    touch "$cache/complete"
}
fetch_guest || { echo "SKIPPED: no kernel for the guest can be downloaded (try apt-get update)"; exit 0; }

root=$work/initramfs
mkdir -p "$root"/{bin,dev,proc,sys,disk,modules}
cp "$cache/unpacked/bin/busybox" "$root/bin/"
# In the order in which they depend on each other.
modules=(virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk
    crc16 crc32c_generic libcrc32c mbcache jbd2 ext4)
for module in "${modules[@]}"; do
    find "$cache/unpacked/lib/modules" -name "$module.ko" -exec cp {} "$root/modules/" \;
done
cat >"$root/init" <<GUEST
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in ${modules[*]}; do
    [ -e /modules/\$module.ko ] && insmod /modules/\$module.ko
done
mount -t ext4 /dev/vda /disk || { echo "guest: no disk"; poweroff -f; }
echo "guest: writing"
(read -r line </dev/console && touch /stop) &
round=0
while [ ! -e /stop ]; do
    round=\$((round + 1))
    file=\$((round % 200))
    dd if=/dev/urandom of=/disk/file-\$file bs=64k count=2 2>/dev/null || break
    (cd /disk && md5sum file-\$file >sum-\$file) || break
    sync || break
    [ \$((round % 10)) = 0 ] && echo "guest: round \$round"
done
umount /disk && echo "guest: \$round rounds, all written"
poweroff -f
GUEST
chmod +x "$root/init"
(cd "$root" && find . | bin/busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$work/initramfs.gz"

# --- The disk, mounted; QEMU uses it as another user --------------------------------------------------------------------

truncate -s 256M "$work/old/disk.img"
"$livemirror" mount --allow-other "$work/old/disk.img" "$work/mnt"
mounted=yes
disk=$work/mnt/disk.img
mkfs.ext4 -q "$disk"
chown "$user" "$disk"

kernel=$(echo "$cache"/unpacked/boot/vmlinuz-*)
cp "$kernel" "$work/vmlinuz"
mkfifo "$work/console"
runuser -u "$user" -- qemu-system-x86_64 -accel tcg -m 256 -nodefaults -no-reboot -display none -serial stdio \
    -kernel "$work/vmlinuz" -initrd "$work/initramfs.gz" -append "console=ttyS0 quiet panic=-1" \
    -drive "file=$disk,format=raw,if=virtio,cache=none" <>"$work/console" >"$work/guest.log" &
vm=$!

# Waits until the guest has said something.
guest_says() {
    until grep -q "$1" "$work/guest.log"; do
        kill -0 "$vm" 2>/dev/null || { cat "$work/guest.log"; echo "the machine ended without '$1'"; exit 1; }
        sleep 0.1
    done
}
# Waits until the guest has written ten more rounds.
guest_goes_on() {
    local round
    round=$(grep -c 'guest: round' "$work/guest.log" || true)
    until (($(grep -c 'guest: round' "$work/guest.log" || true) > round)); do
        kill -0 "$vm" 2>/dev/null || { cat "$work/guest.log"; echo "the machine ended"; exit 1; }
        sleep 0.1
    done
}

guest_says "guest: writing"
guest_goes_on
echo "the machine runs and writes; its disk moves now"
"$livemirror" move "$work/mnt" "$work/new/disk.img"
guest_goes_on
echo "it goes on writing, to $work/new/disk.img"

# --- Off, and a look at the new image -----------------------------------------------------------------------------------

echo stop >"$work/console"
wait "$vm"
vm=
grep 'all written' "$work/guest.log" || { cat "$work/guest.log"; exit 1; }
"$livemirror" unmount "$work/mnt"
mounted=
fsck.ext4 -f -n "$work/new/disk.img" >/dev/null
loop=$(losetup --find --show --read-only "$work/new/disk.img")
mount -o ro "$loop" "$work/check"
(cd "$work/check" && cat sum-* | md5sum --quiet -c)
echo "every file of the machine is on the new image: $(find "$work/check" -name 'file-*' | wc -l) files, nothing lost"
