//! Whether a target goes through the host's page cache is the user's choice, and stays so when it is the disk.

mod common;

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;

use common::mounted::{Mount, Mounted};
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
