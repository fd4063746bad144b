//! Dense layers: matrix products with their epilogues, GELU alone, and the gate of a SwiGLU.

use super::{same_shape, vector, vector_grad};
use crate::backend::cpu::arenas::Access;
use crate::backend::cpu::gemm::{self, Dropout};
use crate::backend::cpu::{CpuBackend, activation};
use crate::backend::{Epilogue, InputGrad, Mask, ops};
use crate::error::Result;

/// A mask over the rows of a dense layer's output; `None` draws nothing.
fn bound(cpu: &CpuBackend, mask: Mask, rows: usize) -> Option<Dropout> {
    let (mask, samples) = (cpu.bind(mask), cpu.micro.samples);
    (!mask.is_none()).then(|| {
        assert_eq!(rows % samples, 0, "dropout: {rows} rows of {samples} samples");
        Dropout { mask, rows_per_sample: rows / samples }
    })
}

pub(super) fn matmul(cpu: &mut CpuBackend, op: &ops::Matmul) -> Result<()> {
    let ops::Matmul { x, w, epilogue, y } = *op;
    let (out, input) = (w.weight.rows, w.weight.cols);
    assert_eq!((x.cols, y.cols, x.rows), (input, out, y.rows), "matmul: {x} · {}ᵀ → {y}", w.weight);
    let dropout = match epilogue {
        Epilogue::BiasGelu { dropout, .. } => bound(cpu, dropout, y.rows),
        _ => None,
    };

    let mut a = Access::new(&mut cpu.arenas);
    let (x, weight) = (a.read(x), a.read(w.weight));
    let y_rows = a.write(y);
    let epilogue = match epilogue {
        Epilogue::None => gemm::Epilogue::None,
        Epilogue::Bias => gemm::Epilogue::Bias(vector(&mut a, w.bias, out)),
        Epilogue::BiasResidual(residual) => {
            same_shape("matmul", residual, y);
            let bias = vector(&mut a, w.bias, out);
            let residual =
                if residual == y { gemm::Residual::InPlace } else { gemm::Residual::From(a.read(residual)) };
            gemm::Epilogue::BiasResidual { bias, residual }
        }
        Epilogue::BiasGelu { pre, form, .. } => {
            if let Some(pre) = pre {
                same_shape("matmul", pre, y);
            }
            gemm::Epilogue::BiasGelu {
                bias: vector(&mut a, w.bias, out),
                pre: pre.map(|pre| a.write(pre)),
                form,
                dropout,
            }
        }
        Epilogue::BiasTanh => gemm::Epilogue::BiasTanh(vector(&mut a, w.bias, out)),
    };
    gemm::matmul(&cpu.compute, x, weight, epilogue, y_rows);
    Ok(())
}

pub(super) fn matmul_backward(cpu: &mut CpuBackend, op: &ops::MatmulBackward) -> Result<()> {
    let ops::MatmulBackward { d_y, x, w, d_x } = *op;
    let (out, input) = (w.weight.rows, w.weight.cols);
    assert_eq!(
        (d_y.cols, x.cols, x.rows),
        (out, input, d_y.rows),
        "matmul_backward: {d_y}, {x}, {}",
        w.weight
    );
    let (c, accumulate) = (&cpu.compute, cpu.micro.gradients.adds());

    if w.d_weight.is_some() || w.d_bias.is_some() {
        let mut a = Access::new(&mut cpu.arenas);
        let (d_y, x) = (a.read(d_y), a.read(x));
        if let Some(d_bias) = vector_grad(&mut a, w.d_bias, out) {
            gemm::column_sums(c, d_y, accumulate, d_bias);
        }
        if let Some(d_weight) = w.d_weight {
            same_shape("matmul_backward", d_weight, w.weight);
            gemm::weight_grad(c, d_y, x, accumulate, a.write(d_weight));
        }
    }

    // After the weights' gradients, because `d_x` may take the place of `x`.
    let dropout = match d_x {
        InputGrad::Gelu { dropout, .. } => bound(cpu, dropout, d_y.rows),
        _ => None,
    };
    let mut a = Access::new(&mut cpu.arenas);
    let (d_y, weight) = (a.read(d_y), a.read(w.weight));
    let (epilogue, d_x) = match d_x {
        InputGrad::None => return Ok(()),
        InputGrad::Plain(d_x) => (gemm::InputEpilogue::Plain, d_x),
        InputGrad::Add(d_x) => (gemm::InputEpilogue::Add, d_x),
        InputGrad::Gelu { d_pre, pre, form, .. } => {
            same_shape("matmul_backward", d_pre, pre);
            (gemm::InputEpilogue::Gelu { pre: a.read(pre), form, dropout }, d_pre)
        }
        InputGrad::Tanh { d, y } => {
            same_shape("matmul_backward", d, y);
            (gemm::InputEpilogue::Tanh { y: a.read(y) }, d)
        }
    };
    assert_eq!((d_x.rows, d_x.cols), (x.rows, input), "matmul_backward: {d_x} is no gradient of {x}");
    gemm::input_grad(&cpu.compute, d_y, weight, epilogue, a.write(d_x));
    Ok(())
}

pub(super) fn gelu(cpu: &mut CpuBackend, op: &ops::Gelu) -> Result<()> {
    let ops::Gelu { pre, form, dropout, y } = *op;
    same_shape("gelu", pre, y);
    let dropout = bound(cpu, dropout, y.rows);
    let mut a = Access::new(&mut cpu.arenas);
    let pre = a.read(pre);
    activation::gelu(&cpu.compute, pre, form, dropout, a.write(y));
    Ok(())
}

pub(super) fn swiglu(cpu: &mut CpuBackend, op: &ops::Swiglu) -> Result<()> {
    let ops::Swiglu { pre, dropout, y } = *op;
    assert_eq!((pre.rows, pre.cols), (y.rows, 2 * y.cols), "swiglu: {pre} → {y}");
    let dropout = bound(cpu, dropout, y.rows);
    let mut a = Access::new(&mut cpu.arenas);
    let pre = a.read(pre);
    activation::swiglu(&cpu.compute, pre, dropout, a.write(y));
    Ok(())
}

/// The bias gradient is left to the product, which sums the rows of its `d_y` itself.
pub(super) fn swiglu_backward(cpu: &mut CpuBackend, op: &ops::SwigluBackward) -> Result<()> {
    let ops::SwigluBackward { d_y, pre, dropout, d_pre, d_bias: _ } = *op;
    same_shape("swiglu_backward", d_pre, pre);
    assert_eq!((pre.rows, pre.cols), (d_y.rows, 2 * d_y.cols), "swiglu_backward: {d_y} of {pre}");
    let dropout = bound(cpu, dropout, d_y.rows);
    let mut a = Access::new(&mut cpu.arenas);
    let (d_y, pre) = (a.read(d_y), a.read(pre));
    activation::swiglu_backward(&cpu.compute, d_y, pre, dropout, a.write(d_pre));
    Ok(())
}
