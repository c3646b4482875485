//! How a mount ends. An idle one ends cleanly, whichever way it is told to: everything flushed, and no process, mount, lock,
//! socket or runtime file left. One that is in use is not ended: the holder is named, and the guest goes on.

mod common;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::block_device::LoopDevice;
use common::command::{is_root, run};
use common::holder::Holder;
use common::leftovers;
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::wait;

fn mount(place: &Place) -> (Mounted, PathBuf) {
    let image = place.random("disk.img", 2 << 20, 1);
    (Mount::of(place, [&image]).start(), image)
}

/// Ends an idle mount by `end`, after a write that nobody flushed.
fn ends_cleanly(end: impl FnOnce(&Mounted)) {
    let place = Place::on_disk();
    let (mut mounted, image) = mount(&place);
    let disk = mounted.disk("disk.img");
    OpenOptions::new().write(true).open(&disk).and_then(|file| file.write_all_at(b"kept", 5_000)).expect("write");
    assert!(!leftovers::locks_on(&image).is_empty(), "the image is locked while it is mounted");
    end(&mounted);
    mounted.assert_gone();
    assert_eq!(leftovers::locks_on(&image), Vec::<String>::new());
    assert_eq!(std::fs::read(&image).expect("read")[5_000..5_004], *b"kept");
    let again = Mount::of(&place, [&image]).start();
    again.unmount();
}

#[test]
fn idle_by_livemirror_unmount() {
    ends_cleanly(|mounted| {
        mounted.verb::<OsString>("unmount", []).ok();
        assert!(leftovers::ours_of(mounted.state_dir.parent().expect("a parent")).is_empty(), "it waits for the end");
    });
}

#[test]
fn idle_by_umount() {
    if is_root("umount") {
        ends_cleanly(|mounted| drop(run("umount", [&mounted.mountpoint]).ok()));
    }
}

#[test]
fn idle_by_fusermount3() {
    ends_cleanly(|mounted| drop(run("fusermount3", ["-u", mounted.mountpoint.to_str().expect("UTF-8")]).ok()));
}

#[test]
fn idle_by_signals() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        ends_cleanly(|mounted| {
            let pid: i32 = std::fs::read_to_string(&mounted.pidfile).expect("a pidfile").trim().parse().expect("a pid");
            assert_eq!(pid, mounted.server_pid);
            kill(Pid::from_raw(pid), signal).expect("kill");
            let point = &mounted.mountpoint;
            wait::until("the mount to end", || leftovers::mounts_below(point).is_empty());
        });
    }
}

#[test]
fn idle_by_qmp_quit() {
    ends_cleanly(|mounted| {
        common::qmp::Qmp::connect(&mounted.control).ok("quit", serde_json::json!({}));
        let point = &mounted.mountpoint;
        wait::until("the mount to end", || leftovers::mounts_below(point).is_empty());
    });
}

#[test]
fn a_mirror_that_runs_does_not_keep_it_mounted() {
    let place = Place::on_disk();
    let (mounted, image) = mount(&place);
    mounted.mirror(&place.at("target.img"), &["--speed", "64K"]);
    mounted.unmount();
    assert_eq!(leftovers::locks_on(&image), Vec::<String>::new());
    let target = place.at("target.img");
    assert!(!target.exists() || leftovers::locks_on(&target).is_empty());
}

#[track_caller]
fn assert_still_works(mounted: &Mounted) {
    assert_eq!(leftovers::mounts_below(&mounted.mountpoint).len(), 1);
    let disk = OpenOptions::new().read(true).write(true).open(mounted.disk("disk.img")).expect("open");
    disk.write_all_at(b"alive", 0).expect("write");
    disk.sync_all().expect("fsync");
    assert_eq!(mounted.status()["server_pid"], mounted.server_pid);
}

#[track_caller]
fn refused_naming(mounted: &Mounted, names: &[&str]) {
    let refused = mounted.verb::<OsString>("unmount", []).exits_with(3);
    for name in names {
        assert!(refused.stderr.contains(name), "{name:?} is not named: {refused}");
    }
    assert_still_works(mounted);
}

#[test]
fn a_program_that_holds_a_disk_is_named() {
    let place = Place::on_disk();
    let (mounted, _image) = mount(&place);
    let holder = Holder::of(&mounted.disk("disk.img"));
    refused_naming(&mounted, &["sh", &holder.pid()]);
    refused_naming(&mounted, &["sh", &holder.pid()]);
    holder.release();
    let holder = Holder::in_directory(&mounted.mountpoint);
    refused_naming(&mounted, &["sh", &holder.pid()]);
    holder.release();
    mounted.unmount();
}

