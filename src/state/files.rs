//! Files that are replaced as a whole, in a directory that is ours alone.
//!
//! ```text
//! stage:   write NAME.PID.N.new -> fsync          an error: the old file is as it was
//! commit:  rename it to NAME -> fsync directory   an error: undecided, a power cut may leave the old or the new one
//! ```
//!
//! Works from the directory's descriptor, so that its name may change, or be hidden by a mount, meanwhile.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// No file of the state is anywhere near so large; a larger one is not read into memory.
const FILE_BYTES_MAX: u64 = 16 << 20;
const SUFFIX: &str = ".new";

/// Why a staged file is not, or may not be, in place.
#[derive(Debug)]
pub enum CommitError {
    /// The old file is in place, as it was.
    NotCommitted(Error),
    /// The rename or the fsync of the directory failed: after a power cut either may be found. Only a later commit that
    /// succeeds decides it.
    Undecided(Error),
}

impl From<CommitError> for Error {
    fn from(error: CommitError) -> Error {
        match error {
            CommitError::NotCommitted(error) | CommitError::Undecided(error) => error,
        }
    }
}

/// Where tests make file operations fail. In production it is empty and does nothing.
#[derive(Default)]
pub(crate) struct Faults {
    /// Steps that fail until somebody takes them out.
    #[cfg(test)]
    pub(crate) failing: parking_lot::Mutex<std::collections::BTreeSet<Step>>,
}

/// A step that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    Write,
    SyncFile,
    Rename,
    SyncDirectory,
}

impl Faults {
    #[cfg(not(test))]
    fn check(&self, _step: Step) -> io::Result<()> {
        Ok(())
    }

    #[cfg(test)]
    fn check(&self, step: Step) -> io::Result<()> {
        let errno = if step == Step::Write { libc::ENOSPC } else { libc::EIO };
        if self.failing.lock().contains(&step) { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
    }
}

/// A directory of ours.
pub(super) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
    pub(super) faults: Faults,
}

