//! `-o`: the mount options of the command line and of /etc/fstab.

use std::path::PathBuf;
use std::time::Duration;

use super::units;
use crate::error::{Error, Result};
use crate::image::{CacheMode, Format};

/// What all `-o` together say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// `ro` and `rw`, the last one counts.
    pub read_only: Option<bool>,
    /// `allow_other`.
    pub allow_other: bool,
    /// `cache=`.
    pub cache: Option<CacheMode>,
    /// `format=`.
    pub format: Option<Format>,
    /// `name=`.
    pub name: Option<String>,
    /// `growable`.
    pub growable: bool,
    /// `follow`.
    pub follow: bool,
    /// `force`.
    pub force: bool,
    /// `foreground`.
    pub foreground: bool,
    /// `reconnect=`.
    pub reconnect: Option<Duration>,
    /// `state_dir=`.
    pub state_dir: Option<PathBuf>,
    /// `control=`.
    pub control: Option<PathBuf>,
    /// `log_file=`.
    pub log_file: Option<PathBuf>,
    /// `pidfile=`.
    pub pidfile: Option<PathBuf>,
    /// For the kernel.
    pub kernel: Vec<String>,
}

/// Options of the kernel, all of which fusermount3 knows as well.
const KERNEL: &[&str] = &[
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "nodiratime",
    "relatime",
    "strictatime",
    "sync",
    "async",
    "dirsync",
];

/// Options of fstab and of mount(8), which are meant for others.
const PASSED_OVER: &[&str] = &[
    "defaults",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "rw",
    "nomand",
    "mand",
    "lazytime",
    "nolazytime",
    "iversion",
    "noiversion",
    "norelatime",
    "nostrictatime",
    "silent",
    "loud",
    "diratime",
    "noiversion",
    "default_permissions",
];

impl MountOptions {
    /// Reads one `-o` argument: options between commas, later ones going before earlier ones.
    ///
    /// # Errors
    /// An option is unknown, or its value is not one of those that it takes.
    pub fn add(&mut self, list: &str) -> Result<()> {
        for option in list.split(',').filter(|option| !option.is_empty()) {
            self.add_one(option)?;
        }
        Ok(())
    }

    fn add_one(&mut self, option: &str) -> Result<()> {
        let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        match (name, value) {
            ("ro", None) => self.read_only = Some(true),
            ("rw", None) => self.read_only = Some(false),
            ("allow_other", None) => self.allow_other = true,
            ("growable", None) => self.growable = true,
            ("follow", None) => self.follow = true,
            ("force", None) => self.force = true,
            ("foreground", None) => self.foreground = true,
            ("cache", Some("none")) => self.cache = Some(CacheMode::None),
            ("cache", Some("writeback")) => self.cache = Some(CacheMode::Writeback),
            ("cache", _) => return Err(wrong_value(option, "cache=none or cache=writeback")),
            ("format", Some("raw")) => self.format = Some(Format::Raw),
            ("format", Some("qcow2")) => self.format = Some(Format::Qcow2),
            ("format", _) => return Err(wrong_value(option, "format=raw or format=qcow2")),
            ("name", Some(value)) if !value.is_empty() => self.name = Some(value.to_owned()),
            ("reconnect", Some(value)) => match units::parse_duration(value) {
                Ok(reconnect) => self.reconnect = Some(reconnect),
                Err(_) => return Err(wrong_value(option, "reconnect=DURATION, such as 30s")),
            },
            ("reconnect", None) => return Err(wrong_value(option, "reconnect=DURATION, such as 30s")),
            ("state_dir", Some(value)) => self.state_dir = Some(value.into()),
            ("control", Some(value)) => self.control = Some(value.into()),
            ("log_file", Some(value)) => self.log_file = Some(value.into()),
            ("pidfile", Some(value)) => self.pidfile = Some(value.into()),
            // mount(8) adds who did it to `user`; the other two name what the kernel shows anyway.
            ("user" | "fsname" | "subtype" | "comment", Some(_)) => {}
            (name, None) if KERNEL.contains(&name) => self.kernel.push(name.to_owned()),
            (name, None) if PASSED_OVER.contains(&name) => {}
            (name, _) if name.starts_with("x-") || name.starts_with("X-") => {}
            _ => {
                let error = Error::usage(format!("unknown mount option '{option}' (-o)"));
                return Err(error.advise("`livemirror mount --help` lists the options"));
            }
        }
        Ok(())
    }
}

fn wrong_value(option: &str, expected: &str) -> Error {
    Error::usage(format!("mount option '{option}' (-o) has a value that it cannot have"))
        .advise(format!("give {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<MountOptions> {
        let mut options = MountOptions::default();
        options.add(list).map(|()| options)
    }

    #[test]
    fn an_fstab_line_is_understood() {
        let options = parse(
            "rw,nosuid,nodev,noatime,allow_other,_netdev,nofail,x-systemd.requires=a.mount,user=joe,cache=none,ro",
        )
        .unwrap();
        assert_eq!(options.kernel, ["nosuid", "nodev", "noatime"]);
        assert!(options.allow_other);
        assert_eq!((options.read_only, options.cache), (Some(true), Some(CacheMode::None)));
    }

    #[test]
    fn unknown_options_are_named() {
        let error = parse("ro,bogus=1").unwrap_err();
        assert_eq!((error.to_string().as_str(), error.exit_code()), ("unknown mount option 'bogus=1' (-o)", 2));
        assert_eq!(parse("cache=wat").unwrap_err().exit_code(), 2);
        assert_eq!(parse("ro=1").unwrap_err().exit_code(), 2);
        assert_eq!(parse("reconnect=soon").unwrap_err().exit_code(), 2);
        assert_eq!(parse("reconnect=2s").unwrap().reconnect, Some(Duration::from_secs(2)));
    }
}
