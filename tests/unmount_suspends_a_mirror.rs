//! A mirror that is not finished when its disk is unmounted goes on with the next mount: from where it was, as it was told to. A target
//! that is not there delays nothing and nobody.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::{Value, json};

use common::command::{is_root, run};
use common::leftovers;
use common::mortal::{bytes_written, marked_regions, resumptions};
use common::mounted::{Mount, Mounted, words};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;
use common::remote::{Kind, Remote};
use common::wait;
use livemirror::state::Store;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;

struct Story {
    a: PathBuf,
    b: PathBuf,
    seed: u64,
    table: std::sync::Arc<Table>,
    place: Place,
}

impl Story {
    fn new() -> Story {
        let (place, seed) = (Place::on_disk(), random::seed());
        let (a, b) = (place.sparse("a.img", SIZE), place.at("b.img"));
        let table = Table::new(seed, SIZE);
        pattern::fill(&a, &table);
        Story { a, b, seed, table, place }
    }

    fn mount(&self) -> Mounted {
        Mount::of(&self.place, [&self.a]).start()
    }

    /// Verified writes for a while.
    fn write(&self, mounted: &Mounted) {
        let habits = Habits { depth: 4, ..Habits::default() };
        let load = Load::start(&mounted.disk("a.img"), &self.table, habits, self.seed);
        load.wait_for_more(200);
        load.stop();
    }

    /// Cuts over, writes, unmounts: everything is on the new image.
    fn finish(self, mounted: Mounted) {
        self.write(&mounted);
        mounted.verb("set", ["--speed", "0"]).ok();
        mounted.wait_ready();
        mounted.cutover();
        self.write(&mounted);
        assert_eq!(mounted.active(), self.b);
        assert_eq!(mounted.volume()["last_mirror"]["result"], "completed");
        mounted.unmount();
        self.table.assert_on(&self.b);
        // Nothing of it is left for the next mount.
        let mounted = Mount::of(&self.place, [&self.b]).start();
        assert!(mounted.job().is_null());
        assert_eq!(marked_regions(&mounted.state_dir), None, "the log is gone");
        mounted.unmount();
        assert_eq!(leftovers::locks_on(&self.a), Vec::<String>::new());
    }
}

fn copied(mounted: &Mounted) -> u64 {
    mounted.job()["copied_bytes"].as_u64().expect("a count")
}

#[track_caller]
fn wait_going_on(mounted: &Mounted) {
    wait::until("the mirror to be taken up", || mounted.log().contains("goes on to"));
}

#[test]
fn in_the_middle() {
    let story = Story::new();
    let mounted = story.mount();
    mounted.mirror(&story.b, &["--copy-mode", "write-blocking", "--speed", "4M"]);
    let half = |volumes: &[Value]| volumes[0]["mirror"]["copied_bytes"].as_u64() >= Some(6 * MIB);
    mounted.wait_for("some to be copied", half);
    story.write(&mounted);
    let before = copied(&mounted);
    let state_dir = mounted.state_dir.clone();
    mounted.unmount();
    assert_eq!(leftovers::locks_on(&story.b), Vec::<String>::new(), "nobody uses the target");
    let marked = marked_regions(&state_dir).expect("a log") * MIB;
    // It copied on until it was suspended.
    let store = Store::open_existing(&state_dir, nix::unistd::geteuid().as_raw()).expect("open").expect("a state");
    let suspended = store.pulse().expect("a pulse").volumes["a.img"].copied;
    assert!(suspended >= before);

    let mounted = story.mount();
    wait_going_on(&mounted);
    let job = mounted.job();
    assert_eq!((&job["copy_mode"], &job["speed"]), (&json!("write-blocking"), &json!(4 * MIB)), "{job}");
    assert_eq!(job["target"], story.b.to_str().expect("UTF-8"));
    assert!(copied(&mounted) >= suspended, "{suspended}, {job}");
    assert_eq!(resumptions(&mounted.log(), "copied again"), [marked]);
    // One at a time.
    let refused = mounted.verb("mirror", words(&story.place.at("c.img"), &[])).refuses_naming(&["a.img"]);
    assert!(refused.complaint().contains(story.b.to_str().expect("UTF-8")), "{refused}");
    assert!(refused.stderr.contains("cancel"), "what to do: {refused}");
    assert!(!story.place.at("c.img").exists());
    mounted.verb("set", ["--speed", "0"]).ok();
    mounted.wait_ready();
    assert!(copied(&mounted) <= suspended + marked, "{suspended} and {marked}, {}", mounted.job());
    story.finish(mounted);
}

