//! The demo's temporary directory and the mount in it, and that both are gone afterwards, whatever happens.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::cli::place;
use crate::cli::unmount;
use crate::error::{Error, Result};
use crate::fuse::launch;
use crate::image::CacheMode;
use crate::image::nbd::RECONNECT_DEFAULT;
use crate::server::config::{Layout, MountConfig, VolumeConfig};

/// A directory of our own. Dropping it unmounts what is mounted in it and removes it.
pub struct Stage {
    directory: PathBuf,
}

impl Stage {
    /// Makes the directory below `base`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(base: &Path) -> Result<Stage> {
        let directory = base.join(format!("livemirror-demo-{}", std::process::id()));
        let failed = |error| Error::io("cannot make", &error).on(directory.display().to_string());
        DirBuilder::new().mode(0o700).create(&directory).map_err(failed)?;
        let stage = Stage { directory: directory.clone() };
        for name in ["old", "new", "mnt"] {
            DirBuilder::new().create(stage.path(name)).map_err(failed)?;
        }
        Ok(stage)
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Mounts `source`, as `livemirror mount` does, and returns the disk's path.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn mount(&self, source: &Path) -> Result<PathBuf> {
        let config = MountConfig {
            mountpoint: self.path("mnt"),
            layout: Layout::Directory,
            volumes: vec![VolumeConfig { name: "disk.img".to_owned(), source: source.to_owned(), format: None }],
            read_only: false,
            growable: false,
            allow_other: false,
            cache: CacheMode::Writeback,
            reconnect: RECONNECT_DEFAULT,
            follow: false,
            force: false,
            control: self.path("control.sock"),
            state_dir: self.path("state"),
            log_file: Some(self.path("log")),
            pidfile: None,
            foreground: false,
            kernel_options: Vec::new(),
        };
        launch::launch(&config)?;
        Ok(self.path("mnt").join("disk.img"))
    }

    /// Unmounts, as `livemirror unmount` does.
    ///
    /// # Errors
    /// The disk is in use, or it is not mounted.
    pub fn unmount(&self) -> Result<()> {
        unmount::unmount(&place::find(&self.path("mnt"))?, false)
    }

    fn end(&self) -> Result<()> {
        if let Ok(found) = place::find(&self.path("mnt")) {
            unmount::unmount(&found, true)?;
        }
        std::fs::remove_dir_all(&self.directory).map_err(|error| Error::io("cannot remove", &error))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("livemirror: left behind, as it could not be cleaned up ({error}): {}", self.directory.display());
        }
    }
}
