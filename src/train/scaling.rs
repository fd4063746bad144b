//! A step on many GPUs, predicted: communication hidden and exposed, memory, the loader's demand, and the time
//! to train.
//!
//! The step is the one of `docs/distributed.md`: gradients are reduce-scattered in buckets behind the last
//! micro-batch's backward, inside a node and then between nodes; each GPU of a node updates its shard; the
//! weights are gathered. [`Step::of`] is the arithmetic, [`Assumed`] what it rests on. Nothing here has been
//! compared with GPUs. `vitrum bench --what train` under mpirun measures the same rows ([`Row`]).

pub mod chip;
pub mod links;
mod row;
mod run;
mod source;

use chip::StepTime;
use links::Links;

pub use row::Row;
pub use run::{Memory, Options, ScalePlan};
pub use source::Source;

/// The most GPUs that a plan is made for: the model of the network was not made for more.
pub const MOST: usize = 1024;

/// What the arithmetic rests on, besides the rates of [`chip`] and [`links`].
pub struct Assumed {
    /// What computation loses while communication runs: a share of that time.
    pub contention: f64,
    /// Standard deviation of a rank's computation: the slowest of N is waited for.
    pub jitter: f64,
    /// Seconds for the squares of the gradient norm inside a node.
    pub norm: f64,
}

/// The assumptions of every plan.
pub const ASSUMED: Assumed = Assumed { contention: 0.15, jitter: 0.005, norm: 40e-6 };

/// How many ranks there are, and how they are connected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cluster {
    /// All of them.
    pub ranks: usize,
    /// Those of a node.
    pub per_node: usize,
    /// Between them.
    pub links: Links,
    /// Whether communication runs beside computation, as on GPUs.
    pub overlaps: bool,
}

impl Cluster {
    /// Ranks of a node, or all if there are fewer.
    pub fn group(&self) -> usize {
        self.ranks.min(self.per_node)
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.ranks / self.group()
    }
}

/// What a step moves and computes on one rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// The step of one rank by itself, with its part of the batch.
    pub alone: StepTime,
    /// Backward passes of a step; gradients are final in the last one.
    pub micro_batches: usize,
    /// Bytes of the gradients that are reduced.
    pub reduced: f64,
    /// Buckets in which they are reduced, each as soon as it is final.
    pub buckets: usize,
    /// Bytes of what is gathered after the update.
    pub gathered: f64,
    /// Whether each rank of a node updates its shard. Adafactor's statistics span tensors: every rank updates
    /// everything.
    pub shards_update: bool,
}

/// Seconds of a step on several ranks, by what they are spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// Forward, backward and the update of a shard, with what contention and jitter add.
    pub compute: f64,
    /// Reductions that run behind a backward.
    pub hidden: f64,
    /// Reductions, gathers and norms that are waited for.
    pub exposed: f64,
}

impl Step {
    /// The step of `work` on each rank of `cluster`.
    pub fn of(work: &Work, cluster: &Cluster) -> Self {
        let Work { alone, .. } = work;
        if cluster.ranks == 1 {
            return Self { compute: alone.total(), ..Self::default() };
        }
        let (group, nodes, links) = (cluster.group(), cluster.nodes(), &cluster.links);
        let buckets = work.buckets as f64;
        let bucket = work.reduced / buckets;
        let reduction =
            links.inside.ring(bucket, group) + links.across.all_reduce(bucket / group as f64, nodes);
        let reductions = buckets * reduction;
        // The last bucket is final when the backward ends.
        let behind = match cluster.overlaps {
            true => alone.backward / work.micro_batches as f64 * (buckets - 1.0) / buckets,
            false => 0.0,
        };
        let last = if cluster.overlaps { reduction } else { reductions };
        let exposed = last + (reductions - last - behind).max(0.0);
        let hidden = reductions - exposed;
        let gather = links.inside.ring(work.gathered, group);
        let norm = ASSUMED.norm + links.across.small(nodes);
        let passes = alone.forward + alone.backward;
        let slowest = ASSUMED.jitter * (2.0 * (cluster.ranks as f64).ln()).sqrt() * passes;
        let update = if work.shards_update { alone.update / group as f64 } else { alone.update };
        Self {
            compute: passes + update + ASSUMED.contention * hidden + slowest,
            hidden,
            exposed: exposed + gather + norm,
        }
    }

    /// Seconds of the step.
    pub fn total(&self) -> f64 {
        self.compute + self.exposed
    }
}

#[cfg(test)]
mod tests;
