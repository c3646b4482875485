//! `--finish-by`: as slow as will do, and an honest word where nothing would. `--guest-first`: the copy yields to the guest.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::compare::assert_same_content;
use common::mounted::Mount;
use common::nbd::Server;
use common::place::Place;
use common::random;

const MIB: u64 = 1 << 20;

/// A server in memory that takes no more than so many MiB a second.
fn slow_server(place: &Place, name: &str, mib_per_second: u64) -> Server {
    let rate = format!("rate={}", mib_per_second * 8 * MIB);
    Server::nbdkit(place, name, &["--filter=rate", "memory", "48M", &rate, "burstiness=0.05"])
}

#[test]
fn a_mirror_takes_the_time_that_it_was_given() {
    let place = Place::in_memory();
    let source = place.random("disk.img", 48 * MIB, random::seed());
    let server = slow_server(&place, "slow.sock", 32);
    let mounted = Mount::of(&place, [&source]).start();
    let begun = Instant::now();
    let asked = Duration::from_secs(10);
    mounted.mirror(&server.uri(), &["--finish-by", "10s"]);
    mounted.wait_for("a forecast", |volumes| !volumes[0]["mirror"]["in_time"].is_null());
    let job = mounted.job();
    // A machine that is stopped for seconds may think otherwise for a moment.
    if job["in_time"] == true {
        assert!(job["own_speed"].as_u64().is_some_and(|speed| speed > 0), "{job}");
    }
    mounted.wait_ready();
    let took = begun.elapsed();
    // It can do it in 1.5 s. That it is not late either is shown where time is no obstacle: in the tests of the rule itself.
    assert!(took >= asked.mul_f64(0.85), "ready after {took:?}: faster than it had to be");
    println!("asked for {asked:?}, ready after {took:?}");
    // From now on it follows, and at no slow pace.
    mounted.wait_for("no limit of its own", |volumes| volumes[0]["mirror"]["own_speed"] == 0);
    let disk = File::options().write(true).open(mounted.first_disk()).expect("open");
    for at in (0..8 * MIB).step_by(1 << 20) {
        disk.write_all_at(&vec![7; 1 << 20], at).expect("write");
    }
    mounted.wait_for("the mirror to follow", |volumes| volumes[0]["mirror"]["in_sync"] == true);
    drop(disk);
    mounted.cutover();
    mounted.unmount();
}

#[test]
fn what_cannot_be_ready_in_time_is_said_at_once() {
    let place = Place::in_memory();
    let source = place.random("disk.img", 48 * MIB, random::seed());
    let server = slow_server(&place, "slow.sock", 8);
    let mounted = Mount::of(&place, [&source]).start();
    let disk = mounted.first_disk();
    let said = mounted.verb_on(&disk, "mirror", [server.uri().as_os_str(), "--finish-by".as_ref(), "2s".as_ref()]);
    assert_eq!(said.code, Some(0), "it goes on all the same: {said}");
    assert!(said.stderr.contains("will not be ready by"), "{said}");
    let job = mounted.job();
    assert!(job["in_time"] == false && job["own_speed"] == 0, "full speed: {job}");
    assert!(job["eta_seconds"].as_u64().is_some_and(|left| left >= 1), "{job}");
    // All the time in the world: slow enough to be seen, then none asked for.
    mounted.verb("set", ["--finish-by", "2h"]).ok();
    mounted.wait_for("another forecast", |volumes| volumes[0]["mirror"]["in_time"] == true);
    mounted
        .wait_for("a slow pace", |volumes| volumes[0]["mirror"]["own_speed"].as_u64().is_some_and(|speed| speed > 0));
    let said = mounted.verb::<&str>("status", []).ok().stdout;
    assert!(said.contains("to be ready by"), "{said}");
    mounted.verb("set", ["--finish-by", "never"]).ok();
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
}

#[test]
fn the_copy_yields_to_a_guest_and_goes_on_when_it_is_quiet() {
    let place = Place::in_memory();
    let data = place.random("data.img", 48 * MIB, random::seed());
    let path = data.display().to_string();
    // Each read takes 20 ms, whatever else goes on.
    let server = Server::nbdkit(&place, "far.sock", &["--filter=delay", "file", &path, "rdelay=20ms"]);
    let target = place.at("target.img");
    let mounted = Mount::of(&place, [server.uri()]).start();
    let disk = File::open(mounted.first_disk()).expect("open");
    std::thread::scope(|scope| {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let disk = &disk;
        scope.spawn(move || {
            let mut at = 0;
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                disk.read_exact_at(&mut [0; 4096], at % (48 * MIB)).expect("read");
                at += 1 << 16;
            }
        });
        mounted.mirror(&target, &["--guest-first", "5ms"]);
        mounted.wait_for("the copy to yield", |volumes| volumes[0]["mirror"]["own_speed"] == MIB);
        let job = mounted.job();
        assert!(job["guest_p99_us"].as_u64().is_some_and(|p99| p99 >= 20_000), "{job}");
        assert_eq!((&job["guest_first_us"], &job["ready"]), (&5_000.into(), &false.into()), "{job}");
        let said = mounted.verb::<&str>("status", []).ok().stdout;
        assert!(said.contains("yields"), "{said}");
        // A bound that the guest keeps: it goes faster again, while the guest goes on.
        mounted.verb("set", ["--guest-first", "10s"]).ok();
        mounted.wait_for("the copy to go on", |volumes| {
            let job = &volumes[0]["mirror"];
            job["ready"] == true || job["own_speed"] != MIB
        });
        mounted.verb("set", ["--guest-first", "0"]).ok();
        mounted.wait_for("no bound", |volumes| volumes[0]["mirror"]["guest_first_us"].is_null());
        mounted.wait_ready();
        drop(stop);
    });
    drop(disk);
    mounted.cutover();
    mounted.unmount();
    assert_same_content(&data, &target);
}
