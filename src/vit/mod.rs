//! The model, written once, over any backend.
pub mod config;
pub mod params;
