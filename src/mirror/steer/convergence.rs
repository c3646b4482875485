//! `auto`: whether the copy gains on the guest, by what was measured, and what follows from it.
//!
//! In the background both go on at once: it takes what is dirty over what the copy gains on the guest. With write-blocking guests add
//! nothing: it takes what is dirty over what the copy does. Where the first is much longer guests wait for both images, and clean
//! granules stay clean; as soon as what they write is little against what was too much, they do not wait any more.

use std::time::Duration;

/// In the background it may take this much longer, and this many times longer, than with write-blocking.
const SLACK: Duration = Duration::from_millis(500);
const WORTH: f64 = 4.0;
/// A judgement needs so many bytes that became clean, or so long a time.
const CLEARED_ENOUGH: u64 = 32 << 20;
const LONG_ENOUGH: Duration = Duration::from_secs(2);
/// So many judgements in a row must say so.
const LOOKS: u32 = 2;
/// Guests write little if that is this part of what was too much, at most. Waiting for the target makes them slower by itself.
const LITTLE: f64 = 0.1;
/// ... or this part of what was copied then.
const COPIED_PART: f64 = 0.25;
/// ... for this long, and longer if the last time it was not true for long.
const QUIET: Duration = Duration::from_secs(2);
const QUIET_MAX: Duration = Duration::from_secs(64);

/// What has happened since the last look. Bytes of granules, but for what guests wrote.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) elapsed: Duration,
    pub(super) dirty: u64,
    pub(super) cleared: u64,
    pub(super) marked: u64,
    pub(super) guest_bytes: u64,
    /// All of the disk was copied once: what is dirty now is the guest's.
    pub(super) full_pass: bool,
    /// Bytes read and written for it.
    pub(super) copied: u64,
    /// It will be ready by the time that was asked for: it may be slow.
    pub(super) in_time: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Convergence {
    /// What has come together since the last judgement.
    sum: Sum,
    behind: u32,
    quiet: Duration,
    quiet_needed: Duration,
    /// Time in the background since guests were let off waiting.
    background: Duration,
    /// What guests wrote per second when that was too much, and what was copied then.
    too_much: f64,
    copied: f64,
}

#[derive(Debug, Default)]
struct Sum {
    elapsed: Duration,
    cleared: u64,
    marked: u64,
    guest_bytes: u64,
    copied: u64,
}

impl Convergence {
    pub(super) fn new() -> Self {
        Convergence {
            sum: Sum::default(),
            behind: 0,
            quiet: Duration::ZERO,
            quiet_needed: QUIET,
            background: QUIET_MAX,
            too_much: 0.0,
            copied: 0.0,
        }
    }

    /// In the background. True: from now on guests are to wait for both images.
    pub(super) fn must_block(&mut self, sample: &Sample) -> bool {
        self.background += sample.elapsed;
        if sample.dirty == 0 || sample.in_time {
            (self.behind, self.sum) = (0, Sum::default());
            return false;
        }
        let Some(sum) = self.enough(sample) else { return false };
        if sum.cleared == 0 {
            // It stands still: that is no matter of speed.
            return false;
        }
        let seconds = sum.elapsed.as_secs_f64();
        let (dirty, cleared) = (sample.dirty as f64, sum.cleared as f64 / seconds);
        let gain = cleared - sum.marked as f64 / seconds;
        let is_behind = gain <= 0.0 || dirty / gain > dirty / cleared * WORTH + SLACK.as_secs_f64();
        self.behind = if is_behind { self.behind + 1 } else { 0 };
        // What was seen in the first pass counts, but before its end there is nothing that guests could keep clean.
        if !sample.full_pass || self.behind < LOOKS {
            return false;
        }
        // Let off too early the last time?
        let early = self.background < self.quiet_needed * 4;
        self.quiet_needed = if early { (self.quiet_needed * 2).min(QUIET_MAX) } else { QUIET };
        self.behind = 0;
        self.quiet = Duration::ZERO;
        (self.too_much, self.copied) = (sum.guest_bytes as f64 / seconds, sum.copied as f64 / seconds);
        true
    }

    /// A slow copy ends a claim now and then: what a short time shows of it is nothing or too much.
    fn enough(&mut self, sample: &Sample) -> Option<Sum> {
        let sum = &mut self.sum;
        sum.elapsed += sample.elapsed;
        sum.cleared += sample.cleared;
        sum.marked += sample.marked;
        sum.guest_bytes += sample.guest_bytes;
        sum.copied += sample.copied;
        (sum.cleared >= CLEARED_ENOUGH || sum.elapsed >= LONG_ENOUGH).then(|| std::mem::take(sum))
    }

