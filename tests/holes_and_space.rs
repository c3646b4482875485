//! What a mounted disk takes up and what it says about itself: preallocation, punched holes, zeroed ranges, SEEK_HOLE and
//! SEEK_DATA, st_blocks, statfs, times, modes and owners.

mod common;

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::command::is_root;
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::space::{FallocateFlags, KEEP, PREALLOCATE, PUNCH, ZERO, allocate, seek_data, seek_hole};

const MIB: u64 = 1 << 20;
const CACHES: [&str; 2] = ["cache=writeback", "cache=none"];

fn mount(place: &Place, image: &Path, options: &[&str]) -> (Mounted, File) {
    let mounted = Mount::of(place, [image]).with(options.iter().copied()).start();
    let disk = OpenOptions::new().read(true).write(true).open(mounted.disk("disk.img")).expect("open");
    (mounted, disk)
}

fn blocks(path: &Path) -> u64 {
    fs::metadata(path).expect("stat").blocks()
}

#[test]
fn punching_frees_and_zeroes_exactly_what_was_asked() {
    for cache in CACHES {
        let place = Place::on_disk();
        let image = place.random("disk.img", 8 * MIB + 777, 3);
        let mut model = fs::read(&image).expect("read");
        let (mounted, disk) = mount(&place, &image, &["-o", cache]);
        let before = blocks(&mounted.disk("disk.img"));
        for (start, len) in [(MIB, 4 * MIB), (10, 100), (4_000, 5_000), (6 * MIB + 1, 65_536)] {
            allocate(&disk, PUNCH, start, len).expect("punch");
            model[start as usize..(start + len) as usize].fill(0);
        }
        assert!(fs::read(mounted.disk("disk.img")).expect("read") == model);
        let after = blocks(&mounted.disk("disk.img"));
        assert!(before >= after + 4 * MIB / 512, "{before} blocks before, {after} after freeing 4 MiB");
        assert_eq!(after, blocks(&image), "st_blocks tells the allocation");

        allocate(&disk, PUNCH, 8 * MIB, MIB).expect("across the end");
        allocate(&disk, PUNCH, 20 * MIB, MIB).expect("past the end");
        model[8 << 20..].fill(0);
        assert_eq!(disk.metadata().expect("fstat").len(), 8 * MIB + 777);
        drop(disk);
        mounted.unmount();
        assert!(fs::read(&image).expect("read") == model);
    }
}

#[test]
fn zeroing_keeps_the_size_unless_the_disk_may_grow() {
    for cache in CACHES {
        let place = Place::on_disk();
        let image = place.random("disk.img", 4 * MIB, 4);
        let mut model = fs::read(&image).expect("read");
        let (mounted, disk) = mount(&place, &image, &["-o", cache]);
        for (start, len, mode) in [(5, 10, KEEP), (4_095, 70_000, KEEP), (MIB, MIB, FallocateFlags::empty())] {
            allocate(&disk, ZERO | mode, start, len).expect("zero range");
            model[start as usize..(start + len) as usize].fill(0);
        }
        let past = allocate(&disk, ZERO, 4 * MIB - 10, MIB);
        past.expect_err("a fixed disk does not grow");
        assert_eq!(disk.metadata().expect("fstat").len(), 4 * MIB);
        drop(disk);
        mounted.unmount();
        let found = fs::read(&image).expect("read");
        assert_eq!(found.len(), model.len());
        assert!(found[..4 * MIB as usize - 10] == model[..4 * MIB as usize - 10]);

        let (mounted, disk) = mount(&place, &image, &["--growable", "-o", cache]);
        allocate(&disk, ZERO, 4 * MIB - 10, MIB).expect("zero range");
        model.truncate(4 * MIB as usize - 10);
        model.resize(5 * MIB as usize - 10, 0);
        drop(disk);
        mounted.unmount();
        assert!(fs::read(&image).expect("read") == model);
    }
}

