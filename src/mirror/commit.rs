//! What makes a cutover durable: the seam between the mirror and the state, or a test in its place.

use crate::error::{Error, Result};
use crate::image::{CacheMode, Image};
use crate::sync::Arc;
use crate::volume::Volume;

/// One volume's change of image.
#[derive(Clone, Debug)]
pub struct Switch {
    /// The volume.
    pub volume: Arc<Volume>,
    /// The image that it leaves.
    pub old: Arc<dyn Image>,
    /// The image that it goes to.
    pub new: Arc<dyn Image>,
    /// How that image uses the host's page cache, where it was told.
    pub cache: Option<CacheMode>,
}

/// Makes cutovers durable. The state stands behind it; tests stand in for it.
pub trait Committer: Send + Sync {
    /// Writes a record in which every switch is made, or (a copy) every mirror is over, aside, and makes it durable there.
    ///
    /// # Errors
    /// Nothing has changed.
    fn prepare(&self, switches: &[Switch], ending: Ending) -> Result<Box<dyn PreparedRecord>>;

    /// Marks the old images as superseded (rule 10). The record is durable already: an error is logged, not reported.
    fn supersede(&self, switches: &[Switch]);

    /// Writes a durable record by any means: of the switches made, or (`made == false`) of none.
    ///
    /// # Errors
    /// Still undecided.
    fn settle(&self, switches: &[Switch], made: bool) -> Result<()>;

    /// The switches are made and guests go on.
    fn switched(&self, switches: &[Switch]);
}

/// A record that waits for its one rename.
pub trait PreparedRecord {
    /// Puts the record in place.
    ///
    /// # Errors
    /// See [`CommitFailure`].
    fn commit(self: Box<Self>) -> Result<(), CommitFailure>;
}

/// Why a record is not in place.
#[derive(Debug)]
pub enum CommitFailure {
    /// Nothing was renamed: the old record stands.
    NotDone(Error),
    /// It may or may not be in place, now or after a power cut.
    Undecided(Error),
}

/// How a job that is ready ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The target becomes the disk.
    Switch,
    /// The target is left as a consistent copy.
    Copy,
}
