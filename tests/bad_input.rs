//! Whatever is asked wrongly gives one clear first line on stderr that names the path or the option, exit code 1, 2 or 3, and
//! leaves nothing behind: nothing mounted, no file, no lock, no process.

mod common;

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};

use common::block_device::{FileSystem, LoopDevice};
use common::command::{Done, is_root, livemirror, run};
use common::holder::Holder;
use common::leftovers;
use common::mounted::{Mount, Mounted, words};
use common::place::Place;

const SIZE: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Tries to mount; sees that it is refused, naming `names`, and that the place is as it was.
#[track_caller]
fn mount_refused(place: &Place, mount: &Mount<'_>, names: &[&str]) -> Done {
    fs::create_dir_all(place.at("mnt")).expect("mkdir");
    let before = place.inventory();
    let done = mount.attempt().refuses_naming(names);
    leftovers::assert_none(place.path(), &place.at("mnt"));
    assert_eq!(place.inventory(), before, "something was left behind by {done}");
    done
}

/// A mounted disk on which something is refused.
struct Refusals {
    mounted: Mounted,
    source: PathBuf,
    place: Place,
}

impl Refusals {
    fn new() -> Self {
        let place = Place::on_disk();
        let source = place.random("disk.img", SIZE, 1);
        let mounted = Mount::of(&place, [&source]).start();
        Refusals { mounted, source, place }
    }

    /// Runs a verb; sees that it is refused, naming `names`, and that all is as it was.
    #[track_caller]
    fn refused(&self, verb: &str, arguments: &[&str], names: &[&str]) -> Done {
        let before = (self.outside(), self.mounted.volume());
        let done = self.mounted.verb(verb, arguments.iter().copied()).refuses_naming(names);
        assert_eq!((self.outside(), self.mounted.volume()), before, "something was left behind by {done}");
        done
    }

    /// What lies in the place, but for the inside of the mount and of the state.
    fn outside(&self) -> Vec<String> {
        let skip = ["mnt", "mnt.state", "mnt.sock", "mnt.pid"];
        let of = |entry: fs::DirEntry| (entry.file_name(), entry.path());
        let entries = fs::read_dir(self.place.path()).expect("readdir").flatten().map(of);
        let mut lines: Vec<String> = entries
            .filter(|(name, _)| !skip.iter().any(|skip| name == skip))
            .map(|(name, path)| {
                let locks = if path.is_file() && path != self.source { leftovers::locks_on(&path).len() } else { 0 };
                format!(
                    "{} {} {locks} locks",
                    name.to_string_lossy(),
                    fs::symlink_metadata(&path).expect("lstat").len()
                )
            })
            .collect();
        lines.sort();
        lines
    }

    fn done(self) {
        self.mounted.unmount();
    }
}

#[test]
fn sources_that_cannot_be_mounted() {
    let place = Place::on_disk();
    let missing = place.at("missing.img");
    mount_refused(&place, &Mount::of(&place, [&missing]), &[text(&missing)]);
    let directory = place.directory("directory.img");
    mount_refused(&place, &Mount::of(&place, [&directory]), &[text(&directory), "directory"]);
    mount_refused(&place, &Mount::of(&place, ["/dev/null"]), &["/dev/null"]);
    let image = place.sparse("disk.img", SIZE);
    let twice = Mount::of(&place, [&image]).with(["--volume", &format!("name=b,source={}", text(&image))]);
    mount_refused(&place, &twice, &[text(&image)]);
}

#[test]
fn a_qcow2_header_in_a_file_that_claims_to_be_raw() {
    let place = Place::on_disk();
    let image = place.at("disk.img");
    run("qemu-img", ["create", "-q", "-f", "qcow2", text(&image), "1M"]).ok();
    mount_refused(&place, &Mount::of(&place, [&image]), &[text(&image), "qcow2"]);
    let named = place.file("disk.qcow2", &[0; 1 << 16]);
    mount_refused(&place, &Mount::of(&place, [&named]), &[text(&named), "qcow2"]);
}

