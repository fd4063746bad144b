//! Checks of whole training steps: a device against the CPU, and a trajectory against other implementations.

#![forbid(unsafe_code)]

pub mod batch_file;
pub mod replay;
pub mod steps;
