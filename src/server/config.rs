//! What `livemirror mount` was told: made by the command line, handed to the keeper and to every server it starts.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::image::nbd::RECONNECT_DEFAULT;
use crate::image::{CacheMode, Format};

/// One disk of a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeConfig {
    /// File name in a directory mount, and the stem of the QMP device name. Unique in the mount.
    pub name: String,
    /// Absolute path of the source, as the user named it (symlinks not resolved), or an NBD URI.
    pub source: PathBuf,
    /// `None`: told by name and content.
    pub format: Option<Format>,
}

/// What the mountpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// A directory: each disk is a file in it.
    Directory,
    /// A regular file: that path becomes the only disk. It may be the source itself.
    File,
}

/// Everything that a mount needs to know. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountConfig {
    /// Where the disks appear.
    pub mountpoint: PathBuf,
    /// What is there now.
    pub layout: Layout,
    /// The disks, at least one.
    pub volumes: Vec<VolumeConfig>,
    /// No guest may write.
    pub read_only: bool,
    /// Guests may change the size (write past the end, truncate).
    pub growable: bool,
    /// Other users may use the disks (file modes are checked by the kernel).
    pub allow_other: bool,
    /// Use of the host's page cache.
    pub cache: CacheMode,
    /// How long a request to an NBD server waits while the connection is lost.
    #[serde(default = "reconnect_default")]
    pub reconnect: Duration,
    /// Mount the successor of a superseded source (rule 10).
    pub follow: bool,
    /// Mount a superseded source all the same (rule 10).
    pub force: bool,
    /// The control socket.
    pub control: PathBuf,
    /// This mount's directory in the state.
    pub state_dir: PathBuf,
    /// Where the server logs to; `None`: standard error (foreground), the journal, or a file in the state.
    pub log_file: Option<PathBuf>,
    /// File to write the server's pid to.
    pub pidfile: Option<PathBuf>,
    /// Stay attached to the terminal.
    pub foreground: bool,
    /// Further kernel mount options, already checked to be known to the kernel (`nosuid`, `nodev`, `noatime`, ...).
    pub kernel_options: Vec<String>,
}

/// Of a keeper that was made before there was the option.
fn reconnect_default() -> Duration {
    RECONNECT_DEFAULT
}

impl MountConfig {
    /// The id of a mount at `mountpoint` (absolute): 16 hex digits, the same at every mount there. Names the state
    /// directory, the socket and the runtime record.
    pub fn mount_id(mountpoint: &std::path::Path) -> String {
        use std::os::unix::ffi::OsStrExt;
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(mountpoint.as_os_str().as_bytes()))
    }
}
