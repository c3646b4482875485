//! Two disks of one mount, written in a fixed order: number n to disk 1, then, once that is acknowledged, number n to disk 2.
//! Whatever a pair of images holds must be a point in that order: disk 2 never knows a number that disk 1 does not.
//!
//! The pair that was left shows the very instant of the cutover, for nobody writes it any more. Had disk 1 been switched
//! before disk 2, some number would be on the old disk 2 and not on the old disk 1; the other way round, the new disk 2 would
//! miss what the old one got.

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use common::aligned::Aligned;
use common::command::long;
use common::mounted::Mount;
use common::place::Place;
use common::wait;

const SLOT: usize = 4096;
/// Numbers go round a ring of slots; each writer has one of its own on both disks.
const RING: u64 = 256;
const WRITERS: u64 = 6;
const SIZE: u64 = RING * WRITERS * SLOT as u64;

/// Threads that write their numbers to disk 1 and then to disk 2.
struct Ordered {
    stop: Arc<AtomicBool>,
    last: Arc<Vec<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Ordered {
    fn start(disks: [&Path; 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let last: Arc<Vec<AtomicU64>> = Arc::new((0..WRITERS).map(|_| AtomicU64::new(0)).collect());
        let threads = (0..WRITERS).map(|writer| {
            let options = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).clone();
            let files: Vec<File> = disks.iter().map(|disk| options.open(disk).expect("open")).collect();
            let (stop, last) = (Arc::clone(&stop), Arc::clone(&last));
            std::thread::spawn(move || {
                let mut bytes = Aligned::zeroed(SLOT);
                for number in 1.. {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    bytes[..8].copy_from_slice(&u64::to_le_bytes(number));
                    for file in &files {
                        let written = file.write_at(&bytes, slot(writer, number)).expect("write");
                        assert_eq!(written, SLOT);
                    }
                    last[writer as usize].store(number, Ordering::SeqCst);
                }
            })
        });
        Ordered { threads: threads.collect(), stop, last }
    }

    fn total(&self) -> u64 {
        self.last.iter().map(|number| number.load(Ordering::SeqCst)).sum()
    }

    fn wait_for_more(&self, count: u64) {
        let goal = self.total() + count;
        let failed = || self.threads.iter().any(JoinHandle::is_finished);
        wait::until("the writers to go on", || self.total() >= goal || failed());
        assert!(!failed(), "a write failed");
    }

    fn stop(mut self) -> Vec<u64> {
        assert!(self.join(), "a write failed");
        self.last.iter().map(|number| number.load(Ordering::SeqCst)).collect()
    }

    fn join(&mut self) -> bool {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.drain(..).map(JoinHandle::join).filter(Result::is_err).count() == 0
    }
}

impl Drop for Ordered {
    fn drop(&mut self) {
        self.join();
    }
}

fn slot(writer: u64, number: u64) -> u64 {
    (number % RING * WRITERS + writer) * SLOT as u64
}

/// The newest number of each writer on an image. Panics if an older one is missing: a point in the order has no gaps.
fn newest(image: &Path) -> Vec<u64> {
    let file = File::open(image).expect("open");
    let read = |writer, number| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, slot(writer, number)).expect("read");
        u64::from_le_bytes(bytes)
    };
    let of = |writer| {
        let newest = (0..RING).map(|place| read(writer, place)).max().unwrap_or(0);
        for number in (newest + 1).saturating_sub(RING).max(1)..=newest {
            let found = read(writer, number);
            assert_eq!(found, number, "writer {writer}, {}: {newest} is there, {number} is not", image.display());
        }
        newest
    };
    (0..WRITERS).map(of).collect()
}

/// Panics unless the pair is a point in the order: disk 2 has what disk 1 has, or all but the last number of it.
#[track_caller]
fn assert_one_instant(pair: &[PathBuf; 2]) {
    let differences = torn_apart(pair);
    assert!(differences.is_empty(), "not one instant: {}", differences.join("; "));
}

/// In which the pair is no point in the order.
fn torn_apart(pair: &[PathBuf; 2]) -> Vec<String> {
    let [first, second] = pair.each_ref().map(|image| newest(image));
    let both = first.into_iter().zip(second).enumerate();
    let wrong = both.filter(|(_, (one, two))| one != two && *one != two + 1);
    wrong.map(|(writer, (one, two))| format!("writer {writer}: disk 1 is at {one}, disk 2 at {two}")).collect()
}

