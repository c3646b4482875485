//! Images: the places where a disk's bytes live.
//!
//! [`Image`] is the boundary to storage. Production, fault injection ([`faulty`]) and tests ([`memory`]) stand behind the
//! same trait; nothing above it knows files. An image knows nobody: no volume, no job, no guest.
//!
//! Rules that every image keeps:
//! - every method takes `&self` and may be called from many threads at once;
//! - reads and writes are whole or they fail; a failed write may have changed any of its bytes;
//! - a write that is not aligned to [`Properties::request_alignment`] is allowed: the image holds the blocks that it shares
//!   against every other write, and never extends the image's tail;
//! - bytes written outside a request's range never change.

pub mod aligned;
mod block_device;
mod device_limits;
pub mod faulty;
mod file_io;
mod gate;
mod layout;
mod lock;
pub mod memory;
pub mod nbd;
mod open;
pub mod own_mount;
mod pages;
mod probe;
mod qcow2;
mod raw;
mod same;
mod stripes;
mod users;
mod zeroing;

pub use self::layout::{BackingFile, Layout, Version};
pub use self::open::{OpenOptions, Role};
#[cfg(not(all(test, shuttle)))]
pub use self::open::{create, open, sync_parent_directory};
pub use self::probe::{format_of_content, format_of_name};
pub use self::same::{check_in_place, is_image_at, is_same_file, refuse_on_own_disk, refuse_same, same_image};
#[cfg(all(test, shuttle))]
pub use crate::simulation::image::{create, open, sync_parent_directory};

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::Arc;

/// What a byte range of an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentStatus {
    /// Bytes that must be read. Also the answer of an image that cannot tell, or failed to.
    Data,
    /// Allocated, reads as zeroes.
    Zero,
    /// Unallocated, reads as zeroes.
    Hole,
}

/// A byte range with one status. Two extents in a row may have the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Never empty; ends at the image's end at the latest.
    pub range: ByteRange,
    /// What it holds.
    pub status: ExtentStatus,
}

/// How the bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// A plain file or block device: byte N of the disk is byte N of the file.
    Raw,
    /// A qcow2 file, with its backing files.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// How the host's page cache is used, with the meanings of QEMU's `cache=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// Direct I/O: the host's page cache is bypassed.
    None,
    /// Through the host's page cache; durable after a flush.
    #[default]
    Writeback,
}

/// What an image can do, fixed while it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Requests aligned to this many bytes go through without read-modify-write. A power of two, 1 at least.
    pub request_alignment: u64,
    /// The unit of allocation (a file system's block, a qcow2 cluster), if the image has one.
    pub cluster_bytes: Option<u64>,
    /// True if [`Image::discard`] frees space and leaves zeroes, as far as is known now (a refusal teaches it).
    pub thin_zeroing: bool,
    /// False if it was opened read-only.
    pub writable: bool,
    /// True if [`Image::resize`] works.
    pub resizable: bool,
}

/// Owner, mode and times that a mounted disk shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits (`0o7777` at most).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub modified: std::time::SystemTime,
    /// Last status change.
    pub changed: std::time::SystemTime,
    /// Last access.
    pub accessed: std::time::SystemTime,
}

/// Room on what the image lies on, for `statfs` and for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes that an ordinary user may still allocate there.
    pub available_bytes: u64,
    /// Free bytes, reserved ones included.
    pub free_bytes: u64,
    /// Size of it all.
    pub total_bytes: u64,
}

/// What came of [`Image::copy_range_from`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyOffer {
    /// The range was copied, without its bytes passing through our memory.
    Copied {
        /// How long the source's writers were kept out.
        held: std::time::Duration,
    },
    /// This pair of images cannot: read and write.
    Declined,
}

/// Which image it is, whatever it is called (an inode number alone proves nothing: ext4 gives the next file the number of a deleted one).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random id kept in the image's xattr `user.livemirror.id`, where there are xattrs. Of a loop device: what its
    /// file is. Of an NBD export: its URI, hashed.
    pub id: Option<String>,
    /// Device number of the file system, or of the block device itself.
    pub device: u64,
    /// Inode number, 0 for a block device.
    pub inode: u64,
    /// Birth time in nanoseconds since the epoch, where the file system tells.
    pub birth_ns: Option<u64>,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// Which descriptor a parked one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DescriptorRole {
    /// The one that carries the image locks and serves I/O.
    Locked,
    /// An O_PATH one: to open the image again with other flags through /proc/self/fd.
    Path,
    /// The socket of an NBD connection: who takes it over reads its end (rule 14).
    Connection,
}

/// A place where a disk's bytes live. See the module for the rules.
pub trait Image: Send + Sync + fmt::Debug {
    /// The absolute path (or URI) it was opened with; used in every message.
    fn name(&self) -> &str;

    /// How its bytes are stored.
    fn format(&self) -> Format;

    /// The disk's size in bytes.
    fn size_bytes(&self) -> u64;

    /// What it can do.
    fn properties(&self) -> Properties;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When not all of it can be read; also when the range does not lie within the image.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Writes all of `data` at `offset`. Not durable before [`Image::flush`].
    ///
    /// # Errors
    /// When not all of it was written; any part of it may have been. Also when the range does not lie within the image.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()>;

    /// As [`Image::read_at`], of what will not be read again soon: the host's page cache is left as it was, where that is possible.
    ///
    /// # Errors
    /// As [`Image::read_at`].
    fn read_once(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.read_at(offset, buffer)
    }

