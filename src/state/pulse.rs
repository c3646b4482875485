//! The server's pulse: when it was last alive, and how far it had counted. Written at most once a second while there is I/O, and
//! whenever counters are shown, without fsync: after a crash it dates the death (rule 11) and lets counters go on; it decides nothing else.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::envelope::Kind;
use super::files::Directory;
use crate::error::Result;
use crate::sync::Arc;

/// The name of the file in the state directory.
pub const FILE_NAME: &str = "pulse";
const KIND: Kind = Kind { name: "pulse", version: 1 };

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulse {
    /// Nanoseconds since the epoch.
    pub when_ns: i64,
    /// By volume name.
    pub volumes: BTreeMap<String, Counts>,
}

/// What a volume's counters stood at. Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Guests read.
    pub read: u64,
    /// Guests wrote.
    pub written: u64,
    /// The mirror copied.
    pub copied: u64,
    /// The mirror zeroed on the target.
    pub zeroed: u64,
    /// The mirror freed on the target.
    pub discarded: u64,
    /// The mirror passed over.
    pub skipped: u64,
}

impl Pulse {
    pub(super) fn load(directory: &Directory) -> Result<Option<Pulse>> {
        let bytes = directory.read(FILE_NAME)?;
        bytes.map(|bytes| KIND.decode(&bytes, &directory.path_of(FILE_NAME))).transpose()
    }

    pub(super) fn save(&self, directory: &Arc<Directory>) -> Result<()> {
        directory.replace(FILE_NAME, &KIND.encode(self)?)
    }
}
