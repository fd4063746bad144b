//! Rotary positions (kernels/rotate.cu).

use super::Cuda;
use super::launch::{RotateArgs, variant};
use crate::backend::{RopePairs, ops};
use crate::error::Result;

pub(super) fn rotate(cuda: &mut Cuda, op: &ops::Rotate) -> Result<()> {
    let ops::Rotate { rope, heads, x, back } = *op;
    let (table, width) = (rope.table, heads.heads * heads.head_size);
    assert_eq!((table.cols, x.cols % width), (heads.head_size, 0), "rotate: {table} for {x}");
    assert!(x.rows % heads.tokens == 0 && table.rows <= heads.tokens, "rotate: rows are whole samples");
    let args = RotateArgs {
        x: cuda.view(x),
        table: cuda.view(table),
        tokens: heads.tokens as u32,
        head_size: heads.head_size as u32,
        neighbours: u32::from(rope.pairs == RopePairs::Neighbours),
        sign: if back { -1.0 } else { 1.0 },
    };
    let threads =
        x.rows / heads.tokens * table.rows * (x.cols / heads.head_size) * (heads.head_size / 2).div_ceil(8);
    cuda.launch(variant!(x.dtype, "rotate"), [threads.div_ceil(256) as u32, 1, 1], 0, &args)
}