#[test]
fn mountpoints_that_cannot_be_used() {
    let place = Place::on_disk();
    let image = place.sparse("disk.img", SIZE);
    let missing = place.at("missing");
    mount_refused(&place, &Mount::of(&place, [&image]).on(&missing), &[text(&missing)]);
    let full = place.directory("full");
    fs::write(full.join("file"), "").expect("write");
    mount_refused(&place, &Mount::of(&place, [&image]).on(&full), &[text(&full), "empty"]);

    let mounted = Mount::of(&place, [&image]).start();
    let other = place.sparse("other.img", SIZE);
    let again = Mount::of(&place, [&other]).attempt().refuses_naming(&[text(&mounted.mountpoint)]);
    assert!(again.complaint().contains("mounted"), "{again}");
    assert_eq!(leftovers::locks_on(&other), Vec::<String>::new());
    assert_eq!(mounted.status()["server_pid"], mounted.server_pid, "the first mount goes on");
    mounted.unmount();

    if is_root("a file system of somebody else") {
        let tmpfs = FileSystem::mount(&["-t", "tmpfs", "tmpfs"], &place.at("theirs"));
        Mount::of(&place, [&image]).on(&tmpfs.path).attempt().refuses_naming(&[text(&tmpfs.path)]);
        assert_eq!(leftovers::mounts_below(&tmpfs.path).len(), 1, "somebody else's mount is never touched");
        tmpfs.unmount();

        // Nor one whose own server has died.
        let theirs = place.directory("dead");
        let device = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").expect("open");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let (source, kind) = (Some("theirs"), Some("fuse.theirs"));
        nix::mount::mount(source, &theirs, kind, MsFlags::empty(), Some(&*options)).expect("mount");
        drop(device);
        Mount::of(&place, [&image]).on(&theirs).attempt().refuses_naming(&[text(&theirs)]);
        assert_eq!(leftovers::mounts_below(&theirs).len(), 1, "somebody else's dead mount is never touched");
        nix::mount::umount2(&theirs, MntFlags::MNT_DETACH).expect("umount");
    }
}

#[test]
fn an_image_that_somebody_else_writes() {
    let place = Place::on_disk();
    let image = place.sparse("disk.img", SIZE);
    let holder = Holder::qemu(&image);
    mount_refused(&place, &Mount::of(&place, [&image]), &[text(&image), "in use", "qemu-io"]);
    holder.release();

    let mounted = Mount::of(&place, [&image]).start();
    Mount::of(&place, [&image]).named("second").attempt().refuses_naming(&[text(&image), "in use"]);
    let refused = run("qemu-io", ["-f", "raw", "-c", "write 0 512", text(&image)]);
    assert_ne!(refused.code, Some(0), "QEMU may not write a mounted image: {refused}");
    run("qemu-img", ["info", "-U", text(&image)]).ok();
    mounted.unmount();
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let place = Place::on_disk();
    let image = place.sparse("disk.img", SIZE);
    let mount = |options: &[&str]| Mount::of(&place, [&image]).with(options.iter().copied()).attempt().exits_with(2);
    mount(&["--no-such-option"]).refuses_naming(&["--no-such-option"]);
    mount(&["--format", "vhdx"]).refuses_naming(&["vhdx"]);
    mount(&["--volume", "source"]).refuses_naming(&["--volume"]);
    for wrong in [&["mount"][..], &["mirror"], &["nonsense"], &[]] {
        livemirror(wrong).exits_with(2).refuses_naming(&[]);
    }
    assert!(leftovers::mounts_below(place.path()).is_empty());
}

#[test]
fn a_disk_that_is_none() {
    let place = Place::on_disk();
    let image = place.sparse("disk.img", SIZE);
    for verb in ["status", "cutover", "finish", "cancel", "pause", "resume", "unmount"] {
        for path in [&image, &place.at("missing"), &PathBuf::from("/proc")] {
            livemirror([verb, text(path)]).refuses_naming(&[text(path)]);
        }
    }
    livemirror(["mirror", text(&image), text(&place.at("target.img"))]).refuses_naming(&[text(&image)]);
    assert!(!place.at("target.img").exists());
}

#[test]
fn the_target_is_the_source() {
    let disk = Refusals::new();
    let (link, hard) = (disk.place.at("link.img"), disk.place.at("hard.img"));
    std::os::unix::fs::symlink(&disk.source, &link).expect("symlink");
    fs::hard_link(&disk.source, &hard).expect("link");
    for existing in [&[][..], &["--existing"]] {
        for target in [&disk.source, &link, &hard] {
            disk.refused("mirror", &[&[text(target)], existing].concat(), &[text(target)]);
        }
    }
    if is_root("a loop device") {
        let device = LoopDevice::over(&disk.source);
        disk.refused("mirror", &[text(&device.path)], &[text(&device.path)]);
        device.detach();
    }
    disk.done();
}

#[test]
fn the_target_lies_in_a_mount_of_ours() {
    let disk = Refusals::new();
    let inside = disk.mounted.disk("disk.img");
    disk.refused("mirror", &[text(&inside), "--existing"], &[text(&inside)]);
    let new = disk.mounted.disk("new.img");
    disk.refused("mirror", &[text(&new)], &[text(&new)]);
    let other = Place::in_memory();
    let second = Mount::of(&other, [&other.sparse("other.img", SIZE)]).start();
    let theirs = second.disk("other.img");
    disk.refused("mirror", &[text(&theirs), "--existing"], &[text(&theirs)]);
    second.unmount();
    disk.done();
}

