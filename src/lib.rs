//! Vitrum pre-trains and fine-tunes Vision Transformers as fast as the hardware allows.
//!
//! `ARCHITECTURE.md` is the map. Imports point one way: cli → (bench, check) → train → infer → (vit, optim, data,
//! weights, dist, report) → backend.

// Only `terminal` prints. `println!` elsewhere would panic if stdout is closed.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod backend;
pub mod bench;
pub mod check;
pub mod cli;
pub mod data;
pub mod dist;
pub mod error;
pub mod files;
pub mod infer;
pub mod optim;
pub mod recipe;
pub mod report;
pub mod rng;
pub mod seal;
pub mod selftest;
pub mod signals;
pub mod terminal;
pub mod train;
pub mod vit;
pub mod weights;
