//! The end of a bit (rule 2), looked for by a thread of its own, so that no guest ever waits for a flush of an image:
//!
//! ```text
//! (a) nothing in flight: Set -> Retiring;  then: nothing dirty, claimed or held, and no write lately
//! (b) flush both images: begun after all of (a)
//! (c) still nothing dirty; hand over to the log's thread, which takes what is still Retiring
//! (d) the log's thread: Clearing, written, durable: Clear
//! ```
//!
//! A write counts itself and then learns the state; it marks the dirty map before it is counted out. So one that came before
//! (a) has left a mark that the look after it finds, and one that comes later sets the region back. Dirty is looked at again after
//! the flush because another flush may have failed meanwhile and made dirty what was written before.

use std::time::Duration;

use crate::error::Result;
use crate::range::ByteRange;
use crate::sync::atomic::Ordering::Relaxed;
use crate::sync::{Arc, Instant, wait_until};

use super::Inner;
use super::region::State;
use super::writer::{Health, Queue};

/// A region in which a guest's write ended less than so many seconds ago stays marked: it is likely to be written again.
pub const HOT_SECONDS: u32 = 30;
/// How long to wait before looking again at regions that were dirty ...
const PASS_INTERVAL: Duration = Duration::from_secs(1);
/// ... and at first, then twice as long each time: what was copied is not copied again even if servers are killed many times a second.
const FIRST_INTERVAL: Duration = Duration::from_millis(50);

/// What the end of a bit needs to know of the images. Called on the retirer's thread, without locks held.
pub trait Clearing: Send + Sync {
    /// True if, at one instant, nothing in `range` was dirty, claimed or held. Must be quick: see
    /// [`DirtyMap::is_quiet`](crate::dirty::DirtyMap::is_quiet).
    fn is_quiet(&self, range: ByteRange) -> bool;

    /// How many flushes of the target have failed so far, whoever asked for them: what they had not proven was made dirty, and may have been
    /// copied again since, which no flush has proven then. Counted before it is made dirty.
    fn failed_flushes(&self) -> u64;

    /// Flushes source and target, both begun after the call. May take as long as it must.
    ///
    /// # Errors
    /// Either failed: nothing is cleared.
    fn flush_both(&self) -> Result<()>;
}

/// When another pass may have something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// No region is marked.
    WhenMarked,
    After(Duration),
}

/// Why a region stays marked, or that it does not.
enum Look {
    Retiring,
    /// Written lately, or just now: seconds until it may have cooled.
    Hot(u32),
    Busy,
}

impl Inner {
    /// The retirer's thread.
    pub(super) fn retire_until_stopped(&self, clearing: &dyn Clearing) {
        let over = |queue: &Queue| queue.stop_retiring || queue.health != Health::Sound;
        while !over(&self.queue.lock()) {
            let next = self.pass(clearing);
            let mut queue = self.queue.lock();
            let deadline = match next {
                Next::WhenMarked => None,
                Next::After(wait) => Some(Instant::now() + wait),
            };
            queue.retirer_idle = deadline.is_none();
            let mut in_time = true;
            while in_time && !over(&queue) && !(queue.retirer_idle && queue.newly_set) {
                in_time = wait_until(&self.retire, &mut queue, deadline);
            }
            queue.retirer_idle = false;
        }
    }

    /// Clears what may be cleared now: at most one flush of both images and one write of the log, none of them if nothing may.
    pub(super) fn pass(&self, clearing: &dyn Clearing) -> Next {
        self.queue.lock().newly_set = false;
        self.passes.fetch_add(1, Relaxed);
        let now = self.settings.clock.seconds();
        let failed_before = clearing.failed_flushes();
        let mut retiring = Vec::new();
        let mut next = Next::WhenMarked;
        for region in self.regions.marked() {
            let wait = match self.look(region, now, clearing) {
                Look::Retiring => {
                    retiring.push(region);
                    continue;
                }
                Look::Hot(seconds) => Duration::from_secs(seconds.into()),
                Look::Busy => self.interval(),
            };
            next = Next::After(if let Next::After(sooner) = next { sooner.min(wait) } else { wait });
        }
        let looked_at = retiring.len();
        if retiring.is_empty() || self.clear(retiring, clearing, failed_before) == looked_at {
            return next;
        }
        Next::After(self.interval())
    }

