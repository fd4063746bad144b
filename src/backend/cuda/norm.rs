//! LayerNorm and the residual stream (kernels/layernorm.cu, kernels/residual.cu).
//!
//! Where y is bf16, rows of up to 1,280 values stay in the registers of a warp, in one of five instances for
//! each type of the stream. A branch is joined inside that kernel. Wider rows, and y in f32, use kernels that
//! loop over the row, and the join is a separate launch.
//!
//! Each backward kernel for register rows, and that of a trained LayerScale, has a second variant that also
//! sums a bias gradient ([`super::bias`]).

use super::Cuda;
use super::bias;
use super::dense::elementwise_grid;
use super::driver::Address;
use super::launch::{Argument, MaskArgs, launch, stream_variant};
use super::sums::{self, COLUMN_SHARED, COLUMN_STRETCH, Partials};
use crate::backend::{Branch, Dtype, Join, Mask, Mat, Norm, Stats, ops};
use crate::error::Result;

/// The kernels for rows of up to 256·n values, with their launch shape: blocks per multiprocessor and threads
/// per block. n is the instance's number.
struct Instance {
    forward: &'static str,
    forward_threads: u32,
    forward_blocks: usize,
    join: &'static str,
    join_threads: u32,
    join_blocks: usize,
    backward: &'static str,
    backward_join: &'static str,
    /// The variant that sums a bias; without a branch, only where products can read the stream.
    backward_bias: &'static str,
    backward_join_bias: &'static str,
    backward_threads: u32,
    backward_blocks: usize,
}

impl Instance {
    /// The sums of a bias lie in shared memory, one row per warp.
    fn backward_shared(&self, columns: usize, bias: bool) -> u32 {
        let row = 4 * columns.next_multiple_of(COLUMN_STRETCH) as u32;
        if bias { COLUMN_SHARED.max(self.backward_threads / 32 * row) } else { COLUMN_SHARED }
    }
}

macro_rules! instance {
    ($suffix:literal, $n:literal, $forward:expr, $join:expr, $backward:expr) => {
        Instance {
            forward: concat!("layernorm_", $suffix, "_", $n),
            forward_threads: $forward.0,
            forward_blocks: $forward.1,
            join: concat!("layernorm_join_", $suffix, "_", $n),
            join_threads: $join.0,
            join_blocks: $join.1,
            backward: concat!("layernorm_backward_", $suffix, "_", $n),
            backward_join: concat!("layernorm_backward_join_", $suffix, "_", $n),
            backward_bias: concat!("layernorm_backward_bias_", $suffix, "_", $n),
            backward_join_bias: concat!("layernorm_backward_join_bias_", $suffix, "_", $n),
            backward_threads: $backward.0,
            backward_blocks: $backward.1,
        }
    };
}

/// As at the end of `kernels/layernorm.cu`.
const INSTANCES: [Instance; 5] = [
    instance!("bf16", 1, (256, 4), (256, 4), (256, 3)),
    instance!("bf16", 2, (192, 3), (256, 3), (256, 2)),
    instance!("bf16", 3, (256, 2), (256, 2), (192, 2)),
    instance!("bf16", 4, (192, 2), (256, 2), (256, 1)),
    instance!("bf16", 5, (192, 2), (256, 2), (256, 1)),
];
/// The same where the stream is f32.
const INSTANCES_OF_F32: [Instance; 5] = [
    instance!("f32_bf16", 1, (256, 3), (256, 3), (192, 3)),
    instance!("f32_bf16", 2, (192, 3), (256, 3), (192, 2)),
    instance!("f32_bf16", 3, (256, 2), (256, 2), (192, 2)),
    instance!("f32_bf16", 4, (192, 2), (256, 2), (256, 1)),
    instance!("f32_bf16", 5, (256, 1), (192, 2), (256, 1)),
];
/// Default number of threads per block.
const THREADS: u32 = 256;
/// Blocks per multiprocessor for the kernels that loop over rows.
const WIDE_BLOCKS: usize = 4;

/// The instance for a stream type and the type that the block reads and writes.
fn instance(stream: Mat, y: Mat) -> Option<&'static Instance> {
    let instances = match (stream.dtype, y.dtype) {
        (_, Dtype::F32) => return None,
        (Dtype::Bf16, Dtype::Bf16) => &INSTANCES,
        (Dtype::F32, Dtype::Bf16) => &INSTANCES_OF_F32,
    };
    instances.get(y.cols.div_ceil(COLUMN_STRETCH) - 1)
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

