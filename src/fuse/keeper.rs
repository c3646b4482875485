//! The keeper: owns the connection to the kernel and outlives every server.
//!
//! ```text
//! start server -> images open, parked -> mount -> serving -> checked: ready
//!                                                               |
//!       connection alive:  reap, start the next server  <--- server ends ---> connection ended: done
//! ```
//!
//! It is as simple as possible, because nothing restarts it: one thread, one loop over signals and links, no image I/O, no
//! look at the mount. What may wait for the server (umount2, the check of the new disks) is done in helper processes. A
//! server is started only after the one before was reaped: the wait for it ends when the I/O of its threads has.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::helpers;
use crate::fuse::init::{Negotiated, negotiate};
use crate::fuse::link::{Link, ToKeeper, ToServer, WireError};
use crate::fuse::mount::{How, Point, mount};
use crate::fuse::server_process::{Parked, Server, describe};
use crate::fuse::session::connection_ended;
use crate::fuse::waiting::Waiting;
use crate::server::config::MountConfig;
use crate::sys::process::set_io_flusher;

/// A server that served for less than this, and answered nothing, is started again with a delay: a request may be what
/// kills it.
const SERVED_WELL: Duration = Duration::from_secs(1);
const DELAY_MIN: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(5);

struct Kept {
    fd: OwnedFd,
    negotiated: Negotiated,
    point: Point,
}

enum Purpose {
    Check(Vec<PathBuf>),
    Unmount(How),
}

struct Keeper<'a> {
    config: MountConfig,
    waiting: Waiting<'a>,
    signals: SignalFd,
    parked: Vec<Parked>,
    kept: Option<Kept>,
    server: Option<Server>,
    helper: Option<(Purpose, Child)>,
    /// The disks were shown to work once: from now on a server that dies is replaced.
    ready: bool,
    restarts: u64,
    last_exit: Option<String>,
    delay: Duration,
    restart_at: Option<Instant>,
    /// The mount was ended by force: whatever the server does now is its end.
    aborted: bool,
    /// A signal that arrived while no server served.
    held_signal: Option<Signal>,
}

/// Verb [`crate::fuse::VERB_KEEPER`].
pub fn main() -> u8 {
    match main_detached() {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{error}");
            error.exit_code()
        }
    }
}

fn main_detached() -> Result<()> {
    let link = Link::from_stdin()?;
    // The launcher may have been started as a group's leader; this process never is.
    let _ = nix::unistd::setsid();
    let Some((config, _)) = link.receive::<MountConfig>()? else { return Ok(()) };
    run(config, Waiting::Launcher(link))
}

/// Becomes the keeper of `config`, in this process.
pub(super) fn run(config: MountConfig, waiting: Waiting<'_>) -> Result<()> {
    // Inherited by every server. Allowed to root only; without it the disk works all the same.
    let _ = set_io_flusher();
    let _ = fs::write("/proc/self/oom_score_adj", "-900");
    // Started by way of /proc/self/exe, which is what `ps` and the list of an image's users would call it.
    let _ = fs::write("/proc/self/comm", "livemirror");
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        mask.add(signal);
    }
    let failed = |errno: nix::errno::Errno| Error::io("cannot receive signals", &errno.into());
    mask.thread_block().map_err(failed)?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(failed)?;
    let mut keeper = Keeper {
        config,
        waiting,
        signals,
        parked: Vec::new(),
        kept: None,
        server: None,
        helper: None,
        ready: false,
        restarts: 0,
        last_exit: None,
        delay: Duration::ZERO,
        restart_at: None,
        aborted: false,
        held_signal: None,
    };
    let result = keeper.start_server().and_then(|()| keeper.watch());
    keeper.leave(&result);
    result
}

