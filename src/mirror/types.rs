//! What is said about a mirror job: its options, states, verbs, counters and events. The words are those of QEMU's jobs
//! (QAPI `JobStatus`, `JobVerb`, `MirrorCopyMode`, `BlockdevOnError`).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::image::{CacheMode, Format, Layout};
use crate::range::Granularity;

/// How long a guest's request waits for the target at most, where nothing else is told.
pub const MAX_GUEST_DELAY: Duration = Duration::from_secs(2);

/// When a guest's write is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// The job chooses between the other two and switches, both ways.
    #[default]
    Auto,
    /// The guest waits for the source only.
    Background,
    /// The guest waits for both images.
    WriteBlocking,
}

/// What of the disk a mirror is about (QEMU's `MirrorSyncMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SyncMode {
    /// All of it.
    #[default]
    Full,
    /// What the source has above its backing file, or above [`MirrorOptions::base`]; the target has the same one beneath it.
    Top,
    /// What guests write from now on.
    None,
}

/// What an error of one side does to the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorPolicy {
    /// The job fails and says why.
    Report,
    /// Tried again, with back-off.
    Ignore,
    /// The job pauses until somebody resumes it.
    Stop,
    /// [`ErrorPolicy::Stop`] when there is no room, else [`ErrorPolicy::Report`].
    Enospc,
}

/// QEMU's job states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    /// Exists, does not run yet.
    Created,
    /// Copies.
    Running,
    /// Paused before it was ready.
    Paused,
    /// A target flush succeeded while nothing was dirty or in flight.
    Ready,
    /// Paused after it was ready.
    Standby,
    /// Told to complete; finishing its work.
    Waiting,
    /// Done but for `finalize`.
    Pending,
    /// Failing or cancelled; cleaning up.
    Aborting,
    /// Ended; waits for `dismiss`.
    Concluded,
    /// Gone.
    Null,
}

/// QEMU's job verbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobVerb {
    /// End without a switch.
    Cancel,
    /// Stop copying, go on tracking.
    Pause,
    /// Go on copying.
    Resume,
    /// Change the speed limit.
    SetSpeed,
    /// Switch to the target (cutover).
    Complete,
    /// Let a pending job conclude.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
    /// Change the copy mode.
    Change,
}

/// How a job ends when it is asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelMode {
    /// Give up at once: the target is not a copy (QEMU: force).
    Force,
    /// If ready, end with a consistent copy and no switch (QEMU: soft cancel, our `finish`); else as [`CancelMode::Force`].
    Soft,
}

/// What the pace of a copy is to follow, besides its speed limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// The copy yields so that 99 of 100 reads and writes of guests take no longer, in the server.
    #[serde(default)]
    pub guest_first: Option<Duration>,
    /// The lowest speed at which the mirror is ready by then; since the epoch.
    #[serde(default)]
    pub finish_by: Option<Duration>,
}

