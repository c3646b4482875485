//! The cutover: one attempt, for one volume or several at one instant.
//!
//! ```text
//! before:   flush the targets; write the new record aside          (guests go on, no hurry)
//!           wait until what remains is predicted to fit the pause
//! barrier:  raise all -> drain -> flush the targets -> ONE rename -> mark the old sources -> switch -> lower all
//! ```
//!
//! The pause runs from the first raising to the last lowering. Every step before the rename can be abandoned: the barrier is
//! lowered, the job goes on copying, the caller tries again. If the rename itself fails, nobody knows which record a restart
//! would find: guests' writes then go to both images until a record is durable (rule 15).

use crate::sync::atomic::Ordering::SeqCst;
use std::cell::Cell;
use std::time::Duration;

pub use super::commit::{CommitFailure, Committer, Ending, PreparedRecord, Switch};
use super::job::{Job, Live, Verdict};
use super::types::{JobStatus, Operation};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, check_in_place};
use crate::sync::{Arc, Instant, Mutex, MutexGuard, thread, wait_until};
use crate::volume::barrier::Raised;

/// The pause that is allowed where nothing else is told.
pub const MAX_PAUSE_DEFAULT: Duration = Duration::from_millis(50);
/// After an attempt that held guests in vain they are left alone for so many times its pause.
const REST_PAUSES: u32 = 10;
/// ... and no longer than this.
const REST_MAX: Duration = Duration::from_secs(2);
/// The flush before the barrier may take this long; a target that hangs must not keep a cancel waiting.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);
/// While undecided, a record is tried this often.
const SETTLE_EVERY: Duration = Duration::from_millis(200);

/// Carries out cutovers, one at a time in a mount.
pub struct Cutovers {
    committer: Arc<dyn Committer>,
    /// Locked by the one that runs; holds when guests may be held again after an attempt in vain.
    running: Mutex<Option<Instant>>,
}

/// How long guest writes waited at a cutover.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pause {
    /// What was expected before they were held, in milliseconds: what was left to copy at the rate seen, and a flush like the last one,
    /// which had more to write.
    pub predicted_ms: f64,
    /// What it was, in milliseconds.
    pub took_ms: f64,
}

/// What one attempt works with, for one volume.
struct Participant {
    job: Arc<Job>,
    live: Live,
}

impl std::fmt::Debug for Cutovers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cutovers").finish_non_exhaustive()
    }
}

impl Cutovers {
    /// Cutovers made durable by `committer`.
    pub fn new(committer: Arc<dyn Committer>) -> Arc<Self> {
        Arc::new(Cutovers { committer, running: Mutex::new(None) })
    }

