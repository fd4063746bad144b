//! Attention of one query per head and image over all its tokens. It serves the class token of a pruned last
//! block, and a MAP head, where one learned query is shared by all images (Zhai et al. 2022,
//! arXiv:2106.04560).
//!
//! Its time is that of reading the keys and values once, so the code is plain: one image per task, dot
//! products along Dh.

use super::attention::dot;
use super::compute::Compute;
use super::math::exp;
use super::simd::{Simd, Task};
use super::view::{Rows, RowsMut, Shared};
use crate::backend::Heads;
use crate::backend::mask::BoundMask;

/// `o: [B, H·Dh]` and the probabilities `p: [B·H·T]` from `q: [B, H·Dh]`, or `[1, H·Dh]` shared by all
/// images, and `kv: [B·T, 2·H·Dh]`. Dropout acts on the probabilities after `p` is stored: element
/// `h·T·T + key` of sample b, as for the first query of [`super::attention`].
/// # Panics
/// If shapes do not fit.
pub fn forward(
    c: &Compute,
    heads: Heads,
    q: Rows,
    kv: Rows,
    p: &mut [f32],
    o: RowsMut,
    dropout: Option<BoundMask>,
) {
    let images = images(heads, q, kv);
    let len = images * heads.heads * heads.tokens;
    assert_eq!(p.len(), len, "probe attention: length of p");
    assert_eq!((o.rows, o.cols), (images, q.cols), "probe attention: shape of o");
    let p = Shared::new(RowsMut::dense(p, 1, len));
    let o = Shared::new(o);
    let job = Job { heads, q, kv, dropout };
    c.for_each(images, |image| {
        let factors = c.scratch(heads.tokens);
        c.isa.run(ForwardTask { job: &job, p, o, image, factors });
    });
}

/// `d_q` and `d_kv: [B·T, 2·H·Dh]`, both assigned, from `d_o: [B, H·Dh]`. `d_q` has the shape of `q`; if the
/// images share the query, it is summed over them in order.
/// # Panics
/// If shapes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    c: &Compute,
    heads: Heads,
    q: Rows,
    kv: Rows,
    p: &[f32],
    dropout: Option<BoundMask>,
    d_o: Rows,
    d_q: RowsMut,
    d_kv: RowsMut,
) {
    let images = images(heads, q, kv);
    assert_eq!(p.len(), images * heads.heads * heads.tokens, "probe attention backward: length of p");
    assert_eq!((d_o.rows, d_o.cols), (images, q.cols), "probe attention backward: shape of d_o");
    assert_eq!((d_q.rows, d_q.cols), (q.rows, q.cols), "probe attention backward: shape of d_q");
    assert_eq!((d_kv.rows, d_kv.cols), (kv.rows, kv.cols), "probe attention backward: shape of d_kv");
    let job = Job { heads, q, kv, dropout };
    let d_kv = Shared::new(d_kv);
    let for_images = |d_q: RowsMut| {
        let d_q = Shared::new(d_q);
        c.for_each(images, |image| {
            let (ds, factors) = (c.scratch(heads.tokens), c.scratch(heads.tokens));
            c.isa.run(BackwardTask { job: &job, p, d_o, d_q, d_kv, image, ds, factors });
        });
    };
    if q.rows == images {
        return for_images(d_q);
    }
    let (width, mut d_q) = (q.cols, d_q);
    let mut parts = c.scratch(images * width);
    for_images(RowsMut::dense(&mut parts, images, width));
    let d_q = d_q.row(0);
    d_q.fill(0.0);
    for part in parts.chunks_exact(width) {
        d_q.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
}

/// B
fn images(heads: Heads, q: Rows, kv: Rows) -> usize {
    let Heads { tokens, heads, head_size } = heads;
    assert!(tokens > 0 && heads > 0 && head_size > 0, "probe attention: an empty head");
    assert_eq!(q.cols, heads * head_size, "probe attention: columns of q");
    assert_eq!(kv.cols, 2 * q.cols, "probe attention: columns of kv");
    assert_eq!(kv.rows % tokens, 0, "probe attention: {} rows are not whole images", kv.rows);
    let images = kv.rows / tokens;
    assert!(q.rows == 1 || q.rows == images, "probe attention: {} queries of {images} images", q.rows);
    images
}

/// The inputs of both passes.
struct Job<'a> {
    heads: Heads,
    q: Rows<'a>,
    kv: Rows<'a>,
    dropout: Option<BoundMask>,
}

