//! The packets between launcher, keeper and server: JSON, one message a packet (SOCK_SEQPACKET), at most one descriptor with it.
//!
//! ```text
//! launcher            keeper                                   server
//!    | --- config ----> |                                        |
//!    |                  | --- Start, Parked... ----------------> |
//!    |                  | <------------- Park... (first start) - | opens and locks the images
//!    |                  | <-------------------------- Opened --- |
//!    |                  | mounts (first start)                   |
//!    |                  | --- Connection | MountFailed --------> |
//!    |                  | <------------------- Serving | Failed  |
//!    |                  | checks the disks (first start)         |
//!    | <--- Ready ----- |                                        |
//!    |                  | <--------------- Unmount, Park, Unpark |
//!    |                  | --- Unmounted -----------------------> |
//! ```
//!
//! A keeper and its server may be of different versions for a while: unknown fields are passed over, and what was added later
//! has a default.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::sys::signal::SigSet;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::init::Negotiated;
use crate::image::DescriptorRole;
use crate::server::config::MountConfig;
use crate::sys::descriptor;

/// Longest packet; a configuration with some hundred disks fits.
const PACKET_BYTES_MAX: usize = 160 << 10;

/// An error on its way to another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    kind: String,
    text: String,
    advice: Option<String>,
}

const KINDS: [(ErrorKind, &str); 12] = [
    (ErrorKind::Usage, "usage"),
    (ErrorKind::NotNow, "not-now"),
    (ErrorKind::Locked, "locked"),
    (ErrorKind::Superseded, "superseded"),
    (ErrorKind::NotFound, "not-found"),
    (ErrorKind::Exists, "exists"),
    (ErrorKind::Unsupported, "unsupported"),
    (ErrorKind::NoSpace, "no-space"),
    (ErrorKind::ReadOnly, "read-only"),
    (ErrorKind::Corrupt, "corrupt"),
    (ErrorKind::Different, "different"),
    (ErrorKind::Failed, "failed"),
];

impl From<&Error> for WireError {
    fn from(error: &Error) -> Self {
        let kind = KINDS.iter().find(|(kind, _)| *kind == error.kind()).map_or("failed", |(_, name)| name);
        WireError { kind: kind.into(), text: error.to_string(), advice: error.advice().map(Into::into) }
    }
}

impl From<WireError> for Error {
    fn from(wire: WireError) -> Self {
        let kind = KINDS.iter().find(|(_, name)| *name == wire.kind).map_or(ErrorKind::Failed, |(kind, _)| *kind);
        let error = Error::new(kind, wire.text);
        match wire.advice {
            Some(advice) => error.advise(advice),
            None => error,
        }
    }
}

/// Keeper to launcher.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToLauncher {
    /// The disks can be used.
    Ready {
        /// Their paths.
        paths: Vec<PathBuf>,
    },
    /// Nothing is mounted and nothing was left behind.
    Failed(WireError),
}

/// Keeper to server.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToServer {
    /// The first message. The record of requests under way comes with it, if there is one.
    Start {
        /// What to mount.
        config: MountConfig,
        /// True if nothing is mounted yet.
        first: bool,
        /// How many servers ran before this one.
        restarts: u64,
        /// How the last one ended.
        last_exit: Option<String>,
        /// How many `Parked` follow.
        parked: usize,
        /// The last server died by itself: perhaps of a request.
        #[serde(default)]
        crashed: bool,
        /// A service manager keeps everything that the keeper keeps: see [`crate::fuse::Start::kept_by_manager`].
        #[serde(default)]
        kept_by_manager: bool,
    },
    /// A parked descriptor comes with it.
    Parked {
        /// As parked.
        volume: String,
        /// As parked.
        role: DescriptorRole,
    },
    /// The connection comes with it.
    Connection(Negotiated),
    /// There is no mount: leave.
    MountFailed(WireError),
    /// Answers `Unmount`.
    Unmounted(Option<WireError>),
    /// Answers `Adopt`.
    Adopted,
}

/// Server to keeper.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToKeeper {
    /// Keep the descriptor that comes with it; replaces one of the same volume and role.
    Park {
        /// The server's name for it.
        volume: String,
        /// Which one.
        role: DescriptorRole,
    },
    /// Close it.
    Unpark {
        /// As parked.
        volume: String,
        /// As parked.
        role: DescriptorRole,
    },
    /// All images are open and locked.
    Opened,
    /// Requests are being answered.
    Serving {
        /// The disks' paths.
        paths: Vec<PathBuf>,
    },
    /// A first request was answered. Said by servers of versions before; now it is in the record of requests under way.
    Answered,
    /// The server is about to leave because of this.
    Failed(WireError),
    /// Unmount.
    Unmount {
        /// Even when in use.
        abort: bool,
    },
    /// Be the keeper of a mount that has lost its own; the connection comes with it. `Process`, `Flights` and what is parked follow.
    Adopt(Box<Adoption>),
    /// The server's process comes with it, as a descriptor.
    Process,
    /// The record of requests under way comes with it, if there is one.
    Flights,
}

