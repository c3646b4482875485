//! Whether a target goes through the host's page cache is the user's choice, and stays so when it is the disk; a copy through it does not
//! push out what the guest has there.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::Signal;

use common::compare::assert_same_content;
use common::mounted::{Mount, Mounted};
use common::page_cache::cached_pages;
use common::place::Place;
use common::{mortal, wait};

const MIB: u64 = 1 << 20;

/// Whether process `pid` has `path` open with O_DIRECT for its requests: only descriptors that may read and write count.
fn is_direct(pid: i32, path: &Path) -> bool {
    let path = path.canonicalize().expect("the image is there");
    let mut flags = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("the server lives").flatten() {
        if fs::read_link(entry.path()).is_ok_and(|open| open == path) {
            let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy());
            let info = fs::read_to_string(info).unwrap_or_default();
            let octal = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0").trim().to_owned();
            flags.push(i32::from_str_radix(&octal, 8).expect("octal flags"));
        }
    }
    assert!(!flags.is_empty(), "{pid} does not have {} open", path.display());
    flags.iter().any(|flags| flags & libc::O_PATH == 0 && flags & libc::O_DIRECT != 0)
}

/// Kills the server; the one that took over.
fn next_server(mounted: &Mounted) -> i32 {
    let killed = mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    wait::until_some("another server", || Some(mounted.pid("server_pid")).filter(|&pid| pid != 0 && pid != killed))
}

#[test]
fn the_target_has_a_cache_mode_of_its_own_and_keeps_it_as_the_disk() {
    let place = Place::on_disk();
    for (mount, mirror, mounted_direct) in [("writeback", "none", false), ("none", "writeback", true)] {
        let source = place.random(&format!("{mount}.img"), 3 * MIB + 4096, 7);
        let target = place.at(&format!("{mount}-target.img"));
        let mounted = Mount::of(&place, [&source]).with(["-o", &format!("cache={mount}")]).start();
        assert_eq!(is_direct(mounted.pid("server_pid"), &source), mounted_direct);
        mounted.mirror(&target, &["--target-cache", mirror]);
        mounted.wait_ready();
        assert_eq!(is_direct(mounted.pid("server_pid"), &target), !mounted_direct);

        // A server that goes on with the mirror opens it so again.
        let server = next_server(&mounted);
        mounted.wait_for("the mirror to go on", |volumes| volumes[0]["mirror"]["ready"] == true);
        assert_eq!(is_direct(server, &target), !mounted_direct);

        mounted.cutover();
        let server = next_server(&mounted);
        assert_eq!(mounted.active(), target);
        assert_eq!(is_direct(server, &target), !mounted_direct);
        mounted.unmount();
        assert!(fs::read(&source).unwrap() == fs::read(&target).unwrap(), "the images differ");
        fs::remove_file(&target).unwrap();
    }
}

/// Takes a file that is durable out of the page cache.
fn forget(path: &Path) {
    let file = File::open(path).expect("open");
    file.sync_all().expect("fsync");
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("fadvise");
}

/// RWF_DONTCACHE: Linux 6.14, on ext4, XFS and some others. Where TMPDIR has none of that this fails, and says why.
#[test]
fn a_copy_leaves_in_the_page_cache_what_the_guest_has_there_and_nothing_more() {
    let place = Place::on_disk();
    let pages = 64 * MIB / 4096;
    let (source, target) = (place.random("disk.img", 64 * MIB, 9), place.at("target.img"));
    forget(&source);
    let mounted = Mount::of(&place, [&source]).start();
    let disk = File::open(mounted.first_disk()).expect("open");
    let mut buffer = vec![0; MIB as usize];
    for at in 10..14 {
        disk.read_exact_at(&mut buffer, at * MIB).expect("read");
    }
    let before = cached_pages(&source).expect("cachestat, Linux 6.5");
    assert!((4 * MIB / 4096..pages / 2).contains(&before), "{before} of {pages} pages cached");
    mounted.mirror(&target, &["--no-reflink"]);
    mounted.wait_ready();
    let after = cached_pages(&source).unwrap();
    assert!(after >= 4 * MIB / 4096, "the guest's pages are gone: {after}");
    let why = "does the file system of TMPDIR know RWF_DONTCACHE (ext4 and XFS of Linux 6.14 do)?";
    assert!(after <= before + pages / 10, "{before} pages of the source before, {after} after, of {pages}; {why}");
    // They leave as their writing ends; the flush before ready has waited for that, not for what comes after it.
    wait::until("the target to leave the page cache", || cached_pages(&target).unwrap() <= pages / 10);
    mounted.verb::<&str>("verify", []).ok();
    assert!(cached_pages(&source).unwrap() <= after + pages / 10, "verify fills the cache");
    drop(disk);
    mounted.cutover();
    mounted.unmount();
    assert_same_content(&source, &target);
}
