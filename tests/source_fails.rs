//! The source fails: the guest gets the errno of its own request, as from a disk; the copy follows `--on-source-error`; and once the
//! source works again, so does everything.

mod common;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::fcntl::{FallocateFlags, fallocate};

use common::aligned::Aligned;
use common::block_device::FileSystem;
use common::command::is_root;
use common::compare;
use common::mounted::Mount;
use common::place::Place;
use common::remote::{Kind, Remote};
use common::wait;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

fn open(disk: &std::path::Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk).expect("open")
}

/// One request of a guest of that kind.
fn ask(disk: &File, kind: Kind) -> io::Result<()> {
    let mut bytes = Aligned::zeroed(4096);
    bytes.fill(7);
    match kind {
        Kind::Read => disk.read_exact_at(&mut bytes, MIB),
        Kind::Write => disk.write_all_at(&bytes, MIB),
        Kind::Sync => disk.sync_all(),
        Kind::Allocate => {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            Ok(fallocate(disk, flags, 2 * 1_048_576, 65_536)?)
        }
    }
}

#[test]
fn the_guest_gets_the_errno_of_its_own_request() {
    if !is_root("a file system of the test's own") {
        return;
    }
    let place = Place::in_memory();
    let remote = Remote::new(&place);
    let source = remote.sparse("a.img", SIZE);
    let mounted = Mount::of(&place, [&source]).start();
    let disk = open(&mounted.disk("a.img"));
    disk.write_all_at(&Aligned::zeroed(4096), 0).expect("write");
    let target = place.at("b.img");
    mounted.mirror(&target, &["--copy-mode", "write-blocking"]);
    mounted.wait_ready();
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EROFS, libc::ENXIO, libc::ENODEV, libc::ETIMEDOUT] {
        for kind in [Kind::Write, Kind::Allocate, Kind::Sync, Kind::Read] {
            remote.fail(kind, "a.img", errno);
            let error = ask(&disk, kind).expect_err("the source fails");
            remote.behave();
            assert_eq!(error.raw_os_error(), Some(errno), "{kind:?}");
            ask(&disk, kind).unwrap_or_else(|error| panic!("{kind:?} after {errno}: {error}"));
        }
    }
    let job = mounted.job();
    assert!(job["io_status"] == "ok" && job["state"] == "ready", "the guest's errors are not the job's: {job}");
    mounted.wait_ready();
    mounted.cutover();
    drop(disk);
    mounted.unmount();
    compare::assert_same_content(&remote.backing("a.img"), &target);
}

/// A sparse image on a file system that fills up.
#[test]
fn a_full_file_system_under_a_sparse_source_is_a_full_disk() {
    if !is_root("a file system of the test's own") {
        return;
    }
    let place = Place::in_memory();
    let small = FileSystem::mount(&["-t", "tmpfs", "-o", "size=2m", "tmpfs"], &place.at("small"));
    let source = small.path.join("a.img");
    File::create_new(&source).and_then(|file| file.set_len(SIZE)).expect("a sparse file");
    let mounted = Mount::of(&place, [&source]).start();
    let disk = open(&mounted.disk("a.img"));
    let target = place.at("b.img");
    mounted.mirror(&target, &[]);
    mounted.wait_ready();
    let mut bytes = Aligned::zeroed(65_536);
    bytes.fill(7);
    let blocks = SIZE / bytes.len() as u64;
    let write = |block: u64| disk.write_all_at(&bytes, block * bytes.len() as u64);
    let full = (0..blocks).find_map(|block| write(block).err().map(|error| (block, error)));
    let (block, error) = full.expect("4 MiB do not fit into 2");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!(block > 0);
    // What is there can be written, and what is freed makes room, as on any thin disk.
    write(0).expect("no room is needed");
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&disk, flags, 0, 2 * 65_536).expect("punch");
    write(block).expect("there is room again");
    assert_eq!(mounted.job()["io_status"], "ok");
    mounted.wait_ready();
    mounted.cutover();
    // The new image has room for all of it.
    (0..blocks).for_each(|block| write(block).expect("write"));
    drop(disk);
    mounted.unmount();
    let content = std::fs::read(&target).expect("read");
    assert!(content.len() as u64 == SIZE && content.iter().all(|byte| *byte == 7));
    small.unmount();
}

#[test]
fn the_copy_pauses_until_the_source_can_be_read_again() {
    if !is_root("a file system of the test's own") {
        return;
    }
    for (policy, errno, status) in
        [("stop", libc::EIO, "failed"), ("stop", libc::ENODEV, "failed"), ("enospc", libc::ENOSPC, "nospace")]
    {
        let place = Place::in_memory();
        let remote = Remote::new(&place);
        let source = remote.sparse("a.img", SIZE);
        std::fs::write(remote.backing("a.img"), vec![5; SIZE as usize]).expect("content");
        let mounted = Mount::of(&place, [&source]).start();
        let disk = open(&mounted.disk("a.img"));
        remote.fail(Kind::Read, "a.img", errno);
        let target = place.at("b.img");
        mounted.mirror(&target, &["--on-source-error", policy]);
        mounted.wait_for("the job to pause", |volumes| volumes[0]["mirror"]["state"] == "paused");
        let job = mounted.job();
        assert_eq!(job["io_status"], status, "{job}");
        let said = job["last_error"].as_str().expect("an error");
        assert!(said.contains(source.to_str().expect("UTF-8")) && said.contains("at offset"), "{said}");
        assert_eq!(ask(&disk, Kind::Read).expect_err("the guest's own").raw_os_error(), Some(errno));
        ask(&disk, Kind::Write).expect("writes work");
        remote.behave();
        mounted.verb::<&str>("resume", []).ok();
        mounted.wait_ready();
        mounted.cutover();
        drop(disk);
        mounted.unmount();
        compare::assert_same_content(&remote.backing("a.img"), &target);
    }
}

/// Under `ignore` all but the bad spot is copied, and that as soon as it can be read.
#[test]
fn the_copy_goes_around_a_bad_spot_and_comes_back() {
    if !is_root("a file system of the test's own") {
        return;
    }
    let place = Place::in_memory();
    let remote = Remote::new(&place);
    let source = remote.sparse("a.img", SIZE);
    std::fs::write(remote.backing("a.img"), vec![5; SIZE as usize]).expect("content");
    let mounted = Mount::of(&place, [&source]).start();
    remote.meet(Kind::Read, "a.img", (MIB, MIB + 512), u64::MAX, common::remote::Effect::Fail(libc::EIO));
    let target = place.at("b.img");
    mounted.mirror(&target, &["--on-source-error", "ignore"]);
    wait::until("all but one granule", || {
        let job = mounted.job();
        let [dirty, granule] = ["dirty_bytes", "granularity"].map(|name| job[name].as_u64().expect("a number"));
        assert!(job["state"] == "running", "{job}");
        job["copied_bytes"].as_u64() >= Some(SIZE - granule) && dirty <= granule
    });
    remote.behave();
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    compare::assert_same_content(&remote.backing("a.img"), &target);
}
