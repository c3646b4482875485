//! The dirty map of one volume. A set bit means: the target may differ from the source here.
//!
//! ```text
//! guest write, background:      write source -> mark -> reply
//! guest write, write-blocking:  hold -> clear what is covered -> write both -> finish  (failed: mark again, then release)
//! copier:                       claim (clears) -> ask and read source -> write target -> finish  (failed: mark again, then release)
//! ```
//!
//! Invariants:
//! - **Clear before read** (rule 3): bits are cleared only when a claim is taken or grown, before its owner looks at the source,
//!   or by a hold, before its owner writes. A write that races with a copy marks its granule again, and a later
//!   claim copies it.
//! - **One copier at a time**: no granule is in two claims, or in a claim and a hold, however often it is marked.
//! - **Nothing falls between**: a claim or hold that is dropped marks first and is released afterwards, so that at each instant a
//!   granule that may differ is dirty or in flight. [`DirtyMap::is_in_sync`] looks at both under the lock in which
//!   releases happen.
//! - **Marking takes no lock** while no copier sleeps. A copier that goes to sleep counts itself as a sleeper and then looks
//!   for work; who marks sets the bit and then looks for sleepers. One of them sees the other.
//! - Claims never wait. A hold waits without owning anything, so that no two waiters wait for each other.
//!
//! Lock order: the map's mutex is a leaf. Nothing is called while it is held but the `stop` of [`DirtyMap::wait_for_work`].

use std::fmt;
use std::ops::Range;

use crate::range::{ByteRange, Granularity, Granule};
use crate::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use crate::sync::{Arc, Condvar, Instant, Mutex, wait_until};

use super::bits::BitTree;
use super::blocks::Blocks;
use super::busy::{Busy, touched_granules};
use super::heat::{Heat, Search};
use super::{Claim, Hold};

/// Why [`DirtyMap::wait_for_work`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// There was a granule to claim at that moment; another copier may have been faster.
    Work,
    /// `stop` said so.
    Stopped,
    /// The deadline has passed.
    TimedOut,
}

/// Granules whose copy on the target may be stale. See the module.
pub struct DirtyMap {
    size_bytes: u64,
    granularity: Granularity,
    pub(super) bits: BitTree,
    /// Which parts of dirty granules differ, where that is known.
    pub(super) blocks: Option<Blocks>,
    /// Which are to be copied last, where that is to be known.
    heat: Option<Heat>,
    pub(super) busy: Mutex<Busy>,
    /// Something was released, or a waiter for a hold left.
    hold_freed: Condvar,
    /// Something became claimable.
    work_arrived: Condvar,
    sleepers: AtomicUsize,
}

impl DirtyMap {
    /// A map for a disk of `size_bytes`, all clean. The size is fixed. Memory: 16 bytes for 2^24 granules (1 TiB of 64 KiB
    /// granules); beyond that, 4 KiB for each 2^15 granules among which one was ever dirty.
    pub fn new(size_bytes: u64, granularity: Granularity) -> Arc<Self> {
        Self::make(size_bytes, granularity, None, false)
    }

    /// A map that knows of granules of which a part was marked which blocks of `block_bytes` bytes that was, if a granule has 2 to 16 of
    /// them: see [`Claim::parts`]. Memory: 64 KiB more for each 2^15 granules of which a part was ever marked, 16 MiB at most; past that,
    /// granules are whole. Granules that are written again before they are copied are claimed last, as long as they are few.
    pub fn with_blocks(size_bytes: u64, granularity: Granularity, block_bytes: u64) -> Arc<Self> {
        Self::make(size_bytes, granularity, Blocks::new(size_bytes, granularity, block_bytes), true)
    }

