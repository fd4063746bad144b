//! Multi-head attention straight from the packed `[B·T, 3·H·Dh]` rows, forward and backward.
//!
//! One (image, head) is one task, done by one thread. Keys, and in the backward pass values too, are packed
//! transposed once. Then MR queries at a time go through scores, softmax and the product with the values,
//! while their scores stay in L1. The forward pass keeps only `lse = ln Σ_j e^(s_j)` of each query; the
//! backward pass recomputes the probabilities from it (Dao et al. 2022, arXiv:2205.14135):
//!
//! ```text
//! P = e^(scale·Q·Kᵀ - lse)    dP = dO·Vᵀ    dS = scale·P∘(dP - rowsum(dO∘O))
//! dQ = dS·K    dK = dSᵀ·Q    dV = Pᵀ·dO
//! ```
//!
//! P and dS of a block of queries lie in scratch of at most [`SCORES`] values each (or MR rows): no buffer
//! has B·H·T·T values. Under dropout, P in `P·V` and `Pᵀ·dO`, and dP, are multiplied by the mask; `lse`
//! ignores it.

use super::compute::Compute;
use super::gemm::pack::{pack_plain, pack_transposed, packed_len};
use super::gemm::tile::{Left, Product, Right, TileBuffer, product};
use super::math::{exp2, ln};
use super::simd::{MAX_MR, Simd, Task};
use super::view::{Rows, RowsMut, Shared};
use crate::backend::Heads;
use crate::backend::mask::BoundMask;

/// Values of P, and of dS, that the backward pass keeps: T·T up to 512 tokens, a block of queries for more.
const SCORES: usize = 512 * 512;
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// Tasks per thread.
const TASKS_PER_THREAD: usize = 8;

/// `o: [B·T, H·Dh]` and `lse: [B·H·T]` (natural logarithm, of scores scaled by 1/√Dh) from `qkv: [B·T, 3·H·Dh]`.
/// Dropout acts on the probabilities: element `(h·T + query)·T + key` of sample b.
/// # Panics
/// If shapes do not fit.
pub fn forward(
    c: &Compute,
    heads: Heads,
    qkv: Rows,
    o: RowsMut,
    lse: &mut [f32],
    dropout: Option<BoundMask>,
) {
    let images = images(heads, qkv);
    assert_eq!((o.rows, o.cols), (qkv.rows, qkv.cols / 3), "attention: shape of o");
    assert_eq!(lse.len(), images * heads.heads * heads.tokens, "attention: length of lse");
    let lse_len = lse.len();
    let job = Forward {
        heads,
        qkv,
        o: Shared::new(o),
        lse: Shared::new(RowsMut::dense(lse, 1, lse_len)),
        dropout: dropout.filter(|d| !d.is_none()),
    };
    for_heads(c, images * heads.heads, |items| c.isa.run(ForwardTask { c, job: &job, items }));
}

/// `d_qkv: [B·T, 3·H·Dh]` from `d_o`, with `o` and `lse` of the forward.
/// # Panics
/// If shapes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    c: &Compute,
    heads: Heads,
    qkv: Rows,
    o: Rows,
    lse: &[f32],
    dropout: Option<BoundMask>,
    d_o: Rows,
    d_qkv: RowsMut,
) {
    let images = images(heads, qkv);
    let shape = (qkv.rows, qkv.cols / 3);
    assert_eq!((o.rows, o.cols), shape, "attention backward: shape of o");
    assert_eq!((d_o.rows, d_o.cols), shape, "attention backward: shape of d_o");
    assert_eq!((d_qkv.rows, d_qkv.cols), (qkv.rows, qkv.cols), "attention backward: shape of d_qkv");
    assert_eq!(lse.len(), images * heads.heads * heads.tokens, "attention backward: length of lse");
    let job = Backward {
        heads,
        qkv,
        o,
        lse,
        d_o,
        d_qkv: Shared::new(d_qkv),
        dropout: dropout.filter(|d| !d.is_none()),
    };
    for_heads(c, images * heads.heads, |items| c.isa.run(BackwardTask { c, job: &job, items }));
}

