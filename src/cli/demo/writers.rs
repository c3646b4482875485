//! The guest of the demo: threads that write to the mounted disk without pause.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pattern::{self, BLOCK_BYTES, SLOTS, Table};
use crate::error::{Error, ErrorKind, Result};

/// Each writes to blocks of its own, so that the last acknowledged write of a block is known.
const THREADS: u64 = 2;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    writes: AtomicU64,
    longest_ns: AtomicU64,
    failed: AtomicBool,
}

/// Writers at work. Dropping them stops them.
pub struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Writers {
    /// Starts writing to the disk at `path`, noting in `table` what is acknowledged.
    ///
    /// # Errors
    /// The disk cannot be opened.
    pub fn start(path: &Path, table: &Arc<Table>) -> Result<Writers> {
        let mut writers = Writers { shared: Arc::default(), threads: Vec::new() };
        for number in 0..THREADS {
            let failed = |error| Error::io("cannot write to", &error).on(path.display().to_string());
            let file = File::options().write(true).open(path).map_err(failed)?;
            let (table, shared, shown) = (Arc::clone(table), Arc::clone(&writers.shared), path.display().to_string());
            let thread = std::thread::Builder::new().name("guest".to_owned()).spawn(move || {
                write(&file, number, &table, &shared).map_err(|error| {
                    shared.failed.store(true, Ordering::Relaxed);
                    Error::io("a write of the guest failed on", &error).on(shown)
                })
            });
            writers.threads.push(thread.map_err(failed)?);
        }
        Ok(writers)
    }

    /// Writes acknowledged so far.
    pub fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// The longest that a write took since the last call.
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.shared.longest_ns.swap(0, Ordering::Relaxed))
    }

    /// True once a write failed.
    pub fn have_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// Stops them and closes the disk.
    ///
    /// # Errors
    /// A write had failed.
    pub fn stop(mut self) -> Result<()> {
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let died = || Error::new(ErrorKind::Failed, "a thread of the guest died");
        let results: Vec<Result<()>> =
            self.threads.drain(..).map(|thread| thread.join().unwrap_or_else(|_| Err(died()))).collect();
        results.into_iter().collect()
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            log::debug!("{error}");
        }
    }
}

fn write(file: &File, number: u64, table: &Table, shared: &Shared) -> std::io::Result<()> {
    let mut random = number + 1;
    let mut sequence = 1;
    let mut block = [0; BLOCK_BYTES];
    while !shared.stop.load(Ordering::Relaxed) {
        // Any generator will do that does not stay in one place.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let slot = (random >> 33) % (SLOTS / THREADS) * THREADS + number;
        let at = pattern::block_of(slot);
        sequence += 1;
        pattern::fill(&mut block, at, sequence);
        let asked = Instant::now();
        file.write_all_at(&block, at * BLOCK_BYTES as u64)?;
        let took = u64::try_from(asked.elapsed().as_nanos()).unwrap_or(u64::MAX);
        table.acknowledge(slot, sequence);
        shared.longest_ns.fetch_max(took, Ordering::Relaxed);
        shared.writes.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
