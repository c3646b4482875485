//! Compressed clusters: raw deflate, written by `qemu-img convert -c`. They are read, never written.

use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::damaged;
use super::host::{Host, in_memory};
use crate::error::Result;

/// The cluster of `cluster_bytes` that is compressed in `len` bytes (or fewer: the last sector need not be full) at `offset`.
pub(super) fn read(host: &Host, offset: u64, len: u64, cluster_bytes: usize) -> Result<Vec<u8>> {
    let there = host.len_bytes().saturating_sub(offset).min(len);
    let mut packed = vec![0; in_memory(there)];
    host.read(offset, &mut packed)?;
    let mut cluster = vec![0; cluster_bytes];
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (_, _, written) = decompress(&mut DecompressorOxide::new(), &packed, &mut cluster, 0, flags);
    if written != cluster_bytes {
        return Err(damaged(host.name(), "a compressed cluster cannot be read"));
    }
    Ok(cluster)
}
