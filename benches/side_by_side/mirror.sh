# shellcheck shell=bash
# How long a mirror takes without load, to what copies the same file otherwise. Sourced by ../side_by_side.sh.
# shellcheck disable=SC2016,SC2154 # scripts of sh; settings of lib.sh, work and work_disk of disks.sh, taken of seconds_of and qemu_mirror

# Seconds until a mirror of DISK into a new TARGET is ready, in $taken. TARGET is removed.
mirror_seconds() {
    local disk=$1 target=$2
    shift 2
    seconds_of "$LIVEMIRROR" mirror "$disk" "$target" "$@" --wait || die "the mirror of $disk fails"
    limited "$LIVEMIRROR" cancel "$disk" > /dev/null || die "the mirror of $disk cannot be cancelled"
}

# copy_seconds SUBJECT SOURCE TARGET [direct]: into a new TARGET, until it is durable, as a mirror is when it is ready.
copy_seconds() {
    local flags=() none=()
    [[ -z ${4-} ]] || flags=(iflag=direct oflag=direct) none=(-t none -T none)
    forget_cache "$2"
    case $1 in
        cp) seconds_of sh -c 'cp --sparse=never "$1" "$2" && sync -d "$2"' cp "$2" "$3" ;;
        dd) seconds_of dd if="$2" of="$3" bs=1M conv=fsync "${flags[@]}" ;;
        convert) seconds_of sh -c 'from=$1 to=$2; shift 2; qemu-img convert -f raw -O raw -W -m 16 "$@" "$from" "$to" && sync -d "$to"' \
            convert "$2" "$3" "${none[@]}" ;;
    esac
}

# qemu_source FILE [direct]: opens it for qemu_mirror, by no export. 1 if there is no qemu-storage-daemon.
qemu_source() {
    have qemu-storage-daemon || return 1
    local options
    mapfile -t options < <(qemu_file source "$@")
    qemu_start "${options[@]}"
}

# mirror_table PLACE OPTIONS [direct]
mirror_table() {
    local place=$1 direct=${3-} round subject absent='' qemu=1 row="mirror of $MIRROR_MIB MiB, s"
    random_file "$place/disk.img" "$MIRROR_MIB"
    random_file "$place/plain.img" "$MIRROR_MIB"
    mount_disks "$place" mnt "$2" "$place/disk.img"
    qemu_source "$place/plain.img" "$direct" || qemu='' absent+='qemu=not installed;'
    local copies=(cp dd)
    if have qemu-img; then copies+=(convert); else absent+='convert=not installed;'; fi
    new_table
    for ((round = 1; round <= ROUNDS; round++)); do
        for subject in "${copies[@]}"; do
            copy_seconds "$subject" "$place/plain.img" "$place/copy.img" "$direct" || die "$subject fails"
            record "$row" "$subject" "$round" "$taken"
            rm -f "$place/copy.img"
        done
        record_best best "$row" "$round" "${copies[@]}"
        mirror_seconds "$place/mnt/disk.img" "$place/target.img" --no-reflink
        record "$row" mirror "$round" "$taken"
        if [[ -n $qemu ]]; then
            qemu_mirror source "$place/copy.img" $((MIRROR_MIB << 20)) "$direct"
            record "$row" qemu "$round" "$taken"
        fi
    done
    [[ -z $qemu ]] || qemu_stop
    say
    table "no load" 'cp=cp --sparse=never;dd=dd bs=1M;convert=qemu-img convert -W -m 16;best=best of the three;mirror=livemirror mirror;qemu=QEMU mirror' \
        mode=speed "absent=$absent" 'compare=mirror/best=speed of the mirror to the best;mirror/cp=to cp;mirror/qemu=to QEMU'
    say
    say "Until the target is durable; the mirror, the start of its command included, until it is ready. QEMU: blockdev-mirror, background," \
        "of the file that cp copies, without any export (QEMU mirrors no disk that it exports writable over FUSE), by a daemon that runs already."
}

section_mirror_memory() {
    say
    say "## Mirror without load, on tmpfs"
    mirror_table "$work" ''
}

section_mirror_disk() {
    say
    say "## Mirror without load, on one disk with O_DIRECT ($(file_system_of "$work_disk"))"
    mirror_table "$work_disk" '-o cache=none' direct
}

