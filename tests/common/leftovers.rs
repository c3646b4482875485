//! What a test's directory is still held by: processes, mounts, loop devices, locks. Looked up in /proc and /sys only:
//! nothing here touches a path below a mount that might be dead.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::finish_within;
use super::wait;

/// Mountpoints at or below `dir`, the innermost last.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    mounts_of_type("", dir)
}

/// Mountpoints of livemirror at or below `dir`.
pub fn our_mounts_below(dir: &Path) -> Vec<PathBuf> {
    mounts_of_type(" - fuse.livemirror ", dir)
}

fn mounts_of_type(mark: &str, dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let lines = table.lines().filter(|line| line.contains(mark));
    let points = lines.filter_map(|line| line.split(' ').nth(4)).map(|text| PathBuf::from(unescape(text)));
    points.filter(|point| point.starts_with(dir)).collect()
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Processes, other than this one, that hold a file in `dir` or were started with a path in it.
pub fn processes_of(dir: &Path) -> BTreeSet<i32> {
    processes(|process| belongs_to(process, dir))
}

fn processes(wanted: impl Fn(&Path) -> bool) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if pid as u32 != std::process::id() && is_running(pid) && wanted(&entry.path()) {
            found.insert(pid);
        }
    }
    found
}

/// Those of [`processes_of`] that are ours. Nobody else's descriptors are looked at: a look at one keeps its mount busy for
/// that moment, which another test may be about to unmount.
pub fn ours_of(dir: &Path) -> BTreeSet<i32> {
    let binary = fs::canonicalize(super::command::binary()).expect("the program");
    processes(|process| fs::read_link(process.join("exe")).is_ok_and(|exe| exe == binary) && belongs_to(process, dir))
}

/// True until the process has ended. A zombie has: it is its parent's business to collect it.
pub fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}

fn belongs_to(process: &Path, dir: &Path) -> bool {
    let words = fs::read(process.join("cmdline")).unwrap_or_default();
    if String::from_utf8_lossy(&words).split('\0').any(|word| word.contains(&*dir.to_string_lossy())) {
        return true;
    }
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target.starts_with(dir)))
}

/// Loop devices whose backing file lies in `dir`.
pub fn loops_of(dir: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let backed = devices.filter_map(|device| {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
        Path::new(backing.trim_end()).starts_with(dir).then(|| format!("/dev/{}", device.file_name().to_string_lossy()))
    });
    backed.collect()
}

/// Byte-range locks that anybody holds on `file`, as /proc/locks shows them, each once: while locks elsewhere come and go, the
/// list may name one twice under two numbers.
pub fn locks_on(file: &Path) -> Vec<String> {
    let data = fs::metadata(file).expect("stat");
    let dev = data.dev();
    let id = format!("{:02x}:{:02x}:{}", nix::sys::stat::major(dev), nix::sys::stat::minor(dev), data.ino());
    let locks = fs::read_to_string("/proc/locks").expect("/proc/locks");
    let held = locks.lines().filter(|line| line.split_whitespace().any(|word| word == id));
    let each: BTreeSet<_> = held.filter_map(|line| line.split_once(": ")).map(|(_, lock)| lock.to_owned()).collect();
    each.into_iter().collect()
}

/// Files that the program keeps for a running mount at `mountpoint`, outside of the directories that it was told: those that
/// speak of it.
pub fn runtime_files(mountpoint: &Path) -> Vec<PathBuf> {
    let point = mountpoint.to_string_lossy().into_owned();
    let speaks = |path: &PathBuf| fs::read(path).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(&point));
    let files = fs::read_dir("/run/livemirror").into_iter().flatten().flatten().map(|entry| entry.path());
    files.filter(speaks).collect()
}

/// Panics if anything of a mount at `mountpoint`, used with files in `dir`, is still there. The processes get the moment
/// that the kernel's own umount does not wait for.
#[track_caller]
pub fn assert_none(dir: &Path, mountpoint: &Path) {
    assert_eq!(our_mounts_below(dir), Vec::<PathBuf>::new(), "still mounted");
    wait::until("the processes of an unmounted disk to end", || ours_of(dir).is_empty());
    assert_eq!(runtime_files(mountpoint), Vec::<PathBuf>::new(), "runtime files left behind");
}

/// The broom: ends whatever is left of a test in `dir`, however it ended.
pub fn sweep(dir: &Path) {
    if mounts_below(dir).is_empty() && loops_of(dir).is_empty() && ours_of(dir).is_empty() {
        return;
    }
    for _ in 0..8 {
        let mounts = mounts_below(dir);
        for device in loops_of(dir) {
            unmount_all_of(&device);
            quietly(Command::new("losetup").args(["-d", &device]));
        }
        for point in mounts.iter().rev() {
            quietly(Command::new("umount").arg("-l").arg(point));
        }
        let processes = processes_of(dir);
        for &pid in &processes {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if mounts.is_empty() && processes.is_empty() && loops_of(dir).is_empty() {
            return;
        }
        wait::within(Duration::from_secs(2), || processes_of(dir).is_empty() && mounts_below(dir).is_empty());
    }
}

/// Unmounts whatever file systems lie on a block device.
fn unmount_all_of(device: &str) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in table.lines() {
        let source = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').nth(1));
        if let (true, Some(point)) = (source == Some(device), line.split(' ').nth(4)) {
            quietly(Command::new("umount").args(["-l", &unescape(point)]));
        }
    }
}

fn quietly(command: &mut Command) {
    let command = std::mem::replace(command, Command::new("true"));
    let _ = finish_within(command, Duration::from_secs(20));
}
