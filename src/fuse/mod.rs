//! Kernel requests in, volume calls out: the only room that knows FUSE.
//!
//! ```text
//! livemirror mount --- launch ---> keeper --- link ---> server
//!                                    |                    |
//!                    mounts, keeps /dev/fuse and      session: answers requests
//!                    the parked descriptors,          from a duplicate of /dev/fuse
//!                    restarts the server
//!                           |
//!                    service manager, where there is one: keeps the same descriptors for the next keeper
//! ```
//!
//! Rules of the room:
//! - no process of ours looks at or below a mount of ours, except the short-lived check that a new disk can be used:
//!   mounts are found in `/proc/self/mountinfo` ([`mountinfo`]);
//! - the keeper does no image I/O, has no threads and waits for nothing that needs the server;
//! - a server is replaced by the same path that started the first one ([`session`]);
//! - every request is answered in the thread that read it, so that a server's end never drops a reply.

mod crew;
mod disks;
mod filesystem;
mod flights;
mod fusermount;
pub mod helpers;
pub mod holders;
pub mod init;
pub mod keeper;
pub mod keeper_link;
pub mod launch;
pub mod lingering;
pub mod link;
pub mod mount;
pub mod mountinfo;
pub mod mountpoint;
mod read_buffer;
mod server_process;
pub mod session;
mod succession;
mod waiting;

pub use disks::Disks;
pub use keeper_link::{Connection, KeeperLink, Start};
pub use session::ServingSession;

/// The file system type, as mountinfo shows it.
pub const FSTYPE: &str = "fuse.livemirror";

/// The part of it after `fuse.`.
pub(crate) const SUBTYPE: &str = "livemirror";

/// Hidden verb: the keeper. Its standard input is the link to the launcher.
pub const VERB_KEEPER: &str = "internal-keeper";
/// Hidden verb: the server. Its standard input is the link to the keeper.
pub const VERB_SERVER: &str = "internal-server";
/// Hidden verb: looks once at new disks.
pub const VERB_CHECK: &str = "internal-check";
/// Hidden verb: one umount2(2), in a process of its own because it may have to wait for the server.
pub const VERB_UNMOUNT: &str = "internal-unmount";

/// Hidden verb: the version of this program, on standard output.
pub const VERB_VERSION: &str = "internal-version";

/// Runs the hidden verbs of this room: `Some(exit code)` if `verb` is one (all but [`VERB_SERVER`], which is the server's).
pub fn run_internal_verb(verb: &str, arguments: &[std::ffi::OsString]) -> Option<u8> {
    match verb {
        VERB_KEEPER => Some(keeper::main(arguments)),
        VERB_VERSION => Some(helpers::version_main()),
        VERB_CHECK => Some(helpers::check_main(arguments)),
        VERB_UNMOUNT => Some(helpers::unmount_main(arguments)),
        _ => None,
    }
}
