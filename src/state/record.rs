//! What is known of a mount when its server starts again: one record for the whole mount, so that one replacement of one file
//! is the commit point of a cutover, of a group too (rule 15).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::pair::{PairMark, Stamp};
use super::pulse::Counts;
#[cfg(not(all(test, shuttle)))]
use crate::error::Error;
use crate::error::Result;
use crate::image::{CacheMode, Format, Identity};
use crate::mirror::types::{IoStatus, JobInfo, JobStatus, LastMirror, MirrorOptions, MirrorResult, SyncMode};
use crate::mirror::{micros, rfc3339};
use crate::range::Granularity;
use crate::sync::SystemTime;
use crate::volume::ShownAttributes;

/// The mount.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MountState {
    /// Absolute.
    pub mountpoint: PathBuf,
    /// How often a server of this mount was restarted since it was mounted.
    pub restarts: u64,
    /// How the last server that died ended.
    pub last_exit: Option<String>,
    /// Its disks, in mount order.
    pub volumes: Vec<VolumeState>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeState {
    /// Random, see [`random_id`]. Stays the same from image to image.
    pub id: String,
    /// Its name in the mount.
    pub name: String,
    /// What was mounted, absolute; never changes.
    pub source: PathBuf,
    /// The format of the active image.
    pub format: Format,
    /// Absolute path or URI of the image that serves the guest.
    pub active: String,
    /// Which image that is.
    pub active_identity: Identity,
    /// How the active image uses the host's page cache, where its mirror was told so. Counts until the disk is mounted anew.
    #[serde(default)]
    pub cache: Option<CacheMode>,
    /// The disk's size in bytes where the active image is larger: a cutover never changes the size.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// Raised at each cutover, and at each start, resume and clean stop of a mirror (rules 10 and 11).
    pub generation: u64,
    /// The images that it has left, oldest first.
    pub superseded: Vec<FormerImage>,
    /// What the guest's chmod and chown made of the shown attributes; `None`: those of the image.
    pub shown: Option<ShownAttributes>,
    /// How the last mirror ended.
    pub last_mirror: Option<LastMirror>,
    /// The target of the mirror that runs. A server that finds one at its start, and no [`VolumeState::mirror`], knows that it died
    /// with the last one.
    #[serde(default)]
    pub mirror_target: Option<String>,
    /// The mirror that runs, as far as it can be resumed.
    #[serde(default)]
    pub mirror: Option<MirrorRecord>,
}

/// An unfinished mirror, to be resumed by the next server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MirrorRecord {
    /// Random; the intent log and the pair's marks carry it.
    pub job: String,
    /// As asked for, and as changed since; with the granularity that was chosen.
    pub options: MirrorOptions,
    /// The user has paused it.
    pub paused: bool,
    /// The target was made for it.
    pub created_target: bool,
    /// Which image the target is.
    pub target_identity: Identity,
    /// The disk's size when it began; it stays.
    pub size_bytes: u64,
    /// In the marks of both images too (rule 11).
    pub generation: u64,
    /// The images' marks may still carry the generation before: it is being raised.
    pub raising: bool,
    /// The source can carry a mark: its file system has attributes.
    pub source_marked: bool,
    /// The target can.
    pub target_marked: bool,
    /// The source's last change.
    pub source_stamp: Stamp,
    /// The target's.
    pub target_stamp: Stamp,
    /// Why everything is compared, where the map is not trusted.
    pub compare: Option<String>,
}

/// An image that a volume has left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerImage {
    /// Absolute path or URI.
    pub path: String,
    /// Which image it was.
    pub identity: Identity,
    /// The volume's generation since it was left; its mark has the same.
    pub generation: u64,
    /// It has that mark, durably: nobody needs to look at it again.
    #[serde(default)]
    pub marked: bool,
}

