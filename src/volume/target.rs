//! The target of a mirror, with a memory of what its last flush has not proven durable.
//!
//! A flush that failed says nothing about the writes before it, and a later one that succeeds does not heal that (Linux
//! reports a writeback error once). So every write is noted in a coarse set before it starts and again after it
//! returned; a flush that succeeds empties what was noted before it began; one that fails hands everything back, to be
//! copied again.
//!
//! ```text
//! write:  note in `current` -> write -> note in `current`
//! flush:  swap `current` and `flushing` -> flush -> ok: empty `flushing`;  failed: mark both in the dirty map
//! ```

use super::Change;
use crate::dirty::DirtyMap;
use crate::error::Result;
use crate::image::{CopyOffer, Image};
use crate::range::{ByteRange, Granularity, Granule};
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};
use crate::sync::{Arc, Mutex, RwLock};

/// The coarse unit of the memory: 1 MiB up to 1 TiB, so that the sets stay small; 64 MiB at most.
fn region_size(size_bytes: u64) -> Granularity {
    let wanted = (size_bytes >> 20).next_power_of_two().clamp(1 << 20, 64 << 20);
    Granularity::new(wanted).unwrap_or(Granularity::DEFAULT)
}

/// See the module.
#[derive(Debug)]
pub struct Target {
    image: Arc<dyn Image>,
    /// What the dirty map covers; a larger target is written up to here only.
    size_bytes: u64,
    unproven: RwLock<Unproven>,
    /// How many changes were begun.
    writes: AtomicU64,
    /// One flush at a time.
    flushing: Mutex<()>,
    /// How many flushes have failed.
    failed_flushes: AtomicU64,
}

#[derive(Debug)]
struct Unproven {
    current: Arc<DirtyMap>,
    flushing: Arc<DirtyMap>,
}

impl Target {
    /// A target for a disk of `size_bytes`, about which nothing is known.
    pub fn new(image: Arc<dyn Image>, size_bytes: u64) -> Self {
        let set = || DirtyMap::new(size_bytes, region_size(size_bytes));
        let unproven = RwLock::new(Unproven { current: set(), flushing: set() });
        Target {
            image,
            size_bytes,
            unproven,
            writes: AtomicU64::new(0),
            flushing: Mutex::new(()),
            failed_flushes: AtomicU64::new(0),
        }
    }

    /// The image itself, for everything but writing.
    pub fn image(&self) -> &Arc<dyn Image> {
        &self.image
    }

    /// The disk's size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// How many changes were begun so far: the same number before and after a flush means that it covered them all.
    pub fn write_count(&self) -> u64 {
        self.writes.load(SeqCst)
    }

    fn note(&self, range: ByteRange) {
        self.unproven.read().current.mark(range);
    }

    /// What is read back in `range` will be relied on as if it had been written now: it may be in the page cache only, and a flush
    /// that fails makes it dirty again too. Called before the reading.
    pub fn rely_on(&self, range: ByteRange) {
        self.writes.fetch_add(1, SeqCst);
        self.note(range);
    }

    /// Makes `change` on the target.
    ///
    /// # Errors
    /// The image's; what the range holds is then unknown.
    pub fn apply(&self, change: Change<'_>) -> Result<()> {
        self.changing(change.range(), |image| change.apply(image))
    }

    /// Writes what the copy has read, past the host's page cache where that is possible: guests do not read it.
    ///
    /// # Errors
    /// As [`Target::apply`].
    pub fn copy(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.changing(range, |image| image.write_once(offset, data))
    }

    /// Makes `range` of the target share the blocks of `source`, if the two images can.
    ///
    /// # Errors
    /// The image's; what the range holds is then unknown.
    pub fn share(&self, source: &dyn Image, range: ByteRange) -> Result<CopyOffer> {
        self.changing(range, |image| image.copy_range_from(source, range))
    }

    /// Notes before and after: a flush that runs meanwhile proves nothing about it.
    fn changing<T>(&self, range: ByteRange, change: impl FnOnce(&dyn Image) -> Result<T>) -> Result<T> {
        self.writes.fetch_add(1, SeqCst);
        self.note(range);
        let result = change(&*self.image);
        self.note(range);
        result
    }

