//! `vitrum features`: writes the input of a model's head for every picture of a data set, for other programs.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{On, Settings};
use crate::data::{self, Split};
use crate::error::{At, Result};
use crate::infer::loaded::LoadedModel;
use crate::infer::probe;
use crate::infer::protocol::Protocol;
use crate::report::format;
use crate::terminal;
use crate::weights::safetensors::{self, View};

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// A packed data set, an image folder, or `demo`
    #[arg(long, value_name = "DIR")]
    pub data: String,
    /// Where to write `features` [N,D] (F32) and `labels` [N] (I64), as safetensors; if pictures may have several
    /// labels, these are zeros and ones [N,C]
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The part to read: train, val or test [default: val, or everything if the data has no parts]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "PART")]
    pub split: Option<Split>,
    /// How pictures are prepared [default: what the weights file says]
    #[arg(long, value_name = "NAME")]
    pub protocol: Option<String>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
}

/// Pictures per batch.
pub(super) const BATCH: usize = 64;

pub fn run(args: Args) -> Result<()> {
    let protocol = args.protocol.as_deref().map(Protocol::named).transpose()?;
    let overrides = args.settings.model_overrides()?;
    crate::weights::locate(&args.weights)?;
    let (data, part) = data::measured(&args.data, args.split)?;
    super::say_part(&args.data, part, data.len());
    let batch = BATCH.min(data.len());
    let mut model = LoadedModel::open_backbone(&args.weights, &overrides, args.on.device, batch)?;
    super::say_notes(&model.notes);
    let protocol = protocol.map_or_else(|| model.protocol(), Ok)?;
    let mut records = Vec::new();
    let samples = probe::features_of(&mut model, &data, protocol, |record| records.push(record))?;

    // A picture with several labels, or none, has a row of zeros and ones.
    let classes = data.classes().len();
    let (labels, shape): (Vec<i64>, Vec<usize>) = match data.is_multi_label() {
        false => (samples.labels.iter().map(|label| *label as i64).collect(), vec![samples.len()]),
        true => {
            let mut ones = vec![0; samples.len() * classes];
            for (row, record) in ones.chunks_exact_mut(classes).zip(&records) {
                data.labels(*record).for_each(|label| row[label] = 1);
            }
            (ones, vec![samples.len(), classes])
        }
    };
    let metadata = BTreeMap::from([
        ("weights".to_string(), args.weights.display().to_string()),
        ("data".to_string(), args.data.clone()),
        ("split".to_string(), part.map_or("all", Split::name).to_string()),
        ("classes".to_string(), serde_json::to_string(data.classes()).at("class names")?),
    ]);
    let views = vec![
        View::f32("features", &[samples.len(), samples.width], &samples.features),
        View::i64("labels", &shape, &labels),
    ];
    safetensors::write(&args.out, &metadata, views)?;
    terminal::say(&format!(
        "{} features of {} images in {}",
        samples.width,
        format::thousands(samples.len() as u64),
        args.out.display()
    ));
    Ok(())
}
