//! Mounting and unmounting as an ordinary user, through the setuid helper `fusermount3`.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::descriptor;

const PROGRAM: &str = "fusermount3";

/// Mounts and returns the connection. `options` as `-o` takes them.
///
/// # Errors
/// With the helper's own words.
pub fn mount(mountpoint: &Path, options: &OsStr) -> Result<OwnedFd> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|errno| Error::io("cannot make a socket pair", &errno.into()))?;
    // It sends the connection to the descriptor that _FUSE_COMMFD names: here its standard input.
    let output =
        command().env("_FUSE_COMMFD", "0").stdin(theirs).arg("-o").arg(options).arg("--").arg(mountpoint).output();
    let output = output.map_err(|error| cannot_run(&error))?;
    if !output.status.success() {
        return Err(said("cannot mount", mountpoint, &output));
    }
    match descriptor::receive(ours.as_fd(), &mut [0; 16]) {
        Ok((_, mut descriptors)) if !descriptors.is_empty() => Ok(descriptors.remove(0)),
        Ok(_) => Err(Error::new(ErrorKind::Failed, format!("{PROGRAM} sent no connection for")).on(shown(mountpoint))),
        Err(error) => Err(Error::io(format!("{PROGRAM} sent no connection for"), &error).on(shown(mountpoint))),
    }
}

/// The command that unmounts; its standard error says what went wrong.
pub fn unmount_command(mountpoint: &Path, lazy: bool) -> Command {
    let mut command = command();
    command.stdin(Stdio::null()).arg(if lazy { "-uz" } else { "-u" }).arg("--").arg(mountpoint);
    command
}

/// What came of [`unmount_command`].
///
/// # Errors
/// [`ErrorKind::NotNow`] if the mount is in use.
pub fn unmount_result(mountpoint: &Path, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    if String::from_utf8_lossy(&output.stderr).contains("Device or resource busy") {
        return Err(super::mount::busy(mountpoint));
    }
    Err(said("cannot unmount", mountpoint, output))
}

fn command() -> Command {
    let mut command = Command::new(PROGRAM);
    command.env("LC_ALL", "C").stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

pub(super) fn cannot_run(error: &std::io::Error) -> Error {
    Error::io(format!("cannot run {PROGRAM}"), error)
        .advise("an ordinary user needs it to mount: install the package fuse3")
}

fn said(what: &str, mountpoint: &Path, output: &Output) -> Error {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.lines().next().unwrap_or_default().trim();
    let text = text.strip_prefix(PROGRAM).map_or(text, |rest| rest.trim_start_matches([':', ' ']));
    let text = if text.is_empty() { output.status.to_string() } else { text.to_owned() };
    let error = Error::new(ErrorKind::Failed, format!("{what} {}: {PROGRAM}: {text}", mountpoint.display()));
    if text.contains("user_allow_other") {
        return error.advise("root can allow it: add the line user_allow_other to /etc/fuse.conf");
    }
    error
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// `name=value` with the characters escaped that separate options.
pub fn option(name: &str, value: &OsStr) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = [name.as_bytes(), b"="].concat();
    for byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            bytes.push(b'\\');
        }
        bytes.push(*byte);
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_are_escaped() {
        assert_eq!(option("fsname", OsStr::new("/a,b\\c")), OsStr::new("fsname=/a\\,b\\\\c"));
    }
}
