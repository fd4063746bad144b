//! `224` or `"224x160"`.
use serde::{Deserialize, Serialize};

/// Height and width in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub height: usize,
    pub width: usize,
}

impl Size {
    pub const fn square(side: usize) -> Self {
        Self { height: side, width: side }
    }
}
