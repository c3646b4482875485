//! The dirty map under shuttle's scheduler: every atomic and lock is a point where another thread may go on. Run with
//! `RUSTFLAGS="--cfg shuttle" cargo test --release --lib --target-dir target-shuttle dirty::`; a failure prints the schedule.

use std::ops::Range;

use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::thread;

use super::*;
use crate::range::{ByteRange, Granularity, Granule};
use crate::sync::Arc;

const GRANULE: u64 = 512;
const SCHEDULES: usize = 10_000;

fn check(body: fn()) {
    shuttle::check_random(body, SCHEDULES);
    shuttle::check_pct(body, SCHEDULES, 3);
}

fn map(count: u64) -> Arc<DirtyMap> {
    DirtyMap::new(count * GRANULE, Granularity::new(GRANULE).unwrap())
}

fn granules(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * GRANULE, count * GRANULE)
}

fn claim_all(map: &Arc<DirtyMap>) {
    while let Some(claim) = map.claim(Granule(0), u32::MAX) {
        claim.finish();
    }
}

/// A mark that has returned is found, whatever a claim does to the summaries above it at the same time.
#[test]
fn no_summary_hides_a_dirty_bit() {
    check(|| {
        let map = map(2 * bits::LEAF_BITS);
        map.mark(granules(1, 1));
        let markers: Vec<_> = [1, 70]
            .into_iter()
            .map(|granule| {
                let map = Arc::clone(&map);
                thread::spawn(move || {
                    map.mark(granules(granule, 1));
                    // Either it is still dirty and found, or somebody claimed it since.
                    assert!(map.next_dirty(Granule(granule)).is_some() || !map.is_dirty(Granule(granule)));
                })
            })
            .collect();
        let claimer = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                if let Some(claim) = map.claim(Granule(0), 4) {
                    claim.finish();
                }
            })
        };
        markers.into_iter().for_each(|marker| marker.join().unwrap());
        claimer.join().unwrap();
        assert!(map.bits.is_consistent());
        claim_all(&map);
        assert!(map.is_in_sync() && map.bits.is_consistent());
    });
}

/// The count never falls below what is set, so that nobody sees zero while something is dirty.
#[test]
fn the_count_is_never_too_low() {
    check(|| {
        let map = map(128);
        map.mark(granules(100, 1));
        let untouched = map.try_hold(granules(100, 1)).unwrap();
        let marker = |granule| {
            let map = Arc::clone(&map);
            thread::spawn(move || map.mark(granules(granule, 1)))
        };
        let threads = [marker(3), marker(3)];
        let claimer = {
            let map = Arc::clone(&map);
            thread::spawn(move || claim_all(&map))
        };
        for _ in 0..3 {
            assert!((1..=3).contains(&map.dirty_granules()));
        }
        for thread in threads {
            thread.join().unwrap();
        }
        claimer.join().unwrap();
        untouched.finish();
        assert!(map.is_dirty(Granule(100)) && map.bits.is_consistent());
    });
}

/// A granule that is claimed, given up and claimed again is dirty or in flight at each instant.
#[test]
fn in_sync_is_not_fooled_by_a_claim_or_hold_that_is_dropped() {
    check(|| {
        let map = map(128);
        map.mark(granules(5, 2));
        let dropper = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                let mut claim = map.claim(Granule(0), 1).unwrap();
                claim.extend(7 * GRANULE);
                drop(claim);
                let mut claim = map.claim(Granule(0), 2).unwrap();
                claim.truncate(5 * GRANULE);
                drop(claim);
                drop(map.try_hold(granules(5, 2)).inspect(|hold| assert_eq!(hold.clear_covered(), 2)).unwrap());
            })
        };
        for _ in 0..4 {
            assert!(!map.is_in_sync());
            assert!(!map.is_quiet(granules(5, 1)));
        }
        dropper.join().unwrap();
        assert_eq!(map.dirty_granules(), 2);
        assert!(map.is_idle());
    });
}

