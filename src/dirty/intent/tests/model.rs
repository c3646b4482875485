//! The log against a plain model, step by step, and under real threads in a world that checks every instant.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const COUNT: u32 = 70;

#[derive(Clone, Debug)]
enum Step {
    /// A whole background write.
    Write {
        first: u32,
        count: u32,
    },
    /// A write that stays in flight, and its end.
    Begin {
        first: u32,
        count: u32,
    },
    End {
        which: usize,
    },
    Copy,
    CopyAll,
    Wait {
        seconds: u32,
    },
    Pass {
        flush_fails: bool,
    },
    /// A write, begun and ended, in the middle of a pass's flush.
    PassWithWrite {
        region: u32,
    },
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let some = || (0..COUNT, prop_oneof![3 => Just(1_u32), 1 => 1..COUNT]);
    let step = prop_oneof![
        6 => some().prop_map(|(first, count)| Step::Write { first, count }),
        3 => some().prop_map(|(first, count)| Step::Begin { first, count }),
        3 => any::<usize>().prop_map(|which| Step::End { which }),
        3 => Just(Step::Copy),
        3 => Just(Step::CopyAll),
        4 => prop_oneof![0..4_u32, 25..40_u32].prop_map(|seconds| Step::Wait { seconds }),
        6 => prop::bool::weighted(0.2).prop_map(|flush_fails| Step::Pass { flush_fails }),
        2 => (0..COUNT).prop_map(|region| Step::PassWithWrite { region }),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..60)
}

#[derive(Default)]
struct Model {
    now: u32,
    marked: BTreeSet<u32>,
    in_flight: Vec<std::ops::Range<u32>>,
    written: BTreeMap<u32, u32>,
    dirty: BTreeSet<u32>,
}

impl Model {
    fn may_clear(&self, region: u32) -> bool {
        !self.dirty.contains(&region)
            && !self.in_flight.iter().any(|range| range.contains(&region))
            && self.written.get(&region).is_none_or(|&written| written + HOT_SECONDS < self.now)
    }

    fn write(&mut self, range: std::ops::Range<u32>) {
        self.marked.extend(range.clone());
        self.dirty.extend(range.clone());
        self.leave(range);
    }

    fn leave(&mut self, range: std::ops::Range<u32>) {
        self.written.extend(range.map(|region| (region, self.now)));
    }
}

fn bytes_of(range: &std::ops::Range<u32>) -> ByteRange {
    regions(range.start.into(), (range.end - range.start).into())
}

fn write(world: &World, log: &IntentLog, range: &std::ops::Range<u32>) {
    let passage = log.enter(bytes_of(range));
    range.clone().for_each(|region| world.write_source(region));
    range.clone().for_each(|region| world.mark_dirty(region));
    drop(passage);
}

