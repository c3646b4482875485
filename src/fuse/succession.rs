//! A server that has lost its keeper makes itself a new one: the program that it runs itself, told all that there is to keep.
//! Unless a service manager keeps that and starts the next keeper.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::poll::PollTimeout;

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::VERB_KEEPER;
use crate::fuse::keeper_link::{KeeperLink, hung_up};
use crate::fuse::link::{Adoption, Link, ToKeeper, ToServer};
use crate::fuse::session::connection_ended;
use crate::sys::process;

/// How long to wait before another attempt.
const DELAY_MIN: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(5);

impl KeeperLink {
    /// Waits for the keeper's death, makes a new one, and so on; returns when the connection has ended.
    pub(super) fn succeed_keepers(&self, on_new_keeper: &impl Fn()) {
        let mut delay = DELAY_MIN;
        // The last one that this server made: its child, to be reaped.
        let mut made: Option<Child> = None;
        loop {
            while !hung_up(&self.link(), PollTimeout::NONE) {}
            self.gone.store(true, Ordering::Relaxed);
            let reaped = made.take().map(|mut child| child.wait());
            if self.has_ended() {
                return;
            }
            let old = self.keeper_pid();
            if self.kept.lock().by_manager {
                // It has all that a keeper needs. The one that it starts ends this server first.
                log::warn!("the keeper, process {old}, died: the service manager is to start the next one");
                return;
            }
            match self.make_keeper() {
                Ok(child) => {
                    let how = reaped.and_then(Result::ok).map(|status| format!(" ({status})")).unwrap_or_default();
                    log::warn!("the keeper, process {old}, died{how}: process {} keeps the mount now", child.id());
                    made = Some(child);
                    delay = DELAY_MIN;
                    on_new_keeper();
                }
                Err(error) => {
                    log::error!("the keeper, process {old}, died, and there is no new one yet: {error}");
                    std::thread::sleep(delay);
                    delay = (delay * 2).min(DELAY_MAX);
                }
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.kept.lock().connection.as_ref().is_none_or(|(connection, _)| connection_ended(connection))
    }

    fn make_keeper(&self) -> Result<Child> {
        let failed = |error: std::io::Error| Error::io("cannot start the keeper process", &error);
        let (link, theirs) = Link::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("livemirror").args([VERB_KEEPER, "adopt"]).stdin(theirs).stdout(Stdio::null());
        let mut child = command.current_dir("/").spawn().map_err(failed)?;
        // The command holds the other end; without this the keeper's end would go unnoticed.
        drop(command);
        match self.hand_over(link) {
            Ok(()) => {
                self.keeper_pid.store(child.id(), Ordering::Relaxed);
                self.gone.store(false, Ordering::Relaxed);
                Ok(child)
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Tells the new keeper everything, and waits until it has understood. What is parked meanwhile waits for that.
    fn hand_over(&self, link: Link) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("cannot hand the mount to a new keeper", &error);
        let kept = self.kept.lock();
        let (Some(config), Some((connection, negotiated))) = (&kept.config, &kept.connection) else {
            return Err(Error::not_now("nothing is mounted"));
        };
        let adoption = Adoption {
            config: config.clone(),
            negotiated: *negotiated,
            restarts: kept.restarts,
            last_exit: kept.last_exit.clone(),
            parked: kept.parked.len(),
            server_pid: std::process::id(),
        };
        let this = process::open(std::process::id()).map_err(failed)?;
        link.send(&ToKeeper::Adopt(Box::new(adoption)), Some(connection.as_fd()))?;
        link.send(&ToKeeper::Process, Some(this.as_fd()))?;
        link.send(&ToKeeper::Flights, kept.flights.as_ref().map(AsFd::as_fd))?;
        for (volume, role, descriptor) in &kept.parked {
            link.send(&ToKeeper::Park { volume: volume.clone(), role: *role }, Some(descriptor.as_fd()))?;
        }
        match link.receive()? {
            Some((ToServer::Adopted, _)) => {
                *self.link.lock() = Arc::new(link);
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::Failed, "the new keeper gave up; its log says why")),
        }
    }
}