/// B
fn images(heads: Heads, qkv: Rows) -> usize {
    let Heads { tokens, heads, head_size } = heads;
    assert!(tokens > 0 && heads > 0 && head_size > 0, "attention: an empty head");
    assert_eq!(qkv.cols, 3 * heads * head_size, "attention: columns of qkv");
    assert_eq!(qkv.rows % tokens, 0, "attention: {} rows are not whole images of {tokens} tokens", qkv.rows);
    qkv.rows / tokens
}

/// Splits the (image, head) pairs into ranges.
fn for_heads(c: &Compute, items: usize, job: impl Fn(std::ops::Range<usize>) + Sync + Send) {
    let tasks = items.min(c.threads() * TASKS_PER_THREAD);
    c.for_each(tasks, |i| job(i * items / tasks..(i + 1) * items / tasks));
}

/// Leading dimension of score rows: an odd number of whole cache lines, so that a column of scores is spread
/// over many sets of the cache.
fn score_row(tokens: usize) -> usize {
    (tokens.div_ceil(16) | 1) * 16
}

/// Takes pieces off a scratch buffer, each aligned to a cache line.
struct Cutter<'a>(&'a mut [f32]);

impl<'a> Cutter<'a> {
    fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (head, tail) = std::mem::take(&mut self.0).split_at_mut(len.next_multiple_of(16));
        self.0 = tail;
        head
    }
}

/// Where a head lies in the rows: pointers to its first q, k and v.
struct Head {
    q: *const f32,
    k: *const f32,
    v: *const f32,
    image: usize,
    head: usize,
    /// First row of the image.
    row: usize,
    /// First column of the head in q, and in o.
    col: usize,
}

impl Head {
    #[inline(always)]
    fn new(heads: Heads, qkv: Rows, item: usize) -> Self {
        let (image, head) = (item / heads.heads, item % heads.heads);
        let (row, col) = (image * heads.tokens, head * heads.head_size);
        let width = heads.heads * heads.head_size;
        let q = qkv.data[row * qkv.ld + col..].as_ptr();
        Self { q, k: q.wrapping_add(width), v: q.wrapping_add(2 * width), image, head, row, col }
    }
}

// Forward ---------------------------------------------------------------------------------------------------------

struct Forward<'a> {
    heads: Heads,
    qkv: Rows<'a>,
    o: Shared<'a>,
    lse: Shared<'a>,
    dropout: Option<BoundMask>,
}

struct ForwardTask<'a> {
    c: &'a Compute,
    job: &'a Forward<'a>,
    items: std::ops::Range<usize>,
}

impl Task for ForwardTask<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { c, job, items } = self;
        let Heads { tokens: t, head_size: dh, .. } = job.heads;
        let (ld, scale) = (score_row(t), 1.0 / (dh as f32).sqrt());
        let lens = [packed_len::<S>(dh, t), packed_len::<S>(t, dh), S::MR * ld, t];
        let mut scratch = c.scratch(lens.iter().map(|l| l.next_multiple_of(16)).sum());
        let mut cutter = Cutter(&mut scratch);
        let [keys, values, scores, factors] = lens.map(|l| cutter.take(l));
        let factors = &mut factors[..t];
        let mut buffer = TileBuffer::new();
        for item in items {
            let head = Head::new(job.heads, job.qkv, item);
            let ld_qkv = job.qkv.ld;
            // SAFETY: the head's q, k and v are t rows of dh values in qkv; the scratch is cut to what is written.
            unsafe {
                pack_transposed(s, head.k, ld_qkv, dh, t, 0..t, keys.as_mut_ptr());
                pack_plain(s, head.v, ld_qkv, t, dh, 0..dh, values.as_mut_ptr());
            }
            let blocks = t.div_ceil(S::MR);
            for block in 0..blocks {
                let (i, end) = (block * t / blocks, (block + 1) * t / blocks);
                let rows = end - i;
                let to_scores = Product {
                    m: rows,
                    n: t,
                    k: dh,
                    a: Left { at: head.q.wrapping_add(i * ld_qkv), row: ld_qkv, k: 1 },
                    b: Right { at: keys.as_ptr(), k: dh },
                    c: scores.as_mut_ptr(),
                    c_row: ld,
                    add: false,
                };
                // SAFETY: rows i..end of the head; `scores` holds MR rows of `ld ≥ t`.
                unsafe { product(s, &to_scores, &mut buffer) };
                let (mut sums, mut most) = ([1.0; MAX_MR], [0.0; MAX_MR]);
                for r in 0..rows {
                    let row = &mut scores[r * ld..r * ld + ld];
                    (sums[r], most[r]) = softmax(s, row, t, scale);
                    if let Some(mask) = &job.dropout {
                        mask.fill(head.image, (head.head * t + i + r) * t, factors);
                        row.iter_mut().zip(&*factors).for_each(|(p, f)| *p *= f);
                    }
                }
                // SAFETY: elements of these queries only.
                unsafe { log_sums(s, &sums[..rows], &most[..rows], job.lse.at(0, item * t + i)) };
                let o = job.o.at(head.row + i, head.col);
                let to_output = Product {
                    m: rows,
                    n: dh,
                    k: t,
                    a: Left { at: scores.as_ptr(), row: ld, k: 1 },
                    b: Right { at: values.as_ptr(), k: t },
                    c: o,
                    c_row: job.o.ld,
                    add: false,
                };
                // SAFETY: rows and columns of this head in o, which belong to this task.
                unsafe {
                    product(s, &to_output, &mut buffer);
                    for (r, sum) in sums[..rows].iter().enumerate() {
                        scale_row(s, o.add(r * job.o.ld), dh, 1.0 / sum);
                    }
                }
            }
        }
    }
}

