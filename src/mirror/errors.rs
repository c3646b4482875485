//! What an error does to a job: the policies of QEMU's `BlockdevOnError`, with back-off where QEMU has none.

use crate::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use super::job::{Job, Verdict};
use super::types::{CopyMode, ErrorAction, ErrorPolicy, IoStatus, JobEvent, Operation};
use crate::error::{Error, ErrorKind};
use crate::sync::Instant;
use crate::volume::tracking::TargetObserver;

/// The first wait under `ignore`; doubles up to [`BACK_OFF_MAX`].
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// Under `ignore` at most this often.
const ERROR_EVENT_EVERY: Duration = Duration::from_millis(500);
/// After an error this many claims are of one granule each, so that what is good around a bad spot still gets copied.
const CAREFUL_CLAIMS: u64 = 64;

impl ErrorPolicy {
    /// What it does about `error`.
    pub fn action(self, error: &Error) -> ErrorAction {
        match self {
            ErrorPolicy::Report => ErrorAction::Report,
            ErrorPolicy::Ignore => ErrorAction::Ignore,
            ErrorPolicy::Stop => ErrorAction::Stop,
            ErrorPolicy::Enospc if error.kind() == ErrorKind::NoSpace => ErrorAction::Stop,
            ErrorPolicy::Enospc => ErrorAction::Report,
        }
    }
}

impl Job {
    /// A copy, or a flush of the target, failed. Its range is dirty again already.
    pub(super) fn copy_failed(&self, operation: Operation, error: Error) {
        self.copy_failed_since(self.counters.resumes.load(SeqCst), operation, error);
    }

    /// As [`Job::copy_failed`], for a copy that began when the job had been resumed `resumes` times. What was under way while
    /// the job was paused and resumed is tried again without a word: whoever resumed it has mended the cause.
    pub(super) fn copy_failed_since(&self, resumes: u64, operation: Operation, error: Error) {
        if self.stopping.load(SeqCst) {
            return;
        }
        self.counters.careful.store(CAREFUL_CLAIMS, Relaxed);
        let policy = match operation {
            Operation::Read => self.options.on_source_error,
            Operation::Write => self.options.on_target_error,
        };
        let action = policy.action(&error);
        let error = self.explain(operation, action, error);
        let mut tell = true;
        {
            let mut state = self.state.lock();
            let outdated = self.counters.resumes.load(SeqCst) != resumes;
            if state.verdict.is_some() || outdated || (state.error_paused && action == ErrorAction::Stop) {
                // Several copiers met the same thing at the same time.
                return;
            }
            let now = Instant::now();
            match action {
                ErrorAction::Report => state.verdict = Some(Verdict::Failed(error.clone())),
                ErrorAction::Stop => {
                    state.error_paused = true;
                    let full = error.kind() == ErrorKind::NoSpace;
                    state.io_status = if full { IoStatus::Nospace } else { IoStatus::Failed };
                }
                ErrorAction::Ignore => {
                    state.failures = (state.failures + 1).min(16);
                    let wait = BACK_OFF_MIN.saturating_mul(1 << (state.failures - 1)).min(BACK_OFF_MAX);
                    state.retry_at = Some(now + wait);
                    tell = state.error_event_at.is_none_or(|at| now - at >= ERROR_EVENT_EVERY);
                }
            }
            if tell {
                state.error_event_at = Some(now);
            }
            state.last_error = Some(error.clone());
            self.hold_copiers(&state);
        }
        if tell {
            log::warn!("job {}: {error}", self.id());
            self.events.emit(&JobEvent::Error { job_id: self.id().to_owned(), operation, action });
        }
        match action {
            // Under `ignore` the supervisor lets the copiers go on when the time has come.
            ErrorAction::Ignore | ErrorAction::Report => self.wake(),
            ErrorAction::Stop => self.show_pause(),
        }
    }

    /// Ends a back-off whose time has come. `Some`: when to look again.
    pub(super) fn end_back_off(&self) -> Option<Instant> {
        {
            let mut state = self.state.lock();
            match state.retry_at {
                Some(at) if at > Instant::now() => return Some(at),
                Some(_) => state.retry_at = None,
                None => return None,
            }
            self.hold_copiers(&state);
        }
        self.wake();
        None
    }

    /// A copy went well: the next error starts with the shortest wait again.
    pub(super) fn copy_went_well(&self) {
        let mut state = self.state.lock();
        if state.retry_at.is_none() {
            state.failures = 0;
        }
    }

    /// Adds what the user can do about it.
    fn explain(&self, operation: Operation, action: ErrorAction, error: Error) -> Error {
        if operation == Operation::Read {
            return error.advise("the source has a bad spot: --on-source-error ignore copies all the rest");
        }
        if error.kind() != ErrorKind::NoSpace {
            return error;
        }
        let info = self.info();
        let missing = info.data_bytes.saturating_sub(info.copied_bytes).max(info.dirty_bytes.min(info.data_bytes));
        let percent = (info.copied_bytes * 100).checked_div(info.data_bytes).unwrap_or(0);
        let text = format!("the target is full at {percent} %, needs up to {} more", human(missing));
        error.advise(match action {
            ErrorAction::Report => format!("{text}: make room, then start the mirror again"),
            ErrorAction::Stop => format!("{text}: make room, then 'livemirror resume'"),
            ErrorAction::Ignore => format!("{text}: make room, and it goes on by itself"),
        })
    }
}

/// A size for messages.
fn human(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

impl TargetObserver for Job {
    fn target_failed(&self, error: &Error) {
        self.copy_failed(Operation::Write, error.clone());
    }

    fn target_stalled(&self) {
        let delay = self.volume.tracking().map_or(Duration::ZERO, |tracking| tracking.max_guest_delay());
        let text = format!("the target kept a guest waiting for {} ms; guests no longer wait for", delay.as_millis());
        let error = Error::new(ErrorKind::Failed, text).on(&self.options.target);
        log::warn!("job {}: {error}", self.id());
        let mut state = self.state.lock();
        state.stalled_at = Some(Instant::now());
        state.last_error = Some(error);
        if state.copy_mode == CopyMode::WriteBlocking {
            log::warn!("job {}: write-blocking is suspended until the target answers again", self.id());
        }
        drop(state);
        self.changed.notify_all();
    }
}
