//! `vitrum train`: trains a model as a recipe says.

use std::path::PathBuf;

use super::flags::Everyday;
use super::runs::{self, Place, summarise};
use super::{On, Settings, numbers};
use crate::dist::Launch;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::report::Log;
use crate::train;
use crate::train::finetune;
use crate::train::run::RunOptions;

#[derive(clap::Args)]
#[command(after_help = super::recipes::names_help())]
pub struct Args {
    /// A built-in recipe or a .toml file [default: demo]
    pub recipe: Option<String>,
    /// Pictures to train on, `demo`, or DIR with `train/` and `val/` inside: `--set data.train=DIR`
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
    #[command(flatten)]
    pub everyday: Everyday,
    /// Train once per value and report the best; several keys make a grid
    #[arg(long, value_name = "KEY=V1,V2", conflicts_with_all = ["overfit", "dry_run"])]
    pub sweep: Vec<String>,
    #[command(flatten)]
    pub settings: Settings,
    /// The run's directory; for a sweep, the folder of its runs [default: runs/RECIPE-DATE]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue the run in DIR with its own recipe; without DIR, continue the run or the sweep in --out
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    pub resume: Option<Option<PathBuf>>,
    /// Check that the model can overfit N samples: no augmentation, loss below 0.01 within 300 steps
    #[arg(long, value_name = "N", value_parser = numbers::whole::<u64>(1..=u64::MAX))]
    pub overfit: Option<u64>,
    /// Show the full recipe, its memory and its FLOPs; do not train
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub on: On,
    /// For a sweep: print one JSON object instead of the table
    #[arg(long, requires = "sweep")]
    pub json: bool,
}

pub fn run(mut args: Args) -> Result<()> {
    let place = Place::find(&mut args.recipe, args.out.take(), args.resume.take())?;
    let data = args.data.iter().map(|data| format!("data.train={data}"));
    let set: Vec<String> = data.chain(args.everyday.settings()).chain(args.settings.set).collect();
    let loaded = Recipe::read(args.recipe.as_deref(), &set)?;
    let log = Log::stderr();
    loaded.notes.iter().for_each(|note| log.line(&format!("note: {note}")));
    if args.dry_run || !args.sweep.is_empty() {
        Launch::from_env()?.alone(if args.dry_run { "`--dry-run`" } else { "`--sweep`" })?;
    }
    if args.dry_run {
        return super::plan::show(&loaded.recipe, &loaded.name, args.on.device, false);
    }
    let options = RunOptions {
        out: place.out(&loaded)?,
        numbered: place.is_new(&loaded),
        recipe_name: loaded.name.clone(),
        resume: place.resume,
        overfit: args.overfit.map(|n| n as usize),
        device: args.on.device,
        notes: Vec::new(),
    };
    if !args.sweep.is_empty() {
        runs::refuse_run(&options)?;
        let name = args.recipe.as_deref().unwrap_or("demo");
        return runs::sweep_over(&args.sweep, name, &set, &options, args.json);
    }
    let data = loaded.recipe.data.val.clone().or(loaded.recipe.data.train.clone());
    let run = match loaded.recipe.finetune {
        Some(_) => finetune::run(&loaded, &options)?,
        None => train::train(loaded.recipe, &options)?,
    };
    summarise(&run, data.as_deref()).print(&log);
    Ok(())
}
