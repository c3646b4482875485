//! A service manager that keeps descriptors (systemd's fd store) restarts the service, and the guest does not notice: neither a clean
//! restart nor the death of everything; a stop unmounts. By a stand-in for the manager.

mod common;

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::command;
use common::holder::Holder;
use common::leftovers;
use common::mortal::{self, resumptions};
use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;
use common::service_manager::{LEFT, ServiceManager};
use common::wait;

const SIZE: u64 = 64 << 20;

/// The line of the mount at `mountpoint` in mountinfo, with its number and its device.
fn entry(mountpoint: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let word = format!(" {} ", mountpoint.display());
    table.lines().find(|line| line.contains(&word)).map(str::to_owned)
}

fn serves(mounted: &Mounted, restarts: u64) {
    mounted.wait_for("a server", |_| true);
    assert_eq!(mounted.status()["restarts"], restarts);
}

/// Restarts and deaths in turn, with a mirror under way, then a cutover, then the same again on the new image.
#[test]
fn under_load_with_a_mirror() {
    let place = Place::in_memory();
    let seed = random::seed();
    let (a, b) = (place.sparse("a.img", SIZE), place.at("b.img"));
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    let entry_before = entry(&mounted.mountpoint);
    let load = Load::start(&mounted.disk("a.img"), &table, Habits { depth: 8, ..Habits::default() }, seed);
    mounted.mirror(&b, &["--speed", "4M"]);
    let rounds = if command::long() { 40 } else { 8 };
    for round in 0..rounds {
        load.wait_for_more(100);
        let copied = mounted.job()["copied_bytes"].as_u64().expect("a mirror");
        if round % 2 == 0 {
            manager.restart();
        } else {
            manager.kill_all_and_start();
        }
        load.wait_for_more(100);
        serves(&mounted, round + 1);
        mounted.wait_for("the mirror to go on", |volumes| volumes[0]["mirror"]["state"] != "paused");
        let job = mounted.job();
        assert_eq!(job["speed"], 4 << 20, "{job}");
        assert!(job["copied_bytes"].as_u64().is_some_and(|now| now >= copied), "{copied} bytes before, {job}");
        assert_eq!(entry(&mounted.mountpoint), entry_before, "the same mount");
        assert_eq!(mounted.pid("keeper_pid"), manager.pid());
    }
    let log = manager.log();
    assert_eq!(resumptions(&log, "compared"), Vec::<u64>::new(), "nobody touched the images: {log}");
    assert_eq!(resumptions(&log, "copied again").len() as u64, rounds, "{log}");
    mounted.verb("set", ["--speed", "0"]).ok();
    mounted.wait_ready();
    mounted.cutover();
    // The command line still names the old image.
    for round in 0..4 {
        load.wait_for_more(100);
        if round % 2 == 0 {
            manager.restart();
        } else {
            manager.kill_all_and_start();
        }
        load.wait_for_more(100);
        assert_eq!(mounted.active(), b);
        assert_eq!(entry(&mounted.mountpoint), entry_before, "the same mount");
    }
    assert_eq!(leftovers::locks_on(&a), Vec::<String>::new(), "the old image is let go");
    println!("the longest request took {:?}", load.stop());
    table.assert_on(&mounted.disk("a.img"));
    mounted.note_processes();
    manager.stop();
    mounted.assert_gone();
    table.assert_on(&b);
}

/// What the manager keeps is what is in use, and each by its name.
#[test]
fn what_is_kept_is_up_to_date() {
    let place = Place::on_disk();
    let (a, b) = (place.random("a.img", 4 << 20, 1), place.at("b.img"));
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    let alone = manager.kept();
    let images = |kept: &[String]| kept.iter().filter(|name| *name == "livemirror-image").count();
    let others: Vec<_> = alone.iter().filter(|name| *name != "livemirror-image").cloned().collect();
    let expected = ["connection", "directory", "lock", "requests", "server", "table"];
    assert_eq!(others, expected.map(|name| format!("livemirror-{name}")));
    mounted.mirror(&b, &["--speed", "1K"]);
    assert_eq!(images(&manager.kept()), 2 * images(&alone), "the target's, too");
    manager.restart();
    assert!(manager.log().contains("job a.img: suspended with the mount"), "{}", manager.log());
    assert_eq!(images(&manager.kept()), 2 * images(&alone));
    assert!(!leftovers::locks_on(&b).is_empty());
    mounted.verb::<OsString>("cancel", []).ok();
    assert_eq!(manager.kept(), alone);
    // While no process lives the images are locked, and the mount belongs to somebody.
    manager.signal(Signal::SIGTERM);
    assert_eq!(manager.wait(), Some(LEFT));
    assert!(!manager.kept().contains(&"livemirror-server".to_owned()), "{:?}", manager.kept());
    assert!(!leftovers::locks_on(&a).is_empty());
    let refused = Mount::of(&place, [&a]).attempt();
    refused.refuses_naming(&["already mounted"]);
    manager.start();
    assert!(manager.status().starts_with("serving "), "{}", manager.status());
    mounted.note_processes();
    manager.stop();
    mounted.assert_gone();
    assert_eq!(leftovers::locks_on(&a), Vec::<String>::new());
}