    /// Keeps every cutover of the mount away while the result lives.
    pub(super) fn exclusive(&self) -> MutexGuard<'_, Option<Instant>> {
        self.running.lock()
    }

    /// Tries to end `jobs` at one instant. Waits up to `patience` for them to come near enough, and lets guest writes wait no
    /// longer than `max_pause`. Returns that pause.
    ///
    /// # Errors
    /// `NotNow`: nothing has changed, another attempt may succeed. Else the switch failed for good; the guests go on.
    pub fn attempt(&self, jobs: &[Arc<Job>], ending: Ending, max_pause: Duration, patience: Duration) -> Result<Pause> {
        let give_up_at = Instant::now() + patience;
        let mut rest_until = self.running.lock();
        let participants = gather(jobs, ending)?;
        wait_until_near(&participants, max_pause, Duration::ZERO, *rest_until, give_up_at)?;
        let flush_took = flush_beforehand(&participants)?;
        // After the flush, which is given up on where the target hangs; this is not.
        participants.iter().try_for_each(|one| check_in_place(&**one.live.target.image()))?;
        let switches: Vec<Switch> = participants.iter().map(Participant::switch).collect();
        let record = self.committer.prepare(&switches, ending)?;
        let drain_takes = wait_until_near(&participants, max_pause, flush_took, *rest_until, give_up_at)?;
        let predicted_ms = (drain_takes + flush_took).as_secs_f64() * 1e3;
        *rest_until = Some(Instant::now() + max_pause.saturating_mul(REST_PAUSES).min(REST_MAX));

        let raised_at = Instant::now();
        let deadline = raised_at + max_pause;
        let barriers = raise_all(&participants, deadline)?;
        drain(&participants, deadline)?;
        let frozen = Frozen::new(&participants);
        let written = write_counts(&participants);
        flush_under_barrier(&participants, deadline)?;
        refuse_unless_proven(&participants, &written)?;
        let failure = match record.commit() {
            Err(CommitFailure::NotDone(error)) => return Err(error),
            Err(CommitFailure::Undecided(error)) if ending == Ending::Copy => {
                for one in &participants {
                    one.live.tracking.set_synchronous(false);
                }
                drop(barriers);
                return Err(self.take_back(&participants, &switches, &frozen, error));
            }
            Err(CommitFailure::Undecided(error)) => Some(error),
            Ok(()) => None,
        };
        frozen.for_good();
        if let Some(error) = failure {
            return self.settle(&participants, &switches, barriers, error, (raised_at, predicted_ms));
        }
        if ending == Ending::Switch {
            self.committer.supersede(&switches);
        }
        for (participant, barrier) in participants.iter().zip(&barriers) {
            match ending {
                Ending::Switch => participant.switch_to_target(barrier),
                Ending::Copy => participant.job.volume.end_tracking(barrier),
            }
        }
        drop(barriers);
        let pause = Pause { predicted_ms, took_ms: raised_at.elapsed().as_secs_f64() * 1e3 };
        if ending == Ending::Switch {
            self.committer.switched(&switches);
        }
        announce(&participants, ending, pause);
        *rest_until = None;
        Ok(pause)
    }

    /// Nobody knows whether the record in place calls the copy finished: the target stays as it is, so that this would be true, until a
    /// record is durable by which the mirror goes on. Guests' changes are marked meanwhile.
    fn take_back(&self, participants: &[Participant], switches: &[Switch], frozen: &Frozen<'_>, error: Error) -> Error {
        log::error!("the copy may be finished or not: {error}; nothing is copied until a record is durable");
        while let Err(error) = self.committer.settle(switches, false) {
            log::error!("the end of the copy is still undecided: {error}");
            if participants.iter().any(|one| one.job.verdict().is_some()) {
                frozen.for_good();
                break;
            }
            thread::sleep(SETTLE_EVERY);
        }
        Error::not_now(error.to_string())
    }

    /// Nobody knows which record is in place: serve from the old image, write both, until a record is durable.
    fn settle(
        &self,
        participants: &[Participant],
        switches: &[Switch],
        barriers: Vec<Raised<'_>>,
        error: Error,
        (raised_at, predicted_ms): (Instant, f64),
    ) -> Result<Pause> {
        log::error!("the cutover is undecided: {error}; guest writes go to both images until a record is durable");
        for (participant, barrier) in participants.iter().zip(&barriers) {
            participant.job.volume.set_tracking(barrier, None);
            let Live { target, map, .. } = &participant.live;
            participant.job.volume.join(barrier, target.clone(), map.clone());
        }
        drop(barriers);
        let pause = Pause { predicted_ms, took_ms: raised_at.elapsed().as_secs_f64() * 1e3 };
        loop {
            thread::sleep(SETTLE_EVERY);
            let Some(barriers) =
                participants.iter().map(|one| one.job.volume.raise_barrier(None)).collect::<Option<Vec<_>>>()
            else {
                continue;
            };
            let mut both = participants.iter().zip(&barriers);
            let whole = both.all(|(one, barrier)| one.job.volume.make_twin_durable(barrier));
            if let Err(error) = self.committer.settle(switches, whole) {
                log::error!("the cutover is still undecided: {error}");
                continue;
            }
            if whole {
                self.committer.supersede(switches);
            }
            for (participant, barrier) in participants.iter().zip(&barriers) {
                if whole {
                    participant.switch_to_target(barrier);
                } else {
                    participant.job.volume.separate(barrier);
                }
            }
            drop(barriers);
            if whole {
                self.committer.switched(switches);
                announce(participants, Ending::Switch, pause);
                return Ok(pause);
            }
            let error = Error::new(ErrorKind::Failed, format!("the cutover failed and was taken back: {error}"));
            for one in participants {
                one.job.state.lock().verdict = Some(Verdict::Failed(error.clone()));
                one.job.wake();
            }
            return Err(error);
        }
    }
}

