//! A run on several ranks: what must divide, and what the first rank tells the others about a resumed state.

use std::time::Duration;

use crate::backend::Arena;
use crate::dist::Collective;
use crate::error::{Error, Kind, Result};
use crate::recipe::{MicroBatch, Recipe};

use super::Trainer;
use super::checkpoint::RunState;
use super::state::SHARED;

/// Checks that `n` ranks can share a resolved recipe's batch, and writes what depends on their number into
/// it: samples are mixed within a rank, and a micro-batch is part of a rank's batch.
pub(super) fn settle(mut recipe: Recipe, n: usize) -> Result<Recipe> {
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
        None if ranks.comm().is_some() => "gradients summed by NCCL".into(),
        None => "gradients summed in rank order".into(),
    };
    (ranks.size > 1).then(|| format!("ranks    {} with {own} samples of each batch, {sum}", ranks.size))
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
    let mut weights = if ranks.is_first() { trainer.backend.read_arena(Arena::Params)? } else { Vec::new() };
    ranks.broadcast(&mut weights)?;
    trainer.backend.write_arena(Arena::Params, &weights)?;
    for arena in SHARED {
        let mut bytes = trainer.restored(arena);
        ranks.broadcast(&mut bytes)?;
        trainer.set_whole(arena, &bytes)?;
    }
    Ok(())
}

/// How long other ranks leave rank 0 to print why it ends.
const SPEAK: Duration = Duration::from_millis(300);

/// Passes a result on. If a signal stops all ranks, in the same step, they leave the group together: nobody
/// ends while the first one still saves.
pub(super) fn stop_together<T>(ranks: &Collective, result: Result<T>) -> Result<T> {
    if result.as_ref().is_err_and(|e| matches!(e.kind(), Kind::Stopped(_))) {
        ranks.leave()?;
        if !ranks.is_first() {
            // A launcher ends all ranks when the first of them ends with an error, and rank 0 still has to speak.
            std::thread::sleep(SPEAK);
        }
    }
    result
}
