//! `vitrum grad`: writes logits, loss and every gradient of one batch, for comparison with other
//! implementations.

use std::path::PathBuf;

use super::{On, Settings, numbers};
use crate::backend::{DeviceOptions, Loss, LossKind, Residual};
use crate::check::batch_file::BatchFile;
use crate::error::Result;
use crate::infer::loaded::{LoadedModel, gradients};
use crate::terminal;
use crate::vit::Mode;
use crate::weights::safetensors::{self, View};

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Safetensors with `images` [B,H,W,3] and `labels` [B] or `targets` [B,C]
    #[arg(long, value_name = "FILE")]
    pub batch: PathBuf,
    /// Where to write `logits` [B,C], `loss` [1] and `grad/NAME`, all F32
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The loss: softmax or sigmoid [default: softmax]
    #[arg(long, value_enum, hide_possible_values = true)]
    pub loss: Option<LossKind>,
    /// Label smoothing: targets become (1-S)·onehot + S/C
    #[arg(long, value_name = "S", default_value_t = 0.0, value_parser = numbers::real(0.0..=1.0))]
    pub label_smoothing: f64,
    /// The type in which a GPU stores the residual stream: bf16 or f32
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = Residual::Auto)]
    pub residual: Residual,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
}

pub fn run(args: Args) -> Result<()> {
    let overrides = args.settings.model_overrides()?;
    let batch = BatchFile::open(&args.batch, false)?;
    let (samples, image) = (batch.layout.samples, batch.layout.image);
    let options = DeviceOptions { residual: args.residual, ..DeviceOptions::default() };
    let on = (args.on.device, &options);
    let mut run = LoadedModel::open(&args.weights, &overrides, on, samples, Mode::Train, Some(image))?;
    super::say_notes(&run.notes);
    batch.check_classes(run.model.config.classes)?;
    let slot = batch.slot(&*run.backend, 0)?;
    let kind = args.loss.or(overrides.loss).unwrap_or(LossKind::Softmax);
    let loss = Loss { label_smoothing: args.label_smoothing as f32, ..Loss::plain(kind) };
    let report = gradients(&mut *run.backend, &run.model, loss, slot)?;

    let mut out = vec![("loss".to_string(), vec![1], vec![report.loss as f32])];
    let classes = run.model.config.classes;
    let mut logits = vec![0.0; samples * classes];
    run.backend.read(run.model.logits(), &mut logits)?;
    out.push(("logits".into(), vec![samples, classes], logits));
    for param in run.model.layout.parameters() {
        let mut values = vec![0.0; param.len()];
        run.backend.read(param.grad().expect("nothing is frozen"), &mut values)?;
        out.push((format!("grad/{}", param.name), param.shape.clone(), param.to_file_order(&values)));
    }
    let views = out.iter().map(|(name, shape, values)| View::f32(name, shape, values)).collect();
    safetensors::write(&args.out, &Default::default(), views)?;
    terminal::say(&format!(
        "loss {:.6}, gradients of {} tensors in {}",
        report.loss,
        out.len() - 2,
        args.out.display()
    ));
    Ok(())
}