/// What a mirror is asked to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorOptions {
    /// The job's id.
    pub job_id: String,
    /// Absolute path of the target image, or an NBD URI.
    pub target: String,
    /// The target's format; `None`: told by name and content.
    pub format: Option<Format>,
    /// Write into an image that is there (QEMU: `mode: existing`) instead of creating one.
    pub existing: bool,
    /// What is copied.
    #[serde(default)]
    pub sync: SyncMode,
    /// [`SyncMode::Top`]: the image of the source's chain that is the target's backing file. `None`: the source's own.
    #[serde(default)]
    pub base: Option<String>,
    /// How a target that is created is laid out.
    #[serde(default)]
    pub layout: Layout,
    /// How the host's page cache is used for the target, also once it is the disk, as long as the mount lives. `None`: as for the source.
    #[serde(default)]
    pub target_cache: Option<CacheMode>,
    /// When guest writes are answered.
    pub copy_mode: CopyMode,
    /// `None`: the target's cluster size within 4 KiB to 64 KiB, else 64 KiB.
    pub granularity: Option<Granularity>,
    /// Bytes per second; 0 = no limit.
    pub speed_bytes_per_second: u64,
    /// What the copy's pace is to follow besides.
    #[serde(default)]
    pub pace: Pace,
    /// Memory for copies in flight, in bytes.
    pub buffer_bytes: u64,
    /// On a read error of the source.
    pub on_source_error: ErrorPolicy,
    /// On a write error of the target.
    pub on_target_error: ErrorPolicy,
    /// How long a guest's request waits for the target, or for the intent log, at most.
    pub max_guest_delay: Duration,
    /// NBD: how long a request waits while the connection to the target is lost. `None`: as the mount has it.
    #[serde(default)]
    pub reconnect: Option<Duration>,
    /// Share the source's blocks where both images lie on a file system that can.
    #[serde(default = "yes")]
    pub reflink: bool,
    /// False: a job told to complete waits in `pending` for `finalize`.
    pub auto_finalize: bool,
    /// False: a job that ended stays in `concluded` until `dismiss`.
    pub auto_dismiss: bool,
}

fn yes() -> bool {
    true
}

impl MirrorOptions {
    /// The command line's defaults for a mirror to `target`.
    pub fn new(job_id: impl Into<String>, target: impl Into<String>) -> Self {
        MirrorOptions {
            job_id: job_id.into(),
            target: target.into(),
            format: None,
            existing: false,
            sync: SyncMode::Full,
            base: None,
            layout: Layout::default(),
            target_cache: None,
            copy_mode: CopyMode::Auto,
            granularity: None,
            speed_bytes_per_second: 0,
            pace: Pace::default(),
            buffer_bytes: 16 << 20,
            on_source_error: ErrorPolicy::Report,
            on_target_error: ErrorPolicy::Enospc,
            max_guest_delay: MAX_GUEST_DELAY,
            reconnect: None,
            reflink: true,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }
}

/// QEMU's `BlockDeviceIoStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// No error stopped it.
    #[default]
    Ok,
    /// Stopped by an error.
    Failed,
    /// Stopped by a full target.
    Nospace,
}

/// A snapshot of a job, as `status --json` and the QMP queries show it. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobInfo {
    /// The job's id.
    pub job_id: String,
    /// Absolute path of the target.
    pub target: String,
    /// What is copied.
    #[serde(default)]
    pub sync: SyncMode,
    /// Where it stands.
    pub state: JobStatus,
    /// The mode asked for (`auto` stays `auto`).
    pub copy_mode: CopyMode,
    /// Granule size.
    pub granularity: u64,
    /// A flush of the target succeeded while nothing was dirty or in flight.
    pub ready: bool,
    /// Nothing is dirty or in flight at this moment.
    pub in_sync: bool,
    /// Data to copy as known so far: holes never count.
    pub data_bytes: u64,
    /// Data copied.
    pub copied_bytes: u64,
    /// Dirty, not yet copied.
    pub dirty_bytes: u64,
    /// In the copiers' hands, or written synchronously.
    pub in_flight_bytes: u64,
    /// Zeroes written to the target.
    pub zeroed_bytes: u64,
    /// Ranges freed on the target.
    pub discarded_bytes: u64,
    /// Holes that needed nothing, the target being known to be zero there.
    pub skipped_bytes: u64,
    /// Of `copied_bytes`: what shares the source's blocks and so is no second copy.
    #[serde(default)]
    pub shared_bytes: u64,
    /// What the source takes up.
    pub source_allocated_bytes: u64,
    /// What the target takes up.
    pub target_allocated_bytes: u64,
    /// How fast the guest makes granules dirty.
    pub dirty_bytes_per_second: u64,
    /// How fast the copy drains them.
    pub drain_bytes_per_second: u64,
    /// Expected time to ready, `None` if the copy does not gain on the guest.
    pub eta_seconds: Option<u64>,
    /// Speed limit, bytes per second; 0 = none.
    pub speed: u64,
    /// The limit that the job has set itself for [`Pace`], bytes per second; 0 = none.
    #[serde(default)]
    pub own_speed: u64,
    /// See [`Pace::guest_first`]; microseconds.
    #[serde(default)]
    pub guest_first_us: Option<u64>,
    /// 99 of 100 reads and writes of guests took no longer, when last looked at; microseconds. Known with [`Pace::guest_first`].
    #[serde(default)]
    pub guest_p99_us: Option<u64>,
    /// See [`Pace::finish_by`]; RFC 3339.
    #[serde(default)]
    pub finish_by: Option<String>,
    /// Whether it will be ready by then; `None`: not known yet.
    #[serde(default)]
    pub in_time: Option<bool>,
    /// Whether an error stopped it.
    pub io_status: IoStatus,
    /// The last error of either image, kept.
    pub last_error: Option<String>,
    /// Asked to pause (or stopped by an error).
    #[serde(skip)]
    pub paused: bool,
    /// I/O of the job is under way.
    #[serde(skip)]
    pub busy: bool,
    /// Guest writes go to both images at this moment, and nothing is dirty.
    #[serde(skip)]
    pub actively_synced: bool,
    /// See [`MirrorOptions::auto_finalize`].
    #[serde(skip)]
    pub auto_finalize: bool,
    /// See [`MirrorOptions::auto_dismiss`].
    #[serde(skip)]
    pub auto_dismiss: bool,
    /// Why a concluded job failed.
    #[serde(skip)]
    pub error: Option<String>,
}