impl MirrorRecord {
    /// What `status` shows of the mirror while nothing is copied: paused, and why. `marked_bytes`: what is to be copied again.
    pub fn info(&self, counts: &Counts, marked_bytes: u64, last_error: Option<String>) -> JobInfo {
        let options = &self.options;
        JobInfo {
            job_id: options.job_id.clone(),
            target: options.target.clone(),
            sync: options.sync,
            state: JobStatus::Paused,
            copy_mode: options.copy_mode,
            granularity: options.granularity.unwrap_or(Granularity::DEFAULT).bytes(),
            ready: false,
            in_sync: false,
            data_bytes: counts.copied + marked_bytes,
            copied_bytes: counts.copied,
            dirty_bytes: marked_bytes,
            in_flight_bytes: 0,
            zeroed_bytes: counts.zeroed,
            discarded_bytes: counts.discarded,
            skipped_bytes: counts.skipped,
            shared_bytes: 0,
            source_allocated_bytes: 0,
            target_allocated_bytes: 0,
            dirty_bytes_per_second: 0,
            drain_bytes_per_second: 0,
            eta_seconds: None,
            speed: options.speed_bytes_per_second,
            own_speed: 0,
            guest_first_us: options.pace.guest_first.map(micros),
            guest_p99_us: None,
            finish_by: options.pace.finish_by.map(rfc3339),
            in_time: None,
            io_status: if last_error.is_some() { IoStatus::Failed } else { IoStatus::Ok },
            last_error,
            paused: true,
            busy: false,
            actively_synced: false,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            error: None,
        }
    }

    /// Why an image that says `mark` is not the one that was paired; `None`: it is. `marked`: it could carry a mark.
    pub fn mismatch(&self, marked: bool, mark: Option<&PairMark>) -> Option<String> {
        match mark {
            None if !marked => None,
            None => Some("it does not say that it belongs to this mirror".to_owned()),
            Some(mark) if mark.job != self.job => Some("it belongs to another mirror".to_owned()),
            Some(mark) => {
                let before = self.generation.checked_sub(1).filter(|_| self.raising);
                let known = mark.generation == self.generation || Some(mark.generation) == before;
                (!known).then(|| format!("it is of generation {}, not {}", mark.generation, self.generation))
            }
        }
    }
}

impl MountState {
    /// The volume called `name`.
    pub fn volume(&self, name: &str) -> Option<&VolumeState> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// The volume called `name`, to be changed.
    pub fn volume_mut(&mut self, name: &str) -> Option<&mut VolumeState> {
        self.volumes.iter_mut().find(|volume| volume.name == name)
    }
}

impl VolumeState {
    /// Writes down that the mirror that ran, if one did that cannot be resumed, died with its server.
    pub fn mirror_died(&mut self) {
        if self.mirror.is_some() {
            return;
        }
        if let Some(target) = self.mirror_target.take() {
            let text = "the server died while the mirror ran, which could not be resumed any more; the target is not a copy: \
                        start the mirror again";
            self.mirror_ended(&target, MirrorResult::Failed);
            if let Some(last) = &mut self.last_mirror {
                last.error = Some(text.to_owned());
            }
        }
    }

    /// Writes down that the mirror to `target` is over.
    pub fn mirror_ended(&mut self, target: &str, result: MirrorResult) {
        let whole = self.mirror.as_ref().is_none_or(|record| record.options.sync != SyncMode::None);
        self.mirror_target = None;
        self.mirror = None;
        self.last_mirror = Some(LastMirror {
            target: target.to_owned(),
            result,
            consistent: whole && matches!(result, MirrorResult::Completed | MirrorResult::Finished),
            error: None,
            pause_ms: None,
            predicted_pause_ms: None,
            ended: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        });
    }

    /// What a cutover writes down: `active` is the image from now on, the one before is superseded, the generation is raised.
    pub fn cut_over(&mut self, active: String, identity: Identity, format: Format) {
        // Seconds since the epoch where that is more: an image may be cut over from several mounts, whose records do not know each
        // other, and the latest cutover must win.
        let now = SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let generation = now.max(self.generation + 1);
        let path = std::mem::replace(&mut self.active, active);
        let identity = std::mem::replace(&mut self.active_identity, identity);
        let former = FormerImage { path, identity, generation, marked: false };
        self.format = format;
        self.mirror_target = None;
        self.mirror = None;
        self.generation = generation;
        // An image that becomes active again is no longer a former one.
        self.superseded.retain(|other| other.path != self.active && other.path != former.path);
        self.superseded.push(former);
    }
}

/// 128 random bits as 32 hex digits.
///
/// # Errors
/// The system has no `/dev/urandom`.
pub fn random_id() -> Result<String> {
    #[cfg(all(test, shuttle))]
    return Ok(crate::simulation::random_id());
    #[cfg(not(all(test, shuttle)))]
    system_random_id()
}

#[cfg(not(all(test, shuttle)))]
fn system_random_id() -> Result<String> {
    use std::io::Read;

    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes));
    read.map_err(|error| Error::io("cannot read", &error).on("/dev/urandom"))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}
