//! Plans: a run's memory to the byte, its FLOPs and its steps, calculated without running it.

use serde_json::{Value, json};

use crate::backend::timed::Timing;
use crate::backend::{self, Arena, Cost, Device, MemoryPlan};
use crate::data::{self, Dataset};
use crate::error::Result;
use crate::optim::Optimizer;
use crate::recipe::{Duration, MicroBatch, Recipe};
use crate::report::format;
use crate::vit::Vit;

use super::setup::{DataShape, Parts};
use super::{header, setup};

/// Shown if the recipe names no data set.
const UNKNOWN_DATA: &str = "not opened";

/// A recipe with everything that follows from it.
pub struct Plan {
    /// The recipe, resolved.
    pub recipe: Recipe,
    /// The architecture, with the places of its tensors.
    pub model: Vit,
    /// The optimiser, with its groups.
    pub optimizer: Optimizer,
    /// Every buffer on the device.
    pub memory: MemoryPlan,
    /// Bytes of the batch slots in host memory.
    pub slot_bytes: usize,
    /// Number of training images, if the recipe names a data set.
    pub images: Option<usize>,
    /// The operations of one update, with their minimum cost.
    pub operations: Vec<Timing>,
}

impl Plan {
    /// Opens the recipe's data set, if it names one, to learn its size and classes. Memory is that of
    /// `device`.
    pub fn of(recipe: &Recipe, device: Device) -> Result<Self> {
        let (mut recipe, shape, images) = with_data(recipe)?;
        if recipe.train.micro_batch == MicroBatch::Auto {
            let backend = backend::select(device, &setup::device_options(&recipe)).map_err(|e| {
                e.hint("`train.micro_batch = \"auto\"` needs a device's free memory; without a device give a number")
            })?;
            recipe = setup::resolve_for_device(recipe, &*backend, shape, 1)?;
        }
        let t = &mut recipe.train;
        let (precision, storage) = backend::planned(device, t.precision, t.residual);
        (t.precision, t.residual) = (precision, t.residual.settled(precision));
        let mut parts = Parts::of(&recipe, storage, shape)?;
        let slot_bytes = parts.slot.bytes() * recipe.data.slots;
        let (memory, operations) = (parts.memory(), parts.operations()?);
        let Parts { model, optimizer, .. } = parts;
        Ok(Self { memory, recipe, model, optimizer, slot_bytes, images, operations })
    }

    fn steps(&self) -> u64 {
        self.recipe.train.steps.expect("a resolved recipe has its steps")
    }

    fn train_flops(&self) -> f64 {
        self.steps() as f64 * self.recipe.train.batch as f64 * self.model.config.train_flops() as f64
    }

    /// For people: header, memory table, compute, some learning rates, and the full recipe.
    pub fn text(&self, name: &str) -> String {
        let t = &self.recipe.train;
        let mut lines = vec![format!("recipe   {name}")];
        lines.extend(header::model_lines(&self.model, self.recipe.finetune.is_none()));
        let epochs = self.images.map(|n| self.steps() as f64 * t.batch as f64 / n as f64);
        let data =
            self.images.map_or(UNKNOWN_DATA.into(), |n| format!("{} images", format::thousands(n as u64)));
        lines.push(format!("data     {data}"));
        lines.push(format!(
            "train    {} steps of {} = {} images{}",
            format::thousands(self.steps()),
            t.batch,
            format::thousands(self.steps() * t.batch as u64),
            epochs.map_or(String::new(), |e| format!(", {e:.1} epochs"))
        ));
        lines.push(format!(
            "compute  {} in all, {} per step (3 x forward, matrix products only, all tokens in every block)",
            format::si(self.train_flops(), "FLOP"),
            format::si(t.batch as f64 * self.model.config.train_flops() as f64, "FLOP"),
        ));
        for rate in [1e11, 1e12, 4e14] {
            lines.push(format!(
                "         {} at {}",
                format::seconds(self.train_flops() / rate),
                format::si(rate, "FLOP/s")
            ));
        }
        lines.push(format!("lr       {}", self.learning_rates()));
        lines.extend(header::memory_lines(&self.memory));
        lines.push(format!(
            "         and {} in {} batch slots",
            format::bytes(self.slot_bytes as u64),
            self.recipe.data.slots
        ));
        lines.push("activations".into());
        for (what, bytes) in self.activations() {
            lines.push(format!("  {what:<24} {:>12}", format::bytes(bytes as u64)));
        }
        lines.push("operations of a step, minimum cost".into());
        lines.extend(self.operation_lines());
        lines.push(String::new());
        lines.push(self.recipe.to_toml());
        lines.join("\n")
    }

