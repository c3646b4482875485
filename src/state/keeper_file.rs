//! The keeper's file beside the control socket: a lock, so that a mount never has two keepers, and its word on what it does, for
//! the command line. It is there while the keeper lives, whether a server runs or not.
//!
//! The word is written in place, padded to one length: a reader that meets one half written reads it again.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::files::Directory;
use super::paths;
use crate::error::{Error, Result};

const SUFFIX: &str = ".keeper";
const WORD_BYTES: usize = 4096;
/// How long a keeper that is just ending may hold the lock.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(5);
/// How often a word that is half written is read again.
const READS: usize = 20;

/// What a keeper says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperWord {
    /// Its process.
    pub keeper_pid: u32,
    /// The version of its program.
    pub version: String,
    /// The server that runs.
    pub server_pid: Option<u32>,
    /// That server answers requests.
    pub serving: bool,
    /// How many servers have died.
    pub restarts: u64,
    /// How the last one did.
    pub last_exit: Option<String>,
    /// It waits this long before the next attempt, in milliseconds, since a server died before it had answered anything.
    pub backing_off_ms: Option<u64>,
    /// The last upgrade.
    pub upgrade: Option<Upgrade>,
}

/// How an upgrade went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrade {
    /// Counts them, from 1.
    pub number: u64,
    /// The version before.
    pub from: String,
    /// The version that was tried, where it could tell.
    pub to: Option<String>,
    /// What went wrong: then the server before, or its like, serves.
    pub error: Option<String>,
    /// How long no server served, in milliseconds; `None`: it went on all the time.
    pub pause_ms: Option<u64>,
}

/// The file, locked, in the hands of the one keeper.
#[derive(Debug)]
pub struct KeeperFile {
    path: PathBuf,
    lock: Flock<File>,
}

impl KeeperFile {
    /// Makes and locks the file of the mount `mount_id`. `Ok(None)`: there is no place for it, or no locking there.
    ///
    /// # Errors
    /// `NotNow`: another keeper holds it.
    pub fn claim(mount_id: &str) -> Result<Option<KeeperFile>> {
        match paths::runtime_dir() {
            Ok(directory) => KeeperFile::claim_in(&directory, mount_id),
            Err(error) => {
                log::warn!("{error}");
                Ok(None)
            }
        }
    }

    pub(super) fn claim_in(directory: &Path, mount_id: &str) -> Result<Option<KeeperFile>> {
        let path = directory.join(format!("{mount_id}{SUFFIX}"));
        let shown = path.display().to_string();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let file = match options.open(&path) {
                Ok(file) => file,
                Err(error) => {
                    log::warn!("{}", Error::io("cannot make the keeper's file", &error).on(shown));
                    return Ok(None);
                }
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // The one before may have removed the file while this one waited for it.
                Ok(lock) if is_at(&lock, &path) => return Ok(Some(KeeperFile { path, lock })),
                Ok(_) => {}
                Err((_, nix::Error::EWOULDBLOCK)) if Instant::now() < deadline => std::thread::sleep(RETRY),
                Err((_, nix::Error::EWOULDBLOCK)) => {
                    let error = Error::not_now("another keeper has the mount:").on(shown);
                    return Err(error.advise("`livemirror list` shows the mounts"));
                }
                Err((_, errno)) => {
                    log::warn!("{}", Error::io("cannot lock", &errno.into()).on(shown));
                    return Ok(None);
                }
            }
        }
    }

    /// The file that this process held before it replaced itself.
    pub fn inherited(path: PathBuf, lock: OwnedFd) -> Option<KeeperFile> {
        // It is locked: the lock is the open file's. This only says so.
        let lock = Flock::lock(File::from(lock), FlockArg::LockExclusiveNonblock).ok()?;
        Some(KeeperFile { path, lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor that carries the lock.
    pub fn lock(&self) -> &File {
        &self.lock
    }

    /// Says `word`. What fails is of no consequence.
    pub fn say(&self, word: &KeeperWord) {
        let mut word = word.clone();
        // A long reason must not make it too long.
        let upgrade_error = word.upgrade.as_mut().and_then(|upgrade| upgrade.error.as_mut());
        for text in word.last_exit.as_mut().into_iter().chain(upgrade_error) {
            *text = text.chars().take(400).collect();
        }
        let mut bytes = serde_json::to_vec(&word).unwrap_or_default();
        bytes.resize(WORD_BYTES.max(bytes.len()), b' ');
        let _ = self.lock.write_all_at(&bytes, 0);
    }

    /// The end of the mount.
    pub fn remove(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let number = |data: std::fs::Metadata| (data.dev(), data.ino());
    file.metadata().ok().map(number) == std::fs::symlink_metadata(path).ok().map(number)
}

/// What the keeper of the mount `mount_id` says; `owner` is the mount's. `None`: it has no keeper, or one that left no word.
pub fn word(mount_id: &str, owner: Option<u32>) -> Option<KeeperWord> {
    paths::runtime_dirs(owner).iter().find_map(|(path, uid)| word_in(path, *uid, mount_id))
}

pub(super) fn word_in(directory: &Path, owner: u32, mount_id: &str) -> Option<KeeperWord> {
    let directory = Directory::open(directory, owner).ok()??;
    for _ in 0..READS {
        let bytes = directory.read(&format!("{mount_id}{SUFFIX}")).ok()??;
        if let Ok(word) = serde_json::from_slice(&bytes) {
            return Some(word);
        }
        std::thread::sleep(RETRY);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_keeper_and_its_word_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let me = nix::unistd::geteuid().as_raw();
        let file = KeeperFile::claim_in(directory.path(), "id").unwrap().unwrap();
        assert_eq!(KeeperFile::claim_in(directory.path(), "id").unwrap_err().exit_code(), 3);
        assert!(KeeperFile::claim_in(directory.path(), "other").unwrap().is_some());
        let upgrade = Upgrade { error: Some("é".repeat(9_000)), ..Upgrade::default() };
        file.say(&KeeperWord { keeper_pid: 7, upgrade: Some(upgrade), ..KeeperWord::default() });
        file.say(&KeeperWord { keeper_pid: 8, ..KeeperWord::default() });
        assert_eq!(word_in(directory.path(), me, "id").unwrap().keeper_pid, 8);
        assert!(word_in(directory.path(), me, "nobody").is_none());
        file.remove();
        assert!(word_in(directory.path(), me, "id").is_none());
        assert!(KeeperFile::claim_in(directory.path(), "id").unwrap().is_some());
    }
}
