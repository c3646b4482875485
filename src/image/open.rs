//! Opening and creating images.
//!
//! An open image has up to three descriptors, each an open file description of its own:
//!
//! | descriptor | use |
//! |---|---|
//! | path_only | O_PATH: what was found under the name, whatever happens to the name later; all others are opened through it |
//! | locked | carries QEMU's image locks and, on a block device, O_EXCL; parked with the keeper, so they outlive the server |
//! | I/O | reads and writes; never parked, so that it ends with the server and with the last request of it (rule 14) |

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::block_device::BlockDevice;
use super::device_limits::DeviceLimits;
use super::file_io::{Direct, FileIo};
use super::lock::{self, Fence};
use super::qcow2::{self, Qcow2Image};
use super::raw::RawImage;
use super::{Attributes, CacheMode, DescriptorRole, Format, Image, Layout, nbd, own_mount, probe, users};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;
use crate::sys::files;

/// Block and memory alignment of direct I/O where the file system does not tell: fits all that are in use.
const DIRECT_BLOCK_BYTES: u64 = 4096;

/// How long a new server waits for the last request of the one before it.
const FENCE_PATIENCE: Duration = Duration::from_secs(10);

/// What an image is opened for: decides which locks are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The disk's bytes now: read, and written if it is opened writable.
    #[default]
    Source,
    /// A mirror's target.
    Target,
    /// Beneath another image: read, by others too.
    Backing,
    /// Looked at only, whoever else uses it: no lock is taken.
    Observer,
}

/// How to open an image.
#[derive(Debug, Default)]
pub struct OpenOptions {
    /// `None`: told by name and content.
    pub format: Option<Format>,
    /// False: read-only.
    pub writable: bool,
    /// Use of the host's page cache.
    pub cache: CacheMode,
    /// What it is for.
    pub role: Role,
    /// A [`super::DescriptorRole::Locked`] descriptor from an earlier server, used instead of opening the path.
    pub descriptor: Option<OwnedFd>,
    /// NBD: how long a request waits while the connection is lost.
    pub reconnect: Duration,
    /// NBD: guests wait for it already, and it had so many bytes. A server that does not answer is gone on waiting for after it was opened.
    pub insist: Option<u64>,
}

/// What belongs to an open image besides its I/O.
#[derive(Debug)]
pub(super) struct Opened {
    /// The absolute path.
    pub(super) path: PathBuf,
    /// O_PATH.
    pub(super) path_only: File,
    /// Carries the locks.
    pub(super) locked: File,
    /// Opened for writing.
    pub(super) writable: bool,
}

/// Opens the image at `path`, which may be an NBD URI.
///
/// # Errors
/// Names the path and what is wrong with it: missing, not a file, in use, of a format that is in doubt.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>> {
    if nbd::uri::is_uri(path) {
        return nbd::open(path, options);
    }
    open_layer(path, None, options, &qcow2::Chain::default())
}

