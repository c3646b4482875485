//! A file system of the test's own: what an NFS server is to the program that uses it, one that hangs or fails on demand.
//!
//! Its files are those of a directory beside it, in which they can be looked at without asking it. A request that it *holds* is one
//! that the kernel has sent: no signal makes its caller come back, and it takes effect when it is let go, whoever has died
//! meanwhile. Files are opened for direct, parallel writes: no lock of the kernel's own orders two writes to one place.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    Session, SessionACL, TimeOrNow, WriteFlags,
};
use nix::fcntl::{FallocateFlags, OFlag};
use nix::mount::{MntFlags, MsFlags};
use nix::sys::stat::Mode;
use nix::unistd::Whence;
use xattr::FileExt as _;

use super::place::Place;
use super::wait;

/// Kinds of requests that can be held or failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Sync,
    Allocate,
}

/// What becomes of a request that matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It waits for [`Remote::let_go`], and takes effect then.
    Hold,
    /// It fails with this errno, and nothing is done.
    Fail(i32),
}

struct Rule {
    kind: Kind,
    file: String,
    /// First byte, and the one after the last.
    range: (u64, u64),
    times: u64,
    effect: Effect,
}

/// Does what was asked, and answers.
type Deed = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    held: Vec<Deed>,
    /// Requests of each kind that came, held and failed ones included, by file.
    came: Vec<(Kind, String)>,
    files: Vec<(String, Arc<File>)>,
}

/// The mounted file system. Everything held is let go when it is dropped, and it is unmounted.
pub struct Remote {
    /// Where it is mounted.
    pub path: PathBuf,
    backing: PathBuf,
    state: Arc<Mutex<State>>,
}

