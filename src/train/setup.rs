//! Turns a recipe into everything that the first step needs: a device, the recipe as that device resolves it,
//! the model, the optimiser and the batch layout.
//!
//! A backend decides what `"auto"` means for `train.precision` when it is opened: bf16 on a GPU, f32 on the CPU.
//! This file decides the rest for that backend: `train.residual`, `train.micro_batch`, and whether the run fits.
//! The decisions are written into the run's recipe, because the bits depend on them. A resumed run keeps them.

use crate::backend::dry_run::DryRun;
use crate::backend::ranks::exchange_bytes;
use crate::backend::timed::{Timed, Timing};
use crate::backend::{
    self, Arena, Backend, Device, Loss, MemoryPlan, Normalise, Pixels, Precision, Residual, Shards,
    SlotLayout, Storage, TargetKind,
};
use crate::data::Dataset;
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::files;
use crate::optim::{self, Optimizer, RunLength};
use crate::recipe::{ClassWeights, MicroBatch, OnSpike, Recipe, SlotPixels, TrainSection};
use crate::report::format;
use crate::vit::{LastBlock, Mode, Param, Vit};

use super::run::{RunData, RunOptions};
use super::state::SHARED;
use super::trainer::{gradients, micro_batches};
use super::{class_weights, ranks};

/// `"auto"` leaves 1/SPARE of the free memory unused, for memory that no plan counts: a recorded step on a GPU,
/// or slots and the system's cache on the CPU.
const SPARE: usize = 10;

/// The largest automatic micro-batch on a CPU. Larger ones are not faster.
const CPU_MOST: usize = 32;

/// The properties of the training data that the run's parts depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataShape {
    /// How a slot stores a sample's classes.
    pub targets: TargetKind,
    /// Images per epoch.
    pub images: usize,
}

impl DataShape {
    /// Class indices, or rows of zeros and ones if either data set is multi-label. A run uses one form
    /// throughout, because a recorded step reads only one.
    pub fn of(train: &Dataset, val: Option<&Dataset>) -> Self {
        let targets = match train.is_multi_label() || val.is_some_and(Dataset::is_multi_label) {
            true => TargetKind::Dense { classes: train.classes().len() },
            false => TargetKind::Labels,
        };
        Self { targets, images: train.len() }
    }

    /// `images` images with one label each.
    pub fn labels(images: usize) -> Self {
        Self { targets: TargetKind::Labels, images }
    }
}

/// The parts of a recipe for a device with a given storage. Making them needs no device.
pub struct Parts {
    /// The architecture, bound to buffers.
    pub model: Vit,
    /// The optimiser, with its groups.
    pub optimizer: Optimizer,
    /// The layout of the largest slot that the run binds.
    pub slot: SlotLayout,
    /// The training objective.
    pub loss: Loss,
    /// Samples of a whole batch on one rank.
    pub batch: usize,
    /// How ranks divide the gradients; `None` for one rank without chunks.
    pub shards: Option<Shards>,
    /// Chunks of the whole batch, of all ranks.
    chunks: Option<usize>,
}

impl Parts {
    /// The parts of a resolved recipe, whose classes and micro-batch are known.
    pub fn of(recipe: &Recipe, storage: Storage, data: DataShape) -> Result<Self> {
        let model = model(recipe, Mode::Train, storage)?;
        let optimizer = optimizer(recipe, &model, data.images)?;
        let slot = slot_layout(recipe, data.targets);
        let loss = Loss {
            kind: recipe.loss.kind,
            label_smoothing: recipe.loss.label_smoothing,
            class_weights: model.class_weights,
        };
        let parts = Self {
            model,
            optimizer,
            slot,
            loss,
            batch: recipe.train.batch,
            shards: None,
            chunks: recipe.train.reduce_chunks,
        };
        Ok(parts.shared_by(1))
    }