/// Takes steps until the next restart. False: there are no more.
fn life(world: &Arc<World>, model: &mut Model, log: &Arc<IntentLog>, steps: &mut impl Iterator<Item = Step>) -> bool {
    let mut passages: Vec<Passage<'_>> = Vec::new();
    for step in steps {
        match step {
            Step::Write { first, count } => {
                let range = first..COUNT.min(first + count);
                write(world, log, &range);
                model.write(range);
            }
            Step::Begin { first, count } => {
                let range = first..COUNT.min(first + count);
                passages.push(log.enter(bytes_of(&range)));
                model.marked.extend(range.clone());
                model.in_flight.push(range);
            }
            Step::End { which } if !passages.is_empty() => {
                let which = which % passages.len();
                drop(passages.swap_remove(which));
                let range = model.in_flight.swap_remove(which);
                model.leave(range);
            }
            Step::Copy => assert_eq!(world.copy_one(), model.dirty.pop_first().is_some()),
            Step::CopyAll => {
                while world.copy_one() {}
                model.dirty.clear();
            }
            Step::Wait { seconds } => {
                model.now += seconds;
                world.seconds.store(model.now, SeqCst);
            }
            Step::Pass { flush_fails } => {
                world.faults.lock().unwrap().flush = flush_fails.then_some(libc::EIO);
                let (syncs, flushes) = (log.syncs(), world.flushes.load(SeqCst));
                let goes: BTreeSet<u32> =
                    model.marked.iter().copied().filter(|&region| model.may_clear(region)).collect();
                log.inner.pass(&**world);
                assert_eq!(world.flushes.load(SeqCst) - flushes, u64::from(!goes.is_empty()));
                assert_eq!(log.syncs() - syncs, u64::from(!goes.is_empty() && !flush_fails));
                if !flush_fails {
                    model.marked.retain(|region| !goes.contains(region));
                }
                world.faults.lock().unwrap().flush = None;
            }
            Step::PassWithWrite { region } => {
                let during = (Arc::downgrade(world), Arc::downgrade(log));
                *world.in_flush.lock().unwrap() = Some(Box::new(move || {
                    write(&during.0.upgrade().unwrap(), &during.1.upgrade().unwrap(), &(region..region + 1));
                }));
                let goes: BTreeSet<u32> =
                    model.marked.iter().copied().filter(|&region| model.may_clear(region)).collect();
                log.inner.pass(&**world);
                *world.in_flush.lock().unwrap() = None;
                if !goes.is_empty() {
                    model.marked.retain(|region| !goes.contains(region));
                    model.write(region..region + 1);
                }
            }
            Step::Restart => {
                // What was in flight may have reached the image: it is marked, and a new server knows of no more.
                drop(passages);
                model.in_flight.clear();
                model.written.clear();
                return true;
            }
            Step::End { .. } => {}
        }
        assert_eq!(marked(log), model.marked.iter().copied().map(u64::from).collect::<Vec<_>>());
        let durable = world.durable();
        let is_durable = |region: u32| durable[region as usize / 64] >> (region % 64) & 1 == 1;
        assert!((0..COUNT).all(|region| is_durable(region) == model.marked.contains(&region)));
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_plain_set(steps in steps()) {
        let world = World::new(COUNT as usize);
        let mut model = Model { now: 1, ..Model::default() };
        let mut steps = steps.into_iter();
        let mut log = Arc::new(world.log());
        while life(&world, &mut model, &log, &mut steps) {
            drop(log);
            let (next, found) = world.reopen(&world.log_in_the_page_cache(), Duration::from_secs(3600));
            prop_assert!(found.is_whole());
            log = Arc::new(next);
        }
    }
}

/// Guests, a copier and the retirer at once; the world checks at each change that a power cut would lose nothing.
#[test]
fn a_power_cut_at_any_instant_of_a_storm_loses_nothing() {
    let world = World::new(6);
    // Never: nothing is hot.
    world.seconds.store(0, SeqCst);
    let log = world.log();
    let guests = AtomicU64::new(3);
    std::thread::scope(|scope| {
        for guest in 0..3_u32 {
            let (log, world, guests) = (&log, &world, &guests);
            scope.spawn(move || {
                for number in 0..1500_u32 {
                    let first = (number * 7 + guest) % 6;
                    write(world, log, &(first..(first + 1 + number % 2).min(6)));
                    if number % 5 == 0 {
                        // The others catch up.
                        std::thread::sleep(Duration::from_micros(200));
                    }
                }
                guests.fetch_sub(1, SeqCst);
            });
        }
        scope.spawn(|| while world.copy_one() || guests.load(SeqCst) > 0 {});
        scope.spawn(|| {
            while guests.load(SeqCst) > 0 {
                log.inner.pass(&*world);
            }
        });
    });
    while world.copy_one() {}
    log.inner.pass(&*world);
    assert_eq!((log.marked_bytes(), log.is_broken()), (0, false));
    // How often depends on who got a processor when; that both happened does not.
    assert!(log.syncs() > 0 && world.flushes.load(SeqCst) > 0, "{} {}", log.syncs(), world.flushes.load(SeqCst));
}
