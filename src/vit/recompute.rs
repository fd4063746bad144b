//! What the backward pass recomputes instead of keeping ([`Recompute`]). It runs the forward's own operations, on the
//! same inputs and with the same masks, so that no bit of a gradient depends on the level.

use crate::backend::{Backend, Epilogue, Join, Recompute};
use crate::error::Result;

use super::block::{Block, Mlp, MlpGelu};
use super::forward;

/// From `ln2` to `act`. If `act` will be recomputed, the GELU is a separate kernel here too: a fused GELU may round
/// differently.
pub(super) fn fc1(b: &mut dyn Backend, a: &Block) -> Result<()> {
    match &a.mlp {
        Mlp::Dense(gelu) if a.recompute != Recompute::LnGelu => {
            return b.matmul(a.ln2, &a.fc1, gelu.epilogue(), a.act);
        }
        Mlp::Dense(gelu) => b.matmul(a.ln2, &a.fc1, Epilogue::Bias, gelu.pre)?,
        Mlp::Gated(gate) => b.matmul(a.ln2, &a.fc1, Epilogue::Bias, gate.pre)?,
    }
    act(b, a)
}

/// `act` from what fc1 gave.
fn act(b: &mut dyn Backend, a: &Block) -> Result<()> {
    match a.mlp {
        Mlp::Dense(MlpGelu { pre, form, dropout }) => b.gelu(pre, form, dropout, a.act),
        Mlp::Gated(gate) => {
            b.swiglu(gate.pre, gate.dropout, gate.hidden)?; // 1
            match &gate.norm {
                Some((norm, stats)) => b.layernorm(&Join::Ready(gate.hidden), norm, a.act, *stats), // 2
                None => Ok(()),
            }
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
            fc1(b, a)
        }
    }
}
