//! `vitrum eval`: top-1, top-5 and loss of a model on a data set.

use std::path::PathBuf;

use serde_json::json;

use super::{On, Settings, not_built, print, print_json};
use crate::data::{Dataset, Split};
use crate::error::Result;
use crate::report::format;
use crate::train::loaded::Loaded;
use crate::vit::Mode;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// A packed data set, an image folder, or `demo`; takes its validation part
    #[arg(long, value_name = "DIR")]
    pub data: String,
    /// How pictures are prepared (not built yet)
    #[arg(long, value_name = "NAME")]
    pub protocol: Option<String>,
    /// Leave out a short last batch
    #[arg(long)]
    pub drop_last: bool,
    /// Class names or numbers, one line per picture, in place of the data set's own
    #[arg(long, value_name = "FILE")]
    pub labels: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.protocol.is_some() {
        return Err(not_built("vitrum eval --protocol").hint("leave it out: the file's own protocol is used"));
    }
    if args.labels.is_some() {
        return Err(
            not_built("vitrum eval --labels").hint("leave it out: the data set's own labels are used")
        );
    }
    let overrides = args.settings.model_overrides()?;
    let data = Dataset::open(&args.data, Split::Val)?;
    let batch = BATCH.min(data.len());
    let mut run = Loaded::open(&args.weights, &overrides, args.on.device, batch, Mode::Infer, None)?;
    let report = run.evaluate(data, args.drop_last)?;
    if args.json {
        return print_json(&json!({
            "weights": args.weights.display().to_string(),
            "data": args.data,
            "images": report.count,
            "top1": report.top1,
            "top5": report.top5,
            "loss": report.loss,
            "img_per_s": report.img_per_s,
        }));
    }
    print(&format!(
        "{} images   top-1 {}   top-5 {}   loss {:.4}   {}",
        format::thousands(report.count as u64),
        format::percent(report.top1),
        format::percent(report.top5),
        report.loss,
        format::rate(report.img_per_s)
    ))
}

/// Samples of one pass.
const BATCH: usize = 64;
