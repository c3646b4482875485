//! Raw images on block devices.
//!
//! As files, with these differences: the size is fixed; all of it is data; zeroing works on whole blocks, and giving space back on
//! whole granules of the device, in steps that it takes ([`DeviceLimits`]), and goes down this chain:
//!
//! ```text
//! write_zeroes: fallocate(ZERO_RANGE), else BLKZEROOUT, else write zeroes
//! discard:      fallocate(PUNCH_HOLE), else unsupported; what is less than a granule is zeroed
//! ```
//!
//! BLKDISCARD is never used: it promises no zeroes. The chain runs on the descriptor that holds the device exclusively:
//! through any other one the kernel refuses, with EBUSY, to zero what has unwritten pages in the page cache.

use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::fcntl::FallocateFlags;

use super::device_limits::DeviceLimits;
use super::file_io::FileIo;
use super::open::Opened;
use super::raw::attributes_of;
use super::zeroing::{Ability, Tried};
use super::{
    Attributes, DescriptorRole, Extent, ExtentStatus, Format, Identity, Image, Properties, Room, check_bounds,
};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sys::files;

/// A raw image on a block device.
#[derive(Debug)]
pub(super) struct BlockDevice {
    io: FileIo,
    opened: Opened,
    limits: DeviceLimits,
    punch: Ability,
    zero_range: Ability,
    zero_out: Ability,
}

impl BlockDevice {
    /// An image over `io`, on a device with these limits.
    pub(super) fn new(io: FileIo, opened: Opened, limits: DeviceLimits) -> Self {
        let (punch, zero_range, zero_out) = (Ability::default(), Ability::default(), Ability::default());
        BlockDevice { io, opened, limits, punch, zero_range, zero_out }
    }

    fn try_zero(&self, range: ByteRange) -> Tried {
        let device = &self.opened.locked;
        let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.zero_range.attempt_fallocate(device, flags, range) {
            Tried::Refused => self.zero_out.attempt(|| files::block_zero_out(device, range)),
            tried => tried,
        }
    }

    fn try_punch(&self, range: ByteRange) -> Tried {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.punch.attempt_fallocate(&self.opened.locked, flags, range)
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        let inner = self.limits.blocks(range);
        for edge in around(range, inner) {
            self.io.write_zero_bytes(edge)?;
        }
        for piece in inner.pieces(self.limits.zeroing_step()) {
            match self.io.change("write zeroes", piece, || self.try_zero(piece))? {
                Tried::Done => (),
                Tried::Failed(error) => return Err(self.io.failed("write zeroes to", piece, &error)),
                Tried::Refused => self.io.write_zero_bytes(piece)?,
            }
        }
        Ok(())
    }
}

/// What of `range` is not in `inner`, a part of it.
fn around(range: ByteRange, inner: ByteRange) -> [ByteRange; 2] {
    [ByteRange::from_bounds(range.start(), inner.start()), ByteRange::from_bounds(inner.end(), range.end())]
}

impl Image for BlockDevice {
    fn name(&self) -> &str {
        self.io.name()
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn size_bytes(&self) -> u64 {
        self.io.size_bytes()
    }

    fn properties(&self) -> Properties {
        Properties {
            request_alignment: self.io.request_alignment(),
            cluster_bytes: None,
            thin_zeroing: self.limits.can_discard() && self.punch.is_likely(),
            writable: self.opened.writable,
            resizable: false,
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.io.read(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.io.write(offset, data)
    }

    fn read_once(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.io.read_once(offset, buffer)
    }

    fn write_once(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.io.write_once(offset, data)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        check_bounds(self, "write zeroes", range)?;
        self.zero(range)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        check_bounds(self, "discard", range)?;
        let unsupported = || {
            let what = "the device cannot discard to zeroes:";
            Error::new(ErrorKind::Unsupported, what).on(self.name()).at(range)
        };
        if !self.limits.can_discard() {
            return Err(unsupported());
        }
        let inner = self.limits.granules(range);
        for piece in inner.pieces(self.limits.discard_step()) {
            match self.io.change("discard", piece, || self.try_punch(piece))? {
                Tried::Done => (),
                Tried::Failed(error) => return Err(self.io.failed("discard", piece, &error)),
                Tried::Refused => return Err(unsupported()),
            }
        }
        around(range, inner).into_iter().try_for_each(|edge| self.zero(edge))
    }

    /// A device is allocated from the start, as far as anybody can tell.
    fn allocate(&self, range: ByteRange) -> Result<()> {
        check_bounds(self, "allocate", range)
    }

    fn flush(&self) -> Result<()> {
        self.io.flush()
    }

    fn extent_at(&self, offset: u64) -> Extent {
        Extent { range: ByteRange::from_bounds(offset, self.size_bytes()), status: ExtentStatus::Data }
    }

    /// A device does not tell: its size.
    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.size_bytes())
    }

    fn resize(&self, _size_bytes: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "a block device has a fixed size: cannot resize").on(self.name()))
    }

    fn attributes(&self) -> Result<Attributes> {
        let meta = self.io.file().metadata();
        attributes_of(&meta.map_err(|error| Error::io("cannot look at", &error).on(self.name()))?)
    }

    /// There is room for exactly what fits the device.
    fn room(&self) -> Result<Room> {
        let size = self.size_bytes();
        Ok(Room { available_bytes: size, free_bytes: size, total_bytes: size })
    }

    fn identity(&self) -> Result<Identity> {
        let meta = self.io.file().metadata();
        let meta = meta.map_err(|error| Error::io("cannot look at", &error).on(self.name()))?;
        // A loop device is another image when another file is attached to it, and the same one under another number.
        let id = match crate::sys::files::loop_backing(self.io.file()) {
            Ok(files::LoopBacking::File { device, inode }) => Some(format!("loop-{device:x}-{inode:x}")),
            _ => None,
        };
        Ok(Identity { id, device: meta.rdev(), inode: 0, birth_ns: None, size_bytes: self.size_bytes() })
    }

    fn descriptors(&self) -> Vec<(DescriptorRole, BorrowedFd<'_>)> {
        self.opened.descriptors()
    }

    fn path(&self) -> Option<PathBuf> {
        Some(self.opened.path.clone())
    }
}
