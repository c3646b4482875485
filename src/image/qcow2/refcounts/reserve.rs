//! Reservations: free clusters become ones that may be used, many at a time.

use super::super::damaged;
use super::super::host::{Host, in_memory};
use super::{Clusters, Refcounts, State, Taken};
use crate::error::Result;
use crate::range::ByteRange;

/// The first reservation; each is twice the one before, up to the maximum.
pub(super) const RESERVE_BYTES_MIN: u64 = 16 << 20;
const RESERVE_BYTES_MAX: u64 = 1 << 30;
const RESERVE_CLUSTERS_MIN: u64 = 8;
const RESERVE_CLUSTERS_MAX: u64 = 16 << 10;

impl Refcounts {
    /// Reserves clusters: as many as are due, `count` at least.
    pub(super) fn reserve(&self, host: &Host, state: &mut State, count: u64) -> Result<()> {
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
                let cluster = index * per_block + at;
                self.refuse_occupied(host, Clusters { first: cluster, count: 1 })?;
                self.width.set(&mut block, at, 1);
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
    pub(super) fn reserve_at_end(&self, host: &Host, state: &mut State, count: u64) -> Result<Taken> {
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
            let written = self
                .refuse_occupied(host, Clusters { first: at, count: 1 })
                .and_then(|()| host.write_metadata(state.table[in_memory(index)] + bytes.start as u64, &block[bytes]));
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
}