    /// The same for one of `ranks` ranks, which have equal shares of every batch, of the moments and of the
    /// average. [`Parts::of`] are those of one rank.
    pub fn shared_by(mut self, ranks: usize) -> Self {
        self.batch /= ranks;
        self.slot.samples /= ranks;
        let several = ranks > 1;
        self.shards =
            (several || self.chunks.is_some()).then(|| Shards::new(self.model.layout.grad_elements, ranks));
        if several {
            self.model = self.model.with_samples_of_all_ranks(self.batch * ranks);
        }
        self
    }

    /// Bytes of every arena of the run: what `vitrum plan` prints and [`super::Trainer::new`] allocates.
    pub fn memory(&self) -> MemoryPlan {
        let mut plan = self.model.plan();
        plan.set_batch(self.slot);
        let optimizer = &self.optimizer;
        let shards = self.shards.as_ref().filter(|_| self.is_sharded());
        let update = backend::update_bytes(plan.storage(), optimizer.rule(), optimizer.segments(), shards);
        plan.set_bytes(Arena::Update, update);
        plan.set_bytes(Arena::Moment1, optimizer.moment1_bytes());
        plan.set_bytes(Arena::Moment2, optimizer.moment2_bytes());
        if optimizer.ema_decay().is_some() {
            plan.set_bytes(Arena::Ema, plan.bytes(Arena::Params));
        }
        let state = |plan: &MemoryPlan| -> usize { SHARED.iter().map(|arena| plan.bytes(*arena)).sum() };
        let Some(shards) = &self.shards else {
            plan.set_snapshot_bytes(plan.bytes(Arena::Params) + state(&plan));
            return plan;
        };
        plan.set_bytes(Arena::Grads, shards.padded() * 4);
        let chunks = self.chunks.unwrap_or(1) / shards.ranks();
        plan.set_bytes(Arena::Exchange, exchange_bytes(plan.storage(), shards, chunks.max(1)));
        if self.is_sharded() {
            let moment = optimizer.rule().first_moment();
            for (arena, bytes) in [(Arena::Moment1, moment.bytes()), (Arena::Moment2, 4), (Arena::Ema, 4)] {
                if plan.bytes(arena) > 0 {
                    plan.set_bytes(arena, shards.shard() * bytes);
                }
            }
        }
        // Each rank writes its shard, and an equal part of what all have.
        let ranks = shards.ranks();
        let of_state = if self.is_sharded() { state(&plan) } else { state(&plan).div_ceil(ranks) };
        plan.set_snapshot_bytes(plan.bytes(Arena::Params).div_ceil(ranks) + of_state);
        plan
    }

    /// Whether each rank has the moments and the average of its shard only.
    pub fn is_sharded(&self) -> bool {
        self.shards.as_ref().is_some_and(|shards| shards.ranks() > 1)
            && self.optimizer.rule().is_elementwise()
    }

    /// The operations of one update, in the order of their first calls, with their number of calls and the
    /// minimum cost of all calls. Computes nothing; the seconds in the result are meaningless.
    ///
    /// # Errors
    /// None known: [`DryRun`] does not fail.
    pub fn operations(&mut self) -> Result<Vec<Timing>> {
        // Costs depend on the storage, and on the precision only through it.
        let mut counted = Timed::new(Box::new(DryRun::new(self.model.plan().storage(), Precision::F32)));
        counted.expect_batch(self.slot);
        let micro_batches = micro_batches(&self.model, self.batch, &Collective::ALONE, false);
        gradients(&mut counted, &self.model, self.loss, &micro_batches)?;
        counted.update(&self.optimizer.update(0))?;
        Ok(counted.times().operations())
    }
}

/// Everything that [`super::Trainer::new`] takes.
pub struct Setup {
    /// The device.
    pub backend: Box<dyn Backend>,
    /// The recipe, with the device's decisions written into it.
    pub recipe: Recipe,
    /// Model, optimiser and loss.
    pub parts: Parts,
    /// C class weights in the order of the classes, if the loss uses them.
    pub class_weights: Option<Vec<f32>>,
    /// Lines for the run's header.
    pub notes: Vec<String>,
}

