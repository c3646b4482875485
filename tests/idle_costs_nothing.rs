//! A mount that nobody uses sleeps, also while a mirror is ready: no thread of its server wakes up.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::mounted::Mount;
use common::place::Place;
use common::{random, wait};

/// How often the threads of `pid` have gone to sleep so far: as often as they woke up.
fn sleeps(pid: i32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the server lives").flatten();
    let of = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).map(str::trim);
        line.and_then(|count| count.parse::<u64>().ok()).unwrap_or(0)
    };
    threads.map(|thread| of(fs::read_to_string(thread.path().join("status")).unwrap_or_default())).sum()
}

/// Waits until three seconds have passed in which nothing woke up; what ticks once a second never comes to that.
fn wait_for_rest(pid: i32) {
    let mut before = u64::MAX;
    wait::until("the server to sleep", || {
        let now = sleeps(pid);
        let rests = now == before;
        before = now;
        if !rests {
            std::thread::sleep(Duration::from_secs(3));
        }
        rests
    });
}

#[test]
fn a_mount_sleeps_and_so_does_a_mirror_that_is_ready() {
    let place = Place::in_memory();
    let (source, target) = (place.random("disk.img", 8 << 20, random::seed()), place.at("target.img"));
    let mounted = Mount::of(&place, [&source]).start();
    let server = mounted.pid("server_pid");
    wait_for_rest(server);
    mounted.mirror(&target, &[]);
    mounted.wait_ready();
    wait_for_rest(server);
    // It wakes up for a guest, and its heart beats again: the time of death of a server is known from then on.
    let beat = || fs::metadata(mounted.state_dir.join("pulse")).and_then(|file| file.modified()).expect("a pulse");
    let before = beat();
    let disk = File::options().write(true).open(mounted.first_disk()).expect("open");
    disk.write_all_at(&[7; 4096], 1 << 20).expect("write");
    wait::until("the pulse", || beat() > before);
    mounted.wait_for("the mirror to follow", |volumes| volumes[0]["mirror"]["in_sync"] == true);
    drop(disk);
    wait_for_rest(server);
    mounted.cutover();
    mounted.unmount();
}
