//! A run on several ranks: what must divide, what the ranks exchange in a step, and what the first rank tells
//! the others about a resumed state.

use crate::backend::{Arena, Backend, Device, Loss, Micro};
use crate::dist::{Collective, GradientSum};
use crate::error::{Error, Kind, Result};
use crate::recipe::{MicroBatch, Recipe};
use crate::signals;
use crate::vit::Vit;

use super::Trainer;
use super::checkpoint::RunState;
use super::trainer::gradients;

/// Refuses ranks on a GPU.
pub(super) fn refuse_gpus(ranks: &Collective) -> Result<()> {
    Err(Error::usage(format!("{} ranks on GPUs need NCCL, which is not built yet", ranks.size))
        .hint("use `--device cpu`, or one process for one GPU"))
}

/// Checks that the ranks can share a resolved recipe's batch, and writes what depends on their number into
/// it: samples are mixed within a rank, and a micro-batch is part of a rank's batch.
pub(super) fn settle(recipe: Recipe, ranks: &Collective, device: Device) -> Result<Recipe> {
    if ranks.size > 1 && matches!(device, Device::Cuda(_)) {
        refuse_gpus(ranks)?;
    }
    shared(recipe, ranks.size)
}

/// The same for `n` ranks, on any device.
pub(super) fn shared(mut recipe: Recipe, n: usize) -> Result<Recipe> {
    if n == 1 {
        return Ok(recipe);
    }
    let (train, augment) = (&mut recipe.train, &mut recipe.augment);
    if !train.batch.is_multiple_of(n) {
        return Err(Error::usage(format!(
            "`train.batch` is {}, which {n} ranks cannot share equally",
            train.batch
        ))
        .hint(format!("use `--set train.batch={}`", train.batch.next_multiple_of(n))));
    }
    if let Some(chunks) = train.reduce_chunks.filter(|chunks| !chunks.is_multiple_of(n)) {
        return Err(Error::usage(format!(
            "`train.reduce_chunks` is {chunks}, which {n} ranks cannot share equally"
        ))
        .hint(match n.is_power_of_two() {
            true => format!("use `--set train.reduce_chunks={n}`"),
            false => format!("use {} ranks: chunks are a power of two", n.next_power_of_two() / 2),
        }));
    }
    let own = train.batch / n;
    let micro = match train.micro_batch {
        MicroBatch::Samples(0) => own,
        MicroBatch::Samples(micro) => micro,
        MicroBatch::Auto => 1,
    };
    if !own.is_multiple_of(micro) {
        let fits = (1..=micro).rev().find(|m| own.is_multiple_of(*m)).unwrap_or(1);
        return Err(Error::usage(format!(
            "`train.micro_batch` is {micro}, which does not divide the {own} samples of a rank"
        ))
        .hint(format!("use `--set train.micro_batch={fits}`")));
    }
    if train.micro_batch != MicroBatch::Auto {
        train.micro_batch = MicroBatch::Samples(micro);
    }
    if augment.mixes() {
        if augment.mix_group == 0 {
            augment.mix_group = own;
        }
        if !own.is_multiple_of(augment.mix_group) {
            return Err(Error::usage(format!(
                "`augment.mix_group` is {}, which does not divide the {own} samples of a rank",
                augment.mix_group
            ))
            .hint(format!("use `--set augment.mix_group={own}`")));
        }
    }
    Ok(recipe)
}

/// `"auto"` looks at the free memory, which ranks see at different moments: all take the smallest choice.
pub(super) fn same_micro_batch(recipe: &mut Recipe, ranks: &Collective) -> Result<()> {
    if let MicroBatch::Samples(own) = recipe.train.micro_batch {
        let smallest = ranks.gather_number(own as u64)?.into_iter().min().unwrap_or(own as u64);
        recipe.train.micro_batch = MicroBatch::Samples(smallest as usize);
    }
    Ok(())
}

/// A line for the header.
pub(super) fn line(recipe: &Recipe, ranks: &Collective) -> Option<String> {
    let own = recipe.train.batch / ranks.size;
    let sum = match recipe.train.reduce_chunks {
        Some(chunks) => format!("gradients summed in {chunks} chunks, on any number of ranks"),
        None => "gradients summed in rank order".into(),
    };
    (ranks.size > 1).then(|| format!("ranks    {} with {own} samples of each batch, {sum}", ranks.size))
}

