//! The pulse of a mount with an unfinished mirror: at most once a second, and only while guests write or the mirror copies. It dates
//! the death of a server (rule 11) and lets the counters go on after it. A mount without a mirror has none: idle, it sleeps.

use std::time::{Duration, Instant};

use super::backend::Server;
use crate::state::pair::now_ns;
use crate::state::{Counts, Pulse};
use crate::sync::{Condvar, Mutex, wait_until};

const EVERY: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Default)]
pub(super) struct Heartbeat {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Heartbeat {
    /// A mirror has begun.
    pub(super) fn wake(&self) {
        let _ended = self.ended.lock();
        self.changed.notify_all();
    }

    /// Nothing is written after this.
    pub(super) fn end(&self) {
        *self.ended.lock() = true;
        self.changed.notify_all();
    }

    /// Beats until it is ended; for a thread of its own.
    pub(super) fn run(&self, server: &Server) {
        let mut last = Pulse::default();
        let mut ended = self.ended.lock();
        while !*ended {
            if server.volumes.iter().any(|volume| volume.is_marking()) {
                let now = pulse(server);
                if now.volumes != last.volumes {
                    if let Err(error) = server.ledger.store.beat(&now) {
                        log::debug!("{error}");
                    }
                    last = now;
                }
                wait_until(&self.changed, &mut ended, Some(Instant::now() + EVERY));
            } else {
                self.changed.wait(&mut ended);
            }
        }
    }
}

/// How far everything has counted now.
pub(super) fn pulse(server: &Server) -> Pulse {
    let counts = |volume: &crate::volume::Volume| {
        let (read, written) = volume.traffic();
        let mirror = server.mirror_of(volume);
        let mirror = mirror.as_ref();
        Counts {
            read,
            written,
            copied: mirror.map_or(0, |job| job.copied_bytes),
            zeroed: mirror.map_or(0, |job| job.zeroed_bytes),
            discarded: mirror.map_or(0, |job| job.discarded_bytes),
            skipped: mirror.map_or(0, |job| job.skipped_bytes),
        }
    };
    let volumes = server.volumes.iter().map(|volume| (volume.name().to_owned(), counts(volume))).collect();
    Pulse { when_ns: now_ns(), volumes }
}
