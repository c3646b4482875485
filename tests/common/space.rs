//! fallocate and lseek with the offsets of this crate.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;
pub use nix::fcntl::FallocateFlags;
use nix::unistd::{Whence, lseek};

/// Frees a range; the size stays.
pub const PUNCH: FallocateFlags = FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(KEEP);
/// Makes a range read as zeroes; the size may grow.
pub const ZERO: FallocateFlags = FallocateFlags::FALLOC_FL_ZERO_RANGE;
/// The size stays.
pub const KEEP: FallocateFlags = FallocateFlags::FALLOC_FL_KEEP_SIZE;
/// Preallocates; the size may grow.
pub const PREALLOCATE: FallocateFlags = FallocateFlags::empty();

/// fallocate(2).
pub fn allocate(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
    nix::fcntl::fallocate(file, mode, signed(offset), signed(len))
}

/// SEEK_DATA from `offset`.
pub fn seek_data(file: &File, offset: u64) -> Result<u64, Errno> {
    lseek(file.as_fd(), signed(offset), Whence::SeekData).map(|at| at as u64)
}

/// SEEK_HOLE from `offset`.
pub fn seek_hole(file: &File, offset: u64) -> Result<u64, Errno> {
    lseek(file.as_fd(), signed(offset), Whence::SeekHole).map(|at| at as u64)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).expect("an offset of a file")
}
