//! LayerNorm over rows, with the residual add in front of it where the model needs one. Ba et al. 2016, arXiv:1607.06450.
//!
//! ```text
//! mean = avg(x)   rstd = 1/√(avg((x - mean)²) + eps)   x̂ = (x - mean)·rstd   y = γ·x̂ + β
//! u = γ·d_y       d_x = rstd·(u - avg(u) - x̂·avg(u·x̂))   dγ = Σ_R d_y·x̂   dβ = Σ_R d_y
//! ```
//!
//! A row fits into the L1 cache, so every row is read from memory once and then passed over two or three
//! times. In a row far from zero, the rounding error of the mean is too large compared with the deviation.
//! Both passes therefore measure the residual of the rounded mean, `avg(x - mean)`, and subtract it.

use super::compute::Compute;
use super::residual::Residual;
use super::rowwise::{sums, update};
use super::simd::{Simd, Task};
use super::sums::{CHUNK, Sums};
use super::view::{Rows, RowsMut};

/// What is normalised.
pub(super) enum Input<'a> {
    Ready(Rows<'a>),
    /// `sum` is computed first.
    Join {
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
            c.for_each_item(tasks, |((start, y), (mean, rstd))| {
                let x = x.slice(start, start + y.rows);
                c.isa.run(Forward { x, gamma, beta, eps, y, mean, rstd });
            });
        }
        Input::Join { residual, sum } => {
            let tasks: Vec<_> = y.blocks(CHUNK).into_iter().zip(sum.blocks(CHUNK)).zip(stats).collect();
            c.for_each_item(tasks, |(((start, y), (_, mut sum)), (mean, rstd))| {
                c.isa.run(residual.add(start, &mut sum));
                c.isa.run(Forward { x: sum.as_rows(), gamma, beta, eps, y, mean, rstd });
            });
        }
    }
}

/// The forward pass of a chunk of rows.
struct Forward<'a> {
    x: Rows<'a>,
    gamma: &'a [f32],
    beta: &'a [f32],
    eps: f32,
    y: RowsMut<'a>,
    mean: &'a mut [f32],
    rstd: &'a mut [f32],
}

impl Task for Forward<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let inverse = 1.0 / self.x.cols as f32;
        for r in 0..self.x.rows {
            let x = self.x.row(r);
            let [total] = sums(
                s,
                [x],
                #[inline(always)]
                |[x]| [x],
            );
            let near = total * inverse;
            let shift = s.splat(near);
            let [rest, squares] = sums(
                s,
                [x],
                #[inline(always)]
                |[x]| {
                    let off = s.sub(x, shift);
                    [off, s.mul(off, off)]
                },
            );
            let rest = rest * inverse;
            let rstd = 1.0 / ((squares * inverse - rest * rest).max(0.0) + self.eps).sqrt();
            let (left, scale) = (s.splat(rest), s.splat(rstd));
            update(
                s,
                [x, self.gamma, self.beta],
                [self.y.row(r)],
                #[inline(always)]
                |[x, gamma, beta], _| {
                    let hat = s.mul(s.sub(s.sub(x, shift), left), scale);
                    [s.fma(hat, gamma, beta)]
                },
            );
            self.mean[r] = near + rest;
            self.rstd[r] = rstd;
        }
    }
}

/// What a LayerNorm's backward reads.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub(super) x: Rows<'a>,
    pub(super) gamma: &'a [f32],
    pub(super) mean: &'a [f32],
    pub(super) rstd: &'a [f32],
}

/// The branch's part of a LayerNorm's backward.
pub(super) struct BranchGrad<'a> {
    pub(super) residual: Residual<'a>,
    pub(super) d_branch: RowsMut<'a>,
    pub(super) d_layer_scale: Option<&'a mut [f32]>,
}