#[test]
fn preallocation_takes_space_and_changes_no_byte() {
    let place = Place::on_disk();
    let image = place.sparse("disk.img", 16 * MIB);
    OpenOptions::new().write(true).open(&image).and_then(|file| file.write_all_at(b"here", 2 * MIB)).expect("write");
    let (mounted, disk) = mount(&place, &image, &[]);
    let path = mounted.disk("disk.img");
    allocate(&disk, PREALLOCATE, 0, 8 * MIB).expect("preallocate");
    assert!(blocks(&path) >= 8 * MIB / 512, "{} blocks", blocks(&path));
    assert_eq!(blocks(&path), blocks(&image));
    let _ = allocate(&disk, KEEP, 15 * MIB, 4 * MIB);
    allocate(&disk, PREALLOCATE, 15 * MIB, 4 * MIB).expect_err("a fixed disk does not grow");
    assert_eq!(disk.metadata().expect("fstat").len(), 16 * MIB);
    for mode in [FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, FallocateFlags::FALLOC_FL_INSERT_RANGE] {
        allocate(&disk, mode, MIB, MIB).expect_err("no disk can do that");
    }
    drop(disk);
    mounted.unmount();
    let mut model = vec![0; 16 * MIB as usize];
    model[2 << 20..][..4].copy_from_slice(b"here");
    assert!(fs::read(&image).expect("read") == model);

    let (mounted, disk) = mount(&place, &image, &["--growable"]);
    allocate(&disk, KEEP, 16 * MIB, MIB).expect("preallocate past the end");
    assert_eq!(disk.metadata().expect("fstat").len(), 16 * MIB);
    allocate(&disk, PREALLOCATE, 16 * MIB, MIB).expect("preallocate and grow");
    assert_eq!(disk.metadata().expect("fstat").len(), 17 * MIB);
    drop(disk);
    mounted.unmount();
    model.resize(17 * MIB as usize, 0);
    assert!(fs::read(&image).expect("read") == model);
}

/// A sparse image with data at its start, in its middle and at its unaligned end.
fn holey(place: &Place, name: &str, tail_is_data: bool) -> PathBuf {
    let image = place.sparse(name, 4 * MIB + 555);
    let file = OpenOptions::new().write(true).open(&image).expect("open");
    file.write_all_at(&[1; 8_192], 0).expect("write");
    file.write_all_at(&[2; 4_096], 2 * MIB).expect("write");
    if tail_is_data {
        file.write_all_at(&[3; 555], 4 * MIB).expect("write");
    }
    image
}

#[test]
fn seek_finds_holes_and_data_exactly_where_the_image_has_them() {
    for tail_is_data in [true, false] {
        let place = Place::on_disk();
        let image = holey(&place, "disk.img", tail_is_data);
        let bare = File::open(&image).expect("open");
        let (mounted, disk) = mount(&place, &image, &[]);
        let size = 4 * MIB + 555;
        let mut offsets = vec![0, 1, 4_095, 4_096, 8_191, 8_192, 8_193, MIB, 2 * MIB - 1, 2 * MIB, 2 * MIB + 4_095];
        offsets.extend([2 * MIB + 4_096, 4 * MIB - 1, 4 * MIB, size - 1, size, size + 1, 1 << 40]);
        for offset in offsets {
            assert_eq!(seek_data(&disk, offset), seek_data(&bare, offset), "SEEK_DATA from {offset}, {tail_is_data}");
            assert_eq!(seek_hole(&disk, offset), seek_hole(&bare, offset), "SEEK_HOLE from {offset}, {tail_is_data}");
        }
        assert_eq!(common::compare::data_of(&mounted.disk("disk.img")), common::compare::data_of(&image));
        drop(disk);
        mounted.unmount();
    }
}

