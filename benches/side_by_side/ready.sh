# shellcheck shell=bash
# How long a mirror takes until it is ready while a guest writes 4 KiB at random at depth 32, as fast as it can, all over the disk.
# Sourced by ../side_by_side.sh.
# shellcheck disable=SC2154 # settings of lib.sh; work of disks.sh; taken, became_ready of seconds_of and qemu_mirror

# How long the load goes on, and a mirror is waited for, in seconds.
ready_limit() { if [[ -n $quick ]]; then echo 3; else echo 20; fi; }

# start_load NAME SECONDS FIO-OPTIONS...: its process is in $load; returns when it writes. Its log of requests each 50 ms, with
# the time in ms since 1970, goes to $work/NAME_iops.1.log.
start_load() {
    local name=$1 seconds=$2
    shift 2
    rm -f "$work/${name}"_*.log
    fio --name=load --rw=randwrite --bs=4k --iodepth=32 --size="${MIRROR_MIB}M" --time_based --runtime="$seconds" \
        --norandommap --randrepeat=0 --write_iops_log="$work/$name" --log_avg_msec=50 --log_unix_epoch=1 --output="$work/load.out" \
        "$@" > "$work/load.said" 2>&1 &
    load=$!
    processes+=("$load")
    sleep 1
    kill -0 "$load" 2> /dev/null || die "fio does not run: $(cat "$work/load.said")"
}

# Ends the load, if it has not ended by itself. It writes its log now.
stop_load() {
    kill -INT "$load" 2> /dev/null || true
    wait "$load" || true
    processes=("${processes[@]/$load/}")
}

milliseconds() { echo "$((${EPOCHREALTIME/[.,]/} / 1000))"; }

# load_figure NAME FROM TO: requests per second between two moments (ms since 1970). Nothing if none were logged.
load_figure() {
    awk -F '[, ]+' -v from="$2" -v to="$3" '$1 >= from && $1 <= to { sum += $2; n++ } END { if (n) printf "%.0f\n", sum / n }' \
        "$work/$1"_iops.*.log
}

# One mirror under load: `with_load ROW ROUND NAME COMMAND...`, COMMAND sets $taken and $became_ready. Fio's options are in $load_options.
with_load() {
    local row=$1 round=$2 from to figure
    shift 2
    start_load "guest" $(($(ready_limit) + 40)) "${load_options[@]}"
    from=$(milliseconds)
    "$@"
    to=$(milliseconds)
    stop_load
    record "$row" loaded "$round" "$taken"
    [[ $became_ready == true ]] || gave_up+=" $row"
    figure=$(load_figure guest "$from" "$to")
    [[ -z $figure ]] || record "$row" guest "$round" "$figure"
    figure=$(load_figure guest 0 "$from")
    [[ -z $figure ]] || record "$row" before "$round" "$figure"
}

# As qemu_mirror does it: gives up after the limit.
livemirror_until_ready() {
    local start=$EPOCHREALTIME
    became_ready=true
    timeout "$(ready_limit)" "$LIVEMIRROR" mirror "$work/mnt/disk.img" "$work/target.img" --copy-mode "$1" --wait > "$work/said" 2>&1 ||
        became_ready=false
    taken=$(difference "$start" "$EPOCHREALTIME")
    [[ $became_ready == true ]] || (($(ready_limit) <= ${taken%.*} + 1)) || die "the mirror fails: $(sed -n 1p "$work/said")"
    limited "$LIVEMIRROR" cancel "$work/mnt/disk.img" > /dev/null || die "the mirror cannot be cancelled"
}

section_ready() {
    local round mode row load_options gave_up='' qemu=1 why=''
    have qemu-storage-daemon || qemu='' why="qemu-storage-daemon is not installed"
    fio --enghelp | grep -qw nbd || qemu='' why="this fio has no engine for NBD"
    random_file "$work/disk.img" "$MIRROR_MIB"
    random_file "$work/qemu.img" "$MIRROR_MIB"
    mount_disks "$work" mnt '' "$work/disk.img"
    if [[ -n $qemu ]]; then
        local options
        mapfile -t options < <(qemu_file source "$work/qemu.img")
        qemu_start "${options[@]}" --nbd-server "addr.type=unix,addr.path=$work/nbd,max-connections=4" \
            --export type=nbd,id=export,node-name=source,name=disk,writable=on
    fi
    new_table
    for ((round = 1; round <= ROUNDS; round++)); do
        for mode in auto background write-blocking; do
            row="livemirror, $mode"
            livemirror_until_ready "$mode"
            record "$row" idle "$round" "$taken"
            load_options=(--filename="$work/mnt/disk.img" --direct=1 --ioengine="$ENGINE")
            with_load "$row" "$round" livemirror_until_ready "$mode"
        done
        [[ -n $qemu ]] || continue
        for mode in background write-blocking; do
            row="QEMU, $mode, guest over NBD"
            qemu_mirror source "$work/copy.img" $((MIRROR_MIB << 20)) "$mode" 60
            record "$row" idle "$round" "$taken"
            load_options=(--ioengine=nbd --uri="nbd+unix:///disk?socket=$work/nbd")
            with_load "$row" "$round" qemu_mirror source "$work/copy.img" $((MIRROR_MIB << 20)) "$mode" "$(ready_limit)"
        done
    done
    [[ -z $qemu ]] || qemu_stop
    say
    say "## Time to ready under load, on tmpfs ($MIRROR_MIB MiB of data, 4 KiB random writes at depth 32, full speed)"
    say
    table "" 'idle=no load, s;loaded=under load, s;before=writes/s before;guest=writes/s meanwhile' \
        'compare=loaded/idle=time under load to without;guest/before=the guest meanwhile to before'
    say
    say "A mirror that is not ready after $(ready_limit) s is given up; its time is that then.${gave_up:+ Given up:$gave_up.}"
    if [[ -n $qemu ]]; then
        say "QEMU mirrors no disk that it exports writable over FUSE: its guest is fio over NBD, by a unix socket."
    else
        say "No rows of QEMU, whose guest would come over NBD: $why."
    fi
}
