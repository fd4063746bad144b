//! `vitrum plan`: what a recipe will take, worked out without running it.

use super::{Settings, not_built};
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
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    Recipe::load(Some(&args.recipe), &args.settings.set)?;
    Err(not_built("vitrum plan"))
}
