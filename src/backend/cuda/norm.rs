//! LayerNorm and the residual stream (kernels/layernorm.cu, kernels/residual.cu).
//!
//! Rows of bf16 of up to 1,280 values stay in the registers of a warp, in one of five instances; a branch joins the
//! stream inside that kernel. Wider rows, and f32, take kernels that walk the row, with the join as a launch of its own.

use super::Cuda;
use super::dense::elementwise_grid;
use super::driver::Address;
use super::launch::{Argument, MaskArgs, launch, variant};
use super::sums::{self, COLUMN_SHARED, COLUMN_STRETCH, Partials};
use crate::backend::{Branch, Dtype, Join, Mat, Norm, Stats};
use crate::error::Result;

/// The kernels for rows of bf16 of up to 256 values times their number, with their launch shape: blocks of a
/// multiprocessor, and threads of a block.
struct Instance {
    forward: &'static str,
    forward_threads: u32,
    forward_blocks: usize,
    join: &'static str,
    join_blocks: usize,
    backward: &'static str,
    backward_join: &'static str,
    backward_threads: u32,
    backward_blocks: usize,
}

macro_rules! instance {
    ($n:literal, $forward_threads:literal, $forward:literal, $join:literal, $threads:literal, $backward:literal) => {
        Instance {
            forward: concat!("layernorm_bf16_", $n),
            forward_threads: $forward_threads,
            forward_blocks: $forward,
            join: concat!("layernorm_join_bf16_", $n),
            join_blocks: $join,
            backward: concat!("layernorm_backward_bf16_", $n),
            backward_join: concat!("layernorm_backward_join_bf16_", $n),
            backward_threads: $threads,
            backward_blocks: $backward,
        }
    };
}

/// As at the foot of `kernels/layernorm.cu`.
const INSTANCES: [Instance; 5] = [
    instance!(1, 256, 4, 4, 256, 3),
    instance!(2, 256, 3, 3, 256, 2),
    instance!(3, 256, 2, 2, 192, 2),
    instance!(4, 192, 2, 2, 256, 1),
    instance!(5, 192, 2, 2, 256, 1),
];
/// Threads of a block where nothing else is said.
const THREADS: u32 = 256;
/// Blocks of a multiprocessor of the kernels that walk their rows.
const WIDE_BLOCKS: usize = 4;

fn instance(x: Mat) -> Option<&'static Instance> {
    let n = x.cols.div_ceil(COLUMN_STRETCH);
    INSTANCES.get(n - 1).filter(|_| x.dtype == Dtype::Bf16)
}

/// `BranchArgs` of `kernels/residual.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct BranchArgs {
    layer_scale: Address,
    dropout: MaskArgs,
    drop_path: MaskArgs,
    tokens: u32,
}

// SAFETY: one address and seven words, as in `kernels/residual.cuh`.
unsafe impl Argument for BranchArgs {}
const _: () = assert!(size_of::<BranchArgs>() == 40);

fn branch_args(cuda: &Cuda, branch: &Branch) -> BranchArgs {
    assert_eq!(branch.base.rows % branch.tokens, 0, "residual: rows are whole samples");
    BranchArgs {
        layer_scale: cuda.at_or_null(branch.layer_scale.map(|(scale, _)| scale)),
        dropout: cuda.mask(branch.dropout),
        drop_path: cuda.mask(branch.drop_path),
        tokens: branch.tokens as u32,
    }
}

/// Blocks that loop over the rows, a warp per row.
fn row_grid(cuda: &Cuda, rows: usize, threads: u32, blocks_of_multiprocessor: usize) -> [u32; 3] {
    let most = cuda.card().multiprocessors as usize * blocks_of_multiprocessor;
    [rows.div_ceil(threads as usize / 32).min(most).max(1) as u32, 1, 1]
}

