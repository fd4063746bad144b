//! What `train` and `finetune` share: the run's directory, sweeps, and the summary at the end of a run.

use std::path::{Path, PathBuf};

use super::flags::{program, wanted_out};
use super::{print, print_json};
use crate::error::{Error, Result};
use crate::files;
use crate::recipe::{Metric, RecipeFile};
use crate::report::{Log, Summary, comparison, format, runs_in};
use crate::train::run::{Ending, RunOptions, RunSummary, default_out};
use crate::train::sweep::{self, Axis};

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
            // `train.name` may name the directory: `out` looks.
            (Some(None), None) => return Ok(Self { out: None, resume: true }),
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

    /// The run's directory. If neither `--out` nor `train.name` is given, a new one, which has nothing to resume.
    pub(super) fn out(&self, loaded: &RecipeFile) -> Result<PathBuf> {
        let wanted = wanted_out(self.out.clone(), &loaded.recipe.train)?;
        if wanted.is_none() && self.resume {
            return Err(Error::usage("`--resume` without a run to continue")
                .hint("name its directory, as in `vitrum train --resume runs/NAME`"));
        }
        Ok(wanted.unwrap_or_else(|| default_out(&loaded.name)))
    }

    /// Whether neither `--out` nor `train.name` names the directory.
    pub(super) fn is_new(&self, loaded: &RecipeFile) -> bool {
        self.out.is_none() && loaded.recipe.train.name.is_none()
    }
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
        .fact("curves", curves(&out))
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

/// A sweep makes runs of its own, and goes into no other run's directory.
pub(super) fn refuse_run(options: &RunOptions) -> Result<()> {
    if !options.out.join(OWN).is_file() {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{} is a run, and `--sweep` needs a folder for runs of its own",
        options.out.display()
    ))
    .hint("choose another folder with `--out DIR`, or leave out `--sweep` to continue the run"))
}

/// Trains once for each combination of the values in `axes` (`KEY=V1,V2`) and prints the table of results.
pub(super) fn sweep_over(
    axes: &[String],
    recipe: &str,
    set: &[String],
    options: &RunOptions,
    json: bool,
) -> Result<()> {
    let axes = axes.iter().map(|text| Axis::parse(text)).collect::<Result<Vec<_>>>()?;
    let log = Log::stderr();
    let done = sweep::run(recipe, set, axes, options, &log)?;
    log.line(&format!("\n{} trials in {}", done.trials.len(), options.out.display()));
    if json {
        print_json(&done.json())?
    } else {
        print(&done.text())?
    }
    compare(&options.out, &log);
    Ok(())
}

/// Writes the page that compares a sweep's runs. The results stand without it.
fn compare(out: &Path, log: &Log) {
    let page = out.join("comparison.html");
    let written = runs_in(&[out.to_owned()]).and_then(|runs| {
        let html = comparison(&runs);
        files::write_atomic(&page, |to| to.write_all(html.as_bytes()))
    });
    match written {
        Ok(()) => log.line(&format!("compared in {}", page.display())),
        Err(why) => log.warn(&format!("the runs' page could not be written: {}", why.message())),
    }
}

/// Where a run's curves are: on its page, if it has one.
fn curves(out: &str) -> String {
    let page = Path::new(out).join("report.html");
    match page.is_file() {
        true => page.display().to_string(),
        false => format!("{out}/metrics.jsonl"),
    }
}
