//! Serving a connection that is alive: the one way in which every server starts, the first one too.
//!
//! ```text
//! socketpair:  [ours] <--- synthetic FUSE_INIT, answer ---> [session]      the library shakes hands with itself
//! dup3:        /dev/fuse takes the place of [session]                      the library does not notice
//! RESEND:      what the last server read and did not answer is queued again
//! run:         each thread allocates its buffer (populated), then reads
//! ```
//!
//! RESEND goes out before the first read: requests that this server has read must not be sent to it a second time. The
//! buffers are populated by the allocator ([`crate::sys::populate`]) before the thread that owns one can read into it, so no
//! request ever meets a page that is not there.
//!
//! Every request is answered in the thread that read it. When the connection has ended there is nothing left unanswered.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{Config, Session, SessionACL};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::crew::Crew;
use crate::fuse::disks::{DiskFilesystem, Disks};
use crate::fuse::init::{Negotiated, resend};
use crate::fuse::keeper_link::Connection;
use crate::sys::descriptor;

/// A connection that is being served.
#[derive(Debug)]
pub struct ServingSession {
    runner: JoinHandle<std::io::Result<()>>,
    crew: Arc<Crew>,
    recruiter: Option<JoinHandle<()>>,
}

impl ServingSession {
    /// Serves `disks` on a live connection with `threads` threads, at least one, and more where disks are slow. Requests that the last server
    /// left unanswered are sent again by the kernel: that server must have been reaped.
    ///
    /// # Errors
    /// Descriptors or threads ran out. The connection is as it was.
    pub fn start(connection: Connection, disks: Disks, threads: usize) -> Result<Self> {
        let failed = |error: &std::io::Error| Error::io("cannot start to serve the mount", error);
        let Connection { fd: fuse_fd, negotiated, flights } = connection;
        let crew = Arc::new(Crew::new(threads.max(1)));
        let filesystem = {
            let (crew, flights) = (crew.clone(), Arc::new(flights));
            move || DiskFilesystem::new(disks.clone(), flights.clone(), crew.clone())
        };
        let session = shake_hands(&negotiated, filesystem(), threads)?;
        descriptor::replace(session.as_fd(), fuse_fd.as_fd()).map_err(|error| failed(&error))?;
        if negotiated.has_resend() {
            match resend(fuse_fd.as_fd()) {
                // If the connection has ended meanwhile, `run` finds out.
                Err(error) if !connection_ended(&fuse_fd) => return Err(failed(&error)),
                _ => {}
            }
        }
        let runner = std::thread::Builder::new()
            .name("fuse-session".into())
            .spawn(move || session.run())
            .map_err(|error| failed(&error))?;
        // From now on the connection is served: what fails here costs speed only.
        let recruiter = std::thread::Builder::new().name("fuse-crew".into()).stack_size(256 << 10).spawn({
            let crew = crew.clone();
            move || recruit(&crew, &fuse_fd, &negotiated, filesystem)
        });
        let recruiter = recruiter.inspect_err(|error| log::warn!("cannot start a thread: {error}")).ok();
        Ok(ServingSession { runner, crew, recruiter })
    }

    /// Waits until the connection has ended: unmounted, or aborted. Then every request was answered.
    ///
    /// # Errors
    /// The session gave up although the connection lives; another server can go on with it.
    pub fn wait(self) -> Result<()> {
        let ended = self.runner.join();
        self.crew.close();
        if let (Ok(Ok(())), Some(recruiter)) = (&ended, self.recruiter) {
            // The connection has ended, so its threads end too.
            let _ = recruiter.join();
        }
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Error::io("cannot go on serving the mount", &error)),
            Err(_) => Err(Error::new(ErrorKind::Failed, "a thread that served the mount panicked")),
        }
    }
}

