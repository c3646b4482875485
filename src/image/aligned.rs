//! Memory that direct I/O can use: aligned buffers, from a bounded pool.
//!
//! The kernel wants the memory of a direct request aligned; a FUSE payload never is. The pool hands out buffers to copy
//! through. It makes them when they are first needed and keeps them, so that requests allocate nothing in steady state, and it
//! makes only so many: who finds none waits. A holder of a buffer must not wait for anything but its own I/O.

use std::ops::{Deref, DerefMut};

use crate::sync::{Condvar, Mutex};

/// What every buffer's address is a multiple of, in bytes: at least what any device or file system asks for.
pub const MEMORY_ALIGNMENT: usize = 4096;

/// Zeroed memory whose address is a multiple of [`MEMORY_ALIGNMENT`].
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// `len` bytes of zeroes.
    pub fn zeroed(len: usize) -> Self {
        // A vector that is never resized never moves: the place of the first aligned byte in it stays.
        let memory = vec![0; len + MEMORY_ALIGNMENT];
        let start = memory.as_ptr().align_offset(MEMORY_ALIGNMENT);
        AlignedBuffer { memory, start, len }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Buffers of one size.
#[derive(Debug)]
struct Shelf {
    buffer_bytes: usize,
    limit: usize,
    state: Mutex<ShelfState>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct ShelfState {
    idle: Vec<AlignedBuffer>,
    made: usize,
}

impl Shelf {
    fn new(buffer_bytes: usize, limit: usize) -> Self {
        Shelf { buffer_bytes, limit, state: Mutex::default(), returned: Condvar::default() }
    }

    fn take(&self) -> AlignedBuffer {
        let mut state = self.state.lock();
        loop {
            if let Some(buffer) = state.idle.pop() {
                return buffer;
            }
            if state.made < self.limit {
                state.made += 1;
                drop(state);
                return AlignedBuffer::zeroed(self.buffer_bytes);
            }
            self.returned.wait(&mut state);
        }
    }

    fn put(&self, buffer: AlignedBuffer) {
        self.state.lock().idle.push(buffer);
        self.returned.notify_one();
    }
}

/// A bounded pool of aligned buffers in two sizes.
#[derive(Debug)]
pub struct BufferPool {
    small: Shelf,
    large: Shelf,
}

/// A buffer out of a [`BufferPool`]; goes back when it is dropped. Holds old bytes at first.
#[derive(Debug)]
pub struct PooledBuffer<'a> {
    shelf: &'a Shelf,
    buffer: Option<AlignedBuffer>,
    len: usize,
}

impl BufferPool {
    /// Bytes of the largest buffer.
    pub const BUFFER_BYTES_MAX: usize = 512 << 10;
    const SMALL_BYTES: usize = 16 << 10;
    /// 1 MiB of small buffers and 8 MiB of large ones at most.
    const SMALL_LIMIT: usize = 64;
    const LARGE_LIMIT: usize = 16;

    /// An empty pool: buffers are made when they are needed.
    pub fn new() -> Self {
        BufferPool {
            small: Shelf::new(Self::SMALL_BYTES, Self::SMALL_LIMIT),
            large: Shelf::new(Self::BUFFER_BYTES_MAX, Self::LARGE_LIMIT),
        }
    }

    /// A buffer of `len` bytes (at most [`BufferPool::BUFFER_BYTES_MAX`]). Waits until there is one.
    pub fn take(&self, len: usize) -> PooledBuffer<'_> {
        assert!(len <= Self::BUFFER_BYTES_MAX, "a request larger than the largest buffer is split");
        let shelf = if len <= Self::SMALL_BYTES { &self.small } else { &self.large };
        PooledBuffer { shelf, buffer: Some(shelf.take()), len }
    }
}

impl Default for BufferPool {
    fn default() -> Self {
        BufferPool::new()
    }
}

impl Deref for PooledBuffer<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buffer.as_ref().expect("there until dropped")[..self.len]
    }
}

impl DerefMut for PooledBuffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.as_mut().expect("there until dropped")[..self.len]
    }
}

impl Drop for PooledBuffer<'_> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.shelf.put(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_reused_and_bounded() {
        let pool = BufferPool::new();
        let held: Vec<_> = (0..BufferPool::LARGE_LIMIT).map(|_| pool.take(BufferPool::BUFFER_BYTES_MAX)).collect();
        assert!(held.iter().all(|buffer| buffer.as_ptr().align_offset(MEMORY_ALIGNMENT) == 0));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| pool.take(100_000).len());
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiter.is_finished());
            drop(held);
            assert_eq!(waiter.join().unwrap(), 100_000);
        });
        assert_eq!(pool.large.state.lock().made, BufferPool::LARGE_LIMIT);
        assert_eq!(pool.take(1).len(), 1);
    }
}
