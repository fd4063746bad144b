//! The training loop: the trainer's story, evaluation, checkpoints, early stopping.

#![forbid(unsafe_code)]

pub mod about;
pub mod advice;
pub mod batch_file;
pub mod bench;
pub mod bench_data;
pub mod bench_kernels;
pub mod build;
pub mod checkpoint;
pub mod class_weights;
pub mod directory;
pub mod evaluate;
pub mod finetune;
pub mod header;
pub mod loaded;
mod pace;
pub mod pass;
pub mod plan;
pub mod probe;
pub mod proof;
pub mod replay;
mod resume;
pub mod ridge;
pub mod run;
pub mod run_data;
pub mod samples;
pub mod score;
pub mod settle;
pub mod sweep;
pub mod trainer;

pub use evaluate::{EvalReport, evaluate};
pub use run::{RunOptions, RunSummary};
pub use trainer::{Trainer, train, train_from};
