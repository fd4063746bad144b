//! Attention of all tokens to all tokens, and of one query per sample (or one for all samples) to all tokens.

use crate::backend::{Heads, Mask};
use crate::error::Result;

use super::harness::{Case, Operand, Product, Trial, sum_of};

/// B samples, and the size of the scores: queries and keys are normal with deviation `spread`.
#[derive(Clone, Copy)]
struct Shape {
    samples: usize,
    heads: Heads,
    spread: f64,
    dropout: Mask,
    /// All samples except the second are NaN, and only the second is compared: nothing may read another
    /// sample's rows.
    spoiled: bool,
}

const fn shape(samples: usize, tokens: usize, heads: usize, head_size: usize) -> Shape {
    Shape {
        samples,
        heads: Heads { tokens, heads, head_size },
        spread: 1.0,
        dropout: Mask::NONE,
        spoiled: false,
    }
}

/// Every token count and head size of common ViTs, and some that leave remainders everywhere.
const SHAPES: [Shape; 16] = [
    shape(3, 1, 12, 5),
    shape(3, 5, 5, 12),
    shape(3, 5, 3, 64),
    shape(5, 17, 2, 16),
    shape(1, 64, 2, 64),
    shape(3, 65, 5, 12),
    shape(1, 65, 3, 64),
    shape(1, 65, 1, 7),
    shape(1, 197, 2, 32),
    shape(1, 197, 1, 72),
    shape(1, 197, 3, 64),
    shape(1, 257, 1, 80),
    shape(1, 257, 1, 128),
    shape(2, 33, 2, 24),
    shape(1, 130, 1, 96),
    shape(1, 577, 1, 64),
];

/// Cases with a trained bias: one image and several, heads in one tile and in several, and some that tensor
/// cores cannot take.
const BIASED: [Shape; 9] = [
    shape(3, 5, 3, 64),
    shape(5, 17, 2, 16),
    shape(1, 197, 3, 64),
    shape(3, 1, 12, 5),
    shape(2, 33, 2, 24),
    shape(1, 65, 3, 64),
    shape(2, 130, 2, 72),
    shape(1, 257, 1, 128),
    shape(1, 300, 1, 64),
];

/// One token less than blocks of 32 and 64 keys, and than a short last block of 16: a mask that is off by one lets
/// the zeros in the missing token's place take part. In each kind of tile, and in none.
const ONE_SHORT: [Shape; 10] = [
    shape(1, 79, 1, 32),
    shape(1, 127, 1, 32),
    shape(1, 79, 2, 64),
    shape(1, 127, 2, 64),
    shape(1, 79, 1, 80),
    shape(1, 127, 1, 80),
    shape(1, 79, 1, 128),
    shape(1, 127, 1, 128),
    shape(1, 287, 1, 64),
    shape(1, 127, 1, 12),
];

/// Heads of 64 that end within, at and after the last strip of 16 rows of a kernel that keeps all keys in registers;
/// several heads for each of its blocks where there is one multiprocessor.
const STRIPS: [Shape; 7] = [
    shape(2, 1, 3, 64),
    shape(1, 193, 1, 64),
    shape(2, 196, 1, 64),
    shape(2, 197, 2, 64),
    shape(1, 208, 2, 64),
    shape(1, 209, 1, 64),
    shape(5, 65, 1, 64),
];

const SPOILED: [Shape; 5] =
    [shape(3, 5, 5, 12), shape(3, 17, 2, 32), shape(3, 65, 1, 64), shape(3, 33, 1, 80), shape(3, 40, 1, 128)];

const DROPOUT: Mask = Mask { rate: 0.2, site: 5 };