#[test]
fn targets_that_cannot_be_written() {
    let disk = Refusals::new();
    let small = disk.place.sparse("small.img", SIZE - 512);
    let complaint = disk.refused("mirror", &[text(&small), "--existing"], &[text(&small)]);
    assert!(complaint.stderr.contains(&SIZE.to_string()) || complaint.stderr.contains("small"), "{complaint}");
    let there = disk.place.file("there.img", b"precious");
    let complaint = disk.refused("mirror", &[text(&there)], &[text(&there)]);
    assert!(complaint.stderr.contains("--existing"), "it does not say what to do: {complaint}");
    assert_eq!(fs::read(&there).expect("read"), b"precious");
    let missing = disk.place.at("missing/target.img");
    disk.refused("mirror", &[text(&missing)], &["missing"]);
    let new = disk.place.at("new.img");
    disk.refused("mirror", &[text(&new), "--existing"], &[text(&new)]);
    disk.refused("mirror", &["/dev/null"], &["/dev/null"]);
    let locked = disk.place.sparse("locked.img", SIZE);
    let holder = Holder::qemu(&locked);
    disk.refused("mirror", &[text(&locked), "--existing"], &[text(&locked), "in use"]);
    holder.release();
    disk.done();
}

#[test]
fn file_systems_without_room_or_read_only() {
    if !is_root("a file system of the test's own") {
        return;
    }
    let disk = Refusals::new();
    let tmpfs = FileSystem::mount(&["-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs"], &disk.place.at("full"));
    fs::write(tmpfs.path.join("last inode"), "").expect("write");
    let target = tmpfs.path.join("target.img");
    disk.refused("mirror", &[text(&target)], &[text(&target)]);
    tmpfs.unmount();
    let tmpfs = FileSystem::mount(&["-t", "tmpfs", "-o", "ro", "tmpfs"], &disk.place.at("full"));
    disk.refused("mirror", &[text(&target)], &[text(&target)]);
    tmpfs.unmount();
    disk.done();
}

#[test]
fn options_of_a_mirror_that_make_no_sense() {
    let disk = Refusals::new();
    let target = disk.place.at("target.img");
    for (option, value) in [
        ("--granularity", "3000"),
        ("--granularity", "256"),
        ("--granularity", "128M"),
        ("--granularity", "lots"),
        ("--speed", "fast"),
        ("--buffer", "x"),
        ("--copy-mode", "sideways"),
        ("--on-target-error", "weep"),
        ("--format", "vhdx"),
    ] {
        let done = disk.refused("mirror", &[text(&target), option, value], &[option]);
        assert_eq!(done.code, Some(2), "{done}");
    }
    disk.refused("cutover", &["--max-pause", "soon"], &["soon"]);
    let unknown = disk.mounted.disk("unknown.img");
    let done = disk.mounted.verb_on(&unknown, "mirror", [&target]);
    done.refuses_naming(&["unknown.img"]);
    assert!(!target.exists());
    disk.done();
}

#[test]
fn verbs_without_a_mirror() {
    let disk = Refusals::new();
    for verb in ["cutover", "finish", "cancel", "pause", "resume"] {
        disk.refused(verb, &[], &["mirror"]);
    }
    disk.refused("set", &["--speed", "1M"], &["mirror"]);
    disk.done();
}

#[test]
fn a_second_mirror_and_verbs_at_the_wrong_moment() {
    let place = Place::on_disk();
    let source = place.random("disk.img", SIZE * 8, 1);
    let mounted = Mount::of(&place, [&source]).start();
    let (first, second) = (place.at("first.img"), place.at("second.img"));
    mounted.mirror(&first, &["--speed", "64K"]);
    mounted.verb("mirror", [&second]).refuses_naming(&["disk.img"]);
    assert!(!second.exists(), "a refused mirror leaves its target behind");
    mounted.verb::<&str>("finish", []).exits_with(3).refuses_naming(&["ready"]);
    mounted.verb("cutover", ["--timeout", "300ms"]).exits_with(3).refuses_naming(&[]);
    assert_eq!(mounted.job()["state"], "running", "refused verbs change nothing");
    mounted.verb::<&str>("resume", []).refuses_naming(&[]);
    mounted.verb::<&str>("pause", []).ok();
    mounted.verb::<&str>("pause", []).refuses_naming(&[]);
    mounted.verb::<&str>("cancel", []).ok();
    assert!(!first.exists());
    mounted.unmount();
}

#[test]
fn targets_and_state_on_the_disk_itself() {
    if !is_root("a loop device") {
        return;
    }
    let place = Place::in_memory();
    let source = place.sparse("disk.img", 64 << 20);
    let mounted = Mount::of(&place, [&source]).start();
    let device = LoopDevice::over(&mounted.disk("disk.img"));
    let filesystem = FileSystem::new_ext4(&device.path, &place.at("inner"));
    let target = filesystem.path.join("target.img");
    mounted.verb("mirror", words(&target, &[])).refuses_naming(&[text(&target)]);
    assert!(!target.exists());
    fs::File::create(filesystem.path.join("alive")).and_then(|mut file| file.write_all(b"yes")).expect("write");
    filesystem.unmount();
    device.detach();
    mounted.unmount();
}
