//! The file that holds a qcow2 image: bytes of clusters, bytes of metadata, and syncs.
//!
//! Clusters of data go through [`FileIo`], past the page cache where that was asked for. Metadata goes through the page cache always: an entry of
//! eight bytes is no direct request. The two never share a page (direct I/O is refused for clusters smaller than one).

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::unistd::{Whence, lseek};

use super::super::file_io::FileIo;
use super::super::zeroing::{Ability, Tried};
use super::damaged;
#[cfg(test)]
use super::journal::Event;
use super::sync_point::SyncPoint;
use super::unsynced::Unsynced;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};

/// The file grows in steps of this at least: all of it can then be written in whole blocks.
const STEP_BYTES: u64 = 64 << 10;
/// The largest page of a kernel in use here.
const PAGE_BYTES: u64 = 4096;

/// The file.
#[derive(Debug)]
pub(super) struct Host {
    io: FileIo,
    /// Goes through the page cache.
    metadata: File,
    punch: Ability,
    syncs: SyncPoint,
    /// Held while metadata is written.
    unsynced: Mutex<Unsynced>,
    /// What is in the file is not known any more: nothing is written that builds on it.
    broken: AtomicBool,
}

/// The length of what is known to fit memory.
pub(super) fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("a range in memory")
}

impl Host {
    pub(super) fn new(io: FileIo) -> Result<Self> {
        let metadata = io.buffered().map_err(|error| Error::io("cannot open", &error).on(io.name()))?;
        Ok(Host {
            io,
            metadata,
            punch: Ability::default(),
            syncs: SyncPoint::default(),
            unsynced: Mutex::new(Unsynced::default()),
            broken: AtomicBool::new(false),
        })
    }

    pub(super) fn name(&self) -> &str {
        self.io.name()
    }

    pub(super) fn file(&self) -> &File {
        &self.metadata
    }

    pub(super) fn metadata(&self) -> Result<std::fs::Metadata> {
        self.metadata.metadata().map_err(|error| Error::io("cannot look at", &error).on(self.name()))
    }

    pub(super) fn request_alignment(&self) -> u64 {
        self.io.request_alignment()
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.io.size_bytes()
    }

    /// Makes the file's length a whole number of steps, so that it can be written directly up to its end.
    ///
    /// # Errors
    /// Direct I/O and clusters that share a page; the file cannot grow.
    pub(super) fn prepare_for_writing(&self, cluster_bytes: u64) -> Result<()> {
        if self.io.request_alignment() == 1 {
            return Ok(());
        }
        if cluster_bytes < PAGE_BYTES.max(self.io.request_alignment()) {
            let what = format!("cache=none needs clusters of {PAGE_BYTES} bytes at least, these have {cluster_bytes}:");
            return Err(Error::new(ErrorKind::Unsupported, what).on(self.name()).advise("use -o cache=writeback"));
        }
        self.grow_to(self.len_bytes())
    }

    /// Makes the file at least `len_bytes` long. What is new is a hole.
    pub(super) fn grow_to(&self, len_bytes: u64) -> Result<()> {
        let len = len_bytes.checked_next_multiple_of(STEP_BYTES);
        match len {
            Some(len) if len <= self.io.size_bytes() => Ok(()),
            Some(len) if i64::try_from(len).is_ok() => {
                #[cfg(test)]
                super::journal::note(|| Event::Len(len));
                self.io.resize_to_at_least(len)
            }
            _ => Err(damaged(self.name(), "a cluster lies beyond the end of every file")),
        }
    }

    /// Cuts the file's end off, or nothing if `len_bytes` is more than it has. With direct I/O whole steps stay, as the next opening needs
    /// them: it must not change the file before it is seen that nobody else did.
    pub(super) fn cut_to(&self, len_bytes: u64) -> Result<()> {
        let direct = self.io.request_alignment() > 1;
        let len_bytes = if direct { len_bytes.next_multiple_of(STEP_BYTES) } else { len_bytes };
        if len_bytes >= self.io.size_bytes() {
            return Ok(());
        }
        #[cfg(test)]
        super::journal::note(|| Event::Len(len_bytes));
        self.io.resize(len_bytes)
    }

