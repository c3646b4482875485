//! `livemirror verify`: announced, not there yet.

use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};

/// Compares both images of a mirror while the guest runs (not there yet in this version).
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// Always.
    pub fn run(self) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "this version cannot verify a running mirror yet:")
            .on(self.disk.display().to_string())
            .advise("`livemirror finish` the mirror, unmount, and compare with `qemu-img compare SOURCE TARGET`"))
    }
}
