//! LayerNorm over rows, with the residual add in front of it where the model needs one. Ba et al. 2016, arXiv:1607.06450.
//!
//!     mean = avg(x)   rstd = 1/√(avg((x - mean)²) + eps)   x̂ = (x - mean)·rstd   y = γ·x̂ + β
//!     u = γ·d_y       d_x = rstd·(u - avg(u) - x̂·avg(u·x̂))   dγ = Σ_R d_y·x̂   dβ = Σ_R d_y
//!
//! A row is small enough for the first-level cache, so every row is read from memory once and passed over two or
//! three times. The mean of a row far from zero rounds by more than its deviation can bear; both directions therefore
//! measure what the rounded mean left over, `avg(x - mean)`, and take it off.

use super::compute::Compute;
use super::residual::Residual;
use super::sums::{CHUNK, Sums};
use super::vectorise::{sums, vectorised};
use super::view::{Rows, RowsMut};

/// What is normalised.
pub(super) enum Input<'a> {
    Ready(Rows<'a>),
    /// `sum` is computed first.
    Join {
        base: Rows<'a>,
        residual: Residual<'a>,
        sum: RowsMut<'a>,
    },
}

/// `y = layernorm(input)`; keeps `mean` and `rstd`, one per row.
pub(super) fn forward(
    c: &Compute,
    input: Input,
    gamma: &[f32],
    beta: &[f32],
    eps: f32,
    y: RowsMut,
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let stats = mean.chunks_mut(CHUNK).zip(rstd.chunks_mut(CHUNK));
    match input {
        Input::Ready(x) => {
            let tasks: Vec<_> = y.blocks(CHUNK).into_iter().zip(stats).collect();
            c.for_each_item(tasks, |((start, mut y), (mean, rstd))| {
                let x = x.slice(start, start + y.rows);
                vectorised(
                    c.isa,
                    #[inline(always)]
                    || normalise(x, gamma, beta, eps, &mut y, mean, rstd),
                );
            });
        }
        Input::Join { base, residual, sum } => {
            let tasks: Vec<_> = y.blocks(CHUNK).into_iter().zip(sum.blocks(CHUNK)).zip(stats).collect();
            c.for_each_item(tasks, |(((start, mut y), (_, mut sum)), (mean, rstd))| {
                vectorised(
                    c.isa,
                    #[inline(always)]
                    || {
                        residual.add(base, start, &mut sum);
                        normalise(sum.as_rows(), gamma, beta, eps, &mut y, mean, rstd);
                    },
                );
            });
        }
    }
}

#[inline(always)]
fn normalise(
    x: Rows,
    gamma: &[f32],
    beta: &[f32],
    eps: f32,
    y: &mut RowsMut,
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let inverse = 1.0 / x.cols as f32;
    for r in 0..x.rows {
        let row = x.row(r);
        let [total] = sums(
            [row],
            #[inline(always)]
            |[x]| [x],
        );
        let near = total * inverse;
        let [rest, squares] = sums(
            [row],
            #[inline(always)]
            |[x]| [x - near, (x - near) * (x - near)],
        );
        let rest = rest * inverse;
        let variance = (squares * inverse - rest * rest).max(0.0);
        let scale = 1.0 / (variance + eps).sqrt();
        for ((y, x), (gamma, beta)) in y.row(r).iter_mut().zip(row).zip(gamma.iter().zip(beta)) {
            *y = ((x - near) - rest) * scale * gamma + beta;
        }
        mean[r] = near + rest;
        rstd[r] = scale;
    }
}

/// What a LayerNorm's backward reads.
pub(super) struct Saved<'a> {
    pub(super) x: Rows<'a>,
    pub(super) gamma: &'a [f32],
    pub(super) mean: &'a [f32],
    pub(super) rstd: &'a [f32],
}

/// The branch side of a LayerNorm's backward.
pub(super) struct BranchGrad<'a> {
    pub(super) residual: Residual<'a>,
    pub(super) d_branch: RowsMut<'a>,
    pub(super) d_layer_scale: Option<&'a mut [f32]>,
}

