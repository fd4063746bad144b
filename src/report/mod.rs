//! What a run tells: progress on the terminal, `log.txt`, `metrics.jsonl`, and the closing summary.
//!
//! Everything here goes to stderr or into files; stdout belongs to data. A line says the same thing in the terminal
//! and in the log; machines read `metrics.jsonl`.

#![forbid(unsafe_code)]

pub mod format;
mod lines;
mod log;
mod metrics;
mod progress;
mod summary;
mod table;

pub use lines::{EvalLine, Scores, StepLine};
pub use log::Log;
pub use metrics::MetricsFile;
pub use progress::Progress;
pub use summary::Summary;
pub use table::table;