    /// How long to wait after the pass that was begun last.
    fn interval(&self) -> Duration {
        let before = self.passes.load(Relaxed).saturating_sub(1).min(16) as u32;
        FIRST_INTERVAL.saturating_mul(1 << before).min(PASS_INTERVAL)
    }

    /// (a)
    fn look(&self, number: u32, now: u32, clearing: &dyn Clearing) -> Look {
        let bytes = self.layout.bytes_of(number, number + 1);
        if let seconds @ 1.. = self.cools_in(number, now) {
            return Look::Hot(seconds);
        }
        // Looked at twice: most are dirty while a copy runs, and it disturbs nobody to see that.
        if !clearing.is_quiet(bytes) || !self.regions.get(number).change_idle(State::Set, State::Retiring) {
            return Look::Busy;
        }
        if self.cools_in(number, now) > 0 || !clearing.is_quiet(bytes) {
            self.set_back(number);
            return Look::Busy;
        }
        Look::Retiring
    }

    /// Seconds until the region may have cooled.
    fn cools_in(&self, number: u32, now: u32) -> u32 {
        match self.regions.written(number, now) {
            0 => 0,
            // The seconds are whole ones: one more, so that it is never less than they say.
            written => written.saturating_add(HOT_SECONDS + 1).saturating_sub(now),
        }
    }

    fn set_back(&self, number: u32) {
        // In another state it is in use already.
        self.regions.get(number).change(State::Retiring, State::Set);
    }

    /// (b) and (c), and waits for (d). Returns how many regions are clear now. `failed_before`: so many flushes of the target had failed
    /// before (a).
    fn clear(&self, mut retiring: Vec<u32>, clearing: &dyn Clearing, failed_before: u64) -> usize {
        let flushed = clearing.flush_both();
        // One that began before (a) and failed after it: what it made dirty may be quiet again, copied but not flushed.
        let proven = flushed.is_ok() && clearing.failed_flushes() == failed_before;
        if let Err(error) = &flushed {
            log::debug!("{}: nothing is cleared: {error}", self.name);
        }
        retiring.retain(|&number| {
            let quiet = proven && clearing.is_quiet(self.layout.bytes_of(number, number + 1));
            if !quiet {
                self.set_back(number);
            }
            quiet
        });
        if retiring.is_empty() {
            return 0;
        }
        let mut queue = self.queue.lock();
        if queue.stop_retiring || queue.closing || queue.health != Health::Sound {
            retiring.into_iter().for_each(|region| self.set_back(region));
            return 0;
        }
        queue.retired.append(&mut retiring);
        queue.lots_given += 1;
        let lot = queue.lots_given;
        self.work.notify_one();
        while queue.lots_done < lot && queue.health == Health::Sound && !queue.stop_retiring {
            self.done.wait(&mut queue);
        }
        if queue.lots_done >= lot {
            return queue.cleared;
        }
        // What is under way ends without us; what is not goes back.
        std::mem::take(&mut queue.retired).into_iter().for_each(|region| self.set_back(region));
        0
    }
}

/// The thread of [`Inner::retire_until_stopped`], if it could be started.
pub(super) fn start(inner: &Arc<Inner>, clearing: Arc<dyn Clearing>) -> Option<crate::sync::thread::JoinHandle<()>> {
    let name = inner.name.clone();
    let inner = Arc::clone(inner);
    let retirer = crate::sync::thread::Builder::new().name("intent-retire".into());
    match retirer.spawn(move || inner.retire_until_stopped(&*clearing)) {
        Ok(handle) => Some(handle),
        Err(error) => {
            log::warn!("{name}: no thread to clear it: {error}; a restart will compare more than it must");
            None
        }
    }
}
