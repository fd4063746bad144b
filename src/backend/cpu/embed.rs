//! What is added in place to the patch embedding's matmul output: bias, extra tokens, position embedding;
//! then dropout.

use super::compute::Compute;
use super::sums::{CHUNK, add, store};
use super::view::{Rows, RowsMut};
use crate::backend::mask::BoundMask;

/// The sizes of [`crate::backend::Embed`], with its mask bound.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) extra: usize,
    pub(super) posemb_first: usize,
    pub(super) dropout: BoundMask,
}

/// `x: [B·T, D]`, in place.
pub(super) fn forward(
    c: &Compute,
    shape: Shape,
    bias: &[f32],
    extra_tokens: &[&[f32]],
    posemb: Rows,
    x: RowsMut,
) {
    c.for_each_item(x.blocks(CHUNK), |(start, mut x)| {
        let mut factors = vec![0.0; if shape.dropout.is_none() { 0 } else { x.cols }];
        for r in 0..x.rows {
            let token = (start + r) % shape.tokens;
            let row = x.row(r);
            if token >= shape.extra {
                add(row, bias);
            } else {
                add(row, extra_tokens[token]);
            }
            if token >= shape.posemb_first {
                add(row, posemb.row(token - shape.posemb_first));
            }
            drop_out(shape, start + r, row, &mut factors);
        }
    });
}

/// Takes `d_x` back through the dropout in place, then sums it over the samples, in order. `d_extra_tokens` have the
/// token of their first row.
pub(super) fn backward(
    c: &Compute,
    shape: Shape,
    d_x: RowsMut,
    d_bias: Option<&mut [f32]>,
    d_extra_tokens: Vec<(usize, RowsMut)>,
    d_posemb: Option<RowsMut>,
    accumulate: bool,
) {
    let (tokens, width) = (shape.tokens, d_x.cols);
    if !shape.dropout.is_none() {
        let again = RowsMut { data: &mut *d_x.data, ..d_x };
        c.for_each_item(again.blocks(CHUNK), |(start, mut d_x)| {
            let mut factors = vec![0.0; d_x.cols];
            for r in 0..d_x.rows {
                drop_out(shape, start + r, d_x.row(r), &mut factors);
            }
        });
    }
    if d_bias.is_none() && d_posemb.is_none() && d_extra_tokens.is_empty() {
        return;
    }

    // Sum each token's row over the samples: all other gradients follow from that.
    let mut sums = c.scratch(tokens * width);
    let d_x = d_x.as_rows();
    let some_tokens = 8;
    let tasks: Vec<_> = RowsMut::dense(&mut sums, tokens, width).blocks(some_tokens);
    c.for_each_item(tasks, |(first, mut sums)| {
        sums.data.fill(0.0);
        for sample in 0..d_x.rows / tokens {
            for t in 0..sums.rows {
                add(sums.row(t), d_x.row(sample * tokens + first + t));
            }
        }
    });
    let sums = Rows::dense(&sums, tokens, width);

    for (token, mut d) in d_extra_tokens {
        for row in 0..d.rows {
            store(d.row(row), sums.row(token + row), accumulate);
        }
    }
    if let Some(mut d) = d_posemb {
        for row in 0..d.rows {
            store(d.row(row), sums.row(shape.posemb_first + row), accumulate);
        }
    }
    if let Some(d) = d_bias {
        store(d, sums.row(shape.extra), accumulate);
        (shape.extra + 1..tokens).for_each(|token| add(d, sums.row(token)));
    }
}

/// Multiplies row `r` of `[B·T, D]` by its mask.
fn drop_out(shape: Shape, r: usize, row: &mut [f32], factors: &mut [f32]) {
    if shape.dropout.is_none() {
        return;
    }
    shape.dropout.fill(r / shape.tokens, r % shape.tokens * row.len(), factors);
    row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= *factor);
}

#[cfg(test)]
mod tests {
    use crate::backend::cpu::testbed::*;
    use crate::backend::mask::BoundMask;
    use crate::backend::{Backend, Embed, Mask, Write};

    /// What goes into an embedding.
    #[derive(Clone)]
    struct Parts {
        x: Vec<f64>,
        bias: Vec<f64>,
        extra: Vec<Vec<f64>>,
        posemb: Vec<f64>,
    }

    /// The embedding in f64, written from the contract.
    fn embedded(parts: &Parts, tokens: usize, first: usize, mask: BoundMask) -> Vec<f64> {
        let width = parts.bias.len();
        (0..parts.x.len())
            .map(|i| {
                let (row, column) = (i / width, i % width);
                let (sample, token) = (row / tokens, row % tokens);
                let joins = match parts.extra.get(token) {
                    Some(extra) => extra[column],
                    None => parts.bias[column],
                };
                let position =
                    if token >= first { parts.posemb[(token - first) * width + column] } else { 0.0 };
                (parts.x[i] + joins + position) * f64::from(mask.factor(sample, token * width + column))
            })
            .collect()
    }

