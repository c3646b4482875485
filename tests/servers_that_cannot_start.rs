//! No server can be started any more: the keeper keeps the connection and tries again, the guest waits, and `status` says what is in
//! the way, so that it can be repaired. Then all goes on, as if nothing had happened.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::leftovers;
use common::mounted::Mount;
use common::place::Place;
use common::wait;

/// A guest in a process of its own, told line by line what to do. It holds the disk in that process only: this one starts others,
/// none of which has anything to do with a disk that does not answer.
struct Guest {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Guest {
    fn of(disk: &std::path::Path) -> Guest {
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec 3<>\"$0\" 4<>\"$0\"; while read -r line; do eval \"$line\"; done"]).arg(disk);
        let mut child = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sh");
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        Guest { child, input, output: BufReader::new(output) }
    }

    fn told(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("the guest listens");
    }

    fn says(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a line");
        line.trim().to_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // A write that waits for a server ends with the mount, which is swept away after this.
        let _ = self.child.try_wait();
    }
}

#[test]
fn the_guest_waits_and_status_tells() {
    let place = Place::on_disk();
    let image = place.random("a.img", 1 << 20, 1);
    let mut mounted = Mount::of(&place, [&image]).start();
    let mut guest = Guest::of(&mounted.disk("a.img"));
    guest.told("echo before >&3; echo written $?");
    assert_eq!(guest.says(), "written 0");
    // Nobody can listen there.
    fs::remove_file(&mounted.control).expect("rm");
    fs::create_dir(&mounted.control).expect("mkdir");
    let killed = Instant::now();
    kill(Pid::from_raw(mounted.server_pid), Signal::SIGKILL).expect("kill");
    // close(2) does not wait for a server, nor does the one in exec(2); a write does.
    guest.told("exec 4>&-; /bin/true; echo closed; echo after >&3; echo written $?");
    assert_eq!(guest.says(), "closed");

    let mut said = mounted.verb("status", ["--json"]).ok();
    wait::until("status to tell what is in the way", || {
        said = mounted.verb("status", ["--json"]).ok();
        let status = said.json();
        status["restarts"].as_u64() >= Some(6) && status["server_pid"].is_null()
    });
    let status = said.json();
    // The first at once: that server had answered. Then after 20 ms, 40 ms, ... at least.
    let doublings = u32::try_from(status["restarts"].as_u64().expect("a number")).expect("not in a loop") - 2;
    let rested = (0..doublings).map(|at| Duration::from_millis(20 << at.min(7))).sum();
    assert!(killed.elapsed() >= rested, "{doublings} doublings in {:?}", killed.elapsed());
    assert_eq!(status["keeper_pid"], mounted.keeper_pid, "{said}");
    let socket = mounted.control.to_str().expect("UTF-8");
    assert!(status["last_exit"].as_str().is_some_and(|exit| exit.contains(socket)), "{said}");
    assert!(said.stderr.contains("no server runs") && said.stderr.contains(socket), "{said}");
    assert_eq!(status["volumes"][0]["active"], image.to_str().expect("UTF-8"), "{said}");
    assert!(!leftovers::locks_on(&image).is_empty(), "the image stays locked");
    assert_eq!(leftovers::mounts_below(&mounted.mountpoint).len(), 1);
    assert_eq!(fs::read(&image).expect("read")[..7], *b"before\n");

    fs::remove_dir(&mounted.control).expect("rmdir");
    assert_eq!(guest.says(), "written 0", "it waited, and no error came of it");
    assert_eq!(fs::read(mounted.disk("a.img")).expect("read")[..13], *b"before\nafter\n");
    guest.told("exec 3>&-; echo closed");
    assert_eq!(guest.says(), "closed");
    mounted.note_processes();
    mounted.unmount();
}
