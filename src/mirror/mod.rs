//! The mirror: drains a volume's dirty map to a target image.
pub mod types;
