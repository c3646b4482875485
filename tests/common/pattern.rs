//! Self-describing blocks: a load that writes them, and a verifier that notices every write that was lost.
//!
//! ```text
//! writer:    issued[n] += 1  ->  write block n, saying (n, issued[n])  ->  acknowledged[n] = issued[n]
//! verifier:  acknowledged[n] <= what block n says <= issued[n], and the whole block was made by one write
//! ```
//!
//! Each 512-byte sector of a block carries the block's number, the sequence of its write and the number of the sector, and
//! the block ends with a checksum over all of it. A block that says less than what was acknowledged is a *lost* write: the
//! disk is old there, though every byte of it was once right. fio's verification does not see that.
//!
//! A block is written by one thread only, and never twice at once, so that "the last acknowledged write" is a fact. Threads
//! own stripes of 8 blocks (half a granule) unless told otherwise: neighbours of a block are written by others.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::aligned::Aligned;
use super::random::{Random, mix};
use super::wait;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const MAGIC: u64 = 0x6c6d_7061_7474_6572;

/// What was written to a disk and what was acknowledged, block by block.
pub struct Table {
    /// Tells this disk's blocks from those of other disks and of earlier runs.
    tag: u64,
    issued: Vec<AtomicU64>,
    acknowledged: Vec<AtomicU64>,
}

/// What each block may say: from the first to the second, both included. 0 is "never written", all zero bytes.
pub type Bounds = Vec<(u64, u64)>;

