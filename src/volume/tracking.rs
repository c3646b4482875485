//! What a guest's change does while a mirror runs: mark it, or write both images.
//!
//! ```text
//! background:      source -> mark -> reply
//! write-blocking:  hold the range (waits for claims and overlapping guest writes) -> clear what it covers wholly
//!                  -> source and target side by side -> both done: release;  anything else: mark, release -> reply
//! ```
//!
//! Invariants:
//! - a guest waits for the target no longer than `max_guest_delay` in all (holds, writes, flushes); past that the change goes to
//!   the source only and is marked;
//! - whoever waits for a hold holds nothing: there is no cycle of waiters;
//! - overlapping guest writes reach both images in one order, since one hold covers both writes.

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::cell::Cell;
use std::fmt;
use std::time::Duration;

use super::Change;
use super::target::Target;
use super::target_queue::TargetQueue;
use crate::dirty::DirtyMap;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::range::ByteRange;
use crate::sync::{Arc, Instant, Mutex, MutexGuard};

thread_local!(static TO_BOTH: Cell<u64> = const { Cell::new(0) });

/// How many changes of guests this thread has taken to both images so far.
pub fn taken_to_both() -> u64 {
    TO_BOTH.with(Cell::get)
}

/// Hears what guests' writes meet at the target. Called on guests' threads: must be quick and must not wait.
pub trait TargetObserver: Send + Sync {
    /// A synchronous write or flush failed. What it covered is dirty again.
    fn target_failed(&self, error: &Error);
    /// A guest gave up waiting; from now on guests do not wait, until somebody calls [`Tracking::set_synchronous`].
    fn target_stalled(&self);
}

/// Dirty tracking of one volume for one mirror job.
pub struct Tracking {
    map: Arc<DirtyMap>,
    queue: Arc<TargetQueue>,
    observer: Arc<dyn TargetObserver>,
    synchronous: AtomicBool,
    max_guest_delay: Duration,
    /// Bytes that guests changed without the target getting them.
    dirtied_bytes: AtomicU64,
    /// Bytes that guests' writes brought to the target.
    synchronous_bytes: AtomicU64,
    /// Somebody watches a range.
    watching: AtomicBool,
    watched: Mutex<Option<Watched>>,
    /// One at a time.
    watcher: Mutex<()>,
}

struct Watched {
    range: ByteRange,
    touched: bool,
}

/// Notices guests' changes to one range, while it lives.
#[must_use = "nothing is watched once it is dropped"]
pub struct Watch<'a> {
    tracking: &'a Tracking,
    _one: MutexGuard<'a, ()>,
}

impl Watch<'_> {
    /// True if a guest's change to the range has ended since the watch began. With the barrier raised: false, if none was under way since.
    pub fn was_touched(&self) -> bool {
        self.tracking.watched.lock().as_ref().is_some_and(|watched| watched.touched)
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.tracking.watching.store(false, Ordering::SeqCst);
        *self.tracking.watched.lock() = None;
    }
}

impl fmt::Debug for Tracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracking").field("synchronous", &self.is_synchronous()).finish_non_exhaustive()
    }
}

impl Tracking {
    /// Tracking that starts in background mode.
    pub fn new(
        map: Arc<DirtyMap>,
        target: Arc<Target>,
        observer: Arc<dyn TargetObserver>,
        max_guest_delay: Duration,
    ) -> Arc<Self> {
        let queue = TargetQueue::new(target, map.clone());
        Arc::new(Tracking {
            map,
            queue,
            observer,
            synchronous: AtomicBool::new(false),
            max_guest_delay,
            dirtied_bytes: AtomicU64::new(0),
            synchronous_bytes: AtomicU64::new(0),
            watching: AtomicBool::new(false),
            watched: Mutex::new(None),
            watcher: Mutex::new(()),
        })
    }

