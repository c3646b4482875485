//! Changes of the disk: writes, zeroes, the size.
//!
//! ```text
//! all of it is there already and used here only:  shared stripes, write in place
//! else, with exclusive stripes of whole clusters: take clusters -> data, and the rest of the first and last cluster
//!                                                 -> [sync] -> L2 entries -> give up what was there
//! ```
//!
//! Only whole clusters are given back: the rest of a range is zeroed where it is, and where it reads as zeroes already nothing is done.

use super::entry::{self, Cluster};
use super::header::{Header, L1_BYTES_MAX};
use super::host::in_memory;
use super::mapping::Place;
use super::refcounts::Clusters;
use super::tables::{L1, L2, Tables};
use super::{PIECE_BYTES, Qcow2Image, damaged};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::range::ByteRange;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// So much is zeroed under one hold of its stripes.
const ZERO_BYTES_MAX: u64 = 1 << 30;

impl Qcow2Image {
    /// Writes `data`, all of `range`, a piece of a request.
    pub(super) fn write_piece(&self, range: ByteRange, data: &[u8]) -> Result<()> {
        {
            let _held = self.stripes.shared(range);
            if self.write_in_place(range, data)? {
                return Ok(());
            }
        }
        let _held = self.stripes.exclusive(range.align_out(self.cluster_bytes()));
        self.write_mapped(range, data)
    }

    /// False: some of it needs a cluster; a part may have been written.
    fn write_in_place(&self, range: ByteRange, data: &[u8]) -> Result<bool> {
        let (mut rest, mut data) = (range, data);
        while !rest.is_empty() {
            let run = self.run_at(rest)?;
            let Place::Data { host, copied: true } = run.place else { return Ok(false) };
            let (head, tail) = data.split_at(in_memory(run.range.len()));
            self.host.write(host, head).map_err(|error| error.at(run.range))?;
            data = tail;
            rest = ByteRange::from_bounds(run.range.end(), rest.end());
        }
        Ok(true)
    }

    /// As `write_piece`, with the stripes of all its clusters held exclusively.
    fn write_mapped(&self, range: ByteRange, data: &[u8]) -> Result<()> {
        let (mut rest, mut data) = (range, data);
        while !rest.is_empty() {
            let run = self.run_at(rest)?;
            let done = match run.place {
                Place::Data { host, copied: true } => {
                    let head = &data[..in_memory(run.range.len())];
                    self.host.write(host, head).map_err(|error| error.at(run.range))?;
                    run.range
                }
                _ => self.write_new(run.range, data).map_err(|error| error.at(run.range))?,
            };
            data = &data[in_memory(done.len())..];
            rest = ByteRange::from_bounds(done.end(), rest.end());
        }
        Ok(())
    }

    /// Writes the start of `range`, which one L2 table maps, to new clusters. Returns what was written.
    fn write_new(&self, range: ByteRange, data: &[u8]) -> Result<ByteRange> {
        let cluster = self.cluster_bytes();
        let whole = range.align_out(cluster);
        let (l1_index, first) = self.indexes(whole.start());
        let table = self.own_table(l1_index)?;
        let taken = self.refcounts.take(&self.host, whole.len() / cluster)?;
        let covered = ByteRange::new(whole.start(), taken.clusters.count * cluster);
        let part = range.intersect(covered);
        let host = taken.clusters.first * cluster;
        let filled = self.fill(covered, part, &data[..in_memory(part.len())], host, taken.zeroed);
        if let Err(error) = filled {
            self.refcounts.untake(&self.host, taken.clusters);
            return Err(error);
        }
        let count = in_memory(taken.clusters.count);
        let old: Vec<u64> = (first..first + count).map(|index| table.get(index)).collect();
        let new: Vec<u64> = (0..taken.clusters.count).map(|index| entry::data(host + index * cluster)).collect();
        table.set(&self.host, first, &new).inspect_err(|_| self.untake_unreferenced(taken.clusters))?;
        self.give_up(&old)?;
        Ok(part)
    }

