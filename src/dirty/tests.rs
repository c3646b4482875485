//! The dirty map against a plain set, and under real threads.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::range::{ByteRange, Granularity, Granule};
use crate::sync::Arc;

const GRANULE: u64 = 512;

fn map(size_bytes: u64) -> Arc<DirtyMap> {
    DirtyMap::new(size_bytes, Granularity::new(GRANULE).unwrap())
}

fn granules(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * GRANULE, count * GRANULE)
}

#[derive(Clone, Debug)]
enum Step {
    Mark(ByteRange),
    Claim { from: u64, limit: u32 },
    Extend { which: usize, up_to: u64 },
    Truncate { which: usize, byte: u64 },
    EndClaim { which: usize, finish: bool },
    Hold(ByteRange),
    ClearCovered { which: usize },
    EndHold { which: usize, finish: bool },
}

/// Sizes around the borders of words and leaves, odd ones included.
fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        1..3000_u64,
        Just(64 * GRANULE),
        30_000..40_000_u64,
        Just(bits::LEAF_BITS * GRANULE),
        Just(bits::LEAF_BITS * GRANULE * 3 + 17),
    ]
}

fn ranges(size: u64) -> impl Strategy<Value = ByteRange> {
    let near = size + 2 * GRANULE;
    prop_oneof![
        4 => (0..near, 0..20 * GRANULE).prop_map(|(start, len)| ByteRange::new(start, len)),
        1 => (0..near, 0..near).prop_map(|(start, len)| ByteRange::new(start, len)),
        1 => (0..=near / GRANULE, 0..=near / GRANULE).prop_map(|(start, count)| granules(start, count)),
    ]
}

fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let near = size + 2 * GRANULE;
    let step = prop_oneof![
        6 => ranges(size).prop_map(Step::Mark),
        4 => (0..=near / GRANULE, 0..100_u32).prop_map(|(from, limit)| Step::Claim { from, limit }),
        2 => (any::<usize>(), 0..near).prop_map(|(which, up_to)| Step::Extend { which, up_to }),
        1 => (any::<usize>(), 0..near).prop_map(|(which, byte)| Step::Truncate { which, byte }),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(which, finish)| Step::EndClaim { which, finish }),
        2 => ranges(size).prop_map(Step::Hold),
        1 => any::<usize>().prop_map(|which| Step::ClearCovered { which }),
        2 => (any::<usize>(), any::<bool>()).prop_map(|(which, finish)| Step::EndHold { which, finish }),
    ];
    prop::collection::vec(step, 1..60)
}

/// The reference: a plain set of dirty granules beside what is claimed and held.
struct Model {
    size: u64,
    dirty: BTreeSet<u64>,
    claims: Vec<(Claim, Range<u64>)>,
    holds: Vec<(Hold, ByteRange)>,
}

impl Model {
    fn touched(&self, range: ByteRange) -> Range<u64> {
        let range = range.intersect(ByteRange::new(0, self.size));
        if range.is_empty() { 0..0 } else { range.start() / GRANULE..range.end().div_ceil(GRANULE) }
    }

    fn claimable(&self, granule: u64) -> bool {
        self.dirty.contains(&granule)
            && !self.claims.iter().any(|(_, claimed)| claimed.contains(&granule))
            && !self.holds.iter().any(|(_, held)| self.touched(*held).contains(&granule))
    }

    fn run(&self, start: u64, end: u64) -> Range<u64> {
        start..(start..end).find(|&granule| !self.claimable(granule)).unwrap_or(end)
    }