/// What a server tells a keeper that it makes itself.
#[derive(Debug, Serialize, Deserialize)]
pub struct Adoption {
    /// What is mounted.
    pub config: MountConfig,
    /// What was agreed on with the kernel.
    pub negotiated: Negotiated,
    /// How many servers ran before this one.
    pub restarts: u64,
    /// How the last one ended.
    pub last_exit: Option<String>,
    /// How many `Park` follow.
    pub parked: usize,
    /// The server.
    pub server_pid: u32,
}

/// One end of a link.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
}

impl Link {
    /// Both ends of a new link.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn pair() -> Result<(Link, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| Error::io("cannot make a socket pair", &errno.into()))?;
        Ok((Link { socket: ours }, theirs))
    }

    /// The end that this process got as its standard input, which becomes /dev/null. Signals that its parent had blocked are
    /// unblocked: call it before any thread is made.
    ///
    /// # Errors
    /// Standard input cannot be replaced.
    pub fn from_stdin() -> Result<Link> {
        let failed = |error: std::io::Error| Error::io("cannot take over the standard input", &error);
        // A keeper takes its signals from a descriptor, so it blocks them, and a child inherits that.
        SigSet::empty().thread_set_mask().map_err(|errno| failed(errno.into()))?;
        let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
        let null = std::fs::File::open("/dev/null").map_err(failed)?;
        nix::unistd::dup2_stdin(&null).map_err(|errno| failed(errno.into()))?;
        Ok(Link { socket })
    }

    /// An end that this process has already.
    pub(super) fn from_descriptor(socket: OwnedFd) -> Link {
        Link { socket }
    }

    /// Sends a message, with a descriptor if one is given.
    ///
    /// # Errors
    /// The peer is gone, or the message is too long.
    pub fn send<T: Serialize>(&self, message: &T, with: Option<BorrowedFd<'_>>) -> Result<()> {
        let failed = |why: &std::io::Error| Error::io("cannot send to another process of this mount", why);
        let packet = serde_json::to_vec(message).map_err(|error| failed(&error.into()))?;
        if packet.len() > PACKET_BYTES_MAX {
            return Err(failed(&std::io::Error::from_raw_os_error(libc::EMSGSIZE)));
        }
        let numbers: Vec<_> = with.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &control[..0] } else { &control[..] };
        loop {
            let parts = [IoSlice::new(&packet)];
            match sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(failed(&errno.into())),
            }
        }
    }

    /// Waits for a message; `None` once the peer is gone.
    ///
    /// # Errors
    /// It is not one of the expected kind.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Option<OwnedFd>)>> {
        let failed = |why: &std::io::Error| Error::io("cannot receive from another process of this mount", why);
        let mut packet = vec![0; PACKET_BYTES_MAX];
        let (len, descriptors) = match descriptor::receive(self.socket.as_fd(), &mut packet) {
            Ok((0, _)) => return Ok(None),
            Ok(received) => received,
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => return Ok(None),
            Err(error) => return Err(failed(&error)),
        };
        let message = serde_json::from_slice(&packet[..len]).map_err(|error| failed(&error.into()))?;
        Ok(Some((message, descriptors.into_iter().next())))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_descriptors_and_the_end_is_seen() {
        let (ours, theirs) = Link::pair().unwrap();
        let theirs = Link { socket: theirs };
        let file = tempfile::tempfile().unwrap();
        let message = ToKeeper::Park { volume: "os.img".into(), role: DescriptorRole::Locked };
        ours.send(&message, Some(file.as_fd())).unwrap();
        ours.send(&ToKeeper::Opened, None).unwrap();
        drop(ours);
        let (first, descriptor) = theirs.receive::<ToKeeper>().unwrap().unwrap();
        assert!(matches!(first, ToKeeper::Park { volume, .. } if volume == "os.img"));
        assert!(descriptor.is_some());
        let (second, descriptor) = theirs.receive::<ToKeeper>().unwrap().unwrap();
        assert!(matches!(second, ToKeeper::Opened) && descriptor.is_none());
        assert!(theirs.receive::<ToKeeper>().unwrap().is_none());
        assert!(theirs.send(&ToKeeper::Opened, None).is_err());
    }

    #[test]
    fn errors_arrive_as_they_were_sent() {
        let error = Error::not_now("the disk is in use").advise("wait");
        let back = Error::from(WireError::from(&error));
        assert_eq!((back.kind(), back.to_string(), back.advice()), (error.kind(), error.to_string(), Some("wait")));
        assert_eq!(back.exit_code(), 3);
    }
}
