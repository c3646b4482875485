//! Reading and writing bytes of a file or block device: what [`super::raw`] and [`super::block_device`] share.
//!
//! Buffered I/O is granular to the byte, the kernel sees to it. Direct I/O (cache=none) deals in whole blocks:
//!
//! ```text
//! |  block  |  block  |  block  | ...   ... |  block  | end of the file, within a block
//!      [ write ]                 aligned memory and place: as it is; aligned place: through a pooled buffer;
//!      read, change, write       else the first and last block are read, changed and written back
//!                                           | tail ..| the last stripe, if the file ends within a block: buffered
//! ```
//!
//! Invariants:
//! - a write never ends past [`FileIo::size_bytes`], so it never extends the file: every request holds the read side of
//!   `resizing` from its check of the size to its end, a change of the size holds the write side;
//! - whoever writes back bytes that are not its own (read-modify-write) holds their stripes exclusively, every other change holds its
//!   stripes shared;
//! - the order of locks: resizing, stripes, a pooled buffer.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::aligned::BufferPool;
use super::stripes::{Held, STRIPE_BYTES, Stripes};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::RwLock;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sys::uncached;

#[repr(align(4096))]
struct Zeroes([u8; 64 << 10]);

/// Zeroes to write where nothing better works.
static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

/// What is smaller is not worth sparing the page cache for: written out at once, each piece alone, it would cost more than it takes up.
const ONCE_BYTES_MIN: u64 = 64 << 10;

/// Ranges that are changed by special operations are told to be whole blocks by this measure: a kernel page, within which
/// the kernel reads, changes and writes back in its own way.
const PAGE_BYTES: u64 = 4096;

/// Byte I/O on one open file.
#[derive(Debug)]
pub(super) struct FileIo {
    name: String,
    file: File,
    writable: bool,
    direct: Option<Direct>,
    size_bytes: AtomicU64,
    resizing: RwLock<()>,
    /// False once the kernel has refused to leave the page cache alone for this file.
    spares_cache: AtomicBool,
}

/// What direct I/O needs besides.
#[derive(Debug)]
pub(super) struct Direct {
    /// Offset and length of direct requests are multiples of this.
    block: u64,
    /// Memory addresses are multiples of this.
    memory: usize,
    /// The same file, not direct, for a tail that is no whole block. `None`: sizes are whole blocks always.
    tail: Option<File>,
    stripes: Stripes,
    pool: BufferPool,
}

impl Direct {
    /// Direct I/O in blocks of `block` bytes from memory aligned to `memory`, both powers of two.
    pub(super) fn new(block: u64, memory: u64, tail: Option<File>) -> Option<Self> {
        let memory = usize::try_from(memory).ok()?;
        let fits = block.is_power_of_two() && block <= STRIPE_BYTES && memory <= super::aligned::MEMORY_ALIGNMENT;
        fits.then(|| Direct { block, memory: memory.max(1), tail, stripes: Stripes::new(), pool: BufferPool::new() })
    }

    /// Where the direct part of a file of `size` bytes ends. The rest of it, less than a stripe, is buffered: a whole stripe
    /// and not just the last block, so that no page of the page cache holds bytes of both parts.
    fn edge(&self, size: u64) -> u64 {
        if size % self.block == 0 || self.tail.is_none() { size } else { size - size % STRIPE_BYTES }
    }

    fn is_aligned(&self, range: ByteRange) -> bool {
        range.start() % self.block == 0 && range.len() % self.block == 0
    }

    /// How much of `len` bytes at `address`, to go to `offset`, may be passed to the kernel as it is.
    fn body(&self, offset: u64, address: *const u8, len: usize) -> usize {
        if offset % self.block != 0 || address.addr() % self.memory != 0 {
            return 0;
        }
        len - len % usize::try_from(self.block).expect("at most a stripe")
    }

    /// The first piece of `range` that fits a buffer, and the blocks that hold it.
    fn piece(&self, range: ByteRange) -> (ByteRange, ByteRange) {
        let start = range.start() - range.start() % self.block;
        let blocks = ByteRange::from_bounds(start, range.end()).split(BufferPool::BUFFER_BYTES_MAX as u64).0;
        (blocks.intersect(range), blocks.align_out(self.block))
    }

