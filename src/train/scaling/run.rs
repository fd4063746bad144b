//! A recipe on many GPUs: its parts for each number of ranks, and what is printed about them.

use serde_json::{Value, json};

use crate::backend::{self, Arena, Device, Shards};
use crate::error::{Error, Result};
use crate::recipe::{MicroBatch, Recipe};
use crate::report::format;
use crate::train::setup::{DataShape, Parts};
use crate::train::{plan, ranks};

use super::chip::{CHIPS, CORE, Chip, StepTime};
use super::links::{Link, Links};
use super::{ASSUMED, Cluster, Row, Source, Step, Work};

/// The share of a GPU's memory that an automatic micro-batch may fill, as in a run.
const FILLED: f64 = 0.9;

/// What the command line asks for.
#[derive(Clone, Debug)]
pub struct Options {
    /// N
    pub ranks: usize,
    /// Ranks of a node.
    pub per_node: usize,
    /// Names of links, as [`Links::named`] takes them.
    pub links: Vec<String>,
    /// The GPU by name; `None` for ranks on a CPU.
    pub gpu: Option<String>,
    /// The time of a step on one.
    pub source: Source,
}

/// A recipe on many GPUs.
pub struct ScalePlan {
    /// 1, 2, 4, ... and N ranks, as far as they can share the batch.
    pub rows: Vec<Row>,
    /// The last row's step.
    pub step: Step,
    /// The last row's cluster.
    pub cluster: Cluster,
    /// The last row's bytes of each rank.
    pub memory: Memory,
    chip: Chip,
    source: Source,
    steps: u64,
    batch: usize,
}

/// Bytes of a rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Moments of the optimiser: this rank's part.
    pub moments: usize,
    /// Moving average of the weights: this rank's part.
    pub ema: usize,
    /// Everything else: weights, gradients, activations, batches, workspace.
    pub rest: usize,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> usize {
        self.moments + self.ema + self.rest
    }
}

/// A recipe whose data is known, and the device that it is planned for.
struct Planned {
    recipe: Recipe,
    shape: DataShape,
    device: Device,
    chip: Chip,
}

impl ScalePlan {
    /// Opens the recipe's data set, if it names one, to learn its size and classes. Needs no GPU.
    ///
    /// # Errors
    /// N ranks cannot share the batch, or are not whole nodes; a link or GPU is unknown; the run does not fit;
    /// the CPU's speed was not given.
    pub fn of(recipe: &Recipe, options: &Options) -> Result<Self> {
        let chip = match &options.gpu {
            None => CORE,
            Some(name) => *CHIPS.iter().find(|chip| chip.name == name.as_str()).ok_or_else(|| {
                let names = CHIPS.map(|chip| format!("`{}`", chip.name)).join(", ");
                Error::usage(format!("`--gpu {name}`: its rates are not known"))
                    .hint(format!("use one of {names}; `--img-per-s` gives a measured speed"))
            })?,
        };
        let on_cpu = options.gpu.is_none();
        if on_cpu && options.source == Source::Predicted {
            return Err(Error::usage("the speed of a rank on a CPU is measured, not predicted").hint(
                "`vitrum bench --what train --device cpu` measures it; give it as `--img-per-s N`, or its \
                 `--json` as `--measured FILE`",
            ));
        }
        let links =
            Links::named(&options.links, if on_cpu { "shm" } else { "nvlink" }, &chip, options.per_node)?;
        let cluster = Cluster { ranks: options.ranks, per_node: options.per_node, links, overlaps: !on_cpu };
        whole_nodes(&cluster)?;
        let (recipe, shape, _) = plan::with_data(recipe)?;
        let recipe = ranks::settle(recipe, options.ranks)?;
        let device = if on_cpu { Device::Cpu } else { Device::Cuda(0) };
        let planned = Planned { recipe, shape, device, chip };
        let batch = planned.recipe.train.batch;
        let speed = planned.speed(&options.source, &cluster, batch / options.ranks)?;
        let steps = planned.recipe.train.steps.expect("a resolved recipe has its steps");
        let mut rows = Vec::new();
        let mut last = None;
        for ranks in (0..).map(|i| 1 << i).take_while(|n| *n < options.ranks).chain([options.ranks]) {
            let cluster = Cluster { ranks, ..cluster };
            if !batch.is_multiple_of(ranks) || whole_nodes(&cluster).is_err() {
                continue;
            }
            let (work, memory) = planned.work(&cluster, batch / ranks, speed)?;
            // A batch that does not fit is left out of the curve, except for the one that was asked for.
            let fits = memory.total() as f64 <= chip.memory;
            if !fits && ranks == options.ranks {
                return Err(planned.too_large(memory.total(), batch / ranks));
            }
            if !fits {
                continue;
            }
            let step = Step::of(&work, &cluster);
            rows.push(Row {
                ranks,
                batch: batch / ranks,
                step: step.total(),
                hidden: Some(step.hidden),
                exposed: step.exposed,
                memory: memory.total(),
                per_node: cluster.group(),
                efficiency: work.alone.total() / step.total(),
                to_train: Some(steps as f64 * step.total()),
            });
            last = Some((step, cluster, memory));
        }
        let (step, cluster, memory) = last.expect("the last row was made or refused");
        Ok(Self { rows, step, cluster, memory, chip, source: options.source.clone(), steps, batch })
    }