/// Adds threads to those that serve a connection, whenever they are wanted: as further sessions on the same descriptor. They read the
/// requests that nobody has read; nothing is sent again for them.
fn recruit(crew: &Crew, fuse_fd: &OwnedFd, negotiated: &Negotiated, filesystem: impl Fn() -> DiskFilesystem) {
    let mut sessions = Vec::new();
    while let Some(more) = crew.wait_for_demand() {
        let hired = shake_hands(negotiated, filesystem(), more).and_then(|session| {
            let failed = |error: std::io::Error| Error::io("cannot add threads to a mount", &error);
            descriptor::replace(session.as_fd(), fuse_fd.as_fd()).map_err(failed)?;
            let name = std::thread::Builder::new().name("fuse-session".into()).stack_size(256 << 10);
            name.spawn(move || session.run()).map_err(failed)
        });
        match hired {
            Ok(session) => {
                log::info!("the disks are slower than the guests ask: {more} more threads");
                sessions.push(session);
                crew.answer_demand(more);
            }
            Err(error) => {
                log::warn!("{error}; it is served by those that there are");
                crew.answer_demand(0);
            }
        }
    }
    for session in sessions {
        if let Ok(Err(error)) = session.join() {
            log::debug!("{error}");
        }
    }
}

/// A session that believes to have a fresh connection: it has answered the synthetic FUSE_INIT, on one end of a socket pair.
fn shake_hands(negotiated: &Negotiated, disks: DiskFilesystem, threads: usize) -> Result<Session<DiskFilesystem>> {
    let failed = |error: &std::io::Error| Error::io("cannot start to serve the mount", error);
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|errno| failed(&errno.into()))?;
    nix::unistd::write(&ours, &negotiated.synthetic_request()).map_err(|errno| failed(&errno.into()))?;

    let mut config = Config::default();
    config.n_threads = Some(threads.max(1));
    config.acl = SessionACL::All;
    let session = Session::from_fd(disks, theirs, SessionACL::All, config).map_err(|error| failed(&error))?;
    check_handshake(&ours)?;
    Ok(session)
}

/// Reads the library's answer to the synthetic FUSE_INIT: a header whose second word is the error.
fn check_handshake(ours: &OwnedFd) -> Result<()> {
    use std::os::fd::AsRawFd;
    let mut answer = [0; 256];
    let len = recv(ours.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
    match answer[..len].get(4..8) {
        Some([0, 0, 0, 0]) => Ok(()),
        _ => Err(Error::new(ErrorKind::Failed, "the FUSE library refused the connection's parameters")),
    }
}

/// True once the kernel has ended the connection behind `fuse_fd` (unmounted or aborted): poll(2) then says POLLERR.
pub fn connection_ended(fuse_fd: &OwnedFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(fuse_fd.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).is_ok()
        && polled[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLERR | PollFlags::POLLHUP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::flights::Flights;
    use crate::image::memory::MemoryImage;
    use crate::server::config::Layout;
    use crate::sys::populate::populated_buffers;
    use crate::volume::{Volume, VolumeOptions};

    #[test]
    fn the_library_answers_itself_and_reads_into_populated_buffers() {
        let options = VolumeOptions {
            name: "os.img".into(),
            id: "id".into(),
            read_only: false,
            growable: false,
            shown: crate::volume::ShownAttributes::default(),
        };
        let volume = Volume::new(options, MemoryImage::new("os.img", 1 << 20));
        let disks = Disks { layout: Layout::File, volumes: vec![volume.into()] };
        let negotiated = Negotiated {
            kernel_minor: 45,
            kernel_flags: u64::MAX,
            flags: u64::MAX,
            max_readahead_bytes: 131_072,
            max_write_bytes: 1 << 20,
        };
        let before = populated_buffers();
        let flights = Arc::new(Flights::open(None, false).unwrap());
        shake_hands(&negotiated, DiskFilesystem::new(disks, flights, Arc::new(Crew::new(2))), 2).unwrap();
        // The library still asks for buffers of the size that the allocator knows them by.
        assert!(populated_buffers() > before);
    }
}
