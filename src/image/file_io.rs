//! Reading and writing bytes of a file or block device: what [`super::raw`] and [`super::block_device`] share.
//!
//! Invariants:
//! - a write never ends past [`FileIo::size_bytes`], so it never extends the file: every write holds the read side of
//!   `resizing` from its check of the size to its end, a change of the size holds the write side.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::RwLock;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Zeroes to write where nothing better works.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Byte I/O on one open file.
#[derive(Debug)]
pub(super) struct FileIo {
    name: String,
    file: File,
    size_bytes: AtomicU64,
    resizing: RwLock<()>,
}

impl FileIo {
    /// I/O on `file`, which is called `name` in messages and is `size_bytes` long.
    pub(super) fn new(name: String, file: File, size_bytes: u64) -> Self {
        FileIo { name, file, size_bytes: AtomicU64::new(size_bytes), resizing: RwLock::new(()) }
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

    /// An error of `what` at `range`.
    pub(super) fn failed(&self, what: &str, range: ByteRange, source: &std::io::Error) -> Error {
        Error::io(format!("cannot {what}"), source).on(&self.name).at(range)
    }

    fn check(&self, what: &str, range: ByteRange) -> Result<()> {
        if range.end() <= self.size_bytes() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Usage, format!("cannot {what} past the end of")).on(&self.name).at(range))
    }

    /// Fills `buffer` from `offset`.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.check("read", range)?;
        self.file.read_exact_at(buffer, offset).map_err(|error| self.failed("read", range, &error))
    }

    /// Writes `data` at `offset`.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        let _size_stays = self.resizing.read();
        self.check("write", range)?;
        self.file.write_all_at(data, offset).map_err(|error| self.failed("write", range, &error))
    }

    /// Writes zeroes, the plain way.
    pub(super) fn write_zero_bytes(&self, range: ByteRange) -> Result<()> {
        for piece in range.pieces(ZEROES.len() as u64) {
            let len = usize::try_from(piece.len()).expect("at most the length of ZEROES");
            self.write(piece.start(), &ZEROES[..len])?;
        }
        Ok(())
    }

    /// Runs `change`, which changes bytes of `range` by other means than a write, under the same protection as a write.
    pub(super) fn change<T>(&self, what: &str, range: ByteRange, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let _size_stays = self.resizing.read();
        self.check(what, range)?;
        change()
    }

    /// Makes the file `size_bytes` long, once no write is under way.
    pub(super) fn resize(&self, size_bytes: u64) -> Result<()> {
        let _no_writes = self.resizing.write();
        self.file.set_len(size_bytes).map_err(|error| Error::io("cannot resize", &error).on(&self.name))?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    /// Makes what was written durable, and the size with it.
    pub(super) fn flush(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| Error::io("cannot flush", &error).on(&self.name))
    }
}
