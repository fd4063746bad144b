//! Sums over the rows of a matrix whose bits do not depend on the number of threads.
//!
//! Rows are summed in chunks of [`CHUNK`] with separate partial sums, and the chunks are added in order.

use super::compute::{Compute, ThreadScratch};

/// Rows per chunk. It is part of the result's definition: another value gives other bits.
pub(super) const CHUNK: usize = 64;

/// `K` sums of rows of `width` values, each of them requested or not.
pub(super) struct Sums<'a, const K: usize> {
    partial: ThreadScratch<'a>, // [chunks, wanted, width]
    wanted: [bool; K],
    width: usize,
}

impl<'a, const K: usize> Sums<'a, K> {
    pub(super) fn new(c: &'a Compute, rows: usize, wanted: [bool; K], width: usize) -> Self {
        let count = wanted.iter().filter(|w| **w).count();
        let mut partial = c.scratch(rows.div_ceil(CHUNK) * count * width);
        partial.fill(0.0);
        Self { partial, wanted, width }
    }

    /// The partial sums of each chunk, in order; a sum that is not requested is an empty slice.
    pub(super) fn chunks(&mut self) -> impl Iterator<Item = [&mut [f32]; K]> {
        let (wanted, width) = (self.wanted, self.width);
        let size = wanted.iter().filter(|w| **w).count() * width;
        let mut rest = &mut *self.partial;
        std::iter::from_fn(move || {
            if size > 0 && rest.is_empty() {
                return None;
            }
            let (mut chunk, after) = std::mem::take(&mut rest).split_at_mut(size);
            rest = after;
            Some(wanted.map(|wanted| {
                let (sum, after) = std::mem::take(&mut chunk).split_at_mut(if wanted { width } else { 0 });
                chunk = after;
                sum
            }))
        })
    }

    /// Adds the chunks into the outputs that are present: added to (`accumulate`) or assigned.
    pub(super) fn finish(self, outputs: [Option<&mut [f32]>; K], accumulate: bool) {
        let Self { partial, wanted, width } = self;
        let size = wanted.iter().filter(|w| **w).count() * width;
        let mut at = 0;
        for (output, wanted) in outputs.into_iter().zip(wanted) {
            if let Some(output) = output {
                assert!(wanted, "a sum that was not asked for");
                let output = &mut output[..width];
                if !accumulate {
                    output.fill(0.0);
                }
                for chunk in partial.chunks_exact(size.max(1)) {
                    add(output, &chunk[at..at + width]);
                }
            }
            at += if wanted { width } else { 0 };
        }
    }
}

/// `to += values`
#[inline(always)]
pub(super) fn add(to: &mut [f32], values: &[f32]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += value);
}

/// `to = values`, or `to += values` if `accumulate`.
pub(super) fn store(to: &mut [f32], values: &[f32], accumulate: bool) {
    if accumulate { add(to, values) } else { to.copy_from_slice(values) }
}
