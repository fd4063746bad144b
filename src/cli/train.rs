//! `vitrum train`: trains a model as a recipe says.

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
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
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

/// The file in a run directory that holds the run's recipe.
const OWN: &str = "recipe.toml";

/// The directory of a run, and whether to resume it.
pub(super) struct Place {
    out: Option<PathBuf>,
    pub(super) resume: bool,
}

impl Place {
    /// From `--out` and `--resume [DIR]`. A resumed run without a recipe argument uses its own recipe.
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
            // A sweep has no recipe of its own, and neither has a run that was stopped before it began.
            (Some(None), Some(out)) if !out.join(OWN).is_file() => {
                return Ok(Self { out: Some(out), resume: true });
            }
            (Some(None), Some(out)) => (out.clone(), out),
            (Some(Some(dir)), None) => (dir.clone(), dir),
            (Some(Some(dir)), Some(out)) => (dir, out),
        };
        if dir != out && recipe.is_none() && !dir.join(OWN).is_file() {
            // `--resume RECIPE --out DIR`: here RECIPE is the positional argument, not the value of
            // `--resume`.
            *recipe = Some(dir.display().to_string());
        } else if dir != out {
            return Err(Error::usage(format!(
                "`--resume {}` and `--out {}` name different directories",
                dir.display(),
                out.display()
            ))
            .hint("give only one of them"));
        } else if recipe.is_none() {
            let own = out.join(OWN);
            if !own.is_file() {
                return Err(Error::new(format!(
                    "{}: no run to continue: it has no `recipe.toml`",
                    out.display()
                ))
                .hint("give the directory of a run, or add its recipe"));
            }
            *recipe = Some(own.display().to_string());
        }
        Ok(Self { out: Some(out), resume: true })
    }

    /// The run's directory. If neither `--out` nor `train.name` is given, a new one.
    pub(super) fn out(&self, loaded: &RecipeFile) -> Result<PathBuf> {
        let wanted = wanted_out(self.out.clone(), &loaded.recipe.train)?;
        Ok(wanted.unwrap_or_else(|| default_out(&loaded.name)))
    }

    /// Whether neither `--out` nor `train.name` names the directory.
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

/// The result of a run, where its files are, and what to type next.
pub(super) fn summarise(run: &RunSummary, data: Option<&str>) -> Summary {
    let how = match run.ending {
        Ending::Finished => "trained",
        Ending::EarlyStop => "stopped early, after",
        Ending::Learned => "reached the overfit target after",
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
    // `eval` cannot name a held-out split, so there is no command to suggest.
    if let Some(data) = data.filter(|_| run.has_val && !run.held_out) {
        summary = summary.next("measure it", format!("{vitrum} eval --weights {out} --data {data}"));
    }
    let picture = run.samples.first().map_or("IMAGE...".into(), |file| file.display().to_string());
    summary
        .next("ask it", format!("{vitrum} predict --weights {out} {picture}"))
        .next("look inside", format!("{vitrum} inspect {out}"))
}