    fn apply(&mut self, map: &Arc<DirtyMap>, step: Step) {
        let count = self.size.div_ceil(GRANULE);
        match step {
            Step::Mark(range) => {
                let before = self.dirty.len();
                self.dirty.extend(self.touched(range));
                assert_eq!(map.mark(range), self.dirty.len() > before);
            }
            Step::Claim { from, limit } => {
                let after = self.dirty.range(from..).copied().find(|&g| self.claimable(g));
                let start = after.or_else(|| self.dirty.iter().copied().find(|&g| self.claimable(g)));
                let expected =
                    start.filter(|_| limit > 0).map(|start| self.run(start, count.min(start + u64::from(limit))));
                let claim = map.claim(Granule(from), limit);
                assert_eq!(claim.as_ref().map(Claim::granules), expected);
                if let (Some(claim), Some(run)) = (claim, expected) {
                    self.dirty.retain(|granule| !run.contains(granule));
                    let end = (run.end * GRANULE).min(self.size);
                    assert_eq!(claim.range(), ByteRange::from_bounds(run.start * GRANULE, end));
                    self.claims.push((claim, run));
                }
            }
            Step::Extend { which, up_to } if !self.claims.is_empty() => {
                let which = which % self.claims.len();
                let old = self.claims[which].1.clone();
                let wanted = if up_to >= self.size { count } else { up_to / GRANULE };
                let run =
                    if old.is_empty() || wanted <= old.end { old.end..old.end } else { self.run(old.end, wanted) };
                self.claims[which].0.extend(up_to);
                assert_eq!(self.claims[which].0.granules(), old.start..run.end);
                self.dirty.retain(|granule| !run.contains(granule));
                self.claims[which].1 = old.start..run.end;
            }
            Step::Truncate { which, byte } if !self.claims.is_empty() => {
                let which = which % self.claims.len();
                let old = self.claims[which].1.clone();
                let keep = byte.div_ceil(GRANULE).clamp(old.start, old.end);
                self.claims[which].0.truncate(byte);
                self.dirty.extend(keep..old.end);
                self.claims[which].1 = old.start..keep;
            }
            Step::EndClaim { which, finish } if !self.claims.is_empty() => {
                let (claim, run) = self.claims.swap_remove(which % self.claims.len());
                if finish {
                    claim.finish();
                } else {
                    drop(claim);
                    self.dirty.extend(run);
                }
            }
            Step::Hold(range) => {
                let range = range.intersect(ByteRange::new(0, self.size));
                let touched = self.touched(range);
                let free = !self.claims.iter().any(|(_, run)| touched.clone().any(|g| run.contains(&g)))
                    && !self.holds.iter().any(|(_, held)| held.overlaps(range));
                let hold = map.try_hold(range);
                assert_eq!(hold.is_some(), free || range.is_empty());
                self.holds.extend(hold.map(|hold| (hold, range)));
            }
            Step::ClearCovered { which } if !self.holds.is_empty() => {
                let (hold, range) = &self.holds[which % self.holds.len()];
                let covers = |g: u64| {
                    range.start() <= g * GRANULE
                        && (g * GRANULE + GRANULE).min(self.size) <= range.end()
                        && !range.is_empty()
                };
                let before = self.dirty.len() as u64;
                self.dirty.retain(|&granule| !covers(granule));
                assert_eq!(hold.clear_covered(), before - self.dirty.len() as u64);
            }
            Step::EndHold { which, finish } if !self.holds.is_empty() => {
                let (hold, range) = self.holds.swap_remove(which % self.holds.len());
                if finish {
                    hold.finish();
                } else {
                    drop(hold);
                    self.dirty.extend(self.touched(range));
                }
            }
            _ => {}
        }
    }

