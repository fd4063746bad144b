//! A run's reports: progress on the terminal, `log.txt`, `metrics.jsonl`, the page `report.html`, TensorBoard's event
//! files and the closing summary.
//!
//! Everything here goes to stderr or to files; stdout is for data. A line has the same text on the terminal
//! and in the log. `metrics.jsonl` is for machines.

#![forbid(unsafe_code)]

mod details;
pub mod format;
mod history;
mod lines;
mod log;
mod metrics;
mod page;
mod progress;
mod summary;
mod table;
mod tensorboard;

pub use details::{Bin, Confused, Details, Png, Wrong};
pub use lines::{EvalLine, GpuLine, RewindLine, Scores, SpikeLine, StepLine};
pub use log::Log;
pub use metrics::MetricsFile;
pub use page::{RunPage, comparison, runs_in};
pub use progress::Progress;
pub use summary::Summary;
pub use table::table;
pub use tensorboard::{EventFile, Hparam};
