#!/usr/bin/env bash
# Takes the rules of the crate's documentation out of the program, one line at a time, and requires that a test notices.
#
#   tests/mutants.sh              all of them
#   tests/mutants.sh NAME...      those whose file name begins so ("03", "06-stall")
#
# Each tests/mutants/*.patch says in its first lines which rule it breaks, what it takes away, which test must fail, and the
# command that runs it. The tests must pass without any patch, a patch must apply and compile: else the mutant is in error, not
# caught. A test that does not end has failed. Works on a copy of the tree; builds there are kept from run to run.
#
#   MUTANTS_DIR     where the copy and its builds are kept   (default: livemirror-mutants in the temporary directory)
#   TEST_SECONDS    how long a test may take                 (60)
#   BUILD_SECONDS   how long a build may take                (1200)
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=${MUTANTS_DIR:-${TMPDIR:-/tmp}/livemirror-mutants}
tree=$work/tree
log=$work/log
build_seconds=${BUILD_SECONDS:-1200}

# One crate is built over and over, and its tests are short: quick to build matters, quick to run does not.
export CARGO_PROFILE_DEV_OPT_LEVEL=0 CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=1
quick_build=(--config 'profile.dev.package."*".opt-level=0')

# What a patch says of itself: `field NAME PATCH`.
field() {
    sed -n -e '/^--- /q' -e "s/^$1: //p" "$2"
}

# Brings one file of the copy in line with the tree. Never with an older time of change: cargo would take the last build for new.
refresh() {
    mkdir -p "$(dirname "$tree/$1")"
    cmp -s "$root/$1" "$tree/$1" || cp "$root/$1" "$tree/$1"
}

copy_tree() {
    local file
    mkdir -p "$tree"
    # What is gone from the tree goes from the copy too.
    (cd "$tree" && find . -type f -printf '%P\n') | while IFS= read -r file; do
        [[ -e $root/$file ]] || rm -f "$tree/$file"
    done
    git -C "$root" ls-files --cached --others --exclude-standard | while IFS= read -r file; do
        if [[ -f $root/$file ]]; then refresh "$file"; fi
    done
}

# `cargo_words COMMAND`: its environment and its words into the arrays `environment` and `words`.
cargo_words() {
    environment=(CARGO_TARGET_DIR="$work/target")
    read -ra words <<<"$1"
    if [[ $1 == RUSTFLAGS=* ]]; then
        environment=(CARGO_TARGET_DIR="$work/target-shuttle" "RUSTFLAGS=${words[0]#RUSTFLAGS=}")
        words=("${words[@]:1}")
    fi
    words=("${words[@]:0:2}" "${quick_build[@]}" "${words[@]:2}")
}

# Builds what COMMAND would run.
build() {
    local words environment word kept=()
    cargo_words "$1"
    for word in "${words[@]}"; do
        [[ $word == -- ]] && break
        kept+=("$word")
    done
    (cd "$tree" && timeout "$build_seconds" env "${environment[@]}" "${kept[@]}" --no-run) >"$log" 2>&1
}

# Runs COMMAND. 0: its test passed; 124: it did not end; anything else: it failed. 99: there is no such test.
run() {
    local words environment status=0
    cargo_words "$1"
    (cd "$tree" && timeout -k 5 "${TEST_SECONDS:-60}" env "${environment[@]}" "${words[@]}") >"$log" 2>&1 || status=$?
    if ((status == 0)) && grep -q '^running 0 tests' "$log" && ! grep -q '^test .* ok$' "$log"; then return 99; fi
    if ((status == 137)); then status=124; fi
    return "$status"
}

restore() {
    local file
    sed -n 's,^+++ b/\([^[:space:]]*\).*,\1,p' "$1" | while IFS= read -r file; do cp "$root/$file" "$tree/$file"; done
}

# Sets `verdict`.
try() {
    local patch=$1 command status=0
    command=$(field command "$patch")
    if ! patch -d "$tree" -p1 --forward --no-backup-if-mismatch --quiet <"$patch" >"$log" 2>&1; then
        verdict='ERROR: does not apply'
        find "$tree" -name '*.rej' -delete
    elif ! build "$command"; then
        verdict='ERROR: does not compile'
    else
        run "$command" || status=$?
        case $status in
            0) verdict=SURVIVED ;;
            99) verdict='ERROR: no such test' ;;
            124) verdict='caught (it hangs)' ;;
            *) verdict=caught ;;
        esac
    fi
    [[ $verdict == caught* || $verdict == SURVIVED ]] || tail -n 20 "$log" >&2
    restore "$patch"
}

patches=()
for name in "${@:-}"; do
    for patch in "$root/tests/mutants/$name"*.patch; do
        [[ -e $patch ]] || { echo "no such mutant: $name" >&2; exit 2; }
        patches+=("$patch")
    done
done

copy_tree
# Without any patch every one of the tests must pass. Those of one build run together.
declare -A tests_of=()
for patch in "${patches[@]}"; do
    command=$(field command "$patch")
    test=$(field test "$patch")
    [[ -n $(field rule "$patch") && $command == *" -- --exact $test" ]] || { echo "$patch: says no rule, or no such command" >&2; exit 2; }
    tests_of[${command%"$test"}]+=" $test"
done
for command in "${!tests_of[@]}"; do
    if ! build "$command"; then
        tail -n 30 "$log" >&2
        echo "the tree does not compile" >&2
        exit 2
    fi
    TEST_SECONDS=$((${TEST_SECONDS:-60} * 5)) run "$command${tests_of[$command]}" || true
    for test in ${tests_of[$command]}; do
        grep -q "^test $test .*ok$" "$log" && continue
        tail -n 30 "$log" >&2
        echo "does not pass without any mutant: $test" >&2
        exit 2
    done
done

printf '| rule | mutant | test | |\n|---|---|---|---|\n'
bad=0
for patch in "${patches[@]}"; do
    try "$patch"
    [[ $verdict == caught* ]] || bad=1
    printf '| %s | %s | %s | %s |\n' "$(field rule "$patch")" "$(basename "$patch" .patch)" "$(field test "$patch")" "$verdict"
done
exit "$bad"
