//! The target takes up no more than the source: holes are neither read nor written, zeroes become holes, what a guest frees
//! during the mirror is freed on the target, and a target that is used again loses its old data.

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::command::run;
use common::compare::{self, allocated_bytes};
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::random::{self, Random};
use common::space::{FallocateFlags, KEEP, PREALLOCATE, PUNCH, ZERO, allocate};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// A sparse image with `places` pieces of `piece_bytes` random bytes each, one somewhere in each equal part of it.
fn scattered(place: &Place, name: &str, size: u64, places: u64, piece_bytes: u64) -> PathBuf {
    let path = place.sparse(name, size);
    let file = OpenOptions::new().write(true).open(&path).expect("open");
    let mut random = Random::new(random::seed(), 0);
    let part = size / places;
    for number in 0..places {
        let offset = number * part + random.below((part - piece_bytes) / 4096) * 4096;
        file.write_all_at(&random.bytes(piece_bytes as usize), offset).expect("write");
    }
    file.sync_all().expect("fsync");
    path
}

/// The target's allocation is within 1 % of the source's, a few blocks of the file system's own aside.
#[track_caller]
fn assert_as_thin(target: &Path, source: &Path) {
    File::open(source).and_then(|file| file.sync_all()).expect("fsync");
    File::open(target).and_then(|file| file.sync_all()).expect("fsync");
    let (target, source) = (allocated_bytes(target), allocated_bytes(source));
    assert!(target <= source + source / 100 + 65_536, "the target takes up {target} bytes, the source {source}");
}

fn free(disk: &File, mode: FallocateFlags, offset: u64, len: u64) {
    allocate(disk, mode | KEEP, offset, len).expect("fallocate");
}

fn wait_in_sync(mounted: &Mounted) {
    mounted.wait_for("the mirror to be in sync", |volumes| volumes[0]["mirror"]["in_sync"] == true);
}

#[test]
fn a_large_sparse_disk_with_scattered_data() {
    let place = Place::on_disk();
    let (places, piece) = (1_000, 300 * 1024 + 4096 * 2);
    let a = scattered(&place, "a.img", 64 * GIB, places, piece);
    let b = place.at("b.img");
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.wait_ready();
    let job = mounted.job();
    // Data that begins or ends inside a granule may be counted as the whole granule.
    let data_max = places * (piece + 2 * 65_536);
    assert!(job["copied_bytes"].as_u64().is_some_and(|bytes| bytes <= data_max), "holes count as copied: {job}");
    mounted.cutover();
    mounted.unmount();
    assert_as_thin(&b, &a);
    compare::assert_same_content(&a, &b);
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", a.to_str().expect("UTF-8"), b.to_str().expect("UTF-8")]).ok();
}

#[test]
fn data_that_is_zero_becomes_a_hole() {
    let place = Place::on_disk();
    let a = place.file("a.img", &vec![0; 32 << 20]);
    let file = OpenOptions::new().write(true).open(&a).expect("open");
    file.write_all_at(&[1; 4096], 5 * MIB).expect("write");
    let b = place.at("b.img");
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &["--no-reflink"]);
    mounted.cutover();
    mounted.unmount();
    compare::assert_same_content(&a, &b);
    assert!(allocated_bytes(&b) <= 256 * 1024, "{} bytes for 4 KiB of data", allocated_bytes(&b));
}

#[test]
fn preallocated_space_is_no_data() {
    let place = Place::on_disk();
    let a = place.sparse("a.img", 64 * MIB);
    let file = OpenOptions::new().write(true).open(&a).expect("open");
    allocate(&file, PREALLOCATE, 0, 64 * MIB).expect("fallocate");
    let b = place.at("b.img");
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.wait_ready();
    // What the program itself has read, to tell the format, is in the page cache, and the kernel calls that data.
    let copied = mounted.job()["copied_bytes"].as_u64().expect("a number");
    assert!(copied <= 65_536, "{}", mounted.job());
    mounted.cutover();
    mounted.unmount();
    compare::assert_same_content(&a, &b);
    assert_as_thin(&b, &a);
}

