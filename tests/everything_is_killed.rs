//! Keeper and server are killed at once, under load: the mount is dead. The next `livemirror mount` cleans it, and the mirror goes on
//! from what its intent log says: nothing that was acknowledged is lost, and nothing is copied again that cannot have changed. Also
//! in the middle of a cutover, of two disks too: then there is one answer to the question which images are the disks.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::command::long;
use common::compare;
use common::mortal::{self, bytes_written, marked_regions, resumptions};
use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random::{self, Random};
use common::wait;

const MIB: u64 = 1 << 20;

/// Mounts `images` where a mount has died.
#[track_caller]
fn mount_again(place: &Place, images: &[&PathBuf]) -> Mounted {
    let mounted = Mount::of(place, images).on(&place.at("mnt")).with(["--follow"]).start();
    assert_eq!(common::leftovers::our_mounts_below(place.path()).len(), 1, "the dead mount is still there");
    mounted
}

fn copied(mounted: &Mounted) -> u64 {
    mounted.job()["copied_bytes"].as_u64().expect("a count")
}

/// Waits until the log marks nothing: all was copied, and both images were flushed since.
#[track_caller]
fn wait_until_cold(state_dir: &Path) {
    wait::until("the intent log to mark nothing", || marked_regions(state_dir) == Some(0));
}

#[test]
fn what_is_cold_is_not_copied_again() {
    let size = if long() { 512 * MIB } else { 64 * MIB };
    for mode in ["background", "write-blocking"] {
        let (place, seed) = (Place::on_disk(), random::seed());
        let [a, b] = [place.sparse("a.img", size), place.at("b.img")];
        let table = Table::new(seed, size);
        pattern::fill(&a, &table);
        let mounted = Mount::of(&place, [&a]).start();
        let state_dir = mounted.state_dir.clone();
        mounted.mirror(&b, &["--copy-mode", mode]);
        mounted.wait_ready();
        wait_until_cold(&state_dir);
        // Two regions, which stay marked for as long as they are hot.
        let habits = Habits { depth: 4, hot_blocks: 512, ..Habits::small() };
        let load = Load::start(&mounted.disk("a.img"), &table, habits, seed);
        let held = File::open(mounted.disk("a.img")).expect("open");
        load.wait_for_more(300);
        let reported = copied(&mounted);
        assert!(reported >= size, "{reported}");
        load.wait_for_more(300);
        mounted.kill_everything();
        load.end();
        held.read_at(&mut [0; 512], 0).expect_err("the mount is dead");
        table.settle_on(&a);
        assert_eq!(marked_regions(&state_dir), Some(2), "hot regions are marked, and no others");
        if mode == "write-blocking" {
            // Somebody still has it open.
            drop(held);
        }

        let mounted = mount_again(&place, &[&a]);
        mounted.wait_ready();
        let written = bytes_written(mounted.server_pid);
        let now = copied(&mounted);
        assert_eq!(resumptions(&mounted.log(), "copied again"), [2 * MIB]);
        assert_eq!(resumptions(&mounted.log(), "compared"), Vec::<u64>::new());
        assert!(now >= reported, "{reported} bytes were reported as copied, now {now}");
        // The last count may be a second older than the death.
        assert!(now - reported <= 2 * MIB + habits.hot_blocks * 4096 * 4 || mode == "background", "{reported} {now}");
        assert!(written < 4 * MIB, "the server has written {written} bytes where 2 MiB are marked");

        let load = Load::start(&mounted.disk("a.img"), &table, Habits { depth: 4, ..Habits::default() }, seed);
        load.wait_for_more(300);
        load.stop();
        mounted.wait_ready();
        mounted.cutover();
        assert_eq!(mounted.active(), b);
        mounted.unmount();
        table.assert_on(&b);
        compare::assert_same_content(&a, &b);
    }
}