/// The main process alone dies: the server serves on until the next one is there to end it.
#[test]
fn a_server_that_outlives_its_keeper_is_ended_first() {
    let place = Place::in_memory();
    let seed = random::seed();
    let a = place.sparse("a.img", SIZE);
    let table = Table::new(seed, SIZE);
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    let load = Load::start(&mounted.disk("a.img"), &table, Habits::default(), seed);
    for _ in 0..3 {
        load.wait_for_more(100);
        let server = mounted.pid("server_pid");
        manager.signal(Signal::SIGKILL);
        assert_eq!(manager.wait(), None);
        load.wait_for_more(100);
        assert!(leftovers::is_running(server), "the server goes on");
        manager.start();
        assert!(!leftovers::is_running(server), "two serve one mount");
        load.wait_for_more(100);
        assert_eq!(mounted.pid("keeper_pid"), manager.pid());
    }
    println!("the longest request took {:?}", load.stop());
    mounted.note_processes();
    manager.stop();
    mounted.assert_gone();
    table.assert_on(&a);
}

/// A server that dies is the keeper's business, as ever; and so is an upgrade, after which the service goes on as before.
#[test]
fn deaths_and_upgrades_in_between() {
    let place = Place::in_memory();
    let a = place.random("a.img", 4 << 20, 1);
    let content = fs::read(&a).expect("read");
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    for round in 0..2 {
        let (keeper, before) = (manager.pid(), manager.kept());
        kill(Pid::from_raw(mounted.pid("server_pid")), Signal::SIGKILL).expect("kill");
        wait::until("the next server", || mounted.status()["restarts"] == 3 * round + 1);
        mounted.verb::<OsString>("upgrade", []).ok();
        assert_eq!(mounted.pid("keeper_pid"), keeper, "the same main process");
        assert_eq!(manager.kept(), before);
        assert!(fs::read(mounted.disk("a.img")).expect("read") == content);
        manager.restart();
        serves(&mounted, 3 * round + 3);
        assert!(fs::read(mounted.disk("a.img")).expect("read") == content);
    }
    // `livemirror unmount` ends the service, as a success: it is not started again.
    mounted.note_processes();
    mounted.verb::<OsString>("unmount", []).ok();
    assert_eq!(manager.wait(), Some(0), "{}", manager.log());
    assert_eq!(manager.kept(), Vec::<String>::new(), "nothing is left for a manager that keeps for longer");
    mounted.assert_gone();
}

#[test]
fn a_stop_waits_for_who_uses_the_disk_and_names_them() {
    let place = Place::on_disk();
    let a = place.random("a.img", 1 << 20, 1);
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    mounted.note_processes();
    let holder = Holder::of(&mounted.disk("a.img"));
    manager.signal(Signal::SIGINT);
    wait::until("the holder to be named", || manager.log().contains(&format!("pid {}", holder.pid())));
    assert!(entry(&mounted.mountpoint).is_some());
    holder.release();
    assert_eq!(manager.wait(), Some(0), "{}", manager.log());
    mounted.assert_gone();
}

/// Everything is dead and the connection was ended: the next start mounts anew, and what is kept is not in its way.
#[test]
fn a_connection_that_has_ended_is_mounted_anew() {
    let place = Place::on_disk();
    let a = place.random("a.img", 1 << 20, 1);
    let content = fs::read(&a).expect("read");
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    mortal::kill_all(manager.pid());
    assert_eq!(manager.wait(), None);
    // Ends the connection, with nobody there to be asked.
    umount2(&mounted.mountpoint, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).expect("umount");
    manager.start();
    assert!(manager.log().contains("that the service manager kept has ended"), "{}", manager.log());
    assert_eq!(mounted.status()["restarts"], 0);
    assert!(fs::read(mounted.disk("a.img")).expect("read") == content);
    assert_eq!(manager.kept().iter().filter(|name| *name == "livemirror-connection").count(), 1);
    manager.restart();
    serves(&mounted, 1);
    mounted.note_processes();
    manager.stop();
    mounted.assert_gone();
    assert_eq!(leftovers::locks_on(&a), Vec::<String>::new());
}

