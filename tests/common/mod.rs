//! What the black-box tests share: a guard for mounts, self-describing blocks, loop devices, a QMP client.
//!
//! Everything here cleans up after itself, also when a test fails: mounts, processes, loop devices, files. Processes are
//! ended by pid, and only those that hold a file of the test's own directory. Nothing waits for a fixed time; what is
//! waited for has a deadline only so that a hang becomes a message ([`wait::HANG`]).
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod aligned;
pub mod block_device;
pub mod command;
pub mod compare;
pub mod database;
pub mod holder;
pub mod host;
pub mod leftovers;
pub mod mmap;
pub mod mortal;
pub mod mounted;
pub mod nbd;
pub mod page_cache;
pub mod pattern;
pub mod place;
pub mod qcow2;
pub mod qmp;
pub mod random;
pub mod remote;
pub mod service_manager;
pub mod space;
pub mod tree;
pub mod wait;
