//! Parts of dirty granules against a plain set of blocks.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::range::{ByteRange, Granularity, Granule};
use crate::sync::Arc;

const GRANULE: u64 = 512;
const BLOCK: u64 = 32;

fn map(size_bytes: u64) -> Arc<DirtyMap> {
    DirtyMap::with_blocks(size_bytes, Granularity::new(GRANULE).unwrap(), BLOCK)
}

fn clean(map: &Arc<DirtyMap>) {
    while let Some(mut claim) = map.claim(Granule(0), u32::MAX) {
        claim.parts(0);
        claim.finish();
    }
}

fn parts(map: &Arc<DirtyMap>, gap_bytes: u64) -> Vec<ByteRange> {
    let mut found = Vec::new();
    while let Some(mut claim) = map.claim(Granule(0), u32::MAX) {
        found.extend(claim.parts(gap_bytes));
        claim.finish();
    }
    found
}

#[test]
fn what_was_written_is_copied_and_no_more() {
    let map = map(100 * GRANULE);
    map.mark(ByteRange::new(5 * GRANULE + 1, 1));
    assert_eq!(parts(&map, 0), [ByteRange::new(5 * GRANULE, GRANULE)], "nothing was known of it");
    map.mark(ByteRange::new(5 * GRANULE + BLOCK - 1, 2));
    map.mark(ByteRange::new(6 * GRANULE - 1, 1));
    let (two, last) = (ByteRange::new(5 * GRANULE, 2 * BLOCK), ByteRange::new(6 * GRANULE - BLOCK, BLOCK));
    assert_eq!(parts(&map, 0), [two, last]);
    map.mark(ByteRange::new(5 * GRANULE, 1));
    map.mark(ByteRange::new(5 * GRANULE + 3 * BLOCK, 1));
    assert_eq!(parts(&map, 2 * BLOCK), [ByteRange::new(5 * GRANULE, 4 * BLOCK)], "the gap is not worth two requests");
    map.mark(ByteRange::new(5 * GRANULE, 2 * GRANULE));
    assert_eq!(parts(&map, 0), [ByteRange::new(5 * GRANULE, 2 * GRANULE)]);
}

#[test]
fn a_claim_that_fails_gives_everything_back() {
    let map = map(4 * GRANULE);
    map.mark(ByteRange::new(0, 1));
    clean(&map);
    map.mark(ByteRange::new(BLOCK, 1));
    // Not looked at: nothing was lost.
    drop(map.claim(Granule(0), 1));
    assert_eq!(parts(&map, 0), [ByteRange::new(BLOCK, BLOCK)]);
    map.mark(ByteRange::new(BLOCK, 1));
    let mut claim = map.claim(Granule(0), 1).unwrap();
    assert_eq!(claim.parts(0), claim.parts(0), "asked twice");
    drop(claim);
    assert_eq!(parts(&map, 0), [ByteRange::new(0, GRANULE)]);
}

#[test]
fn what_was_given_back_and_claimed_again_is_a_part_again() {
    let map = map(4 * GRANULE);
    map.mark(ByteRange::new(0, 4 * GRANULE));
    let mut claim = map.claim(Granule(0), 4).unwrap();
    claim.parts(0);
    claim.truncate(GRANULE);
    assert_eq!(claim.parts(0), [ByteRange::new(0, GRANULE)]);
    claim.extend(3 * GRANULE);
    assert_eq!(claim.parts(0), [ByteRange::new(0, 3 * GRANULE)]);
}

#[test]
fn memory_for_it_has_an_end() {
    let granules = 300 << 15;
    let map = map(granules * GRANULE);
    for leaf in 0..300 {
        map.mark(ByteRange::new((leaf << 15) * GRANULE, 1));
    }
    clean(&map);
    for leaf in 0..300 {
        map.mark(ByteRange::new((leaf << 15) * GRANULE, 1));
    }
    let found = parts(&map, 0);
    assert_eq!(found.iter().filter(|part| part.len() == BLOCK).count(), 256);
    assert_eq!(found.iter().filter(|part| part.len() == GRANULE).count(), 44, "the others are whole");
}

