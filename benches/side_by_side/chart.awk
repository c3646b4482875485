# An SVG line chart. Input: lines "series TAB x TAB y", x ascending within a series.
#   title, subtitle, x_axis, y_axis      texts
#   events                               "x=text;...": moments, as vertical lines
#   logarithmic                          a logarithmic y axis, if not empty

BEGIN {
    FS = "\t"
    width = 960; height = 460; left = 78; right = 24; top = 84; bottom = 56
    split("#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9", colour, " ")
    moments = split(events, part, ";")
    for (i = 1; i <= moments; i++) { at = index(part[i], "="); when[i] = substr(part[i], 1, at - 1) + 0; what[i] = substr(part[i], at + 1) }
}

NF == 3 {
    if (!($1 in known)) { known[$1] = ++series; name[series] = $1 }
    s = known[$1]
    points++
    of[points] = s; px[points] = $2 + 0; py[points] = $3 + 0
    if (px[points] > x_max) x_max = px[points]
    if (py[points] > y_max) y_max = py[points]
    if (py[points] > 0 && (y_least == "" || py[points] < y_least)) y_least = py[points]
}

function log10(v) { return log(v) / log(10) }
function floor(v,   whole) { whole = int(v); return whole > v ? whole - 1 : whole }
function escaped(text) { gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/>/, "\\&gt;", text); return text }
function x_of(x) { return left + (width - left - right) * x / x_end }
function y_of(y,   share) {
    if (logarithmic != "") { if (y < y_begin) y = y_begin; share = (log10(y) - log10(y_begin)) / (log10(y_end) - log10(y_begin)) }
    else share = y / y_end
    return height - bottom - (height - top - bottom) * share
}

# 1, 2 or 5 times a power of ten, so that there are at most `count` steps up to v.
function step_for(v, count,   power, size) {
    if (v <= 0) return 1
    size = v / count; power = 10 ^ floor(log10(size))
    return (size <= power ? 1 : size <= 2 * power ? 2 : size <= 5 * power ? 5 : 10) * power
}
function number(v) { return v >= 1 || v == 0 ? sprintf("%.10g", v) : sprintf("%.3g", v) }
function text(x, y, anchor, size, fill, words, more) {
    printf "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" font-size=\"%d\" fill=\"%s\"%s>%s</text>\n", x, y, anchor, size, fill, more, escaped(words)
}
function line(x1, y1, x2, y2, stroke, more) {
    printf "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"%s/>\n", x1, y1, x2, y2, stroke, more
}

END {
    if (points == 0) { print "no points" > "/dev/stderr"; exit 1 }
    x_step = step_for(x_max, 12); x_end = x_max
    if (logarithmic != "") {
        y_begin = 10 ^ floor(log10(y_least)); y_end = 10 ^ -floor(-log10(y_max))
        if (y_end <= y_begin) y_end = y_begin * 10
    } else { y_step = step_for(y_max, 8); y_end = y_step * -floor(-y_max / y_step); if (y_end == 0) y_end = 1 }

    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\">\n", width, height, width, height
    printf "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n", width, height
    text(left, 24, "start", 17, "#222", title); text(left, 42, "start", 12, "#555", subtitle)

    for (x = 0; x <= x_end + x_step / 1000; x += x_step) {
        line(x_of(x), top, x_of(x), height - bottom, "#e6e6e6")
        text(x_of(x), height - bottom + 18, "middle", 12, "#444", number(x))
    }
    if (logarithmic != "") {
        for (y = y_begin; y <= y_end * 1.001; y *= 10) {
            for (k = 2; k < 10 && y < y_end * 0.999; k++) line(left, y_of(k * y), width - right, y_of(k * y), "#f3f3f3")
            line(left, y_of(y), width - right, y_of(y), "#dcdcdc")
            text(left - 8, y_of(y) + 4, "end", 12, "#444", number(y))
        }
    } else for (y = 0; y <= y_end + y_step / 1000; y += y_step) {
        line(left, y_of(y), width - right, y_of(y), "#e6e6e6")
        text(left - 8, y_of(y) + 4, "end", 12, "#444", number(y))
    }
    line(left, height - bottom, width - right, height - bottom, "#444"); line(left, top, left, height - bottom, "#444")
    text((left + width - right) / 2, height - 14, "middle", 13, "#222", x_axis)
    text(20, (top + height - bottom) / 2, "middle", 13, "#222", y_axis, sprintf(" transform=\"rotate(-90 20 %.1f)\"", (top + height - bottom) / 2))

    for (i = 1; i <= moments; i++) {
        if (when[i] > x_end) continue
        line(x_of(when[i]), top, x_of(when[i]), height - bottom, "#666", " stroke-dasharray=\"4 3\"")
        end = x_of(when[i]) > width - 150
        text(x_of(when[i]) + (end ? -5 : 5), top + 13 + 15 * ((i - 1) % 3), end ? "end" : "start", 12, "#444", what[i], " stroke=\"white\" stroke-width=\"3\" paint-order=\"stroke\"")
    }
    for (s = 1; s <= series; s++) {
        printf "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.6\" stroke-linejoin=\"round\" points=\"", colour[s]
        for (p = 1; p <= points; p++) if (of[p] == s) printf "%.1f,%.1f ", x_of(px[p]), y_of(py[p])
        print "\"/>"
    }
    at = left
    for (s = 1; s <= series; s++) {
        line(at, 62, at + 22, 62, colour[s], " stroke-width=\"3\""); text(at + 28, 66, "start", 12, "#222", name[s])
        at += 48 + 7 * length(name[s])
    }
    print "</svg>"
}
