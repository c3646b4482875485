//! One mirror job: its parts, its state, and the verbs that change it.
//!
//! Threads of a job: the *supervisor* (states, ready, convergence, the end), one *scanner* (which extents hold data), and
//! some *copiers*. They share this object; nothing else in the crate waits for them.
//!
//! Lock order: `live` and `state` are leaves, never held while an image, the barrier or a listener is called; events are emitted
//! by whoever changed the state, in order, through `Job::transition`.

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::fmt;

use super::cutover::{Cutovers, Pause};
use super::events::EventHub;
use super::pace::{Pacer, RateMeter};
use super::share::Sharing;
use super::start::Resumed;
use super::steer::Steered;
use super::types::{CopyMode, IoStatus, JobEvent, JobInfo, JobProgress, JobStatus, LastMirror, MirrorOptions, Pace};
use crate::dirty::{DirtyMap, IntentLog};
use crate::error::Error;
use crate::image::Image;
use crate::sync::{Arc, Condvar, Instant, Mutex};
use crate::volume::Volume;
use crate::volume::target::Target;
use crate::volume::tracking::Tracking;

/// A mirror job. See the module.
pub struct Job {
    pub(super) options: MirrorOptions,
    pub(super) volume: Arc<Volume>,
    pub(super) events: Arc<EventHub>,
    pub(super) cutovers: Arc<Cutovers>,
    pub(super) observer: Arc<dyn JobObserver>,
    /// So many layers of the source lie above what it and the target have as their base; 0: nothing is left out.
    pub(super) layers: u32,
    /// The target was made for this job: a cancel removes it.
    pub(super) created_target: bool,
    /// ... and is all holes but for what this job has written.
    pub(super) fresh_target: bool,
    /// What the target holds is not known: it is read, and only what differs is written.
    pub(super) comparing: bool,
    /// The durable shadow of the dirty map, where the job can be resumed.
    pub(super) intent: Option<Arc<IntentLog>>,
    pub(super) pacer: Pacer,
    pub(super) sharing: Sharing,
    pub(super) counters: Counters,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    /// The images, while the job uses them. Taken out at its end, so that their locks are released.
    pub(super) live: Mutex<Option<Live>>,
    /// It ended while requests of its own had not returned.
    pub(super) hung: AtomicBool,
    /// Scanner and copiers end.
    pub(super) stopping: AtomicBool,
    /// Copiers take no new claims: paused, or backing off after an error.
    pub(super) holding: AtomicBool,
    /// Copiers take no new claims: a cutover is being committed, or was.
    pub(super) frozen: AtomicBool,
    /// The supervisor sleeps until something changes; copiers wake it when guests write again.
    pub(super) supervisor_idle: AtomicBool,
}

/// What a job works with while it lives.
#[derive(Clone, Debug)]
pub(super) struct Live {
    pub(super) source: Arc<dyn Image>,
    pub(super) target: Arc<Target>,
    pub(super) tracking: Arc<Tracking>,
    pub(super) map: Arc<DirtyMap>,
}

/// Hears when a job has ended and when it is forgotten. Called without locks held.
pub trait JobObserver: Send + Sync {
    /// The job ends without a switch: the pairing of its images must be gone, durably, when this returns (rule 11). Guests' changes are
    /// still tracked.
    fn unpairing(&self, _job: &Job) {}
    /// The job has ended with this outcome; its images are released. Called before the event `concluded`.
    fn ended(&self, job: &Job, outcome: &LastMirror);
    /// The job went from `concluded` to `null`.
    fn gone(&self, job: &Job);
}

/// Bytes, except where a name says otherwise.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) scanned_data: AtomicU64,
    /// Everything before it has been scanned: what is not dirty there does not differ.
    pub(super) scanned_to: AtomicU64,
    pub(super) copied: AtomicU64,
    /// Of the granules of claims that went well, however little of them was copied.
    pub(super) cleared: AtomicU64,
    pub(super) zeroed: AtomicU64,
    pub(super) discarded: AtomicU64,
    pub(super) skipped: AtomicU64,
    /// Where the next claim is looked for, a granule's number.
    pub(super) cursor: AtomicU64,
    /// How often the cursor came round since the scan was done.
    pub(super) passes: AtomicU64,
    /// How often a pause was ended.
    pub(super) resumes: AtomicU64,
    /// Claims of one granule are taken until this counts down to 0: a bad spot is being isolated.
    pub(super) careful: AtomicU64,
}

/// What changes under the job's lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) status: JobStatus,
    pub(super) user_paused: bool,
    pub(super) error_paused: bool,
    pub(super) io_status: IoStatus,
    pub(super) copy_mode: CopyMode,
    pub(super) pace: Pace,
    pub(super) steered: Steered,
    pub(super) scanned: bool,
    pub(super) ready: bool,
    pub(super) wish: Wish,
    pub(super) verdict: Option<Verdict>,
    pub(super) last_error: Option<Error>,
    /// Errors in a row under `ignore`, and until when copiers wait for it.
    pub(super) failures: u32,
    pub(super) retry_at: Option<Instant>,
    pub(super) error_event_at: Option<Instant>,
    /// A guest gave up waiting for the target then.
    pub(super) stalled_at: Option<Instant>,
    pub(super) drain: RateMeter,
    /// How fast granules become clean.
    pub(super) clearing: RateMeter,
    pub(super) dirtying: RateMeter,
    /// Scanner and copiers that have not ended.
    pub(super) threads: usize,
    /// The last picture, once the images are released.
    pub(super) epitaph: Option<(JobInfo, LastMirror)>,
}

