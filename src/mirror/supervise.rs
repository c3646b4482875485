//! The supervisor: one thread a job that turns what happened into states, and sleeps when nothing does.

use crate::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::cutover::{Ending, MAX_PAUSE_DEFAULT};
use super::job::{Job, Live, Verdict, Wish};
use super::steer::{self, Steer};
use super::types::{CopyMode, JobEvent, JobStatus, Operation};
use super::{clearing, copy, end, scan};
use crate::range::ByteRange;
use crate::sync::{Arc, Instant, thread, wait_until};
use crate::volume::target_queue::Ticket;

/// How often a job that has work looks at itself.
const TICK: Duration = Duration::from_millis(50);
/// How long guests may be held to look whether both images are equal.
const MOMENT: Duration = Duration::from_millis(50);

/// Runs a job from its start to its end.
pub(super) fn run(job: &Arc<Job>, live: Live, parts: Vec<ByteRange>) {
    clearing::attach(job, &live);
    let copiers = (job.options.buffer_bytes / copy::PIECE_BYTES).clamp(1, 4);
    start_thread(job, "scan", {
        let (job, live) = (job.clone(), live.clone());
        move || scan::scan(&job, &live, &parts)
    });
    for _ in 0..copiers {
        start_thread(job, "copy", {
            let (job, live) = (job.clone(), live.clone());
            move || copy::run(&job, &live)
        });
    }
    supervise(job, &live);
    // A cutover under way on another thread ends first: its verdict replaces the one that was seen.
    // None begins after it: a job with a verdict takes part in no cutover.
    drop(job.cutovers.exclusive());
    if let Some(verdict) = job.verdict() {
        end::conclude(job, live, verdict);
    }
}

fn start_thread(job: &Arc<Job>, name: &str, body: impl FnOnce() + Send + 'static) {
    job.state.lock().threads += 1;
    let counted = job.clone();
    let started = thread::Builder::new().name(name.into()).spawn(move || {
        body();
        counted.state.lock().threads -= 1;
        counted.notify();
    });
    if let Err(error) = started {
        let mut state = job.state.lock();
        state.threads -= 1;
        let error = crate::error::Error::io("cannot start a thread for the mirror", &error);
        state.verdict.get_or_insert(Verdict::Failed(error));
    }
}

/// Returns once there is a verdict.
fn supervise(job: &Arc<Job>, live: &Live) {
    let mut steer = Steer::new(job, live);
    let mut flush = None;
    loop {
        if job.verdict().is_some() {
            return;
        }
        let retry_at = job.end_back_off();
        if becomes_ready(job, live, &mut flush) {
            steer.arrived(job);
            continue;
        }
        if fulfil_wish(job) {
            continue;
        }
        steer.look(job, live);
        sleep(job, live, retry_at);
    }
}

/// Ready: a flush of the target that began while nothing was dirty or in flight has succeeded. The flush runs on the target's
/// queue: a target that hangs in it keeps the job from being ready, not from being cancelled.
fn becomes_ready(job: &Job, live: &Live, flush: &mut Option<Ticket>) -> bool {
    {
        let state = job.state.lock();
        if state.ready || !state.scanned || state.status != JobStatus::Running {
            return false;
        }
    }
    if flush.is_none() {
        if !is_in_sync_for_a_moment(job, live) {
            return false;
        }
        *flush = live.tracking.queue().submit_flush();
    }
    let Some(ticket) = flush.as_ref() else { return false };
    let Some((result, _)) = ticket.wait(Some(Instant::now() + TICK)) else { return false };
    *flush = None;
    if let Err(error) = result {
        job.copy_failed(Operation::Write, error);
        return true;
    }
    job.copy_went_well();
    // A verb may have come in between; then the next look decides.
    if job.verdict().is_some() || !job.transition_from(JobStatus::Running, JobStatus::Ready) {
        return true;
    }
    job.events.emit(&JobEvent::Ready(job.progress()));
    // A pause that came in between.
    job.show_pause();
    true
}

/// A short barrier makes the moment in which both images are seen to be equal: outside of it a guest's write may be on the
/// source and not marked yet, and under steady synchronous writes something is always in flight. What a guest gave up on stays in
/// flight and is not waited for.
fn is_in_sync_for_a_moment(job: &Job, live: &Live) -> bool {
    if live.map.dirty_granules() > 0 || (!live.tracking.is_synchronous() && !live.map.is_in_sync()) {
        return false;
    }
    let raised = job.volume.raise_barrier(Some(Instant::now() + MOMENT));
    raised.is_some() && live.map.is_in_sync()
}

/// Acts on what the user wants. True: something was done, look again.
fn fulfil_wish(job: &Arc<Job>) -> bool {
    let (wish, status, paused) = {
        let state = job.state.lock();
        (state.wish, state.status, state.is_paused())
    };
    let ending = match wish {
        Wish::None => return false,
        Wish::Finish => Ending::Copy,
        Wish::Complete if job.options.auto_finalize => Ending::Switch,
        Wish::Complete => {
            if job.transition_from(JobStatus::Ready, JobStatus::Waiting) {
                // Guests are not held meanwhile: the switch comes with `finalize`.
                job.transition(JobStatus::Pending);
                job.events.emit(&JobEvent::Pending { job_id: job.id().to_owned() });
            }
            return false;
        }
        Wish::Finalize => Ending::Switch,
    };
    if status == JobStatus::Standby && paused {
        // Told to complete while paused: the user's pause ends, an error's does not.
        let stopped_by_error = job.state.lock().error_paused;
        if stopped_by_error || job.resume().is_err() {
            return false;
        }
    }
    let attempt = job.cutovers.attempt(std::slice::from_ref(job), ending, MAX_PAUSE_DEFAULT, TICK);
    match attempt {
        Ok(_) => true,
        Err(error) if error.kind() == crate::error::ErrorKind::NotNow => {
            log::debug!("job {}: {error}", job.id());
            false
        }
        Err(error) => {
            job.state.lock().verdict.get_or_insert(Verdict::Failed(error));
            true
        }
    }
}

/// Sleeps for a tick while there is work, else until somebody has some.
fn sleep(job: &Job, live: &Live, retry_at: Option<Instant>) {
    let mut state = job.state.lock();
    if state.verdict.is_some() {
        return;
    }
    let rests = state.stalled_at.is_some_and(|at| at.elapsed() < steer::REST) && !live.tracking.is_synchronous();
    let watches = state.copy_mode == CopyMode::Auto && live.tracking.is_synchronous();
    let unblocked = state.copy_mode == CopyMode::WriteBlocking && !live.tracking.is_synchronous();
    let copies = !state.is_paused() && (!state.ready || !live.map.is_in_sync());
    let wishes = matches!(state.wish, Wish::Finish | Wish::Finalize)
        || (state.wish == Wish::Complete && job.options.auto_finalize);
    let until = if copies || watches || rests || unblocked || wishes { Some(Instant::now() + TICK) } else { retry_at };
    if until.is_none() {
        job.supervisor_idle.store(true, SeqCst);
        // A copier that claimed before it could see the flag: nothing was in sync, so look again soon.
        if !state.is_paused() && !live.map.is_in_sync() {
            job.supervisor_idle.store(false, SeqCst);
            return;
        }
    }
    wait_until(&job.changed, &mut state, until);
    job.supervisor_idle.store(false, SeqCst);
}
