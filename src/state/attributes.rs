//! What the file system keeps beside an image's bytes: extended attributes and times, through a descriptor of the image, an O_PATH
//! one too, and so never at a path that names something else by now.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::pair::Observation;

/// The path that leads to the open file.
pub(super) fn path(image: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", image.as_raw_fd())
}

pub(super) fn get(image: BorrowedFd<'_>, name: &str) -> io::Result<Option<Vec<u8>>> {
    xattr::get_deref(path(image), name)
}

pub(super) fn set(image: BorrowedFd<'_>, name: &str, value: &[u8]) -> io::Result<()> {
    xattr::set_deref(path(image), name, value)
}

pub(super) fn remove(image: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    xattr::remove_deref(path(image), name)
}

/// Makes durable all that was changed of the file.
pub(super) fn sync(image: BorrowedFd<'_>) -> io::Result<()> {
    match nix::unistd::fsync(image) {
        // An O_PATH descriptor cannot be synced, but opened again.
        Err(nix::Error::EBADF) => std::fs::File::open(path(image)).and_then(|file| file.sync_all()),
        // A device that keeps nothing.
        Err(nix::Error::EINVAL) => Ok(()),
        other => other.map_err(io::Error::from),
    }
}

/// `None` for what has no times of its own (a block device).
pub(super) fn observe(image: BorrowedFd<'_>) -> io::Result<Option<Observation>> {
    let status = nix::sys::stat::fstat(image)?;
    if status.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(None);
    }
    let ns = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    Ok(Some(Observation {
        size_bytes: status.st_size.unsigned_abs(),
        mtime_ns: ns(status.st_mtime, status.st_mtime_nsec),
        ctime_ns: ns(status.st_ctime, status.st_ctime_nsec),
    }))
}