/// What the user wants beyond copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Copy on.
    None,
    /// End with a consistent copy.
    Finish,
    /// Cut over.
    Complete,
    /// A pending job may conclude.
    Finalize,
}

/// How the job ends. Set once; the supervisor acts on it.
#[derive(Clone, Debug)]
pub(super) enum Verdict {
    /// Given up; the target is kept or removed.
    Cancelled { keep: bool },
    /// An error.
    Failed(Error),
    /// A consistent copy.
    Finished,
    /// The target is the disk now.
    Switched { pause: Pause },
    /// The mount ends; the next one goes on with the job.
    Suspended,
}

impl From<Resumed> for Counters {
    fn from(resumed: Resumed) -> Self {
        Counters {
            // What was copied was data; what is marked comes on top of it.
            scanned_data: resumed.copied.into(),
            copied: resumed.copied.into(),
            zeroed: resumed.zeroed.into(),
            discarded: resumed.discarded.into(),
            skipped: resumed.skipped.into(),
            ..Counters::default()
        }
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("id", &self.options.job_id).finish_non_exhaustive()
    }
}

impl Job {
    /// The job's id.
    pub fn id(&self) -> &str {
        &self.options.job_id
    }

    /// True if it leaves by itself when it has ended, see [`MirrorOptions::auto_dismiss`].
    pub fn dismisses_itself(&self) -> bool {
        self.options.auto_dismiss
    }

    /// The volume that it mirrors.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Where it stands.
    pub fn status(&self) -> JobStatus {
        self.state.lock().status
    }

    /// The outcome, once it has ended.
    pub fn outcome(&self) -> Option<LastMirror> {
        self.state.lock().epitaph.as_ref().map(|(_, outcome)| outcome.clone())
    }

    /// The target's image while the job uses it.
    pub fn target_image(&self) -> Option<Arc<dyn Image>> {
        self.live.lock().as_ref().map(|live| live.target.image().clone())
    }

    pub(super) fn verdict(&self) -> Option<Verdict> {
        self.state.lock().verdict.clone()
    }

    pub(super) fn live(&self) -> Option<Live> {
        self.live.lock().clone()
    }

    /// Goes to `status` and tells everybody.
    pub(super) fn transition(&self, status: JobStatus) {
        let from = self.status();
        debug_assert!(from.may_become(status), "{from:?} -> {status:?}");
        self.transition_from(from, status);
    }

    /// Goes from one state to another and tells everybody, unless the job is in a third one by now. With
    /// [`Job::transition`] the only way in which a job's status changes.
    pub(super) fn transition_from(&self, from: JobStatus, status: JobStatus) -> bool {
        {
            let mut state = self.state.lock();
            if state.status != from {
                return false;
            }
            state.status = status;
            state.ready |= status == JobStatus::Ready;
        }
        log::info!("job {}: {}", self.id(), status.word());
        self.events.emit(&JobEvent::StatusChange { job_id: self.id().to_owned(), status });
        self.notify();
        true
    }

    /// The numbers of a block job event.
    pub(super) fn progress(&self) -> JobProgress {
        let info = self.info();
        JobProgress { job_id: info.job_id, len: info.data_bytes, offset: info.copied_bytes, speed: info.speed }
    }

    /// Makes whoever waits for the job's state look again.
    pub(super) fn notify(&self) {
        // Under the lock, so that nobody is between looking and waiting.
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    /// Makes everyone of the job look at its state again, copiers included.
    pub(super) fn wake(&self) {
        self.notify();
        self.pacer.interrupt();
        if let Some(live) = self.live() {
            live.map.wake_all();
        }
    }

    /// True if copiers must not take another claim now.
    pub(super) fn must_yield(&self) -> bool {
        self.stopping.load(SeqCst) || self.holding.load(SeqCst) || self.frozen.load(SeqCst)
    }

    /// Waits until copiers may claim. False: the job ends.
    pub(super) fn wait_to_copy(&self) -> bool {
        if !self.must_yield() {
            return true;
        }
        let mut state = self.state.lock();
        loop {
            if self.stopping.load(SeqCst) {
                return false;
            }
            if !self.must_yield() {
                return true;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Waits until the job has ended. False: `deadline` passed before.
    pub fn wait_ended(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        while !matches!(state.status, JobStatus::Concluded | JobStatus::Null) {
            if !crate::sync::wait_until(&self.changed, &mut state, deadline) {
                return matches!(state.status, JobStatus::Concluded | JobStatus::Null);
            }
        }
        true
    }

    /// Of a job that has ended: requests of it have not returned. What it used hangs, and they may still land there.
    pub fn left_requests(&self) -> bool {
        self.hung.load(SeqCst)
    }

    pub(super) fn copied(&self) -> u64 {
        self.counters.copied.load(Relaxed)
    }
}
