//! How fast the copy may go, and how fast it goes.
//!
//! The speed limit charges before a claim is taken (a claim never sleeps) and gives back what turned out to be a hole. Waiting
//! for it ends at once when the limit changes or the job is told to pause or end.

use std::time::Duration;

use crate::sync::{Condvar, Instant, Mutex, wait_until};

/// A burst of this length may pass at once after an idle time.
const BURST: Duration = Duration::from_millis(100);

/// What was granted at a higher limit is paid off within this time.
const DEBT_MAX: Duration = Duration::from_secs(1);

/// The speed limit of one job.
#[derive(Debug)]
pub struct Pacer {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The user's limit, and the job's own; 0: none. The lower one counts.
    told: u64,
    own: u64,
    /// When everything granted so far is paid off.
    paid_at: Instant,
    /// A cutover is draining: no limit.
    bypassed: bool,
}

impl State {
    /// The limit that counts; 0: none.
    fn speed(&self) -> u64 {
        match (self.told, self.own) {
            (0, limit) | (limit, 0) => limit,
            (told, own) => told.min(own),
        }
    }
}

impl Pacer {
    /// A limit in bytes per second; 0: none.
    pub fn new(bytes_per_second: u64) -> Self {
        let state = State { told: bytes_per_second, own: 0, paid_at: Instant::now(), bypassed: false };
        Pacer { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The user's limit in bytes per second; 0: none.
    pub fn speed(&self) -> u64 {
        self.state.lock().told
    }

    /// The limit that the job has set itself, bytes per second; 0: none.
    pub fn own_speed(&self) -> u64 {
        self.state.lock().own
    }

    /// Changes the user's limit, for those who wait too. What was granted before is not charged again.
    pub fn set_speed(&self, bytes_per_second: u64) {
        let mut state = self.state.lock();
        state.told = bytes_per_second;
        state.paid_at = Instant::now();
        self.changed.notify_all();
    }

    /// Changes the job's own limit, for those who wait too. It changes all the time: what was granted stays to be paid for, at the new
    /// speed.
    pub fn set_own_speed(&self, bytes_per_second: u64) {
        let mut state = self.state.lock();
        if state.own == bytes_per_second {
            return;
        }
        let (before, now) = (state.speed(), Instant::now());
        state.own = bytes_per_second;
        let debt = state.paid_at.saturating_duration_since(now);
        state.paid_at = match (before, state.speed()) {
            // Without a limit nothing was charged, and nothing is owed.
            (0, _) | (_, 0) => now,
            // The user's limit still counts: what is owed to that stays.
            (before, after) if before == after => return,
            // It does not grow beyond a second's worth: limits may be thousands of times apart.
            (before, after) => now + debt.mul_f64(before as f64 / after as f64).min(debt.max(DEBT_MAX)),
        };
        self.changed.notify_all();
    }

    /// Lifts the limit while a cutover drains.
    pub fn bypass(&self, on: bool) {
        self.state.lock().bypassed = on;
        self.changed.notify_all();
    }

    /// Makes everyone who waits look at their `stop` again.
    pub fn interrupt(&self) {
        // Under the lock, so that nobody is between looking and waiting.
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    /// Waits until `bytes` may be copied and charges them. False: `stop` said so, nothing was charged.
    pub fn acquire(&self, bytes: u64, stop: impl Fn() -> bool) -> bool {
        let mut state = self.state.lock();
        loop {
            if stop() {
                return false;
            }
            if state.speed() == 0 || state.bypassed {
                return true;
            }
            let now = Instant::now();
            if state.paid_at <= now + BURST {
                let cost = Duration::from_secs_f64(bytes as f64 / state.speed() as f64);
                state.paid_at = state.paid_at.max(now) + cost;
                return true;
            }
            let until = state.paid_at - BURST;
            wait_until(&self.changed, &mut state, Some(until));
        }
    }

    /// Gives back what was charged and not copied.
    pub fn refund(&self, bytes: u64) {
        let mut state = self.state.lock();
        if bytes == 0 || state.speed() == 0 {
            return;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / state.speed() as f64);
        state.paid_at = state.paid_at.checked_sub(cost).unwrap_or(state.paid_at);
        self.changed.notify_all();
    }

    /// Charges what was copied beyond what was acquired.
    pub fn charge(&self, bytes: u64) {
        let mut state = self.state.lock();
        if bytes == 0 || state.speed() == 0 || state.bypassed {
            return;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / state.speed() as f64);
        state.paid_at = state.paid_at.max(Instant::now()) + cost;
    }

    /// The largest piece to claim at once: a tenth of a second's worth, `most` at most.
    pub fn piece(&self, most: u64) -> u64 {
        match self.state.lock().speed() {
            0 => most,
            speed => (speed / 10).clamp(1, most),
        }
    }
}

/// A rate in bytes per second, smoothed over about a second, from a counter that only grows.
#[derive(Debug)]
pub struct RateMeter {
    last: (Instant, u64),
    bytes_per_second: f64,
    seeded: bool,
}

impl RateMeter {
    /// A meter for a counter that stands at `counter` now.
    pub fn new(counter: u64) -> Self {
        RateMeter { last: (Instant::now(), counter), bytes_per_second: 0.0, seeded: false }
    }

    /// Takes a sample. Samples less than 20 ms apart are left for the next one.
    pub fn sample(&mut self, counter: u64) {
        let elapsed = self.last.0.elapsed();
        if elapsed < Duration::from_millis(20) {
            return;
        }
        let rate = counter.saturating_sub(self.last.1) as f64 / elapsed.as_secs_f64();
        let weight = if self.seeded { (elapsed.as_secs_f64() / 1.0).min(1.0) } else { 1.0 };
        self.bytes_per_second += (rate - self.bytes_per_second) * weight;
        self.seeded = true;
        self.last = (Instant::now(), counter);
    }

    /// The rate.
    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    #[test]
    fn the_limit_is_kept_over_a_second() {
        let pacer = Pacer::new(10 << 20);
        let start = Instant::now();
        let mut granted = 0u64;
        while granted < 5 << 20 {
            assert!(pacer.acquire(256 << 10, || false));
            granted += 256 << 10;
        }
        // 5 MiB at 10 MiB/s, less one burst: never faster, however slow the machine.
        assert!(start.elapsed() >= Duration::from_millis(350), "{:?}", start.elapsed());
    }

    #[test]
    fn the_lower_limit_counts_and_its_changes_forgive_nothing() {
        let pacer = Pacer::new(10 << 20);
        let start = Instant::now();
        for round in 0..40 {
            // Between 4 and 5 MiB/s, changed at every turn.
            pacer.set_own_speed((4 << 20) + (round % 2) * (1 << 20));
            assert!(pacer.acquire(64 << 10, || false));
        }
        // 2.5 MiB at 5 MiB/s at most, less one burst.
        assert!(start.elapsed() >= Duration::from_millis(350), "{:?}", start.elapsed());
        assert_eq!((pacer.speed(), pacer.own_speed()), (10 << 20, 5 << 20));
        // What a high limit has granted does not weigh for hours at a low one, nor after there was none.
        pacer.set_own_speed(1);
        let begun = Instant::now();
        pacer.set_own_speed(0);
        pacer.set_own_speed(5 << 20);
        assert!(pacer.acquire(1, || begun.elapsed() > Duration::from_secs(60)));
        pacer.set_speed(1 << 20);
        assert_eq!(pacer.piece(1 << 30), (1 << 20) / 10);
    }

    #[test]
    fn what_is_owed_to_the_users_limit_stays_while_the_jobs_own_changes() {
        let pacer = Pacer::new(1 << 20);
        assert!(pacer.acquire(64 << 20, || false), "a minute's worth");
        for own in [8 << 20, 2 << 20, 0, 8 << 20] {
            pacer.set_own_speed(own);
        }
        assert!(pacer.state.lock().paid_at > Instant::now() + Duration::from_secs(30));
    }

    #[test]
    fn holes_are_given_back_and_a_change_or_a_stop_wakes_who_waits() {
        let pacer = Pacer::new(1);
        assert!(pacer.acquire(1 << 30, || false));
        pacer.refund(1 << 30);
        assert!(pacer.acquire(1 << 30, || false), "the refund paid for it");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stopped = scope.spawn(|| pacer.acquire(1, || stop.load(SeqCst)));
            stop.store(true, SeqCst);
            pacer.interrupt();
            assert!(!stopped.join().unwrap());
            let freed = scope.spawn(|| pacer.acquire(1, || false));
            pacer.set_speed(0);
            assert!(freed.join().unwrap());
        });
    }
}
