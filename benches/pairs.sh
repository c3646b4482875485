# shellcheck shell=bash
# What is measured in pairs, in turns: times, and what comes of them. Sourced by nbd.sh and qcow2.sh.

# Lines "A B" on standard input -> "median-A median-B median-of-B/A" ("turn": of A/B).
medians() {
    awk -v turn="${1:+1}" '
        function median(list, count,   i, j, swap) {
            for (i = 2; i <= count; i++)
                for (j = i; j > 1 && list[j - 1] > list[j]; j--) { swap = list[j]; list[j] = list[j - 1]; list[j - 1] = swap }
            return count % 2 ? list[(count + 1) / 2] : (list[count / 2] + list[count / 2 + 1]) / 2
        }
        NF == 2 && $1 > 0 && $2 > 0 { n++; a[n] = $1; b[n] = $2; r[n] = turn ? $1 / $2 : $2 / $1 }
        END { if (n == 0) exit 1; printf "%.3f %.3f %.2f\n", median(a, n), median(b, n), median(r, n) }'
}

now() { local t=$EPOCHREALTIME; printf '%s\n' "${t/,/.}"; }
# seconds_of COMMAND...
seconds_of() {
    local start end
    start=$(now)
    timeout 300 "$@" > /dev/null 2>&1
    end=$(now)
    awk -v a="$start" -v b="$end" 'BEGIN { printf "%.4f\n", b - a }'
}