    #[test]
    fn values_and_every_gradient_are_those_of_the_f64_function() {
        // (samples, tokens, extra, first row with a position, width)
        let shapes =
            [(1, 1, 0, 0, 5), (3, 5, 1, 0, 48), (3, 65, 1, 1, 48), (2, 197, 2, 0, 48), (5, 6, 2, 2, 192)];
        for (shape, rate) in shapes.into_iter().flat_map(|s| [(s, 0.0), (s, 0.3)]) {
            let (samples, tokens, extra, first, width) = shape;
            let rows = samples * tokens;
            let mut b = Testbed::new(samples);
            b.micro.first = 2;
            let (x, d_y) = (normal(1, rows * width, 1.0), normal(2, rows * width, 1.0));
            let (bias, posemb) = (normal(3, width, 1.0), normal(4, (tokens - first) * width, 1.0));
            let extras = [normal(5, width, 1.0), normal(6, width, 1.0)];
            let mut grad = [None; 2];
            let mut value = [None; 3];
            for e in 0..extra {
                grad[e] = Some(b.room(1, width));
                value[e] = Some((b.put(1, width, &extras[e]), grad[e]));
            }
            let embed = Embed {
                tokens,
                extra,
                bias: (b.put(1, width, &bias), Some(b.room(1, width))),
                extra_tokens: value,
                posemb: (b.put(tokens - first, width, &posemb), Some(b.room(tokens - first, width))),
                posemb_first: first,
                dropout: Mask { rate, site: 3 },
            };
            let (y, d_x) = (b.put(rows, width, &x), b.put(rows, width, &d_y));
            let mut results = vec![y, d_x, embed.bias.1.unwrap(), embed.posemb.1.unwrap()];
            results.extend(grad.into_iter().flatten());
            let run = |k: &mut crate::backend::cpu::CpuBackend| {
                k.embed(&embed, y).unwrap();
                k.embed_backward(&embed, d_x, d_x).unwrap();
            };
            b.everywhere(&results, run, |r| {
                let mask = BoundMask::new(embed.dropout, b.keys, b.micro);
                let extra64 = extras.iter().take(extra).map(|e| wide(e)).collect();
                let parts = Parts { x: wide(&x), bias: wide(&bias), extra: extra64, posemb: wide(&posemb) };
                assert_close("y", &r[0], &embedded(&parts, tokens, first, mask), 1e-6);
                let f = |parts: &Parts| -> f64 {
                    let y = embedded(parts, tokens, first, mask);
                    y.iter().zip(&d_y).map(|(y, d)| y * f64::from(*d)).sum()
                };
                let (x, parts) = (&x, &parts);
                assert_gradient("d_x", x, &r[1], |v| f(&Parts { x: v.to_vec(), ..parts.clone() }));
                assert_gradient("d_bias", &bias, &r[2], |v| f(&Parts { bias: v.to_vec(), ..parts.clone() }));
                assert_gradient("d_posemb", &posemb, &r[3], |v| {
                    f(&Parts { posemb: v.to_vec(), ..parts.clone() })
                });
                for e in 0..extra {
                    assert_gradient("d_token", &extras[e], &r[4 + e], |v| {
                        let mut parts = parts.clone();
                        parts.extra[e] = v.to_vec();
                        f(&parts)
                    });
                }
            });
        }
    }

    #[test]
    fn frozen_parts_get_no_gradient_and_others_add_up() {
        let (samples, tokens, width) = (3, 5, 48);
        let mut b = Testbed::new(samples);
        b.micro.gradients = Write::Add;
        let start = normal(1, tokens * width, 1.0);
        let d_posemb = b.put(tokens, width, &start);
        let embed = Embed {
            tokens,
            extra: 1,
            bias: (b.room(1, width), None),
            extra_tokens: [Some((b.room(1, width), None)), None, None],
            posemb: (b.room(tokens, width), Some(d_posemb)),
            posemb_first: 0,
            dropout: Mask::NONE,
        };
        let d = normal(2, samples * tokens * width, 1.0);
        let d_x = b.put(samples * tokens, width, &d);
        b.everywhere(
            &[d_posemb, d_x],
            |k| k.embed_backward(&embed, d_x, d_x).unwrap(),
            |r| {
                let expected: Vec<f64> = (0..tokens * width)
                    .map(|i| {
                        let over_samples = (0..samples).map(|s| f64::from(d[s * tokens * width + i]));
                        f64::from(start[i]) + over_samples.sum::<f64>()
                    })
                    .collect();
                assert_close("d_posemb", &r[0], &expected, 1e-6);
                assert_eq!(r[1], d, "without dropout d_x stays as it is");
            },
        );
    }
}
