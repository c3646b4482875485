//! What a job does by itself about its pace and its copy mode: looked at ten times a second while it copies.
//!
//! ```text
//! counters, guests' request times ──> guest_first, finish_by ──> the lower limit ──> pacer
//!                                 └─> convergence (copy mode auto) ──> tracking: do guests wait for both images?
//! ```

mod convergence;
mod finish_by;
mod guest_first;

use std::time::{Duration, UNIX_EPOCH};

use self::convergence::Convergence;
use self::finish_by::FinishBy;
use self::guest_first::GuestFirst;
use super::job::{Job, Live};
use super::types::{CopyMode, Pace};
use crate::sync::atomic::Ordering::{Relaxed, SeqCst};
use crate::sync::{Instant, SystemTime};
use crate::volume::request_times::Watch;

/// How far two looks are apart at least.
const LOOK: Duration = Duration::from_millis(100);
/// Who has not looked for so long knows nothing: the job was paused, or the machine was.
const GAP: Duration = Duration::from_secs(2);
/// After a guest gave up on the target, or waiting for it made guests' requests too long, guests do not wait for it this long.
pub(super) const REST: Duration = Duration::from_secs(10);
/// Guests' requests are too long for so long, and the copy is not to blame: then it is the waiting for both images.
const IN_VAIN: Duration = Duration::from_secs(2);

/// How a job goes about it, for whoever asks.
#[derive(Clone, Debug, Default)]
pub(super) struct Steered {
    /// Whether it will be ready by the time that was asked for, and when it will.
    pub(super) in_time: Option<bool>,
    pub(super) ready_in: Option<Duration>,
    /// 99 of 100 requests of guests took no longer, when last looked at.
    pub(super) guest_p99: Option<Duration>,
}

/// See the module.
pub(super) struct Steer {
    looked_at: Instant,
    counts: Counts,
    pace: Pace,
    convergence: Convergence,
    guest_first: Option<Watched>,
    finish_by: FinishBy,
    /// At the last look all of the source had been looked at.
    scanned: bool,
    /// The limits of the two rules, 0 being none.
    guest_limit: u64,
    time_limit: u64,
    blocking_failed_at: Option<Instant>,
}

struct Watched {
    rule: GuestFirst,
    watch: Watch,
    since: Instant,
    copied: u64,
}

#[derive(Clone, Copy, Debug)]
struct Counts {
    copied: u64,
    cleared: u64,
    /// Dirty or in flight.
    open: u64,
    guest: u64,
}

impl Counts {
    fn of(job: &Job, live: &Live) -> Self {
        let (dirtied, synchronous) = live.tracking.traffic();
        Counts {
            // What a target had to write in place of holes was work too.
            copied: job.copied() + job.counters.zeroed.load(Relaxed),
            cleared: job.counters.cleared.load(Relaxed),
            open: live.map.dirty_bytes() + live.map.in_flight_bytes(),
            guest: dirtied + synchronous,
        }
    }
}

impl Steer {
    pub(super) fn new(job: &Job, live: &Live) -> Self {
        let mut steer = Steer {
            looked_at: Instant::now(),
            counts: Counts::of(job, live),
            pace: Pace::default(),
            convergence: Convergence::new(),
            guest_first: None,
            finish_by: FinishBy::default(),
            scanned: false,
            guest_limit: 0,
            time_limit: 0,
            blocking_failed_at: None,
        };
        steer.take_over(job, live);
        steer
    }

    /// Looks at what has happened and acts on it, if enough time has passed.
    pub(super) fn look(&mut self, job: &Job, live: &Live) {
        self.take_over(job, live);
        self.block_again(job, live);
        let elapsed = self.looked_at.elapsed();
        if elapsed < LOOK {
            return;
        }
        let (before, now) = (self.counts, Counts::of(job, live));
        (self.counts, self.looked_at) = (now, Instant::now());
        if job.must_yield() || elapsed >= GAP {
            // Held by a pause or an error nothing is copied, and a cutover has its own pace; whether guests' writes go to both images is
            // then the cutover's to say.
            if let Some(watched) = &mut self.guest_first {
                watched.begin(now.copied);
            }
            self.finish_by = FinishBy::default();
            self.show(job);
            return;
        }
        let cleared = now.cleared.saturating_sub(before.cleared);
        let marked = (now.open + cleared).saturating_sub(before.open);
        let left = self.time_left();
        let (mode, scanned, ready) = {
            let state = job.state.lock();
            (state.copy_mode, state.scanned, state.ready)
        };
        let blocking = live.tracking.is_synchronous();
        self.guest_limit = self.guest_first.as_mut().map_or(0, |watched| watched.look(now.copied, blocking));
        self.time_limit = match left {
            Some(left) if !ready => self.finish_by.look(&finish_by::Sample {
                elapsed,
                left,
                copied: now.copied.saturating_sub(before.copied),
                cleared,
                // Until the scan is done most of them are its marks.
                marked: if self.scanned { marked } else { 0 },
                remaining: now.open + unseen(job, live),
            }),
            _ => 0,
        };
        self.scanned = scanned;
        self.limit(job);
        self.show(job);
        let in_time = self.time_limit > 0 && self.finish_by.forecast().in_time == Some(true);
        let full_pass = scanned && job.counters.passes.load(Relaxed) > 0;
        self.choose(
            job,
            live,
            mode,
            &convergence::Sample {
                elapsed,
                dirty: live.map.dirty_bytes(),
                cleared,
                marked,
                guest_bytes: now.guest.saturating_sub(before.guest),
                full_pass,
                copied: now.copied.saturating_sub(before.copied),
                in_time,
            },
        );
    }

