//! Marks on images (rule 10): what is written on an image itself, so that it tells wherever it is mounted from.
//!
//! | xattr | holds |
//! |---|---|
//! | `user.livemirror.id` | a random id: which image this is, whatever it is called |
//! | `user.livemirror.superseded` | a [`Mark`]: the volume lives on another image now |
//! | `user.livemirror.pair` | a [`PairMark`]: it is source or target of an unfinished mirror (rule 11) |
//!
//! Block devices and some file systems have no user xattrs. There a mark is a file in a registry, `superseded/` in the
//! state base directory, named after what is known of the image. Both places are asked; **the highest generation wins**. Marks are
//! read and written through a descriptor, an O_PATH one too, and so never at a path that names something else by now.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Format, Identity};
use crate::sync::Arc;

use super::attributes;
use super::envelope::Kind;
use super::files::Directory;
use super::pair::PairMark;
use super::paths;
use super::record::random_id;

const ID: &str = "user.livemirror.id";
const SUPERSEDED: &str = "user.livemirror.superseded";
const PAIR: &str = "user.livemirror.pair";
const KIND: Kind = Kind { name: "superseded", version: 1 };

/// What a superseded image says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The volume's id.
    pub volume: String,
    /// The volume's generation when it left this image.
    pub generation: u64,
    /// Absolute path or URI of the image that the volume went to.
    pub successor: String,
    /// Which image that is.
    pub successor_identity: Identity,
    /// Its format. `None`: of a version that did not write it down.
    #[serde(default)]
    pub successor_format: Option<Format>,
    /// When, RFC 3339.
    pub when: String,
}

/// Reads and writes the marks of images.
#[derive(Clone, Debug)]
pub struct Marks {
    registry: PathBuf,
}

impl Marks {
    /// Marks with the registry of this user (root: of the host). It is made when it is needed.
    ///
    /// # Errors
    /// The environment does not tell where the state lies.
    pub fn new() -> Result<Self> {
        Ok(Marks::with_registry(&paths::state_base()?.join("superseded")))
    }

    /// Marks with another registry.
    pub fn with_registry(registry: &Path) -> Self {
        Marks { registry: registry.to_owned() }
    }

    /// The image's random id, made if it has none; `None` where there are no xattrs or none can be written.
    ///
    /// # Errors
    /// Reading or writing fails for another reason.
    pub fn ensure_id(&self, image: BorrowedFd<'_>) -> Result<Option<String>> {
        match self.id(image)? {
            Some(id) => Ok(Some(id)),
            None => self.renew_id(image),
        }
    }

    /// Gives the image a new random id; `None` where there are no xattrs or none can be written.
    ///
    /// # Errors
    /// Writing fails for another reason.
    pub fn renew_id(&self, image: BorrowedFd<'_>) -> Result<Option<String>> {
        self.write_id(image, &random_id()?)
    }

    /// Gives the image the id that it is known to have had: a power cut may have taken it.
    ///
    /// # Errors
    /// As [`Marks::renew_id`].
    pub fn write_id(&self, image: BorrowedFd<'_>, id: &str) -> Result<Option<String>> {
        match attributes::set(image, ID, id.as_bytes()) {
            Ok(()) => Ok(Some(id.to_owned())),
            Err(error) if cannot_be_kept_here(&error) => Ok(None),
            Err(error) => Err(Error::io("cannot write the attribute user.livemirror.id of", &error).on(name_of(image))),
        }
    }