impl<'a> Job<'a> {
    /// The image's query: its own, or the shared one.
    fn query(&self, image: usize) -> &'a [f32] {
        self.q.row(if self.q.rows == 1 { 0 } else { image })
    }

    /// The factors of a head's T probabilities.
    fn fill(&self, image: usize, head: usize, factors: &mut [f32]) {
        match &self.dropout {
            Some(mask) => mask.fill(image, head * self.heads.tokens * self.heads.tokens, factors),
            None => factors.fill(1.0),
        }
    }
}

struct ForwardTask<'a, D> {
    job: &'a Job<'a>,
    p: Shared<'a>,
    o: Shared<'a>,
    image: usize,
    /// Scratch for T factors of dropout.
    factors: D,
}

impl<D: std::ops::DerefMut<Target = [f32]>> Task for ForwardTask<'_, D> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { job, p, o, image, mut factors } = self;
        let (Heads { tokens: t, heads, head_size: dh }, kv) = (job.heads, job.kv);
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
            let q = &job.query(image)[col..col + dh];
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
            job.fill(image, head, &mut factors);
            o.fill(0.0);
            for (token, (p, factor)) in p.iter_mut().zip(factors.iter()).enumerate() {
                *p /= sum;
                let value = &kv.row(image * t + token)[width + col..width + col + dh];
                add_scaled(s, o, *p * factor, value);
            }
        }
    }
}

struct BackwardTask<'a, D> {
    job: &'a Job<'a>,
    p: &'a [f32],
    d_o: Rows<'a>,
    /// The gradient of this image's query, in its row.
    d_q: Shared<'a>,
    d_kv: Shared<'a>,
    image: usize,
    /// Scratch for the gradient of T scores, and for T factors of dropout.
    ds: D,
    factors: D,
}

