//! A null volume: a mounted file that is served from nothing, which is the ceiling of what any disk behind FUSE can give on this machine.
//!
//! Requests are negotiated and read as livemirror does it (direct I/O, parallel writes, requests of 1 MiB, as many threads), and answered at
//! once: a read with the same zeroes always, a write without a look at its bytes. What is left is the kernel's way there and back, its copy of
//! the bytes included. `benches/side_by_side.sh` shows it beside the rest.
//!
//! ```text
//! cargo run --release --example null_volume -- FILE SIZE_MIB      FILE (there already) is the volume until it is unmounted
//! ```

use std::io;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig, LockOwner,
    MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyOpen, ReplyWrite, Request, Session, WriteFlags,
};
use livemirror::fuse::init::MAX_TRANSFER_BYTES;

/// As many as livemirror asks for.
const MAX_BACKGROUND: u16 = 256;
const FOREVER: Duration = Duration::from_secs(3600);

struct NullVolume {
    size_bytes: u64,
    zeroes: Vec<u8>,
}

impl NullVolume {
    fn attributes(&self, request: &Request) -> FileAttr {
        FileAttr {
            ino: INodeNo::ROOT,
            size: self.size_bytes,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: FileType::RegularFile,
            perm: 0o600,
            nlink: 1,
            uid: request.uid(),
            gid: request.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for NullVolume {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let refused = |_| io::Error::other("the kernel's FUSE is too old");
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|_| io::Error::other("no asynchronous direct I/O"))?;
        config.set_max_write(MAX_TRANSFER_BYTES).map_err(refused)?;
        config.set_max_background(MAX_BACKGROUND).map_err(|_| io::Error::other("no queue"))?;
        Ok(())
    }

    fn getattr(&self, request: &Request, _: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(request));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = u64::from(size).min(self.size_bytes.saturating_sub(offset)) as usize;
        match self.zeroes.get(..len) {
            Some(zeroes) => reply.data(zeroes),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }
}

/// As many threads as a server of livemirror has.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(4, |cores| (cores.get() * 2).clamp(4, 16))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let size_mib = arguments.get(1).and_then(|size| size.parse::<u64>().ok()).filter(|size| *size > 0);
    let ([file, _], Some(size_mib)) = (&arguments[..], size_mib) else {
        eprintln!("usage: null_volume FILE SIZE_MIB");
        return ExitCode::from(2);
    };
    let volume = NullVolume { size_bytes: size_mib << 20, zeroes: vec![0; MAX_TRANSFER_BYTES as usize] };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("null_volume".into()), MountOption::Subtype("null_volume".into())];
    config.n_threads = Some(threads());
    match Session::new(volume, file, &config).and_then(Session::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("null_volume: cannot serve {file}: {error}");
            ExitCode::FAILURE
        }
    }
}
