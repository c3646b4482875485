//! Between two images on one file system that can (XFS here), a mirror shares blocks instead of copying them: fast, and no second
//! copy. Never so that a guest finds the file system full.

mod common;

use std::fs::File;
use std::path::{Path, PathBuf};

use common::block_device::FileSystem;
use common::command::{is_root, run};
use common::mounted::{Mount, Mounted, words};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;

const MIB: u64 = 1 << 20;
/// mkfs.xfs makes none smaller than 300 MiB.
const XFS_BYTES: u64 = 320 * MIB;
const SIZE: u64 = 64 * MIB;

/// A disk that is all data, mounted from an XFS.
struct Story {
    a: PathBuf,
    b: PathBuf,
    seed: u64,
    table: std::sync::Arc<Table>,
    mounted: Mounted,
    xfs: FileSystem,
    _place: Place,
}

/// `free`: how many bytes are left free on the XFS.
fn story(free: Option<u64>) -> Option<Story> {
    if !is_root("a file system of the test's own") {
        return None;
    }
    let (place, seed) = (Place::in_memory(), random::seed());
    let device = place.sparse("xfs", XFS_BYTES);
    run("mkfs.xfs", ["-q", "-m", "reflink=1", device.to_str().expect("UTF-8")]).ok();
    let xfs = FileSystem::mount(&["-o", "loop", device.to_str().expect("UTF-8")], &place.at("on-xfs"));
    let (a, b) = (xfs.path.join("a.img"), xfs.path.join("b.img"));
    File::create(&a).and_then(|file| file.set_len(SIZE)).expect("a sparse file");
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);
    File::open(&a).and_then(|file| file.sync_all()).expect("fsync");
    if let Some(free) = free {
        let filler = available(&xfs.path) - free;
        run("fallocate", ["-l", &filler.to_string(), xfs.path.join("filler").to_str().expect("UTF-8")]).ok();
    }
    let mounted = Mount::of(&place, [&a]).start();
    Some(Story { a, b, seed, table, mounted, xfs, _place: place })
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn available(path: &Path) -> u64 {
    let told = nix::sys::statvfs::statvfs(path).expect("statvfs");
    told.blocks_available() * told.fragment_size()
}

fn shared(mounted: &Mounted) -> u64 {
    mounted.job()["shared_bytes"].as_u64().expect("a count")
}

impl Story {
    fn load(&self) -> Load {
        let habits = Habits { depth: 4, ..Habits::default() };
        Load::start(&self.mounted.disk("a.img"), &self.table, habits, self.seed)
    }

    /// Cuts over under load and looks at every block of the new image.
    fn finish(self, load: Load) {
        load.wait_for_more(100);
        self.mounted.cutover();
        load.wait_for_more(100);
        load.stop();
        assert_eq!(self.mounted.active(), self.b);
        let Story { b, table, mounted, xfs, .. } = self;
        mounted.unmount();
        table.assert_on(&b);
        xfs.unmount();
    }
}

#[test]
fn under_load_to_a_new_and_to_an_old_target() {
    for old in [false, true] {
        let Some(story) = story(None) else { return };
        if old {
            run("cp", ["--reflink=never", "/proc/self/exe", story.b.to_str().expect("UTF-8")]).ok();
            File::options().write(true).open(&story.b).and_then(|file| file.set_len(SIZE)).expect("resize");
        }
        let options: &[&str] = if old { &["--existing"] } else { &[] };
        let plan = story.mounted.verb("mirror", words(&story.b, &[options, &["--dry-run"]].concat())).ok();
        assert!(plan.stdout.contains("no second copy"), "{plan}");
        let load = story.load();
        story.mounted.mirror(&story.b, options);
        story.mounted.wait_ready();
        assert!(shared(&story.mounted) >= SIZE / 2, "{}", story.mounted.job());
        let shown = story.mounted.verb::<&str>("status", []).ok();
        assert!(shown.stdout.contains("no second copy"), "{shown}");
        story.finish(load);
    }
}

#[test]
fn without_a_guest_it_takes_no_room() {
    let Some(story) = story(None) else { return };
    let before = available(&story.xfs.path);
    story.mounted.mirror(&story.b, &[]);
    story.mounted.wait_ready();
    let took = before.saturating_sub(available(&story.xfs.path));
    assert!(took < SIZE / 8, "{took} bytes for a shared copy of {SIZE}");
    assert_eq!(shared(&story.mounted), SIZE);
    let load = story.load();
    story.finish(load);
}

/// What one disk shares is room that the other one cannot have.
#[test]
fn two_disks_do_not_share_more_than_there_is_room_for() {
    let Some(story) = story(None) else { return };
    story.mounted.unmount();
    let small = |name: &str| story.xfs.path.join(name);
    let c = small("c.img");
    run("cp", ["--reflink=never", text(&story.a), text(&c)]).ok();
    File::open(&c).and_then(|file| file.sync_all()).expect("fsync");
    let mounted = Mount::of(&story._place, [&story.a, &c]).start();
    let [first, second] = ["a.img", "c.img"].map(|name| mounted.disk(name));
    let filler = available(&story.xfs.path) - SIZE - SIZE / 2;
    run("fallocate", ["-l", &filler.to_string(), text(&small("filler"))]).ok();
    let shared = |at: usize| mounted.status()["volumes"][at]["mirror"]["shared_bytes"].as_u64().expect("a count");
    mounted.verb_on(&first, "mirror", words(&story.b, &["--wait"])).ok();
    mounted.verb_on(&second, "mirror", words(&small("d.img"), &["--wait"])).ok();
    assert_eq!((shared(0), shared(1)), (SIZE, 0));
    // A cancelled mirror removes its target, and what was promised for that is to be had again; not so for one that is kept.
    mounted.verb_on(&second, "cancel", ["--keep"]).ok();
    mounted.verb_on::<&str>(&first, "cancel", []).ok();
    std::fs::remove_file(small("d.img")).expect("remove");
    mounted.verb_on(&first, "mirror", words(&story.b, &["--wait"])).ok();
    assert_eq!(shared(0), SIZE, "the room of a mirror that was cancelled is still promised");
    mounted.verb_on::<&str>(&first, "cancel", []).ok();
    mounted.unmount();
    story.xfs.unmount();
}

#[test]
fn a_second_copy_for_whoever_wants_one() {
    let Some(story) = story(None) else { return };
    let before = available(&story.xfs.path);
    story.mounted.mirror(&story.b, &["--no-reflink"]);
    story.mounted.wait_ready();
    let took = before.saturating_sub(available(&story.xfs.path));
    assert!(took >= SIZE, "{took} bytes for a second copy of {SIZE}");
    assert_eq!(shared(&story.mounted), 0);
    let load = story.load();
    story.finish(load);
}

/// Every shared block that the guest overwrites needs another one: where there are too few, nothing is shared.
#[test]
fn a_guest_never_finds_the_file_system_full_because_of_it() {
    let Some(story) = story(Some(SIZE / 2)) else { return };
    story.mounted.mirror(&story.b, &[]);
    story.mounted.wait_for("the full target to pause the job", |volumes| volumes[0]["mirror"]["state"] == "paused");
    assert_eq!(story.mounted.job()["io_status"], "nospace", "{}", story.mounted.job());
    assert_eq!(shared(&story.mounted), 0);
    // Every block of the disk, in place.
    pattern::fill(&story.mounted.disk("a.img"), &story.table);
    story.mounted.verb::<&str>("cancel", []).ok();
    let Story { a, table, mounted, xfs, .. } = story;
    mounted.unmount();
    table.assert_on(&a);
    xfs.unmount();
}
