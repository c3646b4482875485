//! Verified direct writes at depth 32 go on while the disk is mirrored and cut over: every acknowledged write is found on the
//! new image itself, after the unmount, and the old image is left alone from the cutover on.

mod common;

use std::path::Path;
use std::time::Duration;

use common::command::{long, run};
use common::compare;
use common::mounted::{Mount, Mounted, words};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;

fn size() -> u64 {
    if long() { 1 << 30 } else { 96 << 20 }
}

/// Mirrors to `target` and cuts over while `load` goes on.
#[track_caller]
fn move_under(load: &Load, mounted: &Mounted, target: &Path, options: &[&str]) {
    load.wait_for_more(200);
    mounted.mirror(target, options);
    load.wait_for_more(200);
    mounted.wait_ready();
    load.wait_for_more(200);
    mounted.cutover();
    assert_eq!(mounted.active(), target);
    let last = &mounted.volume()["last_mirror"];
    assert_eq!(last["result"], "completed", "{last}");
    assert!(last["pause_ms"].is_number(), "the pause is not reported: {last}");
}

/// A to B to C under load, in one copy mode.
fn twice_in_a_row(place: &Place, options: &[&str], mount_options: &[&str]) {
    let seed = random::seed();
    let [a, b, c] = [place.sparse("a.img", size()), place.at("b.img"), place.at("c.img")];
    let table = Table::new(seed, size());
    pattern::fill(&a, &table);
    let mounted = Mount::of(place, [&a]).with(mount_options.iter().copied()).start();
    let load = Load::start(&mounted.disk("a.img"), &table, Habits::default(), seed);

    move_under(&load, &mounted, &b, options);
    let old = std::fs::read(&a).expect("read");
    load.wait_for_more(200);
    move_under(&load, &mounted, &c, options);
    // At once: what the cutover lost would soon be hidden by a newer write.
    let longest = load.stop();
    println!("the longest request took {longest:?}");

    table.assert_on(&mounted.disk("a.img"));
    mounted.unmount();
    table.assert_on(&c);
    assert!(std::fs::read(&a).expect("read") == old, "the old source was written to after the cutover");
    assert!(table.verify(&b, &table.bounds()).is_err(), "the load went on after the second cutover: B must be older");
}

#[test]
fn twice_in_a_row_in_auto_mode() {
    twice_in_a_row(&Place::in_memory(), &[], &[]);
    twice_in_a_row(&Place::in_memory(), &["--granularity", "4K"], &[]);
}

#[test]
fn twice_in_a_row_in_background_mode() {
    twice_in_a_row(&Place::on_disk(), &["--copy-mode", "background", "--granularity", "4K"], &[]);
}

#[test]
fn twice_in_a_row_in_write_blocking_mode() {
    twice_in_a_row(&Place::on_disk(), &["--copy-mode", "write-blocking"], &[]);
}

#[test]
fn twice_in_a_row_with_direct_io_to_the_images() {
    twice_in_a_row(&Place::on_disk(), &["--granularity", "4K"], &["-o", "cache=none"]);
}

#[test]
fn between_file_systems() {
    let seed = random::seed();
    let (disk, memory) = (Place::on_disk(), Place::in_memory());
    let (a, b) = (disk.sparse("a.img", size()), memory.at("b.img"));
    let table = Table::new(seed, size());
    let mounted = Mount::of(&disk, [&a]).start();
    let load = Load::start(&mounted.disk("a.img"), &table, Habits::default(), seed);
    move_under(&load, &mounted, &b, &["--granularity", "1M", "--buffer", "1M"]);
    load.wait_for_more(200);
    load.stop();
    mounted.unmount();
    table.assert_on(&b);
}

