//! `auto`: whether the copy gains on the guest, by what was measured, and what follows from it.
//!
//! In the background both go on at once: it takes what is dirty over what the copy gains on the guest. With write-blocking guests add
//! nothing: it takes what is dirty over what the copy does. Where the first is much longer guests wait for both images, and clean
//! granules stay clean; as soon as what they write is little against what was too much, they do not wait any more.

use std::time::Duration;

/// In the background it may take this much longer, and this many times longer, than with write-blocking.
const SLACK: Duration = Duration::from_millis(500);
const WORTH: f64 = 4.0;
/// So many looks in a row must say so.
const LOOKS: u32 = 2;
/// Guests write little if that is this part of what was too much, at most. Waiting for the target makes them slower by itself.
const LITTLE: f64 = 0.1;
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
    /// How long it may take in any case; zero where nothing was asked for.
    pub(super) time_left: Duration,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Convergence {
    behind: u32,
    quiet: Duration,
    quiet_needed: Duration,
    /// Time in the background since guests were let off waiting.
    background: Duration,
    /// What guests wrote per second when that was too much.
    too_much: f64,
}

impl Convergence {
    pub(super) fn new() -> Self {
        Convergence { behind: 0, quiet: Duration::ZERO, quiet_needed: QUIET, background: QUIET_MAX, too_much: 0.0 }
    }

    /// In the background. True: from now on guests are to wait for both images.
    pub(super) fn must_block(&mut self, sample: &Sample) -> bool {
        self.background += sample.elapsed;
        if sample.dirty == 0 || sample.cleared == 0 {
            self.behind = 0;
            return false;
        }
        let seconds = sample.elapsed.as_secs_f64();
        let (dirty, cleared) = (sample.dirty as f64, sample.cleared as f64 / seconds);
        let gain = cleared - sample.marked as f64 / seconds;
        let blocking = dirty / cleared;
        let allowed = (blocking * WORTH + SLACK.as_secs_f64()).max(sample.time_left.as_secs_f64());
        let is_behind = gain <= 0.0 || dirty / gain > allowed;
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
        self.too_much = sample.guest_bytes as f64 / seconds;
        true
    }

    /// While guests wait for both images. True: from now on they need not.
    pub(super) fn may_release(&mut self, sample: &Sample) -> bool {
        let little = sample.guest_bytes as f64 <= self.too_much * LITTLE * sample.elapsed.as_secs_f64();
        let quiet = sample.dirty == 0 && little;
        self.quiet = if quiet { self.quiet + sample.elapsed } else { Duration::ZERO };
        if self.quiet < self.quiet_needed {
            return false;
        }
        self.background = Duration::ZERO;
        true
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(100);

    fn sample(dirty: u64, cleared: u64, marked: u64) -> Sample {
        Sample {
            elapsed: LOOK,
            dirty,
            cleared,
            marked,
            guest_bytes: marked,
            full_pass: true,
            time_left: Duration::ZERO,
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
        let in_time = Sample { time_left: Duration::from_secs(60), ..sample(800, 100, 95) };
        assert_eq!(blocks_after(&[in_time; 9]), None);
        assert_eq!(
            blocks_after(&[Sample { time_left: Duration::from_secs(60), ..behind }; 9]),
            Some(1),
            "it never will"
        );
        assert_eq!(blocks_after(&[behind, sample(0, 1, 0), behind, sample(0, 1, 0)]), None, "not two in a row");
    }

    #[test]
    fn guests_are_let_off_when_they_write_little_and_longer_after_it_was_too_early() {
        let mut convergence = Convergence::new();
        let busy = Sample { guest_bytes: 11, ..sample(0, 0, 0) };
        let calm = Sample { guest_bytes: 9, ..busy };
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
