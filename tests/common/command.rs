//! Running programs, `livemirror` first of all, with a deadline and with everything they said in the failure message.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::wait::HANG;

/// A program that has ended.
#[derive(Clone, Debug)]
pub struct Done {
    /// The command, for messages.
    pub line: String,
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Done {
    /// Panics unless it exited with 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits_with(0)
    }

    /// Panics unless it exited with `code`.
    #[track_caller]
    pub fn exits_with(self, code: i32) -> Self {
        assert!(self.code == Some(code), "expected exit code {code}: {self}");
        self
    }

    /// Panics unless it failed in the way that the README promises: exit code 1, 2 or 3 and a first line on stderr that says
    /// what was wrong, naming each of `names`.
    #[track_caller]
    pub fn refuses_naming(self, names: &[&str]) -> Self {
        assert!(matches!(self.code, Some(1..=3)), "expected exit code 1, 2 or 3: {self}");
        let first = self.complaint();
        assert!(!first.trim().is_empty(), "nothing on the first line of stderr: {self}");
        assert!(!first.contains("panicked"), "a panic is no message: {self}");
        for name in names {
            assert!(first.contains(name), "the first line does not name {name:?}: {self}");
        }
        self
    }

    /// The first line on stderr.
    pub fn complaint(&self) -> &str {
        self.stderr.lines().next().unwrap_or("")
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("not JSON ({error}): {self}"))
    }
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Done { line, code, stdout, stderr } = self;
        write!(f, "`{line}` exited with {code:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}

/// Runs this crate's `livemirror`.
#[track_caller]
pub fn livemirror<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Done {
    let mut command = Command::new(binary());
    command.args(arguments);
    finish(command)
}

/// Where this crate's `livemirror` is.
pub fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_livemirror")
}

/// Runs any program.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Done {
    let mut command = Command::new(program);
    command.args(arguments);
    finish(command)
}

/// Runs a prepared command to its end. Its output must end with it: a program that detaches must let go of our pipes.
#[track_caller]
pub fn finish(command: Command) -> Done {
    finish_within(command, HANG).unwrap_or_else(|message| panic!("{message}"))
}

/// As [`finish`], with the hang as an error.
pub fn finish_within(mut command: Command, limit: Duration) -> Result<Done, String> {
    let line = shown(&command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("`{line}` cannot be started: {error}"))?;
    let stdout = collect(child.stdout.take().expect("piped"));
    let stderr = collect(child.stderr.take().expect("piped"));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| format!("`{line}`: {error}"))? {
            break status;
        }
        if start.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            let said = stderr.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
            return Err(format!("`{line}` hangs: killed after {limit:?}\n--- stderr\n{said}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let rest = Duration::from_secs(20);
    let gone = format!("`{line}` has ended, but something that it started keeps its standard output or error open");
    let stdout = stdout.recv_timeout(rest).map_err(|_| gone.clone())?;
    let stderr = stderr.recv_timeout(rest).map_err(|_| gone)?;
    Ok(Done { line, code: status.code(), stdout, stderr })
}

/// A command as a person would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

fn collect(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// True as root. Where a test needs root it says so and ends: `if !command::is_root("a loop device") { return }`.
pub fn is_root(purpose: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: {purpose} needs root");
    }
    root
}

/// True if everything is run, not only the quick set.
pub fn long() -> bool {
    std::env::var_os("LIVEMIRROR_LONG").is_some_and(|value| value != "0" && !value.is_empty())
}
