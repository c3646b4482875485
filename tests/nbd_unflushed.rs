//! A disk on an NBD export whose server has a cache that its death takes along, and our own server dies as well: what a flush has
//! called durable is there, and what is lost the guest is told.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::mortal;
use common::mounted::{Mount, Mounted};
use common::nbd::Server;
use common::place::Place;
use common::wait;
use nix::sys::signal::Signal;

const SIZE: u64 = 8 << 20;

/// Keeps in memory what no flush has asked for.
fn forgetful(place: &Place, image: &Path) -> Server {
    Server::nbdkit(place, "a.sock", &["--filter=cache", "file", image.to_str().unwrap()])
}

fn begins_with(image: &Path, byte: u8) -> bool {
    fs::read(image).unwrap()[..4096] == [byte; 4096]
}

fn open(mounted: &Mounted) -> File {
    File::options().read(true).write(true).open(mounted.first_disk()).unwrap()
}

#[test]
fn what_a_killed_server_of_ours_had_written_is_flushed_by_the_next_one() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let server = forgetful(&place, &image);
    let mut mounted = Mount::of(&place, [server.uri()]).start();
    let disk = open(&mounted);
    disk.write_all_at(&[1; 4096], 0).unwrap();
    assert!(begins_with(&image, 0), "the NBD server has it in its cache only");
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    wait::until("the next server's flush", || begins_with(&image, 1));
    // Nothing was lost: nobody is told so.
    disk.sync_all().unwrap();
    drop(disk);
    mounted.note_processes();
    mounted.unmount();
}

#[test]
fn what_both_have_lost_the_guests_next_flush_tells() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let mut server = forgetful(&place, &image);
    let mut mounted = Mount::of(&place, [server.uri()]).start();
    let disk = open(&mounted);
    disk.write_all_at(&[1; 4096], 0).unwrap();
    server.kill();
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    // One that dies too before any guest was told leaves it to the next.
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    server.restart();
    assert_eq!(disk.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
    let log = mounted.log();
    assert!(log.contains("may be lost") && log.contains(server.uri().to_str().unwrap()), "{log}");
    disk.write_all_at(&[2; 4096], 0).unwrap();
    disk.sync_all().unwrap();
    assert!(begins_with(&image, 2));
    drop(disk);
    mounted.note_processes();
    mounted.unmount();
}
