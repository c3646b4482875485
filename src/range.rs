//! Byte ranges and granules: offsets and lengths as types of their own, so that swapping them does not compile.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A half-open range of bytes of a disk: `start()..end()`. May be empty; never wraps.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start_bytes: u64,
    len_bytes: u64,
}

impl ByteRange {
    /// The range of `len` bytes at `start`. Clipped at the end of the address space, so that `end()` never wraps.
    pub const fn new(start: u64, len: u64) -> Self {
        let room = u64::MAX - start;
        ByteRange { start_bytes: start, len_bytes: if len > room { room } else { len } }
    }

    /// The range from `start` up to, not including, `end`; empty if `end <= start`.
    pub const fn from_bounds(start: u64, end: u64) -> Self {
        ByteRange { start_bytes: start, len_bytes: end.saturating_sub(start) }
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start_bytes
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.start_bytes + self.len_bytes
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.len_bytes
    }

    /// True if the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len_bytes == 0
    }

    /// True if both ranges share at least one byte.
    pub const fn overlaps(self, other: ByteRange) -> bool {
        self.start() < other.end() && other.start() < self.end() && !self.is_empty() && !other.is_empty()
    }

    /// True if every byte of `other` lies in this range.
    pub const fn contains(self, other: ByteRange) -> bool {
        other.is_empty() || (self.start() <= other.start() && other.end() <= self.end())
    }

    /// The shared bytes; empty if there are none.
    pub fn intersect(self, other: ByteRange) -> ByteRange {
        ByteRange::from_bounds(self.start().max(other.start()), self.end().min(other.end()))
    }

    /// The smallest range with both ends on multiples of `align` (not necessarily a power of two) that holds this one.
    pub fn align_out(self, align: u64) -> ByteRange {
        if self.is_empty() {
            return self;
        }
        let start = self.start() - self.start() % align;
        ByteRange::from_bounds(start, self.end().checked_next_multiple_of(align).unwrap_or(u64::MAX))
    }

    /// The largest range with both ends on multiples of `align` that lies in this one; may be empty.
    pub fn align_in(self, align: u64) -> ByteRange {
        match self.start().checked_next_multiple_of(align) {
            Some(start) => ByteRange::from_bounds(start, self.end() - self.end() % align),
            None => ByteRange::new(self.start(), 0),
        }
    }

    /// The first `limit` bytes, and the rest.
    pub fn split(self, limit: u64) -> (ByteRange, ByteRange) {
        let head = self.len().min(limit);
        (ByteRange::new(self.start(), head), ByteRange::from_bounds(self.start() + head, self.end()))
    }

    /// Pieces of at most `limit` bytes each, in order, cut at multiples of `limit`.
    pub fn pieces(self, limit: u64) -> impl Iterator<Item = ByteRange> {
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (head, tail) = rest.split(limit - rest.start() % limit);
            rest = tail;
            Some(head)
        })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start(), self.end())
    }
}

/// The number of a granule: its first byte is at `number * granularity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granule(pub u64);

/// The size of a granule: a power of two from 512 B to 64 MiB (the limits of QEMU's dirty bitmaps). Written down in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Granularity {
    shift: u32,
}

impl Granularity {
    /// Used where nothing else is told: 64 KiB.
    pub const DEFAULT: Granularity = Granularity { shift: 16 };

    /// `None` unless `bytes` is a power of two from 512 to 64 MiB.
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 512 && bytes <= 64 << 20 {
            Some(Granularity { shift: bytes.trailing_zeros() })
        } else {
            None
        }
    }

    /// Bytes of one granule.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// How many granules a disk of `size` bytes has; the last may be partly past the end.
    pub const fn count(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }

    /// The granule that holds the byte at `offset`.
    pub const fn granule_of(self, offset: u64) -> Granule {
        Granule(offset >> self.shift)
    }

    /// The first byte of `granule`.
    pub const fn start_of(self, granule: Granule) -> u64 {
        granule.0 << self.shift
    }
}

impl TryFrom<u64> for Granularity {
    type Error = &'static str;

    fn try_from(bytes: u64) -> Result<Self, Self::Error> {
        Granularity::new(bytes).ok_or("not a granularity")
    }
}

impl From<Granularity> for u64 {
    fn from(granularity: Granularity) -> u64 {
        granularity.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_goes_out_and_in() {
        let range = ByteRange::from_bounds(100, 1100);
        assert_eq!(range.align_out(512), ByteRange::from_bounds(0, 1536));
        assert_eq!(range.align_in(512), ByteRange::from_bounds(512, 1024));
        assert!(ByteRange::from_bounds(100, 600).align_in(512).is_empty());
    }

    #[test]
    fn pieces_cut_at_multiples() {
        let pieces: Vec<_> = ByteRange::from_bounds(100, 1100).pieces(512).collect();
        assert_eq!(
            pieces,
            [ByteRange::from_bounds(100, 512), ByteRange::from_bounds(512, 1024), ByteRange::from_bounds(1024, 1100)]
        );
    }

    #[test]
    fn ends_never_wrap() {
        assert_eq!(ByteRange::new(u64::MAX - 1, 10).end(), u64::MAX);
        assert_eq!(ByteRange::new(u64::MAX - 1, 1).align_out(4096).end(), u64::MAX);
    }

    #[test]
    fn granularity_is_bounded() {
        assert!(Granularity::new(256).is_none());
        assert!(Granularity::new(3 << 10).is_none());
        assert!(Granularity::new(128 << 20).is_none());
        assert_eq!(Granularity::DEFAULT.count(65_537), 2);
    }
}
