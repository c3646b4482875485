//! Comparing files byte by byte, holes skipped, and measuring what they take up.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;

use super::space::{seek_data, seek_hole};

/// Bytes that a file takes up.
pub fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).expect("stat").blocks() * 512
}

/// The next data of `file` at or after `from`, as (start, end); `None` if only holes follow.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match seek_data(file, from) {
        Err(Errno::ENXIO) => return Ok(None),
        other => other?,
    };
    Ok(Some((start, seek_hole(file, start)?)))
}

/// All data of a file, as (start, end), in order.
pub fn data_of(path: &Path) -> Vec<(u64, u64)> {
    let file = File::open(path).expect("open");
    let mut found = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = next_data(&file, at).expect("SEEK_DATA") {
        found.push((start, end));
        at = end;
    }
    found
}

/// Panics unless both files hold the same bytes. Reads only where one of them has data.
#[track_caller]
pub fn assert_same_content(left: &Path, right: &Path) {
    if let Some(offset) = first_difference(left, right) {
        panic!("{} and {} differ first at byte {offset}", left.display(), right.display());
    }
}

/// Where two files differ first, sizes included.
pub fn first_difference(left: &Path, right: &Path) -> Option<u64> {
    let (left, right) = (File::open(left).expect("open"), File::open(right).expect("open"));
    let size = left.metadata().expect("stat").len().min(right.metadata().expect("stat").len());
    let mut buffers = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        let data = [&left, &right].map(|file| next_data(file, at).expect("SEEK_DATA"));
        let Some(start) = data.iter().flatten().map(|extent| extent.0).min() else { break };
        at = start;
        let end = data.iter().flatten().filter(|extent| extent.0 == start).map(|extent| extent.1).max().unwrap_or(size);
        while at < end.min(size) {
            let len = (end.min(size) - at).min(1 << 20) as usize;
            let (a, b) = (&mut buffers.0[..len], &mut buffers.1[..len]);
            left.read_exact_at(a, at).expect("read");
            right.read_exact_at(b, at).expect("read");
            if a != b {
                let first = a.iter().zip(b.iter()).position(|(x, y)| x != y).unwrap_or(0);
                return Some(at + first as u64);
            }
            at += len as u64;
        }
    }
    (left.metadata().expect("stat").len() != right.metadata().expect("stat").len()).then_some(size)
}
