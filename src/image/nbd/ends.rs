//! Connections whose end has not been read: what was sent over one may still change its export (rule 14).
//!
//! ```text
//! connection made ──> registered, its socket parked with the keeper ──> first request
//! connection over ──> half-closed ──> its end is read ──> the next one may write; unparked when that has all that this one may have lost
//! server killed   ──> the next server inherits the sockets, half-closes each and reads its end before it opens the export
//! ```
//!
//! That the NBD server went away, with nobody left who could send again what it lost, is told by one that is over already when it is
//! inherited, by one that is reset then, by a connection to the export that cannot be made, and, at a unix socket, by another process that
//! answers there. That our half-closing ended it and the next one was made at once tells nothing of the kind.
//!
//! A server's end of the connection is its word that it is done (the protocol: it handles all outstanding requests before
//! it closes). A reset counts as the same: nobody is there any more to do anything. When the *kernel* gives a silent host up nobody knows.
//! It tells so once, to whoever reads first, and shows an end like any other afterwards: so who drives the connection passes on what it
//! heard, and for a TCP connection the kernel is asked how it came to be closed.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    MsgFlags, Shutdown, SockaddrStorage, getpeername, getsockopt, recv, setsockopt, shutdown, sockopt,
};
use parking_lot::{Condvar, Mutex};

use super::uri;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::tcp;

/// Keeps sockets beyond the death of this process.
pub trait Parking: Send + Sync {
    /// Keeps `socket` under `name`.
    fn park(&self, name: &str, socket: BorrowedFd<'_>);
    /// Closes it.
    fn unpark(&self, name: &str);
}

/// How a parked socket is called, so that it is known again: this, the process and a number, the URI.
const NAME: &str = "nbd ";

static OPEN: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
/// What tells that a server went away while nobody had what was not flushed, with the key of its export.
static OVER: Mutex<Vec<(String, Option<Ended>)>> = Mutex::new(Vec::new());
/// Who answered at inherited connections that have ended well, with the key of the export.
static ANSWERED: Mutex<Vec<(String, i32)>> = Mutex::new(Vec::new());
static CHANGED: Condvar = Condvar::new();
static PARKING: Mutex<Option<Arc<dyn Parking>>> = Mutex::new(None);
static NEXT: AtomicU64 = AtomicU64::new(0);

struct Entry {
    name: String,
    uri: String,
    place: Place,
    process: Option<i32>,
    /// The image that it belongs to; `None`: of a server before.
    user: Option<User>,
}

/// Who uses connections: one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct User {
    number: u64,
    /// It does not write, nor mind who does.
    observes: bool,
}

impl User {
    pub(super) fn new(observes: bool) -> Self {
        User { number: NEXT.fetch_add(1, Relaxed), observes }
    }
}

/// An export, as far as it can be told from others: by what it was called, and by who answered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    key: String,
    peer: Option<String>,
    export: String,
}

impl Place {
    fn of(uri: &str, socket: BorrowedFd<'_>) -> Self {
        Place { key: uri::key(uri), peer: peer(socket), export: uri::export_name(uri) }
    }

    fn is_same(&self, other: &Self) -> bool {
        self.key == other.key || (self.peer.is_some() && self.peer == other.peer && self.export == other.export)
    }
}

/// Who is at the other end. All addresses of this host are one: a server listens at many.
fn peer(socket: BorrowedFd<'_>) -> Option<String> {
    let peer = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok()?;
    if let Some(address) = peer.as_unix_addr() {
        // A relative one depends on where the server was started.
        return address.path().filter(|path| path.is_absolute()).map(|path| format!("unix {}", path.display()));
    }
    if let Some(address) = peer.as_vsock_addr() {
        return Some(format!("vsock {}:{}", address.cid(), address.port()));
    }
    let stream = TcpStream::from(socket.try_clone_to_owned().ok()?);
    let (peer, ours) = (stream.peer_addr().ok()?, stream.local_addr().ok()?);
    let (address, port) = (peer.ip().to_canonical(), peer.port());
    let local = address.is_loopback() || address == ours.ip().to_canonical();
    Some(if local { format!("this host:{port}") } else { format!("{address}:{port}") })
}

/// The process that listened at the other end's unix socket.
fn process(socket: BorrowedFd<'_>) -> Option<i32> {
    getsockopt(&socket, sockopt::PeerCredentials).ok().map(|peer| peer.pid()).filter(|pid| *pid > 0)
}

/// How a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Farewell {
    /// The server has closed it.
    Closed,
    /// Nobody is there any more who could do anything.
    Reset,
}

/// A connection whose end has not been read. Dropped, it stays registered: only [`OpenEnd::forget`] ends that.
#[derive(Debug)]
pub(super) struct OpenEnd {
    name: String,
    socket: OwnedFd,
}

