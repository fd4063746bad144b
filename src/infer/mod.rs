//! Inference: loads a trained model, runs it over a data set, scores it, and probes its features.

#![forbid(unsafe_code)]

pub mod loaded;
pub mod pass;
pub mod probe;
pub mod protocol;
pub mod ridge;
pub mod score;

pub use loaded::LoadedModel;
