//! The target that a disk was cut over to, while its mirror may still flush it: for the clearing of the intent log, or for a guest that
//! gave up waiting.
//!
//! An error of such a flush is the guest's: Linux reports it once, and the guest's next flush would succeed and heal nothing (rule 7). So
//! all flush through the mirror's [`Target`], one at a time, and whoever comes after one that failed hears of it.

use super::target::Target;
use crate::dirty::DirtyMap;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// See the module.
#[derive(Debug)]
pub(super) struct Former {
    target: Arc<Target>,
    map: Arc<DirtyMap>,
    /// So many flushes had failed when somebody heard of it last.
    heard_of: AtomicU64,
}

impl Former {
    /// A target that has all that guests wrote, durably.
    pub(super) fn new(target: Arc<Target>, map: Arc<DirtyMap>) -> Former {
        let heard_of = target.failed_flushes().into();
        Former { target, map, heard_of }
    }

    pub(super) fn is(&self, target: &Arc<Target>) -> bool {
        Arc::ptr_eq(&self.target, target)
    }

    /// Flushes.
    ///
    /// # Errors
    /// This flush failed, or one that nobody has heard of.
    pub(super) fn flush(&self) -> Result<()> {
        let flushed = self.target.flush(&self.map);
        let unheard = self.unheard();
        flushed.and(unheard)
    }

    /// # Errors
    /// A flush has failed that nobody has heard of.
    pub(super) fn unheard(&self) -> Result<()> {
        let failed = self.target.failed_flushes();
        match self.heard_of.swap(failed, SeqCst) == failed {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Failed, "an earlier flush has failed:").on(self.target.image().name())),
        }
    }
}
