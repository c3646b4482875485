//! Locks on image files, understood by QEMU and by other servers of ours (rules 9 and 14).
//!
//! QEMU's scheme (docs/interop and block/file-posix.c describe it): an open image holds *shared* byte locks that say what
//! it does and what it does not tolerate; nobody ever blocks on them, conflicts are looked up.
//!
//! ```text
//! byte 100 + p   "I use permission p"               p: 0 consistent read, 1 write, 2 write unchanged, 3 resize
//! byte 200 + p   "I do not let others use p"
//! byte 298, 299  ours: exclusive, one server's I/O descriptors (the fence of rule 14)
//! ```
//!
//! We use read and write, and let nobody write or resize: QEMU programs that only look (`qemu-img info`,
//! `qemu-img compare -U`) work meanwhile, those that write are refused. A reader uses read only.
//!
//! All are OFD locks: they belong to the open file description, so a second opening in this process conflicts too, and
//! they last until the last duplicate of the descriptor is closed, in whichever process.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::error::{Error, ErrorKind, Result};

const USES: i64 = 100;
const REFUSES: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What we do not let others do.
const REFUSED: [i64; 2] = [WRITE, RESIZE];

/// Private bytes, outside the two ranges that QEMU uses (64 permissions each at most).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fence {
    /// Held by the descriptor that reads and writes.
    Io = 299,
    /// Held by the second, buffered descriptor of direct I/O.
    Tail = 298,
}

/// How often a lock that is held is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// How long a lock in the way is given to vanish. A process that is just being started holds copies of all descriptors of its parent
/// until it runs its program (fork(2), then O_CLOEXEC): what was closed a moment ago may still be locked.
pub(super) const PATIENCE: Duration = Duration::from_millis(200);

/// Attempts until there is a result, `None` once `patience` is over. The last attempt is made at the end of the time or later.
pub(super) fn patiently<T, E>(
    patience: Duration,
    mut attempt: impl FnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    let deadline = Instant::now() + patience;
    loop {
        let is_last = Instant::now() >= deadline;
        match attempt()? {
            None if !is_last => std::thread::sleep(RETRY),
            outcome => return Ok(outcome),
        }
    }
}

fn one_byte(kind: i32, byte: i64) -> libc::flock {
    let narrow = |value: i32| i16::try_from(value).expect("lock constants are small");
    // l_pid must be 0 for OFD locks (fcntl(2)).
    libc::flock { l_type: narrow(kind), l_whence: narrow(libc::SEEK_SET), l_start: byte, l_len: 1, l_pid: 0 }
}

/// False: somebody else's lock is in the way.
fn set(file: &File, kind: i32, byte: i64) -> Result<bool, Errno> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&one_byte(kind, byte))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// True if any other open file description has a lock on `byte`.
fn is_held_by_others(file: &File, byte: i64) -> Result<bool, Errno> {
    // Asking for an exclusive lock finds shared ones too. Asking needs no write access, unlike taking.
    let mut asked = one_byte(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked))?;
    Ok(i32::from(asked.l_type) != libc::F_UNLCK)
}

/// Takes the image locks of a reader, or of a writer, on `file` (called `name` in messages). Taking them again on the same
/// open file description changes nothing.
///
/// # Errors
/// [`ErrorKind::Locked`] if another program's locks conflict; then none of ours stays.
pub(super) fn take_image_locks(file: &File, name: &str, writer: bool) -> Result<()> {
    let taken = patiently(PATIENCE, || match try_image_locks(file, writer) {
        Ok(true) => Ok(Some(())),
        Ok(false) => Ok(None),
        Err(errno) => Err(errno),
    });
    match taken {
        Ok(Some(())) => Ok(()),
        Ok(None) => Err(in_use(file, name)),
        Err(errno) => Err(Error::io("cannot lock", &errno.into())
            .on(name)
            .advise("the file system must support open file description locks")),
    }
}

/// One attempt. False: somebody is in the way. Unless it succeeds, none of the locks stays.
fn try_image_locks(file: &File, writer: bool) -> Result<bool, Errno> {
    let used: &[i64] = if writer { &[READ, WRITE] } else { &[READ] };
    let ours = used.iter().map(|p| USES + p).chain(REFUSED.iter().map(|p| REFUSES + p));
    let mut conflicts = used.iter().map(|p| REFUSES + p).chain(REFUSED.iter().map(|p| USES + p));
    // First take, then look: of two that come at the same time at least one sees the other.
    let taken = ours.clone().try_fold(true, |all, byte| Ok(all && set(file, libc::F_RDLCK, byte)?));
    let outcome = taken.and_then(|all| {
        let conflict = conflicts.try_fold(false, |any, byte| Ok(any || is_held_by_others(file, byte)?))?;
        Ok(all && !conflict)
    });
    if outcome != Ok(true) {
        for byte in ours {
            let _ = set(file, libc::F_UNLCK, byte);
        }
    }
    outcome
}

/// Takes the exclusive lock on a private byte: with it in hand, no I/O of an earlier server can land any more. Waits up to
/// `patience` for that server's last request. Closing the descriptor gives it back.
///
/// # Errors
/// [`ErrorKind::Locked`] if it is still held then.
pub(super) fn take_fence(file: &File, name: &str, fence: Fence, patience: Duration) -> Result<()> {
    let taken = patiently(patience.max(PATIENCE), || Ok(set(file, libc::F_WRLCK, fence as i64)?.then_some(())));
    match taken {
        Ok(Some(())) => Ok(()),
        Ok(None) => Err(Error::new(ErrorKind::Locked, "image is in use by another livemirror:").on(name)),
        Err(errno) => Err(Error::io("cannot lock", &Errno::into(errno)).on(name)),
    }
}

