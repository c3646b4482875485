//! The simulated intent log: what `file` is, on the simulated machine.

use std::io;
use std::path::Path;

use crate::error::Result;
use crate::simulation::state;

/// See the real one.
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

pub(super) struct File(usize);

impl LogFile for File {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        state::write_log(self.0, offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        state::sync_log(self.0)
    }
}

pub(super) fn create(path: &Path) -> Result<File> {
    Ok(File(state::create(path)))
}

pub(super) fn open(path: &Path, len_bytes: usize) -> Result<(File, Vec<u8>)> {
    let bytes = state::read(path).unwrap_or_default();
    let file = state::find(path).unwrap_or_else(|| state::create(path));
    Ok((File(file), bytes.into_iter().take(len_bytes).collect()))
}

/// The file's name becomes durable; its bytes are since the sync before.
pub(super) fn settle(_file: &File, path: &Path, _len_bytes: usize) -> Result<()> {
    state::sync_names(path);
    Ok(())
}

pub(super) fn remove(path: &Path) -> Result<()> {
    state::remove(path);
    Ok(())
}
