//! From handles to matrices: each operation checks that its shapes fit, borrows its operands from the arenas and calls a
//! kernel. One file per group of operations, as in `backend/cuda`; the contracts are those of [`crate::backend::ops`].

mod attention;
mod dense;
mod head;
mod norm;
mod stem;
mod update;

use super::CpuBackend;
use super::arenas::Access;
use crate::backend::{Mat, Op};
use crate::error::Result;

pub(super) fn execute(cpu: &mut CpuBackend, op: &Op) -> Result<()> {
    match op {
        Op::Patchify(op) => stem::patchify(cpu, op),
        Op::Embed(op) => stem::embed(cpu, op),
        Op::EmbedBackward(op) => stem::embed_backward(cpu, op),
        Op::Matmul(op) => dense::matmul(cpu, op),
        Op::MatmulBackward(op) => dense::matmul_backward(cpu, op),
        Op::Gelu(op) => dense::gelu(cpu, op),
        Op::Swiglu(op) => dense::swiglu(cpu, op),
        Op::SwigluBackward(op) => dense::swiglu_backward(cpu, op),
        Op::LayerNorm(op) => norm::layernorm(cpu, op),
        Op::LayerNormBackward(op) => norm::layernorm_backward(cpu, op),
        Op::Residual(op) => norm::residual(cpu, op),
        Op::ResidualBackward(op) => norm::residual_backward(cpu, op),
        Op::Rotate(op) => attention::rotate(cpu, op),
        Op::Attention(op) => attention::attention(cpu, op),
        Op::AttentionBackward(op) => attention::attention_backward(cpu, op),
        Op::QueryAttention(op) => attention::query_attention(cpu, op),
        Op::QueryAttentionBackward(op) => attention::query_attention_backward(cpu, op),
        Op::Pool(op) => head::pool(cpu, op),
        Op::PoolBackward(op) => head::pool_backward(cpu, op),
        Op::Scale(op) => head::scale(cpu, op),
        Op::Loss(op) => head::loss(cpu, op),
        Op::BeginReport => update::begin_report(cpu),
        Op::AddToReport(op) => update::add_to_report(cpu, op),
        Op::Update(update) => update::update(cpu, update),
    }
}

/// A parameter vector of `len` values.
fn vector<'a>(access: &mut Access<'a>, mat: Mat, len: usize) -> &'a [f32] {
    assert_eq!((mat.rows, mat.cols), (1, len), "{mat} is no vector of {len}");
    access.read_flat(mat)
}

/// The gradient of a parameter vector, if it is trained.
fn vector_grad<'a>(access: &mut Access<'a>, mat: Option<Mat>, len: usize) -> Option<&'a mut [f32]> {
    mat.map(|mat| {
        assert_eq!((mat.rows, mat.cols), (1, len), "{mat} is no vector of {len}");
        access.write_flat(mat)
    })
}

fn same_shape(what: &str, a: Mat, b: Mat) {
    assert_eq!((a.rows, a.cols), (b.rows, b.cols), "{what}: {a} and {b} differ in shape");
}
