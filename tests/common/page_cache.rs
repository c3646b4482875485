//! What the page cache has of a file, and what of that is not durable yet: cachestat(2), Linux 6.5.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The number of cachestat(2), the same on every architecture (include/uapi/asm-generic/unistd.h).
const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Statistics {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

fn statistics(file: &Path) -> io::Result<Statistics> {
    let file = File::open(file)?;
    let range = Range { offset: 0, len: 0 };
    let mut statistics = Statistics::default();
    // SAFETY: both pointers are to live values with the layout of `struct cachestat_range` and `struct cachestat`
    // (include/uapi/linux/mman.h), the second writable; the kernel keeps neither.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut statistics, 0) };
    if result == 0 { Ok(statistics) } else { Err(io::Error::last_os_error()) }
}

/// Pages of `file` that are dirty or being written back. After an fsync that nobody wrote behind it is 0.
pub fn unwritten_pages(file: &Path) -> io::Result<u64> {
    statistics(file).map(|statistics| statistics.dirty + statistics.writeback)
}

/// Pages of `file` that are in memory.
pub fn cached_pages(file: &Path) -> io::Result<u64> {
    statistics(file).map(|statistics| statistics.cached)
}
