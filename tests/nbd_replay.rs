//! What an NBD server has lost in its death is sent to it again: many changes at a time, older ones first where they overlap, by the means
//! that this server has.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::compare::assert_same_content;
use common::mounted::Mount;
use common::nbd::Server;
use common::place::Place;
use common::space;

const SIZE: u64 = 8 << 20;
const BLOCK: u64 = 4096;
/// More than are ever sent at once.
const WRITES: u64 = 48;
/// As many changes are (`src/image/nbd/replay.rs`).
const AT_ONCE: i32 = 16;

/// Takes from `image` what no flush has made durable: all of it.
fn forget(image: &Path, byte: u8) {
    fs::write(image, vec![byte; SIZE as usize]).unwrap();
}

/// How many were under way at most: `+` for each that began, `-` for each that ended.
fn most_at_once(log: &Path) -> i32 {
    let mut running = 0;
    let count = |line: &str| {
        running += if line == "+" { 1 } else { -1 };
        running
    };
    fs::read_to_string(log).unwrap().lines().map(count).max().unwrap_or(0)
}

#[test]
fn lost_writes_are_sent_again_many_at_a_time_and_in_order_where_they_overlap() {
    let place = Place::in_memory();
    let (image, log) = (place.sparse("a.img", SIZE), place.file("log", b""));
    let mut server = Server::script(&place, "a.sock", &image, &["can_flush=exit 0"]);
    let mounted = Mount::of(&place, [server.uri()]).start();
    let disk = File::options().read(true).write(true).open(mounted.first_disk()).unwrap();
    // A large one, and small ones over it.
    disk.write_all_at(&vec![0xFF; (WRITES * BLOCK) as usize], 0).unwrap();
    for number in 0..WRITES {
        disk.write_all_at(&[number as u8; BLOCK as usize], number * BLOCK).unwrap();
    }
    server.kill();
    forget(&image, 0xEE);
    // The large one takes longer: whoever did not wait for it is overwritten.
    let slow = format!(
        "pwrite=echo + >> {0}; if [ $3 -gt {BLOCK} ]; then sleep 1; else sleep 0.1; fi; \
         dd of={1} seek=$4 oflag=seek_bytes iflag=fullblock bs=1M conv=notrunc status=none; echo - >> {0}",
        log.display(),
        image.display()
    );
    let words = ["-t", "64", "can_flush=exit 0", "thread_model=echo parallel", &slow];
    let server = Server::script(&place, "a.sock", &image, &words);
    let mut seen = vec![0; BLOCK as usize];
    for number in 0..WRITES {
        disk.read_exact_at(&mut seen, number * BLOCK).unwrap();
        assert_eq!(seen, [number as u8; BLOCK as usize], "block {number}");
    }
    let most = most_at_once(&log);
    assert!((2..=AT_ONCE).contains(&most), "{most} changes were under way at once");
    disk.sync_all().unwrap();
    drop(disk);
    mounted.unmount();
    drop(server);
}

#[test]
fn freed_ranges_are_freed_again_by_the_means_that_the_server_has() {
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let whole = [["--filter=nozero"].as_slice(), &["--filter=nozero", "--filter=noextents"], &[]];
    for (filters, word) in whole.into_iter().zip(["Trim", "Write", "Zero"]) {
        forget(&image, 0xDD);
        let log = place.at("log");
        let (path, logfile) = (image.display().to_string(), format!("logfile={}", log.display()));
        let words = [filters, &["--filter=log", "file", &path, &logfile]].concat();
        let mut server = Server::nbdkit(&place, "a.sock", &words);
        let mounted = Mount::of(&place, [server.uri()]).start();
        let disk = File::options().read(true).write(true).open(mounted.first_disk()).unwrap();
        space::allocate(&disk, space::PUNCH, 1 << 20, 1 << 20).unwrap();
        space::allocate(&disk, space::ZERO, 3 << 20, 1 << 20).unwrap();
        disk.write_all_at(&[7; 100], (1 << 20) + 5000).unwrap();
        server.kill();
        let expected = fs::read(&image).unwrap();
        forget(&image, 0xDD);
        server.restart();
        let mut seen = vec![0; SIZE as usize];
        disk.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == expected, "with {filters:?}");
        assert_same_content(&mounted.first_disk(), &image);
        // The log begins anew with the server.
        let log = fs::read_to_string(log).unwrap();
        assert!(log.contains(&format!(" {word} ")), "{filters:?} got no {word}: {log}");
        drop(disk);
        mounted.unmount();
    }
}