section_sparse() {
    local apparent=$((100 << 30)) pieces=256 piece_mib=$((MIRROR_MIB / 256)) round subject absent='' qemu=1
    [[ -z $quick ]] || apparent=$((10 << 30)) pieces=$MIRROR_MIB piece_mib=1
    local -A row=([full]="$MIRROR_MIB MiB, all data" [sparse]="$((apparent >> 30)) GiB apparent, $MIRROR_MIB MiB data in $pieces pieces")
    random_file "$work/full.img" "$MIRROR_MIB"
    spread_file "$work/sparse.img" "$apparent" "$pieces" "$piece_mib"
    mount_disks "$work" mnt '' "$work/full.img" "$work/sparse.img"
    if have qemu-storage-daemon; then
        local options
        mapfile -t options < <(qemu_file full "$work/full.img" && qemu_file sparse "$work/sparse.img")
    else
        qemu='' absent='qemu=not installed'
    fi
    new_table
    for ((round = 1; round <= ROUNDS; round++)); do
        for subject in full sparse; do
            mirror_seconds "$work/mnt/$subject.img" "$work/target.img"
            record "${row[$subject]}" mirror "$round" "$taken"
            record "livemirror: speed of the second to the first" "$subject" "$round" "$taken"
        done
    done
    if [[ -n $qemu ]]; then
        # Its locks and ours exclude each other.
        end_mount livemirror "$work/mnt"
        qemu_start "${options[@]}"
        for ((round = 1; round <= ROUNDS; round++)); do
            for subject in full sparse; do
                qemu_mirror "$subject" "$work/copy.img" "$(stat -c %s "$work/$subject.img")"
                record "${row[$subject]}" qemu "$round" "$taken"
            done
        done
        qemu_stop
    fi
    grep -v '^livemirror:' "$work/figures" > "$work/times"
    grep '^livemirror:' "$work/figures" > "$work/ratios"
    say
    say "## Mirror of a sparse disk, on tmpfs, no load"
    say
    mv "$work/times" "$work/figures"
    table "time to ready, s" 'mirror=livemirror mirror;qemu=QEMU mirror' mode=speed "absent=$absent" 'compare=mirror/qemu=speed to QEMU'
    mv "$work/ratios" "$work/figures"
    say
    table "" 'full=all data, s;sparse=sparse, s' mode=speed 'compare=sparse/full=ratio'
}

# An XFS of its own on a loop device, at $work_disk/xfs; 1 if it cannot be had.
mount_xfs() {
    local mib=$1
    ((EUID == 0)) && have mkfs.xfs || return 1
    mkdir -p "$work_disk/xfs"
    truncate -s "${mib}M" "$work_disk/xfs.img"
    mkfs.xfs -q -m reflink=1 "$work_disk/xfs.img"
    mounts+=("xfs $work_disk/xfs")
    mount -o loop "$work_disk/xfs.img" "$work_disk/xfs" 2> "$work/said"
}

# Data that takes no time to make; what is in it does not matter where blocks are shared.
plain_file() { (set +o pipefail && yes livemirror | head -c "$2M" > "$1") && sync "$1"; }

section_reflink() {
    local mib=10240 round row free absent=''
    [[ -z $quick ]] || mib=256
    say
    say "## Mirror within one XFS (reflink), no load"
    say
    free=$(($(stat -f -c '%a * %S' "$work_disk") / 1048576))
    if ((free < mib * 2)); then
        say "Passed over: DIR_DISK has $free MiB of room, $((mib * 2)) are needed."
        return
    fi
    if ! mount_xfs $((mib * 5 / 2 + 1024)); then
        say "Passed over: no XFS can be mounted (it needs root, xfsprogs and a loop device)."
        return
    fi
    local xfs=$work_disk/xfs
    row="$mib MiB, s"
    plain_file "$xfs/disk.img" "$mib"
    new_table
    for ((round = 1; round <= ROUNDS; round++)); do
        seconds_of sh -c 'cp --reflink=always "$1" "$2" && sync -d "$2"' cp "$xfs/disk.img" "$xfs/copy.img" || die "cp --reflink fails"
        record "$row" cp "$round" "$taken"
        rm -f "$xfs/copy.img"
        # A server of its own for each: what one has shared it counts as taken for as long as it lives.
        mount_disks "$work" mnt '' "$xfs/disk.img"
        mirror_seconds "$work/mnt/disk.img" "$xfs/target.img"
        record "$row" mirror "$round" "$taken"
        end_mount livemirror "$work/mnt"
    done
    # Copies all of it, so once is enough.
    if qemu_source "$xfs/disk.img"; then
        qemu_mirror source "$xfs/copy.img" $((mib << 20))
        qemu_stop
        record "$row" qemu 1 "$taken"
    else
        absent='qemu=not installed'
    fi
    table "" 'mirror=livemirror mirror;cp=cp --reflink=always;qemu=QEMU mirror (once)' \
        mode=speed "absent=$absent" 'compare=mirror/cp=speed of the mirror to cp;mirror/qemu=to QEMU'
    say
    say "QEMU's mirror copies the bytes; it shares no blocks."
}
