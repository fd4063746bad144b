//! Training: the loop, evaluation, checkpoints, early stopping, fine-tuning, sweeps and plans.

#![forbid(unsafe_code)]

pub mod about;
pub mod advice;
pub mod checkpoint;
pub mod class_weights;
pub mod directory;
pub mod evaluate;
pub mod finetune;
pub mod header;
mod pace;
pub mod plan;
mod resume;
pub mod run;
pub mod run_data;
pub mod samples;
pub mod setup;
pub mod sweep;
pub mod trainer;

pub use evaluate::{EvalReport, evaluate};
pub use run::{RunOptions, RunSummary};
pub use setup::{DataShape, Setup};
pub use trainer::{Trainer, train, train_from};
