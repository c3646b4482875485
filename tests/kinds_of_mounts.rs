//! Kinds of mounts: several disks in one, a file as mountpoint, the image itself as mountpoint, block devices as source and
//! as target, and mount options as fstab writes them.

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::block_device::LoopDevice;
use common::command::{is_root, livemirror};
use common::compare;
use common::leftovers;
use common::mounted::Mount;
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;

const SIZE: u64 = 8 << 20;

fn write(path: &Path, bytes: &[u8], offset: u64) {
    let file = OpenOptions::new().write(true).open(path).expect("open");
    file.write_all_at(bytes, offset).and_then(|()| file.sync_all()).expect("write");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn several_disks_with_names_of_their_own() {
    let place = Place::in_memory();
    let images: Vec<PathBuf> = (0..3).map(|n| place.random(&format!("disk-{n}.img"), SIZE, n)).collect();
    let volume = format!("name=log.img,source={},format=raw", text(&images[2]));
    let mounted = Mount::of(&place, &images[..2]).with(["--volume", &*volume]).start();
    let names = ["disk-0.img", "disk-1.img", "log.img"];
    let printed: Vec<&str> = mounted.printed.lines().collect();
    assert_eq!(printed, names.map(|name| mounted.disk(name)).iter().map(|path| text(path)).collect::<Vec<_>>());
    for (name, image) in names.iter().zip(&images) {
        compare::assert_same_content(&mounted.disk(name), image);
    }
    let target = place.at("moved.img");
    mounted.verb_on(&mounted.disk("log.img"), "mirror", [&target]).ok();
    mounted.verb("mirror", [&target]).refuses_naming(&[]);
    mounted.wait_ready();
    write(&mounted.disk("log.img"), b"new", 100);
    write(&mounted.disk("disk-0.img"), b"new", 200);
    mounted.cutover();
    let status = mounted.status();
    let active: Vec<_> = (0..3).map(|n| status["volumes"][n]["active"].as_str().expect("active").to_owned()).collect();
    assert_eq!(active, [text(&images[0]), text(&images[1]), text(&target)]);
    let one = mounted.verb_on(&mounted.disk("log.img"), "status", ["--json"]).ok().json();
    assert!(one.to_string().contains("log.img"), "{one}");
    mounted.unmount();
    compare::assert_same_content(&images[2], &target);
    assert_eq!(fs::read(&images[0]).expect("read")[200..203], *b"new");
}

#[test]
fn two_sources_of_one_name_need_names() {
    let place = Place::in_memory();
    let other = place.directory("other").join("disk.img");
    let image = place.random("disk.img", SIZE, 1);
    fs::copy(&image, &other).expect("copy");
    Mount::of(&place, [&image, &other]).attempt().exits_with(2).refuses_naming(&["disk.img"]);
}

#[test]
fn a_file_becomes_the_disk() {
    let place = Place::in_memory();
    let (image, point) = (place.random("disk.img", SIZE, 1), place.file("point", b"what lies beneath"));
    let mounted = Mount::of(&place, [&image]).on(&point).start();
    assert_eq!(mounted.first_disk(), point);
    compare::assert_same_content(&point, &image);
    write(&point, b"new", 5);
    let target = place.at("target.img");
    mounted.mirror(&target, &[]);
    mounted.cutover();
    write(&point, b"newer", 50);
    mounted.unmount();
    assert_eq!(fs::read(&point).expect("read"), b"what lies beneath");
    assert_eq!(fs::read(&target).expect("read")[50..55], *b"newer");
    assert_eq!(fs::read(&image).expect("read")[5..8], *b"new");
}

#[test]
fn the_image_itself_becomes_the_disk() {
    let seed = random::seed();
    let place = Place::on_disk();
    let (image, target) = (place.sparse("disk.img", SIZE), place.at("target.img"));
    let table = Table::new(seed, SIZE);
    pattern::fill(&image, &table);
    let mounted = Mount::of(&place, [&image]).on(&image).start();
    let load = Load::start(&image, &table, Habits { depth: 8, ..Habits::default() }, seed);
    load.wait_for_more(200);
    mounted.mirror(&target, &[]);
    mounted.wait_ready();
    mounted.cutover();
    load.wait_for_more(200);
    load.stop();
    let done = mounted.verb::<&str>("unmount", []).ok();
    let said = done.stdout + &done.stderr;
    assert!(said.contains(text(&target)), "it does not say which image to use from now on: {said}");
    let mut mounted = mounted;
    mounted.assert_gone();
    table.assert_on(&target);
    assert!(table.verify(&image, &table.bounds()).is_err(), "the path shows the old image again");
}

#[test]
fn symbolic_links_and_relative_paths() {
    let place = Place::in_memory();
    let image = place.random("disk.img", SIZE, 1);
    std::os::unix::fs::symlink("disk.img", place.at("link.img")).expect("symlink");
    let mounted = Mount::of(&place, [place.at("link.img")]).start();
    compare::assert_same_content(&mounted.disk("link.img"), &image);
    let mut command = std::process::Command::new(common::command::binary());
    command.current_dir(place.path()).args(["mirror", "mnt", "target.img"]);
    common::command::finish(command).ok();
    mounted.wait_ready();
    mounted.cutover();
    assert_eq!(mounted.active(), place.at("target.img"));
    mounted.unmount();
    compare::assert_same_content(&image, &place.at("target.img"));
}

#[test]
fn options_as_fstab_writes_them() {
    let place = Place::in_memory();
    let image = place.random("disk.img", SIZE, 1);
    let options = "ro,_netdev,nofail,x-systemd.automount,cache=none,format=raw,name=root.img,noatime";
    let mounted = Mount::of(&place, [&image]).with(["-o", options]).start();
    compare::assert_same_content(&mounted.disk("root.img"), &image);
    OpenOptions::new().write(true).open(mounted.disk("root.img")).expect_err("read-only");
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let line = table.lines().find(|line| line.contains(text(&mounted.mountpoint))).expect("mounted");
    assert!(line.contains(" - fuse.livemirror "), "the file system's type: {line}");
    assert!(line.contains(text(&image)), "its source: {line}");
    mounted.unmount();
    Mount::of(&place, [&image])
        .with(["-o", "no_such_option"])
        .attempt()
        .exits_with(2)
        .refuses_naming(&["no_such_option"]);
    Mount::of(&place, [&image]).with(["-o", "cache=sometimes"]).attempt().exits_with(2).refuses_naming(&["sometimes"]);
}

#[test]
fn from_one_block_device_to_another() {
    if !is_root("a loop device") {
        return;
    }
    let seed = random::seed();
    let place = Place::in_memory();
    let (a, b) = (place.sparse("a.img", SIZE), place.random("b.img", SIZE, seed));
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);
    let (source, target) = (LoopDevice::over(&a), LoopDevice::over(&b));
    let name = source.path.file_name().expect("a name").to_owned();
    // A loop device of this number may have been cut over before, by another test.
    let mounted = Mount::of(&place, [&source.path]).with(["--force"]).start();
    let disk = mounted.first_disk();
    assert!(disk.starts_with(&mounted.mountpoint) && disk.to_string_lossy().contains(&*name.to_string_lossy()));
    assert_eq!(disk.metadata().expect("stat").len(), SIZE);
    let load = Load::start(&disk, &table, Habits { depth: 8, ..Habits::default() }, seed);
    load.wait_for_more(200);
    mounted.mirror(&target.path, &["--existing"]);
    mounted.wait_ready();
    mounted.cutover();
    load.wait_for_more(200);
    load.stop();
    mounted.unmount();
    table.assert_on(&target.path);
    source.detach();
    target.detach();
    table.assert_on(&b);
}

