//! `vitrum replay`: one update per stored batch, and the trajectory that results.

use std::path::PathBuf;

use super::{On, Settings, not_built};
use crate::error::Result;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Safetensors with `images_u8` [S,B,H,W,3] or `images`, and `labels` [S,B]
    #[arg(long, value_name = "FILE")]
    pub batches: PathBuf,
    /// Where to write `losses`, `grad_norms`, `lrs` and `final/NAME`
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
}

pub fn run(_args: Args) -> Result<()> {
    Err(not_built("vitrum replay"))
}
