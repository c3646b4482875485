//! `--guest-first`: the copy yields so that guests' requests stay short.
//!
//! It begins slowly and doubles until requests become too long. From then on: over the bound half of it; near the bound as it is; below
//! a little more, as long as the limit is what holds the copy back. Halving is fast and growing slow, so that the time over the bound is
//! short against the time below it.

use std::time::Duration;

use crate::volume::request_times::Window;

/// Below this the copy does not go for a guest's sake, bytes per second: it would never arrive.
pub(super) const FLOOR: u64 = 1 << 20;
/// So it begins.
const START: u64 = 8 << 20;
/// Fewer requests say little about one of a hundred: then more are awaited, for this long.
const REQUESTS_MIN: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(1);
/// A limit is judged by what ended in a time of at least this length.
const SPAN: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Debug)]
pub(super) struct GuestFirst {
    bound: Duration,
    /// Bytes per second.
    limit: u64,
    /// Guests' requests were too long once.
    met: bool,
    p99: Option<Duration>,
    /// How long the bound was exceeded although the copy was as slow as it gets.
    in_vain: Duration,
}

impl GuestFirst {
    /// 99 of 100 requests are to take no longer than `bound`.
    pub(super) fn new(bound: Duration) -> Self {
        GuestFirst { bound, limit: START, met: false, p99: None, in_vain: Duration::ZERO }
    }

    pub(super) fn bound(&self) -> Duration {
        self.bound
    }

    /// Whether `window`, of this length, is enough to judge by.
    pub(super) fn is_enough(window: Window, elapsed: Duration) -> bool {
        let few = (1..REQUESTS_MIN).contains(&window.requests);
        elapsed >= if few { PATIENCE } else { SPAN }
    }

    /// The limit, in bytes per second.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes what guests met in the last `elapsed`, in which the copy went at `rate` bytes per second.
    /// `blocking`: guests wait for both images.
    pub(super) fn look(&mut self, window: Window, rate: u64, elapsed: Duration, blocking: bool) {
        // Nothing has ended, and something is under way: it takes this long at least.
        let hangs = window.requests == 0 && window.under_way > 0;
        let p99 = if hangs { elapsed } else { window.p99 };
        self.p99 = (window.requests > 0 || hangs).then_some(p99);
        if p99 > self.bound {
            self.in_vain = if self.limit == FLOOR && blocking { self.in_vain + elapsed } else { Duration::ZERO };
            self.limit = (self.limit.min(rate.max(FLOOR) * 2) / 2).max(FLOOR);
            self.met = true;
            return;
        }
        self.in_vain = Duration::ZERO;
        let near = p99 > self.bound.mul_f64(0.7);
        let holds_back = rate >= self.limit / 2;
        if !near && holds_back {
            self.limit += if self.met { (self.limit / 8).max(FLOOR / 8) } else { self.limit };
        }
    }

    /// Guests wait for both images from now on.
    pub(super) fn begin_blocking(&mut self) {
        self.in_vain = Duration::ZERO;
    }

    /// What guests met last: 99 of 100 requests took no longer. `None`: there were none.
    pub(super) fn p99(&self) -> Option<Duration> {
        self.p99
    }

    /// For this long it is not the copy's reading and writing that makes requests long.
    pub(super) fn in_vain(&self) -> Duration {
        self.in_vain
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_millis(200);

    /// A disk that does 400 MiB/s: what the copy takes, the guest waits for.
    fn guest_beside(copy: u64) -> Window {
        let load = copy as f64 / (400 << 20) as f64;
        let p99 = Duration::from_micros(500).div_f64((1.0 - load).max(0.001));
        Window { requests: 5000, p99, under_way: 0 }
    }

    #[test]
    fn the_guest_stays_under_the_bound_and_the_copy_gets_the_rest() {
        let mut guest_first = GuestFirst::new(Duration::from_millis(2));
        let (mut rate, mut over, mut copied) = (8 << 20, 0, 0);
        for window in 0..600 {
            let seen = guest_beside(rate);
            guest_first.look(seen, rate, WINDOW, false);
            if window >= 20 {
                over += u32::from(seen.p99 > Duration::from_millis(2));
                copied += rate / 5;
            }
            rate = guest_first.limit().min(399 << 20);
        }
        // Three quarters of the disk are what the bound allows.
        assert!(over < 580 / 20, "over the bound in {over} of 580 windows");
        let share = copied as f64 / (580.0 / 5.0) / (300 << 20) as f64;
        assert!((0.6..=1.0).contains(&share), "the copy got {share} of what it could have");
    }

    #[test]
    fn a_guest_that_is_slow_by_itself_leaves_the_copy_its_floor() {
        let mut guest_first = GuestFirst::new(Duration::from_millis(1));
        let slow = Window { requests: 100, p99: Duration::from_millis(80), under_way: 1 };
        let mut rate = 300 << 20;
        for _ in 0..20 {
            guest_first.look(slow, rate, WINDOW, false);
            rate = guest_first.limit();
        }
        assert_eq!((rate, guest_first.in_vain()), (FLOOR, Duration::ZERO), "it is not the waiting for both images");
        guest_first.begin_blocking();
        (0..10).for_each(|_| guest_first.look(slow, rate, WINDOW, true));
        assert!(guest_first.in_vain() >= WINDOW * 8, "{:?}", guest_first.in_vain());
        let hanging = Window { requests: 0, p99: Duration::ZERO, under_way: 1 };
        guest_first.look(hanging, rate, WINDOW, false);
        assert_eq!((guest_first.limit(), guest_first.p99()), (FLOOR, Some(WINDOW)), "who hangs is not quiet");
        let quiet = Window { requests: 0, p99: Duration::ZERO, under_way: 0 };
        for _ in 0..60 {
            guest_first.look(quiet, rate, WINDOW, false);
            rate = guest_first.limit();
        }
        assert!(rate > 200 << 20, "the guest is quiet: {rate}");
        assert_eq!(guest_first.in_vain(), Duration::ZERO);
    }

    #[test]
    fn a_copy_that_is_slow_for_other_reasons_is_not_allowed_ever_more() {
        let mut guest_first = GuestFirst::new(Duration::from_millis(1));
        let window = |p99| Window { requests: 100, p99, under_way: 0 };
        guest_first.look(window(Duration::from_millis(2)), 80 << 20, WINDOW, false);
        for _ in 0..1000 {
            guest_first.look(window(Duration::from_micros(10)), 30 << 20, WINDOW, false);
        }
        assert!(guest_first.limit() < 80 << 20, "{}", guest_first.limit());
    }
}