fn same_shape(what: &str, a: Mat, b: Mat) {
    assert_eq!((a.rows, a.cols, a.dtype), (b.rows, b.cols, b.dtype), "{what}: {a} and {b} differ");
}

/// [`crate::backend::Backend::layernorm`]
pub(super) fn layernorm(cuda: &mut Cuda, join: &Join, norm: &Norm, y: Mat, stats: Stats) -> Result<()> {
    same_shape("layernorm", join.sum(), y);
    assert_eq!(stats.mean.rows, y.rows, "layernorm: one mean and one rstd per row");
    if let (Join::Branch { sum, branch }, Some(kernels)) = (join, instance(y)) {
        return launch!(
            cuda,
            kernels.join,
            row_grid(cuda, y.rows, THREADS, kernels.join_blocks),
            THREADS,
            0,
            cuda.cells.address(),
            branch_args(cuda, branch),
            cuda.at(branch.base),
            branch.base.ld as u32,
            cuda.at(branch.branch),
            branch.branch.ld as u32,
            cuda.at(*sum),
            sum.ld as u32,
            cuda.at(norm.gamma),
            cuda.at(norm.beta),
            norm.eps,
            cuda.at(y),
            y.ld as u32,
            cuda.at(stats.mean),
            cuda.at(stats.rstd),
            y.rows as u32,
            y.cols as u32,
        );
    }
    residual(cuda, join)?;
    let (kernel, threads, blocks) = match instance(y) {
        Some(kernels) => (kernels.forward, kernels.forward_threads, kernels.forward_blocks),
        None => (wide(y.dtype, "forward"), THREADS, WIDE_BLOCKS),
    };
    let x = join.sum();
    launch!(
        cuda,
        kernel,
        row_grid(cuda, y.rows, threads, blocks),
        threads,
        0,
        cuda.at(x),
        x.ld as u32,
        cuda.at(norm.gamma),
        cuda.at(norm.beta),
        norm.eps,
        cuda.at(y),
        y.ld as u32,
        cuda.at(stats.mean),
        cuda.at(stats.rstd),
        y.rows as u32,
        y.cols as u32,
    )
}

fn wide(dtype: Dtype, direction: &str) -> &'static str {
    match (direction, dtype) {
        ("forward", Dtype::F32) => "layernorm_f32_wide",
        ("forward", Dtype::Bf16) => "layernorm_bf16_wide",
        (_, Dtype::F32) => "layernorm_backward_f32_wide",
        (_, Dtype::Bf16) => "layernorm_backward_bf16_wide",
    }
}

/// [`crate::backend::Backend::layernorm_backward`]
pub(super) fn layernorm_backward(
    cuda: &mut Cuda,
    d_y: Mat,
    join: &Join,
    norm: &Norm,
    stats: Stats,
    d_sum: Mat,
    fresh: bool,
    d_branch: Mat,
) -> Result<()> {
    let backward = Backward { d_y, x: join.sum(), norm, stats, d_sum, fresh };
    same_shape("layernorm_backward", d_y, backward.x);
    same_shape("layernorm_backward", d_y, d_sum);
    match (instance(d_y), join) {
        (None, _) => backward.wide(cuda)?,
        // A trained LayerScale has a sum of its own, which would not fit into the registers of this kernel.
        (Some(kernels), Join::Branch { branch, .. }) if !has_trained_scale(branch) => {
            return backward.fused(cuda, kernels, branch, d_branch);
        }
        (Some(kernels), _) => backward.alone(cuda, kernels)?,
    }
    residual_backward(cuda, join, d_sum, d_branch)
}

fn has_trained_scale(branch: &Branch) -> bool {
    branch.layer_scale.is_some_and(|(_, d)| d.is_some())
}

struct Backward<'a> {
    d_y: Mat,
    x: Mat,
    norm: &'a Norm,
    stats: Stats,
    d_sum: Mat,
    fresh: bool,
}

