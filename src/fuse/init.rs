//! The first exchange of a connection: what the kernel offers (FUSE_INIT) and what is agreed on.
//!
//! It happens once in a connection's life, between the kernel and the keeper, right after the mount. What was agreed on
//! binds every server that comes later, whatever its version, so the keeper keeps it and hands it to each.
//!
//! ```text
//! kernel --- FUSE_INIT ---> keeper: negotiate() ---> Negotiated ---> server 1, server 2, ...
//!                                                                    each answers synthetic_request() to itself
//! ```
//!
//! Layouts and flags: include/uapi/linux/fuse.h. All numbers are in the machine's byte order.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

const FUSE_INIT: u32 = 26;
const MAJOR: u32 = 7;
/// The version whose structures are used here (7.40: Linux 6.9).
const MINOR: u32 = 40;
/// Linux 5.4; older kernels have no usable parallel direct writes, nor the long answer.
const MINOR_AT_LEAST: u32 = 31;

const IN_HEADER_BYTES: usize = 40;
const INIT_IN_BYTES: usize = IN_HEADER_BYTES + 64;
const INIT_OUT_BYTES: usize = 16 + 64;
/// FUSE_MIN_READ_BUFFER: the kernel refuses reads into less.
const READ_BUFFER_BYTES: usize = 8192;

const ASYNC_READ: u64 = 1 << 0;
const BIG_WRITES: u64 = 1 << 5;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
const HAS_RESEND: u64 = 1 << 39;

/// All that is ever asked for. Not in it, and never to be: WRITEBACK_CACHE (it hides writes), OVER_IO_URING (requests die
/// with their ring), SETXATTR_EXT (another request layout), POSIX_LOCKS and FLOCK_LOCKS (guests' locks stay in the kernel
/// and survive us), ATOMIC_O_TRUNC (an open would change the disk), REQUEST_TIMEOUT (it would kill a slow disk).
const WANTED: u64 =
    ASYNC_READ | BIG_WRITES | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT | DIRECT_IO_ALLOW_MMAP | HAS_RESEND;

/// Longest payload of a write, and of a read.
pub const MAX_TRANSFER_BYTES: u32 = 1 << 20;

/// Requests that may be in the queue on behalf of asynchronous I/O.
const MAX_BACKGROUND: u16 = 256;

/// What kernel and keeper agreed on; binding for every server of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    /// Minor protocol version of the kernel (the major one is 7).
    pub kernel_minor: u32,
    /// What the kernel offered.
    pub kernel_flags: u64,
    /// What both agreed on.
    pub flags: u64,
    /// Bytes that the kernel may read ahead (for mapped files).
    pub max_readahead_bytes: u32,
    /// Longest write.
    pub max_write_bytes: u32,
}

impl Negotiated {
    /// True if the kernel can send unanswered requests again, that is, if a server can be replaced.
    pub fn has_resend(&self) -> bool {
        self.flags & HAS_RESEND != 0
    }

    /// The FUSE_INIT that a later server answers to itself: the kernel's, with the same version and flags.
    pub fn synthetic_request(&self) -> [u8; INIT_IN_BYTES] {
        let mut bytes = [0; INIT_IN_BYTES];
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        put(0, INIT_IN_BYTES as u32);
        put(4, FUSE_INIT);
        // `unique`, eight bytes at 8: any number but 0, which marks notifications.
        put(8, 1);
        put(12, 1);
        put(IN_HEADER_BYTES, MAJOR);
        put(IN_HEADER_BYTES + 4, self.kernel_minor);
        put(IN_HEADER_BYTES + 8, self.max_readahead_bytes);
        let [low, high] = halves(self.kernel_flags);
        put(IN_HEADER_BYTES + 12, low);
        put(IN_HEADER_BYTES + 16, high);
        bytes
    }

    fn answer(&self, unique: [u8; 8]) -> [u8; INIT_OUT_BYTES] {
        let mut bytes = [0; INIT_OUT_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let [low, high] = halves(self.flags);
        put(0, &(INIT_OUT_BYTES as u32).to_ne_bytes());
        put(8, &unique);
        put(16, &MAJOR.to_ne_bytes());
        put(20, &MINOR.to_ne_bytes());
        put(24, &self.max_readahead_bytes.to_ne_bytes());
        put(28, &low.to_ne_bytes());
        put(32, &MAX_BACKGROUND.to_ne_bytes());
        // Congestion threshold: three quarters, as the kernel's own default has it.
        put(34, &(MAX_BACKGROUND / 4 * 3).to_ne_bytes());
        put(36, &self.max_write_bytes.to_ne_bytes());
        // Time granularity in nanoseconds, pages of one request.
        put(40, &1_u32.to_ne_bytes());
        put(44, &((self.max_write_bytes / 4096) as u16).to_ne_bytes());
        put(48, &high.to_ne_bytes());
        bytes
    }
}

fn halves(flags: u64) -> [u32; 2] {
    [flags as u32, (flags >> 32) as u32]
}

/// Reads the FUSE_INIT that is pending on a fresh connection and answers it.
///
/// # Errors
/// The connection is gone, or the kernel is too old.
pub fn negotiate(connection: &OwnedFd) -> Result<Negotiated> {
    let failed = |error: &std::io::Error| Error::io("cannot talk to the kernel's FUSE", error);
    let mut device = File::from(connection.try_clone().map_err(|error| failed(&error))?);
    let mut request = vec![0; READ_BUFFER_BYTES];
    let len = loop {
        match device.read(&mut request) {
            Ok(len) => break len,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(&error)),
        }
    };
    let negotiated = parse(&request[..len])?;
    let unique = request[8..16].try_into().unwrap_or_default();
    device.write_all(&negotiated.answer(unique)).map_err(|error| failed(&error))?;
    Ok(negotiated)
}