/// Replaces scores s by `e^(scale·(s - max))`; returns their sum and `scale·max`.
#[inline(always)]
fn softmax<S: Simd>(s: S, row: &mut [f32], t: usize, scale: f32) -> (f32, f32) {
    let lowest = s.splat(f32::NEG_INFINITY);
    let at = row.as_mut_ptr();
    let (whole, rest) = (t / S::LANES * S::LANES, t % S::LANES);
    // SAFETY: whole vectors below t, and one of `rest` lanes.
    unsafe {
        let mut most = lowest;
        let mut j = 0;
        while j < whole {
            most = s.max(most, s.load(at.add(j)));
            j += S::LANES;
        }
        if rest > 0 {
            most = s.max(most, s.keep_head(s.load_head(at.add(whole), rest), rest, lowest));
        }
        let most = s.largest(most);
        let factor = scale * LOG2_E;
        let (factor, shift) = (s.splat(factor), s.splat(-most * factor));
        let mut sum = s.splat(0.0);
        let mut j = 0;
        while j < whole {
            let p = exp2(s, s.fma(s.load(at.add(j)), factor, shift));
            sum = s.add(sum, p);
            s.store(at.add(j), p);
            j += S::LANES;
        }
        if rest > 0 {
            let p = exp2(s, s.fma(s.load_head(at.add(whole), rest), factor, shift));
            sum = s.add(sum, s.keep_head(p, rest, s.splat(0.0)));
            s.store_head(at.add(whole), p, rest);
        }
        (s.sum(sum), most * scale)
    }
}

/// `lse = most + ln(sum)` of some rows.
/// # Safety
/// `lse` must be valid for writes of as many values.
#[inline(always)]
unsafe fn log_sums<S: Simd>(s: S, sums: &[f32], most: &[f32], lse: *mut f32) {
    let mut i = 0;
    while i < sums.len() {
        let n = S::LANES.min(sums.len() - i);
        // SAFETY: n elements from i on, of three arrays of one length.
        unsafe {
            let sum = s.keep_head(s.load_head(sums.as_ptr().add(i), n), n, s.splat(1.0));
            let most = s.load_head(most.as_ptr().add(i), n);
            s.store_head(lse.add(i), s.add(most, ln(s, sum)), n);
        }
        i += n;
    }
}

/// # Safety
/// `n` values must be valid for reads and writes.
#[inline(always)]
unsafe fn scale_row<S: Simd>(s: S, at: *mut f32, n: usize, factor: f32) {
    let mut j = 0;
    while j < n {
        // SAFETY: the caller's promise.
        unsafe {
            let at = at.add(j);
            if n - j >= S::LANES {
                s.store(at, s.mul(s.load(at), s.splat(factor)));
            } else {
                s.store_head(at, s.mul(s.load_head(at, n - j), s.splat(factor)), n - j);
            }
        }
        j += S::LANES;
    }
}