impl Participant {
    fn new_image(&self) -> Arc<dyn Image> {
        self.live.target.image().clone()
    }

    fn switch(&self) -> Switch {
        Switch {
            volume: self.job.volume.clone(),
            old: self.live.source.clone(),
            new: self.new_image(),
            cache: self.job.options.target_cache,
        }
    }

    fn switch_to_target(&self, barrier: &Raised<'_>) {
        let Live { target, map, .. } = &self.live;
        self.job.volume.switch(barrier, target.clone(), map.clone());
    }

    /// How long the rest of the copy would take at the rate seen so far.
    fn predicted_drain(&self) -> Duration {
        let remaining = self.live.map.dirty_bytes() + self.live.map.in_flight_bytes();
        // Before a rate was seen: what a slow disk does.
        let rate = self.job.clearing_rate().max(50 << 20);
        Duration::from_secs_f64(remaining as f64 / rate as f64)
    }
}

fn gather(jobs: &[Arc<Job>], ending: Ending) -> Result<Vec<Participant>> {
    jobs.iter()
        .map(|job| {
            if ending == Ending::Switch {
                job.check_whole("cut over")?;
            }
            let state = job.state.lock();
            let copying = matches!(state.status, JobStatus::Running | JobStatus::Ready | JobStatus::Pending);
            if let Some(Verdict::Failed(error)) = &state.verdict {
                return Err(error.clone());
            }
            if state.is_paused() || !copying || state.verdict.is_some() {
                let text = format!("the mirror of {} is {}", job.volume.name(), state.status.word());
                return Err(Error::not_now(text).advise("see 'livemirror status'; 'livemirror resume' ends a pause"));
            }
            if !state.scanned {
                return Err(Error::not_now(format!("the mirror of {} has just begun", job.volume.name())));
            }
            drop(state);
            let live = job.live().ok_or_else(|| Error::not_now("the mirror has ended"))?;
            Ok(Participant { job: job.clone(), live })
        })
        .collect()
}

/// Leaves little for the flush under the barrier. Returns how long the slowest took.
fn flush_beforehand(participants: &[Participant]) -> Result<Duration> {
    let start = Instant::now();
    flush_all(participants, start + FLUSH_PATIENCE, "takes very long")?;
    Ok(start.elapsed())
}

/// Nobody has cancelled or paused any of them.
fn still_wanted(participants: &[Participant]) -> Result<()> {
    let unwanted = participants.iter().find(|one| {
        let state = one.job.state.lock();
        state.verdict.is_some() || state.is_paused()
    });
    unwanted.map_or(Ok(()), |one| Err(Error::not_now(format!("the mirror of {} was stopped", one.job.volume.name()))))
}

/// Returns how long the rest is predicted to take.
fn wait_until_near(
    participants: &[Participant],
    max_pause: Duration,
    flush_took: Duration,
    rest_until: Option<Instant>,
    give_up_at: Instant,
) -> Result<Duration> {
    // The flush under the barrier has little left to write; the one before it is the upper bound of what it takes.
    let budget = max_pause.saturating_sub(flush_took.min(max_pause / 2)) / 2;
    loop {
        still_wanted(participants)?;
        let predicted = participants.iter().map(Participant::predicted_drain).sum::<Duration>();
        let rested = rest_until.is_none_or(|until| until <= Instant::now());
        if predicted <= budget && rested {
            return Ok(predicted);
        }
        if Instant::now() >= give_up_at {
            let dirty: u64 = participants.iter().map(|one| one.live.map.dirty_bytes()).sum();
            let text =
                format!("not ready: {dirty} bytes are still dirty, a pause of about {} ms", predicted.as_millis());
            return Err(Error::not_now(text).advise("wait, or allow a longer --max-pause"));
        }
        let job = &participants[0].job;
        let mut state = job.state.lock();
        wait_until(&job.changed, &mut state, Some(Instant::now() + Duration::from_millis(5)));
    }
}

fn raise_all(participants: &[Participant], deadline: Instant) -> Result<Vec<Raised<'_>>> {
    participants
        .iter()
        .map(|one| {
            one.job.volume.raise_barrier(Some(deadline)).ok_or_else(|| {
                Error::not_now(format!(
                    "guest writes under way on {} took longer than the pause",
                    one.job.volume.name()
                ))
            })
        })
        .collect()
}

