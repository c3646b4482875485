//! Mounting and unmounting: mount(2) and umount2(2) for root, `fusermount3` for everybody else.
//!
//! A mount is named by a descriptor of its mountpoint's parent directory and a name in it ([`Point`]): unmounting needs no
//! walk along a path that may lead through the mount itself. It is detached lazily only if it is stale, or aborted: a mount
//! in use that seems gone is a disk that two may write to.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::fcntl::{OFlag, open, openat};
use nix::mount::MsFlags;
use nix::sys::stat::Mode;

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mountinfo::{MountEntry, MountTable, Place};
use crate::fuse::{FSTYPE, SUBTYPE, VERB_UNMOUNT, fusermount};
use crate::server::config::{Layout, MountConfig};

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Only if nobody uses it.
    Plain,
    /// End the connection first; whoever uses it gets errors.
    Abort,
    /// Take it out of the tree although something may still be open: for stale mounts, whose connection has ended.
    Stale,
}

impl How {
    /// What the unmount verb calls it.
    fn word(self) -> &'static str {
        match self {
            How::Plain => "plain",
            How::Abort => "force",
            How::Stale => "detach",
        }
    }
}

/// A mounted place.
#[derive(Debug)]
pub struct Point {
    parent: OwnedFd,
    name: OsString,
    /// What mountinfo said about it.
    pub entry: MountEntry,
}

/// A fresh mount.
#[derive(Debug)]
pub struct Mounted {
    /// The kernel's FUSE_INIT is pending on it.
    pub connection: OwnedFd,
    /// Where.
    pub point: Point,
}

/// The error for a mount that cannot be unmounted now.
pub(super) fn busy(mountpoint: &Path) -> Error {
    Error::not_now("the mount is in use:").on(mountpoint.display().to_string())
}

/// Mounts. The images must have been opened before: the mountpoint may be one of them.
///
/// # Errors
/// What the kernel or `fusermount3` says; nothing is mounted then.
pub fn mount(config: &MountConfig) -> Result<Mounted> {
    let shown = config.mountpoint.display().to_string();
    let failed = |error: std::io::Error| Error::io("cannot mount at", &error).on(shown.clone());
    let path = match MountTable::read()?.locate(&config.mountpoint)? {
        Place::Elsewhere(path) => path,
        Place::Ours(..) => return Err(Error::new(ErrorKind::Exists, "something is already mounted at").on(shown)),
    };
    let (parent, name) = open_parent(&path).map_err(failed)?;
    let connection = if nix::unistd::geteuid().is_root() {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let target = openat(&parent, name.as_os_str(), flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
        mount_as_root(config, &target)?
    } else {
        fusermount::mount(&path, &user_options(config))?
    };
    let table = MountTable::read()?;
    let entry = table.at(&path).filter(|entry| entry.is_ours()).cloned();
    let entry = entry.ok_or_else(|| Error::new(ErrorKind::Failed, "the mount vanished at once from").on(shown))?;
    Ok(Mounted { connection, point: Point { parent, name, entry } })
}

/// The directory that holds `path`, and the name in it.
fn open_parent(path: &Path) -> std::io::Result<(OwnedFd, OsString)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(std::io::Error::from_raw_os_error(libc::EBUSY));
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok((open(parent, flags, Mode::empty())?, name.to_owned()))
}

/// What the mount is called: its first source.
fn fsname(config: &MountConfig) -> &OsStr {
    config.volumes.first().map_or(OsStr::new("livemirror"), |volume| volume.source.as_os_str())
}

fn mount_as_root(config: &MountConfig, target: &OwnedFd) -> Result<OwnedFd> {
    let device = open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(|errno| {
        Error::io("cannot open /dev/fuse", &errno.into()).advise("the kernel's FUSE is needed: modprobe fuse")
    })?;
    let root_mode = match config.layout {
        Layout::Directory => libc::S_IFDIR,
        Layout::File => libc::S_IFREG,
    };
    let [uid, gid] = [nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()];
    let mut data =
        format!("fd={},rootmode={root_mode:o},user_id={uid},group_id={gid},default_permissions", device.as_raw_fd());
    if config.allow_other {
        data.push_str(",allow_other");
    }
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, config.read_only);
    for option in &config.kernel_options {
        if !apply_flag(&mut flags, option) {
            data.push(',');
            data.push_str(option);
        }
    }
    // The descriptor of the mountpoint itself: no symlink can come in between.
    let target = PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()));
    nix::mount::mount(Some(fsname(config)), &target, Some(FSTYPE), flags, Some(data.as_str())).map_err(|errno| {
        let error = Error::io("cannot mount at", &errno.into()).on(config.mountpoint.display().to_string());
        match errno {
            nix::errno::Errno::EPERM => error.advise("root needs CAP_SYS_ADMIN for it (a container may lack it)"),
            _ => error,
        }
    })?;
    Ok(device)
}

/// Options of mount(8) that are flags of mount(2). False: it is for the file system.
fn apply_flag(flags: &mut MsFlags, option: &str) -> bool {
    let (flag, on) = match option {
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::empty(), true),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        _ => return false,
    };
    flags.set(flag, on);
    true
}

