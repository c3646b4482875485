//! The size of a mounted disk and what happens at its end: reads and writes at and past it, truncates, appends. A disk keeps
//! its size, as a block device does, unless it was mounted `--growable`; then it behaves as any file.

mod common;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use common::aligned::Aligned;
use common::command::long;
use common::compare;
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::random::{self, Random};

const SIZE: u64 = (1 << 20) + 1_234;
/// Both uses of the host's page cache: everything here holds for each.
const CACHES: [&str; 2] = ["cache=writeback", "cache=none"];

fn mount(place: &Place, options: &[&str]) -> (Mounted, PathBuf) {
    let image = place.random("disk.img", SIZE, 5);
    let mounted = Mount::of(place, [&image]).with(options.iter().copied()).start();
    (mounted, image)
}

fn open(path: &Path, flags: i32) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).expect("open")
}

fn size(path: &Path) -> u64 {
    path.metadata().expect("stat").len()
}

#[test]
fn reads_are_short_at_the_end_and_empty_past_it() {
    for cache in CACHES {
        let place = Place::on_disk();
        let (mounted, image) = mount(&place, &["-o", cache]);
        let content = std::fs::read(&image).expect("read");
        for flags in [0, libc::O_DIRECT] {
            let disk = open(&mounted.disk("disk.img"), flags);
            let mut bytes = Aligned::zeroed(1 << 16);
            let read = |bytes: &mut [u8], at| disk.read_at(bytes, at).expect("read");
            assert_eq!(read(&mut bytes, SIZE), 0, "at the end");
            assert_eq!(read(&mut bytes, SIZE + 1), 0, "past the end");
            assert_eq!(read(&mut bytes, 1 << 50), 0, "far past the end");
            assert_eq!(read(&mut bytes, SIZE - 1), 1, "the last byte");
            assert_eq!(bytes[0], content[SIZE as usize - 1]);
            assert_eq!(read(&mut bytes, 1 << 20), 1_234, "across the end");
            assert_eq!(bytes[..1_234], content[1 << 20..]);
            assert_eq!(read(&mut bytes, 4_096), 1 << 16);
            assert_eq!(bytes[..], content[4_096..][..1 << 16]);
        }
        assert_eq!(size(&mounted.disk("disk.img")), SIZE);
        assert!(std::fs::read(mounted.disk("disk.img")).expect("read") == content);
        mounted.unmount();
    }
}

#[test]
fn a_fixed_disk_takes_no_write_past_its_end() {
    for cache in CACHES {
        let place = Place::on_disk();
        let (mounted, image) = mount(&place, &["-o", cache]);
        let disk = open(&mounted.disk("disk.img"), 0);
        for offset in [SIZE, SIZE + 4_096, 1 << 40] {
            let error = disk.write_at(&[1; 512], offset).expect_err("a write past the end");
            let errno = error.raw_os_error();
            assert!(matches!(errno, Some(libc::ENOSPC | libc::EFBIG)), "at {offset}: {error}");
        }
        // Across the end: what fits, or nothing.
        match disk.write_at(&[2; 1_000], SIZE - 100) {
            Ok(written) => assert_eq!(written, 100),
            Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EFBIG)), "{error}"),
        }
        disk.write_all_at(&[3; 100], SIZE - 100).expect("up to the end");
        drop(disk);
        assert_eq!(size(&mounted.disk("disk.img")), SIZE);
        mounted.unmount();
        assert_eq!(size(&image), SIZE);
        assert!(std::fs::read(&image).expect("read").ends_with(&[3; 100]));
    }
}

#[test]
fn a_fixed_disk_cannot_be_truncated_or_appended_to() {
    let place = Place::on_disk();
    let (mounted, image) = mount(&place, &[]);
    let before = std::fs::read(&image).expect("read");
    let disk = mounted.disk("disk.img");
    open(&disk, 0).set_len(SIZE).expect("to the size that it has");
    for wanted in [0, 512, SIZE - 1, SIZE + 1, SIZE * 2] {
        open(&disk, 0).set_len(wanted).expect_err("a truncate");
    }
    File::create(&disk).expect_err("O_TRUNC");
    OpenOptions::new().append(true).open(&disk).and_then(|mut file| file.write_all(b"more")).expect_err("O_APPEND");
    assert_eq!(size(&disk), SIZE);
    std::fs::remove_file(&disk).expect_err("the disk cannot be removed");
    std::fs::rename(&disk, mounted.disk("other")).expect_err("nor renamed");
    File::create_new(mounted.disk("new")).expect_err("nor can there be another file");
    mounted.unmount();
    assert!(std::fs::read(&image).expect("read") == before, "a refused request changed the image");
}

#[test]
fn a_read_only_mount_takes_no_write() {
    let place = Place::on_disk();
    let (mounted, image) = mount(&place, &["--read-only"]);
    let before = std::fs::read(&image).expect("read");
    let refused = OpenOptions::new().write(true).open(mounted.disk("disk.img")).expect_err("open for writing");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    assert!(std::fs::read(mounted.disk("disk.img")).expect("read") == before);
    mounted.unmount();
    assert!(std::fs::read(&image).expect("read") == before);
}

