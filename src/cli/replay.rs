//! `vitrum replay`: makes one update per stored batch and writes the trajectory.

use std::path::PathBuf;

use super::{On, Settings};
use crate::check::batch_file::BatchFile;
use crate::check::replay;
use crate::error::Result;
use crate::terminal;
use crate::weights;
use crate::weights::safetensors::{self, View};

#[derive(clap::Args)]
pub struct Args {
    /// A weights file, a checkpoint folder or a run directory (its best, else its last)
    #[arg(long, value_name = "FILE")]
    pub weights: PathBuf,
    /// Safetensors with `images_u8` [S,B,H,W,3] or `images`, and `labels` [S,B]
    #[arg(long, value_name = "FILE")]
    pub batches: PathBuf,
    /// Where to write `losses`, `grad_norms`, `lrs` [S] (F64) and `final/NAME` (F32)
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub on: On,
}

pub fn run(args: Args) -> Result<()> {
    let (of_file, of_recipe): (Vec<_>, Vec<_>) = args.settings.set.iter().cloned().partition(|setting| {
        ["model.", "weights.", "data.mean", "data.std"].iter().any(|start| setting.starts_with(start))
    });
    let overrides = Settings { set: of_file }.model_overrides()?;
    let batches = BatchFile::open(&args.batches, true)?;
    let mut file = weights::open(&args.weights, &overrides)?;
    file.set_image(batches.layout.image)?;
    file.notes.iter().for_each(|note| terminal::note(note));
    batches.check_classes(file.config.classes)?;

    let steps = batches.steps;
    let recipe = replay::recipe(&file.config, batches.layout.samples, steps as u64).with(&of_recipe)?;
    let trajectory = replay::run(&recipe, &file, &batches, args.on.device, |step, report| {
        terminal::say(&format!(
            "step {step}/{steps}   loss {:.6}   grad_norm {:.6}",
            report.loss, report.grad_norm
        ));
    })?;

    let shape = [steps];
    let mut views = vec![
        View::f64("losses", &shape, &trajectory.losses),
        View::f64("grad_norms", &shape, &trajectory.grad_norms),
        View::f64("lrs", &shape, &trajectory.lrs),
    ];
    for (name, tensor) in &trajectory.weights {
        views.push(View::f32(format!("final/{name}"), &tensor.shape, &tensor.values));
    }
    safetensors::write(&args.out, &Default::default(), views)?;
    terminal::say(&format!("trajectory of {steps} updates in {}", args.out.display()));
    Ok(())
}
