//! `vitrum predict`: the likeliest classes of single pictures.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{On, Settings, not_built, print, print_json};
use crate::backend::Options;
use crate::error::Result;
use crate::report::format;
use crate::train::loaded::{Loaded, Prediction};
use crate::vit::Mode;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// JPEG or PNG files
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,
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
    let overrides = args.settings.model_overrides()?;
    let mut run =
        Loaded::open(&args.weights, &overrides, (args.on.device, &Options::default()), 1, Mode::Infer, None)?;
    let mut all = Vec::new();
    for path in &args.images {
        let top = run.predict(path, args.top as usize)?;
        if !args.json {
            print(&text(path, &top))?;
        }
        let entry = |p: &Prediction| json!({"class": p.class, "name": p.name, "probability": p.probability});
        all.push(json!({
            "image": path.display().to_string(),
            "top": top.iter().map(entry).collect::<Vec<_>>(),
        }));
    }
    if args.json { print_json(&json!({ "predictions": all })) } else { Ok(()) }
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
