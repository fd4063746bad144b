//! The matrix products that are timed.

use crate::backend::cuda::driver::Launched;
use crate::backend::{Cost, Dtype, Epilogue, Gelu, InputGrad, Mask};

use super::Traffic;
use super::cases::{Case, Placed, Room, sum_partials, traffic};
use super::sizes::Model;

/// The products of a block and of the patch embedding, each with its epilogue and its two backward products.
pub(super) fn products(model: &Model, images: usize) -> Vec<Case> {
    let (rows, d) = (images * model.tokens(), model.width);
    let patch = 3 * model.patch * model.patch;
    let layers: [(&'static str, usize, usize); 5] =
        [("patch_embed", d, patch), ("qkv", 3 * d, d), ("proj", d, d), ("fc1", 4 * d, d), ("fc2", d, 4 * d)];
    layers.into_iter().flat_map(|layer| product(model.name, rows, images, layer)).collect()
}

fn product(
    model: &'static str,
    rows: usize,
    images: usize,
    (layer, out, input): (&'static str, usize, usize),
) -> Vec<Case> {
    let shape = format!("{model} [{rows}, {input}] → {out}");
    // The results of these layers are part of the residual stream.
    let streams: &[Dtype] = match layer {
        "patch_embed" | "proj" | "fc2" => &[Dtype::Bf16, Dtype::F32],
        _ => &[Dtype::Bf16],
    };
    let mut cases: Vec<Case> =
        streams.iter().map(|stream| forward((model, rows, images), (layer, out, input), *stream)).collect();
    let (input_grad, weight_grad) = match layer {
        "patch_embed" => (None, "patch_embed weight gradient"),
        "qkv" => (Some("qkv input gradient"), "qkv weight gradient, bias"),
        "proj" => (Some("proj input gradient"), "proj weight gradient, bias"),
        "fc1" => (Some("fc1 input gradient"), "fc1 weight gradient, bias"),
        _ => (Some("fc2 input gradient, gelu"), "fc2 weight gradient, bias"),
    };
    if let Some(operation) = input_grad {
        let place = move |room: &mut Room| {
            let (d_y, x) = (room.activation(rows, out), room.activation(rows, input));
            let (pre, d_x, w) =
                (room.activation(rows, input), room.activation(rows, input), room.linear(out, input, false));
            let grad = match layer {
                "fc2" => InputGrad::Gelu { d_pre: d_x, pre, form: Gelu::Tanh, dropout: Mask::NONE },
                _ => InputGrad::Plain(d_x),
            };
            Placed::new(move |b| b.matmul_backward(d_y, x, &w, grad))
        };
        cases.push(
            Case::new(operation, shape.clone(), images, beside(rows, input, Dtype::Bf16), place).product(),
        );
    }
    let place = move |room: &mut Room| {
        let (d_y, x) = (room.activation(rows, out), room.activation(rows, input));
        let mut w = room.linear(out, input, true);
        // Another operation computes the gradient of the embedding's bias.
        w.d_bias = w.d_bias.filter(|_| layer != "patch_embed");
        Placed::new(move |b| b.matmul_backward(d_y, x, &w, InputGrad::None))
    };
    cases.push(Case::new(weight_grad, shape, images, beside(rows, out, Dtype::Bf16), place).product());
    cases
}

/// The minimum traffic of our kernels that run beside a product whose epilogue is not fused, for a result
/// `[rows, cols]` of type `y`.
fn beside(rows: usize, cols: usize, y: Dtype) -> impl Fn(&[Launched], Cost) -> Vec<Traffic> {
    let (size, bias) = (y.bytes() * rows * cols, 4 * cols);
    move |launches, _| {
        let slices = launches.first().map_or(0, |launched| launched.grid[1] as usize);
        let least = |launched: &Launched| match launched.kernel {
            "bias_f32" | "bias_bf16" => traffic(size + bias, size),
            "bias_gelu_bf16" => traffic(size + bias, 2 * size),
            "bias_residual_f32" | "bias_residual_bf16" => traffic(2 * size + bias, size),
            "gelu_backward_bf16" => traffic(2 * size, size),
            "column_sums_bf16" => traffic(size, 4 * slices * cols),
            "sum_partials" => sum_partials(slices, 1, cols),
            other => unreachable!("`{other}` is not started beside a product"),
        };
        launches.iter().map(least).collect()
    }
}

fn forward(
    (model, rows, images): (&'static str, usize, usize),
    (layer, out, input): (&'static str, usize, usize),
    stream: Dtype,
) -> Case {
    let operation = match layer {
        "patch_embed" => "patch_embed",
        "qkv" => "qkv, bias",
        "proj" => "proj, bias, residual",
        "fc1" => "fc1, bias, gelu",
        _ => "fc2, bias, residual",
    };
    let note = if stream == Dtype::F32 { ", stream f32" } else { "" };
    let place = move |room: &mut Room| {
        let (x, w) = (room.activation(rows, input), room.linear(out, input, false));
        let [y, other] = [0; 2].map(|_| room.stream(rows, out, stream));
        let epilogue = match layer {
            "patch_embed" => Epilogue::None,
            "qkv" => Epilogue::Bias,
            "fc1" => Epilogue::BiasGelu { pre: Some(other), form: Gelu::Tanh, dropout: Mask::NONE },
            _ => Epilogue::BiasResidual(other),
        };
        Placed::new(move |b| b.matmul(x, &w, epilogue, y))
    };
    let shape = format!("{model} [{rows}, {input}] → {out}{note}");
    Case::new(operation, shape, images, beside(rows, out, stream), place).product()
}