impl Table {
    /// For a new disk of `size_bytes`, all zeroes.
    pub fn new(tag: u64, size_bytes: u64) -> Arc<Self> {
        let blocks = size_bytes / BLOCK as u64;
        let zeroes = || (0..blocks).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Table { tag, issued: zeroes(), acknowledged: zeroes() })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.issued.len() as u64
    }

    /// The last acknowledged sequence of each block, at this moment.
    pub fn acknowledged(&self) -> Vec<u64> {
        self.acknowledged.iter().map(|seq| seq.load(Ordering::SeqCst)).collect()
    }

    /// The last sequence that any writer may have written to each block, at this moment.
    pub fn issued(&self) -> Vec<u64> {
        self.issued.iter().map(|seq| seq.load(Ordering::SeqCst)).collect()
    }

    /// What a disk may hold now that no write is under way: exactly what was acknowledged, unless a write failed.
    pub fn bounds(&self) -> Bounds {
        self.acknowledged().into_iter().zip(self.issued()).collect()
    }

    /// Says that the next write of blocks `first..first + count` is about to start; its sequences.
    fn issue(&self, first: u64, count: u64) -> Vec<u64> {
        (first..first + count).map(|block| self.issued[block as usize].fetch_add(1, Ordering::SeqCst) + 1).collect()
    }

    fn acknowledge(&self, first: u64, sequences: &[u64]) {
        for (block, &seq) in (first..).zip(sequences) {
            self.acknowledged[block as usize].store(seq, Ordering::SeqCst);
        }
    }

    /// The bytes of write number `seq` to `block`.
    pub fn render(&self, block: u64, seq: u64, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), BLOCK);
        if seq == 0 {
            bytes.fill(0);
            return;
        }
        for (number, sector) in bytes.chunks_mut(SECTOR).enumerate() {
            let header = [MAGIC ^ self.tag, block, seq, number as u64];
            for (place, word) in sector.chunks_mut(8).zip(header) {
                place.copy_from_slice(&word.to_le_bytes());
            }
            let filler = mix(self.tag ^ mix(block ^ mix(seq)) ^ number as u64).to_le_bytes();
            for place in sector[32..].chunks_mut(8) {
                place.copy_from_slice(&filler);
            }
        }
        let sum = crc32c::crc32c(&bytes[..BLOCK - 4]);
        bytes[BLOCK - 4..].copy_from_slice(&sum.to_le_bytes());
    }

    /// What is wrong with `bytes`, read from `block`, if it may say `bounds`. Never panics on any content.
    pub fn inspect(&self, block: u64, bytes: &[u8], bounds: (u64, u64)) -> Result<(), Fault> {
        let (acknowledged, issued) = bounds;
        let zero = bytes.iter().all(|&byte| byte == 0);
        if zero {
            let lost = acknowledged > 0;
            return if lost { Err(Fault::Lost { block, says: 0, acknowledged }) } else { Ok(()) };
        }
        let sectors: Vec<[u64; 4]> = bytes.chunks(SECTOR).map(header).collect();
        let first = sectors[0];
        let mut whole = vec![0; BLOCK];
        if first[0] == MAGIC ^ self.tag && first[1] == block {
            self.render(block, first[2], &mut whole);
        }
        if whole != bytes {
            let ours = sectors.iter().any(|sector| sector[0] == MAGIC ^ self.tag && sector[1] == block);
            let says = sectors.iter().map(|sector| sector[2]).collect();
            let (tag, of) = (first[0] ^ MAGIC, first[1]);
            return Err(if ours { Fault::Torn { block, says } } else { Fault::Foreign { block, tag, of } });
        }
        match first[2] {
            says if says < acknowledged => Err(Fault::Lost { block, says, acknowledged }),
            says if says > issued => Err(Fault::NeverIssued { block, says, issued }),
            _ => Ok(()),
        }
    }

    /// Checks a whole disk or image. Its size must be that of the table.
    pub fn verify(&self, image: &Path, bounds: &Bounds) -> Result<(), Faults> {
        let file = File::open(image).unwrap_or_else(|error| panic!("{}: {error}", image.display()));
        let mut faults = Vec::new();
        let mut buffer = vec![0; BLOCK * 256];
        for first in (0..self.blocks()).step_by(256) {
            let count = (self.blocks() - first).min(256) as usize;
            let bytes = &mut buffer[..count * BLOCK];
            let read = file.read_exact_at(bytes, first * BLOCK as u64);
            read.unwrap_or_else(|error| panic!("{} at block {first}: {error}", image.display()));
            for (block, bytes) in (first..).zip(bytes.chunks(BLOCK)) {
                faults.extend(self.inspect(block, bytes, bounds[block as usize]).err());
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(Faults { image: image.to_owned(), faults }) }
    }

    /// After writes that failed with their mount: what `image` holds, which each block may say, is what was written. Panics
    /// unless every acknowledged write is there.
    #[track_caller]
    pub fn settle_on(&self, image: &Path) {
        self.assert_on(image);
        let file = File::open(image).expect("open");
        for block in 0..self.blocks() {
            let (acknowledged, issued) = (&self.acknowledged[block as usize], &self.issued[block as usize]);
            if acknowledged.load(Ordering::SeqCst) != issued.load(Ordering::SeqCst) {
                let mut bytes = [0; SECTOR];
                file.read_exact_at(&mut bytes, block * BLOCK as u64).expect("read");
                let says = header(&bytes)[2];
                acknowledged.store(says, Ordering::SeqCst);
                issued.store(says, Ordering::SeqCst);
            }
        }
    }

    /// Panics unless `image` holds every acknowledged write, and nothing else. For when all writers have stopped.
    #[track_caller]
    pub fn assert_on(&self, image: &Path) {
        self.verify(image, &self.bounds()).unwrap_or_else(|faults| panic!("{faults}"));
    }
}

fn header(sector: &[u8]) -> [u64; 4] {
    let word = |at: usize| u64::from_le_bytes(sector[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
    [word(0), word(1), word(2), word(3)]
}

/// What can be wrong with a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is older than a write that was acknowledged.
    Lost { block: u64, says: u64, acknowledged: u64 },
    /// It was not made by one write: the sequences that its sectors say.
    Torn { block: u64, says: Vec<u64> },
    /// It belongs elsewhere, or is no block of ours at all.
    Foreign { block: u64, tag: u64, of: u64 },
    /// It is whole, but nobody has written it yet.
    NeverIssued { block: u64, says: u64, issued: u64 },
}

/// All that is wrong with an image.
#[derive(Debug)]
pub struct Faults {
    image: PathBuf,
    /// One for each bad block, in order.
    pub faults: Vec<Fault>,
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Faults { image, faults } = self;
        writeln!(f, "{} of {}'s blocks are wrong:", faults.len(), image.display())?;
        faults.iter().take(12).try_for_each(|fault| writeln!(f, "  {fault:?}"))
    }
}

