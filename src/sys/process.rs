//! Processes: properties that matter when memory is short, and a handle that no other process can take over.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// From linux/prctl.h; libc has no name for it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that this process (its children and threads made later, too) does the I/O that memory reclaim may
/// wait for: its own allocations then never wait for reclaim that needs I/O (prctl(2), `PR_SET_IO_FLUSHER`).
///
/// # Errors
/// `EPERM` without `CAP_SYS_RESOURCE`, `EINVAL` before Linux 5.6.
pub fn set_io_flusher() -> io::Result<()> {
    // SAFETY: PR_SET_IO_FLUSHER takes four integers and touches no memory of ours (prctl(2)).
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1_u64, 0_u64, 0_u64, 0_u64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives memory that was freed back to the system, where the C library keeps it for later: what a mirror used is not needed until
/// the next one.
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer, and locks the C library's own heap while it looks at it (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A descriptor of the process `pid` (close-on-exec): poll(2) says POLLIN once it has ended with all its threads, whoever
/// its parent is.
///
/// # Errors
/// There is no such process; no descriptors are left; `ENOSYS` before Linux 5.3.
pub fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(number) {
        // SAFETY: the kernel made this descriptor for this call; nobody else knows of it.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal to the process that `process` (see [`open`]) stands for, and to no other: also once its number is in use again.
///
/// # Errors
/// `ESRCH`: it has ended and was reaped. `EPERM`.
pub fn signal(process: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: pidfd_send_signal takes integers, and a pointer that may be null (pidfd_send_signal(2)); the descriptor is open,
    // since it is borrowed.
    let failed = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, no_info, 0) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
