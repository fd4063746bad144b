//! `vitrum convert`: weights from one layout to another, to the bit or not at all.

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
    /// The file to write; with `--to hf` the folder
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// What to write; without it the end of OUT says: `.npz`, else safetensors
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
