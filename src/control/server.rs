//! The listening end of the control socket: who may connect, how many, and how it ends.
//!
//! Two threads for each connection, [`CONNECTIONS_MAX`] connections. The socket has mode 0600, and whoever connects must be
//! root or the user that this process runs as, whatever the mode of the directories above it.

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::backend::{Backend, SubscriptionId};
use super::errors::{Class, QmpError};
use super::events::{Audience, Peer};
use super::outbox::Outbox;
use super::{commands, connection, wire};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Condvar, Instant, Mutex, wait_until};

/// How many clients may be connected at once.
pub const CONNECTIONS_MAX: usize = 32;
/// How long [`ControlServer::shutdown`] lets commands that are being executed get their answers out.
const FAREWELL: Duration = Duration::from_secs(2);

struct Shared {
    backend: Arc<dyn Backend>,
    audience: Arc<Audience>,
    peers: Mutex<Vec<Arc<Peer>>>,
    changed: Condvar,
}

/// A control socket that is being served. Dropping it is [`ControlServer::shutdown`].
pub struct ControlServer {
    shared: Arc<Shared>,
    subscription: SubscriptionId,
    listener: UnixListener,
    acceptor: Mutex<Option<JoinHandle<()>>>,
    path: PathBuf,
    /// Device and inode of the socket, to remove no other one.
    file: (u64, u64),
}

impl ControlServer {
    /// Listens at `path` and serves `backend` from threads of its own. A socket that a dead server left there is replaced.
    ///
    /// # Errors
    /// `Exists`: a living server listens there, or something that is no socket lies there; or the socket cannot be made.
    pub fn start(path: &Path, backend: Arc<dyn Backend>) -> Result<ControlServer> {
        let (listener, file) = listen(path)?;
        let audience = Arc::new(Audience::default());
        let listeners = Arc::clone(&audience);
        let subscription = backend.subscribe(Box::new(move |event| listeners.tell(event)));
        let shared = Arc::new(Shared { backend, audience, peers: Mutex::default(), changed: Condvar::new() });
        let mut server =
            ControlServer { shared, subscription, listener, acceptor: Mutex::default(), path: path.to_owned(), file };
        let failed =
            |error: &std::io::Error| Error::io("cannot serve the control socket", error).on(path.display().to_string());
        let listener = server.listener.try_clone().map_err(|error| failed(&error))?;
        let shared = Arc::clone(&server.shared);
        let acceptor = thread::Builder::new().name("control".to_owned()).spawn(move || accept(&listener, &shared));
        *server.acceptor.get_mut() = Some(acceptor.map_err(|error| failed(&error))?);
        Ok(server)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes no more commands, waits up to two seconds until the answers of those under way were sent, closes all
    /// connections and removes the socket. A second call does nothing. Not to be called from within a [`Backend`] method, whose
    /// answer it would wait for.
    pub fn shutdown(&self) {
        let Some(acceptor) = self.acceptor.lock().take() else { return };
        self.shared.backend.unsubscribe(self.subscription);
        // Wakes accept(2) with EINVAL; it can fail only for a socket that does not listen.
        let _ = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if acceptor.join().is_err() {
            log::error!("control: the accepting thread died");
        }
        self.remove_socket();
        let deadline = Instant::now() + FAREWELL;
        let mut peers = self.shared.peers.lock();
        for peer in peers.iter() {
            // The reader finds the end of its input once the command that it executes is done.
            let _ = peer.stream.shutdown(Shutdown::Read);
        }
        while !peers.is_empty() && wait_until(&self.shared.changed, &mut peers, Some(deadline)) {}
        for peer in peers.iter() {
            peer.cut();
        }
    }

    fn remove_socket(&self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.file);
        if ours {
            if let Err(error) = fs::remove_file(&self.path) {
                log::warn!("control: cannot remove {}: {error}", self.path.display());
            }
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A listening socket of mode 0600 at `path`, put there by a rename, so that it is never seen half made.
fn listen(path: &Path) -> Result<(UnixListener, (u64, u64))> {
    let shown = path.display().to_string();
    let failed = |what: &str, error: &std::io::Error| Error::io(what, error).on(shown.clone());
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::usage("not a path for a control socket:").on(shown));
    };
    if let Ok(found) = fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt;
        if !found.file_type().is_socket() {
            return Err(Error::new(
                ErrorKind::Exists,
                "something that is no socket is in the place of the control socket",
            )
            .on(shown)
            .advise("remove it, or name another place with --control"));
        }
        if super::client::connect_stream(path).is_ok() {
            return Err(Error::new(ErrorKind::Exists, "another server listens on the control socket")
                .on(shown)
                .advise("unmount it first, or name another place with --control"));
        }
    }
    // Through the directory's descriptor, as a socket's address may have 107 bytes only.
    let opened =
        fs::File::open(directory).map_err(|error| failed("cannot open the directory of the control socket", &error))?;
    let mut hidden = std::ffi::OsString::from(format!(".{}.", std::process::id()));
    hidden.push(name);
    let near = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd())).join(&hidden);
    // Left by a process that died between bind and rename.
    let _ = fs::remove_file(&near);
    let listener = UnixListener::bind(&near).map_err(|error| failed("cannot make the control socket", &error))?;
    let finish = || {
        fs::set_permissions(&near, fs::Permissions::from_mode(0o600))?;
        let made = fs::symlink_metadata(&near)?;
        fs::rename(&near, path)?;
        Ok((made.dev(), made.ino()))
    };
    match finish() {
        Ok(file) => Ok((listener, file)),
        Err(error) => {
            let _ = fs::remove_file(&near);
            Err(failed("cannot make the control socket", &error))
        }
    }
}

