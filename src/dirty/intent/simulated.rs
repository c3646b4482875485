//! A log file, two images and a power switch, for tests: what a power cut could leave is known at every instant.
//!
//! The world is one plain lock, not a checked one, so that under the model checker too each look at it is one instant. After
//! each change it is checked: where a power cut could leave source and target different, the log that it could leave says so.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use super::format::SECTOR_BYTES;
use super::*;
use crate::error::ErrorKind;
use crate::image::faulty::Gate;

pub(super) const JOB: JobId = JobId(*b"a job of 16 byte");
pub(super) const REGION: u64 = 1 << 20;

pub(super) fn regions(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * REGION, count * REGION)
}

/// An image with one version number for each region.
#[derive(Clone, Default)]
struct Image {
    /// What a power cut may leave in each region: the durable version, and those written since. The last is what is read.
    versions: Vec<Vec<u64>>,
}

impl Image {
    fn latest(&self, region: usize) -> u64 {
        *self.versions[region].last().unwrap()
    }

    fn write(&mut self, region: usize, version: u64) {
        self.versions[region].push(version);
    }

    fn begin_flush(&self) -> Vec<usize> {
        self.versions.iter().map(|versions| versions.len() - 1).collect()
    }

    fn end_flush(&mut self, begun: &[usize]) {
        self.versions.iter_mut().zip(begun).for_each(|(versions, &old)| drop(versions.drain(..old)));
    }
}

#[derive(Default)]
struct Disks {
    /// Bytes of the log that are durable, and writes since, each of which a power cut may leave done, undone or torn.
    log: Vec<u8>,
    log_writes: Vec<(usize, Vec<u8>)>,
    source: Image,
    target: Image,
    dirty: Vec<bool>,
    claimed: Vec<bool>,
    version: u64,
}

/// See the module.
pub(super) struct World {
    pub(super) size_bytes: u64,
    disks: Mutex<Disks>,
    pub(super) faults: Mutex<Faults>,
    pub(super) flushes: AtomicU64,
    pub(super) failed_flushes: AtomicU64,
    /// Called in the middle of each flush of both images.
    pub(super) in_flush: Mutex<Option<Box<dyn FnMut() + Send>>>,
    pub(super) forgotten: Mutex<Vec<String>>,
    pub(super) in_forget: Mutex<Option<Box<dyn FnMut() + Send>>>,
    /// What the clock says. At 0, which means never, nothing is ever hot.
    pub(super) seconds: AtomicU32,
}

/// What fails, and what waits.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) write: Option<i32>,
    pub(super) sync: Option<i32>,
    pub(super) flush: Option<i32>,
    pub(super) before_write: Option<Arc<Gate>>,
    pub(super) before_sync: Option<Arc<Gate>>,
}

impl World {
    /// A disk of so many regions.
    pub(super) fn new(count: usize) -> Arc<World> {
        let image = Image { versions: vec![vec![0]; count] };
        let disks = Disks {
            source: image.clone(),
            target: image,
            dirty: vec![false; count],
            claimed: vec![false; count],
            ..Disks::default()
        };
        Arc::new(World {
            size_bytes: count as u64 * REGION,
            disks: Mutex::new(disks),
            faults: Mutex::default(),
            flushes: AtomicU64::new(0),
            failed_flushes: AtomicU64::new(0),
            in_flush: Mutex::default(),
            forgotten: Mutex::default(),
            in_forget: Mutex::default(),
            seconds: AtomicU32::new(1),
        })
    }

    pub(super) fn settings(self: &Arc<Self>, max_wait: Duration) -> Settings {
        Settings { max_wait, forget: Arc::clone(self) as Arc<dyn Forget>, clock: Arc::clone(self) as Arc<dyn Clock> }
    }

    /// A log that begins with nothing marked.
    pub(super) fn log(self: &Arc<Self>) -> IntentLog {
        self.log_with(Duration::from_secs(3600), &[])
    }

