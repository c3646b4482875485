//! Mirrors of less than the whole disk (`--sync top` and `none`), and how their targets are laid out. QEMU's own tools say what is in them.

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use common::command::run;
use common::leftovers;
use common::mortal::{self, resumptions};
use common::mounted::{Mount, Mounted, words};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::qcow2::{check, qemu_img};
use common::random;
use common::space;
use common::wait;

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;
const SIZE: u64 = 24 * MIB;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    run("qemu-img", ["compare", text(one), text(other)]).ok();
}

fn create(path: &Path, backing: &str, format: &str, more: &str) {
    let options = format!("backing_file={backing},backing_fmt={format}{more}");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(path)]);
}

/// Bytes of the disk that the uppermost `layers` layers have, zeroes included.
fn bytes_above(image: &Path, layers: u64) -> u64 {
    let map = run("qemu-img", ["map", "-U", "--output=json", text(image)]).ok().json();
    let above = |one: &&Value| one["depth"].as_u64().expect("a depth") < layers && one["present"] == true;
    map.as_array().expect("a list").iter().filter(above).map(|one| one["length"].as_u64().expect("a length")).sum()
}

fn info(image: &Path) -> Value {
    run("qemu-img", ["info", "--output=json", text(image)]).ok().json()
}

/// A disk of three layers: a raw base full of the table's blocks, and over it two qcow2 files with a part each.
struct Chain {
    place: Place,
    table: Arc<Table>,
    base: PathBuf,
    middle: PathBuf,
    a: PathBuf,
    b: PathBuf,
}

impl Chain {
    fn new(seed: u64) -> Chain {
        let place = Place::in_memory();
        let table = Table::new(seed, SIZE);
        let [base, middle, a, b] = ["base.img", "middle.qcow2", "a.qcow2", "b.qcow2"].map(|name| place.at(name));
        place.sparse("base.img", SIZE);
        pattern::fill(&base, &table);
        create(&middle, "base.img", "raw", ",cluster_size=16k");
        create(&a, "middle.qcow2", "qcow2", "");
        for (layer, at) in [(&middle, MIB), (&a, 5 * MIB)] {
            let mut bytes = vec![0; MIB as usize];
            File::open(&base).and_then(|file| file.read_exact_at(&mut bytes, at)).expect("read");
            let part = place.file("part.bin", &bytes);
            run("qemu-io", ["-f", "qcow2", "-c", &format!("write -q -s {} {at} 1M", text(&part)), text(layer)]).ok();
        }
        Chain { place, table, base, middle, a, b }
    }

    #[track_caller]
    fn mount(&self) -> Mounted {
        mount(&self.place, &self.a)
    }

    /// Blocks far apart, as a guest with little to do writes them.
    fn load(&self, mounted: &Mounted, seed: u64) -> Load {
        Load::start(&mounted.disk("a.img"), &self.table, Habits { depth: 4, ..Habits::small() }, seed)
    }
}

/// Also over what a dead mount has left.
#[track_caller]
fn mount(place: &Place, image: &Path) -> Mounted {
    let mountpoint = place.at("mnt");
    if std::fs::symlink_metadata(&mountpoint).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        place.directory("mnt");
    }
    Mount::of(place, [image]).on(&mountpoint).start()
}

/// Returns when nothing of it is left in the kernel either: a process ends with the last of its threads.
fn kill_everything(mounted: Mounted, images: [&Path; 2]) {
    let mountpoint = mounted.mountpoint.clone();
    mounted.kill_everything();
    wait::until("the mount to be dead", || std::fs::metadata(&mountpoint).is_err());
    wait::until("nobody to use the images", || images.iter().all(|image| leftovers::locks_on(image).is_empty()));
}

fn open(disk: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(disk).expect("open")
}

