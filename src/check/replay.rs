//! Training on stored batches in their order, without augmentation. Other programs can reproduce the
//! trajectory.

use crate::backend::{Device, StepReport};
use crate::dist::Collective;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::vit::ModelConfig;
use crate::weights::{ModelFile, Tensors};

use super::batch_file::BatchFile;
use crate::train::checkpoint::read_weights;
use crate::train::{DataShape, Setup, Trainer};

/// The result of a replay, with one value per update.
pub struct Trajectory {
    /// The loss before the update.
    pub losses: Vec<f64>,
    /// The gradient norm before clipping.
    pub grad_norms: Vec<f64>,
    /// The head's learning rate in the update.
    pub lrs: Vec<f64>,
    /// The weights after the last update.
    pub weights: Tensors,
}

/// The default recipe with this model, batch size and length. `--set` changes the rest.
pub fn recipe(config: &ModelConfig, batch: usize, steps: u64) -> Recipe {
    let mut recipe = Recipe::default();
    recipe.model = recipe.model.of_file(config);
    recipe.train.batch = batch;
    recipe.train.steps = Some(steps);
    recipe
}

/// Makes one update per batch, in file order. Calls `watch` after every step.
pub fn run(
    recipe: &Recipe,
    file: &ModelFile,
    batches: &BatchFile,
    device: Device,
    mut watch: impl FnMut(u64, &StepReport),
) -> Result<Trajectory> {
    let steps = batches.steps;
    let setup = Setup::open(recipe, device, DataShape::labels(steps * recipe.train.batch))?;
    let mut trainer = Trainer::new(setup, Collective::ALONE, Some(file))?;

    let mut out = Trajectory { losses: vec![], grad_norms: vec![], lrs: vec![], weights: Tensors::new() };
    for step in 0..steps {
        let batch = batches.slot(&*trainer.backend, step)?;
        let (_, report) = trainer.step(batch)?;
        out.losses.push(report.loss);
        out.grad_norms.push(report.grad_norm);
        out.lrs.push(trainer.optimizer.lr(step as u64));
        watch(trainer.step, &report);
    }
    out.weights = read_weights(&trainer.model, &mut *trainer.backend)?;
    Ok(out)
}
