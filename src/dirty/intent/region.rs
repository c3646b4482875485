//! What is known of each region in memory: its state, how many writes are in flight in it, and when the last one ended.
//!
//! ```text
//!            first write            log thread: durable            retirer: nothing in flight
//!   Clear ───────────────> Setting ─────────────────────> Set <─────────────────────────────> Retiring
//!     ^                       ^                                a write, or something is dirty     │
//!     │ log thread: durable   │ a write                                                           │ flushed;
//!     └────────────────── Clearing <──────────────────────────────────────────────────────────────┘ log thread
//! ```
//!
//! State and count share one word, so that a write that counts itself learns the state at the same instant, and a region whose
//! writes are all done leaves `Set` or `Retiring` in one step or not at all.
//!
//! - Whoever is counted in a `Set` region keeps it so: `Retiring` and `Clearing` are entered with a count of zero only.
//! - `Setting` and `Clear` are entered, and the bit in [`Regions::marked`] changes, under the log's lock only.
//! - A page of regions that nobody has touched is not there: then the bit tells `Set` from `Clear`.

use crate::sync::OnceLock;
use crate::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

use super::format::Layout;

/// Regions that are allocated together: 4 KiB of memory. Fewer under the model checker, whose atomics are large.
const PAGE: usize = if cfg!(shuttle) { 64 } else { 512 };
const STATE_SHIFT: u32 = 29;
const COUNT_MASK: u32 = (1 << STATE_SHIFT) - 1;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The bit is clear, and durably so.
    Clear,
    /// Asked for; the log thread has not made it durable yet.
    Setting,
    /// The bit is durable.
    Set,
    /// Still durable; nothing was in flight or dirty, and both images are being flushed.
    Retiring,
    /// Being cleared: what is on the disk is unknown.
    Clearing,
}

impl State {
    const ALL: [State; 5] = [State::Clear, State::Setting, State::Set, State::Retiring, State::Clearing];

    fn of(word: u32) -> State {
        State::ALL[(word >> STATE_SHIFT) as usize]
    }

    fn word(self) -> u32 {
        (self as u32) << STATE_SHIFT
    }
}

/// One region. See the module.
#[derive(Debug)]
pub(super) struct Region {
    word: AtomicU32,
    /// Coarse seconds at the end of the last write, 0 if there was none.
    written: AtomicU32,
}

impl Region {
    fn new(state: State) -> Region {
        Region { word: AtomicU32::new(state.word()), written: AtomicU32::new(0) }
    }

    /// Counts a write in. True if the region's bit is durable, and stays so until the write leaves.
    pub(super) fn enter(&self) -> bool {
        match State::of(self.word.fetch_add(1, SeqCst)) {
            State::Set => true,
            State::Retiring => self.change(State::Retiring, State::Set) || self.state() == State::Set,
            State::Clear | State::Setting | State::Clearing => false,
        }
    }

    /// Counts a write out that ended at `now`.
    pub(super) fn leave(&self, now: u32) {
        // Before the count falls: whoever sees it at zero sees the time too.
        self.written.store(now, SeqCst);
        self.word.fetch_sub(1, SeqCst);
    }

    pub(super) fn state(&self) -> State {
        State::of(self.word.load(SeqCst))
    }

    /// How many writes are in flight here.
    #[cfg(all(test, not(shuttle)))]
    pub(super) fn entered(&self) -> u32 {
        self.word.load(SeqCst) & COUNT_MASK
    }

    /// From state to state, whatever the count. False: it was in another state.
    pub(super) fn change(&self, from: State, to: State) -> bool {
        let moved = |word| (State::of(word) == from).then_some(word & COUNT_MASK | to.word());
        self.word.fetch_update(SeqCst, SeqCst, moved).is_ok()
    }

