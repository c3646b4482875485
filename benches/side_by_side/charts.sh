# shellcheck shell=bash
# Two charts: what a guest waits during a mirror and a cutover, and how much is dirty while a guest writes. Sourced by ../side_by_side.sh.
# shellcheck disable=SC2154 # settings of lib.sh; work of disks.sh; what ready.sh and qemu.sh set

section_charts() {
    mkdir -p "$CHARTS"
    say
    say "## Charts"
    chart_latency
    end_mount livemirror "$work/mnt"
    rm -rf "${work:?}"/*
    chart_dirty
}

# chart FILE TITLE SUBTITLE X-AXIS Y-AXIS EVENTS LOG: lines "series TAB x TAB y" on standard input.
chart() {
    awk -v title="$2" -v subtitle="$3" -v x_axis="$4" -v y_axis="$5" -v events="$6" -v logarithmic="$7" -f "$here/chart.awk" > "$work/chart"
    mv "$work/chart" "$CHARTS/$1"
    say
    say "![$2]($(basename "$CHARTS")/$1)"
}

seconds_since() { awk -v from="$1" -v to="$2" 'BEGIN { printf "%.3f", (to - from) / 1000 }'; }

# Guest latency: an even load, so that a request that waits does not hide behind fewer requests.
chart_latency() {
    local rate=8000 calm=3 begun mirrored ready cut over pause
    [[ -z $quick ]] || calm=1
    random_file "$work/disk.img" "$MIRROR_MIB"
    mount_disks "$work" mnt '' "$work/disk.img"
    local disk=$work/mnt/disk.img
    start_load --filename="$disk" --direct=1 --ioengine="$ENGINE" --iodepth=8 --rate_iops=$rate --write_lat_log="$work/load" \
        --disable_clat=1 --disable_slat=1
    begun=$(milliseconds)
    sleep "$calm"
    mirrored=$(milliseconds)
    seconds_of "$LIVEMIRROR" mirror "$disk" "$work/target.img" --wait || die "the mirror fails"
    ready=$(milliseconds)
    sleep "$calm"
    cut=$(milliseconds)
    seconds_of "$LIVEMIRROR" cutover "$disk" --timeout 60s || die "the cutover fails"
    over=$(milliseconds)
    sleep "$calm"
    stop_load
    pause=$(printf '%.2f' "$(status_field "$disk" pause_ms)")
    # The log is in the order in which requests were answered, nearly: by buckets of 50 ms, and in each by latency.
    awk -F '[, ]+' -v from="$begun" '$1 >= from { print int(($1 - from) / 50), $2 / 1000 }' "$work"/load_lat.*.log |
        sort -k1,1n -k2,2n |
        awk '
            function bucket_ends() {
                if (!n) return
                x = (bucket + 0.5) / 20
                printf "longest\t%.3f\t%s\n99th percentile\t%.3f\t%s\nmedian\t%.3f\t%s\n", x, list[n], x, list[int(n * 0.99 + 0.999)], x, list[int((n + 1) / 2)]
            }
            $1 != bucket { bucket_ends(); n = 0; bucket = $1 }
            { list[++n] = $2 }
            END { bucket_ends() }' > "$work/points"
    chart guest_latency.svg "Guest latency during a mirror and a cutover" \
        "$rate random 4 KiB writes a second on a disk of $MIRROR_MIB MiB on tmpfs; each point: 50 ms; the cutover's pause: $pause ms" \
        "seconds" "latency, µs" \
        "$(seconds_since "$begun" "$mirrored")=mirror starts;$(seconds_since "$begun" "$ready")=ready;$(seconds_since "$begun" "$cut")=cutover" 1 \
        < "$work/points"
    say
    say "| longest request, ms | median of 50 ms | longest of all |"
    say "|---|---|---|"
    latency_row "before the mirror" 0 "$(seconds_since "$begun" "$mirrored")"
    latency_row "until it is ready" "$(seconds_since "$begun" "$mirrored")" "$(seconds_since "$begun" "$ready")"
    latency_row "ready" "$(seconds_since "$begun" "$ready")" "$(seconds_since "$begun" "$cut")"
    latency_row "cutover" "$(seconds_since "$begun" "$cut")" "$(seconds_since "$begun" "$over")"
    latency_row "after it" "$(seconds_since "$begun" "$over")" 1000
    say
    say "The cutover's own pause: $pause ms."
}

# latency_row NAME FROM TO: of the buckets that touch that time.
latency_row() {
    awk -F '\t' -v from="$2" -v to="$3" '$1 == "longest" && $2 + 0.025 >= from && $2 - 0.025 <= to { print $3 / 1000 }' "$work/points" |
        sort -n | awk -v name="$1" '{ list[NR] = $1 } END { if (NR) printf "| %s | %.2f | %.2f |\n", name, list[int((NR + 1) / 2)], list[NR] }'
}

# How much is left to copy, from the mirror's start on, while fio writes 4 KiB at random at full speed.
chart_dirty() {
    local mode limit=8 events='' qemu='' from now ready guest
    [[ -z $quick ]] || limit=2
    random_file "$work/disk.img" "$MIRROR_MIB"
    mount_disks "$work" mnt '' "$work/disk.img"
    : > "$work/points"
    for mode in auto background; do
        start_counted_load --filename="$work/mnt/disk.img" --direct=1 --ioengine="$ENGINE"
        dirty_series "$mode" "$limit"
        stop_load
        dirty_row "livemirror, $mode"
        limited "$LIVEMIRROR" cancel "$work/mnt/disk.img" > /dev/null || die "the mirror cannot be cancelled"
    done
    if [[ -z $(no_qemu_guest) ]]; then
        qemu="; QEMU's guest comes over NBD"
        random_file "$work/qemu.img" "$MIRROR_MIB"
        mapfile -t guest < <(qemu_guest)
        prepare_qemu
        start_counted_load "${guest[@]}"
        qemu_dirty_series "QEMU $(qemu_version), background" "$limit"
        stop_load
        dirty_row "QEMU, background"
        end_qemu
    fi
    chart dirty_bytes.svg "What is left to copy under load" \
        "4 KiB random writes at depth 32, full speed, on a disk of $MIRROR_MIB MiB on tmpfs$qemu" \
        "seconds since the mirror was started" "MiB" "${events#;}" '' < "$work/points"
    say
    say "| copy mode | writes/s | ready after, s | dirty at the end, MiB |"
    say "|---|---|---|---|"
    cat "$work/rows"
}

# dirty_row NAME: of the series whose points were written last, from $from to $now; the load has ended and left its log.
dirty_row() {
    printf '| %s | %s | %s | %.1f |\n' "$1" "$(counted "$from" "$now")" "${ready:-not within $limit}" \
        "$(tail -n 1 "$work/points" | cut -f 3)" >> "$work/rows"
}

# Into $work/points; sets $from and $now (ms since 1970) and $ready (seconds, empty if it was not).
dirty_series() {
    local mode=$1 end status
    ready=''
    from=$(milliseconds)
    end=$((from + $2 * 1000)) now=$from
    limited "$LIVEMIRROR" mirror "$work/mnt/disk.img" "$work/target.img" --copy-mode "$mode" > /dev/null || die "the mirror does not start"
    while ((now < end)); do
        status=$(limited "$LIVEMIRROR" status "$work/mnt/disk.img" --json)
        now=$(milliseconds)
        sed -n 's/^ *"dirty_bytes": \([0-9]*\),*$/\1/p' <<< "$status" |
            awk -v mode="$mode" -v x="$(seconds_since "$from" "$now")" '{ printf "%s\t%s\t%.3f\n", mode, x, $1 / 1048576 }' >> "$work/points"
        if [[ -z $ready && $status == *'"ready": true'* ]]; then
            ready=$(seconds_since "$from" "$now")
            events+=";$ready=ready ($mode)"
        fi
        sleep 0.03
    done
}

qemu_dirty_series() {
    local name=$1 end length offset
    ready=''
    from=$(milliseconds)
    end=$((from + $2 * 1000)) now=$from
    qemu_mirror_start source "$work/copy.img" $((MIRROR_MIB << 20)) background
    while ((now < end)); do
        qemu_do '{"execute":"query-block-jobs"}' || die "qemu-storage-daemon does not tell of its mirror"
        now=$(milliseconds)
        length=${qemu_line##*\"len\": } offset=${qemu_line##*\"offset\": }
        printf '%s\t%s\t%s\n' "$name" "$(seconds_since "$from" "$now")" \
            "$(awk -v a="${length%%[,\}]*}" -v b="${offset%%[,\}]*}" 'BEGIN { printf "%.3f", (a - b) / 1048576 }')" >> "$work/points"
        if [[ -z $ready && $qemu_line == *'"ready": true'* ]]; then
            ready=$(seconds_since "$from" "$now")
            events+=";$ready=ready (QEMU)"
        fi
        sleep 0.03
    done
}
