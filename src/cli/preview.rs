//! `vitrum preview`: draws a contact sheet of augmented samples, to look at before training.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Settings, numbers};
use crate::backend::batch::PlainMemory;
use crate::backend::{Normalise, Pixels, Slot, SlotLayout, TargetKind};
use crate::data::{Loader, LoaderSpec, Mode, pair, sheet};
use crate::error::{Error, Result};
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
    let classes = dataset.classes().to_vec();
    let samples = args.samples as usize;
    let layout = SlotLayout {
        samples,
        image: (recipe.model.image.height, recipe.model.image.width),
        pixels: Pixels::U8,
        targets: match dataset.is_multi_label() {
            true => TargetKind::Dense { classes: classes.len() },
            false => TargetKind::Labels,
        },
    };
    let slot = Slot::new(Box::new(PlainMemory::new(layout.bytes())?), layout);
    let spec = LoaderSpec {
        batch: samples,
        image: layout.image,
        mode: Mode::Train { augment: recipe.augment, seed: recipe.train.seed },
        start_batch: args.batch,
        workers: recipe.data.workers,
        on_bad_record: recipe.data.on_bad_record,
        exif: recipe.data.exif,
    };
    let mut loader = Loader::new(Arc::new(dataset), spec, vec![slot]);
    let slot = loader.next()?.ok_or_else(|| Error::new("the data set gave no batch"))?;
    let picture = sheet::draw(&slot, &classes, Normalise::INCEPTION, COLUMNS.min(samples));
    let png = crate::data::encode_png(picture.view())?;
    files::write_atomic(&args.out, |out| out.write_all(&png))?;
    terminal::say(&format!("{} samples of {} classes: {}", slot.count, classes.len(), args.out.display()));
    Ok(())
}