impl Backward<'_> {
    fn is_trained(&self) -> bool {
        self.norm.d_gamma.is_some() || self.norm.d_beta.is_some()
    }

    /// γ and β: two sums per block.
    fn partials(&self, cuda: &Cuda, blocks: usize) -> Partials {
        Partials::new(cuda, blocks, 2, self.d_y.cols, 0)
    }

    fn finish(&self, cuda: &Cuda, partials: &Partials) -> Result<()> {
        partials.finish(cuda, &[self.norm.d_gamma, self.norm.d_beta])
    }

    fn alone(&self, cuda: &Cuda, kernels: &Instance) -> Result<()> {
        let Self { d_y, x, norm, stats, d_sum, fresh } = *self;
        let grid = row_grid(cuda, d_y.rows, kernels.backward_threads, kernels.backward_blocks);
        let partials = self.partials(cuda, grid[0] as usize);
        launch!(
            cuda,
            kernels.backward,
            grid,
            kernels.backward_threads,
            COLUMN_SHARED,
            cuda.at(d_y),
            d_y.ld as u32,
            cuda.at(x),
            x.ld as u32,
            cuda.at(norm.gamma),
            cuda.at(stats.mean),
            cuda.at(stats.rstd),
            cuda.at(d_sum),
            d_sum.ld as u32,
            u32::from(fresh),
            d_y.rows as u32,
            d_y.cols as u32,
            if self.is_trained() { partials.at } else { 0 },
            partials.pitch,
        )?;
        self.finish(cuda, &partials)
    }

    fn fused(&self, cuda: &Cuda, kernels: &Instance, branch: &Branch, d_branch: Mat) -> Result<()> {
        let Self { d_y, x, norm, stats, d_sum, fresh } = *self;
        same_shape("layernorm_backward", d_y, d_branch);
        let grid = row_grid(cuda, d_y.rows, kernels.backward_threads, kernels.backward_blocks);
        let partials = self.partials(cuda, grid[0] as usize);
        launch!(
            cuda,
            kernels.backward_join,
            grid,
            kernels.backward_threads,
            COLUMN_SHARED,
            cuda.cells.address(),
            branch_args(cuda, branch),
            cuda.at(d_y),
            d_y.ld as u32,
            cuda.at(x),
            x.ld as u32,
            cuda.at(norm.gamma),
            cuda.at(stats.mean),
            cuda.at(stats.rstd),
            cuda.at(d_sum),
            d_sum.ld as u32,
            u32::from(fresh),
            cuda.at(d_branch),
            d_branch.ld as u32,
            d_y.rows as u32,
            d_y.cols as u32,
            if self.is_trained() { partials.at } else { 0 },
            partials.pitch,
        )?;
        self.finish(cuda, &partials)
    }

    fn wide(&self, cuda: &Cuda) -> Result<()> {
        let Self { d_y, x, norm, stats, d_sum, fresh } = *self;
        // What the rounding of each row's mean left over goes from the first kernel to the second.
        let rests_bytes = (d_y.rows * 4).next_multiple_of(16);
        let [stretches, slices, _] = sums::column_grid(cuda, d_y);
        let partials = Partials::new(cuda, slices as usize, 2, d_y.cols, rests_bytes);
        let rests = partials.in_front;
        launch!(
            cuda,
            wide(d_y.dtype, "backward"),
            row_grid(cuda, d_y.rows, THREADS, WIDE_BLOCKS),
            THREADS,
            0,
            cuda.at(d_y),
            d_y.ld as u32,
            cuda.at(x),
            x.ld as u32,
            cuda.at(norm.gamma),
            cuda.at(stats.mean),
            cuda.at(stats.rstd),
            cuda.at(d_sum),
            d_sum.ld as u32,
            u32::from(fresh),
            rests,
            d_y.rows as u32,
            d_y.cols as u32,
        )?;
        if !self.is_trained() {
            return Ok(());
        }
        launch!(
            cuda,
            variant!(d_y.dtype, "layernorm_gradients"),
            [stretches, slices, 1],
            THREADS,
            COLUMN_SHARED,
            cuda.at(d_y),
            d_y.ld as u32,
            cuda.at(x),
            x.ld as u32,
            cuda.at(stats.mean),
            cuda.at(stats.rstd),
            rests,
            d_y.rows as u32,
            d_y.cols as u32,
            partials.at,
            partials.pitch,
        )?;
        self.finish(cuda, &partials)
    }
}

