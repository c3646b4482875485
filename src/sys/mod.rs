//! Every unsafe block of the crate, each with its SAFETY note, and the thin wrappers of system calls that no library has.

pub mod descriptor;
pub mod files;
pub mod libnbd;
pub mod populate;
pub mod process;
pub mod shared_page;
pub mod tcp;
pub mod uncached;
