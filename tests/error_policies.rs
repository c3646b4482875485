//! What an error of one of the images does to the mirror: `enospc` and `stop` pause it until somebody resumes it, `report` ends
//! it with an error that names the image and the place, `ignore` tries again. The guest notices nothing of it.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use common::block_device::FileSystem;
use common::command::{is_root, run};
use common::compare;
use common::holder::Holder;
use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::qmp::Qmp;
use common::random;

const SIZE: u64 = 24 << 20;

/// A disk with data, and a file system that is too small for it.
struct Tight {
    table: std::sync::Arc<Table>,
    seed: u64,
    mounted: Mounted,
    small: FileSystem,
    target: PathBuf,
    place: Place,
}

fn tight() -> Option<Tight> {
    if !is_root("a file system of the test's own") {
        return None;
    }
    let (place, seed) = (Place::in_memory(), random::seed());
    let image = place.sparse("disk.img", SIZE);
    let table = Table::new(seed, SIZE);
    pattern::fill(&image, &table);
    let small = FileSystem::mount(&["-t", "tmpfs", "-o", "size=12m", "tmpfs"], &place.at("small"));
    let mounted = Mount::of(&place, [&image]).start();
    Some(Tight { target: small.path.join("target.img"), table, seed, mounted, small, place })
}

impl Tight {
    fn load(&self) -> Load {
        let habits = Habits { depth: 4, rest: std::time::Duration::from_micros(500), ..Habits::default() };
        Load::start(&self.mounted.disk("disk.img"), &self.table, habits, self.seed)
    }

    fn make_room(&self) {
        let point = self.small.path.to_str().expect("UTF-8");
        run("mount", ["-o", "remount,size=200m", point]).ok();
    }

    #[track_caller]
    fn wait_paused(&self) {
        self.mounted.wait_for("the full target to pause the job", |volumes| volumes[0]["mirror"]["state"] == "paused");
        let job = self.mounted.job();
        assert_eq!(job["io_status"], "nospace", "{job}");
        let error = job["last_error"].as_str().expect("an error");
        assert!(error.contains(self.target.to_str().expect("UTF-8")), "it does not name the target: {error}");
    }
}

fn pauses_and_resumes(options: &[&str]) {
    let Some(tight) = tight() else { return };
    let load = tight.load();
    tight.mounted.mirror(&tight.target, options);
    tight.wait_paused();
    load.wait_for_more(100);
    tight.mounted.verb::<&str>("resume", []).ok();
    tight.wait_paused();
    tight.make_room();
    tight.mounted.verb::<&str>("resume", []).ok();
    tight.mounted.wait_for("the mirror to be ready", |volumes| volumes[0]["mirror"]["ready"] == true);
    assert_eq!(tight.mounted.job()["io_status"], "ok");
    tight.mounted.cutover();
    load.wait_for_more(100);
    load.stop();
    let Tight { table, mounted, target, small, place: _place, .. } = tight;
    mounted.unmount();
    table.assert_on(&target);
    small.unmount();
}

#[test]
fn a_full_target_pauses_the_job_until_there_is_room() {
    pauses_and_resumes(&[]);
}

#[test]
fn so_it_does_in_write_blocking_mode_and_with_stop() {
    pauses_and_resumes(&["--on-target-error", "stop", "--copy-mode", "write-blocking"]);
}

#[test]
fn a_full_target_ends_the_job_when_errors_are_reported() {
    let Some(tight) = tight() else { return };
    let load = tight.load();
    tight.mounted.mirror(&tight.target, &["--on-target-error", "report"]);
    tight.mounted.wait_for("the job to fail", |volumes| volumes[0]["mirror"].is_null());
    let last = tight.mounted.volume()["last_mirror"].clone();
    assert_eq!((&last["result"], &last["consistent"]), (&json!("failed"), &json!(false)), "{last}");
    let error = last["error"].as_str().expect("an error");
    assert!(error.contains(tight.target.to_str().expect("UTF-8")) && error.contains("No space"), "{error}");
    load.wait_for_more(100);
    load.stop();
    let image = tight.place.at("disk.img");
    assert_eq!(tight.mounted.active(), image);
    let Tight { table, mounted, small, place: _place, .. } = tight;
    mounted.unmount();
    table.assert_on(&image);
    small.unmount();
}

#[test]
fn a_job_that_is_stuck_can_be_cancelled_and_the_disk_unmounted() {
    let Some(tight) = tight() else { return };
    tight.mounted.mirror(&tight.target, &[]);
    tight.wait_paused();
    tight.mounted.verb::<&str>("cancel", []).ok();
    assert_eq!(tight.mounted.volume()["last_mirror"]["result"], "cancelled");
    assert!(!tight.target.exists());
    tight.mounted.mirror(&tight.target, &[]);
    tight.wait_paused();
    let Tight { mounted, small, place: _place, .. } = tight;
    mounted.unmount();
    small.unmount();
}

