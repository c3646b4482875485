//! Paths that lie in a mount of ours must not be touched by the server of that mount: it would wait for itself for ever.
//!
//! So a path is resolved here by hand, one component after the other, and each is held against the list of mounts *before* it
//! is looked at.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// The type of our mounts in /proc/self/mountinfo.
const FSTYPE: &str = "fuse.livemirror";
/// As many symbolic links as the kernel follows in one path.
const LINKS_MAX: usize = 40;

/// The mountpoint of ours that `path` lies in or is, if any; symbolic links are followed.
pub fn find(path: &Path) -> Option<PathBuf> {
    let mountinfo = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    resolve(&std::path::absolute(path).ok()?, &mountpoints(&mountinfo))
}

/// Refuses a `path` in a mount of ours.
///
/// # Errors
/// Wrong usage, naming the path.
pub fn refuse_inside(path: &Path) -> Result<()> {
    match find(path) {
        None => Ok(()),
        Some(mountpoint) => {
            let what = format!("this lies in a livemirror mount ({}):", mountpoint.display());
            Err(Error::usage(what).on(path.display().to_string()).advise("name a place outside of it"))
        }
    }
}

/// Our mountpoints in `mountinfo`.
fn mountpoints(mountinfo: &[u8]) -> BTreeSet<PathBuf> {
    ours(mountinfo).map(|(_, place)| unescape(place)).collect()
}

/// The device numbers of our mounts: a file of one of them is known by it, even as what lies beneath a loop device.
pub(super) fn devices() -> BTreeSet<u64> {
    let mountinfo = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    ours(&mountinfo).filter_map(|(number, _)| device_number(number)).collect()
}

/// Device number and place of our mounts (proc(5): fields by spaces, the third is the device, the fifth the mountpoint; after a
/// lone dash the type).
fn ours(mountinfo: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let (number, place) = (fields.nth(2)?, fields.nth(1)?);
        fields.find(|field| field == b"-")?;
        (fields.next()? == FSTYPE.as_bytes()).then_some((number, place))
    })
}

/// `major:minor`, as one number.
fn device_number(text: &[u8]) -> Option<u64> {
    let (major, minor) = std::str::from_utf8(text).ok()?.split_once(':')?;
    Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Walks down an absolute path until a mountpoint, something that is not there, or the end.
fn resolve(path: &Path, mountpoints: &BTreeSet<PathBuf>) -> Option<PathBuf> {
    let mut links = 0;
    let mut at = PathBuf::from("/");
    let mut ahead: Vec<OsString> = names(path);
    while let Some(name) = ahead.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        at.push(name);
        if mountpoints.contains(&at) {
            return Some(at);
        }
        if let Ok(target) = std::fs::read_link(&at) {
            links += 1;
            if links > LINKS_MAX {
                return None;
            }
            at.pop();
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            ahead.extend(names(&target));
        }
    }
    None
}

/// The components of a path, the last one first.
fn names(path: &Path) -> Vec<OsString> {
    let named = path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    let mut names: Vec<OsString> = named.map(|part| part.as_os_str().to_owned()).collect();
    names.reverse();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_our_mounts_are_listed() {
        let text = b"36 35 98:0 / /mnt\\040a rw,noatime shared:1 - fuse.livemirror /disk.img rw\n\
            37 35 0:44 / /mnt/b rw - fuse.sshfs host: rw\n38 35 0:45 / /mnt/c rw master:3 - fuse.livemirror x rw\n";
        let expected = BTreeSet::from([PathBuf::from("/mnt/c"), PathBuf::from("/mnt a")]);
        assert_eq!(mountpoints(text), expected);
    }

    #[test]
    fn links_are_followed_into_a_mount_and_no_further() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().canonicalize().unwrap();
        std::fs::create_dir(base.join("mount")).unwrap();
        std::fs::create_dir(base.join("elsewhere")).unwrap();
        symlink("../mount/inner", base.join("elsewhere/link")).unwrap();
        symlink(base.join("elsewhere"), base.join("around")).unwrap();
        symlink("loop", base.join("loop")).unwrap();
        let mounts = BTreeSet::from([base.join("mount")]);
        let find = |name: &str| resolve(&base.join(name), &mounts);
        for inside in ["mount", "mount/disk.img", "mount/a/../b", "around/link/x", "elsewhere/../mount/x"] {
            assert_eq!(find(inside), Some(base.join("mount")), "{inside}");
        }
        for outside in ["", "mountx/y", "elsewhere/new.img", "around/new.img", "loop/x", "missing/y"] {
            assert_eq!(find(outside), None, "{outside}");
        }
    }
}
