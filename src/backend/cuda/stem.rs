//! From the bound batch to tokens, and back to the gradients of bias, extra tokens and positions
//! (kernels/patchify.cu, kernels/embed.cu).

use super::Cuda;
use super::dense::elementwise_grid;
use super::launch::{
    EmbedArgs, EmbedBackwardArgs, EmbedGradientsArgs, EmbedShape, Normalise, PatchShape, PatchifyArgs,
    kernel, stream_variant, variant,
};
use super::sums;
use crate::backend::{Dtype, Embed, Mat, Pixels, ops};
use crate::error::Result;

pub(super) fn patchify(cuda: &mut Cuda, op: &ops::Patchify) -> Result<()> {
    let ops::Patchify { grid, normalise, patches } = *op;
    let slot = cuda.batch.slot.as_ref().expect("patchify: no batch is bound");
    let micro = cuda.micro;
    assert_eq!(slot.layout().image, grid.image, "patchify: the batch has another image size");
    assert!(micro.first + micro.samples <= slot.layout().samples, "patchify: micro-batch outside the batch");
    let expected = (micro.samples * grid.tokens(), grid.patch_len());
    assert_eq!((patches.rows, patches.cols), expected, "patchify: {patches} has the wrong shape");

    let pair = |(a, b): (usize, usize)| [a as u32, b as u32];
    let [image_height, image_width] = pair(grid.image);
    let [patch_height, patch_width] = pair(grid.patch);
    let [grid_height, grid_width] = pair(grid.grid());
    let args = PatchifyArgs {
        params: cuda.step_params.address(),
        shape: PatchShape {
            image_height,
            image_width,
            patch_height,
            patch_width,
            grid_height,
            grid_width,
            extra: grid.extra as u32,
        },
        normalise: Normalise { mean: normalise.mean, std: normalise.std },
        first: micro.first as u32,
        patches: cuda.view(patches),
    };
    let kernel = match (cuda.step_params.pixels(), patches.dtype) {
        (Pixels::U8, Dtype::Bf16) => kernel!("patchify_u8_bf16"),
        (Pixels::U8, Dtype::F32) => kernel!("patchify_u8_f32"),
        (Pixels::F32, Dtype::Bf16) => kernel!("patchify_f32_bf16"),
        (Pixels::F32, Dtype::F32) => kernel!("patchify_f32_f32"),
    };
    cuda.launch(kernel, elementwise_grid(patches.rows, patches.cols), 0, &args)
}

fn embed_shape(embed: &Embed, x: Mat) -> EmbedShape {
    let [class, other, registers] = embed.extra_tokens.map(|part| part.map_or(0, |(tokens, _)| tokens.rows));
    assert_eq!(embed.extra, class + other + registers, "embed: extra tokens");
    assert!(class + other <= 2 && embed.extra < embed.tokens, "embed: too many extra tokens");
    assert_eq!(x.rows % embed.tokens, 0, "embed: rows are whole samples");
    EmbedShape {
        samples: (x.rows / embed.tokens) as u32,
        tokens: embed.tokens as u32,
        width: x.cols as u32,
        extra: embed.extra as u32,
        classes: (class + other) as u32,
        posemb_first: embed.posemb_first as u32,
    }
}

pub(super) fn embed(cuda: &mut Cuda, op: &ops::Embed) -> Result<()> {
    let ops::Embed { embed, x } = *op;
    let posemb = embed.posemb.0;
    let expected = (embed.tokens - embed.posemb_first, x.cols);
    assert_eq!((posemb.rows, posemb.cols), expected, "embed: positions");
    let [extra0, extra1, registers] = embed.extra_tokens.map(|token| token.map(|(value, _)| value));
    let args = EmbedArgs {
        params: cuda.step_params.address(),
        shape: embed_shape(embed, x),
        dropout: cuda.mask(embed.dropout),
        x: cuda.view(x),
        bias: cuda.at(embed.bias.0),
        extra0: cuda.at_or_null(extra0),
        extra1: cuda.at_or_null(extra1),
        registers: cuda.view_or_none(registers),
        posemb: cuda.view(posemb),
    };
    cuda.launch(variant!(x.dtype, "embed"), elementwise_grid(x.rows, x.cols), 0, &args)
}

/// Limit of the scratch for partial sums over slices of the batch.
const PARTIAL_BYTES: usize = 16 << 20;

pub(super) fn embed_backward(cuda: &mut Cuda, op: &ops::EmbedBackward) -> Result<()> {
    let ops::EmbedBackward { embed, d_x, d_y } = *op;
    assert_eq!((d_x.rows, d_x.cols), (d_y.rows, d_y.cols), "embed_backward: {d_x} and {d_y} differ");
    let shape = embed_shape(embed, d_x);
    let d_extra = embed.extra_tokens.map(|token| token.and_then(|(_, d)| d));
    let (d_bias, d_posemb) = (embed.bias.1, embed.posemb.1);
    let trained = d_bias.is_some() || d_posemb.is_some() || d_extra.iter().any(Option::is_some);
    if !trained && embed.dropout.rate == 0.0 {
        return Ok(());
    }

    // Slices of the batch: enough threads for the GPU, within the scratch limit.
    let pitch = d_x.cols.next_multiple_of(8);
    let slice_bytes = embed.tokens * pitch * 4;
    let threads = embed.tokens * pitch / 8;
    let wanted = (cuda.properties().multiprocessors as usize * 1024).div_ceil(threads);
    let slices = wanted.min(PARTIAL_BYTES / slice_bytes).clamp(1, shape.samples as usize);
    let partials = if trained { cuda.scratch(slices * slice_bytes) } else { 0 };
    let [blocks, ..] = elementwise_grid(embed.tokens, d_x.cols);
    let args = EmbedBackwardArgs {
        params: cuda.step_params.address(),
        shape,
        dropout: cuda.mask(embed.dropout),
        d_x: cuda.view(d_x),
        d_y: cuda.view(d_y),
        partials,
        pitch: pitch as u32,
    };
    let kernel = stream_variant!(d_x.dtype, d_y.dtype, "embed_backward");
    cuda.launch(kernel, [blocks, slices as u32, 1], 0, &args)?;
    if !trained {
        return Ok(());
    }
    let args = EmbedGradientsArgs {
        shape,
        partials,
        pitch: pitch as u32,
        slices: slices as u32,
        d_extra0: cuda.at_or_null(d_extra[0]),
        d_extra1: cuda.at_or_null(d_extra[1]),
        d_registers: cuda.view_or_none(d_extra[2]),
        d_posemb: cuda.view_or_none(d_posemb),
        add: u32::from(cuda.micro.gradients.adds()),
    };
    let blocks = (embed.tokens * d_x.cols).div_ceil(256) as u32;
    cuda.launch(kernel!("embed_gradients"), [blocks, 1, 1], 0, &args)?;
    let Some(d_bias) = d_bias else { return Ok(()) };
    // Slice 0 now holds each token's sum.
    let patches = partials + (embed.extra * pitch * 4) as u64;
    let count = (embed.tokens - embed.extra) as u32;
    let pitch = pitch as u32;
    sums::sum_partials(cuda, patches, [count, pitch, pitch], [d_x.cols as u32, 1], [cuda.at(d_bias), 0, 0])
}
