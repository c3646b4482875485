//! What survives a restart.
//!
//! - [`record`] and [`store`]: which images the disks of a mount live on, replaced as a whole (rule 15);
//! - [`marks`]: what is written on the images themselves (rules 10 and 11);
//! - [`pair`] and [`pulse`]: whether an unfinished mirror may go on where it stopped (rule 11);
//! - [`runtime`]: how the command line finds a running mount;
//! - [`keeper_file`]: the keeper's lock and its word on what it does;
//! - [`paths`]: where all of it lies;
//! - `envelope` and `files`: the format, and the replacing; `attributes`: what is kept beside an image's bytes.
#[cfg(not(all(test, shuttle)))]
mod attributes;
mod envelope;
#[cfg(not(all(test, shuttle)))]
mod files;
pub mod keeper_file;
pub mod marks;
pub mod pair;
pub mod paths;
pub mod pulse;
pub mod record;
pub mod runtime;
pub mod store;
#[cfg(all(test, not(shuttle)))]
mod tests;
// What the simulation puts in their place.
#[cfg(all(test, shuttle))]
#[path = "simulated_files.rs"]
mod files;
#[cfg(all(test, shuttle))]
use crate::simulation::attributes;

#[cfg(all(test, not(shuttle)))]
pub(crate) use files::Step;
pub use marks::{Mark, Marks};
pub use pair::{Observation, PairMark, Stamp};
pub use pulse::{Counts, Pulse};
pub use record::{FormerImage, MirrorRecord, MountState, VolumeState, random_id};
pub use runtime::{RuntimeRecord, RuntimeVolume};
pub use store::{CommitError, Prepared, Store};
