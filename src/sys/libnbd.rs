//! The C library libnbd, loaded when the first NBD image is opened: nothing is needed of it to build or to serve other images.
//!
//! Its interface is stable: symbols of version 1.10 and later are used, looked up by name.
//!
//! ```text
//! Library ── create ──> Handle: one connection, used by one thread at a time
//!                          └─ command ──> Operation (on the heap): keeps the buffers until the library lets go of them,
//!                                         then sends itself through the channel that the handle was made with
//! ```
//!
//! The library calls the `free` function of a command exactly once, when it will touch nothing of the command any more: after the
//! answer, when the connection is closed, or when the command was refused. Only there are buffers given back.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use libloading::Library as Loaded;

/// The library's file, by its stable name.
pub const FILE: &str = "libnbd.so.0";

/// What a handle is to libnbd.
#[repr(C)]
struct Opaque {
    _private: [u8; 0],
}

type Raw = *mut Opaque;

/// `nbd_completion_callback`.
#[repr(C)]
struct Completion {
    callback: Option<unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int>,
    user_data: *mut c_void,
    free: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// `nbd_extent_callback`.
#[repr(C)]
struct Extents {
    callback: Option<unsafe extern "C" fn(*mut c_void, *const c_char, u64, *mut u32, usize, *mut c_int) -> c_int>,
    user_data: *mut c_void,
    free: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// Declares the table of functions and how it is filled: each by its name, with its type from libnbd.h.
macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty;)*) => {
        struct Functions { $($name: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Functions {
            fn find(library: &Loaded) -> Result<Self, String> {
                Ok(Functions { $(
                    // SAFETY: the type is the one that libnbd.h has for this name, and the library is never unloaded.
                    $name: unsafe { *library.get(concat!(stringify!($name), "\0").as_bytes()).map_err(|error| error.to_string())? },
                )* })
            }
        }
    };
}

functions! {
    nbd_create: fn() -> Raw;
    nbd_close: fn(Raw) -> ();
    nbd_get_error: fn() -> *const c_char;
    nbd_get_errno: fn() -> c_int;
    nbd_add_meta_context: fn(Raw, *const c_char) -> c_int;
    nbd_set_uri_allow_local_file: fn(Raw, bool) -> c_int;
    nbd_set_strict_mode: fn(Raw, u32) -> c_int;
    nbd_aio_connect_uri: fn(Raw, *const c_char) -> c_int;
    nbd_get_size: fn(Raw) -> i64;
    nbd_get_block_size: fn(Raw, c_int) -> i64;
    nbd_is_read_only: fn(Raw) -> c_int;
    nbd_can_flush: fn(Raw) -> c_int;
    nbd_can_fua: fn(Raw) -> c_int;
    nbd_can_zero: fn(Raw) -> c_int;
    nbd_can_trim: fn(Raw) -> c_int;
    nbd_can_multi_conn: fn(Raw) -> c_int;
    nbd_can_meta_context: fn(Raw, *const c_char) -> c_int;
    nbd_aio_get_fd: fn(Raw) -> c_int;
    nbd_aio_get_direction: fn(Raw) -> c_uint;
    nbd_aio_notify_read: fn(Raw) -> c_int;
    nbd_aio_notify_write: fn(Raw) -> c_int;
    nbd_aio_is_ready: fn(Raw) -> c_int;
    nbd_aio_is_dead: fn(Raw) -> c_int;
    nbd_aio_is_closed: fn(Raw) -> c_int;
    nbd_aio_disconnect: fn(Raw, u32) -> c_int;
    nbd_aio_pread: fn(Raw, *mut c_void, usize, u64, Completion, u32) -> i64;
    nbd_aio_pwrite: fn(Raw, *const c_void, usize, u64, Completion, u32) -> i64;
    nbd_aio_zero: fn(Raw, u64, u64, Completion, u32) -> i64;
    nbd_aio_trim: fn(Raw, u64, u64, Completion, u32) -> i64;
    nbd_aio_flush: fn(Raw, Completion, u32) -> i64;
    nbd_aio_block_status: fn(Raw, u64, u64, Extents, Completion, u32) -> i64;
}

/// `base:allocation`, the context of block status that is asked for.
pub const ALLOCATION: &CStr = c"base:allocation";
/// In an extent's flags: not allocated.
pub const STATE_HOLE: u32 = 1;
/// In an extent's flags: reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// What the library checks before it sends: all but the alignment, which the last bytes of an export of odd size do not have. There
/// the server has the last word.
const STRICT: u32 = 0x0F;

const FLAG_FUA: u32 = 1;
const FLAG_NO_HOLE: u32 = 2;

/// Why libnbd refused something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its own words.
    pub text: String,
    /// The error number, 0 if there is none.
    pub errno: i32,
}

