# shellcheck shell=bash
# qemu-storage-daemon, by QMP on its standard input and output. Sourced by ../side_by_side.sh.
# shellcheck disable=SC2034,SC2153,SC2154 # what other files of these read; QEMU_PID: of the coprocess; work: of disks.sh

# qemu_file NODE FILE [direct]: its options for a raw file.
qemu_file() {
    local cache=''
    [[ -z ${3-} ]] || cache=',cache.direct=on,aio=native'
    printf '%s\n' --blockdev "driver=file,node-name=$1-file,filename=$2$cache,discard=unmap" \
        --blockdev "driver=raw,node-name=$1,file=$1-file,discard=unmap"
}

# qemu_start ARGUMENTS...: one at a time. Not in a subshell.
qemu_start() {
    coproc QEMU { exec qemu-storage-daemon --chardev stdio,id=qmp --monitor chardev=qmp "$@" 2> "$work/qemu.log"; }
    qemu_pid=$QEMU_PID
    # A coprocess's own descriptors are lost to subshells.
    exec {qemu_out}<&"${QEMU[0]}" {qemu_in}>&"${QEMU[1]}"
    processes+=("$qemu_pid")
    qemu_do '{"execute":"qmp_capabilities"}' || die "qemu-storage-daemon does not start: $(cat "$work/qemu.log")"
}

qemu_stop() {
    qemu_do '{"execute":"quit"}' || true
    exec {qemu_out}<&- {qemu_in}>&-
    wait "$qemu_pid" || true
    forget_process "$qemu_pid"
}

# qemu_until PATTERN SECONDS: reads its output up to a line with PATTERN, which is in $qemu_line then; fails at an error, at its end and
# when the time is over.
qemu_until() {
    local end=$((SECONDS + $2))
    while ((SECONDS <= end)); do
        if read -r -t 1 -u "$qemu_out" qemu_line; then
            case $qemu_line in
                *"$1"*) return 0 ;;
                *'"error":'*)
                    note "qemu-storage-daemon: $qemu_line"
                    return 1
                    ;;
            esac
        elif ! kill -0 "$qemu_pid" 2> /dev/null; then
            return 1
        fi
    done
    return 1
}

# qemu_do COMMAND: and waits for its answer.
qemu_do() {
    printf '%s\n' "$1" >&"$qemu_in" || return 1
    qemu_until '"return":' 60
}

# qemu_mirror_start NODE TARGET BYTES MODE [direct]: starts a mirror into a new file.
qemu_mirror_start() {
    local node=$1 target=$2 cache='' file
    [[ -z ${5-} ]] || cache=',"cache":{"direct":true},"aio":"native"'
    truncate -s "$3" "$target"
    file='{"driver":"file","filename":"'$target'","discard":"unmap"'$cache'}'
    qemu_do '{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"target","discard":"unmap","file":'"$file"'}}' ||
        die "qemu-storage-daemon does not open $target"
    qemu_do '{"execute":"blockdev-mirror","arguments":{"job-id":"mirror","device":"'"$node"'","target":"target","sync":"full",
        "copy-mode":"'"$4"'"}}' || die "qemu-storage-daemon does not mirror"
}

# Cancels it and removes the target.
qemu_mirror_end() {
    qemu_do '{"execute":"block-job-cancel","arguments":{"device":"mirror","force":true}}' || die "qemu-storage-daemon does not cancel"
    qemu_until '"status": "null"' 60 || die "the cancelled mirror of qemu-storage-daemon does not end"
    qemu_do '{"execute":"blockdev-del","arguments":{"node-name":"target"}}' || die "qemu-storage-daemon does not close the target"
    rm -f "$1"
}

# qemu_mirror NODE TARGET BYTES [direct]: as `livemirror mirror --wait` and a cancel do it: the seconds until it is ready are in $taken.
qemu_mirror() {
    local start=$EPOCHREALTIME
    qemu_mirror_start "$1" "$2" "$3" background "${4-}"
    qemu_until BLOCK_JOB_READY 300 || die "the mirror of qemu-storage-daemon is not ready after five minutes"
    taken=$(difference "$start" "$EPOCHREALTIME")
    qemu_mirror_end "$2"
}