fn user_options(config: &MountConfig) -> OsString {
    let mut options = fusermount::option("fsname", fsname(config));
    options.push(format!(",subtype={SUBTYPE},default_permissions"));
    if config.allow_other {
        options.push(",allow_other");
    }
    if config.read_only {
        options.push(",ro");
    }
    for option in &config.kernel_options {
        options.push(",");
        options.push(option);
    }
    options
}

impl Point {
    /// The mount of ours that is seen at `mountpoint`, if there is one.
    ///
    /// # Errors
    /// There is no /proc, or the parent directory cannot be opened.
    pub fn find(mountpoint: &Path) -> Result<Option<Point>> {
        match MountTable::read()?.locate(mountpoint)? {
            Place::Ours(entry, _) => Point::of(entry).map(Some),
            Place::Elsewhere(_) => Ok(None),
        }
    }

    /// The mount that `entry` describes.
    ///
    /// # Errors
    /// Its parent directory cannot be opened.
    pub fn of(entry: MountEntry) -> Result<Point> {
        let (parent, name) = open_parent(&entry.mountpoint).map_err(|error| {
            Error::io("cannot open the directory of", &error).on(entry.mountpoint.display().to_string())
        })?;
        Ok(Point { parent, name, entry })
    }

    /// The descriptor of the parent directory, and the name in it: with the entry all that there is to it.
    pub(super) fn parts(&self) -> (&OwnedFd, &OsStr) {
        (&self.parent, &self.name)
    }

    /// From its parts.
    pub(super) fn from_parts(parent: OwnedFd, name: OsString, entry: MountEntry) -> Point {
        Point { parent, name, entry }
    }

    /// True if the mount table still has it.
    pub fn is_mounted(&self) -> bool {
        MountTable::read().is_ok_and(|table| {
            table.ours().any(|entry| entry.mount_id == self.entry.mount_id && entry.minor == self.entry.minor)
        })
    }

    /// The command that unmounts it: a process of its own, because umount2(2) may have to wait for the server, which a keeper
    /// must never do. With [`How::Abort`] the connection is ended right here.
    ///
    /// # Errors
    /// Descriptors ran out.
    pub fn unmount_command(&self, how: How) -> Result<Command> {
        if how == How::Abort {
            self.abort();
        }
        let mut command = if nix::unistd::geteuid().is_root() {
            let parent = self.parent.try_clone().map_err(|error| Error::io("cannot unmount", &error))?;
            let mut command = Command::new("/proc/self/exe");
            command.arg(VERB_UNMOUNT).arg(how.word()).arg(&self.name).stdin(parent);
            command
        } else {
            fusermount::unmount_command(&self.entry.mountpoint, how != How::Plain)
        };
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Ok(command)
    }

    /// What came of [`Point::unmount_command`].
    ///
    /// # Errors
    /// [`ErrorKind::NotNow`] if it is in use.
    pub fn unmount_result(&self, output: &Output) -> Result<()> {
        match self.told(output) {
            // Somebody else was faster: the keeper, after an abort.
            Err(error) if error.kind() != ErrorKind::NotNow && !self.is_mounted() => Ok(()),
            result => result,
        }
    }

    fn told(&self, output: &Output) -> Result<()> {
        if !nix::unistd::geteuid().is_root() {
            return fusermount::unmount_result(&self.entry.mountpoint, output);
        }
        match output.status.code() {
            Some(0) => Ok(()),
            Some(libc::EBUSY) => Err(busy(&self.entry.mountpoint)),
            // The verb's exit code is the errno.
            Some(errno) => Err(Error::io("cannot unmount", &std::io::Error::from_raw_os_error(errno)).on(self
                .entry
                .mountpoint
                .display()
                .to_string())),
            None => Err(Error::new(ErrorKind::Failed, "the unmount was interrupted at").on(self
                .entry
                .mountpoint
                .display()
                .to_string())),
        }
    }

    /// Unmounts and waits for it. Not for keepers.
    ///
    /// # Errors
    /// [`ErrorKind::NotNow`] if it is in use.
    pub fn unmount(&self, how: How) -> Result<()> {
        let output = self.unmount_command(how)?.output().map_err(|error| fusermount::cannot_run(&error))?;
        self.unmount_result(&output)
    }

    /// Ends the connection: every request, waiting or to come, fails. True if the kernel's switch for it could be used;
    /// otherwise the unmount that follows (root), or the end of keeper and server, has the same effect.
    pub fn abort(&self) -> bool {
        let switch = format!("/sys/fs/fuse/connections/{}/abort", self.entry.minor);
        match std::fs::write(&switch, "1") {
            Ok(()) => {
                log::warn!("the connection of {} was ended with {switch}", self.entry.mountpoint.display());
                true
            }
            Err(error) => {
                let error = Error::io("cannot write", &error).on(switch);
                let path = self.entry.mountpoint.display();
                log::warn!("{error}: {path} is detached instead; who has it open gets errors once the server is gone");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_told_from_file_system_options() {
        let mut flags = MsFlags::MS_NODEV;
        assert!(apply_flag(&mut flags, "dev") && apply_flag(&mut flags, "noatime") && apply_flag(&mut flags, "rw"));
        assert_eq!(flags, MsFlags::MS_NOATIME);
        assert!(!apply_flag(&mut flags, "max_read=131072"));
    }
}
