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

use super::counts::Width;
use super::damaged;
use super::header::Header;
use super::host::{Host, in_memory};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::{Mutex, RwLock};

/// The first reservation; each is twice the one before, up to the maximum.
const RESERVE_BYTES_MIN: u64 = 16 << 20;
const RESERVE_BYTES_MAX: u64 = 1 << 30;
const RESERVE_CLUSTERS_MIN: u64 = 8;
const RESERVE_CLUSTERS_MAX: u64 = 16 << 10;
/// More runs that were given up than this, and whoever adds one syncs and frees them: no guest that never flushes fills memory.
pub(super) const GIVEN_UP_MAX: usize = 4096;
/// QEMU's bound for the refcount table.
const TABLE_ENTRIES_MAX: usize = 1 << 20;

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
    /// Where the refcount table is now. Apart from the rest, which is held during syncs.
    table_place: RwLock<ByteRange>,
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
    /// Reads the refcount table; not for an image that is only read.
    pub(super) fn read(host: &Host, header: &Header, writable: bool) -> Result<Self> {
        let entries = in_memory(u64::from(header.refcount_table_clusters) * header.cluster_bytes() / 8);
        let table = if writable { host.read_numbers(header.refcount_table_offset, entries)? } else { Vec::new() };
        for entry in &table {
            if entry % header.cluster_bytes() != 0 {
                return Err(damaged(host.name(), "an entry of the refcount table does not point to a cluster"));
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
            table_place: RwLock::new(header.refcount_table_place()),
        })
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// A refcount block counts so many clusters.
    fn per_block(&self) -> u64 {
        self.width.fit(self.cluster_bytes())
    }

    /// Where the refcount table is now: no cluster of data.
    pub(super) fn table_place(&self) -> ByteRange {
        *self.table_place.read()
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
        let end = self.end_of_use(host, &state)?;
        host.cut_to(end << self.cluster_bits)?;
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

    /// Reserves clusters: as many as are due, `count` at least.
    fn reserve(&self, host: &Host, state: &mut State, count: u64) -> Result<()> {
        let bounds = (RESERVE_CLUSTERS_MIN, RESERVE_CLUSTERS_MAX.min((RESERVE_BYTES_MAX >> self.cluster_bits).max(8)));
        let wanted = state.reserve_next.clamp(bounds.0, bounds.1).max(count);
        state.reserve_next = (state.reserve_next * 2).min(bounds.1);
        let (mut found, mut left) = (Vec::new(), wanted);
        while left > 0 {
            let runs = self.reserve_in_block(host, state, left)?;
            for run in runs {
                left -= run.count;
                found.push(run);
            }
        }
        state.reserved.extend(self.make_durable(host, &found)?);
        Ok(())
    }

    /// Reserves free clusters of the block that the cursor is in, and moves the cursor past them.
    fn reserve_in_block(&self, host: &Host, state: &mut State, limit: u64) -> Result<Vec<Clusters>> {
        let per_block = self.per_block();
        let from = state.cursor;
        let index = from / per_block;
        self.ensure_block(host, state, index)?;
        let mut block =
            self.block(host, state, index)?.ok_or_else(|| damaged(host.name(), "a refcount block is gone"))?;
        let mut found: Vec<Clusters> = Vec::new();
        let mut left = limit;
        let mut at = from % per_block;
        while at < per_block && left > 0 {
            if self.width.get(&block, at) == 0 {
                self.width.set(&mut block, at, 1);
                let cluster = index * per_block + at;
                match found.last_mut() {
                    Some(last) if last.first + last.count == cluster => last.count += 1,
                    _ => found.push(Clusters { first: cluster, count: 1 }),
                }
                left -= 1;
            }
            at += 1;
        }
        if let (Some(first), Some(last)) = (found.first(), found.last()) {
            let bytes = self.width.bytes(first.first % per_block, last.first % per_block + last.count);
            host.write_metadata(state.table[in_memory(index)] + bytes.start as u64, &block[bytes])?;
        }
        // A block made on the way may have moved the table, and freed clusters before this one.
        state.cursor =
            if state.cursor == from { index * per_block + at } else { state.cursor.min(index * per_block + at) };
        Ok(found)
    }

    /// Reserves `count` clusters in a row past everything that the refcounts know to be in use.
    fn reserve_at_end(&self, host: &Host, state: &mut State, count: u64) -> Result<Taken> {
        let mut first = host.len_bytes().div_ceil(self.cluster_bytes());
        let mut at = first;
        while at < first + count {
            let index = at / self.per_block();
            // A block that is made for the row lies in it: then the row begins after it.
            self.ensure_block(host, state, index)?;
            let mut block =
                self.block(host, state, index)?.ok_or_else(|| damaged(host.name(), "a refcount block is gone"))?;
            let within = at % self.per_block();
            if self.width.get(&block, within) > 0 {
                self.lower(host, state, Clusters { first, count: at - first })?;
                at += 1;
                first = at;
                continue;
            }
            self.width.set(&mut block, within, 1);
            let bytes = self.width.bytes(within, within + 1);
            let written = host.write_metadata(state.table[in_memory(index)] + bytes.start as u64, &block[bytes]);
            if let Err(error) = written {
                // For another try. Where that cannot be written either, they are leaked.
                let _ = self.lower(host, state, Clusters { first, count: at - first });
                return Err(error);
            }
            at += 1;
        }
        let found = self.make_durable(host, &[Clusters { first, count }])?;
        found.into_iter().next().ok_or_else(|| damaged(host.name(), "a row of clusters is gone"))
    }

    /// What was marked as used becomes safe to be used: old content goes, the file reaches to its end, and all of it is durable.
    fn make_durable(&self, host: &Host, found: &[Clusters]) -> Result<Vec<Taken>> {
        let len = host.len_bytes();
        let mut taken = Vec::new();
        for &clusters in found {
            let place = self.place(clusters);
            let old = place.intersect(ByteRange::new(0, len));
            taken.push(Taken { clusters, zeroed: old.is_empty() || host.punch(old)? });
        }
        let end = found.iter().map(|clusters| self.place(*clusters).end()).max().unwrap_or(0);
        host.grow_to(end)?;
        host.sync()?;
        Ok(taken)
    }

    /// Lowers the refcounts of `clusters` by one each; punches those that become free.
    fn lower(&self, host: &Host, state: &mut State, clusters: Clusters) -> Result<()> {
        let (mut at, end) = (clusters.first, clusters.first + clusters.count);
        while at < end {
            let index = at / self.per_block();
            let stop = end.min((index + 1) * self.per_block());
            let Some(mut block) = self.block(host, state, index)? else {
                return Err(damaged(host.name(), "a cluster in use has no refcount"));
            };
            let mut free: Vec<Clusters> = Vec::new();
            for cluster in at..stop {
                let within = cluster % self.per_block();
                let count = self.width.get(&block, within);
                if count == 0 {
                    return Err(damaged(host.name(), "a cluster in use has the refcount 0"));
                }
                self.width.set(&mut block, within, count - 1);
                match free.last_mut() {
                    _ if count > 1 => (),
                    Some(last) if last.first + last.count == cluster => last.count += 1,
                    _ => free.push(Clusters { first: cluster, count: 1 }),
                }
            }
            for clusters in &free {
                // Before it is free for others. That space is not given back is no reason to fail.
                let _ = host.punch(self.place(*clusters));
            }
            let bytes = self.width.bytes(at % self.per_block(), stop - index * self.per_block());
            host.write_metadata(state.table[in_memory(index)] + bytes.start as u64, &block[bytes])?;
            if let Some(first) = free.first() {
                state.cursor = state.cursor.min(first.first);
            }
            at = stop;
        }
        Ok(())
    }

    /// The refcount block `index`; `None` if there is none.
    fn block(&self, host: &Host, state: &State, index: u64) -> Result<Option<Vec<u8>>> {
        let Some(&offset) = state.table.get(in_memory(index)).filter(|offset| **offset != 0) else { return Ok(None) };
        let mut block = vec![0; in_memory(self.cluster_bytes())];
        host.read_metadata(offset, &mut block)?;
        Ok(Some(block))
    }

    /// Makes the refcount block `index` if there is none: in the first cluster that it counts, which it counts as used.
    fn ensure_block(&self, host: &Host, state: &mut State, index: u64) -> Result<()> {
        if index >= state.table.len() as u64 {
            self.grow_table(host, state, index)?;
        }
        if state.table[in_memory(index)] != 0 {
            return Ok(());
        }
        let offset = (index * self.per_block()) << self.cluster_bits;
        self.new_block(host, offset, |block| self.width.set(block, 0, 1))?;
        host.write_numbers(state.table_offset + index * 8, &[offset])?;
        state.table[in_memory(index)] = offset;
        Ok(())
    }

    /// Writes a new refcount block, and syncs it.
    fn new_block(&self, host: &Host, offset: u64, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let mut block = vec![0; in_memory(self.cluster_bytes())];
        fill(&mut block);
        host.grow_to(offset + self.cluster_bytes())?;
        host.write_new_metadata(offset, &block)?;
        host.sync()
    }

    /// Moves the refcount table to a larger place past the end of the file, with refcount blocks for that place.
    ///
    /// ```text
    /// | block | block | ... | new table (several clusters) |      all counted as used by those blocks
    /// ```
    fn grow_table(&self, host: &Host, state: &mut State, index: u64) -> Result<()> {
        let per_block = self.per_block();
        // What a block counts is a region: the new table and its blocks begin at the start of a region that is not in use yet.
        let first_region =
            host.len_bytes().div_ceil(self.cluster_bytes() * per_block).max(index).max(state.table.len() as u64);
        let entries_per_cluster = self.cluster_bytes() / 8;
        let (mut regions, mut table_clusters) = (1, 1);
        loop {
            // Half as much again, so that growing stays rare.
            let entries = (first_region + regions) * 3 / 2 + 1;
            table_clusters = entries.div_ceil(entries_per_cluster).max(table_clusters);
            let needed = (table_clusters + regions).div_ceil(per_block);
            if needed <= regions {
                break;
            }
            regions = needed;
        }
        let entries = table_clusters * entries_per_cluster;
        if in_memory(entries) > TABLE_ENTRIES_MAX {
            let what = "the qcow2 file is as large as its refcounts can tell:";
            return Err(Error::new(ErrorKind::NoSpace, what).on(host.name()));
        }
        let first = first_region * per_block;
        let used = regions + table_clusters;
        let mut table = state.table.clone();
        table.resize(in_memory(entries), 0);
        for region in 0..regions {
            let offset = (first + region) << self.cluster_bits;
            table[in_memory(first_region + region)] = offset;
            self.new_block(host, offset, |block| {
                for at in 0..per_block.min(used.saturating_sub(region * per_block)) {
                    self.width.set(block, at, 1);
                }
            })?;
        }
        let table_offset = (first + regions) << self.cluster_bits;
        host.grow_to((first + used) << self.cluster_bits)?;
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        host.write_new_metadata(table_offset, &bytes)?;
        host.sync()?;
        let clusters = u32::try_from(table_clusters).expect("bounded above");
        Header::write_refcount_table(host, table_offset, clusters)?;
        let old = self.table_clusters(state);
        // The file names the new one from here on. If the sync fails the old one is leaked, because a power cut may bring it back.
        state.table = table;
        state.table_offset = table_offset;
        *self.table_place.write() = self.place(self.table_clusters(state));
        host.sync()?;
        self.lower(host, state, old)
    }
}
