//! A write of the dead server is still under way in the kernel when the server is killed (rule 14): it takes effect later, whatever
//! is written to the same place meanwhile. So nothing is: no server serves before the last one's requests have returned, and
//! `status` says what is waited for.
//!
//! The images lie on a file system of the test's own that holds a request for as long as the test wants. What it holds is what an
//! NFS server or a device has got and does not answer: no signal takes it back.

mod common;

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::aligned::Aligned;
use common::command::{is_root, livemirror};
use common::mortal;
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::remote::{Kind, Remote, block_of};
use common::wait;

const SIZE: u64 = 8 << 20;
/// Where all the writes go.
const SPOT: u64 = 64 << 10;
const HELD: (u64, u64) = (SPOT, SPOT + 4096);
/// How long nothing must happen. A server that would come too early is there long before.
const MOMENT: Duration = Duration::from_millis(1500);

/// Writes 4 KiB of `byte` at `offset` of a disk, past the page cache.
fn write(disk: &Path, offset: u64, byte: u8) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let mut bytes = Aligned::zeroed(4096);
    bytes.fill(byte);
    file.write_all_at(&bytes, offset)
}

/// A guest that writes one byte after the other to a place, each once the last was acknowledged. Not a scoped thread: where the
/// test fails, nobody waits for it.
struct Guest {
    acknowledged: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<()>>,
}

