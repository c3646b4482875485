//! The library as it is loaded: its functions by name, and its words for what failed.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library as Loaded;

/// The library's file, by its stable name.
pub const FILE: &str = "libnbd.so.0";

/// What a handle is to libnbd.
#[repr(C)]
pub(super) struct Opaque {
    _private: [u8; 0],
}

pub(super) type Raw = *mut Opaque;

/// `nbd_completion_callback`.
#[repr(C)]
pub(super) struct Completion {
    pub(super) callback: Option<unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int>,
    pub(super) user_data: *mut c_void,
    pub(super) free: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// `nbd_extent_callback`.
#[repr(C)]
pub(super) struct Extents {
    pub(super) callback:
        Option<unsafe extern "C" fn(*mut c_void, *const c_char, u64, *mut u32, usize, *mut c_int) -> c_int>,
    pub(super) user_data: *mut c_void,
    pub(super) free: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// Declares the table of functions and how it is filled: each by its name, with its type from libnbd.h.
macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty;)*) => {
        pub(super) struct Functions { $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)* }

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
    pub(super) functions: Functions,
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
    pub(super) fn refusal(&self) -> Refusal {
        // SAFETY: both may be called at any time; the text belongs to this thread and is copied before the next call.
        let (text, errno) = unsafe { ((self.functions.nbd_get_error)(), (self.functions.nbd_get_errno)()) };
        if text.is_null() {
            return Refusal { text: "libnbd does not say why".to_owned(), errno };
        }
        // SAFETY: it is not null, and libnbd ends its messages with NUL.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        Refusal { text, errno }
    }

    pub(super) fn check(&self, result: impl Into<i64>) -> Result<i64, Refusal> {
        match result.into() {
            -1 => Err(self.refusal()),
            result => Ok(result),
        }
    }
}