/// A connection whose end was read, or a word that was left. It stays parked until this is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Ended {
    name: String,
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(parking) = &*PARKING.lock() {
            parking.unpark(&self.name);
        }
    }
}

/// Leaves word for a server of ours to come: what was written to the export of `uri` without a flush may be lost, and no guest was told.
/// It inherits a connection that is over. `None`: there are no sockets to be had; only this process knows.
pub(super) fn leave_word(uri: &str) -> Option<Ended> {
    let ours = match UnixStream::pair() {
        Ok((ours, _closed_now)) => ours,
        Err(error) => {
            log::error!("{uri}: cannot leave word of what may be lost: {error}");
            return None;
        }
    };
    let name = new_name(uri);
    if let Some(parking) = &*PARKING.lock() {
        parking.park(&name, ours.as_fd());
    }
    Some(Ended { name })
}

fn new_name(uri: &str) -> String {
    format!("{NAME}{}.{} {uri}", std::process::id(), NEXT.fetch_add(1, Relaxed))
}

/// From now on sockets are parked there.
pub fn park_with(parking: Arc<dyn Parking>) {
    *PARKING.lock() = Some(parking);
}

/// Takes over what an earlier server had parked under `name`, if it is a connection: its end is read by a thread of its own, and no
/// image of that export is opened before. Gives back what is none.
///
/// # Errors
/// The descriptor, if it is something else.
pub fn inherit(name: &str, socket: OwnedFd) -> Result<(), OwnedFd> {
    let Some(uri) = name.strip_prefix(NAME).and_then(|rest| rest.split_once(' ')).map(|(_, uri)| uri) else {
        return Err(socket);
    };
    let (place, process) = (Place::of(uri, socket.as_fd()), process(socket.as_fd()));
    OPEN.lock().push(Entry { name: name.to_owned(), uri: uri.to_owned(), place, process, user: None });
    let was_over = is_over(socket.as_fd());
    let end = OpenEnd { name: name.to_owned(), socket };
    let (shown, key) = (uri.to_owned(), uri::key(uri));
    if was_over {
        log::warn!("{shown}: the connection of the server before was lost already");
        OVER.lock().push((key.clone(), Some(Ended { name: name.to_owned() })));
    }
    let read = move || match end.read(None) {
        Ok(how) => {
            log::info!("{shown}: the connection of the server before has ended");
            // Before anybody opens the export.
            if how == Farewell::Reset && !was_over {
                log::warn!("{shown}: its server went away");
                OVER.lock().push((key, Some(Ended { name: end.name.clone() })));
            } else if let Some(process) = process {
                ANSWERED.lock().push((key, process));
            }
            let ended = end.forget();
            if was_over || how == Farewell::Reset {
                // The other one of that name keeps it parked.
                std::mem::forget(ended);
            }
        }
        Err(error) => log::error!("{shown}: the end of the connection of the server before cannot be read: {error}"),
    };
    if let Err(error) = std::thread::Builder::new().name("nbd-end".into()).stack_size(256 << 10).spawn(read) {
        log::error!("cannot start a thread: {error}");
    }
    Ok(())
}

/// Waits until no connection to the export of `uri`, however it is spelled, is open, of this process or inherited.
///
/// # Errors
/// [`ErrorKind::Locked`]: one still was after `patience`.
pub(super) fn wait_for_all(uri: &str, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    let key = uri::key(uri);
    let mut open = OPEN.lock();
    while open.iter().any(|entry| entry.place.key == key) {
        if CHANGED.wait_until(&mut open, deadline).timed_out() {
            let what =
                "an earlier connection has not ended: its server may still be writing, or the export is in use here:";
            let advice = "wait for the NBD server, or restart it; an export is used by one disk at a time";
            return Err(Error::new(ErrorKind::Locked, what).on(uri).advise(advice));
        }
    }
    Ok(())
}

/// True if the other end has closed it, or is gone.
fn is_over(socket: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::from_bits_retain(libc::POLLRDHUP))];
    let _ = poll(&mut polled, PollTimeout::ZERO);
    // That one flag has no name there, so events with it are none that are known.
    polled[0].revents().is_none_or(|events| !events.is_empty())
}

/// The export of `uri`, which a server of ours used before, cannot be connected to: whatever its server had in its cache may be lost.
pub(super) fn note_away(uri: &str) {
    let key = uri::key(uri);
    let mut over = OVER.lock();
    if over.iter().all(|(other, _)| *other != key) {
        over.push((key, leave_word(uri)));
    }
}