    /// A log that begins with the regions `marked`.
    pub(super) fn log_with(self: &Arc<Self>, max_wait: Duration, marked: &[u32]) -> IntentLog {
        let layout = Layout::new(self.size_bytes);
        let mut words = vec![0; layout.words()];
        marked.iter().for_each(|region| words[*region as usize / 64] |= 1 << (region % 64));
        let bytes = (0..layout.sectors())
            .flat_map(|sector| encode(layout, &JOB, sector, words[layout.words_of(sector)].iter().copied()));
        let bytes: Vec<u8> = bytes.collect();
        self.disks.lock().unwrap().log.clone_from(&bytes);
        self.reopen(&bytes, max_wait).0
    }

    pub(super) fn reopen(self: &Arc<Self>, bytes: &[u8], max_wait: Duration) -> (IntentLog, Recovery) {
        let file = Box::new(SimulatedLog(Arc::clone(self)));
        IntentLog::open_on(file, "job.intent", bytes, JOB, self.size_bytes, self.settings(max_wait)).unwrap()
    }

    /// What a dead server's successor reads, without a power cut.
    #[cfg_attr(shuttle, expect(dead_code, reason = "no test under the model checker restarts"))]
    pub(super) fn log_in_the_page_cache(&self) -> Vec<u8> {
        let disks = self.disks.lock().unwrap();
        let mut bytes = disks.log.clone();
        for (offset, written) in &disks.log_writes {
            bytes[*offset..*offset + written.len()].copy_from_slice(written);
        }
        bytes
    }

    /// True if the region is marked in every log that a power cut could leave now.
    pub(super) fn is_durable(&self, region: u32) -> bool {
        self.durable()[region as usize / 64] >> (region % 64) & 1 == 1
    }

    /// The same of all regions, as words of bits.
    pub(super) fn durable(&self) -> Vec<u64> {
        self.disks.lock().unwrap().durable(self.size_bytes)
    }

    /// A guest's background write to one region, all of it: as [`crate::volume::tracking`] does it.
    pub(super) fn guest_write(&self, log: &IntentLog, region: u32) {
        let passage = log.enter(regions(region.into(), 1));
        self.write_source(region);
        self.mark_dirty(region);
        drop(passage);
    }

    pub(super) fn write_source(&self, region: u32) {
        pause();
        self.change(|disks| {
            disks.version += 1;
            let version = disks.version;
            disks.source.write(region as usize, version);
        });
        pause();
    }

    pub(super) fn mark_dirty(&self, region: u32) {
        pause();
        self.change(|disks| disks.dirty[region as usize] = true);
    }

    /// The copier: takes one dirty region and brings it to the target. False: there was none.
    pub(super) fn copy_one(&self) -> bool {
        pause();
        let claim = self.change(|disks| {
            let found = (0..disks.dirty.len()).find(|&at| disks.dirty[at] && !disks.claimed[at])?;
            disks.dirty[found] = false;
            disks.claimed[found] = true;
            Some(found)
        });
        let Some(region) = claim else { return false };
        pause();
        let version = self.change(|disks| disks.source.latest(region));
        pause();
        self.change(|disks| disks.target.write(region, version));
        pause();
        self.change(|disks| disks.claimed[region] = false);
        true
    }

    fn change<T>(&self, change: impl FnOnce(&mut Disks) -> T) -> T {
        let mut disks = self.disks.lock().unwrap();
        let result = change(&mut disks);
        disks.check(self.size_bytes);
        result
    }
}

impl Disks {
    /// The bits that are set in every log that a power cut could leave. A sector is then old, or as one of the writes left it, or
    /// torn, and then it counts as marked.
    fn durable(&self, size_bytes: u64) -> Vec<u64> {
        let mut durable = recover(&self.log, &JOB, size_bytes).0;
        for (offset, written) in &self.log_writes {
            let mut log = self.log.clone();
            log[*offset..offset + written.len()].copy_from_slice(written);
            let bits = recover(&log, &JOB, size_bytes).0;
            durable.iter_mut().zip(bits).for_each(|(durable, bits)| *durable &= bits);
        }
        durable
    }

