//! The adapter between kernel requests and volumes: translate, call the volume, reply. It decides nothing about bytes.
//!
//! Each method ends in one reply, sent by the thread that read the request. What may look at a disk is recorded as under way
//! until before its reply ([`Flights`](super::flights::Flights)).
//!
//! The kernel remembers ENOSYS for the life of the connection and never asks again. So it is the answer only where it shall
//! stay so: flush (close(2) has nothing to wait for), copy_file_range (the kernel then copies through read and write), poll
//! (always ready), interrupt, and the xattr calls (the kernel then answers EOPNOTSUPP by itself). Wherever an error comes from a volume, ENOSYS is turned into
//! EOPNOTSUPP: an FSYNC, FALLOCATE or LSEEK must reach us always.

use std::ffi::OsStr;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, IoctlFlags, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::fuse::disks::{DiskFilesystem, Node};
use crate::fuse::flights::Named;
use crate::fuse::read_buffer;
use crate::range::ByteRange;
use crate::volume::AttributeChange;

/// Names never change while mounted.
const ENTRY_TTL: Duration = Duration::from_secs(3600);
/// The kernel drops what it knows whenever the guest writes; only the copy's effect on st_blocks may be this late.
const ATTRIBUTE_TTL: Duration = Duration::from_secs(1);
const HANDLE: FileHandle = FileHandle(0);
const GENERATION: Generation = Generation(0);
const STATFS_BLOCK_BYTES: u32 = 4096;

fn time(value: TimeOrNow) -> SystemTime {
    match value {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl DiskFilesystem {
    fn finish(&self, reply: ReplyEmpty, result: Result<(), Errno>) {
        match result {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
        self.flights.answered();
    }

    fn finish_attributes(&self, reply: ReplyAttr, result: Result<FileAttr, Errno>) {
        match result {
            Ok(attributes) => reply.attr(&ATTRIBUTE_TTL, &attributes),
            Err(errno) => reply.error(errno),
        }
        self.flights.answered();
    }

    /// Whatever may look at a disk is recorded as under way while it does.
    fn fly<T>(&self, request: &Request, named: Named<'_>, work: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let look = self.crew.look(&self.flights);
        let result = self.flights.run(request.unique().into(), named, work);
        if let Some(look) = look {
            self.crew.judge(&look);
        }
        result
    }
}

impl Filesystem for DiskFilesystem {
    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = || match self.node(parent)? {
            Node::Root => {
                let index = self.disks.volumes.iter().position(|volume| name == volume.name()).ok_or(Errno::ENOENT)?;
                self.attributes(Self::inode_of(index))
            }
            Node::Disk(_) => Err(Errno::ENOTDIR),
        };
        match self.fly(request, Named("lookup", parent.0, 0, 0), found) {
            Ok(attributes) => reply.entry_with_ttls(&ATTRIBUTE_TTL, &ENTRY_TTL, &attributes, GENERATION),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, request: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.finish_attributes(reply, self.fly(request, Named("getattr", inode.0, 0, 0), || self.attributes(inode)));
    }

    fn setattr(
        &self,
        request: &Request,
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
        let named = Named("setattr", inode.0, size.unwrap_or(0), 0);
        self.finish_attributes(reply, self.fly(request, named, || self.change(inode, size, change)));
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
        request: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let named = Named("read", inode.0, offset, size.into());
        read_buffer::with(size as usize, |buffer| {
            match self.fly(request, named, || self.read_into(inode, offset, buffer)) {
                Ok(len) => reply.data(&buffer[..len]),
                Err(errno) => reply.error(errno),
            }
        });
        self.flights.answered();
    }

    fn write(
        &self,
        request: &Request,
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
        let named = Named("write", inode.0, offset, data.len() as u64);
        match self.fly(request, named, || self.write_all(inode, offset, data, durable)) {
            Ok(written) => reply.written(written),
            Err(errno) => reply.error(errno),
        }
        self.flights.answered();
    }

    /// close(2): nothing is held back for it, since nothing of the guest's is cached here. Said once and for all: else a close would
    /// wait while no server runs, that of an exec(2) too, and then whoever looks at that process, `ps` first of all.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, request: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let flush = || self.disk(inode)?.flush().map_err(|error| self.refuse(&error));
        self.finish(reply, self.fly(request, Named("fsync", inode.0, 0, 0), flush));
    }

    fn fallocate(
        &self,
        request: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let named = Named("fallocate", inode.0, offset, len);
        self.finish(reply, self.fly(request, named, || self.allocate(inode, ByteRange::new(offset, len), mode)));
    }

    fn lseek(&self, request: &Request, inode: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let named = Named("lseek", inode.0, u64::try_from(offset).unwrap_or(0), 0);
        match self.fly(request, named, || self.seek(inode, offset, whence)) {
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

    fn statfs(&self, request: &Request, inode: INodeNo, reply: ReplyStatfs) {
        let disk = match self.node(inode) {
            Ok(Node::Disk(disk)) => Some(disk),
            _ => self.disks.volumes.first().map(|volume| &**volume),
        };
        let Some(disk) = disk else { return reply.error(Errno::EIO) };
        let room = || disk.room().map_err(|error| self.refuse(&error));
        match self.fly(request, Named("statfs", inode.0, 0, 0), room) {
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
            Err(errno) => reply.error(errno),
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

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
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
