//! A shared, writable mapping of a file, with its unsafe code.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// `len` bytes of a file, mapped MAP_SHARED. Other writers of the file may change them at any time.
pub struct SharedMap {
    start: NonNull<u8>,
    len: usize,
}

impl SharedMap {
    /// Maps `len` bytes at `offset` (a multiple of the page size), readable and writable.
    pub fn new(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: no address is asked for, so the kernel picks one that nothing uses; `file` is open for the call's
        // duration, and a mapping outlives its descriptor (mmap(2)).
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(SharedMap { start, len })
    }

    /// Copies `bytes` into the mapping at `at`.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.len), "outside the mapping");
        // SAFETY: the range lies in the mapping (asserted), which lives as long as `self`; `bytes` is ordinary memory, so the
        // two do not overlap. No reference into the mapping is ever made, so nothing is assumed about who else writes it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(at), bytes.len()) }
    }

    /// Copies bytes of the mapping at `at` into `bytes`.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.len), "outside the mapping");
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr().add(at), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Writes what was changed back to the file and waits for it.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: start and length are exactly those that mmap gave.
        match unsafe { libc::msync(self.start.as_ptr().cast(), self.len, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: start and length are exactly those that mmap gave, and no pointer into the mapping is kept elsewhere.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.len);
        }
    }
}
