//! Attention by Hopper's own instructions (`kernels/attention_*_hopper.cu`): for heads of 64 values and at most
//! [`ROWS`] tokens in bf16, without dropout. Everything else takes the portable kernels.

use super::{HEAD_WIDTH, Work};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::device::{DeviceProperties, HOPPER};
use crate::backend::cuda::launch::{AttentionHopperArgs, kernel};
use crate::backend::{Dtype, Kernels, Mat};
use crate::error::{Error, Result};

/// Tokens of a head that a block holds: rows of a box of Q, K or V.
const ROWS: usize = 208;
/// Rows of a box of O: those of a warp.
const STORED_ROWS: usize = 16;
/// Bytes of the barriers of two stages.
const BARRIERS: usize = 32;
/// Bytes of shared memory: Q, K and V of two heads.
const SHARED: usize = 2 * 3 * ROWS * 2 * HEAD_WIDTH + BARRIERS;

/// # Errors
/// Hopper's kernels are asked for on another GPU.
pub(in crate::backend::cuda) fn check_gpu(gpu: &DeviceProperties, kernels: Kernels) -> Result<()> {
    if kernels != Kernels::Hopper || gpu.capability == HOPPER {
        return Ok(());
    }
    let (major, minor) = gpu.capability;
    Err(Error::new(format!(
        "`train.kernels = hopper` needs a GPU of compute capability 9.0 (H100, H200); {} has {major}.{minor}",
        gpu.name
    ))
    .hint("set `train.kernels=portable`"))
}

/// Whether the kernel does this work, and is asked for.
pub(super) fn takes(cuda: &Cuda, work: &Work) -> bool {
    cuda.options.kernels == Kernels::Hopper
        && work.tile.is_some()
        && work.dtype == Dtype::Bf16
        && work.heads.head_size == HEAD_WIDTH
        && work.heads.tokens <= ROWS
        && work.dropout.rate == 0.0
}

pub(super) fn forward(cuda: &Cuda, work: &Work, qkv: Mat, o: Mat, lse: Mat) -> Result<()> {
    let (images, heads) = (work.images, work.heads);
    let all_heads = images * heads.heads;
    // {values, tokens, heads of Q, K and V, images}
    let map = |mat: Mat, parts: usize, rows: usize| {
        let row = mat.ld * mat.dtype.bytes();
        let sizes = [heads.head_size, heads.tokens, parts * heads.heads, images].map(|n| n as u64);
        let strides = [row, 2 * heads.head_size, heads.tokens * row].map(|n| n as u64);
        cuda.gpu.tensor_map(cuda.at(mat), sizes, strides, [heads.head_size as u32, rows as u32, 1, 1])
    };
    let args = AttentionHopperArgs {
        qkv: map(qkv, 3, ROWS)?,
        o: map(o, 1, STORED_ROWS)?,
        lse: work.per_head(cuda, lse, 0, images),
        scale: work.scale(),
        tokens: heads.tokens as u32,
        heads: heads.heads as u32,
        all_heads: all_heads as u32,
    };
    // A block takes one head after the other: as many blocks as multiprocessors.
    let blocks = all_heads.min(cuda.gpu.properties().multiprocessors as usize) as u32;
    cuda.launch(kernel!("attention_forward_hopper_bf16_d64"), [blocks, 1, 1], SHARED as u32, &args)
}
