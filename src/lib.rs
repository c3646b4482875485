//! livemirror: live-mirrored volumes, exposed through FUSE.

pub mod cli;
pub mod control;
pub mod dirty;
pub mod error;
pub mod fuse;
pub mod image;
pub mod mirror;
pub mod range;
pub mod server;
pub mod state;
mod sync;
pub mod sys;
pub mod volume;