    fn read(&self, file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (body, rest) = buffer.split_at_mut(self.body(offset, buffer.as_ptr(), buffer.len()));
        file.read_exact_at(body, offset)?;
        let (mut offset, mut rest) = (offset + body.len() as u64, rest);
        while !rest.is_empty() {
            let (piece, blocks) = self.piece(ByteRange::new(offset, rest.len() as u64));
            let mut pooled = self.pool.take(length(blocks));
            file.read_exact_at(&mut pooled, blocks.start())?;
            let skip = length(ByteRange::from_bounds(blocks.start(), piece.start()));
            let (head, tail) = rest.split_at_mut(length(piece));
            head.copy_from_slice(&pooled[skip..skip + head.len()]);
            (offset, rest) = (piece.end(), tail);
        }
        Ok(())
    }

    /// Needs the stripes: exclusively, unless the range is aligned.
    fn write(&self, file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
        let (body, rest) = data.split_at(self.body(offset, data.as_ptr(), data.len()));
        file.write_all_at(body, offset)?;
        let (mut offset, mut rest) = (offset + body.len() as u64, rest);
        let block = length(ByteRange::new(0, self.block));
        while !rest.is_empty() {
            let (piece, blocks) = self.piece(ByteRange::new(offset, rest.len() as u64));
            let mut pooled = self.pool.take(length(blocks));
            let skip = length(ByteRange::from_bounds(blocks.start(), piece.start()));
            let last = pooled.len() - block;
            if skip > 0 {
                file.read_exact_at(&mut pooled[..block], blocks.start())?;
            }
            if piece.end() < blocks.end() && (skip == 0 || last > 0) {
                file.read_exact_at(&mut pooled[last..], blocks.end() - self.block)?;
            }
            let (head, tail) = rest.split_at(length(piece));
            pooled[skip..skip + head.len()].copy_from_slice(head);
            file.write_all_at(&pooled, blocks.start())?;
            (offset, rest) = (piece.end(), tail);
        }
        Ok(())
    }

    /// Writes to the buffered tail and leaves nothing of it in the page cache, where direct requests of others, or of
    /// ours once the file has grown, would pass it by. Needs the stripes exclusively.
    fn write_tail(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let Some(tail) = self.tail.as_ref() else { return Err(io::Error::from_raw_os_error(libc::EINVAL)) };
        tail.write_all_at(data, offset)?;
        tail.sync_data()?;
        let start = i64::try_from(offset - offset % STRIPE_BYTES).unwrap_or(0);
        // Length 0: up to the end.
        let _ = posix_fadvise(tail, start, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        Ok(())
    }
}

/// The length of a range that is known to fit memory.
fn length(range: ByteRange) -> usize {
    usize::try_from(range.len()).expect("a range in memory")
}

impl FileIo {
    /// I/O on `file`, which is called `name` in messages and is `size_bytes` long. With `direct`, the file is open with
    /// O_DIRECT.
    pub(super) fn new(name: String, file: File, size_bytes: u64, writable: bool, direct: Option<Direct>) -> Self {
        let spares_cache = AtomicBool::new(direct.is_none());
        let size_bytes = AtomicU64::new(size_bytes);
        FileIo { name, file, writable, direct, size_bytes, resizing: RwLock::new(()), spares_cache }
    }

    /// What it is called in messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The size now.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Requests aligned to this need no read-modify-write.
    pub(super) fn request_alignment(&self) -> u64 {
        self.direct.as_ref().map_or(1, |direct| direct.block)
    }

    /// An error of `what` at `range`.
    pub(super) fn failed(&self, what: &str, range: ByteRange, source: &io::Error) -> Error {
        Error::io(format!("cannot {what}"), source).on(&self.name).at(range)
    }

