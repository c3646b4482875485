#!/usr/bin/env bash
# Runs the tests: the quick set, or with --long everything. Installs the Debian packages that they talk to where those are
# missing (as root). The last line is "N passed, N failed", counted over all that was run.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1-}" in
    "") export LIVEMIRROR_LONG= ;;
    --long) export LIVEMIRROR_LONG=1 ;;
    *)
        echo "usage: tests/run.sh [--long]" >&2
        exit 2
        ;;
esac

# program:package that has it
needed=(
    fusermount3:fuse3 fio:fio mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs xfs_io:xfsprogs sqlite3:sqlite3 setfattr:attr
    losetup:mount strace:strace runuser:util-linux flock:util-linux cmp:diffutils shellcheck:shellcheck
    nbdkit:nbdkit nbdcopy:libnbd-bin certtool:gnutls-bin ip:iproute2 nsenter:util-linux sysctl:procps curl:curl
    systemd-analyze:systemd
)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

missing_packages() {
    local entry
    for entry in "${needed[@]}"; do
        command -v "${entry%%:*}" >/dev/null || echo "${entry##*:}"
    done | sort -u
}

# Debian's plain QEMU would take the newer qemu-utils of the backports away: what is installed decides where it comes from.
backports_wanted() {
    [[ $(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null) == *~bpo* ]]
}

codename() {
    sed -n 's/^VERSION_CODENAME=//p' /etc/os-release
}

# A sources.list with the backports suite added, on the mirror that this machine uses already.
backports_sources() {
    local codename mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    codename=$(codename)
    # shellcheck disable=SC2016 # apt's own variables
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(IDENTIFIER)' |
        awk -v release="$codename" '$2 == release && $3 == "Packages" { print $1; exit }')
    [[ -n $mirror ]] || return 1
    cat /etc/apt/sources.list 2>/dev/null || true
    echo "deb [signed-by=$keyring] $mirror $codename-backports main"
}

install_packages() {
    local packages=() apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0) qemu=()
    mapfile -t packages < <(missing_packages)
    command -v qemu-img >/dev/null || packages+=(qemu-utils)
    [[ $(uname -m) != x86_64 ]] || command -v qemu-system-x86_64 >/dev/null || qemu=(qemu-system-x86)
    if ((${#packages[@]} + ${#qemu[@]} == 0)); then
        return
    fi
    if ((EUID != 0)); then
        if ((${#packages[@]})); then
            echo "tests/run.sh: missing: ${packages[*]}; install them, or run this once as root" >&2
            exit 2
        fi
        return
    fi
    if ((${#qemu[@]})) && backports_wanted && backports_sources >"$work/sources.list"; then
        apt+=(-o "Dir::Etc::SourceList=$work/sources.list")
        qemu=(-t "$(codename)-backports" qemu-system-x86 qemu-system-common qemu-utils)
    fi
    "${apt[@]}" update >"$work/apt.log" 2>&1 || true
    if ((${#packages[@]})); then
        echo "installing ${packages[*]}"
        "${apt[@]}" install -y --no-install-recommends "${packages[@]}" >"$work/apt.log" 2>&1 || {
            cat "$work/apt.log" >&2
            echo "tests/run.sh: ${packages[*]} could not be installed" >&2
            exit 2
        }
    fi
    if ((${#qemu[@]})); then
        echo "installing QEMU for the example with a virtual machine"
        "${apt[@]}" install -y --no-install-recommends "${qemu[@]}" >"$work/apt.log" 2>&1 ||
            echo "QEMU could not be installed: the example with a virtual machine will be passed over" >&2
    fi
}

passed=0 failed=0

# One thing that passes or fails as a whole.
check() {
    local name=$1
    shift
    echo "== $name"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $name"
    fi
}

# `cargo test ...`: its tests are counted one by one; what does not even build counts as one.
cargo_tests() {
    local name=$1 status=0 log=$work/cargo.log counts
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$log" || status=$?
    counts=$(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed;.*/\1 \2/p' "$log" |
        awk '{ passed += $1; failed += $2 } END { print passed + 0, failed + 0 }')
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
    if ((status != 0 && ${counts#* } == 0)); then
        failed=$((failed + 1))
        echo "FAILED: $name"
    fi
}

shell_scripts() {
    git ls-files 2>/dev/null | grep -E '\.sh$|^\.ci/run$' || find . -name '*.sh' -not -path './target*'
}

install_packages

mapfile -t scripts < <(shell_scripts)
check "shell scripts" shellcheck --severity=style "${scripts[@]}"

# Some at a time: most tests wait for a disk or for another process.
cargo_tests "tests" cargo test --no-fail-fast -- --test-threads="${LIVEMIRROR_TEST_THREADS:-3}"

# The dirty map under a model checker, and everything on a simulated machine: another build of the crate, so in a directory of its own.
if grep -rqs 'cfg(shuttle)' src && grep -rqs 'shuttle::' src; then
    cargo_tests "all interleavings, and the simulation" \
        env RUSTFLAGS="--cfg shuttle" cargo test --lib --target-dir target-shuttle -- dirty:: simulation::
fi

echo
echo "$passed passed, $failed failed"
((failed == 0))