/// `move` that fails says so, and leaves the guest where it was.
#[test]
fn move_to_a_full_target_fails_with_the_reason() {
    let Some(tight) = tight() else { return };
    let target = tight.target.to_str().expect("UTF-8");
    let done = tight.mounted.verb("move", [target, "--on-target-error", "report"]).refuses_naming(&[target]);
    assert!(done.stderr.contains("No space"), "{done}");
    assert_eq!(tight.mounted.active(), tight.place.at("disk.img"));
    let Tight { mounted, small, place: _place, .. } = tight;
    mounted.unmount();
    small.unmount();
}

/// How the storage daemon is told to end.
const QUIT: &str = "{'execute': 'qmp_capabilities'} {'execute': 'quit'}\n";

/// A file whose reads or writes fail at one place: QEMU's blkdebug behind its FUSE export.
fn with_bad_sector(place: &Place, backing: &Path, event: &str, sector: u64) -> Option<(Holder, PathBuf)> {
    if !run("qemu-storage-daemon", ["--version"]).stdout.contains("version") {
        eprintln!("SKIPPED: no qemu-storage-daemon");
        return None;
    }
    let point = place.file(&format!("bad-{}", backing.file_name()?.to_string_lossy()), b"");
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev");
    command.arg(format!("driver=file,node-name=file,filename={},cache.direct=off", backing.display()));
    command.arg("--blockdev");
    command.arg(format!(
        "driver=blkdebug,node-name=debug,image=file,inject-error.0.event=none,inject-error.0.iotype={event},\
         inject-error.0.sector={sector},inject-error.0.errno=5"
    ));
    command.arg("--export");
    command
        .arg(format!("type=fuse,id=export,node-name=debug,mountpoint={},writable=on,allow-other=off", point.display()));
    command.args(["--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"]);
    let holder = Holder::saying(command, "QMP");
    Some((holder, point))
}

#[test]
fn a_bad_sector_of_the_source_is_named() {
    let place = Place::in_memory();
    let backing = place.random("backing.img", 4 << 20, 1);
    let Some((bad, source)) = with_bad_sector(&place, &backing, "read", 4096) else { return };
    let target = place.at("target.img");
    let mounted = Mount::of(&place, [&source]).start();
    mounted.mirror(&target, &["--on-source-error", "report"]);
    mounted.wait_for("the job to fail", |volumes| volumes[0]["mirror"].is_null());
    let last = mounted.volume()["last_mirror"].clone();
    let error = last["error"].as_str().expect("an error");
    assert!(last["result"] == "failed" && error.contains(source.to_str().expect("UTF-8")), "{last}");
    assert!(error.contains("Input/output error") && error.contains("2097152"), "where and why: {error}");

    let _ = std::fs::remove_file(&target);
    mounted.mirror(&target, &["--on-source-error", "stop"]);
    mounted.wait_for("the job to pause", |volumes| volumes[0]["mirror"]["state"] == "paused");
    assert_eq!(mounted.job()["io_status"], "failed");
    // The guest repairs the sector... which it cannot read either, and its own error is its own.
    let disk = OpenOptions::new().read(true).open(mounted.first_disk()).expect("open");
    disk.read_at(&mut [0; 512], 4096 * 512).expect_err("the guest's own read of a bad sector");
    drop(disk);
    mounted.verb::<&str>("cancel", []).ok();
    mounted.unmount();
    bad.release_saying(QUIT);
}

#[test]
fn an_error_that_is_ignored_is_tried_again_without_a_flood_of_events() {
    let place = Place::in_memory();
    let backing = place.sparse("backing.img", 4 << 20);
    let Some((bad, target)) = with_bad_sector(&place, &backing, "write", 4096) else { return };
    let source = place.random("disk.img", 4 << 20, 1);
    let mounted = Mount::of(&place, [&source]).start();
    let mut client = Qmp::connect(&mounted.control);
    mounted.mirror(&target, &["--existing", "--on-target-error", "ignore"]);
    let start = std::time::Instant::now();
    let mut errors = 0u32;
    while errors < 5 {
        let event = client.event();
        if event["event"] == "BLOCK_JOB_ERROR" {
            assert_eq!((&event["data"]["operation"], &event["data"]["action"]), (&json!("write"), &json!("ignore")));
            errors += 1;
        }
    }
    assert!(start.elapsed().as_millis() > 100, "five errors in {:?}: no back-off", start.elapsed());
    assert_eq!(mounted.job()["state"], "running");
    mounted.verb("cancel", ["--keep"]).ok();
    drop(client);
    mounted.unmount();
    bad.release_saying(QUIT);
    assert!(compare::first_difference(&source, &backing).is_some());
}
