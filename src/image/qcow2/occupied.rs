//! The clusters of the file that hold metadata in use: no data comes there, whatever refcounts and tables say.
//!
//! In a sound file the refcounts keep the two apart. In a damaged one they may call such a cluster free, or an entry for data may
//! point to it. What is written there destroys more than it saves, so it is refused before anything is:
//!
//! | what | refused |
//! |---|---|
//! | a free cluster is about to be reserved, or to hold refcounts | the write that needs it |
//! | a guest's data lies there | its reads and writes |
//! | a reference to it was the last one | it is not freed, and stays leaked |
//! | the unused end of the file is cut off | it is not cut there |
//!
//! Known are the header, the L1 table, its L2 tables, the refcount table and its blocks. Tables of snapshots are not: only the file
//! knows them.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::RwLock;

/// See the module. An image that is only read knows its header and its two large tables here: nothing is given out there.
#[derive(Debug)]
pub(super) struct Occupied {
    cluster_bits: u32,
    /// How often each cluster is used: more than once is damage too.
    uses: RwLock<BTreeMap<u64, u32>>,
}

impl Occupied {
    /// Of a file with clusters of `1 << cluster_bits` bytes: the header.
    pub(super) fn new(cluster_bits: u32) -> Self {
        Occupied { cluster_bits, uses: RwLock::new(BTreeMap::from([(0, 1)])) }
    }

    fn clusters(&self, place: ByteRange) -> std::ops::Range<u64> {
        let all = place.align_out(1 << self.cluster_bits);
        all.start() >> self.cluster_bits..all.end() >> self.cluster_bits
    }

    /// There is a table in `place`.
    pub(super) fn add(&self, place: ByteRange) {
        self.add_clusters(self.clusters(place));
    }

    /// There is a table in each of the clusters at `offsets`.
    pub(super) fn add_all(&self, offsets: impl Iterator<Item = u64>) {
        self.add_clusters(offsets.map(|offset| offset >> self.cluster_bits));
    }

    fn add_clusters(&self, clusters: impl Iterator<Item = u64>) {
        let mut uses = self.uses.write();
        for cluster in clusters {
            *uses.entry(cluster).or_insert(0) += 1;
        }
    }

    /// The table in `place` is referred to no more.
    pub(super) fn remove(&self, place: ByteRange) {
        let mut uses = self.uses.write();
        for cluster in self.clusters(place) {
            match uses.get_mut(&cluster) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(uses.remove(&cluster)),
            }
        }
    }

    /// The offset of the first cluster that holds metadata in `place`.
    pub(super) fn first_in(&self, place: ByteRange) -> Option<u64> {
        if place.is_empty() {
            return None;
        }
        let uses = self.uses.read();
        uses.range(self.clusters(place)).next().map(|(cluster, _)| cluster << self.cluster_bits)
    }

    /// One past the last byte of metadata.
    pub(super) fn end(&self) -> u64 {
        self.uses.read().last_key_value().map_or(0, |(last, _)| (last + 1) << self.cluster_bits)
    }

    /// # Errors
    /// There is metadata in `place` of the file `name`, which counts as free.
    pub(super) fn refuse_free(&self, name: &str, place: ByteRange) -> Result<()> {
        self.first_in(place).map_or(Ok(()), |offset| Err(refused(name, "holds metadata and counts as free", offset)))
    }

    /// # Errors
    /// Some cluster of `place` in the file `name` is used by two tables.
    pub(super) fn refuse_shared(&self, name: &str, place: ByteRange) -> Result<()> {
        let uses = self.uses.read();
        match uses.range(self.clusters(place)).find(|(_, count)| **count > 1) {
            Some((cluster, _)) => Err(refused(name, "is used by two tables", cluster << self.cluster_bits)),
            None => Ok(()),
        }
    }
}

/// A write that would make the damage worse.
pub(super) fn refused(name: &str, what: &str, offset: u64) -> Error {
    let what = format!("the qcow2 metadata is damaged (the cluster at offset {offset} of the file {what}):");
    Error::new(ErrorKind::Corrupt, what)
        .on(name)
        .advise(format!("unmount it, keep a copy of it, and repair it: qemu-img check -r all {name}"))
}
