//! The allocator: the system's, except that buffers for kernel requests are born with their memory in place.
//!
//! The kernel copies a request straight into the pages of the buffer that a session thread gave to read(2). If a page is
//! not there yet and the thread has been killed meanwhile, the page cannot be faulted in, and the kernel ends that request
//! with EIO, although the next server could have answered it. So no kill may ever meet a missing page:
//!
//! ```text
//! session thread:  allocate the buffer (mapped and populated here) -> read -> dispatch -> read -> ...
//! ```
//!
//! The library that reads the requests allocates its buffers itself and offers no seam; the one place that sees each of
//! them before its first use is the allocator. They are told by their size, [`REQUEST_BUFFER_BYTES`], which nothing else
//! asks for; should the library change it, a test fails. Only the head is populated, [`POPULATED_BYTES`]: no request is
//! longer, since `max_write` is 1 MiB. Besides populating:
//! - `mlock`, where the limit allows: a page that is not there again (swapped out) is as bad as one that never was;
//! - the payload of a write starts on a page: the kernel copies whole pages to whole pages (both from the guest's memory and
//!   into the image), and direct I/O can use the payload as it is;
//! - `MADV_HUGEPAGE` for the populated head: the kernel looks fewer pages up;
//! - `MADV_DONTFORK`: a fork would write-protect the pages until they are copied.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the session library (fuser 0.18, `read_buf.rs`) allocates for each thread that reads requests.
pub const REQUEST_BUFFER_BYTES: usize = (16 << 20) + 4096;

/// How much of a request buffer is populated: the longest request (1 MiB of payload) and its headers.
pub const POPULATED_BYTES: usize = (1 << 20) + (16 << 10);

const PAGE_BYTES: usize = 4096;

/// What precedes the payload in a write request: fuse_in_header and fuse_write_in (include/uapi/linux/fuse.h).
const WRITE_HEADER_BYTES: usize = 40 + 40;
/// How far into its mapping a request buffer starts.
const LEAD_BYTES: usize = PAGE_BYTES - WRITE_HEADER_BYTES;
/// What a request buffer's address is a multiple of: of what the lead is.
const LEAD_ALIGNMENT: usize = 16;
const LEAD_PAGES_BYTES: usize = PAGE_BYTES;
const MAPPED_BYTES: usize = LEAD_PAGES_BYTES + REQUEST_BUFFER_BYTES;

/// Bytes of a huge page (of the usual kind; elsewhere the advice is worth nothing and does no harm).
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// How many request buffers were populated since the process started.
static POPULATED: AtomicUsize = AtomicUsize::new(0);

/// How many request buffers were handed out with their memory in place, since the process started.
pub fn populated_buffers() -> usize {
    POPULATED.load(Ordering::Relaxed)
}

/// The crate's allocator. See the module.
pub struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn is_request_buffer(layout: Layout) -> bool {
    layout.size() == REQUEST_BUFFER_BYTES && layout.align() <= LEAD_ALIGNMENT
}

/// Maps `MAPPED_BYTES` from a multiple of `HUGE_PAGE_BYTES` on; null where there is no memory.
fn map_aligned() -> *mut u8 {
    // SAFETY: an anonymous private mapping at an address of the kernel's choice changes no memory that is in use (mmap(2)).
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            MAPPED_BYTES + HUGE_PAGE_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return std::ptr::null_mut();
    }
    let skip = start.addr().next_multiple_of(HUGE_PAGE_BYTES) - start.addr();
    // SAFETY: what is cut off, before the aligned part and after it, lies within the mapping just made (its length is the sum
    // of the three) and was never handed out. Where that fails, the part stays mapped and unused.
    unsafe {
        let aligned = start.add(skip);
        if skip > 0 {
            libc::munmap(start, skip);
        }
        if skip < HUGE_PAGE_BYTES {
            libc::munmap(aligned.add(MAPPED_BYTES), HUGE_PAGE_BYTES - skip);
        }
        aligned.cast()
    }
}