/// The second one begins within what its disk gives back as one: neither reaches beyond its own ends.
#[test]
fn from_one_partition_to_another() {
    if !is_root("a loop device") {
        return;
    }
    const WHOLE: u64 = 32 << 20;
    let seed = random::seed();
    let place = Place::in_memory();
    let (a, b) = (place.random("a.img", WHOLE, seed), place.random("b.img", WHOLE, seed + 1));
    let before = [&a, &b].map(|file| fs::read(file).expect("read"));
    let (start_a, start_b) = (1 << 20, (2 << 20) + 1536);
    let (mut source, mut target) = (LoopDevice::over(&a), LoopDevice::over(&b));
    let from = source.add_partition(start_a, SIZE);
    let to = target.add_partition(start_b, SIZE);
    let table = Table::new(seed, SIZE);
    pattern::fill(&from, &table);
    let mounted = Mount::of(&place, [&from]).with(["--force"]).start();
    let disk = mounted.first_disk();
    assert_eq!(disk.metadata().expect("stat").len(), SIZE);
    let load = Load::start(&disk, &table, Habits { depth: 8, ..Habits::default() }, seed);
    load.wait_for_more(200);
    mounted.mirror(&to, &["--existing"]);
    mounted.wait_ready();
    mounted.cutover();
    load.wait_for_more(200);
    load.stop();
    mounted.unmount();
    table.assert_on(&to);
    source.detach();
    target.detach();
    for (file, before, start) in [(&a, &before[0], start_a), (&b, &before[1], start_b)] {
        let after = fs::read(file).expect("read");
        let (start, end) = (start as usize, (start + SIZE) as usize);
        assert!(after[..start] == before[..start] && after[end..] == before[end..], "{}: around it", file.display());
    }
}

