//! Where the state and the sockets lie.
//!
//! | | root | others |
//! |---|---|---|
//! | state | `/var/lib/livemirror` | `$XDG_STATE_HOME/livemirror`, else `~/.local/state/livemirror` |
//! | runtime | `/run/livemirror` | `$XDG_RUNTIME_DIR/livemirror`, else `/tmp/livemirror-UID`, of mode 0700 and checked |
//!
//! Variables that do not hold an absolute path are passed over, as the XDG specification demands.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

use super::files::{Directory, is_directory_of};

const NAME: &str = "livemirror";

/// Who we are and what the environment says. Tests make their own.
#[derive(Clone, Debug)]
pub(super) struct Environment {
    pub(super) uid: u32,
    pub(super) state_home: Option<PathBuf>,
    pub(super) home: Option<PathBuf>,
    pub(super) runtime_dir: Option<PathBuf>,
    pub(super) temporary: PathBuf,
}

impl Environment {
    fn current() -> Self {
        let path = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        Environment {
            uid: nix::unistd::geteuid().as_raw(),
            state_home: path("XDG_STATE_HOME"),
            home: path("HOME"),
            runtime_dir: path("XDG_RUNTIME_DIR"),
            temporary: PathBuf::from("/tmp"),
        }
    }

    pub(super) fn state_base(&self) -> Result<PathBuf> {
        if self.uid == 0 {
            return Ok(Path::new("/var/lib").join(NAME));
        }
        if let Some(state_home) = &self.state_home {
            return Ok(state_home.join(NAME));
        }
        if let Some(home) = &self.home {
            return Ok(home.join(".local/state").join(NAME));
        }
        let error = Error::new(ErrorKind::Failed, "no place for the state: neither XDG_STATE_HOME nor HOME is set");
        Err(error.advise("set HOME, or give --state-dir"))
    }

    pub(super) fn runtime_dir(&self) -> Result<PathBuf> {
        let path = if self.uid == 0 {
            Path::new("/run").join(NAME)
        } else {
            // Set by the login; left over by su and sudo it is somebody else's.
            match self.runtime_dir.as_ref().filter(|path| is_directory_of(path, self.uid)) {
                Some(runtime_dir) => runtime_dir.join(NAME),
                None => self.temporary.join(format!("{NAME}-{}", self.uid)),
            }
        };
        Directory::create(&path)?;
        check_private(&path)?;
        Ok(path)
    }

    /// The runtime directories that there are: our own, and those in which the user `owner` may have one.
    pub(super) fn runtime_dirs(&self, owner: Option<u32>) -> Vec<(PathBuf, u32)> {
        let mut found = Vec::new();
        let own = self.runtime_dir.iter().map(|path| path.join(NAME));
        let own = own.filter(|_| self.uid != 0);
        for path in own.chain([self.temporary.join(format!("{NAME}-{}", self.uid))]) {
            found.push((path, self.uid));
        }
        for uid in [Some(self.uid), owner].into_iter().flatten() {
            if uid == 0 {
                found.push((Path::new("/run").join(NAME), uid));
            } else {
                found.push((Path::new("/run/user").join(uid.to_string()).join(NAME), uid));
                found.push((self.temporary.join(format!("{NAME}-{uid}")), uid));
            }
        }
        found.sort();
        found.dedup();
        found.retain(|(path, uid)| is_directory_of(path, *uid));
        found
    }
}

/// The directory below which each mount has its state, and images their fallback marks. Not made here.
///
/// # Errors
/// The environment does not tell where.
pub fn state_base() -> Result<PathBuf> {
    Environment::current().state_base()
}

/// The state directory of the mount with this id (see [`crate::server::config::MountConfig::mount_id`]). Not made here.
///
/// # Errors
/// As [`state_base`].
pub fn state_dir(mount_id: &str) -> Result<PathBuf> {
    Ok(state_base()?.join(mount_id))
}

/// The directory of the sockets and runtime records; made if it is missing.
///
/// # Errors
/// It cannot be made, or somebody else can get at it.
pub fn runtime_dir() -> Result<PathBuf> {
    Environment::current().runtime_dir()
}

/// The control socket of the mount with this id, in [`runtime_dir`].
///
/// # Errors
/// As [`runtime_dir`].
pub fn control_socket(mount_id: &str) -> Result<PathBuf> {
    Ok(runtime_dir()?.join(format!("{mount_id}.sock")))
}

/// The runtime directories that exist: one's own, and those of the user `owner`.
pub(super) fn runtime_dirs(owner: Option<u32>) -> Vec<(PathBuf, u32)> {
    Environment::current().runtime_dirs(owner)
}

/// The users who may have a mount: for root everybody who has a runtime directory, for others themselves.
pub(super) fn users() -> Vec<u32> {
    let uid = nix::unistd::geteuid().as_raw();
    if uid != 0 {
        return vec![uid];
    }
    let number = |name: std::ffi::OsString, prefix: &str| name.to_str()?.strip_prefix(prefix)?.parse().ok();
    let names = |path: &str| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let logins = names("/run/user").filter_map(|name| number(name, ""));
    let mut users: Vec<u32> = logins.chain(names("/tmp").filter_map(|name| number(name, "livemirror-"))).collect();
    users.push(0);
    users.sort_unstable();
    users.dedup();
    users
}

fn check_private(path: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let named = |error: Error| error.on(path.display().to_string());
    let status = std::fs::symlink_metadata(path).map_err(|error| named(Error::io("cannot look at", &error)))?;
    if status.mode() & 0o077 == 0 {
        return Ok(());
    }
    let error = named(Error::new(ErrorKind::Failed, "other users can get at the directory"));
    Err(error.advise(format!("chmod 700 {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn environment(root: &Path) -> Environment {
        Environment {
            // Not root, whoever runs the test: nothing here asks the system for it.
            uid: nix::unistd::geteuid().as_raw(),
            state_home: None,
            home: Some(root.to_owned()),
            runtime_dir: None,
            temporary: root.to_owned(),
        }
    }

    #[test]
    fn the_state_lies_where_the_environment_says() {
        let user = Environment { uid: 1000, ..environment(Path::new("/home/user")) };
        assert_eq!(user.state_base().unwrap(), Path::new("/home/user/.local/state/livemirror"));
        let other = Environment { state_home: Some("/data".into()), ..user.clone() };
        assert_eq!(other.state_base().unwrap(), Path::new("/data/livemirror"));
        assert_eq!(Environment { uid: 0, ..other }.state_base().unwrap(), Path::new("/var/lib/livemirror"));
        assert!(Environment { home: None, ..user }.state_base().unwrap_err().advice().is_some());
    }

    #[test]
    fn a_directory_that_others_can_get_at_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("open");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(check_private(&path).unwrap_err().advice(), Some(&*format!("chmod 700 {}", path.display())));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Directory::create(&path).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(Directory::create(&path).is_ok() && check_private(&path).is_ok());
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Directory::create(&link).is_err(), "a symlink is not a directory of ours");
        assert!(Directory::open(&path, nix::unistd::geteuid().as_raw() + 1).is_err());
    }

    #[test]
    fn runtime_directories_are_found_by_owner() {
        let root = tempfile::tempdir().unwrap();
        let environment = environment(root.path());
        let own = root.path().join(format!("livemirror-{}", environment.uid));
        assert!(!environment.runtime_dirs(None).iter().any(|(path, _)| *path == own));
        Directory::create(&own).unwrap();
        assert!(environment.runtime_dirs(None).contains(&(own, environment.uid)));
    }
}
