//! A large set of bits in a tree: setting is lock-free, finding the next set bit skips what is empty, and empty parts take
//! no memory.
//!
//! ```text
//! root        summary: 1 bit for each directory      OnceLock<Directory> ...
//! Directory   summary: 1 bit for each leaf           OnceLock<Leaf> x 512
//! Leaf        summary: 1 bit for each word           word x 512             = 32768 bits, 4 KiB
//! ```
//!
//! With granules of 64 KiB a leaf covers 2 GiB and a directory 1 TiB. A tree for 16 TiB starts with 16 slots; wholly set it
//! takes 32 MiB and 2 % more.
//!
//! Invariants:
//! - **A summary bit is set whenever anything below it is**, as seen by whoever has the [`Turn`]. Setters go upwards (word, leaf,
//!   directory, root) and touch a summary only if it is not set. Clearers go upwards too, and look again after lowering:
//!
//!   ```text
//!   setter:   word |= bit          clearer:  word &= !bits  (now 0)
//!             summary set?                   summary &= !bit
//!             no: summary |= bit             word != 0?  yes: summary |= bit
//!   ```
//!   All of it is sequentially consistent. Either the setter looks at the summary after the clearer lowered it, and raises it; or
//!   before, and then its bit was in the word when the clearer looked again. Between lowering and looking again a set bit may
//!   be hidden: that is why finders and clearers take turns (the turn lives in a mutex), and setters need not. The reverse,
//!   a summary bit with nothing below, remains where a setter raised it after its bit was cleared; finders look and go on.
//! - **[`BitTree::count`] is never less than the number of set bits.** A setter adds before it sets and takes back what was set already;
//!   a clearer subtracts after it cleared. With nobody at work it is exact.
//!
//! Which parts of a granule differ is `blocks`' affair.

use crate::sync::OnceLock;
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};

const WORD_BITS: u64 = 64;
/// Children of a node. Smaller under the model checker, whose atomics are large.
const FANOUT: usize = if cfg!(shuttle) { 64 } else { 512 };
pub(super) const LEAF_BITS: u64 = FANOUT as u64 * WORD_BITS;

struct Leaf {
    words: [AtomicU64; FANOUT],
    summary: [AtomicU64; FANOUT / 64],
}

struct Directory {
    leaves: [OnceLock<Box<Leaf>>; FANOUT],
    summary: [AtomicU64; FANOUT / 64],
}

/// The right to clear bits and to search: there is one for each tree.
pub(super) struct Turn(());

/// See the module.
pub(super) struct BitTree {
    bits: u64,
    count: AtomicU64,
    directories: Box<[OnceLock<Box<Directory>>]>,
    summary: Box<[AtomicU64]>,
}

/// The part of a range that lies in one leaf.
#[derive(Clone, Copy)]
struct Segment {
    directory: usize,
    leaf: usize,
    /// Bits within the leaf.
    first: u64,
    end: u64,
    /// The number of the leaf's first bit.
    base: u64,
}

impl Segment {
    fn of(start: u64, end: u64) -> Segment {
        let leaf = start / LEAF_BITS;
        let base = leaf * LEAF_BITS;
        Segment {
            directory: index(leaf / FANOUT as u64),
            leaf: index(leaf % FANOUT as u64),
            first: start - base,
            end: (end - base).min(LEAF_BITS),
            base,
        }
    }

    /// The words that it touches, each with the mask of the bits that belong to it.
    fn words(self) -> impl Iterator<Item = (usize, u64)> {
        let last = (self.end - 1) / WORD_BITS;
        (self.first / WORD_BITS..=last).map(move |word| {
            let from = self.first.max(word * WORD_BITS) - word * WORD_BITS;
            let to = self.end.min((word + 1) * WORD_BITS) - word * WORD_BITS;
            (index(word), mask(from, to))
        })
    }
}

