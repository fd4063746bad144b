//! The CPU backend (being written).
pub mod compute;
pub mod update;
pub mod view;
