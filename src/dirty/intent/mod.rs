//! The intent log: one durable bit for each *region* of the disk, set before anything in the region may change the active image
//! (rule 2). After a power cut, the regions that are marked are those in which the images may differ.
//!
//! ```text
//! guest write:  enter ──> count in, look at the state ── set: go on
//!                                                     └─ not: ask ──> log thread: pwrite, fdatasync ──> go on
//!               ... change the image, mark the dirty map ...
//!               drop the passage ──> note the time, count out
//! end of a bit: retirer: nothing in flight, dirty or hot ──> flush both images ──> log thread: pwrite, fdatasync
//! ```
//!
//! - `format`: the file, byte by byte; `recovery`: what a file that was found says; `file`: where it is;
//! - `region`: the states of a region, in memory;
//! - `writer`: the one thread that writes the log; `retire`: the thread that looks for bits to clear.
//!
//! Invariants:
//! - **The log is never less than the truth.** A bit counts as set once an fdatasync that began after its pwrite succeeded, and as clear
//!   from before the pwrite that clears it. A log that is opened is written anew, and made durable, before it is believed: what a
//!   dead process wrote may be in the page cache only.
//! - **No guest waits for an image here**, only for the log, and no longer than [`Settings::max_wait`].
//! - **No guest fails because of the log** (rule 6). When it cannot be written, or not in time, the pairing of source and target is
//!   first forgotten durably ([`Forget`]); then the log is *broken*: everybody goes on, and nothing is marked any more.
//! - Whoever makes anything dirty does so inside a [`Passage`], the mirror included: dirty is marked.
//!
//! Lock order: the log's lock is a leaf, but for the retirer's handle, which is taken before it. Nothing is called under it. A guest
//! waits inside [`IntentLog::enter`] for the log's thread, which waits for nobody but its disk.

mod clock;
#[cfg(not(all(test, shuttle)))]
mod file;
mod format;
mod recovery;
mod region;
mod retire;
mod writer;

#[cfg(all(test, shuttle))]
#[path = "simulated_file.rs"]
mod file;
#[cfg(all(test, shuttle))]
mod shuttle_tests;
#[cfg(test)]
mod simulated;
#[cfg(all(test, not(shuttle)))]
mod tests;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

pub use self::clock::{Clock, CoarseClock};
pub use self::file::LogFile;
pub use self::format::JobId;
pub use self::recovery::{Recovery, marked_bytes, recover};
pub use self::retire::{Clearing, HOT_SECONDS};

use self::format::{Layout, SECTOR_BYTES, encode};
use self::region::Regions;
use self::writer::Queue;
use crate::error::{Error, Result};
use crate::range::ByteRange;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use crate::sync::{Arc, Condvar, Instant, Mutex, thread, wait_until};

/// Destroys the pairing of source and target, so that no restart resumes the mirror (rule 11).
pub trait Forget: Send + Sync {
    /// Called once at most, when the log cannot be trusted any more, by the log's thread or by a guest that has waited too long,
    /// without locks held; guests wait until it returns. It returns when the pairing is destroyed durably, by
    /// whatever means works: the log's own disk may be what hangs. It must not wait for a guest, nor call
    /// [`IntentLog::detach`] or [`IntentLog::close`].
    fn forget(&self, reason: &Error);
}

/// How a log behaves.
#[derive(Clone)]
pub struct Settings {
    /// How long a guest waits for the log at most, before it gives the log up.
    pub max_wait: Duration,
    /// What is done then.
    pub forget: Arc<dyn Forget>,
    /// Tells when a region was last written.
    pub clock: Arc<dyn Clock>,
}

impl Settings {
    /// With the system's clock.
    pub fn new(max_wait: Duration, forget: Arc<dyn Forget>) -> Self {
        Settings { max_wait, forget, clock: Arc::new(CoarseClock::new()) }
    }
}

/// The intent log of one mirror job. See the module. Dropping it is [`IntentLog::close`].
pub struct IntentLog {
    inner: Arc<Inner>,
    writer: Mutex<Option<thread::JoinHandle<()>>>,
    retirer: Mutex<Option<thread::JoinHandle<()>>>,
}

struct Inner {
    layout: Layout,
    job: JobId,
    /// For messages.
    name: String,
    file: Box<dyn LogFile>,
    settings: Settings,
    regions: Regions,
    broken: AtomicBool,
    /// Group commits that were begun.
    syncs: AtomicU64,
    /// Passes of the retirer.
    passes: AtomicU64,
    queue: Mutex<Queue>,
    /// There is something to write.
    work: Condvar,
    /// Something was written, or nothing will be.
    done: Condvar,
    /// The retirer may look again.
    retire: Condvar,
}

/// A change of the image that is under way: its regions are durably marked, and stay so until this is dropped.
#[must_use = "the regions may be cleared once it is dropped"]
pub struct Passage<'a> {
    inner: &'a Inner,
    touched: Range<u32>,
}

