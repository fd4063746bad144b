//! The sum of the gradients: in one order, whatever the number of ranks.
//!
//! With `train.reduce_chunks = K` the global batch is K chunks of equal size. Each chunk's gradients are
//! computed alone, and added in a binary tree over the chunks' indices: ((0 + 1) + (2 + 3)) + ... A rank holds
//! neighbouring chunks, so that its own sum is a node of that tree, and the sum over the ranks is the rest of
//! it. All ranks do the same additions, on any number of them.
//!
//! Without chunks a rank adds up as it goes, and the ranks' sums are added in rank order. The bits then depend
//! on the number of ranks.

use super::Collective;
use crate::error::Result;

/// Values that a rank sums at a time: 1 MiB for each other rank.
const PIECE: usize = 256 << 10;

/// Sums gradients over chunks and ranks. Its buffers are as large as they become after the first step.
#[derive(Default)]
pub struct GradientSum {
    /// The left operands that wait for their right ones: at most one for each level of the tree.
    waiting: Vec<Vec<f32>>,
    /// Chunks of this rank that were added.
    added: usize,
    parts: Vec<f32>,
    received: Vec<f32>,
}

impl GradientSum {
    /// Before the first chunk of a step.
    pub fn begin(&mut self) {
        self.added = 0;
    }

    /// Takes the gradients of the next of `chunks` chunks, a power of two. After the last one `gradients`
    /// holds the sum of all.
    pub fn add_chunk(&mut self, gradients: &mut [f32], chunks: usize) {
        debug_assert!(chunks.is_power_of_two() && self.added < chunks);
        let mut level = 0;
        while self.added >> level & 1 == 1 {
            add(gradients, &self.waiting[level]);
            level += 1;
        }
        self.added += 1;
        if self.added == chunks {
            return;
        }
        if self.waiting.len() <= level {
            self.waiting.resize_with(level + 1, Vec::new);
        }
        let to = &mut self.waiting[level];
        to.clear();
        to.extend_from_slice(gradients);
    }

    /// Replaces `gradients` by its sum over all ranks: in a tree, or in rank order.
    ///
    /// # Errors
    /// Another rank ended.
    pub fn over_ranks(&mut self, ranks: &Collective, gradients: &mut [f32], in_a_tree: bool) -> Result<()> {
        if ranks.size == 1 {
            return Ok(());
        }
        let piece = PIECE.min(gradients.len().div_ceil(ranks.size)).max(1);
        self.parts.resize(piece * ranks.size, 0.0);
        self.received.resize(piece * ranks.size, 0.0);
        for block in gradients.chunks_mut(piece * ranks.size) {
            // The last block is shorter; the rest of the piece is summed and not used.
            self.parts[..block.len()].copy_from_slice(block);
            ranks.all_to_all(
                bytemuck::cast_slice(&self.parts),
                bytemuck::cast_slice_mut(&mut self.received),
            )?;
            sum_pieces(&mut self.received, piece, in_a_tree);
            let own = bytemuck::cast_slice(&self.received[..piece]);
            ranks.all_gather(own, bytemuck::cast_slice_mut(&mut self.parts))?;
            block.copy_from_slice(&self.parts[..block.len()]);
        }
        Ok(())
    }
}

/// Adds pieces of equal length into the first.
fn sum_pieces(values: &mut [f32], piece: usize, in_a_tree: bool) {
    let count = values.len() / piece;
    let mut add_into = |to: usize, from: usize| {
        let (left, right) = values.split_at_mut(from * piece);
        add(&mut left[to * piece..(to + 1) * piece], &right[..piece]);
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

fn add(to: &mut [f32], values: &[f32]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += value);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of very different sizes, so that another order of additions has other bits.
    fn gradients(chunk: usize) -> Vec<f32> {
        (0..37)
            .map(|i| ((i * 7919 + chunk * 104_729) % 1009) as f32 * 10f32.powi(chunk as i32 % 5 - 2))
            .collect()
    }

    fn own(chunks: std::ops::Range<usize>) -> Vec<f32> {
        let mut sum = GradientSum::default();
        let mut last = Vec::new();
        for _ in 0..2 {
            // A second step finds the first one's buffers.
            sum.begin();
            for chunk in chunks.clone() {
                last = gradients(chunk);
                sum.add_chunk(&mut last, chunks.len());
            }
        }
        last
    }

    #[test]
    fn the_tree_is_the_same_on_any_number_of_ranks() {
        const CHUNKS: usize = 16;
        let want = own(0..CHUNKS);
        for ranks in [1, 2, 4, 8, 16] {
            let each = CHUNKS / ranks;
            let mut parts: Vec<f32> =
                (0..ranks).flat_map(|rank| own(rank * each..(rank + 1) * each)).collect();
            sum_pieces(&mut parts, 37, true);
            assert_eq!(parts[..37], want, "{ranks} ranks");
        }
        let mut in_order: Vec<f32> = (0..CHUNKS).flat_map(gradients).collect();
        sum_pieces(&mut in_order, 37, false);
        assert!(in_order[..37] != want[..], "another order has other bits");
    }

    #[test]
    fn four_chunks_are_two_pairs() {
        let [a, b, c, d] = [0, 1, 2, 3].map(gradients);
        let want: Vec<f32> = (0..37).map(|i| (a[i] + b[i]) + (c[i] + d[i])).collect();
        assert_eq!(own(0..4), want);
    }

    #[test]
    fn ranks_in_order_are_added_from_the_first() {
        let mut values: Vec<f32> = [0, 1, 2].into_iter().flat_map(gradients).collect();
        let want: Vec<f32> = (0..37).map(|i| (values[i] + values[37 + i]) + values[74 + i]).collect();
        sum_pieces(&mut values, 37, false);
        assert_eq!(values[..37], want);
    }
}