/// Nobody is inside a granule that somebody else has; nobody waits for ever.
#[test]
fn claims_and_holds_exclude_each_other_without_a_cycle() {
    check(|| {
        let map = map(64);
        map.mark(granules(0, 3));
        let users = Arc::new([const { AtomicU64::new(0) }; 3]);
        let enter = |users: &[AtomicU64; 3], range: Range<usize>| {
            for user in &users[range.clone()] {
                assert_eq!(user.fetch_add(1, SeqCst), 0);
            }
            thread::yield_now();
            users[range].iter().for_each(|user| _ = user.fetch_sub(1, SeqCst));
        };
        let mut threads = Vec::new();
        for (first, count) in [(0, 2), (1, 2)] {
            let (map, users) = (Arc::clone(&map), Arc::clone(&users));
            threads.push(thread::spawn(move || {
                let hold = map.hold(granules(first, count), None).unwrap();
                let first = first as usize;
                enter(&users, first..first + count as usize);
                if count + first as u64 == 2 {
                    hold.clear_covered();
                    hold.finish();
                }
            }));
        }
        for _ in 0..2 {
            let (map, users) = (Arc::clone(&map), Arc::clone(&users));
            threads.push(thread::spawn(move || {
                if let Some(mut claim) = map.claim(Granule(0), 1) {
                    claim.extend(3 * GRANULE);
                    let claimed = claim.granules();
                    enter(&users, claimed.start as usize..claimed.end as usize);
                }
            }));
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(map.is_idle() && map.bits.is_consistent());
    });
}

/// A copier that sleeps misses neither a mark, nor a release, nor the stop. (A missed one is a deadlock, which shuttle reports.)
#[test]
fn no_wake_up_is_lost() {
    check(|| {
        let map = map(128);
        let stop = Arc::new(AtomicBool::new(false));
        let copied = Arc::new(AtomicU64::new(0));
        let copier = || {
            let (map, stop, copied) = (Arc::clone(&map), Arc::clone(&stop), Arc::clone(&copied));
            thread::spawn(move || {
                while map.wait_for_work(None, || stop.load(SeqCst)) == Wake::Work {
                    if let Some(claim) = map.claim(Granule(0), 1) {
                        claim.finish();
                        if copied.fetch_add(1, SeqCst) == 1 {
                            stop.store(true, SeqCst);
                            map.wake_all();
                        }
                    }
                }
            })
        };
        let copiers = [copier(), copier()];
        let holder = {
            let map = Arc::clone(&map);
            thread::spawn(move || drop(map.hold(granules(70, 1), None).unwrap()))
        };
        map.mark(granules(1, 1));
        copiers.into_iter().for_each(|copier| copier.join().unwrap());
        holder.join().unwrap();
    });
}

/// The same with one copier and one event, which nothing else makes up for.
#[test]
fn one_mark_or_one_stop_wakes_the_only_sleeper() {
    check(|| {
        let map = map(128);
        let stop = Arc::new(AtomicBool::new(false));
        let copier = {
            let (map, stop) = (Arc::clone(&map), Arc::clone(&stop));
            thread::spawn(move || {
                assert_eq!(map.wait_for_work(None, || false), Wake::Work);
                claim_all(&map);
                assert_eq!(map.wait_for_work(None, || stop.load(SeqCst)), Wake::Stopped);
            })
        };
        map.mark(granules(1, 1));
        while map.is_dirty(Granule(1)) {
            thread::yield_now();
        }
        stop.store(true, SeqCst);
        map.wake_all();
        copier.join().unwrap();
    });
}

/// Background and synchronous writers against copiers, some of which fail: once the map is in sync, both images are the same.
#[test]
fn both_images_agree_once_in_sync() {
    check(|| {
        let map = map(3);
        let image = || Arc::new([const { AtomicU64::new(0) }; 3]);
        let (source, target) = (image(), image());
        fn copy(source: &[AtomicU64; 3], target: &[AtomicU64; 3], granules: Range<u64>) {
            for granule in granules {
                target[granule as usize].store(source[granule as usize].load(SeqCst), SeqCst);
            }
        }
        let mut threads = Vec::new();
        for version in 1..3 {
            let (map, source, target) = (Arc::clone(&map), Arc::clone(&source), Arc::clone(&target));
            threads.push(thread::spawn(move || {
                let hold = map.hold(granules(0, 2), None).unwrap();
                hold.clear_covered();
                for granule in 0..2 {
                    source[granule].store(version, SeqCst);
                }
                target[0].store(version, SeqCst);
                if version == 1 {
                    target[1].store(version, SeqCst);
                    hold.finish();
                }
            }));
        }
        {
            let (map, source) = (Arc::clone(&map), Arc::clone(&source));
            threads.push(thread::spawn(move || {
                for version in 10..12 {
                    source[2].store(version, SeqCst);
                    map.mark(granules(2, 1));
                }
            }));
        }
        for copier in 0..2 {
            let (map, source, target) = (Arc::clone(&map), Arc::clone(&source), Arc::clone(&target));
            threads.push(thread::spawn(move || {
                for turn in 0..2 {
                    let Some(mut claim) = map.claim(Granule(copier), 1) else { continue };
                    claim.extend(3 * GRANULE);
                    copy(&source, &target, claim.granules());
                    if turn + copier > 0 {
                        claim.finish();
                    }
                }
            }));
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        while let Some(claim) = map.claim(Granule(0), 1) {
            copy(&source, &target, claim.granules());
            claim.finish();
        }
        assert!(map.is_in_sync() && map.bits.is_consistent());
        for (source, target) in source.iter().zip(&*target) {
            assert_eq!(source.load(SeqCst), target.load(SeqCst));
        }
    });
}

/// A disk of two granules with four blocks each, and its copy: what a marker has written is on the copy once everything was claimed.
#[test]
fn no_written_block_is_left_out() {
    const BLOCKS: u64 = 8;
    const BLOCK: u64 = GRANULE / 4;
    let disk = || -> Arc<Vec<AtomicU64>> { Arc::new((0..BLOCKS).map(|_| AtomicU64::new(0)).collect()) };
    shuttle::check_random(
        move || {
            let map = DirtyMap::with_blocks(2 * GRANULE, Granularity::new(GRANULE).unwrap(), BLOCK);
            let (source, target) = (disk(), disk());
            let copy = |map: &Arc<DirtyMap>, source: &[AtomicU64], target: &[AtomicU64]| {
                let Some(mut claim) = map.claim(Granule(0), 2) else { return false };
                for part in claim.parts(0) {
                    for block in part.start() / BLOCK..part.end() / BLOCK {
                        target[block as usize].store(source[block as usize].load(SeqCst), SeqCst);
                    }
                }
                claim.finish();
                true
            };
            // Of both it is known what differs: nothing.
            map.mark(ByteRange::new(0, 1));
            map.mark(ByteRange::new(GRANULE, 1));
            while copy(&map, &source, &target) {}
            // Parts of the first granule; all of it; a part with the whole of the next.
            let writers: Vec<_> = [1..2, 3..4, 0..4, 2..8]
                .into_iter()
                .zip(1..)
                .map(|(blocks, value): (Range<u64>, u64)| {
                    let (map, source) = (Arc::clone(&map), Arc::clone(&source));
                    thread::spawn(move || {
                        for block in blocks.clone() {
                            source[block as usize].store(value, SeqCst);
                        }
                        map.mark(ByteRange::from_bounds(blocks.start * BLOCK, blocks.end * BLOCK));
                    })
                })
                .collect();
            let copier = {
                let (map, source, target) = (Arc::clone(&map), Arc::clone(&source), Arc::clone(&target));
                thread::spawn(move || {
                    for _ in 0..12 {
                        copy(&map, &source, &target);
                    }
                })
            };
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            copier.join().unwrap();
            while copy(&map, &source, &target) {}
            for (block, (source, target)) in source.iter().zip(&*target).enumerate() {
                assert_eq!(source.load(SeqCst), target.load(SeqCst), "block {block}");
            }
        },
        4 * SCHEDULES,
    );
}
