//! Our own matrix products, for those that cuBLASLt does not accept (kernels/product.cu): one row, one
//! column, odd sizes.
//!
//! How a product is divided follows from its sizes alone, so its bits are the same on every GPU.

use super::Cuda;
use super::blas::{Fused, Matrix, Operands, Shape};
use super::driver::Address;
use super::launch::{ProductArgs, ProductShape, ProductSumArgs, kernel, variant};
use crate::backend::Dtype;
use crate::error::Result;

/// Warps per block, and columns of D per warp.
const WARPS: usize = 8;
const COLUMNS: usize = 4;
/// Lanes of a warp: rows of D, or neighbouring terms of its sums.
const LANES: usize = 32;
/// Warps that keep the memory of a large GPU busy, and the fewest terms that make a slice of the sums worth a
/// launch.
const BUSY: usize = 4096;
const LEAST_SLICE: usize = 256;

/// How a product is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Plan {
    shape: ProductShape,
    /// The lanes of a warp run along k; otherwise along the rows.
    along_k: bool,
    /// A and B are exchanged: the kernel computes Dᵀ = Bᵀ·Aᵀ.
    exchanged: bool,
    blocks: u32,
    slices: u32,
}

impl Plan {
    fn new(shape: &Shape) -> Self {
        let Shape { transpose_a, transpose_b, a, b, d, .. } = *shape;
        let (m, n) = (d.rows, d.cols);
        let k = if transpose_a { a.rows } else { a.cols };
        let of = |matrix: Matrix, transposed| {
            if transposed { (matrix.cols, matrix.rows) } else { (matrix.rows, matrix.cols) }
        };
        assert_eq!((of(a, transpose_a), of(b, transpose_b)), ((m, k), (k, n)), "product: {shape:?}");
        assert!(m > 0 && n > 0 && k > 0, "product: {shape:?} is empty");
        // Neighbours along k are contiguous, or the other axis is too short to fill a warp.
        let a_suits = transpose_a || m < LANES;
        let b_suits = !transpose_b || n < LANES;
        let along_k = k >= LANES && a_suits && b_suits;
        // The columns are the longer side; lanes on rows take the side that is contiguous.
        let exchanged = match (along_k, transpose_a, transpose_b) {
            (true, ..) => m > n,
            (false, true, true) => n >= LANES || m <= n,
            (false, ..) => m < LANES && n > m,
        };

        let word =
            |value: usize| u32::try_from(value).expect("matrices have fewer than 2^32 elements to a row");
        let along = |matrix: Matrix, side_by_side| if side_by_side { 1 } else { word(matrix.ld) };
        // Rows of A, columns of B: strides along those, and along k.
        let (a, b) = (
            [along(a, !transpose_a), along(a, transpose_a)],
            [along(b, transpose_b), along(b, !transpose_b)],
        );
        let (rows, columns) = if exchanged { (n, m) } else { (m, n) };
        let ([a_row, a_step], [b_column, b_step]) = if exchanged { (b, a) } else { (a, b) };
        let (d_row, d_column) = if exchanged { (word(d.ld), 1) } else { (1, word(d.ld)) };

        let row_groups = if along_k { rows } else { rows.div_ceil(LANES) };
        let warps = row_groups * columns.div_ceil(COLUMNS);
        let slices = (BUSY / warps).min(k / LEAST_SLICE).max(1);
        let slice = k.div_ceil(slices);
        let (m, n, k, slice) = (word(rows), word(columns), word(k), word(slice));
        Self {
            shape: ProductShape { m, n, k, a_row, a_step, b_column, b_step, d_row, d_column, slice },
            along_k,
            exchanged,
            blocks: i32::try_from(warps.div_ceil(WARPS)).expect("a grid's x ends at 2^31") as u32,
            slices: k.div_ceil(slice),
        }
    }

    /// Elements of partial sums: none, or one element of D per slice.
    fn partials(&self) -> usize {
        if self.slices == 1 { 0 } else { self.slices as usize * self.elements() }
    }

    fn elements(&self) -> usize {
        self.shape.m as usize * self.shape.n as usize
    }
}

/// `D = op(A)·op(B) [+ C]`, where cuBLASLt has no algorithm. C may be D; nothing else is fused.
pub(super) fn product(cuda: &Cuda, shape: &Shape, operands: &Operands) -> Result<()> {
    assert_eq!(shape.fused, Fused::Nothing, "product: nothing is fused but the sum with C");
    let plan = Plan::new(shape);
    let types = (shape.a.dtype, shape.b.dtype, shape.d.dtype);
    let [along_k, along_rows] = match types {
        (Dtype::F32, Dtype::F32, Dtype::F32) => {
            [kernel!("product_along_k_f32"), kernel!("product_along_rows_f32")]
        }
        (Dtype::Bf16, Dtype::Bf16, Dtype::F32) => {
            [kernel!("product_along_k_bf16_f32"), kernel!("product_along_rows_bf16_f32")]
        }
        (Dtype::Bf16, Dtype::Bf16, Dtype::Bf16) => {
            [kernel!("product_along_k_bf16"), kernel!("product_along_rows_bf16")]
        }
        _ => panic!("product: no kernel for {types:?}"),
    };
    let (a, b) = if plan.exchanged { (operands.b, operands.a) } else { (operands.a, operands.b) };
    let c: Address = if shape.add_c { operands.c } else { 0 };
    let partials: Address = match plan.partials() {
        0 => 0,
        count => cuda.scratch(4 * count),
    };
    let args = ProductArgs { shape: plan.shape, a, b, c, d: operands.d, partials };
    cuda.launch(if plan.along_k { along_k } else { along_rows }, [plan.blocks, plan.slices, 1], 0, &args)?;
    if partials == 0 {
        return Ok(());
    }
    let args = ProductSumArgs { shape: plan.shape, partials, slices: plan.slices, c, d: operands.d };
    let kernel = variant!(shape.d.dtype, "product_sum");
    cuda.launch(kernel, [(plan.elements() as u32).div_ceil(kernel.threads), 1, 1], 0, &args)
}

#[cfg(test)]
mod tests;
