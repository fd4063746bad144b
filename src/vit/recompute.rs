//! What the backward pass recomputes instead of keeping ([`Recompute`]). It runs the forward's own operations, on the
//! same inputs and with the same masks, so that no bit of a gradient depends on the level.

use crate::backend::{Backend, Epilogue, Join, Recompute};
use crate::error::Result;

use super::block::{Block, Mlp, MlpGelu};
use super::forward;

/// `act = gelu(fc1(ln2))`. If `act` will be recomputed, the GELU is a separate kernel here too: a fused GELU may
/// round differently.
pub(super) fn matmul_gelu(b: &mut dyn Backend, a: &Block, gelu: &MlpGelu) -> Result<()> {
    if a.recompute != Recompute::LnGelu {
        return b.matmul(a.ln2, &a.fc1, gelu.epilogue(), a.act);
    }
    b.matmul(a.ln2, &a.fc1, Epilogue::Bias, gelu.pre)?;
    act(b, a)
}

/// `act` from what fc1 gave.
fn act(b: &mut dyn Backend, a: &Block) -> Result<()> {
    match &a.mlp {
        Mlp::Dense(MlpGelu { pre, form, dropout }) => b.gelu(*pre, *form, *dropout, a.act),
        Mlp::Gated(gate) => {
            b.swiglu(gate.pre, gate.dropout, gate.hidden)?;
            let Some((norm, stats)) = &gate.norm else { return Ok(()) };
            b.layernorm(&Join::Ready(gate.hidden), norm, a.act, *stats)
        }
    }
}

/// Recomputes what the block's backward needs and the forward did not keep. The sum that enters a half is always kept;
/// the branch that was added to it need not be.
pub(super) fn restore(b: &mut dyn Backend, a: &Block) -> Result<()> {
    let (x, mid) = (Join::Ready(a.x.sum()), Join::Ready(a.mid.sum()));
    match a.recompute {
        Recompute::None => Ok(()),
        Recompute::LnGelu => {
            b.layernorm(&x, &a.norm1, a.ln1, a.stats1)?;
            b.layernorm(&mid, &a.norm2, a.ln2, a.stats2)?;
            act(b, a)
        }
        Recompute::Block => {
            b.layernorm(&x, &a.norm1, a.ln1, a.stats1)?;
            forward::attention(b, a)?;
            b.matmul(a.o, &a.proj, a.proj_epilogue, a.proj_out)?;
            b.layernorm(&a.mid, &a.norm2, a.ln2, a.stats2)?;
            forward::mlp(b, a)
        }
    }
}