/// Lifts the speed limit for as long as it lives.
struct Hurry<'a>(&'a [Participant]);

impl<'a> Hurry<'a> {
    fn new(participants: &'a [Participant]) -> Self {
        participants.iter().for_each(|one| one.job.pacer.bypass(true));
        Hurry(participants)
    }
}

impl Drop for Hurry<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|one| one.job.pacer.bypass(false));
    }
}

fn drain(participants: &[Participant], deadline: Instant) -> Result<()> {
    let _hurry = Hurry::new(participants);
    for one in participants {
        one.job.wake();
        while !one.live.map.is_in_sync() {
            still_wanted(participants)?;
            if Instant::now() >= deadline {
                let text = format!("what remained of {} took longer than the pause", one.job.volume.name());
                return Err(Error::not_now(text).advise("it is tried again; --max-pause allows a longer one"));
            }
            let mut state = one.job.state.lock();
            if !one.live.map.is_in_sync() {
                let soon = Instant::now() + Duration::from_millis(1);
                wait_until(&one.job.changed, &mut state, Some(soon.min(deadline)));
            }
        }
    }
    Ok(())
}

fn flush_under_barrier(participants: &[Participant], deadline: Instant) -> Result<()> {
    flush_all(participants, deadline, "took longer than the pause")?;
    if Instant::now() >= deadline {
        return Err(Error::not_now("flushing the target took longer than the pause"));
    }
    Ok(())
}

/// All at once: the time it takes is that of the slowest.
fn flush_all(participants: &[Participant], deadline: Instant, late: &str) -> Result<()> {
    let tickets: Vec<_> = participants.iter().map(|one| (one, one.live.tracking.queue().submit_flush())).collect();
    for (one, ticket) in tickets {
        let name = one.job.volume.name();
        match ticket.and_then(|ticket| ticket.wait(Some(deadline))) {
            Some((Ok(()), _)) => (),
            Some((Err(error), _)) => {
                one.job.copy_failed(Operation::Write, error);
                return Err(Error::not_now(format!("the target of {name} cannot be flushed")));
            }
            None => {
                let error = Error::not_now(format!("flushing the target of {name} {late}"));
                return Err(error.advise("it is tried again; --max-pause allows a longer pause"));
            }
        }
    }
    Ok(())
}

/// Keeps copiers from taking claims while it lives. What is marked after a switch (by a guest's flush of the target that fails late)
/// must never be copied: the source is old by then.
struct Frozen<'a> {
    participants: &'a [Participant],
    for_good: Cell<bool>,
}

impl<'a> Frozen<'a> {
    fn new(participants: &'a [Participant]) -> Self {
        participants.iter().for_each(|one| one.job.frozen.store(true, SeqCst));
        Frozen { participants, for_good: Cell::new(false) }
    }

    fn for_good(&self) {
        self.for_good.set(true);
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if !self.for_good.get() {
            for one in self.participants {
                one.job.frozen.store(false, SeqCst);
                one.job.wake();
            }
        }
    }
}

fn write_counts(participants: &[Participant]) -> Vec<u64> {
    participants.iter().map(|one| one.live.target.write_count()).collect()
}

/// A guest's flush of the target may have failed beside ours, which then proves nothing: what it covered is dirty again, or was
/// even copied again while our flush ran. And a job that has failed or was cancelled meanwhile is not switched.
fn refuse_unless_proven(participants: &[Participant], written: &[u64]) -> Result<()> {
    still_wanted(participants)?;
    let unproven =
        |(one, before): &(&Participant, &u64)| !one.live.map.is_in_sync() || one.live.target.write_count() != **before;
    match participants.iter().zip(written).find(unproven).map(|(one, _)| one) {
        Some(one) => Err(Error::not_now(format!("a flush of the target of {} has failed", one.job.volume.name()))),
        None => Ok(()),
    }
}

fn announce(participants: &[Participant], ending: Ending, pause: Pause) {
    for one in participants {
        {
            let mut state = one.job.state.lock();
            state.ready = true;
            state.verdict = Some(match ending {
                Ending::Switch => Verdict::Switched { pause },
                Ending::Copy => Verdict::Finished,
            });
        }
        one.job.wake();
    }
}
