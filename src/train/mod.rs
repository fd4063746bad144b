//! The training loop: the trainer's story, evaluation, checkpoints, early stopping.

#![forbid(unsafe_code)]

pub mod batch_file;
pub mod bench;
pub mod bench_data;
pub mod build;
pub mod checkpoint;
pub mod evaluate;
pub mod loaded;
pub mod plan;
pub mod replay;
pub mod run;
pub mod signals;
pub mod trainer;

pub use evaluate::{EvalReport, evaluate};
pub use run::{RunOptions, RunSummary};
pub use trainer::{Trainer, train};