    /// Writes to new clusters at `host`, which will be `covered` of the disk: `data` at `part`, and around it what is there now.
    fn fill(&self, covered: ByteRange, part: ByteRange, data: &[u8], host: u64, zeroed: bool) -> Result<()> {
        let at = |range: ByteRange| host + (range.start() - covered.start());
        let mut must_sync = false;
        let around =
            [ByteRange::from_bounds(covered.start(), part.start()), ByteRange::from_bounds(part.end(), covered.end())];
        for rest in around {
            if rest.is_empty() {
                continue;
            }
            // Past the disk's end there is nothing, whatever the backing file has.
            let on_disk = rest.intersect(ByteRange::new(0, self.size_bytes()));
            if let Some(mut bytes) = self.content_unless_zero(on_disk)? {
                bytes.resize(in_memory(rest.len()), 0);
                // These bytes are durable where they are now, and must be so where they will be.
                self.host.write(at(rest), &bytes)?;
                must_sync = true;
            } else if !zeroed {
                self.host.zero(ByteRange::new(at(rest), rest.len()))?;
                must_sync = true;
            }
        }
        self.host.write(at(part), data)?;
        if must_sync { self.host.sync() } else { Ok(()) }
    }

    /// The bytes at `range`, a part of one cluster, of the disk; `None`: they are zeroes. Nothing is read to find out what the tables tell.
    fn content_unless_zero(&self, range: ByteRange) -> Result<Option<Vec<u8>>> {
        if range.is_empty() {
            return Ok(None);
        }
        let known = match self.run_at(range)?.place {
            Place::Zero { .. } => true,
            Place::Unallocated => self.backing_is_zero(range),
            Place::Data { .. } | Place::Compressed { .. } => false,
        };
        if known {
            return Ok(None);
        }
        let mut bytes = vec![0; in_memory(range.len())];
        self.read_mapped(range, &mut bytes)?;
        Ok(bytes.iter().any(|&byte| byte != 0).then_some(bytes))
    }

    /// The L2 table in the L1 entry `index`, made, or copied if a snapshot shares it.
    fn own_table(&self, index: u64) -> Result<Arc<L2>> {
        let find = || {
            let found = self.tables.l2(&self.host, &self.header, index)?;
            if let Some((table, true)) = &found {
                // What is written there would be read as something else too.
                self.occupied.refuse_shared(self.name(), ByteRange::new(table.offset, self.cluster_bytes()))?;
            }
            Ok::<_, Error>(found)
        };
        if let Some((table, true)) = find()? {
            return Ok(table);
        }
        let _one = self.tables.l1_change.lock();
        let old = find()?;
        if let Some((table, true)) = old {
            return Ok(table);
        }
        if index >= self.tables.l1_count() as u64 {
            return Err(damaged(self.name(), "the L1 table is too small for the disk"));
        }
        let entries = old.as_ref().map_or_else(|| vec![0; in_memory(self.cluster_bytes() / 8)], |(old, _)| old.all());
        let taken = self.refcounts.take(&self.host, 1)?;
        let offset = taken.clusters.first * self.cluster_bytes();
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let written = self.host.write_new_metadata(offset, &bytes).and_then(|()| {
            // A hole reads as an empty table; anything else must be there before it is referred to.
            if old.is_some() || !taken.zeroed { self.host.sync() } else { Ok(()) }
        });
        if let Err(error) = written {
            self.refcounts.untake(&self.host, taken.clusters);
            return Err(error);
        }
        self.tables.forget(offset);
        let set = self.tables.set_l1(&self.host, index, Tables::l1_pointer(offset));
        set.inspect_err(|_| self.untake_unreferenced(taken.clusters))?;
        if let Some((old, _)) = old {
            self.tables.forget(old.offset);
            self.refcounts.give_up(Clusters { first: old.offset / self.cluster_bytes(), count: 1 });
        }
        let made = self.tables.l2(&self.host, &self.header, index)?;
        made.map(|(table, _)| table).ok_or_else(|| damaged(self.name(), "an L2 table is gone"))
    }

