//! The gradients of several ranks: summed bucket by bucket as they become final, each rank its part; then the
//! update of the rank's shard; then everyone has all weights.
//!
//! With chunks, the gradients of each chunk are computed alone and added in a binary tree over the chunks'
//! numbers: ((0 + 1) + (2 + 3)) + ... A rank has neighbouring chunks, so that its own sum is a node of that
//! tree, and the sum over the ranks is the rest of it. Any number of ranks does the same additions.
//!
//! Without chunks a rank adds up as it goes, and the ranks' sums are added in rank order.
//!
//! Once gradients are used they are no longer needed. What all ranks then need of each other, weights or their
//! average, goes through the same memory: every rank writes its shard where its gradients were, the buckets
//! are gathered, and the result is copied to its place, tensor by tensor.

#[cfg(test)]
mod tests;

use super::arenas::Arenas;
use super::compute::Compute;
use super::update::{self, Outcome};
use super::{CpuBackend, Micro};
use crate::backend::ranks::{Advance, Group, Progress, received_elements};
use crate::backend::shards::{BLOCK, Piece};
use crate::backend::{Arena, Mat, Update};
use crate::error::Result;

/// The ranks, and how far the sums of this step are.
pub(super) struct Reduction {
    group: Group,
    /// What this rank updates.
    pieces: Vec<Piece>,
    /// Every tensor.
    whole: Vec<Piece>,
    progress: Progress,
    /// The signal that this rank got, or 0.
    pub(super) signal: i32,
    /// Whether the gradients' memory holds the whole average (and, while they are exchanged, the weights).
    holds_ema: bool,
}

impl Reduction {
    pub(super) fn new(group: Group) -> Self {
        let (pieces, whole) = (group.pieces(), Piece::whole(&group.segments));
        let progress = Progress::new(&group);
        Self { group, pieces, whole, progress, signal: 0, holds_ema: false }
    }

    fn received_len(&self) -> usize {
        received_elements(&self.group.shards)
    }

    /// Gradients from `from` on are final in `micro`.
    fn advance(&mut self, c: &Compute, arenas: &mut Arenas, micro: Micro, from: usize) -> Result<()> {
        let Advance { fresh, chunk, buckets } = self.progress.advance(&self.group, micro, from);
        let first_received = self.received_len();
        let (grads, exchange) = arenas.for_reduction();
        let (received, waiting) = exchange.split_at_mut(first_received);
        self.holds_ema = false;
        if let Some((chunk, chunks)) = chunk {
            add_chunk(c, grads, waiting, fresh, chunk, chunks);
        }
        let Group { ranks, shards, in_chunks, .. } = &self.group;
        for bucket in buckets.map(|index| shards.bucket(index)).filter(|_| ranks.size() > 1) {
            let own = shards.part(&bucket, ranks.rank());
            let received = &mut received[..bucket.len()];
            ranks.all_to_all(bytemuck::cast_slice(&grads[bucket]), bytemuck::cast_slice_mut(received))?;
            sum_parts(c, received, own.len(), *in_chunks);
            grads[own.clone()].copy_from_slice(&received[..own.len()]);
        }
        Ok(())
    }

    /// The norm of all gradients, and the largest signal of all ranks: the same on every rank.
    fn norm(&self, c: &Compute, grads: &[f32]) -> Result<(f64, i32)> {
        let Group { ranks, shards, .. } = &self.group;
        let mut own: Vec<f64> =
            shards.own(ranks.rank()).flat_map(|part| update::squares_of_blocks(c, &grads[part])).collect();
        own.push(f64::from(self.signal));
        let mut all = vec![0.0; own.len() * ranks.size()];
        ranks.all_gather(bytemuck::cast_slice(&own), bytemuck::cast_slice_mut(&mut all))?;
        let (mut squares, mut signal) = (vec![0.0; shards.blocks()], 0.0f64);
        for (rank, of_rank) in all.chunks_exact(own.len()).enumerate() {
            let mut values = of_rank.iter().copied();
            for part in shards.own(rank) {
                squares[part.start / BLOCK..part.end / BLOCK]
                    .iter_mut()
                    .zip(&mut values)
                    .for_each(|(to, v)| *to = v);
            }
            signal = signal.max(values.next().expect("a rank sends its signal last"));
        }
        Ok((update::norm_of_blocks(&squares), signal as i32))
    }

    /// Gives every rank all buckets, of which it holds its parts.
    fn gather(&self, grads: &mut [f32], received: &mut [f32]) -> Result<()> {
        let Group { ranks, shards, .. } = &self.group;
        if ranks.size() == 1 {
            return Ok(());
        }
        for bucket in (0..shards.buckets()).map(|index| shards.bucket(index)) {
            let own = shards.part(&bucket, ranks.rank());
            let copy = &mut received[..own.len()];
            copy.copy_from_slice(&grads[own]);
            ranks.all_gather(bytemuck::cast_slice(copy), bytemuck::cast_slice_mut(&mut grads[bucket]))?;
        }
        Ok(())
    }

    fn gather_in(&self, arenas: &mut Arenas) -> Result<()> {
        let (grads, exchange) = arenas.for_reduction();
        self.gather(grads, &mut exchange[..self.received_len()])
    }