impl Directory {
    /// Opens `path`, after making it and what is missing above it with mode 0700.
    ///
    /// # Errors
    /// It cannot be made, is no directory (a symlink is none), belongs to somebody else, or others may write to it.
    pub(super) fn create(path: &Path) -> Result<Arc<Directory>> {
        make_durably(path)
            .map_err(|error| Error::io("cannot create the directory", &error).on(path.display().to_string()))?;
        Directory::open(path, nix::unistd::geteuid().as_raw())?
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "the directory vanished:").on(path.display().to_string()))
    }

    /// Opens `path`, which must belong to the user `owner`. `None` if it is not there.
    ///
    /// # Errors
    /// As [`Directory::create`].
    pub(super) fn open(path: &Path, owner: u32) -> Result<Option<Arc<Directory>>> {
        let named = |error: Error| error.on(path.display().to_string());
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let fd = match nix::fcntl::open(path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(nix::Error::ENOENT) => return Ok(None),
            Err(errno) => return Err(named(Error::io("cannot open the directory", &errno.into()))),
        };
        let status = nix::sys::stat::fstat(&fd).map_err(|errno| named(Error::io("cannot look at", &errno.into())))?;
        if status.st_uid != owner {
            let what = format!("the directory belongs to user {}, not to user {owner}:", status.st_uid);
            return Err(named(Error::new(ErrorKind::Failed, what)));
        }
        if status.st_mode & 0o022 != 0 {
            let error = Error::new(ErrorKind::Failed, "other users may write to the directory");
            return Err(named(error.advise(format!("chmod 700 {}", path.display()))));
        }
        Ok(Some(Arc::new(Directory { fd, path: path.to_owned(), faults: Faults::default() })))
    }

    /// Keeps every other process from writing here, for as long as the result lives. Where the file system cannot lock directories
    /// (NFS), nothing is kept away.
    ///
    /// # Errors
    /// `NotNow`: another process has done so.
    pub(super) fn claim(&self) -> Result<Option<Flock<OwnedFd>>> {
        let fd = self.fd.try_clone().map_err(|error| self.error("cannot use", ".", &error))?;
        match Flock::lock(fd, FlockArg::LockExclusiveNonblock) {
            Ok(claim) => Ok(Some(claim)),
            Err((_, nix::Error::EWOULDBLOCK)) => {
                let error = Error::not_now("another server uses the state directory");
                Err(error.on(self.path.display().to_string()).advise("unmount its disks first, or see --state-dir"))
            }
            Err((_, errno)) => {
                log::debug!("{}: {errno}", self.path.display());
                Ok(None)
            }
        }
    }

    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn error(&self, what: &str, name: &str, error: &io::Error) -> Error {
        Error::io(what, error).on(self.path_of(name).display().to_string())
    }

    /// The whole of a file; `None` if it is not there.
    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(nix::Error::ENOENT) => return Ok(None),
            Err(errno) => return Err(self.error("cannot open", name, &errno.into())),
        };
        let mut bytes = Vec::new();
        let read = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
        read.map_err(|error| self.error("cannot read", name, &error))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            let error = Error::new(ErrorKind::Corrupt, "far too large for a record:");
            return Err(error.on(self.path_of(name).display().to_string()));
        }
        Ok(Some(bytes))
    }

    /// The names of its files, those that are being staged left out.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let failed = |error: &io::Error| Error::io("cannot list", error).on(self.path.display().to_string());
        let mut names = self.entries().map_err(|error| failed(&error))?;
        names.retain(|name| !name.ends_with(SUFFIX));
        names.sort();
        Ok(names)
    }

    fn entries(&self) -> io::Result<Vec<String>> {
        let by_descriptor = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let names = std::fs::read_dir(by_descriptor)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    /// Removes a file, durably. Nothing to do if it is not there.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => self.sync().map_err(|error| self.error("cannot make durable the removal of", name, &error)),
            Err(nix::Error::ENOENT) => Ok(()),
            Err(errno) => Err(self.error("cannot remove", name, &errno.into())),
        }
    }

    /// Writes `bytes` aside, durably, to become the file `name`.
    ///
    /// # Errors
    /// It cannot be written; then nothing is left of it.
    pub(super) fn stage(self: &Arc<Self>, name: &str, bytes: &[u8]) -> Result<Staged> {
        let (staged, file) = self.write_aside(name, bytes)?;
        let sync = self.faults.check(Step::SyncFile).and_then(|()| file.sync_all());
        sync.map_err(|error| self.error("cannot make durable", &staged.aside, &error))?;
        Ok(staged)
    }

    /// Replaces the file `name` at once; not durable, and after a power cut perhaps damaged.
    ///
    /// # Errors
    /// It cannot be written; the old one is in place then.
    pub(super) fn replace(self: &Arc<Self>, name: &str, bytes: &[u8]) -> Result<()> {
        let (staged, _) = self.write_aside(name, bytes)?;
        let renamed = renameat(&self.fd, staged.aside.as_str(), &self.fd, name);
        renamed.map_err(|errno| self.error("cannot replace", name, &errno.into()))
    }

    fn write_aside(self: &Arc<Self>, name: &str, bytes: &[u8]) -> Result<(Staged, File)> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let aside = format!("{name}.{}.{number}{SUFFIX}", std::process::id());
        let failed = |what: &str, error: &io::Error| self.error(what, &aside, error);
        // A dead process may have had our number: what it left is of no use to anybody.
        _ = unlinkat(&self.fd, aside.as_str(), UnlinkatFlags::NoRemoveDir);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, aside.as_str(), flags, Mode::from_bits_truncate(0o600));
        let mut file = File::from(fd.map_err(|errno| failed("cannot create", &errno.into()))?);
        let staged = Staged { directory: Arc::clone(self), aside: aside.clone(), name: name.to_owned() };
        let write = self.faults.check(Step::Write).and_then(|()| file.write_all(bytes));
        write.map_err(|error| failed("cannot write", &error))?;
        Ok((staged, file))
    }

    /// Removes what processes that were killed left behind while they staged `name`. Only for whoever is its one writer.
    pub(super) fn remove_leftovers(&self, name: &str) {
        for entry in self.entries().unwrap_or_default() {
            if entry.strip_prefix(name).is_some_and(|rest| rest.starts_with('.') && rest.ends_with(SUFFIX)) {
                _ = unlinkat(&self.fd, entry.as_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.check(Step::SyncDirectory)?;
        Ok(nix::unistd::fsync(self.fd.as_fd())?)
    }
}

/// A file that was written aside. Dropping it removes it.
#[must_use = "it is not in place before it is committed"]
pub(super) struct Staged {
    directory: Arc<Directory>,
    aside: String,
    name: String,
}

impl Staged {
    /// Puts it in place: one rename, and an fsync of the directory.
    ///
    /// # Errors
    /// [`CommitError::Undecided`].
    pub(super) fn commit(self) -> Result<(), CommitError> {
        let directory = &self.directory;
        let undecided =
            |what: &str, error: &io::Error| CommitError::Undecided(directory.error(what, &self.name, error));
        let rename = || {
            directory.faults.check(Step::Rename)?;
            Ok(renameat(&directory.fd, self.aside.as_str(), &directory.fd, self.name.as_str())?)
        };
        rename().map_err(|error: io::Error| undecided("cannot replace", &error))?;
        directory.sync().map_err(|error| undecided("cannot make durable the replacement of", &error))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After the rename there is nothing of that name.
        _ = unlinkat(&self.directory.fd, self.aside.as_str(), UnlinkatFlags::NoRemoveDir);
    }
}

/// Makes `path` and what is missing above it, each durable in the directory above.
fn make_durably(path: &Path) -> io::Result<()> {
    if std::fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent {
        make_durably(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        other => other?,
    }
    match File::open(parent.unwrap_or(Path::new("."))) {
        Ok(parent) => parent.sync_all(),
        // A parent that may be entered but not read is somebody else's business.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(error),
    }
}

/// True if `path` is a directory, no symlink, that belongs to `owner`.
pub(super) fn is_directory_of(path: &Path, owner: u32) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|status| status.is_dir() && status.uid() == owner)
}
