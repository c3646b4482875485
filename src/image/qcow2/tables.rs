//! The two levels of tables that lead from the disk's clusters to the file's.
//!
//! The L1 table is in memory, all of it. L2 tables are cached, within a bound; a table that is in use is never dropped, so there is
//! one copy of each at most. A change goes to the file first, then to memory; nothing that is cached was not written.

use std::collections::HashMap;
use std::fmt;

use super::header::Header;
use super::host::{Host, in_memory};
use super::occupied::Occupied;
use super::{damaged, entry};
use crate::error::Result;
use crate::range::ByteRange;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, OnceLock, RwLock};

/// Memory for L2 tables, half of it for the second layer of a chain, a third for the third, and so on: with clusters of 64 KiB they map 128 GiB of the disk.
const CACHE_BYTES: u64 = 16 << 20;
const CACHED_TABLES_MIN: u64 = 8;
/// ... and in a backing file.
const CACHED_TABLES_MIN_BELOW: u64 = 2;

/// The tables of one image.
#[derive(Debug)]
pub(super) struct Tables {
    l1: RwLock<L1>,
    /// Changes of the L1 table, one at a time.
    pub(super) l1_change: Mutex<()>,
    cache: RwLock<HashMap<u64, Arc<L2>>>,
    cached_max: usize,
    cluster_bytes: u64,
    /// Shared with who knows the other tables.
    occupied: Arc<Occupied>,
}

/// The L1 table as it is in the file.
#[derive(Debug)]
pub(super) struct L1 {
    pub(super) offset: u64,
    pub(super) entries: Vec<u64>,
}

impl L1 {
    fn place(&self) -> ByteRange {
        ByteRange::new(self.offset, self.entries.len() as u64 * 8)
    }
}

/// An L2 table.
pub(super) struct L2 {
    pub(super) offset: u64,
    entries: OnceLock<Box<[AtomicU64]>>,
    /// Held while entries are changed, and while the table is read.
    change: Mutex<()>,
    used: AtomicBool,
}

impl fmt::Debug for L2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("L2").field("offset", &self.offset).finish_non_exhaustive()
    }
}

impl L2 {
    /// The entry of the cluster `index` of the table.
    pub(super) fn get(&self, index: usize) -> u64 {
        self.entries.get().map_or(0, |entries| entries[index].load(Ordering::Acquire))
    }

    pub(super) fn all(&self) -> Vec<u64> {
        self.entries.get().into_iter().flatten().map(|entry| entry.load(Ordering::Acquire)).collect()
    }

    /// Changes entries from `index` on: in the file, then here. Whoever calls holds the clusters' stripes.
    pub(super) fn set(&self, host: &Host, index: usize, entries: &[u64]) -> Result<()> {
        let _one = self.change.lock();
        host.write_numbers(self.offset + index as u64 * 8, entries)?;
        let own = self.entries.get().map_or(&[] as &[AtomicU64], |own| &own[index..]);
        for (own, entry) in own.iter().zip(entries) {
            own.store(*entry, Ordering::Release);
        }
        Ok(())
    }

    fn load(&self, host: &Host, entries: usize) -> Result<()> {
        if self.entries.get().is_some() {
            return Ok(());
        }
        let _one = self.change.lock();
        if self.entries.get().is_none() {
            let read = host.read_numbers(self.offset, entries)?;
            let _ = self.entries.set(read.into_iter().map(AtomicU64::new).collect());
        }
        Ok(())
    }
}

impl Tables {
    /// Reads the L1 table of the layer `depth` of a chain, the top one is 1. What is only read needs no more of it than the disk has: a
    /// hostile file may claim a table of 32 MiB.
    pub(super) fn read(
        host: &Host,
        header: &Header,
        writable: bool,
        depth: u64,
        occupied: Arc<Occupied>,
    ) -> Result<Self> {
        let all = u64::from(header.l1_entries);
        let needed = if writable { all } else { all.min(header.size_bytes.div_ceil(header.l2_span_bytes())) };
        let entries = match needed {
            0 => Vec::new(),
            count => host.read_numbers(header.l1_offset, in_memory(count))?,
        };
        occupied.add(ByteRange::new(header.l1_offset, needed * 8));
        if writable {
            let tables = entries.iter().filter_map(|entry| header.table_at(*entry).ok().flatten());
            occupied.add_all(tables.map(|(offset, _)| offset));
        }
        let least = if depth == 1 { CACHED_TABLES_MIN } else { CACHED_TABLES_MIN_BELOW };
        let cached_max = in_memory(((CACHE_BYTES / depth) >> header.cluster_bits).max(least));
        Ok(Tables {
            l1: RwLock::new(L1 { offset: header.l1_offset, entries }),
            l1_change: Mutex::new(()),
            cache: RwLock::new(HashMap::new()),
            cached_max,
            cluster_bytes: header.cluster_bytes(),
            occupied,
        })
    }

