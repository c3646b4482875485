//! Holds: bytes that a guest write keeps to itself while it goes to both images.
//!
//! ```text
//! hold -> clear_covered -> write source and target -> finish            both have the same bytes
//!                                                 \-> drop: mark, release    one of them failed
//! ```
//!
//! A hold may go to another thread and outlive the one that took it: a target write that was given up on keeps its hold until
//! it has returned (rule 14), and so counts as in flight.

use std::fmt;

use crate::range::ByteRange;
use crate::sync::Arc;

use super::DirtyMap;
use super::busy::touched_granules;

/// Bytes that one guest write may change on both images. See the module.
#[must_use = "dropping a hold marks its range dirty"]
pub struct Hold {
    map: Arc<DirtyMap>,
    range: ByteRange,
    finished: bool,
}

impl Hold {
    pub(super) fn new(map: Arc<DirtyMap>, range: ByteRange) -> Self {
        Hold { map, range, finished: false }
    }

    /// Its bytes, as far as they lie inside the disk.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// The map that it belongs to.
    pub fn map(&self) -> &Arc<DirtyMap> {
        &self.map
    }

    /// Clears the granules that the range covers wholly (the last granule of the disk is, when the range reaches the disk's
    /// end): both images are about to get the same bytes there. To be called before either write starts. Granules that are
    /// covered partly stay as they are. Returns how many were dirty.
    pub fn clear_covered(&self) -> u64 {
        let granule_bytes = self.map.granularity().bytes();
        let start = self.range.start().div_ceil(granule_bytes);
        let end = if self.range.end() == self.map.size_bytes() {
            self.map.granules()
        } else {
            self.range.end() / granule_bytes
        };
        if start >= end {
            return 0;
        }
        let mut busy = self.map.busy.lock();
        self.map.forget_heat(&mut busy, start..end);
        self.map.bits.clear(start, end, &mut busy.turn)
    }

    /// Both images have the same bytes in the range.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.range.is_empty() {
            return;
        }
        if !self.finished {
            let granules = touched_granules(self.range, self.map.granularity());
            self.map.set(self.range, granules);
        }
        let mut busy = self.map.busy.lock();
        busy.holds.remove(self.range.start());
        busy.in_flight_bytes -= self.range.len();
        self.map.wake_after_release(&busy);
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hold({:?})", self.range)
    }
}