    fn check(&self, map: &Arc<DirtyMap>, probe: ByteRange) {
        let bytes = |g: u64| (g * GRANULE + GRANULE).min(self.size) - g * GRANULE;
        assert!(map.bits.is_consistent());
        assert_eq!(map.dirty_granules(), self.dirty.len() as u64);
        assert_eq!(map.dirty_bytes(), self.dirty.iter().map(|&g| bytes(g)).sum::<u64>());
        let claimed: u64 = self.claims.iter().flat_map(|(_, run)| run.clone()).map(bytes).sum();
        let held: u64 = self.holds.iter().map(|(_, range)| range.len()).sum();
        assert_eq!(map.in_flight_bytes(), claimed + held);
        assert_eq!(map.is_idle(), claimed + held == 0);
        assert_eq!(map.is_in_sync(), claimed + held == 0 && self.dirty.is_empty());
        let from = probe.start() / GRANULE;
        assert_eq!(map.next_dirty(Granule(from)), self.dirty.range(from..).next().copied().map(Granule));
        assert_eq!(map.is_dirty(Granule(from)), self.dirty.contains(&from));
        assert_eq!(map.any_dirty(probe), self.touched(probe).any(|g| self.dirty.contains(&g)));
        let busy = |g: u64| {
            self.claims.iter().any(|(_, run)| run.contains(&g))
                || self.holds.iter().any(|(_, held)| self.touched(*held).contains(&g))
        };
        assert_eq!(map.is_quiet(probe), !self.touched(probe).any(|g| self.dirty.contains(&g) || busy(g)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_plain_set((size, steps, probe) in sizes().prop_flat_map(|s| (Just(s), steps(s), ranges(s)))) {
        let map = map(size);
        let mut model = Model { size, dirty: BTreeSet::new(), claims: Vec::new(), holds: Vec::new() };
        for step in steps {
            model.apply(&map, step);
            model.check(&map, probe);
        }
    }
}

#[test]
fn a_large_claim_extends_over_leaves_and_stops_at_the_first_clean_granule() {
    let map = DirtyMap::new(16 << 40, Granularity::DEFAULT);
    map.mark(ByteRange::new(0, 8 << 40));
    let mut claim = map.claim(Granule(0), 256).unwrap();
    claim.extend(u64::MAX);
    assert_eq!(claim.range(), ByteRange::new(0, 8 << 40));
    assert_eq!(map.dirty_bytes(), 0);
    assert_eq!(map.in_flight_bytes(), 8 << 40);
    claim.truncate(1 << 30);
    assert_eq!(map.dirty_bytes(), (8 << 40) - (1 << 30));
    drop(claim);
    assert_eq!(map.dirty_bytes(), 8 << 40);
    assert!(map.is_idle() && map.bits.is_consistent());
}

#[test]
fn an_extension_leaves_out_a_granule_that_lies_partly_past_it() {
    let map = map(10 * GRANULE + 5);
    map.mark(granules(0, 11));
    let mut claim = map.claim(Granule(0), 1).unwrap();
    assert_eq!(claim.extend(3 * GRANULE + 1), granules(1, 2));
    assert_eq!(claim.extend(10 * GRANULE + 5), ByteRange::from_bounds(3 * GRANULE, 10 * GRANULE + 5));
}

#[test]
fn claims_wrap_around_and_pass_over_what_is_held_or_waited_for() {
    let map = map(100 * GRANULE);
    map.mark(granules(10, 4));
    let hold = map.hold(ByteRange::new(11 * GRANULE + 7, 1), None).unwrap();
    assert_eq!(map.claim(Granule(50), 10).unwrap().granules(), 10..11);
    let waiter = {
        let map = Arc::clone(&map);
        thread::spawn(move || map.hold(granules(11, 2), None).unwrap().finish())
    };
    while !map.busy.lock().has_waiters() {
        thread::yield_now();
    }
    assert_eq!(map.claim(Granule(11), 10).unwrap().granules(), 13..14);
    hold.finish();
    waiter.join().unwrap();
    assert_eq!(map.claim(Granule(11), 10).unwrap().granules(), 11..14);
}

#[test]
fn a_granule_in_a_claim_is_not_claimed_again_however_often_it_is_marked() {
    let map = map(100 * GRANULE);
    map.mark(granules(10, 2));
    let claim = map.claim(Granule(10), 1).unwrap();
    map.mark(granules(10, 1));
    assert_eq!(map.claim(Granule(10), 1).unwrap().granules(), 11..12);
    claim.finish();
    assert_eq!(map.claim(Granule(10), 1).unwrap().granules(), 10..11);
}

#[test]
fn what_is_dirty_claimed_or_held_is_not_quiet() {
    let map = map(100 * GRANULE);
    let probe = ByteRange::from_bounds(10 * GRANULE + 1, 12 * GRANULE - 1);
    let quiet = || (map.is_quiet(granules(0, 10)), map.is_quiet(probe), map.is_quiet(granules(12, u64::MAX / GRANULE)));
    map.mark(granules(11, 1));
    assert_eq!(quiet(), (true, false, true), "dirty");
    let claim = map.claim(Granule(0), 1).unwrap();
    assert_eq!(quiet(), (true, false, true), "claimed");
    drop(claim);
    assert_eq!(quiet(), (true, false, true), "given back");
    map.claim(Granule(0), 1).unwrap().finish();
    assert_eq!(quiet(), (true, true, true));
    let hold = map.try_hold(ByteRange::new(10 * GRANULE, 1)).unwrap();
    assert_eq!(quiet(), (true, false, true), "a hold of other bytes of the same granule");
    hold.finish();
    assert_eq!(quiet(), (true, true, true));
}

#[test]
fn holds_of_different_bytes_of_one_granule_do_not_wait_for_each_other() {
    let map = map(100 * GRANULE);
    let first = map.try_hold(ByteRange::new(0, 256)).unwrap();
    let second = map.try_hold(ByteRange::new(256, 256)).unwrap();
    assert!(map.try_hold(ByteRange::new(255, 2)).is_none());
    first.finish();
    second.finish();
    assert!(map.is_in_sync());
}

#[test]
fn a_hold_gives_up_at_its_deadline_and_those_behind_it_go_on() {
    let map = map(100 * GRANULE);
    map.mark(granules(0, 1));
    let claim = map.claim(Granule(0), 1).unwrap();
    let started = Instant::now();
    let behind = {
        let map = Arc::clone(&map);
        let soon = Instant::now() + Duration::from_millis(60);
        let front = thread::spawn({
            let map = Arc::clone(&map);
            move || map.hold(granules(0, 4), Some(soon)).is_none()
        });
        while !map.busy.lock().has_waiters() {
            thread::yield_now();
        }
        assert!(map.hold(granules(2, 2), Some(soon + Duration::from_secs(60))).is_some());
        front.join().unwrap()
    };
    assert!(behind, "the claim blocks the one in front until its deadline");
    assert!(started.elapsed() >= Duration::from_millis(50) && started.elapsed() < Duration::from_secs(30));
    drop(claim);
}

#[test]
fn sleepers_wake_for_marks_stops_and_deadlines() {
    let map = map(100 * GRANULE);
    let stop = AtomicBool::new(false);
    let soon = Instant::now() + Duration::from_millis(5);
    assert_eq!(map.wait_for_work(Some(soon), || false), Wake::TimedOut);
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| map.wait_for_work(None, || false));
        thread::sleep(Duration::from_millis(5));
        map.mark(granules(3, 1));
        assert_eq!(sleeper.join().unwrap(), Wake::Work);
        let claim = map.claim(Granule(0), 1).unwrap();
        let sleeper = scope.spawn(|| map.wait_for_work(None, || false));
        thread::sleep(Duration::from_millis(5));
        map.mark(granules(3, 1));
        assert!(!sleeper.is_finished(), "what is claimed cannot be claimed again");
        claim.finish();
        assert_eq!(sleeper.join().unwrap(), Wake::Work);
        map.claim(Granule(0), 1).unwrap().finish();
        let sleeper = scope.spawn(|| map.wait_for_work(None, || stop.load(SeqCst)));
        thread::sleep(Duration::from_millis(5));
        stop.store(true, SeqCst);
        map.wake_all();
        assert_eq!(sleeper.join().unwrap(), Wake::Stopped);
    });
}