impl IntentLog {
    /// A new log for the job `job` of a disk of `size_bytes`, in place of a file that may be there. Every region is marked, durably,
    /// before this returns: then the state may name the job.
    ///
    /// # Errors
    /// The file cannot be written, or there can be no thread.
    pub fn create(path: &Path, job: JobId, size_bytes: u64, settings: Settings) -> Result<IntentLog> {
        let layout = Layout::new(size_bytes);
        let marked: Vec<u64> = (0..layout.words()).map(|at| layout.mask(at)).collect();
        Self::create_marked(path, job, layout, &marked, settings)
    }

    /// As [`IntentLog::create`], for a job that is not concerned with what was there before it: no region is marked.
    ///
    /// # Errors
    /// As there.
    pub fn create_unmarked(path: &Path, job: JobId, size_bytes: u64, settings: Settings) -> Result<IntentLog> {
        let layout = Layout::new(size_bytes);
        let marked: Vec<u64> = (0..layout.words()).map(|_| 0).collect();
        Self::create_marked(path, job, layout, &marked, settings)
    }

    fn create_marked(path: &Path, job: JobId, layout: Layout, marked: &[u64], settings: Settings) -> Result<IntentLog> {
        let file = file::create(path)?;
        let name = path.display().to_string();
        write_whole(&file, layout, &job, marked, &name)?;
        file::settle(&file, path, layout.sectors() * SECTOR_BYTES)?;
        Self::start(Box::new(file), name, job, layout, marked, settings)
    }

    /// The log that a job left behind. Regions whose sector is missing, damaged or of another job or disk are marked, and so is
    /// everything if there is no file; the whole log is made durable before this returns. What was marked is then in
    /// [`IntentLog::marked_ranges`].
    ///
    /// # Errors
    /// The file cannot be opened or written, or there can be no thread. Then nothing is known about the pair.
    pub fn open(path: &Path, job: JobId, size_bytes: u64, settings: Settings) -> Result<(IntentLog, Recovery)> {
        let layout = Layout::new(size_bytes);
        let len = layout.sectors() * SECTOR_BYTES;
        let (file, bytes) = file::open(path, len)?;
        let (marked, recovery) = recover(&bytes, &job, size_bytes);
        let name = path.display().to_string();
        if !recovery.is_whole() {
            log::warn!("{name}: {recovery}");
        }
        write_whole(&file, layout, &job, &marked, &name)?;
        file::settle(&file, path, len)?;
        Ok((Self::start(Box::new(file), name, job, layout, &marked, settings)?, recovery))
    }

    /// [`IntentLog::open`] on a file that holds `bytes`, called `name` in messages.
    ///
    /// # Errors
    /// As there.
    pub fn open_on(
        file: Box<dyn LogFile>,
        name: &str,
        bytes: &[u8],
        job: JobId,
        size_bytes: u64,
        settings: Settings,
    ) -> Result<(IntentLog, Recovery)> {
        let layout = Layout::new(size_bytes);
        let (marked, recovery) = recover(bytes, &job, size_bytes);
        write_whole(&*file, layout, &job, &marked, name)?;
        Ok((Self::start(file, name.to_owned(), job, layout, &marked, settings)?, recovery))
    }

    /// On a file that holds just what `marked` says, durably.
    fn start(
        file: Box<dyn LogFile>,
        name: String,
        job: JobId,
        layout: Layout,
        marked: &[u64],
        settings: Settings,
    ) -> Result<IntentLog> {
        let inner = Arc::new(Inner {
            layout,
            job,
            name,
            file,
            settings,
            regions: Regions::new(layout, marked),
            broken: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            passes: AtomicU64::new(0),
            queue: Mutex::new(Queue::default()),
            work: Condvar::new(),
            done: Condvar::new(),
            retire: Condvar::new(),
        });
        let writer = thread::Builder::new().name("intent".into()).spawn({
            let inner = Arc::clone(&inner);
            move || inner.write_groups()
        });
        let writer = writer.map_err(|error| Error::io("cannot start a thread for the intent log", &error))?;
        Ok(IntentLog { inner, writer: Mutex::new(Some(writer)), retirer: Mutex::new(None) })
    }

