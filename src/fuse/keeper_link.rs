//! The server's end of the link to its keeper.
//!
//! A server says, in this order: what it parks (first start), that all is [opened](KeeperLink::opened), that it
//! [serves](KeeperLink::serving). Later only [`KeeperLink::request_unmount`], [`KeeperLink::park`] and [`KeeperLink::unpark`],
//! from any thread. The keeper's death is not the server's: it goes on serving, and makes itself a new keeper (`succession`),
//! for which it has a duplicate of all that the keeper keeps.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::flights::Flights;
use crate::fuse::init::Negotiated;
use crate::fuse::link::{Link, ToKeeper, ToServer, WireError};
use crate::fuse::mount::{How, Point};
use crate::fuse::server_process::Parked;
use crate::image::DescriptorRole;
use crate::server::config::MountConfig;

/// What a server starts from.
#[derive(Debug)]
pub struct Start {
    /// What to mount.
    pub config: MountConfig,
    /// Descriptors that an earlier server parked: its name for the volume, the role, the descriptor.
    pub parked: Vec<(String, DescriptorRole, OwnedFd)>,
    /// How many servers ran before this one.
    pub restarts: u64,
    /// How the last one ended.
    pub last_exit: Option<String>,
    /// True if nothing is mounted yet.
    pub first: bool,
    /// The keeper's process id.
    pub keeper_pid: u32,
    /// A service manager keeps all that the keeper keeps, and starts the next one: SIGTERM means to leave without unmounting.
    pub kept_by_manager: bool,
}

/// The live connection to the kernel.
#[derive(Debug)]
pub struct Connection {
    /// An open /dev/fuse.
    pub fd: OwnedFd,
    /// What its first server agreed on with the kernel.
    pub negotiated: Negotiated,
    pub(super) flights: Flights,
}

/// The link to the keeper.
#[derive(Debug)]
pub struct KeeperLink {
    pub(super) link: Mutex<Arc<Link>>,
    pub(super) keeper_pid: AtomicU32,
    /// Held for a question and its answer.
    asking: Mutex<()>,
    pub(super) gone: AtomicBool,
    pub(super) kept: Mutex<Kept>,
}

/// What the keeper keeps, for the next one.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) config: Option<MountConfig>,
    pub(super) restarts: u64,
    pub(super) last_exit: Option<String>,
    /// /dev/fuse, and what was agreed on.
    pub(super) connection: Option<(OwnedFd, Negotiated)>,
    pub(super) parked: Vec<Parked>,
    /// The record of requests under way.
    pub(super) flights: Option<OwnedFd>,
    crashed: bool,
    /// So does a service manager, and it starts the next keeper.
    pub(super) by_manager: bool,
}

impl KeeperLink {
    fn new(link: Link) -> Self {
        KeeperLink {
            link: Mutex::new(Arc::new(link)),
            keeper_pid: AtomicU32::new(nix::unistd::getppid().as_raw().unsigned_abs()),
            asking: Mutex::new(()),
            gone: AtomicBool::new(false),
            kept: Mutex::default(),
        }
    }

    /// The link that this process got as its standard input. First of all, before any thread is made: it unblocks the
    /// signals that the keeper had blocked.
    ///
    /// # Errors
    /// Standard input cannot be taken over.
    pub fn from_stdin() -> Result<Self> {
        Ok(KeeperLink::new(Link::from_stdin()?))
    }

