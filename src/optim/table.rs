//! The table of segments for an update: one line per tensor, and for Adafactor the axes that JAX would see.
//!
//! In our memory a dense kernel is `[out, in]`, and q, k, v are one matrix. JAX has `[in, out]`, and `[D, H,
//! Dh]` for each of q, k and v. That decides which axes are the two largest, and over what a statistic is a
//! mean. So the table describes every tensor by the lengths and strides of JAX's axes in our memory.

use crate::backend::{Factor, Segment};
use crate::vit::config::ModelConfig;
use crate::vit::params::{Param, ParamKind};

use super::groups::Part;

/// One axis of a tensor in JAX's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    len: usize,
    stride: usize,
}

/// The line of a whole tensor. `grad` is its offset in the gradient arena.
pub(crate) fn whole(param: &Param, grad: usize, group: usize) -> Segment {
    Segment {
        name: param.name.clone(),
        param: param.offset,
        grad,
        len: param.padded_len(),
        group,
        factor: None,
    }
}

/// The line of one part of a tensor. The last part of a single row includes the row's padding.
pub(crate) fn share(param: &Param, grad: usize, group: usize, part: &Part) -> Segment {
    if part.count == 1 {
        return whole(param, grad, group);
    }
    let channels = param.shape[0] / part.count;
    let stride = if param.shape.len() == 1 { 1 } else { param.ld };
    let start = part.index * channels * stride;
    let end =
        if part.index + 1 == part.count { param.padded_len() } else { (part.index + 1) * channels * stride };
    Segment {
        // Flax's name of this part, if it has one.
        name: part.names.last().expect("a part has a name").clone(),
        param: param.offset + start,
        grad: grad + start,
        len: end - start,
        group,
        factor: None,
    }
}

/// How Adafactor treats a part of a tensor: factored over its two largest axes if both have at least
/// `min_factor` elements (the later of equal axes counts as larger, as Optax sorts them), otherwise in full,
/// row by row in memory order.
pub(crate) fn factor(
    param: &Param,
    part: &Part,
    config: &ModelConfig,
    min_factor: usize,
    state: usize,
) -> Factor {
    let axes = jax_axes(param, part, config);
    let mut order: Vec<usize> = (0..axes.len()).collect();
    order.sort_by_key(|i| axes[*i].len);
    if let [.., second, largest] = order[..]
        && axes[second].len >= min_factor
    {
        let mut outer = [Axis { len: 1, stride: 0 }; 2];
        let others = (0..axes.len()).filter(|i| *i != second && *i != largest && axes[*i].len > 1);
        for (to, from) in outer.iter_mut().zip(others) {
            *to = axes[from];
        }
        return Factor {
            outer: outer.map(|a| a.len),
            rows: axes[second].len,
            cols: axes[largest].len,
            outer_stride: outer.map(|a| a.stride),
            row_stride: axes[second].stride,
            col_stride: axes[largest].stride,
            state,
            factored: true,
        };
    }
    let (rows, cols) = match param.rows {
        1 => (1, param.cols / part.count),
        rows => (rows / part.count, param.cols),
    };
    Factor {
        outer: [1, 1],
        rows,
        cols,
        outer_stride: [0, 0],
        row_stride: param.ld,
        col_stride: 1,
        state,
        factored: false,
    }
}

fn jax_axes(param: &Param, part: &Part, config: &ModelConfig) -> Vec<Axis> {
    use ParamKind::*;
    let axes = |list: &[(usize, usize)]| list.iter().map(|&(len, stride)| Axis { len, stride }).collect();
    let (rows, cols, ld) = (param.rows, param.cols, param.ld);
    let (heads, head_size) = (config.heads, config.head_size());
    match param.kind {
        PatchKernel => {
            let (height, width) = config.patch;
            axes(&[(height, 3 * width), (width, 3), (3, 1), (rows, ld)])
        }
        AttentionIn { .. } => axes(&[(cols, 1), (heads, head_size * ld), (head_size, ld)]),
        AttentionInBias | NoBias => axes(&[(heads, head_size), (head_size, 1)]),
        AttentionOut => axes(&[(heads, head_size), (head_size, 1), (rows, ld)]),
        MlpKernel | GatedKernel | RepKernel | HeadKernel => axes(&[(cols, 1), (rows, ld)]),
        PosEmbed | Registers | SincosTable | RopeTable => axes(&[(1, 0), (rows, ld), (cols, 1)]),
        ExtraToken | MapProbe => axes(&[(1, 0), (1, 0), (cols, 1)]),
        PatchBias | NormGamma | NormBeta | AttentionOutBias | MlpBias | GatedBias | LayerScale | RepBias
        | HeadBias => {
            debug_assert_eq!(part.count, 1, "{}: only q, k, v are fused", param.name);
            axes(&[(cols, 1)])
        }
    }
}
