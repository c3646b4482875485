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

/// Ends this process at once, all threads together (_exit(2)). Nothing is unwound, and no library takes anything down that another thread
/// still uses: neither destructors nor what was registered with atexit(3) runs, and nothing that is buffered is written.
pub fn leave(code: u8) -> ! {
    // SAFETY: takes an integer and does not return; the kernel ends every thread.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Lets this process wait for its children: who ignores SIGCHLD passes that on over exec, and the kernel then reaps them itself
/// (sigaction(2)).
pub fn reset_child_signal() {
    // SAFETY: sets no handler: the default disposition takes no code and no data of ours.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
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

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::process::Command;

    /// Told by the environment to the process that leaves.
    const LEAVES: &str = "LIVEMIRROR_TEST_LEAVES";

    extern "C" fn at_exit() {
        eprintln!("atexit has run");
    }

    #[test]
    fn nothing_runs_after_it_was_left() {
        if std::env::var_os(LEAVES).is_some() {
            // SAFETY: the function takes nothing, returns nothing and lives as long as the program.
            assert_eq!(unsafe { libc::atexit(at_exit) }, 0);
            super::leave(7);
        }
        let own = std::env::current_exe().unwrap();
        let name = concat!(module_path!(), "::nothing_runs_after_it_was_left");
        let name = name.split_once("::").unwrap().1;
        let done = Command::new(own).args(["--exact", name, "--nocapture"]).env(LEAVES, "1").output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(7), "{said}");
        assert!(!said.contains("atexit has run"), "{said}");
    }
}
