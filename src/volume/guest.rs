//! The guest's requests: bounds, sizes and durability. Content goes through [`Volume::modify`].

use crate::sync::atomic::Ordering::Relaxed;

use super::{Change, Volume};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{ExtentStatus, Room};
use crate::range::ByteRange;

impl Volume {
    /// Fills `buffer` from `offset`; returns how many bytes there were before the disk's end.
    ///
    /// # Errors
    /// The active image's.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let _timed = self.request_times.start();
        loop {
            let size = self.size_bytes();
            let range = ByteRange::new(offset, buffer.len() as u64).intersect(ByteRange::new(0, size));
            let len = range.len() as usize;
            if len == 0 {
                return Ok(0);
            }
            match self.active.load().0.read_at(offset, &mut buffer[..len]) {
                Ok(()) => {
                    self.read_bytes.fetch_add(len as u64, Relaxed);
                    return Ok(len);
                }
                // Shortened meanwhile: the new end decides.
                Err(_) if self.size_bytes() < size => (),
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes `data`; returns how many bytes were written: fewer only at the end of a disk that does not grow. `durable`: as
    /// if followed by a flush (O_SYNC, O_DSYNC and RWF_DSYNC: the kernel sends no FSYNC for them, rule 7).
    ///
    /// # Errors
    /// The active image's; ENOSPC for a write wholly past the end of a disk that does not grow, as a block device answers.
    pub fn write(&self, offset: u64, data: &[u8], durable: bool) -> Result<usize> {
        self.refuse_read_only()?;
        let _timed = self.request_times.start();
        let passage = self.barrier.enter();
        let end = offset.saturating_add(data.len() as u64);
        if end > self.size_bytes() && self.options.growable {
            self.grow_to(end)?;
        }
        let len = end.min(self.size_bytes()).saturating_sub(offset) as usize;
        if len == 0 && !data.is_empty() {
            let error = Error::new(ErrorKind::NoSpace, "write past the end of the disk").on(self.name());
            return Err(error.at(ByteRange::new(offset, data.len() as u64)));
        }
        self.modify(Change::Write { offset, data: &data[..len] })?;
        drop(passage);
        if durable {
            self.flush_both()?;
        }
        Ok(len)
    }

    /// Frees `range`, which then reads as zeroes. Success past the end, as on any file.
    ///
    /// # Errors
    /// The active image's.
    pub fn punch_hole(&self, range: ByteRange) -> Result<()> {
        self.refuse_read_only()?;
        let _passage = self.barrier.enter();
        self.clipped(range).map_or(Ok(()), |range| self.modify(Change::Discard(range)))
    }

    /// Makes `range` read as zeroes, allocated. Grows the disk unless `keep_size`.
    ///
    /// # Errors
    /// The active image's; EFBIG-like (ENOSPC) if the disk would have to grow and may not.
    pub fn zero_range(&self, range: ByteRange, keep_size: bool) -> Result<()> {
        self.refuse_read_only()?;
        let _passage = self.barrier.enter();
        self.make_room(range, keep_size)?;
        self.clipped(range).map_or(Ok(()), |range| self.modify(Change::Zero(range)))
    }

    /// Allocates `range` without changing what it reads. Grows the disk unless `keep_size`.
    ///
    /// # Errors
    /// The active image's; ENOSPC if the disk would have to grow and may not.
    pub fn allocate(&self, range: ByteRange, keep_size: bool) -> Result<()> {
        self.refuse_read_only()?;
        let _passage = self.barrier.enter();
        self.make_room(range, keep_size)?;
        self.clipped(range).map_or(Ok(()), |range| self.active.load().0.allocate(range))
    }

    /// Changes the disk's size.
    ///
    /// # Errors
    /// EPERM if the disk is not growable (a truncation to the size that it has succeeds); EBUSY while it is mirrored.
    pub fn truncate(&self, size_bytes: u64) -> Result<()> {
        if size_bytes == self.size_bytes() {
            return Ok(());
        }
        self.refuse_read_only()?;
        if !self.options.growable {
            let error = std::io::Error::from_raw_os_error(libc::EPERM);
            return Err(
                Error::io("cannot change the size of a disk mounted without --growable:", &error).on(self.name())
            );
        }
        // Writes clip to the size that they see: with the barrier up, none is between that look and its image write.
        let _raised = self.barrier.raise(None);
        let _resizing = self.resizing.lock();
        self.refuse_resize(ErrorKind::NotNow)?;
        let before = self.size_bytes();
        // A shorter disk is shown before it is one, a longer one after: no read is sent past the image's end.
        self.size_bytes.store(size_bytes.min(before), Relaxed);
        let resized = self.active.load().0.resize(size_bytes);
        self.size_bytes.store(if resized.is_ok() { size_bytes } else { before }, Relaxed);
        resized
    }

    /// Makes acknowledged writes durable: in the active image, and in write-blocking mode in the target too (rule 7).
    ///
    /// # Errors
    /// The active image's. A target's flush error is the job's affair (rule 6).
    pub fn flush(&self) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        self.flush_both()
    }

    /// The first byte at or after `offset` that is not in a hole; `None` past the last one (ENXIO).
    ///
    /// # Errors
    /// None today; images that cannot tell answer "data".
    pub fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        self.seek(offset, |status| status == ExtentStatus::Data)
    }