    /// It is ready: from here on it follows, as fast as it can.
    pub(super) fn arrived(&mut self, job: &Job) {
        if job.state.lock().ready {
            self.time_limit = 0;
            self.limit(job);
        }
    }

    fn limit(&self, job: &Job) {
        job.pacer.set_own_speed(lower(self.guest_limit, self.time_limit));
    }

    /// Guests that were told to wait for both images do so again when the target has rested: not only at the next look, before which they
    /// may write.
    fn block_again(&self, job: &Job, live: &Live) {
        let wanted = job.state.lock().copy_mode == CopyMode::WriteBlocking;
        // Whether guests' writes go to the target during a cutover is the cutover's to say.
        if wanted && !live.tracking.is_synchronous() && self.may_block(job) && !job.frozen.load(SeqCst) {
            live.tracking.set_synchronous(true);
        }
    }

    fn may_block(&self, job: &Job) -> bool {
        let rested = |at: Option<Instant>| at.is_none_or(|at| at.elapsed() >= REST);
        rested(job.state.lock().stalled_at) && rested(self.blocking_failed_at)
    }

    /// Whether guests are to wait for both images.
    fn choose(&mut self, job: &Job, live: &Live, mode: CopyMode, sample: &convergence::Sample) {
        match mode {
            CopyMode::Background | CopyMode::WriteBlocking => (),
            CopyMode::Auto if !live.tracking.is_synchronous() => {
                if self.may_block(job) && self.convergence.must_block(sample) {
                    log::info!("job {}: the copy does not gain on the guest: write-blocking from now on", job.id());
                    live.tracking.set_synchronous(true);
                    if let Some(watched) = &mut self.guest_first {
                        watched.rule.begin_blocking();
                    }
                }
            }
            CopyMode::Auto => {
                let in_vain = self.guest_first.as_ref().map_or(Duration::ZERO, |watched| watched.rule.in_vain());
                if in_vain >= IN_VAIN {
                    log::info!("job {}: guests wait too long for both images: background again", job.id());
                    self.blocking_failed_at = Some(Instant::now());
                    live.tracking.set_synchronous(false);
                } else if self.convergence.may_release(sample) {
                    log::info!("job {}: the guest has become quiet: background again", job.id());
                    live.tracking.set_synchronous(false);
                }
            }
        }
    }

    /// What the user has told the job since.
    fn take_over(&mut self, job: &Job, live: &Live) {
        let told = job.state.lock().pace.clone();
        if told == self.pace {
            return;
        }
        if told.finish_by != self.pace.finish_by {
            self.finish_by = FinishBy::default();
            let left = told.finish_by.map(time_left);
            self.time_limit = left.map_or(0, |left| FinishBy::begin(self.counts.open + unseen(job, live), left));
        }
        let bound = self.guest_first.as_ref().map(|watched| watched.rule.bound());
        if told.guest_first != bound {
            self.guest_first = told.guest_first.map(|bound| Watched {
                rule: GuestFirst::new(bound),
                watch: job.volume.request_times().watch(),
                since: Instant::now(),
                copied: self.counts.copied,
            });
        }
        self.guest_limit = self.guest_first.as_ref().map_or(0, |watched| watched.rule.limit());
        self.limit(job);
        self.pace = told;
    }

    fn time_left(&self) -> Option<Duration> {
        self.pace.finish_by.map(time_left)
    }

    fn show(&self, job: &Job) {
        let forecast = self.finish_by.forecast();
        let guest_p99 = self.guest_first.as_ref().and_then(|watched| watched.rule.p99());
        let next = Steered { in_time: forecast.in_time, ready_in: forecast.ready_in, guest_p99 };
        let before = std::mem::replace(&mut job.state.lock().steered, next);
        if self.pace.finish_by.is_some() && forecast.in_time == Some(false) && before.in_time != Some(false) {
            log::warn!("job {}: will not be ready in time, also at full speed", job.id());
        }
    }
}

impl Watched {
    fn begin(&mut self, copied: u64) {
        (self.since, self.copied) = (Instant::now(), copied);
        self.watch.take();
    }

    fn look(&mut self, copied: u64, blocking: bool) -> u64 {
        let elapsed = self.since.elapsed();
        if GuestFirst::is_enough(self.watch.look(), elapsed) {
            let rate = (copied.saturating_sub(self.copied) as f64 / elapsed.as_secs_f64()) as u64;
            self.rule.look(self.watch.take(), rate, elapsed, blocking);
            (self.since, self.copied) = (Instant::now(), copied);
        }
        self.rule.limit()
    }
}

/// Until a time since the epoch; zero if it has passed.
fn time_left(since_epoch: Duration) -> Duration {
    since_epoch.saturating_sub(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// The lower of two limits, 0 being none.
fn lower(one: u64, other: u64) -> u64 {
    match (one, other) {
        (0, limit) | (limit, 0) => limit,
        (one, other) => one.min(other),
    }
}

/// How much the scan will find yet, if the rest is as full as what it has seen.
fn unseen(job: &Job, live: &Live) -> u64 {
    let size = live.map.size_bytes();
    let (seen, data) = (job.counters.scanned_to.load(SeqCst).min(size), job.counters.scanned_data.load(Relaxed));
    let density = if seen == 0 { 1.0 } else { (data as f64 / seen as f64).min(1.0) };
    ((size - seen) as f64 * density) as u64
}