/// Mirrors the top under load and cuts over.
fn moves_the_top(base: Option<fn(&Chain) -> &Path>, layers: u64) {
    let seed = random::seed();
    let chain = Chain::new(seed);
    let mounted = chain.mount();
    let mut options = vec!["--sync", "top"];
    let base_path = base.map(|base| text(base(&chain)).to_owned());
    if let Some(base) = &base_path {
        options.extend(["--base", base]);
    }
    let disk = open(&mounted.disk("a.img"));
    // What a guest discards hides what is beneath, and so it must in the target.
    space::allocate(&disk, space::PUNCH | space::KEEP, 20 * MIB, 2 * MIB).expect("punch");
    let mut zeroes = vec![1; 2 << 20];
    mounted.mirror(&chain.b, &options);
    mounted.wait_ready();
    let before = (bytes_above(&chain.b, 1), bytes_above(&chain.a, layers));
    assert_eq!(before.0, before.1, "no more and no less than what the source has above the base");
    disk.write_all_at(&[7; 5000], 23 * MIB + 100).expect("write");
    disk.sync_all().expect("fsync");
    mounted.cutover();
    assert_eq!(mounted.active(), chain.b);
    disk.read_exact_at(&mut zeroes, 20 * MIB).expect("read");
    assert!(zeroes.iter().all(|&byte| byte == 0), "the backing file shows through");
    disk.write_all_at(&[9; 70_000], 2 * MIB).expect("write");
    let mut model = std::fs::read(&chain.base).expect("read");
    model[20 << 20..22 << 20].fill(0);
    model[(23 << 20) + 100..][..5000].fill(7);
    model[2 << 20..][..70_000].fill(9);
    let mut shown = vec![0; SIZE as usize];
    disk.read_exact_at(&mut shown, 0).expect("read");
    assert!(shown == model, "the disk is not what the guest made of it");
    drop(disk);
    mounted.unmount();
    check(&chain.b, false);
    let told = info(&chain.b);
    assert_eq!(told["full-backing-filename"], base_path.as_deref().unwrap_or(text(&chain.middle)));
    assert_same(&chain.place.file("model.img", &model), &chain.b);
    // It is a disk like any other, and the old one says where it went.
    let said = Mount::of(&chain.place, [&chain.a]).attempt();
    said.refuses_naming(&[text(&chain.b)]);
    let mounted = Mount::of(&chain.place, [&chain.a]).with(["--follow"]).start();
    assert_eq!(mounted.active(), chain.b);
    mounted.unmount();
}

#[test]
fn the_top_layer_moves_onto_the_same_backing_file() {
    moves_the_top(None, 1);
}

#[test]
fn what_lies_above_a_base_moves_onto_that_base() {
    moves_the_top(Some(|chain| &chain.base), 2);
    moves_the_top(Some(|chain| &chain.middle), 1);
}

#[test]
fn the_top_moves_under_load_onto_a_target_that_held_something() {
    let seed = random::seed();
    let chain = Chain::new(seed);
    create(&chain.b, "middle.qcow2", "qcow2", ",cluster_size=4k");
    let rubbish = ["-f", "qcow2", "-c", "write -q -P 5 3M 3M", "-c", "write -q -P 6 23M 4k", text(&chain.b)];
    run("qemu-io", rubbish).ok();
    for mode in ["background", "write-blocking"] {
        let mounted = chain.mount();
        let load = chain.load(&mounted, seed);
        load.wait_for_more(50);
        mounted.mirror(&chain.b, &["--sync", "top", "--existing", "--copy-mode", mode]);
        mounted.wait_ready();
        load.wait_for_more(100);
        let verified = mounted.verb("verify", [] as [&str; 0]);
        assert_eq!(verified.code, Some(0), "{verified}");
        load.stop();
        if mode == "background" {
            // A copy, and once more onto what it has become.
            mounted.wait_for("the mirror to be in sync", |volumes| volumes[0]["mirror"]["in_sync"] == true);
            mounted.verb::<&str>("finish", []).ok();
            mounted.unmount();
            check(&chain.b, false);
            assert_same(&chain.a, &chain.b);
            continue;
        }
        mounted.cutover();
        chain.table.assert_on(&mounted.disk("a.img"));
        mounted.unmount();
        check(&chain.b, false);
        assert_same(&chain.a, &chain.b);
    }
}

