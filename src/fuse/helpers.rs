//! The short-lived processes: whatever may have to wait for a server is done in one, so that nobody else waits.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::fuse::VERB_CHECK;

/// How long a mount may take to answer [`probe`].
const PROBE_LIMIT: Duration = Duration::from_secs(2);

/// The command that looks once at each of `paths`; its exit code is 0 or the errno.
pub fn check_command(paths: &[PathBuf]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(VERB_CHECK).args(paths).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// True unless the mount says at once that its server is gone. A server that hangs is alive.
pub fn probe(mountpoint: &Path) -> bool {
    let Ok(mut child) = check_command(&[mountpoint.to_owned()]).stderr(Stdio::null()).spawn() else { return true };
    let started = Instant::now();
    while started.elapsed() < PROBE_LIMIT {
        match child.try_wait() {
            Ok(Some(status)) => return status.code() != Some(libc::ENOTCONN),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    // It ends when the server answers; whoever reaps it does not matter.
    let _ = child.kill();
    true
}

/// Verb [`VERB_CHECK`]: examines each path and reads its first bytes. Any answer will do except that there is no server: the
/// disk may be one that this user must not read.
pub fn check_main(paths: &[OsString]) -> u8 {
    for path in paths {
        let looked =
            std::fs::metadata(path).map(|_| ()).and_then(|()| File::open(path)?.read_at(&mut [0; 512], 0).map(|_| ()));
        if let Err(error) = looked {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            if matches!(errno, libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV | libc::ENOENT | libc::ESTALE) {
                return u8::try_from(errno).unwrap_or(1);
            }
        }
    }
    0
}

/// Verb [`crate::fuse::VERB_UNMOUNT`]: `plain|force NAME`, the directory as standard input. The exit code is 0 or the errno.
pub fn unmount_main(arguments: &[OsString]) -> u8 {
    let [how, name] = arguments else { return 22 };
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if how == "force" {
        // MNT_FORCE ends the connection.
        flags |= MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
    }
    match umount2(&Path::new("/proc/self/fd/0").join(name), flags) {
        Ok(()) => 0,
        Err(errno) => u8::try_from(errno as i32).unwrap_or(1),
    }
}