fn reused_target(place: &Place, options: &[&str]) {
    let a = scattered(place, "a.img", 64 * MIB, 16, 64 * 1024);
    let b = place.random("b.img", 64 * MIB, random::seed());
    let mounted = Mount::of(place, [&a]).start();
    mounted.mirror(&b, &[&["--existing"], options].concat());
    mounted.cutover();
    mounted.unmount();
    compare::assert_same_content(&a, &b);
    assert_as_thin(&b, &a);
}

#[test]
fn a_reused_target_full_of_old_data() {
    reused_target(&Place::on_disk(), &[]);
}

#[test]
fn a_reused_target_in_memory_in_write_blocking_mode() {
    reused_target(&Place::in_memory(), &["--copy-mode", "write-blocking", "--granularity", "1M"]);
}

/// A larger target with --existing is served up to the recorded size, so that a cutover never changes the disk's size.
#[test]
fn a_larger_target_does_not_change_the_disks_size() {
    let place = Place::in_memory();
    let a = scattered(&place, "a.img", 16 * MIB, 4, 4096);
    let b = place.random("b.img", 20 * MIB, 1);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &["--existing"]);
    mounted.cutover();
    assert_eq!(mounted.disk("a.img").metadata().expect("stat").len(), 16 * MIB);
    assert_eq!(compare::first_difference(&mounted.disk("a.img"), &a), None);
    mounted.unmount();
}

fn freed_by_the_guest(place: &Place, options: &[&str]) {
    let size = 64 * MIB;
    let a = place.random("a.img", size, random::seed());
    let b = place.at("b.img");
    let mounted = Mount::of(place, [&a]).start();
    let disk = OpenOptions::new().read(true).write(true).open(mounted.disk("a.img")).expect("open");

    mounted.mirror(&b, &[&["--speed", "4M"], options].concat());
    assert_eq!(mounted.job()["ready"], false, "too late to free anything before it is ready");
    free(&disk, PUNCH, 0, 16 * MIB);
    free(&disk, PUNCH, 40 * MIB + 5, 3 * MIB + 77);
    free(&disk, ZERO, 20 * MIB, 4 * MIB);
    mounted.verb("set", ["--speed", "0"]).ok();
    mounted.wait_ready();
    free(&disk, PUNCH, 30 * MIB, 8 * MIB);
    free(&disk, ZERO, 48 * MIB + 1_000, 2 * MIB);
    disk.write_all_at(&[7; 70_000], 31 * MIB).expect("write");
    free(&disk, PUNCH, 31 * MIB + 4096, 4096);
    wait_in_sync(&mounted);
    mounted.verb::<&str>("finish", []).ok();
    drop(disk);
    mounted.unmount();

    compare::assert_same_content(&a, &b);
    assert!(allocated_bytes(&a) <= 40 * MIB, "the guest's punches did not reach the source");
    assert_as_thin(&b, &a);
}

#[test]
fn what_the_guest_frees_during_the_mirror_in_background_mode() {
    freed_by_the_guest(&Place::on_disk(), &["--copy-mode", "background"]);
}

#[test]
fn what_the_guest_frees_during_the_mirror_in_write_blocking_mode() {
    freed_by_the_guest(&Place::on_disk(), &["--copy-mode", "write-blocking"]);
}

#[test]
fn what_the_guest_frees_during_the_mirror_in_memory() {
    freed_by_the_guest(&Place::in_memory(), &[]);
}

#[test]
fn a_disk_of_many_tebibytes() {
    let place = Place::on_disk();
    let a = place.sparse("a.img", 15 << 40);
    let file = OpenOptions::new().write(true).open(&a).expect("open");
    for offset in [0, 7 << 40, (15 << 40) - 4096] {
        file.write_all_at(&[9; 4096], offset).expect("write");
    }
    let b = place.at("b.img");
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.cutover();
    mounted.unmount();
    compare::assert_same_content(&a, &b);
    assert_as_thin(&b, &a);
}
