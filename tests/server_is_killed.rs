//! The server is killed, again and again, at any moment: while guests write, while a mirror runs, during a cutover, while it is
//! still starting. The guest sees a stall at most. The mirror goes on by itself, as it was told to, and ends in a cutover.

mod common;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use common::block_device::{FileSystem, LoopDevice};
use common::command::{self, is_root, long, run};
use common::compare;
use common::database::{self, Database};
use common::leftovers;
use common::mortal;
use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random::{self, Random};
use common::wait;

const SIZE: u64 = 64 << 20;

fn kills() -> u64 {
    if long() { 50 } else { 10 }
}

/// How often each of several mounts is to be killed, for [`as_often_as_told`].
fn told_kills() -> u64 {
    std::env::var("LIVEMIRROR_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(40)
}

/// How the mount is known to the kernel: another mount at the same place has other words here.
fn mount_of(mounted: &Mounted) -> String {
    let point = mounted.mountpoint.to_str().expect("UTF-8");
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    table.lines().find(|line| line.split(' ').nth(4) == Some(point)).expect("a mount").to_owned()
}

/// A mount whose server is struck dead.
struct Victim {
    mounted: Mounted,
    random: Random,
    struck: u64,
    longest_absence: Duration,
    /// The longest request at each kill.
    stalls: Vec<Duration>,
}

impl Victim {
    fn new(mounted: Mounted, seed: u64) -> Victim {
        Victim {
            mounted,
            random: Random::new(seed, 1_000),
            struck: 0,
            longest_absence: Duration::ZERO,
            stalls: Vec::new(),
        }
    }

    /// Strikes after a random moment.
    fn strike(&mut self, signal: Signal) {
        std::thread::sleep(Duration::from_millis(self.random.below(120)));
        mortal::strike(self.mounted.keeper_pid, signal);
        self.struck += 1;
        // Now and then again at once: the next one is not up yet.
        if signal == Signal::SIGKILL && self.random.one_in(3) {
            std::thread::sleep(Duration::from_millis(self.random.below(40)));
            mortal::strike(self.mounted.keeper_pid, signal);
            self.struck += 1;
        }
    }

    /// The mirror, once it runs again after a kill.
    fn mirror_again(&mut self) -> Value {
        let start = Instant::now();
        self.mounted.wait_for("the mirror to go on", |volumes| {
            let job = &volumes[0]["mirror"];
            let last = &volumes[0]["last_mirror"];
            assert!(!job.is_null(), "the mirror is gone: {last}");
            assert!(job["last_error"].is_null(), "{job}");
            job["state"] != "paused"
        });
        self.longest_absence = self.longest_absence.max(start.elapsed());
        self.mounted.job()
    }

    /// Cuts over to `target` while the server is killed, at most `times`.
    fn cut_over(&mut self, target: &std::path::Path, times: u64) {
        for _ in 0..times {
            std::thread::scope(|scope| {
                let mounted = &self.mounted;
                let cutover = scope.spawn(|| mounted.verb("cutover", ["--max-pause", "10s", "--timeout", "60s"]));
                std::thread::sleep(Duration::from_millis(self.random.below(150)));
                mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
                self.struck += 1;
                let said = cutover.join().expect("cutover");
                assert!(matches!(said.code, Some(0 | 1 | 3)) && !said.stderr.contains("panicked"), "{said}");
            });
            if self.mounted.active() == target {
                return;
            }
        }
        self.mirror_again();
        self.mounted.wait_ready();
        self.mounted.cutover();
        assert_eq!(self.mounted.active(), target);
    }
}

struct Story {
    images: [PathBuf; 2],
    table: Arc<Table>,
    load: Load,
    victim: Victim,
    place: Place,
}

impl Story {
    fn start(habits: Habits) -> Story {
        let (place, seed) = (Place::in_memory(), random::seed());
        let images = [place.sparse("a.img", SIZE), place.at("b.img")];
        let table = Table::new(seed, SIZE);
        pattern::fill(&images[0], &table);
        let mounted = Mount::of(&place, [&images[0]]).start();
        let load = Load::start(&mounted.disk("a.img"), &table, habits, seed);
        load.wait_for_more(20);
        Story { place, images, table, load, victim: Victim::new(mounted, seed) }
    }

    /// Checks every byte. Returns the longest request at each kill.
    fn end(self, last: &std::path::Path) -> Vec<Duration> {
        let Story { place: _place, table, load, mut victim, .. } = self;
        load.wait_for_more(20);
        let (struck, absent) = (victim.struck, victim.longest_absence);
        println!(
            "{struck} kills; the longest request took {:?}, a mirror was away for {absent:?} at most",
            load.stop()
        );
        table.assert_on(&victim.mounted.disk("a.img"));
        victim.mounted.note_processes();
        victim.mounted.unmount();
        table.assert_on(last);
        victim.stalls
    }
}

/// Kills the server `kills` times, then during a cutover, then once more. Returns the longest request at each of the first.
fn while_mirroring(mode: &str, habits: Habits, kills: u64) -> Vec<Duration> {
    let mut story = Story::start(habits);
    let victim = &mut story.victim;
    let before = mount_of(&victim.mounted);
    let held = File::open(victim.mounted.disk("a.img")).expect("open");
    let inode = held.metadata().expect("fstat").ino();
    victim.mounted.mirror(&story.images[1], &["--copy-mode", mode, "--speed", "12M"]);
    let mut reported = 0;
    while victim.struck < kills {
        story.load.longest_since();
        reported = victim.mounted.job()["copied_bytes"].as_u64().expect("a count").max(reported);
        victim.strike(Signal::SIGKILL);
        let job = victim.mirror_again();
        // Who waited has its answer.
        story.load.wait_for_more(4 * habits.depth as u64);
        victim.stalls.push(story.load.longest_since());
        let copied = job["copied_bytes"].as_u64().expect("a count");
        assert!(copied >= reported, "{reported} bytes were reported as copied, now {copied}");
        assert_eq!((&job["copy_mode"], &job["speed"]), (&Value::from(mode), &Value::from(12 << 20)), "{job}");
    }
    victim.mounted.verb("set", ["--speed", "0"]).ok();
    story.load.wait_for_more(20);
    victim.cut_over(&story.images[1], 3);
    victim.strike(Signal::SIGKILL);
    story.load.wait_for_more(20);
    assert_eq!(victim.mounted.active(), story.images[1]);
    assert_eq!(victim.mounted.volume()["last_mirror"]["result"], "completed");
    assert_eq!(mount_of(&victim.mounted), before, "it was mounted anew");
    held.read_exact_at(&mut [0; 4096], 0).expect("the descriptor of before");
    assert_eq!(held.metadata().expect("fstat").ino(), inode);
    drop(held);
    let last = story.images[1].clone();
    story.end(&last)
}

/// By a tool that everybody knows. Its checksums tell less than those of `pattern`: not that a block is old.
#[test]
fn under_fio_that_verifies() {
    let (place, seed) = (Place::in_memory(), random::seed());
    let [a, b] = [place.sparse("a.img", SIZE), place.at("b.img")];
    let mut victim = Victim::new(Mount::of(&place, [&a]).start(), seed);
    victim.mounted.mirror(&b, &["--speed", "32M"]);
    let disk = victim.mounted.disk("a.img");
    // Every block once, in a time in which all kills come, then all are read again.
    let rate = SIZE / 4096 / (kills() / 4).max(1);
    let mut fio = Command::new("fio");
    fio.args([
        "--name=guest",
        "--rw=randwrite",
        "--bs=4k",
        "--ioengine=libaio",
        "--iodepth=8",
        "--direct=1",
        "--minimal",
    ])
    .args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=1"])
    .args([format!("--size={SIZE}"), format!("--rate_iops={rate}"), format!("--filename={}", disk.display())]);
    std::thread::scope(|scope| {
        // Also where a strike fails it is waited for: it ends by itself, or with the mount.
        let guest = scope.spawn(move || command::finish(fio));
        for _ in 0..kills() {
            victim.strike(Signal::SIGKILL);
        }
        guest.join().expect("fio").ok();
    });
    victim.mirror_again();
    victim.mounted.verb("set", ["--speed", "0"]).ok();
    victim.mounted.wait_ready();
    victim.cut_over(&b, 3);
    compare::assert_same_content(&disk, &b);
    victim.mounted.note_processes();
    victim.mounted.unmount();
}

/// Some programs ignore the end of their children, and pass that on to what they start.
#[test]
fn where_whoever_mounted_ignores_children() {
    let place = Place::in_memory();
    let image = place.random("a.img", 1 << 20, 1);
    let wrapper = place.at("ignores-children");
    fs::write(&wrapper, format!("#!/bin/sh\ntrap '' CHLD\nexec {} \"$@\"\n", env!("CARGO_BIN_EXE_livemirror")))
        .expect("write");
    fs::set_permissions(&wrapper, Permissions::from_mode(0o755)).expect("chmod");
    let mut mounted = Mount::of(&place, [&image]).by_program(&wrapper).start();
    let disk = File::open(mounted.first_disk()).expect("open");
    for _ in 0..2 {
        let killed = mounted.server_pid;
        kill(Pid::from_raw(killed), Signal::SIGKILL).expect("kill");
        let mut byte = [0];
        disk.read_exact_at(&mut byte, 0).expect("another server answers");
        mounted.note_processes();
        assert_ne!(mounted.server_pid, killed);
    }
    drop(disk);
    mounted.unmount();
}

#[test]
fn under_small_writes_in_background_mode() {
    while_mirroring("background", Habits { depth: 8, ..Habits::small() }, kills());
}

#[test]
fn under_large_writes_in_write_blocking_mode() {
    while_mirroring("write-blocking", Habits { depth: 4, ..Habits::large() }, kills());
}

#[test]
fn under_mixed_writes_in_auto_mode() {
    while_mirroring("auto", Habits { depth: 8, ..Habits::default() }, kills());
}

/// `benches/kills.sh`: many kills, each mount's last ones during and after a cutover, and how long requests took then.
#[test]
#[ignore = "long; benches/kills.sh runs it"]
fn as_often_as_told() {
    let loads = [
        ("4 KiB", "background", Habits { depth: 8, ..Habits::small() }),
        ("1 MiB", "write-blocking", Habits { depth: 4, ..Habits::large() }),
        ("4 to 32 KiB", "auto", Habits { depth: 8, ..Habits::default() }),
    ];
    for (requests, mode, habits) in loads {
        let mut stalls = Vec::new();
        let mut left = told_kills();
        while left > 0 {
            // A mount lives through so many.
            let kills = left.min(25);
            stalls.extend(while_mirroring(mode, habits, kills));
            left -= kills;
        }
        stalls.sort();
        let [median, late, longest] =
            [50, 99, 100].map(|percent| stalls[(stalls.len() - 1) * percent / 100].as_millis());
        println!("| {requests} | {mode} | {} | {median} | {late} | {longest} | 0 | 0 |", told_kills());
    }
}

/// Whichever way it dies.
#[test]
fn by_other_signals() {
    let mut story = Story::start(Habits { depth: 4, rest: Duration::from_micros(300), ..Habits::default() });
    story.victim.mounted.mirror(&story.images[1], &["--speed", "4M"]);
    for signal in [Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGBUS, Signal::SIGILL] {
        story.load.wait_for_more(50);
        // The program's own handler of SIGSEGV lets one pass that no instruction has caused: the next one is deadly.
        let server = mortal::strike(story.victim.mounted.keeper_pid, signal);
        wait::until("the server to die", || {
            let _ = kill(Pid::from_raw(server), signal);
            !leftovers::is_running(server)
        });
        story.victim.struck += 1;
        wait::until("the next server", || ![0, server].contains(&story.victim.mounted.pid("server_pid")));
        story.victim.mirror_again();
        let exit = story.victim.mounted.status()["last_exit"].as_str().unwrap_or_default().to_owned();
        assert!(exit.contains(signal.as_str()), "{exit}");
    }
    story.victim.mounted.verb("set", ["--speed", "0"]).ok();
    story.victim.mounted.wait_ready();
    story.victim.mounted.cutover();
    let last = story.images[1].clone();
    story.end(&last);
}

/// What was asked for while it ran is asked for still.
#[test]
fn a_paused_mirror_stays_paused() {
    let mut story = Story::start(Habits { depth: 4, ..Habits::default() });
    let victim = &mut story.victim;
    victim.mounted.mirror(&story.images[1], &["--speed", "2M"]);
    victim.mounted.verb::<&str>("pause", []).ok();
    victim.mounted.verb("set", ["--speed", "3M", "--copy-mode", "background"]).ok();
    for _ in 0..3 {
        victim.strike(Signal::SIGKILL);
        let goes_on = |log: String| log.matches("goes on to").count() as u64;
        wait::until("the mirror to be taken up", || goes_on(victim.mounted.log()) > 0);
        story.load.wait_for_more(20);
        // It passes through the states of a job that begins; no byte is copied in them.
        victim.mounted.wait_for("the mirror to be paused", |volumes| volumes[0]["mirror"]["state"] == "paused");
        let job = victim.mounted.job();
        assert_eq!(
            (&job["state"], &job["copy_mode"], &job["speed"]),
            (&Value::from("paused"), &Value::from("background"), &Value::from(3 << 20))
        );
    }
    let copied = victim.mounted.job()["copied_bytes"].clone();
    story.load.wait_for_more(200);
    assert_eq!(victim.mounted.job()["copied_bytes"], copied, "it is paused");
    victim.mounted.verb("set", ["--speed", "0"]).ok();
    victim.mounted.verb::<&str>("resume", []).ok();
    victim.mounted.wait_ready();
    victim.mounted.cutover();
    let last = story.images[1].clone();
    story.end(&last);
}

/// SQLite on ext4 on a loop device: whoever commits does not notice either.
#[test]
fn under_a_database() {
    if !is_root("a loop device") {
        return;
    }
    let (place, seed) = (Place::in_memory(), random::seed());
    let [a, b] = [place.sparse("a.img", SIZE), place.at("b.img")];
    let mut victim = Victim::new(Mount::of(&place, [&a]).start(), seed);
    let device = LoopDevice::over(&victim.mounted.disk("a.img"));
    let filesystem = FileSystem::new_ext4(&device.path, &place.at("live"));
    let database = Database::start(&filesystem.path.join("data.db"));
    victim.mounted.mirror(&b, &[]);
    while victim.struck < kills() {
        database.wait_for_more(10);
        victim.strike(Signal::SIGKILL);
    }
    victim.mirror_again();
    victim.mounted.wait_ready();
    victim.cut_over(&b, 2);
    database.wait_for_more(20);
    let committed = database.stop();
    println!("{} kills, {committed} transactions", victim.struck);
    filesystem.unmount();
    device.detach();
    victim.mounted.note_processes();
    victim.mounted.unmount();

    let device = LoopDevice::over(&b);
    let name = device.path.to_str().expect("UTF-8").to_owned();
    run("fsck.ext4", ["-f", "-n", &name]).ok();
    let filesystem = FileSystem::mount(&[&name], &place.at("checked"));
    database::assert_holds(&filesystem.path.join("data.db"), committed);
    filesystem.unmount();
    device.detach();
}