#[test]
fn statfs_tells_the_room_of_the_images_file_system() {
    let place = Place::on_disk();
    let image = holey(&place, "disk.img", true);
    let (mounted, disk) = mount(&place, &image, &[]);
    let ours = nix::sys::statvfs::statvfs(&mounted.disk("disk.img")).expect("statvfs");
    let theirs = nix::sys::statvfs::statvfs(&image).expect("statvfs");
    assert_eq!(ours.blocks() * ours.fragment_size(), theirs.blocks() * theirs.fragment_size());
    let [ours, theirs] = [ours, theirs].map(|statistics| statistics.blocks_available() * statistics.fragment_size());
    // Others use that file system, too.
    assert!(ours.abs_diff(theirs) < theirs / 4, "{ours} bytes available, {theirs} at the image");
    drop(disk);
    mounted.unmount();
}

#[test]
fn the_disk_shows_the_images_mode_owner_and_times() {
    let place = Place::on_disk();
    let image = holey(&place, "disk.img", true);
    fs::set_permissions(&image, Permissions::from_mode(0o640)).expect("chmod");
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    File::options().write(true).open(&image).and_then(|file| file.set_modified(then)).expect("utimens");
    let (mounted, disk) = mount(&place, &image, &[]);
    let (shown, bare) = (disk.metadata().expect("fstat"), fs::metadata(&image).expect("stat"));
    assert_eq!((shown.mode(), shown.uid(), shown.gid()), (bare.mode(), bare.uid(), bare.gid()));
    assert_eq!(shown.modified().expect("mtime"), then);
    assert_eq!((shown.len(), shown.nlink()), (bare.len(), 1));

    disk.write_all_at(&[1], 0).expect("write");
    assert!(disk.metadata().and_then(|data| data.modified()).expect("mtime") > then, "a write moves the mtime");
    disk.set_modified(then).expect("utimens");
    assert_eq!(disk.metadata().and_then(|data| data.modified()).expect("mtime"), then);
    drop(disk);
    mounted.unmount();
}

#[test]
fn chmod_and_chown_change_what_the_mount_shows_and_not_the_image() {
    if !is_root("chown") {
        return;
    }
    let place = Place::on_disk();
    let image = holey(&place, "disk.img", true);
    fs::set_permissions(&image, Permissions::from_mode(0o640)).expect("chmod");
    let (mounted, disk) = mount(&place, &image, &[]);
    let path = mounted.disk("disk.img");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("chmod");
    chown(&path, Some(65_534), Some(65_534)).expect("chown");
    let shown = |path: &Path| {
        let data = fs::metadata(path).expect("stat");
        (data.mode() & 0o777, data.uid(), data.gid())
    };
    assert_eq!(shown(&path), (0o600, 65_534, 65_534));
    assert_eq!(shown(&image), (0o640, 0, 0), "the image keeps its own");
    drop(disk);
    mounted.unmount();
    assert_eq!(shown(&image), (0o640, 0, 0));
    let (mounted, disk) = mount(&place, &image, &[]);
    assert_eq!(shown(&mounted.disk("disk.img")), (0o600, 65_534, 65_534), "kept in the state");
    drop(disk);
    mounted.unmount();
}

#[test]
fn the_mountpoint_lists_the_disks_and_nothing_else() {
    let place = Place::on_disk();
    let image = holey(&place, "disk.img", true);
    let (mounted, disk) = mount(&place, &image, &[]);
    let names: Vec<_> = fs::read_dir(&mounted.mountpoint).expect("readdir").flatten().map(|e| e.file_name()).collect();
    assert_eq!(names, ["disk.img"]);
    assert_eq!(
        mounted.printed.trim(),
        mounted.disk("disk.img").to_str().expect("UTF-8"),
        "mount prints the disks' paths"
    );
    let [inode, again] = [0, 1].map(|_| fs::metadata(mounted.disk("disk.img")).expect("stat").ino());
    assert_eq!(inode, again);
    assert!(fs::metadata(mounted.disk("other.img")).is_err());
    drop(disk);
    mounted.unmount();
}