    fn update(
        &mut self,
        c: &Compute,
        arenas: &mut Arenas,
        update: &Update,
        loss_is_fine: bool,
    ) -> Result<Outcome> {
        self.progress.assert_summed(&self.group);
        assert_eq!(update.segments, self.group.segments, "an update of other tensors than the group's");
        let (norm, signal) = self.norm(c, arenas.for_reduction().0)?;
        if !self.group.is_sharded {
            self.gather_in(arenas)?;
        }
        let buffers = arenas.for_update().buffers(update);
        let outcome = update::update_pieces(c, update, &self.pieces, buffers, norm, loss_is_fine);
        if self.group.is_sharded && !outcome.skipped {
            let a = arenas.for_exchange();
            for piece in &self.pieces {
                a.grads[piece.grad..][..piece.len].copy_from_slice(&a.params[piece.param..][..piece.len]);
            }
            self.gather_in(arenas)?;
            let a = arenas.for_exchange();
            for piece in &self.whole {
                a.params[piece.param..][..piece.len].copy_from_slice(&a.grads[piece.grad..][..piece.len]);
            }
        }
        Ok(Outcome { signal, ..outcome })
    }
}

/// See [`crate::backend::Backend::gradients_done`].
pub(super) fn gradients_done(cpu: &mut CpuBackend, from: usize) -> Result<()> {
    match &mut cpu.reduction {
        Some(reduction) => reduction.advance(&cpu.compute, &mut cpu.arenas, cpu.micro, from),
        None => Ok(()),
    }
}

/// See [`crate::backend::Backend::gather_rows`].
pub(super) fn gather_rows(cpu: &mut CpuBackend, rows: Mat) -> Result<()> {
    let Some(Reduction { group, .. }) = &cpu.reduction else { return Ok(()) };
    let (rank, size) = (group.ranks.rank(), group.ranks.size());
    let all = super::Access::new(&mut cpu.arenas).write(rows);
    assert!(rows.rows.is_multiple_of(size) && rows.ld == rows.cols, "{rows}: equal shares of {size} ranks");
    let len = rows.rows / size * rows.cols;
    let own = all.data[rank * len..][..len].to_vec();
    group.ranks.all_gather(bytemuck::cast_slice(&own), bytemuck::cast_slice_mut(&mut all.data[..len * size]))
}

/// See [`crate::backend::Backend::gather_ema`].
pub(super) fn gather_ema(cpu: &mut CpuBackend) -> Result<()> {
    let Some(reduction) = cpu.reduction.as_mut().filter(|r| r.group.is_sharded) else { return Ok(()) };
    let a = cpu.arenas.for_exchange();
    let mut ema = a.ema;
    for own in reduction.group.shards.own(reduction.group.ranks.rank()) {
        let (part, rest) = ema.split_at(own.len());
        a.grads[own].copy_from_slice(part);
        ema = rest;
    }
    reduction.gather_in(&mut cpu.arenas)?;
    reduction.holds_ema = true;
    Ok(())
}

/// See [`crate::backend::Backend::swap_ema`]. Tensors that are not trained are their own average.
pub(super) fn swap_ema(cpu: &mut CpuBackend) {
    match cpu.reduction.as_ref().filter(|r| r.group.is_sharded) {
        None => cpu.arenas.swap(Arena::Params, Arena::Ema),
        Some(reduction) => {
            assert!(reduction.holds_ema, "the average is gathered before it is used");
            let a = cpu.arenas.for_exchange();
            for piece in &reduction.whole {
                let (weights, ema) = (&mut a.params[piece.param..][..piece.len], &mut a.grads[piece.grad..]);
                weights.swap_with_slice(&mut ema[..piece.len]);
            }
        }
    }
}

/// See [`crate::backend::Op::Update`].
pub(super) fn update(cpu: &mut CpuBackend, update: &Update, loss_is_fine: bool) -> Result<Option<Outcome>> {
    let Some(reduction) = &mut cpu.reduction else { return Ok(None) };
    reduction.update(&cpu.compute, &mut cpu.arenas, update, loss_is_fine).map(Some)
}

// Sums -----------------------------------------------------------------------------------------------------------

/// Takes some of the gradients of one of `chunks` chunks, a power of two. After the last chunk they are the sum
/// of all; before, sums that lack their right neighbour wait: at most one for each level of the tree.
fn add_chunk(
    c: &Compute,
    grads: &mut [f32],
    waiting: &mut [f32],
    range: std::ops::Range<usize>,
    chunk: usize,
    chunks: usize,
) {
    debug_assert!(chunks.is_power_of_two() && chunk < chunks);
    let len = grads.len();
    let grads = &mut grads[range.clone()];
    let at = |level: usize| level * len + range.start..level * len + range.end;
    let mut level = 0;
    while chunk >> level & 1 == 1 {
        add(c, grads, &waiting[at(level)]);
        level += 1;
    }
    if chunk + 1 < chunks {
        waiting[at(level)].copy_from_slice(grads);
    }
}

/// Adds parts of equal length into the first: in a tree, or in order.
fn sum_parts(c: &Compute, values: &mut [f32], part: usize, in_a_tree: bool) {
    let count = values.len() / part;
    let mut add_into = |to: usize, from: usize| {
        let (left, right) = values.split_at_mut(from * part);
        add(c, &mut left[to * part..(to + 1) * part], &right[..part]);
    };
    if !in_a_tree {
        return (1..count).for_each(|from| add_into(0, from));
    }
    let mut apart = 1;
    while apart < count {
        (0..count - apart).step_by(2 * apart).for_each(|to| add_into(to, to + apart));
        apart *= 2;
    }
}

fn add(c: &Compute, to: &mut [f32], values: &[f32]) {
    c.for_each_item(to.chunks_mut(BLOCK).zip(values.chunks(BLOCK)).collect(), |(to, values)| {
        to.iter_mut().zip(values).for_each(|(to, value)| *to += value);
    });
}
