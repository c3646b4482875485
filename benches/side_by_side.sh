#!/usr/bin/env bash
# What the mounted disk and its mirror cost, side by side with the plain file, with cp, dd and qemu-img, with qemu-storage-daemon, and with
# a null volume (the most that the kernel's FUSE path gives), by public tools only. Prints Markdown for RESULTS.md, writes two charts.
#
#   benches/side_by_side.sh [--quick] [--no-install] [SECTION...]        all of them, unless some are named
#
#   guest-memory, guest-disk (guest: both)      fio on all of these in turns; in memory, and on a disk with O_DIRECT
#   mirror-memory, mirror-disk (mirror: both)   a mirror without load, to the best of cp, dd and qemu-img convert
#   sparse     a mirror of 100 GiB with little data, to one of a full disk with the same data
#   reflink    a mirror within one XFS (a loop device; needs root)
#   ready      time until a mirror is ready under load, to the time without, and the same for QEMU
#   cost       mount, status, mirror, memory and wake-ups of disks of 1 GiB, 1 TiB and 16 TiB with the same data
#   charts     guest latency during a mirror and a cutover; dirty bytes under load
#
# Everything is measured in turns, round by round, so that noise hits all alike: tables show medians, and medians of the rounds' ratios.
# --quick: everything small and once, to see that it works. As root it installs fio, QEMU's tools and xfsprogs where they are missing
# (--no-install: it says only what is missing).
# Environment:
#   LIVEMIRROR    the program (target/release/livemirror)      NULL_VOLUME  the null volume (target/release/examples/null_volume);
#                 these two are built where they are not there, unless another place was named
#   DIR_MEMORY    a directory on tmpfs (/dev/shm)              DIR_DISK     one on a disk (/var/tmp)
#   ROUNDS        rounds of each table (5)                     SECONDS_EACH length of a fio run (0.7)
#   GUEST_MIB     disk of the guest sections (512)             MIRROR_MIB   data of the mirror sections (1024)
#   ROWS          guest rows to run, a pattern (.)             SUBJECTS     guest columns to run, a pattern (.)
#   PACE          speed of the paced mirror (100M)             ENGINE       fio's engine at depths above 1 (libaio)
#   CHARTS        where the charts go (benches/charts)
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "$0")/.." && pwd)
here=$root/benches/side_by_side
sections=(guest-memory guest-disk mirror-memory mirror-disk sparse reflink ready cost charts)

usage() {
    sed -n '5p' "$0" | sed 's/^# */usage: /' >&2
    echo "sections: guest mirror ${sections[*]}" >&2
    exit 2
}

quick='' install=1 chosen=()
for argument in "$@"; do
    case $argument in
        --quick) quick=1 ;;
        --no-install) install='' ;;
        guest | mirror) chosen+=("$argument-memory" "$argument-disk") ;;
        -*) usage ;;
        *)
            [[ " ${sections[*]} " == *" $argument "* ]] || usage
            chosen+=("$argument")
            ;;
    esac
done
((${#chosen[@]})) || chosen=("${sections[@]}")

# shellcheck source=benches/side_by_side/lib.sh
. "$here/lib.sh"
# shellcheck source=benches/side_by_side/tools.sh
. "$here/tools.sh"
# shellcheck source=benches/side_by_side/disks.sh
. "$here/disks.sh"
# shellcheck source=benches/side_by_side/qemu.sh
. "$here/qemu.sh"
# shellcheck source=benches/side_by_side/guest.sh
. "$here/guest.sh"
# shellcheck source=benches/side_by_side/mirror.sh
. "$here/mirror.sh"
# shellcheck source=benches/side_by_side/ready.sh
. "$here/ready.sh"
# shellcheck source=benches/side_by_side/cost.sh
. "$here/cost.sh"
# shellcheck source=benches/side_by_side/charts.sh
. "$here/charts.sh"

install_tools
build_programs
make_places
say_machine
for section in "${chosen[@]}"; do
    started=$SECONDS
    "section_${section//-/_}"
    clear_section
    note "$section took $((SECONDS - started)) s"
done
