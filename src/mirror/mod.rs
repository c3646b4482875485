//! The mirror: drains a volume's dirty map to a target image, until the two converge and the volume can be cut over.
//!
//! ```text
//!            start (tracking on) ──> scan ──> copiers ──> supervisor: ready ──> cutover / finish ──> end
//! guest ──> volume ──> dirty map ──────────────^   ^── pace, errors
//! ```

mod clearing;
mod commit;
mod copy;
pub mod cutover;
mod end;
mod errors;
pub mod events;
mod info;
pub mod job;
pub mod pace;
mod scan;
mod scope;
mod share;
mod start;
mod states;
mod steer;
mod supervise;
pub mod types;
mod verbs;
pub mod verify;

pub use info::{describe, micros, rfc3339};
pub use start::{Resumed, Setting, default_granularity, start};

#[cfg(test)]
mod tests;
