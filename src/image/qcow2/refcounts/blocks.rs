//! The refcounts in the file: the blocks that hold them, and the table that finds these.

use super::super::damaged;
use super::super::header::Header;
use super::super::host::{Host, in_memory};
use super::{Clusters, Refcounts, State};
use crate::error::{Error, ErrorKind, Result};

/// QEMU's bound for the refcount table.
const TABLE_ENTRIES_MAX: usize = 1 << 20;

impl Refcounts {
    /// Lowers the refcounts of `clusters` by one each; punches those that become free. None that holds metadata becomes free.
    pub(super) fn lower(&self, host: &Host, state: &mut State, clusters: Clusters) -> Result<()> {
        let (mut at, end) = (clusters.first, clusters.first + clusters.count);
        while at < end {
            let index = at / self.per_block();
            let stop = end.min((index + 1) * self.per_block());
            let Some(mut block) = self.block(host, state, index)? else {
                return Err(damaged(host.name(), "a cluster in use has no refcount"));
            };
            let mut free: Vec<Clusters> = Vec::new();
            let kept = self.occupied.first_in(self.place(Clusters { first: at, count: stop - at })).is_some();
            for cluster in at..stop {
                let within = cluster % self.per_block();
                let count = self.width.get(&block, within);
                if count == 0 {
                    return Err(damaged(host.name(), "a cluster in use has the refcount 0"));
                }
                let own = self.place(Clusters { first: cluster, count: 1 });
                if kept && count == 1 && self.occupied.first_in(own).is_some() {
                    let what = "was data too, and holds metadata: it is kept";
                    log::warn!("{}: the cluster at offset {} {what}", host.name(), own.start());
                    continue;
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

    /// # Errors
    /// Some of `clusters`, which are free for all that the refcounts say, hold metadata.
    pub(super) fn refuse_occupied(&self, host: &Host, clusters: Clusters) -> Result<()> {
        self.occupied.refuse_free(host.name(), self.place(clusters))
    }

    /// The refcount block `index`; `None` if there is none.
    pub(super) fn block(&self, host: &Host, state: &State, index: u64) -> Result<Option<Vec<u8>>> {
        let Some(&offset) = state.table.get(in_memory(index)).filter(|offset| **offset != 0) else { return Ok(None) };
        let mut block = vec![0; in_memory(self.cluster_bytes())];
        host.read_metadata(offset, &mut block)?;
        Ok(Some(block))
    }

    /// Makes the refcount block `index` if there is none: in the first cluster that it counts, which it counts as used.
    pub(super) fn ensure_block(&self, host: &Host, state: &mut State, index: u64) -> Result<()> {
        if index >= state.table.len() as u64 {
            self.grow_table(host, state, index)?;
        }
        if state.table[in_memory(index)] != 0 {
            return Ok(());
        }
        let own = Clusters { first: index * self.per_block(), count: 1 };
        self.refuse_occupied(host, own)?;
        let offset = own.first << self.cluster_bits;
        self.new_block(host, offset, |block| self.width.set(block, 0, 1))?;
        host.write_numbers(state.table_offset + index * 8, &[offset])?;
        state.table[in_memory(index)] = offset;
        self.occupied.add(self.place(own));
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
        self.refuse_occupied(host, Clusters { first, count: used })?;
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
        self.occupied.add(self.place(Clusters { first, count: used }));
        self.occupied.remove(self.place(old));
        // The file names the new one from here on. If the sync fails the old one is leaked, because a power cut may bring it back.
        state.table = table;
        state.table_offset = table_offset;
        host.sync()?;
        self.lower(host, state, old)
    }
}
