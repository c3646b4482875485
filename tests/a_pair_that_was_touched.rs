//! Between two mounts somebody touches an image of a mirror that is to go on (rule 11): a virtual machine is started on the bare source,
//! the target is replaced, an old backup comes back. The mirror does not trust its map then. It says why, compares everything and
//! copies what differs. Untouched, it does trust it, which each test would fail without: else everything would always be compared.

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::block_device::LoopDevice;
use common::command::{is_root, run};
use common::compare;
use common::mortal::{bytes_written, resumptions};
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::wait;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 12 * MIB;

#[derive(Clone, Copy, PartialEq)]
enum End {
    Unmounted,
    Killed,
}

struct Pair {
    a: PathBuf,
    b: PathBuf,
    end: End,
    place: Place,
}

/// A mirror of a disk on which nothing happens any more: ready, all copied, nothing marked. Nothing is mounted.
fn left(end: End) -> Pair {
    let place = Place::on_disk();
    let (a, b) = (place.random("a.img", SIZE, 1), place.at("b.img"));
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.wait_ready();
    wait::until("the log to mark nothing", || common::mortal::marked_regions(&mounted.state_dir) == Some(0));
    match end {
        End::Unmounted => mounted.unmount(),
        End::Killed => {
            mounted.kill_everything();
            // What is changed right after a death cannot be told from what the dead server did itself.
            let dead = std::time::Instant::now();
            wait::until("the slack to pass", || dead.elapsed() > Duration::from_millis(4_300));
        }
    }
    Pair { a, b, end, place }
}

impl Pair {
    fn mount(&self) -> Mounted {
        Mount::of(&self.place, [&self.a]).on(&self.place.at("mnt")).start()
    }

    /// Mounts and cuts over: `which` image is suspected, and of all blocks at most `bytes` are written on the target.
    #[track_caller]
    fn must_be_compared(self, which: &str, bytes: u64) {
        let mounted = self.mount();
        mounted.wait_ready();
        let log = mounted.log();
        let reason = log.lines().find(|line| line.contains("everything is compared")).expect("the log says so");
        assert!(reason.contains(&format!("the {which} may have been changed")), "{reason}");
        println!("{reason}");
        assert_eq!(resumptions(&log, "compared"), [SIZE]);
        let job = mounted.job();
        let skipped = job["skipped_bytes"].as_u64().expect("a count");
        assert!(skipped >= SIZE - bytes, "only {skipped} bytes were left alone: {job}");
        let written = bytes_written(mounted.server_pid);
        assert!(written < bytes + MIB, "{written} bytes were written");
        self.cut_over(mounted);
    }

    /// The disk is mounted once more and written to; the log of that is thrown away.
    fn goes_on(&self) {
        let mounted = self.mount();
        mounted.wait_ready();
        let disk = OpenOptions::new().write(true).open(mounted.disk("a.img")).expect("open");
        disk.write_all_at(&[7; 4096], 2 * MIB).expect("write");
        drop(disk);
        mounted.wait_ready();
        mounted.unmount();
        let _ = fs::remove_file(self.place.at("mnt.state/log"));
    }

    fn cut_over(self, mounted: Mounted) {
        let disk = fs::read(mounted.disk("a.img")).expect("read");
        mounted.cutover();
        assert!(fs::read(mounted.disk("a.img")).expect("read") == disk, "the cutover changes what the guest reads");
        mounted.unmount();
        compare::assert_same_content(&self.a, &self.b);
    }
}

/// Changes a byte: it is another one afterwards.
fn change(image: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(image).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[!byte[0]], at).expect("write");
}

/// Gives `path` the times that it had.
fn with_old_mtime(path: &Path, tamper: impl FnOnce()) {
    let times = path.with_extension("times");
    File::create(&times).expect("a file");
    run("touch", [Path::new("-r"), path, &times]).ok();
    tamper();
    run("touch", [Path::new("-r"), &times, path]).ok();
}

