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
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::file_io::FileIo;
use super::raw::RawImage;
use super::{Attributes, CacheMode, Format, Image, probe};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// What an image is opened for: decides which locks are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The disk's bytes now: read, and written if it is opened writable.
    #[default]
    Source,
    /// A mirror's target.
    Target,
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

/// Opens the image at `path`.
///
/// # Errors
/// Names the path and what is wrong with it: missing, not a file, in use, of a format that is in doubt.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>> {
    let path = std::path::absolute(path).map_err(|error| Error::io("cannot open", &error).on(display(path)))?;
    let name = display(&path);
    let failed = |error: std::io::Error| Error::io("cannot open", &error).on(&*name);
    let path_only = match &options.descriptor {
        Some(parked) => open_path_only(&reopened(parked)),
        None => open_path_only(&path),
    };
    let path_only = path_only.map_err(failed)?;
    let kind = path_only.metadata().map_err(failed)?.file_type();
    if kind.is_dir() {
        return Err(Error::usage("an image is a file or a block device, not a directory:").on(name));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::usage("an image is a regular file or a block device, which this is not:").on(name));
    }
    let locked = match &options.descriptor {
        Some(parked) => File::from(parked.try_clone().map_err(failed)?),
        None => reopen(&path_only, options.writable, 0).map_err(failed)?,
    };
    let opened = Opened { path, path_only, locked, writable: options.writable };
    probe::decide(&opened.path, &opened.locked, options.format)?;
    if options.cache == CacheMode::None {
        return Err(Error::new(ErrorKind::Unsupported, "cache=none is not supported yet for").on(name));
    }
    let io = reopen(&opened.path_only, options.writable, 0).map_err(failed)?;
    let size_bytes = io.metadata().map_err(failed)?.size();
    Ok(Arc::new(RawImage::new(FileIo::new(name.clone(), io, size_bytes), opened)?))
}

/// Creates a raw image of `size_bytes`, all of it a hole, and opens it. Mode and owner are those of `like`, where
/// the system allows it.
///
/// # Errors
/// [`ErrorKind::Exists`] if there is something at `path`. Whatever fails, nothing is left behind.
pub fn create(
    path: &Path,
    size_bytes: u64,
    like: Option<&Attributes>,
    options: &OpenOptions,
) -> Result<Arc<dyn Image>> {
    let name = display(path);
    if options.format == Some(Format::Qcow2)
        || (options.format.is_none() && probe::format_of_name(path) == Format::Qcow2)
    {
        return Err(Error::new(ErrorKind::Unsupported, "qcow2 is not supported yet: cannot create").on(name));
    }
    let failed = |error: std::io::Error| Error::io("cannot create", &error).on(&*name);
    let mut new = std::fs::OpenOptions::new();
    let file = new.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let finish = || {
        file.set_len(size_bytes).map_err(failed)?;
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

/// Gives `file` the owner and mode of `like`. An owner that may not be given away stays.
fn adopt(file: &File, like: &Attributes) -> std::io::Result<()> {
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
fn reopened(descriptor: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// Opens a name without opening what it names: no device is touched, no fifo is waited for.
fn open_path_only(path: &Path) -> std::io::Result<File> {
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

/// A new open file description of the file behind `descriptor`.
pub(super) fn reopen(descriptor: &impl AsRawFd, writable: bool, flags: i32) -> std::io::Result<File> {
    std::fs::OpenOptions::new().read(true).write(writable).custom_flags(flags).open(reopened(descriptor))
}