    fn make(size_bytes: u64, granularity: Granularity, blocks: Option<Blocks>, ordered: bool) -> Arc<Self> {
        let granules = granularity.count(size_bytes);
        let (bits, turn) = BitTree::new(granules);
        let (heat, heat_turn) = ordered.then(|| Heat::new(granules)).unzip();
        Arc::new(DirtyMap {
            size_bytes,
            granularity,
            bits,
            blocks,
            heat,
            busy: Mutex::new(Busy::new(turn, heat_turn)),
            hold_freed: Condvar::new(),
            work_arrived: Condvar::new(),
            sleepers: AtomicUsize::new(0),
        })
    }

    /// Bytes of a granule.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Bytes of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// How many granules the disk has; the last may be partly past its end.
    pub fn granules(&self) -> u64 {
        self.granularity.count(self.size_bytes)
    }

    /// Marks every granule that `range` touches, those that it covers partly too; what lies past the disk's end is passed
    /// over. True if any of them was clean. Takes no lock while no copier sleeps.
    pub fn mark(&self, range: ByteRange) -> bool {
        let range = self.clip(range);
        let granules = touched_granules(range, self.granularity);
        let asked = granules.end - granules.start;
        let count = self.set(range, granules.clone());
        if let (true, Some(heat)) = (count < asked, &self.heat) {
            heat.note(&granules);
        }
        let newly = count > 0;
        // Whoever set a bit first wakes the sleepers: bits that were set already have been announced, or are about to be.
        if newly && self.sleepers.load(SeqCst) > 0 {
            // A sleeper that has counted itself may not sleep yet: it does when the lock is free.
            drop(self.busy.lock());
            self.work_arrived.notify_all();
        }
        newly
    }

    /// Sets the bits of `granules`, of which `range` is to be copied. How many were not set.
    pub(super) fn set(&self, range: ByteRange, granules: Range<u64>) -> u64 {
        if let Some(blocks) = &self.blocks {
            blocks.mark(range, &granules);
        }
        self.bits.set(granules.start, granules.end)
    }

    /// True if `granule` is dirty. Granules in a claim are not, unless they were marked again.
    pub fn is_dirty(&self, granule: Granule) -> bool {
        self.bits.get(granule.0)
    }

    /// True if any granule that `range` touches is dirty.
    pub fn any_dirty(&self, range: ByteRange) -> bool {
        let granules = touched_granules(self.clip(range), self.granularity);
        match granules.end - granules.start {
            0 => false,
            1 => self.bits.get(granules.start),
            _ => self.next_dirty(Granule(granules.start)).is_some_and(|found| found.0 < granules.end),
        }
    }

    /// How many granules are dirty. Exact while nobody marks or claims, else never too low.
    pub fn dirty_granules(&self) -> u64 {
        self.bits.count()
    }

    /// Bytes of the dirty granules, as far as they lie inside the disk.
    pub fn dirty_bytes(&self) -> u64 {
        let dirty = self.dirty_granules().min(self.granules());
        let past_the_end = (self.granules() << self.granularity.bytes().trailing_zeros()) - self.size_bytes;
        let tail = if past_the_end > 0 && self.bits.get(self.granules() - 1) { past_the_end } else { 0 };
        (dirty << self.granularity.bytes().trailing_zeros()).saturating_sub(tail)
    }

    /// The first dirty granule at or after `from`, claimable or not. Microseconds, however large the disk.
    pub fn next_dirty(&self, from: Granule) -> Option<Granule> {
        self.bits.next(from.0, &self.busy.lock().turn).map(Granule)
    }

    /// Takes up to `limit_granules` consecutive dirty granules and clears their bits: the first that are free at or after
    /// `from`, or else the first of the disk. Granules in another claim or in a hold are passed over, and so are those that a
    /// guest write waits for. `None` if nothing can be claimed. Never waits for claims or holds.
    pub fn claim(self: &Arc<Self>, from: Granule, limit_granules: u32) -> Option<Claim> {
        if limit_granules == 0 {
            return None;
        }
        let mut busy = self.busy.lock();
        let end = |start: u64| start.saturating_add(limit_granules.into()).min(self.granules());
        let cold = self.find_cold(&busy, from.0).map(|(start, cold_end)| (start, cold_end.min(end(start))));
        let (start, end) = match cold {
            Some(cold) => cold,
            None => self.find_claimable(&busy, from.0, None).map(|start| (start, end(start)))?,
        };
        let limit = self.free_until(&busy, start, end);
        let end = self.bits.take_run(start, limit, &mut busy.turn);
        self.forget_heat(&mut busy, start..end);
        debug_assert!(end > start);
        busy.claims.insert(start, end);
        busy.in_flight_bytes += self.bytes_of(start, end).len();
        drop(busy);
        Some(Claim::new(Arc::clone(self), start, end))
    }

