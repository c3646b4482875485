//! NBD: disks on other hosts, and whatever an NBD server stands in front of. Through the C library libnbd
//! ([`crate::sys::libnbd`]), which is loaded when the first such image is opened.
//!
//! ```text
//! image.rs ── requests as the crate makes them ── change.rs: what the server can do ── link.rs: connections, made anew
//!    │ extents.rs: what is known of them              │ kept.rs: what no flush has proven     │ connection.rs: one each, and its thread
//!    │ awaited.rs: not there yet                      │                                       │
//!    └ ranges.rs: one change of a place at a time     └ call.rs: one request                  └ ends.rs: until their ends are read
//! ```
//!
//! # What an acknowledged write survives (rule 5)
//! A guest's write is answered when the server has answered it.
//!
//! | who dies | what holds the write |
//! |---|---|
//! | this server | the NBD server: it has the write, in its cache at least |
//! | the NBD server, with its cache (`kept.rs`, `replay.rs`) | this server: everything since the last flush is kept and sent again, in order where it overlaps, before anything else is |
//! | both | nothing, unless a flush came between: the guest's, or the one with which each new server begins (`left_behind.rs`). If it was lost a guest's next flush fails, once: whoever else's does before, and whatever the disk was cut over to meanwhile |
//!
//! What was flushed, everybody has. FUA is used where a server offers it and no flush: then every write carries it, and nothing
//! has to be kept. For all others FUA on every write would cost a flush each, to survive what no disk survives. What is kept is
//! bounded; who would exceed the bound flushes first. A server that offers neither is not written to: it could lose what it was ever
//! sent, and nobody would know what to send again. Nor is one that comes back and can no longer do what was relied on.
//!
//! A target is no different, so that a cutover changes nothing: after a lost connection everything since its last flush is sent again, so
//! that nothing of it becomes dirty. It does when a request fails: when a server stays away too long, or says itself that a flush has failed.
//!
//! # Nothing lands late (rule 14)
//! A connection that was lost is half-closed, and its end is read, before another one writes; over the death of this server too, since
//! the keeper keeps the sockets (`ends.rs`). A request whose caller waits no longer holds its range until then: nobody writes there,
//! and who reads there waits, or fails. A server that is silent is not replaced by another connection while it may still work on
//! what it was sent: when it goes on, so does everything; if it is stuck for good, restarting it ends the connection. Where the
//! *kernel* gives a host up that fell silent (after minutes), nobody knows its end: if changes were under way, the image is broken for
//! good: a target's job fails and says so, a disk's requests fail until it is mounted again.
//!
//! The protocol has a server finish all requests before it closes a connection. One that closes earlier (qemu-nbd, when a connection ends
//! while its requests are being carried out) can do the rest a moment later; no client can tell.
//!
//! # What NBD does not have
//! Locks (rule 9): that an export has one writer is the server's affair, or the administrator's. This process uses one export once,
//! whatever it is called: URIs are compared in one spelling (`uri.rs`), and who answers with all others that are connected (`ends.rs`).
//! What nobody can tell: two addresses of another host, a forwarded port, two names of one export.
//! Identities and times (rule 11): a mirror that is resumed compares everything. A size that changes: an export that comes
//! back with another one is refused. Zeroing by trim: that promises nothing about what is read (`change.rs`).

mod awaited;
mod buffers;
mod call;
mod change;
mod connection;
mod ends;
mod extents;
mod image;
mod kept;
mod left_behind;
mod link;
mod ranges;
mod replay;
#[cfg(all(test, not(shuttle)))]
mod tests;
pub mod uri;

use std::path::Path;
use std::time::Duration;

pub use self::ends::{Parking, inherit, park_with};
pub use self::image::RECONNECT_DEFAULT;

use self::connection::NoConnection;
use self::image::NbdImage;
use self::link::Patience;
use super::open::{OpenOptions, Role};
use super::{CacheMode, Format, Image};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;
use crate::sys::libnbd;

