//! A run's reports: progress on the terminal, `log.txt`, `metrics.jsonl` and the closing summary.
//!
//! Everything here goes to stderr or to files; stdout is for data. A line has the same text on the terminal
//! and in the log. `metrics.jsonl` is for machines.

#![forbid(unsafe_code)]

pub mod format;
mod lines;
mod log;
mod metrics;
mod progress;
mod summary;
mod table;

pub use lines::{EvalLine, GpuLine, RewindLine, Scores, SpikeLine, StepLine};
pub use log::Log;
pub use metrics::MetricsFile;
pub use progress::Progress;
pub use summary::Summary;
pub use table::table;
