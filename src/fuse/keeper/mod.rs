//! The keeper: owns the connection to the kernel and outlives every server.
//!
//! ```text
//! start server -> images open, parked -> mount -> serving -> checked: ready
//!                                                               |
//!       connection alive:  reap, start the next server  <--- server ends ---> connection ended: done
//! ```
//!
//! It is as simple as possible: one thread, one loop over signals and links, no image I/O, no look at the mount. What may
//! wait for the server (umount2, the check of the new disks) is done in helper processes. A server is started only after the
//! one before was reaped: the wait for it ends when the I/O of its threads has.
//!
//! A keeper comes into being in four ways: `livemirror mount` starts it; it replaces itself by a newer program (`table`); a
//! server whose keeper has died makes itself a new one (`adopt`); a service manager starts it with what the last one left there
//! (`restart`). A lock ([`crate::state::keeper_file`]) sees to it that there is one.

mod adopt;
mod helper;
mod manager;
pub mod restart;
mod servers;
mod service;
mod store;
mod table;
mod upgrade;

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::helper::Helper;
use self::service::Service;
use self::upgrade::Upgrading;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::init::Negotiated;
use crate::fuse::link::Link;
use crate::fuse::mount::{How, Point};
use crate::fuse::server_process::{Parked, Server};
use crate::fuse::session::connection_ended;
use crate::fuse::waiting::Waiting;
use crate::server::config::MountConfig;
use crate::state::keeper_file::{KeeperFile, KeeperWord, Upgrade};
use crate::sys::process::set_io_flusher;
use crate::sys::shared_page::SharedPage;

/// The version of this program.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The exit code of a keeper that has left its mount to the service manager. It is not 0: a manager that did not ask for a restart starts
/// the next keeper all the same, instead of closing everything.
pub const LEFT_TO_MANAGER: u8 = 75;
/// This very program, whatever has become of its file.
const THIS_PROGRAM: &str = "/proc/self/exe";

struct Kept {
    fd: OwnedFd,
    negotiated: Negotiated,
    point: Point,
}

struct Keeper<'a> {
    config: MountConfig,
    /// Where this program's file was: an upgrade finds the next one there.
    program: PathBuf,
    waiting: Waiting<'a>,
    signals: SignalFd,
    /// `None`: there was no place for it.
    file: Option<KeeperFile>,
    parked: Vec<Parked>,
    /// The record of requests under way, which the servers share. `None`: there is no memory for it.
    flights: Option<OwnedFd>,
    kept: Option<Kept>,
    server: Option<Server>,
    helper: Option<Helper>,
    /// The disks were shown to work once: from now on a server that dies is replaced.
    ready: bool,
    restarts: u64,
    last_exit: Option<String>,
    /// The last server died by itself.
    crashed: bool,
    delay: Duration,
    restart_at: Option<Instant>,
    /// The mount was ended by force: whatever the server does now is its end.
    aborted: bool,
    /// A signal that arrived while no server served.
    held_signal: Option<Signal>,
    upgrading: Option<Upgrading>,
    upgrade: Option<Upgrade>,
    /// A service manager has started this process.
    service: Option<Service>,
    /// The mount stays, with the service manager, and this keeper goes.
    leaving: bool,
    /// When to look what keeps the server that leaves.
    look_at: Option<Instant>,
}

/// Verb [`crate::fuse::VERB_KEEPER`].
pub fn main(arguments: &[OsString]) -> u8 {
    let words: Vec<_> = arguments.iter().filter_map(|word| word.to_str()).collect();
    let result = match words[..] {
        [adopt::WORD] => adopt::main(),
        [table::WORD, ref numbers @ ..] => table::main(numbers),
        _ => main_detached(),
    };
    match result {
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
    let file = KeeperFile::claim(&MountConfig::mount_id(&config.mountpoint));
    let mut keeper = Keeper::new(config, waiting, None)?;
    if matches!(keeper.waiting, Waiting::Caller(_)) {
        keeper.service = Service::new();
    }
    let result = file.and_then(|file| {
        keeper.file = file;
        keeper.flights = SharedPage::create().ok();
        keeper.start_server()?;
        keeper.watch()
    });
    keeper.leave(&result);
    result
}

/// The file of this program, as it was called when it was started.
fn own_file() -> PathBuf {
    let path = fs::read_link(THIS_PROGRAM).unwrap_or_default();
    match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(text) if !path.exists() => PathBuf::from(text),
        _ => path,
    }
}

