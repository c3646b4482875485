//! The control socket: QMP, as QEMU speaks it, and the client that the command line uses.
pub mod backend;