/// How a [`Load`] writes.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Threads, each with one request under way.
    pub depth: usize,
    /// Direct I/O.
    pub direct: bool,
    /// Only this many blocks from the start of the disk are written; 0 = all.
    pub hot_blocks: u64,
    /// Each thread rests this long after a write: for a load that a test's machine can copy beside.
    pub rest: Duration,
    /// Blocks in a row that one thread owns; a request has at most so many.
    pub stripe: u64,
    /// Each request has that many, not any number of them.
    pub whole: bool,
}

impl Habits {
    /// Requests of one block.
    pub fn small() -> Self {
        Habits { stripe: 1, ..Habits::default() }
    }

    /// Requests of 1 MiB.
    pub fn large() -> Self {
        Habits { stripe: (1 << 20) / BLOCK as u64, whole: true, ..Habits::default() }
    }
}

impl Default for Habits {
    fn default() -> Self {
        Habits { depth: 32, direct: true, hot_blocks: 0, rest: Duration::ZERO, stripe: 8, whole: false }
    }
}

/// Threads that write blocks to a disk until told to stop. An I/O error stops a thread and is reported by [`Load::stop`].
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<(), String>>>,
}

struct Shared {
    table: Arc<Table>,
    stop: AtomicBool,
    writes: AtomicU64,
    longest_us: AtomicU64,
    since_us: AtomicU64,
}

impl Load {
    /// Starts it. The disk is opened once by each thread.
    pub fn start(disk: &Path, table: &Arc<Table>, habits: Habits, seed: u64) -> Self {
        assert!(table.blocks() >= habits.depth as u64 * habits.stripe, "a stripe for each thread");
        let shared = Arc::new(Shared {
            table: Arc::clone(table),
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
            since_us: AtomicU64::new(0),
        });
        let threads = (0..habits.depth).map(|number| {
            let flags = if habits.direct { libc::O_DIRECT } else { 0 };
            let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(disk);
            let file = file.unwrap_or_else(|error| panic!("{}: {error}", disk.display()));
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                let mut random = Random::new(seed, number as u64);
                let walked = random.below(1 << 20);
                Writer { shared: &shared, file, number: number as u64, habits, random, walked }.run()
            })
        });
        Load { threads: threads.collect(), shared: Arc::clone(&shared) }
    }

    /// Acknowledged writes so far.
    pub fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::SeqCst)
    }

    /// The longest time that a request took since this was asked last.
    pub fn longest_since(&self) -> Duration {
        Duration::from_micros(self.shared.since_us.swap(0, Ordering::SeqCst))
    }

    /// Waits until `count` more writes were acknowledged: the load is really going on at this point of the test.
    #[track_caller]
    pub fn wait_for_more(&self, count: u64) {
        let goal = self.writes() + count;
        wait::until("the writers to go on", || {
            self.writes() >= goal || self.threads.iter().any(JoinHandle::is_finished)
        });
        assert!(self.writes() >= goal, "a writer gave up; Load::stop says why");
    }

    /// Stops it; panics if a write or a read failed, or a read returned something else than the last acknowledged write.
    /// The longest time that a request took.
    #[track_caller]
    pub fn stop(mut self) -> Duration {
        let failures: Vec<String> = self.join().into_iter().filter_map(Result::err).collect();
        assert!(failures.is_empty(), "the load failed: {}", failures.join("; "));
        Duration::from_micros(self.shared.longest_us.load(Ordering::SeqCst))
    }

    /// Stops it after its mount has died: its requests then fail. What was acknowledged stays so.
    pub fn end(mut self) {
        self.join();
    }

    fn join(&mut self) -> Vec<Result<(), String>> {
        self.shared.stop.store(true, Ordering::SeqCst);
        let threads = std::mem::take(&mut self.threads).into_iter();
        threads.map(|thread| thread.join().unwrap_or_else(|_| Err("a writer panicked".to_owned()))).collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.join();
    }
}

struct Writer<'a> {
    shared: &'a Shared,
    file: File,
    number: u64,
    habits: Habits,
    random: Random,
    walked: u64,
}

