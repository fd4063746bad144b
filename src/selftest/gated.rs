//! The gate of a SwiGLU, and rotary positions.

use crate::backend::{Heads, Mask, Rope, RopePairs};
use crate::error::Result;

use super::harness::{Case, ELEMENTWISE, Operand, Trial};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // Rows whose second half begins on a boundary of 16 bytes, and off one.
    let shapes = [(1, 1, 3), (3, 5, 24), (2, 65, 85), (3, 17, 192), (1, 197, 30)];
    for (samples, tokens, m) in shapes {
        for rate in [0.0, 0.2] {
            let mask = Mask { rate, site: 34 };
            let dropout = if rate > 0.0 { ", dropout" } else { "" };
            let title = format!("B {samples} T {tokens} M {m}{dropout}");
            cases.push(Case::new("swiglu", title.clone(), move |t| swiglu(t, samples, tokens, m, mask)));
            cases.push(Case::new("swiglu_backward", title, move |t| {
                swiglu_backward(t, samples, tokens, m, mask)
            }));
        }
    }
    // (samples, tokens, patches, heads, head size): heads of 16 to 128, among them some that 16 does not divide.
    for (samples, tokens, patches, heads, head_size) in [
        (1, 1, 1, 1, 4),
        (3, 7, 6, 2, 12),
        (2, 70, 65, 3, 64),
        (1, 201, 196, 2, 64),
        (2, 20, 16, 2, 72),
        (1, 33, 32, 1, 88),
        (2, 17, 16, 1, 128),
    ] {
        for pairs in [RopePairs::Half, RopePairs::Neighbours] {
            for (parts, back) in [(2, false), (2, true), (1, false)] {
                let back_too = if back { ", back" } else { "" };
                let title = format!(
                    "B {samples} T {tokens} N {patches}, {parts} of H {heads} Dh {head_size}, {pairs:?}{back_too}"
                );
                let sizes = Heads { tokens, heads, head_size };
                cases.push(Case::new("rotate", title, move |t| {
                    rotate(t, samples, patches, parts, sizes, pairs, back)
                }));
            }
        }
    }
    cases
}

/// `σ(x)`
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The dropout's factors of `[R, M]`.
fn factors(t: &Trial, mask: Mask, rows: usize, elements: usize, m: usize) -> Vec<f64> {
    let bound = t.mask(mask);
    let factor = |i: usize| f64::from(bound.factor(i / elements, i % elements));
    (0..rows * m).map(|i| if mask.rate == 0.0 { 1.0 } else { factor(i) }).collect()
}

fn swiglu(t: &mut Trial, samples: usize, tokens: usize, m: usize, mask: Mask) -> Result<()> {
    let rows = samples * tokens;
    t.samples(samples, false);
    let pre = t.input(rows, 2 * m, 2.0);
    let y = t.output(rows, m);
    let factors = factors(t, mask, rows, tokens * m, m);
    let expected: Vec<f64> = (0..rows * m)
        .map(|i| {
            let (g, u) = (pre.row(i / m)[i % m], pre.row(i / m)[m + i % m]);
            g * sigmoid(g) * u * factors[i]
        })
        .collect();
    t.start()?.swiglu(pre.mat, mask, y.mat)?;
    t.compare("y", &y, &expected, ELEMENTWISE)
}

fn swiglu_backward(t: &mut Trial, samples: usize, tokens: usize, m: usize, mask: Mask) -> Result<()> {
    let rows = samples * tokens;
    t.samples(samples, false);
    let (d_y, pre) = (t.input(rows, m, 1.0), t.input(rows, 2 * m, 2.0));
    let d_pre = t.output(rows, 2 * m);
    let factors = factors(t, mask, rows, tokens * m, m);
    let mut expected = vec![0.0; rows * 2 * m];
    for i in 0..rows * m {
        let (row, j) = (i / m, i % m);
        let (g, u, d) = (pre.row(row)[j], pre.row(row)[m + j], d_y.row(row)[j] * factors[i]);
        let w = sigmoid(g);
        expected[row * 2 * m + j] = d * u * w * (1.0 + g * (1.0 - w));
        expected[row * 2 * m + m + j] = d * g * w;
    }
    t.start()?.swiglu_backward(d_y.mat, pre.mat, mask, d_pre.mat, None)?;
    t.compare("d_pre", &d_pre, &expected, ELEMENTWISE)
}

fn rotate(
    t: &mut Trial,
    samples: usize,
    patches: usize,
    parts: usize,
    sizes: Heads,
    pairs: RopePairs,
    back: bool,
) -> Result<()> {
    let Heads { tokens, heads, head_size } = sizes;
    let (half, width) = (head_size / 2, parts * heads * head_size);
    t.samples(samples, false);
    let table = t.param(patches, head_size, 0.0, 1.0);
    // The values beside them, in the same rows, stay as they are.
    let all: Operand = t.input(samples * tokens, width + heads * head_size, 1.0);
    let columns = all.mat.cols;
    let mut expected = all.values.clone();
    for (row, values) in expected.chunks_mut(columns).enumerate() {
        let Some(patch) = (row % tokens).checked_sub(tokens - patches) else { continue };
        for head in values[..width].chunks_mut(head_size) {
            for j in 0..half {
                let (a, b) = match pairs {
                    RopePairs::Half => (j, j + half),
                    RopePairs::Neighbours => (2 * j, 2 * j + 1),
                };
                let (cos, sin) =
                    (table.row(patch)[j], table.row(patch)[half + j] * if back { -1.0 } else { 1.0 });
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
    }
    let rope = Rope { table: table.mat, pairs };
    t.start()?.rotate(&rope, sizes, all.mat.column_range(0, width), back)?;
    t.compare("x", &all, &expected, ELEMENTWISE)
}
