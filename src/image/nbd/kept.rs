//! Changes that no flush has proven durable yet: a server that lost them in its own death gets them again (rule 5).
//!
//! ```text
//! change:  begin (kept) -> sent -> answered: acknowledged;  failed: forgotten
//! flush:   note what is acknowledged -> sent -> answered: what was noted is forgotten
//! ```
//!
//! A change is kept *before* it is sent: what a server has answered a moment before its death is among them, whoever was told of it.
//! The list is bounded (rule 13): who would exceed it flushes first.

use std::collections::BTreeMap;

use super::change::Change;
use crate::sync::Mutex;

/// Bytes that may be kept. More is flushed: often enough to be small in memory, rarely enough to be small in time.
pub(super) const KEPT_BYTES_MAX: u64 = 64 << 20;
/// Changes that may be kept: each is a request at least, when they are sent again.
pub(super) const KEPT_CHANGES_MAX: usize = 16_384;
/// What one change takes besides its bytes.
const ENTRY_BYTES: u64 = 128;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Kept {
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    changes: BTreeMap<u64, (Change, bool)>,
    next: u64,
    bytes: u64,
}

fn size_of_change(change: &Change) -> u64 {
    ENTRY_BYTES + change.memory_bytes()
}

impl List {
    fn forget(&mut self, number: u64) {
        if let Some((change, _)) = self.changes.remove(&number) {
            self.bytes -= size_of_change(&change);
        }
    }
}

impl Kept {
    /// Keeps a change that is about to be sent. Its range is held: overlapping ones come here in the order in which they are made.
    pub(super) fn begin(&self, change: Change) -> u64 {
        let mut list = self.list.lock();
        let number = list.next;
        list.next += 1;
        list.bytes += size_of_change(&change);
        list.changes.insert(number, (change, false));
        number
    }

    /// The server has answered it.
    pub(super) fn acknowledge(&self, number: u64) {
        if let Some((_, acknowledged)) = self.list.lock().changes.get_mut(&number) {
            *acknowledged = true;
        }
    }

    /// It failed: its caller was told.
    pub(super) fn forget(&self, number: u64) {
        self.list.lock().forget(number);
    }

    /// What a flush that begins now will have made durable.
    pub(super) fn acknowledged(&self) -> Vec<u64> {
        self.list.lock().changes.iter().filter(|(_, (_, done))| *done).map(|(number, _)| *number).collect()
    }

    /// What [`Kept::acknowledged`] said is durable, or known to be lost.
    pub(super) fn settle(&self, numbers: &[u64]) {
        let mut list = self.list.lock();
        numbers.iter().for_each(|number| list.forget(*number));
    }

    /// True if a change with `bytes` has room.
    pub(super) fn has_room_for(&self, bytes: u64) -> bool {
        let list = self.list.lock();
        let count = list.changes.len();
        count == 0 || (count < KEPT_CHANGES_MAX && list.bytes + bytes <= KEPT_BYTES_MAX)
    }

    /// All of it, in the order in which it was made; true: it was acknowledged.
    pub(super) fn all(&self) -> Vec<(Change, bool)> {
        self.list.lock().changes.values().cloned().collect()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::image::nbd::buffers::Buffers;
    use crate::range::ByteRange;
    use crate::sync::Arc;

    fn write(byte: u8, len: usize) -> Change {
        Change::Write { offset: 0, data: Arc::new(Buffers::default()).data(vec![byte; len]) }
    }

    fn bytes(kept: &Kept) -> Vec<u8> {
        let first = |(change, _): (Change, bool)| match change {
            Change::Write { data, .. } => data[0],
            Change::Zero { .. } => 0,
        };
        kept.all().into_iter().map(first).collect()
    }

    #[test]
    fn a_flush_settles_only_what_was_acknowledged_before_it_began() {
        let kept = Kept::default();
        let (one, two) = (kept.begin(write(1, 10)), kept.begin(write(2, 10)));
        kept.acknowledge(two);
        let noted = kept.acknowledged();
        kept.acknowledge(one);
        let three = kept.begin(write(3, 10));
        kept.acknowledge(three);
        kept.settle(&noted);
        assert_eq!(bytes(&kept), [1, 3], "in the order in which they were made");
        kept.forget(one);
        assert_eq!(bytes(&kept), [3]);
    }

    #[test]
    fn it_is_bounded() {
        let kept = Kept::default();
        assert!(kept.has_room_for(2 * KEPT_BYTES_MAX), "one change always has room, however large");
        let number = kept.begin(write(1, 1 << 20));
        assert!(kept.has_room_for(KEPT_BYTES_MAX / 2) && !kept.has_room_for(KEPT_BYTES_MAX));
        kept.forget(number);
        assert!(kept.has_room_for(KEPT_BYTES_MAX));
        let zero = || Change::Zero { range: ByteRange::new(0, 512), keep: true };
        let numbers: Vec<_> = (0..KEPT_CHANGES_MAX).map(|_| kept.begin(zero())).collect();
        assert!(!kept.has_room_for(0));
        kept.settle(&numbers[..1]);
        assert!(kept.has_room_for(512));
    }
}
