//! The forward pass: pixels → logits. Read each numbered line beside its counterpart in [`super::backward`].

use crate::backend::{Backend, Epilogue, Join, Mat, Normalise, Recompute};
use crate::error::Result;

use super::graph::{Block, Graph, Head, MapHead, Stem, Tail};

/// Logits of the bound micro-batch.
pub(super) fn forward(b: &mut dyn Backend, g: &Graph, normalise: Normalise) -> Result<()> {
    stem(b, &g.stem, normalise)?;
    for layer in &g.blocks {
        block(b, layer)?;
    }
    b.residual(&g.last)?;
    tail(b, &g.tail, g.last.sum())?;
    head(b, &g.head)
}

fn stem(b: &mut dyn Backend, s: &Stem, normalise: Normalise) -> Result<()> {
    b.patchify(s.grid, normalise, s.patches)?; // 1
    b.matmul(s.patches, &s.patch_embed, Epilogue::None, s.x)?; // 2
    b.embed(&s.embed, s.x) // 3
}

fn block(b: &mut dyn Backend, a: &Block) -> Result<()> {
    halves(b, a, &a.x)?; // 1 to 6
    b.matmul(a.act, &a.fc2, a.fc2_epilogue, a.fc2_out) // 7
}

/// A block up to its last product.
fn halves(b: &mut dyn Backend, a: &Block, x: &Join) -> Result<()> {
    b.layernorm(x, &a.norm1, a.ln1, a.stats1)?; // 1
    b.matmul(a.ln1, &a.qkv, Epilogue::Bias, a.qkv_out)?; // 2
    b.attention(a.heads, a.qkv_out, a.o, a.lse, a.attention_dropout)?; // 3
    b.matmul(a.o, &a.proj, a.proj_epilogue, a.proj_out)?; // 4
    b.layernorm(&a.mid, &a.norm2, a.ln2, a.stats2)?; // 5
    mlp_activation(b, a) // 6
}

/// Where the activation is worked out again, it is worked out apart here too: the same operation gives the same bits.
fn mlp_activation(b: &mut dyn Backend, a: &Block) -> Result<()> {
    if a.recompute != Recompute::LnGelu {
        return b.matmul(a.ln2, &a.fc1, a.gelu, a.act);
    }
    let (pre, form, dropout) = a.gelu_parts();
    b.matmul(a.ln2, &a.fc1, Epilogue::Bias, pre)?;
    b.gelu(pre, form, dropout, a.act)
}

/// Brings back what the block's backward needs and the forward has not kept.
pub(super) fn restore(b: &mut dyn Backend, a: &Block) -> Result<()> {
    match a.recompute {
        Recompute::None => Ok(()),
        Recompute::LnGelu => {
            b.layernorm(&Join::Ready(a.x.sum()), &a.norm1, a.ln1, a.stats1)?; // 1
            b.layernorm(&Join::Ready(a.mid.sum()), &a.norm2, a.ln2, a.stats2)?; // 5
            let (pre, form, dropout) = a.gelu_parts();
            b.gelu(pre, form, dropout, a.act) // 6
        }
        // The sum that enters is kept, the branch that led to it need not be.
        Recompute::Block => halves(b, a, &Join::Ready(a.x.sum())),
    }
}

fn tail(b: &mut dyn Backend, t: &Tail, x: Mat) -> Result<()> {
    match t {
        Tail::PoolNorm { pools, pooled, norm, stats, y } => {
            for (pool, to) in pools {
                b.pool(*pool, x, *to)?; // 1
            }
            b.layernorm(&Join::Ready(*pooled), norm, *y, *stats) // 2
        }
        Tail::NormPool { norm, stats, tokens, pool, y } => {
            b.layernorm(&Join::Ready(x), norm, *tokens, *stats)?; // 1
            b.pool(*pool, *tokens, *y) // 2
        }
        Tail::Map(map) => map_head(b, map, x),
    }
}

fn map_head(b: &mut dyn Backend, m: &MapHead, x: Mat) -> Result<()> {
    b.layernorm(&Join::Ready(x), &m.norm, m.tokens, m.stats)?; // 1
    b.matmul(m.probe, &m.q, Epilogue::Bias, m.q_out)?; // 2
    b.matmul(m.tokens, &m.kv, Epilogue::Bias, m.kv_out)?; // 3
    b.probe_attention(m.heads, m.q_out, m.kv_out, m.p, m.o)?; // 4
    b.matmul(m.o, &m.proj, Epilogue::Bias, m.a)?; // 5
    b.layernorm(&Join::Ready(m.a), &m.norm2, m.ln, m.stats2)?; // 6
    b.matmul(m.ln, &m.fc1, m.gelu, m.act)?; // 7
    b.matmul(m.act, &m.fc2, Epilogue::BiasResidual(m.a), m.y) // 8
}

fn head(b: &mut dyn Backend, h: &Head) -> Result<()> {
    if let Some(rep) = &h.rep {
        b.matmul(rep.pooled, &rep.linear, Epilogue::BiasTanh, h.features)?; // 1
    }
    for (linear, features, epilogue, _) in &h.heads {
        b.matmul(*features, linear, *epilogue, h.logits)?; // 2
    }
    b.scale(h.logits, 1.0 / h.heads.len() as f32) // 3
}
