//! The end of a job: threads, tracking, images, the target that nobody wants, and the events in QEMU's order.

use crate::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::info::describe;
use super::job::{Job, Live, Verdict};
use super::types::{JobEvent, JobStatus, LastMirror, MirrorResult, SyncMode};
use crate::image::Image;
use crate::sync::{Arc, Instant, SystemTime, thread, wait_until};

/// How long the end of a job waits for its copiers and for what guests gave up on. A request that hangs in the target's store is left
/// behind: it keeps its range, its buffer and the target's lock until it returns (rule 14).
const PATIENCE: Duration = Duration::from_secs(3);

/// How long guests may be held while one of their writes does not return.
const BARRIER_PATIENCE: Duration = Duration::from_secs(1);

pub(super) fn conclude(job: &Arc<Job>, live: Live, verdict: Verdict) {
    let good = matches!(verdict, Verdict::Finished | Verdict::Switched { .. });
    walk_to(job, if good { JobStatus::Pending } else { JobStatus::Aborting });
    job.stopping.store(true, SeqCst);
    job.wake();
    let deadline = Instant::now() + PATIENCE;
    let hung = wait_for_threads(job, deadline);
    if hung > 0 && !good {
        // A network image ends them now; others cannot, and then they keep what they have until they return (rule 14).
        live.target.image().give_up();
    }
    if let Some(intent) = &job.intent {
        intent.detach();
    }
    let suspended = matches!(verdict, Verdict::Suspended);
    if !good {
        if !suspended {
            // Durably, before the first change that nobody tracks (rule 11).
            job.observer.unpairing(job);
        }
        // Guests' writes stop going through this job before its images are released.
        // One that is stuck in the source must not hold all the others for ever: they go on between two attempts.
        loop {
            if let Some(raised) = job.volume.raise_barrier(Some(Instant::now() + BARRIER_PATIENCE)) {
                match suspended {
                    // What guests may still change is marked durably.
                    true => job.volume.set_tracking(&raised, None),
                    false => job.volume.end_tracking(&raised),
                }
                break;
            }
            thread::sleep(BARRIER_PATIENCE);
        }
    }
    let queue = live.tracking.queue();
    queue.close();
    // What guests gave up on is under way there.
    let given_up = queue.wait_returned(deadline);
    if given_up > 0 && !good {
        live.target.image().give_up();
    }
    if given_up == 0 {
        job.volume.part_from(&live.target);
    }
    let hung = hung + given_up;
    job.hung.store(hung > 0, SeqCst);
    let info = job.picture(&live);
    let progress = job.progress();
    let target = live.target.image().clone();
    let outcome = outcome(job, &verdict);
    let error = outcome.error.clone();
    job.state.lock().epitaph = Some((info, outcome.clone()));
    drop(live);
    *job.live.lock() = None;
    if hung > 0 {
        let text = "have not returned; the image stays locked until they have";
        log::error!("job {}: {hung} requests on {} {text}", job.id(), target.name());
    }
    if matches!(verdict, Verdict::Cancelled { keep: false }) && job.created_target && remove(&*target) {
        job.sharing.target_is_gone();
    }
    if hung == 0 && !matches!(verdict, Verdict::Switched { .. }) {
        // Before anybody is told that it ended: who looks at the target then finds it as it stays.
        if let Err(error) = target.settle() {
            log::warn!("job {}: {error}", job.id());
        }
    }
    drop(target);

    if !suspended {
        job.observer.ended(job, &outcome);
    }
    match verdict {
        Verdict::Suspended => (),
        Verdict::Cancelled { .. } => job.events.emit(&JobEvent::Cancelled(progress)),
        _ => job.events.emit(&JobEvent::Completed(progress, error)),
    }
    job.transition(JobStatus::Concluded);
    if let (Some(intent), false) = (&job.intent, suspended) {
        intent.close();
    }
    if job.options.auto_dismiss {
        job.transition(JobStatus::Null);
        job.observer.gone(job);
    }
}

/// Passes through all the states that QEMU's jobs pass through: `waiting` before `pending`, and out of a pause before either.
fn walk_to(job: &Job, last: JobStatus) {
    loop {
        let status = job.status();
        let next = match status {
            JobStatus::Standby => JobStatus::Ready,
            JobStatus::Paused => JobStatus::Running,
            _ if status.may_become(last) => last,
            JobStatus::Running | JobStatus::Ready => JobStatus::Waiting,
            _ => return,
        };
        job.transition_from(status, next);
    }
}

/// Waits for scanner and copiers, within bounds; returns how many are left.
fn wait_for_threads(job: &Job, deadline: Instant) -> usize {
    let mut state = job.state.lock();
    while state.threads > 0 && wait_until(&job.changed, &mut state, Some(deadline)) {}
    state.threads
}

/// Removes the file that was made for the job, if that is still what its path names. True: it is gone.
fn remove(target: &dyn Image) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Some(path), Ok(identity)) = (target.path(), target.identity()) else { return false };
    let same = std::fs::symlink_metadata(&path)
        .is_ok_and(|found| (found.dev(), found.ino()) == (identity.device, identity.inode));
    if !same {
        return false;
    }
    let removed = std::fs::remove_file(&path);
    if let Err(error) = &removed {
        log::warn!("cannot remove {}: {error}", path.display());
    }
    removed.is_ok()
}

fn outcome(job: &Job, verdict: &Verdict) -> LastMirror {
    let (result, consistent, error, pause) = match verdict {
        Verdict::Cancelled { .. } => (MirrorResult::Cancelled, false, None, None),
        Verdict::Failed(error) => (MirrorResult::Failed, false, Some(describe(error)), None),
        Verdict::Finished => (MirrorResult::Finished, job.options.sync != SyncMode::None, None, None),
        Verdict::Switched { pause } => (MirrorResult::Completed, true, None, Some(*pause)),
        // Nobody hears of it: it is no end.
        Verdict::Suspended => (MirrorResult::Cancelled, false, None, None),
    };
    LastMirror {
        target: job.options.target.clone(),
        result,
        consistent,
        error,
        pause_ms: pause.map(|pause| pause.took_ms),
        predicted_pause_ms: pause.map(|pause| pause.predicted_ms),
        ended: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
    }
}
