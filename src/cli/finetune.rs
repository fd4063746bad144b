//! `vitrum finetune`: trains an existing model on other pictures; with `--sweep`, a grid of such runs.

use std::path::PathBuf;

use clap::ValueEnum;

use super::flags::Everyday;
use super::runs::{self, Place};
use super::{On, Settings};
use crate::dist::Launch;
use crate::error::Result;
use crate::recipe::{HeadPolicy, Recipe};
use crate::report::Log;
use crate::train::run::{RunData, RunOptions};
use crate::train::{finetune, finetune::Start};

#[derive(clap::Args)]
#[command(after_help = super::recipes::names_help())]
pub struct Args {
    /// A built-in recipe or a .toml file [default: finetune, which takes the model from the weights file]
    pub recipe: Option<String>,
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: Option<String>,
    /// Pictures to train on: a packed data set, an image folder, or `demo`; a validation part inside is used
    /// too
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
    #[command(flatten)]
    pub everyday: Everyday,
    /// The classifier: auto keeps it if the classes match, reset always makes a new one, keep always keeps it
    #[arg(long, value_enum, hide_possible_values = true)]
    pub head: Option<HeadPolicy>,
    /// Train once per value and report the best; several keys make a grid
    #[arg(long, value_name = "KEY=V1,V2")]
    pub sweep: Vec<String>,
    #[command(flatten)]
    pub settings: Settings,
    /// The run's directory; for a sweep, the folder of its runs [default: runs/RECIPE-DATE]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue the run in DIR with its own recipe; without DIR, continue the run or the sweep in --out
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    pub resume: Option<Option<PathBuf>>,
    /// Load the weights, show the full recipe, its memory and its FLOPs; do not train
    #[arg(long, conflicts_with = "sweep")]
    pub dry_run: bool,
    #[command(flatten)]
    pub on: On,
    /// For a sweep: print one JSON object instead of the table
    #[arg(long, requires = "sweep")]
    pub json: bool,
}

pub fn run(mut args: Args) -> Result<()> {
    let place = Place::find(&mut args.recipe, args.out.take(), args.resume.take())?;
    let set = settings(&args);
    let name = args.recipe.as_deref().unwrap_or("finetune");
    let loaded = Recipe::read(Some(name), &set)?;
    let log = Log::stderr();
    loaded.notes.iter().for_each(|note| log.line(&format!("note: {note}")));
    let options = RunOptions {
        out: place.out(&loaded)?,
        numbered: place.is_new(&loaded),
        recipe_name: loaded.name.clone(),
        resume: place.resume,
        overfit: None,
        device: args.on.device,
        notes: Vec::new(),
    };
    if args.dry_run || !args.sweep.is_empty() {
        Launch::from_env()?.alone(if args.dry_run { "`--dry-run`" } else { "`--sweep`" })?;
    }
    if args.dry_run {
        let data = RunData::open(&loaded.recipe, &options)?;
        let start = Start::load(&loaded, &data)?;
        start.header(&loaded, &data)?.iter().for_each(|line| log.line(line));
        return super::plan::show(&start.complete(&loaded, &data)?, &loaded.name, args.on.device, false);
    }
    if args.sweep.is_empty() {
        let data = loaded.recipe.data.val.clone().or(loaded.recipe.data.train.clone());
        runs::summarise(&finetune::run(&loaded, &options)?, data.as_deref()).print(&log);
        return Ok(());
    }
    if loaded.recipe.finetune.is_none() {
        return Err(finetune::names_none(&loaded));
    }
    runs::refuse_run(&options)?;
    runs::sweep_over(&args.sweep, name, &set, &options, args.json)
}

/// The flags as settings of the recipe. `--set` comes last and wins.
fn settings(args: &Args) -> Vec<String> {
    let head = args.head.and_then(|head| Some(head.to_possible_value()?.get_name().to_string()));
    let flags = [("finetune.weights", &args.weights), ("data.train", &args.data), ("finetune.head", &head)];
    let of_flags = flags.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value.as_ref()?)));
    of_flags.chain(args.everyday.settings()).chain(args.settings.set.iter().cloned()).collect()
}