#[derive(Clone, Debug)]
enum Step {
    Mark(ByteRange),
    Copy {
        from: u64,
        limit: u32,
        fails: bool,
    },
    /// To both images at once.
    Synchronous {
        range: ByteRange,
        fails: bool,
    },
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_block_that_was_written_is_copied(
        size in 1..40 * GRANULE,
        steps in prop::collection::vec(prop_oneof![
            3 => (0..40 * GRANULE, 1..3 * GRANULE).prop_map(|(start, len)| Step::Mark(ByteRange::new(start, len))),
            3 => (0..40 * GRANULE, 1..BLOCK).prop_map(|(start, len)| Step::Mark(ByteRange::new(start, len))),
            2 => (0..40 * GRANULE, 1..3 * GRANULE, any::<bool>()).prop_map(|(start, len, fails)| Step::Synchronous {
                range: ByteRange::new(start, len),
                fails,
            }),
            4 => (0..40_u64, 1..5_u32, any::<bool>()).prop_map(|(from, limit, fails)| Step::Copy { from, limit, fails }),
        ], 1..60),
    ) {
        let map = map(size);
        let disk = ByteRange::new(0, size);
        let blocks = |range: ByteRange| {
            let range = range.intersect(disk).align_out(BLOCK);
            range.start() / BLOCK..range.end() / BLOCK
        };
        // The blocks that differ, and the granules of which that is known exactly.
        let (mut differ, mut exact, mut narrowed) = (BTreeSet::new(), BTreeSet::new(), false);
        for step in steps {
            match step {
                Step::Mark(range) => {
                    map.mark(range);
                    // From now on there is a leaf.
                    let part = range.intersect(disk);
                    narrowed |= !part.is_empty() && part.align_out(GRANULE).intersect(disk) != part;
                    differ.extend(blocks(range));
                }
                Step::Synchronous { range, fails } => {
                    let hold = map.try_hold(range).unwrap();
                    hold.clear_covered();
                    let (start, end) = (hold.range().start(), hold.range().end());
                    if fails {
                        drop(hold);
                        differ.extend(blocks(range));
                        let part = range.intersect(disk);
                        narrowed |= !part.is_empty() && part.align_out(GRANULE).intersect(disk) != part;
                    } else {
                        hold.finish();
                        let whole = start.div_ceil(GRANULE)..if end == size { size.div_ceil(GRANULE) } else { end / GRANULE };
                        differ.retain(|block| !whole.contains(&(block * BLOCK / GRANULE)));
                        // Their words still say what they said.
                        exact.retain(|granule| !whole.contains(granule));
                    }
                }
                Step::Copy { from, limit, fails } => {
                    let Some(mut claim) = map.claim(Granule(from), limit) else { continue };
                    let copied: BTreeSet<u64> = claim.parts(0).into_iter().flat_map(blocks).collect();
                    for block in blocks(claim.range()) {
                        let differs = differ.contains(&block);
                        prop_assert!(!differs || copied.contains(&block), "block {} is left out", block);
                        if exact.contains(&(block * BLOCK / GRANULE)) {
                            prop_assert_eq!(differs, copied.contains(&block), "block {}", block);
                        }
                    }
                    let granules = claim.granules();
                    if fails {
                        exact.retain(|granule| !granules.contains(granule));
                    } else {
                        differ.retain(|block| !granules.contains(&(block * BLOCK / GRANULE)));
                        exact.extend(granules.filter(|_| narrowed));
                        claim.finish();
                    }
                }
            }
        }
        let copied: BTreeSet<u64> = parts(&map, 0).into_iter().flat_map(blocks).collect();
        prop_assert!(differ.is_subset(&copied));
    }
}

/// The granules in the order in which they are claimed, so many at a time.
fn order(map: &Arc<DirtyMap>, limit: u32) -> Vec<u64> {
    let mut order = Vec::new();
    let mut from = Granule(0);
    while let Some(claim) = map.claim(from, limit) {
        order.extend(claim.granules());
        from = claim.next();
        claim.finish();
    }
    order
}

#[test]
fn what_is_written_again_before_it_is_copied_is_copied_last() {
    let map = map(64 * GRANULE);
    let write = |granule: u64| map.mark(ByteRange::new(granule * GRANULE, BLOCK));
    map.mark(ByteRange::new(0, 64 * GRANULE));
    // The scan finds what a guest has written already: that alone does not make it hot, nor does a stream.
    map.mark(ByteRange::new(0, 64 * GRANULE));
    assert_eq!(order(&map, 16), (0..64).collect::<Vec<_>>());
    map.mark(ByteRange::new(0, 64 * GRANULE));
    for hot in [0, 20, 21, 63] {
        write(hot);
    }
    let cold = (0..64).filter(|granule| ![0, 20, 21, 63].contains(granule));
    assert_eq!(order(&map, 16), cold.chain([63, 0, 20, 21]).collect::<Vec<_>>());
    // Too many before the next cold one: the search ends, and does not begin again behind it.
    let long = DirtyMap::with_blocks(4096 * GRANULE, Granularity::new(GRANULE).unwrap(), BLOCK);
    long.mark(ByteRange::new(0, 4096 * GRANULE));
    for granule in 100..200 {
        long.mark(ByteRange::new(granule * GRANULE, BLOCK));
    }
    let claim = long.claim(Granule(100), 1).unwrap();
    assert_eq!(claim.granules(), 100..101);
    claim.finish();
    // Forgotten when it was copied; and where all is hot nothing is.
    map.mark(ByteRange::new(0, 64 * GRANULE));
    assert_eq!(order(&map, 1), (0..64).collect::<Vec<_>>());
    map.mark(ByteRange::new(0, 64 * GRANULE));
    for granule in 0..64 {
        write(granule);
    }
    assert_eq!(order(&map, 16), (0..64).collect::<Vec<_>>());
}
