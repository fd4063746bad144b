//! `vitrum plan`: calculates a recipe's memory, FLOPs and steps without running it.

use std::path::PathBuf;

use super::{On, Settings};
use crate::backend::Device;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::terminal;
use crate::train::plan::Plan;
use crate::train::scaling::{self, ScalePlan, Source};

#[derive(clap::Args)]
#[command(after_help = super::recipes::names_help())]
pub struct Args {
    /// A built-in recipe or a .toml file [default: demo]
    pub recipe: Option<String>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Predict the run on N GPUs: step, communication, memory of each, loader, time to train; with `--device
    /// cpu` on N ranks
    #[arg(long, visible_alias = "ranks", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=scaling::MOST as i64))]
    pub gpus: Option<u32>,
    /// GPUs of a node
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub per_node: u32,
    /// Links inside a node and between nodes: nvlink, pcie, shm; ib800, ib400, ib200, ib100, eth100; or one with
    /// its rate in GB/s, as in `ib400=40` [default: nvlink,ib400]
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "gpus")]
    pub link: Vec<String>,
    /// The GPU: h100, h200, a100 or b200
    #[arg(long, value_name = "NAME", default_value = "h100")]
    pub gpu: String,
    /// Measured images per second of one GPU with its part of the batch, instead of a prediction
    #[arg(long, value_name = "N", requires = "gpus", conflicts_with = "measured")]
    pub img_per_s: Option<f64>,
    /// The same from a file: what `bench --what train --json` printed on one GPU
    #[arg(long, value_name = "FILE", requires = "gpus")]
    pub measured: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let loaded = Recipe::read(args.recipe.as_deref(), &args.settings.set)?;
    loaded.notes.iter().for_each(|note| terminal::note(note));
    if let Some(ranks) = args.gpus {
        let on_cpu = args.on.device == Device::Cpu;
        let variant = loaded.recipe.model.variant.as_deref();
        let source = match (args.img_per_s, &args.measured) {
            (Some(rate), _) => Source::given(rate)?,
            (None, Some(file)) => Source::read(file, variant, on_cpu)?,
            (None, None) => Source::Predicted,
        };
        let options = scaling::Options {
            ranks: ranks as usize,
            per_node: args.per_node as usize,
            links: args.link,
            gpu: (!on_cpu).then_some(args.gpu.to_ascii_lowercase()),
            source,
        };
        let plan = ScalePlan::of(&loaded.recipe, &options)?;
        return match args.json {
            true => super::print_json(&plan.json(&loaded.name)),
            false => super::print(&plan.text(&loaded.name)),
        };
    }
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
