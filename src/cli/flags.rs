//! Flags that are short for settings, and the answer to flags that only other programs have.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::error::{Error, Result};
use crate::recipe::{self, TrainSection};

/// Flags for the settings of every run. Each flag equals the `--set` that its help shows; an explicit `--set`
/// wins.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Everyday {
    /// Passes over the training pictures: `--set train.epochs=N`
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    pub epochs: Option<String>,
    /// Total number of updates: `--set train.steps=N`
    #[arg(long, value_name = "N")]
    pub steps: Option<String>,
    /// Pictures per update: `--set train.batch=N`
    #[arg(long, value_name = "N")]
    pub batch: Option<String>,
    /// The learning rate: `--set optim.lr=X`
    #[arg(long, value_name = "X")]
    pub lr: Option<String>,
    /// The seed of all random choices: `--set train.seed=N`
    #[arg(long, value_name = "N")]
    pub seed: Option<String>,
    /// The size of pictures in pixels, `N` or `HxW`: `--set model.image=N`
    #[arg(long, value_name = "N")]
    pub image: Option<String>,
    /// The run's name; its directory is `runs/NAME`: `--set train.name=NAME`
    #[arg(long, value_name = "NAME", conflicts_with = "out")]
    pub name: Option<String>,
}

impl Everyday {
    /// The flags that were given, as `--set` takes them.
    pub fn settings(&self) -> Vec<String> {
        let flags = [
            ("train.epochs", &self.epochs),
            ("train.steps", &self.steps),
            ("train.batch", &self.batch),
            ("optim.lr", &self.lr),
            ("train.seed", &self.seed),
            ("model.image", &self.image),
            ("train.name", &self.name),
        ];
        flags.iter().filter_map(|(key, value)| Some(format!("{key}={}", value.as_ref()?))).collect()
    }
}

/// The run's directory: `--out`, else `runs/` with the run's name. `None` if neither is given.
///
/// # Errors
/// The name cannot be a folder's name.
pub(super) fn wanted_out(out: Option<PathBuf>, train: &TrainSection) -> Result<Option<PathBuf>> {
    let Some(name) = train.name.as_deref().filter(|_| out.is_none()) else { return Ok(out) };
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
        return Err(Error::usage(format!("`train.name` is `{name}`, which is not a folder name"))
            .hint("give a plain name, or the whole path with `--out DIR`"));
    }
    Ok(Some(Path::new("runs").join(name)))
}

/// How the user calls this program from the current folder: `vitrum` if the shell finds it by that name, else
/// its path.
pub(super) fn program() -> String {
    let plain = String::from("vitrum");
    let Ok(this) = std::env::current_exe().and_then(|path| path.canonicalize()) else { return plain };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_this = |folder: PathBuf| folder.join(&plain).canonicalize().is_ok_and(|found| found == this);
    if std::env::split_paths(&path).any(is_this) {
        return plain;
    }
    let here = std::env::current_dir().and_then(|folder| folder.canonicalize()).unwrap_or_default();
    let shown = this.strip_prefix(&here).unwrap_or(&this);
    // A shell looks up a bare name only in PATH.
    match shown.components().count() {
        1 => format!("./{}", shown.display()),
        _ => shown.display().to_string(),
    }
}

/// Flags of other programs (timm, big_vision, ultralytics, torchvision, HuggingFace) and the setting or flag
/// here.
const ELSEWHERE: [(&str, &str); 50] = [
    ("amp", "train.precision"),
    ("batch-size", "train.batch"),
    ("bs", "train.batch"),
    ("checkpoint", "--weights"),
    ("class-weight", "loss.class_weights"),
    ("class-weights", "loss.class_weights"),
    ("clip-grad", "optim.clip"),
    ("cos-lr", "schedule.kind"),
    ("data-dir", "--data"),
    ("data-path", "--data"),
    ("dataset", "--data"),
    ("device-batch-size", "train.micro_batch"),
    ("epoch", "--epochs"),
    ("experiment", "--name"),
    ("fp16", "train.precision"),
    ("freeze", "optim.freeze_blocks"),
    ("grad-accum", "train.micro_batch"),
    ("grad-accum-steps", "train.micro_batch"),
    ("gradient-accumulation-steps", "train.micro_batch"),
    ("image-size", "--image"),
    ("img-size", "--image"),
    ("imgsz", "--image"),
    ("initial-checkpoint", "--weights"),
    ("input-size", "--image"),
    ("learning-rate", "--lr"),
    ("lr0", "--lr"),
    ("max-steps", "--steps"),
    ("model-ema", "optim.ema"),
    ("model-name", "model.variant"),
    ("model", "model.variant"),
    ("num-classes", "model.classes"),
    ("num-epochs", "--epochs"),
    ("num-train-epochs", "--epochs"),
    ("num-workers", "data.workers"),
    ("opt", "optim.name"),
    ("optimizer", "optim.name"),
    ("output", "--out"),
    ("output-dir", "--out"),
    ("per-device-train-batch-size", "train.batch"),
    ("pretrained", "--weights"),
    ("project", "--out"),
    ("random-seed", "--seed"),
    ("resolution", "--image"),
    ("resume-from-checkpoint", "--resume"),
    ("save-dir", "--out"),
    ("sched", "schedule.kind"),
    ("smoothing", "loss.label_smoothing"),
    ("total-steps", "--steps"),
    ("wd", "optim.weight_decay"),
    ("workers", "data.workers"),
];

