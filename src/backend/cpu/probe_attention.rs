//! The attention of a MAP head: one learned query per head looks at all tokens of each image (Zhai et al. 2022,
//! arXiv:2106.04560). It runs once per step, so it is plain: one image per piece of work, dot products along Dh.

use super::attention::dot;
use super::compute::Compute;
use super::math::exp;
use super::simd::{Simd, Task};
use super::view::{Rows, RowsMut, Shared};
use crate::backend::Heads;

/// `o: [B, H·Dh]` and the probabilities `p: [B·H·T]` from `q: [H·Dh]` and `kv: [B·T, 2·H·Dh]`.
/// # Panics
/// If shapes do not fit.
pub fn forward(c: &Compute, heads: Heads, q: &[f32], kv: Rows, p: &mut [f32], o: RowsMut) {
    let images = images(heads, q, kv);
    let len = images * heads.heads * heads.tokens;
    assert_eq!(p.len(), len, "probe attention: length of p");
    assert_eq!((o.rows, o.cols), (images, q.len()), "probe attention: shape of o");
    let p = Shared::new(RowsMut::dense(p, 1, len));
    let o = Shared::new(o);
    c.for_each(images, |image| c.isa.run(ForwardTask { heads, q, kv, p, o, image }));
}

/// `d_q: [H·Dh]`, summed over the images in order, and `d_kv: [B·T, 2·H·Dh]`, both assigned, from `d_o: [B, H·Dh]`.
/// # Panics
/// If shapes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    c: &Compute,
    heads: Heads,
    q: &[f32],
    kv: Rows,
    p: &[f32],
    d_o: Rows,
    d_q: &mut [f32],
    d_kv: RowsMut,
) {
    let images = images(heads, q, kv);
    assert_eq!(p.len(), images * heads.heads * heads.tokens, "probe attention backward: length of p");
    assert_eq!((d_o.rows, d_o.cols), (images, q.len()), "probe attention backward: shape of d_o");
    assert_eq!(d_q.len(), q.len(), "probe attention backward: length of d_q");
    assert_eq!((d_kv.rows, d_kv.cols), (kv.rows, kv.cols), "probe attention backward: shape of d_kv");
    let width = q.len();
    let mut parts = c.scratch(images * width);
    {
        let d_kv = Shared::new(d_kv);
        let parts = Shared::new(RowsMut::dense(&mut parts, images, width));
        c.for_each(images, |image| {
            let ds = c.scratch(heads.tokens);
            c.isa.run(BackwardTask { heads, q, kv, p, d_o, d_kv, parts, image, ds });
        });
    }
    d_q.fill(0.0);
    for part in parts.chunks_exact(width) {
        d_q.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
}

/// B
fn images(heads: Heads, q: &[f32], kv: Rows) -> usize {
    let Heads { tokens, heads, head_size } = heads;
    assert!(tokens > 0 && heads > 0 && head_size > 0, "probe attention: an empty head");
    assert_eq!(q.len(), heads * head_size, "probe attention: length of q");
    assert_eq!(kv.cols, 2 * q.len(), "probe attention: columns of kv");
    assert_eq!(kv.rows % tokens, 0, "probe attention: {} rows are no whole images", kv.rows);
    kv.rows / tokens
}

struct ForwardTask<'a> {
    heads: Heads,
    q: &'a [f32],
    kv: Rows<'a>,
    p: Shared<'a>,
    o: Shared<'a>,
    image: usize,
}

impl Task for ForwardTask<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { heads: Heads { tokens: t, heads, head_size: dh }, q, kv, p, o, image } = self;
        let width = heads * dh;
        let scale = 1.0 / (dh as f32).sqrt();
        for head in 0..heads {
            let (at, col) = ((image * heads + head) * t, head * dh);
            // SAFETY: the head's t probabilities and its dh outputs belong to this task.
            let (p, o) = unsafe {
                (
                    std::slice::from_raw_parts_mut(p.at(0, at), t),
                    std::slice::from_raw_parts_mut(o.at(image, col), dh),
                )
            };
            let q = &q[col..col + dh];
            for (token, p) in p.iter_mut().enumerate() {
                let key = &kv.row(image * t + token)[col..col + dh];
                // SAFETY: both are slices of dh values.
                *p = unsafe { dot(s, q.as_ptr(), key.as_ptr(), dh) } * scale;
            }
            let most = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for chunk in p.chunks_mut(S::LANES) {
                let n = chunk.len();
                // SAFETY: n values of the chunk.
                unsafe {
                    let e = exp(s, s.sub(s.load_head(chunk.as_ptr(), n), s.splat(most)));
                    s.store_head(chunk.as_mut_ptr(), e, n);
                }
                sum += chunk.iter().sum::<f32>();
            }
            o.fill(0.0);
            for (token, p) in p.iter_mut().enumerate() {
                *p /= sum;
                let value = &kv.row(image * t + token)[width + col..width + col + dh];
                add_scaled(s, o, *p, value);
            }
        }
    }
}

struct BackwardTask<'a, D> {
    heads: Heads,
    q: &'a [f32],
    kv: Rows<'a>,
    p: &'a [f32],
    d_o: Rows<'a>,
    d_kv: Shared<'a>,
    /// The image's part of `d_q`, in its row.
    parts: Shared<'a>,
    image: usize,
    /// Scratch for the gradient of T scores.
    ds: D,
}

