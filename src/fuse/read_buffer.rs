//! The buffers that guests' reads are served from: one per session thread, used again for every request.

use std::cell::RefCell;

/// Start of the bytes that are lent: direct I/O of any image can go straight there.
const ALIGNMENT_BYTES: usize = 4096;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` bytes of this thread's buffer, page-aligned, with whatever the last request left in them. The buffer grows
/// to the longest request there was (1 MiB, `max_pages`) and never beyond.
pub fn with<T>(len: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < len + ALIGNMENT_BYTES {
            buffer.clear();
            buffer.resize(len + ALIGNMENT_BYTES, 0);
        }
        let skip = buffer.as_ptr().align_offset(ALIGNMENT_BYTES);
        work(&mut buffer[skip..skip + len])
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_buffer_is_aligned_and_is_kept() {
        let first = super::with(1 << 20, |bytes| (bytes.as_ptr() as usize, bytes.len()));
        assert_eq!((first.0 % 4096, first.1), (0, 1 << 20));
        assert_eq!(super::with(512, |bytes| bytes.as_ptr() as usize), first.0);
    }
}
