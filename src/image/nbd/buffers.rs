//! Memory of large requests, used again and again: the kernel clears fresh memory page by page, which takes longer than the copy into it.
//!
//! As much is kept as was used between the last two flushes, and no more than may be kept of changes.

use std::collections::BTreeMap;
use std::ops::Deref;

use super::kept::KEPT_BYTES_MAX;
use crate::sync::{Arc, Mutex};
use crate::sys::libnbd::Memory;

/// Buffers are multiples of this. What is smaller is left to the allocator.
const STEP_BYTES: usize = 64 << 10;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    idle: Mutex<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    by_size: BTreeMap<usize, Vec<Vec<u8>>>,
    bytes: usize,
    /// Bytes taken since the last [`Buffers::trim`].
    taken: usize,
}

/// Bytes of a change. Their memory goes back when the last user is done.
#[derive(Debug)]
pub(super) struct Data {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
}

impl Deref for Data {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsRef<[u8]> for Data {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        self.home.give(std::mem::take(&mut self.bytes));
    }
}

impl Memory for Buffers {
    /// Bytes of anything.
    fn take(&self, len: usize) -> Vec<u8> {
        if len < STEP_BYTES {
            return vec![0; len];
        }
        let size = len.next_multiple_of(STEP_BYTES);
        let mut idle = self.idle.lock();
        idle.taken += size;
        let found = idle.by_size.get_mut(&size).and_then(Vec::pop);
        if found.is_some() {
            idle.bytes -= size;
        }
        drop(idle);
        let mut bytes = found.unwrap_or_else(|| Vec::with_capacity(size));
        bytes.resize(len, 0);
        bytes
    }
}

impl Buffers {
    /// A copy of `bytes`.
    pub(super) fn copy(self: &Arc<Self>, bytes: &[u8]) -> Arc<Data> {
        if bytes.len() < STEP_BYTES {
            return self.data(bytes.to_vec());
        }
        let mut copy = self.take(bytes.len());
        copy.copy_from_slice(bytes);
        self.data(copy)
    }

    /// `bytes`, as a change has them.
    pub(super) fn data(self: &Arc<Self>, bytes: Vec<u8>) -> Arc<Data> {
        Arc::new(Data { bytes, home: self.clone() })
    }

    /// What was taken is needed no longer.
    pub(super) fn give(&self, bytes: Vec<u8>) {
        let size = bytes.capacity();
        if size < STEP_BYTES || size % STEP_BYTES != 0 {
            return;
        }
        let mut idle = self.idle.lock();
        if (idle.bytes + size) as u64 <= KEPT_BYTES_MAX {
            idle.bytes += size;
            idle.by_size.entry(size).or_default().push(bytes);
        }
    }

    /// Lets go of what was not needed since the last time.
    pub(super) fn trim(&self) {
        let mut freed = Vec::new();
        let mut idle = self.idle.lock();
        let needed = std::mem::take(&mut idle.taken);
        while idle.bytes > needed {
            let Some(mut largest) = idle.by_size.last_entry() else { break };
            let size = *largest.key();
            freed.extend(largest.get_mut().pop());
            if largest.get().is_empty() {
                largest.remove();
            }
            idle.bytes -= size;
        }
        drop(idle);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_what_is_not_needed_is_let_go() {
        let buffers = Arc::new(Buffers::default());
        let held = || buffers.idle.lock().bytes;
        let first = buffers.copy(&[7; 100_000]);
        let place = first.as_ptr();
        assert!(first[..] == [7; 100_000] && held() == 0);
        drop(first);
        assert_eq!(held(), 2 * STEP_BYTES);
        let again = buffers.copy(&[8; 120_000]);
        assert!(again[..] == [8; 120_000] && again.as_ptr() == place);
        buffers.give(buffers.take(200_000));
        drop(again);
        buffers.trim();
        assert_eq!(held(), 6 * STEP_BYTES, "all of it was needed since the last time");
        drop(buffers.copy(&[9; 70_000]));
        buffers.trim();
        assert_eq!(held(), 2 * STEP_BYTES);
        buffers.trim();
        assert_eq!(held(), 0);
        drop(buffers.copy(&[1; 100]));
        assert_eq!(held(), 0, "small ones are the allocator's");
        let many: Vec<_> = (0..2 * KEPT_BYTES_MAX / (1 << 20)).map(|_| buffers.take(1 << 20)).collect();
        many.into_iter().for_each(|bytes| buffers.give(bytes));
        assert_eq!(held() as u64, KEPT_BYTES_MAX);
    }
}