#[test]
fn a_hot_spot_does_not_keep_it_from_ending() {
    let seed = random::seed();
    let place = Place::in_memory();
    let (a, b) = (place.sparse("a.img", size()), place.at("b.img"));
    let table = Table::new(seed, size());
    pattern::fill(&a, &table);
    let mounted = Mount::of(&place, [&a]).start();
    let habits = Habits { depth: 4, hot_blocks: 32, ..Habits::default() };
    let load = Load::start(&mounted.disk("a.img"), &table, habits, seed);
    move_under(&load, &mounted, &b, &[]);
    load.stop();
    mounted.unmount();
    table.assert_on(&b);
}

#[test]
fn finish_keeps_an_equal_copy() {
    let seed = random::seed();
    let place = Place::on_disk();
    let (a, b) = (place.sparse("a.img", size() + 512 * 3), place.at("b.img"));
    let table = Table::new(seed, size());
    pattern::fill(&a, &table);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.wait_ready();
    mounted.verb::<&str>("finish", []).ok();
    let volume = mounted.volume();
    assert!(volume["mirror"].is_null(), "{volume}");
    assert_eq!(volume["last_mirror"]["result"], "finished");
    assert_eq!(volume["last_mirror"]["consistent"], true);
    assert_eq!(mounted.active(), a, "finish does not switch");
    let images = ["compare", "-U", "-f", "raw", "-F", "raw", a.to_str().expect("UTF-8"), b.to_str().expect("UTF-8")];
    run("qemu-img", images).ok();
    mounted.unmount();
    run("qemu-img", images).ok();
    compare::assert_same_content(&a, &b);
}

#[test]
fn finish_under_load_keeps_a_copy_of_one_moment() {
    let seed = random::seed();
    let place = Place::in_memory();
    let (a, b) = (place.sparse("a.img", size()), place.at("b.img"));
    let table = Table::new(seed, size());
    pattern::fill(&a, &table);
    let mounted = Mount::of(&place, [&a]).start();
    let load = Load::start(&mounted.disk("a.img"), &table, Habits { depth: 8, ..Habits::default() }, seed);
    mounted.verb("mirror", words(&b, &["--wait"])).ok();
    load.wait_for_more(500);
    let at_least = table.acknowledged();
    mounted.verb::<&str>("finish", []).ok();
    let at_most = table.issued();
    load.wait_for_more(500);
    load.stop();
    let bounds = at_least.into_iter().zip(at_most).collect();
    table.verify(&b, &bounds).unwrap_or_else(|faults| panic!("{faults}"));
    mounted.unmount();
    table.assert_on(&a);
}

#[test]
fn cancel_and_start_again() {
    let seed = random::seed();
    let place = Place::in_memory();
    let (a, b) = (place.sparse("a.img", size()), place.at("b.img"));
    let table = Table::new(seed, size());
    pattern::fill(&a, &table);
    let mounted = Mount::of(&place, [&a]).start();
    let habits = Habits { rest: Duration::from_micros(200), ..Habits::default() };
    let load = Load::start(&mounted.disk("a.img"), &table, habits, seed);
    mounted.mirror(&b, &["--speed", "1M"]);
    load.wait_for_more(200);
    mounted.verb::<&str>("cancel", []).ok();
    assert!(!b.exists(), "cancel removes the target that it created");
    assert_eq!(mounted.volume()["last_mirror"]["result"], "cancelled");
    move_under(&load, &mounted, &b, &[]);
    load.stop();
    mounted.unmount();
    table.assert_on(&b);
}

#[test]
fn move_does_it_all() {
    let seed = random::seed();
    let place = Place::in_memory();
    let (a, b) = (place.sparse("a.img", size()), place.at("b.img"));
    let table = Table::new(seed, size());
    let mounted = Mount::of(&place, [&a]).start();
    let load = Load::start(&mounted.disk("a.img"), &table, Habits { depth: 4, ..Habits::default() }, seed);
    load.wait_for_more(500);
    mounted.verb("move", [&b]).ok();
    assert_eq!(mounted.active(), b);
    load.wait_for_more(500);
    load.stop();
    mounted.unmount();
    table.assert_on(&b);
}