/// What a step exchanges. Its buffers stop growing after the first step.
pub(super) struct Exchange {
    /// Chunks of this rank, if gradients are summed in chunks.
    chunks: Option<usize>,
    sum: GradientSum,
    /// The rows of [`Vit::sample_metrics`] of this rank's samples, then the signal that it got, or 0.
    own: Vec<f32>,
    /// The same of all ranks.
    all: Vec<f32>,
    /// The signal that some rank got.
    pub(super) signal: Option<i32>,
}

impl Exchange {
    pub(super) fn new(recipe: &Recipe, ranks: &Collective) -> Self {
        let chunks = recipe.train.reduce_chunks.map(|chunks| chunks / ranks.size);
        Self { chunks, sum: GradientSum::default(), own: Vec::new(), all: Vec::new(), signal: None }
    }

    /// Whether every micro-batch assigns its gradients, to be summed as a chunk.
    pub(super) fn in_chunks(&self) -> bool {
        self.chunks.is_some()
    }

    /// Computes the gradients of this rank's batch, and sums them and the report over chunks and ranks.
    pub(super) fn gradients(
        &mut self,
        b: &mut dyn Backend,
        model: &Vit,
        loss: Loss,
        micro_batches: &[Micro],
        ranks: &Collective,
    ) -> Result<()> {
        let (several, samples) = (ranks.size > 1, model.sample_metrics());
        let Self { chunks, sum, own, all, signal } = self;
        sum.begin();
        own.clear();
        gradients(b, model, loss, micro_batches, &mut |b| {
            if several {
                let from = own.len();
                own.resize(from + samples.rows * samples.cols, 0.0);
                b.read(samples, &mut own[from..])?;
            }
            if let Some(chunks) = *chunks {
                sum.add_chunk(in_main_memory(b)?, chunks);
            }
            Ok(())
        })?;
        if !several {
            return Ok(());
        }
        own.push(signals::pending().unwrap_or(0) as f32);
        all.resize(own.len() * ranks.size, 0.0);
        ranks.all_gather(bytemuck::cast_slice(own), bytemuck::cast_slice_mut(all))?;
        // Every rank adds the samples' rows in their order in the global batch, as one rank would.
        b.begin_report()?;
        let mut last = 0.0f32;
        for of_rank in all.chunks_exact(own.len()) {
            let (asked, rows) = of_rank.split_last().expect("a rank sends its signal");
            last = last.max(*asked);
            for rows in rows.chunks_exact(samples.rows * samples.cols) {
                b.write(samples, rows)?;
                b.add_to_report(samples)?;
            }
        }
        *signal = (last > 0.0).then_some(last as i32);
        sum.over_ranks(ranks, in_main_memory(b)?, chunks.is_some())
    }
}

fn in_main_memory(b: &mut dyn Backend) -> Result<&mut [f32]> {
    let device = b.describe();
    b.gradients_mut()
        .ok_or_else(|| Error::usage(format!("sums over ranks or chunks are not built yet on {device}")))
}

/// Gives every rank the state that the first one restored from a checkpoint, if it did.
pub(super) fn share_state(trainer: &mut Trainer, state: &mut Option<RunState>) -> Result<()> {
    let ranks = trainer.collective;
    if ranks.size == 1 {
        return Ok(());
    }
    let mut json = serde_json::to_vec(state).expect("a state is written to checkpoints");
    ranks.broadcast(&mut json)?;
    *state = serde_json::from_slice(&json).map_err(|e| Error::new(format!("the state of rank 0: {e}")))?;
    let Some(state) = state else { return Ok(()) };
    trainer.resume_at(state.step, state.skipped, state.skipped_in_a_row);
    for arena in [Arena::Params, Arena::Ema, Arena::Moment1, Arena::Moment2] {
        let mut bytes = trainer.backend.read_arena(arena)?;
        ranks.broadcast(&mut bytes)?;
        trainer.backend.write_arena(arena, &bytes)?;
    }
    Ok(())
}

/// Passes a result on. If a signal stops all ranks, in the same step, they leave the group together: nobody
/// ends while the first one still saves.
pub(super) fn stop_together<T>(ranks: &Collective, result: Result<T>) -> Result<T> {
    if result.as_ref().is_err_and(|e| matches!(e.kind(), Kind::Stopped(_))) {
        ranks.leave()?;
    }
    result
}
