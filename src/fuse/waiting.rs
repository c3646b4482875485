//! Whoever waits for a mount to be made: told once, that it is ready or why it failed.

use std::path::PathBuf;

use crate::error::Error;
use crate::fuse::link::{Link, ToLauncher, WireError};

/// Called with the paths of the disks.
type OnReady<'a> = Box<dyn FnOnce(&[PathBuf]) + 'a>;

/// See the module.
pub(super) enum Waiting<'a> {
    /// `livemirror mount`, in a process of its own.
    Launcher(Link),
    /// The same process, in the foreground: gets a failure as the keeper's result.
    Caller(OnReady<'a>),
    /// It was told.
    Nobody,
}

impl Waiting<'_> {
    /// The disks can be used.
    pub(super) fn tell_ready(self, paths: Vec<PathBuf>) {
        match self {
            Waiting::Launcher(link) => {
                // A launcher that died by now leaves a mount that works.
                let _ = link.send(&ToLauncher::Ready { paths }, None);
            }
            Waiting::Caller(on_ready) => on_ready(&paths),
            Waiting::Nobody => {}
        }
    }

    /// There is no mount.
    pub(super) fn tell_failed(&self, error: &Error) {
        if let Waiting::Launcher(link) = self {
            let _ = link.send(&ToLauncher::Failed(WireError::from(error)), None);
        }
    }
}
