//! What is in flight on a dirty map: claims, holds and those who wait for a hold. Lives in the map's mutex.
//!
//! - Claims are disjoint ranges of granules; holds are disjoint ranges of *bytes*. Two synchronous writes to different bytes
//!   of one granule need not wait for each other: the bit of a granule that neither covers wholly is touched by
//!   neither. A claim and a hold exclude each other by granules, because the copier reads whole granules.
//! - Who waits for a hold owns nothing. It is let in once no claim, no hold and nobody who came *earlier* overlaps: waiters are
//!   ordered by their time of arrival, so that there is no cycle, and a claim never waits.
//! - Claims avoid what is waited for, so that copiers do not starve the guest.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::range::{ByteRange, Granularity, Granule};

use super::bits::Turn;

/// Disjoint half-open intervals.
#[derive(Default)]
pub(super) struct Intervals {
    ends: BTreeMap<u64, u64>,
}

impl Intervals {
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Adds `start..end`; does nothing if it is empty.
    pub(super) fn insert(&mut self, start: u64, end: u64) {
        if start < end {
            debug_assert!(self.first_overlap(start, end).is_none());
            self.ends.insert(start, end);
        }
    }

    /// Takes out the interval that begins at `start`, if there is one.
    pub(super) fn remove(&mut self, start: u64) {
        self.ends.remove(&start);
    }

    /// The lowest interval that shares something with `start..end`.
    pub(super) fn first_overlap(&self, start: u64, end: u64) -> Option<Range<u64>> {
        if start >= end {
            return None;
        }
        let before = self.ends.range(..=start).next_back().filter(|&(_, &e)| e > start);
        let found = before.or_else(|| self.ends.range(start..end).next());
        found.map(|(&s, &e)| s..e)
    }
}

/// See the module.
pub(super) struct Busy {
    pub(super) turn: Turn,
    pub(super) heat_turn: Option<Turn>,
    pub(super) claims: Intervals,
    pub(super) holds: Intervals,
    waiting: VecDeque<(u64, ByteRange)>,
    next_ticket: u64,
    pub(super) in_flight_bytes: u64,
}

impl Busy {
    pub(super) fn new(turn: Turn, heat_turn: Option<Turn>) -> Self {
        Busy {
            turn,
            heat_turn,
            claims: Intervals::default(),
            holds: Intervals::default(),
            waiting: VecDeque::new(),
            next_ticket: 0,
            in_flight_bytes: 0,
        }
    }

    /// Nothing claimed, nothing held.
    pub(super) fn is_idle(&self) -> bool {
        self.claims.is_empty() && self.holds.is_empty()
    }

    pub(super) fn has_waiters(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The lowest granules within `granules` that may not be claimed: they are in a claim or a hold, or waited for.
    pub(super) fn first_taken(&self, granules: Range<u64>, granularity: Granularity) -> Option<Range<u64>> {
        if granules.is_empty() {
            return None;
        }
        let bytes = ByteRange::from_bounds(
            granularity.start_of(Granule(granules.start)),
            granules.end.saturating_mul(granularity.bytes()),
        );
        let touched = |start, end| touched_granules(ByteRange::from_bounds(start, end), granularity);
        let claim = self.claims.first_overlap(granules.start, granules.end);
        let hold = self.holds.first_overlap(bytes.start(), bytes.end()).map(|held| touched(held.start, held.end));
        let waiting = self.waiting.iter().map(|&(_, range)| range).filter(|range| range.overlaps(bytes));
        let waiting = waiting.map(|range| touched(range.start(), range.end()));
        claim.into_iter().chain(hold).chain(waiting).min_by_key(|taken| taken.start)
    }

    /// Queues up for a hold. The ticket goes to [`Busy::may_hold`] and [`Busy::leave`].
    pub(super) fn queue(&mut self, range: ByteRange) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting.push_back((ticket, range));
        ticket
    }

    /// True if `range` may be held now by the waiter with `ticket`, or by a newcomer (`None`).
    pub(super) fn may_hold(&self, range: ByteRange, granularity: Granularity, ticket: Option<u64>) -> bool {
        let granules = touched_granules(range, granularity);
        self.claims.first_overlap(granules.start, granules.end).is_none()
            && self.holds.first_overlap(range.start(), range.end()).is_none()
            && !self
                .waiting
                .iter()
                .take_while(|(earlier, _)| ticket.is_none_or(|ticket| *earlier < ticket))
                .any(|(_, waited)| waited.overlaps(range))
    }

    /// Leaves the queue, whether the hold was got or not.
    pub(super) fn leave(&mut self, ticket: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != ticket);
    }
}

/// Every granule that `range` touches.
pub(super) fn touched_granules(range: ByteRange, granularity: Granularity) -> Range<u64> {
    let start = granularity.granule_of(range.start()).0;
    start..if range.is_empty() { start } else { granularity.granule_of(range.end() - 1).0 + 1 }
}
