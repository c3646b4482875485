//! How many threads serve a mount: a few, and more when all of them sleep in requests to a disk while others wait for a thread.
//!
//! Threads that are busy computing are no reason: more of them would only take the processors from each other. So every few requests
//! one is looked at more closely: was every thread busy when it began, and did this one sleep while it was carried out? Threads that
//! were added stay; idle ones cost their buffer.

use nix::sys::resource::{UsageWho, getrusage};

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use parking_lot::{Condvar, Mutex};

use crate::fuse::flights::{Flights, THREADS_MAX};

/// One request of so many is looked at, on each thread.
const EVERY: u32 = 16;
/// So many looks make a judgement, and so many of them must say the same.
const LOOKS: u32 = 32;
const ENOUGH: u32 = 24;

/// See the module.
#[derive(Debug)]
pub(super) struct Crew {
    threads: AtomicUsize,
    looks: Mutex<Looks>,
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Looks {
    all: u32,
    short: u32,
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
}

thread_local!(static REQUESTS: Cell<u32> = const { Cell::new(0) });

/// How often this thread has gone to sleep so far.
fn sleeps() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

impl Crew {
    pub(super) fn new(threads: usize) -> Self {
        Crew {
            threads: AtomicUsize::new(threads),
            looks: Mutex::default(),
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
        Some(Look { all_busy, slept_before: if all_busy { sleeps() } else { 0 } })
    }

    /// After it was.
    pub(super) fn judge(&self, look: &Look) {
        let is_short = look.all_busy && sleeps() > look.slept_before;
        let Some(mut looks) = self.looks.try_lock() else { return };
        looks.all += 1;
        looks.short += u32::from(is_short);
        if looks.all < LOOKS {
            return;
        }
        let short = std::mem::take(&mut *looks).short;
        drop(looks);
        if short < ENOUGH {
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
    use std::time::Duration;

    use super::*;

    /// Runs `requests` requests on one thread of a crew of one, so that every thread is busy.
    fn after(requests: u32, work: impl Fn()) -> usize {
        let crew = Crew::new(1);
        let flights = Flights::open(None, false).unwrap();
        for _ in 0..requests {
            let look = crew.look(&flights);
            work();
            if let Some(look) = look {
                crew.judge(&look);
            }
        }
        let more = crew.wanted.lock().more;
        more
    }

    #[test]
    fn more_are_wanted_when_all_sleep_and_none_when_they_compute() {
        let wait = || std::thread::sleep(Duration::from_micros(50));
        assert_eq!(after(EVERY * LOOKS, wait), 1, "twice as many");
        assert_eq!(after(EVERY * (LOOKS - 1), wait), 0, "too early to say");
        let compute = || drop(std::hint::black_box(vec![1_u8; 4096]));
        assert_eq!(after(EVERY * LOOKS * 4, compute), 0);
    }

    #[test]
    fn demands_are_answered_once_and_end_at_the_most_there_may_be() {
        let crew = Crew::new(THREADS_MAX / 2 + 1);
        let demand = || {
            for _ in 0..LOOKS {
                crew.judge(&Look { all_busy: true, slept_before: -1 });
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
