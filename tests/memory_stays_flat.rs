//! The server's memory does not grow with the load: neither with the number of requests nor with how long a mirror runs
//! (HARD_PARTS 21, rule 13).

mod common;

use std::fs;

use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;

const MIB: u64 = 1 << 20;

/// The most memory that the server ever had, in bytes.
fn peak(mounted: &Mounted) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", mounted.server_pid)).expect("the server runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") << 10
}

/// What a request may leave behind at most: less than any object on the heap would be.
const BYTES_PER_REQUEST: u64 = 16;
/// What comes and goes: stacks, caches of the allocator, a buffer more in use than before.
const SLACK: u64 = 4 * MIB;

fn load_leaves_nothing_behind(copy_mode: &str) {
    let place = Place::in_memory();
    let (seed, size) = (random::seed(), 64 * MIB);
    let image = place.sparse("disk.img", size);
    let table = Table::new(seed, size);
    pattern::fill(&image, &table);
    let mounted = Mount::of(&place, [&image]).start();
    let load = Load::start(&mounted.disk("disk.img"), &table, Habits::default(), seed);
    mounted.mirror(&place.at("target.img"), &["--copy-mode", copy_mode]);
    // Warm: every thread has had its buffers, every granule was dirty once.
    load.wait_for_more(20_000);
    let (warm, before) = (peak(&mounted), load.writes());
    load.wait_for_more(200_000);
    let (now, requests) = (peak(&mounted), load.writes() - before);
    load.stop();
    println!("{copy_mode}: {} MiB warm, {} MiB after {requests} more requests", warm / MIB, now / MIB);
    let allowed = SLACK + requests * BYTES_PER_REQUEST;
    assert!(now - warm <= allowed, "{requests} requests left {} KiB behind", (now - warm) / 1024);
    mounted.cutover();
    let active = mounted.active();
    mounted.unmount();
    table.assert_on(&active);
}

#[test]
fn under_load_in_background_mode() {
    load_leaves_nothing_behind("background");
}

#[test]
fn under_load_in_write_blocking_mode() {
    load_leaves_nothing_behind("write-blocking");
}

/// One mirror after the other: what a job had is given back.
#[test]
fn from_mirror_to_mirror() {
    let place = Place::in_memory();
    let image = place.random("disk.img", 16 * MIB, random::seed());
    let mounted = Mount::of(&place, [&image]).start();
    let mirror = |count: u32| {
        for _ in 0..count {
            mounted.mirror(&place.at("target.img"), &["--wait"]);
            mounted.verb::<&str>("cancel", []).ok();
        }
        peak(&mounted)
    };
    let warm = mirror(8);
    let now = mirror(32);
    println!("{} MiB after 8 mirrors, {} MiB after 40", warm / MIB, now / MIB);
    // The buffers alone of a job that is kept would be 32 times a few MiB; the allocator's heaps fill up and stay as they are.
    assert!(now - warm <= 4 * SLACK, "32 mirrors left {} KiB behind", (now - warm) / 1024);
    mounted.unmount();
}
