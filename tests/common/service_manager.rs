//! A stand-in for systemd, as far as a service with a store of descriptors sees it: sd_notify(3) and sd_listen_fds(3).
//!
//! What it takes over from systemd: messages are handled in order, all that were sent before a process ended are handled before the
//! next one starts; descriptors come as 3, 4, ... with LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES; a descriptor that is kept already is
//! not kept twice; one that shows an error is let go, unless FDPOLL=0 was said; the store is emptied when the service has stopped.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use command_fds::{CommandFdExt, FdMapping};
use livemirror::sys::descriptor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command;
use super::leftovers;
use super::mortal;
use super::mounted::{Mount, Mounted};
use super::place::Place;
use super::wait;

/// The exit code of a service that has left its mount as it is, which the unit has restarted in any case.
pub const LEFT: i32 = 75;

#[derive(Default)]
struct State {
    store: Vec<Kept>,
    ready: bool,
    status: String,
    /// Messages that were not understood.
    odd: Vec<String>,
    handled: u64,
}

struct Kept {
    name: String,
    descriptor: OwnedFd,
    watched: bool,
}

/// It, with one service.
pub struct ServiceManager {
    socket: PathBuf,
    log: PathBuf,
    words: Vec<OsString>,
    state: Arc<Mutex<State>>,
    main: Option<Child>,
    /// The process that is started is a shell, and the program its child.
    is_wrapped: bool,
    /// Nobody listens any more.
    is_gone: bool,
}

impl ServiceManager {
    /// With a service in `place` that is not started yet: `mount`, in the foreground.
    pub fn of(place: &Place, mount: &Mount<'_>) -> Self {
        let socket = place.at("notify.sock");
        let listener = UnixDatagram::bind(&socket).expect("a socket");
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        std::thread::spawn(move || while handle(&listener, &shared) {});
        let mut words = mount.words();
        words.push("--foreground".into());
        ServiceManager {
            socket,
            log: place.at("service.log"),
            words,
            state,
            main: None,
            is_wrapped: false,
            is_gone: false,
        }
    }

    /// With a service whose program is started by a script that stays.
    pub fn wrapped(place: &Place, mount: &Mount<'_>) -> Self {
        let mut manager = ServiceManager::of(place, mount);
        manager.is_wrapped = true;
        manager
    }

    /// It dies, with its socket: nothing reaches it from now on.
    #[track_caller]
    pub fn vanish(&mut self) {
        self.catch_up();
        let own = UnixDatagram::unbound().expect("a socket");
        own.send_to(b"X_END=1", &self.socket).expect("send");
        wait::until("nobody to listen", || own.send_to(b"X_END=1", &self.socket).is_err());
        self.is_gone = true;
    }

    /// `systemctl start`, of a service that comes up.
    #[track_caller]
    pub fn start(&mut self) {
        self.try_start();
        wait::until("the service to be ready", || {
            let ended = self.main.as_mut().expect("started").try_wait().expect("wait");
            assert!(ended.is_none(), "it ended at once ({ended:?}): {}", self.log());
            self.state.lock().expect("state").ready
        });
    }

    /// Starts the process, with all that is kept.
    #[track_caller]
    pub fn try_start(&mut self) {
        self.catch_up();
        let mut state = self.state.lock().expect("state");
        state.store.retain(|kept| !kept.watched || !has_error(kept));
        (state.ready, state.status) = (false, String::new());
        let names: Vec<&str> = state.store.iter().map(|kept| kept.name.as_str()).collect();
        let mut service = Command::new("sh");
        let script = match self.is_wrapped {
            true => "export LISTEN_PID=$$ SYSTEMD_EXEC_PID=$$; \"$@\"; exit $?",
            false => "export LISTEN_PID=$$ SYSTEMD_EXEC_PID=$$ && exec \"$@\"",
        };
        service.args(["-c", script, "sh", command::binary()]).args(&self.words);
        service.env("NOTIFY_SOCKET", &self.socket).env("FDSTORE", "64").current_dir("/");
        service.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        let log = File::options().create(true).append(true).open(&self.log).expect("a log");
        service.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let numbers = (3..).zip(&state.store);
        let mapped = numbers.map(|(child_fd, kept)| FdMapping {
            parent_fd: kept.descriptor.try_clone().expect("a descriptor"),
            child_fd,
        });
        service.fd_mappings(mapped.collect()).expect("numbers");
        self.main = Some(service.spawn().expect("sh"));
    }

    /// Mounted by the service that has been started.
    #[track_caller]
    pub fn mounted(&self, mount: Mount<'_>) -> Mounted {
        mount.started(String::new())
    }