pub(super) fn cases() -> Vec<Case> {
    let mut shapes: Vec<Shape> = SHAPES.to_vec();
    shapes.extend(ONE_SHORT);
    shapes.extend(STRIPS);
    shapes.extend([1, 3, 5, 8].map(|i| Shape { dropout: DROPOUT, ..SHAPES[i] }));
    // Scores of several tens: most probabilities are zero, and an exponential without subtracting the largest
    // score overflows.
    shapes.push(Shape { spread: 4.0, ..shape(1, 65, 2, 64) });
    shapes.extend(SPOILED.map(|s| Shape { spoiled: true, ..s }));

    let mut cases = Vec::new();
    for s in &shapes {
        let s = *s;
        cases.push(Case::new("attention", s.title(), move |t| attention(t, s)));
    }
    for s in &shapes {
        let s = *s;
        cases.push(Case::new("attention_backward", s.title(), move |t| attention_backward(t, s, None)));
    }
    let dropped = [1, 2].map(|i| Shape { dropout: DROPOUT, ..BIASED[i] });
    for (i, s) in BIASED.into_iter().chain(dropped).chain(ONE_SHORT).enumerate() {
        let accumulate = i % 2 == 1;
        let title = s.title() + ", bias" + if accumulate { ", accumulating" } else { "" };
        let body = move |t: &mut Trial| attention_backward(t, s, Some(accumulate));
        cases.push(Case::new("attention_backward", title, body));
    }
    for probe in probes() {
        cases.push(Case::new("query_attention", probe.title(), move |t| query_attention(t, probe)));
    }
    // Enough samples that one block sums several of them into the gradient of their query, and several lanes
    // per token.
    let many = Probe { shape: shape(40, 2, 64, 16), shared: true };
    for probe in probes().into_iter().chain([many]) {
        let body = move |t: &mut Trial| query_attention_backward(t, probe);
        cases.push(Case::new("query_attention_backward", probe.title(), body));
    }
    cases
}

impl Shape {
    fn title(&self) -> String {
        let Heads { tokens, heads, head_size } = self.heads;
        let spread = if self.spread > 1.0 { ", large scores" } else { "" };
        let dropout = if self.dropout.rate > 0.0 { ", dropout" } else { "" };
        let spoiled = if self.spoiled { ", NaN beside it" } else { "" };
        format!("B {} T {tokens} H {heads} Dh {head_size}{spread}{dropout}{spoiled}", self.samples)
    }

    fn rows(&self) -> usize {
        self.samples * self.heads.tokens
    }

    fn width(&self) -> usize {
        self.heads.heads * self.heads.head_size
    }

    /// Sets all samples except the second to NaN, if `spoiled`.
    fn spoil(&self, mut values: Vec<f64>) -> Vec<f64> {
        let sample = values.len() / self.samples;
        for (i, values) in values.chunks_mut(sample).enumerate() {
            if self.spoiled && i != 1 {
                values.fill(f64::NAN);
            }
        }
        values
    }

    /// The compared values: everything, or the second sample.
    fn seen<'a>(&self, values: &'a [f64]) -> &'a [f64] {
        let sample = values.len() / self.samples;
        if self.spoiled { &values[sample..2 * sample] } else { values }
    }

    /// The rounding error of scores is relative to their size, and they are exponents.
    fn tolerance(&self) -> f64 {
        if self.spread > 1.0 { 1e-5 } else { 2e-6 }
    }
}

/// Scores, probabilities and outputs of an attention with `queries` rows per sample.
struct Attention {
    queries: usize,
    p: Vec<f64>,   // [B, H, queries, T]
    lse: Vec<f64>, // [B, H, queries]
    o: Vec<f64>,   // [B, queries, H·Dh]
}

/// Part of packed rows: sample, head and token give `Dh` values.
trait Part: Fn(usize, usize, usize) -> Vec<f64> {}
impl<F: Fn(usize, usize, usize) -> Vec<f64>> Part for F {}

