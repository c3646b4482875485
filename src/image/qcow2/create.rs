//! New qcow2 files: all of the disk unallocated, with a backing file or without.
//!
//! ```text
//! | header | refcount table | refcount blocks | L1 table |      each begins at a cluster
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::header::{CLUSTER_BITS, Header, L1_BYTES_MAX, encode};
use super::host::in_memory;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Layout, Version};

/// QEMU's default.
const CLUSTER_BYTES: u64 = 64 << 10;
/// QEMU deals in sectors: the rest of a disk that ends within one would be lost to it.
const SECTOR_BYTES: u64 = 512;
/// A refcount has two bytes.
const REFCOUNT_BYTES: u64 = 2;

/// Writes an empty disk of `size_bytes` (rounded up to whole sectors) into the empty `file`, which is called `name`.
///
/// # Errors
/// There are no such clusters; the disk is too large for them; the file cannot be written.
pub(in crate::image) fn format(file: &File, name: &str, size_bytes: u64, layout: &Layout) -> Result<()> {
    let cluster = layout.cluster_bytes.unwrap_or(CLUSTER_BYTES);
    let bits = cluster.trailing_zeros();
    if !cluster.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
        let what = format!("a qcow2 file cannot have clusters of {cluster} bytes:");
        return Err(Error::usage(what).on(name).advise("a power of two from 512 to 2M"));
    }
    let too_large = || {
        let what = format!("a qcow2 file with clusters of {cluster} bytes cannot hold {size_bytes} bytes:");
        Error::new(ErrorKind::Usage, what).on(name)
    };
    let size_bytes = size_bytes.checked_next_multiple_of(SECTOR_BYTES).ok_or_else(too_large)?;
    let version = match layout.version {
        Version::V2 => 2,
        Version::V3 => 3,
    };
    let mut header = Header::new(version, bits, size_bytes);
    if let Some(backing) = &layout.backing {
        header.backing_name = Some(backing.file.clone());
        header.backing_format = backing.format.map(|format| format.to_string());
    }
    let l1_entries = size_bytes.div_ceil(header.l2_span_bytes()).max(1);
    if l1_entries * 8 > L1_BYTES_MAX || i64::try_from(size_bytes).is_err() {
        return Err(too_large());
    }
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let (mut table_clusters, mut blocks) = (1, 1);
    loop {
        let needed = (1 + table_clusters + blocks + l1_clusters).div_ceil(cluster / REFCOUNT_BYTES);
        if needed <= blocks && (blocks * 8).div_ceil(cluster) <= table_clusters {
            break;
        }
        blocks = needed;
        table_clusters = (blocks * 8).div_ceil(cluster);
    }
    let used = 1 + table_clusters + blocks + l1_clusters;
    header.refcount_table_offset = cluster;
    header.refcount_table_clusters = u32::try_from(table_clusters).map_err(|_| too_large())?;
    header.l1_offset = (1 + table_clusters + blocks) * cluster;
    header.l1_entries = u32::try_from(l1_entries).map_err(|_| too_large())?;

    let mut table = vec![0; in_memory(table_clusters * cluster)];
    for (index, entry) in table.chunks_exact_mut(8).take(in_memory(blocks)).enumerate() {
        entry.copy_from_slice(&((1 + table_clusters + index as u64) * cluster).to_be_bytes());
    }
    let mut counts = vec![0; in_memory(blocks * cluster)];
    for count in counts.chunks_exact_mut(2).take(in_memory(used)) {
        count[1] = 1;
    }
    let write = |offset: u64, bytes: &[u8]| {
        file.write_all_at(bytes, offset).map_err(|error| Error::io("cannot write", &error).on(name))
    };
    write(cluster, &table)?;
    write((1 + table_clusters) * cluster, &counts)?;
    write(header.l1_offset, &vec![0; in_memory(l1_entries * 8)])?;
    file.set_len(used * cluster).map_err(|error| Error::io("cannot resize", &error).on(name))?;
    // What makes it an image comes last.
    write(0, &encode(&header, name)?)?;
    file.sync_all().map_err(|error| Error::io("cannot flush", &error).on(name))
}