fn touched(end: End) {
    for which in ["source", "target"] {
        let pair = left(end);
        let image = if which == "source" { &pair.a } else { &pair.b };
        change(image, 5 * MIB + 7);
        pair.must_be_compared(which, 64 << 10);
    }
}

#[test]
fn not_at_all() {
    for end in [End::Unmounted, End::Killed] {
        let pair = left(end);
        let mounted = pair.mount();
        mounted.wait_ready();
        assert_eq!(resumptions(&mounted.log(), "copied again"), [0]);
        assert!(!mounted.log().contains("compared") && mounted.job()["skipped_bytes"] == 0, "{}", mounted.log());
        assert!(bytes_written(mounted.server_pid) < MIB);
        assert!(pair.end == end);
        pair.cut_over(mounted);
    }
}

#[test]
fn one_byte_after_an_unmount() {
    touched(End::Unmounted);
}

#[test]
fn one_byte_after_a_death() {
    touched(End::Killed);
}

/// A disk of a virtual machine that was started on the bare image: by way of a loop device, and of QEMU.
#[test]
fn by_a_machine_on_the_bare_source() {
    if !is_root("a loop device") {
        return;
    }
    let pair = left(End::Unmounted);
    let device = LoopDevice::over(&pair.a);
    change(&device.path, 3 * MIB);
    run("sync", [&device.path]).ok();
    device.detach();
    pair.must_be_compared("source", 64 << 10);

    let pair = left(End::Killed);
    run("qemu-io", ["-f", "raw", "-c", "write -P 7 9M 64k", pair.a.to_str().expect("UTF-8")]).ok();
    pair.must_be_compared("source", 64 << 10);
}

#[test]
fn with_the_times_set_back() {
    for end in [End::Unmounted, End::Killed] {
        let pair = left(end);
        with_old_mtime(&pair.b, || change(&pair.b, MIB));
        pair.must_be_compared("target", 64 << 10);
    }
}

/// An older copy of the target, attributes, times and all, is where the target was.
#[test]
fn by_an_older_copy_with_its_attributes() {
    let pair = left(End::Unmounted);
    let copy = pair.place.at("copy.img");
    run("cp", [Path::new("-a"), &pair.b, &copy]).ok();
    pair.goes_on();
    fs::rename(&copy, &pair.b).expect("rename");
    pair.must_be_compared("target", 64 << 10);

    let pair = left(End::Unmounted);
    let copy = pair.place.at("copy.img");
    run("cp", [Path::new("--preserve=all"), &pair.b, &copy]).ok();
    pair.goes_on();
    // Into the same file.
    run("cp", [Path::new("--preserve=all"), &copy, &pair.b]).ok();
    pair.must_be_compared("target", 64 << 10);
}

/// An older copy of the source too, which is what restoring a backup of it does.
#[test]
fn by_a_backup_of_the_source() {
    let pair = left(End::Unmounted);
    let copy = pair.place.at("copy.img");
    run("cp", [Path::new("-a"), &pair.a, &copy]).ok();
    pair.goes_on();
    fs::rename(&copy, &pair.a).expect("rename");
    pair.must_be_compared("source", 64 << 10);
}

#[test]
fn by_cutting_it_short() {
    for end in [End::Unmounted, End::Killed] {
        let pair = left(end);
        OpenOptions::new().write(true).open(&pair.b).and_then(|file| file.set_len(4 * MIB)).expect("truncate");
        pair.must_be_compared("target", 8 * MIB);
    }
}

#[test]
fn by_making_it_anew() {
    for len in [0, SIZE] {
        let pair = left(End::Unmounted);
        fs::remove_file(&pair.b).expect("rm");
        File::create(&pair.b).and_then(|file| file.set_len(len)).expect("a new file");
        pair.must_be_compared("target", SIZE);
    }
}

