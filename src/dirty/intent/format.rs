//! The intent log's format: sectors of 512 bytes that are updated in place, each of which speaks for itself.
//!
//! | bytes | what (numbers are little-endian) |
//! |---|---|
//! | 0..8 | `lm-intnt` |
//! | 8..12 | version of the format: 1 |
//! | 12..16 | number of the sector in the file, from 0 |
//! | 16..32 | the job's id |
//! | 32..40 | the disk's size in bytes |
//! | 40..48 | bytes of a region |
//! | 48..504 | 3648 bits, the lowest of the first byte first: bit *n* of sector *s* is region 3648 *s* + *n*. 1: marked |
//! | 504..508 | zero |
//! | 508..512 | crc32c of bytes 0..508 |
//!
//! The file has as many sectors as the regions need, and at least one. Bits past the last region mean nothing.
//!
//! There is no header and no second copy: a power cut may leave each sector old, new or torn. Old and new are both true (rule
//! 2), torn ones have a wrong checksum, and then their regions count as marked.

use crate::range::ByteRange;

/// The unit of writing: what a disk writes wholly or not at all, mostly. The checksum notices the rest.
pub(super) const SECTOR_BYTES: usize = 512;
/// Words of 64 bits in one sector.
pub(super) const SECTOR_WORDS: usize = 57;

const MAGIC: [u8; 8] = *b"lm-intnt";
const VERSION: u32 = 1;
const REGIONS_MAX: u64 = 512 << 10;
/// Sectors of the largest log.
pub(super) const SECTORS_MAX: usize = (REGIONS_MAX as usize / 64).div_ceil(SECTOR_WORDS);
const REGION_BYTES_MIN: u64 = 1 << 20;
const BITS_AT: usize = 48;
const CHECKSUM_AT: usize = SECTOR_BYTES - 4;

/// Which mirror job a log belongs to: random bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobId(pub [u8; 16]);

impl JobId {
    /// The id that is written as 32 hex digits, as in the state.
    pub fn from_hex(digits: &str) -> Option<JobId> {
        let valid = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        valid.then(|| u128::from_str_radix(digits, 16).ok().map(|id| JobId(id.to_be_bytes())))?
    }
}

/// Where things are in the log of a disk of a certain size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    size_bytes: u64,
    region_shift: u32,
    regions: u32,
}

impl Layout {
    /// Regions of 1 MiB, or of the power of two above it that makes them at most 512 Ki.
    pub(super) fn new(size_bytes: u64) -> Layout {
        let wanted = size_bytes.div_ceil(REGIONS_MAX).clamp(REGION_BYTES_MIN, 1 << 63);
        let region_shift = wanted.next_power_of_two().trailing_zeros();
        let regions = size_bytes.div_ceil(1 << region_shift);
        Layout { size_bytes, region_shift, regions: u32::try_from(regions).unwrap_or(u32::MAX) }
    }

    pub(super) fn size_bytes(self) -> u64 {
        self.size_bytes
    }

    pub(super) fn region_bytes(self) -> u64 {
        1 << self.region_shift
    }

    /// How many regions the disk has; the last may be partly past its end.
    pub(super) fn regions(self) -> u32 {
        self.regions
    }

    /// The first region that `range` touches, and the one after the last. What lies past the disk's end is passed over.
    #[expect(clippy::cast_possible_truncation, reason = "a region's number is less than 2^19")]
    pub(super) fn touched(self, range: ByteRange) -> std::ops::Range<u32> {
        let end = range.end().min(self.size_bytes);
        if range.start() >= end {
            return 0..0;
        }
        (range.start() >> self.region_shift) as u32..((end - 1) >> self.region_shift) as u32 + 1
    }

    /// The bytes of the regions `start..end`, as far as they lie inside the disk.
    pub(super) fn bytes_of(self, start: u32, end: u32) -> ByteRange {
        let byte = |region| (u64::from(region) << self.region_shift).min(self.size_bytes);
        ByteRange::from_bounds(byte(start), if end >= self.regions { self.size_bytes } else { byte(end) })
    }

    /// 64-bit words that hold a bit for each region.
    pub(super) fn words(self) -> usize {
        self.regions.div_ceil(64) as usize
    }

    pub(super) fn sectors(self) -> usize {
        self.words().div_ceil(SECTOR_WORDS).max(1)
    }

    /// The sector that has the region's bit.
    pub(super) fn sector_of(region: u32) -> usize {
        region as usize / 64 / SECTOR_WORDS
    }

    /// The words that `sector` has, out of all [`Layout::words`].
    pub(super) fn words_of(self, sector: usize) -> std::ops::Range<usize> {
        let start = (sector * SECTOR_WORDS).min(self.words());
        start..(start + SECTOR_WORDS).min(self.words())
    }

    /// The bits of word `at` that belong to a region.
    pub(super) fn mask(self, at: usize) -> u64 {
        match self.regions % 64 {
            rest @ 1.. if at + 1 == self.words() => (1 << rest) - 1,
            _ => u64::MAX,
        }
    }
}

/// One sector with the words of its bits; missing words are written as zero.
pub(super) fn encode(
    layout: Layout,
    job: &JobId,
    sector: usize,
    words: impl Iterator<Item = u64>,
) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    bytes[..BITS_AT].copy_from_slice(&head(layout, job, sector));
    for (place, word) in bytes[BITS_AT..BITS_AT + 8 * SECTOR_WORDS].chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let checksum = crc32c::crc32c(&bytes[..CHECKSUM_AT]);
    bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn head(layout: Layout, job: &JobId, sector: usize) -> [u8; BITS_AT] {
    let mut head = [0; BITS_AT];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head[12..16].copy_from_slice(&u32::try_from(sector).unwrap_or(u32::MAX).to_le_bytes());
    head[16..32].copy_from_slice(&job.0);
    head[32..40].copy_from_slice(&layout.size_bytes.to_le_bytes());
    head[40..48].copy_from_slice(&layout.region_bytes().to_le_bytes());
    head
}

/// Why a sector is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// It is not there, or not all of it.
    Missing,
    /// No sector of such a log, torn, changed, or in the wrong place.
    Damaged,
    /// Of a version that is not known here.
    Version,
    /// Whole, but of another job or a disk of another size.
    Foreign,
}

/// The words of sector number `sector`, read from `bytes`; there may be more of them than the disk has.
pub(super) fn decode(
    layout: Layout,
    job: &JobId,
    sector: usize,
    bytes: &[u8],
) -> Result<impl Iterator<Item = u64>, Flaw> {
    let bytes: &[u8; SECTOR_BYTES] = bytes.try_into().map_err(|_| Flaw::Missing)?;
    let (body, checksum) = bytes.split_at(CHECKSUM_AT);
    let known = head(layout, job, sector);
    if body[..8] != known[..8] {
        return Err(Flaw::Damaged);
    }
    if crc32c::crc32c(body).to_le_bytes() != checksum {
        // Another version may keep its checksum elsewhere.
        return Err(if body[8..12] == known[8..12] { Flaw::Damaged } else { Flaw::Version });
    }
    if body[8..12] != known[8..12] {
        return Err(Flaw::Version);
    }
    if body[16..BITS_AT] != known[16..] {
        return Err(Flaw::Foreign);
    }
    if body[12..16] != known[12..16] {
        return Err(Flaw::Damaged);
    }
    let words = body[BITS_AT..BITS_AT + 8 * SECTOR_WORDS].chunks_exact(8);
    Ok(words.map(|word| u64::from_le_bytes(std::array::from_fn(|at| word[at]))))
}