/// Opens the export that `place`, an NBD URI, names.
///
/// # Errors
/// The library is missing; the server cannot be reached, or does not let this be opened so.
pub(super) fn open(place: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>> {
    let name = place.to_str().ok_or_else(|| Error::usage("the URI is not UTF-8:").on(place.display().to_string()))?;
    uri::check(name)?;
    if options.format == Some(Format::Qcow2) {
        let what = "a format inside of an NBD export is not supported: cannot open";
        return Err(Error::new(ErrorKind::Unsupported, what)
            .on(name)
            .advise("have the server open it: qemu-nbd -f qcow2, and pass --format raw"));
    }
    let library = libnbd::library().map_err(|why| missing(name, why))?;
    if options.cache == CacheMode::None {
        log::debug!("{name}: cache=none concerns this host's page cache, which NBD does not use");
    }
    let attempt = Attempt {
        library,
        name: name.to_owned(),
        patience: Patience::new(options.reconnect),
        writable: options.writable,
        role: options.role,
        told_format: options.format.is_some(),
        takes_over: options.insist,
    };
    match options.insist {
        None => Ok(Arc::new(attempt.make(ends::PATIENCE)?)),
        Some(size_bytes) => {
            let attempt = move || attempt.make(awaited::AGAIN_AFTER);
            awaited::open(name, size_bytes, options.writable, options.reconnect, attempt)
        }
    }
}

/// How an export is to be opened.
struct Attempt {
    library: &'static libnbd::Library,
    name: String,
    patience: Patience,
    writable: bool,
    role: Role,
    told_format: bool,
    /// Another server of ours has used it, and died; it had so many bytes.
    takes_over: Option<u64>,
}

impl Attempt {
    /// Opens it, if all earlier connections to it end within `ended_within`.
    fn make(&self, ended_within: Duration) -> Result<NbdImage> {
        if self.role == Role::Observer {
            return self.connected(true);
        }
        ends::wait_for_all(&self.name, ended_within)?;
        let made = self.connected(false);
        match &made {
            Ok(image) => {
                // Whoever does not take it over leaves nobody who could be told.
                let away = ends::take_over(&self.name);
                if self.inherits() {
                    image.take_over(away);
                }
            }
            // Another disk of ours that is there already says nothing of the server.
            Err(error) if self.inherits() && error.kind() != ErrorKind::Locked => ends::note_away(&self.name),
            Err(_) => (),
        }
        made
    }

    /// True if changes may have been left there that were not flushed.
    fn inherits(&self) -> bool {
        self.takes_over.is_some() && self.writable
    }

    fn connected(&self, observes: bool) -> Result<NbdImage> {
        let name = self.name.as_str();
        let image = NbdImage::open(self.library, name, self.patience, self.writable, observes, self.inherits());
        let image = image.map_err(|why| match why {
            NoConnection::Refused(error) => error,
            NoConnection::Yet(why) => unreachable(name, &why),
        })?;
        let now = image.size_bytes();
        if let Some(size_bytes) = self.takes_over.filter(|size_bytes| *size_bytes != now) {
            let what = format!("the export has {now} bytes now, and had {size_bytes}:");
            return Err(Error::new(ErrorKind::Corrupt, what).on(name));
        }
        if self.writable && image.is_read_only() {
            let error = Error::new(ErrorKind::ReadOnly, "the NBD server exports this read-only: cannot open");
            return Err(error.on(name).advise("pass --read-only, or have the server let it be written"));
        }
        if self.writable && !image.can_be_durable() {
            // After a lost connection nobody could say what of all that was ever written is still there.
            let what = "the NBD server offers neither flush nor FUA, so nothing written there is ever known to be durable: cannot open";
            let advice = "have the server offer flush (nbd-server: flush = true), or pass --read-only";
            return Err(Error::new(ErrorKind::Unsupported, what).on(name).advise(advice));
        }
        if !self.told_format {
            refuse_qcow2(&image, name)?;
        }
        Ok(image)
    }
}

/// Raw bytes belong to the guest, so what looks like a format is taken for raw only if the user says so.
fn refuse_qcow2(image: &NbdImage, name: &str) -> Result<()> {
    let mut magic = [0; 4];
    if image.size_bytes() < 4 || image.read_at(0, &mut magic).is_err() || !super::probe::is_qcow(magic) {
        return Ok(());
    }
    let error = Error::usage("an NBD export holds raw bytes, but there is a qcow2 header in").on(name);
    Err(error.advise(
        "pass --format raw if these bytes are the disk itself; if the disk is inside, have the server open it: qemu-nbd -f qcow2",
    ))
}

fn missing(name: &str, why: &str) -> Error {
    let what = format!("NBD needs the library libnbd, which cannot be loaded ({why}): cannot open");
    Error::new(ErrorKind::Unsupported, what)
        .on(name)
        .advise("install the package libnbd0 (Debian, Ubuntu) or libnbd (Fedora, SUSE)")
}

fn unreachable(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::Failed, format!("cannot connect to the NBD server ({why}):"))
        .on(name)
        .advise("does the server run, and does it have this export?")
}