#[test]
fn to_go_on_wherever_the_image_is_mounted() {
    let story = Story::new();
    let mounted = story.mount();
    mounted.mirror(&story.b, &["--speed", "4M"]);
    mounted.wait_for("some to be copied", |volumes| volumes[0]["mirror"]["copied_bytes"].as_u64() >= Some(6 * MIB));
    story.write(&mounted);
    let (before, first_state) = (copied(&mounted), mounted.state_dir.clone());
    mounted.unmount();
    let marked = marked_regions(&first_state).expect("a log") * MIB;
    // The target is no disk yet.
    let a = story.a.to_str().expect("UTF-8");
    Mount::of(&story.place, [&story.b]).named("wrong").attempt().refuses_naming(&[a]);
    // A mount that fails takes nothing away, where there was one before too.
    Mount::of(&story.place, [story.place.sparse("c.img", MIB)]).named("failing").start().unmount();
    fs::create_dir(story.place.at("failing.sock")).expect("mkdir");
    Mount::of(&story.place, [&story.a]).named("failing").attempt().refuses_naming(&["failing.sock"]);

    let mounted = Mount::of(&story.place, [&story.a]).named("elsewhere").start();
    wait_going_on(&mounted);
    assert!(copied(&mounted) >= before, "{before}, {}", mounted.job());
    assert_eq!(resumptions(&mounted.log(), "copied again"), [marked]);
    assert_eq!(marked_regions(&first_state), None, "there is one record of it");
    mounted.unmount();
    // Its target is away, so that only the source can tell the next mount where it is known.
    let away = story.place.at("away.img");
    fs::rename(&story.b, &away).expect("rename");
    for name in ["third", "mnt"] {
        let mounted = Mount::of(&story.place, [&story.a]).named(name).start();
        mounted.wait_for("the missing target", |volumes| !volumes[0]["mirror"]["last_error"].is_null());
        mounted.unmount();
    }
    fs::rename(&away, &story.b).expect("rename");
    let mounted = Mount::of(&story.place, [&story.a]).named("fourth").start();
    wait_going_on(&mounted);
    story.finish(mounted);
}

/// A backup of the source has its attributes; the mirror stays with the source.
#[test]
fn not_to_go_on_with_a_copy_of_the_image() {
    let story = Story::new();
    let mounted = story.mount();
    mounted.mirror(&story.b, &["--speed", "4M"]);
    mounted.wait_for("some to be copied", |volumes| volumes[0]["mirror"]["copied_bytes"].as_u64() >= Some(6 * MIB));
    mounted.unmount();
    let copy = story.place.at("backup.img");
    run("cp", ["-a".into(), story.a.clone().into_os_string(), copy.clone().into_os_string()]).ok();
    let target = fs::read(&story.b).expect("read");
    let other = Mount::of(&story.place, [&copy]).named("other").start();
    assert!(other.job().is_null(), "{}", other.job());
    let disk = fs::OpenOptions::new().write(true).open(other.first_disk()).expect("open");
    disk.write_all_at(&[7; 512], 0).expect("a write");
    drop(disk);
    other.unmount();
    assert!(fs::read(&story.b).expect("read") == target, "the target got the copy's bytes");
    let mounted = story.mount();
    wait_going_on(&mounted);
    assert!(mounted.log().contains("copied again"), "{}", mounted.log());
    story.finish(mounted);
}

#[test]
fn when_ready() {
    let story = Story::new();
    let mounted = story.mount();
    mounted.mirror(&story.b, &[]);
    mounted.wait_ready();
    wait::until("the log to mark nothing", || marked_regions(&mounted.state_dir) == Some(0));
    let before = copied(&mounted);
    mounted.unmount();
    for _ in 0..2 {
        let mounted = story.mount();
        mounted.wait_ready();
        assert_eq!(copied(&mounted), before);
        assert!(bytes_written(mounted.server_pid) < MIB);
        mounted.unmount();
    }
    let mounted = story.mount();
    mounted.wait_ready();
    assert_eq!(resumptions(&mounted.log(), "copied again"), [0; 3]);
    story.finish(mounted);
}

#[test]
fn when_paused() {
    let story = Story::new();
    let mounted = story.mount();
    mounted.mirror(&story.b, &["--speed", "4M"]);
    mounted.verb::<&str>("pause", []).ok();
    let before = copied(&mounted);
    mounted.unmount();
    let mounted = story.mount();
    wait_going_on(&mounted);
    story.write(&mounted);
    let job = mounted.job();
    assert_eq!((&job["state"], &job["speed"]), (&json!("paused"), &json!(4 * MIB)), "{job}");
    assert_eq!(copied(&mounted), before, "it is paused");
    mounted.verb::<&str>("resume", []).ok();
    story.finish(mounted);
}

/// Written by a guest, then unmounted at once: what was not copied yet is marked.
#[test]
fn right_after_a_write() {
    let story = Story::new();
    let mut mounted = story.mount();
    mounted.mirror(&story.b, &["--copy-mode", "background"]);
    for _ in 0..4 {
        mounted.wait_ready();
        story.write(&mounted);
        mounted.unmount();
        mounted = story.mount();
    }
    assert_eq!(resumptions(&mounted.log(), "compared"), Vec::<u64>::new());
    story.finish(mounted);
}

