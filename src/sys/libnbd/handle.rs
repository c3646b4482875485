//! One connection as libnbd has it, and the commands in its hands.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::ALLOCATION;
use super::library::{Completion, Extents, Library, Opaque, Raw, Refusal};

/// What the library checks before it sends: all but the alignment, which the last bytes of an export of odd size do not have. There
/// the server has the last word.
const STRICT: u32 = 0x0F;

const FLAG_FUA: u32 = 1;
const FLAG_NO_HOLE: u32 = 2;

/// Bytes that the library reads.
pub trait Payload: AsRef<[u8]> + std::fmt::Debug + Send + Sync {}

impl<T: AsRef<[u8]> + std::fmt::Debug + Send + Sync> Payload for T {}

/// Where the memory of what is read comes from.
pub trait Memory: std::fmt::Debug + Send + Sync {
    /// So many bytes of anything.
    fn take(&self, len: usize) -> Vec<u8>;
}

/// One thing that a server is asked to do.
#[derive(Clone, Debug)]
pub enum Command {
    /// So many bytes from an offset.
    Read {
        /// Where.
        offset: u64,
        /// How many.
        len: usize,
        /// Into what.
        memory: Arc<dyn Memory>,
    },
    /// A part of `data`, to an offset.
    Write {
        /// Where to.
        offset: u64,
        /// Holds the bytes.
        data: Arc<dyn Payload>,
        /// Which of them.
        part: std::ops::Range<usize>,
        /// Durable when it is answered.
        fua: bool,
    },
    /// Zeroes.
    Zero {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
        /// The space stays allocated.
        keep: bool,
        /// Durable when it is answered.
        fua: bool,
    },
    /// Gives space back; what is read there afterwards is not defined.
    Trim {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Durable when it is answered.
        fua: bool,
    },
    /// Makes what was acknowledged durable.
    Flush,
    /// Which extents there are from an offset on.
    Status {
        /// Where.
        offset: u64,
        /// How far.
        len: u64,
    },
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server did it.
    Done,
    /// The server, or the library for it, answered with this error number.
    Failed(i32),
    /// No answer came: it was refused, or the connection was closed before.
    Unanswered,
}

/// A command that the library has let go of.
#[derive(Debug)]
pub struct Finished {
    /// The number that it was given.
    pub id: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// The bytes of a read.
    pub bytes: Vec<u8>,
    /// Length in bytes and flags, of a block status.
    pub extents: Vec<(u32, u32)>,
}

/// A command in the library's hands.
struct Operation {
    finished: Finished,
    /// Read by the library until it is done.
    _data: Option<Arc<dyn Payload>>,
    sender: Sender<Finished>,
}

/// One connection. May move between threads, is used by one at a time.
pub struct Handle {
    raw: NonNull<Opaque>,
    library: &'static Library,
    sender: Sender<Finished>,
}

// SAFETY: libnbd's handles are not tied to a thread (each has a lock of its own), and what hangs on one, the operations, may be
// sent as well.
unsafe impl Send for Handle {}

unsafe extern "C" fn on_completion(user_data: *mut c_void, error: *mut c_int) -> c_int {
    // SAFETY: it is the operation that `Handle::start` gave the library, which calls back from one thread at a time and calls
    // `on_free` later; the number is the library's own.
    unsafe {
        (*user_data.cast::<Operation>()).finished.outcome = match *error {
            0 => Outcome::Done,
            errno => Outcome::Failed(errno),
        };
    }
    // The library forgets the command by itself.
    1
}

unsafe extern "C" fn on_extents(
    user_data: *mut c_void,
    _context: *const c_char,
    _offset: u64,
    entries: *mut u32,
    count: usize,
    _error: *mut c_int,
) -> c_int {
    // SAFETY: as in `on_completion`; the library has `count` numbers at `entries` for the length of this call.
    let (operation, entries) =
        unsafe { (&mut *user_data.cast::<Operation>(), std::slice::from_raw_parts(entries, count)) };
    operation.finished.extents.extend(entries.chunks_exact(2).map(|pair| (pair[0], pair[1])));
    0
}

unsafe extern "C" fn on_free(user_data: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `Handle::start`; the library calls this once and touches nothing of it afterwards.
    let operation = unsafe { Box::from_raw(user_data.cast::<Operation>()) };
    let Operation { finished, sender, .. } = *operation;
    // Nobody listens any more: then nobody wants to know.
    let _ = sender.send(finished);
}

