//! The state directory of one mount, and the one record in it.
//!
//! ```text
//! change:   save    = prepare + commit
//! cutover:  prepare -> barrier, drain, flush -> commit (one rename: from here on the new images are the disks)
//! ```
//!
//! Whoever changes the state does so one change at a time: a prepared record contains the whole mount. A record that was
//! prepared before another one was committed is refused, so that no change is lost by mistake.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::Flock;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Instant, Mutex, thread};

use super::envelope::Kind;
use super::files::{Directory, Staged};
use super::pulse::{self, Pulse};
use super::record::MountState;

pub use super::files::CommitError;

/// The name of the record in the state directory.
pub const FILE_NAME: &str = "mount.state";
const KIND: Kind = Kind { name: "mount-state", version: 1 };
/// How long another server may keep a state that is not its own.
const CLAIM_PATIENCE: Duration = Duration::from_secs(1);
const CLAIM_RETRY: Duration = Duration::from_millis(10);
const INTENT_PREFIX: &str = "intent-";

/// The state of one mount on disk.
#[derive(Clone)]
pub struct Store {
    directory: Arc<Directory>,
    /// How many commits there were, or may have been.
    commits: Arc<Mutex<u64>>,
    /// Keeps other servers away.
    claim: Option<Arc<Flock<OwnedFd>>>,
}

impl Store {
    /// Opens the state directory; makes it, with mode 0700, and what is missing above it.
    ///
    /// # Errors
    /// It cannot be made, belongs to somebody else, or others may write to it.
    pub fn open(directory: &Path) -> Result<Store> {
        Ok(Store { directory: Directory::create(directory)?, commits: Arc::new(Mutex::new(0)), claim: None })
    }

    /// Keeps every other server from this state, for as long as this lives. Waits for a moment for one that only looks whether
    /// something in it concerns it.
    ///
    /// # Errors
    /// `NotNow`: another server uses it.
    pub fn claim(self) -> Result<Store> {
        self.claim_within(CLAIM_PATIENCE)
    }

    /// [`Store::claim`] without waiting.
    ///
    /// # Errors
    /// As there.
    pub fn try_claim(self) -> Result<Store> {
        self.claim_within(Duration::ZERO)
    }

    fn claim_within(mut self, patience: Duration) -> Result<Store> {
        let deadline = Instant::now() + patience;
        loop {
            match self.directory.claim() {
                Err(error) if error.kind() == ErrorKind::NotNow && Instant::now() < deadline => {
                    thread::sleep(CLAIM_RETRY);
                }
                claimed => {
                    self.claim = claimed?.map(Arc::new);
                    return Ok(self);
                }
            }
        }
    }

    /// Opens the state directory of user `owner` to look at it. `None` if there is none; changes nothing.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_existing(directory: &Path, owner: u32) -> Result<Option<Store>> {
        let directory = Directory::open(directory, owner)?;
        Ok(directory.map(|directory| Store { directory, commits: Arc::new(Mutex::new(0)), claim: None }))
    }

    /// The path of the record.
    pub fn path(&self) -> PathBuf {
        self.directory.path_of(FILE_NAME)
    }

    /// The record; `None` if there is none yet.
    ///
    /// # Errors
    /// It cannot be read; [`ErrorKind::Corrupt`] if it is damaged or of an unknown version.
    pub fn load(&self) -> Result<Option<MountState>> {
        let Some(bytes) = self.directory.read(FILE_NAME)? else { return Ok(None) };
        KIND.decode(&bytes, &self.path()).map(Some)
    }

    /// Replaces the record, durably.
    ///
    /// # Errors
    /// As [`Store::prepare`] and [`Prepared::commit`].
    pub fn save(&self, state: &MountState) -> Result<(), CommitError> {
        self.prepare(state).map_err(CommitError::NotCommitted)?.commit()
    }

    /// Writes a new record aside, durably. The old one stays in place.
    ///
    /// # Errors
    /// It cannot be written; then nothing is left of it.
    pub fn prepare(&self, state: &MountState) -> Result<Prepared> {
        let commits_before = *self.commits.lock();
        let staged = self.directory.stage(FILE_NAME, &KIND.encode(state)?)?;
        Ok(Prepared { staged, commits: Arc::clone(&self.commits), commits_before })
    }

    /// The last pulse; `None` if there is none, or none that can be read.
    pub fn pulse(&self) -> Option<Pulse> {
        Pulse::load(&self.directory).unwrap_or_else(|error| {
            log::warn!("{error}");
            None
        })
    }

    /// Writes down that the server lives.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn beat(&self, pulse: &Pulse) -> Result<()> {
        pulse.save(&self.directory)
    }

    /// The path of the intent log of job `job`.
    pub fn intent_log(&self, job: &str) -> PathBuf {
        self.directory.path_of(&format!("{INTENT_PREFIX}{job}"))
    }

    /// Takes a copy of the intent log of job `job` from `other`, durably. Without one everything counts as marked.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub fn take_intent_log(&self, other: &Store, job: &str) -> Result<()> {
        let name = format!("{INTENT_PREFIX}{job}");
        match other.directory.read(&name)? {
            Some(bytes) => Ok(self.directory.stage(&name, &bytes)?.commit()?),
            None => self.directory.remove(&name),
        }
    }

    /// Removes the intent logs of other jobs than `jobs`: what a crash left.
    pub fn remove_intent_logs_but(&self, jobs: &[String]) {
        for name in self.directory.names().unwrap_or_default() {
            if name.strip_prefix(INTENT_PREFIX).is_some_and(|job| !jobs.iter().any(|known| known == job)) {
                if let Err(error) = self.directory.remove(&name) {
                    log::warn!("{error}");
                }
            }
        }
    }

    /// Forgets the mount: removes the record and all that belongs to it, durably. Nothing to do if there is none.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self) -> Result<()> {
        let mut commits = self.commits.lock();
        *commits += 1;
        self.remove_intent_logs_but(&[]);
        self.directory.remove(pulse::FILE_NAME)?;
        self.directory.remove(FILE_NAME)
    }

    /// Removes what a server that was killed while it wrote a record left behind. Only for the mount's own server, at its
    /// start: there is no other writer then.
    pub fn remove_leftovers(&self) {
        self.directory.remove_leftovers(FILE_NAME);
        self.directory.remove_leftovers(pulse::FILE_NAME);
    }

    /// Where tests make it fail.
    #[cfg(all(test, not(shuttle)))]
    pub(crate) fn faults(&self) -> &super::files::Faults {
        &self.directory.faults
    }
}

/// What a record of these bytes says, for the simulation.
#[cfg(all(test, shuttle))]
pub(crate) fn decode(bytes: &[u8]) -> Result<MountState> {
    KIND.decode(bytes, Path::new(FILE_NAME))
}

/// A record that was written aside. Dropping it removes it.
#[must_use = "it is not in place before it is committed"]
pub struct Prepared {
    staged: Staged,
    commits: Arc<Mutex<u64>>,
    commits_before: u64,
}

impl Prepared {
    /// Puts the record in place: one rename, and an fsync of the directory.
    ///
    /// # Errors
    /// [`CommitError::NotCommitted`] if another record was committed since this one was prepared: prepare again.
    /// [`CommitError::Undecided`] if the rename or the fsync failed: only a later commit that succeeds decides.
    pub fn commit(self) -> Result<(), CommitError> {
        let mut commits = self.commits.lock();
        if *commits != self.commits_before {
            let what = "the mount's state was changed by something else meanwhile";
            return Err(CommitError::NotCommitted(Error::new(ErrorKind::NotNow, what)));
        }
        *commits += 1;
        self.staged.commit()
    }
}