    /// A link to nobody: the other end is only kept open.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Result<(Self, OwnedFd)> {
        let (link, other) = Link::pair()?;
        Ok((KeeperLink::new(link), other))
    }

    /// The keeper's process id; another one after its death.
    pub fn keeper_pid(&self) -> u32 {
        self.keeper_pid.load(Ordering::Relaxed)
    }

    pub(super) fn link(&self) -> Arc<Link> {
        self.link.lock().clone()
    }

    fn receive(&self) -> Result<(ToServer, Option<OwnedFd>)> {
        self.link().receive()?.ok_or_else(|| {
            self.gone.store(true, Ordering::Relaxed);
            Error::new(ErrorKind::Failed, "the keeper of this mount is gone")
        })
    }

    /// Receives what this server starts from. Once, first of all.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn receive_start(&self) -> Result<Start> {
        let (start, flights) = self.receive()?;
        let ToServer::Start { config, first, restarts, last_exit, parked: count, crashed, kept_by_manager } = start
        else {
            return Err(unexpected());
        };
        let mut parked = Vec::with_capacity(count);
        while parked.len() < count {
            match self.receive()? {
                (ToServer::Parked { volume, role }, Some(descriptor)) => parked.push((volume, role, descriptor)),
                _ => return Err(unexpected()),
            }
        }
        let mut kept = self.kept.lock();
        (kept.config, kept.restarts, kept.last_exit) = (Some(config.clone()), restarts, last_exit.clone());
        (kept.flights, kept.crashed, kept.by_manager) = (flights, crashed, kept_by_manager);
        for (volume, role, descriptor) in &parked {
            kept.park(volume, *role, descriptor.as_fd())?;
        }
        Ok(Start { config, parked, restarts, last_exit, first, keeper_pid: self.keeper_pid(), kept_by_manager })
    }

    /// Gives the keeper a duplicate of `descriptor` to keep for the servers to come; it replaces one that was parked under
    /// the same `volume` (any name that the server likes) and `role`. If there is no keeper, the next one gets it.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn park(&self, volume: &str, role: DescriptorRole, descriptor: BorrowedFd<'_>) -> Result<()> {
        let mut kept = self.kept.lock();
        kept.park(volume, role, descriptor)?;
        let _ = self.link().send(&ToKeeper::Park { volume: volume.into(), role }, Some(descriptor));
        Ok(())
    }

    /// Lets the keeper close a parked descriptor.
    ///
    /// # Errors
    /// None so far.
    pub fn unpark(&self, volume: &str, role: DescriptorRole) -> Result<()> {
        let mut kept = self.kept.lock();
        kept.parked.retain(|(name, kind, _)| (name.as_str(), *kind) != (volume, role));
        let _ = self.link().send(&ToKeeper::Unpark { volume: volume.into(), role }, None);
        Ok(())
    }

    /// Says that all images are open and locked, and waits for the connection. At the first start the keeper mounts now.
    ///
    /// # Errors
    /// It could not be mounted: leave, nothing is there. Or the keeper is gone.
    pub fn opened(&self) -> Result<Connection> {
        let _asking = self.asking.lock();
        self.link().send(&ToKeeper::Opened, None)?;
        match self.receive()? {
            (ToServer::Connection(negotiated), Some(fd)) => {
                let again = fd.try_clone().map_err(|error| Error::io("cannot keep the connection", &error))?;
                let mut kept = self.kept.lock();
                kept.connection = Some((again, negotiated));
                let flights = Flights::open(kept.flights.as_ref().map(AsFd::as_fd), kept.crashed)?;
                Ok(Connection { fd, negotiated, flights })
            }
            (ToServer::MountFailed(error), _) => Err(error.into()),
            _ => Err(unexpected()),
        }
    }

    /// Says that requests are being answered and where the disks are. SIGTERM and SIGINT must be handled by now: one that
    /// arrived while no server served is forwarded at once.
    ///
    /// # Errors
    /// The message is too long.
    pub fn serving(&self, paths: &[PathBuf]) -> Result<()> {
        match self.link().send(&ToKeeper::Serving { paths: paths.to_vec() }, None) {
            // It died just now; the next one knows that this server serves.
            Err(_) if self.keeper_is_gone() => Ok(()),
            sent => sent,
        }
    }

    /// Says why this server is about to leave. `livemirror mount` prints it if nothing was mounted yet.
    pub fn failed(&self, error: &Error) {
        if self.link().send(&ToKeeper::Failed(WireError::from(error)), None).is_err() {
            log::error!("{error}");
        }
    }

    /// Unmounts, through the keeper. Flushing and saving come first and are the caller's. Do not call it from a thread that
    /// answers requests: the unmount may need one. On success the session ends on its own; after an abort that the kernel
    /// offered no switch for (see [`Point::abort`]) it ends when this process leaves, which it should then do at once.
    ///
    /// # Errors
    /// [`ErrorKind::NotNow`]: the disks are in use, nothing changed.
    pub fn request_unmount(&self, abort: bool) -> Result<()> {
        let _asking = self.asking.lock();
        if !self.keeper_is_gone() && self.link().send(&ToKeeper::Unmount { abort }, None).is_ok() {
            match self.receive() {
                Ok((ToServer::Unmounted(None), _)) => return Ok(()),
                Ok((ToServer::Unmounted(Some(error)), _)) => return Err(error.into()),
                Ok(_) => return Err(unexpected()),
                Err(_) => log::warn!("the keeper of this mount died: unmounting without it"),
            }
        }
        let mountpoint = self.kept.lock().config.as_ref().map(|config| config.mountpoint.clone()).unwrap_or_default();
        match Point::find(&mountpoint)? {
            Some(point) => point.unmount(if abort { How::Abort } else { How::Plain }),
            None => Ok(()),
        }
    }

    /// True while the keeper is known to be dead and there is no new one.
    pub fn keeper_is_gone(&self) -> bool {
        if !self.gone.load(Ordering::Relaxed) && hung_up(&self.link(), PollTimeout::ZERO) {
            self.gone.store(true, Ordering::Relaxed);
        }
        self.gone.load(Ordering::Relaxed)
    }

    /// Watches from a thread of its own: after the keeper's death makes a new one, and tells `on_new_keeper`. Once, after the session's
    /// start.
    pub fn watch(self: &Arc<Self>, on_new_keeper: impl Fn() + Send + 'static) {
        let this = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("keeper-watch".into()).stack_size(256 << 10).spawn(move || {
            this.succeed_keepers(&on_new_keeper);
        });
        if let Err(error) = spawned {
            log::warn!("cannot watch the keeper of this mount: {error}");
        }
    }
}

impl Kept {
    fn park(&mut self, volume: &str, role: DescriptorRole, descriptor: BorrowedFd<'_>) -> Result<()> {
        let descriptor = descriptor.try_clone_to_owned();
        let descriptor = descriptor.map_err(|error| Error::io("cannot keep a descriptor of", &error).on(volume))?;
        self.parked.retain(|(name, kind, _)| (name.as_str(), *kind) != (volume, role));
        self.parked.push((volume.to_owned(), role, descriptor));
        Ok(())
    }
}

pub(super) fn hung_up(link: &Link, timeout: PollTimeout) -> bool {
    let mut polled = [PollFd::new(link.as_fd(), PollFlags::empty())];
    let known = poll(&mut polled, timeout).is_ok();
    known && polled[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

fn unexpected() -> Error {
    Error::new(ErrorKind::Failed, "the keeper of this mount sent something unexpected")
}
