//! What the device decides about a run: what `"auto"` is in `train.precision`, `train.residual` and `train.micro_batch`, and
//! whether it fits.
//!
//! All are written into the run's recipe, because the bits depend on them: a resumed run keeps what its directory says.

use crate::backend::{self, Backend, Device, Precision, Residual, TargetKind};
use crate::error::{Error, Result};
use crate::files;
use crate::recipe::{MicroBatch, Recipe, TrainSection};
use crate::report::format;
use crate::vit::Mode;

use super::run::RunOptions;
use super::{Trainer, build};

/// Of the free memory, the tenth that `"auto"` leaves alone: for what no plan counts, as a recorded step on a card, or
/// slots and the system's cache on the CPU.
const SPARE: usize = 10;

/// More samples at a time make a CPU no faster.
const CPU_MOST: usize = 32;

/// The recipe with a precision and a micro-batch for this device. `data_size`: pictures of an epoch.
///
/// # Errors
/// The run does not fit into the device's own memory; the hint names the largest micro-batch that does.
pub fn settle(
    mut recipe: Recipe,
    backend: &dyn Backend,
    targets: TargetKind,
    data_size: usize,
) -> Result<Recipe> {
    recipe.train.precision = backend.precision();
    recipe.train.residual = recipe.train.residual.settled(backend.precision());
    let needs = |micro_batch: MicroBatch| -> Result<usize> {
        let mut recipe = recipe.clone();
        recipe.train.micro_batch = micro_batch;
        let model = build::model(&recipe, Mode::Train, backend.storage())?;
        let optimizer = build::optimizer(&recipe, &model, data_size)?;
        Ok(Trainer::plan(&model, &optimizer, build::slot_layout(&recipe, targets)).total_bytes())
    };
    let batch = recipe.train.batch;
    let most = if backend.storage().is_apart() { batch } else { batch.min(CPU_MOST) };
    let largest = |room: usize| -> Result<Option<usize>> {
        for micro_batch in (1..=most).rev().filter(|m| batch.is_multiple_of(*m)) {
            if needs(MicroBatch::Samples(micro_batch))? <= room {
                return Ok(Some(micro_batch));
            }
        }
        Ok(None)
    };
    let refuse = |needed: usize, free: usize, largest: Option<usize>| {
        let size = |bytes: usize| format::bytes(bytes as u64);
        let hint = match largest {
            Some(fits) => format!("`--set train.micro_batch={fits}` is the largest that fits"),
            None => "not even `train.micro_batch=1` fits: try `--set train.recompute=block`, another optimiser or a \
                     smaller model"
                .into(),
        };
        let (needed, free, device) = (size(needed), size(free), backend.describe());
        Error::new(format!("the run needs {needed}, and {free} are free on {device}")).hint(hint)
    };
    match recipe.train.micro_batch {
        MicroBatch::Auto => {
            let free = backend.free_memory()?;
            let Some(fits) = largest(free - free / SPARE)? else {
                return Err(refuse(needs(MicroBatch::Samples(1))?, free, largest(free)?));
            };
            recipe.train.micro_batch = MicroBatch::Samples(fits);
        }
        given if backend.storage().is_apart() => {
            let (needed, free) = (needs(given)?, backend.free_memory()?);
            if needed > free {
                return Err(refuse(needed, free, largest(free)?));
            }
        }
        MicroBatch::Samples(_) => {}
    }
    Ok(recipe)
}

/// Opens the run's device and settles the recipe for it. Returns lines for the header, too.
pub fn open(
    mut recipe: Recipe,
    options: &RunOptions,
    targets: TargetKind,
    data_size: usize,
) -> Result<(Box<dyn Backend>, Recipe, Vec<String>)> {
    let chosen = recipe.train.micro_batch == MicroBatch::Auto;
    let before = if options.resume { saved(options)? } else { None };
    if let Some(before) = &before {
        let t = &mut recipe.train;
        if t.precision == Precision::Auto {
            t.precision = before.train.precision;
        }
        if t.residual == Residual::Auto && t.precision == Precision::Bf16 {
            t.residual = before.train.residual;
        }
        if t.micro_batch == MicroBatch::Auto {
            t.micro_batch = before.train.micro_batch;
        }
    }
    let kept = recipe.train.precision;
    let words = in_words(&recipe.train);
    let backend = backend::select(options.device, &build::device_options(&recipe)).map_err(|e| {
        // Only the CPU refuses a precision.
        let refused =
            !matches!(options.device, Device::Cuda(_)) && !matches!(kept, Precision::Auto | Precision::F32);
        if !refused || before.is_none() {
            return e;
        }
        e.at(format!("the run in {} computes in {}", options.out.display(), words)).hint(
            "go on in f32 with `--set train.precision=f32`: from there on the bits are those of another run",
        )
    })?;
    let recipe = settle(recipe, &*backend, targets, data_size)?;
    let mut notes = Vec::new();
    if chosen && let MicroBatch::Samples(n) = recipe.train.micro_batch {
        notes.push(format!("batch    {} in micro-batches of {n}", recipe.train.batch));
    }
    if let Some(before) = before.filter(|b| b.train.precision != Precision::Auto) {
        let (now, then) = (in_words(&recipe.train), in_words(&before.train));
        if now != then {
            notes.push(format!(
                "resume   in {now}, after {then}: from here on the bits are those of another run"
            ));
        }
    }
    Ok((backend, recipe, notes))
}

/// `f32`, or `bf16 with the residual stream in f32`.
fn in_words(train: &TrainSection) -> String {
    let precision = format!("{:?}", train.precision).to_lowercase();
    match (train.precision, train.residual) {
        (Precision::Bf16, Residual::F32) => precision + " with the residual stream in f32",
        _ => precision,
    }
}

/// The recipe that the run's directory holds, if it holds one.
fn saved(options: &RunOptions) -> Result<Option<Recipe>> {
    let path = options.out.join("recipe.toml");
    if !path.exists() {
        return Ok(None);
    }
    let text = files::read_text(&path)?;
    let recipe = Recipe::from_toml(&text, &path.display().to_string());
    recipe.map(Some).map_err(|e| e.at("the run's own recipe says in what it computes"))
}
