//! What the intent log costs: a guest's write in a marked region, which is nearly every one; its first write there; and the
//! retirer's look at a large disk. `cargo bench --bench intent_log`

use std::sync::Arc;
use std::time::Duration;

use divan::{Bencher, black_box};
use livemirror::dirty::DirtyMap;
use livemirror::dirty::intent::{Clearing, Forget, IntentLog, JobId, Settings};
use livemirror::error::{Error, Result};
use livemirror::range::{ByteRange, Granularity};

const SIZE_BYTES: u64 = 16 << 40;
const JOB: JobId = JobId([7; 16]);

fn main() {
    divan::main();
}

/// Forgets nothing, for there is nothing to forget.
struct Nothing;

impl Forget for Nothing {
    fn forget(&self, _: &Error) {}
}

/// Two images that never differ.
struct Quiet;

impl Clearing for Quiet {
    fn is_quiet(&self, _: ByteRange) -> bool {
        true
    }
    fn failed_flushes(&self) -> u64 {
        0
    }
    fn flush_both(&self) -> Result<()> {
        Ok(())
    }
}

/// A new log, all marked, and the directory that it is in.
fn marked() -> (IntentLog, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings::new(Duration::from_secs(60), Arc::new(Nothing));
    (IntentLog::create(&directory.path().join("intent"), JOB, SIZE_BYTES, settings).unwrap(), directory)
}

/// The same with nothing marked any more.
fn clear() -> (IntentLog, tempfile::TempDir) {
    let (log, directory) = marked();
    log.attach(Arc::new(Quiet));
    while log.marked_bytes() > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    log.detach();
    (log, directory)
}

/// A 4 KiB write in a region that is marked, begun and ended.
#[divan::bench(threads = [1, 2], sample_size = 10_000)]
fn enter_and_leave(bencher: Bencher) {
    let (log, _directory) = marked();
    bencher.bench(|| drop(black_box(log.enter(black_box(ByteRange::new(1 << 30, 4096))))));
}

/// The same once the log is broken.
#[divan::bench(sample_size = 10_000)]
fn enter_and_leave_broken(bencher: Bencher) {
    let (log, _directory) = clear();
    log.close();
    log.mark_durably(ByteRange::new(0, 1));
    assert!(log.is_broken());
    bencher.bench(|| drop(black_box(log.enter(black_box(ByteRange::new(1 << 30, 4096))))));
}

/// A first write in a clear region: one group commit, on the file system of the temporary directory.
#[divan::bench(sample_count = 50, sample_size = 1)]
fn first_write(bencher: Bencher) {
    let (log, _directory) = clear();
    let mut at = 0;
    bencher
        .with_inputs(|| {
            at += log.region_bytes();
            ByteRange::new(at, 4096)
        })
        .bench_local_values(|range| drop(log.enter(range)));
}

/// What the retirer asks of the dirty map in one pass while a copy of 16 TiB runs: of every region whether it is quiet.
#[divan::bench(sample_count = 10, sample_size = 1)]
fn ask_every_region(bencher: Bencher) {
    let map = DirtyMap::new(SIZE_BYTES, Granularity::DEFAULT);
    map.mark(ByteRange::new(0, SIZE_BYTES));
    let region = |at: u64| ByteRange::new(at * (SIZE_BYTES >> 19), SIZE_BYTES >> 19);
    bencher.bench(|| (0..1 << 19).filter(|at| map.is_quiet(black_box(region(*at)))).count());
}
