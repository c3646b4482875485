//! No process of the program touches its own mount: it would wait for itself, for ever if the server cannot answer (HARD_PARTS
//! 21). The system calls of the keeper, of the server and of each verb are watched throughout the life of a mount.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::command::{self, is_root};
use common::holder::Holder;
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::wait;

/// What is watched: every call that takes a path. Directories and descriptors are shown with their paths.
const WATCH: [&str; 6] = ["-f", "-y", "-s", "4096", "-e", "trace=%file"];

/// `strace` on the processes of a mount, until it is dropped.
struct Watch {
    strace: Child,
    log: PathBuf,
}

impl Watch {
    fn on(mounted: &Mounted, log: PathBuf) -> Self {
        let pids = [mounted.keeper_pid, mounted.server_pid].map(|pid| pid.to_string());
        let mut strace = Command::new("strace");
        strace.args(WATCH).args(["-p", &pids[0], "-p", &pids[1], "-o"]).arg(&log).stderr(Stdio::null());
        let mut watch = Watch { strace: strace.spawn().expect("strace"), log };
        wait::until("strace to be attached to keeper and server", || {
            let ended = watch.strace.try_wait().expect("strace");
            assert!(ended.is_none(), "strace cannot attach: {ended:?}");
            pids.iter().all(|pid| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
            })
        });
        watch
    }

    /// What was seen, once the watched processes have ended.
    fn calls(mut self) -> Vec<String> {
        wait::until("strace to end", || self.strace.try_wait().expect("strace").is_some());
        lines(&self.log)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

fn lines(log: &Path) -> Vec<String> {
    fs::read_to_string(log).expect("strace's log").lines().map(str::to_owned).collect()
}

/// Runs a verb, watched; how it ends is the caller's to say.
fn watched(place: &Place, code: i32, words: &[&str]) -> Vec<String> {
    let log = place.at("verb.strace");
    let mut strace = Command::new("strace");
    strace.args(WATCH).arg("-o").arg(&log).arg(command::binary()).args(words);
    command::finish(strace).exits_with(code);
    lines(&log)
}

/// The calls that reach into the mount at `mountpoint`. Mounting and unmounting name it without looking into it.
fn touches(calls: &[String], mountpoint: &Path) -> Vec<String> {
    let mountpoint = mountpoint.to_str().expect("UTF-8");
    let below = format!("{mountpoint}/");
    let reaches = |call: &String| {
        let Some((name, arguments)) = call.split_once('(') else { return false };
        let name = name.rsplit(' ').next().unwrap_or(name);
        if matches!(name, "mount" | "umount2" | "execve") {
            return false;
        }
        // A symbolic link of /proc is read without a look at what it names; anything else follows it.
        let follows_another = !name.starts_with("readlink") && !name.starts_with("lstat");
        // A path: relative ones are shown after the directory that they begin in.
        let mut quoted = arguments.split('"');
        let mut found = false;
        while let (Some(before), Some(path)) = (quoted.next(), quoted.next()) {
            // What a link says is not where it was looked for.
            if found || (name.starts_with("readlink") && before.starts_with(", ")) {
                break;
            }
            // An open descriptor itself: its opening was seen. What lies below a mount over the image has the mount's path.
            if path.is_empty() {
                continue;
            }
            let directory = before.rsplit_once('<').and_then(|(_, rest)| rest.split_once('>')).map(|(path, _)| path);
            let whole = if path.starts_with('/') {
                PathBuf::from(path)
            } else {
                Path::new(directory.unwrap_or("/")).join(path)
            };
            let whole = whole.to_string_lossy().into_owned();
            let named =
                follows_another && whole.starts_with("/proc/") && whole.contains("/fd/") && !whole.contains("/self/");
            found |= whole == mountpoint || whole.starts_with(&below) || named;
        }
        found
    };
    let end = calls.iter().position(|call| call.contains("umount2(") && call.ends_with("= 0"));
    // After the unmount the path is an ordinary directory again.
    calls[..end.unwrap_or(calls.len())].iter().filter(|call| reaches(call)).cloned().collect()
}

fn whole_life(place: &Place, mounted: Mounted) {
    let mountpoint = mounted.mountpoint.clone();
    let disk = mounted.first_disk();
    let (disk_text, target) = (disk.to_str().expect("UTF-8"), place.at("target.img"));
    let watch = Watch::on(&mounted, place.at("server.strace"));
    let mut calls = Vec::new();
    let mut verb = |code, words: &[&str]| calls.extend(watched(place, code, words));
    verb(0, &["status", disk_text, "--json"]);
    verb(0, &["status", disk_text]);
    verb(0, &["list"]);
    verb(0, &["mirror", disk_text, target.to_str().expect("UTF-8"), "--wait"]);
    verb(0, &["pause", disk_text]);
    verb(0, &["resume", disk_text]);
    verb(0, &["cutover", disk_text, "--max-pause", "10s"]);
    verb(1, &["mirror", disk_text, disk_text, "--existing"]);
    let holder = Holder::of(&disk);
    verb(3, &["unmount", mountpoint.to_str().expect("UTF-8")]);
    holder.release();
    verb(0, &["unmount", mountpoint.to_str().expect("UTF-8")]);
    let mut mounted = mounted;
    mounted.assert_gone();

    let served = watch.calls();
    assert!(served.iter().any(|call| call.contains("umount2(")), "the watch saw the whole life of the server");
    assert!(calls.iter().any(|call| call.contains("/proc/self/mountinfo")), "the watch saw the verbs");
    assert_eq!(touches(&served, &mountpoint), Vec::<String>::new(), "by keeper or server");
    assert_eq!(touches(&calls, &mountpoint), Vec::<String>::new(), "by a verb");
}

#[test]
fn in_the_life_of_a_directory_mount() {
    if !is_root("watching other processes") {
        return;
    }
    let place = Place::in_memory();
    let image = place.random("disk.img", 4 << 20, 1);
    let mounted = Mount::of(&place, [&image]).start();
    whole_life(&place, mounted);
}

#[test]
fn in_the_life_of_a_mount_over_the_image_itself() {
    if !is_root("watching other processes") {
        return;
    }
    let place = Place::in_memory();
    let image = place.random("disk.img", 4 << 20, 1);
    let mounted = Mount::of(&place, [&image]).on(&image).start();
    whole_life(&place, mounted);
}

/// The watch itself: what it lets pass and what it reports.
#[test]
fn the_watch_sees_a_touch() {
    let touch = |call: &str| !touches(&[call.to_owned()], Path::new("/m/nt")).is_empty();
    assert!(touch(r#"12 statx(AT_FDCWD</>, "/m/nt/disk.img", 0) = 0"#));
    assert!(touch(r#"12 openat(AT_FDCWD</m>, "nt", O_PATH) = 3"#));
    assert!(touch(r#"12 newfstatat(7</m/nt>, "disk.img", {}, 0) = 0"#));
    assert!(touch(r#"12 stat("/proc/77/fd/3", {}) = 0"#));
    assert!(!touch(r#"12 readlink("/proc/77/fd/3", "/m/nt/disk.img", 4096) = 14"#));
    assert!(!touch(r#"12 umount2("/m/nt", 0) = 0"#));
    assert!(!touch(r#"12 statx(AT_FDCWD</>, "/m/ntx", 0) = 0"#));
}