/// [`crate::backend::Backend::residual`]
pub(super) fn residual(cuda: &mut Cuda, join: &Join) -> Result<()> {
    let Join::Branch { sum, branch } = join else { return Ok(()) };
    same_shape("residual", *sum, branch.base);
    same_shape("residual", *sum, branch.branch);
    launch!(
        cuda,
        variant!(sum.dtype, "residual"),
        elementwise_grid(sum.rows, sum.cols),
        THREADS,
        0,
        cuda.cells.address(),
        branch_args(cuda, branch),
        cuda.at(branch.base),
        branch.base.ld as u32,
        cuda.at(branch.branch),
        branch.branch.ld as u32,
        cuda.at(*sum),
        sum.ld as u32,
        sum.rows as u32,
        sum.cols as u32,
    )
}

/// [`crate::backend::Backend::residual_backward`]
pub(super) fn residual_backward(cuda: &mut Cuda, join: &Join, d_sum: Mat, d_branch: Mat) -> Result<()> {
    let Join::Branch { branch, .. } = join else { return Ok(()) };
    same_shape("residual_backward", d_sum, d_branch);
    if !has_trained_scale(branch) {
        return launch!(
            cuda,
            variant!(d_sum.dtype, "residual_backward"),
            elementwise_grid(d_sum.rows, d_sum.cols),
            THREADS,
            0,
            cuda.cells.address(),
            branch_args(cuda, branch),
            cuda.at(d_sum),
            d_sum.ld as u32,
            cuda.at(d_branch),
            d_branch.ld as u32,
            d_sum.rows as u32,
            d_sum.cols as u32,
        );
    }
    let x = branch.branch;
    same_shape("residual_backward", d_sum, x);
    let grid = sums::column_grid(cuda, d_sum);
    let partials = Partials::new(cuda, grid[1] as usize, 1, d_sum.cols, 0);
    launch!(
        cuda,
        variant!(d_sum.dtype, "residual_scale_backward"),
        grid,
        THREADS,
        COLUMN_SHARED,
        cuda.cells.address(),
        branch_args(cuda, branch),
        cuda.at(x),
        x.ld as u32,
        cuda.at(d_sum),
        d_sum.ld as u32,
        cuda.at(d_branch),
        d_branch.ld as u32,
        d_sum.rows as u32,
        d_sum.cols as u32,
        partials.at,
        partials.pitch,
    )?;
    partials.finish(cuda, &[branch.layer_scale.and_then(|(_, d)| d)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_are_those_that_the_kernels_were_compiled_for() {
        let source = include_str!("../../../kernels/layernorm.cu");
        let lines: Vec<Vec<usize>> = source
            .lines()
            .filter_map(|line| line.strip_prefix("LAYERNORM(")?.strip_suffix(')'))
            .map(|numbers| {
                // Rows ahead, the second number, are the kernel's own affair.
                let numbers = numbers.split(", ").enumerate().filter(|(i, _)| *i != 1);
                numbers.map(|(_, n)| n.parse().unwrap()).collect()
            })
            .collect();
        let table = INSTANCES.iter().enumerate().map(|(i, k)| {
            let [forward_threads, backward_threads] =
                [k.forward_threads, k.backward_threads].map(|n| n as usize);
            vec![i + 1, forward_threads, k.forward_blocks, k.join_blocks, backward_threads, k.backward_blocks]
        });
        assert_eq!(lines, table.collect::<Vec<_>>());
    }
}
