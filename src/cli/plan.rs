//! `vitrum plan`: calculates a recipe's memory, FLOPs and steps without running it.

use super::{On, Settings};
use crate::backend::Device;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::terminal;
use crate::train::plan::Plan;

#[derive(clap::Args)]
#[command(after_help = super::recipes::names_help())]
pub struct Args {
    /// A built-in recipe or a .toml file [default: demo]
    pub recipe: Option<String>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let loaded = Recipe::read(args.recipe.as_deref(), &args.settings.set)?;
    loaded.notes.iter().for_each(|note| terminal::note(note));
    show(&loaded.recipe, &loaded.name, args.on.device, args.json)
}

/// Prints the plan and the full recipe. Opens the data set if it exists; runs nothing.
pub fn show(recipe: &Recipe, name: &str, device: Device, json: bool) -> Result<()> {
    let plan = Plan::of(recipe, device)?;
    if json {
        return super::print_json(&plan.json(name));
    }
    super::print(&plan.text(name))
}