impl BitTree {
    /// `bits` bits, all clear.
    pub(super) fn new(bits: u64) -> (BitTree, Turn) {
        let directories = index(bits.div_ceil(LEAF_BITS * FANOUT as u64));
        let tree = BitTree {
            bits,
            count: AtomicU64::new(0),
            directories: (0..directories).map(|_| OnceLock::new()).collect(),
            summary: (0..directories.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        };
        (tree, Turn(()))
    }

    /// How many bits are set: never too low, and exact while nobody sets or clears.
    pub(super) fn count(&self) -> u64 {
        self.count.load(SeqCst)
    }

    /// True if bit `at` is set. Takes no turn.
    pub(super) fn get(&self, at: u64) -> bool {
        let segment = Segment::of(at, at + 1);
        let word = |leaf: &Leaf| leaf.words[index(segment.first / WORD_BITS)].load(SeqCst);
        at < self.bits && self.leaf(segment).is_some_and(|leaf| word(leaf) & (1 << (at % WORD_BITS)) != 0)
    }

    /// Sets the bits `start..end` and returns how many were clear before. Takes no turn; waits for nobody, but for another
    /// thread that allocates the same leaf.
    pub(super) fn set(&self, start: u64, end: u64) -> u64 {
        debug_assert!(start >= end || end <= self.bits);
        let mut newly = 0;
        let mut at = start;
        while at < end {
            let segment = Segment::of(at, end);
            newly += self.set_in_leaf(segment);
            at = segment.base + segment.end;
        }
        newly
    }

    fn set_in_leaf(&self, segment: Segment) -> u64 {
        let directory = self.directories[segment.directory].get_or_init(|| Box::new(Directory::new()));
        let leaf = directory.leaves[segment.leaf].get_or_init(|| Box::new(Leaf::new()));
        let newly = if leaf.all_set(segment) { 0 } else { self.set_words(leaf, segment) };
        // Summaries even when nothing was new: whoever set the bits may not have come this far yet.
        raise(&leaf.summary, index(segment.first / WORD_BITS), index((segment.end - 1) / WORD_BITS) + 1);
        raise(&directory.summary, segment.leaf, segment.leaf + 1);
        raise(&self.summary, segment.directory, segment.directory + 1);
        newly
    }

    fn set_words(&self, leaf: &Leaf, segment: Segment) -> u64 {
        let asked = segment.end - segment.first;
        self.count.fetch_add(asked, SeqCst);
        let newly = segment.words().map(|(word, mask)| ones(mask & !leaf.words[word].fetch_or(mask, SeqCst))).sum();
        if newly < asked {
            self.count.fetch_sub(asked - newly, SeqCst);
        }
        newly
    }

    /// The first set bit at or after `from`.
    pub(super) fn next(&self, from: u64, _turn: &Turn) -> Option<u64> {
        if from >= self.bits {
            return None;
        }
        let start = Segment::of(from, from + 1);
        let in_leaf = |leaf: &Leaf, segment: Segment, first| Some(segment.base + leaf.next(first)?);
        if let Some(found) = self.leaf(start).and_then(|leaf| in_leaf(leaf, start, start.first)) {
            return Some(found);
        }
        let mut directory_at = start.directory;
        let mut leaf_from = start.leaf + 1;
        loop {
            directory_at = find(&self.summary, directory_at)?;
            let directory = self.directories[directory_at].get()?;
            if directory_at > start.directory {
                leaf_from = 0;
            }
            while let Some(leaf_at) = find(&directory.summary, leaf_from) {
                let leaf_number = (directory_at * FANOUT + leaf_at) as u64;
                let segment = Segment::of(leaf_number * LEAF_BITS, leaf_number * LEAF_BITS + 1);
                // A setter raises its summary bits one after the other, so a leaf that is announced may hold nothing yet.
                if let Some(found) = self.leaf(segment).and_then(|leaf| in_leaf(leaf, segment, 0)) {
                    return Some(found);
                }
                leaf_from = leaf_at + 1;
            }
            directory_at += 1;
        }
    }

    /// Clears the set bits from `start` on, up to the first clear one or `end`, and returns where that is.
    pub(super) fn take_run(&self, start: u64, end: u64, turn: &mut Turn) -> u64 {
        let mut at = start;
        while at < end {
            let segment = Segment::of(at, end);
            let taken = self.clear_in_leaf(segment, true, turn);
            at += taken;
            if at < segment.base + segment.end {
                break;
            }
        }
        at
    }

    /// Clears the bits `start..end` and returns how many were set.
    pub(super) fn clear(&self, start: u64, end: u64, turn: &mut Turn) -> u64 {
        let mut cleared = 0;
        let mut at = start;
        while let Some(found) = self.next(at, turn).filter(|&found| found < end) {
            let segment = Segment::of(found, end);
            cleared += self.clear_in_leaf(segment, false, turn);
            at = segment.base + segment.end;
        }
        cleared
    }

    /// Clears the segment's bits, only the run of set ones at its start if `run_only`. Returns how many were cleared.
    fn clear_in_leaf(&self, segment: Segment, run_only: bool, _turn: &mut Turn) -> u64 {
        let Some(directory) = self.directories[segment.directory].get() else { return 0 };
        let Some(leaf) = directory.leaves[segment.leaf].get() else { return 0 };
        let mut cleared = 0;
        let mut emptied = [0_u64; FANOUT / 64];
        for (word, mask) in segment.words() {
            let set = leaf.words[word].load(SeqCst);
            let take = if run_only { run_at_start(set, mask) } else { set & mask };
            if take != 0 {
                // Only this turn clears, so that all of `take` is still set.
                let before = leaf.words[word].fetch_and(!take, SeqCst);
                cleared += ones(take);
                if before & !take == 0 {
                    emptied[word / 64] |= 1 << (word % 64);
                }
            }
            if run_only && take != mask {
                break;
            }
        }
        for (at, emptied) in emptied.into_iter().enumerate().filter(|(_, emptied)| *emptied != 0) {
            lower(&leaf.summary[at], emptied, |bit| leaf.words[at * 64 + bit].load(SeqCst) != 0);
        }
        if !any(&leaf.summary) {
            lower(&directory.summary[segment.leaf / 64], 1 << (segment.leaf % 64), |_| any(&leaf.summary));
        }
        if !any(&directory.summary) {
            let bit = 1 << (segment.directory % 64);
            lower(&self.summary[segment.directory / 64], bit, |_| any(&directory.summary));
        }
        self.count.fetch_sub(cleared, SeqCst);
        cleared
    }

    fn leaf(&self, segment: Segment) -> Option<&Leaf> {
        self.directories.get(segment.directory)?.get()?.leaves[segment.leaf].get().map(|leaf| &**leaf)
    }

    /// True if no summary hides a set bit and the count is exact. For tests, with nobody at work.
    #[cfg(test)]
    pub(super) fn is_consistent(&self) -> bool {
        let is_set = |summary: &[AtomicU64], at: usize| summary[at / 64].load(SeqCst) & (1 << (at % 64)) != 0;
        let mut total = 0;
        let mut good = true;
        for (at, directory) in self.directories.iter().enumerate() {
            let Some(directory) = directory.get() else { continue };
            good &= !any(&directory.summary) || is_set(&self.summary, at);
            for (at, leaf) in directory.leaves.iter().enumerate() {
                let Some(leaf) = leaf.get() else { continue };
                good &= !any(&leaf.summary) || is_set(&directory.summary, at);
                for (at, word) in leaf.words.iter().enumerate() {
                    let word = word.load(SeqCst);
                    good &= word == 0 || is_set(&leaf.summary, at);
                    total += ones(word);
                }
            }
        }
        good && total == self.count()
    }
}

impl Leaf {
    fn new() -> Self {
        Leaf { words: std::array::from_fn(|_| AtomicU64::new(0)), summary: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// True if the segment lies in one word and all of it is set: the case of a hot spot, for which nothing is counted. The
    /// exchange of a value for itself orders this look like a write, so that a clearer that comes later sees what the
    /// caller did before.
    fn all_set(&self, segment: Segment) -> bool {
        let mut words = segment.words();
        let (Some((word, mask)), None) = (words.next(), words.next()) else { return false };
        let word = &self.words[word];
        let set = word.load(SeqCst);
        set & mask == mask && word.compare_exchange(set, set, SeqCst, SeqCst).is_ok()
    }

    /// The first set bit at or after `from`, within the leaf.
    fn next(&self, from: u64) -> Option<u64> {
        let bit_in = |word: usize, set: u64| word as u64 * WORD_BITS + u64::from(set.trailing_zeros());
        let first = index(from / WORD_BITS);
        let set = self.words[first].load(SeqCst) & mask(from % WORD_BITS, WORD_BITS);
        if set != 0 {
            return Some(bit_in(first, set));
        }
        let mut word = first + 1;
        loop {
            word = find(&self.summary, word)?;
            let set = self.words[word].load(SeqCst);
            if set != 0 {
                return Some(bit_in(word, set));
            }
            word += 1;
        }
    }
}

impl Directory {
    fn new() -> Self {
        Directory {
            leaves: std::array::from_fn(|_| OnceLock::new()),
            summary: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

/// Sets the bits `start..end` of a summary, touching only words in which one is clear.
fn raise(summary: &[AtomicU64], start: usize, end: usize) {
    for (at, word) in summary.iter().enumerate().take(end.div_ceil(64)).skip(start / 64) {
        let bits = mask((start.max(at * 64) - at * 64) as u64, (end.min(at * 64 + 64) - at * 64) as u64);
        if word.load(SeqCst) & bits != bits {
            word.fetch_or(bits, SeqCst);
        }
    }
}

/// Clears `bits` of a word of a summary, then looks again: those for which `still_set` are set again.
fn lower(summary: &AtomicU64, bits: u64, still_set: impl Fn(usize) -> bool) {
    summary.fetch_and(!bits, SeqCst);
    let mut rest = bits;
    let mut regained = 0;
    while rest != 0 {
        let bit = rest.trailing_zeros();
        rest &= rest - 1;
        if still_set(bit as usize) {
            regained |= 1 << bit;
        }
    }
    if regained != 0 {
        summary.fetch_or(regained, SeqCst);
    }
}

fn any(summary: &[AtomicU64]) -> bool {
    summary.iter().any(|word| word.load(SeqCst) != 0)
}

/// The first set bit of a summary at or after `from`.
fn find(summary: &[AtomicU64], from: usize) -> Option<usize> {
    let mut wanted = mask((from % 64) as u64, 64);
    for (at, word) in summary.iter().enumerate().skip(from / 64) {
        let set = word.load(SeqCst) & wanted;
        if set != 0 {
            return Some(at * 64 + set.trailing_zeros() as usize);
        }
        wanted = u64::MAX;
    }
    None
}

/// The bits `from..to` of a word. `from < to <= 64`.
const fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX >> (WORD_BITS - (to - from))) << from
}

/// The set bits of `set` that follow each other from the lowest bit of `mask` on, within `mask`.
fn run_at_start(set: u64, mask: u64) -> u64 {
    let first = mask.trailing_zeros();
    match (set >> first).trailing_ones() {
        0 => 0,
        run => (u64::MAX >> (64 - run)) << first & mask,
    }
}

fn ones(word: u64) -> u64 {
    u64::from(word.count_ones())
}

/// Bit numbers are bounded by the tree's size, which was allocated: they fit.
#[expect(clippy::cast_possible_truncation, reason = "64-bit hosts only; checked by the allocation of the tree")]
const fn index(number: u64) -> usize {
    number as usize
}
