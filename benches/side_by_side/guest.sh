# shellcheck shell=bash
# What guests get: the same fio jobs on the plain file, the null volume, a mounted disk (idle, and while it is mirrored) and QEMU's
# FUSE export. Sourced by ../side_by_side.sh.
# shellcheck disable=SC2153,SC2154 # settings of lib.sh; work, work_disk of disks.sh

# name, fio's rw, block size, depth
guest_jobs() {
    cat << 'END'
randread-4k-d1 randread 4k 1
randwrite-4k-d1 randwrite 4k 1
randread-4k-d32 randread 4k 32
randwrite-4k-d32 randwrite 4k 32
read-1M-d1 read 1M 1
write-1M-d1 write 1M 1
read-1M-d4 read 1M 4
write-1M-d4 write 1M 4
read-1M-d32 read 1M 32
write-1M-d32 write 1M 32
END
}

# fio_run FILE RW BS DEPTH: "FIGURE P50": requests per second (4k) or MiB per second, and the median latency in microseconds. At depth 1
# the engine is psync: there is nothing to be asynchronous about.
fio_run() {
    local engine=$ENGINE
    (($4 > 1)) || engine=psync
    limited fio --name=row --filename="$1" --rw="$2" --bs="$3" --iodepth="$4" --direct=1 --ioengine="$engine" \
        --size="${GUEST_MIB}M" --time_based --runtime="$(awk -v s="$SECONDS_EACH" 'BEGIN { printf "%d", s * 1000 }')ms" \
        --norandommap --randrepeat=0 --allow_file_create=0 --lat_percentiles=1 --clat_percentiles=0 --percentile_list=50 \
        --output-format=json --output="$work/fio.json" > "$work/fio.said" 2>&1 || die "fio fails on $1: $(sed -n 1p "$work/fio.said")"
    # shellcheck disable=SC2016 # awk's fields
    awk -v way="\"${2#rand}\"" -v small="$([[ $3 == 4k ]] && echo 1)" '
        $1 == "\"read\"" || $1 == "\"write\"" || $1 == "\"trim\"" { inside = $1 == way }
        !inside { next }
        $1 == "\"bw_bytes\"" { bytes = $3 + 0 }
        $1 == "\"iops\"" { requests = $3 + 0 }
        $1 == "\"50.000000\"" { p50 = $3 / 1000 }
        END { if (requests <= 0) exit 1; printf "%.3f %.2f\n", small ? requests : bytes / 1048576, p50 }' "$work/fio.json"
}

# One subject's figures in a row, into both tables.
guest_measure() { # ROW SUBJECT ROUND FILE RW BS DEPTH
    local row=$1 subject=$2 round=$3 figure p50
    shift 3
    read -r figure p50 < <(fio_run "$@") || die "no figures of $subject in $row"
    record "$row" "$subject" "$round" "$figure"
    [[ $row != *-d1 ]] || printf '%s\t%s\t%s\t%s\n' "$row" "$subject" "$round" "$p50" >> "$work/latencies"
}

guest_subjects='plain=plain file;null=null volume;idle=livemirror idle;mirroring=while mirroring;paced=while mirroring, paced;qemu=QEMU FUSE export'

is_wanted() { [[ $1 =~ $SUBJECTS ]]; }

# The null volume is $place/null then; 1 if it is not there.
guest_null() {
    if [[ ! -x $NULL_VOLUME ]]; then
        absent+='null=not built;'
        note "not built: $NULL_VOLUME (cargo build --release --example null_volume)"
        return 1
    fi
    mount_null "$place/null" "$GUEST_MIB"
}

# QEMU's export is $place/qemu.disk then; 1 if there is no qemu-storage-daemon.
guest_qemu() { # [direct]
    local options
    if ! have qemu-storage-daemon; then
        absent+='qemu=not installed;'
        return 1
    fi
    random_file "$place/qemu.img" "$GUEST_MIB"
    : > "$place/qemu.disk"
    mapfile -t options < <(qemu_file disk "$place/qemu.img" "${1-}")
    mounts+=("fuse $place/qemu.disk")
    qemu_start "${options[@]}" --export "type=fuse,id=export,node-name=disk,mountpoint=$place/qemu.disk,writable=on"
    wait_until is_mounted "$place/qemu.disk"
}

# guest_table PLACE TARGET OPTIONS [direct]
guest_table() {
    local place=$1 target=$2 direct=${4-} absent='' subject subjects=() round name rw bs depth
    local -A file=([plain]=$1/plain.img [null]=$1/null [qemu]=$1/qemu.disk)
    for name in plain disk; do random_file "$place/$name.img" "$GUEST_MIB"; done
    mount_disks "$place" mnt "$3" "$place/disk.img"
    local disk=$place/mnt/disk.img
    for subject in plain null idle mirroring paced qemu; do
        is_wanted "$subject" || continue
        case $subject in
            null) guest_null || continue ;;
            qemu) guest_qemu "$direct" || continue ;;
        esac
        subjects+=("$subject")
    done
    new_table
    : > "$work/latencies"
    for ((round = 1; round <= ROUNDS; round++)); do
        while read -r name rw bs depth; do
            [[ $name =~ $ROWS ]] || continue
            for subject in "${subjects[@]}"; do
                [[ $subject != paced || $name =~ 4k-d32|1M-d4 ]] || continue
                case $subject in
                    mirroring) start_mirroring "$disk" "$target" ;;
                    paced) start_mirroring "$disk" "$target" --speed "$PACE" ;;
                esac
                guest_measure "$name" "$subject" "$round" "${file[$subject]:-$disk}" "$rw" "$bs" "$depth"
                [[ $subject != mirroring && $subject != paced ]] || stop_mirroring "$disk"
            done
        done < <(guest_jobs)
    done
    [[ " ${subjects[*]} " != *" qemu "* ]] || qemu_stop
    say
    table "fio, direct=1" "$guest_subjects" base=plain "absent=$absent" \
        'compare=mirroring/idle=mirroring to idle;paced/idle=paced to idle;idle/null=idle to null;idle/qemu=idle to QEMU'
    say
    say "4k: requests per second, 1M: MiB per second; in brackets the ratio to the plain file. While mirroring: a mirror at full speed" \
        "that starts anew when it is ready, or paced at $PACE a second. Depth 1 with psync, deeper with $ENGINE."
    [[ -s $work/latencies ]] || return 0
    say
    mv "$work/latencies" "$work/figures"
    table "p50 latency at depth 1, µs" "$guest_subjects" base=plain mode=added "absent=$absent"
    say
    say "In brackets what is added to the plain file."
}

section_guest_memory() {
    say
    say "## Guest, on tmpfs ($GUEST_MIB MiB, target on the same tmpfs)"
    guest_table "$work" "$work/target.img" ''
}

section_guest_disk() {
    say
    say "## Guest, on a disk with O_DIRECT ($GUEST_MIB MiB on $(file_system_of "$work_disk"), target on tmpfs)"
    guest_table "$work_disk" "$work/target.img" '-o cache=none' direct
}
