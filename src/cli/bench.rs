//! `vitrum bench`: how fast a model trains or infers on this machine.

use super::{On, Settings, numbers, print, print_json};
use crate::bench::step::{self, StepBench};
use crate::bench::{data as pipeline, kernels};
use crate::data::{Dataset, Split};
use crate::error::{Error, Result};
use crate::recipe::{Recipe, ScheduleKind};

/// What to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// Forward, backward, clip and update
    Train,
    /// Forward only
    Infer,
    /// The input pipeline, stage by stage
    Data,
    /// Single operations of a GPU, compared with its copy and product rates
    Kernels,
}

#[derive(clap::Args)]
#[command(after_help = "If the head reads only the class token, the last block computes only that token: \
                        `--set train.prune_last_block=false` times the whole block.\n\n\
                        `mpirun -n N vitrum bench --what train` times a step of N ranks, which share the batch, and \
                        compares it with the same step of each rank by itself.")]
pub struct Args {
    /// The model's variant
    #[arg(long, value_name = "NAME/PATCH", default_value = "Ti/16")]
    pub model: String,
    /// Samples per step, of all ranks together
    #[arg(long, value_name = "N", value_parser = numbers::whole::<u32>(1..=u32::MAX.into()))]
    pub batch: Option<u32>,
    /// What to time: train, infer, data or kernels
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = What::Train)]
    pub what: What,
    /// Include the loader of this data set in the timing; for `--what data`: a data set or `demo`
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
    /// How many rounds to time; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = numbers::whole::<u32>(1..=u32::MAX.into()))]
    pub rounds: u32,
    /// Minimum seconds of one round [default: 3; 0.05 for kernels]
    #[arg(long, value_name = "S", value_parser = numbers::real(0.0..=f64::MAX))]
    pub seconds: Option<f64>,
    /// For `--what data`: the GPU to feed
    #[arg(long, value_name = "NAME", value_enum, default_value_t = pipeline::GpuModel::H200)]
    pub card: pipeline::GpuModel,
    /// Show the time of each operation
    #[arg(long)]
    pub profile: bool,
    /// For `--what kernels`: only operations whose line contains this text
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// For `--what kernels`: run small sizes once each, to see which kernels are launched
    #[arg(long)]
    pub few: bool,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Train | What::Infer => {}
        What::Data => return time_data(&args),
        What::Kernels => return time_kernels(&args),
    }
    let recipe = recipe(&args)?;
    let options = StepBench {
        train: args.what == What::Train,
        device: args.on.device,
        rounds: args.rounds as usize,
        seconds: args.seconds.unwrap_or(3.0),
        profile: args.profile,
        data: args.data.clone(),
    };
    let Some(measured) = step::run(&recipe, &args.model, &options)? else { return Ok(()) };
    if args.json { print_json(&measured.json()) } else { print(&measured.text()) }
}

fn time_data(args: &Args) -> Result<()> {
    let recipe = recipe(args)?;
    let options = pipeline::DataBench {
        data: args.data.clone().unwrap_or_else(|| "demo".into()),
        rounds: args.rounds as usize,
        seconds: args.seconds.unwrap_or(3.0),
        card: args.card,
    };
    let measured = pipeline::run(&recipe, &args.model, &options)?;
    if args.json { print_json(&measured.json()) } else { print(&measured.text()) }
}

fn time_kernels(args: &Args) -> Result<()> {
    let gpu = args.on.device.gpu().ok_or_else(|| {
        Error::usage("`bench --what kernels` times a GPU's kernels")
            .hint("`cargo bench -p vitrum-benches --bench kernels` times those of the CPU")
    })?;
    let options = kernels::KernelBench {
        gpu,
        filter: args.filter.clone(),
        few: args.few,
        rounds: args.rounds as usize,
        seconds: args.seconds.unwrap_or(0.05),
    };
    let measured = kernels::run(&options)?;
    if args.json { print_json(&measured.json()) } else { print(&measured.text()) }
}

/// The recipe to time. Loss and optimiser are those of `peers_cpu.py`, so that the figures can be compared.
fn recipe(args: &Args) -> Result<Recipe> {
    let mut recipe = Recipe::default();
    recipe.model.variant = Some(args.model.clone());
    recipe.model.classes = Some(1000);
    recipe.train.batch = args.batch.map_or(16, |n| n as usize);
    recipe.train.steps = Some(1_000_000);
    recipe.loss.label_smoothing = 0.1;
    recipe.optim.weight_decay = 0.05;
    recipe.schedule.kind = ScheduleKind::Constant;
    // `--what data` takes the demo where nothing is named.
    if let Some(data) = args.data.as_deref().or((args.what == What::Data).then_some("demo")) {
        recipe.model.classes = Some(Dataset::open(data, Split::Train)?.classes().len());
    }
    let recipe = recipe.with(&args.settings.set)?;
    recipe.validate()?;
    Ok(recipe)
}
