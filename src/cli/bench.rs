//! `vitrum bench`: how fast a model trains or infers on this machine.

use std::path::PathBuf;

use super::{On, Settings, not_built};
use crate::error::Result;

/// What to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// Forward, backward, clip and update
    Train,
    /// Forward only
    Infer,
    /// The input pipeline (not built yet)
    Data,
    /// Single operations (not built yet)
    Kernels,
}

#[derive(clap::Args)]
pub struct Args {
    /// The model's variant
    #[arg(long, value_name = "NAME/PATCH", default_value = "Ti/16")]
    pub model: String,
    /// Samples per step
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: Option<u32>,
    /// What to time: train, infer, data or kernels
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = What::Train)]
    pub what: What,
    /// Time the whole, with this data set's loader
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Train | What::Infer => Err(not_built("vitrum bench")),
        What::Data => Err(not_built("vitrum bench --what data").hint("use `--what train --data DIR`")),
        What::Kernels => Err(not_built("vitrum bench --what kernels").hint("use `cargo bench`")),
    }
}