/// `d_sum += layernorm'(d_y)` (assigned if `fresh`), then the branch's share of `d_sum`, and the gradients of
/// γ, β and the LayerScale. The sums go in chunks of rows that depend only on the shape.
pub(super) fn backward(
    c: &Compute,
    d_y: Rows,
    saved: Saved,
    d_sum: RowsMut,
    fresh: bool,
    branch: Option<BranchGrad>,
    [d_gamma, d_beta]: [Option<&mut [f32]>; 2],
    accumulate: bool,
) {
    let (rows, width) = (d_y.rows, d_y.cols);
    let trained = d_gamma.is_some() || d_beta.is_some();
    let Some(BranchGrad { residual, d_branch, d_layer_scale }) = branch else {
        let mut sums = Sums::new(c, rows, [trained; 2], width);
        let tasks: Vec<_> = d_sum.blocks(CHUNK).into_iter().zip(sums.chunks()).collect();
        c.for_each_item(tasks, |((start, mut d_sum), d_norm)| {
            c.isa.run(Backward { d_y, saved, start, d_sum: &mut d_sum, fresh, d_norm });
        });
        return sums.finish([d_gamma, d_beta], accumulate);
    };

    let mut sums = Sums::new(c, rows, [trained, trained, d_layer_scale.is_some()], width);
    let blocks = d_sum.blocks(CHUNK).into_iter().zip(d_branch.blocks(CHUNK));
    let tasks: Vec<_> = blocks.zip(sums.chunks()).collect();
    c.for_each_item(tasks, |(((start, mut d_sum), (_, d_branch)), [d_gamma, d_beta, d_scale])| {
        c.isa.run(Backward { d_y, saved, start, d_sum: &mut d_sum, fresh, d_norm: [d_gamma, d_beta] });
        c.isa.run(residual.back(start, d_sum.as_rows(), d_branch, d_scale));
    });
    sums.finish([d_gamma, d_beta, d_layer_scale], accumulate);
}

/// Rows `start..` of the backward. `d_norm` are the sums for γ and β; empty if not needed.
struct Backward<'a, 'd> {
    d_y: Rows<'a>,
    saved: Saved<'a>,
    start: usize,
    d_sum: &'a mut RowsMut<'d>,
    fresh: bool,
    d_norm: [&'a mut [f32]; 2],
}

impl Task for Backward<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Saved { x, gamma, mean, rstd } = self.saved;
        let [d_gamma, d_beta] = self.d_norm;
        let inverse = 1.0 / x.cols as f32;
        for r in 0..self.d_sum.rows {
            let row = self.start + r;
            let (x, d_y, d_sum) = (x.row(row), self.d_y.row(row), self.d_sum.row(r));
            let (shift, scale) = (s.splat(mean[row]), s.splat(rstd[row]));
            let totals = sums(
                s,
                [x, d_y, gamma],
                #[inline(always)]
                |[x, d_y, gamma]| {
                    let (off, u) = (s.sub(x, shift), s.mul(d_y, gamma));
                    [off, u, s.mul(u, off)]
                },
            );
            let [rest, avg_u, avg_ux] = totals.map(|total| total * inverse);
            let avg_ux = (avg_ux - avg_u * rest) * rstd[row];

            let grad = RowGrad::<S> {
                shift,
                scale,
                rest: s.splat(rest),
                avg_u: s.splat(avg_u),
                avg_ux: s.splat(avg_ux),
            };
            if self.fresh {
                update(
                    s,
                    [x, d_y, gamma],
                    [d_sum],
                    #[inline(always)]
                    |[x, d_y, gamma], _| [grad.d_x(s, x, d_y, gamma)],
                );
            } else {
                update(
                    s,
                    [x, d_y, gamma],
                    [d_sum],
                    #[inline(always)]
                    |[x, d_y, gamma], [sum]| [s.add(sum, grad.d_x(s, x, d_y, gamma))],
                );
            }
            if !d_gamma.is_empty() {
                update(
                    s,
                    [x, d_y],
                    [&mut *d_gamma, &mut *d_beta],
                    #[inline(always)]
                    |[x, d_y], [d_gamma, d_beta]| [s.fma(d_y, grad.hat(s, x), d_gamma), s.add(d_beta, d_y)],
                );
            }
        }
    }
}

/// Values that the gradients of a row's elements share.
struct RowGrad<S: Simd> {
    /// The stored mean, and its rounding error.
    shift: S::V,
    rest: S::V,
    scale: S::V,
    avg_u: S::V,
    avg_ux: S::V,
}