fn parse(request: &[u8]) -> Result<Negotiated> {
    let word = |at: usize| request.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
    if request.len() < IN_HEADER_BYTES + 16 || word(4) != FUSE_INIT {
        return Err(Error::new(ErrorKind::Failed, "the kernel's FUSE did not begin with its INIT request"));
    }
    let [major, minor] = [word(IN_HEADER_BYTES), word(IN_HEADER_BYTES + 4)];
    if major != MAJOR || minor < MINOR_AT_LEAST {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("the kernel speaks FUSE {major}.{minor}, at least {MAJOR}.{MINOR_AT_LEAST} is needed"),
        ));
    }
    let mut kernel_flags = u64::from(word(IN_HEADER_BYTES + 12));
    if kernel_flags & INIT_EXT != 0 {
        kernel_flags |= u64::from(word(IN_HEADER_BYTES + 16)) << 32;
    }
    Ok(Negotiated {
        kernel_minor: minor,
        kernel_flags,
        flags: kernel_flags & WANTED,
        max_readahead_bytes: word(IN_HEADER_BYTES + 8),
        max_write_bytes: MAX_TRANSFER_BYTES,
    })
}

/// Asks the kernel to send every request again that was read and not answered (FUSE_NOTIFY_RESEND). Only after whoever
/// read them is dead and reaped, and before anybody reads anew: a request that a living server has read would be carried
/// out twice at the same time, and its first run could end after a later write to the same place.
///
/// # Errors
/// `EINVAL` if the kernel cannot.
pub fn resend(connection: BorrowedFd<'_>) -> std::io::Result<()> {
    const NOTIFY_RESEND: u32 = 7;
    let mut notification = [0; 16];
    notification[..4].copy_from_slice(&16_u32.to_ne_bytes());
    notification[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    nix::unistd::write(connection, &notification)?;
    Ok(())
}

/// Refuses a host on which the kernel ends FUSE requests that take long: a disk that hangs for a while must not turn into
/// I/O errors for good.
///
/// # Errors
/// Names the setting.
pub fn check_request_timeouts() -> Result<()> {
    for name in ["default_request_timeout", "max_request_timeout"] {
        let value = std::fs::read_to_string(format!("/proc/sys/fs/fuse/{name}")).unwrap_or_default();
        if !matches!(value.trim(), "" | "0") {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the setting fs.fuse.{name} is {}: the kernel would end this mount when a request takes long",
                    value.trim()
                ),
            )
            .advise(format!("set it to 0: sysctl -w fs.fuse.{name}=0")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(flags: u64) -> Negotiated {
        let offered = Negotiated {
            kernel_minor: 45,
            kernel_flags: flags | INIT_EXT,
            flags: 0,
            max_readahead_bytes: 131_072,
            max_write_bytes: 0,
        };
        parse(&offered.synthetic_request()).unwrap()
    }

    #[test]
    fn only_what_is_wanted_is_agreed_on() {
        let everything = kernel(u64::MAX);
        assert_eq!(everything.flags, WANTED);
        assert!(everything.has_resend());
        // WRITEBACK_CACHE, POSIX_LOCKS, FLOCK_LOCKS, SETXATTR_EXT, OVER_IO_URING, REQUEST_TIMEOUT.
        for bit in [16, 1, 10, 29, 41, 42] {
            assert_eq!(everything.flags & (1 << bit), 0, "bit {bit}");
        }
        assert!(!kernel(ASYNC_READ).has_resend());
    }

    #[test]
    fn the_synthetic_request_repeats_the_kernels() {
        let first = kernel(u64::MAX);
        assert_eq!(parse(&first.synthetic_request()).unwrap(), first);
    }

    #[test]
    fn the_answer_has_the_kernels_layout() {
        let answer = kernel(u64::MAX).answer([9; 8]);
        assert_eq!(answer[..4], 80_u32.to_ne_bytes());
        assert_eq!(answer[8..16], [9; 8]);
        assert_eq!(answer[36..40], MAX_TRANSFER_BYTES.to_ne_bytes());
        assert_eq!(answer[44..46], 256_u16.to_ne_bytes());
    }

    #[test]
    fn an_old_kernel_is_refused() {
        let mut request = kernel(0).synthetic_request();
        request[44..48].copy_from_slice(&19_u32.to_ne_bytes());
        assert_eq!(parse(&request).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