    /// Watches `range` for guests' changes.
    pub fn watch(&self, range: ByteRange) -> Watch<'_> {
        let one = self.watcher.lock();
        *self.watched.lock() = Some(Watched { range, touched: false });
        self.watching.store(true, Ordering::SeqCst);
        Watch { tracking: self, _one: one }
    }

    /// After the mark: whoever looked too early to see this change finds it dirty, or copied.
    fn note_change(&self, range: ByteRange) {
        if self.watching.load(Ordering::SeqCst) {
            if let Some(watched) = &mut *self.watched.lock() {
                watched.touched |= !watched.range.intersect(range).is_empty();
            }
        }
    }

    /// The map that changes are marked in.
    pub fn map(&self) -> &Arc<DirtyMap> {
        &self.map
    }

    /// The queue through which requests reach the target that may be given up on.
    pub fn queue(&self) -> &Arc<TargetQueue> {
        &self.queue
    }

    /// How long a guest waits for the target at most.
    pub fn max_guest_delay(&self) -> Duration {
        self.max_guest_delay
    }

    /// True if guests wait for both images.
    pub fn is_synchronous(&self) -> bool {
        self.synchronous.load(Ordering::Relaxed)
    }

    /// Makes guests wait for both images, or for the source only. Returns what was so before.
    pub fn set_synchronous(&self, on: bool) -> bool {
        self.synchronous.swap(on, Ordering::Relaxed)
    }

    /// Bytes that guests changed without the target getting them, and bytes that they brought to the target.
    pub fn traffic(&self) -> (u64, u64) {
        (self.dirtied_bytes.load(Ordering::Relaxed), self.synchronous_bytes.load(Ordering::Relaxed))
    }

    /// Makes a guest's `change` on the source, and sees to it that the target gets it, now or later.
    ///
    /// # Errors
    /// The source's.
    pub fn guest_change(&self, source: &dyn Image, change: Change<'_>) -> Result<()> {
        if change.range().is_empty() {
            return change.apply(source);
        }
        let result =
            if self.is_synchronous() { self.write_both(source, change) } else { self.write_source(source, change) };
        self.note_change(change.range());
        result
    }

    fn write_source(&self, source: &dyn Image, change: Change<'_>) -> Result<()> {
        let result = change.apply(source);
        // After the write, failed or not: see the module `volume`.
        self.map.mark(change.range());
        self.dirtied_bytes.fetch_add(change.range().len(), Ordering::Relaxed);
        result
    }

    fn write_both(&self, source: &dyn Image, change: Change<'_>) -> Result<()> {
        TO_BOTH.with(|count| count.set(count.get() + 1));
        let deadline = Instant::now() + self.max_guest_delay;
        let Some(hold) = self.map.hold(change.range(), Some(deadline)) else {
            self.fall_back();
            return self.write_source(source, change);
        };
        hold.clear_covered();
        let ticket = match self.queue.submit(change, hold) {
            Ok(ticket) => ticket,
            Err(hold) => {
                // Dropped after the write: what was cleared is marked again before anyone can claim it.
                let result = change.apply(source);
                drop(hold);
                self.dirtied_bytes.fetch_add(change.range().len(), Ordering::Relaxed);
                return result;
            }
        };
        let result = change.apply(source);
        match ticket.wait(Some(deadline)) {
            Some((Ok(()), Some(hold))) if result.is_ok() => {
                hold.finish();
                self.synchronous_bytes.fetch_add(change.range().len(), Ordering::Relaxed);
            }
            Some((written, hold)) => {
                drop(hold);
                if let Err(error) = written {
                    self.observer.target_failed(&error);
                }
            }
            None => {
                self.map.mark(change.range());
                self.fall_back();
            }
        }
        result
    }

    /// Makes acknowledged writes durable in the source, and in write-blocking mode in the target too (rule 7).
    ///
    /// # Errors
    /// The source's.
    pub fn guest_flush(&self, source: &dyn Image) -> Result<()> {
        let deadline = Instant::now() + self.max_guest_delay;
        let synchronous = self.is_synchronous();
        let ticket = if synchronous { self.queue.submit_flush() } else { None };
        if synchronous && ticket.is_none() {
            // The target is so far behind that it takes no more: this flush is not its either.
            self.fall_back();
        }
        let result = source.flush();
        if let Some(ticket) = ticket {
            match ticket.wait(Some(deadline)) {
                Some((Err(error), _)) => self.observer.target_failed(&error),
                Some((Ok(()), _)) => (),
                None => self.fall_back(),
            }
        }
        result
    }

    fn fall_back(&self) {
        if self.set_synchronous(false) {
            self.observer.target_stalled();
        }
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        self.queue.close();
    }
}