impl<D: std::ops::DerefMut<Target = [f32]>> Task for BackwardTask<'_, D> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { job, p, d_o, d_q, d_kv, image, mut ds, mut factors } = self;
        let (Heads { tokens: t, heads, head_size: dh }, kv) = (job.heads, job.kv);
        let width = heads * dh;
        let scale = 1.0 / (dh as f32).sqrt();
        for head in 0..heads {
            let col = head * dh;
            let p = &p[(image * heads + head) * t..][..t];
            let (q, d_o) = (&job.query(image)[col..col + dh], &d_o.row(image)[col..col + dh]);
            job.fill(image, head, &mut factors);
            let mut mean = 0.0;
            for token in 0..t {
                let value = &kv.row(image * t + token)[width + col..width + col + dh];
                // SAFETY: both are slices of dh values.
                ds[token] = factors[token] * unsafe { dot(s, d_o.as_ptr(), value.as_ptr(), dh) };
                mean += p[token] * ds[token];
            }
            // SAFETY: the image's row of d_q belongs to this task.
            let d_q = unsafe { std::slice::from_raw_parts_mut(d_q.at(image, col), dh) };
            d_q.fill(0.0);
            for token in 0..t {
                let row = image * t + token;
                let d_score = p[token] * (ds[token] - mean) * scale;
                let weight = p[token] * factors[token];
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
                    d_value[i] = weight * d_o[i];
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
    use crate::backend::{Mask, Micro, StepKeys, Write};

    fn dropout() -> BoundMask {
        let micro = Micro { first: 2, samples: 8, global_first: 8, gradients: Write::Assign, mean_over: 8 };
        BoundMask::new(Mask { rate: 0.3, site: 9 }, StepKeys { seed: 1, step: 4 }, micro)
    }

    #[test]
    fn forward_and_backward_equal_f64() {
        let shapes = [(1, 1, 1, 1), (3, 5, 2, 5), (2, 16, 3, 12), (4, 33, 2, 64), (2, 197, 1, 72)];
        for (seed, (b, t, h, dh)) in shapes.into_iter().enumerate() {
            for (queries, mask) in [(1, None), (b, None), (1, Some(dropout())), (b, Some(dropout()))] {
                equal_f64(seed, Heads { tokens: t, heads: h, head_size: dh }, b, queries, mask);
            }
        }
    }

    fn equal_f64(seed: usize, heads: Heads, b: usize, queries: usize, mask: Option<BoundMask>) {
        let Heads { tokens: t, heads: h, head_size: dh } = heads;
        let width = h * dh;
        let mut numbers = Numbers::new(seed as u64);
        let q = Matrix::random(&mut numbers, queries, width, seed % 2);
        let kv = Matrix::random(&mut numbers, b * t, 2 * width, seed % 3);
        let d_o = Matrix::random(&mut numbers, b, width, seed % 2);
        let scale = 1.0 / (dh as f64).sqrt();
        let (mut p, mut o) = (vec![0.0; b * h * t], vec![0.0; b * width]);
        let (mut d_q, mut d_kv) = (vec![0.0; queries * width], vec![0.0; b * t * 2 * width]);
        for image in 0..b {
            for head in 0..h {
                let query = image % queries;
                let at = |i: usize, e: usize| kv.at(image * t + i, head * dh + e);
                let value = |i: usize, e: usize| kv.at(image * t + i, width + head * dh + e);
                let g = |e: usize| d_o.at(image, head * dh + e);
                let q = |e: usize| q.at(query, head * dh + e);
                let m = |j: usize| mask.map_or(1.0, |m| m.factor(image, head * t * t + j) as f64);
                let s: Vec<f64> =
                    (0..t).map(|j| (0..dh).map(|e| q(e) * at(j, e)).sum::<f64>() * scale).collect();
                let sum: f64 = s.iter().map(|s| s.exp()).sum();
                let prob: Vec<f64> = s.iter().map(|s| s.exp() / sum).collect();
                let dp: Vec<f64> =
                    (0..t).map(|j| m(j) * (0..dh).map(|e| g(e) * value(j, e)).sum::<f64>()).collect();
                let mean: f64 = (0..t).map(|j| prob[j] * dp[j]).sum();
                for j in 0..t {
                    p[(image * h + head) * t + j] = prob[j];
                    let ds = prob[j] * (dp[j] - mean) * scale;
                    for e in 0..dh {
                        let col = head * dh + e;
                        o[image * width + col] += prob[j] * m(j) * value(j, e);
                        d_q[query * width + col] += ds * at(j, e);
                        d_kv[(image * t + j) * 2 * width + col] = ds * q(e);
                        d_kv[(image * t + j) * 2 * width + width + col] = prob[j] * m(j) * g(e);
                    }
                }
            }
        }
        let want = [&p[..], &o, &d_q, &d_kv];
        on_every_isa(
            |c| {
                let mut p = vec![0.5; b * h * t];
                let blank = |rows: usize, cols: usize, gap: usize| {
                    Matrix::from_values(&vec![0.5; rows * cols], rows, cols, gap)
                };
                let (mut o, mut d_q) = (blank(b, width, 1), blank(queries, width, 2));
                let mut d_kv = blank(b * t, 2 * width, seed % 4);
                forward(c, heads, q.rows(), kv.rows(), &mut p, o.rows_mut(), mask);
                let (d_q_rows, d_kv_rows) = (d_q.rows_mut(), d_kv.rows_mut());
                backward(c, heads, q.rows(), kv.rows(), &p, mask, d_o.rows(), d_q_rows, d_kv_rows);
                [p, o.values(), d_q.values(), d_kv.values()].concat()
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
                    assert!(
                        error < 3e-6,
                        "part {part} of {b} {heads:?}, {queries} queries, {isa:?}: {error:e}"
                    );
                    got = rest;
                }
            },
        );
    }
}