    fn check(&self, size_bytes: u64) {
        let pairs = self.source.versions.iter().zip(&self.target.versions).enumerate();
        let differing = pairs.filter(|(_, (source, target))| source.iter().chain(*target).any(|it| *it != source[0]));
        let mut durable = None;
        for (region, (source, target)) in differing {
            let durable = durable.get_or_insert_with(|| self.durable(size_bytes));
            let is_marked = durable[region / 64] >> (region % 64) & 1 == 1;
            assert!(is_marked, "region {region}: {source:?} and {target:?}, and not marked after a power cut");
        }
    }
}

/// A place where another thread may go on.
fn pause() {
    #[cfg(shuttle)]
    thread::yield_now();
}

struct SimulatedLog(Arc<World>);

impl LogFile for SimulatedLog {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (errno, gate) = {
            let faults = self.0.faults.lock().unwrap();
            (faults.write, faults.before_write.clone())
        };
        gate.inspect(|gate| gate.pass());
        pause();
        let offset = usize::try_from(offset).unwrap();
        assert!(offset % SECTOR_BYTES == 0 && bytes.len() % SECTOR_BYTES == 0);
        self.0.change(|disks| disks.log_writes.push((offset, bytes.to_vec())));
        errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    fn sync(&self) -> io::Result<()> {
        let begun = self.0.disks.lock().unwrap().log_writes.len();
        let (errno, gate) = {
            let faults = self.0.faults.lock().unwrap();
            (faults.sync, faults.before_sync.clone())
        };
        gate.inspect(|gate| gate.pass());
        pause();
        if let Some(errno) = errno {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.0.change(|disks| {
            // Another process may have been here.
            let begun = begun.min(disks.log_writes.len());
            let done: Vec<_> = disks.log_writes.drain(..begun).collect();
            for (offset, bytes) in done {
                let end = offset + bytes.len();
                if disks.log.len() < end {
                    disks.log.resize(end, 0);
                }
                disks.log[offset..end].copy_from_slice(&bytes);
            }
        });
        Ok(())
    }
}

impl Clearing for World {
    fn is_quiet(&self, range: ByteRange) -> bool {
        pause();
        let mut touched = Layout::new(self.size_bytes).touched(range);
        let disks = self.disks.lock().unwrap();
        touched.all(|at| !disks.dirty[at as usize] && !disks.claimed[at as usize])
    }

    fn failed_flushes(&self) -> u64 {
        self.failed_flushes.load(SeqCst)
    }

    fn flush_both(&self) -> Result<()> {
        self.flushes.fetch_add(1, SeqCst);
        let begun = self.change(|disks| (disks.source.begin_flush(), disks.target.begin_flush()));
        pause();
        if let Some(in_flush) = &mut *self.in_flush.lock().unwrap() {
            in_flush();
        }
        if let Some(errno) = self.faults.lock().unwrap().flush {
            return Err(Error::io("flush", &io::Error::from_raw_os_error(errno)));
        }
        self.change(|disks| disks.source.end_flush(&begun.0));
        pause();
        self.change(|disks| disks.target.end_flush(&begun.1));
        Ok(())
    }
}

impl Forget for World {
    fn forget(&self, reason: &Error) {
        assert_ne!(reason.kind(), ErrorKind::Corrupt);
        if let Some(in_forget) = &mut *self.in_forget.lock().unwrap() {
            in_forget();
        }
        self.forgotten.lock().unwrap().push(reason.to_string());
    }
}

impl Clock for World {
    fn seconds(&self) -> u32 {
        self.seconds.load(SeqCst)
    }
}
