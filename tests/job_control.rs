//! Pause, resume, speed limits and the numbers of `status`: progress counts data, never says that all is done while something
//! is dirty, and a limit holds in every phase without delaying pause or cancel.

mod common;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::qmp::Qmp;
use common::random;

const MIB: u64 = 1 << 20;

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_else(|| panic!("{name} is no number: {value}"))
}

fn mounted(place: &Place, size: u64) -> (Mounted, std::sync::Arc<Table>, u64) {
    let seed = random::seed();
    let image = place.sparse("disk.img", size);
    let table = Table::new(seed, size);
    pattern::fill(&image, &table);
    (Mount::of(place, [&image]).start(), table, seed)
}

#[test]
fn a_paused_job_copies_nothing_and_tracks_all() {
    let place = Place::in_memory();
    let (mounted, table, seed) = mounted(&place, 16 * MIB);
    let target = place.at("target.img");
    mounted.mirror(&target, &["--speed", "1M"]);
    mounted.verb::<&str>("pause", []).ok();
    mounted.wait_for("the job to pause", |volumes| volumes[0]["mirror"]["state"] == "paused");
    mounted.wait_for("nothing to be in flight", |volumes| volumes[0]["mirror"]["in_flight_bytes"] == 0);
    let before = number(&mounted.job(), "copied_bytes");
    let load = Load::start(&mounted.disk("disk.img"), &table, Habits { depth: 4, ..Habits::default() }, seed);
    load.wait_for_more(1_000);
    let job = mounted.job();
    assert_eq!(number(&job, "copied_bytes"), before, "a paused job copied: {job}");
    assert!(number(&job, "dirty_bytes") > 0 && job["ready"] == false && job["in_sync"] == false, "{job}");
    mounted.verb("set", ["--speed", "0"]).ok();
    assert_eq!(mounted.job()["state"], "paused", "a new limit does not resume it");
    mounted.verb::<&str>("resume", []).ok();
    mounted.wait_ready();
    mounted.verb::<&str>("pause", []).ok();
    mounted.wait_for("standby", |volumes| volumes[0]["mirror"]["state"] == "standby");
    load.wait_for_more(1_000);
    mounted.verb::<&str>("resume", []).ok();
    mounted.cutover();
    load.stop();
    mounted.unmount();
    table.assert_on(&target);
}

/// The limit is a rate: what was copied never exceeds what the limit allows for the time that has passed, plus a burst.
#[test]
fn the_speed_limit_holds_and_can_be_changed() {
    let place = Place::in_memory();
    let (mounted, _table, _seed) = mounted(&place, 64 * MIB);
    let start = Instant::now();
    mounted.mirror(&place.at("target.img"), &["--speed", "4M"]);
    let allowed = |rate: u64, since: Instant| (since.elapsed().as_secs_f64() * rate as f64) as u64 + 4 * MIB;
    while start.elapsed() < Duration::from_secs(2) {
        let copied = number(&mounted.job(), "copied_bytes");
        assert!(copied <= allowed(4 * MIB, start), "{copied} bytes after {:?} at 4 MiB/s", start.elapsed());
    }
    let copied = number(&mounted.job(), "copied_bytes");
    assert!(copied > 0, "a limited job copies all the same");
    let start = Instant::now();
    mounted.verb("set", ["--speed", "8M"]).ok();
    let job = mounted.job();
    assert_eq!(number(&job, "speed"), 8 * MIB);
    assert!(number(&job, "copied_bytes") <= copied + allowed(8 * MIB, start), "{job}");
    assert!(!job["eta_seconds"].is_null(), "no expected time: {job}");
    let start = Instant::now();
    mounted.verb("set", ["--speed", "1K"]).ok();
    mounted.verb::<&str>("cancel", []).ok();
    assert!(start.elapsed() < Duration::from_secs(20), "a limit delays cancel");
    mounted.unmount();
}

#[test]
fn holes_cost_nothing_of_the_speed_limit() {
    let place = Place::on_disk();
    let image = place.sparse("disk.img", 1 << 40);
    let mounted = Mount::of(&place, [&image]).start();
    mounted.mirror(&place.at("target.img"), &["--speed", "64K"]);
    mounted.wait_ready();
    let job = mounted.job();
    assert_eq!((number(&job, "data_bytes"), number(&job, "copied_bytes")), (0, 0), "{job}");
    mounted.unmount();
}

