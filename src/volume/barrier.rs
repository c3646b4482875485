//! The barrier: the short moment in which guest writes wait.
//!
//! ```text
//! guest write:  enter -> change the image, mark -> leave
//! cutover:      raise (new ones wait, those inside are waited for) -> ... -> lower
//! ```
//!
//! Entering costs one atomic on a cache line that threads rarely share. What a passage must never do: wait for a thread that
//! waits for the barrier.

#[cfg(not(shuttle))]
use std::cell::Cell;

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use crate::sync::{Condvar, Instant, Mutex, wait_until};

const LANES: usize = 16;

/// A counter on a cache line of its own, so that writers on different processors do not disturb each other.
#[repr(align(128))]
#[derive(Debug, Default)]
struct Lane(AtomicU64);

/// See the module.
#[derive(Debug, Default)]
pub struct Barrier {
    lanes: [Lane; LANES],
    raised: AtomicBool,
    gate: Mutex<()>,
    changed: Condvar,
}

/// A guest request that may change the image. Dropping it leaves.
#[must_use]
#[derive(Debug)]
pub struct Passage<'a> {
    barrier: &'a Barrier,
    lane: usize,
}

/// The raised barrier. Dropping it lowers it.
#[must_use]
#[derive(Debug)]
pub struct Raised<'a> {
    barrier: &'a Barrier,
}

/// The lane of the calling thread, given out in turn.
#[cfg(not(shuttle))]
fn lane() -> usize {
    // Plain: it orders nothing.
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    thread_local!(static LANE: Cell<usize> = const { Cell::new(usize::MAX) });
    LANE.with(|lane| {
        if lane.get() == usize::MAX {
            lane.set(NEXT.fetch_add(1, SeqCst) % LANES);
        }
        lane.get()
    })
}

/// The lane of the calling task: the same one whenever a schedule is played.
#[cfg(shuttle)]
fn lane() -> usize {
    usize::from(shuttle::thread::current().id()) % LANES
}

impl Barrier {
    /// Lets a guest write pass; waits while the barrier is up.
    pub fn enter(&self) -> Passage<'_> {
        let lane = lane();
        loop {
            // Count first, look second: whoever raises looks at the counts after raising, so one of the two sees the other.
            self.lanes[lane].0.fetch_add(1, SeqCst);
            if !self.raised.load(SeqCst) {
                return Passage { barrier: self, lane };
            }
            self.leave(lane);
            let mut gate = self.gate.lock();
            while self.raised.load(SeqCst) {
                self.changed.wait(&mut gate);
            }
        }
    }

    fn leave(&self, lane: usize) {
        self.lanes[lane].0.fetch_sub(1, SeqCst);
        if self.raised.load(SeqCst) {
            let _gate = self.gate.lock();
            self.changed.notify_all();
        }
    }

    fn inside(&self) -> u64 {
        // A passage stays in the lane that it entered, so a sum of zeroes read after raising means that nobody is inside.
        self.lanes.iter().map(|lane| lane.0.load(SeqCst)).sum()
    }

    /// Raises the barrier and waits until nobody is inside. `None`: that took longer than `deadline`; it is down again.
    /// Raising it while it is up waits for the other one to lower it.
    pub fn raise(&self, deadline: Option<Instant>) -> Option<Raised<'_>> {
        let mut gate = self.gate.lock();
        while self.raised.load(SeqCst) {
            if !wait_until(&self.changed, &mut gate, deadline) {
                return None;
            }
        }
        self.raised.store(true, SeqCst);
        let raised = Raised { barrier: self };
        while self.inside() > 0 {
            if !wait_until(&self.changed, &mut gate, deadline) && self.inside() > 0 {
                drop(gate);
                drop(raised);
                return None;
            }
        }
        Some(raised)
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self.barrier.leave(self.lane);
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        let _gate = self.barrier.gate.lock();
        self.barrier.raised.store(false, SeqCst);
        self.barrier.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Arc;
    use std::time::Duration;

    #[test]
    fn nobody_is_inside_while_it_is_up() {
        let barrier = Arc::new(Barrier::default());
        let inside = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..4)
            .map(|_| {
                let (barrier, inside, stop) = (barrier.clone(), inside.clone(), stop.clone());
                std::thread::spawn(move || {
                    while !stop.load(SeqCst) {
                        let _passage = barrier.enter();
                        inside.fetch_add(1, SeqCst);
                        std::hint::spin_loop();
                        inside.fetch_sub(1, SeqCst);
                    }
                })
            })
            .collect();
        for _ in 0..200 {
            let raised = barrier.raise(None).unwrap();
            for _ in 0..20 {
                assert_eq!(inside.load(SeqCst), 0);
            }
            drop(raised);
        }
        stop.store(true, SeqCst);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    }

    #[test]
    fn a_writer_that_stays_makes_raising_give_up_and_everyone_goes_on() {
        let barrier = Barrier::default();
        let passage = barrier.enter();
        assert!(barrier.raise(Some(Instant::now() + Duration::from_millis(5))).is_none());
        let second = barrier.enter();
        drop((passage, second));
        assert!(barrier.raise(None).is_some());
    }
}
