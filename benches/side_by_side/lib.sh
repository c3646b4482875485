# shellcheck shell=bash
# Settings, figures and tables. Sourced by ../side_by_side.sh, which says what the settings are.
# shellcheck disable=SC2034,SC2154 # what other files of these read; root, here, quick: of side_by_side.sh

if [[ -n $quick ]]; then
    : "${ROUNDS:=1}" "${SECONDS_EACH:=0.3}" "${GUEST_MIB:=32}" "${MIRROR_MIB:=64}" "${PACE:=4M}"
else
    : "${ROUNDS:=5}" "${SECONDS_EACH:=0.7}" "${GUEST_MIB:=512}" "${MIRROR_MIB:=1024}" "${PACE:=100M}"
fi
: "${ROWS:=.}" "${SUBJECTS:=.}" "${ENGINE:=libaio}"
: "${DIR_MEMORY:=/dev/shm}" "${DIR_DISK:=/var/tmp}" "${CHARTS:=$root/benches/charts}"

say() { printf '%s\n' "$*"; }
note() { printf 'side_by_side: %s\n' "$*" >&2; }
die() {
    note "$*"
    exit 1
}
have() { command -v "$1" > /dev/null; }

# Runs a command that is not worth waiting for without end.
limited() { timeout -k 5 300 "$@"; }

# difference START END: both of $EPOCHREALTIME, in seconds.
difference() { awk -v a="${1/,/.}" -v b="${2/,/.}" 'BEGIN { printf "%.6f\n", b - a }'; }

# seconds_of COMMAND...: how long it took is in $taken; fails as it does.
seconds_of() {
    local start=$EPOCHREALTIME status=0
    limited "$@" > "$work/said" 2>&1 || status=$?
    taken=$(difference "$start" "$EPOCHREALTIME")
    if ((status != 0)); then
        cat "$work/said" >&2
        note "failed: $*"
    fi
    return "$status"
}

# Figures of the table that is being made: lines "row TAB subject TAB round TAB value" in $work/figures.
# record ROW SUBJECT ROUND VALUE
record() { printf '%s\t%s\t%s\t%s\n' "$@" >> "$work/figures"; }

# record_best BEST ROW ROUND SUBJECT...: the smallest figure of these subjects, as one of its own.
record_best() {
    local name=$1 row=$2 round=$3
    shift 3
    awk -F '\t' -v subjects=" $* " -v row="$row" -v round="$round" -v name="$name" '
        $1 == row && $3 == round && index(subjects, " " $2 " ") && (best == "" || $4 < best) { best = $4 }
        END { if (best != "") printf "%s\t%s\t%s\t%s\n", row, name, round, best }' "$work/figures" > "$work/best"
    cat "$work/best" >> "$work/figures"
}

new_table() { : > "$work/figures"; }

# table CORNER SUBJECTS [NAME=VALUE...]: prints the figures; see table.awk for the names.
table() {
    local corner=$1 subjects=$2 options=()
    shift 2
    for option in "$@"; do options+=(-v "$option"); done
    awk -v corner="$corner" -v subjects="$subjects" "${options[@]}" -f "$here/table.awk" "$work/figures"
}

say_machine() {
    local cpu memory
    cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p)
    memory=$(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo)
    say "$(date -u +%Y-%m-%d), $(nproc) cores of ${cpu:-an unnamed processor}, $memory, Linux $(uname -r | cut -d- -f1), load" \
        "$(cut -d' ' -f1 /proc/loadavg); livemirror $("$LIVEMIRROR" --version | awk '{ print $2 }'), $(fio --version)," \
        "QEMU $(qemu_version). Medians of $ROUNDS rounds in turns; ratios are medians of the rounds' ratios."
}
