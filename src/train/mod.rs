//! Training: the loop, evaluation, checkpoints, early stopping, fine-tuning, sweeps and plans.

#![forbid(unsafe_code)]

// Hidden modules are parts of [`train`] and of the command line.
#[doc(hidden)]
pub mod about;
#[doc(hidden)]
pub mod advice;
pub mod checkpoint;
#[doc(hidden)]
pub mod class_weights;
#[doc(hidden)]
pub mod directory;
pub mod evaluate;
pub mod finetune;
#[doc(hidden)]
pub mod header;
mod lease;
mod pace;
pub mod plan;
mod ranks;
pub mod report;
mod resume;
pub mod run;
pub mod run_data;
#[doc(hidden)]
pub mod samples;
#[doc(hidden)]
pub mod scaling;
pub mod setup;
mod spikes;
mod state;
pub mod sweep;
pub mod trainer;

pub use evaluate::{EvalReport, evaluate};
pub use run::{RunOptions, RunSummary};
pub use setup::{DataShape, Setup};
pub use trainer::{Trainer, train, train_from};
