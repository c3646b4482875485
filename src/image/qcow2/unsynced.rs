//! The metadata that was written since the last sync that succeeded.
//!
//! A sync that fails may have lost any of it for good: the kernel tells of an error once, and counts as clean what it could not write.
//! The mirror, or the guest, writes its data again, but into clusters that the tables in memory know already. So it is for us to
//! write the metadata again, before the next sync:
//!
//! ```text
//! write -> current --a sync begins--> in doubt --it succeeds--> forgotten
//!                                         `------it fails-----> written again before the next sync
//! ```
//!
//! Only the newest bytes of a place are kept: nobody who reads metadata meanwhile sees older ones. What was kept of a cluster is
//! forgotten before the cluster is given to somebody else.

use std::collections::HashMap;
use std::ops::Range;

use super::host::in_memory;
use crate::range::ByteRange;

/// The unit that is kept, 512 bytes, as a number of either kind.
const UNIT: usize = 512;
const UNIT_BYTES: u64 = UNIT as u64;
/// So many units are kept, each of a KiB of memory: 8 MiB.
const UNITS_MAX: usize = 8 << 10;

/// Bytes of one unit of the file, where they are known.
#[derive(Debug)]
struct Unit {
    bytes: [u8; UNIT],
    known: [bool; UNIT],
}

type Units = HashMap<u64, Box<Unit>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Unsynced {
    current: Units,
    in_doubt: Units,
    /// A sync of what is in doubt failed.
    lost: bool,
}

impl Unsynced {
    /// There is no more room: a sync is due.
    pub(super) fn is_full(&self) -> bool {
        self.current.len() + self.in_doubt.len() >= UNITS_MAX
    }

    /// Keeps what was written at `offset`.
    pub(super) fn keep(&mut self, offset: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for (index, within) in units(ByteRange::new(offset, bytes.len() as u64)) {
            let (head, tail) = rest.split_at(within.len());
            let unit =
                self.current.entry(index).or_insert_with(|| Box::new(Unit { bytes: [0; UNIT], known: [false; UNIT] }));
            unit.bytes[within.clone()].copy_from_slice(head);
            unit.known[within].fill(true);
            rest = tail;
        }
    }

    /// Nothing of `range` is written again.
    pub(super) fn forget(&mut self, range: ByteRange) {
        for kept in [&mut self.current, &mut self.in_doubt] {
            let touched = ByteRange::from_bounds(range.start() / UNIT_BYTES, range.end().div_ceil(UNIT_BYTES));
            let indexes: Vec<u64> = if touched.len() < kept.len() as u64 {
                (touched.start()..touched.end()).collect()
            } else {
                kept.keys().copied().filter(|index| (touched.start()..touched.end()).contains(index)).collect()
            };
            for index in indexes {
                let Some(unit) = kept.get_mut(&index) else { continue };
                for (_, within) in units(ByteRange::new(index * UNIT_BYTES, UNIT_BYTES).intersect(range)) {
                    unit.known[within].fill(false);
                }
                if !unit.known.contains(&true) {
                    kept.remove(&index);
                }
            }
        }
    }

    /// A sync begins. Calls `write` for what has to be written again for it, if there is something.
    ///
    /// # Errors
    /// The first one of `write`.
    pub(super) fn begin<E>(&mut self, mut write: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        for (index, newer) in self.current.drain() {
            match self.in_doubt.get_mut(&index) {
                Some(older) => {
                    for at in (0..UNIT).filter(|&at| newer.known[at]) {
                        (older.bytes[at], older.known[at]) = (newer.bytes[at], true);
                    }
                }
                None => drop(self.in_doubt.insert(index, newer)),
            }
        }
        if !self.lost {
            return Ok(());
        }
        for (index, unit) in &self.in_doubt {
            for run in known_runs(&unit.known) {
                write(index * UNIT_BYTES + run.start as u64, &unit.bytes[run])?;
            }
        }
        Ok(())
    }

    /// The sync ended.
    pub(super) fn end(&mut self, succeeded: bool) {
        self.lost = !succeeded;
        if succeeded {
            self.in_doubt.clear();
        }
    }
}

/// The units that `range` touches, and where in them.
fn units(range: ByteRange) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut at = range.start();
    std::iter::from_fn(move || {
        let index = at / UNIT_BYTES;
        let part = range.intersect(ByteRange::from_bounds(at, (index + 1) * UNIT_BYTES));
        at = part.end();
        let first = in_memory(part.start() % UNIT_BYTES);
        (!part.is_empty()).then(|| (index, first..first + in_memory(part.len())))
    })
}

fn known_runs(known: &[bool]) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + known[at..].iter().position(|&known| known)?;
        at = known[start..].iter().position(|&known| !known).map_or(known.len(), |len| start + len);
        Some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written again, in the order of places.
    fn again(unsynced: &mut Unsynced) -> Vec<(u64, Vec<u8>)> {
        let mut written = Vec::new();
        let begun: Result<(), ()> = unsynced.begin(|at, bytes| {
            written.push((at, bytes.to_vec()));
            Ok(())
        });
        begun.unwrap();
        written.sort();
        written
    }

    #[test]
    fn the_newest_bytes_are_written_again_after_a_failure_and_until_a_success() {
        let mut unsynced = Unsynced::default();
        unsynced.keep(510, &[1, 2, 3, 4]);
        assert!(again(&mut unsynced).is_empty(), "nothing is known to be lost");
        unsynced.keep(511, &[7]);
        unsynced.end(false);
        let all = vec![(510, vec![1, 7]), (512, vec![3, 4])];
        assert_eq!(again(&mut unsynced), all);
        unsynced.keep(2000, &[9]);
        unsynced.end(false);
        assert_eq!(again(&mut unsynced).len(), 3, "what came during the sync that failed too");
        unsynced.keep(3000, &[5]);
        unsynced.end(true);
        assert!(again(&mut unsynced).is_empty());
        unsynced.end(false);
        assert_eq!(again(&mut unsynced), vec![(3000, vec![5])], "it was written after the sync began");
    }

    #[test]
    fn what_was_forgotten_is_not_written_again() {
        let mut unsynced = Unsynced::default();
        unsynced.keep(0, &[1; 1024]);
        again(&mut unsynced);
        unsynced.end(false);
        unsynced.keep(4096, &[1; 512]);
        unsynced.forget(ByteRange::new(100, 8000));
        assert_eq!(again(&mut unsynced), vec![(0, vec![1; 100])]);
    }
}
