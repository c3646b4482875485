//! Dirty tracking: which granules of the target may differ from the source.
//!
//! - [`map`]: the dirty map of one volume, shared by the guest's threads and the copiers;
//! - [`claim`]: granules in a copier's hands;
//! - [`hold`]: bytes that a synchronous guest write keeps to itself;
//! - [`intent`]: the durable, coarse shadow of the map, which a power cut leaves true;
//! - `bits`, `blocks`, `heat` and `busy`: what the map is made of.
mod bits;
mod blocks;
mod busy;
pub mod claim;
mod heat;
pub mod hold;
pub mod intent;
pub mod map;

pub use claim::Claim;
pub use hold::Hold;
pub use intent::{Clearing, IntentLog};
pub use map::{DirtyMap, Wake};

#[cfg(all(test, not(shuttle)))]
mod block_tests;
#[cfg(all(test, shuttle))]
mod shuttle_tests;
#[cfg(all(test, not(shuttle)))]
mod tests;
