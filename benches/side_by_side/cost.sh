# shellcheck shell=bash
# What disks of 1 GiB, 1 TiB and 16 TiB with the same data cost: the work and the data should count, not the size. Sourced by
# ../side_by_side.sh.
# shellcheck disable=SC2154 # settings of lib.sh; work of disks.sh; taken of seconds_of

# Each size in GiB, and as a column's key.
cost_sizes=(1 1024 16384)
cost_subjects='1=1 GiB;1024=1 TiB;16384=16 TiB'

# "CPU-MS WAKE-UPS" of the processes so far, all threads: nanoseconds on a processor, and the times that one went to sleep by itself.
cost_of_processes() {
    local process
    for process in "$@"; do
        awk '{ print "ns", $1 }' "/proc/$process"/task/*/schedstat
        awk '/^voluntary_ctxt_switches/ { print "woken", $2 }' "/proc/$process"/task/*/status
    done | awk '$1 == "ns" { ns += $2 } $1 == "woken" { woken += $2 } END { printf "%.3f %d\n", ns / 1e6, woken }'
}

# MiB of VmRSS, VmHWM and the like of a process.
memory_of() { awk -v field="$2:" '$1 == field { printf "%.2f\n", $2 / 1024 }' "/proc/$1/status"; }

processes_of() { echo "$(cat "$work/$1.pid") $(status_field "$work/$1" keeper_pid)"; }

# cost_idle SECONDS WORDS: all mounts at once are left alone for so long.
cost_idle() {
    local size cpu_before woken_before cpu woken
    local -A before
    for size in "${cost_sizes[@]}"; do
        # shellcheck disable=SC2086 # two numbers
        before[$size]=$(cost_of_processes ${servers[$size]})
    done
    sleep "$1"
    for size in "${cost_sizes[@]}"; do
        # shellcheck disable=SC2086
        read -r cpu woken < <(cost_of_processes ${servers[$size]})
        read -r cpu_before woken_before <<< "${before[$size]}"
        record "CPU in $1 idle s, ms$2" "$size" 1 "$(awk -v a="$cpu_before" -v b="$cpu" 'BEGIN { print b - a }')"
        record "wake-ups in $1 idle s$2" "$size" 1 "$((woken - woken_before))"
    done
}

section_cost() {
    local size round image pieces=64 piece_mib=4 idle=10 start
    [[ -z $quick ]] || piece_mib=1 idle=2
    for size in "${cost_sizes[@]}"; do
        if ! spread_file "$work/$size.img" $((size << 30)) "$pieces" "$piece_mib" 2> "$work/said"; then
            die "no sparse file of $size GiB on $DIR_MEMORY: $(cat "$work/said")"
        fi
    done
    new_table
    for ((round = 1; round <= ROUNDS; round++)); do
        for size in "${cost_sizes[@]}"; do
            image=$work/$size.img
            start=$EPOCHREALTIME
            mount_disks "$work" mnt '' "$image"
            record "mount, s" "$size" "$round" "$(difference "$start" "$EPOCHREALTIME")"
            seconds_of "$LIVEMIRROR" status "$work/mnt" --json
            record "status, s" "$size" "$round" "$taken"
            mirror_seconds "$work/mnt/$size.img" "$work/target.img"
            record "mirror until ready, s" "$size" "$round" "$taken"
            start=$EPOCHREALTIME
            end_mount livemirror "$work/mnt"
            record "unmount, s" "$size" "$round" "$(difference "$start" "$EPOCHREALTIME")"
            rm -rf "$work/mnt.state"
        done
    done
    local -A servers
    for size in "${cost_sizes[@]}"; do
        mount_disks "$work" "mnt$size" '' "$work/$size.img"
        servers[$size]=$(processes_of "mnt$size")
    done
    sleep 1
    for size in "${cost_sizes[@]}"; do
        record "resident, idle, MiB" "$size" 1 "$(memory_of "${servers[$size]% *}" VmRSS)"
    done
    cost_idle "$idle" ''
    for size in "${cost_sizes[@]}"; do
        limited "$LIVEMIRROR" mirror "$work/mnt$size/$size.img" "$work/target$size.img" --wait > /dev/null 2>&1 || die "the mirror fails"
        record "resident, mirror ready, MiB" "$size" 1 "$(memory_of "${servers[$size]% *}" VmRSS)"
        record "resident at most, MiB" "$size" 1 "$(memory_of "${servers[$size]% *}" VmHWM)"
    done
    sleep 1
    cost_idle "$idle" ', mirror ready'
    say
    say "## Cost in proportion to the work (sparse disks on tmpfs, $((pieces * piece_mib)) MiB of data in $pieces pieces all over each)"
    say
    table "" "$cost_subjects" base=1
    say
    say "In brackets the ratio to 1 GiB. CPU and wake-ups (voluntary context switches) are those of all threads of server and keeper."
}
