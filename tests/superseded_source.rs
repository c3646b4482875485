//! After a cutover the old image is stale, and nobody mounts it by mistake: it is refused with a message that names the new
//! one, unless told to follow or to take it all the same. It is a legal target again, which is the way back.

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::compare;
use common::mounted::Mount;
use common::place::Place;
use common::wait;
use livemirror::state::Store;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Moves a disk from one image to another, with something written on the way; nothing stays mounted.
fn moved(place: &Place, source: &Path, target: &Path, options: &[&str], mount_options: &[&str]) {
    let mounted = Mount::of(place, [source]).with(mount_options.iter().copied()).start();
    mounted.mirror(target, options);
    mounted.cutover();
    let disk = OpenOptions::new().write(true).open(mounted.first_disk()).expect("open");
    disk.write_all_at(text(target).as_bytes(), 4_096).expect("write");
    drop(disk);
    mounted.unmount();
}

fn images(place: &Place) -> [PathBuf; 3] {
    [place.random("a.img", 1 << 20, 1), place.at("b.img"), place.at("c.img")]
}

/// On each kind of file system, and with the state kept or lost.
fn places() -> [Place; 2] {
    [Place::on_disk(), Place::in_memory()]
}

#[test]
fn it_is_refused_and_the_new_image_named() {
    for place in places() {
        let [a, b, _] = images(&place);
        moved(&place, &a, &b, &[], &[]);
        let refused = Mount::of(&place, [&a]).attempt().refuses_naming(&[text(&a), text(&b)]);
        assert!(refused.stderr.contains("--follow") && refused.stderr.contains("--force"), "what to do: {refused}");
        let elsewhere = Mount::of(&place, [&a]).named("elsewhere").attempt();
        elsewhere.refuses_naming(&[text(&b)]);
        let new = Mount::of(&place, [&b]).named("new").start();
        assert_eq!(new.active(), b);
        new.unmount();
    }
}

/// A crash right after the record said so: the old image itself does not know.
#[test]
fn it_is_refused_elsewhere_when_a_crash_kept_it_from_being_marked() {
    let place = Place::on_disk();
    let [a, b, _] = images(&place);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    let pair = attribute(&a, "pair").expect("it is one of a pair");
    mounted.cutover();
    mounted.unmount();
    assert!(attribute(&a, "superseded").is_some());
    set_attribute(&a, "superseded", None);
    set_attribute(&a, "pair", Some(&pair));

    Mount::of(&place, [&a]).named("elsewhere").attempt().refuses_naming(&[text(&a), text(&b)]);
    let followed = Mount::of(&place, [&a]).named("elsewhere").with(["--follow"]).start();
    assert_eq!(followed.active(), b);
    followed.unmount();
    let forced = Mount::of(&place, [&a]).named("forced").with(["--force"]).start();
    assert_eq!(forced.active(), a);
    forced.unmount();
    let again = Mount::of(&place, [&a]).named("forced").start();
    assert_eq!(again.active(), a, "an image that was mounted by force is the disk again");
    again.unmount();
    let third = Mount::of(&place, [&a]).named("third").start();
    assert_eq!(third.active(), a, "anywhere");
    third.unmount();
}

/// It may lie on what is failing, which is why it was left.
#[test]
fn a_new_server_does_not_look_at_an_image_that_is_marked() {
    let place = Place::on_disk();
    let [a, b, c] = images(&place);
    let mut mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.cutover();
    wait::until("the record to know of the mark", || {
        let store =
            Store::open_existing(&mounted.state_dir, nix::unistd::geteuid().as_raw()).expect("open").expect("a state");
        store.load().expect("load").expect("a record").volumes[0].superseded[0].marked
    });
    set_attribute(&a, "superseded", None);
    kill(Pid::from_raw(mounted.server_pid), Signal::SIGKILL).expect("kill");
    mounted.note_processes();
    // Long after it would have.
    mounted.mirror(&c, &[]);
    mounted.cutover();
    assert_eq!(attribute(&a, "superseded"), None);
    mounted.unmount();
}

fn attribute(image: &Path, name: &str) -> Option<Vec<u8>> {
    xattr::get(image, format!("user.livemirror.{name}")).expect("getxattr")
}

