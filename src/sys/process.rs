//! Properties of a process that matter when memory is short.

use std::io;

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
