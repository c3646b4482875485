//! The end of a mount: asked for by a signal, by `livemirror unmount` or by QMP's `quit`.
//!
//! A signal ends an idle mount as cleanly as `unmount`. While a disk is in use it flushes, saves, names the holders, and the
//! server goes on serving until the last of them is gone.
//!
//! Where a service manager keeps the mount's descriptors, SIGTERM means a restart of the service: the server flushes, saves and leaves, and
//! the mount stays. Guests' requests go on until the very end; what is not answered then, the kernel sends to the next server.

use std::path::Path;
use std::time::Duration;

use super::backend::Server;
use crate::control::backend::Holder;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mountinfo::MountTable;
use crate::fuse::{KeeperLink, holders};
use crate::sync::{Arc, Condvar, Instant, Mutex, wait_until};
use crate::sys::process;

/// How long the end of the mount waits for a mirror to leave a consistent copy.
pub(super) const JOB_PATIENCE: Duration = Duration::from_secs(10);
/// How often a mount that was told to end is tried again while it is in use. The kernel tells nobody that it is free.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// How long to wait for a mount that is busy without a holder, and how often.
const BUSY_MOMENT: Duration = Duration::from_millis(50);
const BUSY_MOMENTS: usize = 10;
/// How long an aborted session may take to end.
const ABORT_PATIENCE: Duration = Duration::from_secs(3);

/// See the module.
pub(super) struct Departure {
    link: Arc<KeeperLink>,
    asked: Mutex<Option<Wish>>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    Unmount,
    Leave,
}

impl Departure {
    pub(super) fn new(link: Arc<KeeperLink>) -> Self {
        Departure { link, asked: Mutex::new(None), changed: Condvar::new() }
    }

    /// The keeper's process.
    pub(super) fn keeper_pid(&self) -> u32 {
        self.link.keeper_pid()
    }

    /// Leave as soon as nobody uses the disks.
    pub(super) fn ask(&self) {
        self.wish(Wish::Unmount);
    }

    /// Leave the mount as it is, to the next server.
    pub(super) fn ask_to_leave(&self) {
        self.wish(Wish::Leave);
    }

    fn wish(&self, wish: Wish) {
        let mut asked = self.asked.lock();
        if *asked != Some(Wish::Leave) {
            *asked = Some(wish);
        }
        self.changed.notify_all();
    }

    /// Waits to be asked, then tries until the mount is gone. For a thread of its own.
    pub(super) fn run(&self, server: &Server) {
        let mut asked = self.asked.lock();
        while asked.is_none() {
            self.changed.wait(&mut asked);
        }
        drop(asked);
        let mut told = false;
        loop {
            if *self.asked.lock() == Some(Wish::Leave) {
                leave(server);
            }
            match self.unmount(server, false) {
                Ok(()) => return,
                Err(error) if !told => {
                    log::warn!("{error}; the disks stay usable until nobody uses them any more");
                    told = true;
                }
                Err(_) => (),
            }
            let mut asked = self.asked.lock();
            if *asked == Some(Wish::Leave) {
                continue;
            }
            wait_until(&self.changed, &mut asked, Some(Instant::now() + RETRY_EVERY));
        }
    }

    /// Flushes, saves and unmounts.
    ///
    /// # Errors
    /// `NotNow`: the disks are in use; the message names who uses them.
    pub(super) fn unmount(&self, server: &Server, abort: bool) -> Result<()> {
        server.flush_all();
        match self.request(&server.config.mountpoint, abort) {
            Ok(()) if abort => {
                leave_soon(server);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::NotNow => {
                let mountpoint = &server.config.mountpoint;
                let holders = self.holders(mountpoint);
                if holders.is_empty() {
                    return Err(error);
                }
                let text = format!("in use by {}:", holders::describe(&holders));
                Err(Error::not_now(text)
                    .on(mountpoint.display().to_string())
                    .advise("stop them, or end the connection all the same with --abort"))
            }
            other => other,
        }
    }

    /// A mount that is busy while nobody is seen to hold it is so for a moment only: somebody looks at a process's descriptors,
    /// or a program that has just ended is being taken apart.
    fn request(&self, mountpoint: &Path, abort: bool) -> Result<()> {
        for _ in 0..BUSY_MOMENTS {
            match self.link.request_unmount(abort) {
                Err(error) if error.kind() == ErrorKind::NotNow && self.holders(mountpoint).is_empty() => {
                    std::thread::sleep(BUSY_MOMENT);
                }
                other => return other,
            }
        }
        self.link.request_unmount(abort)
    }

    /// Who keeps the mount busy.
    pub(super) fn holders(&self, mountpoint: &Path) -> Vec<Holder> {
        let table = match MountTable::read() {
            Ok(table) => table,
            Err(error) => {
                log::warn!("{error}");
                return Vec::new();
            }
        };
        table.at(mountpoint).map(holders::holders).unwrap_or_default()
    }
}

/// Flushes, saves and leaves the mount to the next server, with whatever guests are just asking for.
fn leave(server: &Server) -> ! {
    log::info!("leaving {} to the next server", server.config.mountpoint.display());
    server.suspend_jobs();
    server.heartbeat.end();
    server.flush_all();
    // No reply is dropped on the way, as nothing is unwound; and sessions still serve, also with what a library would take down.
    process::leave(0)
}

/// An aborted connection may live as long as this process does (an ordinary user has no other switch), so the process ends
/// itself when its session does not.
fn leave_soon(server: &Server) {
    let (config, volumes) = (server.config.clone(), server.volumes.clone());
    let spawned = std::thread::Builder::new().name("abort".into()).spawn(move || {
        std::thread::sleep(ABORT_PATIENCE);
        log::warn!("the session does not end after the abort: leaving");
        super::run::clean_up(&config, &volumes);
        let _ = std::fs::remove_file(&config.control);
        process::leave(0);
    });
    if let Err(error) = spawned {
        log::error!("cannot watch the end of the session: {error}");
    }
}
