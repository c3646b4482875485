//! The seeds that are played.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use super::host::replace_host;
use super::schedule::{Outcome, Seeds, outcome};
use super::story;

/// Played in the quick set.
const SEEDS: u64 = 400;
const SEEDS_LONG: u64 = 10_000;

type Counts = BTreeMap<&'static str, u64>;

thread_local!(static PLAYED: Cell<(u64, Option<Outcome>)> = const { Cell::new((0, None)) });

/// Plays the seeds one after the other; returns what came of the last, and how often each thing happened.
fn play(seeds: impl Iterator<Item = u64> + 'static, tells: bool) -> (Option<Outcome>, Counts) {
    let mut config = shuttle::Config::new();
    config.stack_size = 256 << 10;
    config.failure_persistence = shuttle::FailurePersistence::None;
    config.max_steps = shuttle::MaxSteps::None;
    config.silence_warnings = true;
    let counts: Rc<RefCell<Counts>> = Rc::default();
    let all = counts.clone();
    let check = move || {
        let (seed, played) = PLAYED.get();
        if seed > 0 && played.is_none() {
            let outcome = outcome();
            PLAYED.set((seed, Some(outcome)));
            assert!(outcome.finished, "it does not end");
            let host = replace_host(None);
            host.into_iter()
                .flat_map(|host| host.counts)
                .for_each(|(what, count)| *all.borrow_mut().entry(what).or_default() += count);
        }
    };
    let last = check.clone();
    let seeds = seeds.inspect(move |seed| {
        check();
        PLAYED.set((*seed, None));
    });
    let runner = shuttle::Runner::new(Seeds(seeds), config);
    PLAYED.set((0, None));
    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runner.run(move || story::play(PLAYED.get().0, tells));
        last();
    }));
    if let Err(panic) = played {
        eprintln!(
            "seed {} has failed; LIVEMIRROR_SEED={} plays it again and tells what happens",
            PLAYED.get().0,
            PLAYED.get().0
        );
        std::panic::resume_unwind(panic);
    }
    (PLAYED.get().1, counts.take())
}

/// Plays the seeds from 1 on, some at a time: all that a seed has belongs to one thread.
fn play_all(seeds: u64) -> Counts {
    let threads = std::thread::available_parallelism().map_or(2, |cores| cores.get().min(8));
    let mut counts = Counts::new();
    std::thread::scope(|scope| {
        let play = |first: usize| move || play((1..=seeds).skip(first).step_by(threads), false).1;
        let players: Vec<_> = (0..threads).map(|first| scope.spawn(play(first))).collect();
        for player in players {
            match player.join() {
                Ok(played) => played.into_iter().for_each(|(what, count)| *counts.entry(what).or_default() += count),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    counts
}

/// Rules 1, 2, 5, 7, 10, 11, 14 and 15, see the module `checks`.
#[test]
fn the_rules_hold_whatever_fails() {
    if let Some(seed) = std::env::var("LIVEMIRROR_SEED").ok().and_then(|seed| seed.parse().ok()) {
        let (outcome, counts) = play(std::iter::once(seed), true);
        eprintln!("seed {seed}: {outcome:?} {counts:?}");
        return;
    }
    let long = std::env::var("LIVEMIRROR_LONG").is_ok_and(|long| !long.is_empty());
    let seeds = if long { SEEDS_LONG } else { SEEDS };
    let started = std::time::Instant::now();
    let counts = play_all(seeds);
    eprintln!("{seeds} seeds in {:?}: {counts:?}", started.elapsed());
    // A simulation in which nothing happens shows nothing.
    for what in [
        "mirror",
        "cutover",
        "kill",
        "kill of both",
        "power cut",
        "stop",
        "landed late",
        "failed flush",
        "lost connection",
        "foreign change noticed",
        "undecided rename",
        "undecided cutover",
        "refused as superseded",
        "flush of both",
        "instants checked",
    ] {
        assert!(counts.get(what).is_some_and(|count| *count >= 5), "{what}: {counts:?}");
    }
}

/// The same seed is the same story, step by step: else no failure could be looked at.
#[test]
fn a_seed_is_played_the_same_way_again() {
    for seed in [1, 2, 3, 20, 300] {
        let once = play(std::iter::once(seed), false).0;
        let again = play(std::iter::once(seed), false).0;
        assert!(once.is_some() && once == again, "seed {seed}: {once:?} {again:?}");
    }
    let (one, other) = (play(std::iter::once(1), false).0, play(std::iter::once(2), false).0);
    assert_ne!(one.map(|one| one.trace), other.map(|other| other.trace));
}
