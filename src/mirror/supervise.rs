//! The supervisor: one thread a job that turns what happened into states, and sleeps when nothing does.

use crate::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use super::cutover::{Ending, MAX_PAUSE_DEFAULT};
use super::job::{Job, Live, Verdict, Wish};
use super::types::{CopyMode, JobEvent, JobStatus, Operation};
use super::{clearing, copy, end, scan};
use crate::range::ByteRange;
use crate::sync::{Arc, Instant, thread, wait_until};
use crate::volume::target_queue::Ticket;

/// How often a job that has work looks at itself.
const TICK: Duration = Duration::from_millis(50);
/// How long the dirty count is watched before `auto` decides that it no longer falls.
const WINDOW: Duration = Duration::from_millis(500);
/// How long guests must have been quiet before `auto` lets them off waiting for the target.
const QUIET: Duration = Duration::from_secs(2);
/// After a guest gave up on the target, guests do not wait for it this long.
const STALL_REST: Duration = Duration::from_secs(10);

/// How long guests may be held to look whether both images are equal.
const MOMENT: Duration = Duration::from_millis(50);

/// What `auto` remembers between two looks.
#[derive(Debug)]
struct Convergence {
    window: Instant,
    dirty_then: u64,
    quiet_since: Instant,
    traffic_then: u64,
}

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
    let mut convergence =
        Convergence { window: Instant::now(), dirty_then: u64::MAX, quiet_since: Instant::now(), traffic_then: 0 };
    let mut flush = None;
    loop {
        if job.verdict().is_some() {
            return;
        }
        let retry_at = job.end_back_off();
        if becomes_ready(job, live, &mut flush) {
            continue;
        }
        if fulfil_wish(job) {
            continue;
        }
        converge(job, live, &mut convergence);
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

/// The simplest `auto`: background, write-blocking once a full pass is done and the dirty count no longer falls, and back
/// when guests have become quiet. Also ends the rest that a stalled target was given.
fn converge(job: &Job, live: &Live, memory: &mut Convergence) {
    if job.frozen.load(SeqCst) {
        // Whether guests' writes go to the target now is the cutover's to say.
        return;
    }
    let (mode, scanned, rested) = {
        let state = job.state.lock();
        let rested = state.stalled_at.is_none_or(|at| at.elapsed() >= STALL_REST);
        (state.copy_mode, state.scanned, rested)
    };
    let synchronous = live.tracking.is_synchronous();
    match mode {
        CopyMode::Background => (),
        CopyMode::WriteBlocking => {
            if !synchronous && rested {
                live.tracking.set_synchronous(true);
            }
        }
        CopyMode::Auto if !synchronous => {
            if memory.window.elapsed() < WINDOW {
                return;
            }
            let dirty = live.map.dirty_bytes();
            let falls = dirty < memory.dirty_then / 10 * 9;
            let full_pass = scanned && job.counters.passes.load(Relaxed) > 0;
            if full_pass && dirty > 0 && !falls && rested && !job.must_yield() {
                log::info!("job {}: the copy does not gain on the guest: write-blocking from now on", job.id());
                live.tracking.set_synchronous(true);
                memory.quiet_since = Instant::now();
            }
            memory.dirty_then = dirty;
            memory.window = Instant::now();
        }
        CopyMode::Auto => {
            let (dirtied, synced) = live.tracking.traffic();
            let traffic = dirtied + synced;
            if traffic != memory.traffic_then || live.map.dirty_bytes() > 0 {
                memory.traffic_then = traffic;
                memory.quiet_since = Instant::now();
            }
            if memory.quiet_since.elapsed() >= QUIET {
                log::info!("job {}: the guest is quiet: background again", job.id());
                live.tracking.set_synchronous(false);
                memory.dirty_then = u64::MAX;
                memory.window = Instant::now();
            }
        }
    }
}

/// Sleeps for a tick while there is work, else until somebody has some.
fn sleep(job: &Job, live: &Live, retry_at: Option<Instant>) {
    let mut state = job.state.lock();
    if state.verdict.is_some() {
        return;
    }
    let rests = state.stalled_at.is_some_and(|at| at.elapsed() < STALL_REST) && !live.tracking.is_synchronous();
    let watches = state.copy_mode == CopyMode::Auto && live.tracking.is_synchronous();
    let copies = !state.is_paused() && (!state.ready || !live.map.is_in_sync());
    let wishes = matches!(state.wish, Wish::Finish | Wish::Finalize)
        || (state.wish == Wish::Complete && job.options.auto_finalize);
    let until = if copies || watches || rests || wishes { Some(Instant::now() + TICK) } else { retry_at };
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
