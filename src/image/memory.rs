//! An image in memory, for tests of everything above the [`Image`] boundary.
//!
//! Sparse in pages of 4 KiB: a page that was never written, or was discarded whole, is a hole and costs nothing, so that an
//! image of many TiB is cheap. It keeps the rules of every image (see [`super`]) and reports extents and allocation as a
//! file system would. What it lacks can be chosen with [`MemoryOptions`], to see how callers cope.
//!
//! One lock guards all pages: a request is atomic against every other one. Not meant to be fast.

use std::time::SystemTime;

pub use super::pages::PAGE_BYTES;
use super::pages::Pages;
use super::{Attributes, Extent, ExtentStatus, Format, Identity, Image, Properties, Room, check_bounds};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, RwLock, RwLockWriteGuard};

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

/// See the module.
pub struct MemoryImage {
    name: String,
    options: MemoryOptions,
    content: RwLock<Pages>,
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
        let content = Pages::new(size_bytes, options.capacity_bytes);
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
        let mut bytes = vec![0; usize::try_from(content.size_bytes()).expect("an image that fits memory")];
        content.read(0, &mut bytes);
        bytes
    }

    /// Changes the room that is left for writes: a disk that fills up, or that somebody makes room on.
    pub fn set_capacity(&self, capacity_bytes: Option<u64>) {
        self.content.write().capacity_bytes = capacity_bytes;
    }

    fn change(&self, what: &str, range: ByteRange) -> Result<RwLockWriteGuard<'_, Pages>> {
        let content = self.content.write();
        if !self.options.writable {
            return Err(Error::new(ErrorKind::ReadOnly, format!("cannot {what} read-only image")).on(&self.name));
        }
        if range.end() > content.size_bytes() {
            let what = format!("cannot {what} past the end of");
            return Err(Error::new(ErrorKind::Usage, what).on(&self.name).at(range));
        }
        Ok(content)
    }

    fn refuse(&self, what: &str) -> Error {
        Error::new(ErrorKind::Unsupported, format!("cannot {what}")).on(&self.name)
    }
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
        self.content.read().size_bytes()
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
        content.zero(range, true);
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let mut content = self.change("discard", range)?;
        if !self.options.can_discard {
            return Err(self.refuse("discard").at(range));
        }
        content.zero(range, false);
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
        if !self.options.tells_extents {
            return Extent { range: ByteRange::from_bounds(offset, content.size_bytes()), status: ExtentStatus::Data };
        }
        let (status, end) = content.run_at(offset);
        Extent { range: ByteRange::from_bounds(offset, end), status }
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.content.read().allocated_bytes())
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        if !self.options.resizable {
            return Err(self.refuse("resize"));
        }
        let mut content = self.change("resize", ByteRange::new(0, 0))?;
        content.resize(size_bytes);
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
