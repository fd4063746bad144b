//! The residual add with everything that may modify the branch:
//! `sum = base + drop_path(layer_scale ∘ dropout(branch))`.
//!
//! It works on blocks of rows, so that the next LayerNorm finds the sum in the cache.

use super::compute::Compute;
use super::rowwise::update;
use super::simd::{Simd, Task};
use super::sums::{CHUNK, Sums};
use super::view::{Rows, RowsMut};
use crate::backend::mask::BoundMask;

/// A branch that joins the residual stream. See [`crate::backend::Branch`].
#[derive(Clone, Copy)]
pub(super) struct Residual<'a> {
    pub(super) base: Rows<'a>,                 // [R, D]
    pub(super) branch: Rows<'a>,               // [R, D]
    pub(super) layer_scale: Option<&'a [f32]>, // [D]
    pub(super) dropout: BoundMask,
    pub(super) drop_path: BoundMask,
    pub(super) tokens: usize,
}

/// `sum = base + …`
pub(super) fn forward(c: &Compute, residual: &Residual, sum: RowsMut) {
    c.for_each_item(sum.blocks(CHUNK), |(start, mut sum)| {
        c.isa.run(residual.add(start, &mut sum));
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
) {
    let mut sums = Sums::new(c, d_sum.rows, [d_layer_scale.is_some()], d_sum.cols);
    let tasks: Vec<_> = d_branch.blocks(CHUNK).into_iter().zip(sums.chunks()).collect();
    c.for_each_item(tasks, |((start, d_branch), [d_scale])| {
        let d_sum = d_sum.slice(start, start + d_branch.rows);
        c.isa.run(residual.back(start, d_sum, d_branch, d_scale));
    });
    sums.finish([d_layer_scale], accumulate);
}

impl<'a> Residual<'a> {
    /// The task that computes rows `start..` of the sum.
    pub(super) fn add<'s, 'm>(&'s self, start: usize, sum: &'s mut RowsMut<'m>) -> Add<'s, 'a, 'm> {
        Add { residual: self, start, sum }
    }

    /// The task for rows `start..` of the backward: writes `d_branch`, and adds to the LayerScale's sum if
    /// there is one (not empty).
    pub(super) fn back<'s>(
        &'s self,
        start: usize,
        d_sum: Rows<'s>,
        d_branch: RowsMut<'s>,
        d_scale: &'s mut [f32],
    ) -> Back<'s, 'a> {
        Back { residual: self, start, d_sum, d_branch, d_scale }
    }

    /// The product of row `r`'s dropout and drop-path factors.
    #[inline(always)]
    fn factors(&self, r: usize, factors: &mut [f32]) {
        let (sample, token) = (r / self.tokens, r % self.tokens);
        let path = if self.drop_path.is_none() { 1.0 } else { self.drop_path.factor(sample, 0) };
        if self.dropout.is_none() {
            factors.fill(path);
            return;
        }
        self.dropout.fill(sample, token * factors.len(), factors);
        if path != 1.0 {
            factors.iter_mut().for_each(|f| *f *= path);
        }
    }
}

pub(super) struct Add<'s, 'a, 'm> {
    residual: &'s Residual<'a>,
    start: usize,
    sum: &'s mut RowsMut<'m>,
}

impl Task for Add<'_, '_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Add { residual, start, sum } = self;
        let mut factors = vec![0.0; sum.cols];
        for r in 0..sum.rows {
            residual.factors(start + r, &mut factors);
            let (base, branch) = (residual.base.row(start + r), residual.branch.row(start + r));
            match residual.layer_scale {
                None => update(
                    s,
                    [base, branch, &factors],
                    [sum.row(r)],
                    #[inline(always)]
                    |[base, x, f], _| [s.fma(x, f, base)],
                ),
                Some(scale) => {
                    let inputs = [base, branch, &factors, scale];
                    update(
                        s,
                        inputs,
                        [sum.row(r)],
                        #[inline(always)]
                        |[base, x, f, scale], _| [s.fma(s.mul(x, scale), f, base)],
                    );
                }
            }
        }
    }
}

pub(super) struct Back<'s, 'a> {
    residual: &'s Residual<'a>,
    start: usize,
    d_sum: Rows<'s>,
    d_branch: RowsMut<'s>,
    d_scale: &'s mut [f32],
}

impl Task for Back<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Back { residual, start, d_sum, mut d_branch, d_scale } = self;
        let mut factors = vec![0.0; d_sum.cols];
        for r in 0..d_sum.rows {
            residual.factors(start + r, &mut factors);
            let (branch, d) = (residual.branch.row(start + r), d_sum.row(r));
            if !d_scale.is_empty() {
                update(
                    s,
                    [d, branch, &factors],
                    [&mut *d_scale],
                    #[inline(always)]
                    |[d, x, f], [sum]| [s.fma(s.mul(x, f), d, sum)],
                );
            }
            let to = [d_branch.row(r)];
            match residual.layer_scale {
                None => update(
                    s,
                    [d, &factors],
                    to,
                    #[inline(always)]
                    |[d, f], _| [s.mul(d, f)],
                ),
                Some(scale) => update(
                    s,
                    [d, &factors, scale],
                    to,
                    #[inline(always)]
                    |[d, f, scale], _| [s.mul(s.mul(d, f), scale)],
                ),
            }
        }
    }
}