    /// Gives back clusters after the reference to them could not be written.
    fn untake_unreferenced(&self, clusters: Clusters) {
        // A reference that was torn may be to them.
        if self.host.is_sound() {
            self.refcounts.untake(&self.host, clusters);
        }
    }

    /// Gives up the clusters of L2 entries that are in no table any more.
    fn give_up(&self, entries: &[u64]) -> Result<()> {
        let mut crowded = false;
        for &entry in entries {
            let bits = self.header.cluster_bits;
            let clusters = match entry::decode(entry, bits, true) {
                Ok(Cluster::Data { host, .. } | Cluster::Zero { host: Some(host), .. }) => {
                    Clusters { first: host >> bits, count: 1 }
                }
                Ok(Cluster::Compressed { host, len }) => {
                    let first = host >> bits;
                    Clusters { first, count: (host.saturating_add(len - 1) >> bits) - first + 1 }
                }
                _ => continue,
            };
            crowded |= self.refcounts.give_up(clusters);
        }
        if crowded { self.refcounts.sync(&self.host) } else { Ok(()) }
    }

    /// Makes `range` read as zeroes by the thinnest means.
    pub(super) fn zero(&self, range: ByteRange) -> Result<()> {
        for piece in range.pieces(self.zero_step()) {
            let _held = self.stripes.exclusive(piece.align_out(self.cluster_bytes()));
            self.zero_held(piece)?;
        }
        Ok(())
    }

    /// One step needs one L2 table.
    fn zero_step(&self) -> u64 {
        ZERO_BYTES_MAX.min(self.header.l2_span_bytes())
    }

    /// As `zero`, for a range within one L2 table, with its stripes held exclusively.
    fn zero_held(&self, range: ByteRange) -> Result<()> {
        let cluster = self.cluster_bytes();
        // A cluster that the disk's end cuts counts as whole.
        let end = if range.end() >= self.size_bytes() { range.end().next_multiple_of(cluster) } else { range.end() };
        let inner = ByteRange::from_bounds(range.start(), end).align_in(cluster);
        if inner.is_empty() || (self.backing.is_some() && !self.header.has_zero_clusters()) {
            return self.zero_bytes(range);
        }
        self.zero_bytes(ByteRange::from_bounds(range.start(), inner.start()))?;
        self.zero_clusters(inner).map_err(|error| error.at(range))?;
        self.zero_bytes(ByteRange::from_bounds(inner.end(), range.end()))
    }

