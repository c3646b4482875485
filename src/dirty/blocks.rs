//! Which blocks of a dirty granule were written: a guest that writes 4 KiB here and there must not cost 64 KiB of copying each time.
//!
//! ```text
//! leaf     one for each 2^15 granules, made when a part of one of them is marked: a word of up to 16 blocks for each granule
//! word     a set bit: this block is the same on both images, whatever the granule's bit in the map says
//! ```
//!
//! A granule's bit in the map says *that* something differs; only its word says that some blocks do not. So a new leaf, all zeroes,
//! says nothing, and no leaf says nothing either: the whole granule is copied. Leaves stay.
//!
//! ```text
//! marker:  word &= !blocks -> set the granule's bit          copier:  clear the granule's bit (a claim) -> swap(word, all)
//! ```
//!
//! Invariants:
//! - **A marker clears blocks before it sets the bit; a copier takes blocks after it cleared the bit.** A copier that takes a block
//!   before its marker sets the bit reads the source after the write; the bit is then set for nothing.
//! - **Who finds no leaf needs none**: one that is made later begins with all that differs, and who takes that from it takes it later.
//! - A claim that fails gives back whole granules if it had taken their blocks.

use std::ops::Range;

use crate::range::{ByteRange, Granularity};
use crate::sync::OnceLock;
use crate::sync::atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst};

/// Granules of a leaf: 64 KiB of words. Fewer under the model checker, whose atomics are large.
const LEAF_GRANULES: u64 = if cfg!(shuttle) { 64 } else { 1 << 15 };
/// At most this many leaves (16 MiB, for 512 GiB of 64 KiB granules); the other granules are copied whole.
const LEAVES_MAX: usize = 256;

type Leaf = Box<[AtomicU16]>;

fn word(leaf: &Leaf, granule: u64) -> &AtomicU16 {
    &leaf[(granule % LEAF_GRANULES) as usize]
}

/// See the module.
pub(super) struct Blocks {
    disk: ByteRange,
    granules: u64,
    granule_bytes: u64,
    block_bytes: u64,
    leaves: Box<[OnceLock<Leaf>]>,
    /// How many may still be made.
    left: AtomicUsize,
}

impl Blocks {
    /// For a disk of `size_bytes` whose granules have 2 to 16 blocks of `block_bytes` each; `None`: they have fewer or more.
    pub(super) fn new(size_bytes: u64, granularity: Granularity, block_bytes: u64) -> Option<Blocks> {
        let (granules, granule_bytes) = (granularity.count(size_bytes), granularity.bytes());
        let fits = block_bytes.is_power_of_two() && (2..=16).contains(&(granule_bytes / block_bytes));
        let leaves = (0..granules.div_ceil(LEAF_GRANULES)).map(|_| OnceLock::new()).collect();
        fits.then(|| Blocks {
            disk: ByteRange::new(0, size_bytes),
            granules,
            granule_bytes,
            block_bytes,
            leaves,
            left: AtomicUsize::new(LEAVES_MAX),
        })
    }

    /// The word of a granule with all its blocks.
    fn all(&self) -> u16 {
        u16::MAX >> (16 - self.granule_bytes / self.block_bytes)
    }

    fn leaf(&self, granule: u64) -> Option<&Leaf> {
        self.leaves[(granule / LEAF_GRANULES) as usize].get()
    }

    /// Made if it is not there and there may be one.
    fn make_leaf(&self, granule: u64) -> Option<&Leaf> {
        let place = &self.leaves[(granule / LEAF_GRANULES) as usize];
        if place.get().is_none() {
            self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).ok()?;
            let mut made = false;
            place.get_or_init(|| {
                made = true;
                let first = granule - granule % LEAF_GRANULES;
                (first..self.granules.min(first + LEAF_GRANULES)).map(|_| AtomicU16::new(0)).collect()
            });
            if !made {
                self.left.fetch_add(1, SeqCst);
            }
        }
        place.get()
    }

    /// The blocks of `range` differ. To be called before the bits of `granules`, which are those that it touches, are set.
    pub(super) fn mark(&self, range: ByteRange, granules: &Range<u64>) {
        let mut at = granules.start;
        while at < granules.end {
            let whole = ByteRange::new(at * self.granule_bytes, self.granule_bytes).intersect(self.disk);
            if range.contains(whole) {
                // As many as there are in this leaf.
                let end = (at - at % LEAF_GRANULES + LEAF_GRANULES).min(granules.end);
                let end = if range.end() < self.disk.end() { end.min(range.end() / self.granule_bytes) } else { end };
                if let Some(leaf) = self.leaf(at) {
                    (at..end).for_each(|granule| word(leaf, granule).store(0, SeqCst));
                }
                at = end;
                continue;
            }
            if let Some(leaf) = self.make_leaf(at) {
                let part = range.intersect(whole);
                let first = (part.start() - whole.start()) / self.block_bytes;
                let end = (part.end() - whole.start()).div_ceil(self.block_bytes);
                word(leaf, at).fetch_and(!((u16::MAX >> (16 - (end - first))) << first), SeqCst);
            }
            at += 1;
        }
    }

    /// Takes the blocks of `granules` that differ and appends them to `parts`, in order, joined where there is no more than `gap_bytes`
    /// between two. To be called after the granules' bits were cleared, and before the source is read.
    pub(super) fn take(&self, granules: Range<u64>, gap_bytes: u64, parts: &mut Vec<ByteRange>) {
        let mut add = |start: u64, end: u64| match parts.last_mut() {
            Some(last) if start <= last.end() + gap_bytes => *last = ByteRange::from_bounds(last.start(), end),
            _ => parts.push(ByteRange::from_bounds(start, end)),
        };
        let mut granule = granules.start;
        while granule < granules.end {
            let start = granule * self.granule_bytes;
            let Some(leaf) = self.leaf(granule) else {
                let next = ((granule / LEAF_GRANULES + 1) * LEAF_GRANULES).min(granules.end);
                add(start, next * self.granule_bytes);
                granule = next;
                continue;
            };
            let mut blocks = !word(leaf, granule).swap(u16::MAX, SeqCst) & self.all();
            while blocks != 0 {
                let first = blocks.trailing_zeros();
                let count = (blocks >> first).trailing_ones();
                let from = start + u64::from(first) * self.block_bytes;
                add(from, from + u64::from(count) * self.block_bytes);
                blocks &= !((u16::MAX >> (16 - count)) << first);
            }
            granule += 1;
        }
    }
}
