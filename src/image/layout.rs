//! How a new image is laid out, as far as its format leaves a choice. The names are those of QEMU's `blockdev-create`.

use serde::{Deserialize, Serialize};

use super::Format;
use crate::error::{Error, Result};

/// The version of a new qcow2 file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Version {
    /// `compat=0.10`: for QEMU before 1.1. Has no zero clusters: over a backing file zeroes take room.
    V2,
    /// `compat=1.1`.
    #[default]
    V3,
}

/// What a new image has beneath it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingFile {
    /// As it is written into the new file: a relative path starts at that file's directory.
    pub file: String,
    /// `None`: told by its name and content, and then written down.
    pub format: Option<Format>,
}

/// See the module. The default is what QEMU makes where nothing is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// A power of two from 512 to 2 MiB; `None`: 64 KiB.
    pub cluster_bytes: Option<u64>,
    /// The version of the format.
    pub version: Version,
    /// What is not written to the new image is read there.
    pub backing: Option<BackingFile>,
}

impl Layout {
    /// Refuses what an image of `format` cannot be told.
    ///
    /// # Errors
    /// Wrong usage, naming the image.
    pub fn check(&self, format: Format, name: &str) -> Result<()> {
        if format == Format::Raw && *self != Layout::default() {
            let what = "a raw image has no clusters, no version and no backing file:";
            return Err(Error::usage(what).on(name).advise("ask for --format qcow2"));
        }
        Ok(())
    }
}
