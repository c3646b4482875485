//! qcow2 images: a disk inside a file, with clusters that are allocated when they are written, and with a backing file.
//!
//! The format is QEMU's (docs/interop/qcow2.txt describes it). A disk's cluster is found through two tables, and a refcount
//! says of each cluster of the file how often it is used:
//!
//! ```text
//! L1 table -> L2 table -> cluster of data      an entry: unallocated | zero | data | compressed data
//! refcount table -> refcount block             0: free   1: used once, may be written   more: shared with a snapshot
//! ```
//!
//! **Why a driver of our own.** Rule 5 and a SIGKILL at any instant. The crate that there is for this format (imago 0.2.6) writes
//! the reference to a new L2 table at once and keeps that table's refcount in its cache, so that a kill between the two leaves a cluster in
//! use that counts as free: the next server would give it away a second time. It also syncs nothing between refcounts
//! and references, which a power cut may turn around. No wrapper can close that from outside.
//!
//! **How it is made safe and cheap here.** Nothing is kept in memory that a later server needs; what the order of changes has to
//! guarantee is guaranteed ahead of time:
//!
//! ```text
//! ahead, many clusters at once:   refcounts := 1 -> file grown, old content punched -> sync     (a reservation)
//! a write to a new cluster:       data -> copied rest of the cluster -> [sync] -> L2 entry -> reply
//! a write to a cluster that is there: data -> reply
//! a cluster that is given up:     L2 entry -> reply ... -> sync (a guest's, mostly) -> refcount, punch
//! ```
//!
//! So an acknowledged write costs one small write of an L2 entry more where it allocates, and nothing where it overwrites; a kill leaves
//! leaked clusters (reserved, not used) and never an error; and so does a power cut. The sync in brackets is needed only where the rest of the
//! cluster was copied out of a backing file or snapshot: those bytes are durable now and must stay so. Many writers share one.
//!
//! Invariants:
//! - an L2 entry is on the way to the disk before its change is acknowledged, and the copy in memory changes after it;
//! - whoever changes the mapping of a cluster holds its stripes exclusively, every other request holds them shared: no host
//!   cluster is freed or given to somebody else under a request that found it;
//! - locks in this order: stripes, L1, one L2 table, refcounts; nobody waits for a guest or for another image while holding the last three;
//! - a sync that failed, whoever needed it, fails the next flush, and the metadata that it may have lost is written again;
//! - only clusters with refcount 1 are written in place: internal snapshots stay as they are.
//!
//! Refused by name: encrypted, corrupt and (for writing) dirty files, external data files, zstd, extended L2 entries, features that are
//! not known. Bitmaps of QEMU are invalidated by clearing the autoclear bits, before the first write.

mod chain;
mod change;
mod compressed;
mod counts;
mod create;
mod entry;
mod header;
mod host;
#[cfg(test)]
pub(super) mod journal;
mod mapping;
mod occupied;
mod refcounts;
mod status;
mod sync_point;
mod tables;
mod unsynced;

pub(super) use self::chain::{Chain, backing_path};
pub(super) use self::create::format;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::SystemTime;

use self::header::Header;
use self::host::Host;
use self::occupied::Occupied;
use self::refcounts::Refcounts;
use self::tables::Tables;
use super::file_io::FileIo;
use super::open::{OpenOptions, Opened};
use super::raw::{ID_ATTRIBUTE, attributes_of, room_of};
use super::stripes::Stripes;
use super::zeroing::Ability;
use super::{Attributes, DescriptorRole, Extent, Format, Identity, Image, Properties, Room, check_bounds};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};

/// A request is worked on in pieces of this size: it bounds what is held locked at once.
const PIECE_BYTES: u64 = 1 << 20;

/// A disk in a qcow2 file.
pub(super) struct Qcow2Image {
    host: Host,
    opened: Opened,
    header: Header,
    size_bytes: AtomicU64,
    tables: Tables,
    refcounts: Refcounts,
    occupied: Arc<Occupied>,
    backing: Option<Arc<dyn Image>>,
    stripes: Stripes,
    /// A change of the size, one at a time.
    resizing: Mutex<()>,
    seek: Ability,
}

impl Qcow2Image {
    /// The disk in the file behind `io`. Opens its backing files, and then, if it is opened for writing, invalidates what
    /// programs that know more than we do keep in it.
    ///
    /// # Errors
    /// Names what is wrong with the file, or with one of its backing files; then nothing was changed.
    pub(super) fn new(io: FileIo, opened: Opened, options: &OpenOptions, chain: &Chain) -> Result<Self> {
        let host = Host::new(io)?;
        let header = Header::read(&host, opened.writable)?;
        let occupied = Arc::new(Occupied::new(header.cluster_bits));
        let tables = Tables::read(&host, &header, opened.writable, chain.depth(), occupied.clone())?;
        let refcounts = Refcounts::read(&host, &header, opened.writable, occupied.clone())?;
        let backing = chain.open_backing(&opened, &header, options)?;
        if opened.writable {
            host.prepare_for_writing(header.cluster_bytes())?;
            header.clear_autoclear(&host)?;
            // What the last program freed or referred to is durable before anything is built on it.
            host.sync()?;
        }
        if header.snapshots > 0 {
            log::info!("{}: {} internal snapshots stay as they are", host.name(), header.snapshots);
        }
        Ok(Qcow2Image {
            size_bytes: AtomicU64::new(header.size_bytes),
            host,
            opened,
            header,
            tables,
            refcounts,
            occupied,
            backing,
            stripes: Stripes::new(),
            resizing: Mutex::new(()),
            seek: Ability::default(),
        })
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.cluster_bytes()
    }

