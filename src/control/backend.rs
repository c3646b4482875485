//! What the control socket asks of the mount behind it: one trait, so that the protocol is tested without a mount.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::mirror::types::{CancelMode, CopyMode, JobEvent, JobInfo, LastMirror, MirrorOptions};
use crate::mirror::verify::Verified;

/// The guest's own traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestTraffic {
    /// Bytes read since the mount.
    pub read_bytes: u64,
    /// Bytes written since the mount.
    pub written_bytes: u64,
}

/// One volume, as `status --json` shows it .
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume's name.
    pub name: String,
    /// Absolute path of the mounted disk.
    pub disk: String,
    /// What was mounted; never changes.
    pub source: String,
    /// The format of the active image.
    pub format: String,
    /// The image that serves the guest now.
    pub active: String,
    /// The disk's size.
    pub size_bytes: u64,
    /// Traffic.
    pub guest: GuestTraffic,
    /// The running mirror.
    pub mirror: Option<JobInfo>,
    /// How the last one ended.
    pub last_mirror: Option<LastMirror>,
}

/// One mount, as `status --json` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MountStatus {
    /// Where.
    pub mountpoint: String,
    /// The process that answers requests; `None` if it is dead.
    pub server_pid: Option<u32>,
    /// The process that keeps the connection.
    pub keeper_pid: Option<u32>,
    /// The control socket.
    pub control: String,
    /// How often the server was restarted.
    pub restarts: u64,
    /// How the last server that died ended.
    pub last_exit: Option<String>,
    /// The disks.
    pub volumes: Vec<VolumeStatus>,
}

/// What `mirror --dry-run` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MirrorPlan {
    /// Absolute path of the target as it would be used.
    pub target: String,
    /// Bytes that would be read and written.
    pub data_bytes: u64,
    /// The disk's size.
    pub size_bytes: u64,
    /// Room at the target, if that is known.
    pub available_bytes: Option<u64>,
    /// How the bytes would get there, in words.
    pub method: String,
    /// Expected time at the speed limit, or at a rate measured by reading a sample; `None` if unknown.
    pub expected_seconds: Option<u64>,
}

/// A cutover of one volume or of all that have a mirror.
#[derive(Clone, Debug, PartialEq)]
pub struct CutoverRequest {
    /// The device names; empty: every volume of the mount that has a mirror.
    pub devices: Vec<String>,
    /// How long guest writes may wait.
    pub max_pause: Duration,
    /// How long this one call may try before it answers [`crate::error::ErrorKind::NotNow`]. Callers repeat the call.
    pub patience: Duration,
}

/// A cutover that took place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CutoverReport {
    /// The volume.
    pub device: String,
    /// The image that serves the guest now.
    pub active: String,
    /// The image that it left.
    pub superseded: String,
    /// How long guest writes waited, in milliseconds.
    pub pause_ms: f64,
    /// What was predicted for that, in milliseconds.
    #[serde(default)]
    pub predicted_pause_ms: f64,
}

/// A process (or kernel user) that keeps a disk open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id; `None` for users inside the kernel (loop devices, swap, nfsd).
    pub pid: Option<u32>,
    /// Command name, or what it is (`loop device /dev/loop0`).
    pub name: String,
    /// The disk or directory that it holds, if known.
    pub path: Option<String>,
}

/// The mount behind a control socket. Errors: `NotFound` for an unknown device or job, `NotNow` for what may be tried again.
pub trait Backend: Send + Sync + 'static {
    /// QMP device names of the volumes, in mount order (see [`crate::control::device_name`]).
    fn devices(&self) -> Vec<String>;

    /// Everything about the mount.
    fn status(&self) -> MountStatus;

    /// Starts a mirror of `device`; returns once tracking is on. With auto-finalize and auto-dismiss as told.
    ///
    /// # Errors
    /// The target cannot be used, a job with that id or on that volume exists.
    fn start_mirror(&self, device: &str, options: MirrorOptions) -> Result<()>;

    /// What [`Backend::start_mirror`] would do. Changes nothing.
    ///
    /// # Errors
    /// As [`Backend::start_mirror`].
    fn plan_mirror(&self, device: &str, options: MirrorOptions) -> Result<MirrorPlan>;

    /// All jobs, newest first. Concluded ones that were not dismissed are among them.
    fn jobs(&self) -> Vec<JobInfo>;

    /// Pauses a job at the user's wish.
    ///
    /// # Errors
    /// The verb is not allowed in the job's state (in QEMU's words); it is paused already.
    fn pause(&self, job_id: &str) -> Result<()>;

    /// Ends the user's pause, or an error's.
    ///
    /// # Errors
    /// As for pause.
    fn resume(&self, job_id: &str) -> Result<()>;

    /// Ends a job without a switch. Returns at once; the job's end is seen from its events.
    ///
    /// # Errors
    /// As for pause. A soft cancel of a paused job is refused.
    fn cancel(&self, job_id: &str, mode: CancelMode, keep_target: bool) -> Result<()>;

    /// Tells a ready job to cut over. Returns at once.
    ///
    /// # Errors
    /// As for pause.
    fn complete(&self, job_id: &str) -> Result<()>;

    /// Lets a pending job conclude. Returns when it has.
    ///
    /// # Errors
    /// As for pause; the cutover failed.
    fn finalize(&self, job_id: &str) -> Result<()>;

    /// Forgets a concluded job.
    ///
    /// # Errors
    /// As for pause.
    fn dismiss(&self, job_id: &str) -> Result<()>;

    /// Changes the speed limit, bytes per second, 0 = none.
    ///
    /// # Errors
    /// As for pause.
    fn set_speed(&self, job_id: &str, bytes_per_second: u64) -> Result<()>;

    /// Changes what the copy's pace follows. What is `None` stays; zero is "no longer". `finish_by` is a time since the epoch.
    ///
    /// # Errors
    /// As for pause.
    fn set_pace(&self, job_id: &str, guest_first: Option<Duration>, finish_by: Option<Duration>) -> Result<()>;

    /// Changes the copy mode.
    ///
    /// # Errors
    /// As for pause.
    fn set_copy_mode(&self, job_id: &str, mode: CopyMode) -> Result<()>;

    /// Cuts over at one instant. Blocks for `patience` at most (the barrier itself no longer than `max_pause`).
    ///
    /// # Errors
    /// `NotNow`: not ready yet, or the pause would not have sufficed; nothing changed. `NotFound`: no mirror there.
    fn cutover(&self, request: &CutoverRequest) -> Result<Vec<CutoverReport>>;

    /// Compares both images of the mirror of `device` from a byte on, for a while.
    ///
    /// # Errors
    /// See [`crate::mirror::verify::step`]. `NotFound`: no mirror there.
    fn verify(&self, device: &str, from: u64) -> Result<Verified>;

    /// Unmounts. With `abort` the connection is ended even when the disks are in use.
    ///
    /// # Errors
    /// `NotNow`: the holders keep it busy; they are in the message.
    fn unmount(&self, abort: bool) -> Result<()>;

    /// Who keeps the mount busy.
    fn holders(&self) -> Vec<Holder>;

    /// Flushes, saves, and leaves as soon as the disks are not in use (QMP `quit`, SIGTERM).
    fn quit(&self);

    /// Registers a listener. Called from the jobs' threads: it must not block and must not call back.
    fn subscribe(&self, listener: Box<dyn Fn(&JobEvent) + Send + Sync>) -> SubscriptionId;

    /// Removes a listener.
    fn unsubscribe(&self, id: SubscriptionId);
}

/// Names a listener of [`Backend::subscribe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SubscriptionId(pub u64);