// Backward --------------------------------------------------------------------------------------------------------

struct Backward<'a> {
    heads: Heads,
    qkv: Rows<'a>,
    o: Rows<'a>,
    lse: &'a [f32],
    d_o: Rows<'a>,
    d_qkv: Shared<'a>,
    dropout: Option<BoundMask>,
}

struct BackwardTask<'a> {
    c: &'a Compute,
    job: &'a Backward<'a>,
    items: std::ops::Range<usize>,
}

impl Task for BackwardTask<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { c, job, items } = self;
        let Heads { tokens: t, heads, head_size: dh } = job.heads;
        let (ld, width, scale) = (score_row(t), heads * dh, 1.0 / (dh as f32).sqrt());
        // Queries per block.
        let most = (SCORES / ld).max(S::MR).min(t);
        let (across, along) = (packed_len::<S>(dh, t), packed_len::<S>(t, dh));
        let lens = [across, across, along, along, along, most * ld, most * ld, t];
        let mut scratch = c.scratch(lens.iter().map(|l| l.next_multiple_of(16)).sum());
        let mut cutter = Cutter(&mut scratch);
        let [keys_t, values_t, keys, queries, d_out, p, ds, factors] = lens.map(|l| cutter.take(l));
        let factors = &mut factors[..t];
        let mut buffer = TileBuffer::new();
        let (ld_qkv, ld_o, ld_do) = (job.qkv.ld, job.o.ld, job.d_o.ld);
        for item in items {
            let head = Head::new(job.heads, job.qkv, item);
            let o = job.o.data[head.row * ld_o + head.col..].as_ptr();
            let d_o = job.d_o.data[head.row * ld_do + head.col..].as_ptr();
            let lse = &job.lse[item * t..(item + 1) * t];
            let place = |part: usize, row: usize| job.d_qkv.at(head.row + row, part * width + head.col);
            // SAFETY: all sources are t rows of dh values; the scratch is cut to what is written.
            unsafe {
                pack_transposed(s, head.k, ld_qkv, dh, t, 0..t, keys_t.as_mut_ptr());
                pack_transposed(s, head.v, ld_qkv, dh, t, 0..t, values_t.as_mut_ptr());
                pack_plain(s, head.k, ld_qkv, t, dh, 0..dh, keys.as_mut_ptr());
            }
            for first in (0..t).step_by(most) {
                let queries_here = most.min(t - first);
                let blocks = queries_here.div_ceil(S::MR);
                for block in 0..blocks {
                    let i = first + block * queries_here / blocks;
                    let rows = first + (block + 1) * queries_here / blocks - i;
                    let at = (i - first) * ld;
                    // SAFETY: rows i..i+rows of the head; P and dS hold `most` rows of `ld ≥ t`; dQ's rows and columns
                    // belong to this task.
                    unsafe {
                        let scores = Product {
                            m: rows,
                            n: t,
                            k: dh,
                            a: Left { at: head.q.add(i * ld_qkv), row: ld_qkv, k: 1 },
                            b: Right { at: keys_t.as_ptr(), k: dh },
                            c: p.as_mut_ptr().add(at),
                            c_row: ld,
                            add: false,
                        };
                        product(s, &scores, &mut buffer);
                        let d_probabilities = Product {
                            a: Left { at: d_o.add(i * ld_do), row: ld_do, k: 1 },
                            b: Right { at: values_t.as_ptr(), k: dh },
                            c: ds.as_mut_ptr().add(at),
                            ..scores
                        };
                        product(s, &d_probabilities, &mut buffer);
                        for r in 0..rows {
                            let query = i + r;
                            let dot = dot(s, d_o.add(query * ld_do), o.add(query * ld_o), dh);
                            let (p, ds) = (&mut p[at + r * ld..][..t], &mut ds[at + r * ld..][..t]);
                            let mask = match &job.dropout {
                                Some(mask) => {
                                    mask.fill(head.image, (head.head * t + query) * t, factors);
                                    Some(&*factors)
                                }
                                None => None,
                            };
                            d_scores(s, p, ds, lse[query], dot, scale, mask);
                        }
                        let d_query = Product {
                            m: rows,
                            n: dh,
                            k: t,
                            a: Left { at: ds.as_ptr().add(at), row: ld, k: 1 },
                            b: Right { at: keys.as_ptr(), k: t },
                            c: place(0, i),
                            c_row: job.d_qkv.ld,
                            add: false,
                        };
                        product(s, &d_query, &mut buffer);
                    }
                }
                // SAFETY: the queries of this block; rows and columns of dK and dV that belong to this task.
                unsafe {
                    let k = queries_here;
                    let from = head.q.add(first * ld_qkv);
                    pack_plain(s, from, ld_qkv, k, dh, 0..dh, queries.as_mut_ptr());
                    pack_plain(s, d_o.add(first * ld_do), ld_do, k, dh, 0..dh, d_out.as_mut_ptr());
                    let d_key = Product {
                        m: t,
                        n: dh,
                        k,
                        a: Left { at: ds.as_ptr(), row: 1, k: ld },
                        b: Right { at: queries.as_ptr(), k },
                        c: place(1, 0),
                        c_row: job.d_qkv.ld,
                        add: first > 0,
                    };
                    product(s, &d_key, &mut buffer);
                    let d_value = Product {
                        a: Left { at: p.as_ptr(), row: 1, k: ld },
                        b: Right { at: d_out.as_ptr(), k },
                        c: place(2, 0),
                        ..d_key
                    };
                    product(s, &d_value, &mut buffer);
                }
            }
        }
    }
}