/// Converts the stream's gradient to another type and changes nothing else.
fn no_branch() -> BranchArgs {
    let none = MaskArgs { rate: Mask::NONE.rate, site: Mask::NONE.site, first_sample: 0 };
    BranchArgs { layer_scale: 0, dropout: none, drop_path: none, tokens: 1 }
}

/// Blocks that loop over the rows, one warp per row.
fn row_grid(cuda: &Cuda, rows: usize, threads: u32, blocks_of_multiprocessor: usize) -> [u32; 3] {
    let most = cuda.card().multiprocessors as usize * blocks_of_multiprocessor;
    [rows.div_ceil(threads as usize / 32).min(most).max(1) as u32, 1, 1]
}

fn same_shape(what: &str, a: Mat, b: Mat) {
    assert_eq!((a.rows, a.cols), (b.rows, b.cols), "{what}: {a} and {b} differ");
}

/// Checks two parts of the residual stream.
fn same_kind(what: &str, a: Mat, b: Mat) {
    same_shape(what, a, b);
    assert_eq!(a.dtype, b.dtype, "{what}: {a} and {b} differ in type");
}

pub(super) fn layernorm(cuda: &mut Cuda, op: &ops::LayerNorm) -> Result<()> {
    let ops::LayerNorm { join, norm, y, stats } = *op;
    same_shape("layernorm", join.sum(), y);
    assert_eq!(stats.mean.rows, y.rows, "layernorm: one mean and one rstd per row");
    if let (Join::Branch { sum, branch }, Some(kernels)) = (join, instance(join.sum(), y)) {
        same_kind("layernorm", *sum, branch.base);
        same_kind("layernorm", y, branch.branch);
        return launch!(
            cuda,
            kernels.join,
            row_grid(cuda, y.rows, kernels.join_threads, kernels.join_blocks),
            kernels.join_threads,
            0,
            cuda.step_params.address(),
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
    residual(cuda, &ops::Residual { join })?;
    let x = join.sum();
    let (kernel, threads, blocks) = match instance(x, y) {
        Some(kernels) => (kernels.forward, kernels.forward_threads, kernels.forward_blocks),
        None => (wide(x.dtype, y.dtype, "forward"), THREADS, WIDE_BLOCKS),
    };
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

fn wide(stream: Dtype, y: Dtype, direction: &str) -> &'static str {
    match (direction, stream, y) {
        ("forward", Dtype::F32, Dtype::F32) => "layernorm_f32_wide",
        ("forward", Dtype::F32, Dtype::Bf16) => "layernorm_f32_bf16_wide",
        ("forward", Dtype::Bf16, _) => "layernorm_bf16_wide",
        (_, Dtype::F32, Dtype::F32) => "layernorm_backward_f32_wide",
        (_, Dtype::F32, Dtype::Bf16) => "layernorm_backward_f32_bf16_wide",
        (_, Dtype::Bf16, _) => "layernorm_backward_bf16_wide",
    }
}

pub(super) fn layernorm_backward(cuda: &mut Cuda, op: &ops::LayerNormBackward) -> Result<()> {
    let ops::LayerNormBackward { join, norm, d_sum, d_branch, d_bias, .. } = *op;
    let read_next = handed_on(join, d_sum, d_branch);
    let scale_grad = scale_grad_of(join);
    let changed = [Some(d_sum), norm.d_gamma, norm.d_beta, scale_grad].into_iter().flatten();
    let changed: Vec<Mat> = changed.collect();
    let operation =
        if matches!(join, Join::Ready(_)) { "layernorm_backward" } else { "layernorm_backward join" };
    bias::make(cuda, operation, (read_next, d_sum.dtype), d_bias, &changed, &|cuda, d_bias| {
        launch_layernorm_backward(cuda, op, d_bias)
    })
}

/// The kernels with or without the sums of a bias. Returns the gradient's destination if it was made: no
/// kernel for wide rows makes it.
fn launch_layernorm_backward(
    cuda: &Cuda,
    op: &ops::LayerNormBackward,
    d_bias: Option<Mat>,
) -> Result<Option<Mat>> {
    let ops::LayerNormBackward { d_y, join, norm, stats, d_sum, write, d_branch, .. } = *op;
    let backward = Backward { d_y, x: join.sum(), norm, stats, d_sum, fresh: !write.adds(), d_bias: None };
    same_shape("layernorm_backward", d_y, d_sum);
    same_kind("layernorm_backward", d_sum, backward.x);
    match (instance(d_sum, d_y), branch_of(cuda, join, d_sum, d_branch)) {
        (None, _) => backward.wide(cuda)?,
        (Some(kernels), Some(branch)) => {
            Backward { d_bias, ..backward }.fused(cuda, kernels, branch, d_branch)?;
            return Ok(d_bias);
        }
        (Some(kernels), None) if matches!(join, Join::Ready(_)) => {
            Backward { d_bias, ..backward }.alone(cuda, kernels)?;
            return Ok(d_bias);
        }
        (Some(kernels), None) => backward.alone(cuda, kernels)?,
    }
    launch_residual_backward(cuda, &op.residual(), d_bias)
}

/// The matrix that the next products of the backward pass read.
fn handed_on(join: &Join, d_sum: Mat, d_branch: Mat) -> Mat {
    match join {
        Join::Ready(_) if d_branch.dtype == d_sum.dtype => d_sum,
        _ => d_branch,
    }
}

/// How `d_branch` follows from `d_sum`, if it does so by factors alone. A trained LayerScale needs a sum of
/// its own, which would not fit into the registers of a LayerNorm.
fn branch_of(cuda: &Cuda, join: &Join, d_sum: Mat, d_branch: Mat) -> Option<BranchArgs> {
    match join {
        Join::Branch { branch, .. } => (!has_trained_scale(branch)).then(|| branch_args(cuda, branch)),
        Join::Ready(_) => (d_branch.dtype != d_sum.dtype).then(no_branch),
    }
}

/// The gradient of a join's LayerScale, if it is trained.
fn scale_grad_of(join: &Join) -> Option<Mat> {
    match join {
        Join::Branch { branch, .. } => branch.layer_scale.and_then(|(_, d)| d),
        Join::Ready(_) => None,
    }
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
    d_bias: Option<Mat>,
}

impl Backward<'_> {
    fn is_trained(&self) -> bool {
        self.norm.d_gamma.is_some() || self.norm.d_beta.is_some() || self.d_bias.is_some()
    }

    /// γ, β, and the bias if requested.
    fn sums(&self) -> usize {
        2 + usize::from(self.d_bias.is_some())
    }

    fn partials(&self, cuda: &Cuda, blocks: usize) -> Partials {
        Partials::new(cuda, blocks, self.sums(), self.d_y.cols, 0)
    }

    fn finish(&self, cuda: &Cuda, partials: &Partials) -> Result<()> {
        let outputs = [self.norm.d_gamma, self.norm.d_beta, self.d_bias];
        partials.finish(cuda, &outputs[..self.sums()])
    }

    fn alone(&self, cuda: &Cuda, kernels: &Instance) -> Result<()> {
        let Self { d_y, x, norm, stats, d_sum, fresh, d_bias } = *self;
        let grid = row_grid(cuda, d_y.rows, kernels.backward_threads, kernels.backward_blocks);
        let partials = self.partials(cuda, grid[0] as usize);
        launch!(
            cuda,
            if d_bias.is_some() { kernels.backward_bias } else { kernels.backward },
            grid,
            kernels.backward_threads,
            kernels.backward_shared(d_y.cols, d_bias.is_some()),
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

    fn fused(&self, cuda: &Cuda, kernels: &Instance, branch: BranchArgs, d_branch: Mat) -> Result<()> {
        let Self { d_y, x, norm, stats, d_sum, fresh, d_bias } = *self;
        same_kind("layernorm_backward", d_y, d_branch);
        let grid = row_grid(cuda, d_y.rows, kernels.backward_threads, kernels.backward_blocks);
        let partials = self.partials(cuda, grid[0] as usize);
        launch!(
            cuda,
            if d_bias.is_some() { kernels.backward_join_bias } else { kernels.backward_join },
            grid,
            kernels.backward_threads,
            kernels.backward_shared(d_y.cols, d_bias.is_some()),
            cuda.step_params.address(),
            branch,
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
        let Self { d_y, x, norm, stats, d_sum, fresh, .. } = *self;
        // The first kernel passes the rounding error of each row's mean to the second.
        let rests_bytes = (d_y.rows * 4).next_multiple_of(16);
        let [stretches, slices, _] = sums::column_grid(cuda, d_y);
        let partials = Partials::new(cuda, slices as usize, 2, d_y.cols, rests_bytes);
        let rests = partials.in_front;
        launch!(
            cuda,
            wide(x.dtype, d_y.dtype, "backward"),
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
            stream_variant!(x.dtype, d_y.dtype, "layernorm_gradients"),
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

pub(super) fn residual(cuda: &mut Cuda, op: &ops::Residual) -> Result<()> {
    let Join::Branch { sum, branch } = op.join else { return Ok(()) };
    same_kind("residual", *sum, branch.base);
    same_shape("residual", *sum, branch.branch);
    launch!(
        cuda,
        stream_variant!(sum.dtype, branch.branch.dtype, "residual"),
        elementwise_grid(sum.rows, sum.cols),
        THREADS,
        0,
        cuda.step_params.address(),
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

pub(super) fn residual_backward(cuda: &mut Cuda, op: &ops::ResidualBackward) -> Result<()> {
    let ops::ResidualBackward { join, d_sum, d_branch, d_bias } = *op;
    let read_next = handed_on(join, d_sum, d_branch);
    let changed: Vec<Mat> = scale_grad_of(join).into_iter().collect();
    bias::make(cuda, "residual_backward", (read_next, d_sum.dtype), d_bias, &changed, &|cuda, d_bias| {
        launch_residual_backward(cuda, op, d_bias)
    })
}

/// The kernel with or without the sums of a bias. Returns the gradient's destination if it was made: only the
/// kernel with a LayerScale's gradient makes it.
fn launch_residual_backward(
    cuda: &Cuda,
    op: &ops::ResidualBackward,
    d_bias: Option<Mat>,
) -> Result<Option<Mat>> {
    let ops::ResidualBackward { join, d_sum, d_branch, .. } = *op;
    if let Some(branch) = branch_of(cuda, join, d_sum, d_branch) {
        same_shape("residual_backward", d_sum, d_branch);
        launch!(
            cuda,
            stream_variant!(d_sum.dtype, d_branch.dtype, "residual_backward"),
            elementwise_grid(d_sum.rows, d_sum.cols),
            THREADS,
            0,
            cuda.step_params.address(),
            branch,
            cuda.at(d_sum),
            d_sum.ld as u32,
            cuda.at(d_branch),
            d_branch.ld as u32,
            d_sum.rows as u32,
            d_sum.cols as u32,
        )?;
        return Ok(None);
    }
    let Join::Branch { branch, .. } = join else { return Ok(None) };
    let x = branch.branch;
    same_shape("residual_backward", d_sum, x);
    same_kind("residual_backward", x, d_branch);
    let grid = sums::column_grid(cuda, d_sum);
    let outputs = [branch.layer_scale.and_then(|(_, d)| d), d_bias];
    let outputs = &outputs[..1 + usize::from(d_bias.is_some())];
    let partials = Partials::new(cuda, grid[1] as usize, outputs.len(), d_sum.cols, 0);
    launch!(
        cuda,
        match d_bias {
            None => stream_variant!(d_sum.dtype, d_branch.dtype, "residual_scale_backward"),
            Some(_) => stream_variant!(d_sum.dtype, d_branch.dtype, "residual_scale_backward_bias"),
        },
        grid,
        THREADS,
        COLUMN_SHARED,
        cuda.step_params.address(),
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
    partials.finish(cuda, outputs)?;
    Ok(d_bias)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_are_those_that_the_kernels_were_compiled_for() {
        let source = include_str!("../../../kernels/layernorm.cu");
        let lines: Vec<String> = source
            .lines()
            .filter_map(|line| line.strip_prefix("LAYERNORM(")?.strip_suffix(')'))
            .map(|words| {
                // The test ignores the type and the number of prefetched rows.
                let words = words.split(", ").enumerate().filter(|(i, _)| ![1, 3].contains(i));
                words.map(|(_, word)| word).collect::<Vec<_>>().join(" ")
            })
            .collect();
        let both = [("bf16", &INSTANCES), ("f32_bf16", &INSTANCES_OF_F32)];
        let table = both.into_iter().flat_map(|(suffix, instances)| {
            instances.iter().enumerate().map(move |(i, k)| {
                let forward = format!("{} {}", k.forward_threads, k.forward_blocks);
                let join = format!("{} {}", k.join_threads, k.join_blocks);
                let backward = format!("{} {}", k.backward_threads, k.backward_blocks);
                format!("{suffix} {} {forward} {join} {backward}", i + 1)
            })
        });
        assert_eq!(lines, table.collect::<Vec<_>>());

        // The variants with bias sums follow the same table.
        let biases: Vec<&str> = source
            .lines()
            .filter_map(|line| line.strip_prefix("LAYERNORM_BIAS(")?.strip_suffix(')'))
            .collect();
        let table = INSTANCES
            .iter()
            .enumerate()
            .map(|(i, k)| format!("{}, {}, {}", i + 1, k.backward_threads, k.backward_blocks));
        assert_eq!(biases, table.collect::<Vec<_>>());
    }
}
