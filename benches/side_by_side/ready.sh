# shellcheck shell=bash
# How long a mirror takes until it is ready while a guest writes 4 KiB at random at depth 32, as fast as it can, all over the disk.
# Sourced by ../side_by_side.sh.
# shellcheck disable=SC2034,SC2153,SC2154 # settings of lib.sh; work of disks.sh; taken for others too

# How long the load goes on, and a mirror is waited for, in seconds.
ready_limit() { if [[ -n $quick ]]; then echo 3; else echo 10; fi; }

# start_load FIO-OPTIONS...: its process is in $load; returns when it has written for a second. Two minutes at most.
start_load() {
    rm -f "$work"/load_*.log "$work/load.runs"
    # Its hook leaves a file where it is.
    (cd "$work" && exec fio --name=load --rw=randwrite --bs=4k --iodepth=32 --size="${MIRROR_MIB}M" --time_based --runtime=120 \
        --norandommap --randrepeat=0 --log_unix_epoch=1 --exec_prerun="touch $work/load.runs" --output=load.out "$@" > load.said 2>&1) &
    load=$!
    processes+=("$load")
    wait_until load_runs
    sleep 1
}
load_runs() {
    kill -0 "$load" 2> /dev/null || die "fio does not run: $(cat "$work/load.said")"
    [[ -e $work/load.runs ]]
}

# As start_load; its log has the requests of each 50 ms.
start_counted_load() { start_load --write_iops_log="$work/load" --log_avg_msec=50 "$@"; }

# Ends the load, if it has not ended by itself. It writes its log now.
stop_load() {
    kill -INT "$load" 2> /dev/null || true
    wait "$load" || true
    forget_process "$load"
}

milliseconds() { echo "$((${EPOCHREALTIME/[.,]/} / 1000))"; }

# counted FROM TO: requests per second of the last counted load between two moments (ms since 1970). Nothing if none were logged.
counted() {
    awk -F '[, ]+' -v from="$1" -v to="$2" '$1 >= from && $1 <= to { sum += $2; n++ } END { if (n) printf "%.0f\n", sum / n }' \
        "$work"/load_iops.*.log
}

# What is measured, as functions of a copy mode: prepare_X, time_X (sets $taken, and $became_ready to "true"; gives up after the limit), end_X.
prepare_livemirror() { :; }
time_livemirror() {
    local start=$EPOCHREALTIME
    became_ready=true
    timeout "$(ready_limit)" "$LIVEMIRROR" mirror "$work/mnt/disk.img" "$work/target.img" --copy-mode "$1" --wait > "$work/said" 2>&1 ||
        became_ready=false
    taken=$(difference "$start" "$EPOCHREALTIME")
    [[ $became_ready == true ]] || (($(ready_limit) <= ${taken%.*} + 1)) || die "the mirror fails: $(sed -n 1p "$work/said")"
}
end_livemirror() { limited "$LIVEMIRROR" cancel "$work/mnt/disk.img" > /dev/null || die "the mirror cannot be cancelled"; }

# A daemon for each mirror: some versions crash when one is cancelled that was under load.
prepare_qemu() {
    local options
    mapfile -t options < <(qemu_file source "$work/qemu.img")
    qemu_start "${options[@]}" --nbd-server "addr.type=unix,addr.path=$work/nbd,max-connections=4" \
        --export type=nbd,id=export,node-name=source,name=disk,writable=on
}
time_qemu() {
    local start=$EPOCHREALTIME
    qemu_mirror_start source "$work/copy.img" $((MIRROR_MIB << 20)) "$1"
    became_ready=true
    qemu_until BLOCK_JOB_READY "$(ready_limit)" || became_ready=false
    taken=$(difference "$start" "$EPOCHREALTIME")
}
end_qemu() {
    qemu_stop
    rm -f "$work/copy.img"
}
# Fio's options for its guest.
qemu_guest() { printf '%s\n' --ioengine=nbd --uri="nbd+unix:///disk?socket=$work/nbd"; }

# Why there are no rows of QEMU; nothing if there can be.
no_qemu_guest() {
    if ! have qemu-storage-daemon; then
        echo "qemu-storage-daemon is not installed"
    elif ! fio --enghelp | grep -qw nbd; then
        echo "this fio has no engine for NBD"
    fi
}

# ready_row ROW ROUND livemirror|qemu MODE FIO-OPTIONS...
ready_row() {
    local row=$1 round=$2 what=$3 mode=$4 from to figure
    shift 4
    "prepare_$what"
    "time_$what" "$mode"
    "end_$what"
    record "$row" idle "$round" "$taken"
    "prepare_$what"
    start_counted_load "$@"
    from=$(milliseconds)
    "time_$what" "$mode"
    to=$(milliseconds)
    stop_load
    "end_$what"
    record "$row" loaded "$round" "$taken"
    [[ $became_ready == true ]] || gave_up+="${gave_up:+; }$row"
    figure=$(counted "$from" "$to")
    [[ -z $figure ]] || record "$row" guest "$round" "$figure"
    figure=$(counted 0 "$from")
    [[ -z $figure ]] || record "$row" before "$round" "$figure"
}

section_ready() {
    local round rounds=$((ROUNDS < 3 ? ROUNDS : 3)) mode gave_up='' why guest
    why=$(no_qemu_guest)
    random_file "$work/disk.img" "$MIRROR_MIB"
    mount_disks "$work" mnt '' "$work/disk.img"
    if [[ -z $why ]]; then
        random_file "$work/qemu.img" "$MIRROR_MIB"
        mapfile -t guest < <(qemu_guest)
    fi
    new_table
    for ((round = 1; round <= rounds; round++)); do
        for mode in auto background write-blocking; do
            ready_row "livemirror, $mode" "$round" livemirror "$mode" \
                --filename="$work/mnt/disk.img" --direct=1 --ioengine="$ENGINE"
            [[ $mode == auto || -n $why ]] || ready_row "QEMU, $mode, guest over NBD" "$round" qemu "$mode" "${guest[@]}"
        done
    done
    say
    say "## Time to ready under load, on tmpfs ($MIRROR_MIB MiB of data, 4 KiB random writes at depth 32, full speed)"
    say
    table "" 'idle=no load, s;loaded=under load, s;before=writes/s before;guest=writes/s meanwhile' \
        'compare=loaded/idle=time under load to without;guest/before=the guest meanwhile to before'
    say
    say "Medians of $rounds rounds. A mirror that is not ready after $(ready_limit) s is given up, its time is that then:" \
        "${gave_up:-none was}."
    if [[ -z $why ]]; then
        say "QEMU mirrors no disk that it exports writable over FUSE: its guest is fio over NBD, by a unix socket."
    else
        say "No rows of QEMU, whose guest would come over NBD: $why."
    fi
}
