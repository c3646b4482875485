//! `livemirror upgrade` replaces the program that serves a mount by the one on disk, and the guest sees a stall at most. A program
//! that does not work is not stayed with.

mod common;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use common::command;
use common::mounted::{Mount, Mounted, words};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;
use common::wait;

const SIZE: u64 = 64 << 20;

/// Puts a copy of the program, or a script, where the mount's program is, as packages do: by renaming.
fn install(place: &Place, content: Option<&str>) -> PathBuf {
    let (program, aside) = (place.at("livemirror"), place.at("livemirror.new"));
    // Written by another process: a child that another test makes meanwhile would keep a descriptor of ours open for a moment, and nobody
    // runs what somebody may write.
    let copied = match content {
        Some(script) => {
            let text = place.file("livemirror.text", script.as_bytes());
            let done = command::run("cp", [text.as_os_str(), aside.as_os_str()]);
            fs::remove_file(&text).expect("rm");
            done
        }
        None => command::run("cp", [std::ffi::OsStr::new(command::binary()), aside.as_os_str()]),
    };
    copied.ok();
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)).expect("chmod");
    fs::rename(&aside, &program).expect("rename");
    program
}

/// What a process runs now.
fn program_of(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).expect("a running process")
}

struct Story {
    place: Place,
    mounted: Mounted,
    table: std::sync::Arc<Table>,
    small: Load,
    large: Large,
}

/// Writes of 1 MiB, one after the other, on a second disk.
struct Large {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<std::io::Result<(u64, std::time::Duration)>>,
}

impl Large {
    fn start(disk: &Path) -> Large {
        use std::os::unix::fs::{FileExt, OpenOptionsExt};
        use std::sync::atomic::{AtomicBool, Ordering};
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let (told, disk) = (stop.clone(), disk.to_owned());
        let thread = std::thread::spawn(move || {
            let file = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk)?;
            let (mut rounds, mut longest) = (0_u64, std::time::Duration::ZERO);
            let mut bytes = common::aligned::Aligned::zeroed(1 << 20);
            let mut found = common::aligned::Aligned::zeroed(1 << 20);
            while !told.load(Ordering::SeqCst) {
                let at = rounds % 16 * (1 << 20);
                bytes.fill(u8::try_from(rounds % 251).expect("small") + 1);
                let start = std::time::Instant::now();
                file.write_all_at(&bytes, at)?;
                longest = longest.max(start.elapsed());
                file.read_exact_at(&mut found, at)?;
                if found[..] != bytes[..] {
                    return Err(std::io::Error::other(format!("round {rounds} reads back something else")));
                }
                rounds += 1;
            }
            Ok((rounds, longest))
        });
        Large { stop, thread }
    }

    fn stop(self) -> (u64, std::time::Duration) {
        self.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        self.thread.join().expect("the writer").expect("no error in the guest")
    }
}

impl Story {
    fn start() -> Story {
        let place = Place::in_memory();
        let program = install(&place, None);
        let seed = random::seed();
        let [a, b] = [place.sparse("a.img", SIZE), place.sparse("b.img", SIZE)];
        let table = Table::new(seed, SIZE);
        pattern::fill(&a, &table);
        let mounted = Mount::of(&place, [&a, &b]).by_program(&program).start();
        let small = Load::start(&mounted.disk("a.img"), &table, Habits { depth: 16, ..Habits::default() }, seed);
        let large = Large::start(&mounted.disk("b.img"));
        Story { place, mounted, table, small, large }
    }

    fn end(mut self) {
        self.small.wait_for_more(200);
        println!("the longest request took {:?}", self.small.stop());
        let (rounds, longest) = self.large.stop();
        println!("the longest of {rounds} writes of 1 MiB took {longest:?}");
        assert!(rounds > 0);
        self.table.assert_on(&self.mounted.disk("a.img"));
        self.mounted.note_processes();
        self.mounted.unmount();
        self.table.assert_on(&self.place.at("a.img"));
    }

    fn upgrade(&self) -> command::Done {
        let mut upgrade = std::process::Command::new(command::binary());
        upgrade.arg("upgrade").arg(&self.mounted.mountpoint);
        command::finish(upgrade)
    }
}

#[test]
fn five_times() {
    let story = Story::start();
    let keeper = story.mounted.pid("keeper_pid");
    for round in 1..=5 {
        story.small.wait_for_more(200);
        let before = story.mounted.pid("server_pid");
        let program = install(&story.place, None);
        assert_ne!(program_of(keeper), program, "the program that runs was removed");
        let said = story.upgrade().ok().stdout;
        println!("{}", said.trim());
        let server = story.mounted.pid("server_pid");
        assert_ne!(server, before);
        assert_eq!(story.mounted.pid("keeper_pid"), keeper, "the keeper stays the same process");
        for (name, pid) in [("server", server), ("keeper", keeper)] {
            assert!(said.contains(&format!("{name} {pid}")), "{said}");
            assert_eq!(program_of(pid), program, "{name}");
        }
        let version = env!("CARGO_PKG_VERSION");
        assert!(said.contains(&format!("from {version} to {version}")) && said.contains(" ms"), "{said}");
        assert_eq!(story.mounted.status()["restarts"], round);
    }
    // What a keeper that has replaced itself still does: a server that dies has a successor.
    let before = story.mounted.pid("server_pid");
    kill(Pid::from_raw(before), Signal::SIGKILL).expect("kill");
    story.small.wait_for_more(200);
    assert_ne!(story.mounted.pid("server_pid"), before);
    story.end();
}

