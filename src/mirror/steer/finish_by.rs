//! `--finish-by`: the lowest speed that makes it, and a forecast that is honest.
//!
//! First the copy goes much faster than it has to, for a moment: what it can do is measured. From then on its limit is what is left, and what guests
//! will have added by then, over the time that is left; looked at anew all the time, so that whatever was wrong is made up for. Where
//! full speed would not do either there is no limit, and it says so.

use std::time::Duration;

/// Of the time that was left at first: this part is kept for the last flush.
const RESERVE_PART: u32 = 33;
const RESERVE_MAX: Duration = Duration::from_secs(60);
/// No limit is lower: the last pieces are to be done at once.
const LIMIT_MIN: u64 = 1 << 20;
/// Nothing is planned for less time than this.
const SOON: f64 = 0.05;
/// How far an average looks back.
const MEMORY: Duration = Duration::from_secs(2);
/// The first moment: this part of the time that is left, within these bounds, and so many times faster than it has to be.
const PROBE_FACTOR: f64 = 4.0;
const PROBE_PART: u32 = 40;
const PROBE_MIN: Duration = Duration::from_millis(200);
const PROBE_MAX: Duration = Duration::from_secs(1);

/// What has happened since the last look. Bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) elapsed: Duration,
    /// Until the time that was asked for; zero: it has passed.
    pub(super) left: Duration,
    /// Read and written.
    pub(super) copied: u64,
    /// Of granules that became clean, and of those that guests made dirty.
    pub(super) cleared: u64,
    pub(super) marked: u64,
    /// Of granules that are dirty, in flight, or not looked at yet.
    pub(super) remaining: u64,
}

/// What it comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Forecast {
    /// Whether it will be ready in time. `None`: not known yet.
    pub(super) in_time: Option<bool>,
    /// When it will be ready. `None`: not known yet, or never.
    pub(super) ready_in: Option<Duration>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct FinishBy {
    /// How long the first moment lasts still. `None`: nothing has been copied.
    probe: Option<Duration>,
    reserve: Option<Duration>,
    /// What the copy can do: bytes per second.
    capability: f64,
    copied: Average,
    cleared: Average,
    marked: Average,
    /// Bytes per second; 0: none.
    limit: u64,
    forecast: Forecast,
}

#[derive(Debug, Default)]
struct Average(Option<f64>);

impl Average {
    fn take(&mut self, bytes: u64, elapsed: Duration) -> f64 {
        let rate = bytes as f64 / elapsed.as_secs_f64().max(1e-3);
        let weight = (elapsed.as_secs_f64() / MEMORY.as_secs_f64()).min(1.0);
        let next = self.0.map_or(rate, |before| before + (rate - before) * weight);
        self.0 = Some(next);
        next
    }
}

impl FinishBy {
    /// The limit to begin with, in bytes per second: as far as is known `remaining` bytes are to be copied in the time that is left.
    pub(super) fn begin(remaining: u64, left: Duration) -> u64 {
        ((remaining as f64 / left.as_secs_f64().max(SOON) * PROBE_FACTOR) as u64).max(1 << 20)
    }

    /// Takes a sample. Returns the limit in bytes per second, 0: none.
    pub(super) fn look(&mut self, sample: &Sample) -> u64 {
        let rate = self.copied.take(sample.copied, sample.elapsed);
        let cleared = self.cleared.take(sample.cleared, sample.elapsed);
        let marked = self.marked.take(sample.marked, sample.elapsed);
        if let Some(probe) = self.probed(sample) {
            self.probe = Some(probe);
            self.capability = self.capability.max(rate);
            return Self::begin(sample.remaining, sample.left);
        }
        self.learn(rate, sample);
        // Of what is marked only a part may have to be copied: blocks that were written, data between holes.
        let part = if cleared > 0.0 { (rate / cleared).min(1.0) } else { 1.0 };
        let (remaining, coming) = (sample.remaining as f64 * part, marked * part);
        let reserve = *self.reserve.get_or_insert((sample.left / RESERVE_PART).min(RESERVE_MAX));
        let left = sample.left.saturating_sub(reserve).as_secs_f64().max(SOON);
        let needed = remaining / left + coming;
        let in_time = sample.left > Duration::ZERO && needed <= self.capability;
        let gain = self.capability - coming;
        let ready_in = match in_time {
            true => Some(sample.left),
            false => (gain > 0.0).then(|| Duration::try_from_secs_f64(remaining / gain).ok()).flatten(),
        };
        self.forecast = Forecast { in_time: Some(in_time), ready_in };
        self.limit = if in_time { (needed as u64).max(LIMIT_MIN) } else { 0 };
        self.limit
    }

