//! Rotary positions: pairs of a head's elements turned by the angles of a patch. Su et al. 2021, arXiv:2104.09864.
//!
//! ```text
//! (a, b) ← (a·cos - b·sin, b·cos + a·sin)     backward: the same with -sin, on (d_a, d_b)
//! ```

use super::compute::Compute;
use super::sums::CHUNK;
use super::view::{Rows, RowsMut};
use crate::backend::{Heads, RopePairs};

/// `x: [B·T, P·H·Dh]`, in place; `table: [N, Dh]` has the cosines of the angles and then their sines.
pub(super) fn rotate(c: &Compute, table: Rows, pairs: RopePairs, heads: Heads, x: RowsMut, back: bool) {
    let (tokens, half) = (heads.tokens, heads.head_size / 2);
    let extra = tokens - table.rows;
    let sign = if back { -1.0 } else { 1.0 };
    c.for_each_item(x.blocks(CHUNK), |(start, mut x)| {
        for r in 0..x.rows {
            let token = (start + r) % tokens;
            if token < extra {
                continue;
            }
            let (cos, sin) = table.row(token - extra).split_at(half);
            for head in x.row(r).chunks_exact_mut(heads.head_size) {
                let turn = |a: &mut f32, b: &mut f32, j: usize| {
                    let (cos, sin) = (cos[j], sign * sin[j]);
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                };
                match pairs {
                    RopePairs::Half => {
                        let (first, second) = head.split_at_mut(half);
                        first.iter_mut().zip(second).enumerate().for_each(|(j, (a, b))| turn(a, b, j));
                    }
                    RopePairs::Neighbours => {
                        for (j, pair) in head.chunks_exact_mut(2).enumerate() {
                            let (a, b) = pair.split_at_mut(1);
                            turn(&mut a[0], &mut b[0], j);
                        }
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use crate::backend::cpu::testbed::*;
    use crate::backend::{Backend, Heads, Rope, RopePairs};

    #[test]
    fn pairs_turn_by_their_angles_and_gradients_turn_back() {
        // (samples, tokens, patches, heads, head size)
        for (samples, tokens, patches, heads, head_size) in
            [(1, 1, 1, 1, 4), (3, 7, 6, 2, 12), (2, 70, 65, 3, 64)]
        {
            for pairs in [RopePairs::Half, RopePairs::Neighbours] {
                let (rows, width) = (samples * tokens, 2 * heads * head_size);
                let angles = normal(1, patches * head_size / 2, 2.0);
                let half = head_size / 2;
                let mut table = Vec::new();
                for row in angles.chunks(half) {
                    table.extend(row.iter().map(|a| a.cos()));
                    table.extend(row.iter().map(|a| a.sin()));
                }
                let mut b = Testbed::new(samples);
                let (x, d) = (normal(2, rows * width, 1.0), normal(3, rows * width, 1.0));
                let rope = Rope { table: b.put(patches, head_size, &table), pairs };
                let (x_at, d_at) = (b.put(rows, width, &x), b.put(rows, width, &d));
                let sizes = Heads { tokens, heads: 2 * heads, head_size };
                let run = |k: &mut crate::backend::cpu::CpuBackend| {
                    k.rotate(&rope, sizes, x_at, false).unwrap();
                    k.rotate(&rope, sizes, d_at, true).unwrap();
                };
                b.everywhere(&[x_at, d_at], run, |r| {
                    let turned = |x: &[f64]| -> Vec<f64> {
                        let value = |i: usize| {
                            let (row, column) = (i / width, i % width);
                            let (head, e) = (column / head_size * head_size, column % head_size);
                            let Some(patch) = (row % tokens).checked_sub(tokens - patches) else {
                                return x[i];
                            };
                            let (j, partner, sign) = match pairs {
                                RopePairs::Half if e < half => (e, e + half, -1.0),
                                RopePairs::Half => (e - half, e - half, 1.0),
                                RopePairs::Neighbours if e % 2 == 0 => (e / 2, e + 1, -1.0),
                                RopePairs::Neighbours => (e / 2, e - 1, 1.0),
                            };
                            let angle = f64::from(angles[patch * half + j]);
                            x[i] * angle.cos() + sign * x[row * width + head + partner] * angle.sin()
                        };
                        (0..x.len()).map(value).collect()
                    };
                    assert_close("turned", &r[0], &turned(&wide(&x)), 1e-6);
                    assert_gradient("turned back", &x, &r[1], |v| {
                        turned(v).iter().zip(&d).map(|(y, d)| y * f64::from(*d)).sum()
                    });
                });
            }
        }
    }
}
