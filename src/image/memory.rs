//! An image in memory, for tests of everything above the [`Image`] boundary.
//!
//! Sparse in pages of 4 KiB: a page that was never written, or was discarded whole, is a hole and costs nothing, so that an
//! image of many TiB is cheap. It keeps the rules of every image (see [`super`]) and reports extents and allocation as a
//! file system would. What it lacks can be chosen with [`MemoryOptions`], to see how callers cope.
//!
//! One lock guards all pages: a request is atomic against every other one. Not meant to be fast.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::SystemTime;

use super::{Attributes, Extent, ExtentStatus, Format, Identity, Image, Properties, Room, check_bounds};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, RwLock};

/// Bytes of one page: the unit of allocation.
pub const PAGE_BYTES: u64 = 4096;
const PAGE: usize = 4096;

/// What a [`MemoryImage`] can do. The default can do everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryOptions {
    /// False: [`Image::extent_at`] answers `Data` always.
    pub tells_extents: bool,
    /// False: [`Image::discard`] is refused as unsupported.
    pub can_discard: bool,
    /// False: [`Image::allocate`] is refused as unsupported.
    pub can_allocate: bool,
    /// False: [`Image::resize`] is refused as unsupported.
    pub resizable: bool,
    /// False: everything that changes the image is refused.
    pub writable: bool,
    /// What [`Properties::request_alignment`] says. Requests of any alignment work all the same.
    pub request_alignment: u64,
    /// What [`Properties::cluster_bytes`] says.
    pub cluster_bytes: Option<u64>,
    /// Bytes that may be allocated before writes fail with "no space" (whole pages). `None`: no limit.
    pub capacity_bytes: Option<u64>,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        MemoryOptions {
            tells_extents: true,
            can_discard: true,
            can_allocate: true,
            resizable: true,
            writable: true,
            request_alignment: 1,
            cluster_bytes: None,
            capacity_bytes: None,
        }
    }
}

/// An allocated page. Absent ones are holes.
#[derive(Clone)]
enum Page {
    /// Allocated, reads as zeroes.
    Zero,
    /// Bytes, which may happen to be zeroes.
    Data(Box<[u8; PAGE]>),
}

struct Content {
    pages: BTreeMap<u64, Page>,
    size_bytes: u64,
    capacity_bytes: Option<u64>,
}

/// See the module.
pub struct MemoryImage {
    name: String,
    options: MemoryOptions,
    content: RwLock<Content>,
    serial: u64,
}

impl MemoryImage {
    /// An image of `size_bytes` that is one hole.
    pub fn new(name: impl Into<String>, size_bytes: u64) -> Arc<Self> {
        Self::with_options(name, size_bytes, MemoryOptions::default())
    }

    /// As [`MemoryImage::new`], with less or other abilities.
    pub fn with_options(name: impl Into<String>, size_bytes: u64, options: MemoryOptions) -> Arc<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let content = Content { pages: BTreeMap::new(), size_bytes, capacity_bytes: options.capacity_bytes };
        Arc::new(MemoryImage {
            name: name.into(),
            options,
            content: RwLock::new(content),
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// All its bytes. For small images.
    pub fn bytes(&self) -> Vec<u8> {
        let content = self.content.read();
        let mut bytes = vec![0; usize::try_from(content.size_bytes).expect("an image that fits memory")];
        content.read(0, &mut bytes);
        bytes
    }

    /// Changes the room that is left for writes: a disk that fills up, or that somebody makes room on.
    pub fn set_capacity(&self, capacity_bytes: Option<u64>) {
        self.content.write().capacity_bytes = capacity_bytes;
    }

    fn change(&self, what: &str, range: ByteRange) -> Result<parking_lot::RwLockWriteGuard<'_, Content>> {
        let content = self.content.write();
        if !self.options.writable {
            return Err(Error::new(ErrorKind::ReadOnly, format!("cannot {what} read-only image")).on(&self.name));
        }
        if range.end() > content.size_bytes {
            let what = format!("cannot {what} past the end of");
            return Err(Error::new(ErrorKind::Usage, what).on(&self.name).at(range));
        }
        Ok(content)
    }

    fn refuse(&self, what: &str) -> Error {
        Error::new(ErrorKind::Unsupported, format!("cannot {what}")).on(&self.name)
    }
}

impl Content {
    /// The parts of `range` page by page: page number, and the part's place within the page.
    fn parts(range: ByteRange) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        range.pieces(PAGE_BYTES).map(|piece| {
            let start = usize::try_from(piece.start() % PAGE_BYTES).expect("less than a page");
            (piece.start() / PAGE_BYTES, start..start + usize::try_from(piece.len()).expect("at most a page"))
        })
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) {
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

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
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

    /// Zeroes pages that are covered partly, hands whole ones (the image's last page up to its end included) to `whole`.
    fn zero(&mut self, range: ByteRange, whole: impl Fn(&mut BTreeMap<u64, Page>, u64)) {
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
            if covers(number) {
                whole(&mut self.pages, number);
            } else if let Some(Page::Data(bytes)) = self.pages.get_mut(&number) {
                let part = ByteRange::new(number * PAGE_BYTES, PAGE_BYTES).intersect(range);
                for (_, place) in Self::parts(part) {
                    bytes[place].fill(0);
                }
            }
        }
    }

