//! Where the bytes of the disk are, and reading them.

use super::entry::{self, Cluster};
use super::host::in_memory;
use super::{Qcow2Image, compressed, occupied};
use crate::error::Result;
use crate::range::ByteRange;

/// Where a run of the disk's bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The backing file's, or zeroes.
    Unallocated,
    /// Zeroes, with clusters set aside or without.
    Zero { allocated: bool },
    /// In the file, the run's first byte at `host`. `copied`: may be written there.
    Data { host: u64, copied: bool },
    /// In one compressed cluster.
    Compressed { host: u64, len: u64 },
}

/// Bytes of the disk that are in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) range: ByteRange,
    pub(super) place: Place,
}

impl Qcow2Image {
    /// The index in the L1 table, and in the L2 table, of the cluster that holds the byte at `offset`.
    pub(super) fn indexes(&self, offset: u64) -> (u64, usize) {
        let span = self.header.l2_span_bytes();
        (offset / span, in_memory((offset % span) >> self.header.cluster_bits))
    }

    /// The run at the start of `range`, within it. Needs the stripes.
    pub(super) fn run_at(&self, range: ByteRange) -> Result<Run> {
        let (l1_index, first) = self.indexes(range.start());
        let span = self.header.l2_span_bytes();
        let table_end = (range.start() - range.start() % span).saturating_add(span);
        let range = ByteRange::from_bounds(range.start(), range.end().min(table_end));
        let Some((table, _)) = self.tables.l2(&self.host, &self.header, l1_index)? else {
            return Ok(Run { range, place: Place::Unallocated });
        };
        let cluster = self.cluster_bytes();
        let skip = range.start() % cluster;
        let decode = |index: usize| {
            entry::decode(table.get(index), self.header.cluster_bits, self.header.has_zero_clusters())
                .map_err(|what| self.damaged(what, range))
        };
        let place = match decode(first)? {
            Cluster::Unallocated => Place::Unallocated,
            Cluster::Zero { host, .. } => Place::Zero { allocated: host.is_some() },
            Cluster::Data { host, copied } => Place::Data { host: host + skip, copied },
            Cluster::Compressed { host, len } => Place::Compressed { host, len },
        };
        let mut end = range.start() - skip + cluster;
        let mut index = first + 1;
        while end < range.end() {
            let goes_on = match (place, decode(index)?) {
                (Place::Unallocated, Cluster::Unallocated) => true,
                (Place::Zero { allocated }, Cluster::Zero { host, .. }) => allocated == host.is_some(),
                (Place::Data { host, copied }, Cluster::Data { host: next, copied: next_copied }) => {
                    host.checked_add(end - range.start()) == Some(next) && copied == next_copied
                }
                _ => false,
            };
            if !goes_on {
                break;
            }
            end += cluster;
            index += 1;
        }
        let run = Run { range: ByteRange::from_bounds(range.start(), end.min(range.end())), place };
        self.check_run(run)?;
        Ok(run)
    }

    /// Data is not where metadata is: a write there would destroy the image, and a read is no better.
    fn check_run(&self, run: Run) -> Result<()> {
        let Place::Data { host, .. } = run.place else { return Ok(()) };
        let there = ByteRange::new(host, run.range.len());
        match self.occupied.first_in(there) {
            Some(offset) => {
                let what = "holds data and metadata, they overlap";
                Err(occupied::refused(self.host.name(), what, offset).at(run.range))
            }
            None => Ok(()),
        }
    }

    /// Fills `buffer` with `range`. Needs the stripes.
    pub(super) fn read_mapped(&self, range: ByteRange, buffer: &mut [u8]) -> Result<()> {
        let (mut range, mut buffer) = (range, buffer);
        while !range.is_empty() {
            let run = self.run_at(range)?;
            let (head, rest) = buffer.split_at_mut(in_memory(run.range.len()));
            #[cfg(test)]
            super::journal::reads_now();
            match run.place {
                Place::Unallocated => self.read_backing(run.range, head)?,
                Place::Zero { .. } => head.fill(0),
                Place::Data { host, .. } => self.host.read(host, head).map_err(|error| error.at(run.range))?,
                Place::Compressed { host, len } => {
                    let skip = in_memory(run.range.start() % self.cluster_bytes());
                    let whole = compressed::read(&self.host, host, len, in_memory(self.cluster_bytes()))
                        .map_err(|error| error.at(run.range))?;
                    head.copy_from_slice(&whole[skip..skip + head.len()]);
                }
            }
            buffer = rest;
            range = ByteRange::from_bounds(run.range.end(), range.end());
        }
        Ok(())
    }

    /// What the backing file has of `range`; zeroes past its end, and where there is none.
    fn read_backing(&self, range: ByteRange, buffer: &mut [u8]) -> Result<()> {
        let there = self.backed(range);
        let (head, tail) = buffer.split_at_mut(in_memory(there.len()));
        tail.fill(0);
        match &self.backing {
            Some(backing) if !there.is_empty() => backing.read_at(there.start(), head),
            _ => Ok(()),
        }
    }

    /// The first part of `range`: what the backing file reaches to.
    pub(super) fn backed(&self, range: ByteRange) -> ByteRange {
        let end = self.backing.as_ref().map_or(0, |backing| backing.size_bytes());
        ByteRange::from_bounds(range.start(), range.end().min(end).max(range.start()))
    }
}
