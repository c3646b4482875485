//! Every way of doing I/O that programs use works on a mounted disk: direct, synchronous, unaligned and parallel requests,
//! shared mappings, libaio and io_uring, deep queues, large requests, several openers, a loop device. What must be durable when
//! it is answered has left the page cache of the image by then.

mod common;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use common::aligned::Aligned;
use common::block_device::LoopDevice;
use common::command::{is_root, long, run};
use common::compare;
use common::mmap::SharedMap;
use common::mounted::{Mount, Mounted};
use common::page_cache::unwritten_pages;
use common::place::Place;
use common::random::Random;

const MIB: u64 = 1 << 20;
const CACHES: [&str; 2] = ["cache=writeback", "cache=none"];

fn open(path: &Path, flags: i32) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).expect("open")
}

/// A mount of a new sparse disk in `place`.
fn mount(place: &Place, size: u64, options: &[&str]) -> Mounted {
    let image = place.sparse("disk.img", size);
    Mount::of(place, [&image]).with(options.iter().copied()).start()
}

#[test]
fn synchronous_writes_are_durable_when_answered() -> io::Result<()> {
    let place = Place::on_disk();
    let mounted = mount(&place, 16 * MIB, &[]);
    let (disk, image) = (mounted.disk("disk.img"), place.at("disk.img"));
    let bytes = Aligned::copy_of(&[7; 65_536]);
    let clean = |what: &str| assert_eq!(unwritten_pages(&image).expect("cachestat"), 0, "after {what}");
    for (flags, what) in [
        (libc::O_SYNC, "O_SYNC"),
        (libc::O_DSYNC, "O_DSYNC"),
        (libc::O_DIRECT | libc::O_DSYNC, "O_DIRECT and O_DSYNC"),
        (libc::O_DIRECT | libc::O_SYNC, "O_DIRECT and O_SYNC"),
    ] {
        let file = open(&disk, flags);
        for offset in [0, MIB, 4 * MIB] {
            open(&disk, 0).write_all_at(&[8; 100_000], offset + 2 * MIB)?;
            file.write_all_at(&bytes, offset)?;
            clean(what);
        }
    }
    for sync in [File::sync_all, File::sync_data] {
        let file = open(&disk, libc::O_DIRECT);
        file.write_all_at(&bytes, 9 * MIB)?;
        sync(&file)?;
        clean("fsync");
    }
    let map = SharedMap::new(&open(&disk, 0), 0, 65_536)?;
    map.write(100, b"mapped");
    map.sync()?;
    clean("msync");
    drop(map);
    run("xfs_io", ["-c", "pwrite -D -V 1 -S 0x5 0 64k", disk.to_str().expect("UTF-8")]).ok();
    clean("RWF_DSYNC");
    mounted.unmount();
    Ok(())
}

#[test]
fn a_flush_reaches_both_images_in_write_blocking_mode() -> io::Result<()> {
    let place = Place::on_disk();
    let mounted = mount(&place, 16 * MIB, &[]);
    let target = place.at("target.img");
    mounted.mirror(&target, &["--copy-mode", "write-blocking"]);
    mounted.wait_ready();
    let disk = open(&mounted.disk("disk.img"), 0);
    for offset in [0, 3 * MIB, 7 * MIB + 512] {
        disk.write_all_at(&[1; 100_000], offset)?;
        disk.sync_all()?;
        for image in [&place.at("disk.img"), &target] {
            assert_eq!(unwritten_pages(image)?, 0, "{}", image.display());
        }
    }
    drop(disk);
    mounted.cutover();
    mounted.unmount();
    Ok(())
}

/// Threads whose pieces share blocks: a block that is read, modified and written back must not undo a neighbour's write.
#[test]
fn unaligned_parallel_writes_within_a_block_all_arrive() {
    for cache in CACHES {
        let place = Place::on_disk();
        let mounted = mount(&place, MIB + 333, &["-o", cache]);
        let (disk, threads, pieces) = (mounted.disk("disk.img"), 16u64, 60u64);
        let target = place.at("target.img");
        mounted.mirror(&target, &["--copy-mode", "write-blocking", "--granularity", "4K"]);
        // Piece p of thread t lies at (p * threads + t) * 97: forty pieces and their writers in each 4 KiB block.
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let file = open(&disk, if thread % 2 == 0 { 0 } else { libc::O_DIRECT });
                scope.spawn(move || {
                    for piece in 0..pieces {
                        let number = piece * threads + thread;
                        let bytes = Aligned::copy_of(&[number as u8 | 1; 97]);
                        file.write_all_at(&bytes, number * 97).expect("write");
                        file.write_all_at(&bytes[..5], MIB + 13 + thread * 19).expect("write to the tail");
                    }
                });
            }
        });
        mounted.cutover();
        mounted.unmount();
        let mut model = vec![0; (MIB + 333) as usize];
        for number in 0..threads * pieces {
            model[number as usize * 97..][..97].fill(number as u8 | 1);
        }
        for thread in 0..threads {
            let last = ((pieces - 1) * threads + thread) as u8 | 1;
            model[(MIB + 13 + thread * 19) as usize..][..5].fill(last);
        }
        let found = std::fs::read(&target).expect("read");
        let wrong = found.iter().zip(&model).position(|(found, wanted)| found != wanted);
        assert_eq!((found.len(), wrong), (model.len(), None), "{cache}: the first wrong byte");
        compare::assert_same_content(&place.at("disk.img"), &target);
    }
}

