//! The command line: one file per command, each with its `Args` and a `run`. Parsing, wiring and printing; no
//! logic.
//!
//! Data goes to stdout or files, progress and errors to stderr. Exit codes: 0 done, 1 a failure that the
//! message explains, 2 wrong usage, 130 interrupted, 143 terminated.

#![forbid(unsafe_code)]
// Help texts are written for a terminal: `[B, C]` in them is a shape.
#![allow(rustdoc::broken_intra_doc_links)]

pub mod bench;
pub mod convert;
pub mod doctor;
pub mod eval;
mod examples;
pub mod features;
pub mod finetune;
mod flags;
pub mod grad;
pub mod inspect;
mod numbers;
pub mod pack;
pub mod plan;
pub mod predict;
pub mod preview;
pub mod probe;
pub mod recipes;
pub mod replay;
pub mod report;
mod runs;
pub mod selftest;
pub mod settings;
pub mod shell;
pub mod train;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::backend::Device;
use crate::data::Split;
use crate::dist::{self, Launch};
use crate::error::{Error, Kind, Result};
use crate::report::format;
use crate::terminal;
pub use crate::terminal::{print, print_json};
use crate::weights::ModelOverrides;

/// Pre-trains and fine-tunes Vision Transformers as fast as the hardware allows.
#[derive(Parser)]
#[command(name = "vitrum", version)]
#[command(
    after_help = "Start with `vitrum train`: it draws its own pictures and trains a small model on them."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model as a recipe says
    Train(train::Args),
    /// Fine-tune a trained model on other data
    Finetune(finetune::Args),
    /// Measure a model's accuracy on a data set
    Eval(eval::Args),
    /// Predict the classes of pictures
    Predict(predict::Args),
    /// Write the pooled features of a data set to a file
    Features(features::Args),
    /// Measure how good a model's features are, without training it
    Probe(probe::Args),
    /// Pack pictures into a data set that loads fast
    Pack(pack::Args),
    /// Draw a contact sheet of augmented samples
    Preview(preview::Args),
    /// Convert weights between layouts
    Convert(convert::Args),
    /// Describe a weights file, a checkpoint or a data set
    Inspect(inspect::Args),
    /// Write logits, loss and every gradient of one batch
    Grad(grad::Args),
    /// Train on stored batches and write the trajectory
    Replay(replay::Args),
    /// Calculate a recipe's memory, FLOPs and steps without running it
    Plan(plan::Args),
    /// Time training or inference on this machine
    Bench(bench::Args),
    /// Check every operation on this machine's device against float64
    Selftest(selftest::Args),
    /// Show what this machine offers and what Vitrum will use
    Doctor(doctor::Args),
    /// Write a run's page, or one that compares runs
    Report(report::Args),
    /// Explain every key that a recipe may have
    Settings(settings::Args),
    /// List the built-in recipes, or show one
    Recipes(recipes::Args),
    /// Print completions for a shell
    Completions(shell::CompletionsArgs),
    /// Write the man pages
    Man(shell::ManArgs),
}

/// The `--set` flag of every command that reads a recipe.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Settings {
    /// Change one setting of the recipe, such as `train.steps=60`; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub set: Vec<String>,
}

impl Settings {
    /// For commands that read a weights file: `model.KEY=VALUE` gives what the file does not say.
    pub fn model_overrides(&self) -> Result<ModelOverrides> {
        let pairs = self.set.iter().map(|setting| match setting.split_once('=') {
            Some((key, value)) => Ok((key.trim().to_string(), value.trim().to_string())),
            None => Err(Error::usage(format!("`--set {setting}` has no value"))
                .hint("write `--set model.KEY=VALUE`, as in `--set model.heads=12`")),
        });
        ModelOverrides::from_sets(&pairs.collect::<Result<Vec<_>>>()?)
    }
}

/// Where to compute.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct On {
    /// Where to compute: auto, cpu, cuda, or cuda:N for the N-th GPU
    #[arg(long, default_value_t)]
    pub device: Device,
}

/// Every command with its arguments. Tests compare the documentation with it.
pub fn command() -> clap::Command {
    // `--lr -1` is a wrong value, not an unknown flag `-1`.
    let values = |arg: clap::Arg| match arg.get_action().takes_values() && !arg.is_positional() {
        true => arg.allow_negative_numbers(true),
        false => arg,
    };
    Cli::command().mut_subcommands(|command| {
        let said = command.get_after_help().map(|text| format!("{text}\n\n")).unwrap_or_default();
        let examples = examples::text(command.get_name()).unwrap_or_default();
        command.mut_args(values).after_help(said + &examples)
    })
}

