//! `vitrum eval`: top-1, top-5 and loss of a model on a data set, under one system's evaluation protocol or
//! under all.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{On, Settings, numbers, print, print_json};
use crate::backend::DeviceOptions;
use crate::data::{self, Split};
use crate::error::Result;
use crate::infer::loaded::LoadedModel;
use crate::infer::pass::{Output, PassReport};
use crate::infer::protocol::Protocol;
use crate::infer::score::{OfClass, Score, Truth};
use crate::recipe::PROTOCOLS;
use crate::report::{format, table};
use crate::terminal;
use crate::vit::Mode;

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// A packed data set, an image folder, or `demo`
    #[arg(long, value_name = "DIR")]
    pub data: String,
    /// The part to measure: train, val or test [default: val, or everything if the data has no parts]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "PART")]
    pub split: Option<Split>,
    /// How pictures are prepared: a system's name, or `all` for a table [default: what the weights file says]
    #[arg(long, value_name = "NAME")]
    pub protocol: Option<String>,
    /// Skip an incomplete last batch, as vit_jax does (with --batch 512)
    #[arg(long)]
    pub drop_last: bool,
    /// Pictures per batch
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = numbers::whole::<u16>(1..=u16::MAX.into()))]
    pub batch: u16,
    /// Labels that replace the data set's: one line (or one entry of a JSON list) per picture, names or
    /// numbers
    #[arg(long, value_name = "FILE")]
    pub labels: Option<PathBuf>,
    /// Also show the accuracy of each class
    #[arg(long)]
    pub per_class: bool,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let protocols = match args.protocol.as_deref() {
        None => Vec::new(),
        Some("all") => PROTOCOLS.map(|(name, ..)| name).to_vec(),
        Some(name) => vec![name],
    };
    let named = protocols.iter().map(|name| Protocol::named(name)).collect::<Result<Vec<_>>>()?;
    let overrides = args.settings.model_overrides()?;
    crate::weights::locate(&args.weights)?;
    let (data, part) = data::measured(&args.data, args.split)?;
    super::say_part(&args.data, part, data.len());
    let batch = usize::from(args.batch).min(data.len());
    let mut model = LoadedModel::open(
        &args.weights,
        &overrides,
        (args.on.device, &DeviceOptions::default()),
        batch,
        Mode::Infer,
        None,
    )?;
    super::say_notes(&model.notes);
    let (classes, names) = (model.model.config.classes, model.meta.classes.clone());
    let truth = match &args.labels {
        Some(path) => Truth::read(path, &data, classes, names.as_deref())?,
        None => Truth::of(&data, classes, names.as_deref())?,
    };
    if let Some(matching) = &truth.matching {
        terminal::say(&matching.line(classes));
    }
    let kind = model.loss();
    if data.is_multi_label() && args.labels.is_none() && model.meta.loss.is_none() {
        terminal::note(
            "the file does not say its head's loss: assumed softmax, though pictures may have several labels; \
             `--set loss.kind=sigmoid` changes it",
        );
    }
    let named = if named.is_empty() { vec![model.protocol()?] } else { named };
    let mut measure = |protocol: Protocol| -> Result<Measured> {
        let protocol = Protocol { drop_last: args.drop_last, ..protocol };
        let mut score = Score::new(classes, kind, &truth);
        let see = |picture: usize, logits: &[f32]| score.add(&truth, picture, logits);
        let report = model.pass(&data, protocol, Output::Logits, see)?;
        Ok(Measured { protocol, score, report })
    };
    let what = json!({ "weights": args.weights.display().to_string(), "data": args.data, "split": part.map(Split::name) });
    if args.protocol.as_deref() == Some("all") {
        let all = named.into_iter().map(measure).collect::<Result<Vec<_>>>()?;
        if args.json {
            let entries: Vec<Value> = all.iter().map(|one| one.json(names.as_deref())).collect();
            return print_json(&merged(what, json!({ "protocols": entries })));
        }
        return print(&all_protocols(&all));
    }
    let one = measure(named[0])?;
    if args.json {
        let what = merged(what, json!({ "classes_matched": truth.matching.as_ref().map(|m| m.by) }));
        return print_json(&merged(what, one.json(names.as_deref())));
    }
    print(&one.text())?;
    if args.per_class { print(&one.per_class(names.as_deref())) } else { Ok(()) }
}

/// The probability from which a multi-label model's answer counts as yes.
const YES: f64 = 0.5;

/// A model under one protocol.
struct Measured {
    protocol: Protocol,
    score: Score,
    report: PassReport,
}

impl Measured {
    /// One line.
    fn text(&self) -> String {
        // With five classes or fewer, top-5 is always 100 %.
        let top5 = match self.score.classes() {
            ..=5 => String::new(),
            _ => format!("   top-5 {}", format::percent(self.score.top5())),
        };
        let mut text = format!(
            "{} images   top-1 {}{top5}   loss {:.4}   {}",
            format::thousands(self.score.images as u64),
            format::percent(self.score.top1()),
            self.score.loss(),
            format::rate(self.report.img_per_s)
        );
        if let Some(several) = self.score.several(YES) {
            text += &format!("   mAP {}   F1 {}", format::percent(several.map), format::percent(several.f1));
        }
        if self.score.unlabelled > 0 {
            text += &format!("   {} without a label", format::thousands(self.score.unlabelled as u64));
        }
        text
    }

    fn json(&self, names: Option<&[String]>) -> Value {
        let protocol = json!({
            "protocol": self.protocol.name(),
            "resize": self.protocol.resize,
            "crop_ratio": self.protocol.crop_ratio,
            "drop_last": self.protocol.drop_last,
            "img_per_s": self.report.img_per_s,
        });
        let several = self.score.several(YES).map_or(json!({}), |several| json!(several));
        merged(merged(protocol, self.score.json(names)), several)
    }

    fn per_class(&self, names: Option<&[String]>) -> String {
        let row = |of: OfClass| {
            let name = names.and_then(|names| names.get(of.class)).map_or(String::new(), String::clone);
            let mut row = vec![of.class.to_string(), name, of.images.to_string(), format::percent(of.top1)];
            row.extend(of.ap.map(format::percent));
            row
        };
        let rows: Vec<_> = self.score.per_class().map(row).collect();
        let head = ["class", "name", "images", "top-1", "AP"];
        table(&head[..rows.first().map_or(4, Vec::len)], &rows)
    }
}

/// One row per protocol. The table shows why one file has several published accuracies.
fn all_protocols(all: &[Measured]) -> String {
    let row = |one: &Measured| {
        vec![
            one.protocol.name().unwrap_or_default().to_string(),
            serde_json::to_value(one.protocol.resize)
                .map_or(String::new(), |v| v.to_string().replace('"', "")),
            format!("{:.3}", one.protocol.crop_ratio),
            one.score.images.to_string(),
            format!("{:.2} %", 100.0 * one.score.top1()),
            format!("{:.2} %", 100.0 * one.score.top5()),
            format!("{:.4}", one.score.loss()),
        ]
    };
    let head = ["protocol", "resize", "crop ratio", "images", "top-1", "top-5", "loss"];
    table(&head, &all.iter().map(row).collect::<Vec<_>>())
}

/// The fields of both objects.
fn merged(mut first: Value, second: Value) -> Value {
    if let (Value::Object(fields), Value::Object(more)) = (&mut first, second) {
        fields.extend(more);
    }
    first
}
