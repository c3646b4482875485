//! Descriptors: replacing what stands behind a number, receiving some from another process, keeping some over an exec.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Lets the number of `target` name what `source` names: one atomic step, seen by every holder of the number. What
/// stood there before is closed. The number stays close-on-exec.
///
/// The owner of `target` keeps owning the number; it only finds another open file behind it.
///
/// # Errors
/// As dup3(2).
pub fn replace(target: BorrowedFd<'_>, source: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both numbers are open, since they are borrowed. dup3 ends the old open file of `target` but never leaves
    // the number closed, so whoever owns it still owns an open descriptor (dup(2)).
    match unsafe { libc::dup3(source.as_raw_fd(), target.as_raw_fd(), libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Receives one packet into `buffer` with the descriptors that came along (close-on-exec). 0 bytes: the peer is gone.
///
/// # Errors
/// As recvmsg(2); `EMSGSIZE` if the packet or its descriptors did not fit.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 4]);
    let mut parts = [IoSliceMut::new(buffer)];
    let (len, fit, numbers) = loop {
        match recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(message) => {
                let mut numbers = Vec::new();
                let lost = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
                if let Ok(control) = message.cmsgs() {
                    for part in control {
                        if let ControlMessageOwned::ScmRights(more) = part {
                            numbers.extend(more);
                        }
                    }
                }
                break (message.bytes, !message.flags.intersects(lost), numbers);
            }
        }
    };
    // SAFETY: the kernel installed these numbers for this call (unix(7), SCM_RIGHTS): they are open, and nobody else in
    // this process knows of them.
    let descriptors = numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect();
    if !fit {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok((len, descriptors))
}

/// Lets a descriptor stay open over execve(2), or closes it then, as all others are.
///
/// # Errors
/// As fcntl(2).
pub fn keep_over_exec(descriptor: impl AsFd, keep: bool) -> io::Result<()> {
    let flags = if keep { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
    fcntl(descriptor, FcntlArg::F_SETFD(flags)).map(drop).map_err(Into::into)
}

/// Takes a descriptor over that this program had open before it replaced itself by execve(2) (see [`keep_over_exec`]), or that
/// its parent handed it by number. It is closed at the next one. Each number once, before anything else opens descriptors
/// by numbers that it was told.
///
/// # Errors
/// `EBADF`: it is not open.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(2) with F_GETFD only looks at a number; one that is not open is an error.
    if number <= 2 || unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open, and the caller is the first to own the number in this program.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    keep_over_exec(&descriptor, false)?;
    Ok(descriptor)
}