impl Setup {
    /// Opens the device of one of a run's ranks. A resumed run keeps the precision and the micro-batch in its
    /// directory's recipe.
    pub fn for_run(recipe: Recipe, data: &RunData, options: &RunOptions, ranks: &Collective) -> Result<Self> {
        let weights = class_weights::of(&recipe, &data.train);
        let (backend, recipe, mut notes) = open(recipe, options, data.shape(), ranks)?;
        notes.extend(weights.iter().map(|weights| class_weights::line(weights, data.train.classes())));
        let mut setup = Self::with(backend, recipe, data.shape(), weights)?;
        setup.parts = setup.parts.shared_by(ranks.size);
        Ok(Self { notes, ..setup })
    }

    /// Opens a device for data of which only the shape is known.
    ///
    /// # Errors
    /// Those of [`Setup::on`]; the device cannot be opened.
    pub fn open(recipe: &Recipe, device: Device, data: DataShape) -> Result<Self> {
        // Refused before a device is opened.
        class_weights::of_list(recipe)?;
        Self::on(backend::select(device, &device_options(recipe))?, recipe, data)
    }

    /// Like [`Setup::open`], on a device that is already open.
    ///
    /// # Errors
    /// The recipe is invalid; it does not fit on the device; its class weights need records to count.
    pub fn on(backend: Box<dyn Backend>, recipe: &Recipe, data: DataShape) -> Result<Self> {
        Self::on_rank(backend, recipe, data, &Collective::ALONE)
    }

    /// The same for one of several ranks, which share every batch.
    ///
    /// # Errors
    /// Those of [`Setup::on`]; the ranks cannot share the batch.
    pub fn on_rank(
        backend: Box<dyn Backend>,
        recipe: &Recipe,
        data: DataShape,
        group: &Collective,
    ) -> Result<Self> {
        let weights = class_weights::of_list(recipe)?;
        let recipe = ranks::settle(recipe.clone().in_chunks(), group.size)?;
        let mut recipe = resolve_for_device(recipe, &*backend, data, group.size)?;
        ranks::same_micro_batch(&mut recipe, group)?;
        let mut setup = Self::with(backend, recipe, data, weights)?;
        setup.parts = setup.parts.shared_by(group.size);
        Ok(setup)
    }

    fn with(
        backend: Box<dyn Backend>,
        recipe: Recipe,
        data: DataShape,
        class_weights: Option<Vec<f32>>,
    ) -> Result<Self> {
        let parts = Parts::of(&recipe, backend.storage(), data)?;
        Ok(Self { backend, recipe, parts, class_weights, notes: Vec::new() })
    }
}

/// The recipe with this device's precision and micro-batch, for one of `ranks` ranks.
///
/// # Errors
/// The run does not fit into the device's memory, and the hint names the largest
/// micro-batch that does; `train.on_spike = "skip"` on a GPU.
pub fn resolve_for_device(
    recipe: Recipe,
    backend: &dyn Backend,
    data: DataShape,
    ranks: usize,
) -> Result<Recipe> {
    if recipe.train.on_spike == OnSpike::Skip && backend.storage().has_device_memory() {
        return Err(Error::usage("`train.on_spike = \"skip\"` is not built yet for GPUs")
            .hint("use `--set train.on_spike=report`, with `train.rewind_after` to go back after several such steps"));
    }
    let mut recipe = recipe.in_chunks();
    recipe.train.precision = backend.precision();
    recipe.train.residual = recipe.train.residual.settled(backend.precision());
    let needs = |micro_batch: MicroBatch| -> Result<usize> {
        let mut recipe = recipe.clone();
        recipe.train.micro_batch = micro_batch;
        let plan = Parts::of(&recipe, backend.storage(), data)?.shared_by(ranks).memory();
        // A device with memory of its own has the copy for checkpoints elsewhere.
        let copy = if plan.storage().has_device_memory() { 0 } else { plan.snapshot_bytes() };
        Ok(plan.total_bytes() + copy)
    };
    let batch = recipe.train.batch / ranks;
    let most = if backend.storage().has_device_memory() { batch } else { batch.min(CPU_MOST) };
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
        Error::new(format!("the run needs {needed}, but only {free} are free on {device}")).hint(hint)
    };
    match recipe.train.micro_batch {
        MicroBatch::Auto => {
            let free = backend.free_memory()?;
            let Some(fits) = largest(free - free / SPARE)? else {
                return Err(refuse(needs(MicroBatch::Samples(1))?, free, largest(free)?));
            };
            recipe.train.micro_batch = MicroBatch::Samples(fits);
        }
        given if backend.storage().has_device_memory() => {
            let (needed, free) = (needs(given)?, backend.free_memory()?);
            if needed > free {
                return Err(refuse(needed, free, largest(free)?));
            }
        }
        MicroBatch::Samples(_) => {}
    }
    Ok(recipe)
}

