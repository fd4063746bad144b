//! A named array of f32 in file order, and the reorderings between layouts. All are bit-exact.

use std::collections::BTreeMap;

/// Values in row-major order of `shape`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Size of each axis, the slowest first.
    pub shape: Vec<usize>,
    /// The product of `shape` many.
    pub values: Vec<f32>,
}

/// Tensors by name. Under our own names the shapes are timm's, as in files.
pub type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    /// Panics if `shape` does not hold exactly `values`.
    pub fn new(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(
            shape.iter().product::<usize>(),
            values.len(),
            "shape {shape:?} and number of values differ"
        );
        Self { shape, values }
    }

    /// The first value that is NaN or infinite.
    pub fn non_finite(&self) -> Option<f32> {
        self.values.iter().copied().find(|v| !v.is_finite())
    }
}

/// `[64, 3, 4, 4]`
pub(super) fn shape_text(shape: &[usize]) -> String {
    format!("{shape:?}")
}

/// `[rows, cols]` → `[cols, rows]`, in tiles so that both sides stay in cache.
pub(super) fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    assert_eq!(values.len(), rows * cols);
    let mut out = vec![0.0; values.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..cols).step_by(TILE) {
            for r in r0..(r0 + TILE).min(rows) {
                for c in c0..(c0 + TILE).min(cols) {
                    out[c * rows + r] = values[r * cols + c];
                }
            }
        }
    }
    out
}

/// Fortran order (first index fastest) → row-major, for any rank.
pub(super) fn from_fortran(values: &[f32], shape: &[usize]) -> Vec<f32> {
    assert_eq!(values.len(), shape.iter().product::<usize>());
    let mut strides = vec![1; shape.len()];
    for axis in 1..shape.len() {
        strides[axis] = strides[axis - 1] * shape[axis - 1];
    }
    let mut index = vec![0; shape.len()];
    let mut at = 0;
    let mut out = Vec::with_capacity(values.len());
    for _ in 0..values.len() {
        out.push(values[at]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_in_fortran_order_reads_row_by_row() {
        let (a, b, c) = (2, 3, 4);
        let fortran: Vec<f32> = (0..a * b * c).map(|v| v as f32).collect();
        let rows = from_fortran(&fortran, &[a, b, c]);
        for i in 0..a {
            for j in 0..b {
                for k in 0..c {
                    assert_eq!(rows[(i * b + j) * c + k], fortran[i + a * (j + b * k)]);
                }
            }
        }
    }

    #[test]
    fn transposing_twice_gives_the_same_bits_at_odd_sizes() {
        let values: Vec<f32> = (0..37 * 65).map(|v| v as f32 * 0.1).collect();
        let once = transpose(&values, 37, 65);
        assert_eq!(once[64 * 37 + 3], values[3 * 65 + 64]);
        assert_eq!(transpose(&once, 65, 37), values);
    }
}
