//! Blocks that describe themselves, and the table of what the disk must hold.
//!
//! ```text
//! 0  magic   8  block number   16  sequence of its write   24  CRC-32C of all the rest   28  noise of number and sequence
//! ```
//!
//! A block in the wrong place, from an older write, or torn between two writes is told from the right one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// The disk's size.
pub const DISK_BYTES: u64 = 1 << 30;
/// The disk holds data in this many places, evenly spread.
const AREAS: u64 = 32;
/// Blocks of each of them: 4 MiB.
const AREA_BLOCKS: u64 = 1024;
const SPACING_BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES as u64 / AREAS;
/// How many blocks hold data.
pub const SLOTS: u64 = AREAS * AREA_BLOCKS;
const MAGIC: u64 = u64::from_le_bytes(*b"LMdemo\r\n");

/// What the disk must hold: for each block with data the sequence of the last write that was acknowledged.
pub struct Table(Vec<AtomicU64>);

impl Table {
    /// Everything as it was first written, with sequence 1.
    pub fn new() -> Table {
        Table((0..SLOTS).map(|_| AtomicU64::new(1)).collect())
    }

    /// Notes that the write with `sequence` to the block in `slot` was acknowledged.
    pub fn acknowledge(&self, slot: u64, sequence: u64) {
        if let Some(entry) = usize::try_from(slot).ok().and_then(|slot| self.0.get(slot)) {
            entry.store(sequence, Ordering::Release);
        }
    }
}

/// The block number of the `slot`-th block with data.
pub fn block_of(slot: u64) -> u64 {
    slot / AREA_BLOCKS * SPACING_BLOCKS + slot % AREA_BLOCKS
}

/// The slot of a block; `None` for those that never hold data.
fn slot_of(block: u64) -> Option<u64> {
    let (area, at) = (block / SPACING_BLOCKS, block % SPACING_BLOCKS);
    (at < AREA_BLOCKS).then_some(area * AREA_BLOCKS + at)
}

/// The content of block `number` after the write with `sequence`.
pub fn fill(block: &mut [u8; BLOCK_BYTES], number: u64, sequence: u64) {
    let mut noise = number.rotate_left(32) ^ sequence;
    for word in block.chunks_exact_mut(8) {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&noise.to_le_bytes());
    }
    block[..8].copy_from_slice(&MAGIC.to_le_bytes());
    block[8..16].copy_from_slice(&number.to_le_bytes());
    block[16..24].copy_from_slice(&sequence.to_le_bytes());
    let sum = checksum(block);
    block[24..28].copy_from_slice(&sum.to_le_bytes());
}

fn checksum(block: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&block[..24]), &block[28..])
}

/// The sequence that a block holds, if it is whole and in its place.
fn sequence(block: &[u8], number: u64) -> Option<u64> {
    let word = |at: usize| block[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    let sum = block[24..28].try_into().map(u32::from_le_bytes).ok()?;
    (word(0)? == MAGIC && word(8)? == number && sum == checksum(block)).then(|| word(16)).flatten()
}

/// Makes the disk's first content in a new sparse file.
///
/// # Errors
/// It cannot be written.
pub fn create(path: &Path) -> Result<()> {
    let make = || {
        let file = File::create_new(path)?;
        file.set_len(DISK_BYTES)?;
        let mut block = [0; BLOCK_BYTES];
        let mut area = Vec::new();
        for slot in 0..SLOTS {
            fill(&mut block, block_of(slot), 1);
            area.extend_from_slice(&block);
            if (slot + 1) % AREA_BLOCKS == 0 {
                file.write_all_at(&area, block_of(slot + 1 - AREA_BLOCKS) * BLOCK_BYTES as u64)?;
                area.clear();
            }
        }
        Ok(())
    };
    make().map_err(|error| Error::io("cannot make the disk", &error).on(path.display().to_string()))
}

/// What an image was found to hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Blocks that hold their last acknowledged write.
    pub current: u64,
    /// Blocks that hold an older write of theirs.
    pub older: u64,
    /// Blocks that hold something else, and blocks without data that are not zero.
    pub wrong: u64,
}

/// Reads every block of the image and compares it with the table.
///
/// # Errors
/// It cannot be read.
pub fn verify(path: &Path, table: &Table) -> Result<Verdict> {
    let failed = |error: std::io::Error| Error::io("cannot verify", &error).on(path.display().to_string());
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    if size != DISK_BYTES {
        return Err(Error::new(ErrorKind::Failed, format!("the image has {size} bytes instead of {DISK_BYTES}:"))
            .on(path.display().to_string()));
    }
    let mut verdict = Verdict::default();
    let mut buffer = vec![0; 1 << 20];
    let mut number = 0;
    while number * (BLOCK_BYTES as u64) < DISK_BYTES {
        file.read_exact_at(&mut buffer, number * BLOCK_BYTES as u64).map_err(failed)?;
        for block in buffer.chunks_exact(BLOCK_BYTES) {
            let expected = slot_of(number).and_then(|slot| table.0.get(usize::try_from(slot).ok()?));
            match expected.map(|expected| (expected.load(Ordering::Acquire), sequence(block, number))) {
                Some((expected, Some(found))) if found == expected => verdict.current += 1,
                Some((expected, Some(found))) if found < expected => verdict.older += 1,
                Some(_) => verdict.wrong += 1,
                None if block.iter().all(|byte| *byte == 0) => {}
                None => verdict.wrong += 1,
            }
            number += 1;
        }
    }
    Ok(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_torn_and_misplaced_writes_are_noticed() {
        let mut old = [0; BLOCK_BYTES];
        fill(&mut old, 7, 1);
        let mut new = [0; BLOCK_BYTES];
        fill(&mut new, 7, 2);
        assert_eq!((sequence(&old, 7), sequence(&new, 7), sequence(&old, 8)), (Some(1), Some(2), None));
        old[2048..].copy_from_slice(&new[2048..]);
        assert_eq!(sequence(&old, 7), None);

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        create(&path).unwrap();
        let table = Table::new();
        assert_eq!(verify(&path, &table).unwrap(), Verdict { current: SLOTS, older: 0, wrong: 0 });
        table.acknowledge(3, 2);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"x", AREA_BLOCKS * BLOCK_BYTES as u64).unwrap();
        assert_eq!(verify(&path, &table).unwrap(), Verdict { current: SLOTS - 1, older: 1, wrong: 1 });
    }

    #[test]
    fn slots_and_blocks_are_each_others_inverse() {
        for slot in [0, 1, AREA_BLOCKS - 1, AREA_BLOCKS, SLOTS - 1] {
            assert_eq!(slot_of(block_of(slot)), Some(slot));
        }
        assert_eq!(slot_of(AREA_BLOCKS), None);
    }
}
