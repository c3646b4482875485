#!/usr/bin/env bash
# A disk moves into an object store while it is in use, and is mounted from there: through nbdkit's S3 plugin, over a unix socket.
#
#   examples/s3.sh          in a temporary directory; leaves nothing behind but, in a store of yours, the objects
#
# Environment:
#   LIVEMIRROR     the program (livemirror)
#   S3_ENDPOINT    the store, "http://host:port" (default: one that is started here for the time being: `moto_server`, of the Python
#                  package moto[server])
#   S3_BUCKET      a bucket that is there (default, with the store of this script: disks)
#   S3_KEY         what the objects' names begin with (vm1)
#   AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY    of your store
# Debian: nbdkit, nbdkit-plugin-python, python3-boto3 (1.32 or later of the first two), libnbd-bin to look at the result.
set -euo pipefail

livemirror=${LIVEMIRROR:-livemirror}
size_mib=16
key=${S3_KEY:-vm1}
skip() { echo "SKIPPED: $*"; exit 0; }
for program in nbdkit nbdcopy curl; do
    command -v "$program" >/dev/null || skip "$program is not installed"
done
nbdkit S3 --dump-plugin >/dev/null 2>&1 || skip "nbdkit has no S3 plugin (nbdkit-plugin-python, python3-boto3)"
[[ -n ${S3_ENDPOINT-} ]] || command -v moto_server >/dev/null || skip "no S3_ENDPOINT is given, and there is no moto_server"

work=$(mktemp -d)
store=
clean_up() {
    ! mountpoint -q "$work/mnt" || "$livemirror" unmount "$work/mnt" --wait 20s || "$livemirror" unmount "$work/mnt" --abort
    [[ ! -s $work/nbdkit.pid ]] || kill "$(cat "$work/nbdkit.pid")" 2>/dev/null || true
    [[ -z $store ]] || kill "$store" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

if [[ -z ${S3_ENDPOINT-} ]]; then
    echo "--- a store for the time being"
    export AWS_ACCESS_KEY_ID=example AWS_SECRET_ACCESS_KEY=example AWS_DEFAULT_REGION=us-east-1
    S3_BUCKET=disks
    port=$(shuf -i 20000-30000 -n 1)
    S3_ENDPOINT=http://127.0.0.1:$port
    moto_server -H 127.0.0.1 -p "$port" >"$work/store.log" 2>&1 &
    store=$!
    until curl -s -o /dev/null "$S3_ENDPOINT"; do
        kill -0 "$store" || { cat "$work/store.log"; exit 1; }
        sleep 0.2
    done
    curl -s -f -o /dev/null -X PUT "$S3_ENDPOINT/$S3_BUCKET"
fi
: "${S3_BUCKET:?the bucket}"

echo "--- an NBD server in front of it: each 64 KiB of the disk that are not zero are one object"
uri="nbd+unix:///?socket=$work/nbd.sock"
nbdkit -P "$work/nbdkit.pid" -U "$work/nbd.sock" S3 "endpoint-url=$S3_ENDPOINT" "bucket=$S3_BUCKET" "key=$key" \
    "size=${size_mib}M" object-size=64K
until [[ -S $work/nbd.sock ]]; do sleep 0.1; done

echo "--- a disk that is in use"
mkdir "$work/mnt"
truncate -s "${size_mib}M" "$work/disk.img"
dd if=/dev/urandom of="$work/disk.img" bs=1M count=2 conv=notrunc status=none
disk=$("$livemirror" mount "$work/disk.img" "$work/mnt" --state-dir "$work/state" --control "$work/control" --log-file "$work/log")
write() { head -c 5000 /dev/urandom | dd of="$disk" bs=5000 seek="$1" conv=notrunc,fsync status=none; }
write 3

echo "--- it moves"
"$livemirror" mirror "$disk" "$uri" --wait
write 500
"$livemirror" cutover "$disk" --max-pause 2s --timeout 60s
write 1000
sum=$(sha256sum <"$disk")
"$livemirror" unmount "$work/mnt"

echo "--- and is read from there, by another program and by a new mount"
nbdcopy "$uri" "$work/copy.img"
[[ $(sha256sum <"$work/copy.img") == "$sum" ]] || { echo "the copy differs"; exit 1; }
disk=$("$livemirror" mount "$uri" "$work/mnt" --state-dir "$work/again" --control "$work/control" --log-file "$work/log")
[[ $(sha256sum <"$disk") == "$sum" ]] || { echo "the disk differs"; exit 1; }
"$livemirror" unmount "$work/mnt"
echo "the same $size_mib MiB"
