# shellcheck shell=bash
# The programs that are compared: installed and built where they are missing. Sourced by ../side_by_side.sh.
# shellcheck disable=SC2154 # root, install, chosen: of side_by_side.sh

# program:package that has it
needed=(
    fio:fio qemu-img:qemu-utils qemu-storage-daemon:qemu-utils mkfs.xfs:xfsprogs losetup:mount mountpoint:util-linux fusermount3:fuse3
)

missing_packages() {
    local entry
    for entry in "${needed[@]}"; do
        have "${entry%%:*}" || echo "${entry##*:}"
    done | sort -u
}

# Nothing is ever removed for it. A Debian that has QEMU's storage daemon in another package gets that one.
install_tools() {
    local packages=() apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0) log
    mapfile -t packages < <(missing_packages)
    ((${#packages[@]})) || return 0
    if [[ -z $install ]] || ((EUID != 0)) || ! have apt-get; then
        note "not installed: ${packages[*]} (as root on Debian this script installs them)"
    else
        log=$(mktemp)
        "${apt[@]}" update > "$log" 2>&1 || true
        for package in "${packages[@]}"; do
            note "installing $package"
            "${apt[@]}" install -y --no-remove --no-install-recommends "$package" > "$log" 2>&1 || note "$(tail -n 1 "$log")"
        done
        have qemu-storage-daemon ||
            "${apt[@]}" install -y --no-remove --no-install-recommends qemu-system-common > "$log" 2>&1 || true
        rm -f "$log"
    fi
    have fio || die "fio is needed"
    have qemu-storage-daemon || note "without qemu-storage-daemon its rows read \"not installed\""
}

qemu_version() {
    if have qemu-storage-daemon; then
        qemu-storage-daemon --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p'
    else
        echo "not installed"
    fi
}

# What is not there is built, unless it was named. The null volume is for guests' sections, which can do without.
build_programs() {
    local build=() release=$root/target/release
    [[ -n ${LIVEMIRROR-} || -x $release/livemirror ]] || build+=(--bin livemirror)
    [[ -n ${NULL_VOLUME-} || -x $release/examples/null_volume || " ${chosen[*]}" != *" guest-"* || ! null =~ $SUBJECTS ]] ||
        build+=(--example null_volume)
    if ((${#build[@]})) && have cargo; then (cd "$root" && cargo build --release "${build[@]}" >&2); fi
    : "${LIVEMIRROR:=$release/livemirror}" "${NULL_VOLUME:=$release/examples/null_volume}"
    [[ -x $LIVEMIRROR ]] || die "missing: $LIVEMIRROR (cargo build --release)"
}
