//! The server: the process that answers FUSE requests and runs the mirrors of one mount.
//!
//! ```text
//! run ──> opening (which image each disk lives on, rule 10) ──> keeper: mount ──> session
//!   └──> backend (what the control socket may ask) ──> target, jobs ──> mirror
//!            └── ledger: the record on disk, and the cutover's one commit point (rule 15)
//! ```

mod backend;
pub mod config;
mod departure;
mod jobs;
mod ledger;
mod opening;
mod plan;
mod run;
mod target;
#[cfg(test)]
mod tests;

pub use run::main;