/// Opens an image beneath those of `chain`. `found`: what is at `path`, opened by [`open_path_only`].
pub(super) fn open_layer(
    path: &Path,
    found: Option<File>,
    options: &OpenOptions,
    chain: &qcow2::Chain,
) -> Result<Arc<dyn Image>> {
    let path = std::path::absolute(path).map_err(|error| Error::io("cannot open", &error).on(display(path)))?;
    let name = display(&path);
    let failed = |error: io::Error| cannot_open(&name, &error);
    let path_only = match (found, &options.descriptor) {
        (Some(found), _) => Ok(found),
        (None, Some(parked)) => open_path_only(&reopened(parked)),
        (None, None) => open_path_only(&path),
    };
    let path_only = path_only.map_err(failed)?;
    let meta = path_only.metadata().map_err(failed)?;
    let device = meta.file_type().is_block_device();
    if meta.is_dir() {
        return Err(Error::usage("an image is a file or a block device, not a directory:")
            .on(name)
            .advise("name the image file in it"));
    }
    if !meta.is_file() && !device {
        return Err(Error::usage("an image is a regular file or a block device, which this is not:")
            .on(name)
            .advise("name an image file or a block device"));
    }
    let locked = match &options.descriptor {
        Some(parked) => {
            check_access(File::from(parked.try_clone().map_err(failed)?), options.writable).map_err(failed)?
        }
        None => {
            // O_EXCL without O_CREAT: nobody else may hold the device that way, a mounted file system or an LVM for instance.
            let alone = !matches!(options.role, Role::Observer | Role::Backing);
            let exclusive = if device && alone { libc::O_EXCL } else { 0 };
            let opened = lock::patiently(lock::PATIENCE, || match reopen(&path_only, options.writable, exclusive) {
                Err(error) if device && error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
                opened => opened.map(Some),
            });
            let locked = opened.map_err(failed)?.ok_or_else(|| users::busy(&name, meta.rdev()))?;
            if device && alone {
                users::refuse_loop_over(&name, meta.rdev())?;
            }
            locked
        }
    };
    if options.role != Role::Observer {
        lock::take_image_locks(&locked, &name, options.writable)?;
    }
    let format = probe::decide(&path, &locked, options.format)?;
    let opened = Opened { path, path_only, locked, writable: options.writable };
    if format == Format::Qcow2 {
        if device {
            let what = "a qcow2 image on a block device is not supported:";
            return Err(Error::new(ErrorKind::Unsupported, what)
                .on(name)
                .advise("pass --format raw to use the device itself"));
        }
        let io = opened.io(name, meta.size(), None, options)?;
        return Ok(Arc::new(Qcow2Image::new(io, opened, options, chain)?));
    }
    if device {
        let limits = DeviceLimits::of(&opened.locked).map_err(failed)?;
        let size = files::block_device_size(&opened.locked).map_err(failed)?;
        let io = opened.io(name, size, Some(&limits), options)?;
        return Ok(Arc::new(BlockDevice::new(io, opened, limits)));
    }
    let io = opened.io(name, meta.size(), None, options)?;
    Ok(Arc::new(RawImage::new(io, opened)?))
}

impl Opened {
    /// What to park with the keeper.
    pub(super) fn descriptors(&self) -> Vec<(DescriptorRole, BorrowedFd<'_>)> {
        vec![(DescriptorRole::Locked, self.locked.as_fd()), (DescriptorRole::Path, self.path_only.as_fd())]
    }

    /// Opens the descriptors that read and write, fenced if they can write. `device`: the limits of a device.
    fn io(
        &self,
        name: String,
        size_bytes: u64,
        device: Option<&DeviceLimits>,
        options: &OpenOptions,
    ) -> Result<FileIo> {
        let failed = |error: io::Error| Error::io("cannot open", &error).on(&*name);
        // An earlier server was reaped before its descriptor came here; requests that outlive their process take a moment.
        let patience = if options.descriptor.is_some() { FENCE_PATIENCE } else { Duration::ZERO };
        let fenced = |file: &File, fence: Fence| {
            let needed = self.writable && options.role != Role::Observer;
            if needed { lock::take_fence(file, &name, fence, patience) } else { Ok(()) }
        };
        if options.cache == CacheMode::Writeback {
            let file = reopen(&self.path_only, self.writable, 0).map_err(failed)?;
            fenced(&file, Fence::Io)?;
            return Ok(FileIo::new(name, file, size_bytes, self.writable, None));
        }
        let refused = |why: &str| {
            let what = format!("cache=none needs direct I/O, which {why}: cannot open");
            Error::new(ErrorKind::Unsupported, what).on(&*name).advise("use -o cache=writeback")
        };
        let file = match reopen(&self.path_only, self.writable, libc::O_DIRECT) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(refused("the file system does not offer"));
            }
            opened => opened.map_err(failed)?,
        };
        let (block, memory) = match device {
            Some(limits) => (limits.logical_block, limits.memory),
            None => match files::direct_alignment(&file).map_err(failed)? {
                Some(told) if told.offset == 0 || told.memory == 0 => {
                    return Err(refused("the file system does not offer for this file"));
                }
                Some(told) => (told.offset.into(), told.memory.into()),
                None => (DIRECT_BLOCK_BYTES, DIRECT_BLOCK_BYTES),
            },
        };
        // Only a file can end within a block.
        let tail = device.is_none().then(|| reopen(&self.path_only, self.writable, 0)).transpose().map_err(failed)?;
        fenced(&file, Fence::Io)?;
        if let Some(tail) = &tail {
            fenced(tail, Fence::Tail)?;
        }
        let direct =
            Direct::new(block, memory, tail).ok_or_else(|| refused("needs larger blocks here than are supported"))?;
        Ok(FileIo::new(name, file, size_bytes, self.writable, Some(direct)))
    }
}