fn set_attribute(image: &Path, name: &str, value: Option<&[u8]>) {
    let name = format!("user.livemirror.{name}");
    match value {
        Some(value) => xattr::set(image, name, value).expect("setxattr"),
        None => xattr::remove(image, name).expect("removexattr"),
    }
}

#[test]
fn follow_mounts_the_successor() {
    for place in places() {
        let [a, b, c] = images(&place);
        moved(&place, &a, &b, &[], &[]);
        let mounted = Mount::of(&place, [&a]).with(["--follow"]).start();
        assert_eq!(mounted.active(), b);
        assert_eq!(mounted.volume()["source"], text(&a), "the source is what was mounted");
        let disk = mounted.first_disk();
        assert_eq!(disk.file_name(), a.file_name(), "the disk keeps its name");
        compare::assert_same_content(&disk, &b);
        mounted.unmount();
        moved(&place, &a, &c, &[], &["--follow"]);
        let mounted = Mount::of(&place, [&a]).with(["-o", "follow"]).start();
        assert_eq!(mounted.active(), c, "over two successors");
        mounted.unmount();
        // What was never superseded is mounted as it is.
        let mounted = Mount::of(&place, [&c]).with(["--follow"]).start();
        assert_eq!(mounted.active(), c);
        mounted.unmount();
    }
}

#[test]
fn follow_checks_that_the_successor_is_the_one() {
    let place = Place::on_disk();
    let [a, b, _] = images(&place);
    moved(&place, &a, &b, &[], &[]);
    let kept = place.at("kept.img");
    fs::rename(&b, &kept).expect("rename");
    Mount::of(&place, [&a]).with(["--follow"]).attempt().refuses_naming(&[text(&b)]);
    fs::write(&b, fs::read(&kept).expect("read")).expect("write");
    Mount::of(&place, [&a]).with(["--follow"]).attempt().refuses_naming(&[text(&b)]);
    fs::rename(&kept, &b).expect("rename");
    Mount::of(&place, [&a]).with(["--follow"]).start().unmount();
}

#[test]
fn force_mounts_the_old_one_all_the_same() {
    for place in places() {
        let [a, b, _] = images(&place);
        moved(&place, &a, &b, &[], &[]);
        let mounted = Mount::of(&place, [&a]).with(["--force"]).start();
        assert_eq!(mounted.active(), a);
        compare::assert_same_content(&mounted.first_disk(), &a);
        mounted.unmount();
        let mounted = Mount::of(&place, [&a]).named("again").start();
        assert_eq!(mounted.active(), a, "an image that was mounted by force is the disk again");
        mounted.unmount();
    }
}

#[test]
fn there_and_back_again() {
    for place in places() {
        let [a, b, _] = images(&place);
        moved(&place, &a, &b, &[], &[]);
        moved(&place, &b, &a, &["--existing"], &[]);
        Mount::of(&place, [&b]).named("old").attempt().refuses_naming(&[text(&a)]);
        let mounted = Mount::of(&place, [&a]).named("back").start();
        assert_eq!(mounted.active(), a, "an image that becomes active loses its mark");
        let mut found = vec![0; text(&a).len()];
        let disk = fs::File::open(mounted.first_disk()).expect("open");
        disk.read_exact_at(&mut found, 4_096).expect("read");
        assert_eq!(found, text(&a).as_bytes());
        drop(disk);
        mounted.unmount();
    }
}

#[test]
fn there_and_back_within_one_mount() {
    let place = Place::on_disk();
    let [a, b, _] = images(&place);
    let mounted = Mount::of(&place, [&a]).start();
    for (target, options) in [(&b, &[][..]), (&a, &["--existing"]), (&b, &["--existing"])] {
        mounted.mirror(target, options);
        mounted.cutover();
        assert_eq!(mounted.active(), *target);
    }
    mounted.unmount();
    Mount::of(&place, [&a]).named("old").attempt().refuses_naming(&[text(&b)]);
    Mount::of(&place, [&b]).named("new").start().unmount();
}

#[test]
fn a_copy_that_was_finished_supersedes_nothing() {
    let place = Place::on_disk();
    let [a, b, _] = images(&place);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &[]);
    mounted.wait_ready();
    mounted.verb::<&str>("finish", []).ok();
    mounted.unmount();
    Mount::of(&place, [&a]).start().unmount();
    Mount::of(&place, [&b]).named("copy").start().unmount();
}