/// Killed, and then touched by others: it goes on as a mirror of the top both times.
#[test]
fn a_mirror_of_the_top_goes_on_as_one() {
    let seed = random::seed();
    let chain = Chain::new(seed);
    let mounted = chain.mount();
    mounted.mirror(&chain.b, &["--sync", "top", "--speed", "256K"]);
    let load = chain.load(&mounted, seed);
    load.wait_for_more(20);
    kill_everything(mounted, [&chain.a, &chain.b]);
    load.end();
    check(&chain.b, true);
    let mounted = chain.mount();
    mounted.verb("set", ["--speed", "0"]).ok();
    mounted.wait_ready();
    assert_eq!(mounted.job()["sync"], "top");
    assert_eq!(resumptions(&mounted.log(), "compared"), Vec::<u64>::new(), "nobody touched the images");
    mounted.unmount();
    assert_same(&chain.a, &chain.b);
    assert_eq!(bytes_above(&chain.b, 1), bytes_above(&chain.a, 1));
    // Somebody writes to the target: everything is compared, and what comes of the base is still not copied.
    run("qemu-io", ["-f", "qcow2", "-c", "write -q -P 9 12M 64k", text(&chain.b)]).ok();
    let mounted = chain.mount();
    mounted.wait_ready();
    assert_eq!(resumptions(&mounted.log(), "compared"), [SIZE]);
    let expected = bytes_above(&chain.a, 1);
    mounted.cutover();
    mounted.unmount();
    assert_same(&chain.a, &chain.b);
    let found = bytes_above(&chain.b, 1);
    assert!(found <= expected + 64 * KIB, "{found} bytes where {expected} are the source's");
    check(&chain.b, true);
}

/// A target that was exchanged for one over another base is not taken for the old one.
#[test]
fn a_mirror_of_the_top_does_not_go_on_over_another_base() {
    let chain = Chain::new(random::seed());
    let mounted = chain.mount();
    mounted.mirror(&chain.b, &["--sync", "top"]);
    mounted.wait_ready();
    mounted.unmount();
    let kept = chain.place.at("kept.qcow2");
    std::fs::rename(&chain.b, &kept).expect("rename");
    create(&chain.b, "base.img", "raw", "");
    let mounted = chain.mount();
    mounted.wait_for("the mirror to say why it waits", |volumes| {
        assert_ne!(volumes[0]["mirror"]["ready"], true, "it goes on over another base");
        let said = volumes[0]["mirror"]["last_error"].as_str().unwrap_or_default();
        said.contains(text(&chain.base)) && said.contains(text(&chain.middle))
    });
    assert_eq!(bytes_above(&chain.b, 1), 0, "nothing was written");
    std::fs::rename(&kept, &chain.b).expect("rename");
    mounted.verb::<&str>("resume", []).ok();
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    assert_same(&chain.a, &chain.b);
}

#[test]
fn what_has_no_common_base_is_refused_by_name() {
    let chain = Chain::new(random::seed());
    let place = &chain.place;
    let [other, bare, guess, raw] = ["other.qcow2", "bare.qcow2", "guess.qcow2", "b.img"].map(|name| place.at(name));
    create(&other, "base.img", "raw", "");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&bare), &SIZE.to_string()]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-u", "-b", "middle.qcow2", "-F", "raw", text(&guess), "24M"]);
    let mounted = chain.mount();
    let inventory = || {
        let mut all = place.inventory();
        all.retain(|one| !one.contains("mnt.state/log"));
        all
    };
    let before = inventory();
    let top = ["--sync", "top"];
    let refused = |target: &Path, options: &[&str], names: &[&str]| {
        mounted.verb("mirror", words(target, options)).refuses_naming(names);
    };
    let existing = |target: &Path, names: &[&str]| refused(target, &["--sync", "top", "--existing"], names);
    existing(&other, &[text(&other), text(&chain.base), text(&chain.middle)]);
    existing(&bare, &[text(&bare), "no backing file", text(&chain.middle)]);
    existing(&guess, &[text(&guess), "raw", "qcow2"]);
    refused(&raw, &top, &[text(&raw), "raw"]);
    refused(&chain.b, &["--sync", "top", "--backing-file", "base.img"], &[text(&chain.b), text(&chain.middle)]);
    refused(&chain.b, &["--sync", "top", "--base", text(&bare)], &[text(&bare), text(&chain.a)]);
    refused(&chain.b, &["--base", text(&chain.base)], &[text(&chain.base), "--sync top"]);
    refused(&chain.b, &["--sync", "top", "--base", text(&chain.a)], &[text(&chain.a)]);
    refused(&bare, &["--existing", "--cluster-size", "4K"], &[text(&bare), "created"]);
    refused(&raw, &["--cluster-size", "4K"], &[text(&raw), "raw image"]);
    refused(&chain.b, &["--cluster-size", "3000"], &[text(&chain.b), "3000"]);
    // The disk itself lies under nothing that it is mirrored to.
    refused(&chain.b, &["--backing-file", text(&chain.a)], &["in use"]);
    assert_eq!(inventory(), before, "something was left behind");
    // Nothing of that kept the right one from being made.
    mounted.mirror(&chain.b, &top);
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    assert_same(&chain.a, &chain.b);
}

