//! A simulated machine on which servers live and die, thousands of times: the rules of the crate under every failure that a seed
//! thinks of.
//!
//! Everything runs as in production, from the server's start (`server::run::prepare`) to the bits of the dirty map; what is simulated
//! lies beneath: images, the state directory, the intent log's file, extended attributes, and time. Shuttle's scheduler gives each
//! step to one task, as the seed wants it.
//!
//! ```text
//!   operator: lives, ends, faults     guests: write, flush, read, hold us to it
//!        │                                 │
//!   [server] real ── [volume] ── [dirty] ── [mirror] ── [state] real
//!        │              │            │                    │
//!   image: Image     schedule      state: log file      attributes, record's file        <- here
//!        └────────── host: disks and files behind caches that forget ── checks ──┘
//! ```
//!
//! - [`schedule`]: who goes on; [`story`] and [`operations`]: what happens; [`guest`] and [`oracle`]: what was promised; [`checks`]: the rules;
//! - [`host`], [`disk`], [`files`], [`volatile`]: the machine; [`image`], [`state`], [`attributes`]: how the real code reaches it.
//!
//! After most changes it is asked what a power cut, or the death of the server, would leave *at this instant*: all that it could
//! leave, not one throw of the dice. `LIVEMIRROR_SEED=N` plays one seed and tells what happens; `LIVEMIRROR_LONG=1` plays thousands.

pub(crate) mod attributes;
mod checks;
mod dice;
mod disk;
mod files;
mod guest;
mod host;
pub(crate) mod image;
mod operations;
mod oracle;
mod schedule;
pub(crate) mod state;
mod story;
mod tests;
mod volatile;

/// A random id: of the seed's.
pub(crate) fn random_id() -> String {
    host::host(|host| format!("{:016x}{:016x}", host.dice.next(), host.dice.next()))
}