    /// Zeroes parts of clusters where they are.
    fn zero_bytes(&self, range: ByteRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let run = self.run_at(rest.split(PIECE_BYTES).0)?;
            match run.place {
                Place::Zero { .. } => (),
                Place::Unallocated if self.backing_is_zero(run.range) => (),
                Place::Data { host, copied: true } => {
                    self.host.zero(ByteRange::new(host, run.range.len())).map_err(|error| error.at(run.range))?;
                }
                _ => self.write_mapped(run.range, &vec![0; in_memory(run.range.len())])?,
            }
            rest = ByteRange::from_bounds(run.range.end(), rest.end());
        }
        Ok(())
    }

    /// Gives up whole clusters of one L2 table.
    fn zero_clusters(&self, range: ByteRange) -> Result<()> {
        let (l1_index, first) = self.indexes(range.start());
        let cluster = self.cluster_bytes();
        let found = self.tables.l2(&self.host, &self.header, l1_index)?;
        if found.is_none() && (self.backing.is_none() || self.backing_is_zero(range)) {
            return Ok(());
        }
        let count = in_memory(range.len() / cluster);
        let old: Vec<u64> = match &found {
            Some((table, _)) => (first..first + count).map(|index| table.get(index)).collect(),
            None => vec![entry::UNALLOCATED; count],
        };
        // With a backing file an entry that says nothing would show what is behind.
        let cleared = if self.backing.is_some() { entry::ZERO_PLAIN } else { entry::UNALLOCATED };
        let mut new = old.clone();
        for (index, entry) in new.iter_mut().enumerate() {
            let here = ByteRange::new(range.start() + index as u64 * cluster, cluster);
            let decoded = entry::decode(*entry, self.header.cluster_bits, self.header.has_zero_clusters());
            *entry = match decoded.map_err(|what| self.damaged(what, here))? {
                Cluster::Zero { host: None, .. } => *entry,
                Cluster::Unallocated if self.backing_is_zero(here) => *entry,
                _ => cleared,
            };
        }
        if new == old {
            return Ok(());
        }
        let table = self.own_table(l1_index)?;
        table.set(&self.host, first, &new)?;
        let gone: Vec<u64> = old.iter().zip(&new).filter(|(old, new)| old != new).map(|(old, _)| *old).collect();
        self.give_up(&gone)
    }

    /// Refuses what would need more than a new size.
    pub(super) fn may_resize(&self) -> Result<()> {
        let why = if self.backing.is_some() {
            "the size of a qcow2 file with a backing file cannot be changed:"
        } else if self.header.snapshots > 0 {
            "the size of a qcow2 file with internal snapshots cannot be changed:"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Unsupported, why).on(self.name()))
    }

    pub(super) fn change_size(&self, size_bytes: u64) -> Result<()> {
        let _one = self.resizing.lock();
        let _no_requests = self.stripes.exclusive(ByteRange::new(0, u64::MAX));
        let before = self.size_bytes();
        // What is cut off, or what was left behind the end, must not be seen again.
        let step = self.zero_step();
        let gone = ByteRange::from_bounds(before.min(size_bytes), before.max(size_bytes));
        let mapped = self.tables.l1_count() as u64 * self.header.l2_span_bytes();
        for piece in gone.intersect(ByteRange::new(0, mapped)).pieces(step) {
            self.zero_held(piece)?;
        }
        let needed = size_bytes.div_ceil(self.header.l2_span_bytes());
        if needed > self.tables.l1_count() as u64 {
            self.grow_l1(needed)?;
        }
        Header::write_size(&self.host, size_bytes)?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    /// Moves the L1 table to a larger place.
    fn grow_l1(&self, count: u64) -> Result<()> {
        let _one = self.tables.l1_change.lock();
        if count > L1_BYTES_MAX / 8 {
            let what = "the disk would be larger than clusters of this size allow:";
            return Err(Error::new(ErrorKind::NoSpace, what).on(self.name()));
        }
        let mut entries = self.tables.l1_entries();
        entries.resize(in_memory(count), 0);
        let cluster = self.cluster_bytes();
        let taken = self.refcounts.take_row(&self.host, (count * 8).div_ceil(cluster))?;
        let offset = taken.clusters.first * cluster;
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let written = self.host.write_new_metadata(offset, &bytes).and_then(|()| self.host.sync());
        if let Err(error) = written {
            self.refcounts.untake(&self.host, taken.clusters);
            return Err(error);
        }
        Header::write_l1(&self.host, offset, u32::try_from(count).expect("bounded above"))?;
        let old = self.tables.replace_l1(L1 { offset, entries });
        if !old.entries.is_empty() {
            let count = (old.entries.len() as u64 * 8).div_ceil(cluster);
            self.refcounts.give_up(Clusters { first: old.offset / cluster, count });
        }
        Ok(())
    }

    pub(super) fn flush_file(&self) -> Result<()> {
        if self.opened.writable { self.refcounts.flush(&self.host) } else { Ok(()) }
    }
}