/// Part `which` of `[B, T, parts, H, Dh]`.
fn part(packed: &Operand, heads: Heads, which: usize) -> impl Part {
    move |sample, head, token| {
        let start = (which * heads.heads + head) * heads.head_size;
        packed.row(sample * heads.tokens + token)[start..start + heads.head_size].to_vec()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The factor of probability `(head, query, key)` of a sample: element `(head·T + query)·T + key` of its mask.
fn keep(t: &Trial, s: Shape) -> impl Fn(usize, usize, usize, usize) -> f64 {
    let (bound, tokens, rate) = (t.mask(s.dropout), s.heads.tokens, s.dropout.rate);
    move |sample, head, query, key| match rate {
        0.0 => 1.0,
        _ => f64::from(bound.factor(sample, (head * tokens + query) * tokens + key)),
    }
}

/// `o = dropout(softmax(q·kᵀ/√Dh))·v`
fn attend(
    s: Shape,
    queries: usize,
    q: impl Part,
    k: impl Part,
    v: impl Part,
    keep: impl Fn(usize, usize, usize, usize) -> f64,
) -> Attention {
    let Heads { tokens, heads, head_size } = s.heads;
    let scale = 1.0 / (head_size as f64).sqrt();
    let mut result =
        Attention { queries, p: Vec::new(), lse: Vec::new(), o: vec![0.0; s.samples * queries * s.width()] };
    for b in 0..s.samples {
        for h in 0..heads {
            let keys: Vec<_> = (0..tokens).map(|j| k(b, h, j)).collect();
            let values: Vec<_> = (0..tokens).map(|j| v(b, h, j)).collect();
            for i in 0..queries {
                let q = q(b, h, i);
                let scores: Vec<f64> = keys.iter().map(|k| scale * dot(&q, k)).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = largest + scores.iter().map(|score| (score - largest).exp()).sum::<f64>().ln();
                let o = &mut result.o[(b * queries + i) * s.width() + h * head_size..][..head_size];
                for (j, score) in scores.iter().enumerate() {
                    let p = (score - lse).exp();
                    let weight = p * keep(b, h, i, j);
                    o.iter_mut().zip(&values[j]).for_each(|(o, v)| *o += weight * v);
                    result.p.push(p);
                }
                result.lse.push(lse);
            }
        }
    }
    result
}

/// Gradients of queries, keys and values, each `[B, rows, H·Dh]`.
struct Gradients {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

/// The backward of [`attend`].
fn attend_backward(
    s: Shape,
    a: &Attention,
    q: impl Part,
    k: impl Part,
    v: impl Part,
    keep: impl Fn(usize, usize, usize, usize) -> f64,
    d_o: &Operand,
) -> Gradients {
    let Heads { tokens, heads, head_size } = s.heads;
    let (width, scale) = (s.width(), 1.0 / (head_size as f64).sqrt());
    let zeros = |rows: usize| vec![0.0; s.samples * rows * width];
    let mut d = Gradients { q: zeros(a.queries), k: zeros(tokens), v: zeros(tokens) };
    for b in 0..s.samples {
        for h in 0..heads {
            let keys: Vec<_> = (0..tokens).map(|j| k(b, h, j)).collect();
            let values: Vec<_> = (0..tokens).map(|j| v(b, h, j)).collect();
            for i in 0..a.queries {
                let q = q(b, h, i);
                let p = &a.p[((b * heads + h) * a.queries + i) * tokens..][..tokens];
                let query = (b * a.queries + i) * width + h * head_size;
                let d_o = &d_o.values[query..query + head_size];
                let d_p: Vec<f64> = (0..tokens).map(|j| keep(b, h, i, j) * dot(d_o, &values[j])).collect();
                let mean = dot(p, &d_p);
                for j in 0..tokens {
                    let d_score = p[j] * (d_p[j] - mean) * scale;
                    let weight = p[j] * keep(b, h, i, j);
                    let key = (b * tokens + j) * width + h * head_size;
                    for e in 0..head_size {
                        d.q[query + e] += d_score * keys[j][e];
                        d.k[key + e] += d_score * q[e];
                        d.v[key + e] += weight * d_o[e];
                    }
                }
            }
        }
    }
    d
}

/// `[rows, parts·width]` from one `[rows, width]` per part.
fn pack(parts: &[&[f64]], width: usize) -> Vec<f64> {
    let rows = parts[0].len() / width;
    (0..rows).flat_map(|r| parts.iter().flat_map(move |p| p[r * width..(r + 1) * width].to_vec())).collect()
}

fn qkv(t: &mut Trial, s: Shape) -> Operand {
    let mut values = t.normal(s.rows() * 3 * s.width(), 1.0);
    for row in values.chunks_mut(3 * s.width()) {
        row[..2 * s.width()].iter_mut().for_each(|x| *x *= s.spread);
    }
    t.given(s.rows(), 3 * s.width(), s.spoil(values))
}

fn attention(t: &mut Trial, s: Shape) -> Result<()> {
    t.samples(s.samples, false);
    let qkv = qkv(t, s);
    let o = t.output(s.rows(), s.width());
    let lse = t.statistics_output(s.samples * s.heads.heads, s.heads.tokens);
    let [q, k, v] = [0, 1, 2].map(|which| part(&qkv, s.heads, which));
    let expected = attend(s, s.heads.tokens, q, k, v, keep(t, s));

    t.start()?.attention(s.heads, qkv.mat, o.mat, lse.mat, s.dropout)?;
    for (name, output, expected) in [("o", &o, &expected.o), ("lse", &lse, &expected.lse)] {
        let (got, tolerance) = (t.take(output)?, t.tolerance(output, s.tolerance()));
        t.judge(name, s.seen(&got), s.seen(expected), output.mat.cols, tolerance);
    }
    Ok(())
}

/// `bias`: if a product with a trained bias reads `d_qkv`, whether its gradients accumulate.
fn attention_backward(t: &mut Trial, s: Shape, bias: Option<bool>) -> Result<()> {
    t.samples(s.samples, bias == Some(true));
    let qkv = qkv(t, s);
    let [q, k, v] = [0, 1, 2].map(|which| part(&qkv, s.heads, which));
    let forward = attend(s, s.heads.tokens, &q, &k, &v, keep(t, s));
    let o = t.given(s.rows(), s.width(), forward.o.clone());
    let lse = t.statistics(s.samples * s.heads.heads, s.heads.tokens, forward.lse.clone());
    let d_o = t.normal(s.rows() * s.width(), 1.0);
    let d_o = t.given(s.rows(), s.width(), s.spoil(d_o));
    let d_qkv = t.output(s.rows(), 3 * s.width());
    let product = bias.map(|accumulate| Product::behind(t, s.rows(), 3 * s.width(), accumulate));
    let d = attend_backward(s, &forward, q, k, v, keep(t, s), &d_o);

    let d_bias = product.as_ref().map(Product::d_bias);
    let (qkv, o, lse, d_o) = (qkv.mat, o.mat, lse.mat, d_o.mat);
    t.start()?.attention_backward(s.heads, qkv, o, lse, s.dropout, d_o, d_qkv.mat, d_bias)?;
    if let (Some(product), Some(accumulate)) = (&product, bias) {
        product.check(t, &d_qkv, accumulate)?;
    }
    let got = t.take(&d_qkv)?;
    let width = s.width();
    // With one token the probabilities are 1 for any scores, so their gradients contain only rounding.
    let floor = 1e-6;
    for (i, (name, expected)) in [("d_q", &d.q), ("d_k", &d.k), ("d_v", &d.v)].into_iter().enumerate() {
        let got: Vec<f64> =
            got.chunks(3 * width).flat_map(|row| row[i * width..(i + 1) * width].to_vec()).collect();
        let rounded = t.tolerance(&d_qkv, 2.0 * s.tolerance());
        let tolerance = if s.heads.tokens == 1 { floor } else { rounded };
        t.judge(name, s.seen(&got), s.seen(expected), width, tolerance);
    }
    Ok(())
}

/// An attention with one query per sample, or one query that all samples share.
#[derive(Clone, Copy)]
struct Probe {
    shape: Shape,
    shared: bool,
}

fn probes() -> Vec<Probe> {
    let own = |shape: Shape| Probe { shape, shared: false };
    let mut probes: Vec<Probe> = SHAPES.map(|shape| Probe { shape, shared: true }).to_vec();
    probes.extend(SHAPES.map(own));
    probes.extend([1, 3, 5, 8].map(|i| own(Shape { dropout: DROPOUT, ..SHAPES[i] })));
    probes.push(Probe { shape: Shape { dropout: DROPOUT, ..SHAPES[2] }, shared: true });
    probes.push(own(Shape { spread: 4.0, ..shape(2, 65, 2, 64) }));
    probes.extend(SPOILED.map(|s| own(Shape { spoiled: true, ..s })));
    probes
}

impl Probe {
    fn title(&self) -> String {
        let shared = if self.shared { ", one query" } else { "" };
        format!("{}{shared}", self.shape.title())
    }

    fn queries(&self) -> usize {
        if self.shared { 1 } else { self.shape.samples }
    }

    /// Queries, and keys and values of all tokens.
    fn operands(&self, t: &mut Trial) -> (Operand, Operand) {
        let s = self.shape;
        t.samples(s.samples, false);
        let q = t.normal(self.queries() * s.width(), s.spread);
        let q = t.given(self.queries(), s.width(), if self.shared { q } else { s.spoil(q) });
        let mut kv = t.normal(s.rows() * 2 * s.width(), 1.0);
        for row in kv.chunks_mut(2 * s.width()) {
            row[..s.width()].iter_mut().for_each(|k| *k *= s.spread);
        }
        (q, t.given(s.rows(), 2 * s.width(), s.spoil(kv)))
    }

    /// The query of a sample's head.
    fn query(&self, q: &Operand) -> impl Part {
        let (heads, shared) = (self.shape.heads, self.shared);
        move |sample, head, _| {
            q.row(if shared { 0 } else { sample })[head * heads.head_size..][..heads.head_size].to_vec()
        }
    }
}

fn query_attention(t: &mut Trial, probe: Probe) -> Result<()> {
    let s = probe.shape;
    let (q, kv) = probe.operands(t);
    let p = t.statistics_output(s.samples * s.heads.heads, s.heads.tokens);
    let o = t.output(s.samples, s.width());
    let [k, v] = [0, 1].map(|which| part(&kv, s.heads, which));
    let expected = attend(s, 1, probe.query(&q), k, v, keep(t, s));

    t.start()?.query_attention(s.heads, q.mat, kv.mat, p.mat, o.mat, s.dropout)?;
    for (name, output, expected) in [("p", &p, &expected.p), ("o", &o, &expected.o)] {
        let (got, tolerance) = (t.take(output)?, t.tolerance(output, s.tolerance()));
        t.judge(name, s.seen(&got), s.seen(expected), output.mat.cols, tolerance);
    }
    Ok(())
}

fn query_attention_backward(t: &mut Trial, probe: Probe) -> Result<()> {
    let s = probe.shape;
    let (q, kv) = probe.operands(t);
    let [k, v] = [0, 1].map(|which| part(&kv, s.heads, which));
    let forward = attend(s, 1, probe.query(&q), &k, &v, keep(t, s));
    let p = t.statistics(s.samples * s.heads.heads, s.heads.tokens, forward.p.clone());
    let d_o = t.normal(s.samples * s.width(), 1.0);
    let d_o = t.given(s.samples, s.width(), s.spoil(d_o));
    let d_q = t.output(probe.queries(), s.width());
    let d_kv = t.output(s.rows(), 2 * s.width());
    let d = attend_backward(s, &forward, probe.query(&q), k, v, keep(t, s), &d_o);
    let d_queries = match probe.shared {
        true => (0..s.width()).map(|c| d.q.iter().skip(c).step_by(s.width()).sum()).collect(),
        false => d.q.clone(),
    };

    let (q, kv, p, d_o) = (q.mat, kv.mat, p.mat, d_o.mat);
    t.start()?.query_attention_backward(s.heads, q, kv, p, s.dropout, d_o, d_q.mat, d_kv.mat)?;
    let summed = if probe.shared { s.samples } else { 1 };
    let d_kv_expected = pack(&[&d.k, &d.v], s.width());
    for (name, output, expected) in [("d_q", &d_q, &d_queries), ("d_kv", &d_kv, &d_kv_expected)] {
        let rounded = t.tolerance(output, 2.0 * s.tolerance() + sum_of(summed));
        let got = t.take(output)?;
        // With one token the query has no influence, so its gradient contains only rounding.
        let tolerance = if s.heads.tokens == 1 && name == "d_q" { 1e-6 } else { rounded };
        t.judge(name, s.seen(&got), s.seen(expected), output.mat.cols, tolerance);
    }
    Ok(())
}
