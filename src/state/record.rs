//! What is known of a mount when its server starts again: one record for the whole mount, so that one replacement of one file
//! is the commit point of a cutover, of a group too (rule 15).

use std::io::Read;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::image::{Format, Identity};
use crate::mirror::types::{LastMirror, MirrorResult};
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
    /// The target of the mirror that runs. A server that finds one at its start knows that the last one died with it.
    #[serde(default)]
    pub mirror_target: Option<String>,
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
    /// Writes down that the mirror that ran, if one did, died with its server.
    pub fn mirror_died(&mut self) {
        if let Some(target) = self.mirror_target.take() {
            let text = "the server died while the mirror ran; the target is not a copy: start the mirror again";
            self.last_mirror = Some(LastMirror {
                target,
                result: MirrorResult::Failed,
                consistent: false,
                error: Some(text.to_owned()),
                pause_ms: None,
                ended: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
            });
        }
    }

    /// What a cutover writes down: `active` is the image from now on, the one before is superseded, the generation is raised.
    pub fn cut_over(&mut self, active: String, identity: Identity, format: Format) {
        // Seconds since the epoch where that is more: an image may be cut over from several mounts, whose records do not know each
        // other, and the latest cutover must win.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let generation = now.max(self.generation + 1);
        let path = std::mem::replace(&mut self.active, active);
        let former = FormerImage { path, identity: std::mem::replace(&mut self.active_identity, identity), generation };
        self.format = format;
        self.mirror_target = None;
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
    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes));
    read.map_err(|error| Error::io("cannot read", &error).on("/dev/urandom"))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}
