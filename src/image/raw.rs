//! Raw images in regular files: byte N of the disk is byte N of the file.
//!
//! Special operations go down a chain until one is not refused, and a refusal is remembered:
//!
//! ```text
//! write_zeroes: ZERO_RANGE, else PUNCH_HOLE and allocate, else write zeroes
//! discard:      PUNCH_HOLE, else unsupported
//! allocate:     fallocate,  else unsupported
//! extent_at:    SEEK_DATA and SEEK_HOLE, else all data
//! copy_range_from: FICLONERANGE, else declined
//! ```
//!
//! `extent_within` asks SEEK_DATA only: tmpfs answers SEEK_HOLE by a walk over each page of the data.
//!
//! Space that was allocated and never written counts as a hole: SEEK_HOLE does not tell the two apart.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::unistd::{Whence, lseek};

use super::file_io::FileIo;
use super::open::Opened;
use super::zeroing::{Ability, Tried};
use super::{Attributes, CopyOffer, DescriptorRole, Extent, ExtentStatus, Format, Identity, Image, Properties, Room};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sys::files;

/// The xattr that holds an image's random id.
pub(super) const ID_ATTRIBUTE: &std::ffi::CStr = c"user.livemirror.id";

/// A raw image in a regular file.
#[derive(Debug)]
pub(super) struct RawImage {
    io: FileIo,
    opened: Opened,
    cluster_bytes: u64,
    punch: Ability,
    zero_range: Ability,
    fallocate: Ability,
    seek: Ability,
    clone: Ability,
}

impl RawImage {
    /// A raw image over `io`. The rest of what was opened is kept for its locks.
    pub(super) fn new(io: FileIo, opened: Opened) -> Result<Self> {
        let meta = io.file().metadata().map_err(|error| Error::io("cannot look at", &error).on(io.name()))?;
        Ok(RawImage {
            io,
            opened,
            cluster_bytes: meta.blksize(),
            punch: Ability::default(),
            zero_range: Ability::default(),
            fallocate: Ability::default(),
            seek: Ability::default(),
            clone: Ability::default(),
        })
    }

    fn cannot(&self, what: &str) -> impl Fn(std::io::Error) -> Error {
        let what = format!("cannot {what}");
        let name = self.io.name().to_owned();
        move |error| Error::io(&*what, &error).on(&*name)
    }

    /// `range`, and where it reaches the end of the file, the rest of the last block: a punched block that the end cuts is
    /// freed only if it is punched whole.
    fn with_last_block(&self, range: ByteRange) -> ByteRange {
        if range.end() == self.io.size_bytes() {
            let end = range.end().checked_next_multiple_of(self.cluster_bytes.max(1)).unwrap_or(range.end());
            return ByteRange::from_bounds(range.start(), end);
        }
        range
    }

    fn try_punch(&self, range: ByteRange) -> Tried {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.punch.attempt_fallocate(self.io.file(), flags, self.with_last_block(range))
    }

    fn try_allocate(&self, range: ByteRange) -> Tried {
        self.fallocate.attempt_fallocate(self.io.file(), FallocateFlags::FALLOC_FL_KEEP_SIZE, range)
    }

    /// The chain of `write_zeroes` without its last link.
    fn try_zero(&self, range: ByteRange) -> Tried {
        let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.zero_range.attempt_fallocate(self.io.file(), flags, range) {
            Tried::Refused => (),
            tried => return tried,
        }
        // Without an allocation afterwards a later write could meet a full file system.
        match self.fallocate.is_likely().then(|| self.try_punch(range)) {
            Some(Tried::Done) => self.try_allocate(range),
            Some(tried) => tried,
            None => Tried::Refused,
        }
    }

    /// Where the next data (or the next hole) is, from `offset` on; ENXIO: there is none.
    fn seek(&self, offset: u64, whence: Whence) -> Result<u64, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        let found = lseek(self.io.file(), offset, whence)?;
        u64::try_from(found).map_err(|_| Errno::EIO)
    }

    /// The hole at `offset`, if there is one.
    fn look_for_hole(&self, offset: u64, size: u64) -> Result<Option<Extent>, Errno> {
        let data = match self.seek(offset, Whence::SeekData) {
            Err(Errno::ENXIO) => size,
            found => found?.min(size),
        };
        let hole = || Extent { range: ByteRange::from_bounds(offset, data), status: ExtentStatus::Hole };
        Ok((data > offset).then(hole))
    }

    fn look(&self, offset: u64, size: u64) -> Result<Extent, Errno> {
        if let Some(hole) = self.look_for_hole(offset, size)? {
            return Ok(hole);
        }
        // A hole that was punched between the two looks may begin at the offset itself.
        let hole = self.seek(offset, Whence::SeekHole)?.min(size);
        let end = if hole > offset { hole } else { size.min(offset + self.cluster_bytes) };
        Ok(Extent { range: ByteRange::from_bounds(offset, end), status: ExtentStatus::Data })
    }
}