#[test]
fn it_can_be_given_up_and_begun_anew() {
    let story = Story::new();
    let mounted = story.mount();
    mounted.mirror(&story.b, &["--speed", "1M"]);
    mounted.unmount();
    let mounted = story.mount();
    wait_going_on(&mounted);
    mounted.verb::<&str>("cancel", []).ok();
    assert!(mounted.job().is_null());
    assert_eq!(mounted.volume()["last_mirror"]["result"], "cancelled");
    assert!(!story.b.exists(), "cancel removes the target that it created");
    mounted.unmount();
    let mounted = story.mount();
    assert!(mounted.job().is_null());
    assert_eq!(mounted.volume()["last_mirror"]["result"], "cancelled", "it is remembered");
    mounted.mirror(&story.b, &["--speed", "1M"]);
    story.finish(mounted);
}

#[test]
fn what_was_finished_does_not_go_on() {
    let story = Story::new();
    let mounted = story.mount();
    mounted.mirror(&story.b, &[]);
    mounted.wait_ready();
    mounted.verb::<&str>("finish", []).ok();
    mounted.unmount();
    let mounted = story.mount();
    assert!(mounted.job().is_null());
    assert_eq!(mounted.volume()["last_mirror"]["result"], "finished");
    assert_eq!(leftovers::locks_on(&story.b), Vec::<String>::new());
    story.write(&mounted);
    mounted.unmount();
    story.table.assert_on(&story.a);
}

/// A mount whose mirror waits for its target.
fn waiting(story: &Story) -> Mounted {
    let mounted = story.mount();
    mounted.mirror(&story.b, &["--speed", "4M"]);
    mounted.unmount();
    fs::rename(&story.b, story.place.at("away.img")).expect("rename");
    let mounted = story.mount();
    story.write(&mounted);
    mounted.wait_for("the reason", |volumes| !volumes[0]["mirror"]["last_error"].is_null());
    let job = mounted.job();
    assert_eq!(
        (&job["state"], &job["io_status"], &job["speed"]),
        (&json!("paused"), &json!("failed"), &json!(4 * MIB))
    );
    let error = job["last_error"].as_str().expect("an error");
    assert!(error.contains(story.b.to_str().expect("UTF-8")) && error.contains("No such file"), "{error}");
    mounted
}

#[test]
fn without_its_target_it_waits() {
    let story = Story::new();
    let mounted = waiting(&story);
    mounted.verb("cutover", ["--timeout", "1s"]).refuses_naming(&["a.img"]);
    mounted.verb::<&str>("finish", []).refuses_naming(&["a.img"]);
    mounted.verb("mirror", words(&story.place.at("c.img"), &[])).refuses_naming(&["a.img"]);
    mounted.verb("set", ["--speed", "0", "--copy-mode", "background"]).ok();
    // A mount that ends meanwhile changes nothing.
    mounted.unmount();
    let mounted = story.mount();
    story.write(&mounted);
    fs::rename(story.place.at("away.img"), &story.b).expect("rename");
    mounted.verb::<&str>("resume", []).ok();
    mounted.wait_ready();
    let job = mounted.job();
    assert_eq!((&job["speed"], &job["copy_mode"]), (&json!(0), &json!("background")), "{job}");
    assert!(job["last_error"].is_null(), "{job}");
    story.finish(mounted);
}

#[test]
fn without_its_target_it_goes_on_by_itself_later() {
    let story = Story::new();
    let mounted = waiting(&story);
    fs::rename(story.place.at("away.img"), &story.b).expect("rename");
    mounted.wait_for("the mirror to go on", |volumes| volumes[0]["mirror"]["last_error"].is_null());
    story.finish(mounted);
}

#[test]
fn without_its_target_it_can_be_given_up() {
    let story = Story::new();
    let mounted = waiting(&story);
    mounted.verb::<&str>("cancel", []).ok();
    assert!(mounted.job().is_null());
    assert_eq!(mounted.volume()["last_mirror"]["result"], "cancelled");
    story.write(&mounted);
    mounted.mirror(&story.b, &[]);
    story.finish(mounted);
}

/// An NFS server, say, that does not answer while the machine boots.
#[test]
fn with_a_target_that_hangs_the_disk_is_served() {
    if !is_root("a file system of the test's own") {
        return;
    }
    let mut story = Story::new();
    let remote = Remote::new(&story.place);
    story.b = remote.sparse("target.img", SIZE);
    let mounted = story.mount();
    mounted.mirror(&story.b, &["--existing", "--speed", "1M"]);
    mounted.unmount();
    for kind in [Kind::Read, Kind::Write, Kind::Sync] {
        remote.hold(kind, "target.img", (0, SIZE), u64::MAX);
    }
    let mounted = story.mount();
    remote.wait_held(1);
    story.write(&mounted);
    assert!(!mounted.job().is_null());
    remote.behave();
    remote.let_go();
    story.finish(mounted);
}

#[test]
fn the_kernels_own_umount_suspends_it_too() {
    if !is_root("umount") {
        return;
    }
    let story = Story::new();
    let mut mounted = story.mount();
    mounted.mirror(&story.b, &["--speed", "4M"]);
    story.write(&mounted);
    run("umount", [&mounted.mountpoint]).ok();
    mounted.assert_gone();
    let mounted = story.mount();
    wait_going_on(&mounted);
    assert_eq!(resumptions(&mounted.log(), "compared"), Vec::<u64>::new());
    story.finish(mounted);
}
