//! `vitrum grad`: logits, loss and every gradient of one batch, for comparison with other implementations.

use std::path::PathBuf;

use super::{On, Settings, not_built};
use crate::backend::LossKind;
use crate::error::Result;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Safetensors with `images` [B,H,W,3] and `labels` [B] or `targets` [B,C]
    #[arg(long, value_name = "FILE")]
    pub batch: PathBuf,
    /// Where to write `logits`, `loss` and `grad/NAME`
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// softmax or sigmoid
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = LossKind::Softmax)]
    pub loss: LossKind,
    /// Targets become (1-S)·onehot + S/C
    #[arg(long, value_name = "S", default_value_t = 0.0)]
    pub label_smoothing: f32,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
}

pub fn run(_args: Args) -> Result<()> {
    Err(not_built("vitrum grad"))
}
