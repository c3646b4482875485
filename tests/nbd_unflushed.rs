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

/// A mount whose guest has written 4096 ones that both servers have lost; the NBD server is there again.
fn after_a_loss(place: &Place, image: &Path) -> (Server, Mounted, File) {
    let mut server = forgetful(place, image);
    let mounted = Mount::of(place, [server.uri()]).start();
    let disk = open(&mounted);
    disk.write_all_at(&[1; 4096], 0).unwrap();
    server.kill();
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    server.restart();
    (server, mounted, disk)
}

#[track_caller]
fn assert_told_once(disk: &File) {
    assert_eq!(disk.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
    disk.sync_all().unwrap();
}

/// The guest is told, and all ends as it should.
#[track_caller]
fn ends_once_told(mut mounted: Mounted, disk: File) {
    assert_told_once(&disk);
    drop(disk);
    mounted.note_processes();
    mounted.unmount();
}

#[test]
fn a_flush_of_nobodys_does_not_take_what_the_guest_is_to_be_told() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let (_server, mounted, disk) = after_a_loss(&place, &image);
    // The server flushes, says who uses the disk, and goes on; one that is still coming up would just end.
    disk.read_exact_at(&mut [0; 4096], 4096).unwrap();
    mortal::strike(mounted.keeper_pid, Signal::SIGTERM);
    wait::until("it to have flushed", || mounted.log().contains("the disks stay usable"));
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    ends_once_told(mounted, disk);
}

#[test]
fn a_cutover_in_between_does_not_keep_it_from_the_guest() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let (_server, mounted, disk) = after_a_loss(&place, &image);
    let copy = place.at("b.img");
    mounted.mirror(&copy, &[]);
    mounted.wait_ready();
    mounted.cutover();
    ends_once_told(mounted, disk);
}

#[test]
fn a_flush_that_was_refused_the_next_server_tells_of_too() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let refuses = place.at("refuses");
    let flush = format!("flush=test ! -e {} || {{ echo EIO gone >&2; exit 1; }}", refuses.display());
    let server = Server::script(&place, "a.sock", &image, &["can_flush=exit 0", &flush]);
    let mounted = Mount::of(&place, [server.uri()]).start();
    let disk = open(&mounted);
    disk.write_all_at(&[1; 4096], 0).unwrap();
    fs::write(&refuses, "").unwrap();
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    wait::until("the next server's flush", || mounted.log().contains("cannot be flushed"));
    fs::remove_file(&refuses).unwrap();
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    ends_once_told(mounted, disk);
}

fn forgetful_tcp(image: &Path) -> Server {
    Server::nbdkit_tcp(&["--filter=cache", "file", image.to_str().unwrap()])
}

/// Has a server of ours inherit the connections of an NBD server that stands still.
fn inherit_frozen(mounted: &Mounted, server: &Server) {
    server.freeze();
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    wait::until("the next server to wait for it", || mounted.log().contains("its server does not answer"));
}

#[test]
fn what_a_server_lost_that_was_restarted_while_ours_stood_still() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let mut server = forgetful_tcp(&image);
    let mounted = Mount::of(&place, [server.uri()]).start();
    let disk = open(&mounted);
    disk.write_all_at(&[1; 4096], 0).unwrap();
    mortal::strike(mounted.keeper_pid, Signal::SIGSTOP);
    server.kill();
    server.restart();
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    ends_once_told(mounted, disk);
}

#[test]
fn what_a_server_lost_that_died_while_ours_waited_for_it() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let mut server = forgetful_tcp(&image);
    let mounted = Mount::of(&place, [server.uri()]).start();
    let disk = open(&mounted);
    disk.write_all_at(&[1; 4096], 0).unwrap();
    inherit_frozen(&mounted, &server);
    server.kill();
    wait::until("it to be missed", || mounted.log().contains("cannot connect to the NBD server"));
    // That it was missed the next one knows too.
    mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    server.restart();
    ends_once_told(mounted, disk);
}

#[test]
fn what_a_server_lost_that_was_replaced_while_ours_waited_for_it() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let cached = |name: &str| Server::nbdkit(&place, name, &["--filter=cache", "file", image.to_str().unwrap()]);
    let (socket, next) = (place.at("a.sock"), place.at("next.sock"));
    let mut first = cached("1.sock");
    std::os::unix::fs::symlink(place.at("1.sock"), &socket).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let mounted = Mount::of(&place, [&uri]).start();
    let disk = open(&mounted);
    disk.write_all_at(&[1; 4096], 0).unwrap();
    inherit_frozen(&mounted, &first);
    // There is always one to connect to.
    let _second = cached("2.sock");
    std::os::unix::fs::symlink(place.at("2.sock"), &next).unwrap();
    fs::rename(&next, &socket).unwrap();
    first.kill();
    ends_once_told(mounted, disk);
}
