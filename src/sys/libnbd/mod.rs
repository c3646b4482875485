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

mod handle;
mod library;

use std::ffi::CStr;

pub use self::handle::{Command, Finished, Handle, Memory, Outcome, Payload};
pub use self::library::{FILE, Library, Refusal, library};

/// `base:allocation`, the context of block status that is asked for.
pub const ALLOCATION: &CStr = c"base:allocation";
/// In an extent's flags: not allocated.
pub const STATE_HOLE: u32 = 1;
/// In an extent's flags: reads as zeroes.
pub const STATE_ZERO: u32 = 2;

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

    #[derive(Debug)]
    struct Fresh;

    impl Memory for Fresh {
        fn take(&self, len: usize) -> Vec<u8> {
            vec![0; len]
        }
    }

    #[test]
    fn what_the_library_refuses_comes_back_all_the_same() {
        let Ok(library) = library() else { return eprintln!("SKIPPED: libnbd0 is not installed") };
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut handle = Handle::new(library, sender).unwrap();
        let memory = std::sync::Arc::new(Fresh);
        let refusal = handle.start(7, &Command::Read { offset: 0, len: 512, memory }).unwrap_err();
        assert!(refusal.text.contains("nbd_aio_pread"), "{refusal:?}");
        let finished = receiver.recv().unwrap();
        assert_eq!((finished.id, finished.outcome), (7, Outcome::Unanswered));
    }
}