/// The loaded library; never unloaded.
pub struct Library {
    functions: Functions,
    _loaded: Loaded,
}

/// Loads the library once for this process.
///
/// # Errors
/// The loader's words: it is not installed, or too old.
pub fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY.get_or_init(|| Library::load(FILE)).as_ref().map_err(String::as_str)
}

impl Library {
    /// Loads the library from `file`.
    ///
    /// # Errors
    /// The loader's words.
    pub fn load(file: &str) -> Result<Self, String> {
        // SAFETY: libnbd has no initialisation that could interfere with this process; it is trusted as any library that one
        // links to.
        let loaded = unsafe { Loaded::new(file) }.map_err(|error| error.to_string())?;
        Ok(Library { functions: Functions::find(&loaded)?, _loaded: loaded })
    }

    /// The words for this thread's last failure.
    fn refusal(&self) -> Refusal {
        // SAFETY: both may be called at any time; the text belongs to this thread and is copied before the next call.
        let (text, errno) = unsafe { ((self.functions.nbd_get_error)(), (self.functions.nbd_get_errno)()) };
        if text.is_null() {
            return Refusal { text: "libnbd does not say why".to_owned(), errno };
        }
        // SAFETY: it is not null, and libnbd ends its messages with NUL.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        Refusal { text, errno }
    }

    fn check(&self, result: impl Into<i64>) -> Result<i64, Refusal> {
        match result.into() {
            -1 => Err(self.refusal()),
            result => Ok(result),
        }
    }
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
    },
    /// A part of `data`, to an offset.
    Write {
        /// Where to.
        offset: u64,
        /// Holds the bytes.
        data: Arc<Vec<u8>>,
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
    _data: Option<Arc<Vec<u8>>>,
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
            Command::Read { len, .. } => vec![0; *len],
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
                Command::Read { offset, len } => {
                    (functions.nbd_aio_pread)(raw, buffer.cast(), *len, *offset, completion, 0)
                }
                Command::Write { offset, data, part, fua } => {
                    let bytes = &data[part.clone()];
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_is_an_error_and_no_crash() {
        let error = Library::load("libnbd-that-nobody-has.so.0").err().unwrap();
        assert!(error.contains("libnbd-that-nobody-has.so.0"), "{error}");
    }

    #[test]
    fn a_library_without_the_functions_is_refused() {
        assert!(Library::load("libc.so.6").err().unwrap().contains("nbd_create"));
    }

    #[test]
    fn what_the_library_refuses_comes_back_all_the_same() {
        let Ok(library) = library() else { return eprintln!("SKIPPED: libnbd0 is not installed") };
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut handle = Handle::new(library, sender).unwrap();
        let refusal = handle.start(7, &Command::Read { offset: 0, len: 512 }).unwrap_err();
        assert!(refusal.text.contains("nbd_aio_pread"), "{refusal:?}");
        let finished = receiver.recv().unwrap();
        assert_eq!((finished.id, finished.outcome), (7, Outcome::Unanswered));
    }
}