#[test]
fn progress_counts_data_and_never_claims_too_much() {
    let place = Place::in_memory();
    let (mounted, table, seed) = mounted(&place, 16 * MIB);
    let habits = Habits { depth: 4, rest: Duration::from_millis(1), ..Habits::default() };
    let load = Load::start(&mounted.disk("disk.img"), &table, habits, seed);
    mounted.mirror(&place.at("target.img"), &["--copy-mode", "background"]);
    let mut seen = 0;
    while seen < 50 {
        let job = mounted.job();
        if number(&job, "dirty_bytes") + number(&job, "in_flight_bytes") > 0 {
            assert_eq!(job["in_sync"], false, "{job}");
            assert!(
                number(&job, "copied_bytes") < number(&job, "data_bytes"),
                "all done, but something is dirty: {job}"
            );
        }
        seen += 1;
    }
    load.stop();
    mounted.wait_for("the mirror to be in sync", |volumes| volumes[0]["mirror"]["in_sync"] == true);
    let job = mounted.job();
    assert!(number(&job, "data_bytes") >= 16 * MIB, "{job}");
    assert_eq!(number(&job, "copied_bytes"), number(&job, "data_bytes"), "{job}");
    assert_eq!((number(&job, "dirty_bytes"), number(&job, "in_flight_bytes")), (0, 0), "{job}");
    mounted.cutover();
    assert!(number(&mounted.volume()["guest"], "written_bytes") > 0);
    mounted.unmount();
}

#[test]
fn the_copy_mode_can_be_changed_under_load() {
    let place = Place::in_memory();
    let (mounted, table, seed) = mounted(&place, 16 * MIB);
    let target = place.at("target.img");
    let load = Load::start(&mounted.disk("disk.img"), &table, Habits { depth: 8, ..Habits::default() }, seed);
    mounted.mirror(&target, &["--copy-mode", "background"]);
    for _ in 0..4 {
        for mode in ["write-blocking", "background", "auto"] {
            mounted.verb("set", ["--copy-mode", mode]).ok();
            assert_eq!(mounted.job()["copy_mode"], mode);
            load.wait_for_more(200);
        }
    }
    mounted.cutover();
    load.wait_for_more(200);
    load.stop();
    mounted.unmount();
    table.assert_on(&target);
}

/// Two commands at the same moment: one wins, the others get a clear error, and the disk is whole.
#[test]
fn commands_at_the_same_moment() {
    let place = Place::in_memory();
    let (mounted, table, seed) = mounted(&place, 16 * MIB);
    let load = Load::start(&mounted.disk("disk.img"), &table, Habits { depth: 4, ..Habits::default() }, seed);
    let targets: Vec<_> = (0..4).map(|number| place.at(&format!("target-{number}.img"))).collect();
    std::thread::scope(|scope| {
        let attempt = |target| mounted.verb("mirror", [target]);
        let attempts: Vec<_> = targets.iter().map(|target| scope.spawn(move || attempt(target))).collect();
        let done: Vec<_> = attempts.into_iter().map(|attempt| attempt.join().expect("a mirror")).collect();
        assert_eq!(done.iter().filter(|done| done.code == Some(0)).count(), 1, "{done:?}");
        done.into_iter().filter(|done| done.code != Some(0)).for_each(|done| drop(done.refuses_naming(&[])));
    });
    let left: Vec<_> = targets.iter().filter(|target| target.exists()).collect();
    assert_eq!(left.len(), 1, "the losers' targets are gone");
    std::thread::scope(|scope| {
        let cutover = scope.spawn(|| mounted.verb("cutover", ["--max-pause", "10s", "--timeout", "100s"]));
        let cancel = scope.spawn(|| mounted.verb::<&str>("cancel", []));
        let done = [cutover.join().expect("cutover"), cancel.join().expect("cancel")];
        assert_eq!(done.iter().filter(|done| done.code == Some(0)).count(), 1, "{done:?}");
    });
    load.wait_for_more(200);
    load.stop();
    let active = mounted.active();
    mounted.unmount();
    table.assert_on(&active);
}

/// Whoever sees that a mirror is gone sees how that very mirror ended, however often and whenever it looks.
#[test]
fn a_mirror_that_is_gone_has_its_outcome_recorded() {
    let place = Place::in_memory();
    let image = place.random("disk.img", MIB, 1);
    let mounted = Mount::of(&place, [&image]).start();
    let mut looking = Qmp::connect(&mounted.control);
    let mut acting = Qmp::connect(&mounted.control);
    for number in 0..40 {
        let target = place.at(&format!("target-{number}.img"));
        let target = target.to_str().expect("UTF-8");
        acting.ok("drive-mirror", json!({"device": "disk.img", "target": target, "format": "raw", "sync": "full"}));
        std::thread::scope(|scope| {
            let looker = scope.spawn(|| {
                loop {
                    let status = looking.ok("livemirror-status", json!({}));
                    let volume = &status["volumes"][0];
                    if volume["mirror"].is_null() {
                        return volume["last_mirror"]["target"].clone();
                    }
                }
            });
            acting.ok("livemirror-cancel", json!({"device": "disk.img", "keep": false}));
            assert_eq!(looker.join().expect("a looker"), json!(target), "attempt {number}");
        });
    }
    mounted.unmount();
}
