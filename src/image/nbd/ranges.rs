//! Which ranges of an export are being changed: overlapping changes go one after the other.
//!
//! The order in which overlapping changes are made is so the order in which they are kept, and in which a server that lost
//! them gets them again. A change that a caller gave up on holds its range until its connection has ended: **abandoned**. Until then
//! nobody writes there, and nobody takes for true what is read there (rule 14).

use crate::range::ByteRange;
use crate::sync::{Arc, Condvar, Instant, Mutex, wait_until};

/// The ranges of one export.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    held: Mutex<Vec<Entry>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    range: ByteRange,
    abandoned: bool,
}

/// A range that is held until the last clone of this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    ranges: Arc<Ranges>,
    id: u64,
}

impl Ranges {
    /// Holds `range` against all others; `None`: somebody else held it until `deadline`.
    pub(super) fn hold(self: &Arc<Self>, range: ByteRange, deadline: Instant) -> Option<Arc<Held>> {
        let mut held = self.held.lock();
        while held.iter().any(|entry| entry.range.overlaps(range)) {
            if !wait_until(&self.changed, &mut held, Some(deadline)) && Instant::now() >= deadline {
                return None;
            }
        }
        let id = held.iter().map(|entry| entry.id + 1).max().unwrap_or(0);
        held.push(Entry { id, range, abandoned: false });
        Some(Arc::new(Held { ranges: self.clone(), id }))
    }

    /// Waits until nothing in `range` is abandoned. False: something was, until `deadline`.
    pub(super) fn wait_for_abandoned(&self, range: ByteRange, deadline: Instant) -> bool {
        let mut held = self.held.lock();
        while held.iter().any(|entry| entry.abandoned && entry.range.overlaps(range)) {
            if !wait_until(&self.changed, &mut held, Some(deadline)) && Instant::now() >= deadline {
                return false;
            }
        }
        true
    }
}

impl Held {
    /// Its caller waits no longer.
    pub(super) fn abandon(&self) {
        let mut held = self.ranges.held.lock();
        held.iter_mut().filter(|entry| entry.id == self.id).for_each(|entry| entry.abandoned = true);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.ranges.held.lock().retain(|entry| entry.id != self.id);
        self.ranges.changed.notify_all();
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn overlapping_changes_wait_for_each_other_and_others_do_not() {
        let ranges = Arc::new(Ranges::default());
        let one = ranges.hold(ByteRange::new(0, 100), soon()).unwrap();
        let two = ranges.hold(ByteRange::new(100, 100), soon()).unwrap();
        assert!(ranges.hold(ByteRange::new(99, 2), soon()).is_none());
        drop(two);
        assert!(ranges.hold(ByteRange::new(99, 2), soon()).is_none());
        drop(one);
        assert!(ranges.hold(ByteRange::new(99, 2), soon()).is_some());
    }

    #[test]
    fn what_was_given_up_on_is_neither_read_nor_written_until_its_end() {
        let ranges = Arc::new(Ranges::default());
        let held = ranges.hold(ByteRange::new(0, 100), soon()).unwrap();
        assert!(ranges.wait_for_abandoned(ByteRange::new(0, 1), soon()), "one under way is no reason to wait");
        held.abandon();
        let request = held.clone();
        drop(held);
        assert!(!ranges.wait_for_abandoned(ByteRange::new(99, 1), soon()));
        assert!(ranges.wait_for_abandoned(ByteRange::new(100, 1), soon()));
        assert!(ranges.hold(ByteRange::new(50, 1), soon()).is_none());
        drop(request);
        assert!(ranges.wait_for_abandoned(ByteRange::new(99, 1), soon()));
    }
}
