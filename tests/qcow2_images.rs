//! qcow2 through a real mount: as the disk that guests use, with backing files and without, and as the target of a mirror. What
//! QEMU's own tools say of the files afterwards decides.

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::command::{long, run};
use common::compare::allocated_bytes;
use common::leftovers;
use common::mortal;
use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::qcow2::{check, qemu_img};
use common::random::{self, Random};
use common::wait;

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The disk in an image, as raw bytes, by QEMU.
fn raw_of(place: &Place, image: &Path, format: &str) -> PathBuf {
    let raw = place.at("by-qemu.img");
    qemu_img(&["convert", "-f", format, "-O", "raw", text(image), text(&raw)]);
    raw
}

/// What the file system gives for the same disk as `qemu-img convert` would make it of the image.
fn as_converted(place: &Place, image: &Path, (from, to): (&str, &str)) -> u64 {
    let made = place.at("converted");
    qemu_img(&["convert", "-f", from, "-O", to, text(image), text(&made)]);
    let bytes = allocated_bytes(&made);
    std::fs::remove_file(&made).expect("remove");
    bytes
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Raw,
    Qcow2,
    TwoBackingFiles,
}

impl Source {
    /// An image filled with the table's blocks, and its name in the mount.
    fn make(self, place: &Place, table: &Table, size: u64) -> (PathBuf, &'static str) {
        let raw = place.sparse("a.img", size);
        pattern::fill(&raw, table);
        if self == Source::Raw {
            return (raw, "a.img");
        }
        let image = place.at("disk.qcow2");
        if self == Source::Qcow2 {
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
            return (image, "disk.img");
        }
        // The middle has rubbish nowhere: it is written over with what the base has, in part.
        let middle = place.at("middle.qcow2");
        let over = |backing: &str, format: &str, path: &Path, more: &str| {
            let options = format!("backing_file={backing},backing_fmt={format}{more}");
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(path)]);
        };
        over("a.img", "raw", &middle, ",cluster_size=4k");
        let mut bytes = vec![0; 2 << 20];
        File::open(&raw).and_then(|file| file.read_exact_at(&mut bytes, MIB)).expect("read");
        let part = place.file("part.bin", &bytes);
        run("qemu-io", ["-f", "qcow2", "-c", &format!("write -q -s {} 1M 2M", text(&part)), text(&middle)]).ok();
        over("middle.qcow2", "qcow2", &image, "");
        (image, "disk.img")
    }
}

/// Mirror under load, cut over, go on writing, unmount.
fn moves(source: Source, format: &str) {
    let (place, seed) = (Place::in_memory(), random::seed());
    let size = 24 * MIB;
    let table = Table::new(seed, size);
    let (a, name) = source.make(&place, &table, size);
    let b = place.at(if format == "raw" { "b.img" } else { "b.qcow2" });
    let mounted = Mount::of(&place, [&a]).start();
    let disk = mounted.disk(name);
    table.assert_on(&disk);
    let load = Load::start(&disk, &table, Habits { depth: 4, ..Habits::default() }, seed);
    load.wait_for_more(50);
    mounted.mirror(&b, &["--format", format]);
    mounted.wait_ready();
    load.wait_for_more(50);
    mounted.cutover();
    assert_eq!(mounted.active(), b);
    load.wait_for_more(50);
    load.stop();
    table.assert_on(&disk);
    mounted.unmount();
    if format == "qcow2" {
        check(&b, false);
    }
    if source != Source::Raw {
        check(&a, false);
    }
    table.assert_on(&raw_of(&place, &b, format));
    let (ours, theirs) = (allocated_bytes(&b), as_converted(&place, &b, (format, format)));
    assert!(ours <= theirs + 65_536, "{source:?} to {format}: {ours} bytes, qemu-img needs {theirs}");
    println!("{source:?} to {format}: {ours} bytes allocated, by qemu-img convert {theirs}");
}

#[test]
fn a_qcow2_disk_moves_to_a_raw_file() {
    moves(Source::Qcow2, "raw");
}

#[test]
fn a_qcow2_disk_moves_to_a_qcow2_file() {
    moves(Source::Qcow2, "qcow2");
}

#[test]
fn a_raw_disk_moves_to_a_qcow2_file() {
    moves(Source::Raw, "qcow2");
}

#[test]
fn a_disk_on_two_backing_files_moves_to_either() {
    moves(Source::TwoBackingFiles, "raw");
    moves(Source::TwoBackingFiles, "qcow2");
}

