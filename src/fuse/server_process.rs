//! The keeper's hold on one server process: its start, its link, its end.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, Result};
use crate::fuse::VERB_SERVER;
use crate::fuse::link::{Link, ToServer};
use crate::image::DescriptorRole;

/// How long a server may take to leave after a failed start, before it is killed.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// A descriptor that a server gave to keep: its name for the volume, the role, the descriptor.
pub(super) type Parked = (String, DescriptorRole, OwnedFd);

/// A running server.
pub(super) struct Server {
    pub(super) child: Child,
    pub(super) link: Link,
    /// It closed its end of the link.
    pub(super) silent: bool,
    pub(super) serving_since: Option<Instant>,
    /// It has answered a request.
    pub(super) answered: bool,
    /// What it said before it left.
    pub(super) failure: Option<Error>,
}

impl Server {
    /// Starts one, and tells it `start` and what is parked.
    pub(super) fn start(start: &ToServer, parked: &[Parked]) -> Result<Server> {
        let failed = |error: std::io::Error| Error::io("cannot start the server process", &error);
        let (link, theirs) = Link::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("livemirror").arg(VERB_SERVER).stdin(theirs).stdout(Stdio::null());
        // A group of its own: Ctrl-C reaches it through the keeper only.
        let child = command.process_group(0).current_dir("/").spawn().map_err(failed)?;
        // The command holds the other end; without this the server's end would go unnoticed.
        drop(command);
        let mut sent = link.send(start, None);
        for (volume, role, descriptor) in parked {
            let message = ToServer::Parked { volume: volume.clone(), role: *role };
            sent = sent.and_then(|()| link.send(&message, Some(descriptor.as_fd())));
        }
        if let Err(error) = sent {
            // It is dead already; the keeper is about to reap it.
            log::warn!("{error}");
        }
        Ok(Server { child, link, silent: false, serving_since: None, answered: false, failure: None })
    }

    pub(super) fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Lets a server that never got to serve leave, and reaps it. Without link and connection it has nothing to stay for.
    pub(super) fn dismiss(self) {
        let Server { mut child, link, .. } = self;
        drop(link);
        let asked = Instant::now();
        while asked.elapsed() < LEAVE_LIMIT {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// How a server ended, as a clause.
pub(super) fn describe(status: ExitStatus) -> String {
    match status.signal().map(|number| Signal::try_from(number).map_or("an unknown signal", Signal::as_str)) {
        Some(signal) => format!("was killed by {signal}"),
        None => format!("exited with code {}", status.code().unwrap_or(-1)),
    }
}
