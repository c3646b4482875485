//! Threads of a process that was killed, which the kernel has not let go of: they wait for a device or a server of files that does
//! not answer, and no signal ends such a wait. Until they return the process is not reaped, what it has open stays open and
//! locked, and whatever they were writing may still land (rule 14). Read from /proc only.

use std::fs;
use std::path::{Path, PathBuf};

/// SIGKILL in the masks of /proc/PID/status.
const KILLED: u64 = 1 << (libc::SIGKILL - 1);

/// What is left of a process that was killed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lingering {
    /// How many of its threads are still there.
    pub threads: usize,
    /// What they wait for, as far as this user may see it: the file of the system call that each is in.
    pub files: Vec<PathBuf>,
}

/// The threads of `process` that were told to die and have not. `None`: there are none.
pub fn look(process: u32) -> Option<Lingering> {
    let mut found = Lingering::default();
    for task in fs::read_dir(format!("/proc/{process}/task")).ok()?.flatten() {
        let task = task.path();
        if fs::read_to_string(task.join("status")).is_ok_and(|status| was_killed(&status)) {
            found.threads += 1;
            found.files.extend(file_in_use(&task));
        }
    }
    found.files.sort();
    found.files.dedup();
    (found.threads > 0).then_some(found)
}

/// A thread that has ended keeps its mask while others of its process go on.
fn was_killed(status: &str) -> bool {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let pending = field("SigPnd:").and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    let ended = field("State:").is_none_or(|state| state.starts_with(['Z', 'X']));
    pending & KILLED != 0 && !ended
}

/// The file that a thread reads, writes or flushes at this moment: the calls that do have its descriptor as their first argument.
fn file_in_use(task: &Path) -> Option<PathBuf> {
    let call = fs::read_to_string(task.join("syscall")).ok()?;
    let descriptor = call.split(' ').nth(1)?.trim_start_matches("0x");
    let descriptor = u32::from_str_radix(descriptor, 16).ok()?;
    let file = fs::read_link(task.join("fd").join(descriptor.to_string())).ok()?;
    file.is_absolute().then_some(file)
}

impl std::fmt::Display for Lingering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = if self.threads == 1 { "a thread of it" } else { "threads of it" };
        let files: Vec<_> = self.files.iter().map(|file| file.display().to_string()).collect();
        write!(
            f,
            "{what} cannot end before {} answers",
            match &files[..] {
                [] => "a device or file server".to_owned(),
                files => files.join(", "),
            }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_was_told_to_die_and_has_not_counts() {
        let status =
            |state: &str, pending: &str| format!("Name:\tx\nState:\t{state}\nSigPnd:\t{pending}\nShdPnd:\t0\n");
        assert!(was_killed(&status("D (disk sleep)", "0000000000000100")));
        assert!(!was_killed(&status("D (disk sleep)", "0000000000000000")));
        assert!(!was_killed(&status("Z (zombie)", "0000000000000100")));
        assert!(!was_killed(&status("S (sleeping)", "0000000000004000")));
        assert_eq!(look(std::process::id()), None);
        assert_eq!(look(u32::MAX), None);
    }

    #[test]
    fn the_file_of_a_call_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().canonicalize().unwrap().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let opened = fs::File::options().read(true).write(true).open(&fifo).unwrap();
        let reader = opened.try_clone().unwrap();
        let waiting = std::thread::spawn(move || std::io::Read::read(&mut &reader, &mut [0]));
        let tasks = || fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
        while !tasks().any(|task| file_in_use(&task) == Some(fifo.clone())) {
            assert!(!waiting.is_finished());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::io::Write::write(&mut &opened, &[0]).unwrap();
        waiting.join().unwrap().unwrap();
        let text = Lingering { threads: 1, files: vec!["/nfs/b.img".into()] }.to_string();
        assert_eq!(text, "a thread of it cannot end before /nfs/b.img answers");
    }
}
