//! Claims: granules in a copier's hands. Their bits were cleared when the claim was taken or grown, so that a guest write marks
//! them again; nobody else may claim or hold them until the claim ends.
//!
//! ```text
//! claim -> (extend | truncate)* -> finish                   the copy is on the target
//!                               \-> drop: mark, release     it is not: at no instant neither dirty nor in flight
//! ```

use std::fmt;
use std::ops::Range;

use crate::range::{ByteRange, Granule};
use crate::sync::Arc;

use super::DirtyMap;
use super::bits::LEAF_BITS;

/// The lock is let go of after so many granules of an extension: some 100 microseconds.
const EXTENSION_STEP_GRANULES: u64 = 16 * LEAF_BITS;

/// Consecutive granules that a copier took from the map. See the module.
#[must_use = "dropping a claim marks its granules dirty again"]
pub struct Claim {
    map: Arc<DirtyMap>,
    start: u64,
    end: u64,
    finished: bool,
    /// Of the granules before `taken_to`: see [`Claim::parts`].
    parts: Vec<ByteRange>,
    taken_to: u64,
}

impl Claim {
    pub(super) fn new(map: Arc<DirtyMap>, start: u64, end: u64) -> Self {
        Claim { map, start, end, finished: false, parts: Vec::new(), taken_to: start }
    }

    /// The numbers of its granules.
    pub fn granules(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Its bytes, as far as they lie inside the disk.
    pub fn range(&self) -> ByteRange {
        self.map.bytes_of(self.start, self.end)
    }

    /// The granule after its last: where to look for the next claim.
    pub fn next(&self) -> Granule {
        Granule(self.end)
    }

    /// The map that it belongs to.
    pub fn map(&self) -> &Arc<DirtyMap> {
        &self.map
    }

    /// Grows it over the granules that follow directly, are dirty and free, and lie wholly below the byte `up_to`; their bits
    /// are cleared. Returns the bytes that were added, which may be none. Whole words at a time: terabytes take milliseconds.
    ///
    /// As with the claim itself, ask the source about the added range only *after* this.
    pub fn extend(&mut self, up_to: u64) -> ByteRange {
        let before = self.end;
        let map = &self.map;
        let wanted = if up_to >= map.size_bytes() { map.granules() } else { map.granularity().granule_of(up_to).0 };
        while self.start < self.end && self.end < wanted {
            let mut busy = map.busy.lock();
            let step_end = wanted.min(self.end.saturating_add(EXTENSION_STEP_GRANULES));
            let free_end = map.free_until(&busy, self.end, step_end);
            let reached = map.bits.take_run(self.end, free_end, &mut busy.turn);
            map.forget_heat(&mut busy, self.end..reached);
            busy.claims.remove(self.start);
            busy.claims.insert(self.start, reached);
            busy.in_flight_bytes += map.bytes_of(self.end, reached).len();
            drop(busy);
            self.end = reached;
            if reached < step_end {
                break;
            }
        }
        map.bytes_of(before, self.end)
    }

    /// What of it is to be copied, in order, as far as it lies inside the disk: all of it, but for blocks that nobody has written since
    /// they were copied last (see [`DirtyMap::with_blocks`]). What is no more than `gap_bytes` apart is one part. Ask before the source is
    /// read.
    pub fn parts(&mut self, gap_bytes: u64) -> Vec<ByteRange> {
        let new = self.taken_to..self.end;
        self.taken_to = self.taken_to.max(self.end);
        match &self.map.blocks {
            Some(blocks) => blocks.take(new, gap_bytes, &mut self.parts),
            None => self.parts = vec![self.range()],
        }
        let range = self.range();
        self.parts.iter().map(|part| part.intersect(range)).filter(|part| !part.is_empty()).collect()
    }

    /// Gives back the granules that lie wholly at or after `byte`: they are dirty again, then free. May leave it empty.
    pub fn truncate(&mut self, byte: u64) {
        let granularity = self.map.granularity();
        let keep = byte.div_ceil(granularity.bytes()).clamp(self.start, self.end);
        self.give_back(keep, true);
    }

    /// The granules are on the target; nothing is marked. Those that were marked meanwhile are dirty.
    pub fn finish(mut self) {
        self.finished = true;
    }

    /// Releases the granules from `keep` on, marked again if `mark`.
    fn give_back(&mut self, keep: u64, mark: bool) {
        if keep >= self.end {
            return;
        }
        if mark {
            let taken = keep..self.taken_to.clamp(keep, self.end);
            self.map.set(self.map.bytes_of(taken.start, taken.end), taken.clone());
            // Their blocks were not touched.
            self.map.bits.set(taken.end, self.end);
        }
        self.taken_to = self.taken_to.min(keep);
        let kept = self.map.bytes_of(self.start, keep);
        self.parts.iter_mut().for_each(|part| *part = part.intersect(kept));
        self.parts.retain(|part| !part.is_empty());
        let mut busy = self.map.busy.lock();
        busy.claims.remove(self.start);
        busy.claims.insert(self.start, keep);
        busy.in_flight_bytes -= self.map.bytes_of(keep, self.end).len();
        self.end = keep;
        self.map.wake_after_release(&busy);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.give_back(self.start, !self.finished);
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Claim({:?})", self.range())
    }
}
