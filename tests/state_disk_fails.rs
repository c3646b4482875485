//! The disk that holds the state is full: no guest notices, a mirror that runs goes on, and a server that dies has a successor. What
//! cannot be written down is said.

mod common;

use std::fs;
use std::path::PathBuf;

use common::block_device::FileSystem;
use common::command::{is_root, run};
use common::mortal;
use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;
use common::wait;
use nix::sys::signal::Signal;

const SIZE: u64 = 48 << 20;

struct Story {
    b: PathBuf,
    table: std::sync::Arc<Table>,
    load: Load,
    mounted: Mounted,
    state: FileSystem,
    place: Place,
}

fn start() -> Option<Story> {
    if !is_root("a file system of the test's own") {
        return None;
    }
    let (place, seed) = (Place::in_memory(), random::seed());
    let (a, b) = (place.sparse("a.img", SIZE), place.at("b.img"));
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);
    let state = FileSystem::mount(&["-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs"], &place.at("mnt.state"));
    let mounted = Mount::of(&place, [&a]).with(["--log-file".into(), place.at("log").into_os_string()]).start();
    let habits = Habits { depth: 4, ..Habits::default() };
    let load = Load::start(&mounted.disk("a.img"), &table, habits, seed);
    Some(Story { b, table, load, mounted, state, place })
}

impl Story {
    /// Nothing more can be written beside the state.
    fn fill_up(&self) {
        let path = self.state.path.join("filler");
        run("dd", ["if=/dev/zero", &format!("of={}", path.display()), "bs=4096"]);
    }

    fn end(self, last: &str) {
        let Story { table, load, mut mounted, state, place, .. } = self;
        load.wait_for_more(50);
        println!("the longest request took {:?}", load.stop());
        let last = place.at(last);
        assert_eq!(mounted.active(), last);
        mounted.note_processes();
        mounted.unmount();
        table.assert_on(&last);
        state.unmount();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.place.at("log")).expect("a log")
    }
}

#[test]
fn full_before_the_mirror_begins() {
    let Some(story) = start() else { return };
    story.fill_up();
    let refused = story.mounted.verb("mirror", [&story.b]).refuses_naming(&["No space left on device"]);
    println!("{refused}");
    assert!(!story.b.exists(), "a target is left behind");
    assert!(story.mounted.job().is_null());
    story.end("a.img");
}

/// A server that dies then is replaced all the same: guests do not wait for room on a disk that is not theirs.
#[test]
fn full_while_the_mirror_runs() {
    let Some(story) = start() else { return };
    story.mounted.mirror(&story.b, &["--speed", "8M"]);
    story.fill_up();
    story.load.wait_for_more(200);
    assert_eq!(story.mounted.job()["state"], "running");
    for _ in 0..2 {
        let server = mortal::strike(story.mounted.keeper_pid, Signal::SIGKILL);
        wait::until("the next server", || ![0, server].contains(&story.mounted.pid("server_pid")));
        story.load.wait_for_more(50);
    }
    assert!(story.log().contains("No space left on device; serving all the same"), "{}", story.log());
    // The log needs no more room than it has; the record does, to say that the pair is in use again.
    story.mounted.wait_for("the reason", |volumes| !volumes[0]["mirror"]["last_error"].is_null());
    let error = story.mounted.job()["last_error"].clone();
    assert!(error.as_str().is_some_and(|error| error.contains("No space left on device")), "{error}");
    fs::remove_file(story.state.path.join("filler")).expect("rm");
    story.mounted.verb::<&str>("resume", []).ok();
    story.mounted.wait_for("the mirror to go on", |volumes| volumes[0]["mirror"]["last_error"].is_null());
    story.mounted.verb("set", ["--speed", "0"]).ok();
    story.mounted.wait_ready();
    story.mounted.cutover();
    story.end("b.img");
}
