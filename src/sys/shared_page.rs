//! A page of memory that outlives the process that writes it: numbers in a sealed memory file, mapped by one process after the
//! other.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const BYTES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Numbers in a page.
pub const WORDS: usize = BYTES.get() / size_of::<AtomicU64>();

/// The page, mapped.
#[derive(Debug)]
pub struct SharedPage {
    start: NonNull<AtomicU64>,
}

// SAFETY: all that is reached through the pointer are atomics, which any thread may use; the mapping lasts as long as this.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// A new page, all zeroes, as a descriptor that can be handed on. Its size cannot change.
    ///
    /// # Errors
    /// No memory or no descriptors are left.
    pub fn create() -> io::Result<OwnedFd> {
        let file = memfd_create("page", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&file, 4096)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file)
    }

    /// Maps the page behind `file`.
    ///
    /// # Errors
    /// It is no such page.
    pub fn map(file: impl AsFd) -> io::Result<SharedPage> {
        let seals = SealFlag::from_bits_truncate(fcntl(file.as_fd(), FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new shared mapping at an address of the kernel's choice. The file is at least that long for ever, being
        // sealed: `create` is what makes such files, and it seals a page.
        let start = unsafe { mmap(None, BYTES, access, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(SharedPage { start: start.cast() })
    }

    /// Number `at`, below [`WORDS`].
    pub fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < WORDS);
        // SAFETY: within the mapping, aligned, always initialised (a memory file starts as zeroes), and only used as an atomic.
        unsafe { self.start.add(at).as_ref() }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`, which nothing refers to any more: `word` lends no longer than this lives.
        let _ = unsafe { munmap(self.start.cast(), BYTES.get()) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn what_one_mapping_writes_another_reads() {
        let file = SharedPage::create().unwrap();
        let first = SharedPage::map(&file).unwrap();
        first.word(WORDS - 1).store(7, Ordering::Relaxed);
        drop(first);
        assert_eq!(SharedPage::map(&file).unwrap().word(WORDS - 1).load(Ordering::Relaxed), 7);
        assert!(SharedPage::map(tempfile::tempfile().unwrap()).is_err());
    }
}
