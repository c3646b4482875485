//! Dirty tracking: which granules of the target may differ from the source.
pub mod map;
