//! What is mounted where, from `/proc/self/mountinfo` alone: looking at a mount of ours through its path could wait for a
//! server that waits for us.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::FSTYPE;

/// Symlinks that one path may pass through (path_resolution(7)).
const SYMLINKS_MAX: usize = 40;

/// One mount of this mount namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountEntry {
    /// Unique among the mounts of now; may be used again later.
    pub mount_id: u64,
    /// The mount on which this one is mounted.
    pub parent_id: u64,
    /// Device number; the minor one of a FUSE mount names its connection.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
    /// Absolute, no symlinks.
    pub mountpoint: PathBuf,
    /// File system type.
    pub fstype: OsString,
    /// The file system's name: for a mount of ours the source's path.
    pub fsname: OsString,
    /// Whoever mounted it, if it is a FUSE mount.
    pub user_id: Option<u32>,
}

impl MountEntry {
    /// True for a mount that this program made.
    pub fn is_ours(&self) -> bool {
        self.fstype == FSTYPE
    }
}

/// All mounts, in the order in which they were made where they lie over each other.
#[derive(Clone, Debug)]
pub struct MountTable {
    entries: Vec<MountEntry>,
}

/// Where a path leads, seen without touching any mount of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// To or below a mount of ours: the mount, and the rest of the path below it (empty: its root).
    Ours(MountEntry, PathBuf),
    /// Elsewhere: the absolute path with its symlinks resolved, as far as it exists.
    Elsewhere(PathBuf),
}

impl MountTable {
    /// Reads the table.
    ///
    /// # Errors
    /// There is no /proc.
    pub fn read() -> Result<Self> {
        let path = "/proc/self/mountinfo";
        let text = std::fs::read(path).map_err(|error| Error::io("cannot read", &error).on(path))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &[u8]) -> Self {
        MountTable { entries: text.split(|byte| *byte == b'\n').filter_map(parse_line).collect() }
    }

    /// Every mount.
    pub fn entries(&self) -> &[MountEntry] {
        &self.entries
    }

    /// The mounts of this program.
    pub fn ours(&self) -> impl Iterator<Item = &MountEntry> {
        self.entries.iter().filter(|entry| entry.is_ours())
    }

    /// The mount that is seen at exactly this path (the topmost), without symlinks.
    pub fn at(&self, mountpoint: &Path) -> Option<&MountEntry> {
        self.entries.iter().rev().find(|entry| entry.mountpoint == mountpoint)
    }

    /// Where `path` leads. Walks it component by component and stops before it would look at a mount of ours.
    ///
    /// # Errors
    /// The current directory is unknown (for a relative path), or there are too many symlinks.
    pub fn locate(&self, path: &Path) -> Result<Place> {
        let absolute = std::path::absolute(path).map_err(|error| Error::io("cannot find", &error).on(text(path)))?;
        let mut rest: Vec<OsString> = components(&absolute);
        let mut reached = PathBuf::from("/");
        let mut symlinks = 0;
        while let Some(name) = rest.pop() {
            if name == ".." {
                reached.pop();
                continue;
            }
            reached.push(&name);
            if let Some(entry) = self.at(&reached).filter(|entry| entry.is_ours()) {
                return Ok(Place::Ours(entry.clone(), rest.iter().rev().collect()));
            }
            // Any error means: no symlink, or not there. Whoever opens the path finds out which.
            if let Ok(target) = std::fs::read_link(&reached) {
                symlinks += 1;
                if symlinks > SYMLINKS_MAX {
                    return Err(Error::new(ErrorKind::Failed, "too many symbolic links in").on(text(path)));
                }
                reached.pop();
                if target.is_absolute() {
                    reached = PathBuf::from("/");
                }
                rest.extend(components(&target));
            }
        }
        Ok(Place::Elsewhere(reached))
    }
}

/// The names of a path, last one first. `.` is dropped, `..` stays.
fn components(path: &Path) -> Vec<OsString> {
    let mut names: Vec<OsString> = path
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect();
    names.reverse();
    names
}