    /// While guests wait for both images. True: from now on they need not.
    pub(super) fn may_release(&mut self, sample: &Sample) -> bool {
        let little = (self.too_much * LITTLE).max(self.copied * COPIED_PART) * sample.elapsed.as_secs_f64();
        let quiet = sample.dirty == 0 && sample.guest_bytes as f64 <= little;
        self.quiet = if quiet { self.quiet + sample.elapsed } else { Duration::ZERO };
        if self.quiet < self.quiet_needed {
            return false;
        }
        self.background = Duration::ZERO;
        self.sum = Sum::default();
        true
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(100);

    /// Of MiB.
    fn sample(dirty: u64, cleared: u64, marked: u64) -> Sample {
        Sample {
            elapsed: LOOK,
            dirty: dirty << 20,
            cleared: cleared << 20,
            marked: marked << 20,
            guest_bytes: marked << 20,
            full_pass: true,
            copied: cleared << 20,
            in_time: false,
        }
    }

    fn blocks_after(samples: &[Sample]) -> Option<usize> {
        let mut convergence = Convergence::new();
        samples.iter().position(|sample| convergence.must_block(sample))
    }

    #[test]
    fn a_guest_that_is_as_fast_as_the_copy_is_made_to_wait() {
        assert_eq!(blocks_after(&[sample(800, 100, 100); 9]), Some(1));
        assert_eq!(blocks_after(&[sample(800, 100, 120); 9]), Some(1));
        assert_eq!(blocks_after(&[sample(800, 100, 95); 9]), Some(1), "16 s, and 0.8 with write-blocking");
        assert_eq!(blocks_after(&[sample(800, 100, 50); 9]), None, "1.6 s");
        assert_eq!(blocks_after(&[sample(35, 100, 95); 9]), Some(1), "0.7 s, and 0.035");
        assert_eq!(blocks_after(&[sample(30, 100, 93); 9]), None, "it is nearly there");
    }

    #[test]
    fn nobody_waits_before_the_first_pass_nor_for_a_copy_that_stands_still_nor_with_time_left() {
        let behind = sample(800, 100, 100);
        let early = Sample { full_pass: false, ..behind };
        assert_eq!(blocks_after(&[early; 9]), None);
        assert_eq!(blocks_after(&[early, early, early, behind]), Some(3), "at its end");
        assert_eq!(blocks_after(&[Sample { cleared: 0, ..behind }; 9]), None);
        assert_eq!(blocks_after(&[sample(0, 100, 100); 9]), None);
        assert_eq!(blocks_after(&[Sample { in_time: true, ..behind }; 9]), None);
        assert_eq!(blocks_after(&[behind, sample(0, 1, 0), behind, sample(0, 1, 0)]), None, "not two in a row");
    }

    /// 4 MiB/s: a claim of 1 MiB ends in every second or third look, four of them at once in every tenth.
    #[test]
    fn a_copy_that_is_slow_is_judged_by_more_than_a_look() {
        let look = |at: usize| sample(800, if at % 10 == 9 { 4 } else { 0 }, if at % 2 == 0 { 1 } else { 0 });
        let looks: Vec<Sample> = (0..100).map(look).collect();
        assert!(blocks_after(&looks).is_some(), "5 MiB/s are written, 4 copied");
        let look = |at: usize| sample(800, if at % 10 == 9 { 4 } else { 0 }, if at % 10 == 0 { 1 } else { 0 });
        let looks: Vec<Sample> = (0..100).map(look).collect();
        assert_eq!(blocks_after(&looks), None, "1 MiB/s is written");
    }

    #[test]
    fn guests_are_let_off_when_they_write_little_and_longer_after_it_was_too_early() {
        let mut convergence = Convergence::new();
        let busy = Sample { guest_bytes: 26 << 20, ..sample(0, 0, 0) };
        let calm = Sample { guest_bytes: 24 << 20, ..busy };
        let looks =
            |convergence: &mut Convergence, sample: &Sample| (1..1000).find(|_| convergence.may_release(sample));
        let behind = |convergence: &mut Convergence| (1..1000).find(|_| convergence.must_block(&sample(800, 100, 100)));
        assert_eq!(behind(&mut convergence), Some(2));
        assert_eq!(looks(&mut convergence, &busy), None);
        assert_eq!(looks(&mut convergence, &calm), Some(20));
        assert_eq!(behind(&mut convergence), Some(2), "at once again");
        assert_eq!(looks(&mut convergence, &calm), Some(40));
        for _ in 0..1000 {
            assert!(!convergence.must_block(&sample(0, 100, 10)));
        }
        assert_eq!(behind(&mut convergence), Some(2));
        assert_eq!(looks(&mut convergence, &calm), Some(20), "forgotten");
    }
}
