//! `vitrum train`: from a recipe to a trained model.

use std::path::PathBuf;

use super::{On, Settings, not_built};
use crate::error::Result;
use crate::recipe::Recipe;

#[derive(clap::Args)]
#[command(after_help = super::built_in_help())]
pub struct Args {
    /// A built-in recipe or a .toml file
    #[arg(default_value = "demo")]
    pub recipe: String,
    #[command(flatten)]
    pub settings: Settings,
    /// The run's directory [default: runs/RECIPE-DATE]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue the run in --out from its last checkpoint
    #[arg(long, requires = "out")]
    pub resume: bool,
    /// Check that N samples can be learned by heart: no augmentation, loss below 0.01 within 300 steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub overfit: Option<u64>,
    /// Show the recipe in full and what it would take; train nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub on: On,
}

pub fn run(args: Args) -> Result<()> {
    Recipe::load(Some(&args.recipe), &args.settings.set)?;
    Err(not_built("vitrum train"))
}