/// QEMU's rule: without a backing file the top is all there is.
#[test]
fn the_top_of_a_disk_without_backing_file_is_all_of_it() {
    let place = Place::in_memory();
    let (a, b) = (place.random("a.img", 4 * MIB, random::seed()), place.at("b.qcow2"));
    let mounted = mount(&place, &a);
    mounted.mirror(&b, &["--sync", "top"]);
    mounted.wait_ready();
    assert_eq!(mounted.job()["sync"], "full");
    mounted.cutover();
    mounted.unmount();
    assert!(info(&b).get("backing-filename").is_none());
    assert_same(&a, &b);
}

fn write(disk: &File, at: u64, byte: u8, len: usize) {
    disk.write_all_at(&vec![byte; len], at).expect("write");
    disk.sync_all().expect("fsync");
}

#[track_caller]
fn assert_has(target: &Path, patterns: &[(u64, u8, u64)]) {
    for (at, byte, len) in patterns {
        let command = format!("read -q -P {byte} {at} {len}");
        let done = run("qemu-io", ["-r", "-f", "qcow2", "-c", &command, text(target)]).ok();
        assert!(!format!("{done}").contains("verification failed"), "{done}");
    }
}

#[test]
fn only_what_is_written_from_now_on_is_mirrored_and_never_becomes_the_disk() {
    let place = Place::in_memory();
    let (a, b) = (place.random("a.img", SIZE, random::seed()), place.at("b.qcow2"));
    let mut mounted = mount(&place, &a);
    mounted.verb("move", words(&b, &["--sync", "none"])).refuses_naming(&["--sync none"]);
    assert!(!b.exists());
    let disk = open(&mounted.disk("a.img"));
    write(&disk, 0, 1, 128 << 10);
    mounted.mirror(&b, &["--sync", "none"]);
    mounted.wait_ready();
    let start = bytes_above(&b, 1);
    assert_eq!(start, 0, "nothing was written yet");
    write(&disk, 4 * MIB, 2, 64 << 10);
    write(&disk, 9 * MIB, 3, 64 << 10);
    let refused = |mounted: &Mounted| {
        mounted.verb("cutover", ["--timeout", "1s"]).refuses_naming(&[text(&b), "--sync none", "cut over"]);
        mounted.verb::<&str>("verify", []).refuses_naming(&[text(&b), "--sync none"]);
        assert_eq!(mounted.active(), a);
    };
    refused(&mounted);
    drop(disk);
    // A kill of the server, one of all there is, and a clean stop: what was not written is still not copied.
    mortal::strike(mounted.keeper_pid, nix::sys::signal::Signal::SIGKILL);
    mounted.wait_ready();
    mounted.note_processes();
    write(&open(&mounted.disk("a.img")), 14 * MIB, 4, 64 << 10);
    kill_everything(mounted, [&a, &b]);
    let mounted = mount(&place, &a);
    mounted.wait_ready();
    assert_eq!(mounted.job()["sync"], "none");
    mounted.unmount();
    let mounted = mount(&place, &a);
    mounted.wait_ready();
    refused(&mounted);
    write(&open(&mounted.disk("a.img")), 19 * MIB, 5, 64 << 10);
    let said = mounted.verb::<&str>("finish", []).ok();
    assert!(!said.stdout.contains("copy"), "{said}");
    let last = mounted.volume()["last_mirror"].clone();
    assert_eq!((&last["result"], &last["consistent"]), (&"finished".into(), &false.into()), "{last}");
    mounted.unmount();
    check(&b, true);
    let parts = [(4 * MIB, 2, 64 * KIB), (9 * MIB, 3, 64 * KIB), (14 * MIB, 4, 64 * KIB), (19 * MIB, 5, 64 * KIB)];
    assert_has(&b, &parts);
    // A restart knows what was written by regions of a MiB.
    let found = bytes_above(&b, 1);
    assert!((256 * KIB..=4 * MIB).contains(&found), "{found} bytes where 256 KiB were written");
}

