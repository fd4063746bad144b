//! Benchmarks: a training step, the input pipeline, single kernels on a GPU.

#![forbid(unsafe_code)]

pub mod data;
pub mod kernels;
pub mod step;