    /// True once a flush has failed: what is read from the target proves nothing about what its store holds.
    pub fn is_distrusted(&self) -> bool {
        self.failed_flushes() > 0
    }

    /// How many flushes have failed so far, or connections were lost: the same number before a write and after a flush that succeeded
    /// means that the write is durable, whoever else has flushed meanwhile.
    pub fn failed_flushes(&self) -> u64 {
        self.failed_flushes.load(SeqCst)
    }

    /// Flushes. When that fails, every range written since the last success is marked in `map` before this returns.
    ///
    /// # Errors
    /// The image's.
    pub fn flush(&self, map: &DirtyMap) -> Result<()> {
        let _one = self.flushing.lock();
        {
            let mut unproven = self.unproven.write();
            let unproven = &mut *unproven;
            // `flushing` is empty unless the last flush failed, and then `distrust` has emptied both.
            std::mem::swap(&mut unproven.current, &mut unproven.flushing);
        }
        let result = self.image.flush();
        match &result {
            Ok(()) => {
                let flushed = self.unproven.read().flushing.clone();
                drain(&flushed, |_| ());
            }
            Err(_) => self.distrust(map),
        }
        result
    }

    /// Marks everything since the last successful flush in `map`: after a failed flush or a lost connection.
    pub fn distrust(&self, map: &DirtyMap) {
        // Before anything is dirty again: whoever copies it does not take what it reads back for proof.
        self.failed_flushes.fetch_add(1, SeqCst);
        let sets = {
            let unproven = self.unproven.read();
            [unproven.current.clone(), unproven.flushing.clone()]
        };
        for set in sets {
            drain(&set, |range| {
                map.mark(range.intersect(ByteRange::new(0, map.size_bytes())));
            });
        }
    }
}

/// Hands every noted range to `each`, then forgets it.
fn drain(set: &Arc<DirtyMap>, mut each: impl FnMut(ByteRange)) {
    while let Some(claim) = set.claim(Granule(0), u32::MAX) {
        each(claim.range());
        claim.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::faulty::{Effect, Fault, FaultyImage, Gate, Operation};
    use crate::image::memory::MemoryImage;

    #[test]
    fn a_failed_flush_makes_everything_since_the_last_good_one_dirty_again() {
        let faulty = FaultyImage::new(MemoryImage::new("target", 8 << 20));
        let target = Target::new(faulty.clone(), 8 << 20);
        let map = DirtyMap::new(8 << 20, Granularity::DEFAULT);
        target.apply(Change::Write { offset: 0, data: &[1; 4096] }).unwrap();
        target.flush(&map).unwrap();
        assert_eq!(map.dirty_granules(), 0);
        target.apply(Change::Write { offset: 3 << 20, data: &[1; 4096] }).unwrap();
        faulty.add(Fault::new(Operation::Flush, Effect::Fail(libc::EIO)).times(1));
        target.flush(&map).unwrap_err();
        assert!(!map.any_dirty(ByteRange::new(0, 1 << 20)), "what a good flush proved stays proven");
        assert!(map.any_dirty(ByteRange::new(3 << 20, 4096)));
        // The next flush succeeds and proves nothing about the earlier write: it must still be dirty.
        target.flush(&map).unwrap();
        assert!(map.any_dirty(ByteRange::new(3 << 20, 4096)));
    }

    #[test]
    fn a_flush_proves_nothing_about_a_write_that_was_under_way() {
        let faulty = FaultyImage::new(MemoryImage::new("target", 8 << 20));
        let target = Target::new(faulty.clone(), 8 << 20);
        let map = DirtyMap::new(8 << 20, Granularity::DEFAULT);
        let gate = Gate::new();
        faulty.add(Fault::new(Operation::Write, Effect::Before(gate.clone())).times(1));
        std::thread::scope(|scope| {
            scope.spawn(|| target.apply(Change::Write { offset: 0, data: &[1; 4096] }).unwrap());
            gate.wait_for_arrivals(1);
            target.flush(&map).unwrap();
            gate.open();
        });
        faulty.add(Fault::new(Operation::Flush, Effect::Fail(libc::EIO)).times(1));
        target.flush(&map).unwrap_err();
        assert!(map.any_dirty(ByteRange::new(0, 4096)));
    }
}