#[test]
fn a_signal_to_the_keeper_does_it_too() {
    let story = Story::start();
    let program = install(&story.place, None);
    let keeper = story.mounted.pid("keeper_pid");
    kill(Pid::from_raw(keeper), Signal::SIGHUP).expect("kill");
    wait::until("the keeper to run the new program", || program_of(keeper) == program);
    assert_eq!(program_of(story.mounted.pid("server_pid")), program);
    story.end();
}

#[test]
fn a_program_that_does_not_run_changes_nothing() {
    let story = Story::start();
    let [server, keeper] = ["server_pid", "keeper_pid"].map(|which| story.mounted.pid(which));
    for script in ["#!/bin/sh\nexit 1\n", "#!/nowhere/sh\n", "rubbish"] {
        let program = install(&story.place, Some(script));
        let refused = story.upgrade().refuses_naming(&[program.to_str().expect("UTF-8"), &server.to_string()]);
        assert!(refused.stderr.contains("hint: install"), "{refused}");
        assert_eq!(["server_pid", "keeper_pid"].map(|which| story.mounted.pid(which)), [server, keeper]);
    }
    fs::remove_file(story.place.at("livemirror")).expect("rm");
    story.upgrade().refuses_naming(&["livemirror", "No such file"]);
    assert_eq!(story.mounted.status()["restarts"], 0);
    install(&story.place, None);
    story.upgrade().ok();
    story.end();
}

#[test]
fn a_server_that_does_not_come_up_is_gone_back_from() {
    let story = Story::start();
    let keeper = story.mounted.pid("keeper_pid");
    let script = "#!/bin/sh\n[ \"$1\" = internal-version ] && echo 9.9.9 && exit 0\nexit 7\n";
    install(&story.place, Some(script));
    for _ in 0..2 {
        story.small.wait_for_more(100);
        let refused = story.upgrade().refuses_naming(&["exited with code 7", "goes on"]);
        assert_eq!(refused.code, Some(1));
        assert!(refused.complaint().contains(&format!("server {}", story.mounted.pid("server_pid"))), "{refused}");
        assert!(story.mounted.status()["last_exit"].as_str().is_some_and(|exit| exit.contains("code 7")));
        story.small.wait_for_more(100);
    }
    assert_eq!(story.mounted.pid("keeper_pid"), keeper);
    // The program that goes on has no file any more, and yet has a successor when its server dies.
    kill(Pid::from_raw(story.mounted.pid("server_pid")), Signal::SIGKILL).expect("kill");
    story.small.wait_for_more(100);
    install(&story.place, None);
    story.upgrade().ok();
    story.end();
}

/// As a program does that does not understand what the keeper before it kept.
#[test]
fn a_program_that_cannot_be_the_keeper_hands_back() {
    let story = Story::start();
    let keeper = story.mounted.pid("keeper_pid");
    let hand_back = "exec /proc/self/fd/$4 internal-keeper resume $3";
    install(&story.place, Some(&only_as_keeper(hand_back)));
    let before = story.mounted.pid("server_pid");
    story.upgrade().refuses_naming(&["could not become the keeper"]);
    assert_ne!(story.mounted.pid("server_pid"), before, "the new server stays");
    assert_eq!(story.mounted.pid("keeper_pid"), keeper);
    install(&story.place, None);
    story.upgrade().ok();
    story.end();
}

#[test]
fn a_program_that_dies_as_the_keeper_is_replaced_by_the_server() {
    let story = Story::start();
    let keeper = story.mounted.pid("keeper_pid");
    install(&story.place, Some(&only_as_keeper("exit 1")));
    story.upgrade().refuses_naming(&["the keeper died"]);
    wait::until("a new keeper", || ![0, keeper].contains(&story.mounted.pid("keeper_pid")));
    install(&story.place, None);
    story.upgrade().ok();
    story.end();
}

/// A program that works, but does `what` when it is to become the keeper.
fn only_as_keeper(what: &str) -> String {
    let real = command::binary();
    format!("#!/bin/sh\n[ \"$1 $2\" = 'internal-keeper resume' ] && {what}\nexec {real} \"$@\"\n")
}

#[test]
fn a_mirror_that_runs_goes_on() {
    let story = Story::start();
    let (disk, target) = (story.mounted.disk("b.img"), story.place.at("c.img"));
    story.mounted.verb_on(&disk, "mirror", words(&target, &["--speed", "1M", "--copy-mode", "background"])).ok();
    story.upgrade().ok();
    let mirror_of_b = |volumes: &[Value]| {
        let volume = volumes.iter().find(|volume| volume["name"] == "b.img").expect("b.img");
        assert!(volume["last_mirror"].is_null(), "it has ended: {volume}");
        volume["mirror"].clone()
    };
    story.mounted.wait_for("the mirror to go on", |volumes| mirror_of_b(volumes)["state"] == "running");
    let status = story.mounted.status();
    let job = mirror_of_b(status["volumes"].as_array().expect("volumes"));
    assert_eq!((&job["speed"], &job["copy_mode"]), (&json!(1 << 20), &json!("background")), "{job}");
    story.mounted.verb_on(&disk, "cancel", Vec::<OsString>::new()).ok();
    assert!(!target.exists(), "what the mirror made is removed by a server that did not make it");
    story.end();
}