    /// The main process.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.main.as_ref().expect("a service that runs").id()).expect("a pid")
    }

    /// Sends a signal to the main process only, as KillMode=mixed has it.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("kill");
    }

    /// Waits for the main process to end; its exit code.
    #[track_caller]
    pub fn wait(&mut self) -> Option<i32> {
        let mut main = self.main.take().expect("a service that runs");
        let status = wait::until_some("the service to end", || main.try_wait().expect("wait"));
        self.catch_up();
        status.code()
    }

    /// `systemctl restart`: SIGTERM, and a start. Nothing of it may be left in between.
    #[track_caller]
    pub fn restart(&mut self) {
        let servers: Vec<i32> = mortal::server_of(self.pid()).into_iter().collect();
        self.signal(Signal::SIGTERM);
        assert_eq!(self.wait(), Some(LEFT), "{}", self.log());
        assert!(!servers.into_iter().any(leftovers::is_running), "the server outlives its keeper");
        self.start();
    }

    /// Kills every process of the service, and starts it again (Restart=on-failure).
    #[track_caller]
    pub fn kill_all_and_start(&mut self) {
        mortal::kill_all(self.pid());
        assert_eq!(self.wait(), None);
        self.start();
    }

    /// `systemctl stop`: SIGINT, and the store is emptied.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal(Signal::SIGINT);
        assert_eq!(self.wait(), Some(0), "{}", self.log());
        self.drop_store();
    }

    /// The store is discarded.
    pub fn drop_store(&mut self) {
        self.state.lock().expect("state").store.clear();
    }

    /// Changes the command line of starts to come.
    pub fn add_word(&mut self, word: &str) {
        self.words.push(word.into());
    }

    /// What is kept, without the numbers.
    pub fn kept(&self) -> Vec<String> {
        self.catch_up();
        let state = self.state.lock().expect("state");
        let mut names: Vec<String> = state.store.iter().map(|kept| plain(&kept.name).to_owned()).collect();
        names.sort();
        names
    }

    /// Puts something in the store in the place of what has that name, with or without its number; what was there.
    pub fn replace(&mut self, name: &str, by: Option<OwnedFd>) -> Option<OwnedFd> {
        self.catch_up();
        let mut state = self.state.lock().expect("state");
        let at = state.store.iter().position(|kept| kept.name == name || plain(&kept.name) == name);
        let old = at.map(|at| state.store.remove(at).descriptor);
        let new = by.map(|descriptor| Kept { name: name.to_owned(), descriptor, watched: false });
        state.store.extend(new);
        old
    }

    /// The last STATUS.
    pub fn status(&self) -> String {
        self.catch_up();
        self.state.lock().expect("state").status.clone()
    }

    /// What the service has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// All that was sent so far is handled.
    #[track_caller]
    fn catch_up(&self) {
        if self.is_gone {
            return;
        }
        let handled = || self.state.lock().expect("state").handled;
        let before = handled();
        let own = UnixDatagram::unbound().expect("a socket");
        own.send_to(b"X_MARK=1", &self.socket).expect("send");
        wait::until("its messages to be handled", || handled() > before);
        let state = self.state.lock().expect("state");
        assert_eq!(state.odd, Vec::<String>::new(), "messages that no service manager understands");
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        if let Some(mut main) = self.main.take() {
            if std::thread::panicking() {
                eprintln!("--- the service's log\n{}", self.log());
            }
            let _ = main.kill();
            let _ = main.wait();
        }
        self.drop_store();
        if let Ok(own) = UnixDatagram::unbound() {
            let _ = own.send_to(b"X_END=1", &self.socket);
        }
    }
}

/// A name without its number.
fn plain(name: &str) -> &str {
    name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-')
}

fn has_error(kept: &Kept) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(kept.descriptor.as_fd(), PollFlags::empty())];
    let _ = poll(&mut polled, PollTimeout::ZERO);
    polled[0].revents().is_some_and(|events| !events.is_empty())
}

/// True if both are the same open file, as systemd finds out.
fn is_same(one: &OwnedFd, other: &OwnedFd) -> bool {
    let link = |descriptor: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd())).ok();
    // Locks and positions belong to the open file: fdinfo tells most that are not the same apart.
    let info = |descriptor: &OwnedFd| fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd())).ok();
    link(one) == link(other) && info(one) == info(other)
}

/// Handles one message. False: it was the last.
fn handle(listener: &UnixDatagram, state: &Mutex<State>) -> bool {
    let mut bytes = vec![0; 4096];
    let Ok((len, descriptors)) = descriptor::receive(listener.as_fd(), &mut bytes) else { return false };
    let text = String::from_utf8_lossy(&bytes[..len]).into_owned();
    let words: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let value = |name: &str| words.iter().find(|(word, _)| *word == name).map(|(_, value)| *value);
    let known: BTreeSet<&str> = [
        "FDSTORE",
        "FDNAME",
        "FDPOLL",
        "FDSTOREREMOVE",
        "READY",
        "STATUS",
        "STOPPING",
        "BARRIER",
        "EXTEND_TIMEOUT_USEC",
        "X_MARK",
        "X_END",
    ]
    .into();
    let mut state = state.lock().expect("state");
    if words.iter().any(|(word, _)| !known.contains(word)) {
        state.odd.push(text.clone());
    }
    let name = value("FDNAME").unwrap_or("stored").to_owned();
    if name.contains(':') || !name.is_ascii() || name.len() > 255 {
        state.odd.push(text.clone());
    }
    if value("FDSTORE") == Some("1") {
        for descriptor in descriptors {
            if !state.store.iter().any(|kept| is_same(&kept.descriptor, &descriptor)) {
                let watched = value("FDPOLL") != Some("0");
                state.store.push(Kept { name: name.clone(), descriptor, watched });
            }
        }
    }
    if value("FDSTOREREMOVE") == Some("1") {
        state.store.retain(|kept| kept.name != name);
    }
    state.ready |= value("READY") == Some("1");
    if let Some(status) = value("STATUS") {
        state.status = status.to_owned();
    }
    state.handled += u64::from(value("X_MARK").is_some());
    value("X_END").is_none()
}
