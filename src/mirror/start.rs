//! The start of a job: tracking on, under the barrier, before anything looks at the source (rule 4).

use crate::sync::atomic::AtomicBool;
use std::time::Duration;

use super::cutover::Cutovers;
use super::events::EventHub;
use super::job::{Counters, Job, JobObserver, Live, State, Wish};
use super::pace::{Pacer, RateMeter};
use super::share::Sharing;
use super::steer::Steered;
use super::supervise;
use super::types::{CopyMode, IoStatus, JobEvent, JobStatus, MirrorOptions, SyncMode};
use crate::dirty::{DirtyMap, IntentLog};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Format, Image};
use crate::range::{ByteRange, Granularity};
use crate::sync::{Arc, Condvar, Instant, Mutex, thread};
use crate::volume::Volume;
use crate::volume::target::Target;
use crate::volume::tracking::Tracking;

/// How long the start of a mirror waits for guest writes that are under way, while new ones wait for it.
const BARRIER_PATIENCE: Duration = Duration::from_secs(2);

const SECTOR_BYTES: u64 = 512;
/// The smallest block that is told apart in a granule.
const BLOCK_BYTES: u64 = 4096;

/// What a job needs besides its options.
pub struct Setting {
    /// The volume to mirror.
    pub volume: Arc<Volume>,
    /// The opened, locked target; at least as large as the disk.
    pub target: Arc<dyn Image>,
    /// It was made for this job. Unless the job is resumed it is all holes.
    pub created_target: bool,
    /// [`SyncMode::Top`]: so many layers of the source lie above the target's backing file. Else 0.
    pub layers: u32,
    /// The durable shadow of the dirty map, if the job is to be resumable. Of a new job: all ones ([`SyncMode::None`]: zeroes).
    pub intent: Option<Arc<IntentLog>>,
    /// The job goes on where a server that is gone left it.
    pub resumed: Option<Resumed>,
    /// Hears the job's events.
    pub events: Arc<EventHub>,
    /// Carries out its cutover.
    pub cutovers: Arc<Cutovers>,
    /// Hears of its end.
    pub observer: Arc<dyn JobObserver>,
}

/// How a job stood when it was left. What is to be copied is what the intent log has marked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resumed {
    /// The log is not trusted: the target is read too, and only what differs is written.
    pub compare: bool,
    /// The user had paused it.
    pub paused: bool,
    /// Bytes that it had copied.
    pub copied: u64,
    /// Bytes zeroed on the target.
    pub zeroed: u64,
    /// Bytes freed on the target.
    pub discarded: u64,
    /// Bytes passed over.
    pub skipped: u64,
}

/// The granularity that a mirror to `target` gets when none is asked for: the cluster of a format that has clusters, within
/// 4 KiB to 64 KiB, else 64 KiB (QEMU's rule).
pub fn default_granularity(target: &dyn Image) -> Granularity {
    let cluster = if target.format() == Format::Raw { None } else { target.properties().cluster_bytes };
    cluster.and_then(|bytes| Granularity::new(bytes.clamp(4 << 10, 64 << 10))).unwrap_or(Granularity::DEFAULT)
}

/// The unit in which changes of a part of a granule are told apart: a page, and what the target has to change at once.
fn block_bytes(granularity: Granularity, target: &dyn Image) -> u64 {
    let properties = target.properties();
    let cluster = properties.cluster_bytes.filter(|_| target.format() != Format::Raw).unwrap_or(1);
    BLOCK_BYTES.max(granularity.bytes() / 16).max(properties.request_alignment).max(cluster)
}

