//! Sweeps: one run for each point of a grid of settings. Fine-tuning runs share one copy of the weights.
//!
//! A trial is bit-identical to a single run with its settings, and has its own run directory. The weights are
//! read and adapted once and the data is opened once, as long as trials need the same.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{At, Error, Kind, Result};
use crate::files;
use crate::recipe::{Metric, Recipe, RecipeFile};
use crate::report::{Log, format, table};

use super::directory::Directory;
use super::finetune::Start;
use super::run::{RunData, RunOptions, RunSummary};
use super::trainer::train_from;

/// One key and its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// A key of the recipe, such as `optim.lr`.
    pub key: String,
    /// The values to try, as they are written after `--set KEY=`.
    pub values: Vec<String>,
}

/// More trials than this are taken for a mistake.
const MOST_TRIALS: usize = 1000;

impl Axis {
    /// Parses `optim.lr=0.001,0.003`. Commas inside brackets and quotes belong to a value.
    pub fn parse(text: &str) -> Result<Axis> {
        let wrong = |what: &str| {
            Error::usage(format!("`--sweep {text}` {what}"))
                .hint("write `--sweep KEY=VALUE,VALUE`, as in `--sweep optim.lr=0.003,0.01,0.03`")
        };
        let (key, values) = text.split_once('=').ok_or_else(|| wrong("has no values"))?;
        let axis = Axis { key: key.trim().into(), values: split(values) };
        if axis.values.iter().any(String::is_empty) {
            return Err(wrong("has an empty value"));
        }
        if let Some(twice) = axis.values.iter().enumerate().find(|(i, v)| axis.values[..*i].contains(v)) {
            return Err(wrong(&format!("has the value `{}` twice", twice.1)));
        }
        Ok(axis)
    }
}

