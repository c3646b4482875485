//! The adapter between kernel requests and volumes: translate, call the volume, reply. It decides nothing about bytes.
//!
//! Inode numbers and file handles are constants, so that a server that takes over knows them all:
//!
//! ```text
//! layout Directory:  inode 1 the root directory, inode 2 + N volume N
//! layout File:       inode 1 volume 0
//! file handle:       0 always
//! ```
//!
//! The kernel remembers ENOSYS for the life of the connection and never asks again. So it is the answer only where it shall
//! stay so: copy_file_range (the kernel then copies through read and write), poll (always ready), interrupt, and the
//! xattr calls (the kernel then answers EOPNOTSUPP by itself). Wherever an error comes from a volume, ENOSYS is turned into
//! EOPNOTSUPP: a FLUSH, FSYNC, FALLOCATE or LSEEK must reach us always.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, IoctlFlags, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::error::{Error, Result};
use crate::fuse::read_buffer;
use crate::range::ByteRange;
use crate::server::config::Layout;
use crate::volume::{AttributeChange, Volume};

/// Names never change while mounted.
const ENTRY_TTL: Duration = Duration::from_secs(3600);
/// The kernel drops what it knows whenever the guest writes; only the copy's effect on st_blocks may be this late.
const ATTRIBUTE_TTL: Duration = Duration::from_secs(1);
const HANDLE: FileHandle = FileHandle(0);
const GENERATION: Generation = Generation(0);
const FIRST_VOLUME_INODE: u64 = 2;
const STATFS_BLOCK_BYTES: u32 = 4096;

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
    disks: Disks,
    started: SystemTime,
    /// Seconds since `started` at which a failed request was last logged.
    last_log_seconds: AtomicU64,
}

/// What an inode number names.
enum Node<'a> {
    Root,
    Disk(&'a Volume),
}

impl DiskFilesystem {
    pub(super) fn new(disks: Disks) -> Self {
        DiskFilesystem { disks, started: SystemTime::now(), last_log_seconds: AtomicU64::new(u64::MAX) }
    }

