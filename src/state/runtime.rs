//! How the command line finds a running mount: a small record beside its socket, written by the server once the mount can be
//! used and removed at a clean end. One that is left over from a crash is harmless: its socket does not answer, and its
//! `state_dir` tells what is known.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Result;

use super::envelope::Kind;
use super::files::Directory;
use super::paths;

const KIND: Kind = Kind { name: "runtime", version: 1 };
const SUFFIX: &str = ".mount";

/// One running mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeRecord {
    /// Absolute.
    pub mountpoint: PathBuf,
    /// The process that answers requests.
    pub server_pid: u32,
    /// The process that keeps the connection.
    pub keeper_pid: Option<u32>,
    /// The control socket.
    pub control: PathBuf,
    /// The mount's state directory.
    pub state_dir: PathBuf,
    /// Its disks, in mount order.
    pub volumes: Vec<RuntimeVolume>,
    /// When the server started, RFC 3339.
    pub started: String,
}

/// One disk of a running mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeVolume {
    /// Its name in the mount.
    pub name: String,
    /// What was mounted.
    pub source: PathBuf,
    /// Its QMP device.
    pub device: String,
}

impl RuntimeRecord {
    /// Writes or replaces the record of the mount `mount_id` in our runtime directory.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn publish(&self, mount_id: &str) -> Result<()> {
        self.publish_in(&paths::runtime_dir()?, mount_id)
    }

    pub(super) fn publish_in(&self, directory: &Path, mount_id: &str) -> Result<()> {
        let name = format!("{mount_id}{SUFFIX}");
        let directory = Directory::create(directory)?;
        // A server that was killed while it wrote this left it half done.
        directory.remove_leftovers(&name);
        Ok(directory.stage(&name, &KIND.encode(self)?)?.commit()?)
    }
}

/// Removes our record of the mount `mount_id`. Nothing to do if there is none.
///
/// # Errors
/// It cannot be removed.
pub fn withdraw(mount_id: &str) -> Result<()> {
    withdraw_from(&paths::runtime_dir()?, mount_id)
}

pub(super) fn withdraw_from(directory: &Path, mount_id: &str) -> Result<()> {
    let (directory, name) = (Directory::create(directory)?, format!("{mount_id}{SUFFIX}"));
    directory.remove_leftovers(&name);
    directory.remove(&name)
}

/// The record of the mount `mount_id`, looked for in our own runtime directories and in those of the user `owner` (the mount's
/// owner, as its line in `/proc/self/mountinfo` says). `None` if there is none.
///
/// # Errors
/// There is one, and it is damaged.
pub fn find_runtime(mount_id: &str, owner: Option<u32>) -> Result<Option<RuntimeRecord>> {
    find_in(&paths::runtime_dirs(owner), mount_id)
}

pub(super) fn find_in(directories: &[(PathBuf, u32)], mount_id: &str) -> Result<Option<RuntimeRecord>> {
    for (path, uid) in directories {
        let Some(directory) = Directory::open(path, *uid)? else { continue };
        let name = format!("{mount_id}{SUFFIX}");
        if let Some(bytes) = directory.read(&name)? {
            return KIND.decode(&bytes, &directory.path_of(&name)).map(Some);
        }
    }
    Ok(None)
}

/// Every mount of this user, for root of everybody, that has a record: with its mount id. Records that cannot be read are
/// passed over.
pub fn list_runtime() -> Vec<(String, RuntimeRecord)> {
    let mut directories: Vec<_> = paths::users().into_iter().flat_map(|uid| paths::runtime_dirs(Some(uid))).collect();
    directories.sort();
    directories.dedup();
    list_in(&directories)
}

pub(super) fn list_in(directories: &[(PathBuf, u32)]) -> Vec<(String, RuntimeRecord)> {
    let mut found = Vec::new();
    for (path, uid) in directories {
        let Ok(Some(directory)) = Directory::open(path, *uid) else { continue };
        for name in directory.names().unwrap_or_default() {
            let Some(mount_id) = name.strip_suffix(SUFFIX) else { continue };
            let Ok(Some(bytes)) = directory.read(&name) else { continue };
            match KIND.decode(&bytes, &directory.path_of(&name)) {
                Ok(record) => found.push((mount_id.to_owned(), record)),
                Err(error) => log::warn!("{error}"),
            }
        }
    }
    found
}
