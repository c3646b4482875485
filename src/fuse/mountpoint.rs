//! Whether something can be mounted at a place, and what it would look like. A stale mount of ours is cleaned on the way.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mount::{How, Point};
use crate::fuse::mountinfo::{MountEntry, MountTable, Place, text};
use crate::fuse::{helpers, holders, lingering};
use crate::server::config::Layout;

/// Checks that `mountpoint` can take a mount: an empty directory, or a regular file. A mount of ours that a crash left there
/// is detached; a living one, and anything of somebody else's, is not touched.
///
/// # Errors
/// Says what is in the way and what to do.
pub fn inspect(mountpoint: &Path) -> Result<Layout> {
    let shown = text(mountpoint);
    // A stale mount may lie over another one.
    for _ in 0..16 {
        let table = MountTable::read()?;
        match table.locate(mountpoint)? {
            Place::Ours(entry, rest) if rest.as_os_str().is_empty() => {
                if is_alive(&entry) {
                    if let Some(error) = killed_server(&entry) {
                        return Err(error);
                    }
                    return Err(Error::new(
                        ErrorKind::Exists,
                        format!("already mounted: {shown} is a livemirror mount of {}", entry.fsname.to_string_lossy()),
                    )
                    .advise(format!(
                        "see it with: livemirror status {shown}; end it with: livemirror unmount {shown}"
                    )));
                }
                clean(entry)?;
            }
            Place::Ours(entry, _) => {
                return Err(Error::usage(format!(
                    "the mountpoint {shown} lies within the livemirror mount {}",
                    entry.mountpoint.display()
                )));
            }
            Place::Elsewhere(path) => return inspect_plain(&table, &path, &shown),
        }
    }
    Err(Error::new(ErrorKind::Failed, "stale mounts cannot be removed from").on(shown))
}

fn inspect_plain(table: &MountTable, path: &Path, shown: &str) -> Result<Layout> {
    if let Some(entry) = table.at(path) {
        return Err(Error::new(
            ErrorKind::Exists,
            format!("already mounted: {shown} holds {}", entry.fstype.to_string_lossy()),
        )
        .advise("choose another mountpoint, or unmount that one first"));
    }
    let kind = std::fs::symlink_metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, "there is no mountpoint")
            .on(shown)
            .advise(format!("make it first: mkdir -p {shown}")),
        _ => Error::io("cannot use the mountpoint", &error).on(shown),
    })?;
    if kind.is_file() {
        return Ok(Layout::File);
    }
    if !kind.is_dir() {
        return Err(Error::usage("the mountpoint is neither a directory nor a regular file:").on(shown));
    }
    let mut entries =
        std::fs::read_dir(path).map_err(|error| Error::io("cannot read the mountpoint", &error).on(shown))?;
    if entries.next().is_some() {
        return Err(Error::new(ErrorKind::Exists, "the mountpoint is not empty:")
            .on(shown)
            .advise("a mount would hide what is in it: choose an empty directory"));
    }
    Ok(Layout::Directory)
}

/// True unless the mount's server and keeper are both gone. Waits for a server that hangs no longer than
/// [`helpers::probe`] does, and for none whose process can be seen.
pub fn is_alive(entry: &MountEntry) -> bool {
    let kept = holders::connection_is_kept(entry);
    if kept == Some(true) {
        return true;
    }
    // Nobody is seen to keep it; a keeper may still live where this process cannot see it. The kernel knows.
    match helpers::probe(&entry.mountpoint) {
        Some(libc::ENOTCONN) => false,
        // Another user's mount does not answer root, but root sees all processes.
        Some(libc::EACCES) => kept.is_none() || !nix::unistd::geteuid().is_root(),
        _ => true,
    }
}

/// The error for a mount of which nothing is left but a server that was killed and cannot end yet.
fn killed_server(entry: &MountEntry) -> Option<Error> {
    let server = holders::keeper_of_connection(entry)?;
    let left = lingering::look(server)?;
    let what = format!("the server (pid {server}) was killed, and {left}: the mount ends only then,");
    let advice = "what it was writing may land until then: mount again after it";
    Some(Error::new(ErrorKind::Exists, what).on(entry.mountpoint.display().to_string()).advise(advice))
}

/// Detaches a stale mount of ours.
///
/// # Errors
/// It is another user's.
pub fn clean(entry: MountEntry) -> Result<()> {
    log::warn!("removing the stale mount at {}", entry.mountpoint.display());
    Point::of(entry)?.unmount(How::Stale)
}