/// # Safety
/// Both sides must be valid for `n` values.
#[inline(always)]
pub(super) unsafe fn dot<S: Simd>(s: S, a: *const f32, b: *const f32, n: usize) -> f32 {
    let mut sum = s.splat(0.0);
    let mut j = 0;
    while j < n {
        let len = S::LANES.min(n - j);
        // SAFETY: the caller's promise.
        sum = unsafe { s.fma(s.load_head(a.add(j), len), s.load_head(b.add(j), len), sum) };
        j += len;
    }
    s.sum(sum)
}

/// For one query's row: scores become probabilities (after dropout), and the gradient of the probabilities
/// becomes that of the unscaled scores. `dot` is the row sum of dO∘O, which equals that of P∘dP.
#[inline(always)]
fn d_scores<S: Simd>(
    s: S,
    p: &mut [f32],
    ds: &mut [f32],
    lse: f32,
    dot: f32,
    scale: f32,
    mask: Option<&[f32]>,
) {
    let (to_log2, minus_lse) = (s.splat(scale * LOG2_E), s.splat(-lse * LOG2_E));
    let (scale, dot) = (s.splat(scale), s.splat(dot));
    let t = p.len();
    let (p, ds) = (p.as_mut_ptr(), ds.as_mut_ptr());
    let mut j = 0;
    while j < t {
        let len = S::LANES.min(t - j);
        let whole = len == S::LANES;
        // SAFETY: `len` values from j < t on, in rows of t values (and the mask has as many).
        unsafe {
            let (p, ds) = (p.add(j), ds.add(j));
            let score = if whole { s.load(p) } else { s.load_head(p, len) };
            let mut dp = if whole { s.load(ds) } else { s.load_head(ds, len) };
            let prob = exp2(s, s.fma(score, to_log2, minus_lse));
            let mut kept = prob;
            if let Some(mask) = mask {
                let factor = s.load_head(mask.as_ptr().add(j), len);
                (kept, dp) = (s.mul(prob, factor), s.mul(dp, factor));
            }
            let d = s.mul(s.mul(prob, scale), s.sub(dp, dot));
            if whole {
                s.store(p, kept);
                s.store(ds, d);
            } else {
                s.store_head(p, kept, len);
                s.store_head(ds, d, len);
            }
        }
        j += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::{Matrix, Numbers, Tensors, on_every_isa, reference, rel_l2};
    use crate::backend::{Mask, Micro, StepKeys, Write};

    /// (B, T, H, Dh)
    const SHAPES: [(usize, usize, usize, usize); 16] = [
        (1, 1, 1, 1),
        (2, 1, 3, 12),
        (1, 2, 1, 5),
        (3, 5, 2, 5),
        (2, 7, 3, 12),
        (2, 16, 4, 32),
        (1, 17, 2, 16),
        (5, 12, 1, 24),
        (1, 33, 2, 72),
        (1, 65, 3, 64),
        (2, 50, 1, 80),
        (1, 30, 1, 128),
        (1, 13, 1, 160),
        (1, 197, 1, 64),
        (1, 257, 2, 20),
        (1, 700, 1, 8),
    ];

    fn dropout(rate: f32) -> BoundMask {
        let micro = Micro { first: 2, samples: 8, global_first: 8, gradients: Write::Assign, mean_over: 8 };
        BoundMask::new(Mask { rate, site: 9 }, StepKeys { seed: 1, step: 4 }, micro)
    }

    /// o, lse, d_qkv in f64, by the formulas of a textbook.
    fn attention64(
        (b, t, h, dh): (usize, usize, usize, usize),
        qkv: &Matrix,
        d_o: &Matrix,
        mask: Option<BoundMask>,
    ) -> [Vec<f64>; 3] {
        let width = h * dh;
        let scale = 1.0 / (dh as f64).sqrt();
        let mut o = vec![0.0; b * t * width];
        let mut lse = vec![0.0; b * h * t];
        let mut d = vec![0.0; b * t * 3 * width];
        for image in 0..b {
            for head in 0..h {
                let q = |i: usize, e: usize| qkv.at(image * t + i, head * dh + e);
                let k = |i: usize, e: usize| qkv.at(image * t + i, width + head * dh + e);
                let v = |i: usize, e: usize| qkv.at(image * t + i, 2 * width + head * dh + e);
                let g = |i: usize, e: usize| d_o.at(image * t + i, head * dh + e);
                let place = |part: usize, i: usize, e: usize| {
                    (image * t + i) * 3 * width + part * width + head * dh + e
                };
                for i in 0..t {
                    let s: Vec<f64> =
                        (0..t).map(|j| (0..dh).map(|e| q(i, e) * k(j, e)).sum::<f64>() * scale).collect();
                    let most = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = s.iter().map(|s| (s - most).exp()).sum();
                    lse[(image * h + head) * t + i] = most + sum.ln();
                    let p: Vec<f64> = s.iter().map(|s| (s - most).exp() / sum).collect();
                    let m: Vec<f64> = (0..t)
                        .map(|j| mask.map_or(1.0, |m| m.factor(image, (head * t + i) * t + j) as f64))
                        .collect();
                    for e in 0..dh {
                        o[(image * t + i) * width + head * dh + e] =
                            (0..t).map(|j| p[j] * m[j] * v(j, e)).sum();
                    }
                    let dp: Vec<f64> =
                        (0..t).map(|j| m[j] * (0..dh).map(|e| g(i, e) * v(j, e)).sum::<f64>()).collect();
                    let mean: f64 = (0..t).map(|j| p[j] * dp[j]).sum();
                    for j in 0..t {
                        let ds = p[j] * (dp[j] - mean) * scale;
                        for e in 0..dh {
                            d[place(0, i, e)] += ds * k(j, e);
                            d[place(1, j, e)] += ds * q(i, e);
                            d[place(2, j, e)] += p[j] * m[j] * g(i, e);
                        }
                    }
                }
            }
        }
        [o, lse, d]
    }

    fn run(
        c: &Compute,
        heads: Heads,
        qkv: &Matrix,
        d_o: &Matrix,
        mask: Option<BoundMask>,
        gap: usize,
    ) -> Vec<f32> {
        let blank = |cols: usize| Matrix::from_values(&vec![0.5; qkv.rows * cols], qkv.rows, cols, gap);
        let (mut o, mut d_qkv) = (blank(qkv.cols / 3), blank(qkv.cols));
        let mut lse = vec![0.0; qkv.rows * heads.heads];
        forward(c, heads, qkv.rows(), o.rows_mut(), &mut lse, mask);
        backward(c, heads, qkv.rows(), o.rows(), &lse, mask, d_o.rows(), d_qkv.rows_mut());
        [o.values(), lse, d_qkv.values()].concat()
    }

    #[test]
    fn forward_and_backward_equal_f64() {
        for (seed, shape) in SHAPES.into_iter().enumerate() {
            let (b, t, h, dh) = shape;
            let heads = Heads { tokens: t, heads: h, head_size: dh };
            let mut numbers = Numbers::new(seed as u64);
            let mut qkv = Matrix::random(&mut numbers, b * t, 3 * h * dh, seed % 3);
            // Some rows with large scores of both signs: a softmax that does not subtract the maximum fails.
            for r in (0..b * t).step_by(3) {
                let cols = qkv.cols;
                qkv.rows_mut().row(r)[..cols / 3 * 2].iter_mut().for_each(|x| *x *= 12.0);
            }
            let d_o = Matrix::random(&mut numbers, b * t, h * dh, seed % 2);
            for mask in [None, Some(dropout(0.0)), Some(dropout(0.3))] {
                let [o, lse, d] = attention64(shape, &qkv, &d_o, mask);
                on_every_isa(
                    |c| run(c, heads, &qkv, &d_o, mask, seed % 4),
                    |isa, got| {
                        let (got_o, got) = got.split_at(o.len());
                        let (got_lse, got_d) = got.split_at(lse.len());
                        // Scores reach about 100, so the rounding error of an exponent reaches 100·2^-24.
                        for (name, got, want) in
                            [("o", got_o, &o), ("lse", got_lse, &lse), ("d_qkv", got_d, &d)]
                        {
                            let error = rel_l2(got, want.iter().copied());
                            assert!(error < 1e-5, "{name} {shape:?} {isa:?} {mask:?}: {error:e}");
                        }
                    },
                );
            }
        }
    }

    #[test]
    fn blocks_of_queries_bound_the_scratch() {
        let (t, dh) = (4000, 4);
        let mut numbers = Numbers::new(5);
        let heads = Heads { tokens: t, heads: 1, head_size: dh };
        let qkv = Matrix::random(&mut numbers, t, 3 * dh, 0);
        let d_o = Matrix::random(&mut numbers, t, dh, 0);
        let c = Compute::new(super::super::compute::Isa::best(), 1).unwrap();
        let got = run(&c, heads, &qkv, &d_o, None, 0);
        assert!(c.scratch_bytes() < 4 * t * t / 4, "{} bytes of scratch", c.scratch_bytes());
        let want = attention64((1, t, 1, dh), &qkv, &d_o, None).concat();
        let error = rel_l2(&got, want);
        assert!(error < 2e-6, "{error:e}");
        let held = c.scratch_bytes();
        run(&c, heads, &qkv, &d_o, None, 0);
        assert_eq!(c.scratch_bytes(), held, "a second run allocates nothing");
    }

    #[test]
    fn attention_equals_the_reference() {
        let Some(folder) = reference("kernels") else { return };
        let mut files = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if !name.starts_with("attn_") {
                continue;
            }
            files += 1;
            let file = Tensors::open(&path);
            let (shape, qkv) = file.get("qkv");
            let [b, t, three, h, dh] = shape[..] else { panic!("{name}: shape {shape:?}") };
            assert_eq!(three, 3);
            let heads = Heads { tokens: t, heads: h, head_size: dh };
            let qkv = Matrix::from_values(&qkv, b * t, 3 * h * dh, 0);
            let d_o = Matrix::from_values(&file.get("dout").1, b * t, h * dh, 0);
            on_every_isa(
                |c| run(c, heads, &qkv, &d_o, None, 0),
                |isa, got| {
                    let (o, got) = got.split_at(b * t * h * dh);
                    let (lse, d_qkv) = got.split_at(b * h * t);
                    for (part, got, most) in [("out", o, 2e-6), ("lse", lse, 2e-6), ("dqkv", d_qkv, 4e-6)] {
                        let error = rel_l2(got, file.get(part).1.into_iter().map(|v| v as f64));
                        assert!(error < most, "{name} {part} {isa:?}: {error:e}");
                    }
                },
            );
        }
        assert!(files > 0, "no attention case in {}", folder.display());
    }
}
