#!/usr/bin/env bash
# What the mounted disk and the mirror cost, side by side with the plain file and with cp, by public tools only.
#
#   benches/side_by_side.sh [guest] [mirror] [memory]      all of them, unless some are named
#
# Every pair is measured in turns (plain, mounted, plain, mounted ...), so that noise hits both alike; medians and the
# median of the pairs' ratios are printed. Environment:
#   LIVEMIRROR  the program (default: target/release/livemirror)
#   DIR         where images lie (default: a new directory in /dev/shm)
#   PAIRS       pairs of each row (5)    SECONDS_EACH  length of one run (2)    SIZE_MIB  size of the image (1024)
#   ROWS        the guest rows to run, as a pattern (".": all)       ENGINE     fio's engine (libaio)
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
: "${LIVEMIRROR:=$root/target/release/livemirror}"
: "${PAIRS:=5}" "${SECONDS_EACH:=2}" "${SIZE_MIB:=1024}" "${ROWS:=.}" "${ENGINE:=libaio}"
own_dir=
if [[ -z ${DIR:-} ]]; then
    DIR=$(mktemp -d /dev/shm/livemirror-bench-XXXXXX)
    own_dir=1
fi
mount=$DIR/mnt

say() { printf '%s\n' "$*"; }
die() { printf 'side_by_side: %s\n' "$*" >&2; exit 1; }

