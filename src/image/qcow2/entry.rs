//! One entry of an L2 table: where a cluster of the disk is.

/// The cluster may be written where it is: its refcount is 1.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Reads as zeroes (version 3).
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// The backing file's, or zeroes.
    Unallocated,
    /// Zeroes; a cluster may be set aside for it.
    Zero { host: Option<u64>, copied: bool },
    /// In the file at `host`. `copied`: may be written there.
    Data { host: u64, copied: bool },
    /// `len` bytes in the file from `host` on hold it, compressed.
    Compressed { host: u64, len: u64 },
}

/// The entry of an unallocated cluster.
pub(super) const UNALLOCATED: u64 = 0;
/// The entry of a cluster that reads as zeroes and has no room of its own.
pub(super) const ZERO_PLAIN: u64 = ZERO;

/// The entry of a data cluster at `host` that is used here only.
pub(super) fn data(host: u64) -> u64 {
    host | COPIED
}

/// The offset in an entry of the L1 table, `None` if there is no table, and whether the table may be changed where it is.
pub(super) fn table(entry: u64) -> Option<(u64, bool)> {
    let offset = entry & OFFSET;
    (offset != 0).then_some((offset, entry & COPIED != 0))
}

/// What `entry` says, in a file with clusters of `1 << cluster_bits` bytes.
///
/// # Errors
/// What is wrong with it.
pub(super) fn decode(entry: u64, cluster_bits: u32, has_zero_clusters: bool) -> Result<Cluster, &'static str> {
    if entry & COMPRESSED != 0 {
        // Offset in the lower bits, then the number of further sectors that the data reaches into.
        let bits = 62 - (cluster_bits - 8);
        let host = entry & ((1 << bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        return Ok(Cluster::Compressed { host, len: sectors * 512 - host % 512 });
    }
    let (offset, copied) = (entry & OFFSET, entry & COPIED != 0);
    if offset & ((1 << cluster_bits) - 1) != 0 {
        return Err("an entry of an L2 table does not point to a cluster");
    }
    let host = (offset != 0).then_some(offset);
    match (entry & ZERO != 0, host) {
        (true, _) if !has_zero_clusters => Err("a zero cluster in a file of version 2"),
        (true, host) => Ok(Cluster::Zero { host, copied }),
        (false, Some(host)) => Ok(Cluster::Data { host, copied }),
        (false, None) => Ok(Cluster::Unallocated),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_what_the_format_says() {
        let entry = |entry| decode(entry, 16, true);
        assert_eq!(entry(UNALLOCATED), Ok(Cluster::Unallocated));
        assert_eq!(entry(ZERO_PLAIN), Ok(Cluster::Zero { host: None, copied: false }));
        assert_eq!(entry(data(0x50000)), Ok(Cluster::Data { host: 0x50000, copied: true }));
        assert_eq!(entry(0x50000), Ok(Cluster::Data { host: 0x50000, copied: false }));
        assert_eq!(entry(data(0x50000) | ZERO), Ok(Cluster::Zero { host: Some(0x50000), copied: true }));
        // 64 KiB clusters: the number of sectors is in bits 54 to 61.
        let compressed = COMPRESSED | 3 << 54 | 0x50123;
        assert_eq!(entry(compressed), Ok(Cluster::Compressed { host: 0x50123, len: 4 * 512 - 0x123 }));
        assert!(entry(0x50200).is_err());
        assert!(decode(ZERO_PLAIN, 16, false).is_err());
    }
}
