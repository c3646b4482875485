//! What the mounted disk shows: its image's owner, mode and times, as changed by the guest's chmod, chown and utimens. The
//! image itself keeps its own (libvirt changes the owner of the disks it starts).

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::Volume;
use crate::error::Result;

/// What a guest changed of the shown attributes; `None`: shown as the image has it. Kept in the state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownAttributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Last access.
    #[serde(skip)]
    pub accessed: Option<SystemTime>,
    /// Last modification. A later write shows the image's own time again.
    #[serde(skip)]
    pub modified: Option<(SystemTime, SystemTime)>,
}

/// Attributes of the mounted disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskAttributes {
    /// Size of the disk.
    pub size_bytes: u64,
    /// What the active image takes up.
    pub allocated_bytes: u64,
    /// Preferred size of a request.
    pub block_bytes: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access.
    pub accessed: SystemTime,
    /// Last modification.
    pub modified: SystemTime,
    /// Last status change.
    pub changed: SystemTime,
}

/// A guest's chmod, chown or utimens; `None` leaves a thing as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttributeChange {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Last access.
    pub accessed: Option<SystemTime>,
    /// Last modification.
    pub modified: Option<SystemTime>,
}

impl Volume {
    /// What the mounted disk shows now.
    ///
    /// # Errors
    /// When the active image's store does not tell.
    pub fn attributes(&self) -> Result<DiskAttributes> {
        let active = self.active();
        let image = active.attributes()?;
        let shown = *self.shown.lock();
        let modified = match shown.modified {
            // Set by the guest, and the image was not written since.
            Some((set, image_then)) if image_then == image.modified => set,
            _ => image.modified,
        };
        Ok(DiskAttributes {
            size_bytes: self.size_bytes(),
            allocated_bytes: active.allocated_bytes().unwrap_or_else(|_| self.size_bytes()),
            block_bytes: 4096,
            mode: shown.mode.unwrap_or(image.mode),
            uid: shown.uid.unwrap_or(image.uid),
            gid: shown.gid.unwrap_or(image.gid),
            accessed: shown.accessed.unwrap_or(image.accessed),
            modified,
            changed: image.changed,
        })
    }

    /// Changes what the mounted disk shows.
    ///
    /// # Errors
    /// When the active image's store does not tell its times.
    pub fn set_attributes(&self, change: AttributeChange) -> Result<()> {
        let image_modified = self.active().attributes()?.modified;
        let mut shown = self.shown.lock();
        shown.mode = change.mode.map(|mode| mode & 0o7777).or(shown.mode);
        shown.uid = change.uid.or(shown.uid);
        shown.gid = change.gid.or(shown.gid);
        shown.accessed = change.accessed.or(shown.accessed);
        shown.modified = change.modified.map(|time| (time, image_modified)).or(shown.modified);
        drop(shown);
        let kept = change.mode.is_some() || change.uid.is_some() || change.gid.is_some();
        if let Some(listener) = self.shown_changed.get().filter(|_| kept) {
            (listener.0)();
        }
        Ok(())
    }

    /// Has `listener` called after each change of what is to be kept in the state. The first one stays.
    pub fn on_shown_changed(&self, listener: impl Fn() + Send + Sync + 'static) {
        let _ = self.shown_changed.set(super::Listener(Box::new(listener)));
    }

    /// What the guest changed, to be kept in the state.
    pub fn shown(&self) -> ShownAttributes {
        *self.shown.lock()
    }
}
