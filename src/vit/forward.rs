//! The forward pass: pixels → logits. Read each numbered line beside its counterpart in [`super::backward`].

use crate::backend::{Backend, Epilogue, Join, Mask, Mat, Normalise};
use crate::error::Result;

use super::block::{Attention, Block, Mlp};
use super::graph::{Graph, Head, MapHead, Stem, Tail};
use super::recompute;

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
    b.embed(&s.embed, s.x)?; // 3
    match s.norm {
        Some(n) => b.layernorm(&Join::Ready(s.x), &n.norm, n.y, n.stats), // 4
        None => Ok(()),
    }
}

fn block(b: &mut dyn Backend, a: &Block) -> Result<()> {
    b.layernorm(&a.x, &a.norm1, a.ln1, a.stats1)?; // 1
    attention(b, a)?; // 2
    b.matmul(a.o, &a.proj, a.proj_epilogue, a.proj_out)?; // 3
    b.layernorm(&a.mid, &a.norm2, a.ln2, a.stats2)?; // 4
    mlp(b, a)?; // 5
    b.matmul(a.act, &a.fc2, a.fc2_epilogue, a.fc2_out) // 6
}

/// From `ln2` to `act`.
pub(super) fn mlp(b: &mut dyn Backend, a: &Block) -> Result<()> {
    match &a.mlp {
        Mlp::Dense(gelu) => recompute::matmul_gelu(b, a, gelu), // 1
        Mlp::Gated(gate) => {
            b.matmul(a.ln2, &a.fc1, Epilogue::Bias, gate.pre)?; // 1
            b.swiglu(gate.pre, gate.dropout, gate.hidden)?; // 2
            let Some((norm, stats)) = &gate.norm else { return Ok(()) };
            b.layernorm(&Join::Ready(gate.hidden), norm, a.act, *stats) // 3
        }
    }
}

/// From `ln1` to `o`. For the class token alone, its rows of the stream are copied first: everything after uses only
/// those.
pub(super) fn attention(b: &mut dyn Backend, a: &Block) -> Result<()> {
    match &a.attention {
        Attention::Full { qkv, qkv_out, lse } => {
            b.matmul(a.ln1, qkv, Epilogue::Bias, *qkv_out)?; // 1
            if let Some(rope) = &a.rope {
                b.rotate(rope, a.heads, qkv_out.column_range(0, 2 * a.o.cols), false)?; // 2
            }
            b.attention(a.heads, *qkv_out, a.o, *lse, a.attention_dropout) // 3
        }
        Attention::ClassToken(c) => {
            b.pool(c.pool, a.x.sum(), c.x)?; // 1
            b.matmul(c.ln1, &c.q, Epilogue::Bias, c.q_out)?; // 2
            b.matmul(a.ln1, &c.kv, Epilogue::Bias, c.kv_out)?; // 3
            // The class token's query is not turned.
            if let Some(rope) = &a.rope {
                b.rotate(rope, a.heads, c.kv_out.column_range(0, a.o.cols), false)?; // 4
            }
            b.query_attention(a.heads, c.q_out, c.kv_out, c.p, a.o, a.attention_dropout) // 5
        }
    }
}

fn tail(b: &mut dyn Backend, t: &Tail, x: Mat) -> Result<()> {
    match t {
        Tail::PoolNorm { pools, pooled, norm, stats, y, .. } => {
            for part in pools {
                b.pool(part.pool, x, part.y)?; // 1
            }
            b.layernorm(&Join::Ready(*pooled), norm, *y, *stats) // 2
        }
        Tail::Norm { norm, stats, y } => b.layernorm(&Join::Ready(x), norm, *y, *stats), // 1
        Tail::NormPool { norm, stats, tokens, pools, .. } => {
            b.layernorm(&Join::Ready(x), norm, *tokens, *stats)?; // 1
            pools.iter().try_for_each(|part| b.pool(part.pool, *tokens, part.y)) // 2
        }
        Tail::Pool { pools, .. } => pools.iter().try_for_each(|part| b.pool(part.pool, x, part.y)), // 1
        Tail::Map(map) => map_head(b, map, x),
    }
}

fn map_head(b: &mut dyn Backend, m: &MapHead, x: Mat) -> Result<()> {
    b.layernorm(&Join::Ready(x), &m.norm, m.tokens, m.stats)?; // 1
    b.matmul(m.probe, &m.q, Epilogue::Bias, m.q_out)?; // 2
    b.matmul(m.tokens, &m.kv, Epilogue::Bias, m.kv_out)?; // 3
    b.query_attention(m.heads, m.q_out, m.kv_out, m.p, m.o, Mask::NONE)?; // 4
    b.matmul(m.o, &m.proj, Epilogue::Bias, m.a)?; // 5
    b.layernorm(&Join::Ready(m.a), &m.norm2, m.ln, m.stats2)?; // 6
    b.matmul(m.ln, &m.fc1, m.gelu.epilogue(), m.act)?; // 7
    b.matmul(m.act, &m.fc2, Epilogue::BiasResidual(m.a), m.y) // 8
}

fn head(b: &mut dyn Backend, h: &Head) -> Result<()> {
    if let Some(rep) = &h.rep {
        b.matmul(rep.pooled, &rep.linear, Epilogue::BiasTanh, h.features)?; // 1
    }
    for class in &h.heads {
        b.matmul(class.features, &class.linear, class.epilogue, h.logits)?; // 2
    }
    b.scale(h.logits, 1.0 / h.heads.len() as f32) // 3
}