/// Guests, synchronous guests and copiers on a small disk: each granule has a version on either image, and at the end they agree.
#[test]
fn both_images_agree_after_a_storm() {
    const COUNT: u64 = 200;
    let map = map(COUNT * GRANULE);
    let image = || (0..COUNT).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let (source, target) = (image(), image());
    let done = AtomicBool::new(false);
    let copy = |granules: Range<u64>| {
        for granule in granules {
            let at = usize::try_from(granule).unwrap();
            target[at].store(source[at].load(SeqCst), SeqCst);
        }
    };
    thread::scope(|scope| {
        let copiers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut from = Granule(0);
                    let mut turn = 0;
                    while map.wait_for_work(None, || done.load(SeqCst)) == Wake::Work {
                        let Some(mut claim) = map.claim(from, 7) else { continue };
                        claim.extend(claim.range().end() + 3 * GRANULE);
                        turn += 1;
                        from = claim.next();
                        copy(claim.granules());
                        if turn % 5 > 0 {
                            claim.finish();
                        }
                    }
                })
            })
            .collect();
        let guests: Vec<_> = (0..3_u64)
            .map(|guest| {
                let (map, source, target) = (&map, &source, &target);
                scope.spawn(move || {
                    for number in 0..20_000_u64 {
                        let at = (number * 7919 + guest * 31) % COUNT;
                        let slot = usize::try_from(at).unwrap();
                        let version = number * 3 + guest + 1;
                        if guest > 0 {
                            let hold = map.hold(granules(at, 1), None).unwrap();
                            hold.clear_covered();
                            source[slot].store(version, SeqCst);
                            if number % 11 > 0 {
                                target[slot].store(version, SeqCst);
                                hold.finish();
                            }
                        } else {
                            source[slot].store(version, SeqCst);
                            map.mark(granules(at, 1));
                        }
                    }
                })
            })
            .collect();
        guests.into_iter().for_each(|guest| guest.join().unwrap());
        done.store(true, SeqCst);
        map.wake_all();
        copiers.into_iter().for_each(|copier| copier.join().unwrap());
    });
    assert!(map.is_idle() && map.bits.is_consistent());
    while let Some(claim) = map.claim(Granule(0), 1000) {
        copy(claim.granules());
        claim.finish();
    }
    assert!(map.is_in_sync());
    assert!(source.iter().zip(&target).all(|(source, target)| source.load(SeqCst) == target.load(SeqCst)));
}