fn mount_again(place: &Place, image: &Path) -> Mounted {
    Mount::of(place, [image]).start()
}

/// Every acknowledged write is there after each kill, and the file has no error at any such moment.
#[test]
fn whatever_is_killed_acknowledged_writes_stay_and_the_files_are_sound() {
    let (place, seed) = (Place::in_memory(), random::seed());
    let mut random = Random::new(seed, 1_000);
    let size = 24 * MIB;
    let table = Table::new(seed, size);
    // A thin disk over a base: most writes allocate a cluster and copy the rest of it.
    let (base, a, b) = (place.sparse("base.img", size), place.at("a.qcow2"), place.at("b.qcow2"));
    pattern::fill(&base, &table);
    let make = || {
        let options = "backing_file=base.img,backing_fmt=raw,cluster_size=16k";
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&a)]);
    };
    make();
    let habits = Habits { depth: 8, ..Habits::small() };
    let mut mounted = Mount::of(&place, [&a]).start();
    for round in 0..if long() { 20 } else { 4 } {
        let disk = mounted.disk("a.img");
        let mut load = Load::start(&disk, &table, habits, seed + round);
        if round == 2 {
            mounted.mirror(&b, &["--copy-mode", "write-blocking", "--speed", "8M"]);
        }
        // The server alone: guests see a stall at most.
        for _ in 0..3 {
            load.wait_for_more(30);
            std::thread::sleep(Duration::from_millis(random.below(60)));
            mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
        }
        load.wait_for_more(30);
        std::thread::sleep(Duration::from_millis(random.below(60)));
        mounted.kill_everything();
        load.end();
        // A process ends with the last of its threads: until then it has its locks.
        let unused = |image: &Path| !image.exists() || leftovers::locks_on(image).is_empty();
        wait::until("nobody to use the images", || unused(&a) && unused(&b));
        check(&a, true);
        if round >= 2 {
            check(&b, true);
        }
        table.settle_on(&raw_of(&place, &a, "qcow2"));
        mounted = mount_again(&place, &a);
        load = Load::start(&mounted.disk("a.img"), &table, habits, seed + round + 100);
        load.wait_for_more(10);
        load.stop();
    }
    mounted.verb("set", ["--speed", "0"]).ok();
    mounted.wait_ready();
    mounted.cutover();
    assert_eq!(mounted.active(), b);
    table.assert_on(&mounted.disk("a.img"));
    mounted.unmount();
    check(&a, true);
    check(&b, true);
    table.assert_on(&raw_of(&place, &b, "qcow2"));
}

/// The hole patterns that `commands` of qemu-io make, mirrored by us and converted by qemu-img.
fn as_thin_as_converted(commands: &[&str], options: &str) {
    let place = Place::in_memory();
    let a = place.at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&a), "64M"]);
    let mut arguments = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(text(&a));
    run("qemu-io", &arguments).ok();
    for format in ["raw", "qcow2"] {
        let theirs = as_converted(&place, &a, ("qcow2", format));
        let b = place.at(&format!("b.{format}"));
        let mounted = Mount::of(&place, [&a]).start();
        mounted.mirror(&b, &["--format", format]);
        mounted.wait_ready();
        mounted.verb::<&str>("finish", []).ok();
        // Nothing but what a copy needs, from the moment on when it is said to be one.
        if format == "qcow2" {
            check(&b, false);
        }
        mounted.unmount();
        let ours = allocated_bytes(&b);
        assert!(ours <= theirs, "{commands:?} to {format}: {ours} bytes, qemu-img convert needs {theirs}");
        run("qemu-img", ["compare", "-f", "qcow2", "-F", format, text(&a), text(&b)]).ok();
    }
}

#[test]
fn targets_are_no_larger_than_converted_ones() {
    as_thin_as_converted(
        &["write -q 0 64k", "write -q 1M 4k", "write -q 5M 1M", "write -q 63M 1M"],
        "cluster_size=64k",
    );
    as_thin_as_converted(
        &["write -q 0 8M", "write -q -z 1M 2M", "discard -q 4M 1M", "write -q -z 7000k 8k"],
        "cluster_size=64k",
    );
    as_thin_as_converted(&["write -q -P 0 0 4M", "write -q 8M 12k", "write -q 9M 512"], "cluster_size=4k");
    as_thin_as_converted(&["write -q 3M 5M", "write -q -z -u 4M 100k"], "cluster_size=2M");
    as_thin_as_converted(&["write -q 10M 64k"], "preallocation=metadata");
}

