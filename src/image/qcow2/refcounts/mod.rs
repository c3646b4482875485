//! Which clusters of the file are in use, and which a write may take.
//!
//! Clusters are *reserved* many at a time: their refcounts become 1, their old content goes, and that is durable before one of them
//! is referred to. So the refcounts on disk are never lower than the references, whatever is killed or loses power when:
//!
//! ```text
//!   free --reserve, sync--> reserved (counts 1, unused: a leak after a crash) --take--> in use
//!    ^                                                                                   |
//!    `---- refcount lowered, punched <---- sync <---- given up (its reference is gone) <-'
//! ```
//!
//! A cluster that was given up counts as used until the loss of its reference is durable: a power cut may bring the
//! reference back. After a sync that failed nothing is known of what it should have made durable: those clusters stay leaked.
//!
//! What is reserved and not used is given back when the image is closed.
//!
//! `reserve.rs` has the first arrow of the drawing, `blocks.rs` the numbers in the file.

mod blocks;
mod reserve;

use self::reserve::RESERVE_BYTES_MIN;
use super::counts::Width;
use super::damaged;
use super::header::Header;
use super::host::{Host, in_memory};
use super::occupied::Occupied;
use crate::error::Result;
use crate::range::ByteRange;
use crate::sync::{Arc, Mutex};

/// More runs that were given up than this, and whoever adds one syncs and frees them: no guest that never flushes fills memory.
pub(super) const GIVEN_UP_MAX: usize = 4096;

/// Clusters in a row, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clusters {
    pub(super) first: u64,
    pub(super) count: u64,
}

/// Clusters that a write has taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) clusters: Clusters,
    /// They are known to read as zeroes, after a power cut too.
    pub(super) zeroed: bool,
}

/// The refcounts of one file.
#[derive(Debug)]
pub(super) struct Refcounts {
    cluster_bits: u32,
    width: Width,
    state: Mutex<State>,
    /// Shared with who knows the other tables.
    occupied: Arc<Occupied>,
}

#[derive(Debug)]
struct State {
    table_offset: u64,
    /// Places of the refcount blocks; 0: there is none, all of its clusters are free.
    table: Vec<u64>,
    /// No cluster before this one is free.
    cursor: u64,
    reserved: Vec<Taken>,
    reserve_next: u64,
    /// In the order in which they were given up.
    given_up: Vec<Clusters>,
}

