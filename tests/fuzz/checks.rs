//! What must hold of a recovered intent log, whatever its bytes are. Shared by the fuzzer and by an ordinary test of its corpus.

use super::{JobId, recover};

/// The job that the fuzzed logs are of.
pub const JOB: JobId = JobId(*b"the fuzzed job's");
const SECTOR_BYTES: usize = 512;
const SECTOR_BITS: usize = 3648;

/// `input`: one byte of options, the disk's size (8 bytes), and then the log. Option 1: the checksums are made right first, so
/// that what is behind them is reached.
pub fn check(input: &[u8]) {
    let Some((&[options, ref size @ ..], log)) = input.split_first_chunk::<9>() else { return };
    let size_bytes = u64::from_le_bytes(*size);
    let mut log = log.to_vec();
    if options & 1 == 1 {
        for sector in log.chunks_exact_mut(SECTOR_BYTES) {
            let checksum = crc32c::crc32c(&sector[..SECTOR_BYTES - 4]);
            sector[SECTOR_BYTES - 4..].copy_from_slice(&checksum.to_le_bytes());
        }
    }
    let (marked, found) = recover(&log, &JOB, size_bytes);

    // The numbers fit each other.
    let regions = found.regions as usize;
    assert!(regions <= 512 << 10 && (regions == 0) == (size_bytes == 0));
    assert_eq!(marked.len(), regions.div_ceil(64));
    assert_eq!(found.sectors as usize, regions.div_ceil(SECTOR_BITS).max(1));
    assert_eq!(marked.iter().map(|word| word.count_ones()).sum::<u32>(), found.marked_regions);
    assert!(found.presumed_regions <= found.marked_regions && found.marked_regions <= found.regions);
    assert!(found.bad_sectors() <= found.sectors && found.is_whole() == (found.bad_sectors() == 0));
    let is_marked = |marked: &[u64], region: usize| marked[region / 64] >> (region % 64) & 1 == 1;
    assert!((regions..marked.len() * 64).all(|past| !is_marked(&marked, past)));
    assert!(!found.to_string().is_empty());

    // A log that lost its end, or one bit of a sector, is never less than what it was.
    let (shorter, _) = recover(&log[..log.len() / 2], &JOB, size_bytes);
    assert!(marked.iter().zip(&shorter).all(|(whole, shorter)| whole & !shorter == 0));
    for sector in 0..(found.sectors as usize).min(log.len().div_ceil(SECTOR_BYTES)).min(4) {
        let at = sector * SECTOR_BYTES + usize::from(options >> 1);
        if let Some(byte) = log.get_mut(at) {
            *byte ^= 0x10;
            let (flipped, _) = recover(&log, &JOB, size_bytes);
            log[at] ^= 0x10;
            let own = sector * SECTOR_BITS..((sector + 1) * SECTOR_BITS).min(regions);
            let expected = |region| own.contains(&region) || is_marked(&marked, region);
            // A flip may also mend what was bad.
            let mended = |region| own.contains(&region) && found.bad_sectors() > 0;
            assert!((0..regions).all(|region| mended(region) || is_marked(&flipped, region) == expected(region)));
        }
    }
}
