#!/usr/bin/env bash
# A mirror over NBD side by side with nbdcopy, by public tools only: the same bytes, the same kind of server, a unix socket.
#
#   benches/nbd.sh [target] [source] [thin]     all of them, unless some are named
#
#   target   a raw file to an NBD server that keeps it in memory
#   source   from such a server to a raw file
#   thin     as target, of a file that is mostly holes
#
# Every pair is measured in turns (nbdcopy, mirror, nbdcopy, mirror ...), so that noise hits both alike, each time with a new
# server; medians and the median of the pairs' ratios are printed. Environment:
#   LIVEMIRROR  the program (default: target/release/livemirror)
#   DIR         where images lie (default: a new directory in /dev/shm)
#   PAIRS       pairs of each row (5)    SIZE_MIB  size of the image (1024)
#   PLUGIN      what nbdkit keeps the bytes with ("memory SIZE_MIBM")
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
: "${LIVEMIRROR:=$root/target/release/livemirror}"
: "${PAIRS:=5}" "${SIZE_MIB:=1024}"
: "${PLUGIN:=memory ${SIZE_MIB}M}"
own_dir=
if [[ -z ${DIR:-} ]]; then
    DIR=$(mktemp -d /dev/shm/livemirror-bench-XXXXXX)
    own_dir=1
fi
mount=$DIR/mnt
socket=$DIR/nbd.sock
uri="nbd+unix:///?socket=$socket"

say() { printf '%s\n' "$*"; }
die() { printf 'nbd: %s\n' "$*" >&2; exit 1; }

# By a file: rows are measured in a shell of their own.
stop_server() {
    [[ -s $DIR/nbd.pid ]] || return 0
    local server
    server=$(cat "$DIR/nbd.pid")
    kill "$server" 2> /dev/null || true
    while kill -0 "$server" 2> /dev/null; do sleep 0.01; done
    rm -f "$socket" "$DIR/nbd.pid"
}

clean_up() {
    trap - EXIT
    if mountpoint -q "$mount"; then
        timeout 60 "$LIVEMIRROR" unmount "$mount" --wait 20s || timeout 60 "$LIVEMIRROR" unmount "$mount" --abort || true
    fi
    stop_server
    if [[ -n $own_dir ]]; then rm -rf "$DIR"; fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM

need() {
    local missing=()
    for tool in "$@"; do command -v "$tool" > /dev/null || missing+=("$tool"); done
    [[ ${#missing[@]} == 0 ]] || die "missing: ${missing[*]} (Debian: nbdkit libnbd-bin fuse3)"
}
need nbdkit nbdcopy awk dd fusermount3 mountpoint truncate
[[ -x $LIVEMIRROR ]] || die "missing: $LIVEMIRROR (cargo build --release)"

# shellcheck source=benches/pairs.sh
. "$root/benches/pairs.sh"

start_server() {
    stop_server
    # shellcheck disable=SC2086 # the plugin and its parameters
    nbdkit -P "$DIR/nbd.pid" -U "$socket" $PLUGIN
    for _ in $(seq 200); do
        [[ -S $socket ]] && return
        sleep 0.05
    done
    die "nbdkit does not listen"
}

# mount_disk SOURCE: mounted at $mount, its path in $disk.
mount_disk() {
    mkdir -p "$mount"
    disk=$(timeout 60 "$LIVEMIRROR" mount "$1" "$mount" --state-dir "$DIR/state" --control "$DIR/control" --log-file "$DIR/log")
}
unmount_disk() {
    timeout 60 "$LIVEMIRROR" unmount "$mount" --wait 20s
    rm -rf "$DIR/state"
}

# mirror_seconds TARGET: until it is ready.
mirror_seconds() {
    seconds_of "$LIVEMIRROR" mirror "$disk" "$1" --wait
    timeout 60 "$LIVEMIRROR" cancel "$disk" > /dev/null
}

row() { printf '%-28s %10s %10s %7s\n' "$@"; }

# to_server NAME: $DIR/disk.img to a new server, by both.
to_server() {
    local figures copied mirrored
    mount_disk "$DIR/disk.img"
    figures=$(for _ in $(seq "$PAIRS"); do
        start_server
        copied=$(seconds_of nbdcopy --flush "$DIR/disk.img" "$uri")
        start_server
        mirrored=$(mirror_seconds "$uri")
        stop_server
        printf '%s %s\n' "$copied" "$mirrored"
    done | medians turn)
    unmount_disk
    # shellcheck disable=SC2086
    row "$1" $figures
}

bench_target() {
    dd if=/dev/urandom of="$DIR/disk.img" bs=4M count=$((SIZE_MIB / 4)) status=none
    to_server "raw to NBD"
    rm -f "$DIR/disk.img"
}

bench_thin() {
    truncate -s "${SIZE_MIB}M" "$DIR/disk.img"
    local at
    for ((at = 0; at < SIZE_MIB; at += 16)); do
        dd if=/dev/urandom of="$DIR/disk.img" bs=1M count=1 seek=$at conv=notrunc status=none
    done
    to_server "raw, 1 MiB in 16, to NBD"
    rm -f "$DIR/disk.img"
}

bench_source() {
    local figures copied mirrored
    dd if=/dev/urandom of="$DIR/filling.img" bs=4M count=$((SIZE_MIB / 4)) status=none
    start_server
    nbdcopy "$DIR/filling.img" "$uri"
    rm -f "$DIR/filling.img"
    mount_disk "$uri"
    figures=$(for _ in $(seq "$PAIRS"); do
        copied=$(seconds_of nbdcopy --flush "$uri" "$DIR/copy.img")
        rm -f "$DIR/copy.img"
        mirrored=$(mirror_seconds "$DIR/target.img")
        rm -f "$DIR/target.img"
        printf '%s %s\n' "$copied" "$mirrored"
    done | medians turn)
    unmount_disk
    stop_server
    # shellcheck disable=SC2086
    row "NBD to raw" $figures
}

[[ $# -gt 0 ]] || set -- target source thin
say "livemirror $("$LIVEMIRROR" --version | awk '{ print $2 }'), $(nproc) cores, Linux $(uname -r | cut -d- -f1), load $(cut -d' ' -f1 /proc/loadavg)"
say "$SIZE_MIB MiB, nbdkit $PLUGIN, a unix socket; seconds, and speed to nbdcopy's"
row "" nbdcopy mirror speed
for part in "$@"; do
    case $part in
    target | source | thin) "bench_$part" ;;
    *) die "unknown part: $part (target, source, thin)" ;;
    esac
done