/// While there is much left to copy, in each mode.
#[test]
fn again_and_again_in_the_middle() {
    let size = 48 * MIB;
    for (mode, habits) in
        [("background", Habits::small()), ("write-blocking", Habits::large()), ("auto", Habits::default())]
    {
        let (place, seed) = (Place::in_memory(), random::seed());
        let mut random = Random::new(seed, 1_000);
        let [a, b] = [place.sparse("a.img", size), place.at("b.img")];
        let table = Table::new(seed, size);
        pattern::fill(&a, &table);
        let mut mounted = Mount::of(&place, [&a]).start();
        let habits = Habits { depth: 4, rest: Duration::from_millis(1), ..habits };
        let mut load = Load::start(&mounted.disk("a.img"), &table, habits, seed);
        mounted.mirror(&b, &["--copy-mode", mode, "--speed", "16M"]);
        for _ in 0..if long() { 20 } else { 3 } {
            load.wait_for_more(20);
            std::thread::sleep(Duration::from_millis(random.below(300)));
            let reported = copied(&mounted);
            mounted.kill_everything();
            load.end();
            table.settle_on(&a);
            mounted = mount_again(&place, &[&a]);
            load = Load::start(&mounted.disk("a.img"), &table, habits, seed);
            mounted.wait_for("the mirror to go on", |volumes| {
                let job = &volumes[0]["mirror"];
                assert!(!job.is_null(), "{}", volumes[0]);
                job["state"] != "paused"
            });
            let job = mounted.job();
            assert!(job["copied_bytes"].as_u64().is_some_and(|now| now >= reported), "{reported} bytes before, {job}");
            assert_eq!((&job["copy_mode"], &job["speed"]), (&mode.into(), &(16 * MIB).into()), "{job}");
        }
        assert_eq!(resumptions(&mounted.log(), "compared"), Vec::<u64>::new(), "nothing was touched");
        mounted.verb("set", ["--speed", "0"]).ok();
        mounted.wait_ready();
        mounted.cutover();
        load.wait_for_more(20);
        println!("the longest request since the last kill took {:?}", load.stop());
        assert_eq!(mounted.active(), b);
        mounted.unmount();
        table.assert_on(&b);
    }
}

/// Two disks, killed at some moment of their common cutover.
#[test]
fn during_a_cutover_of_two_disks() {
    let size = 8 * MIB;
    let seed = random::seed();
    let mut random = Random::new(seed, 1_000);
    let mut outcomes = [0, 0];
    for round in 0..if long() { 40 } else { 6 } {
        let place = Place::in_memory();
        let sources = [place.sparse("a.img", size), place.sparse("b.img", size)];
        let targets = [place.at("new-a.img"), place.at("new-b.img")];
        let tables = [0, 1].map(|number| Table::new(seed + round * 2 + number, size));
        for (source, table) in sources.iter().zip(&tables) {
            pattern::fill(source, table);
        }
        let mounted = Mount::of(&place, &sources).start();
        let disks = ["a.img", "b.img"].map(|name| mounted.disk(name));
        let habits = Habits { depth: 2, ..Habits::default() };
        let start = |at: usize| Load::start(&disks[at], &tables[at], habits, seed + at as u64);
        let loads = [start(0), start(1)];
        for (disk, target) in disks.iter().zip(&targets) {
            mounted.verb_on(disk, "mirror", [target]).ok();
        }
        mounted.wait_ready();
        loads.iter().for_each(|load| load.wait_for_more(20));
        let keeper = mounted.keeper_pid;
        std::thread::scope(|scope| {
            scope.spawn(|| mounted.verb("cutover", ["--max-pause", "10s", "--timeout", "60s"]));
            std::thread::sleep(Duration::from_micros(random.below(20_000)));
            mortal::kill_all(keeper);
        });
        mounted.forget();
        loads.into_iter().for_each(Load::end);

        let mounted = mount_again(&place, &[&sources[0], &sources[1]]);
        let status = mounted.status();
        let active = [0, 1].map(|at| PathBuf::from(status["volumes"][at]["active"].as_str().expect("active")));
        let switched = active == targets;
        assert!(switched || active == sources, "neither both old nor both new: {active:?}");
        outcomes[usize::from(switched)] += 1;
        for (table, image) in tables.iter().zip(&active) {
            table.settle_on(image);
        }
        let loads = [start(0), start(1)];
        loads.iter().for_each(|load| load.wait_for_more(20));
        if switched {
            assert!(status["volumes"][0]["mirror"].is_null() && status["volumes"][1]["mirror"].is_null(), "{status}");
        } else {
            mounted.wait_ready();
            mounted.cutover();
        }
        loads.into_iter().for_each(|load| println!("the longest request took {:?}", load.stop()));
        mounted.unmount();
        for (table, target) in tables.iter().zip(&targets) {
            table.assert_on(target);
        }
    }
    println!("{} times both old, {} times both new", outcomes[0], outcomes[1]);
}

/// The dead mount is nobody's any more, but what lies there is found: a state, locks, sockets. And `status` answers.
#[test]
fn a_dead_mount_is_told_apart() {
    let place = Place::on_disk();
    let (a, b) = (place.random("a.img", 4 * MIB, 1), place.at("b.img"));
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &["--speed", "256K"]);
    let point = mounted.mountpoint.clone();
    mounted.kill_everything();
    let said = common::command::livemirror([Path::new("status"), &point, Path::new("--json")]).ok().json();
    assert!(said["server_pid"].is_null(), "{said}");
    assert_eq!(said["volumes"][0]["active"], a.to_str().expect("UTF-8"), "{said}");
    assert_eq!(common::leftovers::locks_on(&a), Vec::<String>::new(), "the dead hold no locks");
    let mounted = mount_again(&place, &[&a]);
    mounted.verb("set", ["--speed", "0"]).ok();
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    assert!(fs::read(&a).expect("read") == fs::read(&b).expect("read"));
}