impl<S: Simd> RowGrad<S> {
    #[inline(always)]
    fn hat(&self, s: S, x: S::V) -> S::V {
        s.mul(s.sub(s.sub(x, self.shift), self.rest), self.scale)
    }

    #[inline(always)]
    fn d_x(&self, s: S, x: S::V, d_y: S::V, gamma: S::V) -> S::V {
        let centred = s.sub(s.mul(d_y, gamma), self.avg_u);
        s.mul(self.scale, s.nfma(self.hat(s, x), self.avg_ux, centred))
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::cpu::testbed::*;
    use crate::backend::mask::BoundMask;
    use crate::backend::{Backend, Branch, Join, Mask, Mat, Norm, Stats, Write};

    const SHAPES: [(usize, usize, usize); 6] =
        [(1, 1, 5), (3, 5, 48), (3, 65, 192), (2, 197, 48), (65, 1, 192), (5, 65, 5)];

    fn norm(b: &mut Testbed, width: usize, eps: f32) -> (Norm, Vec<f32>, Vec<f32>) {
        let gamma: Vec<f32> = normal(1, width, 0.3).iter().map(|v| v + 1.0).collect();
        let beta = normal(2, width, 0.3);
        let norm = Norm {
            gamma: b.put(1, width, &gamma),
            beta: b.put(1, width, &beta),
            d_gamma: Some(b.room(1, width)),
            d_beta: Some(b.room(1, width)),
            eps,
        };
        (norm, gamma, beta)
    }

    /// `Σ weight·layernorm(x)` in f64.
    fn weighted(x: &[f64], gamma: &[f64], beta: &[f64], weight: &[f64]) -> f64 {
        let width = gamma.len() as f64;
        let rows = x.chunks(gamma.len()).zip(weight.chunks(gamma.len()));
        rows.map(|(x, weight)| {
            let mean = x.iter().sum::<f64>() / width;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width;
            let rstd = 1.0 / (variance + 1e-6f32 as f64).sqrt();
            let y = x.iter().zip(gamma.iter().zip(beta)).map(|(x, (g, b))| (x - mean) * rstd * g + b);
            y.zip(weight).map(|(y, w)| y * w).sum::<f64>()
        })
        .sum()
    }

    #[test]
    fn every_gradient_is_the_slope_of_the_f64_function() {
        for (samples, tokens, width) in SHAPES {
            let rows = samples * tokens;
            let mut b = Testbed::new(samples);
            let (norm, gamma, beta) = norm(&mut b, width, 1e-6);
            let (x, d_y, above) =
                (normal(3, rows * width, 2.0), normal(4, rows * width, 1.0), normal(5, rows * width, 1.0));
            let join = Join::Ready(b.put(rows, width, &x));
            let stats = Stats { mean: b.room(rows, 1), rstd: b.room(rows, 1) };
            let (y, d_y_mat) = (b.room(rows, width), b.put(rows, width, &d_y));
            let (added, fresh) = (b.put(rows, width, &above), b.room(rows, width));
            let results = [y, fresh, added, norm.d_gamma.unwrap(), norm.d_beta.unwrap()];
            let run = |k: &mut crate::backend::cpu::CpuBackend| {
                k.layernorm(&join, &norm, y, stats).unwrap();
                k.layernorm_backward(d_y_mat, &join, &norm, stats, added, Write::Add, y, None).unwrap();
                k.layernorm_backward(d_y_mat, &join, &norm, stats, fresh, Write::Assign, y, None).unwrap();
            };
            b.everywhere(&results, run, |r| {
                let (x64, g, be, w) = (wide(&x), wide(&gamma), wide(&beta), wide(&d_y));
                let total: f64 = r[0].iter().zip(&w).map(|(y, w)| f64::from(*y) * w).sum();
                let size: f64 = r[0].iter().zip(&w).map(|(y, w)| (f64::from(*y) * w).abs()).sum();
                assert!((total - weighted(&x64, &g, &be, &w)).abs() <= 1e-6 * size);
                assert_gradient("d_x", &x, &r[1], |x| weighted(x, &g, &be, &w));
                assert_gradient("d_gamma", &gamma, &r[3], |g| weighted(&x64, g, &be, &w));
                assert_gradient("d_beta", &beta, &r[4], |be| weighted(&x64, &g, be, &w));
                let sum: Vec<f64> = r[1].iter().zip(&above).map(|(d, a)| f64::from(*d + *a)).collect();
                assert_close("d_sum, added", &r[2], &sum, 2e-7);
            });
        }
    }

    struct Drawn {
        scale: Vec<f32>,
        dropout: Mask,
        drop_path: Mask,
        tokens: usize,
    }

    /// `base + drop_path(scale ∘ dropout(branch))` in f64, written from the contract.
    fn joined(b: &Testbed, drawn: &Drawn, base: &[f64], branch: &[f64], scale: &[f64]) -> Vec<f64> {
        let bind = |mask| BoundMask::new(mask, b.keys, b.micro);
        let (dropout, path, width) = (bind(drawn.dropout), bind(drawn.drop_path), scale.len());
        (0..base.len())
            .map(|i| {
                let (row, column) = (i / width, i % width);
                let (sample, token) = (row / drawn.tokens, row % drawn.tokens);
                let keep = f64::from(dropout.factor(sample, token * width + column));
                base[i] + f64::from(path.factor(sample, 0)) * keep * scale[column] * branch[i]
            })
            .collect()
    }

    fn branch(b: &mut Testbed, drawn: &Drawn, rows: usize, base: &[f32], branch: &[f32]) -> (Branch, Mat) {
        let width = drawn.scale.len();
        let d_scale = b.room(1, width);
        let scale = b.put(1, width, &drawn.scale);
        let branch = Branch {
            base: b.put(rows, width, base),
            branch: b.put(rows, width, branch),
            layer_scale: Some((scale, Some(d_scale))),
            dropout: drawn.dropout,
            drop_path: drawn.drop_path,
            tokens: drawn.tokens,
        };
        (branch, d_scale)
    }

    #[test]
    fn the_branch_gets_its_gradient_through_scale_dropout_and_drop_path() {
        let rates = [(0.3, 0.4), (0.0, 0.5), (0.2, 0.0), (0.0, 0.0)];
        for ((samples, tokens, width), (dropout, path)) in
            SHAPES.into_iter().flat_map(|s| rates.map(|r| (s, r)))
        {
            let rows = samples * tokens;
            let mut b = Testbed::new(samples);
            let drawn = Drawn {
                scale: normal(6, width, 0.5),
                dropout: Mask { rate: dropout, site: 4 },
                drop_path: Mask { rate: path, site: 5 },
                tokens,
            };
            let (norm, gamma, beta) = norm(&mut b, width, 1e-6);
            let (base, value) = (normal(7, rows * width, 1.0), normal(8, rows * width, 1.0));
            let (d_y, above) = (normal(9, rows * width, 1.0), normal(10, rows * width, 1.0));
            let (branch, d_scale) = branch(&mut b, &drawn, rows, &base, &value);
            let sum = b.room(rows, width);
            let join = Join::Branch { sum, branch };
            let stats = Stats { mean: b.room(rows, 1), rstd: b.room(rows, 1) };
            let (y, d_y_mat) = (b.room(rows, width), b.put(rows, width, &d_y));
            let (d_sum, d_branch) = (b.put(rows, width, &above), b.room(rows, width));
            b.everywhere(
                &[sum, d_sum, d_branch, d_scale],
                |k| {
                    k.layernorm(&join, &norm, y, stats).unwrap();
                    k.layernorm_backward(d_y_mat, &join, &norm, stats, d_sum, Write::Add, d_branch, None)
                        .unwrap();
                },
                |r| {
                    let (base64, value64, scale64) = (wide(&base), wide(&value), wide(&drawn.scale));
                    assert_close("sum", &r[0], &joined(&b, &drawn, &base64, &value64, &scale64), 1e-6);
                    // The stream goes to `above` and through the norm to `d_y`.
                    let f = |base: &[f64], value: &[f64], scale: &[f64]| {
                        let sum = joined(&b, &drawn, base, value, scale);
                        let on: f64 = sum.iter().zip(&above).map(|(s, a)| s * f64::from(*a)).sum();
                        on + weighted(&sum, &wide(&gamma), &wide(&beta), &wide(&d_y))
                    };
                    assert_gradient("d_base", &base, &r[1], |x| f(x, &value64, &scale64));
                    assert_gradient("d_branch", &value, &r[2], |x| f(&base64, x, &scale64));
                    assert_gradient("d_scale", &drawn.scale, &r[3], |x| f(&base64, &value64, x));
                },
            );
        }
    }

    #[test]
    fn the_residual_alone_gives_what_it_gives_in_front_of_a_norm() {
        let (samples, tokens, width) = (3, 65, 48);
        let rows = samples * tokens;
        let mut b = Testbed::new(samples);
        b.micro.gradients = Write::Add;
        let drawn = Drawn {
            scale: normal(6, width, 0.5),
            dropout: Mask { rate: 0.1, site: 1 },
            drop_path: Mask { rate: 0.5, site: 2 },
            tokens,
        };
        let (base, value) = (normal(7, rows * width, 1.0), normal(8, rows * width, 1.0));
        let d = normal(9, rows * width, 1.0);
        let (mut branch, d_scale) = branch(&mut b, &drawn, rows, &base, &value);
        let start = normal(10, width, 1.0);
        let before = b.put(1, width, &start);
        branch.layer_scale = branch.layer_scale.map(|(scale, _)| (scale, Some(before)));
        let (sum, d_sum, d_branch) = (b.room(rows, width), b.put(rows, width, &d), b.room(rows, width));
        let join = Join::Branch { sum, branch };
        b.everywhere(
            &[sum, d_branch, before, d_scale],
            |k| {
                k.residual(&join).unwrap();
                k.residual_backward(&join, d_sum, d_branch, None).unwrap();
            },
            |r| {
                let (base64, value64, scale64) = (wide(&base), wide(&value), wide(&drawn.scale));
                assert_close("sum", &r[0], &joined(&b, &drawn, &base64, &value64, &scale64), 1e-6);
                let f = |value: &[f64], scale: &[f64]| -> f64 {
                    let sum = joined(&b, &drawn, &base64, value, scale);
                    sum.iter().zip(&d).map(|(s, d)| s * f64::from(*d)).sum()
                };
                assert_gradient("d_branch", &value, &r[1], |x| f(x, &scale64));
                let added: Vec<f32> = r[2].iter().zip(&start).map(|(d, start)| d - start).collect();
                assert_gradient("d_scale", &drawn.scale, &added, |x| f(&value64, x));
                assert!(r[3].iter().all(|v| v.is_nan()), "another vector was written");
            },
        );
    }

    #[test]
    fn gradients_add_up_over_micro_batches() {
        let (rows, width) = (130, 48);
        let mut b = Testbed::new(rows);
        let (norm, ..) = norm(&mut b, width, 1e-6);
        let join = Join::Ready(b.put(rows, width, &normal(3, rows * width, 1.0)));
        let stats = Stats { mean: b.room(rows, 1), rstd: b.room(rows, 1) };
        let (y, d_x) = (b.room(rows, width), b.room(rows, width));
        let d_y = b.put(rows, width, &normal(4, rows * width, 1.0));
        let results = [norm.d_gamma.unwrap(), norm.d_beta.unwrap()];
        let once = std::cell::RefCell::new(Vec::new());
        let run = |k: &mut crate::backend::cpu::CpuBackend| {
            k.layernorm(&join, &norm, y, stats).unwrap();
            k.layernorm_backward(d_y, &join, &norm, stats, d_x, Write::Assign, y, None).unwrap();
            *once.borrow_mut() = results.map(|mat| take(k, mat)).to_vec();
            k.begin_micro(crate::backend::Micro { gradients: Write::Add, ..b.micro }).unwrap();
            k.layernorm_backward(d_y, &join, &norm, stats, d_x, Write::Assign, y, None).unwrap();
        };
        b.everywhere(&results, run, |r| {
            for (twice, once) in r.iter().zip(once.borrow().iter()) {
                let expected: Vec<f64> = once.iter().map(|g| 2.0 * f64::from(*g)).collect();
                assert_close("twice", twice, &expected, 1e-6);
            }
        });
    }

    #[test]
    fn rows_far_from_zero_keep_their_digits() {
        let (rows, width) = (5, 100);
        let x: Vec<f32> = normal(3, rows * width, 0.1).iter().map(|x| x + 1000.0).collect();
        let d_y = normal(4, rows * width, 1.0);
        let mut b = Testbed::new(rows);
        let (norm, gamma, beta) = norm(&mut b, width, 1e-6);
        let join = Join::Ready(b.put(rows, width, &x));
        let stats = Stats { mean: b.room(rows, 1), rstd: b.room(rows, 1) };
        let (y, d_x, d_y_mat) = (b.room(rows, width), b.room(rows, width), b.put(rows, width, &d_y));
        let run = |k: &mut crate::backend::cpu::CpuBackend| {
            k.layernorm(&join, &norm, y, stats).unwrap();
            k.layernorm_backward(d_y_mat, &join, &norm, stats, d_x, Write::Assign, d_x, None).unwrap();
        };
        b.everywhere(&[y, d_x], run, |r| {
            for (row, (x, d_y)) in x.chunks(width).zip(d_y.chunks(width)).enumerate() {
                let (x, d_y, n) = (wide(x), wide(d_y), width as f64);
                let mean = x.iter().sum::<f64>() / n;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
                let rstd = 1.0 / (variance + f64::from(1e-6f32)).sqrt();
                let hat: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
                let u: Vec<f64> = d_y.iter().zip(&gamma).map(|(d, g)| d * f64::from(*g)).collect();
                let avg_u = u.iter().sum::<f64>() / n;
                let avg_ux = u.iter().zip(&hat).map(|(u, x)| u * x).sum::<f64>() / n;
                let y: Vec<f64> =
                    (0..width).map(|i| hat[i] * f64::from(gamma[i]) + f64::from(beta[i])).collect();
                let d_x: Vec<f64> = (0..width).map(|i| rstd * (u[i] - avg_u - hat[i] * avg_ux)).collect();
                let of_row = row * width..(row + 1) * width;
                assert_close("y", &r[0][of_row.clone()], &y, 1e-6);
                assert_close("d_x", &r[1][of_row], &d_x, 1e-6);
            }
        });
    }

    #[test]
    fn reference_values_are_met_row_by_row() {
        let Some(file) = Reference::open("kernels/layernorm.safetensors") else { return };
        for i in (0..).take_while(|i| file.has(&format!("ln{i}.x"))) {
            let get = |name: &str| file.f32(&format!("ln{i}.{name}"));
            let shape = file.shape(&format!("ln{i}.x"));
            let (rows, width) = (shape[0], shape[1]);
            let mut b = Testbed::new(rows);
            let norm = Norm {
                gamma: b.put(1, width, &get("scale")),
                beta: b.put(1, width, &get("bias")),
                d_gamma: Some(b.room(1, width)),
                d_beta: Some(b.room(1, width)),
                eps: 1e-6,
            };
            let join = Join::Ready(b.put(rows, width, &get("x")));
            let stats = Stats { mean: b.room(rows, 1), rstd: b.room(rows, 1) };
            let (y, d_x) = (b.room(rows, width), b.room(rows, width));
            let d_y = b.put(rows, width, &get("dy"));
            let results = [stats.mean, stats.rstd, y, d_x, norm.d_gamma.unwrap(), norm.d_beta.unwrap()];
            let run = |k: &mut crate::backend::cpu::CpuBackend| {
                k.layernorm(&join, &norm, y, stats).unwrap();
                k.layernorm_backward(d_y, &join, &norm, stats, d_x, Write::Assign, d_x, None).unwrap();
            };
            b.everywhere(&results, run, |r| {
                for (got, name) in r.iter().zip(["mean", "rstd", "y", "dx", "dscale", "dbias"]) {
                    let expected = wide(&get(name));
                    let by_row = if name == "y" || name == "dx" { width } else { got.len() };
                    for (row, (got, expected)) in got.chunks(by_row).zip(expected.chunks(by_row)).enumerate()
                    {
                        assert_close(&format!("ln{i}.{name}, row {row}"), got, expected, 1e-6);
                    }
                }
            });
        }
    }
}
