//! One server after the other: its start, what it says, its end.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Keeper, Kept, THIS_PROGRAM};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::flights::made_progress;
use crate::fuse::init::negotiate;
use crate::fuse::link::{ToKeeper, ToServer, WireError};
use crate::fuse::mount::{How, mount};
use crate::fuse::server_process::Server;
use crate::fuse::session::connection_ended;

/// A server that served for less than this, and answered nothing, is started again with a delay: a request may be what
/// kills it.
const SERVED_WELL: Duration = Duration::from_secs(1);
const DELAY_MIN: Duration = Duration::from_millis(20);
const DELAY_MAX: Duration = Duration::from_secs(5);

impl Keeper<'_> {
    pub(super) fn start_server(&mut self) -> Result<()> {
        self.start_server_of(Path::new(THIS_PROGRAM))
    }

    pub(super) fn start_server_of(&mut self, program: &Path) -> Result<()> {
        let start = ToServer::Start {
            config: self.config.clone(),
            first: self.kept.is_none(),
            restarts: self.restarts,
            last_exit: self.last_exit.clone(),
            parked: self.parked.len(),
            crashed: std::mem::take(&mut self.crashed),
            kept_by_manager: self.may_be_kept_by_manager(),
        };
        self.server = Some(Server::start(program)?);
        // Before it can touch an image: should everything die now, the next keeper knows whose end to wait for.
        self.say();
        if let Some(server) = &self.server {
            server.tell(&start, self.flights.as_ref().map(AsFd::as_fd), &self.parked);
        }
        Ok(())
    }

    pub(super) fn on_server_message(&mut self) -> Result<()> {
        let Some(server) = &mut self.server else { return Ok(()) };
        match server.link.receive::<ToKeeper>() {
            Ok(Some((ToKeeper::Park { volume, role }, Some(descriptor)))) => {
                self.parked.retain(|(name, kind, _)| (name, *kind) != (&volume, role));
                self.parked.push((volume, role, descriptor));
                self.tell_manager();
            }
            Ok(Some((ToKeeper::Unpark { volume, role }, _))) => {
                self.parked.retain(|(name, kind, _)| (name, *kind) != (&volume, role));
                self.tell_manager();
            }
            Ok(Some((ToKeeper::Opened, _))) => return self.hand_over(),
            Ok(Some((ToKeeper::Serving { paths }, _))) => return self.on_serving(paths),
            Ok(Some((ToKeeper::Answered, _))) => {
                server.answered = true;
                self.delay = Duration::ZERO;
            }
            Ok(Some((ToKeeper::Failed(error), _))) => server.failure = Some(error.into()),
            Ok(Some((ToKeeper::Unmount { abort }, _))) => {
                self.start_unmount(if abort { How::Abort } else { How::Plain });
            }
            Ok(Some((ToKeeper::Park { .. } | ToKeeper::Adopt(_) | ToKeeper::Process | ToKeeper::Flights, _))) => {
                log::warn!("the server said something unexpected");
            }
            Ok(None) => server.silent = true,
            Err(error) => log::warn!("{error}"),
        }
        Ok(())
    }

    /// Gives the connection to a server that has its images open; makes the connection first if there is none.
    fn hand_over(&mut self) -> Result<()> {
        if self.kept.is_none() {
            let made = mount(&self.config).and_then(|mounted| match negotiate(&mounted.connection) {
                Ok(negotiated) => Ok(Kept { fd: mounted.connection, negotiated, point: mounted.point }),
                Err(error) => {
                    let _ = mounted.point.unmount(How::Stale);
                    Err(error)
                }
            });
            match made {
                Ok(kept) => {
                    self.kept = Some(kept);
                    self.tell_manager();
                }
                Err(error) => {
                    self.tell_server(&ToServer::MountFailed(WireError::from(&error)), None);
                    return Err(error);
                }
            }
        }
        if let Some(kept) = &self.kept {
            self.tell_server(&ToServer::Connection(kept.negotiated), Some(kept));
        }
        Ok(())
    }

    pub(super) fn tell_server(&self, message: &ToServer, kept: Option<&Kept>) {
        if let Some(server) = &self.server {
            if let Err(error) = server.link.send(message, kept.map(|kept| kept.fd.as_fd())) {
                log::warn!("{error}");
            }
        }
    }

    fn on_serving(&mut self, paths: Vec<PathBuf>) -> Result<()> {
        let Some(server) = &mut self.server else { return Ok(()) };
        server.serving_since = Some(Instant::now());
        let server_pid = server.process.pid;
        if let Some(signal) = self.held_signal.take() {
            server.process.signal(signal);
        }
        if let Some(path) = &self.config.pidfile {
            if let Err(error) = fs::write(path, format!("{server_pid}\n")) {
                let error = Error::io("cannot write the pid to", &error).on(path.display().to_string());
                if !self.ready {
                    return Err(error);
                }
                log::warn!("{error}");
            }
        }
        self.say();
        if !self.ready && self.helper.is_none() {
            return self.start_check(paths);
        }
        self.on_serving_in_upgrade(&paths);
        Ok(())
    }

    /// True if the server has ended and so has the mount.
    pub(super) fn reap_server(&mut self) -> Result<bool> {
        let Some(server) = &self.server else { return Ok(false) };
        let Some(ending) = server.process.try_reap()? else { return Ok(false) };
        // Its last words may still be in the link.
        while self.server.as_ref().is_some_and(|server| !server.silent) {
            self.on_server_message()?;
        }
        let Some(server) = self.server.take() else { return Ok(false) };
        let said = server.failure.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
        let exit = format!("{}{said}", ending.text);
        let Some(kept) = self.kept.as_ref().filter(|_| self.ready) else {
            return Err(server.failure.unwrap_or_else(|| Error::new(ErrorKind::Failed, format!("the server {exit}"))));
        };
        if self.aborted || connection_ended(&kept.fd) {
            if !ending.success && server.process.is_child {
                log::warn!("the mount has ended, and the server {exit}");
            }
            return Ok(true);
        }
        if !kept.negotiated.has_resend() {
            return Err(Error::new(
                ErrorKind::Failed,
                format!("the server {exit}, and this kernel (before 6.9) cannot hand its requests to another one"),
            ));
        }
        self.restarts += 1;
        self.crashed = ending.crashed;
        if self.leaving {
            self.last_exit = Some(match ending.success {
                true => "left, for a restart of the service".into(),
                false => exit,
            });
            return Ok(true);
        }
        if self.goes_on_with_upgrade(&exit) {
            return Ok(false);
        }
        log::warn!("the server {exit}: starting it again");
        self.last_exit = Some(exit);
        let progress = self.flights.as_ref().is_some_and(|page| made_progress(page.as_fd()));
        if server.answered || progress || server.serving_since.is_some_and(|since| since.elapsed() >= SERVED_WELL) {
            self.delay = Duration::ZERO;
            self.restart_at = Some(Instant::now());
        } else {
            self.plan_restart();
        }
        self.say();
        Ok(false)
    }

    pub(super) fn plan_restart(&mut self) {
        self.delay = (self.delay * 2).clamp(DELAY_MIN, DELAY_MAX);
        self.restart_at = Some(Instant::now() + self.delay);
    }
}