#[test]
fn two_openers_see_each_others_writes_at_once() -> io::Result<()> {
    let place = Place::in_memory();
    let mounted = mount(&place, 4 * MIB, &[]);
    let disk = mounted.disk("disk.img");
    let files = [open(&disk, 0), open(&disk, libc::O_DIRECT)];
    let map = SharedMap::new(&files[0], 0, 4096)?;
    let mut random = Random::new(1, 1);
    for round in 0..200 {
        let bytes = Aligned::copy_of(&random.bytes(4096));
        let (writer, reader) = (&files[round % 2], &files[1 - round % 2]);
        writer.write_all_at(&bytes, 0)?;
        let mut found = Aligned::zeroed(4096);
        reader.read_exact_at(&mut found, 0)?;
        assert!(found[..] == bytes[..]);
        map.read(0, &mut found);
        assert!(found[..] == bytes[..], "through a mapping");
        map.write(77, &[round as u8]);
        reader.read_exact_at(&mut found, 0)?;
        assert_eq!(found[77], round as u8, "what a mapping wrote");
    }
    drop((map, files));
    run("dd", ["if=/dev/urandom", &format!("of={}", disk.display()), "bs=1M", "count=4", "conv=notrunc"]).ok();
    run("cmp", [&disk, &place.at("disk.img")]).ok();
    mounted.unmount();
    Ok(())
}

#[test]
fn locks_of_the_guest_hold_between_openers() {
    let place = Place::in_memory();
    let mounted = mount(&place, MIB, &[]);
    let disk = mounted.disk("disk.img");
    let disk = disk.to_str().expect("UTF-8");
    let inner = format!("flock -n {disk} true");
    let nested = run("flock", [disk, "sh", "-c", &inner]);
    assert_eq!(nested.code, Some(1), "a second flock while one is held: {nested}");
    run("flock", ["-n", disk, "true"]).ok();
    mounted.unmount();
}

/// fio writes and verifies with checksums; a job that its kernel does not offer is passed over, and said so.
fn fio(disk: &Path, engine: &str, options: &[&str]) {
    let mut arguments = vec![
        "--name=job".to_owned(),
        format!("--filename={}", disk.display()),
        format!("--ioengine={engine}"),
        "--verify=crc32c".to_owned(),
        "--verify_fatal=1".to_owned(),
        "--verify_state_save=0".to_owned(),
        format!("--size={}", if long() { 256 * MIB } else { 24 * MIB }),
        "--end_fsync=1".to_owned(),
    ];
    arguments.extend(options.iter().map(|&option| option.to_owned()));
    let done = run("fio", arguments);
    if engine == "io_uring" && done.code != Some(0) && (done.stdout.clone() + &done.stderr).contains("not permitted") {
        eprintln!("SKIPPED: io_uring is switched off here");
        return;
    }
    done.ok();
}

fn with_fio(engine: &str) {
    for cache in CACHES {
        let place = Place::on_disk();
        let mounted = mount(&place, 256 * MIB, &["-o", cache]);
        let disk = mounted.disk("disk.img");
        fio(&disk, engine, &["--direct=1", "--rw=randrw", "--bs=4k", "--iodepth=256"]);
        fio(&disk, engine, &["--direct=1", "--rw=write", "--bs=1m", "--iodepth=16"]);
        fio(&disk, engine, &["--direct=1", "--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--iodepth=32"]);
        fio(&disk, engine, &["--direct=0", "--rw=randrw", "--bs=3000", "--iodepth=8", "--size=4m"]);
        mounted.unmount();
    }
}

#[test]
fn libaio() {
    with_fio("libaio");
}

#[test]
fn io_uring() {
    with_fio("io_uring");
}

#[test]
fn posix_threads_and_mmap_by_fio() {
    let place = Place::in_memory();
    let mounted = mount(&place, 256 * MIB, &[]);
    let disk = mounted.disk("disk.img");
    fio(&disk, "mmap", &["--rw=randrw", "--bs=4k", "--size=8m"]);
    fio(&disk, "psync", &["--direct=1", "--rw=randrw", "--bs=64k", "--size=8m", "--sync=1"]);
    fio(&disk, "pvsync2", &["--direct=1", "--rw=randrw", "--bs=4m"]);
    mounted.unmount();
}

#[test]
fn a_loop_device_that_discards() -> io::Result<()> {
    if !is_root("a loop device") {
        return Ok(());
    }
    let place = Place::on_disk();
    let mounted = mount(&place, 32 * MIB, &[]);
    let device = LoopDevice::over(&mounted.disk("disk.img"));
    let name = device.path.to_str().expect("UTF-8");
    let mut model = Random::new(9, 9).bytes(32 << 20);
    open(&device.path, 0).write_all_at(&model, 0)?;
    open(&device.path, 0).sync_all()?;
    run("blkdiscard", ["--offset", "8M", "--length", "16M", name]).ok();
    run("blkdiscard", ["--zeroout", "--offset", "28M", "--length", "1M", name]).ok();
    model[8 << 20..24 << 20].fill(0);
    model[28 << 20..29 << 20].fill(0);
    device.detach();
    mounted.unmount();
    assert!(std::fs::read(place.at("disk.img"))? == model);
    assert!(compare::allocated_bytes(&place.at("disk.img")) <= 17 * MIB, "the discard freed nothing");
    Ok(())
}
