//! From a resolved recipe to the parts of a trainer.

use crate::backend::{self, Loss, Normalise, Pixels, SlotLayout, Storage, TargetKind};
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::optim::{self, Optimizer, RunLength};
use crate::recipe::{ClassWeights, MicroBatch, Recipe, SlotPixels};
use crate::vit::{LastBlock, Mode, Param, Vit};

use super::trainer::TrainerOptions;

/// The recipe's model. `model.classes` must be known by now.
pub fn model(recipe: &Recipe, mode: Mode, storage: Storage) -> Result<Vit> {
    let Some(classes) = recipe.model.classes else {
        return Err(
            Error::usage("the number of classes is not known").hint("set it with `--set model.classes=...`")
        );
    };
    let config = recipe.model_config(classes)?;
    recipe.check_class_weights(classes)?;
    let frozen = |param: &Param| optim::is_frozen(&recipe.optim, param);
    let storage = Storage { recompute: recipe.train.recompute, ..storage };
    let last_block = if recipe.train.prune_last_block { LastBlock::Pruned } else { LastBlock::Whole };
    let normalise = recipe.data.normalise(Normalise::INCEPTION);
    let model = Vit::new(config, normalise, micro_batch(recipe)?, mode, storage, last_block, frozen);
    let weighs = mode == Mode::Train && recipe.loss.class_weights != ClassWeights::None;
    Ok(if weighs { model.with_class_weights() } else { model })
}

/// The recipe's optimiser for a data set of `data_size` images.
pub fn optimizer(recipe: &Recipe, model: &Vit, data_size: usize) -> Result<Optimizer> {
    let run = RunLength { steps: recipe.steps(data_size)?, batch: recipe.train.batch, data_size };
    Optimizer::new(&recipe.optim, &recipe.schedule, &model.layout, &model.config, run)
}

/// How the recipe wants its device opened.
pub fn device_options(recipe: &Recipe) -> backend::Options {
    let t = &recipe.train;
    backend::Options {
        precision: t.precision,
        residual: t.residual,
        threads: t.threads,
        graph: t.graph,
        check_launches: t.check_launches,
        deterministic: t.deterministic,
    }
}

/// What a slot of the run holds.
pub fn slot_layout(recipe: &Recipe, targets: TargetKind) -> SlotLayout {
    SlotLayout {
        samples: recipe.train.batch,
        image: (recipe.model.image.height, recipe.model.image.width),
        pixels: match recipe.data.pixels {
            SlotPixels::U8 => Pixels::U8,
            SlotPixels::F32 => Pixels::F32,
        },
        targets,
    }
}

/// Class indices, or rows of zeros and ones where samples of either may have several classes: one form for a whole run, because a
/// recorded step reads one.
pub fn targets(train: &Dataset, val: Option<&Dataset>) -> TargetKind {
    match train.is_multi_label() || val.is_some_and(Dataset::is_multi_label) {
        true => TargetKind::Dense { classes: train.classes().len() },
        false => TargetKind::Labels,
    }
}

/// Batch, seed and objective, for slots of labels. Class weights come with [`super::Trainer::weigh_classes`].
pub fn options(recipe: &Recipe) -> TrainerOptions {
    TrainerOptions {
        loss: Loss { label_smoothing: recipe.loss.label_smoothing, ..Loss::plain(recipe.loss.kind) },
        batch: recipe.train.batch,
        seed: recipe.train.seed,
        slot: slot_layout(recipe, TargetKind::Labels),
    }
}

/// Samples of one forward and backward.
fn micro_batch(recipe: &Recipe) -> Result<usize> {
    match recipe.train.micro_batch {
        MicroBatch::Samples(0) => Ok(recipe.train.batch),
        MicroBatch::Samples(n) => Ok(n),
        MicroBatch::Auto => {
            Err(Error::usage("`train.micro_batch` is \"auto\", and no device has been asked")
                .hint("give a number of samples"))
        }
    }
}
