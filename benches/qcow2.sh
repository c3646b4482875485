#!/usr/bin/env bash
# What the qcow2 format costs: a mirror from qcow2 to qcow2 beside qemu-img convert, and a guest's small writes beside those to a raw disk.
#
#   benches/qcow2.sh [mirror] [guest]      both, unless one is named
#
# Every pair is measured in turns (one, the other, one, the other ...), so that noise hits both alike; medians and the median of
# the pairs' ratios are printed. Environment:
#   LIVEMIRROR  the program (default: target/release/livemirror)
#   DIR         where images lie (default: a new directory in /dev/shm)
#   PAIRS       pairs of each row (5)    SECONDS_EACH  length of one run of fio (2)    SIZE_MIB  data in the image (1024)
#   ROWS        the rows to run, as a pattern (".": all)      ENGINE  fio's engine (libaio)
#   CONVERT     options of qemu-img convert besides (none: its target is not flushed; "-t writeback": it is)
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
: "${LIVEMIRROR:=$root/target/release/livemirror}"
: "${PAIRS:=5}" "${SECONDS_EACH:=2}" "${SIZE_MIB:=1024}" "${ROWS:=.}" "${ENGINE:=libaio}" "${CONVERT:=}"
own_dir=
if [[ -z ${DIR:-} ]]; then
    DIR=$(mktemp -d /dev/shm/livemirror-bench-XXXXXX)
    own_dir=1
fi
mount=$DIR/mnt
# Many more clusters than are written in one run: nearly each write takes a fresh one.
FRESH_GIB=64

say() { printf '%s\n' "$*"; }
die() { printf 'qcow2: %s\n' "$*" >&2; exit 1; }

clean_up() {
    trap - EXIT
    if mountpoint -q "$mount"; then
        timeout 60 "$LIVEMIRROR" unmount "$mount" --wait 20s || timeout 60 "$LIVEMIRROR" unmount "$mount" --abort || true
    fi
    rm -f "$DIR"/{random.img,disk.img,disk.qcow2,target.qcow2}
    if [[ -n $own_dir ]]; then rm -rf "$DIR"; fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM

need() {
    local missing=()
    for tool in "$@"; do command -v "$tool" > /dev/null || missing+=("$tool"); done
    [[ ${#missing[@]} == 0 ]] || die "missing: ${missing[*]}"
}
need fio qemu-img dd awk mountpoint truncate
[[ -x $LIVEMIRROR ]] || die "missing: $LIVEMIRROR (cargo build --release)"

# shellcheck source=benches/pairs.sh
. "$root/benches/pairs.sh"

row() { printf '%-28s %14s %14s %7s\n' "$@"; }

# mount_disk SOURCE: mounted at $mount, its path in $disk.
mount_disk() {
    mkdir -p "$mount"
    timeout 60 "$LIVEMIRROR" mount "$1" "$mount" --state-dir "$DIR/state" --control "$DIR/control" \
        --log-file "$DIR/log" > /dev/null
    disk=$(echo "$mount"/*)
}
unmount_disk() {
    timeout 60 "$LIVEMIRROR" unmount "$mount" --wait 20s
    rm -rf "$DIR/state"
}

# A qcow2 file whose disk is full of random bytes.
full_image() {
    dd if=/dev/urandom of="$DIR/random.img" bs=4M count=$((SIZE_MIB / 4)) status=none
    qemu-img convert -f raw -O qcow2 "$DIR/random.img" "$1"
}

bench_mirror() {
    full_image "$DIR/disk.qcow2"
    rm -f "$DIR/random.img"
    mount_disk "$DIR/disk.qcow2"
    row "$SIZE_MIB MiB, seconds" convert mirror speed
    local figures converted mirrored
    figures=$(for _ in $(seq "$PAIRS"); do
        # shellcheck disable=SC2086
        converted=$(seconds_of qemu-img convert -U -W -m 16 $CONVERT -f qcow2 -O qcow2 "$DIR/disk.qcow2" "$DIR/target.qcow2")
        rm -f "$DIR/target.qcow2"
        mirrored=$(seconds_of "$LIVEMIRROR" mirror "$disk" "$DIR/target.qcow2" --wait)
        timeout 60 "$LIVEMIRROR" cancel "$disk" > /dev/null
        rm -f "$DIR/target.qcow2"
        printf '%s %s\n' "$converted" "$mirrored"
    done | medians turn)
    # shellcheck disable=SC2086
    row "qcow2 to qcow2" $figures
    unmount_disk
    rm -f "$DIR/disk.qcow2"
}

# make_disk FORMAT KIND: $made
make_disk() {
    made=$DIR/disk.img
    [[ $1 == raw ]] || made=$DIR/disk.qcow2
    rm -f "$made"
    case $2 in
        fresh) qemu-img create -q -f "$1" "$made" "${FRESH_GIB}G" ;;
        allocated) qemu-img convert -f raw -O "$1" "$DIR/random.img" "$made" ;;
    esac
}

# requests KIND DEPTH: of 4 KiB to the disk, per second; those to fresh clusters each in a cluster of its own.
requests() {
    local place=(--size="${SIZE_MIB}M")
    [[ $1 == allocated ]] || place=(--size="${FRESH_GIB}G" --blockalign=64k)
    timeout $((SECONDS_EACH + 60)) fio --name=row --filename="$disk" --rw=randwrite --bs=4k --iodepth="$2" --direct=1 \
        --ioengine="$ENGINE" "${place[@]}" --time_based --runtime="$SECONDS_EACH" --norandommap --randrepeat=0 \
        --output-format=terse --terse-version=3 | awk -F';' '$1 == 3 { printf "%.2f\n", $49 }'
}

# figure FORMAT KIND DEPTH
figure() {
    local disk made
    make_disk "$1" "$2"
    mount_disk "$made"
    requests "$2" "$3"
    unmount_disk
    rm -f "$made"
}

bench_guest() {
    dd if=/dev/urandom of="$DIR/random.img" bs=4M count=$((SIZE_MIB / 4)) status=none
    row "4 KiB random write, 1/s" raw qcow2 ratio
    local figures kind depth
    for kind in allocated fresh; do
        for depth in 1 32; do
            [[ "$kind-d$depth" =~ $ROWS ]] || continue
            figures=$(for _ in $(seq "$PAIRS"); do
                printf '%s %s\n' "$(figure raw "$kind" "$depth")" "$(figure qcow2 "$kind" "$depth")"
            done | medians)
            # shellcheck disable=SC2086
            row "$kind-d$depth" $figures
        done
    done
    rm -f "$DIR/random.img"
}

[[ $# -gt 0 ]] || set -- mirror guest
for what in "$@"; do
    case $what in
        mirror | guest) "bench_$what" ;;
        *) die "what is '$what'? (mirror, guest)" ;;
    esac
done
