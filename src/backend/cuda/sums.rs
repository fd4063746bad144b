//! Sums over the rows of a matrix in two stages: partial sums per block, then their sum in order
//! (kernels/column_sums.cu).

use super::Cuda;
use super::driver::Address;
use super::launch::{ColumnSumsArgs, SumPartialsArgs, kernel, variant};
use crate::backend::Mat;
use crate::error::Result;

/// Columns per block, eight per lane.
pub(super) const COLUMN_STRETCH: usize = 256;
/// Shared memory in which the eight warps of a block are summed.
pub(super) const COLUMN_SHARED: u32 = 8 * 256 * 4;
/// Rows that a block processes at a time.
const ROWS: usize = 8;

/// Stretches of columns times slices of rows: enough blocks for every multiprocessor.
pub(super) fn column_grid(cuda: &Cuda, x: Mat) -> [u32; 3] {
    let stretches = x.cols.div_ceil(COLUMN_STRETCH);
    let wanted = (4 * cuda.properties().multiprocessors as usize).div_ceil(stretches);
    let slices = wanted.clamp(1, x.rows.div_ceil(ROWS).max(1));
    [stretches as u32, slices as u32, 1]
}

/// Partial sums in the workspace: `[blocks, sums, pitch]`.
pub(super) struct Partials {
    pub(super) at: Address,
    /// Scratch before the sums.
    pub(super) in_front: Address,
    pub(super) pitch: u32,
    blocks: u32,
    sums: u32,
    columns: u32,
}

impl Partials {
    /// Reserves the sums after `in_front` bytes of other scratch.
    pub(super) fn new(cuda: &Cuda, blocks: usize, sums: usize, columns: usize, in_front: usize) -> Self {
        let pitch = columns.next_multiple_of(8);
        let scratch = cuda.scratch(in_front + blocks * sums * pitch * 4);
        Self {
            at: scratch + in_front as u64,
            in_front: scratch,
            pitch: pitch as u32,
            blocks: blocks as u32,
            sums: sums as u32,
            columns: columns as u32,
        }
    }

    /// Adds the blocks' sums into the gradients that are present, one per sum: assigned, or added to in a
    /// later micro-batch.
    pub(super) fn finish(&self, cuda: &Cuda, outputs: &[Option<Mat>]) -> Result<()> {
        assert_eq!(outputs.len(), self.sums as usize, "one output per sum");
        if outputs.iter().all(Option::is_none) {
            return Ok(());
        }
        let mut addresses = [0; 3];
        for (address, output) in addresses.iter_mut().zip(outputs) {
            *address = cuda.at_or_null(*output);
        }
        sum_partials(
            cuda,
            self.at,
            [self.blocks, self.sums * self.pitch, self.pitch],
            [self.columns, self.sums],
            addresses,
        )
    }
}

/// `out[s][c] (+)= Σ partials`: `count` partials, `stride` elements apart; different sums are `pitch`
/// elements apart.
pub(super) fn sum_partials(
    cuda: &Cuda,
    at: Address,
    [count, stride, pitch]: [u32; 3],
    [columns, sums]: [u32; 2],
    outputs: [Address; 3],
) -> Result<()> {
    let args = SumPartialsArgs {
        partials: at,
        count,
        stride,
        pitch,
        columns,
        out: outputs,
        add: u32::from(cuda.micro.gradients.adds()),
    };
    cuda.launch(kernel!("sum_partials"), [columns.div_ceil(32), sums, 1], 256 * 4, &args)
}

/// `out (+)= Σ over rows of x`: a bias gradient.
pub(super) fn column_sums(cuda: &Cuda, x: Mat, out: Mat) -> Result<()> {
    let grid = column_grid(cuda, x);
    let partials = Partials::new(cuda, grid[1] as usize, 1, x.cols, 0);
    let args = ColumnSumsArgs { x: cuda.view(x), partials: partials.at, pitch: partials.pitch };
    cuda.launch(variant!(x.dtype, "column_sums"), grid, COLUMN_SHARED, &args)?;
    partials.finish(cuda, &[Some(out)])
}
