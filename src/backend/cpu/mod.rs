//! The CPU backend (being written).
pub mod compute;
pub mod view;
