//! The target of a mirror hangs when the mount ends, or when its service is restarted: nothing of the program waits for it. What the
//! kernel does not let go of keeps the old process, and is named; whoever comes next goes on with the mirror, which was left as after a
//! crash, and every byte is right.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::sys::signal::Signal;

use common::aligned::Aligned;
use common::command::is_root;
use common::leftovers;
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::remote::{Kind, Remote, block_of};
use common::service_manager::{LEFT, ServiceManager};
use common::wait;
use livemirror::state::{Stamp, Store};

const SIZE: u64 = 8 << 20;
const SPOT: u64 = 64 << 10;
const HELD: (u64, u64) = (SPOT, SPOT + 4096);

/// Writes 4 KiB of `byte` at `offset` of a disk, past the page cache.
fn write(disk: &Path, offset: u64, byte: u8) {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(disk).expect("open");
    let mut bytes = Aligned::zeroed(4096);
    bytes.fill(byte);
    file.write_all_at(&bytes, offset).expect("no error ever");
}

/// What the target hangs in.
#[derive(Clone, Copy, Debug)]
enum Hang {
    /// A guest's write, which the guest has given up on; flushes are answered.
    Write,
    /// The copy of a guest's write, and every flush after it.
    Copy,
    /// The first flush at the end.
    Flush,
}

const HANGS: [Hang; 3] = [Hang::Write, Hang::Copy, Hang::Flush];

/// Mirrors, and makes the target hang. The disk has 2 at SPOT then.
fn hang(mounted: &Mounted, remote: &Remote, target: &Path, hang: Hang) {
    let mode = if matches!(hang, Hang::Write) { "write-blocking" } else { "background" };
    mounted.mirror(target, &["--existing", "--copy-mode", mode, "--max-guest-delay", "100ms"]);
    mounted.wait_ready();
    let disk = mounted.disk("a.img");
    match hang {
        Hang::Write | Hang::Copy => {
            remote.hold(Kind::Write, "b.img", HELD, 1);
            write(&disk, SPOT, 1);
            remote.wait_held(1);
            write(&disk, SPOT, 2);
            if matches!(hang, Hang::Write) {
                return;
            }
        }
        Hang::Flush => {
            write(&disk, SPOT, 2);
            mounted.wait_for("it to be copied", |volumes| volumes[0]["mirror"]["in_sync"] == true);
        }
    }
    remote.hold(Kind::Sync, "b.img", (0, u64::MAX), u64::MAX);
}

/// The mirror goes on, and both images are right.
fn goes_on(mounted: &Mounted, remote: &Remote, target: &Path) {
    write(&mounted.disk("a.img"), 0, 3);
    mounted.wait_for("the mirror to go on", |volumes| volumes[0]["mirror"]["ready"] == true);
    mounted.cutover();
    assert_eq!(mounted.active(), target);
    assert_eq!(block_of(&remote.backing("b.img"), SPOT), Some(2), "the late write won");
    assert_eq!(block_of(&remote.backing("b.img"), 0), Some(3));
}

/// What the state says of how the target was left.
#[track_caller]
fn target_stamp(mounted: &Mounted) -> Option<Stamp> {
    let store = Store::open_existing(&mounted.state_dir, nix::unistd::geteuid().as_raw()).expect("a state");
    let state = store.expect("a state").load().expect("a whole state").expect("a record");
    state.volume("a.img").and_then(|volume| volume.mirror.as_ref()).map(|mirror| mirror.target_stamp)
}

fn is_gone(process: i32) -> bool {
    !Path::new(&format!("/proc/{process}")).exists()
}

#[test]
fn an_unmount() {
    if !is_root("a file system of the test's own") {
        return;
    }
    for how in HANGS {
        println!("hangs in {how:?}");
        let place = Place::in_memory();
        let remote = Remote::new(&place);
        let (source, target) = (place.sparse("a.img", SIZE), remote.sparse("b.img", SIZE));
        let mounted = Mount::of(&place, [&source]).start();
        hang(&mounted, &remote, &target, how);
        let (keeper, server) = (mounted.keeper_pid, mounted.server_pid);

        // It comes back, and names what does not.
        let done = mounted.verb::<&str>("unmount", []);
        done.refuses_naming(&[
            "unmounted",
            &format!("process {server} has not ended"),
            target.to_str().expect("UTF-8"),
        ]);
        assert!(leftovers::mounts_below(&mounted.mountpoint).is_empty());
        assert!(!leftovers::is_running(server), "it waits for the target");
        assert!(!is_gone(server));
        let log = mounted.log();
        assert!(log.contains("does not answer"), "{log}");
        assert_eq!(target_stamp(&mounted), Some(Stamp::Running), "not left cleanly");
        let point = mounted.mountpoint.clone();
        mounted.forget();
        Mount::of(&place, [&source]).on(&point).attempt().refuses_naming(&[]);

        remote.let_go();
        wait::until("the old processes to end", || is_gone(server) && is_gone(keeper));
        let mounted = Mount::of(&place, [&source]).on(&point).start();
        goes_on(&mounted, &remote, &target);
        mounted.unmount();
    }
}

#[test]
fn a_restart_of_the_service() {
    if !is_root("a file system of the test's own") {
        return;
    }
    for how in HANGS {
        println!("hangs in {how:?}");
        let place = Place::in_memory();
        let remote = Remote::new(&place);
        let (source, target) = (place.sparse("a.img", SIZE), remote.sparse("b.img", SIZE));
        let mount = Mount::of(&place, [&source]);
        let mut manager = ServiceManager::of(&place, &mount);
        manager.start();
        let mut mounted = manager.mounted(mount);
        hang(&mounted, &remote, &target, how);
        let server = mounted.server_pid;

        manager.signal(Signal::SIGTERM);
        wait::until("the server to leave, whatever its target does", || !leftovers::is_running(server));
        wait::until("the log to name what is waited for", || {
            let waits = format!("before {} answers", target.display());
            manager
                .log()
                .lines()
                .any(|line| line.contains(&format!("server {server} has left")) && line.contains(&waits))
        });
        // The kernel has a request of it: who came now could be overwritten by that.
        assert!(!is_gone(server));
        remote.let_go();
        assert_eq!(manager.wait(), Some(LEFT), "{}", manager.log());
        assert!(is_gone(server));
        manager.start();
        goes_on(&mounted, &remote, &target);
        mounted.note_processes();
        manager.stop();
        mounted.assert_gone();
    }
}