    /// Learning rates at a few steps that characterise the schedule.
    fn learning_rates(&self) -> String {
        let steps = self.steps();
        let warmup = match self.recipe.schedule.warmup {
            Duration::Steps(n) => n,
            other => other.to_steps(steps, self.recipe.train.batch, self.images.unwrap_or(1)),
        };
        let mut at = vec![0, warmup, steps / 2, steps - 1];
        at.sort_unstable();
        at.dedup();
        let rate = |t: u64| format!("{:.3e} at step {t}", self.optimizer.lr(t.min(steps - 1)));
        at.into_iter().map(rate).collect::<Vec<_>>().join(", ")
    }

    /// The activation arena's entries, summed over blocks: `blocks: qkv` is the sum of all `block i qkv`.
    pub fn activations(&self) -> Vec<(String, usize)> {
        let mut sums: Vec<(String, usize)> = Vec::new();
        for entry in &self.memory.activations {
            let words: Vec<&str> = entry.name.split(' ').collect();
            let what = match words.as_slice() {
                ["block", _, rest @ ..] => format!("blocks: {}", rest.join(" ")),
                _ => entry.name.clone(),
            };
            match sums.iter_mut().find(|(name, _)| *name == what) {
                Some((_, bytes)) => *bytes += entry.bytes,
                None => sums.push((what, entry.bytes)),
            }
        }
        sums
    }

    /// One line per operation: calls, FLOPs of matrix products, minimum bytes moved.
    fn operation_lines(&self) -> Vec<String> {
        let line = |operation: &str, calls: String, cost: Cost| {
            let flops = if cost.flops == 0 { String::new() } else { format::si(cost.flops as f64, "FLOP") };
            format!("  {operation:<26} {calls:>10} {flops:>14} {:>12}", format::bytes(cost.bytes()))
        };
        let each = self.operations.iter().map(|op| {
            let plural = if op.calls == 1 { "call" } else { "calls" };
            line(op.operation, format!("{} {plural}", op.calls), op.cost)
        });
        let all: Cost = self.operations.iter().map(|op| op.cost).sum();
        each.chain([line("all", String::new(), all)]).collect()
    }

    /// For programs.
    pub fn json(&self, name: &str) -> Value {
        let bytes = |arena: Arena| self.memory.bytes(arena);
        let operation = |op: &Timing| {
            json!({
                "operation": op.operation,
                "calls": op.calls,
                "flops": op.cost.flops,
                "read_bytes": op.cost.read,
                "written_bytes": op.cost.written,
            })
        };
        json!({
            "recipe": name,
            "params": self.model.layout.count(),
            "tokens": self.model.config.tokens(),
            "images": self.images,
            "steps": self.steps(),
            "batch": self.recipe.train.batch,
            "train_flops": self.train_flops(),
            "train_flops_per_image": self.model.config.train_flops(),
            "train_flops_done_per_image": self.model.flops_done(true),
            "memory": {
                "total_bytes": self.memory.total_bytes(),
                "params_bytes": bytes(Arena::Params),
                "grads_bytes": bytes(Arena::Grads),
                "optimizer_bytes": bytes(Arena::Moment1) + bytes(Arena::Moment2),
                "ema_bytes": bytes(Arena::Ema),
                "activations_bytes": bytes(Arena::Activations),
                "working_copy_bytes": bytes(Arena::Working),
                "workspace_bytes": bytes(Arena::Workspace),
                "batches_bytes": bytes(Arena::Batches),
                "update_bytes": bytes(Arena::Update),
                "exchange_bytes": bytes(Arena::Exchange),
                "slots_bytes": self.slot_bytes,
            },
            "operations_of_a_step": self.operations.iter().map(operation).collect::<Vec<_>>(),
            "config": self.recipe.to_toml(),
        })
    }
}

/// The recipe as its data set resolves it, the data's properties, and its number of images, if the recipe
/// names a data set.
///
/// # Errors
/// The recipe makes no sense; the data set cannot be opened.
pub(super) fn with_data(recipe: &Recipe) -> Result<(Recipe, DataShape, Option<usize>)> {
    recipe.validate()?;
    let data = open(recipe)?;
    let images = data.as_ref().map(Dataset::len);
    // Without data, an epoch has no length. Recipes that count in steps do not need it.
    let size = images.unwrap_or(recipe.train.batch);
    let shape = DataShape {
        images: size,
        ..data.as_ref().map_or(DataShape::labels(size), |d| DataShape::of(d, None))
    };
    let classes = data.as_ref().map_or(0, |d| d.classes().len());
    Ok((recipe.resolved(classes, size)?, shape, images))
}

/// The training data, if the recipe names any. The demo's size is known without drawing it. A path that does
/// not exist is an error, as in training.
fn open(recipe: &Recipe) -> Result<Option<Dataset>> {
    let Some(spec) = recipe.data.train.as_deref() else { return Ok(None) };
    Dataset::open(spec, data::Split::Train).map(Some)
}
