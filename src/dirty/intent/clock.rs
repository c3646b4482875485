//! The time of a region's last write: whole seconds, cheap to read.

/// Tells the time to the intent log.
pub trait Clock: Send + Sync {
    /// Seconds since some moment before the clock was made; never 0, never less than before.
    fn seconds(&self) -> u32;
}

/// The kernel's coarse clock: a few nanoseconds a look, a few milliseconds wrong.
#[derive(Debug)]
pub struct CoarseClock {
    start: i64,
}

impl CoarseClock {
    /// Starts at 1.
    #[expect(clippy::new_without_default, reason = "it reads a clock")]
    pub fn new() -> Self {
        CoarseClock { start: coarse_seconds() }
    }
}

impl Clock for CoarseClock {
    fn seconds(&self) -> u32 {
        u32::try_from(coarse_seconds() - self.start).unwrap_or(u32::MAX - 1) + 1
    }
}

#[cfg(all(test, shuttle))]
fn coarse_seconds() -> i64 {
    i64::try_from(crate::sync::Instant::now().seconds()).unwrap_or(i64::MAX)
}

#[cfg(not(all(test, shuttle)))]
fn coarse_seconds() -> i64 {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, |time| time.tv_sec())
}
