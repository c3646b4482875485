//! Ctrl-C while something is waited for: it ends the waiting, at a place where nothing is half done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::error::{Error, Result};

/// Whether somebody wants this to end. A second signal ends the process at once.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes notice of SIGINT, SIGTERM and SIGHUP from now on.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub fn watch() -> Result<Interrupt> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let both = signal_hook::flag::register_conditional_default(signal, Arc::clone(&flag))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)));
            both.map_err(|error| Error::io("cannot watch for signals", &error))?;
        }
        Ok(Interrupt(flag))
    }

    /// One that comes when the test says so.
    #[cfg(test)]
    pub fn pretended(came: bool) -> Interrupt {
        Interrupt(Arc::new(AtomicBool::new(came)))
    }

    /// True once a signal came.
    pub fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