impl Remote {
    /// Mounts one in `place`, without any file. Needs root.
    #[track_caller]
    pub fn new(place: &Place) -> Remote {
        let (path, backing) = (place.directory("remote"), place.directory("remote.files"));
        let device = nix::fcntl::open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).expect("/dev/fuse");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        nix::mount::mount(Some("remote"), &path, Some("fuse.remote"), MsFlags::empty(), Some(options.as_str()))
            .expect("mount");
        let state = Arc::new(Mutex::new(State::default()));
        let served = Served { backing: backing.clone(), state: Arc::clone(&state) };
        let remote = Remote { path, backing, state };
        let session = Session::from_fd(served, device, SessionACL::All, Config::default()).expect("a FUSE session");
        std::thread::Builder::new().name("remote".into()).spawn(move || session.run()).expect("a thread");
        remote
    }

    /// Makes a file of `size_bytes`, all hole; its path.
    pub fn sparse(&self, name: &str, size_bytes: u64) -> PathBuf {
        File::create_new(self.backing(name)).expect("a new file").set_len(size_bytes).expect("set_len");
        self.path.join(name)
    }

    /// Where the bytes of a file lie, seen past everything that is held.
    pub fn backing(&self, name: &str) -> PathBuf {
        self.backing.join(name)
    }

    /// The next `times` requests of that kind to bytes `from..to` of a file meet `effect`. A sync has no range.
    pub fn meet(&self, kind: Kind, name: &str, (from, to): (u64, u64), times: u64, effect: Effect) {
        let rule = Rule { kind, file: name.to_owned(), range: (from, to), times, effect };
        self.state.lock().expect("state").rules.push(rule);
    }

    /// Holds the next `times` requests of that kind to bytes `from..to` of a file.
    pub fn hold(&self, kind: Kind, name: &str, range: (u64, u64), times: u64) {
        self.meet(kind, name, range, times, Effect::Hold);
    }

    /// Fails every request of that kind to a file from now on.
    pub fn fail(&self, kind: Kind, name: &str, errno: i32) {
        self.meet(kind, name, (0, u64::MAX), u64::MAX, Effect::Fail(errno));
    }

    /// What comes from now on is carried out at once. What is held stays held.
    pub fn behave(&self) {
        self.state.lock().expect("state").rules.clear();
    }

    /// Waits until `count` requests are held.
    #[track_caller]
    pub fn wait_held(&self, count: usize) {
        wait::until("a request that is held", || self.state.lock().expect("state").held.len() >= count);
    }

    /// How many requests of that kind came to a file so far.
    pub fn came(&self, kind: Kind, name: &str) -> usize {
        let state = self.state.lock().expect("state");
        state.came.iter().filter(|(other, file)| *other == kind && file == name).count()
    }

    /// Carries out what is held, and holds nothing any more.
    pub fn let_go(&self) {
        let mut state = self.state.lock().expect("state");
        state.rules.retain(|rule| rule.effect != Effect::Hold);
        let held = std::mem::take(&mut state.held);
        drop(state);
        held.into_iter().for_each(|deed| deed());
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.let_go();
        // Not a plain unmount: a server that is being killed may have a file open for a moment yet.
        let _ = nix::mount::umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

struct Served {
    backing: PathBuf,
    state: Arc<Mutex<State>>,
}

/// Times are asked for each time: what is written past the kernel shows at once.
const NEVER_KEPT: Duration = Duration::ZERO;
const FIRST_FILE: u64 = 2;

impl Served {
    fn file(&self, inode: INodeNo) -> Result<(String, Arc<File>), Errno> {
        let state = self.state.lock().expect("state");
        let at = inode.0.checked_sub(FIRST_FILE).ok_or(Errno::EISDIR)?;
        state.files.get(at as usize).cloned().ok_or(Errno::ESTALE)
    }

    /// The file's number, opened if it is not yet.
    fn find(&self, name: &OsStr) -> Result<INodeNo, Errno> {
        let name = name.to_str().ok_or(Errno::ENOENT)?;
        let mut state = self.state.lock().expect("state");
        let known = state.files.iter().position(|(other, _)| other == name);
        let at = match known {
            Some(at) => at,
            None => {
                let file = OpenOptions::new().read(true).write(true).open(self.backing.join(name))?;
                state.files.push((name.to_owned(), Arc::new(file)));
                state.files.len() - 1
            }
        };
        Ok(INodeNo(FIRST_FILE + at as u64))
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        let meta = match inode {
            INodeNo::ROOT => fs::metadata(&self.backing)?,
            inode => self.file(inode)?.1.metadata()?,
        };
        let time = |seconds: i64, nanos: i64| {
            SystemTime::UNIX_EPOCH + Duration::new(seconds.unsigned_abs(), u32::try_from(nanos).unwrap_or(0))
        };
        Ok(FileAttr {
            ino: inode,
            size: meta.len(),
            blocks: meta.blocks(),
            atime: time(meta.atime(), meta.atime_nsec()),
            mtime: time(meta.mtime(), meta.mtime_nsec()),
            ctime: time(meta.ctime(), meta.ctime_nsec()),
            crtime: SystemTime::UNIX_EPOCH,
            kind: if meta.is_dir() { FileType::Directory } else { FileType::RegularFile },
            perm: (meta.mode() & 0o7777) as u16,
            nlink: 1,
            uid: meta.uid(),
            gid: meta.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// Does `deed` at once, or later, or, with an errno, does not: as the rules say.
    fn serve(
        &self,
        kind: Kind,
        inode: INodeNo,
        (from, to): (u64, u64),
        deed: impl FnOnce(Result<Arc<File>, Errno>) + Send + 'static,
    ) {
        let (name, file) = match self.file(inode) {
            Ok(found) => found,
            Err(errno) => return deed(Err(errno)),
        };
        let mut state = self.state.lock().expect("state");
        state.came.push((kind, name.clone()));
        let met = state.rules.iter_mut().find(|rule| {
            let within = rule.kind == Kind::Sync || (from < rule.range.1 && rule.range.0 < to);
            rule.times > 0 && rule.kind == kind && rule.file == name && within
        });
        let effect = met.map(|rule| {
            rule.times -= 1;
            rule.effect
        });
        match effect {
            Some(Effect::Hold) => state.held.push(Box::new(move || deed(Ok(file)))),
            Some(Effect::Fail(errno)) => {
                drop(state);
                deed(Err(Errno::from_i32(errno)));
            }
            None => {
                drop(state);
                deed(Ok(file));
            }
        }
    }
}

fn end(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(name).and_then(|inode| self.attributes(inode)) {
            Ok(attributes) => reply.entry(&NEVER_KEPT, &attributes, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Ok(attributes) => reply.attr(&NEVER_KEPT, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let resized = size.map_or(Ok(()), |size| Ok(self.file(inode)?.1.set_len(size)?));
        match resized.and_then(|()| self.attributes(inode)) {
            Ok(attributes) => reply.attr(&NEVER_KEPT, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
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
        self.serve(Kind::Read, inode, (offset, offset + u64::from(size)), move |file| {
            let mut bytes = vec![0; size as usize];
            match file.and_then(|file| Ok(file.read_at(&mut bytes, offset)?)) {
                Ok(len) => reply.data(&bytes[..len]),
                Err(errno) => reply.error(errno),
            }
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
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.serve(Kind::Write, inode, (offset, offset + data.len() as u64), move |file| {
            match file.and_then(|file| Ok(file.write_all_at(&data, offset)?)) {
                Ok(()) => reply.written(u32::try_from(data.len()).expect("a request's length")),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, inode: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.serve(Kind::Sync, inode, (0, u64::MAX), move |file| {
            end(reply, file.and_then(|file| Ok(file.sync_data()?)));
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match nix::sys::statvfs::statvfs(&self.backing) {
            Ok(room) => {
                let block = u32::try_from(room.fragment_size()).unwrap_or(4096);
                reply.statfs(room.blocks(), room.blocks_free(), room.blocks_available(), 0, 0, block, 255, block);
            }
            Err(errno) => reply.error(Errno::from_i32(errno as i32)),
        }
    }

    fn setxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, value: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        end(reply, self.file(inode).and_then(|(_, file)| Ok(file.set_xattr(name, value)?)));
    }

    fn getxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.file(inode).and_then(|(_, file)| Ok(file.get_xattr(name)?)) {
            Ok(Some(value)) if size == 0 => reply.size(u32::try_from(value.len()).expect("small")),
            Ok(Some(value)) if value.len() > size as usize => reply.error(Errno::ERANGE),
            Ok(Some(value)) => reply.data(&value),
            Ok(None) => reply.error(Errno::ENODATA),
            Err(errno) => reply.error(errno),
        }
    }

    fn removexattr(&self, _: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        end(reply, self.file(inode).and_then(|(_, file)| Ok(file.remove_xattr(name)?)));
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.serve(Kind::Allocate, inode, (offset, offset + length), move |file| {
            let (from, len) = (i64::try_from(offset).unwrap_or(i64::MAX), i64::try_from(length).unwrap_or(i64::MAX));
            let done = file.and_then(|file| {
                nix::fcntl::fallocate(&*file, FallocateFlags::from_bits_retain(mode), from, len)
                    .map_err(|errno| Errno::from_i32(errno as i32))
            });
            end(reply, done);
        });
    }

    fn lseek(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let whence = if whence == libc::SEEK_DATA { Whence::SeekData } else { Whence::SeekHole };
        let found = self.file(inode).and_then(|(_, file)| {
            nix::unistd::lseek(&*file, offset, whence).map_err(|errno| Errno::from_i32(errno as i32))
        });
        match found {
            Ok(found) => reply.offset(found),
            Err(errno) => reply.error(errno),
        }
    }
}

/// The 4 KiB at `offset` of a file, if they are all one byte.
#[track_caller]
pub fn block_of(path: &Path, offset: u64) -> Option<u8> {
    let mut bytes = [0; 4096];
    File::open(path).and_then(|file| file.read_exact_at(&mut bytes, offset)).expect("read");
    bytes.iter().all(|byte| *byte == bytes[0]).then_some(bytes[0])
}