    /// Holds the bytes of `range` for a guest write to both images: against every other hold that shares a byte with it, and
    /// against claims of the granules that it touches. Waits until all of it is free, and owns nothing until then. `None`: the
    /// deadline has passed (`None` as the deadline: there is none). Waiters for the same bytes are served in turn, before
    /// copiers.
    ///
    /// Whoever has a hold must not wait for another that overlaps it.
    pub fn hold(self: &Arc<Self>, range: ByteRange, deadline: Option<Instant>) -> Option<Hold> {
        let range = self.clip(range);
        let mut busy = self.busy.lock();
        if !busy.may_hold(range, self.granularity, None) {
            let ticket = busy.queue(range);
            let mut in_time = true;
            while in_time && !busy.may_hold(range, self.granularity, Some(ticket)) {
                in_time = wait_until(&self.hold_freed, &mut busy, deadline);
            }
            let free = busy.may_hold(range, self.granularity, Some(ticket));
            busy.leave(ticket);
            if !free {
                // Those behind it, and the copiers that kept away, may go on.
                self.wake_after_release(&busy);
                return None;
            }
        }
        Some(self.enter_hold(&mut busy, range))
    }

    /// [`DirtyMap::hold`] without waiting.
    pub fn try_hold(self: &Arc<Self>, range: ByteRange) -> Option<Hold> {
        let range = self.clip(range);
        let mut busy = self.busy.lock();
        busy.may_hold(range, self.granularity, None).then(|| self.enter_hold(&mut busy, range))
    }

    /// Bytes in claims and holds.
    pub fn in_flight_bytes(&self) -> u64 {
        self.busy.lock().in_flight_bytes
    }

    /// True if nothing is claimed and nothing held.
    pub fn is_idle(&self) -> bool {
        self.busy.lock().is_idle()
    }

    /// True if, at one instant, nothing was dirty and nothing in flight. Guest writes that were not marked yet are the volume's
    /// to count.
    pub fn is_in_sync(&self) -> bool {
        // A claim that fails marks before it takes the lock to be released: seen idle, its marks are in the count.
        let busy = self.busy.lock();
        busy.is_idle() && self.bits.count() == 0
    }

    /// True if, at one instant, no granule that `range` touches was dirty, claimed or held in part. Guest writes that were not
    /// marked yet are the intent log's to count. What lies past the disk's end is quiet.
    pub fn is_quiet(&self, range: ByteRange) -> bool {
        let granules = touched_granules(self.clip(range), self.granularity);
        if granules.is_empty() {
            return true;
        }
        let bytes = self.bytes_of(granules.start, granules.end);
        // As in `is_in_sync`: what is seen released has been marked before, and what is claimed is cleared under the lock.
        let busy = self.busy.lock();
        busy.claims.first_overlap(granules.start, granules.end).is_none()
            && busy.holds.first_overlap(bytes.start(), bytes.end()).is_none()
            && self.bits.next(granules.start, &busy.turn).is_none_or(|dirty| dirty >= granules.end)
    }

