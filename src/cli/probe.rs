//! `vitrum probe`: measures how well a model's features separate the classes of a data set, without training
//! it.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::features::BATCH;
use super::{On, Settings, numbers, print, print_json};
use crate::data::{self, Dataset, Split};
use crate::error::{Error, Result};
use crate::infer::loaded::LoadedModel;
use crate::infer::probe::{self, chosen};
use crate::infer::protocol::Protocol;
use crate::infer::ridge::Samples;
use crate::report::{format, table};

/// What is fitted to the features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    Ridge,
    Fewshot,
    Knn,
}

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// A data set with a training and a validation part
    #[arg(long, value_name = "DIR")]
    pub data: String,
    /// The part to score on; the probe is fitted on the training part [default: val]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "PART")]
    pub split: Option<Split>,
    /// ridge: a linear classifier on all training pictures; fewshot: on a few per class; knn: nearest
    /// neighbours
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = Method::Ridge)]
    pub method: Method,
    /// L2 penalties [default: 1024 for fewshot; for ridge, the best of a grid on a held-out tenth]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = numbers::real(0.0..=f64::MAX))]
    pub l2: Vec<f64>,
    /// For fewshot: pictures per class
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1, 5, 10, 25], value_parser = numbers::whole::<usize>(1..=u64::MAX))]
    pub shots: Vec<usize>,
    /// For fewshot: how many random selections of pictures to average over
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = numbers::whole::<u64>(1..=u64::MAX))]
    pub seeds: u64,
    /// For knn: numbers of neighbours
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [10, 20], value_parser = numbers::whole::<usize>(1..=u64::MAX))]
    pub k: Vec<usize>,
    /// Use only this many training pictures, selected at random with a fixed seed
    #[arg(long, value_name = "N", value_parser = numbers::whole::<u64>(1..=u64::MAX))]
    pub images: Option<u64>,
    /// How pictures are prepared [default: what the weights file says]
    #[arg(long, value_name = "NAME")]
    pub protocol: Option<String>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// big_vision's few-shot penalty.
const FEWSHOT_L2: f64 = 1024.0;

pub fn run(args: Args) -> Result<()> {
    check(&args)?;
    let protocol = args.protocol.as_deref().map(Protocol::named).transpose()?;
    let overrides = args.settings.model_overrides()?;
    crate::weights::locate(&args.weights)?;
    let mut train = Dataset::open(&args.data, Split::Train)?;
    let (val, part) = data::measured(&args.data, args.split)?;
    if part.is_none() {
        let lacks = "no validation part; a probe is scored on one";
        return Err(Error::new(format!("{}: {lacks}", train.name()))
            .hint("give a folder with `train/` and `val/` inside"));
    }
    if train.is_multi_label() || val.is_multi_label() {
        return Err(Error::new(format!(
            "{}: its pictures may have several labels, and a probe takes one each",
            train.name()
        ))
        .hint("use `vitrum finetune` with `--set loss.kind=sigmoid`"));
    }
    let val = val.among(train.classes())?;
    super::say_part(&args.data, part, val.len());
    if let Some(images) = args.images {
        train = train.take(images as usize);
    }
    let batch = BATCH.min(train.len()).min(val.len());
    let mut model = LoadedModel::open_backbone(&args.weights, &overrides, args.on.device, batch)?;
    super::say_notes(&model.notes);
    let protocol = protocol.map_or_else(|| model.protocol(), Ok)?;
    let mut features = |data: &Dataset| probe::features(&mut model, data, protocol);
    let (of_train, of_val) = (features(&train)?, features(&val)?);
    let (results, text) = fit(&args, &of_train, &of_val, train.classes().len())?;
    if !args.json {
        return print(&text);
    }
    print_json(&json!({
        "weights": args.weights.display().to_string(),
        "data": args.data,
        "split": part.map(Split::name),
        "method": format!("{:?}", args.method).to_lowercase(),
        "train_images": of_train.len(),
        "images": of_val.len(),
        "width": of_train.width,
        "results": results,
    }))
}

/// Results for programs, and for people.
fn fit(args: &Args, train: &Samples, val: &Samples, classes: usize) -> Result<(Value, String)> {
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    match args.method {
        Method::Ridge => {
            let grid: Vec<f64> = (-5..=10).map(|power| 4f64.powi(power)).collect();
            let penalties = if args.l2.is_empty() { &grid } else { &args.l2 };
            let scores = probe::ridge(train, val, classes, penalties)?;
            let best = chosen(&scores);
            let row = |score: &probe::RidgeScore| {
                let mark = if score == best { "<- chosen" } else { "" };
                let held_out = score.held_out.map_or("-".into(), percent);
                vec![score.l2.to_string(), held_out, percent(score.top1), mark.into()]
            };
            let rows: Vec<_> = scores.iter().map(row).collect();
            let text = format!(
                "{}\nridge: top-1 {} on {} images, l2 {}\n",
                table(&["l2", "held out", "top-1", ""], &rows),
                percent(best.top1),
                format::thousands(val.len() as u64),
                best.l2
            );
            Ok((json!({ "top1": best.top1, "l2": best.l2, "grid": scores }), text))
        }
        Method::Fewshot => {
            let l2 = args.l2.first().copied().unwrap_or(FEWSHOT_L2);
            let scores = probe::fewshot(train, val, classes, &args.shots, args.seeds, l2)?;
            let row = |score: &probe::FewshotScore| {
                let seeds = score.top1.iter().map(|top1| percent(*top1)).collect::<Vec<_>>().join(", ");
                vec![score.shots.to_string(), percent(score.mean()), seeds]
            };
            let rows: Vec<_> = scores.iter().map(row).collect();
            let entry = |score: &probe::FewshotScore| json!({ "shots": score.shots, "mean": score.mean(), "top1": score.top1 });
            let results = json!({ "l2": l2, "shots": scores.iter().map(entry).collect::<Vec<_>>() });
            Ok((results, table(&["shots", "mean top-1", "of each seed"], &rows)))
        }
        Method::Knn => {
            let scores: Vec<(usize, f64)> =
                args.k.iter().map(|k| (*k, probe::knn(train, val, classes, *k))).collect();
            let rows: Vec<_> = scores.iter().map(|(k, top1)| vec![k.to_string(), percent(*top1)]).collect();
            let results: Vec<_> = scores.iter().map(|(k, top1)| json!({ "k": k, "top1": top1 })).collect();
            Ok((json!(results), table(&["k", "top-1"], &rows)))
        }
    }
}

fn check(args: &Args) -> Result<()> {
    if args.l2.contains(&0.0) {
        return Err(Error::usage("`--l2 0`").hint("a penalty is a number above 0, as in `--l2 1024`"));
    }
    if args.method == Method::Fewshot && args.l2.len() > 1 {
        return Err(Error::usage("`--l2` takes one penalty for `--method fewshot`")
            .hint("`--method ridge` tries several"));
    }
    Ok(())
}
