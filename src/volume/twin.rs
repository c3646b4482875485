//! The other image of an undecided cutover: it gets every change too, until a record says which of the two is the disk (rule 15).
//!
//! It stays whole as long as no change of either image and no flush of it has failed. Whoever flushes it does so through the mirror's
//! [`Target`], one at a time: an error is reported once, and may reach somebody who began before the cutover (the clearing of the intent
//! log, a guest's flush that is late); the next flush would succeed and heal nothing.

use super::Change;
use super::target::Target;
use crate::dirty::DirtyMap;
use crate::error::Result;
use crate::sync::atomic::{AtomicBool, Ordering::SeqCst};
use crate::sync::{Arc, Mutex, MutexGuard};

/// See the module.
#[derive(Debug)]
pub(super) struct Twin {
    target: Arc<Target>,
    map: Arc<DirtyMap>,
    /// When it was proven to be whole.
    failed_flushes: u64,
    change_failed: AtomicBool,
    /// Held over both writes of a change, so that both images get overlapping ones in one order.
    order: Mutex<()>,
}

impl Twin {
    /// A target that has all that guests wrote, durably. `map` gets what a flush that fails has not proven.
    pub(super) fn new(target: Arc<Target>, map: Arc<DirtyMap>) -> Twin {
        let failed_flushes = target.failed_flushes();
        Twin { target, map, failed_flushes, change_failed: AtomicBool::new(false), order: Mutex::new(()) }
    }

    /// To be held over a change of both images.
    pub(super) fn in_order(&self) -> MutexGuard<'_, ()> {
        self.order.lock()
    }

    /// Makes a change that the disk has got.
    ///
    /// # Errors
    /// The image's; what the range holds is then unknown.
    pub(super) fn apply(&self, change: Change<'_>) -> Result<()> {
        self.target.apply(change)
    }

    /// A change has failed on one of the two, and may have been made on the other.
    pub(super) fn fail(&self) {
        self.change_failed.store(true, SeqCst);
    }

    /// Makes what it got durable; when that fails it is not whole any more.
    pub(super) fn flush(&self) {
        let _ = self.target.flush(&self.map);
    }

    /// True if it has got, and kept, every change so far.
    pub(super) fn is_whole(&self) -> bool {
        !self.change_failed.load(SeqCst) && self.target.failed_flushes() == self.failed_flushes
    }
}