/// The same command line with `--lr=-1e-3` for `--lr -1e-3`: clap knows plain negative numbers for values, but not
/// these. `None` if there are none, or something else is wrong.
pub(super) fn with_negative_values(error: &clap::Error, args: &[OsString]) -> Option<Vec<OsString>> {
    let is_flag = |word: &str| word.starts_with("--") && !word.contains('=');
    let is_negative = |word: &str| word.starts_with('-') && word.parse::<f64>().is_ok();
    let mut joined: Vec<OsString> = Vec::new();
    for arg in args {
        match (joined.last_mut().and_then(|last| last.to_str()), arg.to_str()) {
            (Some(flag), Some(number)) if is_flag(flag) && is_negative(number) => {
                let both = format!("{flag}={number}");
                joined.pop();
                joined.push(both.into());
            }
            _ => joined.push(arg.clone()),
        }
    }
    (error.kind() == ErrorKind::UnknownArgument && joined.len() < args.len()).then_some(joined)
}

/// The error for a flag that the command does not have. `None` if something else is wrong with the command
/// line.
pub(super) fn unknown_flag(error: &clap::Error, args: &[OsString]) -> Option<Error> {
    if error.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else { return None };
    let words: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
    let root = super::Cli::command();
    let command = words.iter().find_map(|word| root.find_subcommand(word))?;
    let name = command.get_name();
    if !flag.starts_with('-') {
        return Some(
            Error::usage(format!("`vitrum {name}` takes no argument `{flag}`"))
                .hint(format!("`vitrum {name} --help` shows what it takes")),
        );
    }
    let before = words.iter().position(|word| *word == name).unwrap_or_default();
    if words[..before].iter().any(|word| word.split('=').next() == Some(flag.as_str()))
        && command.get_arguments().any(|arg| arg.get_long() == flag.strip_prefix("--"))
    {
        return Some(
            Error::usage(format!("`{flag}` comes before the command"))
                .hint(format!("write it after, as in `vitrum {name} {flag} ...`")),
        );
    }
    let said = Error::usage(format!("`vitrum {name}` has no flag `{flag}`"));
    let Some(name) = flag.strip_prefix("--") else {
        return Some(said.hint(format!("`vitrum {} --help` lists its flags", command.get_name())));
    };
    let has = |flag: &str| command.get_arguments().any(|arg| arg.get_long() == flag.strip_prefix("--"));
    let value = value_of(flag, &words);
    let typed = |what: &str| match what.starts_with("--") {
        true => format!("`{what}{}`", value.map_or(String::new(), |value| format!(" {value}"))),
        false => format!("`--set {what}={}`", value.unwrap_or("VALUE")),
    };
    let usable = |what: &&str| if what.starts_with("--") { has(what) } else { has("--set") };
    let known = ELSEWHERE.iter().find(|(other, _)| *other == name).map(|(_, ours)| *ours);
    if let Some(ours) = known.filter(usable) {
        return Some(said.hint(format!("here it is {}", typed(ours))));
    }
    let keys = recipe::keys();
    let wanted = name.replace('-', "_");
    let same: Vec<String> = keys
        .iter()
        .filter(|key| **key == wanted || key.rsplit('.').next() == Some(wanted.as_str()))
        .map(|key| typed(key))
        .collect();
    if has("--set") && !same.is_empty() {
        return Some(said.hint(format!("it is a setting of the recipe: {}", same.join(" or "))));
    }
    let close = |candidate: &str| strsim::jaro_winkler(name, candidate);
    let flags = command.get_arguments().filter_map(clap::Arg::get_long);
    let nearest = flags.map(|flag| (close(flag), flag)).max_by(|a, b| a.0.total_cmp(&b.0));
    Some(match nearest {
        Some((score, nearest)) if score >= 0.85 => said.hint(format!("did you mean `--{nearest}`?")),
        _ => said.hint(format!("`vitrum {} --help` lists its flags", command.get_name())),
    })
}

/// The flag's value: `--flag=VALUE`, or the next word.
fn value_of<'a>(flag: &str, words: &[&'a str]) -> Option<&'a str> {
    let with_equals = format!("{flag}=");
    if let Some(word) = words.iter().find(|word| word.starts_with(&with_equals)) {
        return Some(&word[with_equals.len()..]).filter(|value| !value.is_empty());
    }
    let at = words.iter().position(|word| *word == flag)?;
    words.get(at + 1).copied().filter(|word| !word.starts_with("--"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_flag_is_elsewhere_exists_here() {
        let keys = recipe::keys();
        let train = super::super::Cli::command();
        for (flag, ours) in ELSEWHERE {
            let is_flag = ["train", "finetune"].iter().any(|name| {
                let command = train.find_subcommand(name).unwrap();
                command
                    .get_arguments()
                    .any(|arg| arg.get_long().map(|long| format!("--{long}")).as_deref() == Some(ours))
            });
            assert!(is_flag || keys.iter().any(|key| key == ours), "--{flag}: {ours}");
        }
    }
}