    /// From state to state while nothing is in flight. False: something was, or it was in another state.
    pub(super) fn change_idle(&self, from: State, to: State) -> bool {
        self.word.compare_exchange(from.word(), to.word(), SeqCst, SeqCst).is_ok()
    }
}

type Page = [Region; PAGE];

/// All regions of a disk. See the module.
pub(super) struct Regions {
    pages: Box<[OnceLock<Box<Page>>]>,
    /// A bit for each region: clear in the states `Clear` and `Clearing`, set in the others.
    marked: Box<[AtomicU64]>,
    marked_count: AtomicU32,
}

impl Regions {
    /// Those whose bit is set in `marked` are `Set`, the others `Clear`.
    pub(super) fn new(layout: Layout, marked: &[u64]) -> Regions {
        Regions {
            pages: (0..(layout.regions() as usize).div_ceil(PAGE)).map(|_| OnceLock::new()).collect(),
            marked: marked.iter().map(|&word| AtomicU64::new(word)).collect(),
            marked_count: AtomicU32::new(marked.iter().map(|word| word.count_ones()).sum()),
        }
    }

    /// The region of that number, which must be one of the disk's.
    pub(super) fn get(&self, region: u32) -> &Region {
        let at = region as usize;
        let page = self.pages[at / PAGE].get().unwrap_or_else(|| self.allocate(at / PAGE));
        &page[at % PAGE]
    }

    /// Coarse seconds at which a write was last under way in the region, as far as is known at `now`; 0: never.
    pub(super) fn written(&self, region: u32, now: u32) -> u32 {
        let page = self.pages[region as usize / PAGE].get();
        match page.map(|page| &page[region as usize % PAGE]) {
            Some(region) if region.word.load(SeqCst) & COUNT_MASK > 0 => now,
            Some(region) => region.written.load(SeqCst),
            None => 0,
        }
    }

    #[cold]
    #[expect(clippy::borrowed_box, reason = "what the cell holds")]
    fn allocate(&self, page: usize) -> &Box<Page> {
        // Looked at before: should another thread be faster, this is thrown away, and until then nobody changes a bit here.
        let words: [u64; PAGE / 64] =
            std::array::from_fn(|at| self.marked.get(page * PAGE / 64 + at).map_or(0, |word| word.load(SeqCst)));
        let state = |at: usize| if words[at / 64] >> (at % 64) & 1 == 1 { State::Set } else { State::Clear };
        self.pages[page].get_or_init(|| Box::new(std::array::from_fn(|at| Region::new(state(at)))))
    }

    /// Sets the region's bit. Under the log's lock only.
    pub(super) fn mark(&self, region: u32) {
        if self.marked[region as usize / 64].fetch_or(1 << (region % 64), SeqCst) >> (region % 64) & 1 == 0 {
            self.marked_count.fetch_add(1, Relaxed);
        }
    }

    /// Clears the region's bit. Under the log's lock only.
    pub(super) fn unmark(&self, region: u32) {
        if self.marked[region as usize / 64].fetch_and(!(1 << (region % 64)), SeqCst) >> (region % 64) & 1 == 1 {
            self.marked_count.fetch_sub(1, Relaxed);
        }
    }

    /// How many bits are set.
    pub(super) fn marked_count(&self) -> u32 {
        self.marked_count.load(Relaxed)
    }

    /// The bits of word `at`.
    pub(super) fn marked_word(&self, at: usize) -> u64 {
        self.marked[at].load(SeqCst)
    }

    /// The regions whose bit is set, in order, as seen in passing. Skips 64 clear ones at a time.
    pub(super) fn marked(&self) -> impl Iterator<Item = u32> + '_ {
        (0_u32..).zip(&self.marked).flat_map(|(at, word)| {
            let mut rest = word.load(SeqCst);
            std::iter::from_fn(move || {
                let bit = rest.trailing_zeros();
                rest &= rest.wrapping_sub(1);
                (bit < 64).then_some(at * 64 + bit)
            })
        })
    }
}
