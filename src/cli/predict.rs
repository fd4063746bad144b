//! `vitrum predict`: the likeliest classes of single pictures.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{On, Settings, not_built, print, print_json};
use crate::backend::Options;
use crate::data::{Split, pictures};
use crate::error::{At, Error, Result};
use crate::report::format;
use crate::train::loaded::{Loaded, Prediction};
use crate::vit::Mode;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Pictures, folders of pictures, patterns such as 'photos/*.jpg', or `-` for a list of files on stdin
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,
    /// Of folders that are data sets, take this part: train, val or test [default: every picture below the folder]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "PART")]
    pub split: Option<Split>,
    /// How many classes to show
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub top: u16,
    /// Write attention maps as PNG files (not built yet)
    #[arg(long, value_name = "DIR")]
    pub attention: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.attention.is_some() {
        return Err(not_built("vitrum predict --attention").hint("leave it out to get the classes"));
    }
    let images = pictures::named(&args.images, args.split, list)?;
    let overrides = args.settings.model_overrides()?;
    let mut run =
        Loaded::open(&args.weights, &overrides, (args.on.device, &Options::default()), 1, Mode::Infer, None)?;
    let (mut all, mut errors) = (Vec::new(), Vec::new());
    for path in &images {
        // One bad file among many takes nothing from the others.
        let top = match run.predict(path, args.top as usize) {
            Ok(top) => top,
            Err(error) if images.len() == 1 => return Err(error),
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "error: {}", error.message());
                errors.push(json!({ "image": path.display().to_string(), "error": error.message() }));
                continue;
            }
        };
        if !args.json {
            print(&text(path, &top))?;
        }
        let entry = |p: &Prediction| json!({"class": p.class, "name": p.name, "probability": p.probability});
        all.push(json!({
            "image": path.display().to_string(),
            "top": top.iter().map(entry).collect::<Vec<_>>(),
        }));
    }
    let bad = errors.len();
    if args.json {
        let mut out = json!({ "predictions": all });
        if bad > 0 {
            out["errors"] = json!(errors);
        }
        print_json(&out)?;
    }
    match bad {
        0 => Ok(()),
        _ => Err(Error::new(format!("{bad} of {} pictures could not be read", images.len()))),
    }
}

/// The lines of stdin.
fn list() -> Result<String> {
    std::io::read_to_string(std::io::stdin()).at("stdin")
}

/// The picture, then its classes with a bar each.
fn text(path: &Path, top: &[Prediction]) -> String {
    let width = top.iter().map(|p| p.name.chars().count()).max().unwrap_or(0);
    let row = |p: &Prediction| {
        let bar = "#".repeat((p.probability * 40.0).round() as usize);
        format!("  {:<width$}  {:>7}  {bar}\n", p.name, format::percent(p.probability.into()))
    };
    format!("{}\n{}", path.display(), top.iter().map(row).collect::<String>())
}