#[test]
fn what_is_not_understood_is_named_and_a_living_mount_is_not_touched() {
    let place = Place::on_disk();
    let a = place.random("a.img", 1 << 20, 1);
    let rubbish = || Some(OwnedFd::from(File::open("/dev/null").expect("/dev/null")));
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.replace("my.socket", rubbish());
    manager.start();
    let mut mounted = manager.mounted(mount);
    let named = |log: &str| log.matches("'my.socket', which is none of ours").count();
    assert_eq!(named(&manager.log()), 1, "{}", manager.log());
    let before = entry(&mounted.mountpoint);
    for by in [rubbish(), None] {
        mortal::kill_all(manager.pid());
        assert_eq!(manager.wait(), None);
        let table = manager.replace("livemirror-table", by);
        manager.try_start();
        assert_eq!(manager.wait(), Some(1), "{}", manager.log());
        assert!(manager.log().contains("its table is missing or damaged"), "{}", manager.log());
        assert_eq!(entry(&mounted.mountpoint), before);
        manager.replace("livemirror-table", table);
        manager.start();
        assert_eq!(fs::read(mounted.disk("a.img")).expect("read").len(), 1 << 20);
    }
    // A lost one of those that can be done without.
    mortal::kill_all(manager.pid());
    assert_eq!(manager.wait(), None);
    assert!(manager.replace("livemirror-requests", None).is_some());
    manager.start();
    assert_eq!(fs::read(mounted.disk("a.img")).expect("read").len(), 1 << 20);
    mounted.note_processes();
    manager.stop();
    mounted.assert_gone();
}

/// SIGTERM is a restart only where the manager has what the next start needs. Else the mount ends as soon as it is idle: nobody would
/// serve it.
#[test]
fn a_manager_that_has_nothing_is_left_nothing() {
    let place = Place::on_disk();
    let a = place.random("a.img", 1 << 20, 1);
    // It takes messages from the process only that it has started.
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::wrapped(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    assert_eq!(manager.kept(), Vec::<String>::new());
    assert_ne!(mounted.keeper_pid, manager.pid());
    kill(Pid::from_raw(mounted.keeper_pid), Signal::SIGTERM).expect("kill");
    assert_eq!(manager.wait(), Some(0), "{}", manager.log());
    mounted.assert_gone();
    drop(manager);

    // It is gone when the last descriptors come; a guest is waited for.
    let place = Place::on_disk();
    let (a, b) = (place.random("a.img", 1 << 20, 1), place.at("b.img"));
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    manager.vanish();
    mounted.mirror(&b, &["--speed", "1K"]);
    let guest = Holder::of(&mounted.disk("a.img"));
    manager.signal(Signal::SIGTERM);
    wait::until("it to be told", || manager.log().contains("does not have what it is to keep"));
    assert_eq!(fs::read(mounted.disk("a.img")).expect("read").len(), 1 << 20);
    drop(guest);
    assert_eq!(manager.wait(), Some(0), "{}", manager.log());
    mounted.assert_gone();
}

/// A restart does not change how the disks are mounted, and says so.
#[test]
fn another_command_line_counts_after_a_stop() {
    let place = Place::on_disk();
    let a = place.random("a.img", 1 << 20, 1);
    let mount = Mount::of(&place, [&a]);
    let mut manager = ServiceManager::of(&place, &mount);
    manager.start();
    let mut mounted = manager.mounted(mount);
    manager.add_word("--read-only");
    manager.restart();
    assert!(manager.log().contains("counts once the service was stopped and started again"), "{}", manager.log());
    File::options().write(true).open(mounted.disk("a.img")).expect("still writable");
    mounted.note_processes();
    manager.stop();
    mounted.assert_gone();
    manager.start();
    File::options().write(true).open(mounted.disk("a.img")).expect_err("read-only");
    manager.stop();
}

/// The unit, as it is installed, says what the program relies on, and systemd understands it.
#[test]
fn the_unit_is_understood() {
    let place = Place::on_disk();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut install = Command::new("sh");
    install.arg(root.join("packaging/install.sh")).arg(command::binary());
    install.env("PREFIX", place.path()).env("SBINDIR", place.at("sbin")).env_remove("UNITDIR").env_remove("DESTDIR");
    command::finish(install).ok();
    let (unit, instance) = (place.at("lib/systemd/system/livemirror@.service"), place.at("livemirror@mnt-vm.service"));
    let text = fs::read_to_string(&unit).expect("a unit");
    let program = place.at("bin/livemirror");
    let starts = format!("ExecStart={} mount --foreground", program.display());
    let left = format!("RestartForceExitStatus={LEFT}");
    for line in [
        &*starts,
        &*left,
        "KillSignal=SIGINT",
        "RestartKillSignal=SIGTERM",
        "FileDescriptorStoreMax=",
        "KillMode=mixed",
    ] {
        assert!(text.lines().any(|one| one.starts_with(line)), "{line} is not in {text}");
    }
    fs::copy(&unit, &instance).expect("copy");
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("SKIPPED: systemd-analyze is not installed");
        return;
    }
    let done = command::run("systemd-analyze", [Path::new("verify"), Path::new("--man=no"), &instance]).ok();
    assert_eq!(done.stderr, "");
}
