//! A mount of `livemirror`, unmounted and swept away when it is dropped.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::command::{self, Done, finish_within, livemirror};
use super::leftovers;
use super::mortal;
use super::place::Place;
use super::wait;

/// What to mount, and how.
pub struct Mount<'a> {
    place: &'a Place,
    name: String,
    mountpoint: PathBuf,
    sources: Vec<OsString>,
    options: Vec<OsString>,
    ready_made: bool,
    user: Option<String>,
    network: Option<String>,
    program: PathBuf,
}

impl<'a> Mount<'a> {
    /// A mount of `sources` on a directory `mnt` of `place`, with state and control socket of its own.
    pub fn of<S: AsRef<Path>>(place: &'a Place, sources: impl IntoIterator<Item = S>) -> Self {
        Mount {
            place,
            name: "mnt".to_owned(),
            mountpoint: place.at("mnt"),
            sources: sources.into_iter().map(|source| source.as_ref().as_os_str().to_owned()).collect(),
            options: Vec::new(),
            ready_made: false,
            user: None,
            network: None,
            program: PathBuf::from(command::binary()),
        }
    }

    /// Under another name: several mounts in one place.
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self.mountpoint = self.place.at(name);
        self
    }

    /// On a mountpoint that exists: a file, for instance.
    pub fn on(mut self, mountpoint: &Path) -> Self {
        self.mountpoint = mountpoint.to_owned();
        self.ready_made = true;
        self
    }

    /// With further options.
    pub fn with<S: Into<OsString>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.options.extend(options.into_iter().map(Into::into));
        self
    }

    /// As another user. Everything in the place is given to that user first.
    pub fn by(mut self, user: &str) -> Self {
        self.user = Some(user.to_owned());
        self
    }

    /// In a network namespace, as `ip netns` calls it. All else is this host's.
    pub fn in_network(mut self, name: &str) -> Self {
        self.network = Some(name.to_owned());
        self
    }

    /// By a copy of the program.
    pub fn by_program(mut self, program: &Path) -> Self {
        self.program = program.to_owned();
        self
    }

    fn control(&self) -> PathBuf {
        self.place.at(&format!("{}.sock", self.name))
    }

    fn state_dir(&self) -> PathBuf {
        self.place.at(&format!("{}.state", self.name))
    }

    fn pidfile(&self) -> PathBuf {
        self.place.at(&format!("{}.pid", self.name))
    }

    /// The command line of it, after the program's name. Makes the mountpoint.
    pub fn words(&self) -> Vec<OsString> {
        if !self.ready_made {
            fs::create_dir_all(&self.mountpoint).expect("mkdir");
        }
        let mut arguments = vec![OsString::from("mount")];
        arguments.extend(self.sources.iter().cloned());
        arguments.push(self.mountpoint.clone().into());
        for (option, path) in
            [("--control", self.control()), ("--state-dir", self.state_dir()), ("--pidfile", self.pidfile())]
        {
            arguments.extend([option.into(), path.into()]);
        }
        arguments.extend(self.options.iter().cloned());
        arguments
    }

    /// Tries it, for refusals.
    #[track_caller]
    pub fn attempt(&self) -> Done {
        let arguments = self.words();
        match &self.user {
            None => {
                let mut command = match &self.network {
                    None => Command::new(&self.program),
                    Some(network) => {
                        let mut command = Command::new("nsenter");
                        command.arg(format!("--net=/run/netns/{network}")).arg(&self.program);
                        command
                    }
                };
                command.args(arguments);
                command::finish(command)
            }
            Some(user) => {
                command::run("chown", [OsString::from("-R"), user.into(), self.place.path().into()]).ok();
                command::finish(as_user(user, arguments))
            }
        }
    }

    /// Mounts; panics if that fails.
    #[track_caller]
    pub fn start(self) -> Mounted {
        let done = self.attempt().ok();
        self.started(done.stdout)
    }

    /// It was mounted by somebody else: a service manager.
    #[track_caller]
    pub fn started(self, printed: String) -> Mounted {
        let mut mounted = Mounted {
            dir: self.place.path().to_owned(),
            control: self.control(),
            state_dir: self.state_dir(),
            pidfile: self.pidfile(),
            mountpoint: self.mountpoint,
            user: self.user,
            printed,
            server_pid: 0,
            keeper_pid: 0,
            mounted: true,
        };
        let status = mounted.status();
        let pid = |name: &str| status[name].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
        (mounted.server_pid, mounted.keeper_pid) = (pid("server_pid"), pid("keeper_pid"));
        mounted
    }
}

/// A `livemirror` command line run as another user.
pub fn as_user<S: Into<OsString>>(user: &str, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new("runuser");
    command.args(["-u", user, "--", command::binary()]);
    command.args(arguments.into_iter().map(Into::into));
    command.env_remove("XDG_RUNTIME_DIR").env_remove("XDG_STATE_HOME");
    command
}

/// A running mount.
pub struct Mounted {
    dir: PathBuf,
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// The control socket.
    pub control: PathBuf,
    /// Its state.
    pub state_dir: PathBuf,
    /// Holds the server's pid.
    pub pidfile: PathBuf,
    /// What `livemirror mount` printed.
    pub printed: String,
    /// The server at the start.
    pub server_pid: i32,
    /// The keeper.
    pub keeper_pid: i32,
    user: Option<String>,
    mounted: bool,
}

impl Mounted {
    /// A disk by its file name; the mountpoint itself if that is a file mount.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }

    /// The first disk, as `status` names it.
    pub fn first_disk(&self) -> PathBuf {
        PathBuf::from(self.volume()["disk"].as_str().expect("a disk"))
    }

    /// Runs `livemirror VERB MOUNTPOINT ARGUMENTS` as the mount's user.
    #[track_caller]
    pub fn verb<S: Into<OsString>>(&self, verb: &str, arguments: impl IntoIterator<Item = S>) -> Done {
        self.verb_on(&self.mountpoint, verb, arguments)
    }

    /// Runs `livemirror VERB DISK ARGUMENTS` as the mount's user.
    #[track_caller]
    pub fn verb_on<S: Into<OsString>>(&self, disk: &Path, verb: &str, arguments: impl IntoIterator<Item = S>) -> Done {
        let mut words = vec![OsString::from(verb), disk.as_os_str().to_owned()];
        words.extend(arguments.into_iter().map(Into::into));
        match &self.user {
            None => livemirror(words),
            Some(user) => command::finish(as_user(user, words)),
        }
    }

    /// Starts a mirror to `target` and returns when tracking is on.
    #[track_caller]
    pub fn mirror(&self, target: &Path, options: &[&str]) {
        self.verb("mirror", words(target, options)).ok();
    }

    /// Cuts over all volumes, with patience and without a limit to the pause: on a busy machine a short one may never fit.
    #[track_caller]
    pub fn cutover(&self) {
        self.verb("cutover", ["--max-pause", "10s", "--timeout", "120s"]).ok();
    }

    /// `status --json` of the mount.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.verb("status", ["--json"]).ok().json()
    }

    /// A process of the mount, `server_pid` or `keeper_pid`, as `status` says now; 0: none.
    #[track_caller]
    pub fn pid(&self, which: &str) -> i32 {
        self.status()[which].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0)
    }

    /// Notes which processes there are now, so that [`Mounted::unmount`] waits for their end.
    #[track_caller]
    pub fn note_processes(&mut self) {
        (self.server_pid, self.keeper_pid) = (self.pid("server_pid"), self.pid("keeper_pid"));
    }

    /// The first volume's part of it.
    #[track_caller]
    pub fn volume(&self) -> Value {
        self.status()["volumes"][0].clone()
    }

    /// The first volume's mirror, `Null` if there is none.
    #[track_caller]
    pub fn job(&self) -> Value {
        self.volume()["mirror"].clone()
    }

    /// Waits until every mirror of the mount is ready.
    #[track_caller]
    pub fn wait_ready(&self) {
        self.wait_for("every mirror to be ready", |volumes| {
            for volume in volumes {
                let last = &volume["last_mirror"]["error"];
                assert!(last.is_null(), "the mirror failed: {last}");
            }
            volumes.iter().filter(|volume| !volume["mirror"].is_null()).all(|volume| volume["mirror"]["ready"] == true)
        });
    }

    /// Waits until `condition` holds for the volumes of `status --json`.
    #[track_caller]
    pub fn wait_for(&self, what: &str, mut condition: impl FnMut(&[Value]) -> bool) {
        let mut last = Value::Null;
        let come = wait::within(wait::HANG, || {
            last = self.status();
            condition(last["volumes"].as_array().expect("volumes"))
        });
        assert!(come, "hangs: waited for {what}; {last:#}");
    }

    /// The image that serves the guest now.
    #[track_caller]
    pub fn active(&self) -> PathBuf {
        PathBuf::from(self.volume()["active"].as_str().expect("active"))
    }

    /// Unmounts with `livemirror unmount`, and sees that nothing is left.
    #[track_caller]
    pub fn unmount(mut self) {
        self.verb::<OsString>("unmount", []).ok();
        self.assert_gone();
    }

    /// Sees that nothing of the mount is left: no mount, no process, no socket, no runtime file.
    #[track_caller]
    pub fn assert_gone(&mut self) {
        for pid in [self.server_pid, self.keeper_pid] {
            wait::until("the processes of an unmounted disk to end", || !leftovers::is_running(pid));
        }
        leftovers::assert_none(&self.dir, &self.mountpoint);
        assert!(!self.control.exists(), "the control socket is left behind");
        assert!(!self.pidfile.exists(), "the pidfile is left behind");
        self.mounted = false;
    }

    /// Kills keeper and server at once. The mount stays behind, dead, for the next `livemirror mount` to clean.
    #[track_caller]
    pub fn kill_everything(mut self) {
        mortal::kill_all(self.keeper_pid);
        self.mounted = false;
    }

    /// It was killed.
    pub fn forget(mut self) {
        self.mounted = false;
    }

    /// The log of server and keeper.
    pub fn log(&self) -> String {
        fs::read_to_string(self.state_dir.join("log")).unwrap_or_default()
    }
}

/// A path followed by options.
pub fn words(path: &Path, options: &[&str]) -> Vec<OsString> {
    std::iter::once(path.as_os_str().to_owned()).chain(options.iter().map(OsString::from)).collect()
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the server's log");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
        let mut command = Command::new(command::binary());
        command.arg("unmount").arg(&self.mountpoint);
        let unmounted = finish_within(command, Duration::from_secs(20)).is_ok_and(|done| done.code == Some(0));
        if !unmounted || !leftovers::mounts_below(&self.dir).is_empty() {
            leftovers::sweep(&self.dir);
            leftovers::runtime_files(&self.mountpoint).iter().for_each(|file| drop(fs::remove_file(file)));
        }
    }
}
