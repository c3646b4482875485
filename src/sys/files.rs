//! System calls on files and block devices that no library wraps.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Reads the extended attribute `name`. `None` if there is none, or none can be there.
///
/// # Errors
/// What fgetxattr(2) gives, ENODATA and EOPNOTSUPP aside; ERANGE if it is longer than 256 bytes.
pub fn extended_attribute(file: impl AsFd, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0_u8; 256];
    // SAFETY: the descriptor is open for the length of the borrow, the name ends with NUL, and at most `value.len()` bytes
    // are written to `value`.
    let got =
        unsafe { libc::fgetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    match usize::try_from(got) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        Err(_) => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(None),
            error => Err(error),
        },
    }
}
