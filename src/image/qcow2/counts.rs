//! The numbers in a refcount block: 1 to 64 bits each, big-endian; those of less than a byte from the lowest bit on.

use super::host::in_memory;

/// How wide a refcount is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Width {
    bits: u64,
}

impl Width {
    /// `1 << order` bits, `order` 6 at most.
    pub(super) fn new(order: u32) -> Width {
        Width { bits: 1 << order }
    }

    /// So many refcounts are in a block of `bytes`.
    pub(super) fn fit(self, bytes: u64) -> u64 {
        bytes * 8 / self.bits
    }

    /// The refcount `at` of a block.
    pub(super) fn get(self, block: &[u8], at: u64) -> u64 {
        let first = at * self.bits;
        let byte = in_memory(first / 8);
        if self.bits >= 8 {
            let bytes = &block[byte..byte + in_memory(self.bits / 8)];
            bytes.iter().fold(0, |count, byte| (count << 8) | u64::from(*byte))
        } else {
            (u64::from(block[byte]) >> (first % 8)) & ((1 << self.bits) - 1)
        }
    }

    /// Changes the refcount `at` of a block. `count` fits: it is never more than what was there, or 1.
    pub(super) fn set(self, block: &mut [u8], at: u64, count: u64) {
        let first = at * self.bits;
        let byte = in_memory(first / 8);
        if self.bits >= 8 {
            let len = in_memory(self.bits / 8);
            block[byte..byte + len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
        } else {
            let mask = ((1_u64 << self.bits) - 1) << (first % 8);
            let others = u64::from(block[byte]) & !mask;
            block[byte] = (others | ((count << (first % 8)) & mask)).to_le_bytes()[0];
        }
    }

    /// The bytes of a block that hold the refcounts `first..end`.
    pub(super) fn bytes(self, first: u64, end: u64) -> std::ops::Range<usize> {
        in_memory(first * self.bits / 8)..in_memory((end * self.bits).div_ceil(8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let width = Width::new(order);
            let mut block = [0; 64];
            assert_eq!(width.fit(64), 512 >> order);
            for at in [0, 3, 5] {
                width.set(&mut block, at, 1);
            }
            let counts: Vec<u64> = (0..7).map(|at| width.get(&block, at)).collect();
            assert_eq!(counts, [1, 0, 0, 1, 0, 1, 0], "order {order}");
            width.set(&mut block, 3, 0);
            assert_eq!((width.get(&block, 3), width.get(&block, 5)), (0, 1));
        }
        // As the format has them: big-endian, and from the lowest bit on.
        let mut block = [0; 4];
        Width::new(4).set(&mut block, 1, 0x0102);
        assert_eq!(block, [0, 0, 1, 2]);
        let mut block = [0; 4];
        Width::new(1).set(&mut block, 1, 2);
        assert_eq!(block, [0b1000, 0, 0, 0]);
        assert_eq!((Width::new(4).bytes(1, 3), Width::new(0).bytes(9, 17)), (2..6, 1..3));
    }
}