    fn check(&self, what: &str, range: ByteRange) -> Result<()> {
        if range.end() <= self.size_bytes() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Usage, format!("cannot {what} past the end of")).on(&self.name).at(range))
    }

    /// As `check`, for what changes the file.
    fn check_change(&self, what: &str, range: ByteRange) -> Result<()> {
        if !self.writable {
            return Err(
                Error::new(ErrorKind::ReadOnly, format!("cannot {what}, it was opened read-only:")).on(&self.name)
            );
        }
        self.check(what, range)
    }

    /// Fills `buffer` from `offset`.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let _size_stays = self.resizing.read();
        self.check("read", range)?;
        let done = match &self.direct {
            None => self.file.read_exact_at(buffer, offset),
            Some(direct) => {
                let body = ByteRange::from_bounds(offset, range.end().min(direct.edge(self.size_bytes())));
                let (body, rest) = buffer.split_at_mut(length(body));
                direct.read(&self.file, offset, body).and_then(|()| match &direct.tail {
                    Some(tail) if !rest.is_empty() => tail.read_exact_at(rest, offset + body.len() as u64),
                    _ => Ok(()),
                })
            }
        };
        done.map_err(|error| self.failed("read", range, &error))
    }

    /// Writes `data` at `offset`.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        let _size_stays = self.resizing.read();
        self.check_change("write", range)?;
        let done = match &self.direct {
            None => self.file.write_all_at(data, offset),
            Some(direct) => {
                let _held = self.hold(direct, range, direct.block);
                let body = ByteRange::from_bounds(offset, range.end().min(direct.edge(self.size_bytes())));
                let (body, rest) = data.split_at(length(body));
                direct.write(&self.file, offset, body).and_then(|()| match rest {
                    [] => Ok(()),
                    rest => direct.write_tail(offset + body.len() as u64, rest),
                })
            }
        };
        done.map_err(|error| self.failed("write", range, &error))
    }

    /// As [`FileIo::read`], and the page cache holds afterwards what it held before, where the kernel can do that.
    pub(super) fn read_once(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        if !self.may_spare_cache(range) {
            return self.read(offset, buffer);
        }
        let _size_stays = self.resizing.read();
        self.check("read", range)?;
        let done = match uncached::read_exact_at(&self.file, offset, buffer) {
            Err(error) if self.is_refusal(&error) => self.file.read_exact_at(buffer, offset),
            done => done,
        };
        done.map_err(|error| self.failed("read", range, &error))
    }

    /// As [`FileIo::write`], and nothing stays in the page cache that was not there before, where the kernel can do that.
    pub(super) fn write_once(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        if !self.may_spare_cache(range) {
            return self.write(offset, data);
        }
        let _size_stays = self.resizing.read();
        self.check_change("write", range)?;
        let done = match uncached::write_all_at(&self.file, offset, data) {
            Err(error) if self.is_refusal(&error) => self.file.write_all_at(data, offset),
            done => done,
        };
        done.map_err(|error| self.failed("write", range, &error))
    }

    fn may_spare_cache(&self, range: ByteRange) -> bool {
        range.len() >= ONCE_BYTES_MIN && self.spares_cache.load(Ordering::Relaxed)
    }

    /// True if the kernel does not know this way for this file; it is not asked again.
    fn is_refusal(&self, error: &io::Error) -> bool {
        let refused = matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS));
        if refused {
            self.spares_cache.store(false, Ordering::Relaxed);
        }
        refused
    }

    /// The stripes of `range`: shared if it is made of whole units of `unit` bytes in the direct part.
    fn hold<'a>(&self, direct: &'a Direct, range: ByteRange, unit: u64) -> Held<'a> {
        let whole = direct.is_aligned(range) && range.start() % unit == 0 && range.end() % unit == 0;
        if whole && range.end() <= direct.edge(self.size_bytes()) {
            direct.stripes.shared(range)
        } else {
            direct.stripes.exclusive(range)
        }
    }

    /// Writes zeroes, the plain way.
    pub(super) fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        for piece in range.pieces(ZEROES.0.len() as u64) {
            self.write(piece.start(), &ZEROES.0[..length(piece)])?;
        }
        Ok(())
    }

    /// Runs `change`, which changes bytes of `range` by other means than a write, under the same protection as a write.
    pub(super) fn change<T>(&self, what: &str, range: ByteRange, change: impl FnOnce() -> T) -> Result<T> {
        let _size_stays = self.resizing.read();
        self.check_change(what, range)?;
        let _held = self.direct.as_ref().map(|direct| self.hold(direct, range, direct.block.max(PAGE_BYTES)));
        Ok(change())
    }

    /// Makes the file `size_bytes` long, once no request is under way.
    pub(super) fn resize(&self, size_bytes: u64) -> Result<()> {
        self.check_change("resize", ByteRange::new(0, 0))?;
        let _no_requests = self.resizing.write();
        self.file.set_len(size_bytes).map_err(|error| Error::io("cannot resize", &error).on(&self.name))?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    /// Makes the file at least `size_bytes` long, once no request is under way.
    pub(super) fn resize_to_at_least(&self, size_bytes: u64) -> Result<()> {
        self.check_change("resize", ByteRange::new(0, 0))?;
        let _no_requests = self.resizing.write();
        if size_bytes <= self.size_bytes() {
            return Ok(());
        }
        self.file.set_len(size_bytes).map_err(|error| Error::io("cannot resize", &error).on(&self.name))?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    /// A copy of the descriptor that goes through the page cache, fenced as it is.
    pub(super) fn buffered(&self) -> io::Result<File> {
        match &self.direct {
            None => self.file.try_clone(),
            Some(Direct { tail: Some(tail), .. }) => tail.try_clone(),
            Some(_) => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
    }

    /// Makes what was written durable, and the size with it.
    pub(super) fn flush(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| Error::io("cannot flush", &error).on(&self.name))
    }
}