/// Starts a job; returns once tracking is on. Emits `created` and `running`. `register` gets the job before anybody hears of it.
///
/// # Errors
/// The target is smaller than the disk; the volume is mirrored already; no thread can be started.
pub fn start(options: MirrorOptions, setting: Setting, register: impl FnOnce(&Arc<Job>)) -> Result<Arc<Job>> {
    let Setting { volume, target, created_target, layers, intent, resumed, events, cutovers, observer } = setting;
    let size_bytes = volume.size_bytes();
    // A qcow2 file holds whole sectors.
    let as_created = target.size_bytes().saturating_sub(size_bytes) < SECTOR_BYTES;
    if created_target && resumed.is_none() && !(target.size_bytes() >= size_bytes && as_created) {
        return Err(Error::not_now("the disk's size has just changed, try again:").on(volume.name()));
    }
    if target.size_bytes() < size_bytes {
        let text = format!("the target is too small: {} bytes where the disk has {size_bytes}:", target.size_bytes());
        return Err(Error::new(ErrorKind::Failed, text).on(target.name()));
    }
    let lost =
        resumed.is_some_and(|resumed| resumed.compare || intent.as_ref().is_none_or(|intent| intent.is_broken()));
    if options.sync == SyncMode::None && lost {
        let what = "what was written since the mirror began is not known any more:";
        return Err(Error::new(ErrorKind::Failed, what).on(volume.name()));
    }
    let granularity = options.granularity.unwrap_or_else(|| default_granularity(&*target));
    let map = DirtyMap::with_blocks(size_bytes, granularity, block_bytes(granularity, &*target));
    let target = Arc::new(Target::new(target, size_bytes));
    let synchronous = options.copy_mode == CopyMode::WriteBlocking;
    let state = State {
        status: JobStatus::Created,
        user_paused: resumed.is_some_and(|resumed| resumed.paused),
        error_paused: false,
        io_status: IoStatus::Ok,
        copy_mode: options.copy_mode,
        pace: options.pace.clone(),
        steered: Steered::default(),
        scanned: false,
        ready: false,
        wish: Wish::None,
        verdict: None,
        last_error: None,
        failures: 0,
        retry_at: None,
        error_event_at: None,
        stalled_at: None,
        drain: RateMeter::new(resumed.map_or(0, |resumed| resumed.copied)),
        clearing: RateMeter::new(0),
        dirtying: RateMeter::new(0),
        threads: 0,
        epitaph: None,
    };
    let job = Arc::new(Job {
        volume: volume.clone(),
        events,
        cutovers,
        observer,
        created_target,
        layers,
        pacer: Pacer::new(options.speed_bytes_per_second),
        sharing: Sharing::new(options.reflink),
        counters: Counters::from(resumed.unwrap_or_default()),
        // What shows a backing file is no hole.
        fresh_target: created_target && resumed.is_none() && target.image().backing().is_none(),
        comparing: resumed.is_some_and(|resumed| resumed.compare),
        intent: intent.clone(),
        state: Mutex::new(state),
        changed: Condvar::new(),
        live: Mutex::new(None),
        hung: AtomicBool::new(false),
        stopping: AtomicBool::new(false),
        holding: AtomicBool::new(resumed.is_some_and(|resumed| resumed.paused)),
        frozen: AtomicBool::new(false),
        supervisor_idle: AtomicBool::new(false),
        options,
    });
    let tracking = Tracking::new(map.clone(), target.clone(), job.clone(), job.options.max_guest_delay);
    tracking.set_synchronous(synchronous);
    let raised = volume
        .raise_barrier(Some(Instant::now() + BARRIER_PATIENCE))
        .ok_or_else(|| Error::not_now("guest requests under way do not end:").on(volume.name()))?;
    if volume.size_bytes() != size_bytes {
        // A guest grew or shrank it just now; the map and the target have the old size.
        return Err(Error::not_now("the disk's size has just changed, try again:").on(volume.name()));
    }
    if volume.tracking().is_some() {
        return Err(Error::new(ErrorKind::Exists, "the disk is being mirrored already:").on(volume.name()));
    }
    let disk = ByteRange::new(0, size_bytes);
    let marked = match (&intent, resumed) {
        // Under the barrier: no guest is between its bit and its mark.
        // A log that broke meanwhile has not marked everything since: nothing it says is used.
        (Some(intent), Some(_)) if !intent.is_broken() => {
            let mut ranges = Vec::new();
            intent.marked_ranges(|range| ranges.push(range));
            ranges
        }
        (_, None) if job.options.sync == SyncMode::None => Vec::new(),
        _ => vec![disk],
    };
    if let Some(intent) = &intent {
        volume.set_intent(&raised, intent.clone());
    }
    volume.set_tracking(&raised, Some(tracking.clone()));
    drop(raised);
    let live = Live { source: volume.active(), target, tracking, map };
    *job.live.lock() = Some(live.clone());
    register(&job);
    job.events.emit(&JobEvent::StatusChange { job_id: job.id().to_owned(), status: JobStatus::Created });
    let supervised = job.clone();
    job.transition(JobStatus::Running);
    job.show_pause();
    let spawned = thread::Builder::new().name("mirror".into()).spawn(move || supervise::run(&supervised, live, marked));
    if let Err(error) = spawned {
        let error = Error::io("cannot start a thread for the mirror", &error);
        if let Some(raised) = volume.raise_barrier(None) {
            match resumed {
                // It is tried again: what guests change until then is marked durably.
                Some(_) => volume.set_tracking(&raised, None),
                None => volume.end_tracking(&raised),
            }
        }
        job.observer.gone(&job);
        *job.live.lock() = None;
        return Err(error);
    }
    Ok(job)
}