/// How a mirror ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MirrorResult {
    /// Cut over: the target is the disk now.
    Completed,
    /// Ended with a consistent copy.
    Finished,
    /// Given up.
    Cancelled,
    /// An error ended it.
    Failed,
}

/// The outcome of the last mirror of a volume (`last_mirror` in `status --json`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastMirror {
    /// Absolute path of the target.
    pub target: String,
    /// How it ended.
    pub result: MirrorResult,
    /// The target held a consistent copy of the disk when it ended.
    pub consistent: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// How long guest writes waited at the cutover, in milliseconds.
    pub pause_ms: Option<f64>,
    /// What was predicted for that, in milliseconds.
    #[serde(default)]
    pub predicted_pause_ms: Option<f64>,
    /// When it ended, RFC 3339.
    pub ended: String,
}

/// Which image an error was met on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading the source.
    Read,
    /// Writing (or flushing) the target.
    Write,
}

/// What was done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// It is tried again.
    Ignore,
    /// The job is paused.
    Stop,
}

/// Something that happened to a job. One QMP event each; the order is QEMU's.
#[derive(Clone, Debug, PartialEq)]
pub enum JobEvent {
    /// JOB_STATUS_CHANGE.
    StatusChange {
        /// The job.
        job_id: String,
        /// Its new state.
        status: JobStatus,
    },
    /// BLOCK_JOB_READY.
    Ready(JobProgress),
    /// BLOCK_JOB_PENDING.
    Pending {
        /// The job.
        job_id: String,
    },
    /// BLOCK_JOB_COMPLETED, with the error if it failed.
    Completed(JobProgress, Option<String>),
    /// BLOCK_JOB_CANCELLED.
    Cancelled(JobProgress),
    /// BLOCK_JOB_ERROR.
    Error {
        /// The job.
        job_id: String,
        /// Which side.
        operation: Operation,
        /// What was done.
        action: ErrorAction,
    },
}

/// The numbers that QMP's block job events carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobProgress {
    /// The job.
    pub job_id: String,
    /// Work known so far, in bytes.
    pub len: u64,
    /// Work done, in bytes.
    pub offset: u64,
    /// Speed limit in bytes per second, 0 = none.
    pub speed: u64,
}