    fn is_on_cpu(&self) -> bool {
        !self.cluster.overlaps
    }

    /// For people.
    pub fn text(&self, name: &str) -> String {
        let Self { cluster, step, memory, source, chip, .. } = self;
        let (inside, across) = (&cluster.links.inside, &cluster.links.across);
        let link = |link: &Link| format!("{} at {:.0} GB/s", link.name, link.rate / 1e9);
        let row = self.rows.last().expect("a plan has a row");
        let size = |bytes: usize| format::bytes(bytes as u64);
        let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
        let what = if self.is_on_cpu() { "ranks on a CPU".into() } else { format!("{} GPUs", chip.name) };
        let nodes = match cluster.nodes() {
            1 => format!("one node, {}", link(inside)),
            n => {
                format!("{n} nodes of {}, {} inside, {} across", cluster.group(), link(inside), link(across))
            }
        };
        let alone = row.efficiency * row.step;
        let of_one = match source {
            Source::Predicted => {
                format!("{}, predicted from the operations of a step", format::rate(row.batch as f64 / alone))
            }
            Source::Measured { from, .. } => {
                format!("{}, from {from}", format::rate(row.batch as f64 / alone))
            }
        };
        let mut lines = vec![
            format!("recipe   {name}"),
            format!("ranks    {} {what}: {nodes}", cluster.ranks),
            format!("one      {} with {} samples of each batch: {of_one}", ms(alone), row.batch),
            format!(
                "step     {}: {} computing, {} of communication exposed and {} hidden, efficiency {}",
                ms(row.step),
                ms(step.compute),
                ms(step.exposed),
                ms(step.hidden),
                format::percent(row.efficiency)
            ),
            format!(
                "memory   {} on each: moments {} and ema {} of a shard, {} that every rank has",
                size(memory.total()),
                size(memory.moments),
                size(memory.ema),
                size(memory.rest)
            ),
            format!("loader   {} in each node", format::rate(row.loader())),
            format!(
                "train    {} steps of {} in {}, without evaluations and checkpoints",
                format::thousands(self.steps),
                self.batch,
                row.to_train.map_or("-".into(), format::seconds)
            ),
            String::new(),
            Row::text(&self.rows),
            "a prediction; its assumptions:".into(),
        ];
        lines.extend(self.assumptions().into_iter().map(|(what, value)| format!("  {what}: {value}")));
        lines.join("\n")
    }

    /// What the plan rests on, in words.
    fn assumptions(&self) -> Vec<(&'static str, String)> {
        let Self { cluster, .. } = self;
        let rate = |rate: f64| format!("{:.0} GB/s on each rank", rate / 1e9);
        let mut list = vec![("collectives inside a node", rate(cluster.links.inside.rate))];
        if cluster.nodes() > 1 {
            list.push(("all-reduce between nodes", rate(cluster.links.across.rate)));
        }
        match self.is_on_cpu() {
            true => list.push(("communication beside computation", "none".into())),
            false => list.extend([(
                "computation slower beside communication by",
                format!("{:.0} %", 100.0 * ASSUMED.contention),
            )]),
        }
        list.push(("standard deviation of a rank's computation", format!("{:.1} %", 100.0 * ASSUMED.jitter)));
        list
    }

    /// For programs.
    pub fn json(&self, name: &str) -> Value {
        let Self { cluster, memory, .. } = self;
        let measured = match &self.source {
            Source::Predicted => Value::Null,
            Source::Measured { img_per_s, batch, from } => {
                json!({ "img_per_s": img_per_s, "batch": batch, "from": from })
            }
        };
        let assumed: serde_json::Map<_, _> =
            self.assumptions().into_iter().map(|(what, value)| (what.into(), value.into())).collect();
        json!({
            "predicted": true,
            "recipe": name,
            "ranks": cluster.ranks,
            "nodes": cluster.nodes(),
            "per_node": cluster.group(),
            "gpu": self.chip.name,
            "link_inside": cluster.links.inside.name,
            "link_across": (cluster.nodes() > 1).then_some(cluster.links.across.name),
            "one_measured": measured,
            "steps": self.steps,
            "batch": self.batch,
            "memory": {
                "total_bytes": memory.total(),
                "moments_bytes": memory.moments,
                "ema_bytes": memory.ema,
                "rest_bytes": memory.rest,
            },
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "assumptions": assumed,
        })
    }
}