    /// Sleeps until there is something to claim, `stop` is true or the deadline has passed. `stop` is asked at the start and after
    /// each wake-up, under the map's lock: it must be short and take no lock under which the map is used. Whoever changes what
    /// `stop` looks at calls [`DirtyMap::wake_all`] afterwards.
    pub fn wait_for_work(&self, deadline: Option<Instant>, stop: impl Fn() -> bool) -> Wake {
        let mut busy = self.busy.lock();
        self.sleepers.fetch_add(1, SeqCst);
        let mut in_time = true;
        let wake = loop {
            if stop() {
                break Wake::Stopped;
            }
            if self.find_claimable(&busy, 0, None).is_some() {
                break Wake::Work;
            }
            if !in_time {
                break Wake::TimedOut;
            }
            in_time = wait_until(&self.work_arrived, &mut busy, deadline);
        };
        self.sleepers.fetch_sub(1, SeqCst);
        wake
    }

    /// Lets everyone in [`DirtyMap::wait_for_work`] ask its `stop` again.
    pub fn wake_all(&self) {
        drop(self.busy.lock());
        self.work_arrived.notify_all();
    }

    /// The first dirty granule that may be claimed, looked for from `from` on and then from the start.
    /// `search`: hot ones are passed over; where they are too many for that there is no answer.
    fn find_claimable(&self, busy: &Busy, from: u64, mut search: Option<&mut Search<'_>>) -> Option<u64> {
        for (mut at, end) in [(from, self.granules()), (0, from)] {
            while let Some(found) = self.bits.next(at, &busy.turn).filter(|&found| found < end) {
                let hot = match &mut search {
                    Some(search) => search.passes_over(found)?,
                    None => false,
                };
                at = match busy.first_taken(found..found + 1, self.granularity) {
                    Some(taken) => taken.end,
                    None if hot => found + 1,
                    None => return Some(found),
                };
            }
        }
        None
    }

    /// `granules` are clean now: what they are next is seen anew.
    pub(super) fn forget_heat(&self, busy: &mut Busy, granules: Range<u64>) {
        if let (Some(heat), Some(turn)) = (&self.heat, &mut busy.heat_turn) {
            heat.forget(granules, turn);
        }
    }

    /// As [`DirtyMap::find_claimable`], of granules that are not hot, and where they end. `None`: there are none, or it is not worth it.
    fn find_cold(&self, busy: &Busy, from: u64) -> Option<(u64, u64)> {
        let mut search = self.heat.as_ref()?.search(self.bits.count())?;
        let start = self.find_claimable(busy, from, Some(&mut search))?;
        Some((start, search.cold_until(start, self.granules(), busy.heat_turn.as_ref()?)))
    }

    /// The end of the granules from `start` on that may be claimed, `end` at most.
    pub(super) fn free_until(&self, busy: &Busy, start: u64, end: u64) -> u64 {
        busy.first_taken(start..end, self.granularity).map_or(end, |taken| taken.start.max(start))
    }

    fn enter_hold(self: &Arc<Self>, busy: &mut Busy, range: ByteRange) -> Hold {
        busy.holds.insert(range.start(), range.end());
        busy.in_flight_bytes += range.len();
        Hold::new(Arc::clone(self), range)
    }

    /// Wakes whoever may go on now that something was released.
    pub(super) fn wake_after_release(&self, busy: &Busy) {
        if busy.has_waiters() {
            self.hold_freed.notify_all();
        }
        if self.sleepers.load(SeqCst) > 0 && self.bits.count() > 0 {
            self.work_arrived.notify_all();
        }
    }

    /// The bytes of the granules `start..end`, as far as they lie inside the disk.
    pub(super) fn bytes_of(&self, start: u64, end: u64) -> ByteRange {
        let byte = |granule| self.granularity.start_of(Granule(granule)).min(self.size_bytes);
        ByteRange::from_bounds(byte(start), if end >= self.granules() { self.size_bytes } else { byte(end) })
    }

    pub(super) fn clip(&self, range: ByteRange) -> ByteRange {
        range.intersect(ByteRange::from_bounds(0, self.size_bytes))
    }
}

impl fmt::Debug for DirtyMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyMap")
            .field("size_bytes", &self.size_bytes)
            .field("granularity", &self.granularity.bytes())
            .field("dirty_granules", &self.dirty_granules())
            .finish_non_exhaustive()
    }
}
