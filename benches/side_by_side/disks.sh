# shellcheck shell=bash
# Places, images and mounts, and their end. Sourced by ../side_by_side.sh.
# shellcheck disable=SC2034,SC2154 # what other files of these read; LIVEMIRROR and the like: of lib.sh and tools.sh

# Mounts that are ours to end: "livemirror PATH", "fuse PATH", "xfs PATH"; processes by id.
mounts=() processes=()

# In $work (on tmpfs) lies what belongs to one section, in $work_disk the same on a disk.
make_places() {
    work=$(mktemp -d "$DIR_MEMORY/livemirror-bench-XXXXXX") || die "DIR_MEMORY: no directory can be made in $DIR_MEMORY"
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    work_disk=$(mktemp -d "$DIR_DISK/livemirror-bench-XXXXXX") || die "DIR_DISK: no directory can be made in $DIR_DISK"
}

# Asks the kernel's table, not the mount: what serves it may be dead.
is_mounted() { grep -qF " $1 " /proc/self/mountinfo; }

unmount_fuse() { umount "$1" 2> /dev/null || fusermount3 -u "$1" 2> /dev/null || umount -l "$1"; }

end_mount() {
    case $1 in
        livemirror)
            limited "$LIVEMIRROR" unmount "$2" --wait 20s > /dev/null ||
                limited "$LIVEMIRROR" unmount "$2" --abort > /dev/null
            ;;
        fuse) unmount_fuse "$2" ;;
        xfs) umount "$2" ;;
    esac
}

# Ends what a section has left: processes first, then mounts, the last one first.
clear_section() {
    local at
    for at in "${!processes[@]}"; do end_process "${processes[at]}"; done
    for ((at = ${#mounts[@]} - 1; at >= 0; at--)); do
        # shellcheck disable=SC2086 # a kind and a path
        if is_mounted "${mounts[at]#* }"; then end_mount ${mounts[at]} || note "still mounted: ${mounts[at]}"; fi
    done
    processes=() mounts=()
    rm -rf --one-file-system "${work:?}"/* "${work_disk:?}"/*
}

forget_process() {
    local process kept=()
    for process in "${processes[@]}"; do [[ $process == "$1" ]] || kept+=("$process"); done
    processes=("${kept[@]}")
}

# end_process PID: only ours.
end_process() {
    kill -TERM "$1" 2> /dev/null || return 0
    for _ in $(seq 200); do
        kill -0 "$1" 2> /dev/null || return 0
        sleep 0.05
    done
    kill -KILL "$1" 2> /dev/null || true
}

clean_up() {
    trap - EXIT INT TERM
    clear_section || true
    rm -rf --one-file-system "$work" "$work_disk"
}

# random_file FILE MIB: past the page cache where that is possible, so that no program starts with it in memory.
random_file() {
    dd if=/dev/urandom of="$1" bs=4M count=$((($2 + 3) / 4)) iflag=fullblock oflag=direct status=none 2> /dev/null ||
        dd if=/dev/urandom of="$1" bs=4M count=$((($2 + 3) / 4)) iflag=fullblock conv=fsync status=none
    truncate -s "$2M" "$1"
}

# spread_file FILE BYTES PIECES PIECE_MIB: a sparse file of BYTES, with PIECES pieces of random data all over it.
spread_file() {
    local piece step=$((($2 >> 20) / $3))
    truncate -s "$2" "$1"
    for ((piece = 0; piece < $3; piece++)); do
        dd if=/dev/urandom of="$1" bs=1M count="$4" seek=$((piece * step)) iflag=fullblock conv=notrunc status=none
    done
}

file_system_of() { df --output=fstype "$1" | tail -n 1; }

forget_cache() { dd if=/dev/null of="$1" oflag=nocache conv=notrunc,fdatasync count=0 status=none 2> /dev/null || true; }

# mount_disks PLACE NAME OPTIONS SOURCE...: the disks are in PLACE/NAME; its log, state, pid and socket lie beside it.
mount_disks() {
    local place=$1 name=$2 options=$3
    shift 3
    mkdir -p "$place/$name"
    mounts+=("livemirror $place/$name")
    # shellcheck disable=SC2086 # options may be several words, or none
    limited "$LIVEMIRROR" mount $options "$@" "$place/$name" --state-dir "$place/$name.state" --control "$place/$name.control" \
        --pidfile "$place/$name.pid" --log-file "$place/$name.log" > /dev/null
}

# mount_null FILE MIB: FILE becomes the null volume; 1 if there is none.
mount_null() {
    [[ -x $NULL_VOLUME ]] || return 1
    : > "$1"
    mounts+=("fuse $1")
    "$NULL_VOLUME" "$1" "$2" >&2 &
    wait_until is_mounted "$1"
}

# wait_until COMMAND...: asks again and again, for a minute.
wait_until() {
    for _ in $(seq 3000); do
        ! "$@" || return 0
        sleep 0.02
    done
    die "waited in vain for: $*"
}

# status_field DISK FIELD: a number or word of its mirror or volume, from `status --json`; empty if there is none.
status_field() {
    limited "$LIVEMIRROR" status "$1" --json 2> /dev/null | sed -n "s/^ *\"$2\": *\"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" | sed -n 1p
}
is_ready() { [[ $(status_field "$1" ready) == true ]]; }

# A mirror that is copying for as long as the guest is measured: it starts anew as soon as it is ready.
# start_mirroring DISK TARGET [OPTIONS]
start_mirroring() {
    rm -f "$work/stop" "$work/failed"
    keep_mirroring "$@" &
    mirroring=$!
    processes+=("$mirroring")
    wait_until mirror_runs_or_failed "$1"
}
mirror_runs_or_failed() { [[ -e $work/failed || -n $(status_field "$1" job_id) ]]; }

keep_mirroring() {
    trap - EXIT
    local disk=$1 target=$2
    shift 2
    while [[ ! -e $work/stop ]]; do
        if ! limited "$LIVEMIRROR" mirror "$disk" "$target" "$@" --wait > "$work/mirror.said" 2>&1 && [[ ! -e $work/stop ]]; then
            mv "$work/mirror.said" "$work/failed"
            return
        fi
        limited "$LIVEMIRROR" cancel "$disk" > /dev/null 2>&1 || true
    done
}

stop_mirroring() {
    : > "$work/stop"
    while kill -0 "$mirroring" 2> /dev/null; do
        limited "$LIVEMIRROR" cancel "$1" > /dev/null 2>&1 || true
        sleep 0.02
    done
    wait "$mirroring" || true
    forget_process "$mirroring"
    [[ ! -e $work/failed ]] || die "the mirror failed: $(sed -n 1p "$work/failed")"
}