    /// To be called before anything in `range` may change on the active image, and to be kept until the dirty map is marked. When it
    /// returns, the regions that `range` touches are durably marked, or the log is broken. Nearly always they are already:
    /// then it takes no lock, and makes no system call. What lies past the disk's end is passed over.
    pub fn enter(&self, range: ByteRange) -> Passage<'_> {
        let inner = &*self.inner;
        if inner.broken.load(SeqCst) {
            return Passage { inner, touched: 0..0 };
        }
        let touched = inner.layout.touched(range);
        // Counted in everywhere before any of it is waited for: so that one group commit does.
        let mut durable = true;
        for region in touched.clone() {
            durable &= inner.regions.get(region).enter();
        }
        if !durable {
            inner.wait_until_durable(touched.clone());
        }
        Passage { inner, touched }
    }

    /// Marks `range` durably, for changes that are not the guest's.
    pub fn mark_durably(&self, range: ByteRange) {
        drop(self.enter(range));
    }

    /// Lets bits be cleared from now on, in place of what was attached before. What may differ must be dirty already: a marked
    /// region in which nothing is dirty is cleared at once.
    pub fn attach(&self, clearing: Arc<dyn Clearing>) {
        let mut retirer = self.retirer.lock();
        self.stop_retirer(&mut retirer);
        *retirer = retire::start(&self.inner, clearing);
    }

    /// No bit is cleared any more, but those that are being written at this moment. Returns when no call into what was attached is
    /// under way; so it may take as long as a flush, and must not be called from inside one.
    pub fn detach(&self) {
        self.stop_retirer(&mut self.retirer.lock());
    }

    fn stop_retirer(&self, retirer: &mut Option<thread::JoinHandle<()>>) {
        if let Some(handle) = retirer.take() {
            self.inner.queue.lock().stop_retiring = true;
            self.inner.retire.notify_all();
            self.inner.done.notify_all();
            // It does not panic, and if it did, nothing would be cleared.
            _ = handle.join();
            self.inner.queue.lock().stop_retiring = false;
        }
    }

    /// Hands every run of marked regions to `each`, in order.
    pub fn marked_ranges(&self, mut each: impl FnMut(ByteRange)) {
        let layout = self.inner.layout;
        let mut run = 0..0;
        for region in self.inner.regions.marked() {
            if region != run.end {
                if !run.is_empty() {
                    each(layout.bytes_of(run.start, run.end));
                }
                run.start = region;
            }
            run.end = region + 1;
        }
        if !run.is_empty() {
            each(layout.bytes_of(run.start, run.end));
        }
    }

    /// Bytes of the marked regions, to the nearest region.
    pub fn marked_bytes(&self) -> u64 {
        let layout = self.inner.layout;
        (u64::from(self.inner.regions.marked_count()) * layout.region_bytes()).min(layout.size_bytes())
    }

    /// Bytes of a region: a power of two, 1 MiB or more.
    pub fn region_bytes(&self) -> u64 {
        self.inner.layout.region_bytes()
    }

    /// Bytes of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.inner.layout.size_bytes()
    }

    /// How often the log's thread has made a group of bits durable, or has tried to: one fdatasync each.
    pub fn syncs(&self) -> u64 {
        self.inner.syncs.load(SeqCst)
    }

    /// True if the log was given up: the pairing is forgotten, nothing is marked any more.
    pub fn is_broken(&self) -> bool {
        self.inner.broken.load(SeqCst)
    }

    /// Why it is broken.
    pub fn broken_by(&self) -> Option<Error> {
        self.inner.queue.lock().broken_by.clone()
    }

    /// Ends the threads; the file stays as it is. No change may be under way or come after this: one that needs a bit makes the
    /// log broken. A log's disk that hangs is waited for `max_wait`, and then left alone with its thread.
    pub fn close(&self) {
        self.detach();
        let Some(writer) = self.writer.lock().take() else { return };
        let deadline = Instant::now().checked_add(self.inner.settings.max_wait);
        let mut queue = self.inner.queue.lock();
        queue.closing = true;
        self.inner.work.notify_all();
        let mut in_time = true;
        while in_time && !queue.ended {
            in_time = wait_until(&self.inner.done, &mut queue, deadline);
        }
        let ended = queue.ended;
        drop(queue);
        if ended {
            _ = writer.join();
        } else {
            log::warn!("{}: the disk does not answer; a thread is left waiting for it", self.inner.name);
        }
    }

    /// Removes the log at `path`, durably. Nothing to do if there is none.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(path: &Path) -> Result<()> {
        file::remove(path)
    }
}

/// Writes every sector, durably: then all of it may be believed.
fn write_whole(file: &dyn LogFile, layout: Layout, job: &JobId, marked: &[u64], name: &str) -> Result<()> {
    let sector = |sector| encode(layout, job, sector, marked[layout.words_of(sector)].iter().copied());
    let bytes: Vec<u8> = (0..layout.sectors()).flat_map(sector).collect();
    let written = file.write_at(0, &bytes).and_then(|()| file.sync());
    written.map_err(|error| Error::io("cannot write the intent log", &error).on(name))
}

impl Drop for IntentLog {
    fn drop(&mut self) {
        self.close();
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        if self.touched.is_empty() {
            return;
        }
        let now = self.inner.settings.clock.seconds();
        for region in self.touched.clone() {
            self.inner.regions.get(region).leave(now);
        }
    }
}

impl fmt::Debug for IntentLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntentLog")
            .field("name", &self.inner.name)
            .field("size_bytes", &self.size_bytes())
            .field("region_bytes", &self.region_bytes())
            .field("marked_bytes", &self.marked_bytes())
            .field("broken", &self.is_broken())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Passage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Passage({:?})", self.inner.layout.bytes_of(self.touched.start, self.touched.end))
    }
}