impl Handle {
    /// A handle without a connection. What becomes of its commands goes to `sender`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(library: &'static Library, sender: Sender<Finished>) -> Result<Self, Refusal> {
        // SAFETY: it takes nothing.
        let raw = unsafe { (library.functions.nbd_create)() };
        let raw = NonNull::new(raw).ok_or_else(|| library.refusal())?;
        Ok(Handle { raw, library, sender })
    }

    /// Begins to connect, and asks for the block status of [`ALLOCATION`].
    ///
    /// # Errors
    /// The URI is wrong, or the connection is refused at once.
    pub fn connect(&mut self, uri: &CString) -> Result<(), Refusal> {
        let (library, raw) = (self.library, self.raw.as_ptr());
        let functions = &library.functions;
        // SAFETY: the handle lives, all texts end with NUL and are copied by the library.
        unsafe {
            library.check((functions.nbd_set_strict_mode)(raw, STRICT))?;
            library.check((functions.nbd_set_uri_allow_local_file)(raw, true))?;
            library.check((functions.nbd_add_meta_context)(raw, ALLOCATION.as_ptr()))?;
            library.check((functions.nbd_aio_connect_uri)(raw, uri.as_ptr()))?;
        }
        Ok(())
    }

    /// Asks one number of the handle.
    fn ask<T: Into<i64>>(&self, function: unsafe extern "C" fn(Raw) -> T) -> Result<i64, Refusal> {
        // SAFETY: the handle lives, and these functions take nothing else.
        self.library.check(unsafe { function(self.raw.as_ptr()) })
    }

    fn says(&self, function: unsafe extern "C" fn(Raw) -> c_int) -> bool {
        self.ask(function).is_ok_and(|answer| answer > 0)
    }

    /// The connection can be used.
    pub fn is_ready(&self) -> bool {
        self.says(self.library.functions.nbd_aio_is_ready)
    }

    /// The connection has ended, in one way or the other.
    pub fn has_ended(&self) -> bool {
        self.says(self.library.functions.nbd_aio_is_dead) || self.says(self.library.functions.nbd_aio_is_closed)
    }

    /// The size of the export in bytes.
    ///
    /// # Errors
    /// There is no connection.
    pub fn size_bytes(&self) -> Result<u64, Refusal> {
        self.ask(self.library.functions.nbd_get_size).map(i64::unsigned_abs)
    }

    /// Smallest and largest request in bytes, where the server tells.
    pub fn block_sizes(&self) -> (Option<u64>, Option<u64>) {
        let ask = |kind: c_int| {
            // SAFETY: the handle lives; the number is one of libnbd.h (LIBNBD_SIZE_MINIMUM 0, LIBNBD_SIZE_MAXIMUM 2).
            let size = unsafe { (self.library.functions.nbd_get_block_size)(self.raw.as_ptr(), kind) };
            u64::try_from(size).ok().filter(|size| *size > 0)
        };
        (ask(0), ask(2))
    }

    /// The export may not be written.
    pub fn is_read_only(&self) -> bool {
        self.says(self.library.functions.nbd_is_read_only)
    }

    /// The server can flush.
    pub fn can_flush(&self) -> bool {
        self.says(self.library.functions.nbd_can_flush)
    }

    /// The server can make single writes durable.
    pub fn can_fua(&self) -> bool {
        self.says(self.library.functions.nbd_can_fua)
    }

    /// The server can write zeroes without being sent them.
    pub fn can_zero(&self) -> bool {
        self.says(self.library.functions.nbd_can_zero)
    }

    /// The server can trim.
    pub fn can_trim(&self) -> bool {
        self.says(self.library.functions.nbd_can_trim)
    }

    /// A flush on one connection covers what was acknowledged on all.
    pub fn can_multi_conn(&self) -> bool {
        self.says(self.library.functions.nbd_can_multi_conn)
    }

    /// The server tells which extents there are.
    pub fn can_status(&self) -> bool {
        // SAFETY: the handle lives, the text ends with NUL.
        let answer = unsafe { (self.library.functions.nbd_can_meta_context)(self.raw.as_ptr(), ALLOCATION.as_ptr()) };
        answer > 0
    }

    /// A duplicate of its socket, which stays when the library closes its own.
    ///
    /// # Errors
    /// There is no connection, or no descriptors are left.
    pub fn socket(&self) -> io::Result<OwnedFd> {
        let number =
            self.ask(self.library.functions.nbd_aio_get_fd).map_err(|refusal| io::Error::other(refusal.text))?;
        let number = c_int::try_from(number).map_err(io::Error::other)?;
        // SAFETY: the handle owns this number and keeps it open while it is borrowed, which is until the end of this function.
        unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()
    }

    /// What to wait for on the socket: bytes to read, room to write.
    pub fn direction(&self) -> (bool, bool) {
        // SAFETY: the handle lives.
        let direction = unsafe { (self.library.functions.nbd_aio_get_direction)(self.raw.as_ptr()) };
        (direction & 1 != 0, direction & 2 != 0)
    }

    /// There may be something to read.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn notify_read(&mut self) -> Result<(), Refusal> {
        self.ask(self.library.functions.nbd_aio_notify_read).map(drop)
    }

    /// There may be room to write.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn notify_write(&mut self) -> Result<(), Refusal> {
        self.ask(self.library.functions.nbd_aio_notify_write).map(drop)
    }

    /// Tells the server that this connection ends after the commands that were sent.
    ///
    /// # Errors
    /// There is none.
    pub fn disconnect(&mut self) -> Result<(), Refusal> {
        // SAFETY: the handle lives; no flags.
        let result = unsafe { (self.library.functions.nbd_aio_disconnect)(self.raw.as_ptr(), 0) };
        self.library.check(result).map(drop)
    }

    /// Starts `command`; it comes out of the channel as `id` when it has ended, also if this fails.
    ///
    /// # Errors
    /// The library refuses it: the connection has ended, or the export does not allow it.
    pub fn start(&mut self, id: u64, command: &Command) -> Result<(), Refusal> {
        let bytes = match command {
            Command::Read { len, memory, .. } => {
                let bytes = memory.take(*len);
                // The library fills so many.
                assert_eq!(bytes.len(), *len);
                bytes
            }
            _ => Vec::new(),
        };
        let data = match command {
            Command::Write { data, .. } => Some(data.clone()),
            _ => None,
        };
        let finished = Finished { id, outcome: Outcome::Unanswered, bytes, extents: Vec::new() };
        let mut operation = Box::new(Operation { finished, _data: data, sender: self.sender.clone() });
        let buffer = operation.finished.bytes.as_mut_ptr();
        let user_data: *mut c_void = Box::into_raw(operation).cast();
        let completion = Completion { callback: Some(on_completion), user_data, free: Some(on_free) };
        let (raw, functions) = (self.raw.as_ptr(), &self.library.functions);
        let fua_flag = |fua: bool| if fua { FLAG_FUA } else { 0 };
        // SAFETY: the handle lives. The buffers belong to the operation (a vector's bytes stay where they are when the vector
        // moves), which lives until the library calls `on_free`, as it does in every case; the part of the data was checked
        // by the slice. `on_extents` is not called after `on_free`.
        let result = unsafe {
            match command {
                Command::Read { offset, len, .. } => {
                    (functions.nbd_aio_pread)(raw, buffer.cast(), *len, *offset, completion, 0)
                }
                Command::Write { offset, data, part, fua } => {
                    let bytes = &(**data).as_ref()[part.clone()];
                    let flags = fua_flag(*fua);
                    (functions.nbd_aio_pwrite)(raw, bytes.as_ptr().cast(), bytes.len(), *offset, completion, flags)
                }
                Command::Zero { offset, len, keep, fua } => {
                    let flags = fua_flag(*fua) | if *keep { FLAG_NO_HOLE } else { 0 };
                    (functions.nbd_aio_zero)(raw, *len, *offset, completion, flags)
                }
                Command::Trim { offset, len, fua } => {
                    (functions.nbd_aio_trim)(raw, *len, *offset, completion, fua_flag(*fua))
                }
                Command::Flush => (functions.nbd_aio_flush)(raw, completion, 0),
                Command::Status { offset, len } => {
                    let extents = Extents { callback: Some(on_extents), user_data, free: None };
                    (functions.nbd_aio_block_status)(raw, *len, *offset, extents, completion, 0)
                }
            }
        };
        self.library.check(result).map(drop)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `nbd_create`, closed once; every operation left is given to `on_free`.
        unsafe { (self.library.functions.nbd_close)(self.raw.as_ptr()) };
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}