    /// Reads data. Past the file's end there are zeroes.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let there = self.len_bytes().saturating_sub(offset).min(buffer.len() as u64);
        let (head, tail) = buffer.split_at_mut(in_memory(there));
        tail.fill(0);
        if head.is_empty() { Ok(()) } else { self.io.read(offset, head) }
    }

    /// Writes data.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check_sound()?;
        self.grow_to(offset.saturating_add(data.len() as u64))?;
        #[cfg(test)]
        super::journal::note(|| Event::Write { offset, bytes: data.to_vec() });
        self.io.write(offset, data)
    }

    /// Makes a range zero, and a hole where that can be. False: it took writing.
    pub(super) fn zero(&self, range: ByteRange) -> Result<bool> {
        self.check_sound()?;
        let range = range.intersect(ByteRange::new(0, self.len_bytes()));
        if range.is_empty() || self.punch(range)? {
            return Ok(true);
        }
        self.io.write_zero_bytes(range)?;
        Ok(false)
    }

    /// Makes a range a hole. False: the file system cannot.
    pub(super) fn punch(&self, range: ByteRange) -> Result<bool> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let range = range.intersect(ByteRange::new(0, self.len_bytes()));
        self.forget_metadata(range);
        #[cfg(test)]
        super::journal::note(|| Event::Zero(range));
        match self.io.change("discard", range, || self.punch.attempt_fallocate(self.io.file(), flags, range))? {
            Tried::Done => Ok(true),
            Tried::Refused => Ok(false),
            Tried::Failed(error) => Err(self.io.failed("discard", range, &error)),
        }
    }

    /// Reads metadata: all of it must be there.
    pub(super) fn read_metadata(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.metadata.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                damaged(self.name(), "a table lies past the end of the file").at(range)
            }
            _ => self.io.failed("read metadata of", range, &error),
        })
    }

    /// Reads big-endian numbers.
    pub(super) fn read_numbers(&self, offset: u64, count: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; count * 8];
        self.read_metadata(offset, &mut bytes)?;
        Ok(bytes.chunks_exact(8).map(|bytes| u64::from_be_bytes(bytes.try_into().expect("eight bytes"))).collect())
    }

    /// Writes metadata that is in use. If that fails half-way, the image takes no more changes: what memory says and what the file says
    /// must not differ. A file system that copies what is overwritten may be full; then nothing was changed, and it can be
    /// tried again.
    pub(super) fn write_metadata(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_tables(offset, bytes, |error, written| {
            if written > 0 || error.kind() != ErrorKind::NoSpace {
                self.broken.store(true, Ordering::Release);
            }
        })
    }

    /// Writes metadata that nothing refers to yet.
    pub(super) fn write_new_metadata(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_tables(offset, bytes, |_, _| ())
    }

    /// `failed` gets the error and how much was written before it.
    fn write_tables(&self, offset: u64, bytes: &[u8], failed: impl FnOnce(&Error, usize)) -> Result<()> {
        self.check_sound()?;
        if self.unsynced.lock().is_full() {
            self.sync()?;
        }
        let mut unsynced = self.unsynced.lock();
        let mut written = 0;
        let done = self.write_all(offset, bytes, &mut written);
        match done {
            Ok(()) => unsynced.keep(offset, bytes),
            Err(ref error) => failed(error, written),
        }
        done
    }

    fn write_all(&self, offset: u64, bytes: &[u8], written: &mut usize) -> Result<()> {
        let range = ByteRange::new(offset, bytes.len() as u64);
        let failed = |error: std::io::Error| self.io.failed("write metadata of", range, &error);
        #[cfg(test)]
        if let Some(errno) = super::journal::write_fails(bytes.len()) {
            return Err(failed(std::io::Error::from_raw_os_error(errno)));
        }
        #[cfg(test)]
        super::journal::note(|| Event::Write { offset, bytes: bytes.to_vec() });
        while *written < bytes.len() {
            match self.metadata.write_at(&bytes[*written..], offset + *written as u64) {
                Ok(0) => return Err(failed(std::io::ErrorKind::WriteZero.into())),
                Ok(count) => *written += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => (),
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    /// No metadata in `range` is in use any more: it is not written again after a failed sync.
    pub(super) fn forget_metadata(&self, range: ByteRange) {
        self.unsynced.lock().forget(range);
    }

    /// False: the image takes no more changes, and it is not known what its metadata refers to.
    pub(super) fn is_sound(&self) -> bool {
        !self.broken.load(Ordering::Acquire)
    }

    /// Writes big-endian numbers.
    pub(super) fn write_numbers(&self, offset: u64, numbers: &[u64]) -> Result<()> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        self.write_metadata(offset, &bytes)
    }

    /// Makes durable what was written before the call.
    pub(super) fn sync(&self) -> Result<()> {
        self.syncs.pass(|| self.sync_now())
    }

    /// As `sync`; tells of syncs that failed since the last flush too.
    pub(super) fn flush(&self) -> Result<()> {
        self.syncs.flush(|| self.sync_now())
    }

    fn sync_now(&self) -> Result<()> {
        let begun = self.unsynced.lock().begin(|offset, bytes| self.write_all(offset, bytes, &mut 0));
        #[cfg(test)]
        let begun = begun.and_then(|()| super::journal::sync_fails());
        let done = begun.and_then(|()| self.io.flush());
        self.unsynced.lock().end(done.is_ok());
        #[cfg(test)]
        if done.is_ok() {
            super::journal::note(|| Event::Synced);
        }
        done
    }

    fn check_sound(&self) -> Result<()> {
        if self.is_sound() {
            return Ok(());
        }
        let what = "metadata could not be written before, nothing more is changed in";
        Err(Error::new(ErrorKind::Failed, what).on(self.name()).advise("make room, then mount the image again"))
    }

    /// Where the next data (or hole) of the file is, from `offset` on; ENXIO: there is none.
    pub(super) fn seek(&self, offset: u64, whence: Whence) -> std::result::Result<u64, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        u64::try_from(lseek(&self.metadata, offset, whence)?).map_err(|_| Errno::EIO)
    }
}