#[test]
fn what_guests_free_is_freed_and_backing_data_stays_hidden() {
    let place = Place::in_memory();
    let base = place.random("base.img", 8 * MIB, random::seed());
    let a = place.at("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "backing_file=base.img,backing_fmt=raw", text(&a)]);
    let mounted = Mount::of(&place, [&a]).start();
    let disk = OpenOptions::new().read(true).write(true).open(mounted.disk("a.img")).expect("open");
    disk.write_all_at(&vec![7; 4 << 20], 0).expect("write");
    common::space::allocate(&disk, common::space::PUNCH | common::space::KEEP, 0, 6 * MIB).expect("punch");
    disk.sync_all().expect("fsync");
    let mut bytes = vec![1; 6 << 20];
    disk.read_exact_at(&mut bytes, 0).expect("read");
    assert!(bytes.iter().all(|&byte| byte == 0), "the backing file shows through");
    assert!(allocated_bytes(&a) < MIB, "{} bytes for nothing", allocated_bytes(&a));
    assert_eq!(common::space::seek_data(&disk, 0), Ok(6 * MIB));
    drop(disk);
    mounted.unmount();
    check(&a, false);
    let mut model = std::fs::read(&base).expect("read");
    model[..6 << 20].fill(0);
    assert!(std::fs::read(raw_of(&place, &a, "qcow2")).expect("read") == model);
}

#[test]
fn what_is_in_use_beneath_a_disk_is_no_target() {
    let place = Place::in_memory();
    let base = place.sparse("base.img", 4 * MIB);
    let [a, b] = [place.at("a.qcow2"), place.at("b.qcow2")];
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "backing_file=base.img,backing_fmt=raw", text(&a)]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "backing_file=a.qcow2,backing_fmt=qcow2", text(&b)]);
    let mounted = Mount::of(&place, [&a]).start();
    let said = mounted.verb("mirror", [text(&base), "--existing"]);
    said.refuses_naming(&[text(&base), "backing file"]);
    // Nor an image that lies over the disk itself.
    let said = mounted.verb("mirror", [text(&b), "--existing"]);
    assert!(said.code == Some(1) && said.stderr.contains("in use"), "{said}");
    mounted.unmount();
    // A mount that hides what the disk needs.
    let said = Mount::of(&place, [&a]).on(&base).attempt();
    said.refuses_naming(&[text(&base), "hide"]);
}

/// Raw bytes belong to the guest: what it writes there never decides how they are read later.
#[test]
fn a_raw_disk_that_looks_like_qcow2_stays_raw() {
    let place = Place::in_memory();
    let qcow2 = place.at("header.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&qcow2), "1G"]);
    let header = std::fs::read(&qcow2).expect("read");
    let [a, b, c] = [place.at("a.qcow2"), place.at("b.img"), place.at("c.qcow2")];
    qemu_img(&["create", "-q", "-f", "qcow2", text(&a), "8M"]);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.cutover();
    let disk = OpenOptions::new().read(true).write(true).open(mounted.disk("a.img")).expect("open");
    disk.write_all_at(&header, 0).expect("write");
    disk.sync_all().expect("fsync");
    // A restart of the server, a remount of the new image, and one by way of the old one.
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    let mut bytes = vec![0; header.len()];
    disk.read_exact_at(&mut bytes, 0).expect("read");
    assert!(bytes == header);
    drop(disk);
    mounted.unmount();
    let is_the_disk = |mounted: &Mounted, name: &str| {
        let disk = File::open(mounted.disk(name)).expect("open");
        assert_eq!(disk.metadata().expect("stat").len(), 8 * MIB);
        let mut bytes = vec![0; header.len()];
        disk.read_exact_at(&mut bytes, 0).expect("read");
        assert!(bytes == header);
    };
    let mounted = Mount::of(&place, [&b]).start();
    is_the_disk(&mounted, "b.img");
    mounted.unmount();
    let mounted = Mount::of(&place, [&a]).with(["--follow"]).start();
    is_the_disk(&mounted, "a.img");
    // And back into the format.
    mounted.mirror(&c, &[]);
    mounted.cutover();
    is_the_disk(&mounted, "a.img");
    mounted.unmount();
    check(&c, false);
    assert!(std::fs::read(raw_of(&place, &c, "qcow2")).expect("read")[..header.len()] == header);
}

#[test]
fn a_suspended_mirror_to_qcow2_goes_on_where_it_was() {
    let (place, seed) = (Place::in_memory(), random::seed());
    let size = 16 * MIB + 512;
    let table = Table::new(seed, 16 * MIB);
    let (a, b) = (place.at("a.qcow2"), place.at("b.qcow2"));
    let raw = place.sparse("raw.img", size);
    pattern::fill(&raw, &table);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&a)]);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.wait_ready();
    mounted.unmount();
    check(&a, false);
    check(&b, false);
    let mounted = Mount::of(&place, [&a]).start();
    let load = Load::start(&mounted.disk("a.img"), &table, Habits { depth: 4, ..Habits::default() }, seed);
    load.wait_for_more(50);
    load.stop();
    mounted.wait_ready();
    assert_eq!(mortal::resumptions(&mounted.log(), "compared"), Vec::<u64>::new(), "nobody touched the images");
    mounted.cutover();
    mounted.unmount();
    check(&b, false);
    table.assert_on(&raw_of(&place, &b, "qcow2"));
}