/// `d_sum += layernorm'(d_y)` (assigned if `fresh`), then the branch's share of `d_sum`, and the gradients of γ, β and
/// the LayerScale: summed in chunks of rows that depend on nothing but the shape.
pub(super) fn backward(
    c: &Compute,
    d_y: Rows,
    saved: &Saved,
    d_sum: RowsMut,
    fresh: bool,
    branch: Option<BranchGrad>,
    [d_gamma, d_beta]: [Option<&mut [f32]>; 2],
    accumulate: bool,
    scratch: &mut Vec<f32>,
) {
    let (rows, width) = (d_y.rows, d_y.cols);
    let norm_trained = d_gamma.is_some() || d_beta.is_some();
    let Some(BranchGrad { residual, d_branch, d_layer_scale }) = branch else {
        let mut sums = Sums::new(scratch, rows, [norm_trained; 2], width);
        let tasks: Vec<_> = d_sum.blocks(CHUNK).into_iter().zip(sums.chunks()).collect();
        c.for_each_item(tasks, |((start, mut d_sum), partial)| {
            vectorised(
                c.isa,
                #[inline(always)]
                || back(d_y, saved, start, &mut d_sum, fresh, partial),
            );
        });
        return sums.finish([d_gamma, d_beta], accumulate);
    };

    let mut sums = Sums::new(scratch, rows, [norm_trained, norm_trained, d_layer_scale.is_some()], width);
    let blocks = d_sum.blocks(CHUNK).into_iter().zip(d_branch.blocks(CHUNK));
    let tasks: Vec<_> = blocks.zip(sums.chunks()).collect();
    c.for_each_item(tasks, |(((start, mut d_sum), (_, mut d_branch)), [d_gamma, d_beta, d_scale])| {
        vectorised(
            c.isa,
            #[inline(always)]
            || {
                back(d_y, saved, start, &mut d_sum, fresh, [d_gamma, d_beta]);
                residual.back(start, d_sum.as_rows(), &mut d_branch, d_scale);
            },
        );
    });
    sums.finish([d_gamma, d_beta, d_layer_scale], accumulate);
}

/// Rows `start..` of the backward; `d_gamma` and `d_beta` are empty if nobody wants them.
#[inline(always)]
fn back(
    d_y: Rows,
    saved: &Saved,
    start: usize,
    d_sum: &mut RowsMut,
    fresh: bool,
    [d_gamma, d_beta]: [&mut [f32]; 2],
) {
    let Saved { x, gamma, mean, rstd } = saved;
    let inverse = 1.0 / x.cols as f32;
    for r in 0..d_sum.rows {
        let (x, d_y, d_sum) = (x.row(start + r), d_y.row(start + r), d_sum.row(r));
        let (mean, rstd) = (mean[start + r], rstd[start + r]);
        let [rest, avg_u, avg_ux] = sums(
            [x, d_y, gamma],
            #[inline(always)]
            |[x, d_y, gamma]| [x - mean, d_y * gamma, d_y * gamma * (x - mean)],
        )
        .map(|sum| sum * inverse);
        let avg_ux = (avg_ux - avg_u * rest) * rstd;

        let n = x.len();
        let (d_y, gamma, d_sum) = (&d_y[..n], &gamma[..n], &mut d_sum[..n]);
        let hat = |i: usize| ((x[i] - mean) - rest) * rstd;
        if fresh {
            for i in 0..n {
                d_sum[i] = rstd * (d_y[i] * gamma[i] - avg_u - hat(i) * avg_ux);
            }
        } else {
            for i in 0..n {
                d_sum[i] += rstd * (d_y[i] * gamma[i] - avg_u - hat(i) * avg_ux);
            }
        }
        if !d_gamma.is_empty() {
            let (d_gamma, d_beta) = (&mut d_gamma[..n], &mut d_beta[..n]);
            for i in 0..n {
                d_gamma[i] += d_y[i] * hat(i);
                d_beta[i] += d_y[i];
            }
        }
    }
}
