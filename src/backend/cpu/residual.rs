//! The residual add with all that may stand in its way: `sum = base + drop_path(layer_scale ∘ dropout(branch))`.
//!
//! It works on blocks of rows, so that the LayerNorm that follows finds the sum in the cache.

use super::compute::Compute;
use super::sums::{CHUNK, Sums};
use super::vectorise::vectorised;
use super::view::{Rows, RowsMut};
use crate::backend::mask::BoundMask;

/// A branch that joins the residual stream. See [`crate::backend::Branch`].
#[derive(Clone, Copy)]
pub(super) struct Residual<'a> {
    pub(super) branch: Rows<'a>,               // [R, D]
    pub(super) layer_scale: Option<&'a [f32]>, // [D]
    pub(super) dropout: BoundMask,
    pub(super) drop_path: BoundMask,
    pub(super) tokens: usize,
}

/// `sum = base + …`
pub(super) fn forward(c: &Compute, base: Rows, residual: &Residual, sum: RowsMut) {
    c.for_each_item(sum.blocks(CHUNK), |(start, mut sum)| {
        vectorised(
            c.isa,
            #[inline(always)]
            || residual.add(base, start, &mut sum),
        );
    });
}

/// `d_branch` and the gradient of the LayerScale from `d_sum`.
pub(super) fn backward(
    c: &Compute,
    residual: &Residual,
    d_sum: Rows,
    d_branch: RowsMut,
    d_layer_scale: Option<&mut [f32]>,
    accumulate: bool,
    scratch: &mut Vec<f32>,
) {
    let width = d_sum.cols;
    let mut sums = Sums::new(scratch, d_sum.rows, [d_layer_scale.is_some()], width);
    let tasks: Vec<_> = d_branch.blocks(CHUNK).into_iter().zip(sums.chunks()).collect();
    c.for_each_item(tasks, |((start, mut d_branch), [d_scale])| {
        let d_sum = d_sum.slice(start, start + d_branch.rows);
        vectorised(
            c.isa,
            #[inline(always)]
            || residual.back(start, d_sum, &mut d_branch, d_scale),
        );
    });
    sums.finish([d_layer_scale], accumulate);
}

impl Residual<'_> {
    /// Rows `start..` of the sum.
    #[inline(always)]
    pub(super) fn add(&self, base: Rows, start: usize, sum: &mut RowsMut) {
        let mut factors = vec![1.0; sum.cols];
        for r in 0..sum.rows {
            self.factors(start + r, &mut factors);
            if let Some(scale) = self.layer_scale {
                multiply(&mut factors, scale);
            }
            let (base, branch, sum) = (base.row(start + r), self.branch.row(start + r), sum.row(r));
            for ((sum, base), (branch, factor)) in sum.iter_mut().zip(base).zip(branch.iter().zip(&factors)) {
                *sum = base + branch * factor;
            }
        }
    }

    /// Rows `start..` of the backward: writes `d_branch`, adds to the LayerScale's sum if it is wanted (not empty).
    #[inline(always)]
    pub(super) fn back(&self, start: usize, d_sum: Rows, d_branch: &mut RowsMut, d_scale: &mut [f32]) {
        let mut factors = vec![1.0; d_sum.cols];
        for r in 0..d_sum.rows {
            self.factors(start + r, &mut factors);
            let (branch, d_sum, d_branch) = (self.branch.row(start + r), d_sum.row(r), d_branch.row(r));
            if !d_scale.is_empty() {
                let terms = d_sum.iter().zip(branch.iter().zip(&factors));
                for (total, (d, (branch, factor))) in d_scale.iter_mut().zip(terms) {
                    *total += branch * factor * d;
                }
            }
            if let Some(scale) = self.layer_scale {
                multiply(&mut factors, scale);
            }
            for (d_branch, (d, factor)) in d_branch.iter_mut().zip(d_sum.iter().zip(&factors)) {
                *d_branch = d * factor;
            }
        }
    }

    /// What dropout and drop-path together multiply row `r` by. `factors` enters with 1 everywhere or from the row before.
    #[inline(always)]
    fn factors(&self, r: usize, factors: &mut [f32]) {
        let (sample, token) = (r / self.tokens, r % self.tokens);
        let path = if self.drop_path.is_none() { 1.0 } else { self.drop_path.factor(sample, 0) };
        if self.dropout.is_none() {
            factors.fill(path);
            return;
        }
        self.dropout.fill(sample, token * factors.len(), factors);
        factors.iter_mut().for_each(|f| *f *= path);
    }
}

#[inline(always)]
fn multiply(factors: &mut [f32], scale: &[f32]) {
    factors.iter_mut().zip(scale).for_each(|(f, s)| *f *= s);
}