/// What was written cannot be found out by comparing: the mirror ends, and says so.
#[test]
fn a_mirror_of_what_is_written_does_not_go_on_after_others_wrote() {
    let place = Place::on_disk();
    let (a, b) = (place.random("a.img", SIZE, random::seed()), place.at("b.qcow2"));
    for touched in [&a, &b] {
        let mounted = mount(&place, &a);
        mounted.mirror(&b, &["--sync", "none"]);
        mounted.wait_for("the mirror to be ready", |volumes| volumes[0]["mirror"]["ready"] == true);
        write(&open(&mounted.disk("a.img")), 4 * MIB, 2, 64 << 10);
        mounted.unmount();
        let file = OpenOptions::new().write(true).open(touched).expect("open");
        // Past what the qcow2 file knows, and in the middle of the disk.
        let end = file.metadata().expect("stat").len();
        file.write_all_at(&[0], if touched == &a { MIB } else { end - 1 }).expect("write");
        drop(file);
        let mounted = mount(&place, &a);
        mounted.wait_for("the mirror to end", |volumes| {
            let mirror = &volumes[0]["mirror"];
            assert!(mirror["last_error"].is_null() && mirror["ready"] != true, "it goes on, or waits: {mirror}");
            volumes[0]["mirror"].is_null()
        });
        let last = mounted.volume()["last_mirror"].clone();
        assert_eq!((&last["result"], &last["consistent"]), (&"failed".into(), &false.into()), "{last}");
        let said = last["error"].as_str().expect("a reason");
        assert!(said.contains("(--sync none) cannot go on") && said.contains("changed by others"), "{said}");
        // The disk is as good as ever, and so is the next mirror.
        write(&open(&mounted.disk("a.img")), 8 * MIB, 3, 64 << 10);
        std::fs::remove_file(&b).expect("remove");
        mounted.unmount();
    }
}

#[test]
fn a_target_is_laid_out_as_told() {
    let place = Place::in_memory();
    let seed = random::seed();
    let table = Table::new(seed, 8 * MIB);
    let (a, base) = (place.random("a.img", SIZE, seed + 1), place.random("base.img", SIZE, seed));
    pattern::fill(&a, &table);
    let layouts: [(&[&str], &str, u64, bool); 4] = [
        (&["--cluster-size", "4K"], "1.1", 4 << 10, false),
        (&["--compat", "0.10"], "0.10", 64 << 10, false),
        (&["--compat", "0.10", "--cluster-size", "2M", "--backing-file", "base.img"], "0.10", 2 << 20, true),
        (&["--cluster-size", "512", "--backing-file", "base.img", "--backing-format", "raw"], "1.1", 512, true),
    ];
    for (options, compat, cluster, backed) in layouts {
        let b = place.at("b.qcow2");
        let mounted = mount(&place, &a);
        let disk = open(&mounted.disk("a.img"));
        space::allocate(&disk, space::PUNCH | space::KEEP, 10 * MIB, 3 * MIB).expect("punch");
        let load = Load::start(&mounted.disk("a.img"), &table, Habits::small(), seed);
        load.wait_for_more(20);
        mounted.mirror(&b, options);
        mounted.wait_ready();
        load.wait_for_more(20);
        load.stop();
        mounted.wait_for("the mirror to be in sync", |volumes| volumes[0]["mirror"]["in_sync"] == true);
        mounted.verb::<&str>("finish", []).ok();
        drop(disk);
        mounted.unmount();
        check(&b, false);
        let told = info(&b);
        assert_eq!(told["format-specific"]["data"]["compat"], compat, "{told}");
        assert_eq!(told["cluster-size"], cluster, "{told}");
        assert_eq!(told.get("backing-filename").is_some(), backed, "{told}");
        if backed {
            assert_eq!(told["full-backing-filename"], text(&base));
            assert_eq!(told["backing-filename-format"], "raw");
        }
        // Nothing of the backing file shows: the whole disk was copied.
        assert_same(&a, &b);
        std::fs::remove_file(&b).expect("remove");
    }
}