    /// The image's random id, if it has one. One that is not 32 hex digits is none.
    ///
    /// # Errors
    /// Reading fails, but for want of xattrs or of permission.
    pub fn id(&self, image: BorrowedFd<'_>) -> Result<Option<String>> {
        let id = read_xattr(image, ID)?.and_then(|bytes| String::from_utf8(bytes).ok());
        Ok(id.filter(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())))
    }

    /// The image's mark, the one of the highest generation if there are several. `None`: it is not superseded.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there is a mark that cannot be read; it is not taken for none.
    pub fn read_mark(&self, image: BorrowedFd<'_>, identity: &Identity) -> Result<Option<Mark>> {
        let own = match read_xattr(image, SUPERSEDED)? {
            Some(bytes) => Some(serde_json::from_slice(&bytes).map_err(|error| damaged(image, &error))?),
            None => None,
        };
        let registered = self.read_registered(image, identity)?;
        Ok([own, registered].into_iter().flatten().max_by_key(|mark: &Mark| mark.generation))
    }

    /// Marks the image as superseded. A mark of a higher generation stays. In force at once; on an image with xattrs durable only
    /// after [`Marks::make_durable`], because that writes out all of the image's cache and a cutover must not wait for it.
    ///
    /// # Errors
    /// The mark can be written neither on the image nor in the registry.
    pub fn supersede(&self, image: BorrowedFd<'_>, identity: &Identity, mark: &Mark) -> Result<()> {
        // A damaged one is replaced: what is known now is worth more.
        if let Ok(Some(present)) = self.read_mark(image, identity) {
            if present.generation > mark.generation {
                return Ok(());
            }
        }
        let text = serde_json::to_vec(mark).map_err(|error| Error::new(ErrorKind::Failed, error.to_string()))?;
        match attributes::set(image, SUPERSEDED, &text) {
            Ok(()) => return Ok(()),
            Err(error) if cannot_be_kept_here(&error) => {}
            Err(error) => return Err(Error::io("cannot mark as superseded", &error).on(name_of(image))),
        }
        let directory = Directory::create(&self.registry)?;
        Ok(directory.stage(&file_name(image, identity), &KIND.encode(mark)?)?.commit()?)
    }

    /// Takes the mark away: the image is active, or a target, from now on. Nothing to do if there is none. Durable as
    /// [`Marks::supersede`] is.
    ///
    /// # Errors
    /// There is one and it cannot be removed.
    pub fn clear(&self, image: BorrowedFd<'_>, identity: &Identity) -> Result<()> {
        if read_xattr(image, SUPERSEDED)?.is_some() {
            let removed = attributes::remove(image, SUPERSEDED);
            removed.map_err(|error| Error::io("cannot unmark", &error).on(name_of(image)))?;
        }
        match self.open_registry()? {
            Some(directory) => directory.remove(&file_name(image, identity)),
            None => Ok(()),
        }
    }

    /// What the image says of the pair that it belongs to. `None`: nothing, or nothing that can be read, or it has no xattrs.
    ///
    /// # Errors
    /// Reading fails.
    pub fn read_pair(&self, image: BorrowedFd<'_>) -> Result<Option<PairMark>> {
        Ok(read_xattr(image, PAIR)?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Ties the image to a pair. False where there are no xattrs: then nothing speaks for the image at the next start.
    ///
    /// # Errors
    /// Writing fails.
    pub fn write_pair(&self, image: BorrowedFd<'_>, mark: &PairMark) -> Result<bool> {
        let text = serde_json::to_vec(mark).map_err(|error| Error::new(ErrorKind::Failed, error.to_string()))?;
        match attributes::set(image, PAIR, &text) {
            Ok(()) => Ok(true),
            Err(error) if cannot_be_kept_here(&error) => Ok(false),
            Err(error) => {
                Err(Error::io("cannot write the attribute user.livemirror.pair of", &error).on(name_of(image)))
            }
        }
    }

    /// Unties the image. Nothing to do if it is tied to nothing.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn clear_pair(&self, image: BorrowedFd<'_>) -> Result<()> {
        if read_xattr(image, PAIR)?.is_none() {
            return Ok(());
        }
        let removed = attributes::remove(image, PAIR);
        removed.map_err(|error| {
            Error::io("cannot remove the attribute user.livemirror.pair of", &error).on(name_of(image))
        })
    }

    /// Makes durable what [`Marks::ensure_id`], [`Marks::supersede`] and [`Marks::clear`] changed on the image. Writes out
    /// everything that is cached of it: may take long.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn make_durable(&self, image: BorrowedFd<'_>) -> Result<()> {
        attributes::sync(image)
            .map_err(|error| Error::io("cannot make durable the marks on", &error).on(name_of(image)))
    }

    fn read_registered(&self, image: BorrowedFd<'_>, identity: &Identity) -> Result<Option<Mark>> {
        let Some(directory) = self.open_registry()? else { return Ok(None) };
        let name = file_name(image, identity);
        let bytes = directory.read(&name)?;
        bytes.map(|bytes| KIND.decode(&bytes, &directory.path_of(&name))).transpose()
    }

    fn open_registry(&self) -> Result<Option<Arc<Directory>>> {
        Directory::open(&self.registry, nix::unistd::geteuid().as_raw())
    }
}

/// The file of an image in the registry: what is known of it, in words, so that no two images share one. The size of a
/// block device and its name; the file system, inode, birth time and size of a file.
fn file_name(image: BorrowedFd<'_>, identity: &Identity) -> String {
    let size = identity.size_bytes;
    if identity.inode == 0 {
        // Long names are cut at their beginning; the size goes first so that it is never lost.
        if let Some(id) = identity.id.as_deref().filter(|id| id.starts_with("loop-")) {
            return format!("device-{size}-{id}");
        }
        let device = name_of(image).replace('%', "%25").replace('/', "%2F");
        let tail_start = (device.len().saturating_sub(180)..).find(|&at| device.is_char_boundary(at)).unwrap_or(0);
        return format!("device-{size}-{}", &device[tail_start..]);
    }
    let birth = identity.birth_ns.map_or_else(|| "unknown".to_owned(), |birth| birth.to_string());
    format!("file-{:x}-{}-{birth}-{size}", file_system(image, identity), identity.inode)
}

/// What tells one file system from another also after a restart of the host: its id, where it has one.
fn file_system(image: BorrowedFd<'_>, identity: &Identity) -> u64 {
    let told = nix::sys::statvfs::fstatvfs(image).map_or(0, |status| status.filesystem_id());
    if told != 0 { told } else { identity.device }
}

/// The path of the open file, as the kernel tells it; for messages and for block devices.
fn name_of(image: BorrowedFd<'_>) -> String {
    match std::fs::read_link(attributes::path(image)) {
        Ok(path) => String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned(),
        Err(_) => "the image".to_owned(),
    }
}

fn read_xattr(image: BorrowedFd<'_>, name: &str) -> Result<Option<Vec<u8>>> {
    match attributes::get(image, name) {
        Ok(value) => Ok(value),
        Err(error) if cannot_be_kept_here(&error) => Ok(None),
        Err(error) => Err(Error::io(format!("cannot read the attribute {name} of"), &error).on(name_of(image))),
    }
}

/// Errors that mean: no user xattrs on this (a block device: EPERM), not for us, or no room for one.
fn cannot_be_kept_here(error: &io::Error) -> bool {
    let refusals = [libc::EOPNOTSUPP, libc::EPERM, libc::EACCES, libc::EROFS, libc::ENOSPC, libc::EDQUOT, libc::E2BIG];
    error.raw_os_error().is_some_and(|errno| refusals.contains(&errno))
}

fn damaged(image: BorrowedFd<'_>, error: &serde_json::Error) -> Error {
    let path = name_of(image);
    Error::new(ErrorKind::Corrupt, format!("damaged mark ({error}) in the attribute {SUPERSEDED} of"))
        .advise(format!("if this image is the right one, remove the mark: setfattr -x {SUPERSEDED} '{path}'"))
        .on(path)
}
