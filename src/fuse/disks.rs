//! What a session serves, and what each inode number means. Errors are errnos from here on.
//!
//! Inode numbers and file handles are constants, so that a server that takes over knows them all:
//!
//! ```text
//! layout Directory:  inode 1 the root directory, inode 2 + N volume N
//! layout File:       inode 1 volume 0
//! file handle:       0 always
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, INodeNo};

use crate::error::{Error, Result};
use crate::fuse::crew::Crew;
use crate::fuse::flights::Flights;
use crate::range::ByteRange;
use crate::server::config::Layout;
use crate::volume::{AttributeChange, Volume};

const FIRST_VOLUME_INODE: u64 = 2;

/// What a session serves.
#[derive(Clone)]
pub struct Disks {
    /// How they appear.
    pub layout: Layout,
    /// At least one; exactly one in a file layout.
    pub volumes: Vec<Arc<Volume>>,
}

impl std::fmt::Debug for Disks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.volumes.iter().map(|volume| volume.name())).finish()
    }
}

/// The file system that the session library calls. See the module.
#[derive(Debug)]
pub(super) struct DiskFilesystem {
    pub(super) disks: Disks,
    pub(super) flights: Arc<Flights>,
    pub(super) crew: Arc<Crew>,
    started: SystemTime,
    /// Seconds since `started` at which a failed request was last logged.
    last_log_seconds: AtomicU64,
}

/// What an inode number names.
pub(super) enum Node<'a> {
    Root,
    Disk(&'a Volume),
}

impl DiskFilesystem {
    pub(super) fn new(disks: Disks, flights: Arc<Flights>, crew: Arc<Crew>) -> Self {
        let last_log_seconds = AtomicU64::new(u64::MAX);
        DiskFilesystem { disks, flights, crew, started: SystemTime::now(), last_log_seconds }
    }

    pub(super) fn node(&self, inode: INodeNo) -> Result<Node<'_>, Errno> {
        let index = match (self.disks.layout, inode.0) {
            (Layout::File, 1) => 0,
            (Layout::Directory, 1) => return Ok(Node::Root),
            (Layout::Directory, number) if number >= FIRST_VOLUME_INODE => (number - FIRST_VOLUME_INODE) as usize,
            _ => return Err(Errno::ESTALE),
        };
        self.disks.volumes.get(index).map(|volume| Node::Disk(volume)).ok_or(Errno::ESTALE)
    }

    pub(super) fn disk(&self, inode: INodeNo) -> Result<&Volume, Errno> {
        match self.node(inode)? {
            Node::Disk(volume) => Ok(volume),
            Node::Root => Err(Errno::EISDIR),
        }
    }

    /// The number of volume `index` where there is a root directory.
    pub(super) fn inode_of(index: usize) -> INodeNo {
        INodeNo(FIRST_VOLUME_INODE + index as u64)
    }

    /// The errno that the guest gets; logs what lies behind it, once a second at most.
    pub(super) fn refuse(&self, error: &Error) -> Errno {
        let now = self.started.elapsed().map_or(0, |elapsed| elapsed.as_secs());
        if self.last_log_seconds.swap(now, Ordering::Relaxed) != now {
            log::warn!("a guest's request failed: {error}");
        }
        match error.errno() {
            libc::ENOSYS => Errno::EOPNOTSUPP,
            errno => Errno::from_i32(errno),
        }
    }

    pub(super) fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        match self.node(inode)? {
            Node::Root => Ok(self.root_attributes()),
            Node::Disk(volume) => {
                let shown = volume.attributes().map_err(|error| self.refuse(&error))?;
                let block_bytes = shown.block_bytes;
                Ok(FileAttr {
                    ino: inode,
                    size: shown.size_bytes,
                    blocks: shown.allocated_bytes.div_ceil(512),
                    atime: shown.accessed,
                    mtime: shown.modified,
                    ctime: shown.changed,
                    crtime: shown.changed,
                    kind: FileType::RegularFile,
                    perm: (shown.mode & 0o7777) as u16,
                    nlink: 1,
                    uid: shown.uid,
                    gid: shown.gid,
                    rdev: 0,
                    // The kernel takes its logarithm.
                    blksize: if block_bytes.is_power_of_two() { block_bytes.clamp(512, 1 << 20) } else { 4096 },
                    flags: 0,
                })
            }
        }
    }

    fn root_attributes(&self) -> FileAttr {
        FileAttr {
            ino: INodeNo::ROOT,
            size: 0,
            blocks: 0,
            atime: self.started,
            mtime: self.started,
            ctime: self.started,
            crtime: self.started,
            kind: FileType::Directory,
            perm: 0o755,
            nlink: 2,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    pub(super) fn read_into(&self, inode: INodeNo, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        self.disk(inode)?.read(offset, buffer).map_err(|error| self.refuse(&error))
    }

    pub(super) fn write_all(&self, inode: INodeNo, offset: u64, data: &[u8], durable: bool) -> Result<u32, Errno> {
        match self.disk(inode)?.write(offset, data, durable) {
            // A program that gets 0 tries again for ever.
            Ok(0) if !data.is_empty() => Err(Errno::ENOSPC),
            Ok(written) => Ok(u32::try_from(written).unwrap_or(u32::MAX)),
            Err(error) => Err(self.refuse(&error)),
        }
    }

    pub(super) fn allocate(&self, inode: INodeNo, range: ByteRange, mode: i32) -> Result<(), Errno> {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        let disk = self.disk(inode)?;
        if disk.is_read_only() {
            return Err(Errno::EROFS);
        }
        let done = match mode {
            0 | KEEP => disk.allocate(range, mode == KEEP),
            PUNCH => disk.punch_hole(range),
            ZERO => disk.zero_range(range, false),
            mode if mode == ZERO | KEEP => disk.zero_range(range, true),
            _ => return Err(Errno::EOPNOTSUPP),
        };
        done.map_err(|error| self.refuse(&error))
    }

    pub(super) fn seek(&self, inode: INodeNo, offset: i64, whence: i32) -> Result<i64, Errno> {
        let disk = self.disk(inode)?;
        let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        let found = match whence {
            libc::SEEK_DATA => disk.seek_data(offset),
            libc::SEEK_HOLE => disk.seek_hole(offset),
            _ => return Err(Errno::EINVAL),
        };
        let found = found.map_err(|error| self.refuse(&error))?.ok_or(Errno::ENXIO)?;
        i64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    }

    pub(super) fn change(
        &self,
        inode: INodeNo,
        size: Option<u64>,
        change: Option<AttributeChange>,
    ) -> Result<FileAttr, Errno> {
        let disk = match self.node(inode)? {
            Node::Disk(disk) => disk,
            Node::Root => return Err(Errno::EPERM),
        };
        if let Some(size) = size {
            if disk.is_read_only() {
                return Err(Errno::EROFS);
            }
            disk.truncate(size).map_err(|error| self.refuse(&error))?;
        }
        if let Some(change) = change {
            disk.set_attributes(change).map_err(|error| self.refuse(&error))?;
        }
        self.attributes(inode)
    }
}