    /// The first byte at or after `offset` in a hole, the end of the disk at the latest; `None` past the end (ENXIO).
    ///
    /// # Errors
    /// As [`Volume::seek_data`].
    pub fn seek_hole(&self, offset: u64) -> Result<Option<u64>> {
        let size = self.size_bytes();
        if offset >= size {
            return Ok(None);
        }
        Ok(Some(self.seek(offset, |status| status != ExtentStatus::Data)?.unwrap_or(size)))
    }

    /// Room where the active image lies.
    ///
    /// # Errors
    /// The image's.
    pub fn room(&self) -> Result<Room> {
        self.active.load().0.room()
    }

    fn seek(&self, offset: u64, wanted: impl Fn(ExtentStatus) -> bool) -> Result<Option<u64>> {
        let (active, size) = (self.active(), self.size_bytes());
        let mut at = offset;
        while at < size {
            let extent = active.extent_at(at);
            if wanted(extent.status) {
                return Ok(Some(at));
            }
            at = extent.range.end().max(at + 1);
        }
        Ok(None)
    }

    /// Outside the barrier, so that a slow flush never holds a cutover up: a cutover that overtakes it has made everything
    /// that was acknowledged before durable in the new image.
    fn flush_both(&self) -> Result<()> {
        let active = self.active();
        // The guest has it with the reply. It stays with the image as long as only this process knows of it.
        self.flush_images().inspect_err(|_| active.told())
    }

    /// As a guest's flush does, whoever asks.
    pub(super) fn flush_images(&self) -> Result<()> {
        if let Some(twin) = &*self.twin.load() {
            twin.flush();
        }
        let flushed = match &*self.tracking.load() {
            None => self.flush_active(),
            Some(tracking) => tracking.guest_flush(&*self.active.load().0),
        };
        if flushed.is_err() {
            self.flush_failed.store(true, Relaxed);
        }
        match self.owed.lock().take() {
            Some(owed) => flushed.and(Err(owed)),
            None => flushed,
        }
    }

    /// The part of `range` that lies on the disk, if any.
    fn clipped(&self, range: ByteRange) -> Option<ByteRange> {
        Some(range.intersect(ByteRange::new(0, self.size_bytes()))).filter(|range| !range.is_empty())
    }

    fn make_room(&self, range: ByteRange, keep_size: bool) -> Result<()> {
        if keep_size || range.end() <= self.size_bytes() {
            return Ok(());
        }
        if !self.options.growable {
            return Err(Error::new(ErrorKind::NoSpace, "past the end of the disk").on(self.name()).at(range));
        }
        self.grow_to(range.end())
    }

    fn grow_to(&self, size_bytes: u64) -> Result<()> {
        let _resizing = self.resizing.lock();
        if size_bytes <= self.size_bytes() {
            return Ok(());
        }
        self.refuse_resize(ErrorKind::NoSpace)?;
        self.active.load().0.resize(size_bytes)?;
        self.size_bytes.store(size_bytes, Relaxed);
        Ok(())
    }

    /// Both images of a mirror have one size, so a disk that is mirrored keeps its own. And what an image has beyond its disk
    /// is not the disk's: growing would show it.
    fn refuse_resize(&self, kind: ErrorKind) -> Result<()> {
        let mirrored = self.tracking.load().is_some() || self.intent.load().is_some() || self.twin.load().is_some();
        let why = if mirrored || self.size_pinned.load(Relaxed) {
            "the size cannot change while the disk is mirrored:"
        } else if self.active.load().0.size_bytes() > self.size_bytes() {
            "the size cannot change while the disk lies on a larger image:"
        } else {
            return Ok(());
        };
        log::warn!("{why} {}", self.name());
        Err(Error::new(kind, why).on(self.name()))
    }
}
