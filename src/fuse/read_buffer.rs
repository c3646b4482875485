//! The buffers that guests' reads are served from: one per session thread, used again for every request.

use std::cell::RefCell;

use crate::sys::populate::{HUGE_PAGE_BYTES, prefer_huge_pages};

/// Start of the bytes that are lent: direct I/O of any image can go straight there.
const ALIGNMENT_BYTES: usize = 4096;
/// From this length on the buffer is a huge page.
const LARGE_BYTES: usize = 256 << 10;

#[derive(Default)]
struct ReadBuffer {
    memory: Vec<u8>,
    start: usize,
}

impl ReadBuffer {
    fn room(&self) -> usize {
        self.memory.len() - self.start
    }

    /// Makes room for `len` bytes. What was in it is gone.
    fn grow(&mut self, len: usize) {
        let large = (LARGE_BYTES..=HUGE_PAGE_BYTES).contains(&len);
        let (unit, len) = if large { (HUGE_PAGE_BYTES, HUGE_PAGE_BYTES) } else { (ALIGNMENT_BYTES, len) };
        // The old one goes first. Fresh zeroes of this length are untouched memory: what is cut off costs address space only.
        *self = ReadBuffer::default();
        self.memory = vec![0; len + unit];
        self.start = self.memory.as_ptr().align_offset(unit);
        prefer_huge_pages(&mut self.memory[self.start..]);
    }
}

thread_local! {
    static BUFFER: RefCell<ReadBuffer> = RefCell::default();
}

/// Lends `len` bytes of this thread's buffer, page-aligned, with whatever the last request left in them. The buffer grows
/// to hold the longest request there was (1 MiB, `max_pages`).
pub fn with<T>(len: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.room() < len {
            buffer.grow(len);
        }
        work(&mut buffer.memory[buffer.start..][..len])
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_buffer_is_aligned_and_is_kept() {
        let small = super::with(512, |bytes| (bytes.as_ptr() as usize, bytes.len()));
        assert_eq!((small.0 % 4096, small.1), (0, 512));
        let first = super::with(1 << 20, |bytes| (bytes.as_ptr() as usize, bytes.len()));
        assert_eq!((first.0 % 4096, first.1), (0, 1 << 20));
        assert_eq!(super::with(512, |bytes| bytes.as_ptr() as usize), first.0);
        assert_eq!(super::with(3 << 20, |bytes| bytes.len()), 3 << 20);
    }
}
