//! Lengths of time in a run: steps, epochs, examples or percent.
use serde::{Deserialize, Serialize};

/// `500`, `"5 epochs"`, `"100000 examples"`, `"10%"`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Duration {
    Steps(u64),
    Epochs(f64),
    Examples(u64),
    /// Of the run.
    Percent(f64),
}
