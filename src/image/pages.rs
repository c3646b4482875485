//! The sparse bytes of an image in memory.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::ExtentStatus;
use crate::error::{Error, Result};
use crate::range::ByteRange;

/// Bytes of one page: the unit of allocation.
pub const PAGE_BYTES: u64 = 4096;
const PAGE: usize = 4096;

/// An allocated page. Absent ones are holes.
#[derive(Clone)]
enum Page {
    /// Allocated, reads as zeroes.
    Zero,
    /// Bytes, which may happen to be zeroes.
    Data(Box<[u8; PAGE]>),
}

/// See the module.
pub(super) struct Pages {
    pages: BTreeMap<u64, Page>,
    size_bytes: u64,
    /// Bytes of pages that may be there at most.
    pub(super) capacity_bytes: Option<u64>,
}

impl Pages {
    /// `size_bytes` of hole.
    pub(super) fn new(size_bytes: u64, capacity_bytes: Option<u64>) -> Self {
        Pages { pages: BTreeMap::new(), size_bytes, capacity_bytes }
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE_BYTES
    }

    /// Cuts off what is past `size_bytes`, or adds a hole.
    pub(super) fn resize(&mut self, size_bytes: u64) {
        let cut = ByteRange::from_bounds(size_bytes, self.size_bytes.next_multiple_of(PAGE_BYTES));
        self.zero(cut, true);
        self.pages.split_off(&size_bytes.div_ceil(PAGE_BYTES));
        self.size_bytes = size_bytes;
    }

    /// What the page of `offset` holds, and where the run of such pages ends.
    pub(super) fn run_at(&self, offset: u64) -> (ExtentStatus, u64) {
        let status = |page: Option<&Page>| match page {
            None => ExtentStatus::Hole,
            Some(Page::Zero) => ExtentStatus::Zero,
            Some(Page::Data(_)) => ExtentStatus::Data,
        };
        let first = offset / PAGE_BYTES;
        let wanted = status(self.pages.get(&first));
        let mut after = first + 1;
        if wanted == ExtentStatus::Hole {
            let next = self.pages.range((Bound::Excluded(first), Bound::Unbounded)).next();
            after = next.map_or(self.size_bytes.div_ceil(PAGE_BYTES), |(number, _)| *number);
        } else {
            while status(self.pages.get(&after)) == wanted {
                after += 1;
            }
        }
        (wanted, (after * PAGE_BYTES).min(self.size_bytes))
    }

    /// The parts of `range` page by page: page number, and the part's place within the page.
    fn parts(range: ByteRange) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        range.pieces(PAGE_BYTES).map(|piece| {
            let start = usize::try_from(piece.start() % PAGE_BYTES).expect("less than a page");
            (piece.start() / PAGE_BYTES, start..start + usize::try_from(piece.len()).expect("at most a page"))
        })
    }

    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) {
        let mut rest = buffer;
        for (number, place) in Self::parts(ByteRange::new(offset, rest.len() as u64)) {
            let (head, tail) = rest.split_at_mut(place.len());
            match self.pages.get(&number) {
                Some(Page::Data(bytes)) => head.copy_from_slice(&bytes[place]),
                Some(Page::Zero) | None => head.fill(0),
            }
            rest = tail;
        }
    }

    /// False if the page is not there and there is no room for it.
    fn has_room_for(&self, number: u64) -> bool {
        let used = self.pages.len() as u64 * PAGE_BYTES;
        self.pages.contains_key(&number) || self.capacity_bytes.is_none_or(|limit| used + PAGE_BYTES <= limit)
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let mut rest = data;
        for (number, place) in Self::parts(ByteRange::new(offset, data.len() as u64)) {
            if !self.has_room_for(number) {
                return Err(full());
            }
            let (head, tail) = rest.split_at(place.len());
            let page = self.pages.entry(number).or_insert(Page::Zero);
            if let Page::Zero = page {
                *page = Page::Data(Box::new([0; PAGE]));
            }
            if let Page::Data(bytes) = page {
                bytes[place].copy_from_slice(head);
            }
            rest = tail;
        }
        Ok(())
    }

    /// Zeroes pages that are covered partly. Whole ones (the last page is whole up to the image's end) are dropped, or kept
    /// as zeroes if `keep`; none is added.
    pub(super) fn zero(&mut self, range: ByteRange, keep: bool) {
        let last = self.size_bytes;
        let covers = |number: u64| {
            range.contains(ByteRange::from_bounds(number * PAGE_BYTES, ((number + 1) * PAGE_BYTES).min(last)))
        };
        if range.is_empty() {
            return;
        }
        let there = self.pages.range(range.start() / PAGE_BYTES..range.end().div_ceil(PAGE_BYTES));
        let numbers: Vec<u64> = there.map(|(number, _)| *number).collect();
        for number in numbers {
            if covers(number) && keep {
                self.pages.insert(number, Page::Zero);
            } else if covers(number) {
                self.pages.remove(&number);
            } else if let Some(Page::Data(bytes)) = self.pages.get_mut(&number) {
                let part = ByteRange::new(number * PAGE_BYTES, PAGE_BYTES).intersect(range);
                for (_, place) in Self::parts(part) {
                    bytes[place].fill(0);
                }
            }
        }
    }

    pub(super) fn allocate(&mut self, range: ByteRange) -> Result<()> {
        for (number, _) in Self::parts(range) {
            if !self.has_room_for(number) {
                return Err(full());
            }
            self.pages.entry(number).or_insert(Page::Zero);
        }
        Ok(())
    }
}

fn full() -> Error {
    Error::io("cannot write", &std::io::Error::from_raw_os_error(libc::ENOSPC))
}