impl Planned {
    /// The parts of one rank of `cluster` with `own` samples of the batch, in the largest micro-batches that fit
    /// and the recipe allows.
    fn parts(&self, cluster: &Cluster, own: usize) -> Result<Parts> {
        let t = &self.recipe.train;
        let (precision, storage) = backend::planned(self.device, t.precision, t.residual);
        let most = match t.micro_batch {
            MicroBatch::Samples(0) | MicroBatch::Auto => own,
            MicroBatch::Samples(n) => n.min(own),
        };
        // The ranks of a node divide what the ranks of a run without nodes divide.
        let shards = cluster.group();
        let with = |micro: usize| -> Result<Parts> {
            let mut recipe = self.recipe.clone();
            recipe.train.batch = own * shards;
            let chunks = t.reduce_chunks.map(|chunks| chunks / cluster.ranks * shards);
            recipe.train.reduce_chunks = chunks.filter(|chunks| *chunks > 0);
            recipe.train.micro_batch = MicroBatch::Samples(micro);
            (recipe.train.precision, recipe.train.residual) = (precision, t.residual.settled(precision));
            let parts = Parts::of(&recipe, storage, self.shape)?;
            Ok(if shards > 1 { parts.shared_by(shards) } else { parts })
        };
        let divisors = (1..=most).rev().filter(|micro| own.is_multiple_of(*micro));
        if t.micro_batch != MicroBatch::Auto {
            return with(divisors.into_iter().next().unwrap_or(1));
        }
        let mut smallest = None;
        for micro in divisors {
            let parts = with(micro)?;
            if parts.memory().total_bytes() as f64 <= FILLED * self.chip.memory {
                return Ok(parts);
            }
            smallest = Some(parts);
        }
        Ok(smallest.expect("1 divides every batch"))
    }

    /// Predicted seconds of a step of `own` samples on one rank by itself.
    fn alone(&self, cluster: &Cluster, own: usize) -> Result<StepTime> {
        let mut parts = self.parts(&Cluster { ranks: 1, ..*cluster }, own)?;
        let operations = parts.operations()?;
        Ok(StepTime::predicted(&operations, &parts.model.config, &self.chip))
    }

    /// The factor from predicted to measured seconds.
    fn speed(&self, source: &Source, cluster: &Cluster, own: usize) -> Result<f64> {
        let Source::Measured { img_per_s, batch, .. } = source else { return Ok(1.0) };
        let batch = batch.unwrap_or(own);
        Ok(batch as f64 / img_per_s / self.alone(cluster, batch)?.total())
    }

    fn work(&self, cluster: &Cluster, own: usize, speed: f64) -> Result<(Work, Memory)> {
        let parts = self.parts(cluster, own)?;
        let alone = self.alone(cluster, own)?.times(speed);
        let plan = parts.memory();
        let gradients = 4 * parts.model.layout.grad_elements;
        let shards_update = parts.optimizer.rule().is_elementwise();
        let moments = plan.bytes(Arena::Moment1) + plan.bytes(Arena::Moment2);
        let ema = plan.bytes(Arena::Ema);
        let memory = Memory { moments, ema, rest: plan.total_bytes() - moments - ema };
        let work = Work {
            alone,
            micro_batches: own / parts.model.micro_batch,
            reduced: gradients as f64,
            buckets: parts.shards.as_ref().map_or(1, Shards::buckets),
            // Products read bf16 weights, where there are any. Ranks that update everything gather gradients.
            gathered: match plan.storage().has_working_copy() && shards_update {
                true => gradients as f64 / 2.0,
                false => gradients as f64,
            },
            shards_update,
        };
        Ok((work, memory))
    }

    fn too_large(&self, needed: usize, own: usize) -> Error {
        let size = |bytes: f64| format::bytes(bytes as u64);
        let error = Error::new(format!(
            "the run needs {} on each GPU, and one {} has {}",
            size(needed as f64),
            self.chip.name,
            size(self.chip.memory)
        ));
        match own {
            1 => error.hint("use `--set train.recompute=block`, or a GPU with more memory"),
            _ => error.hint("use `--set train.micro_batch=auto`, `--set train.recompute=block` or more GPUs"),
        }
    }
}

/// Refuses ranks that are not whole nodes.
fn whole_nodes(cluster: &Cluster) -> Result<()> {
    let Cluster { ranks, per_node, .. } = *cluster;
    if ranks <= per_node || ranks.is_multiple_of(per_node) {
        return Ok(());
    }
    let fits = (1..=per_node).rev().find(|n| ranks.is_multiple_of(*n)).unwrap_or(1);
    Err(Error::usage(format!("{ranks} ranks are not whole nodes of {per_node}"))
        .hint(format!("use `--gpus {}`, or `--per-node {fits}`", ranks.next_multiple_of(per_node))))
}
