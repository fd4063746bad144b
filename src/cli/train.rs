//! `vitrum train`: from a recipe to a trained model.

use std::path::PathBuf;

use super::flags::{Everyday, program, wanted_out};
use super::{On, Settings};
use crate::error::{Error, Result};
use crate::recipe::{Metric, Recipe, RecipeFile};
use crate::report::{Log, Summary, format};
use crate::train;
use crate::train::finetune;
use crate::train::run::{Ending, RunOptions, RunSummary, default_out};

#[derive(clap::Args)]
#[command(after_help = super::built_in_help())]
pub struct Args {
    /// A built-in recipe or a .toml file [default: demo]
    pub recipe: Option<String>,
    /// Pictures to train on, `demo`, or DIR with `train/` and `val/` inside: `--set data.train=DIR`
    #[arg(long, value_name = "DIR")]
    pub data: Option<String>,
    #[command(flatten)]
    pub everyday: Everyday,
    /// Run once for each value, and say which was best; for several keys, a grid
    #[arg(long, value_name = "KEY=V1,V2", conflicts_with_all = ["overfit", "dry_run"])]
    pub sweep: Vec<String>,
    #[command(flatten)]
    pub settings: Settings,
    /// The run's directory; of a sweep, the folder of its runs [default: runs/RECIPE-DATE]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue the run in DIR by its own recipe; without DIR, the run or the sweep in --out
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    pub resume: Option<Option<PathBuf>>,
    /// Check that N samples can be learned by heart: no augmentation, loss below 0.01 within 300 steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub overfit: Option<u64>,
    /// Show the recipe in full and what it would take; train nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub on: On,
    /// Of a sweep, print one JSON object instead of the table
    #[arg(long, requires = "sweep")]
    pub json: bool,
}

/// A run's own recipe, in its directory.
const OWN: &str = "recipe.toml";

/// Where a run is, or will be.
pub(super) struct Place {
    out: Option<PathBuf>,
    pub(super) resume: bool,
}

impl Place {
    /// From `--out` and `--resume [DIR]`. A run that goes on without a recipe does so by its own.
    pub(super) fn find(
        recipe: &mut Option<String>,
        out: Option<PathBuf>,
        resume: Option<Option<PathBuf>>,
    ) -> Result<Self> {
        let (dir, out) = match (resume, out) {
            (None, out) => return Ok(Self { out, resume: false }),
            (Some(None), None) => {
                return Err(Error::usage("`--resume` without a run to continue")
                    .hint("name its directory, as in `vitrum train --resume runs/NAME`"));
            }
            // A sweep, and a run that was stopped before it began, have no recipe of their own.
            (Some(None), Some(out)) if !out.join(OWN).is_file() => {
                return Ok(Self { out: Some(out), resume: true });
            }
            (Some(None), Some(out)) => (out.clone(), out),
            (Some(Some(dir)), None) => (dir.clone(), dir),
            (Some(Some(dir)), Some(out)) => (dir, out),
        };
        if dir != out && recipe.is_none() && !dir.join(OWN).is_file() {
            // `--resume RECIPE --out DIR`: a flag, and what follows it.
            *recipe = Some(dir.display().to_string());
        } else if dir != out {
            return Err(Error::usage(format!(
                "`--resume {}` and `--out {}` name two directories",
                dir.display(),
                out.display()
            ))
            .hint("leave out one of them"));
        } else if recipe.is_none() {
            let own = out.join(OWN);
            if !own.is_file() {
                return Err(Error::new(format!(
                    "{}: no run to continue: no `recipe.toml` in it",
                    out.display()
                ))
                .hint("name the directory of a run, or give its recipe as well"));
            }
            *recipe = Some(own.display().to_string());
        }
        Ok(Self { out: Some(out), resume: true })
    }

    /// The directory: where neither it nor the run is named, a new one.
    pub(super) fn out(&self, loaded: &RecipeFile) -> Result<PathBuf> {
        let wanted = wanted_out(self.out.clone(), &loaded.recipe.train)?;
        Ok(wanted.unwrap_or_else(|| default_out(&loaded.name)))
    }

    /// Nobody has named it.
    pub(super) fn is_new(&self, loaded: &RecipeFile) -> bool {
        self.out.is_none() && loaded.recipe.train.name.is_none()
    }
}

pub fn run(mut args: Args) -> Result<()> {
    let place = Place::find(&mut args.recipe, args.out.take(), args.resume.take())?;
    let data = args.data.iter().map(|data| format!("data.train={data}"));
    let set: Vec<String> = data.chain(args.everyday.settings()).chain(args.settings.set).collect();
    let loaded = Recipe::read(args.recipe.as_deref(), &set)?;
    let log = Log::stderr();
    loaded.notes.iter().for_each(|note| log.line(&format!("note: {note}")));
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
        let name = args.recipe.as_deref().unwrap_or("demo");
        return super::finetune::sweep_over(&args.sweep, name, &set, &options, args.json);
    }
    let data = loaded.recipe.data.val.clone().or(loaded.recipe.data.train.clone());
    let run = match loaded.recipe.finetune {
        Some(_) => finetune::run(&loaded, &options)?,
        None => train::train(loaded.recipe, &options)?,
    };
    summarise(&run, data.as_deref()).print(&log);
    Ok(())
}

/// What came of a run, where it is, and what to type next.
pub(super) fn summarise(run: &RunSummary, data: Option<&str>) -> Summary {
    let how = match run.ending {
        Ending::Finished => "trained",
        Ending::EarlyStop => "stopped early, after",
        Ending::Learned => "learned by heart in",
    };
    let mut summary = Summary::new(format!("{how} {} steps in {}", run.steps, format::seconds(run.seconds)));
    let on = if run.has_val { "validation" } else { "training images" };
    if let Some(last) = &run.last {
        let (share, of) = last.map.map_or((last.top1, "top-1"), |map| (map, "mAP"));
        let text = format!("{} {of}, loss {:.4}, {} images", format::percent(share), last.loss, last.count);
        summary = summary.fact(on, text);
    }
    if let Some((step, metric)) = run.best {
        let best = match run.metric {
            Metric::Top1 => format!("{} top-1", format::percent(metric)),
            Metric::Loss => format!("loss {:.4}", -metric),
            Metric::Map => format!("{} mAP", format::percent(metric)),
        };
        summary =
            summary.fact("best", format!("{best} at step {step}: {}/checkpoints/best", run.out.display()));
    }
    let out = run.out.display().to_string();
    summary = summary
        .fact("weights", format!("{out}/checkpoints/last/model.safetensors (timm's names)"))
        .fact("curves", format!("{out}/metrics.jsonl"))
        .fact("recipe", format!("{out}/recipe.toml"));
    let vitrum = program();
    // A part that was held out has no name that could be given to `eval`.
    if let Some(data) = data.filter(|_| run.has_val && !run.held_out) {
        summary = summary.next("measure it", format!("{vitrum} eval --weights {out} --data {data}"));
    }
    let picture = run.samples.first().map_or("IMAGE...".into(), |file| file.display().to_string());
    summary
        .next("ask it", format!("{vitrum} predict --weights {out} {picture}"))
        .next("look inside", format!("{vitrum} inspect {out}"))
}