#[test]
fn a_mapping_that_holds_a_disk_is_named() {
    let place = Place::on_disk();
    let (mounted, _image) = mount(&place);
    let file = OpenOptions::new().read(true).write(true).open(mounted.disk("disk.img")).expect("open");
    let map = common::mmap::SharedMap::new(&file, 0, 4096).expect("mmap");
    drop(file);
    refused_naming(&mounted, &[&std::process::id().to_string()]);
    drop(map);
    mounted.unmount();
}

#[test]
fn a_loop_device_that_holds_a_disk_is_named() {
    if !is_root("a loop device") {
        return;
    }
    let place = Place::on_disk();
    let (mounted, _image) = mount(&place);
    let device = LoopDevice::over(&mounted.disk("disk.img"));
    refused_naming(&mounted, &[device.path.to_str().expect("UTF-8")]);
    device.detach();
    mounted.unmount();
}

#[test]
fn unmount_waits_when_told_to() {
    let place = Place::on_disk();
    let (mut mounted, _image) = mount(&place);
    let holder = Holder::of(&mounted.disk("disk.img"));
    mounted.verb("unmount", ["--wait", "100ms"]).exits_with(3);
    assert_still_works(&mounted);
    std::thread::scope(|scope| {
        let unmount = scope.spawn(|| mounted.verb("unmount", ["--wait", "100s"]).ok());
        holder.release();
        unmount.join().expect("unmount");
    });
    mounted.assert_gone();
}

#[test]
fn the_kernels_own_umount_is_refused_while_busy() {
    let place = Place::on_disk();
    let (mounted, _image) = mount(&place);
    let holder = Holder::of(&mounted.disk("disk.img"));
    let refused = run("fusermount3", ["-u", mounted.mountpoint.to_str().expect("UTF-8")]);
    assert_ne!(refused.code, Some(0));
    assert_still_works(&mounted);
    holder.release();
    mounted.unmount();
}

#[test]
fn abort_ends_it_all_the_same_and_says_so() {
    let place = Place::on_disk();
    let (mut mounted, _image) = mount(&place);
    let file = File::open(mounted.disk("disk.img")).expect("open");
    let done = mounted.verb("unmount", ["--abort"]).ok();
    assert!(!(done.stdout + &done.stderr).trim().is_empty(), "it does not say whom it cut off");
    file.read_at(&mut [0; 10], 0).expect_err("the connection has ended");
    mounted.assert_gone();
}

/// A signal while the disk is in use: flushed and saved, and the guest goes on until it lets go by itself.
#[test]
fn a_signal_while_busy_waits_for_the_last_holder() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let place = Place::on_disk();
        let (mut mounted, image) = mount(&place);
        let disk = OpenOptions::new().read(true).write(true).open(mounted.disk("disk.img")).expect("open");
        kill(Pid::from_raw(mounted.server_pid), signal).expect("kill");
        for round in 0..200u64 {
            disk.write_all_at(&round.to_le_bytes(), 8_192).expect("the guest goes on");
            let mut found = [0; 8];
            disk.read_exact_at(&mut found, 8_192).expect("the guest goes on");
            assert_eq!(u64::from_le_bytes(found), round);
        }
        assert_eq!(leftovers::mounts_below(&mounted.mountpoint).len(), 1);
        drop(disk);
        let point = mounted.mountpoint.clone();
        wait::until("the mount to end with its last holder", || leftovers::mounts_below(&point).is_empty());
        mounted.assert_gone();
        assert_eq!(std::fs::read(&image).expect("read")[8_192..8_200], 199u64.to_le_bytes());
    }
}

#[test]
fn foreground_stays_attached_and_ends_with_a_signal() {
    let place = Place::on_disk();
    let image = place.random("disk.img", 1 << 20, 1);
    let point = place.directory("mnt");
    let mut command = std::process::Command::new(common::command::binary());
    command.args(["mount", "--foreground"]).arg(&image).arg(&point).arg("--state-dir").arg(place.at("state"));
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().expect("livemirror");
    let mut printed = String::new();
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    output.read_line(&mut printed).expect("the disk's path");
    let disk = point.join("disk.img");
    assert_eq!(printed.trim_end(), disk.to_str().expect("UTF-8"));
    assert!(std::fs::read(&disk).expect("read") == std::fs::read(&image).expect("read"));
    assert!(child.try_wait().expect("wait").is_none(), "it detached");
    kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), Signal::SIGINT).expect("kill");
    let status = child.wait().expect("wait");
    assert_eq!(status.code(), Some(0), "an idle mount ends with 0 on SIGINT");
    leftovers::assert_none(place.path(), &point);
}
