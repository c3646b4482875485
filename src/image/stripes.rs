//! Locks on ranges of an image, for writes that must read, change and write back a block (see [`super::file_io`]).
//!
//! The image is cut into stripes of 64 KiB, and every 256th of them shares a lock. A write of whole blocks holds its
//! stripes *shared*, and so disturbs no other one; a write that covers a block partly holds them *exclusively*.
//!
//! Locks are taken in ascending order of their index, and nobody who holds any asks for more: no cycle of waiters can form.

use crate::range::ByteRange;
use crate::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes of one stripe: no block of an image is larger.
pub(super) const STRIPE_BYTES: u64 = 64 << 10;
const LOCKS: u64 = 256;
/// A request of 1 MiB touches 17 stripes at most; more than that need an allocation.
const USUAL: usize = 17;

/// The locks of one image.
#[derive(Debug)]
pub(super) struct Stripes {
    locks: Vec<RwLock<()>>,
}

/// A guard of one lock; only its end matters.
enum Guard<'a> {
    Shared { _guard: RwLockReadGuard<'a, ()> },
    Exclusive { _guard: RwLockWriteGuard<'a, ()> },
}

/// Locks that are held until this is dropped.
#[must_use = "the range is locked as long as this lives"]
pub(super) struct Held<'a> {
    _usual: [Option<Guard<'a>>; USUAL],
    _more: Vec<Guard<'a>>,
}

impl Stripes {
    pub(super) fn new() -> Self {
        Stripes { locks: (0..LOCKS).map(|_| RwLock::new(())).collect() }
    }

    /// Holds `range` against exclusive holders.
    pub(super) fn shared(&self, range: ByteRange) -> Held<'_> {
        self.hold(range, |lock| Guard::Shared { _guard: lock.read() })
    }

    /// Holds `range` against everybody.
    pub(super) fn exclusive(&self, range: ByteRange) -> Held<'_> {
        self.hold(range, |lock| Guard::Exclusive { _guard: lock.write() })
    }

    fn hold<'a>(&'a self, range: ByteRange, take: impl Fn(&'a RwLock<()>) -> Guard<'a>) -> Held<'a> {
        let mut usual = [const { None }; USUAL];
        let mut more = Vec::new();
        for (position, index) in indexes(range).enumerate() {
            let index = usize::try_from(index).expect("fewer than 256");
            match usual.get_mut(position) {
                Some(place) => *place = Some(take(&self.locks[index])),
                None => more.push(take(&self.locks[index])),
            }
        }
        Held { _usual: usual, _more: more }
    }
}

/// The indexes of the locks of `range`, each once, ascending.
fn indexes(range: ByteRange) -> impl Iterator<Item = u64> {
    let stripes = range.align_out(STRIPE_BYTES);
    let count = (stripes.len() / STRIPE_BYTES).min(LOCKS);
    let first = stripes.start() / STRIPE_BYTES % LOCKS;
    // A run that goes past the last lock goes on at the first one; that part has the smaller indexes.
    let wrapped = (first + count).saturating_sub(LOCKS);
    (0..wrapped).chain(first..(first + count).min(LOCKS))
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn indexes_of(start: u64, len: u64) -> Vec<u64> {
        indexes(ByteRange::new(start, len)).collect()
    }

    #[test]
    fn indexes_ascend_also_where_a_range_wraps() {
        assert_eq!(indexes_of(0, 0), [0; 0]);
        assert_eq!(indexes_of(STRIPE_BYTES - 1, 2), [0, 1]);
        assert_eq!(indexes_of(254 * STRIPE_BYTES + 5, 4 * STRIPE_BYTES), [0, 1, 2, 254, 255]);
        assert_eq!(indexes_of(77 * STRIPE_BYTES, 1 << 40), (0..256).collect::<Vec<_>>());
    }

    #[test]
    fn exclusive_keeps_everybody_out_and_shared_only_exclusive() {
        let stripes = Stripes::new();
        let one = stripes.shared(ByteRange::new(0, 10));
        let two = stripes.shared(ByteRange::new(5, 10));
        assert!(stripes.locks[0].try_write().is_none() && stripes.locks[1].try_write().is_some());
        drop((one, two));
        let all = stripes.exclusive(ByteRange::new(0, u64::MAX));
        assert!(stripes.locks.iter().all(|lock| lock.try_read().is_none()));
        drop(all);
        assert!(stripes.locks.iter().all(|lock| lock.try_write().is_some()));
    }
}
