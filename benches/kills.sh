#!/usr/bin/env bash
# Kills the server of mounts under load, many times, also during cutovers, and checks every byte: how long guests' requests took at
# each kill, errors and lost writes (either fails the run). Prints a table for RESULTS.md.
#
#   benches/kills.sh [KILLS]      for each of three loads (340 unless told otherwise); 50 more under SQLite
set -euo pipefail
cd "$(dirname "$0")/.."

kills=${1:-340}
[[ $kills =~ ^[1-9][0-9]*$ ]] || { echo "usage: benches/kills.sh [KILLS]" >&2; exit 2; }

echo "$(nproc) processors, load $(cut -d ' ' -f 1 /proc/loadavg), Linux $(uname -r)"
run() {
    LIVEMIRROR_KILLS=$kills cargo test --release --test server_is_killed -- --nocapture --exact "$@"
}
echo "| requests | mode | kills | median ms | p99 ms | longest ms | errors | lost |"
echo "|---|---|---|---|---|---|---|---|"
run --ignored as_often_as_told | grep '^|'
LIVEMIRROR_LONG=1 run under_a_database | grep 'transactions$'
