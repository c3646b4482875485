//! How long guests' reads and writes take, counted while somebody watches.
//!
//! Nobody watches as a rule, and then a request costs one look at one word. The time is the server's: from the request's arrival in
//! the volume to its end, the kernel's way there and back not included. Of what has not ended it is known how many there are.

use std::time::Duration;

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use crate::sync::{Arc, Instant};

/// Buckets of one power of two: a time is known to a quarter of its size or better.
const FINE: usize = 4;
/// Powers of two of a microsecond; the last bucket takes what is longer (a minute).
const OCTAVES: usize = 26;
const BUCKETS: usize = FINE * OCTAVES;

/// See the module.
#[derive(Debug)]
pub struct RequestTimes {
    watchers: AtomicUsize,
    /// Requests that were timed from their begin on.
    begun: AtomicU64,
    counts: [AtomicU64; BUCKETS],
}

/// A request that is being timed; it ends when this is dropped.
#[derive(Debug)]
pub struct Timed<'a> {
    times: &'a RequestTimes,
    begun: Instant,
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.times.note(self.begun.elapsed());
    }
}

/// Somebody who wants to know. Requests are timed while one lives.
#[derive(Debug)]
pub struct Watch {
    times: Arc<RequestTimes>,
    seen: [u64; BUCKETS],
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.times.watchers.fetch_sub(1, Relaxed);
    }
}

/// What ended between two looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Requests.
    pub requests: u64,
    /// 99 of 100 of them took no longer; zero if there were none.
    pub p99: Duration,
    /// Requests that have not ended.
    pub under_way: u64,
}

impl Default for RequestTimes {
    fn default() -> Self {
        RequestTimes {
            watchers: AtomicUsize::new(0),
            begun: AtomicU64::new(0),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl RequestTimes {
    /// Begins to time a request, if anybody watches.
    pub fn start(&self) -> Option<Timed<'_>> {
        (self.watchers.load(Relaxed) > 0).then(|| {
            self.begun.fetch_add(1, Relaxed);
            Timed { times: self, begun: Instant::now() }
        })
    }

    fn under_way(&self) -> u64 {
        // Ended first: what ends in between was begun.
        let ended = self.counts.iter().map(|count| count.load(Relaxed)).sum::<u64>();
        self.begun.load(Relaxed).saturating_sub(ended)
    }

    fn note(&self, took: Duration) {
        self.counts[bucket(took)].fetch_add(1, Relaxed);
    }

    /// Watches from now on.
    pub fn watch(self: &Arc<Self>) -> Watch {
        self.watchers.fetch_add(1, Relaxed);
        Watch { times: self.clone(), seen: std::array::from_fn(|at| self.counts[at].load(Relaxed)) }
    }
}

impl Watch {
    /// The requests that ended so far and were not taken yet.
    pub fn look(&self) -> Window {
        window(&self.news(), self.times.under_way())
    }

    /// As [`Watch::look`]; the next look begins after them.
    pub fn take(&mut self) -> Window {
        let news = self.news();
        self.seen.iter_mut().zip(news).for_each(|(seen, more)| *seen += more);
        window(&news, self.times.under_way())
    }

    fn news(&self) -> [u64; BUCKETS] {
        std::array::from_fn(|at| self.times.counts[at].load(Relaxed).saturating_sub(self.seen[at]))
    }
}

fn window(counts: &[u64; BUCKETS], under_way: u64) -> Window {
    let requests = counts.iter().sum::<u64>();
    let allowed = requests / 100;
    let mut longer = 0;
    // From the longest on, until more than one of a hundred would be longer.
    let found = (0..BUCKETS).rev().find(|&at| {
        longer += counts[at];
        longer > allowed
    });
    Window { requests, p99: found.map_or(Duration::ZERO, upper_bound), under_way }
}

fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    let octave = micros.ilog2() as usize;
    // The two bits after the highest one.
    let fine = if octave >= 2 { micros >> (octave - 2) } else { micros << (2 - octave) };
    (octave * FINE + (fine as usize & (FINE - 1))).min(BUCKETS - 1)
}

/// The shortest time that no request of a bucket reaches.
fn upper_bound(bucket: usize) -> Duration {
    let (octave, fine) = (bucket / FINE, bucket % FINE);
    Duration::from_nanos((((FINE + fine + 1) as u64 * 1000) << octave) / FINE as u64)
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn a_time_lies_below_its_bucket_s_bound_and_not_far_below() {
        for micros in (1..3000).chain([10_000, 123_456, 9_999_999]) {
            let bound = upper_bound(bucket(Duration::from_micros(micros)));
            let micros = Duration::from_micros(micros);
            assert!(bound > micros && bound.as_nanos() <= micros.as_nanos() * 2, "{micros:?} {bound:?}");
            assert!(micros < Duration::from_micros(8) || bound <= micros * 13 / 10, "{micros:?} {bound:?}");
        }
        assert_eq!(bucket(Duration::from_secs(10_000)), BUCKETS - 1);
        assert_eq!(bucket(Duration::ZERO), 0);
    }

    #[test]
    fn what_has_not_ended_is_known() {
        let times = Arc::new(RequestTimes::default());
        let watch = times.watch();
        let requests = [times.start(), times.start()];
        assert_eq!((watch.look().requests, watch.look().under_way), (0, 2));
        drop(requests);
        assert_eq!((watch.look().requests, watch.look().under_way), (2, 0));
    }

    #[test]
    fn one_of_a_hundred_may_be_longer() {
        let times = Arc::new(RequestTimes::default());
        assert!(times.start().is_none(), "nobody watches");
        let mut watch = times.watch();
        assert_eq!(watch.take(), Window { requests: 0, p99: Duration::ZERO, under_way: 0 });
        (0..990).for_each(|_| times.note(Duration::from_micros(100)));
        (0..10).for_each(|_| times.note(Duration::from_millis(50)));
        assert!(watch.look().p99 < Duration::from_micros(130), "{:?}", watch.look());
        times.note(Duration::from_millis(50));
        let window = watch.take();
        assert!(window.requests == 1001 && window.p99 > Duration::from_millis(50), "{window:?}");
        assert_eq!(watch.take().requests, 0, "taken");
        drop(times.start().expect("somebody watches"));
        assert_eq!(watch.take().requests, 1);
        drop(watch);
        assert!(times.start().is_none());
    }
}
