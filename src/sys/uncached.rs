//! Reads and writes through the page cache that leave nothing behind in it: RWF_DONTCACHE (Linux 6.14, on file systems that have it).
//!
//! What others had in the cache stays there and is used; what was brought in for the request is dropped, after a write as soon as it has
//! reached the store, to which it is on its way at once.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The next piece that the kernel does of a request.
fn progress(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn offset_of(offset: u64, done: usize) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset + done as u64).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Fills `buffer` from `offset`.
///
/// # Errors
/// What preadv2(2) gives: EOPNOTSUPP, or EINVAL of older kernels, where it cannot be done this way; the end of the file.
pub fn read_exact_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        let vector = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let at = offset_of(offset, done)?;
        // SAFETY: the descriptor is open for the length of the borrow; the vector is one element that describes `rest`, which is
        // writable and outlives the call.
        let result = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, at, libc::RWF_DONTCACHE) };
        match progress(result) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => done += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `data` at `offset`.
///
/// # Errors
/// What pwritev2(2) gives: EOPNOTSUPP, or EINVAL of older kernels, where it cannot be done this way.
pub fn write_all_at(file: &File, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        let rest = &data[done..];
        let vector = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        let at = offset_of(offset, done)?;
        // SAFETY: the descriptor is open for the length of the borrow; the vector is one element that describes `rest`, which
        // outlives the call and is only read from.
        let result = unsafe { libc::pwritev2(file.as_raw_fd(), &raw const vector, 1, at, libc::RWF_DONTCACHE) };
        match progress(result) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => done += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
