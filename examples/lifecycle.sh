#!/usr/bin/env bash
# The life of a mount: mount, use, an unmount while it is busy, unmount, a line in /etc/fstab, mount again.
# Needs root; writes nothing outside of a temporary directory (the fstab is one of its own, /sbin is covered in a mount namespace).
set -euo pipefail

livemirror=${LIVEMIRROR:-livemirror}
root=$(cd "$(dirname "$0")/.." && pwd)
((EUID == 0)) || { echo "SKIPPED: this example needs root"; exit 0; }
if [[ -z ${LIFECYCLE_NAMESPACE-} ]]; then
    LIFECYCLE_NAMESPACE=1 exec unshare --mount --propagation private bash "$0"
fi

work=$(mktemp -d)
holder=
clean_up() {
    [[ -z $holder ]] || kill "$holder" 2>/dev/null || true
    ! mountpoint -q "$work/mnt" || umount "$work/mnt" || "$livemirror" unmount "$work/mnt" --abort
    rm -rf "$work"
}
trap clean_up EXIT
mkdir "$work/mnt"
truncate -s 64M "$work/disk.img"

echo "--- mount, and use"
"$livemirror" mount "$work/disk.img" "$work/mnt"
mkfs.ext4 -q "$work/mnt/disk.img"
"$livemirror" status "$work/mnt"
"$livemirror" list

echo "--- busy: nothing unmounts it, and the holder is named"
tail -c 1 -f "$work/mnt/disk.img" >/dev/null &
holder=$!
until [[ -n $(find "/proc/$holder/fd" -lname "$work/mnt/disk.img") ]]; do
    sleep 0.1
done
if fusermount3 -u "$work/mnt"; then
    echo "fusermount3 unmounted a disk in use" && exit 1
fi
if "$livemirror" unmount "$work/mnt" 2>"$work/refusal"; then
    echo "livemirror unmounted a disk in use" && exit 1
fi
cat "$work/refusal"
grep -q "$holder" "$work/refusal"
kill "$holder"
wait "$holder" 2>/dev/null || true
holder=

echo "--- idle: the ordinary umount does"
umount "$work/mnt"
mountpoint -q "$work/mnt" && exit 1

echo "--- through /etc/fstab"
# mount(8) looks for the helper in /sbin and nowhere else: it is installed below a directory of our own, which covers /sbin here.
PREFIX=$work/installed SBINDIR=$work/installed/sbin sh "$root/packaging/install.sh" "$(command -v "$livemirror")"
sbin=$(readlink -f /sbin)
mount -t overlay overlay -o "lowerdir=$work/installed/sbin:$sbin" "$sbin"
echo "$work/disk.img $work/mnt fuse.livemirror noauto,nofail,x-systemd.requires=network.target,cache=none 0 0" >"$work/fstab"
mount -T "$work/fstab" "$work/mnt"
findmnt --noheadings -o FSTYPE,SOURCE "$work/mnt"
fsck.ext4 -f -n "$work/mnt/disk.img" >/dev/null
echo "mounted again: the file system is whole"
"$livemirror" unmount "$work/mnt"
