//! `vitrum convert`: weights from one layout to another. Values stay bit-identical, or the command fails.

use std::path::PathBuf;

use super::Settings;
use crate::error::Result;
use crate::terminal;
use crate::weights::{self, Format};

#[derive(clap::Args)]
pub struct Args {
    /// A weights file of any known layout, a HuggingFace folder, a checkpoint or a run directory
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// The file to write; with `--to hf` the folder to write
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// The layout to write [default: by OUT's extension: `.npz`, else safetensors]
    #[arg(long, value_enum)]
    pub to: Option<Format>,
    #[command(flatten)]
    pub settings: Settings,
}

pub fn run(args: Args) -> Result<()> {
    let overrides = args.settings.model_overrides()?;
    let (layout, notes) = weights::convert(&args.input, &args.output, args.to, &overrides)?;
    notes.iter().for_each(|note| terminal::warn(note));
    terminal::say(&format!("{} ({}) -> {}", args.input.display(), layout.name(), args.output.display()));
    Ok(())
}