    fn allocate(&mut self, range: ByteRange) -> Result<()> {
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

impl std::fmt::Debug for MemoryImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryImage").field("name", &self.name).field("size_bytes", &self.size_bytes()).finish()
    }
}

impl Image for MemoryImage {
    fn name(&self) -> &str {
        &self.name
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn size_bytes(&self) -> u64 {
        self.content.read().size_bytes
    }

    fn properties(&self) -> Properties {
        Properties {
            request_alignment: self.options.request_alignment,
            cluster_bytes: self.options.cluster_bytes,
            thin_zeroing: self.options.can_discard,
            writable: self.options.writable,
            resizable: self.options.resizable,
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_bounds(self, "read", ByteRange::new(offset, buffer.len() as u64))?;
        self.content.read().read(offset, buffer);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.change("write", range)?.write(offset, data).map_err(|error| error.on(&self.name).at(range))
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let mut content = self.change("write zeroes", range)?;
        content.allocate(range).map_err(|error| error.on(&self.name).at(range))?;
        content.zero(range, |pages, number| {
            pages.insert(number, Page::Zero);
        });
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let mut content = self.change("discard", range)?;
        if !self.options.can_discard {
            return Err(self.refuse("discard").at(range));
        }
        content.zero(range, |pages, number| {
            pages.remove(&number);
        });
        Ok(())
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        let mut content = self.change("allocate", range)?;
        if !self.options.can_allocate {
            return Err(self.refuse("allocate").at(range));
        }
        content.allocate(range).map_err(|error| error.on(&self.name).at(range))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> Extent {
        let content = self.content.read();
        let end = content.size_bytes;
        if !self.options.tells_extents {
            return Extent { range: ByteRange::from_bounds(offset, end), status: ExtentStatus::Data };
        }
        let status = |page: Option<&Page>| match page {
            None => ExtentStatus::Hole,
            Some(Page::Zero) => ExtentStatus::Zero,
            Some(Page::Data(_)) => ExtentStatus::Data,
        };
        let first = offset / PAGE_BYTES;
        let wanted = status(content.pages.get(&first));
        let mut after = first + 1;
        if wanted == ExtentStatus::Hole {
            let next = content.pages.range((Bound::Excluded(first), Bound::Unbounded)).next();
            after = next.map_or(end.div_ceil(PAGE_BYTES), |(number, _)| *number);
        } else {
            while status(content.pages.get(&after)) == wanted {
                after += 1;
            }
        }
        let range = ByteRange::from_bounds(offset, (after * PAGE_BYTES).min(end));
        Extent { range, status: wanted }
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.content.read().pages.len() as u64 * PAGE_BYTES)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        if !self.options.resizable {
            return Err(self.refuse("resize"));
        }
        let mut content = self.change("resize", ByteRange::new(0, 0))?;
        let cut = ByteRange::from_bounds(size_bytes, content.size_bytes.next_multiple_of(PAGE_BYTES));
        content.zero(cut, |_, _| ());
        content.pages.split_off(&size_bytes.div_ceil(PAGE_BYTES));
        content.size_bytes = size_bytes;
        Ok(())
    }

    fn attributes(&self) -> Result<Attributes> {
        let epoch = SystemTime::UNIX_EPOCH;
        Ok(Attributes { mode: 0o600, uid: 0, gid: 0, modified: epoch, changed: epoch, accessed: epoch })
    }

    fn room(&self) -> Result<Room> {
        let total_bytes = self.content.read().capacity_bytes.unwrap_or(1 << 50);
        let free_bytes = total_bytes.saturating_sub(self.allocated_bytes()?);
        Ok(Room { available_bytes: free_bytes, free_bytes, total_bytes })
    }

    fn identity(&self) -> Result<Identity> {
        let id = Some(format!("memory-{}", self.serial));
        Ok(Identity { id, device: 0, inode: self.serial, birth_ns: None, size_bytes: self.size_bytes() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statuses(image: &MemoryImage) -> Vec<(u64, u64, ExtentStatus)> {
        let mut found = Vec::new();
        let mut offset = 0;
        while offset < image.size_bytes() {
            let extent = image.extent_at(offset);
            assert_eq!(extent.range.start(), offset);
            assert!(!extent.range.is_empty());
            found.push((extent.range.start(), extent.range.end(), extent.status));
            offset = extent.range.end();
        }
        found
    }

    #[test]
    fn extents_follow_writes_zeroes_and_discards() {
        let image = MemoryImage::new("m", 40_000);
        image.write_at(5000, &[1; 10]).unwrap();
        image.write_zeroes(ByteRange::new(12_288, 8192)).unwrap();
        use ExtentStatus::*;
        assert_eq!(
            statuses(&image),
            [(0, 4096, Hole), (4096, 8192, Data), (8192, 12_288, Hole), (12_288, 20_480, Zero), (20_480, 40_000, Hole)]
        );
        assert_eq!(image.allocated_bytes().unwrap(), 3 * 4096);
        image.discard(ByteRange::from_bounds(0, 40_000)).unwrap();
        assert_eq!(statuses(&image), [(0, 40_000, Hole)]);
        assert_eq!(image.bytes(), vec![0; 40_000]);
    }

    #[test]
    fn a_shrunk_image_forgets_what_was_cut() {
        let image = MemoryImage::new("m", 10_000);
        image.write_at(0, &[7; 10_000]).unwrap();
        image.resize(5000).unwrap();
        image.resize(10_000).unwrap();
        let bytes = image.bytes();
        assert!(bytes[..5000].iter().all(|&byte| byte == 7) && bytes[5000..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn sixteen_tebibytes_cost_nothing_and_a_full_one_says_so() {
        let options = MemoryOptions { capacity_bytes: Some(8192), ..MemoryOptions::default() };
        let image = MemoryImage::with_options("m", 16 << 40, options);
        assert_eq!(image.extent_at(1 << 40).range.end(), 16 << 40);
        image.write_at((16 << 40) - 4096, &[1; 4096]).unwrap();
        image.write_at(0, &[1; 4096]).unwrap();
        assert_eq!(image.write_at(8192, &[1; 1]).unwrap_err().kind(), ErrorKind::NoSpace);
        image.set_capacity(None);
        image.write_at(8192, &[1; 1]).unwrap();
    }

    #[test]
    fn what_it_lacks_is_refused() {
        let options = MemoryOptions {
            can_discard: false,
            resizable: false,
            tells_extents: false,
            can_allocate: false,
            ..MemoryOptions::default()
        };
        let image = MemoryImage::with_options("m", 8192, options);
        assert_eq!(image.discard(ByteRange::new(0, 4096)).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(image.allocate(ByteRange::new(0, 4096)).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(image.resize(0).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(image.extent_at(1).status, ExtentStatus::Data);
        assert_eq!(image.write_at(8192, &[1]).unwrap_err().kind(), ErrorKind::Usage);
    }
}
