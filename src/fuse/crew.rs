//! How many threads serve a mount: a few, and more when all of them sleep in requests to a disk while others wait for a thread.
//!
//! Threads that are busy computing are no reason: more of them would only take the processors from each other. So every few requests
//! one is looked at more closely: was every thread busy when it began, and did this one sleep while it was carried out? If most say so
//! and this process has not had half of the processors meanwhile (threads that wait for each other sleep too), there are to be more.
//! Writes that go to both images of a mirror are no reason either: what they wait for is the target, which has threads of its own.
//! Threads that were added stay; idle ones cost their buffer.

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::fuse::flights::{Flights, THREADS_MAX};
use crate::volume::tracking::taken_to_both;

/// One request of so many is looked at, on each thread.
const EVERY: u32 = 16;
/// So many looks make a judgement, and so many of them must say the same.
const LOOKS: u32 = 32;
const ENOUGH: u32 = 24;

/// See the module.
#[derive(Debug)]
pub(super) struct Crew {
    threads: AtomicUsize,
    /// Processor time that this process has used so far.
    used: fn() -> Duration,
    looks: Mutex<Looks>,
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug)]
struct Looks {
    all: u32,
    short: u32,
    since: Instant,
    used: Duration,
}

#[derive(Debug, Default)]
struct Wanted {
    more: usize,
    closed: bool,
}

/// A request that is looked at.
pub(super) struct Look {
    all_busy: bool,
    slept_before: i64,
    to_both_before: u64,
}

thread_local!(static REQUESTS: Cell<u32> = const { Cell::new(0) });

fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX))
}

/// How often this thread has gone to sleep so far.
fn sleeps() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

impl Crew {
    pub(super) fn new(threads: usize) -> Self {
        Self::with_clock(threads, processor_time)
    }

    fn with_clock(threads: usize, used: fn() -> Duration) -> Self {
        Crew {
            threads: AtomicUsize::new(threads),
            used,
            looks: Mutex::new(Looks { all: 0, short: 0, since: Instant::now(), used: used() }),
            wanted: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Before a request is carried out. `None`: this one is not looked at.
    pub(super) fn look(&self, flights: &Flights) -> Option<Look> {
        let turn = REQUESTS.with(|requests| requests.replace(requests.get().wrapping_add(1)) % EVERY == 0);
        if !turn || self.threads.load(Relaxed) >= THREADS_MAX {
            return None;
        }
        // This one is not under way yet.
        let all_busy = flights.under_way() + 1 >= self.threads.load(Relaxed);
        Some(Look { all_busy, slept_before: if all_busy { sleeps() } else { 0 }, to_both_before: taken_to_both() })
    }

    /// After it was.
    pub(super) fn judge(&self, look: &Look) {
        let is_short = look.all_busy && taken_to_both() == look.to_both_before && sleeps() > look.slept_before;
        let Some(mut looks) = self.looks.try_lock() else { return };
        looks.all += 1;
        looks.short += u32::from(is_short);
        if looks.all < LOOKS {
            return;
        }
        let next = Looks { all: 0, short: 0, since: Instant::now(), used: (self.used)() };
        let last = std::mem::replace(&mut *looks, next);
        let (passed, used) = (looks.since - last.since, looks.used.saturating_sub(last.used));
        drop(looks);
        if last.short < ENOUGH || used * 2 > passed * processors() {
            return;
        }
        let now = self.threads.load(Relaxed);
        let mut wanted = self.wanted.lock();
        if wanted.more == 0 && now < THREADS_MAX {
            wanted.more = now.min(THREADS_MAX - now);
            self.changed.notify_one();
        }
    }

    /// Waits until more threads are wanted. `None`: none ever will be.
    pub(super) fn wait_for_demand(&self) -> Option<usize> {
        let mut wanted = self.wanted.lock();
        while wanted.more == 0 && !wanted.closed {
            self.changed.wait(&mut wanted);
        }
        (!wanted.closed).then_some(wanted.more)
    }

    /// What was wanted is there, or cannot be had (`hired` is 0): then it is not asked for again.
    pub(super) fn answer_demand(&self, hired: usize) {
        let mut wanted = self.wanted.lock();
        wanted.more = 0;
        match hired {
            0 => self.threads.store(THREADS_MAX, Relaxed),
            more => drop(self.threads.fetch_add(more, Relaxed)),
        }
    }

    /// The connection has ended.
    pub(super) fn close(&self) {
        self.wanted.lock().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests use the processors too.
    fn idle() -> Duration {
        Duration::ZERO
    }

    /// All of them, all the time.
    fn busy() -> Duration {
        static BEGAN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        BEGAN.get_or_init(Instant::now).elapsed() * processors()
    }

    /// Runs `requests` requests on one thread of a crew of one, so that every thread is busy.
    fn after(requests: u32, used: fn() -> Duration, work: impl Fn()) -> usize {
        let crew = Crew::with_clock(1, used);
        let flights = Flights::open(None, false).unwrap();
        for _ in 0..requests {
            let look = crew.look(&flights);
            work();
            if let Some(look) = look {
                crew.judge(&look);
            }
        }
        crew.wanted.into_inner().more
    }

    #[test]
    fn more_are_wanted_when_all_sleep_and_none_when_they_compute() {
        let wait = || std::thread::sleep(Duration::from_micros(50));
        assert_eq!(after(EVERY * LOOKS, idle, wait), 1, "twice as many");
        assert_eq!(after(EVERY * LOOKS, busy, wait), 0, "they sleep, and there is no processor for more");
        assert_eq!(after(EVERY * (LOOKS - 1), idle, wait), 0, "too early to say");
        let compute = || drop(std::hint::black_box(vec![1_u8; 4096]));
        assert_eq!(after(EVERY * LOOKS * 4, idle, compute), 0);
    }

    #[test]
    fn demands_are_answered_once_and_end_at_the_most_there_may_be() {
        let crew = Crew::with_clock(THREADS_MAX / 2 + 1, idle);
        let demand = || {
            for _ in 0..LOOKS {
                crew.judge(&Look { all_busy: true, slept_before: -1, to_both_before: taken_to_both() });
            }
            crew.wanted.lock().more
        };
        assert_eq!(demand(), THREADS_MAX / 2 - 1);
        assert_eq!(crew.wait_for_demand(), Some(THREADS_MAX / 2 - 1));
        crew.answer_demand(THREADS_MAX / 2 - 1);
        assert_eq!(demand(), 0);
        assert!(crew.look(&Flights::open(None, false).unwrap()).is_none(), "nothing to look for any more");
        crew.close();
        assert_eq!(crew.wait_for_demand(), None);
    }
}
