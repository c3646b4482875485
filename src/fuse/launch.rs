//! `livemirror mount`: starts a keeper, and waits until the disks can be used or it is known why not.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::link::{Link, ToLauncher};
use crate::fuse::waiting::Waiting;
use crate::fuse::{VERB_KEEPER, init, keeper, mountpoint};
use crate::server::config::MountConfig;

/// Mounts and returns the disks' paths once they can be used. Keeper and server then run on their own: in a session of
/// their own, with nothing of the caller's standard streams in their hands.
///
/// # Errors
/// Whatever made it fail. Then nothing is mounted and nothing is left behind.
pub fn launch(config: &MountConfig) -> Result<Vec<PathBuf>> {
    check(config)?;
    let log = Log::open(config)?;
    let result = start_keeper(config, log.file.as_fd().try_clone_to_owned());
    if result.is_err() {
        log.undo();
    }
    result
}

/// Mounts and stays: this process becomes the keeper, and standard error is the log. Calls `on_ready` with the disks' paths
/// once they can be used. Returns when the mount has ended.
///
/// # Errors
/// Whatever made it fail, or end.
pub fn run_foreground(config: &MountConfig, on_ready: impl FnOnce(&[PathBuf])) -> Result<()> {
    check(config)?;
    keeper::run(config.clone(), Waiting::Caller(Box::new(on_ready)))
}

/// A mount that a service manager has kept since the last process of it ended. First of all, before anything is opened.
///
/// # Errors
/// There is one that cannot be gone on with.
pub fn find_kept() -> Result<Option<keeper::restart::Left>> {
    keeper::restart::find()
}

fn check(config: &MountConfig) -> Result<()> {
    init::check_request_timeouts()?;
    let found = mountpoint::inspect(&config.mountpoint)?;
    if found != config.layout {
        return Err(Error::new(ErrorKind::Failed, "the mountpoint changed meanwhile:")
            .on(config.mountpoint.display().to_string()));
    }
    Ok(())
}

fn start_keeper(config: &MountConfig, log: std::io::Result<OwnedFd>) -> Result<Vec<PathBuf>> {
    let failed = |error: std::io::Error| Error::io("cannot start the keeper process", &error);
    let (link, theirs) = Link::pair()?;
    let mut keeper = Command::new("/proc/self/exe");
    keeper.arg0("livemirror").arg(VERB_KEEPER).stdin(theirs).stdout(Stdio::null()).stderr(log.map_err(failed)?);
    let mut child = keeper.current_dir("/").spawn().map_err(failed)?;
    // The command holds the other end; without this the keeper's death would go unnoticed.
    drop(keeper);
    link.send(config, None)?;
    match link.receive()? {
        Some((ToLauncher::Ready { paths }, _)) => Ok(paths),
        Some((ToLauncher::Failed(error), _)) => {
            let _ = child.wait();
            Err(error.into())
        }
        None => {
            let ended = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
            Err(Error::new(ErrorKind::Failed, format!("the keeper process died at the start ({ended})")))
        }
    }
}

/// Where keeper and server write to.
struct Log {
    file: File,
    /// What `undo` removes: the file, then the directory.
    made: Vec<PathBuf>,
}

impl Log {
    fn open(config: &MountConfig) -> Result<Log> {
        let failed = |path: &Path, error: std::io::Error| {
            Error::io("cannot write the log", &error).on(path.display().to_string())
        };
        if config.log_file.is_none() && stderr_is_journal() {
            let stderr = std::io::stderr().as_fd().try_clone_to_owned();
            let file = stderr.map_err(|error| failed(Path::new("/dev/stderr"), error))?.into();
            return Ok(Log { file, made: Vec::new() });
        }
        let mut made = Vec::new();
        let path = match &config.log_file {
            Some(path) => path.clone(),
            None => {
                let directory = &config.state_dir;
                made = missing(directory);
                let mut builder = std::fs::DirBuilder::new();
                builder.recursive(true).mode(0o700).create(directory).map_err(|error| failed(directory, error))?;
                directory.join("log")
            }
        };
        if !path.exists() {
            made.insert(0, path.clone());
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        Ok(Log { file: file.map_err(|error| failed(&path, error))?, made })
    }

    /// Leaves nothing behind of a mount that failed. Directories that are not empty stay.
    fn undo(self) {
        for path in self.made {
            let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path));
        }
    }
}

/// The directories of `path` that are not there, innermost first.
fn missing(path: &Path) -> Vec<PathBuf> {
    path.ancestors().take_while(|directory| !directory.exists()).map(Path::to_owned).collect()
}

/// True if standard error goes to the journal: systemd says so in JOURNAL_STREAM (systemd.exec(5)), as `device:inode`.
fn stderr_is_journal() -> bool {
    let Some(stream) = std::env::var("JOURNAL_STREAM").ok() else { return false };
    let stderr = std::io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let metadata = stderr.and_then(|stderr| stderr.metadata());
    metadata.is_ok_and(|metadata| stream == format!("{}:{}", metadata.dev(), metadata.ino()))
}
