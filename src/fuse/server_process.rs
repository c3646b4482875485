//! The keeper's hold on one server process: its start, its link, its end.
//!
//! A server is the keeper's child, unless it has made the keeper itself because the one before died. Either way its end is seen
//! by a descriptor of the process (pidfd): it tells when all threads have ended, that is, when all their I/O has.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::error::{Error, Result};
use crate::fuse::VERB_SERVER;
use crate::fuse::link::{Link, ToServer};
use crate::image::DescriptorRole;
use crate::sys::process;

/// How long a server may take to leave after a failed start, before it is killed.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// A descriptor that a server gave to keep: its name for the volume, the role, the descriptor.
pub(super) type Parked = (String, DescriptorRole, OwnedFd);

/// A running server.
pub(super) struct Server {
    pub(super) process: Process,
    pub(super) link: Link,
    /// It closed its end of the link.
    pub(super) silent: bool,
    pub(super) serving_since: Option<Instant>,
    /// It has answered a request.
    pub(super) answered: bool,
    /// What it said before it left.
    pub(super) failure: Option<Error>,
}

/// Its process.
pub(super) struct Process {
    pub(super) pid: u32,
    /// Readable once it has ended.
    pub(super) descriptor: OwnedFd,
    /// A child of this process, which reaps it.
    pub(super) is_child: bool,
}

/// How a server ended.
pub(super) struct Ending {
    /// As a clause.
    pub(super) text: String,
    pub(super) success: bool,
    /// By itself, of what it did: not by being killed, nor by leaving.
    pub(super) crashed: bool,
}

impl Server {
    /// Starts `program` as one. It does nothing before it is [told](Server::tell) what.
    pub(super) fn start(program: &Path) -> Result<Server> {
        let failed = |error: std::io::Error| Error::io("cannot start the server process", &error);
        let (link, theirs) = Link::pair()?;
        let mut command = Command::new(program);
        command.arg0("livemirror").arg(VERB_SERVER).stdin(theirs).stdout(Stdio::null());
        // The service manager is the keeper's business.
        for name in ["NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            command.env_remove(name);
        }
        // A group of its own: Ctrl-C reaches it through the keeper only.
        let mut child = command.process_group(0).current_dir("/").spawn().map_err(failed)?;
        // The command holds the other end; without this the server's end would go unnoticed.
        drop(command);
        let descriptor = match process::open(child.id()) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(error));
            }
        };
        Ok(Server::known(Process { pid: child.id(), descriptor, is_child: true }, link))
    }

    /// Hands it `start`, the record of requests under way, and what is parked.
    pub(super) fn tell(&self, start: &ToServer, flights: Option<BorrowedFd<'_>>, parked: &[Parked]) {
        let mut sent = self.link.send(start, flights);
        for (volume, role, descriptor) in parked {
            let message = ToServer::Parked { volume: volume.clone(), role: *role };
            sent = sent.and_then(|()| self.link.send(&message, Some(descriptor.as_fd())));
        }
        if let Err(error) = sent {
            // It is dead already; the keeper is about to reap it.
            log::warn!("{error}");
        }
    }

    /// One that runs already.
    pub(super) fn known(process: Process, link: Link) -> Server {
        Server { process, link, silent: false, serving_since: None, answered: false, failure: None }
    }

    /// Lets a server that never got to serve leave, and reaps it. Without link and connection it has nothing to stay for.
    pub(super) fn dismiss(self) {
        let Server { process, link, .. } = self;
        drop(link);
        let asked = Instant::now();
        while asked.elapsed() < LEAVE_LIMIT {
            if !matches!(process.try_reap(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        process.signal(Signal::SIGKILL);
        let _ = poll(&mut [PollFd::new(process.descriptor.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
        let _ = process.try_reap();
    }
}

impl Process {
    pub(super) fn signal(&self, signal: Signal) {
        // One that has ended needs none.
        let _ = process::signal(self.descriptor.as_fd(), signal as i32);
    }

    /// Reaps it, if it has ended.
    pub(super) fn try_reap(&self) -> Result<Option<Ending>> {
        let mut polled = [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut polled, PollTimeout::ZERO), Ok(1)) {
            return Ok(None);
        }
        if !self.is_child {
            return Ok(Some(Ending {
                text: "ended (how, only its dead keeper knew)".into(),
                success: false,
                crashed: false,
            }));
        }
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        match waitid(Id::PIDFd(self.descriptor.as_fd()), flags) {
            Ok(WaitStatus::Exited(_, code)) => {
                Ok(Some(Ending { text: format!("exited with code {code}"), success: code == 0, crashed: false }))
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                Ok(Some(Ending { text: format!("was killed by {signal}"), success: false, crashed: is_crash(signal) }))
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(None),
            // Somebody else has reaped it.
            Err(nix::errno::Errno::ECHILD) => {
                Ok(Some(Ending { text: "ended (how, is not known)".into(), success: false, crashed: false }))
            }
            Err(errno) => Err(Error::io("cannot wait for the server", &errno.into())),
        }
    }
}

/// A signal that a process gets for what it did itself. SIGKILL is not one: the operator, or the system short of memory.
fn is_crash(signal: Signal) -> bool {
    use Signal::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
    matches!(signal, SIGABRT | SIGBUS | SIGFPE | SIGILL | SIGSEGV | SIGSYS | SIGTRAP)
}
