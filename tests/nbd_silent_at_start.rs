//! The NBD server of one disk is silent while a server of ours is started again: the mount's other disks do not wait for it, its own guests
//! wait as long as they were told.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::mortal;
use common::mounted::{Mount, Mounted};
use common::nbd::Server;
use common::place::Place;
use common::wait;
use nix::sys::signal::Signal;

const SIZE: u64 = 4 << 20;

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// A mount of a file, `a.img`, and of the export of `server`, `nbd.img`.
fn mount(place: &Place, server: &Server, reconnect: &str) -> (Mounted, File, File) {
    let local = place.random("a.img", SIZE, 1);
    let mounted = Mount::of(place, [local, server.uri()]).with(["--reconnect", reconnect]).start();
    let (local, remote) = (open(&mounted.disk("a.img")), open(&mounted.disk("nbd.img")));
    (mounted, local, remote)
}

/// Reads and writes `disk` on another thread, which hangs if the disk does.
#[track_caller]
fn assert_answers(disk: &File) {
    let disk = disk.try_clone().unwrap();
    let guest = std::thread::spawn(move || {
        disk.write_all_at(&[7; 4096], 0)?;
        disk.read_exact_at(&mut [0; 4096], 0)
    });
    wait::until("a disk that has nothing to do with it", || guest.is_finished());
    guest.join().unwrap().unwrap();
}

#[test]
fn other_disks_do_not_wait_for_a_server_that_is_frozen() {
    let place = Place::in_memory();
    let image = place.sparse("b.img", SIZE);
    let server = Server::qemu(&place, "b.sock", "raw", &image);
    let (mut mounted, local, remote) = mount(&place, &server, "1h");
    remote.write_all_at(&[1; 4096], 0).unwrap();
    server.freeze();
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    assert_answers(&local);
    let waiting = {
        let remote = remote.try_clone().unwrap();
        std::thread::spawn(move || remote.write_all_at(&[2; 4096], 4096))
    };
    assert_answers(&local);
    assert!(!waiting.is_finished(), "its own guest waits");
    server.thaw();
    waiting.join().unwrap().unwrap();
    let mut seen = [0; 8192];
    remote.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen[..4096] == [1; 4096] && seen[4096..] == [2; 4096]);
    remote.sync_all().unwrap();
    drop((local, remote));
    mounted.note_processes();
    mounted.unmount();
}

#[test]
fn a_server_that_stays_away_fails_its_own_guests_in_time_and_may_come_back() {
    let place = Place::in_memory();
    let image = place.sparse("b.img", SIZE);
    let mut server = Server::qemu(&place, "b.sock", "raw", &image);
    let (mut mounted, local, remote) = mount(&place, &server, "2s");
    remote.write_all_at(&[1; 4096], 0).unwrap();
    remote.sync_all().unwrap();
    server.kill();
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    assert_answers(&local);
    assert_eq!(remote.write_all_at(&[2; 4096], 4096).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(remote.read_exact_at(&mut [0; 4096], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    let log = mounted.log();
    let cause = "cannot write (no connection to the NBD server: cannot connect to the NBD server";
    assert!(log.contains(cause) && log.contains(server.uri().to_str().unwrap()), "{log}");
    server.restart();
    wait::until("the disk to answer again", || remote.read_exact_at(&mut [0; 4096], 0).is_ok());
    remote.write_all_at(&[3; 4096], 4096).unwrap();
    // It was away when ours died: the first flush says that something may be lost, the next one does not.
    assert_eq!(remote.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
    remote.sync_all().unwrap();
    // As the source of a mirror, too.
    let copy = place.at("c.img");
    mounted.verb_on(&mounted.disk("nbd.img"), "mirror", [copy.as_os_str()]).ok();
    mounted.wait_ready();
    mounted.cutover();
    drop((local, remote));
    mounted.note_processes();
    mounted.unmount();
    common::compare::assert_same_content(&image, &copy);
}
