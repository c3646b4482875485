//! A keeper that a service manager has started in the foreground: what it tells the manager, and what it lets it keep.
//!
//! ```text
//! first start:  mount, all to the store, READY=1
//! SIGTERM:      the server flushes, saves and leaves, then the keeper: the mount stays       (a restart)
//! SIGINT:       the mount ends as soon as it is idle, and the service with it                (a stop)
//! next start:   the store is there (`restart`): goes on
//! ```
//!
//! Without a store, or where something could not be sent to it, it only says when it is ready, and SIGTERM is like SIGINT. What a clean restart does is done for the next start's
//! sake only: the store is up to date at each moment, so that any death is followed by the same start.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::Keeper;
use super::manager::{Manager, has_store};
use super::store::Store;
use crate::fuse::lingering;
use crate::fuse::session::connection_ended;

/// How long the manager may let a start take that goes on with a mount, in microseconds: one that waits for a slow image would not
/// be faster if it were killed.
const START_EXTENDED_BY_US: u64 = 24 * 3_600 * 1_000_000;

/// How often a server that leaves is looked at.
const LOOKS_EVERY: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Service {
    pub(super) manager: Manager,
    /// `None`: the manager keeps nothing.
    pub(super) store: Option<Store>,
    /// The command line that it was started with.
    pub(super) words: Vec<String>,
    told_ready: bool,
    told_status: String,
}

impl Service {
    /// `None`: this process is no service.
    pub(super) fn new() -> Option<Service> {
        let manager = Manager::from_environment()?;
        let store = has_store().then(Store::new).and_then(|made| {
            made.inspect_err(|error| log::warn!("the service manager is given nothing to keep: {error}")).ok()
        });
        Some(Service::of(manager, store, command_line(), false))
    }

    /// The one of a keeper that has replaced itself.
    pub(super) fn again(words: Vec<String>, store: Option<Store>) -> Option<Service> {
        Some(Service::of(Manager::from_environment()?, store, words, true))
    }

    pub(super) fn of(manager: Manager, store: Option<Store>, words: Vec<String>, told_ready: bool) -> Service {
        Service { manager, store, words, told_ready, told_status: String::new() }
    }

    /// A start that goes on with a mount may take longer than others.
    pub(super) fn take_time(&self) {
        self.manager.tell(&format!("EXTEND_TIMEOUT_USEC={START_EXTENDED_BY_US}"));
    }
}

/// What this program was called with.
pub(super) fn command_line() -> Vec<String> {
    std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect()
}

impl Keeper<'_> {
    /// True if a service manager may keep what this keeper keeps, and another server could go on with it.
    pub(super) fn may_be_kept_by_manager(&self) -> bool {
        let stored = self.service.as_ref().is_some_and(|service| service.store.is_some());
        stored && self.kept.as_ref().is_none_or(|kept| kept.negotiated.has_resend())
    }

    /// True if it does keep all of it: only then may the mount be left to it. What could not be sent is sent again first.
    pub(super) fn is_kept_by_manager(&mut self) -> bool {
        self.tell_manager();
        let stored = |service: &Service| service.store.as_ref().is_some_and(Store::is_complete);
        self.may_be_kept_by_manager() && self.kept.is_some() && self.service.as_ref().is_some_and(stored)
    }

    /// Brings the service manager up to date: what it keeps, and what it shows.
    pub(super) fn tell_manager(&mut self) {
        let mut service = self.service.take();
        if let Some(service) = &mut service {
            if let (Some(store), Some((table, items))) = (&mut service.store, self.table(None)) {
                // The command line is the service's own; it is with us here.
                let words = service.words.clone();
                store.keep(&service.manager, &items, |keys| {
                    let mut table = table.with_keys(keys);
                    table.service = Some(words);
                    serde_json::to_vec(&table).unwrap_or_default()
                });
            }
            let serving = self.server.as_ref().is_some_and(|server| server.serving_since.is_some());
            let what = if serving { "serving" } else { "no server serves now:" };
            let exit = self.last_exit.as_ref().map(|exit| format!("; the last one {exit}")).unwrap_or_default();
            let status = format!("{what} {}, {} restarts{exit}", self.config.mountpoint.display(), self.restarts);
            if self.ready && status != service.told_status {
                service.manager.tell(&format!("STATUS={}", status.replace('\n', " ")));
                service.told_status = status;
            }
            if self.ready && serving && !service.told_ready {
                service.told_ready = true;
                service.manager.tell("READY=1");
            }
        }
        self.service = service;
    }

    /// Leaves the mount to the service manager. False: it does not have it, so the mount ends like one that nobody keeps.
    pub(super) fn leave_to_manager(&mut self) -> bool {
        if !self.may_be_kept_by_manager() {
            return false;
        }
        let kept = self.is_kept_by_manager();
        // It may have gone since it was handed the last of it.
        if !self.service.as_ref().is_some_and(|service| service.manager.tell("STOPPING=1")) || !kept {
            log::error!(
                "the service manager does not have what it is to keep: the mount ends as soon as nobody uses it"
            );
            return false;
        }
        log::info!("leaving {} as it is, for a restart of the service", self.config.mountpoint.display());
        self.leaving = true;
        if let Some(server) = &self.server {
            // One that does not serve yet has answered nothing; it may hang on an image.
            let serves = server.serving_since.is_some();
            server.process.signal(if serves { Signal::SIGTERM } else { Signal::SIGKILL });
        }
        self.look_at = Some(Instant::now() + LOOKS_EVERY);
        true
    }

    /// The server has left the mount to the service manager, which does not have all of it now: another one serves on, to end it.
    pub(super) fn stays_instead(&mut self) -> bool {
        let lives = self.kept.as_ref().is_some_and(|kept| !connection_ended(&kept.fd));
        if !self.leaving || !lives || self.is_kept_by_manager() {
            return false;
        }
        log::error!("the service manager does not have what it is to keep: serving until nobody uses the mount");
        (self.leaving, self.look_at) = (false, None);
        self.held_signal = Some(Signal::SIGINT);
        self.restart_at = Some(Instant::now());
        true
    }

    /// Tells what keeps a server that was left to: a request that hangs in the kernel, whose end the next server has to wait for as well.
    pub(super) fn look_what_lingers(&mut self) {
        if self.look_at.is_none_or(|at| at > Instant::now()) {
            return;
        }
        self.look_at = Some(Instant::now() + LOOKS_EVERY);
        let Some(server) = &self.server else { return };
        let pid = server.process.pid;
        if let Some(left) = lingering::look(pid) {
            log::warn!(
                "server {pid} has left, but {left}; the next one serves only after it: whoever uses the disks waits"
            );
            self.look_at = None;
        }
    }
}