    /// As [`Image::write_at`], of what will not be read soon: it is on its way to the store at once, and does not stay in the host's page
    /// cache, where that is possible.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    fn write_once(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_at(offset, data)
    }

    /// Makes `range` read as zeroes and keeps it allocated where the image can (a guest's `fallocate(ZERO_RANGE)`), by
    /// whatever means works: never fails for want of a special operation.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    fn write_zeroes(&self, range: ByteRange) -> Result<()>;

    /// Makes `range` read as zeroes and gives its space back: the thinnest zeroing there is. Blocks that are covered only
    /// partly are zeroed, not freed.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the image cannot do both (use [`Image::write_zeroes`]); else as [`Image::write_at`].
    fn discard(&self, range: ByteRange) -> Result<()>;

    /// Allocates `range` without changing what it reads (a guest's plain `fallocate`).
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] or [`ErrorKind::NoSpace`] among others.
    fn allocate(&self, range: ByteRange) -> Result<()>;

    /// Makes every write that was acknowledged before durable.
    ///
    /// # Errors
    /// After a failure nothing is known of the writes since the last success, and a later success does not change that.
    fn flush(&self) -> Result<()>;

    /// A loss of acknowledged writes that no guest was told of ([`Image::told`]) and that reading does not show, whether or not a flush of
    /// somebody else's has failed with it. Known without I/O. An image whose losses show in what is read, or last no longer than this
    /// process, has none.
    fn owes(&self) -> Option<Error> {
        None
    }

    /// A guest's flush has failed with what a flush of this image has reported: nobody needs to be told any more.
    fn told(&self) {}

    /// The extent that holds the byte at `offset` (< size), from `offset` on. Asked lazily: one call costs one look, however
    /// large the image. An image that cannot tell answers `Data`.
    fn extent_at(&self, offset: u64) -> Extent;

    /// As [`Image::extent_at`] at the start of `range` (not empty, inside the image), for a caller who looks at `range` only:
    /// where there is data at its start, the answer may be `Data` for all of it, holes behind the data included. For images
    /// to which finding the next hole costs time in proportion to the data before it.
    fn extent_within(&self, range: ByteRange) -> Extent {
        self.extent_at(range.start())
    }

    /// Bytes that the image takes up on its store.
    ///
    /// # Errors
    /// When the store does not tell.
    fn allocated_bytes(&self) -> Result<u64>;

    /// Changes the size. New bytes read as zeroes.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the image has a fixed size.
    fn resize(&self, size_bytes: u64) -> Result<()>;

    /// Owner, mode and times.
    ///
    /// # Errors
    /// When the store does not tell.
    fn attributes(&self) -> Result<Attributes>;

    /// Room where the image lies.
    ///
    /// # Errors
    /// When the store does not tell.
    fn room(&self) -> Result<Room>;

    /// Which image it is.
    ///
    /// # Errors
    /// When the store does not tell.
    fn identity(&self) -> Result<Identity>;

    /// Offers to copy `range` from the same range of `source` without the bytes passing through our memory: raw files on one file system
    /// share blocks where it can (reflink). `range` is made of whole blocks of 64 KiB.
    ///
    /// # Errors
    /// As [`Image::write_at`]. A pair of images that cannot answers [`CopyOffer::Declined`], and nothing has changed.
    fn copy_range_from(&self, _source: &dyn Image, _range: ByteRange) -> Result<CopyOffer> {
        Ok(CopyOffer::Declined)
    }

    /// The caller gives up on the requests under way: the image ends them as soon as it can (a network image drops its
    /// connection). An image that cannot does nothing; its requests then end when they end, and until then their ranges stay
    /// locked (rule 14). Raw files and devices cannot; who waits for them gives up by [`crate::volume::target_queue::Ticket`].
    fn give_up(&self) {}

    /// The image beneath it, which has what is not allocated in this one.
    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    /// The first part of `range` (on the disk) of which none of the uppermost `layers` layers has anything, this image being the first: what
    /// is read there is what the layer beneath them holds, or zeroes past its end. Empty where one of them has the first byte, where there is
    /// no layer beneath, or where it cannot be told.
    fn shows_beneath(&self, _layers: u32, range: ByteRange) -> ByteRange {
        range.split(0).0
    }

    /// Gives back what is only kept for speed (clusters that were reserved for writes to come); to be called when no request is
    /// under way or expected, before others look at the file. The image can be used afterwards.
    ///
    /// # Errors
    /// As [`Image::write_at`]; nothing of the disk is lost.
    fn settle(&self) -> Result<()> {
        Ok(())
    }

    /// The descriptors to park with the keeper, so that locks outlive the server. Empty where there are none.
    fn descriptors(&self) -> Vec<(DescriptorRole, BorrowedFd<'_>)> {
        Vec::new()
    }

    /// The path of the file or device, if it is one.
    fn path(&self) -> Option<PathBuf> {
        None
    }
}

/// Checks that `range` lies within `image`.
///
/// # Errors
/// [`ErrorKind::Usage`] naming the operation, the image and the range.
pub fn check_bounds(image: &dyn Image, what: &str, range: ByteRange) -> Result<()> {
    if range.end() <= image.size_bytes() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Usage, format!("cannot {what} past the end of")).on(image.name()).at(range))
}

#[cfg(all(test, not(shuttle)))]
pub(crate) mod tests;
