//! Pooling: one vector per sample from its tokens.

use super::compute::Compute;
use super::sums::add;
use super::view::{Rows, RowsMut};
use crate::backend::Pool;

/// `y: [B, D]` from `x: [B·T, D]`.
pub(super) fn forward(c: &Compute, pool: Pool, x: Rows, y: RowsMut) {
    c.for_each_item(y.blocks(1), |(sample, mut y)| {
        let y = y.row(0);
        match pool {
            Pool::Token { tokens, index } => y.copy_from_slice(x.row(sample * tokens + index)),
            Pool::Mean { tokens, first } => {
                y.fill(0.0);
                (first..tokens).for_each(|t| add(y, x.row(sample * tokens + t)));
                let count = (tokens - first) as f32;
                y.iter_mut().for_each(|y| *y /= count);
            }
        }
    });
}

/// `d_x: [B·T, D]` from `d_y: [B, D]`; rows outside the pool become zero if `fresh`, else they stay.
pub(super) fn backward(c: &Compute, pool: Pool, d_y: Rows, d_x: RowsMut, fresh: bool) {
    let (tokens, pooled) = match pool {
        Pool::Token { tokens, index } => (tokens, index..index + 1),
        Pool::Mean { tokens, first } => (tokens, first..tokens),
    };
    let share = 1.0 / pooled.len() as f32;
    c.for_each_item(d_x.blocks(tokens), |(start, mut d_x)| {
        let d_y = d_y.row(start / tokens);
        for t in 0..tokens {
            let row = d_x.row(t);
            if fresh {
                row.fill(0.0);
            }
            if pooled.contains(&t) {
                row.iter_mut().zip(d_y).for_each(|(d_x, d_y)| *d_x += share * d_y);
            }
        }
    });
}
