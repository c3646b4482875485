//! The file that the intent log is kept in, and where tests put another one in its place.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, Result};

use super::format::SECTOR_BYTES;

/// What the log's thread does with its file.
pub trait LogFile: Send + Sync {
    /// Writes all of `bytes` at `offset`, whole sectors both.
    ///
    /// # Errors
    /// What the bytes in the file are is then unknown.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes durable what was written before.
    ///
    /// # Errors
    /// Nothing written before may be believed durable, not even after a later success.
    fn sync(&self) -> io::Result<()>;
}

impl LogFile for File {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// An empty file at `path`, in place of what was there.
pub(super) fn create(path: &Path) -> Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(named("cannot replace", path, &error)),
        _ => options().create_new(true).open(path).map_err(|error| named("cannot create", path, &error)),
    }
}

/// The file at `path`, or a new one where there is none, with its first `len_bytes` at most. A sector that cannot be read is
/// returned as zeroes.
pub(super) fn open(path: &Path, len_bytes: usize) -> Result<(File, Vec<u8>)> {
    let file = options().create(true).truncate(false).open(path);
    let file = file.map_err(|error| named("cannot open", path, &error))?;
    let mut bytes = vec![0; len_bytes];
    let mut len = 0;
    while len < len_bytes {
        let end = (len / SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES).min(len_bytes);
        match file.read_at(&mut bytes[len..end], len as u64) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                log::warn!("{}: cannot read the sector at {len}: {error}", path.display());
                bytes[len..end].fill(0);
                len = end;
            }
        }
    }
    bytes.truncate(len);
    Ok((file, bytes))
}

/// Makes the file durable, its length and its name included, and no longer than `len_bytes`.
pub(super) fn settle(file: &File, path: &Path, len_bytes: usize) -> Result<()> {
    let settle = || {
        if file.metadata()?.len() > len_bytes as u64 {
            file.set_len(len_bytes as u64)?;
        }
        file.sync_all()?;
        sync_directory(path)
    };
    settle().map_err(|error| named("cannot make durable", path, &error))
}

/// Removes the file at `path`, durably. Nothing to do if it is not there.
pub(super) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(named("cannot remove", path, &error)),
        Ok(()) => sync_directory(path).map_err(|error| named("cannot make durable the removal of", path, &error)),
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

fn named(what: &str, path: &Path, error: &io::Error) -> Error {
    Error::io(format!("{what} the intent log"), error).on(path.display().to_string())
}
