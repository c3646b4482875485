//! System calls on files and block devices that no library wraps.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::range::ByteRange;

/// Reads the extended attribute `name`. `None` if there is none, or none can be there.
///
/// # Errors
/// What fgetxattr(2) gives, ENODATA and EOPNOTSUPP aside; ERANGE if it is longer than 256 bytes.
pub fn extended_attribute(file: impl AsFd, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0_u8; 256];
    // SAFETY: the descriptor is open for the length of the borrow, the name ends with NUL, and at most `value.len()` bytes
    // are written to `value`.
    let got =
        unsafe { libc::fgetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    match usize::try_from(got) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        Err(_) => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(None),
            error => Err(error),
        },
    }
}

/// What a file asks of direct I/O, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Of the memory's address. 0: no direct I/O on this file.
    pub memory: u32,
    /// Of offset and length. 0: no direct I/O on this file.
    pub offset: u32,
}

/// What `file` asks of direct I/O. `None`: the file system does not tell.
///
/// # Errors
/// What statx(2) gives.
pub fn direct_alignment(file: impl AsFd) -> io::Result<Option<DirectAlignment>> {
    // SAFETY: all bits zero is a valid value of this structure of integers.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    let descriptor = file.as_fd().as_raw_fd();
    // SAFETY: the path is an empty string that ends with NUL, the descriptor is open for the length of the borrow, and
    // `answer` may be written to.
    let failed =
        unsafe { libc::statx(descriptor, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut answer) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    let told = answer.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(told.then_some(DirectAlignment { memory: answer.stx_dio_mem_align, offset: answer.stx_dio_offset_align }))
}

mod requests {
    //! ioctl(2) requests; see linux/fs.h.
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), libc::c_uint);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
    nix::ioctl_write_ptr!(ficlonerange, 0x94, 13, super::CloneRange);
    // LOOP_GET_STATUS64, linux/loop.h.
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, super::LoopInfo);
}

/// Bytes of a block device.
///
/// # Errors
/// ENOTTY if it is not one.
pub fn block_device_size(device: impl AsFd) -> io::Result<u64> {
    let mut size = 0;
    // SAFETY: BLKGETSIZE64 writes one 64-bit number (linux/fs.h says size_t, meaning u64) to the address given.
    unsafe { requests::blkgetsize64(device.as_fd().as_raw_fd(), &raw mut size) }?;
    Ok(size)
}

/// Bytes of a block device's logical block: the unit of direct requests.
///
/// # Errors
/// ENOTTY if it is not a block device.
pub fn logical_block_size(device: impl AsFd) -> io::Result<u32> {
    let mut size = 0;
    // SAFETY: BLKSSZGET writes one int to the address given.
    unsafe { requests::blksszget(device.as_fd().as_raw_fd(), &raw mut size) }?;
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EIO))
}

/// Bytes of a block device's physical block: the unit in which it writes.
///
/// # Errors
/// ENOTTY if it is not a block device.
pub fn physical_block_size(device: impl AsFd) -> io::Result<u32> {
    let mut size = 0;
    // SAFETY: BLKPBSZGET writes one unsigned int to the address given.
    unsafe { requests::blkpbszget(device.as_fd().as_raw_fd(), &raw mut size) }?;
    Ok(size)
}

/// Makes `range` of a block device read as zeroes, by whatever means the kernel finds.
///
/// # Errors
/// EINVAL unless it is aligned to the logical block; ENOTTY if it is not a block device; I/O errors.
pub fn block_zero_out(device: impl AsFd, range: ByteRange) -> nix::Result<()> {
    let arguments = [range.start(), range.len()];
    // SAFETY: BLKZEROOUT reads two 64-bit numbers, start and length, from the address given.
    unsafe { requests::blkzeroout(device.as_fd().as_raw_fd(), &raw const arguments) }.map(drop)
}

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
#[derive(Debug)]
pub struct CloneRange {
    source: i64,
    source_offset: u64,
    source_length: u64,
    target_offset: u64,
}

/// Makes `range` of `target` share the blocks of the same range of `source`: FICLONERANGE. The file system keeps both files' writers out
/// meanwhile, and writes out what is cached of the range.
///
/// # Errors
/// EXDEV, EOPNOTSUPP, ENOTTY, EINVAL (also for a range that is not made of whole blocks) where it cannot; ENOSPC; I/O errors.
pub fn clone_range(source: impl AsFd, target: impl AsFd, range: ByteRange) -> nix::Result<()> {
    let arguments = CloneRange {
        source: source.as_fd().as_raw_fd().into(),
        source_offset: range.start(),
        source_length: range.len(),
        target_offset: range.start(),
    };
    // SAFETY: FICLONERANGE (ioctl_ficlonerange(2)) reads one structure of this layout from the address given.
    unsafe { requests::ficlonerange(target.as_fd().as_raw_fd(), &raw const arguments) }.map(drop)
}

/// Writes out what is cached of `range`, without keeping writers out. Proves nothing: not durable.
///
/// # Errors
/// ESPIPE and EINVAL for what has no cache; I/O errors.
pub fn write_out(file: impl AsFd, range: ByteRange) -> io::Result<()> {
    let number = |value: u64| i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG));
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (offset, len) = (number(range.start())?, number(range.len())?);
    // SAFETY: sync_file_range(2) touches no memory of ours.
    match unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), offset, len, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Debug)]
pub struct LoopInfo {
    device: u64,
    inode: u64,
    real_device: u64,
    offset_and_size_limit: [u64; 2],
    numbers_and_flags: [u32; 4],
    names_and_key: [u8; 64 + 64 + 32],
    init: [u64; 2],
}

/// What a loop device's bytes are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopBacking {
    /// A file: device number of its file system, and inode.
    File {
        /// Device number of the file system.
        device: u64,
        /// Inode number.
        inode: u64,
    },
    /// Another block device.
    Device {
        /// Its number.
        number: u64,
    },
}

/// What is beneath a loop device.
///
/// # Errors
/// ENXIO if there is nothing, ENOTTY if it is not a loop device.
pub fn loop_backing(device: impl AsFd) -> io::Result<LoopBacking> {
    // SAFETY: all bits zero is a valid value of this structure of integers.
    let mut info: LoopInfo = unsafe { std::mem::zeroed() };
    // SAFETY: LOOP_GET_STATUS64 writes one structure of this layout to the address given.
    unsafe { requests::loop_get_status64(device.as_fd().as_raw_fd(), &raw mut info) }?;
    // The kernel encodes these numbers in its own way (huge_encode_dev), which for them is the one of user space.
    Ok(match info.real_device {
        0 => LoopBacking::File { device: info.device, inode: info.inode },
        number => LoopBacking::Device { number },
    })
}

const _: () = assert!(size_of::<LoopInfo>() == 232);
const _: () = assert!(size_of::<CloneRange>() == 32);
