//! Special operations of file systems and devices that may be refused: tried once, and not again after a refusal.

use std::io;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::range::ByteRange;
use crate::sync::atomic::{AtomicBool, Ordering};

/// One special operation, and whether it was refused before.
#[derive(Debug, Default)]
pub(super) struct Ability {
    refused: AtomicBool,
}

/// What came of trying a special operation.
#[derive(Debug)]
pub(super) enum Tried {
    /// Done.
    Done,
    /// Not offered here: use another means.
    Refused,
    /// It failed for another reason.
    Failed(io::Error),
}

impl Ability {
    /// True unless a refusal is known.
    pub(super) fn is_likely(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Tries `operation`, unless it was refused before.
    ///
    /// EINVAL means a refusal too on some file systems, but may as well be about this one request: it is not remembered.
    pub(super) fn attempt(&self, mut operation: impl FnMut() -> Result<(), Errno>) -> Tried {
        if !self.is_likely() {
            return Tried::Refused;
        }
        loop {
            return match operation() {
                Ok(()) => Tried::Done,
                Err(Errno::EINTR) => continue,
                Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::ENOSYS) => {
                    self.refused.store(true, Ordering::Relaxed);
                    Tried::Refused
                }
                Err(Errno::EINVAL) => Tried::Refused,
                Err(errno) => Tried::Failed(errno.into()),
            };
        }
    }

    /// Tries fallocate(2) with `mode`, unless it was refused before.
    pub(super) fn attempt_fallocate(&self, file: &std::fs::File, mode: FallocateFlags, range: ByteRange) -> Tried {
        let (Ok(offset), Ok(len)) = (i64::try_from(range.start()), i64::try_from(range.len())) else {
            return Tried::Failed(io::Error::from_raw_os_error(libc::EFBIG));
        };
        if len == 0 {
            return Tried::Done;
        }
        self.attempt(|| fallocate(file, mode, offset, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_remembered_and_einval_is_not() {
        let ability = Ability::default();
        let mut calls = 0;
        let mut attempt = |answer| {
            ability.attempt(|| {
                calls += 1;
                answer
            })
        };
        assert!(matches!(attempt(Err(Errno::EINVAL)), Tried::Refused));
        assert!(matches!(attempt(Ok(())), Tried::Done));
        assert!(matches!(attempt(Err(Errno::EIO)), Tried::Failed(_)));
        assert!(matches!(attempt(Err(Errno::EOPNOTSUPP)), Tried::Refused));
        assert!(matches!(attempt(Ok(())), Tried::Refused));
        assert_eq!(calls, 4);
        assert!(!ability.is_likely());
    }
}
