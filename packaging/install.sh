#!/bin/sh
# Installs livemirror: the binary, the mount helper, the systemd unit, man pages and completions, the latter two made by the
# binary itself.
#
#   packaging/install.sh [BINARY]        BINARY: target/release/livemirror unless told
#
#   PREFIX      where it will live [/usr/local]
#   DESTDIR     put in front of every path, for packages []
#   UNITDIR     where systemd looks for units [PREFIX/lib/systemd/system]
#   SBINDIR     where mount(8) looks for helpers: it knows no other place than /sbin [/sbin]
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
binary=${1:-$top/target/release/livemirror}
prefix=${PREFIX:-/usr/local}
destdir=${DESTDIR:-}
sbindir=${SBINDIR:-/sbin}
unitdir=${UNITDIR:-$prefix/lib/systemd/system}

if [ ! -x "$binary" ]; then
    echo "install.sh: there is no program $binary" >&2
    echo "  hint: cargo build --release" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

install -D -m 755 "$binary" "$destdir$prefix/bin/livemirror"

sed "s|@BINDIR@|$prefix/bin|" "$top/packaging/mount.fuse.livemirror" >"$work/helper"
install -D -m 755 "$work/helper" "$destdir$sbindir/mount.fuse.livemirror"

sed "s|@BINDIR@|$prefix/bin|" "$top/packaging/livemirror@.service" >"$work/unit"
install -D -m 644 "$work/unit" "$destdir$unitdir/livemirror@.service"

mkdir "$work/man"
"$binary" generate man "$work/man"
for page in "$work"/man/*.1; do
    install -D -m 644 "$page" "$destdir$prefix/share/man/man1/${page##*/}"
done

completion() { # SHELL PATH
    "$binary" generate completions "$1" >"$work/completion"
    install -D -m 644 "$work/completion" "$destdir$prefix/share/$2"
}
completion bash bash-completion/completions/livemirror
completion zsh zsh/site-functions/_livemirror
completion fish fish/vendor_completions.d/livemirror.fish

echo "installed $destdir$prefix/bin/livemirror and $destdir$sbindir/mount.fuse.livemirror"
