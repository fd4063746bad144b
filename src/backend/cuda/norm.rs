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
use super::launch::{
    BranchArgs, Kernel, LayerNormArgs, LayerNormBackwardArgs, LayerNormGradientsArgs, LayerNormJoinArgs,
    LayerNormWideBackwardArgs, MaskArgs, ResidualArgs, ResidualBackwardArgs, ResidualScaleBackwardArgs, View,
    kernel, stream_variant,
};
use super::sums::{self, COLUMN_SHARED, COLUMN_STRETCH, Partials};
use crate::backend::{Branch, Dtype, Join, Mask, Mat, Norm, Stats, ops};
use crate::error::Result;

/// The kernels for rows of up to 256·n values; n is the instance's number.
struct Instance {
    forward: Kernel<LayerNormArgs>,
    join: Kernel<LayerNormJoinArgs>,
    backward: Kernel<LayerNormBackwardArgs>,
    backward_join: Kernel<LayerNormBackwardArgs>,
    /// With the sums of a bias. Without a branch only where products can read the stream.
    backward_bias: Option<Kernel<LayerNormBackwardArgs>>,
    backward_join_bias: Kernel<LayerNormBackwardArgs>,
}

macro_rules! instance {
    ($suffix:literal, $n:literal, $bias:expr) => {
        Instance {
            forward: kernel!("layernorm_", $suffix, "_", $n),
            join: kernel!("layernorm_join_", $suffix, "_", $n),
            backward: kernel!("layernorm_backward_", $suffix, "_", $n),
            backward_join: kernel!("layernorm_backward_join_", $suffix, "_", $n),
            backward_bias: $bias,
            backward_join_bias: kernel!("layernorm_backward_join_bias_", $suffix, "_", $n),
        }
    };
}

const INSTANCES: [Instance; 5] = [
    instance!("bf16", 1, Some(kernel!("layernorm_backward_bias_bf16_1"))),
    instance!("bf16", 2, Some(kernel!("layernorm_backward_bias_bf16_2"))),
    instance!("bf16", 3, Some(kernel!("layernorm_backward_bias_bf16_3"))),
    instance!("bf16", 4, Some(kernel!("layernorm_backward_bias_bf16_4"))),
    instance!("bf16", 5, Some(kernel!("layernorm_backward_bias_bf16_5"))),
];
/// The same where the stream is f32.
const INSTANCES_OF_F32: [Instance; 5] = [
    instance!("f32_bf16", 1, None),
    instance!("f32_bf16", 2, None),
    instance!("f32_bf16", 3, None),
    instance!("f32_bf16", 4, None),
    instance!("f32_bf16", 5, None),
];
/// Blocks per multiprocessor for the kernels that loop over rows.
const WIDE_BLOCKS: usize = 4;

/// Shared memory of a backward kernel. The sums of a bias lie there, one row per warp.
fn backward_shared(threads: u32, columns: usize, bias: bool) -> u32 {
    let row = 4 * columns.next_multiple_of(COLUMN_STRETCH) as u32;
    if bias { COLUMN_SHARED.max(threads / 32 * row) } else { COLUMN_SHARED }
}

/// The instance for a stream type and the type that the block reads and writes.
fn instance(stream: Mat, y: Mat) -> Option<&'static Instance> {
    let instances = match (stream.dtype, y.dtype) {
        (_, Dtype::F32) => return None,
        (Dtype::Bf16, Dtype::Bf16) => &INSTANCES,
        (Dtype::F32, Dtype::Bf16) => &INSTANCES_OF_F32,
    };
    instances.get(y.cols.div_ceil(COLUMN_STRETCH) - 1)
}

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
    let most = cuda.properties().multiprocessors as usize * blocks_of_multiprocessor;
    [rows.div_ceil(threads as usize / 32).min(most).max(1) as u32, 1, 1]
}