/// What tells that the server of the export of `uri`, which is connected now, went away since a server of ours used it. Told once; `None`:
/// it did not, as far as can be told.
pub(super) fn take_over(uri: &str) -> Option<Vec<Ended>> {
    let key = uri::key(uri);
    let of_it = |entry: &&Entry| entry.place.key == key && entry.user.is_some_and(|user| !user.observes);
    let now: Vec<_> = OPEN.lock().iter().filter(of_it).filter_map(|entry| entry.process).collect();
    let before = taken(&ANSWERED, &key);
    if before.iter().any(|process| now.iter().any(|other| other != process)) {
        log::warn!("{uri}: another process answers there than before");
        note_away(uri);
    }
    let over = taken(&OVER, &key);
    (!over.is_empty()).then(|| over.into_iter().flatten().collect())
}

fn taken<T>(list: &Mutex<Vec<(String, T)>>, key: &str) -> Vec<T> {
    let mut list = list.lock();
    let (taken, rest) = std::mem::take(&mut *list).into_iter().partition(|(other, _)| other == key);
    *list = rest;
    taken.into_iter().map(|(_, one): (String, T)| one).collect()
}

impl OpenEnd {
    /// Registers a new connection of `user`. Before the first request goes out.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`]: who answers there has this export open with another image already, by the same or another
    /// name. Two images of one export would be a disk and its copy in one place (rule 9).
    pub(super) fn new(uri: &str, socket: OwnedFd, user: User) -> Result<Self> {
        let name = new_name(uri);
        let (place, process) = (Place::of(uri, socket.as_fd()), process(socket.as_fd()));
        let mut open = OPEN.lock();
        let is_other = |entry: &&Entry| entry.user.is_none_or(|other| other != user && !other.observes);
        if let Some(other) = open.iter().filter(is_other).find(|entry| !user.observes && entry.place.is_same(&place)) {
            let what = format!("this export is in use already, as {}:", other.uri);
            let advice = "name another export; or wait, if the other one was just given up";
            return Err(Error::new(ErrorKind::Locked, what).on(uri).advise(advice));
        }
        open.push(Entry { name: name.clone(), uri: uri.to_owned(), place, process, user: Some(user) });
        drop(open);
        ask_now_and_then(&socket);
        if let Some(parking) = &*PARKING.lock() {
            parking.park(&name, socket.as_fd());
        }
        Ok(OpenEnd { name, socket })
    }

    /// The socket, to wait for.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Ends our half: the server gets no more than it has.
    pub(super) fn half_close(&self) {
        // It may have been reset already.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
    }

    /// What the kernel says is wrong with the connection; it says that once.
    pub(super) fn fault(&self) -> Option<Errno> {
        getsockopt(&self.socket, sockopt::SocketError).ok().filter(|number| *number != 0).map(Errno::from_raw)
    }

    /// Half-closes, and reads whatever comes until the server closes too, however long that takes. `fault`: what the kernel has
    /// said of this connection to whoever used it.
    ///
    /// # Errors
    /// The kernel gave the connection up: nobody knows what the server may still do.
    pub(super) fn read(&self, fault: Option<Errno>) -> io::Result<Farewell> {
        match fault.or_else(|| self.fault()) {
            Some(errno) => return if is_end(errno) { Ok(Farewell::Reset) } else { Err(errno.into()) },
            None if tcp::was_given_up(self.socket.as_fd())? => return Err(Errno::ETIMEDOUT.into()),
            None => (),
        }
        self.half_close();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Ok(Farewell::Closed),
                Ok(_) | Err(Errno::EINTR) => (),
                Err(Errno::EAGAIN) => {
                    let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                    let _ = poll(&mut polled, PollTimeout::NONE);
                }
                Err(errno) if is_end(errno) => return Ok(Farewell::Reset),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Nothing that was sent over it can be done any more: another one may write.
    pub(super) fn forget(self) -> Ended {
        OPEN.lock().retain(|entry| entry.name != self.name);
        CHANGED.notify_all();
        Ended { name: self.name }
    }
}

/// Has the kernel ask the other host whether it still knows the connection, where nothing else is sent for so many seconds: one that
/// was restarted says no. One that does not answer is given up as soon as where something was sent, about.
fn ask_now_and_then(socket: &OwnedFd) {
    let (pause, times) = (10, 90);
    let asked = setsockopt(socket, sockopt::KeepAlive, &true)
        .and_then(|()| setsockopt(socket, sockopt::TcpKeepIdle, &pause))
        .and_then(|()| setsockopt(socket, sockopt::TcpKeepInterval, &pause))
        .and_then(|()| setsockopt(socket, sockopt::TcpKeepCount, &times));
    if let Err(errno) = asked {
        // A unix socket, whose other end cannot vanish.
        log::debug!("no keep-alive: {errno}");
    }
}

/// The peer is gone, with all that it was about to do.
fn is_end(errno: Errno) -> bool {
    matches!(errno, Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN)
}

/// How long a new image waits for the connections of the one before.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

#[cfg(all(test, not(shuttle)))]
mod tests;