#[test]
fn a_growable_disk_grows_and_shrinks_like_a_file() {
    for cache in CACHES {
        let place = Place::on_disk();
        let (mounted, image) = mount(&place, &["--growable", "-o", cache]);
        let path = mounted.disk("disk.img");
        let disk = open(&path, 0);
        let mut model = std::fs::read(&image).expect("read");
        let check = |model: &[u8], what: &str| {
            assert_eq!(size(&path), model.len() as u64, "{what}");
            assert!(std::fs::read(&path).expect("read") == model, "{what}");
        };

        disk.write_all_at(&[1; 1_000], SIZE + 5_000).expect("write");
        model.resize(SIZE as usize + 5_000, 0);
        model.extend([1; 1_000]);
        check(&model, "a write past the end leaves zeroes between");
        disk.set_len(700_001).expect("truncate");
        model.truncate(700_001);
        check(&model, "shorter");
        disk.set_len(800_000).expect("truncate");
        model.resize(800_000, 0);
        check(&model, "longer again: zeroes, not what was there once");
        open(&path, libc::O_DIRECT).write_all_at(&Aligned::zeroed(4_096), 800_000 / 4096 * 4096).expect("write");
        let end = 800_000 / 4096 * 4096 + 4096;
        model.resize(end, 0);
        model[end - 4096..].fill(0);
        check(&model, "a direct write across the end");
        OpenOptions::new().append(true).open(&path).and_then(|mut file| file.write_all(b"more")).expect("O_APPEND");
        model.extend(b"more");
        check(&model, "appended");
        File::create(&path).and_then(|mut file| file.write_all(b"anew")).expect("O_TRUNC");
        check(b"anew", "O_TRUNC");
        drop(disk);
        mounted.unmount();
        assert_eq!(std::fs::read(&image).expect("read"), b"anew");
    }
}

#[test]
fn appends_from_many_threads_all_arrive() {
    let place = Place::in_memory();
    let image = place.sparse("disk.img", 0);
    let mounted = Mount::of(&place, [&image]).with(["--growable"]).start();
    let disk = mounted.disk("disk.img");
    std::thread::scope(|scope| {
        for thread in 1..=4u8 {
            let disk = &disk;
            scope.spawn(move || {
                let mut file = OpenOptions::new().append(true).open(disk).expect("open");
                (0..200).for_each(|_| file.write_all(&[thread; 100]).expect("append"));
            });
        }
    });
    mounted.unmount();
    let content = std::fs::read(&image).expect("read");
    assert_eq!(content.len(), 4 * 200 * 100);
    for record in content.chunks(100) {
        assert!(record[0] != 0 && record.iter().all(|&byte| byte == record[0]), "a torn record: {record:?}");
    }
}

#[test]
fn a_disk_of_no_length_works() {
    let place = Place::on_disk();
    let image = place.sparse("disk.img", 0);
    let mounted = Mount::of(&place, [&image]).start();
    let disk = open(&mounted.disk("disk.img"), 0);
    assert_eq!(disk.read_at(&mut [0; 10], 0).expect("read"), 0);
    disk.write_at(&[1], 0).expect_err("a write to a fixed disk of no length");
    drop(disk);
    let target = place.at("target.img");
    mounted.mirror(&target, &[]);
    mounted.cutover();
    mounted.unmount();
    assert_eq!(size(&target), 0);
}

/// Either both images change their size, or the change is refused: never one alone.
#[test]
fn a_size_that_changes_during_a_mirror_changes_on_both_images_or_not_at_all() -> io::Result<()> {
    for (new_size, grows) in [(SIZE * 2, true), (500_000, false)] {
        let place = Place::on_disk();
        let (mounted, image) = mount(&place, &["--growable"]);
        let target = place.at("target.img");
        mounted.mirror(&target, &[]);
        mounted.wait_ready();
        let disk = open(&mounted.disk("disk.img"), 0);
        let changed = disk.set_len(new_size);
        println!("to {new_size}: {changed:?}");
        if changed.is_ok() && grows {
            disk.write_all_at(&[9; 5_000], SIZE + 300_000)?;
        }
        let expected = if changed.is_ok() { new_size } else { SIZE };
        assert_eq!(disk.metadata()?.len(), expected);
        drop(disk);
        mounted.wait_ready();
        mounted.cutover();
        assert_eq!(size(&mounted.disk("disk.img")), expected);
        mounted.unmount();
        assert_eq!(size(&image), expected);
        compare::assert_same_content(&image, &target);
    }
    Ok(())
}

/// The size is settled before the target is made: a change at that very moment is on both images or on none.
#[test]
fn a_size_that_changes_while_a_mirror_starts_is_never_lost() -> io::Result<()> {
    let place = Place::in_memory();
    let (mounted, _image) = mount(&place, &["--growable"]);
    let disk = open(&mounted.disk("disk.img"), 0);
    let mut random = Random::new(random::seed(), 0);
    let rounds = if long() { 200 } else { 25 };
    let mut last = SIZE;
    for round in 0..rounds {
        let target = place.at(&format!("target-{round}.img"));
        let before = mounted.active();
        let started = std::thread::scope(|scope| {
            let start = scope.spawn(|| mounted.verb("mirror", [&target]));
            while !start.is_finished() {
                let size = random.between(SIZE / 2, SIZE * 2);
                last = if disk.set_len(size).is_ok() { size } else { last };
            }
            start.join().expect("mirror")
        });
        started.ok();
        mounted.cutover();
        assert_eq!(size(&mounted.disk("disk.img")), last, "round {round}");
        assert_eq!(size(&target), last, "the image, round {round}");
        last = random.between(SIZE / 2, SIZE * 2);
        disk.set_len(last)?;
        std::fs::remove_file(before)?;
    }
    drop(disk);
    mounted.unmount();
    Ok(())
}