/// The same, as many as the kernel was compiled for.
fn full_grid<A>(cuda: &Cuda, rows: usize, kernel: Kernel<A>) -> [u32; 3] {
    row_grid(cuda, rows, kernel.threads, kernel.blocks as usize)
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
        let args = LayerNormJoinArgs {
            params: cuda.step_params.address(),
            branch_args: branch_args(cuda, branch),
            base: cuda.view(branch.base),
            branch: cuda.view(branch.branch),
            sum: cuda.view(*sum),
            gamma: cuda.at(norm.gamma),
            beta: cuda.at(norm.beta),
            eps: norm.eps,
            y: cuda.view(y),
            mean: cuda.at(stats.mean),
            rstd: cuda.at(stats.rstd),
        };
        return cuda.launch(kernels.join, full_grid(cuda, y.rows, kernels.join), 0, &args);
    }
    residual(cuda, &ops::Residual { join })?;
    let x = join.sum();
    let args = LayerNormArgs {
        x: cuda.view(x),
        gamma: cuda.at(norm.gamma),
        beta: cuda.at(norm.beta),
        eps: norm.eps,
        y: cuda.view(y),
        mean: cuda.at(stats.mean),
        rstd: cuda.at(stats.rstd),
    };
    let kernel = match (instance(x, y), x.dtype, y.dtype) {
        (Some(kernels), ..) => {
            return cuda.launch(kernels.forward, full_grid(cuda, y.rows, kernels.forward), 0, &args);
        }
        (None, Dtype::F32, Dtype::F32) => kernel!("layernorm_f32_wide"),
        (None, Dtype::F32, Dtype::Bf16) => kernel!("layernorm_f32_bf16_wide"),
        (None, Dtype::Bf16, _) => kernel!("layernorm_bf16_wide"),
    };
    cuda.launch(kernel, row_grid(cuda, y.rows, kernel.threads, WIDE_BLOCKS), 0, &args)
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
    let backward = Backward { d_y, x: join.sum(), norm, stats, d_sum, add: write.adds(), d_bias: None };
    same_shape("layernorm_backward", d_y, d_sum);
    same_kind("layernorm_backward", d_sum, backward.x);
    match (instance(d_sum, d_y), branch_of(cuda, join, d_sum, d_branch)) {
        (None, _) => backward.wide(cuda)?,
        (Some(kernels), Some(branch)) => {
            Backward { d_bias, ..backward }.narrow(cuda, kernels, Some((branch, d_branch)))?;
            return Ok(d_bias);
        }
        (Some(kernels), None) if matches!(join, Join::Ready(_)) => {
            Backward { d_bias, ..backward }.narrow(cuda, kernels, None)?;
            return Ok(d_bias);
        }
        (Some(kernels), None) => backward.narrow(cuda, kernels, None)?,
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
    add: bool,
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

    fn finish(&self, cuda: &Cuda, partials: &Partials) -> Result<()> {
        let outputs = [self.norm.d_gamma, self.norm.d_beta, self.d_bias];
        partials.finish(cuda, &outputs[..self.sums()])
    }

    /// Rows in registers. With a branch, also the branch's share of `d_sum`, in `d_branch`.
    fn narrow(&self, cuda: &Cuda, kernels: &Instance, branch: Option<(BranchArgs, Mat)>) -> Result<()> {
        let Self { d_y, x, norm, stats, d_sum, add, d_bias } = *self;
        let kernel = match (branch, d_bias) {
            (None, None) => kernels.backward,
            (None, Some(_)) => {
                kernels.backward_bias.expect("products read a stream of the block's type only")
            }
            (Some(_), None) => kernels.backward_join,
            (Some(_), Some(_)) => kernels.backward_join_bias,
        };
        let grid = full_grid(cuda, d_y.rows, kernel);
        let partials = Partials::new(cuda, grid[0] as usize, self.sums(), d_y.cols, 0);
        let (branch_args, d_branch) = match branch {
            Some((branch_args, d_branch)) => {
                same_kind("layernorm_backward", d_y, d_branch);
                (branch_args, cuda.view(d_branch))
            }
            None => (no_branch(), View::NONE),
        };
        let args = LayerNormBackwardArgs {
            params: cuda.step_params.address(),
            branch_args,
            d_y: cuda.view(d_y),
            x: cuda.view(x),
            gamma: cuda.at(norm.gamma),
            mean: cuda.at(stats.mean),
            rstd: cuda.at(stats.rstd),
            d_sum: cuda.view(d_sum),
            add: u32::from(add),
            d_branch,
            partials: if self.is_trained() { partials.at } else { 0 },
            pitch: partials.pitch,
        };
        cuda.launch(kernel, grid, backward_shared(kernel.threads, d_y.cols, d_bias.is_some()), &args)?;
        self.finish(cuda, &partials)
    }

    /// Rows of any width.
    fn wide(&self, cuda: &Cuda) -> Result<()> {
        let Self { d_y, x, norm, stats, d_sum, add, .. } = *self;
        // The first kernel passes the rounding error of each row's mean to the second.
        let rests_bytes = (d_y.rows * 4).next_multiple_of(16);
        let [stretches, slices, _] = sums::column_grid(cuda, d_y);
        let partials = Partials::new(cuda, slices as usize, 2, d_y.cols, rests_bytes);
        let rests = partials.in_front;
        let args = LayerNormWideBackwardArgs {
            d_y: cuda.view(d_y),
            x: cuda.view(x),
            gamma: cuda.at(norm.gamma),
            mean: cuda.at(stats.mean),
            rstd: cuda.at(stats.rstd),
            d_sum: cuda.view(d_sum),
            add: u32::from(add),
            rests,
        };
        let kernel = match (x.dtype, d_y.dtype) {
            (Dtype::F32, Dtype::F32) => kernel!("layernorm_backward_f32_wide"),
            (Dtype::F32, Dtype::Bf16) => kernel!("layernorm_backward_f32_bf16_wide"),
            (Dtype::Bf16, _) => kernel!("layernorm_backward_bf16_wide"),
        };
        cuda.launch(kernel, row_grid(cuda, d_y.rows, kernel.threads, WIDE_BLOCKS), 0, &args)?;
        if !self.is_trained() {
            return Ok(());
        }
        let args = LayerNormGradientsArgs {
            d_y: cuda.view(d_y),
            x: cuda.view(x),
            mean: cuda.at(stats.mean),
            rstd: cuda.at(stats.rstd),
            rests,
            partials: partials.at,
            pitch: partials.pitch,
        };
        let kernel = stream_variant!(x.dtype, d_y.dtype, "layernorm_gradients");
        cuda.launch(kernel, [stretches, slices, 1], COLUMN_SHARED, &args)?;
        self.finish(cuda, &partials)
    }
}

