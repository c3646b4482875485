# A Markdown table of medians. Input: lines "row TAB subject TAB round TAB value".
#   corner      the first column's title
#   subjects    "key=title;key=title;...": the columns, in order
#   base        each cell also shows the median of the rounds' ratios (value / base's value); none: no ratio
#   mode        ratio (default); speed: base's value / value, for times; added: value - base's value
#   compare     "key/key=title;...": further columns with the ratio of two subjects only
#   absent      "key=why;...": what a cell without figures says (default: a dash)
#   unit        put after each figure

BEGIN {
    FS = "\t"
    if (mode == "") mode = "ratio"
    columns = split(subjects, part, ";")
    for (i = 1; i <= columns; i++) { at = index(part[i], "="); key[i] = substr(part[i], 1, at - 1); title[i] = substr(part[i], at + 1) }
    pairs = split(compare, part, ";")
    for (i = 1; i <= pairs; i++) {
        at = index(part[i], "="); split(substr(part[i], 1, at - 1), two, "/")
        upper[i] = two[1]; lower[i] = two[2]; pair_title[i] = substr(part[i], at + 1)
    }
    reasons = split(absent, part, ";")
    for (i = 1; i <= reasons; i++) { at = index(part[i], "="); why[substr(part[i], 1, at - 1)] = substr(part[i], at + 1) }
}

{
    if (!($1 in seen)) { seen[$1] = 1; row[++rows] = $1 }
    value[$1, $2, $3] = $4
    if ($3 + 0 > rounds) rounds = $3 + 0
}

function median(list, count,   i, j, swap) {
    for (i = 2; i <= count; i++)
        for (j = i; j > 1 && list[j - 1] > list[j]; j--) { swap = list[j]; list[j] = list[j - 1]; list[j - 1] = swap }
    return count % 2 ? list[(count + 1) / 2] : (list[count / 2] + list[count / 2 + 1]) / 2
}

# The median of one subject's figures in a row; "" if it has none.
function middle(name, subject,   round, count, list) {
    for (round = 1; round <= rounds; round++) if ((name, subject, round) in value) list[++count] = value[name, subject, round] + 0
    return count ? median(list, count) : ""
}

# The median of how two subjects compare in the rounds in which both have figures.
function compared(name, a, b, how,   round, count, list, x, y) {
    for (round = 1; round <= rounds; round++) {
        if (!((name, a, round) in value) || !((name, b, round) in value)) continue
        x = value[name, a, round] + 0; y = value[name, b, round] + 0
        if (how == "added") list[++count] = x - y
        else if (how == "speed") { if (x > 0) list[++count] = y / x }
        else if (y > 0) list[++count] = x / y
    }
    return count ? median(list, count) : ""
}

# Three digits at least, with commas.
function shown(x,   text, head) {
    if (x >= 1000) {
        text = sprintf("%.0f", x)
        for (head = ""; length(text) > 3; text = substr(text, 1, length(text) - 3)) head = "," substr(text, length(text) - 2) head
        return text head
    }
    return sprintf(x >= 100 ? "%.0f" : x >= 10 ? "%.1f" : x >= 0.1 || x == 0 ? "%.2f" : "%.4f", x)
}

END {
    line = "| " corner " |"; rule = "|---|"
    for (i = 1; i <= columns; i++) { line = line " " title[i] " |"; rule = rule "---|" }
    for (i = 1; i <= pairs; i++) { line = line " " pair_title[i] " |"; rule = rule "---|" }
    print line; print rule
    for (r = 1; r <= rows; r++) {
        line = "| " row[r] " |"
        for (i = 1; i <= columns; i++) {
            m = middle(row[r], key[i])
            if (m == "") cell = key[i] in why ? why[key[i]] : "–"
            else {
                cell = shown(m) unit
                c = base == "" || base == key[i] ? "" : compared(row[r], key[i], base, mode)
                if (c != "") cell = cell sprintf(mode == "added" ? " (%+.1f)" : " (%.2f)", c)
            }
            line = line " " cell " |"
        }
        for (i = 1; i <= pairs; i++) {
            c = compared(row[r], upper[i], lower[i], mode)
            line = line (c == "" ? " – |" : sprintf(" %.2f |", c))
        }
        print line
    }
}
