//! Behaviour of images on real files and devices.

mod concurrency;
mod devices;
pub(super) mod model;
mod opening;
mod qcow2;
mod qcow2_chains;
mod qcow2_creation;
mod qcow2_damage;
mod qcow2_failures;
mod qcow2_fuzzed;
mod qcow2_overlaps;
mod qcow2_power_cut;
mod sparse;

pub(super) use self::devices::LoopDevice;

use super::*;
use std::path::Path;
use std::sync::Arc;

/// Directories on a disk file system and, where there is one, on tmpfs: they differ in what they refuse.
pub(super) fn directories() -> Vec<tempfile::TempDir> {
    let mut found = vec![tempfile::tempdir().unwrap()];
    found.extend(tempfile::tempdir_in("/dev/shm"));
    found
}

/// A directory in which syncs cost nothing, if there is one.
pub(super) fn quick_directory() -> tempfile::TempDir {
    directories().pop().expect("one at least")
}

pub(super) fn file_of(path: &Path, size_bytes: u64) {
    std::fs::File::create(path).unwrap().set_len(size_bytes).unwrap();
}

pub(super) fn options(cache: CacheMode) -> OpenOptions {
    OpenOptions { writable: true, cache, ..OpenOptions::default() }
}

/// The image, or `None` where the file system has no direct I/O.
pub(super) fn try_open(path: &Path, cache: CacheMode) -> Option<Arc<dyn Image>> {
    match open(path, &options(cache)) {
        Err(error) if cache == CacheMode::None && error.kind() == ErrorKind::Unsupported => {
            assert!(error.to_string().contains("cache=none"), "{error}");
            None
        }
        opened => Some(opened.unwrap()),
    }
}

pub(super) const MODES: [CacheMode; 2] = [CacheMode::None, CacheMode::Writeback];