pub(super) fn residual(cuda: &mut Cuda, op: &ops::Residual) -> Result<()> {
    let Join::Branch { sum, branch } = op.join else { return Ok(()) };
    same_kind("residual", *sum, branch.base);
    same_shape("residual", *sum, branch.branch);
    let args = ResidualArgs {
        params: cuda.step_params.address(),
        branch_args: branch_args(cuda, branch),
        base: cuda.view(branch.base),
        branch: cuda.view(branch.branch),
        sum: cuda.view(*sum),
    };
    let kernel = stream_variant!(sum.dtype, branch.branch.dtype, "residual");
    cuda.launch(kernel, elementwise_grid(sum.rows, sum.cols), 0, &args)
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
        let args = ResidualBackwardArgs {
            params: cuda.step_params.address(),
            branch_args: branch,
            d_sum: cuda.view(d_sum),
            d_branch: cuda.view(d_branch),
        };
        let kernel = stream_variant!(d_sum.dtype, d_branch.dtype, "residual_backward");
        cuda.launch(kernel, elementwise_grid(d_sum.rows, d_sum.cols), 0, &args)?;
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
    let args = ResidualScaleBackwardArgs {
        params: cuda.step_params.address(),
        branch_args: branch_args(cuda, branch),
        branch: cuda.view(x),
        d_sum: cuda.view(d_sum),
        d_branch: cuda.view(d_branch),
        partials: partials.at,
        pitch: partials.pitch,
    };
    let kernel = match (d_bias, d_sum.dtype, d_branch.dtype) {
        (None, ..) => stream_variant!(d_sum.dtype, d_branch.dtype, "residual_scale_backward"),
        (Some(_), Dtype::Bf16, _) => kernel!("residual_scale_backward_bias_bf16"),
        (Some(_), Dtype::F32, Dtype::Bf16) => kernel!("residual_scale_backward_bias_f32_bf16"),
        (Some(_), Dtype::F32, Dtype::F32) => unreachable!("sums are made with a d_y in bf16"),
    };
    cuda.launch(kernel, grid, COLUMN_SHARED, &args)?;
    partials.finish(cuda, outputs)?;
    Ok(d_bias)
}