impl<D: std::ops::DerefMut<Target = [f32]>> Task for BackwardTask<'_, D> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self {
            heads: Heads { tokens: t, heads, head_size: dh },
            q,
            kv,
            p,
            d_o,
            d_kv,
            parts,
            image,
            mut ds,
        } = self;
        let width = heads * dh;
        let scale = 1.0 / (dh as f32).sqrt();
        for head in 0..heads {
            let col = head * dh;
            let p = &p[(image * heads + head) * t..][..t];
            let (q, d_o) = (&q[col..col + dh], &d_o.row(image)[col..col + dh]);
            let mut mean = 0.0;
            for token in 0..t {
                let value = &kv.row(image * t + token)[width + col..width + col + dh];
                // SAFETY: both are slices of dh values.
                ds[token] = unsafe { dot(s, d_o.as_ptr(), value.as_ptr(), dh) };
                mean += p[token] * ds[token];
            }
            // SAFETY: the image's row of the parts belongs to this task.
            let d_q = unsafe { std::slice::from_raw_parts_mut(parts.at(image, col), dh) };
            d_q.fill(0.0);
            for token in 0..t {
                let row = image * t + token;
                let d_score = p[token] * (ds[token] - mean) * scale;
                add_scaled(s, d_q, d_score, &kv.row(row)[col..col + dh]);
                // SAFETY: the image's rows of d_kv belong to this task.
                let (d_key, d_value) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(d_kv.at(row, col), dh),
                        std::slice::from_raw_parts_mut(d_kv.at(row, width + col), dh),
                    )
                };
                for i in 0..dh {
                    d_key[i] = d_score * q[i];
                    d_value[i] = p[token] * d_o[i];
                }
            }
        }
    }
}

/// `to += factor·x`
#[inline(always)]
fn add_scaled<S: Simd>(s: S, to: &mut [f32], factor: f32, x: &[f32]) {
    let factor = s.splat(factor);
    for (to, x) in to.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
        let n = to.len().min(x.len());
        // SAFETY: n values of both chunks.
        unsafe {
            let sum = s.fma(factor, s.load_head(x.as_ptr(), n), s.load_head(to.as_ptr(), n));
            s.store_head(to.as_mut_ptr(), sum, n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::{Matrix, Numbers, on_every_isa, rel_l2};

    #[test]
    fn forward_and_backward_equal_f64() {
        for (seed, (b, t, h, dh)) in
            [(1, 1, 1, 1), (3, 5, 2, 5), (2, 16, 3, 12), (4, 33, 2, 64), (1, 197, 1, 72)]
                .into_iter()
                .enumerate()
        {
            let heads = Heads { tokens: t, heads: h, head_size: dh };
            let width = h * dh;
            let mut numbers = Numbers::new(seed as u64);
            let q = numbers.vec(width);
            let kv = Matrix::random(&mut numbers, b * t, 2 * width, seed % 3);
            let d_o = Matrix::random(&mut numbers, b, width, seed % 2);
            let scale = 1.0 / (dh as f64).sqrt();
            let (mut p, mut o) = (vec![0.0; b * h * t], vec![0.0; b * width]);
            let (mut d_q, mut d_kv) = (vec![0.0; width], vec![0.0; b * t * 2 * width]);
            for image in 0..b {
                for head in 0..h {
                    let at = |i: usize, e: usize| kv.at(image * t + i, head * dh + e);
                    let value = |i: usize, e: usize| kv.at(image * t + i, width + head * dh + e);
                    let g = |e: usize| d_o.at(image, head * dh + e);
                    let q = |e: usize| q[head * dh + e] as f64;
                    let s: Vec<f64> =
                        (0..t).map(|j| (0..dh).map(|e| q(e) * at(j, e)).sum::<f64>() * scale).collect();
                    let sum: f64 = s.iter().map(|s| s.exp()).sum();
                    let prob: Vec<f64> = s.iter().map(|s| s.exp() / sum).collect();
                    let dp: Vec<f64> =
                        (0..t).map(|j| (0..dh).map(|e| g(e) * value(j, e)).sum::<f64>()).collect();
                    let mean: f64 = (0..t).map(|j| prob[j] * dp[j]).sum();
                    for j in 0..t {
                        p[(image * h + head) * t + j] = prob[j];
                        let ds = prob[j] * (dp[j] - mean) * scale;
                        for e in 0..dh {
                            let col = head * dh + e;
                            o[image * width + col] += prob[j] * value(j, e);
                            d_q[col] += ds * at(j, e);
                            d_kv[(image * t + j) * 2 * width + col] = ds * q(e);
                            d_kv[(image * t + j) * 2 * width + width + col] = prob[j] * g(e);
                        }
                    }
                }
            }
            let want = [&p[..], &o, &d_q, &d_kv];
            on_every_isa(
                |c| {
                    let (mut p, mut d_q) = (vec![0.5; b * h * t], vec![0.5; width]);
                    let mut o = Matrix::from_values(&vec![0.5; b * width], b, width, 1);
                    let mut d_kv =
                        Matrix::from_values(&vec![0.5; b * t * 2 * width], b * t, 2 * width, seed % 4);
                    forward(c, heads, &q, kv.rows(), &mut p, o.rows_mut());
                    backward(c, heads, &q, kv.rows(), &p, d_o.rows(), &mut d_q, d_kv.rows_mut());
                    [p, o.values(), d_q, d_kv.values()].concat()
                },
                |isa, mut got| {
                    for (part, want) in want.iter().enumerate() {
                        let (head, rest) = got.split_at(want.len());
                        let error = if want.iter().all(|w| w.abs() < 1e-12) {
                            // One token: no gradient reaches the scores.
                            head.iter().fold(0.0, |m, x| f64::max(m, x.abs() as f64))
                        } else {
                            rel_l2(head, want.iter().copied())
                        };
                        assert!(error < 3e-6, "part {part} of {b} {t} {h} {dh}, {isa:?}: {error:e}");
                        got = rest;
                    }
                },
            );
        }
    }
}
