//! The short-lived processes: whatever may have to wait for a server is done in one, so that nobody else waits.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::fuse::{VERB_CHECK, VERB_VERSION};

/// How long a mount may take to answer [`probe`].
const PROBE_LIMIT: Duration = Duration::from_secs(2);

/// The command that looks once at each of `paths`; its exit code is 0 or the errno.
pub fn check_command(paths: &[PathBuf]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(VERB_CHECK).args(paths).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// The command that lets `program`, perhaps another version of ours, write its version to `into`: whether it can be run at all.
pub fn version_command(program: &Path, into: File) -> Command {
    let mut command = Command::new(program);
    command.arg(VERB_VERSION).current_dir("/").stdin(Stdio::null()).stdout(into).stderr(Stdio::null());
    command
}

/// Verb [`VERB_VERSION`].
pub fn version_main() -> u8 {
    println!("{}", env!("CARGO_PKG_VERSION"));
    0
}

/// What a look at a mount's root says: 0, or the errno. `None` if there was no answer in time: the server hangs, so it lives.
pub fn probe(mountpoint: &Path) -> Option<i32> {
    let mut child = check_command(&[mountpoint.to_owned()]).stderr(Stdio::null()).spawn().ok()?;
    let started = Instant::now();
    while started.elapsed() < PROBE_LIMIT {
        match child.try_wait() {
            Ok(Some(status)) => return status.code(),
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    // It ends when the server answers; whoever reaps it does not matter.
    let _ = child.kill();
    None
}

/// Verb [`VERB_CHECK`]: examines each path and reads its first bytes, if it is a file. A read that is refused or fails is an
/// answer, too (the disk may be one that this user must not read), unless it says that there is no server.
pub fn check_main(paths: &[OsString]) -> u8 {
    for path in paths {
        let read = || File::open(path)?.read_at(&mut [0; 512], 0);
        let failed = match std::fs::metadata(path) {
            Err(error) => Some(error),
            Ok(metadata) if metadata.is_file() => read().err().filter(|error| {
                matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV | libc::ESTALE))
            }),
            // What was just told may have come from the kernel's memory of a server that is dead; this never does.
            Ok(_) => nix::sys::statvfs::statvfs(path.as_os_str()).err().map(Into::into),
        };
        if let Some(error) = failed {
            return u8::try_from(error.raw_os_error().unwrap_or(libc::EIO)).unwrap_or(1);
        }
    }
    0
}

/// Verb [`crate::fuse::VERB_UNMOUNT`]: `plain|detach|force NAME`, the directory as standard input. The exit code is 0 or the errno.
pub fn unmount_main(arguments: &[OsString]) -> u8 {
    let [how, name] = arguments else { return 22 };
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if how != "plain" {
        flags |= MntFlags::MNT_DETACH;
    }
    if how == "force" {
        // Ends the connection.
        flags |= MntFlags::MNT_FORCE;
    }
    match umount2(&Path::new("/proc/self/fd/0").join(name), flags) {
        Ok(()) => 0,
        Err(errno) => u8::try_from(errno as i32).unwrap_or(1),
    }
}
