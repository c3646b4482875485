//! A program that keeps a file open, and QEMU's tools keeping an image locked.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

/// A child process that holds something until it is released.
pub struct Holder {
    child: Child,
    /// Kept open: a program that writes into a closed pipe would end.
    output: Option<BufReader<ChildStdout>>,
}

impl Holder {
    /// A shell that has `path` open for reading and writing.
    #[track_caller]
    pub fn of(path: &Path) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec 3<>\"$0\" && echo open && read -r line"]).arg(path);
        Holder::saying(shell, "open")
    }

    /// A shell whose working directory is `path`.
    #[track_caller]
    pub fn in_directory(path: &Path) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo open && read -r line"]).current_dir(path);
        Holder::saying(shell, "open")
    }

    /// A `qemu-io` that has the raw image `path` open for writing, with QEMU's locks.
    #[track_caller]
    pub fn qemu(path: &Path) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).arg(path);
        let mut holder = Holder::start(command);
        let input = holder.child.stdin.as_mut().expect("piped");
        input.write_all(b"length\n").expect("a command");
        holder.wait_line(|line| line.contains("iB") || line.contains("bytes"));
        holder
    }

    /// Runs `command` until it says a line with `word` in it.
    #[track_caller]
    pub fn saying(command: Command, word: &str) -> Self {
        let mut holder = Holder::start(command);
        holder.wait_line(|line| line.contains(word));
        holder
    }

    fn start(mut command: Command) -> Self {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let output = child.stdout.take().map(BufReader::new);
        Holder { child, output }
    }

    #[track_caller]
    fn wait_line(&mut self, wanted: impl Fn(&str) -> bool) {
        let output = self.output.as_mut().expect("piped");
        assert!(output.lines().map_while(Result::ok).any(|line| wanted(&line)), "it ended without a word");
    }

    /// Its process id.
    pub fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// Lets it end by itself.
    pub fn release(self) {
        self.release_saying("");
    }

    /// Tells it to end.
    pub fn release_saying(mut self, word: &str) {
        let mut input = self.child.stdin.take().expect("piped");
        input.write_all(word.as_bytes()).expect("a last word");
        drop(input);
        self.child.wait().expect("wait");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