fn pair(place: &Place, round: usize) -> [PathBuf; 2] {
    ["one", "two"].map(|name| place.at(&format!("{name}-{round}.img")))
}

fn cut_over_repeatedly(place: &Place, options: &[&str]) {
    let rounds = if long() { 30 } else { 4 };
    let sources = pair(place, 0);
    for source in &sources {
        File::create_new(source).and_then(|file| file.set_len(SIZE)).expect("an image");
    }
    let mounted = Mount::of(place, &sources).start();
    let disks = ["one-0.img", "two-0.img"].map(|name| mounted.disk(name));
    let writers = Ordered::start([&disks[0], &disks[1]]);
    for round in 1..=rounds {
        let targets = pair(place, round);
        for (disk, target) in disks.iter().zip(&targets) {
            mounted.verb_on(disk, "mirror", common::mounted::words(target, options)).ok();
        }
        writers.wait_for_more(500);
        mounted.wait_ready();
        mounted.cutover();
        let status = mounted.status();
        for (volume, target) in status["volumes"].as_array().expect("volumes").iter().zip(&targets) {
            assert_eq!(volume["active"], target.to_str().expect("UTF-8"));
        }
        writers.wait_for_more(500);
        assert_one_instant(&pair(place, round - 1));
    }
    let last = writers.stop();
    mounted.unmount();
    for image in pair(place, rounds) {
        assert_eq!(newest(&image), last, "{}", image.display());
    }
    for round in 0..rounds {
        assert_one_instant(&pair(place, round));
    }
}

#[test]
fn in_auto_mode() {
    cut_over_repeatedly(&Place::in_memory(), &[]);
}

#[test]
fn in_write_blocking_mode() {
    cut_over_repeatedly(&Place::in_memory(), &["--copy-mode", "write-blocking"]);
}

#[test]
fn in_background_mode_on_a_disk() {
    cut_over_repeatedly(&Place::on_disk(), &["--copy-mode", "background", "--granularity", "4K"]);
}

/// The check itself: two disks that are cut over one after the other leave a pair that is no instant, and it is noticed.
#[test]
fn one_after_the_other_would_be_noticed() {
    let place = Place::in_memory();
    let sources = pair(&place, 0);
    for source in &sources {
        File::create_new(source).and_then(|file| file.set_len(SIZE)).expect("an image");
    }
    let mounted = Mount::of(&place, &sources).start();
    let disks = ["one-0.img", "two-0.img"].map(|name| mounted.disk(name));
    let writers = Ordered::start([&disks[0], &disks[1]]);
    for (disk, target) in disks.iter().zip(&pair(&place, 1)) {
        mounted.verb_on(disk, "mirror", [target]).ok();
        mounted.verb_on(disk, "cutover", ["--max-pause", "10s", "--timeout", "120s"]).ok();
        writers.wait_for_more(100);
    }
    let last = writers.stop();
    assert!(!torn_apart(&sources).is_empty(), "nothing was noticed");
    mounted.unmount();
    for image in pair(&place, 1) {
        assert_eq!(newest(&image), last, "{}", image.display());
    }
}

#[test]
fn one_disk_may_move_alone() {
    let place = Place::in_memory();
    let sources = [place.sparse("one-0.img", SIZE), place.sparse("two-0.img", SIZE)];
    let mounted = Mount::of(&place, &sources).start();
    let disks = ["one-0.img", "two-0.img"].map(|name| mounted.disk(name));
    let writers = Ordered::start([&disks[0], &disks[1]]);
    let target = place.at("one-1.img");
    mounted.verb_on(&disks[0], "mirror", [&target]).ok();
    writers.wait_for_more(200);
    mounted.verb_on(&disks[0], "cutover", ["--max-pause", "10s", "--timeout", "120s"]).ok();
    writers.wait_for_more(200);
    let last = writers.stop();
    assert_eq!(mounted.status()["volumes"][1]["active"], sources[1].to_str().expect("UTF-8"));
    mounted.unmount();
    for image in [&target, &sources[1]] {
        assert_eq!(newest(image), last, "{}", image.display());
    }
}