#[test]
fn what_cannot_be_mounted_is_refused_by_name() {
    let place = Place::in_memory();
    let a = place.at("a.qcow2");
    for (options, says) in [("extended_l2=on", "extended L2"), ("compression_type=zstd", "zstd")] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&a), "8M"]);
        let said = Mount::of(&place, [&a]).attempt();
        said.refuses_naming(&[text(&a), says]);
    }
    // The name in the mount says that its bytes are raw.
    qemu_img(&["create", "-q", "-f", "qcow2", text(&a), "8M"]);
    let mounted: Mounted = Mount::of(&place, [&a]).start();
    let names: Vec<_> =
        std::fs::read_dir(&mounted.mountpoint).expect("list").flatten().map(|one| one.file_name()).collect();
    assert_eq!(names, ["a.img"]);
    assert_eq!(mounted.volume()["format"], "qcow2");
    mounted.unmount();
}

#[test]
fn a_disk_that_ends_within_a_sector_moves_there_and_back() {
    let place = Place::in_memory();
    let size = 3 * MIB + 100;
    let a = place.random("a.img", size, random::seed());
    let [b, c] = [place.at("b.qcow2"), place.at("c.img")];
    let table: Arc<Vec<u8>> = Arc::new(std::fs::read(&a).expect("read"));
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.cutover();
    assert_eq!(File::open(mounted.disk("a.img")).expect("open").metadata().expect("stat").len(), size);
    mounted.mirror(&c, &[]);
    mounted.cutover();
    mounted.unmount();
    check(&b, false);
    assert!(std::fs::read(&c).expect("read") == *table);
}

/// A process that is stopped until the end of a test, however that ends.
struct Stopped(Pid);

impl Stopped {
    fn new(pid: i32) -> Stopped {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it runs");
        Stopped(Pid::from_raw(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Between the death of a server and the next one all layers of the disk stay locked; once the disk has left them they are not.
#[test]
fn backing_files_are_locked_while_there_is_no_server() {
    let place = Place::in_memory();
    let base = place.random("base.img", 4 * MIB, 1);
    let [middle, top, target] = ["middle.qcow2", "top.qcow2", "target.img"].map(|name| place.at(name));
    for (image, backing, format) in [(&middle, "base.img", "raw"), (&top, "middle.qcow2", "qcow2")] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", backing, "-F", format, text(image)]);
    }
    let may_write = |image: &Path, format: &str| {
        run("qemu-io", ["-f", format, "-c", "write -q 0 512", text(image)]).code == Some(0)
    };
    let mounted = Mount::of(&place, [&top]).start();
    let disk = mounted.first_disk();
    for _ in 0..2 {
        let stopped = Stopped::new(mounted.keeper_pid);
        let server = mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
        let state = || std::fs::read_to_string(format!("/proc/{server}/stat")).unwrap_or_default();
        wait::until("the server to be dead", || state().contains(") Z "));
        assert!(!may_write(&base, "raw") && !may_write(&middle, "qcow2") && !may_write(&top, "qcow2"));
        drop(stopped);
        // Waits for the next server; what that one parks is locked too.
        let file = OpenOptions::new().write(true).open(&disk).expect("open");
        file.write_all_at(&[7; 512], 512).expect("write");
    }
    mounted.mirror(&target, &[]);
    mounted.cutover();
    wait::until("the layers that the disk has left to be free", || {
        may_write(&base, "raw") && may_write(&middle, "qcow2")
    });
    mounted.unmount();
}