/// Maps a request buffer; null where there is no memory.
fn map_request_buffer() -> *mut u8 {
    let mapping = map_aligned();
    if mapping.is_null() {
        return mapping;
    }
    let start = mapping.cast::<libc::c_void>();
    // SAFETY: the range lies within the mapping just made, which nobody else knows of; none of these calls changes what
    // it reads (madvise(2), mlock(2)). Failing, they leave an ordinary mapping. The huge page is locked whole: a lock on a
    // part would split it.
    let populated = unsafe {
        libc::madvise(start, MAPPED_BYTES, libc::MADV_DONTFORK);
        libc::madvise(start, HUGE_PAGE_BYTES, libc::MADV_HUGEPAGE);
        let populated = libc::madvise(start, LEAD_PAGES_BYTES + POPULATED_BYTES, libc::MADV_POPULATE_WRITE) == 0;
        libc::mlock(start, HUGE_PAGE_BYTES);
        populated
    };
    if !populated {
        // Before Linux 5.14: touch each page.
        for page in (0..LEAD_PAGES_BYTES + POPULATED_BYTES).step_by(PAGE_BYTES) {
            // SAFETY: inside the mapping, writable, and nobody else's.
            unsafe { mapping.add(page).write_volatile(0) };
        }
    }
    POPULATED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the lead and the buffer together are no longer than the mapping.
    unsafe { mapping.add(LEAD_BYTES) }
}

/// Asks for huge pages for what lies whole in `memory`: fewer entries in the processor's tables of pages. Best done before it
/// is first used.
pub fn prefer_huge_pages(memory: &mut [u8]) {
    let skip = memory.as_ptr().align_offset(HUGE_PAGE_BYTES);
    let whole = memory.len().saturating_sub(skip) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if whole > 0 {
        // SAFETY: the range lies within `memory`; the advice changes nothing that can be read there (madvise(2)).
        unsafe { libc::madvise(memory.as_mut_ptr().add(skip).cast(), whole, libc::MADV_HUGEPAGE) };
    }
}

// SAFETY: every method hands its arguments on to `System` unchanged, under the same contract, except for layouts of the
// request buffers' size: those are always made by `map_request_buffer` (a fresh zeroed mapping, aligned as `is_request_buffer` says)
// and always taken back by munmap; which of the two it is follows from the layout alone, and `dealloc` and `realloc` are
// called with the layout of the allocation (GlobalAlloc's contract).
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_request_buffer(layout) {
            return map_request_buffer();
        }
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_request_buffer(layout) {
            return map_request_buffer();
        }
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        if is_request_buffer(layout) {
            // SAFETY: a layout of this size comes from `map_request_buffer`, `LEAD_BYTES` into its mapping; the caller gives
            // the allocation up.
            unsafe { libc::munmap(start.sub(LEAD_BYTES).cast(), MAPPED_BYTES) };
            return;
        }
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_bytes: usize) -> *mut u8 {
        // SAFETY: the caller promises that `new_bytes` is not 0 and does not overflow when rounded up to the alignment.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_bytes, layout.align()) };
        if !is_request_buffer(layout) && !is_request_buffer(new_layout) {
            // SAFETY: the caller's promise, handed on; neither end is ours.
            return unsafe { System.realloc(start, layout, new_bytes) };
        }
        // SAFETY: `new_layout` is valid (above); the old allocation is `layout.size()` bytes long, the new one
        // `new_bytes`, they do not overlap, and the old one is given up only after the copy.
        unsafe {
            let fresh = self.alloc(new_layout);
            if !fresh.is_null() {
                std::ptr::copy_nonoverlapping(start, fresh, layout.size().min(new_bytes));
                self.dealloc(start, layout);
            }
            fresh
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_buffers_are_populated_and_zeroed() {
        let before = populated_buffers();
        let buffer = vec![0_u8; REQUEST_BUFFER_BYTES];
        assert!(populated_buffers() > before);
        assert!(buffer.iter().step_by(4096).all(|byte| *byte == 0));
    }

    #[test]
    fn the_payload_of_a_write_starts_on_a_page() {
        let buffer = vec![0_u8; REQUEST_BUFFER_BYTES];
        // As the library has it: the buffer from its first multiple of 8 on.
        let skip = buffer.as_ptr().align_offset(8);
        assert_eq!((buffer.as_ptr().addr() + skip + 40 + 40) % 4096, 0);
    }

    #[test]
    fn request_buffers_can_grow_and_shrink() {
        let mut buffer = vec![7_u8; REQUEST_BUFFER_BYTES];
        buffer.reserve_exact(4096);
        buffer.push(8);
        assert_eq!((buffer[REQUEST_BUFFER_BYTES - 1], buffer[REQUEST_BUFFER_BYTES]), (7, 8));
        buffer.truncate(100);
        buffer.shrink_to_fit();
        assert_eq!(buffer, [7; 100]);
    }
}
