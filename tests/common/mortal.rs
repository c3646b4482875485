//! Killing the processes of a mount, and what their deaths leave.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::leftovers::is_running;
use super::wait;

/// The server that the keeper has started last, also while it is coming up. `None`: there is none at this moment.
pub fn server_of(keeper: i32) -> Option<i32> {
    children(keeper).into_iter().find(|pid| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).split('\0').any(|word| word == "internal-server"))
    })
}

fn children(pid: i32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// Sends `signal` to the server, waiting for one if the keeper is just starting it; who it was.
#[track_caller]
pub fn strike(keeper: i32, signal: Signal) -> i32 {
    wait::until_some("a server", || {
        let server = server_of(keeper)?;
        kill(Pid::from_raw(server), signal).ok().map(|()| server)
    })
}

/// Kills the keeper and all that it has started, so that none of them sees the other one's end.
#[track_caller]
pub fn kill_all(keeper: i32) {
    let send = |pid, signal| kill(Pid::from_raw(pid), signal);
    send(keeper, Signal::SIGSTOP).expect("the keeper runs");
    let all = children(keeper);
    for &pid in &all {
        let _ = send(pid, Signal::SIGSTOP);
    }
    for &pid in all.iter().chain([&keeper]) {
        let _ = send(pid, Signal::SIGKILL);
    }
    wait::until("the killed to be dead", || !all.iter().chain([&keeper]).any(|&pid| is_running(pid)));
}

/// Bytes that a process has handed to write calls so far, of whatever kind.
#[track_caller]
pub fn bytes_written(pid: i32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).expect("a running process");
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: ")).expect("wchar");
    line.parse().expect("a number")
}

/// How many regions the intent logs in a state directory mark. `None`: there is no log.
pub fn marked_regions(state_dir: &Path) -> Option<u64> {
    let names = fs::read_dir(state_dir).expect("a state directory").flatten();
    let log = names
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("intent-")))?;
    let sectors = fs::read(log).ok()?;
    Some(
        sectors
            .chunks(512)
            .map(|sector| sector[48..504].iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>())
            .sum(),
    )
}

/// The numbers that the log's lines of the form "N bytes are WORD" tell, in order.
pub fn resumptions(log: &str, word: &str) -> Vec<u64> {
    let mark = format!(" bytes are {word}");
    let number = |line: &str| line.split(&mark).next()?.rsplit(' ').next()?.parse().ok();
    log.lines().filter(|line| line.contains(&mark)).filter_map(number).collect()
}
