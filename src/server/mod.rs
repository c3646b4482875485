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
mod elsewhere;
mod heartbeat;
mod jobs;
mod ledger;
mod mirrors;
mod opening;
mod pairing;
mod parking;
mod phases;
mod plan;
mod run;
mod scope;
#[cfg(all(test, shuttle))]
pub(crate) mod simulated;
mod target;
#[cfg(all(test, not(shuttle)))]
mod tests;
mod unfinished;

pub use run::main;