/// Splits at commas that are not inside brackets or quotes.
fn split(text: &str) -> Vec<String> {
    let (mut parts, mut depth, mut quote) = (vec![String::new()], 0usize, None);
    for c in text.chars() {
        match (c, quote) {
            ('"' | '\'', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            ('[' | '{', None) => depth += 1,
            (']' | '}', None) => depth = depth.saturating_sub(1),
            (',', None) if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        parts.last_mut().expect("there is always a part").push(c);
    }
    parts.into_iter().map(|part| part.trim().to_string()).collect()
}

/// The settings of every trial, as `--set` takes them; the last axis changes fastest.
pub fn grid(axes: &[Axis]) -> Result<Vec<Vec<String>>> {
    if let Some((_, axis)) = axes.iter().enumerate().find(|(i, a)| axes[..*i].iter().any(|b| b.key == a.key))
    {
        return Err(Error::usage(format!("`--sweep {}` is given twice", axis.key))
            .hint(format!("give all its values at once: `--sweep {}=VALUE,VALUE`", axis.key)));
    }
    let trials = axes.iter().map(|axis| axis.values.len()).try_fold(1usize, usize::checked_mul);
    if trials.is_none_or(|trials| trials > MOST_TRIALS) {
        return Err(Error::usage(format!("the sweep has more than {MOST_TRIALS} trials"))
            .hint("sweep fewer keys at once"));
    }
    let mut grid = vec![Vec::new()];
    for axis in axes {
        let longer = |trial: &Vec<String>| {
            let with = |value: &String| [trial.clone(), vec![format!("{}={value}", axis.key)]].concat();
            axis.values.iter().map(with).collect::<Vec<_>>()
        };
        grid = grid.iter().flat_map(longer).collect();
    }
    Ok(grid)
}

/// A finished sweep.
pub struct Sweep {
    axes: Vec<Axis>,
    /// The trials that ran, in their order.
    pub trials: Vec<Trial>,
    metric: Metric,
}

/// One run of a sweep.
pub struct Trial {
    /// `KEY=VALUE` for each axis.
    pub settings: Vec<String>,
    /// The run directory.
    pub out: PathBuf,
    /// The summary, or why the trial failed.
    pub result: Result<RunSummary>,
}

/// Runs every trial in `options.out/trial-N`. `recipe` and `set` are the command's; a trial's settings come
/// last and win. A failed trial is a result. A signal ends the sweep; the same command with `--resume`
/// continues it.
pub fn run(recipe: &str, set: &[String], axes: Vec<Axis>, options: &RunOptions, log: &Log) -> Result<Sweep> {
    let (grid, numbered) = (grid(&axes)?, options.numbered);
    let read = |settings: &Vec<String>| Recipe::read(Some(recipe), &[set, settings].concat());
    // All recipes must be valid before the first trial runs.
    let loaded: Vec<RecipeFile> = grid.iter().map(read).collect::<Result<_>>()?;
    let metric = loaded[0].recipe.eval.metric;
    let mut options = RunOptions { numbered: false, ..options.clone() };
    if numbered {
        options.out = Directory::numbered(&options.out)?;
    }

    let (mut data, mut start): (Option<RunData>, Option<Start>) = (None, None);
    let mut trials = Vec::with_capacity(grid.len());
    for (i, (settings, loaded)) in grid.into_iter().zip(&loaded).enumerate() {
        let out = options.out.join(format!("trial-{}", i + 1));
        log.line(&format!("\ntrial {} of {}   {}", i + 1, trials.capacity(), settings.join("   ")));
        let of_trial = RunOptions { out: out.clone(), ..options.clone() };
        if !data.as_ref().is_some_and(|data| data.is_of(&loaded.recipe)) {
            data = Some(RunData::open(&loaded.recipe, &of_trial)?);
        }
        let data = data.as_ref().expect("it was opened");
        let from_weights = loaded.recipe.finetune.is_some();
        if from_weights && !start.as_ref().is_some_and(|start| start.fits(loaded, data)) {
            // Free the old copy before loading the new one.
            drop(start.take());
            start = Some(Start::load(loaded, data)?);
        }
        let result = match &start {
            Some(start) => start.run(loaded, data.clone(), &of_trial),
            None => train_from(None, data.resolve(loaded.recipe.clone())?, data.clone(), &of_trial),
        };
        match result {
            Err(e) if e.kind() != Kind::Failure => {
                let again =
                    format!("continue with the same command and `--out {} --resume`", options.out.display());
                return Err(if matches!(e.kind(), Kind::Stopped(_)) { e.hint(again) } else { e });
            }
            Err(e) => {
                log.warn(&format!("trial {} failed: {}", i + 1, e.message()));
                trials.push(Trial { settings, out, result: Err(e) });
            }
            Ok(summary) => trials.push(Trial { settings, out, result: Ok(summary) }),
        }
    }
    let sweep = Sweep { axes, trials, metric };
    sweep.write(&options.out.join("sweep.json"))?;
    match sweep.best() {
        Some(_) => Ok(sweep),
        None => Err(Error::new(format!("all {} trials of the sweep failed", sweep.trials.len()))
            .hint("the warnings above say why; try a lower `optim.lr`")),
    }
}

impl Sweep {
    /// The trial with the best validation metric; without validation images, with the lowest loss.
    pub fn best(&self) -> Option<&Trial> {
        let scored = self.trials.iter().filter_map(|trial| Some((score(trial.result.as_ref().ok()?), trial)));
        // The first trial wins ties: the grid begins with the values that the user wrote first.
        scored
            .fold(None, |best: Option<(f64, &Trial)>, next| match best {
                Some(best) if best.0 >= next.0 => Some(best),
                _ => Some(next),
            })
            .map(|(_, trial)| trial)
    }

    /// One row per trial, the best one marked.
    pub fn text(&self) -> String {
        let best = self.best().map(|trial| &trial.out);
        let metric = match self.metric {
            Metric::Top1 => "best top-1",
            Metric::Loss => "best loss",
            Metric::Map => "best mAP",
        };
        let keys = self.axes.iter().map(|axis| axis.key.as_str());
        let columns = ["at step", "last top-1", "last loss", "time", ""];
        let head: Vec<&str> = ["trial"].into_iter().chain(keys).chain([metric]).chain(columns).collect();
        let row = |(i, trial): (usize, &Trial)| {
            let values = trial.settings.iter().map(|s| s.split_once('=').map_or("", |(_, v)| v).to_string());
            let mark = if Some(&trial.out) == best { "<- best" } else { "" };
            let results = match &trial.result {
                Err(_) => ["failed", "", "", "", ""].map(String::from).to_vec(),
                Ok(run) => self.results(run).into_iter().chain([mark.to_string()]).collect(),
            };
            [(i + 1).to_string()].into_iter().chain(values).chain(results).collect()
        };
        table(&head, &self.trials.iter().enumerate().map(row).collect::<Vec<_>>())
    }

    fn results(&self, run: &RunSummary) -> Vec<String> {
        let (best, at) = match (run.best, self.metric) {
            (None, _) => ("-".into(), "-".into()),
            (Some((step, share)), Metric::Top1 | Metric::Map) => {
                (format!("{:.2} %", 100.0 * share), step.to_string())
            }
            (Some((step, loss)), Metric::Loss) => (format!("{:.4}", -loss), step.to_string()),
        };
        let last = |text: &dyn Fn(&super::EvalReport) -> String| run.last.as_ref().map_or("-".into(), text);
        vec![
            best,
            at,
            last(&|r| format!("{:.2} %", 100.0 * r.top1)),
            last(&|r| format!("{:.4}", r.loss)),
            format::seconds(run.seconds),
        ]
    }

    /// The same as JSON.
    pub fn json(&self) -> Value {
        let best = self.best().map(|trial| &trial.out);
        let trial = |trial: &Trial| {
            let settings: serde_json::Map<String, Value> = trial
                .settings
                .iter()
                .filter_map(|s| s.split_once('='))
                .map(|(key, value)| (key.to_string(), value.into()))
                .collect();
            let mut entry = json!({
                "settings": settings,
                "out": trial.out.display().to_string(),
                "best": Some(&trial.out) == best,
            });
            match &trial.result {
                Ok(run) => {
                    entry["steps"] = run.steps.into();
                    entry["seconds"] = run.seconds.into();
                    entry["best_step"] = json!(run.best.map(|(step, _)| step));
                    entry["best_metric"] = json!(run.best.map(|(_, metric)| metric));
                    entry["last"] = json!(run.last);
                }
                Err(e) => entry["failed"] = e.message().into(),
            }
            entry
        };
        json!({ "metric": self.metric, "trials": self.trials.iter().map(trial).collect::<Vec<_>>() })
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(&self.json()).at(path.display())?;
        text.push(b'\n');
        files::write_atomic(path, |out| out.write_all(&text))
    }
}

/// Larger is better.
fn score(run: &RunSummary) -> f64 {
    let last = || run.last.as_ref().map(|report| -report.loss);
    run.best.map(|(_, metric)| metric).or_else(last).unwrap_or(f64::NEG_INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_has_every_combination_and_the_last_key_changes_fastest() {
        let axes =
            ["optim.lr=0.01, 0.03", "augment.area=[0.5,1],[0.1,1]"].map(|text| Axis::parse(text).unwrap());
        assert_eq!(axes[1].values, ["[0.5,1]", "[0.1,1]"]);
        let expected = [
            ["optim.lr=0.01", "augment.area=[0.5,1]"],
            ["optim.lr=0.01", "augment.area=[0.1,1]"],
            ["optim.lr=0.03", "augment.area=[0.5,1]"],
            ["optim.lr=0.03", "augment.area=[0.1,1]"],
        ];
        assert_eq!(grid(&axes).unwrap(), expected.map(|trial| trial.map(String::from).to_vec()));
    }

    #[test]
    fn sweeps_that_make_no_sense_are_wrong_usage() {
        for text in ["optim.lr", "optim.lr=", "optim.lr=1,,2", "optim.lr=1,2,1"] {
            assert_eq!(Axis::parse(text).unwrap_err().exit_code(), 2, "{text}");
        }
        let twice = ["optim.lr=1", "optim.lr=2"].map(|text| Axis::parse(text).unwrap());
        assert!(grid(&twice).unwrap_err().message().contains("given twice"));
        let many: Vec<String> = (0..40).map(|i| i.to_string()).collect();
        let axis = |key: &str| Axis { key: key.into(), values: many.clone() };
        assert!(grid(&[axis("a"), axis("b")]).unwrap_err().message().contains("more than 1000"));
    }
}
