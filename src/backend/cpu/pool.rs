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

#[cfg(test)]
mod tests {
    use crate::backend::cpu::testbed::*;
    use crate::backend::{Backend, Pool, Write};

    #[test]
    fn pools_and_their_gradients_are_those_of_the_f64_function() {
        for (samples, tokens, width) in [(1, 1, 5), (3, 5, 48), (3, 65, 192), (2, 197, 48)] {
            let pools = [
                Pool::Token { tokens, index: 0 },
                Pool::Token { tokens, index: tokens - 1 },
                Pool::Mean { tokens, first: 0 },
                Pool::Mean { tokens, first: 1.min(tokens - 1) },
            ];
            for pool in pools {
                let n = samples * tokens * width;
                let mut b = Testbed::new(samples);
                let (x, d_y, above) = (normal(1, n, 1.0), normal(2, samples * width, 1.0), normal(3, n, 1.0));
                let (x_mat, y) = (b.put(samples * tokens, width, &x), b.room(samples, width));
                let d_y_mat = b.put(samples, width, &d_y);
                let fresh = b.room(samples * tokens, width);
                let added = b.put(samples * tokens, width, &above);
                let run = |k: &mut crate::backend::cpu::CpuBackend| {
                    k.pool(pool, x_mat, y).unwrap();
                    k.pool_backward(pool, d_y_mat, fresh, Write::Assign).unwrap();
                    k.pool_backward(pool, d_y_mat, added, Write::Add).unwrap();
                };
                b.everywhere(&[y, fresh, added], run, |r| {
                    let weight = |token: usize| match pool {
                        Pool::Token { index, .. } => f64::from(u8::from(token == index)),
                        Pool::Mean { first, .. } if token < first => 0.0,
                        Pool::Mean { first, .. } => 1.0 / (tokens - first) as f64,
                    };
                    let y: Vec<f64> = (0..samples * width)
                        .map(|i| {
                            let (sample, column) = (i / width, i % width);
                            let value = |t| f64::from(x[(sample * tokens + t) * width + column]);
                            (0..tokens).map(|t| weight(t) * value(t)).sum()
                        })
                        .collect();
                    let d_x: Vec<f64> = (0..n)
                        .map(|i| {
                            let (row, column) = (i / width, i % width);
                            weight(row % tokens) * f64::from(d_y[row / tokens * width + column])
                        })
                        .collect();
                    let sum: Vec<f64> = d_x.iter().zip(&above).map(|(d, a)| d + f64::from(*a)).collect();
                    assert_close("y", &r[0], &y, 1e-6);
                    assert_close("d_x", &r[1], &d_x, 1e-6);
                    assert_close("d_x, added", &r[2], &sum, 1e-6);
                });
            }
        }
    }
}
