//! The server: the process that answers FUSE requests and runs the mirrors of one mount.
pub mod config;
