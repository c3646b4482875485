//! The simulated state directory: what `files` is, on the simulated machine.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;

use crate::error::{Error, ErrorKind, Result};
use crate::simulation::state;
use crate::sync::Arc;

/// See the real one.
#[derive(Debug)]
pub enum CommitError {
    /// The old file is in place, as it was.
    NotCommitted(Error),
    /// Either may be found.
    Undecided(Error),
}

impl From<CommitError> for Error {
    fn from(error: CommitError) -> Error {
        match error {
            CommitError::NotCommitted(error) | CommitError::Undecided(error) => error,
        }
    }
}

pub(super) struct Directory(PathBuf);

impl Directory {
    pub(super) fn create(path: &Path) -> Result<Arc<Directory>> {
        Ok(Arc::new(Directory(path.to_owned())))
    }

    pub(super) fn open(path: &Path, _owner: u32) -> Result<Option<Arc<Directory>>> {
        // There is no registry: every simulated image has attributes.
        Ok(state::exists(path).then(|| Arc::new(Directory(path.to_owned()))))
    }

    pub(super) fn claim(&self) -> Result<Option<Flock<OwnedFd>>> {
        Ok(None)
    }

    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        Ok(state::read(&self.path_of(name)))
    }

    pub(super) fn names(&self) -> Result<Vec<String>> {
        Ok(state::names(&self.0))
    }

    pub(super) fn remove(&self, name: &str) -> Result<()> {
        state::remove(&self.path_of(name));
        Ok(())
    }

    pub(super) fn stage(self: &Arc<Self>, name: &str, bytes: &[u8]) -> Result<Staged> {
        let failed = || Error::new(ErrorKind::NoSpace, "cannot write").on(name);
        let file = state::stage(bytes).ok_or_else(failed)?;
        Ok(Staged { directory: self.clone(), name: name.to_owned(), file })
    }

    pub(super) fn replace(self: &Arc<Self>, name: &str, bytes: &[u8]) -> Result<()> {
        state::replace(&self.path_of(name), bytes);
        Ok(())
    }

    pub(super) fn remove_leftovers(&self, _name: &str) {}
}

#[must_use = "it is not in place before it is committed"]
pub(super) struct Staged {
    directory: Arc<Directory>,
    name: String,
    file: usize,
}

impl Staged {
    pub(super) fn commit(self) -> Result<(), CommitError> {
        let path = self.directory.path_of(&self.name);
        let undecided = || Error::new(ErrorKind::Failed, "cannot replace").on(path.display().to_string());
        if state::rename(self.file, &path) { Ok(()) } else { Err(CommitError::Undecided(undecided())) }
    }
}

pub(super) fn is_directory_of(_path: &Path, _owner: u32) -> bool {
    true
}