clean_up() {
    trap - EXIT
    if mountpoint -q "$mount"; then
        timeout 60 "$LIVEMIRROR" unmount "$mount" --wait 20s || timeout 60 "$LIVEMIRROR" unmount "$mount" --abort || true
    fi
    if [[ -n $own_dir ]]; then rm -rf "$DIR"; fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM

need() {
    local missing=()
    for tool in "$@"; do command -v "$tool" > /dev/null || missing+=("$tool"); done
    [[ ${#missing[@]} == 0 ]] || die "missing: ${missing[*]}"
}
need fio cp dd awk fusermount3 mountpoint truncate
[[ -x $LIVEMIRROR ]] || die "missing: $LIVEMIRROR (cargo build --release)"

# Lines "A B" on standard input -> "median-A median-B median-of-B/A".
medians() {
    awk -v turn="${1:-0}" '
        function median(list, count,   i, j, swap) {
            for (i = 2; i <= count; i++)
                for (j = i; j > 1 && list[j - 1] > list[j]; j--) { swap = list[j]; list[j] = list[j - 1]; list[j - 1] = swap }
            return count % 2 ? list[(count + 1) / 2] : (list[count / 2] + list[count / 2 + 1]) / 2
        }
        NF == 2 && $1 > 0 && $2 > 0 { n++; a[n] = $1; b[n] = $2; r[n] = turn ? $1 / $2 : $2 / $1 }
        END { if (n == 0) exit 1; printf "%.2f %.2f %.2f\n", median(a, n), median(b, n), median(r, n) }'
}

header() { printf '\n%-28s %14s %14s %7s\n' "$@"; }
row() { printf '%-28s %14s %14s %7s\n' "$@"; }

random_file() { dd if=/dev/urandom of="$1" bs=4M count=$((SIZE_MIB / 4)) status=none; }

# mount_disk SOURCE: mounted at $mount, its path in $disk.
mount_disk() {
    mkdir -p "$mount"
    timeout 60 "$LIVEMIRROR" mount "$1" "$mount" --state-dir "$DIR/state" --control "$DIR/control" \
        --pidfile "$DIR/pid" --log-file "$DIR/log" > /dev/null
    disk=$mount/$(basename "$1")
}
unmount_disk() {
    timeout 60 "$LIVEMIRROR" unmount "$mount" --wait 20s
    rm -rf "$DIR/state"
}

# fio_figure FILE RW BS DEPTH: requests per second for 4k, MiB per second for the rest.
fio_figure() {
    local column=7 scale=1024
    [[ $3 == 4k ]] && column=8 scale=1
    [[ $2 == *write ]] && column=$((column + 41))
    timeout $((SECONDS_EACH + 60)) fio --name=row --filename="$1" --rw="$2" --bs="$3" --iodepth="$4" --direct=1 \
        --ioengine="$ENGINE" --size="${SIZE_MIB}M" --time_based --runtime="$SECONDS_EACH" --norandommap \
        --randrepeat=0 --output-format=terse --terse-version=3 |
        awk -F';' -v column=$column -v scale=$scale '$1 == 3 { printf "%.2f\n", $column / scale }'
}

guest_rows() { # guest_rows PLAIN DISK [what the second is]
    header "fio direct, $ENGINE" plain "${3:-mounted}" ratio
    while read -r name rw bs depth; do
        [[ $name =~ $ROWS ]] || continue
        local figures
        figures=$(for _ in $(seq "$PAIRS"); do
            printf '%s %s\n' "$(fio_figure "$1" "$rw" "$bs" "$depth")" "$(fio_figure "$2" "$rw" "$bs" "$depth")"
        done | medians)
        # shellcheck disable=SC2086
        row "$name" $figures
    done <<- ROWS_END
		randread-4k-d32 randread 4k 32
		randwrite-4k-d32 randwrite 4k 32
		read-1M-d4 read 1M 4
		write-1M-d4 write 1M 4
	ROWS_END
    say '(4k: requests per second; 1M: MiB per second)'
}

bench_guest() {
    random_file "$DIR/plain.img"
    random_file "$DIR/disk.img"
    mount_disk "$DIR/disk.img"
    guest_rows "$DIR/plain.img" "$disk"
    unmount_disk
    rm -f "$DIR/plain.img" "$DIR/disk.img"
}

# The ceiling: a file system that answers at once and touches no byte.
now() { local t=$EPOCHREALTIME; printf '%s\n' "${t/,/.}"; }
# seconds_of COMMAND...
seconds_of() {
    local start end
    start=$(now)
    timeout 300 "$@" > /dev/null 2>&1
    end=$(now)
    awk -v a="$start" -v b="$end" 'BEGIN { printf "%.4f\n", b - a }'
}

bench_mirror() {
    random_file "$DIR/disk.img"
    mount_disk "$DIR/disk.img"
    header "$SIZE_MIB MiB, seconds" "cp" "mirror" speed
    local figures
    figures=$(for _ in $(seq "$PAIRS"); do
        copied=$(seconds_of cp --sparse=never "$DIR/disk.img" "$DIR/copy.img")
        rm -f "$DIR/copy.img"
        mirrored=$(seconds_of "$LIVEMIRROR" mirror "$disk" "$DIR/target.img" --wait 2> /dev/null)
        timeout 60 "$LIVEMIRROR" cancel "$disk" > /dev/null
        rm -f "$DIR/target.img"
        printf '%s %s\n' "$copied" "$mirrored"
    done | medians turn)
    # shellcheck disable=SC2086
    row "mirror vs cp" $figures
    unmount_disk
    rm -f "$DIR/disk.img"
}

resident_kib() { awk -v field="$1:" '$1 == field { print $2 }' "/proc/$(cat "$DIR/pid")/status"; }

# The server's resident memory with a sparse 16 TiB disk. Its peak (VmHWM) covers the whole mirror.
bench_memory() {
    local apparent=16T
    truncate -s "$apparent" "$DIR/huge.img" || die "this file system has no room for a sparse $apparent file"
    for place in 0 1000 2000000 4000000 8000000 16000000; do # 6 x 64 MiB of data, MiB apart
        dd if=/dev/urandom of="$DIR/huge.img" bs=1M count=64 seek=$place conv=notrunc status=none
    done
    mount_disk "$DIR/huge.img"
    header "server, $apparent sparse, MiB" VmRSS VmHWM ""
    local state
    for state in mounted running ready; do
        case $state in
        running)
            timeout 60 "$LIVEMIRROR" mirror "$disk" "$DIR/huge-target.img" --speed 100M > /dev/null
            sleep 1
            ;;
        ready)
            timeout 60 "$LIVEMIRROR" set "$disk" --speed 0 > /dev/null
            for _ in $(seq 300); do
                timeout 20 "$LIVEMIRROR" status "$disk" --json | grep -q '"ready": *true' && break
                sleep 0.1
            done
            ;;
        esac
        row "$state" "$(($(resident_kib VmRSS) / 1024))" "$(($(resident_kib VmHWM) / 1024))" ""
    done
    timeout 60 "$LIVEMIRROR" cancel "$disk" > /dev/null
    unmount_disk
    rm -f "$DIR/huge.img" "$DIR/huge-target.img"
}

[[ $# -gt 0 ]] || set -- guest mirror memory
say "livemirror $("$LIVEMIRROR" --version | awk '{ print $2 }'), $(nproc) cores, Linux $(uname -r | cut -d- -f1), load $(cut -d' ' -f1 /proc/loadavg)"
for part in "$@"; do
    case $part in
    guest | mirror | memory) "bench_$part" ;;
    *) die "unknown part: $part (guest, mirror, memory)" ;;
    esac
done