/// What is left is restored from a backup of the state directory: its log knows nothing of what was written since.
#[test]
fn by_an_older_state() {
    let pair = left(End::Unmounted);
    let (state, copy) = (pair.place.at("mnt.state"), pair.place.at("copy"));
    run("cp", [Path::new("-a"), &state, &copy]).ok();
    pair.goes_on();
    fs::remove_dir_all(&state).expect("rm");
    fs::rename(&copy, &state).expect("rename");
    let _ = fs::remove_file(state.join("log"));
    pair.must_be_compared("source", SIZE);
}

/// The images change places. What is mounted is then the target, of which the record says that it is no disk of its own.
#[test]
fn by_swapping_the_images() {
    let pair = left(End::Unmounted);
    let aside = pair.place.at("aside.img");
    change(&pair.a, 6 * MIB);
    let [a, b] = [&pair.a, &pair.b].map(|image| fs::read(image).expect("read"));
    for (from, to) in [(&pair.a, &aside), (&pair.b, &pair.a), (&aside, &pair.b)] {
        fs::rename(from, to).expect("rename");
    }
    let mounted = pair.mount();
    let job = mounted.job();
    assert!(job.is_null() || job["state"] == "paused", "{job}");
    assert!(fs::read(mounted.disk("a.img")).expect("read") == b, "what lies there is shown");
    mounted.unmount();
    assert!(fs::read(&pair.b).expect("read") == a, "and nothing else is written to");
}

/// Another disk lies where the target was: it is not written to.
#[test]
fn by_putting_a_foreign_image_there() {
    let pair = left(End::Unmounted);
    // A disk of livemirror's, whose mount has ended.
    let other = pair.place.random("other.img", SIZE, 2);
    Mount::of(&pair.place, [&other]).named("other").start().unmount();
    refused_and_untouched(pair, &other);
}

/// Something of which livemirror knows nothing.
#[test]
fn by_putting_any_other_file_there() {
    let pair = left(End::Unmounted);
    let other = pair.place.random("other.img", SIZE / 2, 2);
    refused_and_untouched(pair, &other);
}

fn refused_and_untouched(pair: Pair, other: &Path) {
    fs::rename(&pair.b, pair.place.at("away.img")).expect("rename");
    fs::rename(other, &pair.b).expect("rename");
    let content = fs::read(&pair.b).expect("read");
    let mounted = pair.mount();
    mounted.wait_for("the refusal", |volumes| !volumes[0]["mirror"]["last_error"].is_null());
    let job = mounted.job();
    let error = job["last_error"].as_str().expect("an error");
    assert!(job["state"] == "paused" && error.contains("another image"), "{job}");
    assert!(error.contains(pair.b.to_str().expect("UTF-8")), "{error}");
    mounted.verb::<&str>("resume", []).ok();
    mounted.wait_for("the refusal", |volumes| !volumes[0]["mirror"]["last_error"].is_null());
    assert!(fs::read(&pair.b).expect("read") == content, "it was written to");
    // The right one comes back.
    fs::rename(&pair.b, other).expect("rename");
    fs::rename(pair.place.at("away.img"), &pair.b).expect("rename");
    mounted.verb::<&str>("resume", []).ok();
    mounted.wait_ready();
    assert!(fs::read(other).expect("read") == content);
    pair.cut_over(mounted);
}

/// Who wrote to a device since cannot be known.
#[test]
fn a_device_always_counts_as_touched() {
    if !is_root("a loop device") {
        return;
    }
    let place = Place::on_disk();
    let (a, backing) = (place.random("a.img", SIZE, 1), place.sparse("b.img", SIZE));
    let device = LoopDevice::over(&backing);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&device.path, &["--existing"]);
    mounted.wait_ready();
    mounted.unmount();
    change(&device.path, 7 * MIB);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.wait_ready();
    assert_eq!(resumptions(&mounted.log(), "compared"), [SIZE]);
    let job = mounted.job();
    assert!(job["skipped_bytes"].as_u64() >= Some(SIZE - (64 << 10)), "{job}");
    mounted.cutover();
    mounted.unmount();
    run("sync", [&device.path]).ok();
    device.detach();
    compare::assert_same_content(&a, &backing);
}
