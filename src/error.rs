//! The one error type of the crate: what was attempted, on what, where, why it failed, and what to do about it (rule 12).

use std::fmt;
use std::io;

use crate::range::ByteRange;

/// Shorthand for results with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it is, for the callers that must decide (policies, exit codes, errno for the guest).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself makes no sense (exit code 2).
    Usage,
    /// Not possible at this moment, nothing was changed (exit code 3): busy, not ready, timed out.
    NotNow,
    /// The image is used by someone else: QEMU, another livemirror, a mounted file system.
    Locked,
    /// The image was superseded by a cutover (rule 10).
    Superseded,
    /// There is no such file, device, volume or job.
    NotFound,
    /// Something is already there that must not be overwritten.
    Exists,
    /// The image or its file system cannot do this.
    Unsupported,
    /// No room, or a quota: errors that go away when somebody makes room.
    NoSpace,
    /// The image may not be written.
    ReadOnly,
    /// A stored record is damaged or unknown.
    Corrupt,
    /// Two images that should be the same are not (exit code 4).
    Different,
    /// Anything else: input/output errors among them.
    Failed,
}

/// An error with its context. `Display` prints one line: what was attempted, on what, where, why.
#[derive(Clone)]
pub struct Error(Box<Context>);

#[derive(Clone)]
struct Context {
    kind: ErrorKind,
    what: String,
    subject: Option<String>,
    range: Option<ByteRange>,
    errno: Option<i32>,
    cause: Option<String>,
    advice: Option<String>,
}

impl Error {
    /// An error that says `what` could not be done or is wrong, a clause without a full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        let what = what.into();
        Error(Box::new(Context { kind, what, subject: None, range: None, errno: None, cause: None, advice: None }))
    }

    /// Shorthand for [`ErrorKind::Usage`].
    pub fn usage(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::Usage, what)
    }

    /// Shorthand for [`ErrorKind::NotNow`].
    pub fn not_now(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::NotNow, what)
    }

    /// An operating system error met while doing `what` (`"write"`, `"open"`, ...); the kind follows from the errno.
    pub fn io(what: impl Into<String>, source: &io::Error) -> Self {
        let errno = source.raw_os_error();
        let kind = match errno {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS) => ErrorKind::Unsupported,
            Some(libc::EROFS) => ErrorKind::ReadOnly,
            Some(libc::ENOENT | libc::ENOTDIR) => ErrorKind::NotFound,
            Some(libc::EEXIST) => ErrorKind::Exists,
            _ => ErrorKind::Failed,
        };
        let mut error = Error::new(kind, what);
        error.0.errno = errno;
        error.0.cause = Some(plain_cause(source));
        error
    }

    /// Names the image, path or option that it is about.
    #[must_use]
    pub fn on(mut self, subject: impl Into<String>) -> Self {
        self.0.subject = Some(subject.into());
        self
    }

    /// Names the bytes that it is about.
    #[must_use]
    pub fn at(mut self, range: ByteRange) -> Self {
        self.0.range = Some(range);
        self
    }

    /// Says what the user can do about it; printed on a line of its own.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What the user can do about it, if anything is known.
    pub fn advice(&self) -> Option<&str> {
        self.0.advice.as_deref()
    }

    /// The bytes that it is about.
    pub fn range(&self) -> Option<ByteRange> {
        self.0.range
    }

    /// The errno that a guest gets for it. Never 0.
    pub fn errno(&self) -> i32 {
        self.0.errno.unwrap_or(match self.0.kind {
            ErrorKind::Usage => libc::EINVAL,
            ErrorKind::NotNow | ErrorKind::Locked => libc::EBUSY,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::Exists => libc::EEXIST,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::Superseded | ErrorKind::Corrupt | ErrorKind::Different | ErrorKind::Failed => libc::EIO,
        })
    }

    /// The exit code of the command that ends with it : 1 failed, 2 wrong usage, 3 not now, 4 images differ.
    pub fn exit_code(&self) -> u8 {
        match self.0.kind {
            ErrorKind::Usage => 2,
            ErrorKind::NotNow => 3,
            ErrorKind::Different => 4,
            _ => 1,
        }
    }
}

/// The text of an operating system error without Rust's "(os error N)".
fn plain_cause(source: &io::Error) -> String {
    let text = source.to_string();
    match text.find(" (os error ") {
        Some(cut) => text[..cut].to_owned(),
        None => text,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)?;
        if let Some(subject) = &self.0.subject {
            write!(f, " {subject}")?;
        }
        if let Some(range) = self.0.range {
            write!(f, " at offset {} ({} bytes)", range.start(), range.len())?;
        }
        if let Some(cause) = &self.0.cause {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_what_where_and_why() {
        let error = Error::io("cannot write", &io::Error::from_raw_os_error(libc::ENOSPC))
            .on("/new/disk.img")
            .at(ByteRange::new(4096, 512));
        assert_eq!(error.to_string(), "cannot write /new/disk.img at offset 4096 (512 bytes): No space left on device");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.errno(), libc::ENOSPC);
        assert_eq!(error.exit_code(), 1);
    }
}
