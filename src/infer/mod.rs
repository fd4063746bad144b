//! A trained model at work: loaded from a file, run over a data set, scored, and probed for what its features are worth.

#![forbid(unsafe_code)]

pub mod loaded;
pub mod pass;
pub mod probe;
pub mod ridge;
pub mod score;

pub use loaded::LoadedModel;