impl Keeper<'_> {
    /// The loop. Returns when the mount has ended, or could not be made.
    fn watch(&mut self) -> Result<()> {
        loop {
            let [from_server, from_launcher] = self.wait();
            while let Ok(Some(signal)) = self.signals.read_signal() {
                self.on_signal(signal.ssi_signo)?;
            }
            if from_server {
                self.on_server_message()?;
            }
            if from_launcher && !self.ready {
                return Err(Error::new(ErrorKind::Failed, "the mount was given up: livemirror mount was interrupted"));
            }
            self.reap_helper()?;
            if self.reap_server()? {
                return Ok(());
            }
            if self.restart_at.is_some_and(|at| at <= Instant::now()) {
                self.restart_at = None;
                if let Err(error) = self.start_server() {
                    log::error!("{error}");
                    self.plan_restart();
                }
            }
        }
    }

    /// Waits for something to do: whether the server and the launcher have something to say.
    fn wait(&self) -> [bool; 2] {
        let timeout = match self.restart_at {
            Some(at) => PollTimeout::try_from(at.saturating_duration_since(Instant::now()) + Duration::from_millis(1)),
            None => Ok(PollTimeout::NONE),
        };
        let mut polled = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        let server = self.server.as_ref().filter(|server| !server.silent);
        polled.extend(server.map(|server| PollFd::new(server.link.as_fd(), PollFlags::POLLIN)));
        if let Waiting::Launcher(link) = &self.waiting {
            polled.push(PollFd::new(link.as_fd(), PollFlags::POLLIN));
        }
        let _ = poll(&mut polled, timeout.unwrap_or(PollTimeout::NONE));
        let spoke = |at: usize| polled.get(at).and_then(PollFd::any).unwrap_or(false);
        match server {
            Some(_) => [spoke(1), spoke(2)],
            None => [false, spoke(1)],
        }
    }

    fn on_signal(&mut self, number: u32) -> Result<()> {
        let signal = match i32::try_from(number).ok().and_then(|number| Signal::try_from(number).ok()) {
            Some(signal @ (Signal::SIGTERM | Signal::SIGINT)) => signal,
            // A terminal that is closed under a keeper in the foreground.
            Some(Signal::SIGHUP) if self.config.foreground => Signal::SIGTERM,
            _ => return Ok(()),
        };
        if !self.ready {
            return Err(Error::new(ErrorKind::Failed, "the mount was given up: a signal arrived before it was ready"));
        }
        match &self.server {
            Some(server) if server.serving_since.is_some() => server.signal(signal),
            _ => self.held_signal = Some(signal),
        }
        Ok(())
    }

    fn start_server(&mut self) -> Result<()> {
        let start = ToServer::Start {
            config: self.config.clone(),
            first: self.kept.is_none(),
            restarts: self.restarts,
            last_exit: self.last_exit.clone(),
            parked: self.parked.len(),
        };
        self.server = Some(Server::start(&start, &self.parked)?);
        Ok(())
    }

    fn on_server_message(&mut self) -> Result<()> {
        let Some(server) = &mut self.server else { return Ok(()) };
        match server.link.receive::<ToKeeper>() {
            Ok(Some((ToKeeper::Park { volume, role }, Some(descriptor)))) => {
                self.parked.retain(|(name, kind, _)| (name, *kind) != (&volume, role));
                self.parked.push((volume, role, descriptor));
            }
            Ok(Some((ToKeeper::Unpark { volume, role }, _))) => {
                self.parked.retain(|(name, kind, _)| (name, *kind) != (&volume, role));
            }
            Ok(Some((ToKeeper::Opened, _))) => return self.hand_over(),
            Ok(Some((ToKeeper::Serving { paths }, _))) => return self.on_serving(paths),
            Ok(Some((ToKeeper::Answered, _))) => server.answered = true,
            Ok(Some((ToKeeper::Failed(error), _))) => server.failure = Some(error.into()),
            Ok(Some((ToKeeper::Unmount { abort }, _))) => {
                self.start_unmount(if abort { How::Abort } else { How::Plain })
            }
            Ok(Some((ToKeeper::Park { .. }, None))) => log::warn!("the server parked nothing"),
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
                Ok(kept) => self.kept = Some(kept),
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

    fn tell_server(&self, message: &ToServer, kept: Option<&Kept>) {
        if let Some(server) = &self.server {
            if let Err(error) = server.link.send(message, kept.map(|kept| kept.fd.as_fd())) {
                log::warn!("{error}");
            }
        }
    }

    fn on_serving(&mut self, paths: Vec<PathBuf>) -> Result<()> {
        let Some(server) = &mut self.server else { return Ok(()) };
        server.serving_since = Some(Instant::now());
        let server_pid = server.child.id();
        if let Some(signal) = self.held_signal.take() {
            server.signal(signal);
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
        if !self.ready && self.helper.is_none() {
            let check = helpers::check_command(&paths).spawn();
            let check = check.map_err(|error| Error::io("cannot start the check of the new disks", &error))?;
            self.helper = Some((Purpose::Check(paths), check));
        }
        Ok(())
    }

    fn start_unmount(&mut self, how: How) {
        let command = match (&self.kept, &self.helper) {
            (Some(kept), None) => kept.point.unmount_command(how),
            _ => Err(Error::not_now("the mount is busy with its own start or end")),
        };
        let spawned =
            command.and_then(|mut command| command.spawn().map_err(|error| super::fusermount::cannot_run(&error)));
        match spawned {
            Ok(child) => self.helper = Some((Purpose::Unmount(how), child)),
            Err(error) => self.tell_server(&ToServer::Unmounted(Some(WireError::from(&error))), None),
        }
    }

    fn reap_helper(&mut self) -> Result<()> {
        let Some((_, child)) = &mut self.helper else { return Ok(()) };
        if !matches!(child.try_wait(), Ok(Some(_))) {
            return Ok(());
        }
        let Some((purpose, child)) = self.helper.take() else { return Ok(()) };
        // It is dead: this reads what it wrote and does not wait.
        let output = child.wait_with_output().map_err(|error| Error::io("cannot wait for a helper process", &error))?;
        match purpose {
            Purpose::Check(paths) if output.status.success() => {
                self.ready = true;
                std::mem::replace(&mut self.waiting, Waiting::Nobody).tell_ready(paths);
            }
            Purpose::Check(paths) => {
                let errno = std::io::Error::from_raw_os_error(output.status.code().unwrap_or(libc::EIO));
                let path = paths.first().map(|path| path.display().to_string()).unwrap_or_default();
                return Err(Error::io("the new disk does not answer:", &errno).on(path));
            }
            Purpose::Unmount(how) => {
                let result = self.kept.as_ref().map_or(Ok(()), |kept| kept.point.unmount_result(&output));
                self.aborted |= how == How::Abort && result.is_ok();
                let error = result.err().map(|error| WireError::from(&error));
                self.tell_server(&ToServer::Unmounted(error), None);
            }
        }
        Ok(())
    }

    /// True if the server has ended and so has the mount.
    fn reap_server(&mut self) -> Result<bool> {
        let Some(server) = &mut self.server else { return Ok(false) };
        let status = match server.child.try_wait() {
            Ok(Some(status)) => status,
            Ok(None) => return Ok(false),
            Err(error) => return Err(Error::io("cannot wait for the server", &error)),
        };
        // Its last words may still be in the link.
        while self.server.as_ref().is_some_and(|server| !server.silent) {
            self.on_server_message()?;
        }
        let Some(server) = self.server.take() else { return Ok(false) };
        let said = server.failure.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
        let exit = format!("{}{said}", describe(status));
        let Some(kept) = self.kept.as_ref().filter(|_| self.ready) else {
            return Err(server.failure.unwrap_or_else(|| Error::new(ErrorKind::Failed, format!("the server {exit}"))));
        };
        if self.aborted || connection_ended(&kept.fd) {
            if !status.success() {
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
        log::warn!("the server {exit}: starting it again");
        self.restarts += 1;
        self.last_exit = Some(exit);
        if server.answered || server.serving_since.is_some_and(|since| since.elapsed() >= SERVED_WELL) {
            self.delay = Duration::ZERO;
            self.restart_at = Some(Instant::now());
        } else {
            self.plan_restart();
        }
        Ok(false)
    }

    fn plan_restart(&mut self) {
        self.delay = (self.delay * 2).clamp(DELAY_MIN, DELAY_MAX);
        self.restart_at = Some(Instant::now() + self.delay);
    }

    /// Removes what this keeper made, and tells whoever waits.
    fn leave(&mut self, result: &Result<()>) {
        if let Some((_, mut helper)) = self.helper.take() {
            if result.is_err() {
                let _ = helper.kill();
            } else {
                let _ = helper.wait();
            }
        }
        if let Some(kept) = self.kept.take() {
            if result.is_err() {
                // Nobody could use it yet, or nobody ever can again.
                kept.point.abort();
            }
            if kept.point.is_mounted() {
                if let Err(error) = kept.point.unmount(How::Stale) {
                    log::error!("{error}");
                }
            }
        }
        if let Some(server) = self.server.take() {
            server.dismiss();
        }
        if let Some(path) = self.config.pidfile.as_ref().filter(|_| self.ready || result.is_err()) {
            let _ = fs::remove_file(path);
        }
        if let Err(error) = result {
            self.waiting.tell_failed(error);
        }
    }
}