/// A path as messages show it.
pub(super) fn text(path: &Path) -> String {
    path.display().to_string()
}

/// One line (proc(5)): `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u64>().ok();
    let mount_id = number(fields.next()?)?;
    let parent_id = number(fields.next()?)?;
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let mountpoint = PathBuf::from(unescape(fields.nth(1)?));
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let fstype = unescape(fields.next()?);
    let fsname = unescape(fields.next()?);
    let options = fields.next().unwrap_or_default();
    let user_id = options.split(|byte| *byte == b',').find_map(|option| number(option.strip_prefix(b"user_id=")?));
    Some(MountEntry {
        mount_id,
        parent_id,
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        mountpoint,
        fstype,
        fsname,
        user_id: user_id.and_then(|id| u32::try_from(id).ok()),
    })
}

/// Undoes the kernel's escapes: blanks, newlines, backslashes and `#` come as three octal digits.
pub(super) fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let code = (field[at] == b'\\').then(|| field.get(at + 1..at + 4)).flatten();
        let code = code.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(field[at]));
        at += if code.is_some() { 4 } else { 1 };
    }
    OsString::from_vec(bytes)
}

/// True if `path` is `directory` or lies below it, by its text alone.
pub(super) fn lies_in(path: &OsStr, directory: &Path) -> bool {
    let path = path.as_bytes().strip_suffix(b" (deleted)").unwrap_or(path.as_bytes());
    Path::new(OsStr::from_bytes(path)).starts_with(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        40 22 0:39 / /mnt/a\\040b rw,nosuid,nodev - fuse.livemirror /disks/x\\134y.img rw,user_id=1000,group_id=1000\n\
        41 22 0:40 / /mnt/vm rw - tmpfs none rw\n\
        43 41 0:41 / /mnt/vm rw shared:7 master:3 - fuse.livemirror /disks/b.img rw,user_id=0,allow_other\n";

    #[test]
    fn lines_are_taken_apart() {
        let table = MountTable::parse(TABLE);
        let first = table.ours().next().unwrap();
        assert_eq!((first.mount_id, first.minor, first.user_id), (40, 39, Some(1000)));
        assert_eq!(first.mountpoint, Path::new("/mnt/a b"));
        assert_eq!(first.fsname, "/disks/x\\y.img");
        assert_eq!(table.at(Path::new("/mnt/vm")).unwrap().mount_id, 43, "the topmost");
        assert_eq!(table.entries().len(), 4);
    }

    #[test]
    fn a_path_stops_at_our_mount() {
        let table = MountTable::parse(TABLE);
        let Place::Ours(entry, rest) = table.locate(Path::new("/mnt/./vm/os.img")).unwrap() else { panic!() };
        assert_eq!((entry.mount_id, rest), (43, PathBuf::from("os.img")));
        let Place::Ours(_, rest) = table.locate(Path::new("/mnt/vm")).unwrap() else { panic!() };
        assert_eq!(rest, PathBuf::new());
    }

    #[test]
    fn symlinks_are_followed_without_touching_the_mount() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/mnt/../mnt/vm", &link).unwrap();
        let table = MountTable::parse(TABLE);
        let Place::Ours(entry, rest) = table.locate(&link.join("os.img")).unwrap() else { panic!() };
        assert_eq!((entry.mount_id, rest), (43, PathBuf::from("os.img")));
        let round = directory.path().join("round");
        std::os::unix::fs::symlink("round", &round).unwrap();
        assert!(table.locate(&round).is_err());
        let plain = std::fs::canonicalize(directory.path()).unwrap().join("none");
        assert_eq!(table.locate(&directory.path().join("none")).unwrap(), Place::Elsewhere(plain));
    }

    #[test]
    fn deleted_files_still_lie_in_their_directory() {
        assert!(lies_in(OsStr::new("/mnt/vm/os.img (deleted)"), Path::new("/mnt/vm")));
        assert!(lies_in(OsStr::new("/mnt/vm"), Path::new("/mnt/vm")));
        assert!(!lies_in(OsStr::new("/mnt/vm2/os.img"), Path::new("/mnt/vm")));
    }
}