/// The whole program.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    terminal::show_messages();
    let launch = match Launch::from_env() {
        Ok(launch) => launch,
        Err(e) => return fail(&e, &Launch::ALONE),
    };
    dist::silence(&launch);
    let _group = dist::EndAllOnPanic;
    let args: Vec<OsString> = args.into_iter().collect();
    let parse = |args: &[OsString]| {
        command().try_get_matches_from(args).and_then(|found| Cli::from_arg_matches(&found))
    };
    let parsed = parse(&args).or_else(|e| parse(&flags::with_negative_values(&e, &args).ok_or(e)?));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(e) => {
            if let Some(e) = flags::unknown_flag(&e, &args).or_else(|| numbers::wrong_value(&e)) {
                return fail(&e, &launch);
            }
            // Help and version are data and exit with 0; the rest is wrong usage. A closed pipe is not a
            // failure.
            if launch.rank == 0 {
                let _ = e.print();
            }
            return ExitCode::from(e.exit_code() as u8);
        }
    };
    match run(cli, &launch) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e, &launch),
    }
}

/// How long other ranks wait with an error: it is usually everybody's, and the first rank tells it.
const FIRST_RANK_SPEAKS: Duration = Duration::from_millis(500);

/// Prints what was wrong, ends the other ranks, and returns the exit code.
fn fail(e: &Error, launch: &Launch) -> ExitCode {
    let stopped = matches!(e.kind(), Kind::Stopped(_));
    let mut text = if stopped { e.message().to_string() } else { format!("error: {}", e.message()) };
    if let Some(hint) = e.hint_text() {
        text += &format!("\nhint: {hint}");
    }
    if launch.rank == 0 {
        terminal::say(&text);
    } else if !stopped {
        std::thread::sleep(FIRST_RANK_SPEAKS);
        terminal::show_messages();
        terminal::say(&format!("rank {}: {text}", launch.rank));
    }
    dist::end_all(e.exit_code());
    ExitCode::from(e.exit_code() as u8)
}

fn run(cli: Cli, launch: &Launch) -> Result<()> {
    let Some(command) = cli.command else {
        return print(&self::command().render_long_help().to_string());
    };
    match &command {
        Command::Train(_) | Command::Finetune(_) => {}
        Command::Bench(args) if args.what == bench::What::Train => {}
        _ => launch.alone("this command")?,
    }
    start_threads()?;
    match command {
        Command::Train(args) => train::run(args),
        Command::Finetune(args) => finetune::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Features(args) => features::run(args),
        Command::Probe(args) => probe::run(args),
        Command::Predict(args) => predict::run(args),
        Command::Pack(args) => pack::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Grad(args) => grad::run(args),
        Command::Replay(args) => replay::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Selftest(args) => selftest::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Preview(args) => preview::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Report(args) => report::run(args),
        Command::Settings(args) => settings::run(args),
        Command::Recipes(args) => recipes::run(args),
        Command::Completions(args) => shell::completions(args),
        Command::Man(args) => shell::man(args),
    }
}

/// Starts the threads that checksums, conversions and packs share. Started later, a failure could not be
/// reported.
fn start_threads() -> Result<()> {
    rayon::ThreadPoolBuilder::new().build_global().map_err(|e| {
        Error::new(format!("the system cannot start more threads: {e}"))
            .hint("raise the limits that `ulimit -u` and `ulimit -v` show, or set `RAYON_NUM_THREADS=1`")
    })
}

/// The error for a documented command or option that this version does not have yet.
pub fn not_built(what: &str) -> Error {
    Error::usage(format!("`{what}` is not built yet"))
}

/// What was assumed about a weights file.
fn say_notes(notes: &[String]) {
    notes.iter().for_each(|note| terminal::note(note));
}

/// Prints which part of a data set is used.
fn say_part(data: &str, part: Option<Split>, images: usize) {
    let images = format::thousands(images as u64);
    let which = match part {
        Some(part) => format!("the {} part of {data}", part.name()),
        None => format!("all of {data}, which has no parts: not a test if the model was trained on it"),
    };
    terminal::say(&format!("data    {which} ({images} images)"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }
}