#[test]
fn from_a_file_to_a_larger_block_device_and_back() {
    if !is_root("a loop device") {
        return;
    }
    let place = Place::in_memory();
    let (a, b) = (place.random("a.img", SIZE, 1), place.random("b.img", SIZE + (1 << 20), 2));
    let device = LoopDevice::over(&b);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&device.path, &["--existing"]);
    mounted.cutover();
    assert_eq!(mounted.first_disk().metadata().expect("stat").len(), SIZE, "a cutover never changes the size");
    write(&mounted.first_disk(), b"on the device", 1_000);
    mounted.mirror(&a, &["--existing"]);
    mounted.cutover();
    mounted.unmount();
    assert_eq!(fs::read(&a).expect("read")[1_000..1_013], *b"on the device");
    assert_eq!(compare::first_difference(&a, &b), Some(SIZE), "equal up to the end of the smaller");
    device.detach();
}

/// A block device has no place for a mark, and its number says nothing: what is attached to it now counts.
#[test]
fn a_loop_device_over_another_file_is_another_image() {
    if !is_root("a loop device") {
        return;
    }
    let place = Place::in_memory();
    let (a, b, other) = (place.random("a.img", SIZE, 1), place.at("b.img"), place.random("other.img", SIZE, 2));
    let device = LoopDevice::over(&a);
    let path = device.path.clone();
    let mounted = Mount::of(&place, [&path]).with(["--force"]).start();
    mounted.mirror(&b, &[]);
    mounted.cutover();
    mounted.unmount();
    Mount::of(&place, [&path]).named("old").attempt().refuses_naming(&[text(&path), text(&b)]);
    device.detach();
    let Some(device) = LoopDevice::at(&path, &other) else {
        eprintln!("SKIPPED: {} was taken by somebody else", path.display());
        return;
    };
    let mounted = Mount::of(&place, [&path]).named("new").start();
    compare::assert_same_content(&mounted.first_disk(), &other);
    mounted.unmount();
    device.detach();
}

#[test]
fn a_block_device_in_use_is_refused() {
    if !is_root("a loop device") {
        return;
    }
    let place = Place::in_memory();
    let image = place.sparse("a.img", 64 << 20);
    let device = LoopDevice::over(&image);
    let filesystem = common::block_device::FileSystem::new_ext4(&device.path, &place.at("used"));
    Mount::of(&place, [&device.path]).attempt().refuses_naming(&[text(&device.path)]);
    filesystem.unmount();
    device.detach();
}

#[test]
fn status_list_and_dry_run_change_nothing() {
    let place = Place::in_memory();
    let image = place.random("disk.img", SIZE, 1);
    let mounted = Mount::of(&place, [&image]).start();
    let target = place.at("target.img");
    let plan = mounted.verb("mirror", common::mounted::words(&target, &["--dry-run"])).ok();
    assert!(plan.stdout.contains(text(&target)) || plan.stdout.contains("8"), "{plan}");
    assert!(!target.exists());
    assert!(mounted.job().is_null());
    let plain = mounted.verb::<&str>("status", []).ok();
    assert!(plain.stdout.contains(text(&image)), "{plain}");
    let all = livemirror(["status", "--json"]).ok().json();
    let mounts = all.as_array().expect("an array without an argument");
    assert!(mounts.iter().any(|mount| mount["mountpoint"] == text(&mounted.mountpoint)), "{all}");
    let guest = &mounted.volume()["guest"];
    assert!(guest["read_bytes"].is_u64() && guest["written_bytes"].is_u64(), "{guest}");
    let before = place.inventory().len();
    mounted.verb("verify", [] as [&str; 0]).refuses_naming(&["mirror"]);
    assert_eq!(place.inventory().len(), before);
    mounted.unmount();
    assert!(leftovers::runtime_files(&place.at("mnt")).is_empty());
}
