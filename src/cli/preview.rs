//! `vitrum preview`: draws a contact sheet of augmented samples, to look at before training.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Settings, numbers};
use crate::data::{pair, sheet};
use crate::error::Result;
use crate::files;
use crate::recipe::Recipe;
use crate::terminal;

#[derive(clap::Args)]
pub struct Args {
    /// A built-in recipe or a .toml file [default: demo]
    pub recipe: Option<String>,
    /// The data set [default: the recipe's]
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
    /// The PNG file to write
    #[arg(long, value_name = "FILE.png")]
    pub out: PathBuf,
    /// How many samples to show
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = numbers::whole::<u32>(1..=1024))]
    pub samples: u32,
    /// Which batch of the run to show; the run sees the same samples
    #[arg(long, value_name = "K", default_value_t = 0, value_parser = numbers::whole::<u64>(0..=u64::MAX))]
    pub batch: u64,
    #[command(flatten)]
    pub settings: Settings,
}

/// Tiles in a row.
const COLUMNS: usize = 8;

pub fn run(args: Args) -> Result<()> {
    let recipe = Recipe::load(args.recipe.as_deref(), &args.settings.set)?;
    let spec = args.data.as_deref().or(recipe.data.train.as_deref());
    let dataset = pair(spec, None)?.0;
    let classes = dataset.classes().len();
    let (picture, count) =
        sheet::of_run(Arc::new(dataset), &recipe, args.samples as usize, args.batch, COLUMNS)?;
    let png = crate::data::encode_png(picture.view())?;
    files::write_atomic(&args.out, |out| out.write_all(&png))?;
    terminal::say(&format!("{count} samples of {classes} classes: {}", args.out.display()));
    Ok(())
}