    pub(super) fn forecast(&self) -> Forecast {
        self.forecast
    }

    /// How much longer the first moment lasts; `None`: it is over.
    fn probed(&self, sample: &Sample) -> Option<Duration> {
        let left = match self.probe {
            None => (sample.left / PROBE_PART).clamp(PROBE_MIN, PROBE_MAX),
            Some(left) => left,
        };
        // What stands still tells nothing.
        let used = if sample.copied > 0 { sample.elapsed } else { Duration::ZERO };
        left.checked_sub(used).filter(|left| !left.is_zero())
    }

    /// What the copy can do shows when the limit does not hold it back.
    fn learn(&mut self, rate: f64, sample: &Sample) {
        let now = sample.copied as f64 / sample.elapsed.as_secs_f64().max(1e-3);
        if self.limit == 0 || now < self.limit as f64 * 0.8 || rate > self.capability {
            let weight = (sample.elapsed.as_secs_f64() / MEMORY.as_secs_f64()).min(1.0);
            self.capability += (rate.max(now) - self.capability) * weight;
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const MIB: f64 = 1048576.0;
    const TICK: Duration = Duration::from_millis(100);

    /// A target that does `speed` MiB/s, a disk of `data` MiB, a guest that changes `dirties` MiB/s. Returns when it was ready, as a
    /// part of the time asked for, and what was forecast after a second.
    fn play(asked: f64, data: f64, speed: impl Fn(f64) -> f64, dirties: f64) -> (f64, Forecast) {
        let mut finish_by = FinishBy::default();
        let (mut remaining, mut now, mut early) = (data * MIB, 0.0, Forecast::default());
        let mut limit = FinishBy::begin(remaining as u64, Duration::from_secs_f64(asked));
        while remaining > 0.0 && now < asked * 20.0 {
            now += TICK.as_secs_f64();
            let most = speed(now) * MIB * TICK.as_secs_f64();
            let allowed = if limit == 0 { most } else { most.min(limit as f64 * TICK.as_secs_f64()) };
            let copied = allowed.min(remaining);
            let marked = dirties * MIB * TICK.as_secs_f64();
            remaining = remaining - copied + marked;
            if remaining <= marked {
                remaining = 0.0;
            }
            limit = finish_by.look(&Sample {
                elapsed: TICK,
                left: Duration::from_secs_f64((asked - now).max(0.0)),
                copied: copied as u64,
                cleared: copied as u64,
                marked: marked as u64,
                remaining: remaining as u64,
            });
            if early == Forecast::default() {
                early = finish_by.forecast();
            }
        }
        (now / asked, early)
    }

    #[test]
    fn it_is_ready_when_it_was_told_to_be() {
        for (asked, data, speed, dirties) in [
            (60.0, 1000.0, 100.0, 0.0),
            (60.0, 1000.0, 100.0, 10.0),
            (20.0, 100.0, 3000.0, 1.0),
            (3600.0, 9e5, 400.0, 50.0),
        ] {
            let (took, early) = play(asked, data, |_| speed, dirties);
            assert!((0.9..1.0).contains(&took), "asked for {asked} s, took {took} of it");
            assert_eq!(early.in_time, Some(true));
        }
    }

    #[test]
    fn a_target_that_becomes_slower_is_made_up_for() {
        // Planned at 17 MiB/s; for a while it does 5.
        let (took, _) = play(60.0, 1000.0, |now| if (10.0..30.0).contains(&now) { 5.0 } else { 100.0 }, 0.0);
        assert!((0.9..1.0).contains(&took), "took {took} of the time");
    }

    #[test]
    fn what_cannot_be_done_is_said_at_once_and_done_as_fast_as_it_goes() {
        let (took, early) = play(10.0, 1000.0, |_| 50.0, 0.0);
        assert_eq!(early.in_time, Some(false));
        let ready_in = early.ready_in.expect("it will be").as_secs_f64();
        assert!((18.0..=20.5).contains(&ready_in), "{ready_in} s");
        assert!((1.95..=2.05).contains(&took), "full speed all the time: {took}");
        let (_, never) = play(10.0, 1000.0, |_| 50.0, 60.0);
        assert_eq!((never.in_time, never.ready_in), (Some(false), None));
    }
}