impl Image for RawImage {
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
            cluster_bytes: Some(self.cluster_bytes),
            thin_zeroing: self.punch.is_likely(),
            writable: self.opened.writable,
            resizable: self.opened.writable,
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
        match self.io.change("write zeroes", range, || self.try_zero(range))? {
            Tried::Done => Ok(()),
            Tried::Failed(error) => Err(self.io.failed("write zeroes to", range, &error)),
            Tried::Refused => self.io.write_zero_bytes(range),
        }
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        match self.io.change("discard", range, || self.try_punch(range))? {
            Tried::Done => Ok(()),
            Tried::Failed(error) => Err(self.io.failed("discard", range, &error)),
            Tried::Refused => Err(Error::new(ErrorKind::Unsupported, "the file system cannot punch holes into")
                .on(self.name())
                .at(range)),
        }
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        match self.io.change("allocate", range, || self.try_allocate(range))? {
            Tried::Done => Ok(()),
            Tried::Failed(error) => Err(self.io.failed("allocate room in", range, &error)),
            Tried::Refused => {
                let what = "the file system cannot allocate room ahead in";
                Err(Error::new(ErrorKind::Unsupported, what).on(self.name()).at(range))
            }
        }
    }

    fn flush(&self) -> Result<()> {
        self.io.flush()
    }

    fn extent_at(&self, offset: u64) -> Extent {
        let size = self.size_bytes();
        let mut answer = None;
        let tried = self.seek.attempt(|| self.look(offset, size).map(|extent| answer = Some(extent)));
        match (tried, answer) {
            (Tried::Done, Some(extent)) if !extent.range.is_empty() => extent,
            _ => Extent { range: ByteRange::from_bounds(offset, size), status: ExtentStatus::Data },
        }
    }

    fn extent_within(&self, range: ByteRange) -> Extent {
        let mut hole = None;
        let look = || self.look_for_hole(range.start(), self.size_bytes()).map(|found| hole = found);
        match (self.seek.attempt(look), hole) {
            (Tried::Done, Some(hole)) => hole,
            _ => Extent { range, status: ExtentStatus::Data },
        }
    }

    fn allocated_bytes(&self) -> Result<u64> {
        // st_blocks counts 512 bytes each, whatever the file system's block is (stat(2)).
        Ok(self.io.file().metadata().map_err(self.cannot("look at"))?.blocks() * 512)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.io.resize(size_bytes)
    }

    fn attributes(&self) -> Result<Attributes> {
        attributes_of(&self.io.file().metadata().map_err(self.cannot("look at"))?)
    }

    fn room(&self) -> Result<Room> {
        room_of(self.io.file()).map_err(|errno| self.cannot("ask for the free space of")(errno.into()))
    }

    fn identity(&self) -> Result<Identity> {
        let meta = self.io.file().metadata().map_err(self.cannot("look at"))?;
        let id = files::extended_attribute(self.io.file(), ID_ATTRIBUTE)
            .map_err(self.cannot("read the identity of"))?
            .and_then(|value| String::from_utf8(value).ok());
        let birth = meta.created().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        Ok(Identity {
            id,
            device: meta.dev(),
            inode: meta.ino(),
            birth_ns: birth.and_then(|time| u64::try_from(time.as_nanos()).ok()),
            size_bytes: self.size_bytes(),
        })
    }

    fn copy_range_from(&self, source: &dyn Image, range: ByteRange) -> Result<CopyOffer> {
        let locked = source.descriptors().into_iter().find(|(role, _)| *role == DescriptorRole::Locked);
        let (Format::Raw, Some((_, file))) = (source.format(), locked) else { return Ok(CopyOffer::Declined) };
        if !self.clone.is_likely() {
            return Ok(CopyOffer::Declined);
        }
        // Before the file system does it with the source's writers locked out. What fails here fails there, and is told there.
        let _ = files::write_out(file, range);
        let mut held = Duration::ZERO;
        let share = || {
            let begun = Instant::now();
            let done = files::clone_range(file, self.io.file(), range);
            held = begun.elapsed();
            // Another file system: no other request will be another matter.
            done.map_err(|errno| if errno == Errno::EXDEV { Errno::EOPNOTSUPP } else { errno })
        };
        match self.io.change("share blocks with the source in", range, || self.clone.attempt(share))? {
            Tried::Done => Ok(CopyOffer::Copied { held }),
            Tried::Refused => Ok(CopyOffer::Declined),
            Tried::Failed(error) => Err(self.io.failed("share blocks with the source in", range, &error)),
        }
    }

    fn descriptors(&self) -> Vec<(DescriptorRole, BorrowedFd<'_>)> {
        self.opened.descriptors()
    }

    fn path(&self) -> Option<PathBuf> {
        Some(self.opened.path.clone())
    }
}

/// Owner, mode and times out of what stat(2) says.
pub(super) fn attributes_of(meta: &std::fs::Metadata) -> Result<Attributes> {
    let time = |seconds: i64, nanos: i64| {
        let nanos = Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
        let whole = Duration::from_secs(seconds.unsigned_abs());
        let base = if seconds < 0 { SystemTime::UNIX_EPOCH - whole } else { SystemTime::UNIX_EPOCH + whole };
        base + nanos
    };
    Ok(Attributes {
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        modified: time(meta.mtime(), meta.mtime_nsec()),
        changed: time(meta.ctime(), meta.ctime_nsec()),
        accessed: time(meta.atime(), meta.atime_nsec()),
    })
}

/// Room of the file system that `file` lies on.
pub(super) fn room_of(file: impl AsFd) -> Result<Room, Errno> {
    let stat = nix::sys::statvfs::fstatvfs(file)?;
    let unit = stat.fragment_size();
    Ok(Room {
        available_bytes: stat.blocks_available().saturating_mul(unit),
        free_bytes: stat.blocks_free().saturating_mul(unit),
        total_bytes: stat.blocks().saturating_mul(unit),
    })
}