/// Takes connections until the listener is shut down.
fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => match error.raw_os_error() {
                Some(libc::EINVAL | libc::EBADF) => return,
                Some(libc::EINTR | libc::ECONNABORTED) => continue,
                _ => {
                    log::warn!("control: cannot take a connection: {error}");
                    // No descriptors or memory: others have to give some back first.
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            },
        };
        if let Err(error) = admit(stream, shared) {
            log::warn!("control: refused a connection: {error}");
        }
    }
}

fn admit(mut stream: UnixStream, shared: &Arc<Shared>) -> Result<()> {
    let peer_uid = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)
        .map_err(|errno| Error::io("cannot tell who connects", &errno.into()))?
        .uid();
    if peer_uid != 0 && peer_uid != nix::unistd::geteuid().as_raw() {
        return Err(Error::new(ErrorKind::Failed, format!("user {peer_uid} is not the owner of this mount")));
    }
    let failed = |error: std::io::Error| Error::io("cannot serve a connection", &error);
    let peer = Arc::new(Peer { outbox: Outbox::default(), stream: stream.try_clone().map_err(failed)? });
    {
        let mut peers = shared.peers.lock();
        if peers.len() >= CONNECTIONS_MAX {
            let full = QmpError::new(Class::Generic, ErrorKind::NotNow, "too many connections to this control socket");
            // One short line into an empty buffer: it does not block.
            let _ = stream.write_all(&wire::encode(&commands::reply(Err(full), None)));
            return Err(Error::not_now(format!("there are {CONNECTIONS_MAX} already")));
        }
        peers.push(Arc::clone(&peer));
    }
    let serving = Arc::clone(shared);
    let reader = thread::Builder::new().name("control-reader".to_owned()).spawn({
        let peer = Arc::clone(&peer);
        move || {
            if let Err(error) = connection::serve(stream, &peer, &*serving.backend, &serving.audience) {
                log::warn!("control: cannot serve a connection: {error}");
            }
            forget(&serving, &peer);
        }
    });
    if let Err(error) = reader {
        forget(shared, &peer);
        return Err(failed(error));
    }
    Ok(())
}

fn forget(shared: &Shared, peer: &Arc<Peer>) {
    peer.cut();
    shared.peers.lock().retain(|other| !Arc::ptr_eq(other, peer));
    shared.changed.notify_all();
}
