//! What a log that was found says: never less than the truth, whatever happened to the file.

use std::fmt;

use super::format::{Flaw, JobId, Layout, SECTOR_BYTES, decode};

/// What [`recover`] found. Regions of sectors that were not believed are marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Sectors that the log should have.
    pub sectors: u32,
    /// Of those, how many were not there, or not wholly.
    pub missing_sectors: u32,
    /// Torn, changed, or in the wrong place.
    pub damaged_sectors: u32,
    /// Of a version of the format that is not known here.
    pub unknown_sectors: u32,
    /// Of another job, or of a disk of another size.
    pub foreign_sectors: u32,
    /// Regions of the disk.
    pub regions: u32,
    /// Regions that are marked now.
    pub marked_regions: u32,
    /// Of those, how many are so only because their sector was not believed.
    pub presumed_regions: u32,
}

impl Recovery {
    /// True if every sector was as it should be.
    pub fn is_whole(&self) -> bool {
        self.bad_sectors() == 0
    }

    /// Sectors that were not believed.
    pub fn bad_sectors(&self) -> u32 {
        self.missing_sectors + self.damaged_sectors + self.unknown_sectors + self.foreign_sectors
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} regions marked", self.marked_regions, self.regions)?;
        if self.is_whole() {
            return Ok(());
        }
        write!(
            f,
            ", {} of them because of {} bad sectors of {}",
            self.presumed_regions,
            self.bad_sectors(),
            self.sectors
        )?;
        let kinds = [
            (self.missing_sectors, "missing"),
            (self.damaged_sectors, "damaged"),
            (self.unknown_sectors, "of an unknown version"),
            (self.foreign_sectors, "of another job or disk"),
        ];
        let mut before = " (";
        for (number, kind) in kinds.into_iter().filter(|(number, _)| *number > 0) {
            write!(f, "{before}{number} {kind}")?;
            before = ", ";
        }
        f.write_str(")")
    }
}

/// Reads a log's `bytes` for the job `job` of a disk of `size_bytes`. Returns a bit for each region, the lowest first; bits past
/// the last region are clear. Whatever the bytes are, a region that was marked in them is marked in the result: what is not
/// believed counts as all marked, and bytes past the log's end are not looked at. Memory: 64 KiB, whatever the size.
pub fn recover(bytes: &[u8], job: &JobId, size_bytes: u64) -> (Vec<u64>, Recovery) {
    let layout = Layout::new(size_bytes);
    let mut marked = vec![0; layout.words()];
    let mut recovery = Recovery { regions: layout.regions(), ..Recovery::default() };
    for sector in 0..layout.sectors() {
        let start = (sector * SECTOR_BYTES).min(bytes.len());
        let found = &bytes[start..(start + SECTOR_BYTES).min(bytes.len())];
        let places = layout.words_of(sector);
        recovery.sectors += 1;
        match decode(layout, job, sector, found) {
            Ok(words) => marked[places].iter_mut().zip(words).for_each(|(place, word)| *place = word),
            Err(flaw) => {
                let count = match flaw {
                    Flaw::Missing => &mut recovery.missing_sectors,
                    Flaw::Damaged => &mut recovery.damaged_sectors,
                    Flaw::Version => &mut recovery.unknown_sectors,
                    Flaw::Foreign => &mut recovery.foreign_sectors,
                };
                *count += 1;
                recovery.presumed_regions += places.clone().map(|at| layout.mask(at).count_ones()).sum::<u32>();
                marked[places].fill(u64::MAX);
            }
        }
    }
    for (at, word) in marked.iter_mut().enumerate() {
        *word &= layout.mask(at);
        recovery.marked_regions += word.count_ones();
    }
    (marked, recovery)
}
/// Bytes of the regions that a log of these bytes has marked, to the nearest region.
pub fn marked_bytes(bytes: &[u8], job: &JobId, size_bytes: u64) -> u64 {
    let (marked, _) = recover(bytes, job, size_bytes);
    let regions: u64 = marked.iter().map(|word| u64::from(word.count_ones())).sum();
    (regions * Layout::new(size_bytes).region_bytes()).min(size_bytes)
}