/// Opens the run's device and resolves the recipe for it. Also returns lines for the header.
fn open(
    mut recipe: Recipe,
    options: &RunOptions,
    data: DataShape,
    group: &Collective,
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
    let recipe = ranks::settle(recipe, group.size)?;
    let kept = recipe.train.precision;
    let words = in_words(&recipe.train);
    let threads = group.threads(recipe.train.threads);
    let on = backend::DeviceOptions { threads, ..device_options(&recipe) };
    let backend = backend::select(options.device, &on).map_err(|e| {
        // Only the CPU refuses precisions.
        let refused =
            !matches!(options.device, Device::Cuda(_)) && !matches!(kept, Precision::Auto | Precision::F32);
        if !refused || before.is_none() {
            return e;
        }
        e.at(format!("the run in {} computes in {}", options.out.display(), words)).hint(
            "continue with `--set train.precision=f32`; results are then not bit-identical to the original run",
        )
    })?;
    let mut recipe = resolve_for_device(recipe, &*backend, data, group.size)?;
    ranks::same_micro_batch(&mut recipe, group)?;
    let mut notes: Vec<String> = ranks::line(&recipe, group).into_iter().collect();
    if chosen && let MicroBatch::Samples(n) = recipe.train.micro_batch {
        notes.push(format!("batch    {} in micro-batches of {n}", recipe.train.batch));
    }
    if let Some(before) = before.filter(|b| b.train.precision != Precision::Auto) {
        let (now, then) = (in_words(&recipe.train), in_words(&before.train));
        if now != then {
            notes.push(format!(
                "resume   in {now}, after {then}: results are no longer bit-identical to the original run"
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

/// The recipe in the run's directory, if there is one.
fn saved(options: &RunOptions) -> Result<Option<Recipe>> {
    let path = options.out.join("recipe.toml");
    if !path.exists() {
        return Ok(None);
    }
    let text = files::read_text(&path)?;
    let recipe = Recipe::from_toml(&text, &path.display().to_string());
    recipe.map(Some).map_err(|e| e.at("the precision of the run is read from its own recipe"))
}

/// The recipe's model. `model.classes` must be set.
pub fn model(recipe: &Recipe, mode: Mode, storage: Storage) -> Result<Vit> {
    let Some(classes) = recipe.model.classes else {
        return Err(
            Error::usage("the number of classes is not known").hint("set it with `--set model.classes=N`")
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

/// The recipe's options for opening a device.
pub fn device_options(recipe: &Recipe) -> backend::DeviceOptions {
    let t = &recipe.train;
    backend::DeviceOptions {
        precision: t.precision,
        residual: t.residual,
        threads: t.threads,
        graph: t.graph,
        check_launches: t.check_launches,
        // Ranks must compute a chunk in one way, whatever each of them would measure.
        deterministic: t.deterministic || t.reduce_chunks.is_some(),
        kernels: t.kernels,
    }
}

/// The layout of the run's slots.
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

/// Samples per forward and backward pass.
fn micro_batch(recipe: &Recipe) -> Result<usize> {
    match recipe.train.micro_batch {
        MicroBatch::Samples(0) => Ok(recipe.train.batch),
        MicroBatch::Samples(n) => Ok(n),
        MicroBatch::Auto => {
            Err(Error::usage("`train.micro_batch` is \"auto\", but no device has decided it")
                .hint("give a number of samples"))
        }
    }
}