fn in_use(file: &File, name: &str) -> Error {
    let who = match holder(file) {
        Some(holder) => format!("image is in use by {holder}:"),
        None => "image is in use by another program (QEMU?):".to_owned(),
    };
    Error::new(ErrorKind::Locked, who).on(name).advise("end the program that uses the image, or take another image")
}

/// The program that holds image locks on `file`, as far as it can be found out: an OFD lock tells no pid, but the
/// fdinfo of its descriptor lists it (proc(5)).
fn holder(file: &File) -> Option<String> {
    let meta = file.metadata().ok()?;
    let (major, minor) = (libc::major(meta.dev()), libc::minor(meta.dev()));
    let place = format!(" {major:02x}:{minor:02x}:{} ", meta.ino());
    let own = std::process::id();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid != own && holds_lock(pid, &place) {
            let program = std::fs::read_to_string(process.path().join("comm")).ok()?;
            return Some(format!("{} (pid {pid})", program.trim_end()));
        }
    }
    holds_lock(own, &place).then(|| "this livemirror already".to_owned())
}

fn holds_lock(pid: u32, place: &str) -> bool {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
    descriptors.flatten().any(|descriptor| {
        let info = std::fs::read_to_string(descriptor.path()).unwrap_or_default();
        info.lines().any(|line| line.starts_with("lock:") && line.contains("OFDLCK") && line.contains(place))
    })
}

#[cfg(test)]
mod tests {
    use super::super::{OpenOptions, Role, open};
    use super::*;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Stdio};

    fn disk(directory: &tempfile::TempDir) -> PathBuf {
        let path = directory.path().join("disk.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    }

    fn for_writing() -> OpenOptions {
        OpenOptions { writable: true, ..OpenOptions::default() }
    }

    fn works(program: &str, arguments: &[&str], path: &Path) -> bool {
        let output = Command::new(program).args(arguments).arg(path).output().unwrap();
        output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("failed")
    }

    fn has_qemu() -> bool {
        Command::new("qemu-io").arg("--version").output().is_ok()
    }

    struct Running(Child);
    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_second_writer_is_refused_also_within_the_process_and_readers_share() {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory);
        let first = open(&path, &for_writing()).unwrap();
        let error = open(&path, &for_writing()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("in use by"), "{error}");
        assert_eq!(open(&path, &OpenOptions::default()).unwrap_err().kind(), ErrorKind::Locked);
        open(&path, &OpenOptions { role: Role::Observer, ..OpenOptions::default() }).unwrap();
        drop(first);
        let reader = open(&path, &OpenOptions::default()).unwrap();
        let other = open(&path, &OpenOptions::default()).unwrap();
        assert_eq!(open(&path, &for_writing()).unwrap_err().kind(), ErrorKind::Locked);
        drop((reader, other));
        open(&path, &for_writing()).unwrap();
    }

    #[test]
    fn a_failed_attempt_leaves_no_lock() {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory);
        let holder = open(&path, &for_writing()).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        take_image_locks(&file, "disk", true).unwrap_err();
        drop(holder);
        open(&path, &for_writing()).unwrap();
    }

    #[test]
    fn the_parked_descriptor_keeps_the_image_and_serves_the_next_server() {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory);
        let image = open(&path, &for_writing()).unwrap();
        let parked = image.descriptors()[0].1.try_clone_to_owned().unwrap();
        drop(image);
        assert_eq!(open(&path, &for_writing()).unwrap_err().kind(), ErrorKind::Locked);
        let moved = directory.path().join("moved.img");
        std::fs::rename(&path, &moved).unwrap();
        let again = open(&path, &OpenOptions { descriptor: Some(parked), ..for_writing() }).unwrap();
        again.write_at(0, b"still here").unwrap();
        assert_eq!(&std::fs::read(&moved).unwrap()[..10], b"still here");
    }

    #[test]
    fn the_fence_admits_one_server_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory);
        let image = open(&path, &for_writing()).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let error = take_fence(&file, "disk", Fence::Io, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| take_fence(&file, "disk", Fence::Io, Duration::from_secs(20)));
            std::thread::sleep(Duration::from_millis(30));
            drop(image);
            waiter.join().unwrap().unwrap();
        });
    }

    #[test]
    fn qemu_may_look_but_not_write() {
        if !has_qemu() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory);
        let image = open(&path, &for_writing()).unwrap();
        let copy = directory.path().join("copy.img");
        std::fs::copy(&path, &copy).unwrap();
        assert!(works("qemu-img", &["info"], &path));
        assert!(works("qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", copy.to_str().unwrap()], &path));
        assert!(!works("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path));
        drop(image);
        let reader = open(&path, &OpenOptions::default()).unwrap();
        assert!(works("qemu-io", &["-r", "-f", "raw", "-c", "read 0 512"], &path));
        assert!(!works("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path));
        drop(reader);
        assert!(works("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path));
    }

    #[test]
    fn an_image_that_qemu_writes_is_refused_and_the_program_named() {
        if !has_qemu() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = disk(&directory);
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).arg(&path).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut running = Running(command.spawn().unwrap());
        let file = File::open(&path).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_held_by_others(&file, USES + WRITE).unwrap() {
            assert!(running.0.try_wait().unwrap().is_none() && Instant::now() < deadline, "qemu-io takes its locks");
            std::thread::sleep(Duration::from_millis(10));
        }
        for writable in [true, false] {
            let error = open(&path, &OpenOptions { writable, ..OpenOptions::default() }).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Locked);
            assert!(error.to_string().contains(&format!("qemu-io (pid {})", running.0.id())), "{error}");
            assert!(error.to_string().contains("disk.img"), "{error}");
        }
    }
}