    pub(super) fn l1_count(&self) -> usize {
        self.l1.read().entries.len()
    }

    /// Changes an entry of the L1 table: in the file, then here. Needs `l1_change`.
    pub(super) fn set_l1(&self, host: &Host, index: u64, entry: u64) -> Result<()> {
        let (offset, old) = {
            let l1 = self.l1.read();
            (l1.offset, l1.entries[in_memory(index)])
        };
        self.occupy(entry);
        host.write_numbers(offset + index * 8, &[entry]).inspect_err(|_| self.vacate(entry))?;
        self.l1.write().entries[in_memory(index)] = entry;
        self.vacate(old);
        Ok(())
    }

    /// Takes another L1 table, which is in the file already. Needs `l1_change`. Returns what was there.
    pub(super) fn replace_l1(&self, new: L1) -> L1 {
        self.occupied.add(new.place());
        let old = std::mem::replace(&mut *self.l1.write(), new);
        self.occupied.remove(old.place());
        old
    }

    /// The table in an entry of the L1 table is in use.
    fn occupy(&self, entry: u64) {
        if let Some((offset, _)) = entry::table(entry) {
            self.occupied.add(ByteRange::new(offset, self.cluster_bytes));
        }
    }

    /// ... and in use no more.
    fn vacate(&self, entry: u64) {
        if let Some((offset, _)) = entry::table(entry) {
            self.occupied.remove(ByteRange::new(offset, self.cluster_bytes));
        }
    }

    pub(super) fn l1_entries(&self) -> Vec<u64> {
        self.l1.read().entries.clone()
    }

    /// The table in the L1 entry `index`; whether it may be changed where it is. `None`: there is none.
    pub(super) fn l2(&self, host: &Host, header: &Header, index: u64) -> Result<Option<(Arc<L2>, bool)>> {
        let (table, copied) = {
            // Held until the table is cached: one that is given up in this moment is forgotten afterwards, not before.
            let l1 = self.l1.read();
            let entry = l1.entries.get(in_memory(index)).copied().unwrap_or(0);
            let place = header.table_at(entry).map_err(|what| damaged(host.name(), what))?;
            let Some((offset, copied)) = place else { return Ok(None) };
            let known = self.cache.read().get(&offset).cloned();
            (known.unwrap_or_else(|| self.insert(offset)), copied)
        };
        table.used.store(true, Ordering::Relaxed);
        table.load(host, in_memory(header.cluster_bytes() / 8))?;
        Ok(Some((table, copied)))
    }

    /// The table at `offset`, to be read by whoever needs it first.
    fn insert(&self, offset: u64) -> Arc<L2> {
        let mut cache = self.cache.write();
        if let Some(known) = cache.get(&offset) {
            return known.clone();
        }
        if cache.len() >= self.cached_max {
            let before = cache.len();
            // Those in use stay, and so do those used since the last time, once.
            cache.retain(|_, table| Arc::strong_count(table) > 1 || table.used.swap(false, Ordering::Relaxed));
            if cache.len() == before {
                cache.retain(|_, table| Arc::strong_count(table) > 1);
            }
        }
        let table =
            Arc::new(L2 { offset, entries: OnceLock::new(), change: Mutex::new(()), used: AtomicBool::new(true) });
        cache.insert(offset, table.clone());
        table
    }

    /// What was cached of a table whose cluster was given up.
    pub(super) fn forget(&self, offset: u64) {
        self.cache.write().remove(&offset);
    }

    /// Where an entry of the L1 table points to, for one that may be changed there.
    pub(super) fn l1_pointer(offset: u64) -> u64 {
        entry::data(offset)
    }
}