impl Refcounts {
    /// Reads the refcount table; not for an image that is only read. All other tables are in `occupied`.
    ///
    /// # Errors
    /// Those of reading; tables that overlap.
    pub(super) fn read(host: &Host, header: &Header, writable: bool, occupied: Arc<Occupied>) -> Result<Self> {
        let entries = in_memory(u64::from(header.refcount_table_clusters) * header.cluster_bytes() / 8);
        let table = if writable { host.read_numbers(header.refcount_table_offset, entries)? } else { Vec::new() };
        for entry in &table {
            if entry % header.cluster_bytes() != 0 {
                return Err(damaged(host.name(), "an entry of the refcount table does not point to a cluster"));
            }
        }
        let place = header.refcount_table_place();
        occupied.add(place);
        if writable {
            let blocks = table.iter().copied().filter(|offset| *offset != 0);
            occupied.add_all(blocks.clone());
            let blocks = blocks.map(|offset| ByteRange::new(offset, header.cluster_bytes()));
            for place in [header.place(), header.l1_place(), place].into_iter().chain(blocks) {
                occupied.refuse_shared(host.name(), place)?;
            }
        }
        let state = State {
            table_offset: header.refcount_table_offset,
            table,
            cursor: 0,
            reserved: Vec::new(),
            reserve_next: RESERVE_BYTES_MIN >> header.cluster_bits,
            given_up: Vec::new(),
        };
        Ok(Refcounts {
            cluster_bits: header.cluster_bits,
            width: Width::new(header.refcount_order),
            state: Mutex::new(state),
            occupied,
        })
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// A refcount block counts so many clusters.
    fn per_block(&self) -> u64 {
        self.width.fit(self.cluster_bytes())
    }

    fn table_clusters(&self, state: &State) -> Clusters {
        let count = (state.table.len() as u64 * 8).div_ceil(self.cluster_bytes());
        Clusters { first: state.table_offset >> self.cluster_bits, count }
    }

    fn place(&self, clusters: Clusters) -> ByteRange {
        ByteRange::new(clusters.first << self.cluster_bits, clusters.count << self.cluster_bits)
    }

    /// Takes up to `count` clusters in a row, one at least.
    ///
    /// # Errors
    /// No room; then nothing was taken.
    pub(super) fn take(&self, host: &Host, count: u64) -> Result<Taken> {
        let mut state = self.state.lock();
        if state.reserved.is_empty() {
            self.reserve(host, &mut state, 1)?;
        }
        // The lowest first: what is left at the end can be cut off.
        let first = state.reserved.first_mut().expect("there is something reserved");
        let clusters = Clusters { first: first.clusters.first, count: count.min(first.clusters.count) };
        let taken = Taken { clusters, zeroed: first.zeroed };
        first.clusters.first += clusters.count;
        first.clusters.count -= clusters.count;
        if first.clusters.count == 0 {
            state.reserved.remove(0);
        }
        Ok(taken)
    }

    /// Takes exactly `count` clusters in a row, for a table that must be in one piece.
    pub(super) fn take_row(&self, host: &Host, count: u64) -> Result<Taken> {
        let mut state = self.state.lock();
        let position = match state.reserved.iter().position(|taken| taken.clusters.count >= count) {
            Some(position) => position,
            None => {
                let row = self.reserve_at_end(host, &mut state, count)?;
                state.reserved.push(row);
                state.reserved.len() - 1
            }
        };
        let found = &mut state.reserved[position];
        let taken = Taken { clusters: Clusters { first: found.clusters.first, count }, zeroed: found.zeroed };
        found.clusters.first += count;
        found.clusters.count -= count;
        if found.clusters.count == 0 {
            state.reserved.remove(position);
        }
        Ok(taken)
    }

    /// Gives back what was taken and never referred to.
    pub(super) fn untake(&self, host: &Host, clusters: Clusters) {
        if clusters.count > 0 {
            host.forget_metadata(self.place(clusters));
            self.state.lock().reserved.push(Taken { clusters, zeroed: false });
        }
    }

    /// One reference to each of these clusters is gone from the tables. True: so many wait that they should be freed now.
    pub(super) fn give_up(&self, clusters: Clusters) -> bool {
        let mut state = self.state.lock();
        match state.given_up.last_mut() {
            Some(last) if last.first + last.count == clusters.first => last.count += clusters.count,
            _ => state.given_up.push(clusters),
        }
        state.given_up.len() > GIVEN_UP_MAX
    }

    /// Syncs the file, and frees what was given up before.
    ///
    /// # Errors
    /// Those of the sync. That a cluster cannot be freed is no error, it stays leaked.
    pub(super) fn sync(&self, host: &Host) -> Result<()> {
        self.free_after(host, Host::sync)
    }

    /// As `sync`, for whoever asks that all acknowledged writes be durable.
    pub(super) fn flush(&self, host: &Host) -> Result<()> {
        self.free_after(host, Host::flush)
    }

    fn free_after(&self, host: &Host, sync: impl FnOnce(&Host) -> Result<()>) -> Result<()> {
        let given_up = std::mem::take(&mut self.state.lock().given_up);
        sync(host)?;
        if given_up.is_empty() {
            return Ok(());
        }
        let mut state = self.state.lock();
        for clusters in given_up {
            if let Err(error) = self.lower(host, &mut state, clusters) {
                log::warn!("{error}; some clusters of the file are leaked");
                break;
            }
        }
        Ok(())
    }

    /// Frees everything that was reserved, and cuts the file's unused end off. The image can still be used afterwards.
    pub(super) fn settle(&self, host: &Host) -> Result<()> {
        {
            let state = self.state.lock();
            if state.reserved.is_empty() && state.given_up.is_empty() {
                return Ok(());
            }
        }
        self.sync(host)?;
        let mut state = self.state.lock();
        for taken in std::mem::take(&mut state.reserved) {
            self.lower(host, &mut state, taken.clusters)?;
        }
        let end = self.end_of_use(host, &state)? << self.cluster_bits;
        host.cut_to(end.max(self.occupied.end()))?;
        drop(state);
        host.sync()
    }

    /// One past the last cluster that is in use.
    fn end_of_use(&self, host: &Host, state: &State) -> Result<u64> {
        let last =
            (host.len_bytes().div_ceil(self.cluster_bytes()) / self.per_block() + 1).min(state.table.len() as u64);
        for index in (0..last).rev() {
            if let Some(block) = self.block(host, state, index)? {
                if let Some(used) = (0..self.per_block()).rev().find(|at| self.width.get(&block, *at) > 0) {
                    return Ok(index * self.per_block() + used + 1);
                }
            }
        }
        Err(damaged(host.name(), "no cluster is in use"))
    }
}
