//! What joins the patch embedding's matmul output in place: bias, extra tokens, position embedding, dropout.

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
    extra_tokens: [Option<&[f32]>; 2],
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
            } else if let Some(value) = extra_tokens[token] {
                add(row, value);
            }
            if token >= shape.posemb_first {
                add(row, posemb.row(token - shape.posemb_first));
            }
            drop_out(shape, start + r, row, &mut factors);
        }
    });
}

/// Takes `d_x` back through the dropout in place, then sums it over the samples, in order.
pub(super) fn backward(
    c: &Compute,
    shape: Shape,
    d_x: RowsMut,
    d_bias: Option<&mut [f32]>,
    d_extra_tokens: [Option<&mut [f32]>; 2],
    d_posemb: Option<RowsMut>,
    accumulate: bool,
    scratch: &mut Vec<f32>,
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
    if d_bias.is_none() && d_posemb.is_none() && d_extra_tokens.iter().all(|d| d.is_none()) {
        return;
    }

    // The sum over the samples of each token's row: everything else follows from it.
    scratch.resize(scratch.len().max(tokens * width), 0.0);
    let sums = &mut scratch[..tokens * width];
    let d_x = d_x.as_rows();
    let some_tokens = 8;
    let tasks: Vec<_> = RowsMut::dense(sums, tokens, width).blocks(some_tokens);
    c.for_each_item(tasks, |(first, mut sums)| {
        sums.data.fill(0.0);
        for sample in 0..d_x.rows / tokens {
            for t in 0..sums.rows {
                add(sums.row(t), d_x.row(sample * tokens + first + t));
            }
        }
    });
    let sums = Rows::dense(sums, tokens, width);

    for (token, d) in d_extra_tokens.into_iter().enumerate() {
        if let Some(d) = d {
            store(d, sums.row(token), accumulate);
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
