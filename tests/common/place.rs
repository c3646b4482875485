//! Directories for a test's images, removed with everything in them.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::leftovers;

/// A directory of the test's own, on a disk or in memory.
pub struct Place {
    dir: TempDir,
}

impl Place {
    /// On the file system of TMPDIR.
    pub fn on_disk() -> Self {
        Place::under(&std::env::temp_dir())
    }

    /// In memory.
    pub fn in_memory() -> Self {
        Place::under(Path::new("/dev/shm"))
    }

    fn under(base: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("livemirror-test-").tempdir_in(base).expect("a temporary directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        Place { dir }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new directory in it.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.at(name);
        fs::create_dir_all(&path).expect("mkdir");
        path
    }

    /// A new sparse file in it.
    pub fn sparse(&self, name: &str, size_bytes: u64) -> PathBuf {
        let path = self.at(name);
        let file = File::create_new(&path).expect("a new file");
        file.set_len(size_bytes).expect("set_len");
        path
    }

    /// A new file in it, full of `content`.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.at(name);
        fs::write(&path, content).expect("write");
        path
    }

    /// A new file in it of random bytes.
    pub fn random(&self, name: &str, size_bytes: u64, seed: u64) -> PathBuf {
        let path = self.at(name);
        let file = File::create_new(&path).expect("a new file");
        let mut random = super::random::Random::new(seed, 77);
        let mut at = 0;
        while at < size_bytes {
            let piece = random.bytes((size_bytes - at).min(1 << 20) as usize);
            file.write_all_at(&piece, at).expect("write");
            at += piece.len() as u64;
        }
        path
    }

    /// Every path in it with what can be said about it without following it: for "nothing was left behind, nothing changed".
    pub fn inventory(&self) -> Vec<String> {
        let mut lines = Vec::new();
        list(self.path(), self.path(), &mut lines);
        lines.sort();
        lines
    }
}

fn list(base: &Path, dir: &Path, lines: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
        let path = entry.expect("an entry").path();
        let data = fs::symlink_metadata(&path).expect("lstat");
        let name = path.strip_prefix(base).expect("inside").display().to_string();
        let size = if data.is_file() { data.len() } else { 0 };
        lines.push(format!("{name} mode {:o} inode {} size {size}", data.mode(), data.ino()));
        if data.is_dir() {
            list(base, &path, lines);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        leftovers::sweep(self.path());
    }
}