/// A parked descriptor, if it was opened for what is wanted now.
fn check_access(parked: File, writable: bool) -> io::Result<File> {
    let flags = OFlag::from_bits_retain(fcntl(&parked, FcntlArg::F_GETFL)?);
    if writable && flags & OFlag::O_ACCMODE != OFlag::O_RDWR {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    Ok(parked)
}

/// Creates an image of `size_bytes` (qcow2: rounded up to whole sectors) with nothing in it, and opens it: all of it is a hole, or reads as
/// its backing file does. Mode and owner are those of `like`, where the system allows it.
///
/// # Errors
/// [`ErrorKind::Exists`] if there is something at `path`; `layout` is not possible. Whatever fails, nothing is left behind.
pub fn create(
    path: &Path,
    size_bytes: u64,
    like: Option<&Attributes>,
    layout: &Layout,
    options: &OpenOptions,
) -> Result<Arc<dyn Image>> {
    let name = display(path);
    let format = options.format.unwrap_or_else(|| probe::format_of_name(path));
    layout.check(format, &name)?;
    let layout = with_backing_format(path, layout)?;
    let failed = |error: io::Error| Error::io("cannot create", &error).on(&*name);
    let mut new = std::fs::OpenOptions::new();
    let file = new.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let finish = || {
        match format {
            Format::Raw => file.set_len(size_bytes).map_err(failed)?,
            Format::Qcow2 => qcow2::format(&file, &name, size_bytes, &layout)?,
        }
        let image = open(path, options)?;
        if let Some(like) = like {
            // Last, because it may take our right to open the file again.
            adopt(&file, like).map_err(failed)?;
        }
        Ok(image)
    };
    finish().inspect_err(|_| {
        if let Err(error) = std::fs::remove_file(path) {
            log::warn!("cannot remove {name}: {error}");
        }
    })
}

/// The layout with the format of the backing file told: what a guest writes there later must not decide how it is read.
fn with_backing_format(path: &Path, layout: &Layout) -> Result<Layout> {
    let mut layout = layout.clone();
    if let Some(backing) = layout.backing.as_mut().filter(|backing| backing.format.is_none()) {
        let backing_path = qcow2::backing_path(path, &backing.file)?;
        own_mount::refuse_inside(&backing_path)?;
        let options = OpenOptions { role: Role::Observer, ..OpenOptions::default() };
        backing.format = Some(open(&backing_path, &options)?.format());
    }
    Ok(layout)
}

/// Gives `file` the owner and mode of `like`. An owner that may not be given away stays.
fn adopt(file: &File, like: &Attributes) -> io::Result<()> {
    for (uid, gid) in [(None, Some(like.gid)), (Some(like.uid), None)] {
        match std::os::unix::fs::fchown(file, uid, gid) {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL | libc::EOPNOTSUPP)) => {
                return Err(error);
            }
            _ => (),
        }
    }
    let mut mode = like.mode & 0o777;
    if !nix::unistd::geteuid().is_root() {
        // An ordinary user must be able to open its own file again after a restart.
        mode |= 0o600;
    }
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
}

/// Makes the name of `path` durable: a new file is lost in a power cut until its directory is flushed.
///
/// # Errors
/// Names the directory.
pub fn sync_parent_directory(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flushed = File::open(parent).and_then(|directory| directory.sync_all());
    flushed.map_err(|error| Error::io("cannot flush directory", &error).on(display(parent)))
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

/// The name through which a descriptor's file can be opened again, whatever became of its path.
pub(super) fn reopened(descriptor: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// Names the image, and what is mostly behind such an error.
fn cannot_open(name: &str, error: &io::Error) -> Error {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => "check the path; is the file system that holds it mounted?",
        io::ErrorKind::PermissionDenied => {
            "the image must be readable and writable for this user (--read-only: readable)"
        }
        io::ErrorKind::ReadOnlyFilesystem => "its file system is read-only: pass --read-only, or remount it",
        _ => "see that the image can be read and written with other programs",
    };
    Error::io("cannot open", error).on(name).advise(advice)
}

/// Opens a name without opening what it names: no device is touched, no fifo is waited for.
pub(super) fn open_path_only(path: &Path) -> io::Result<File> {
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

/// A new open file description of the file behind `descriptor`.
pub(super) fn reopen(descriptor: &impl AsRawFd, writable: bool, flags: i32) -> io::Result<File> {
    std::fs::OpenOptions::new().read(true).write(writable).custom_flags(flags).open(reopened(descriptor))
}
