//! The verbs of a job: what users may tell it, and when.

use crate::sync::atomic::Ordering::SeqCst;

use super::job::{Job, State, Verdict, Wish};
use super::states::check_verb;
use super::steer::Steered;
use super::types::{CancelMode, CopyMode, IoStatus, JobStatus, JobVerb, LastMirror, Pace};
use crate::error::{Error, ErrorKind, Result};

impl Job {
    fn check(&self, verb: JobVerb) -> Result<()> {
        check_verb(self.id(), self.status(), verb)
    }

    /// Pauses at the user's wish: no new claims; tracking goes on.
    ///
    /// # Errors
    /// Not allowed now, or paused already.
    pub fn pause(&self) -> Result<()> {
        self.check(JobVerb::Pause)?;
        {
            let mut state = self.state.lock();
            if state.user_paused {
                return Err(Error::not_now("Job is already paused"));
            }
            state.user_paused = true;
            state.steered = Steered::default();
            self.hold_copiers(&state);
        }
        self.show_pause();
        Ok(())
    }

    /// Ends the user's pause and an error's.
    ///
    /// # Errors
    /// Not allowed now, or not paused.
    pub fn resume(&self) -> Result<()> {
        self.check(JobVerb::Resume)?;
        {
            let mut state = self.state.lock();
            if !state.user_paused && !state.error_paused {
                return Err(Error::not_now("Can't resume a job that was not paused"));
            }
            state.user_paused = false;
            state.error_paused = false;
            state.io_status = IoStatus::Ok;
            state.retry_at = None;
            state.failures = 0;
            self.counters.resumes.fetch_add(1, SeqCst);
            self.hold_copiers(&state);
        }
        self.show_pause();
        Ok(())
    }

    /// Copiers hold while the job is paused or backs off. Called with the state's lock, by whoever changed what it looks at.
    pub(super) fn hold_copiers(&self, state: &State) {
        self.holding.store(state.is_paused() || state.retry_at.is_some(), SeqCst);
    }

    /// Brings the status in line with the pause flags.
    pub(super) fn show_pause(&self) {
        loop {
            let (paused, status) = {
                let state = self.state.lock();
                if state.verdict.is_some() {
                    break;
                }
                (state.is_paused(), state.status)
            };
            let next = match (paused, status) {
                (true, JobStatus::Running) => JobStatus::Paused,
                (true, JobStatus::Ready) => JobStatus::Standby,
                (false, JobStatus::Paused) => JobStatus::Running,
                (false, JobStatus::Standby) => JobStatus::Ready,
                _ => break,
            };
            // And look again: another verb may have come in between.
            self.transition_from(status, next);
        }
        self.wake();
    }

    /// Ends the job without a switch; acted on by the supervisor.
    ///
    /// # Errors
    /// Not allowed now; a soft cancel of a paused job, as QEMU refuses it.
    pub fn cancel(&self, mode: CancelMode, keep: bool) -> Result<()> {
        self.check(JobVerb::Cancel)?;
        {
            let mut state = self.state.lock();
            let soft = mode == CancelMode::Soft && state.ready;
            if mode == CancelMode::Soft && (state.user_paused || state.error_paused) {
                let text = format!("The block job for device '{}' is currently paused", self.id());
                return Err(Error::not_now(text));
            }
            if soft {
                state.wish = Wish::Finish;
            } else if state.verdict.is_none() {
                state.verdict = Some(Verdict::Cancelled { keep });
            }
        }
        self.wake();
        Ok(())
    }

    /// Leaves the job for the next mount to go on with; acted on by the supervisor.
    pub fn suspend(&self) {
        self.state.lock().verdict.get_or_insert(Verdict::Suspended);
        self.wake();
    }

    /// Tells a ready job to cut over; acted on by the supervisor.
    ///
    /// # Errors
    /// Not ready, or told to finish before.
    pub fn complete(&self) -> Result<()> {
        self.check(JobVerb::Complete)?;
        self.check_whole("cut over")?;
        {
            let mut state = self.state.lock();
            if state.wish == Wish::Finish {
                let text = format!("The active block job '{}' cannot be completed", self.id());
                return Err(Error::not_now(text));
            }
            state.wish = Wish::Complete;
        }
        self.wake();
        Ok(())
    }

    /// Lets a pending job conclude; returns when it has.
    ///
    /// # Errors
    /// Not pending; what ended the job.
    pub fn finalize(&self) -> Result<()> {
        self.check(JobVerb::Finalize)?;
        let mut state = self.state.lock();
        state.wish = Wish::Finalize;
        self.changed.notify_all();
        while !matches!(state.status, JobStatus::Concluded | JobStatus::Null) {
            self.changed.wait(&mut state);
        }
        match &state.epitaph {
            Some((_, LastMirror { error: Some(error), .. })) => Err(Error::new(ErrorKind::Failed, error.clone())),
            _ => Ok(()),
        }
    }

    /// Forgets a concluded job.
    ///
    /// # Errors
    /// Not concluded.
    pub fn dismiss(&self) -> Result<()> {
        self.check(JobVerb::Dismiss)?;
        self.transition(JobStatus::Null);
        self.observer.gone(self);
        Ok(())
    }

    /// Changes the speed limit, bytes per second, 0 = none.
    ///
    /// # Errors
    /// Not allowed now.
    pub fn set_speed(&self, bytes_per_second: u64) -> Result<()> {
        self.check(JobVerb::SetSpeed)?;
        self.pacer.set_speed(bytes_per_second);
        Ok(())
    }

    /// Changes what the pace follows; acted on by the supervisor.
    ///
    /// # Errors
    /// Not allowed now.
    pub fn change_pace(&self, change: impl FnOnce(&mut Pace)) -> Result<()> {
        self.check(JobVerb::SetSpeed)?;
        {
            let mut state = self.state.lock();
            change(&mut state.pace);
            state.steered = Steered::default();
        }
        self.wake();
        Ok(())
    }

    /// Changes the copy mode, both ways.
    ///
    /// # Errors
    /// Not allowed now.
    pub fn set_copy_mode(&self, mode: CopyMode) -> Result<()> {
        self.check(JobVerb::Change)?;
        self.state.lock().copy_mode = mode;
        if let Some(live) = self.live() {
            live.tracking.set_synchronous(mode == CopyMode::WriteBlocking);
        }
        self.wake();
        Ok(())
    }
}