    fn check(&self, what: &str, range: ByteRange) -> Result<()> {
        check_bounds(self, what, range)
    }

    fn check_change(&self, what: &str, range: ByteRange) -> Result<()> {
        if !self.opened.writable {
            let what = format!("cannot {what}, it was opened read-only:");
            return Err(Error::new(ErrorKind::ReadOnly, what).on(self.name()));
        }
        self.check(what, range)
    }

    /// The metadata says what cannot be.
    fn damaged(&self, what: impl fmt::Display, at: ByteRange) -> Error {
        damaged(self.name(), what).at(at)
    }
}

/// Metadata that contradicts itself in the file `name`.
fn damaged(name: &str, what: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the qcow2 metadata is damaged ({what}):"))
        .on(name)
        .advise("look at it with 'qemu-img check'")
}

impl Image for Qcow2Image {
    fn name(&self) -> &str {
        self.host.name()
    }

    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn properties(&self) -> Properties {
        Properties {
            request_alignment: self.host.request_alignment(),
            cluster_bytes: Some(self.cluster_bytes()),
            thin_zeroing: self.header.has_zero_clusters() || self.backing.is_none(),
            writable: self.opened.writable,
            resizable: self.opened.writable && self.may_resize().is_ok(),
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.check("read", range)?;
        let mut rest = buffer;
        for piece in range.pieces(PIECE_BYTES) {
            let (head, tail) = rest.split_at_mut(host::in_memory(piece.len()));
            let _held = self.stripes.shared(piece);
            self.read_mapped(piece, head)?;
            rest = tail;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.check_change("write", range)?;
        let mut rest = data;
        for piece in range.pieces(PIECE_BYTES) {
            let (head, tail) = rest.split_at(host::in_memory(piece.len()));
            self.write_piece(piece, head)?;
            rest = tail;
        }
        Ok(())
    }

    /// Zeroes take no room in this format: the clusters are given back here too.
    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.check_change("write zeroes", range)?;
        self.zero(range)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.check_change("discard", range)?;
        if !self.properties().thin_zeroing {
            let what = "a qcow2 file of version 2 with a backing file cannot discard to zeroes:";
            return Err(Error::new(ErrorKind::Unsupported, what).on(self.name()).at(range));
        }
        self.zero(range)
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.check_change("allocate", range)?;
        let what = "a qcow2 file takes room when it is written, it cannot allocate ahead:";
        Err(Error::new(ErrorKind::Unsupported, what).on(self.name()).at(range))
    }

    fn flush(&self) -> Result<()> {
        self.flush_file()
    }

    fn extent_at(&self, offset: u64) -> Extent {
        self.status(ByteRange::from_bounds(offset, self.size_bytes()), true)
    }

    fn extent_within(&self, range: ByteRange) -> Extent {
        self.status(range, false)
    }

    fn allocated_bytes(&self) -> Result<u64> {
        // st_blocks counts 512 bytes each, whatever the file system's block is (stat(2)).
        use std::os::unix::fs::MetadataExt;
        Ok(self.host.metadata()?.blocks() * 512)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.check_change("resize", ByteRange::new(0, 0))?;
        self.may_resize()?;
        self.change_size(size_bytes)
    }

    fn attributes(&self) -> Result<Attributes> {
        attributes_of(&self.host.metadata()?)
    }

    fn room(&self) -> Result<Room> {
        let failed = |errno: nix::errno::Errno| Error::io("cannot ask for the free space of", &errno.into());
        room_of(self.host.file()).map_err(|errno| failed(errno).on(self.name()))
    }

    fn identity(&self) -> Result<Identity> {
        use std::os::unix::fs::MetadataExt;
        let meta = self.host.metadata()?;
        let id = crate::sys::files::extended_attribute(self.host.file(), ID_ATTRIBUTE)
            .map_err(|error| Error::io("cannot read the identity of", &error).on(self.name()))?
            .and_then(|value| String::from_utf8(value).ok());
        let birth = meta.created().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        Ok(Identity {
            id,
            device: meta.dev(),
            inode: meta.ino(),
            birth_ns: birth.and_then(|time| u64::try_from(time.as_nanos()).ok()),
            size_bytes: self.size_bytes(),
        })
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    fn shows_beneath(&self, layers: u32, range: ByteRange) -> ByteRange {
        self.unallocated(layers, range)
    }

    fn settle(&self) -> Result<()> {
        if !self.opened.writable {
            return Ok(());
        }
        self.refcounts.settle(&self.host)
    }

    fn descriptors(&self) -> Vec<(DescriptorRole, BorrowedFd<'_>)> {
        self.opened.descriptors()
    }

    fn path(&self) -> Option<PathBuf> {
        Some(self.opened.path.clone())
    }
}

impl fmt::Debug for Qcow2Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Image").field("name", &self.name()).field("header", &self.header).finish_non_exhaustive()
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        if let Err(error) = self.settle() {
            log::warn!("{error}; some clusters of the file stay reserved ('qemu-img check -r leaks' frees them)");
        }
    }
}
