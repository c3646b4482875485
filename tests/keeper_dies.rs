//! The keeper dies, and the guest does not notice: the server goes on, and makes itself a new keeper, which does all that the old one
//! did. A mount never has two.

mod common;

use std::ffi::OsString;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::leftovers;
use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;
use common::wait;

const SIZE: u64 = 64 << 20;

fn end_by_force(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
}

/// Kills the keeper and waits for the next one.
fn lose_keeper(mounted: &Mounted) -> i32 {
    let old = mounted.pid("keeper_pid");
    end_by_force(old);
    wait::until("a new keeper", || ![0, old].contains(&mounted.pid("keeper_pid")));
    mounted.pid("keeper_pid")
}

/// The keepers of mounts with files in `place`.
fn keepers(place: &Place) -> Vec<i32> {
    let is_keeper = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).split('\0').any(|word| word == "internal-keeper"))
    };
    leftovers::ours_of(place.path()).into_iter().filter(is_keeper).collect()
}

#[test]
fn again_and_again_under_load() {
    let place = Place::in_memory();
    let seed = random::seed();
    let image = place.sparse("a.img", SIZE);
    let table = Table::new(seed, SIZE);
    pattern::fill(&image, &table);
    let mut mounted = Mount::of(&place, [&image]).start();
    let load = Load::start(&mounted.disk("a.img"), &table, Habits::default(), seed);
    for round in [0, 2, 4] {
        load.wait_for_more(200);
        let server = mounted.pid("server_pid");
        let keeper = lose_keeper(&mounted);
        assert_eq!(mounted.pid("server_pid"), server, "the server goes on");
        assert_eq!(keepers(&place), [keeper]);
        let written = format!("\"keeper_pid\": {keeper}");
        wait::until("the runtime record to name it", || {
            let files = leftovers::runtime_files(&mounted.mountpoint);
            files.iter().any(|file| fs::read_to_string(file).is_ok_and(|text| text.contains(&written)))
        });
        // At once: the new keeper replaces it.
        end_by_force(server);
        load.wait_for_more(200);
        let status = mounted.status();
        assert_eq!(mounted.pid("keeper_pid"), keeper);
        assert_ne!(mounted.pid("server_pid"), server);
        assert_eq!(status["restarts"], round + 1);
        // And once more: now the server is the keeper's child.
        end_by_force(mounted.pid("server_pid"));
        load.wait_for_more(200);
        wait::until("the count", || mounted.status()["restarts"] == round + 2);
        assert!(mounted.status()["last_exit"].as_str().is_some_and(|exit| exit.contains("SIGKILL")));
    }
    // The counts go along.
    lose_keeper(&mounted);
    assert_eq!(mounted.status()["restarts"], 6);
    let keeper = mounted.pid("keeper_pid");
    mounted.verb::<OsString>("upgrade", []).ok();
    assert_eq!(mounted.pid("keeper_pid"), keeper);
    println!("the longest request took {:?}", load.stop());
    assert!(mounted.log().contains("keeps the mount now"), "the log tells of it");
    table.assert_on(&mounted.disk("a.img"));
    mounted.note_processes();
    mounted.unmount();
    table.assert_on(&image);
}

/// What was parked is handed over: the image stays locked while no server runs, and after a cutover it is the new one.
#[test]
fn what_is_parked_goes_along() {
    let place = Place::on_disk();
    let (image, target) = (place.random("a.img", 4 << 20, 1), place.at("b.img"));
    let content = fs::read(&image).expect("read");
    let mut mounted = Mount::of(&place, [&image]).start();
    lose_keeper(&mounted);
    mounted.mirror(&target, &[]);
    mounted.cutover();
    assert_eq!(leftovers::locks_on(&image), Vec::<String>::new(), "the old image is let go");
    let keeper = lose_keeper(&mounted);
    let parked = fs::read_dir(format!("/proc/{keeper}/fd")).expect("/proc").flatten();
    let parked: Vec<_> = parked.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
    assert!(parked.contains(&target) && !parked.contains(&image), "{parked:?}");
    // Found by its parked descriptor only.
    fs::rename(&target, place.at("c.img")).expect("rename");
    end_by_force(mounted.pid("server_pid"));
    assert!(fs::read(mounted.disk("a.img")).expect("read") == content);
    fs::rename(place.at("c.img"), &target).expect("rename");
    mounted.note_processes();
    mounted.unmount();
}

/// A keeper that only seemed dead: the server's new one finds the lock taken, and there are not two.
#[test]
fn two_never_keep_one_mount() {
    let place = Place::in_memory();
    let image = place.random("a.img", 1 << 20, 1);
    let mounted = Mount::of(&place, [&image]).start();
    let keeper = mounted.pid("keeper_pid");
    let second = Mount::of(&place, [&image]).on(&mounted.mountpoint).attempt();
    assert_ne!(second.code, Some(0));
    assert_eq!(keepers(&place), [keeper]);
    mounted.unmount();
}

#[test]
fn an_unmount_after_it_is_as_clean_as_ever() {
    for verb in [&["unmount"][..], &["unmount", "--abort"]] {
        let place = Place::on_disk();
        let image = place.random("a.img", 1 << 20, 1);
        let mut mounted = Mount::of(&place, [&image]).start();
        lose_keeper(&mounted);
        mounted.note_processes();
        mounted.verb(verb[0], &verb[1..]).ok();
        mounted.assert_gone();
        assert_eq!(leftovers::locks_on(&image), Vec::<String>::new());
        Mount::of(&place, [&image]).start().unmount();
    }
}
