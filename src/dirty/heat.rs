//! Which dirty granules are hot: written again before they were copied. They are copied last, when they may have come to rest.
//!
//! Only where they are few: if everything is written all the time there is no use in an order, and claims that leave out every other
//! granule would be small.
//!
//! What is said here is a hint: a granule may be hot and clean, or be called hot a moment too late. Nothing is lost by that.

use std::ops::Range;

use super::bits::{BitTree, Turn};

/// Hot granules are few if there are so many times as many dirty ones.
const FEW: u64 = 8;
/// So many are passed over in one search.
const PASSED_MAX: u32 = 64;
/// A change of more granules is a stream: it does not come back soon.
const STREAM_GRANULES: u64 = 2;

/// See the module.
pub(super) struct Heat {
    bits: BitTree,
}

/// One search that passes hot granules over.
pub(super) struct Search<'a> {
    heat: &'a Heat,
    left: u32,
}

impl Heat {
    pub(super) fn new(granules: u64) -> (Heat, Turn) {
        let (bits, turn) = BitTree::new(granules);
        (Heat { bits }, turn)
    }

    /// A guest wrote to `granules`, of which some were dirty.
    pub(super) fn note(&self, granules: &Range<u64>) {
        if granules.end - granules.start <= STREAM_GRANULES {
            self.bits.set(granules.start, granules.end);
        }
    }

    /// `granules` were claimed: what they are from now on is seen anew.
    pub(super) fn forget(&self, granules: Range<u64>, turn: &mut Turn) {
        if self.bits.count() > 0 {
            self.bits.clear(granules.start, granules.end, turn);
        }
    }

    /// `None` where hot granules are not to be told apart, of so many that are dirty.
    pub(super) fn search(&self, dirty: u64) -> Option<Search<'_>> {
        let hot = self.bits.count();
        (hot > 0 && hot.saturating_mul(FEW) <= dirty).then_some(Search { heat: self, left: PASSED_MAX })
    }
}

impl Search<'_> {
    /// Whether `granule` is to be passed over. `None`: too many were, it is not worth it.
    pub(super) fn passes_over(&mut self, granule: u64) -> Option<bool> {
        if !self.heat.bits.get(granule) {
            return Some(false);
        }
        self.left = self.left.checked_sub(1)?;
        Some(true)
    }

    /// The end of the granules from `start` on, `end` at most, none of which is hot. `start` was not when it was found; it may be now.
    pub(super) fn cold_until(&self, start: u64, end: u64, turn: &Turn) -> u64 {
        self.heat.bits.next(start + 1, turn).map_or(end, |hot| hot.min(end))
    }
}