impl Writer<'_> {
    fn run(mut self) -> Result<(), String> {
        while !self.shared.stop.load(Ordering::SeqCst) {
            let start = Instant::now();
            let first = self.pick();
            let rest = self.habits.stripe - first % self.habits.stripe;
            let count = if self.habits.whole { rest } else { self.random.between(1, rest) };
            let count = count.min(self.shared.table.blocks() - first);
            if self.random.one_in(8) {
                self.read(first, count)?;
            } else {
                self.write(first, count)?;
                self.shared.writes.fetch_add(1, Ordering::SeqCst);
            }
            let took = start.elapsed().as_micros() as u64;
            self.shared.longest_us.fetch_max(took, Ordering::SeqCst);
            self.shared.since_us.fetch_max(took, Ordering::SeqCst);
            if !self.habits.rest.is_zero() {
                std::thread::sleep(self.habits.rest);
            }
        }
        Ok(())
    }

    /// A block of one of this thread's stripes: mostly the next one on a walk over the disk, so that what is lost stays lost
    /// for a while, and now and then one of the first few, so that some granules are hot.
    fn pick(&mut self) -> u64 {
        let table = &self.shared.table;
        let blocks =
            if self.habits.hot_blocks == 0 { table.blocks() } else { self.habits.hot_blocks.min(table.blocks()) };
        let (depth, length) = (self.habits.depth as u64, self.habits.stripe);
        let own = (blocks.div_ceil(length).saturating_sub(self.number)).div_ceil(depth).max(1);
        let turn = if self.random.one_in(4) {
            self.random.below(own.min(4))
        } else {
            self.walked += 1;
            self.walked % own
        };
        let stripe = turn * depth + self.number;
        let within = if self.habits.whole { 0 } else { self.random.below(length) };
        (stripe * length + within).min(table.blocks() - 1)
    }

    fn write(&mut self, first: u64, count: u64) -> Result<(), String> {
        let table = &self.shared.table;
        let mut bytes = Aligned::zeroed(count as usize * BLOCK);
        let sequences = table.issue(first, count);
        for ((block, &seq), bytes) in (first..).zip(&sequences).zip(bytes.chunks_mut(BLOCK)) {
            table.render(block, seq, bytes);
        }
        match self.file.write_at(&bytes, first * BLOCK as u64) {
            Ok(written) if written == bytes.len() => table.acknowledge(first, &sequences),
            Ok(written) => return Err(format!("write of {} bytes at block {first} wrote {written}", bytes.len())),
            Err(error) => return Err(format!("write at block {first}: {error}")),
        }
        Ok(())
    }

    fn read(&mut self, first: u64, count: u64) -> Result<(), String> {
        let table = &self.shared.table;
        let mut bytes = Aligned::zeroed(count as usize * BLOCK);
        read_exact(&self.file, &mut bytes, first * BLOCK as u64)
            .map_err(|error| format!("read at block {first}: {error}"))?;
        for (block, bytes) in (first..).zip(bytes.chunks(BLOCK)) {
            let seq = table.acknowledged[block as usize].load(Ordering::SeqCst);
            table.inspect(block, bytes, (seq, seq)).map_err(|fault| format!("read back: {fault:?}"))?;
        }
        Ok(())
    }
}

fn read_exact(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    match file.read_at(bytes, offset)? {
        len if len == bytes.len() => Ok(()),
        len => Err(io::Error::other(format!("{len} of {} bytes", bytes.len()))),
    }
}

/// Writes every block of a disk once, in order, in large requests: so that there is data to copy.
pub fn fill(disk: &Path, table: &Table) {
    let file = OpenOptions::new().write(true).open(disk).unwrap_or_else(|error| panic!("{}: {error}", disk.display()));
    let mut buffer = vec![0; BLOCK * 256];
    for first in (0..table.blocks()).step_by(256) {
        let count = (table.blocks() - first).min(256);
        let sequences = table.issue(first, count);
        let bytes = &mut buffer[..count as usize * BLOCK];
        for ((block, &seq), bytes) in (first..).zip(&sequences).zip(bytes.chunks_mut(BLOCK)) {
            table.render(block, seq, bytes);
        }
        file.write_all_at(bytes, first * BLOCK as u64).unwrap_or_else(|error| panic!("fill at block {first}: {error}"));
        table.acknowledge(first, &sequences);
    }
    file.sync_all().expect("fsync");
}
