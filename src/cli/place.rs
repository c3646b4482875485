//! From a path that the user gave to the mount that it belongs to, and to its control socket.
//!
//! Nothing here looks at or below a mount of ours: a path is resolved by the mount table.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::control::backend::{MountStatus, VolumeStatus};
use crate::control::client::{self, Client};
use crate::control::device_names;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mountinfo::{MountEntry, MountTable, Place};
use crate::server::config::MountConfig;
use crate::state::runtime::{self, RuntimeRecord};

/// How long a server that is being restarted may take until it answers.
const RESTART: Duration = Duration::from_secs(5);

/// Where a path given by the user leads.
#[derive(Clone, Debug)]
pub struct Found {
    /// The mount, as the kernel lists it.
    pub entry: MountEntry,
    /// Which disk of it, if the path says.
    pub disk_name: Option<String>,
}

/// A disk, by all its names.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Its QMP device.
    pub device: String,
    /// What is known of it.
    pub status: VolumeStatus,
}

/// The mount that `path` belongs to.
///
/// # Errors
/// `NotFound`: it belongs to none.
pub fn find(path: &Path) -> Result<Found> {
    match MountTable::read()?.locate(path)? {
        Place::Ours(entry, rest) => {
            let mut names = rest.components();
            let first = names.next().map(|name| name.as_os_str().to_string_lossy().into_owned());
            if names.next().is_some() {
                return Err(Error::new(ErrorKind::NotFound, "there is no disk").on(path.display().to_string()));
            }
            Ok(Found { entry, disk_name: first })
        }
        Place::Elsewhere(_) => Err(Error::new(ErrorKind::NotFound, "not a mount of livemirror, nor a disk in one:")
            .on(path.display().to_string())
            .advise("`livemirror list` shows the mounts; `livemirror mount` makes one")),
    }
}

/// The mounts of this user, for root of everybody.
///
/// # Errors
/// There is no /proc.
pub fn all() -> Result<Vec<Found>> {
    let me = nix::unistd::geteuid();
    let table = MountTable::read()?;
    let mine = table.ours().filter(|entry| me.is_root() || entry.user_id.is_none_or(|owner| owner == me.as_raw()));
    Ok(mine.map(|entry| Found { entry: entry.clone(), disk_name: None }).collect())
}

impl Found {
    /// The mountpoint.
    pub fn mountpoint(&self) -> &Path {
        &self.entry.mountpoint
    }

    /// What the server wrote down about itself.
    ///
    /// # Errors
    /// `NotFound`: nothing, so that it never ran or is not ours to talk to.
    pub fn record(&self) -> Result<RuntimeRecord> {
        let id = MountConfig::mount_id(self.mountpoint());
        runtime::find_runtime(&id, self.entry.user_id)?.ok_or_else(|| {
            let error = Error::new(ErrorKind::NotFound, "no control socket is known for the mount");
            error
                .on(self.mountpoint().display().to_string())
                .advise("was it mounted by another user, or with another XDG_RUNTIME_DIR?")
        })
    }

    /// A connection to the server. One that is being restarted is waited for, a few seconds.
    ///
    /// # Errors
    /// There is no server any more.
    pub fn connect(&self) -> Result<Client> {
        self.connect_within(client::PATIENCE)
    }

    /// As [`Found::connect`], for a server that must answer within `patience`.
    ///
    /// # Errors
    /// As [`Found::connect`].
    pub fn connect_within(&self, patience: Duration) -> Result<Client> {
        let deadline = Instant::now() + RESTART;
        loop {
            let error = match self.record().and_then(|record| Client::connect_within(&record.control, patience)) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            if !self.is_mounted() {
                let what = "it was unmounted meanwhile:";
                return Err(Error::new(ErrorKind::NotFound, what).on(self.mountpoint().display().to_string()));
            }
            if error.kind() != ErrorKind::NotFound || Instant::now() > deadline {
                return Err(match error.advice() {
                    Some(_) => error,
                    None => error.advise(format!(
                        "`livemirror status {0}` tells what is known; `livemirror unmount --abort {0}` ends it",
                        self.mountpoint().display()
                    )),
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// True while the kernel lists this very mount.
    pub fn is_mounted(&self) -> bool {
        MountTable::read().is_ok_and(|table| table.ours().any(|entry| entry.mount_id == self.entry.mount_id))
    }

    /// The disk that the path names, among those of `status`; the only one where it names none.
    ///
    /// # Errors
    /// There is no such disk; several are there and none was named (`Usage`).
    pub fn disk(&self, status: &MountStatus) -> Result<Disk> {
        let names = || status.volumes.iter().map(|volume| volume.name.as_str());
        let index = match &self.disk_name {
            Some(wanted) => names().position(|name| name == wanted).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("there is no disk '{wanted}' in"))
                    .on(self.mountpoint().display().to_string())
                    .advise(format!("there is: {}", names().collect::<Vec<_>>().join(", ")))
            })?,
            None if status.volumes.len() == 1 => 0,
            None => {
                let disks: Vec<_> = status.volumes.iter().map(|volume| volume.disk.as_str()).collect();
                return Err(Error::usage("several disks are mounted at")
                    .on(self.mountpoint().display().to_string())
                    .advise(format!("name one: {}", disks.join(", "))));
            }
        };
        let device = device_names(names()).swap_remove(index);
        Ok(Disk { device, status: status.volumes[index].clone() })
    }
}

/// A mount with its server's ear.
pub struct Mount {
    /// Where it is.
    pub found: Found,
    /// The connection.
    pub client: Client,
}

impl Mount {
    /// Finds the mount of `path` and connects to its server.
    ///
    /// # Errors
    /// There is none; its server does not answer.
    pub fn open(path: &Path) -> Result<Mount> {
        let found = find(path)?;
        let client = found.connect()?;
        Ok(Mount { found, client })
    }

    /// Everything about the mount. A lost connection is made anew once: the server may have been restarted.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn status(&mut self) -> Result<MountStatus> {
        match self.client.call("livemirror-status", json!({})) {
            Err(error) if error.kind() == ErrorKind::Failed => {
                log::debug!("{error}");
                self.client = self.found.connect()?;
                self.client.call("livemirror-status", json!({}))
            }
            result => result,
        }
    }

    /// The disk that the path named, as it is now.
    ///
    /// # Errors
    /// As [`Found::disk`] and [`Mount::status`].
    pub fn disk(&mut self) -> Result<Disk> {
        let status = self.status()?;
        self.found.disk(&status)
    }
}

impl Disk {
    /// The id of its mirror's job.
    ///
    /// # Errors
    /// `NotFound`: it has none.
    pub fn job_id(&self) -> Result<&str> {
        self.status.mirror.as_ref().map(|job| job.job_id.as_str()).ok_or_else(|| self.no_mirror())
    }

    /// Says that there is no mirror.
    pub fn no_mirror(&self) -> Error {
        Error::new(ErrorKind::NotFound, "there is no mirror of")
            .on(self.status.disk.clone())
            .advise(format!("start one with `livemirror mirror {} TARGET`", self.status.disk))
    }
}

/// The path as the server must see it: absolute, symbolic links left alone. URIs stay as they are.
///
/// # Errors
/// It is empty, not UTF-8, or relative in a directory that is gone.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    if crate::image::nbd::uri::is_uri(path) {
        return Ok(path.to_owned());
    }
    std::path::absolute(path)
        .map_err(|error| Error::io("cannot use the path", &error).on(format!("'{}'", path.display())))
}