impl<'a> Keeper<'a> {
    /// Prepares this process for its life as a keeper.
    fn new(config: MountConfig, waiting: Waiting<'a>, program: Option<PathBuf>) -> Result<Self> {
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
        Ok(Keeper {
            config,
            program: program.unwrap_or_else(own_file),
            waiting,
            signals,
            file: None,
            parked: Vec::new(),
            flights: None,
            kept: None,
            server: None,
            helper: None,
            ready: false,
            restarts: 0,
            last_exit: None,
            crashed: false,
            delay: Duration::ZERO,
            restart_at: None,
            aborted: false,
            held_signal: None,
            upgrading: None,
            upgrade: None,
            service: None,
            leaving: false,
            look_at: None,
        })
    }

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
            if (self.reap_server()? || (self.leaving && self.server.is_none())) && !self.stays_instead() {
                return Ok(());
            }
            self.see_to_upgrade();
            self.look_what_lingers();
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
        let upgrade = self.upgrading.as_ref().and_then(Upgrading::deadline);
        let helper = self.helper.as_ref().and_then(|helper| helper.deadline);
        let timeout = match [self.restart_at, upgrade, helper, self.look_at].into_iter().flatten().min() {
            Some(at) => PollTimeout::try_from(at.saturating_duration_since(Instant::now()) + Duration::from_millis(1)),
            None => Ok(PollTimeout::NONE),
        };
        let mut polled = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        // Its end shows there also where it is not a child.
        polled.extend(
            self.server.as_ref().map(|server| PollFd::new(server.process.descriptor.as_fd(), PollFlags::POLLIN)),
        );
        let mut add = |descriptor| {
            polled.push(PollFd::new(descriptor, PollFlags::POLLIN));
            polled.len() - 1
        };
        let server = self.server.as_ref().filter(|server| !server.silent).map(|server| add(server.link.as_fd()));
        let launcher = match &self.waiting {
            Waiting::Launcher(link) => Some(add(link.as_fd())),
            _ => None,
        };
        let _ = poll(&mut polled, timeout.unwrap_or(PollTimeout::NONE));
        [server, launcher].map(|at| at.and_then(|at| polled[at].any()).unwrap_or(false))
    }

    fn on_signal(&mut self, number: u32) -> Result<()> {
        let signal = match i32::try_from(number).ok().and_then(|number| Signal::try_from(number).ok()) {
            Some(signal @ (Signal::SIGTERM | Signal::SIGINT)) => signal,
            // A terminal that is closed under a keeper in the foreground.
            Some(Signal::SIGHUP) if self.config.foreground && fs::File::open("/dev/tty").is_ok() => Signal::SIGTERM,
            Some(Signal::SIGHUP) => {
                self.start_upgrade();
                return Ok(());
            }
            _ => return Ok(()),
        };
        if !self.ready {
            return Err(Error::new(ErrorKind::Failed, "the mount was given up: a signal arrived before it was ready"));
        }
        if self.leaving {
            return Ok(());
        }
        if signal == Signal::SIGTERM && self.leave_to_manager() {
            return Ok(());
        }
        // To a server SIGTERM may mean to leave the mount as it is.
        match &self.server {
            Some(server) if server.serving_since.is_some() => server.process.signal(Signal::SIGINT),
            _ => self.held_signal = Some(Signal::SIGINT),
        }
        Ok(())
    }

    /// Tells the command line and the service manager how things are.
    fn say(&mut self) {
        self.tell_manager();
        let Some(file) = &self.file else { return };
        file.say(&KeeperWord {
            keeper_pid: std::process::id(),
            version: VERSION.into(),
            server_pid: self.server.as_ref().map(|server| server.process.pid),
            serving: self.server.as_ref().is_some_and(|server| server.serving_since.is_some()),
            restarts: self.restarts,
            last_exit: self.last_exit.clone(),
            backing_off_ms: (!self.delay.is_zero()).then(|| u64::try_from(self.delay.as_millis()).unwrap_or(u64::MAX)),
            upgrade: self.upgrade.clone(),
        });
    }

    /// Removes what this keeper made, and tells whoever waits.
    fn leave(&mut self, result: &Result<()>) {
        let lives = self.kept.as_ref().is_some_and(|kept| !connection_ended(&kept.fd));
        // Where this keeper cannot go on the next one may: the manager starts it, as it does after any death.
        if lives && self.ready && self.is_kept_by_manager() && (self.leaving || result.is_err()) {
            if let Some(helper) = self.helper.take() {
                helper.abandon();
            }
            // Whether there is a server still.
            self.say();
            if result.is_ok() {
                // However this process came to be the keeper.
                std::process::exit(i32::from(LEFT_TO_MANAGER));
            }
            return;
        }
        if let Some(helper) = self.helper.take() {
            helper.dismiss(result.is_err());
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
        if let Some(file) = self.file.take() {
            file.remove();
        }
        if let Some(Service { manager, store: Some(store), .. }) = &mut self.service {
            store.empty(manager);
        }
        if let Err(error) = result {
            self.waiting.tell_failed(error);
        }
    }
}
