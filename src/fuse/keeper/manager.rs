//! The service manager that has started this keeper: what it is told, and which descriptors it is given to keep (sd_notify(3)).
//!
//! Every message is one datagram to the socket that NOTIFY_SOCKET names; nothing is ever answered. The manager handles them in
//! order, and all of them before it hears of the sender's end: what was sent is as good as kept.
//!
//! Whether there is a store is said by FDSTORE: systemd 254 and later sets it, the unit file does for those before. It is this process's
//! own only if the manager has started this very one (SYSTEMD_EXEC_PID, systemd 248): from the child of a script that it has started it takes
//! no descriptors (NotifyAccess=main), and gives it none.

use std::cell::Cell;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// How long a manager that does not read its messages is waited for: the mount is more important than what it knows.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long [`Manager::settle`] waits.
const SETTLES_WITHIN_MS: u16 = 5_000;

/// The way to the service manager.
pub(super) struct Manager {
    socket: UnixDatagram,
    /// It did not read its messages in time: it is not waited for again until it does.
    is_deaf: Cell<bool>,
}

/// True if the service manager says that it keeps descriptors for this service.
pub(super) fn has_store() -> bool {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.trim().parse().unwrap_or(0));
    is_ours(number("FDSTORE"), number("SYSTEMD_EXEC_PID"), std::process::id())
}

/// Whether there is a store of `size` for the process `own`, where the manager has started the process `main`.
fn is_ours(size: Option<u32>, main: Option<u32>, own: u32) -> bool {
    let kept = size.is_some_and(|size| size > 0);
    let started = main.is_none_or(|main| main == own);
    if kept && !started {
        log::warn!(
            "the service manager has started another process than this one, {own}: nothing is given to it to keep"
        );
    }
    kept && started
}

impl Manager {
    /// The one that started this process. `None`: there is none, or it does not want to hear anything.
    pub(super) fn from_environment() -> Option<Manager> {
        let name = std::env::var_os("NOTIFY_SOCKET")?;
        match connect(name.as_encoded_bytes()) {
            Ok(socket) => Some(Manager { socket, is_deaf: Cell::new(false) }),
            Err(error) => {
                log::warn!("the service manager's socket {} cannot be used: {error}", name.to_string_lossy());
                None
            }
        }
    }

    /// Tells it lines of the form `WORD=value`. False: they do not reach it.
    pub(super) fn tell(&self, lines: &str) -> bool {
        let told = self.send(lines, None);
        if let Err(error) = &told {
            log::warn!("cannot tell the service manager {lines:?}: {error}");
        }
        told.is_ok()
    }

    /// Gives it a duplicate of `descriptor` to keep under `name` (ASCII, no colon). It is not to watch it: the other end's end is no
    /// reason to let go.
    ///
    /// # Errors
    /// It does not read its messages.
    pub(super) fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> std::io::Result<()> {
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(descriptor))
    }

    /// Lets it close what it keeps under `name`.
    pub(super) fn forget(&self, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    /// Waits until it has handled all that it was told so far, within bounds.
    pub(super) fn settle(&self) {
        let settled = || -> std::io::Result<bool> {
            // It closes its end when it comes to this message.
            let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
            self.send("BARRIER=1", Some(theirs.as_fd()))?;
            drop(theirs);
            let mut polled = [PollFd::new(ours.as_fd(), PollFlags::empty())];
            Ok(poll(&mut polled, PollTimeout::from(SETTLES_WITHIN_MS))? > 0)
        };
        match settled() {
            Ok(true) => (),
            Ok(false) => log::warn!("the service manager does not handle its messages"),
            Err(error) => log::warn!("cannot wait for the service manager: {error}"),
        }
    }

    fn send(&self, text: &str, with: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let numbers: Vec<_> = with.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &control[..0] } else { &control[..] };
        loop {
            let parts = [IoSlice::new(text.as_bytes())];
            let mut flags = MsgFlags::MSG_NOSIGNAL;
            flags.set(MsgFlags::MSG_DONTWAIT, self.is_deaf.get());
            let sent = sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, flags, None);
            self.is_deaf.set(sent == Err(Errno::EAGAIN));
            match sent {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
impl Manager {
    /// One that listens at the other end of `socket`.
    pub(super) fn of(socket: UnixDatagram) -> Manager {
        Manager { socket, is_deaf: Cell::new(false) }
    }
}

fn connect(name: &[u8]) -> std::io::Result<UnixDatagram> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let address = match name {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        [b'/', ..] => SocketAddr::from_pathname(OsStr::from_bytes(name))?,
        _ => return Err(std::io::ErrorKind::Unsupported.into()),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::is_ours;

    #[test]
    fn a_store_is_that_of_the_process_that_was_started() {
        assert!(is_ours(Some(64), Some(7), 7));
        assert!(is_ours(Some(64), None, 7), "a manager that does not say");
        assert!(!is_ours(Some(64), Some(6), 7), "a script has started it");
        assert!(!is_ours(Some(0), Some(7), 7));
        assert!(!is_ours(None, Some(7), 7));
    }
}