    fn node(&self, inode: INodeNo) -> Result<Node<'_>, Errno> {
        let index = match (self.disks.layout, inode.0) {
            (Layout::File, 1) => 0,
            (Layout::Directory, 1) => return Ok(Node::Root),
            (Layout::Directory, number) if number >= FIRST_VOLUME_INODE => (number - FIRST_VOLUME_INODE) as usize,
            _ => return Err(Errno::ESTALE),
        };
        self.disks.volumes.get(index).map(|volume| Node::Disk(volume)).ok_or(Errno::ESTALE)
    }

    fn disk(&self, inode: INodeNo) -> Result<&Volume, Errno> {
        match self.node(inode)? {
            Node::Disk(volume) => Ok(volume),
            Node::Root => Err(Errno::EISDIR),
        }
    }

    /// The number of volume `index` where there is a root directory.
    fn inode_of(index: usize) -> INodeNo {
        INodeNo(FIRST_VOLUME_INODE + index as u64)
    }

    /// The errno that the guest gets; logs what lies behind it, once a second at most.
    fn refuse(&self, error: &Error) -> Errno {
        let now = self.started.elapsed().map_or(0, |elapsed| elapsed.as_secs());
        if self.last_log_seconds.swap(now, Ordering::Relaxed) != now {
            log::warn!("a guest's request failed: {error}");
        }
        match error.errno() {
            libc::ENOSYS => Errno::EOPNOTSUPP,
            errno => Errno::from_i32(errno),
        }
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
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

    fn read_into(&self, inode: INodeNo, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        self.disk(inode)?.read(offset, buffer).map_err(|error| self.refuse(&error))
    }

    fn write_all(&self, inode: INodeNo, offset: u64, data: &[u8], durable: bool) -> Result<u32, Errno> {
        match self.disk(inode)?.write(offset, data, durable) {
            // A program that gets 0 tries again for ever.
            Ok(0) if !data.is_empty() => Err(Errno::ENOSPC),
            Ok(written) => Ok(u32::try_from(written).unwrap_or(u32::MAX)),
            Err(error) => Err(self.refuse(&error)),
        }
    }

    fn allocate(&self, inode: INodeNo, range: ByteRange, mode: i32) -> Result<(), Errno> {
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

    fn seek(&self, inode: INodeNo, offset: i64, whence: i32) -> Result<i64, Errno> {
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

    fn change(&self, inode: INodeNo, size: Option<u64>, change: Option<AttributeChange>) -> Result<FileAttr, Errno> {
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

fn time(value: TimeOrNow) -> SystemTime {
    match value {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

fn finish(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn finish_attributes(reply: ReplyAttr, result: Result<FileAttr, Errno>) {
    match result {
        Ok(attributes) => reply.attr(&ATTRIBUTE_TTL, &attributes),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for DiskFilesystem {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = match self.node(parent) {
            Ok(Node::Root) => self
                .disks
                .volumes
                .iter()
                .position(|volume| name == volume.name())
                .ok_or(Errno::ENOENT)
                .and_then(|index| self.attributes(Self::inode_of(index))),
            Ok(Node::Disk(_)) => Err(Errno::ENOTDIR),
            Err(errno) => Err(errno),
        };
        match found {
            Ok(attributes) => reply.entry_with_ttls(&ATTRIBUTE_TTL, &ENTRY_TTL, &attributes, GENERATION),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        finish_attributes(reply, self.attributes(inode));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let wanted = mode.is_some() || uid.is_some() || gid.is_some() || accessed.is_some() || modified.is_some();
        let change = wanted.then(|| AttributeChange {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            accessed: accessed.map(time),
            modified: modified.map(time),
        });
        finish_attributes(reply, self.change(inode, size, change));
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.disk(inode) {
            Ok(disk) if disk.is_read_only() && flags.acc_mode() != OpenAccMode::O_RDONLY => reply.error(Errno::EROFS),
            Ok(_) => {
                reply.opened(HANDLE, FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        read_buffer::with(size as usize, |buffer| match self.read_into(inode, offset, buffer) {
            Ok(len) => reply.data(&buffer[..len]),
            Err(errno) => reply.error(errno),
        });
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // O_SYNC contains O_DSYNC; RWF_DSYNC and RWF_SYNC show as the same flags.
        let durable = flags.0 & libc::O_DSYNC != 0;
        match self.write_all(inode, offset, data, durable) {
            Ok(written) => reply.written(written),
            Err(errno) => reply.error(errno),
        }
    }

    /// close(2): nothing is held back for it, since nothing of the guest's is cached here.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let flushed = self.disk(inode).and_then(|disk| disk.flush().map_err(|error| self.refuse(&error)));
        finish(reply, flushed);
    }

    fn fallocate(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, len: u64, mode: i32, reply: ReplyEmpty) {
        finish(reply, self.allocate(inode, ByteRange::new(offset, len), mode));
    }

    fn lseek(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        match self.seek(inode, offset, whence) {
            Ok(found) => reply.offset(found),
            Err(errno) => reply.error(errno),
        }
    }

    fn opendir(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.node(inode) {
            Ok(Node::Root) => reply.opened(HANDLE, FopenFlags::empty()),
            Ok(Node::Disk(_)) => reply.error(Errno::ENOTDIR),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if !matches!(self.node(inode), Ok(Node::Root)) {
            return reply.error(Errno::ENOTDIR);
        }
        let dots = [(INodeNo::ROOT, FileType::Directory, "."), (INodeNo::ROOT, FileType::Directory, "..")];
        let disks = self.disks.volumes.iter().enumerate();
        let disks = disks.map(|(index, volume)| (Self::inode_of(index), FileType::RegularFile, volume.name()));
        let entries = dots.into_iter().chain(disks).zip(1_u64..);
        for ((inode, kind, name), next) in entries.skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _: &Request, inode: INodeNo, reply: ReplyStatfs) {
        let disk = match self.node(inode) {
            Ok(Node::Disk(disk)) => Some(disk),
            _ => self.disks.volumes.first().map(|volume| &**volume),
        };
        let Some(disk) = disk else { return reply.error(Errno::EIO) };
        match disk.room() {
            Ok(room) => {
                let blocks = |bytes: u64| bytes / u64::from(STATFS_BLOCK_BYTES);
                reply.statfs(
                    blocks(room.total_bytes),
                    blocks(room.free_bytes),
                    blocks(room.available_bytes),
                    self.disks.volumes.len() as u64,
                    0,
                    STATFS_BLOCK_BYTES,
                    255,
                    STATFS_BLOCK_BYTES,
                );
            }
            Err(error) => reply.error(self.refuse(&error)),
        }
    }

    // The set of disks is fixed. ENOSYS would make the kernel try other calls instead.

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EPERM);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &std::path::Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    // Remembered by the kernel, see the module.

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn readlink(&self, _: &Request, _: INodeNo, reply: ReplyData) {
        reply.error(Errno::EINVAL);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}