impl Guest {
    fn writes(disk: &Path, offset: u64, bytes: impl IntoIterator<Item = u8> + Send + 'static) -> Guest {
        let acknowledged = Arc::new(AtomicU64::new(0));
        let (disk, count) = (disk.to_owned(), Arc::clone(&acknowledged));
        let thread = std::thread::spawn(move || {
            bytes.into_iter().try_for_each(|byte| {
                write(&disk, offset, byte)?;
                count.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
        });
        Guest { acknowledged, thread }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    #[track_caller]
    fn end(self) {
        wait::until("the guest to end", || self.thread.is_finished());
        self.thread.join().expect("a guest").expect("no error ever");
    }
}

/// Waits until `status` tells that the killed `server` waits for `file`. Not for ever, where one serves that must not.
#[track_caller]
fn wait_told(mountpoint: &Path, server: i32, file: &Path, served: impl Fn() -> bool) {
    wait::until("status to tell what is waited for", || {
        let said = livemirror([Path::new("status"), mountpoint]).stderr;
        let waits = format!("before {} answers", file.display());
        served() || (said.contains(&format!("server {server} was killed")) && said.contains(&waits))
    });
}

#[track_caller]
fn strike(mounted: &Mounted) -> i32 {
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL)
}

/// The kernel has the write to the source; the guest waits for it, and is killed together with nobody.
#[test]
fn of_the_guest_to_the_source() {
    if !is_root("a file system of the test's own") {
        return;
    }
    let place = Place::in_memory();
    let remote = Remote::new(&place);
    let source = remote.sparse("a.img", SIZE);
    let mounted = Mount::of(&place, [&source]).start();
    let disk = mounted.disk("a.img");

    remote.hold(Kind::Write, "a.img", HELD, 1);
    let first = Guest::writes(&disk, SPOT, [1, 2]);
    remote.wait_held(1);
    let server = strike(&mounted);
    let second = Guest::writes(&disk, 0, [7]);
    wait_told(&mounted.mountpoint, server, &source, || second.acknowledged() > 0);
    std::thread::sleep(MOMENT);
    let meanwhile = (first.acknowledged(), second.acknowledged(), remote.came(Kind::Write, "a.img"));
    remote.let_go();
    first.end();
    second.end();
    assert_eq!(block_of(&remote.backing("a.img"), SPOT), Some(2), "the late write won");
    assert_eq!(block_of(&remote.backing("a.img"), 0), Some(7));
    assert_eq!(meanwhile, (0, 0, 1), "served before the dead server's write had returned");
    assert_eq!(mounted.status()["restarts"], 1);
    mounted.unmount();
    assert_eq!(block_of(&remote.backing("a.img"), SPOT), Some(2));
}

/// The guest was let go on without the target, and has written anew; the write that was given up on is still under way when the
/// server dies. The next server's copy of the same place comes after it.
#[test]
fn of_a_guest_to_the_target() {
    if !is_root("a file system of the test's own") {
        return;
    }
    let place = Place::in_memory();
    let remote = Remote::new(&place);
    let (source, target) = (place.sparse("a.img", SIZE), remote.sparse("b.img", SIZE));
    let mounted = Mount::of(&place, [&source]).start();
    let disk = mounted.disk("a.img");
    let options = ["--existing", "--copy-mode", "write-blocking", "--max-guest-delay", "100ms"];
    mounted.mirror(&target, &options);
    mounted.wait_ready();

    remote.hold(Kind::Write, "b.img", HELD, 1);
    // It waits for the target as long as it was told to, no longer.
    write(&disk, SPOT, 1).expect("the guest is not failed by the target");
    remote.wait_held(1);
    let job = mounted.job();
    assert!(job["in_sync"] == false && job["in_flight_bytes"].as_u64() > Some(0), "{job}");
    write(&disk, SPOT, 2).expect("nor is it held again");
    assert_eq!(block_of(&remote.backing("b.img"), SPOT), Some(0));

    let before = remote.came(Kind::Write, "b.img");
    let server = strike(&mounted);
    let guest = Guest::writes(&disk, 0, [7]);
    wait_told(&mounted.mountpoint, server, &target, || guest.acknowledged() > 0);
    std::thread::sleep(MOMENT);
    let meanwhile = (guest.acknowledged(), remote.came(Kind::Write, "b.img") - before);
    remote.let_go();
    guest.end();
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    assert_eq!(block_of(&remote.backing("b.img"), SPOT), Some(2), "the late write won");
    assert_eq!(block_of(&remote.backing("b.img"), 0), Some(7));
    // The price, and README's table says so: what the target holds up, the next server waits for.
    assert_eq!(meanwhile, (0, 0), "served before the dead server's write had returned");
}

/// Nobody is left who could wait for the server: the images' locks tell that it is not gone.
#[test]
fn after_keeper_and_server_were_both_killed() {
    if !is_root("a file system of the test's own") {
        return;
    }
    for held in ["source", "target"] {
        let place = Place::in_memory();
        let remote = Remote::new(&place);
        let (source, target) = (remote.sparse("a.img", SIZE), remote.sparse("b.img", SIZE));
        let mounted = Mount::of(&place, [&source]).start();
        let disk = mounted.disk("a.img");
        let options = ["--existing", "--copy-mode", "write-blocking", "--max-guest-delay", "100ms"];
        mounted.mirror(&target, &options);
        mounted.wait_ready();
        let (file, image) = if held == "source" { ("a.img", &source) } else { ("b.img", &target) };
        remote.hold(Kind::Write, file, HELD, 1);
        let guest = Guest::writes(&disk, SPOT, [1]);
        remote.wait_held(1);

        let (keeper, server) = (mounted.keeper_pid, mounted.server_pid);
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            kill(Pid::from_raw(keeper), signal).expect("the keeper");
            kill(Pid::from_raw(server), signal).expect("the server");
        }
        let point = mounted.mountpoint.clone();
        mounted.forget();
        wait_told(&point, server, image, || false);
        let came = remote.came(Kind::Write, file);
        for _ in 0..3 {
            let refused = Mount::of(&place, [&source]).on(&point).with(["--follow"]).attempt();
            let pid = server.to_string();
            refused.refuses_naming(&[&pid, "was killed", image.to_str().expect("UTF-8")]);
        }
        // Elsewhere, where no mount is in the way.
        let elsewhere = Mount::of(&place, [&source]).named("elsewhere").attempt();
        elsewhere.refuses_naming(&[source.to_str().expect("UTF-8"), "in use"]);
        assert_eq!(remote.came(Kind::Write, file), came);
        remote.let_go();
        // Its write was acknowledged by the target's silence, or the connection ended under it.
        wait::until("the guest to end", || guest.thread.is_finished());

        wait::until("the dead server to be gone", || !Path::new(&format!("/proc/{server}")).exists());
        let mounted = Mount::of(&place, [&source]).on(&point).with(["--follow"]).start();
        let disk = mounted.disk("a.img");
        write(&disk, SPOT, 2).expect("write");
        mounted.wait_ready();
        mounted.cutover();
        mounted.unmount();
        assert_eq!(block_of(&remote.backing("b.img"), SPOT), Some(2), "the late write won");
    }
}
