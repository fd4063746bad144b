//! The backward pass: gradient of the logits → gradients of the parameters. The numbers are those of
//! [`super::forward`], descending. It ends at the first trained block.

use crate::backend::{Backend, InputGrad, Join, Mask, Write};
use crate::error::Result;

use super::block::{Attention, Block, Mlp};
use super::graph::{BlockScratch, Graph, Head, MapHead, Stem, Tail};
use super::recompute;

/// Gradients of every trained parameter.
pub(super) fn backward(b: &mut dyn Backend, g: &Graph) -> Result<()> {
    head(b, &g.head)?;
    tail(b, g)?;
    // Only a tail that pools the stream itself leaves the last join to do; the others end with a LayerNorm that does it.
    if let Tail::PoolNorm { .. } | Tail::Pool { .. } = g.tail {
        b.residual_backward(&g.last, g.above().d_x, g.above().d_branch, g.last_bias())?;
    }
    let [of_stem, of_blocks @ .., of_head] = &g.gradients_from[..] else { unreachable!("of every depth") };
    b.gradients_done(*of_head)?;
    for (layer, from) in g.blocks.iter().zip(of_blocks).skip(g.first_trained_block).rev() {
        recompute::restore(b, layer)?;
        block(b, layer, &g.scratch)?;
        b.gradients_done(*from)?;
    }
    if g.train_stem {
        stem(b, &g.stem, &g.scratch)?;
        b.gradients_done(*of_stem)?;
    }
    Ok(())
}

/// Leaves the gradient of the pooled vector in `d_pooled`.
fn head(b: &mut dyn Backend, h: &Head) -> Result<()> {
    b.scale(h.d_logits, 1.0 / h.heads.len() as f32)?; // 3
    for class in &h.heads {
        let d_x = match &h.rep {
            Some(_) => InputGrad::Tanh { d: class.d_features, y: class.features },
            None => InputGrad::Plain(class.d_features),
        };
        b.matmul_backward(h.d_logits, class.features, &class.linear, d_x)?; // 2
    }
    if let Some(rep) = &h.rep {
        b.matmul_backward(rep.d_pre, rep.pooled, &rep.linear, InputGrad::Plain(rep.d_pooled))?; // 1
    }
    Ok(())
}

/// From `d_pooled` to `d_x`, the gradient of the residual stream, and to the gradient that the last block's MLP reads.
fn tail(b: &mut dyn Backend, g: &Graph) -> Result<()> {
    let (last, s, d_bias) = (&g.last, g.above(), g.last_bias());
    match &g.tail {
        Tail::PoolNorm { pools, pooled, norm, stats, d_pooled, .. } => {
            let (pooled, d) = (Join::Ready(*pooled), *d_pooled);
            b.layernorm_backward(s.d_pooled, &pooled, norm, *stats, d, Write::Assign, d, None)?; // 2
            for (i, part) in pools.iter().enumerate() {
                b.pool_backward(part.pool, part.d_y, s.d_x, Write::add_if(i > 0))?; // 1
            }
            Ok(())
        }
        Tail::Norm { norm, stats, .. } => {
            b.layernorm_backward(s.d_pooled, last, norm, *stats, s.d_x, Write::Assign, s.d_branch, d_bias) // 1
        }
        Tail::NormPool { norm, stats, pools, .. } => {
            for (i, part) in pools.iter().enumerate() {
                b.pool_backward(part.pool, part.d_y, s.d_ln, Write::add_if(i > 0))?; // 2
            }
            b.layernorm_backward(s.d_ln, last, norm, *stats, s.d_x, Write::Assign, s.d_branch, d_bias) // 1
        }
        Tail::Pool { pools, .. } => {
            for (i, part) in pools.iter().enumerate() {
                b.pool_backward(part.pool, part.d_y, s.d_x, Write::add_if(i > 0))?; // 1
            }
            Ok(())
        }
        Tail::Map(map) => map_head(b, map, g),
    }
}

fn map_head(b: &mut dyn Backend, m: &MapHead, g: &Graph) -> Result<()> {
    let (last, s, d_bias) = (&g.last, g.above(), g.last_bias());
    let d_a = s.d_pooled;
    b.matmul_backward(d_a, m.act, &m.fc2, m.gelu.gradient(m.d_pre))?; // 8
    b.matmul_backward(m.d_pre, m.ln, &m.fc1, InputGrad::Plain(m.d_ln))?; // 7
    b.layernorm_backward(m.d_ln, &Join::Ready(m.a), &m.norm2, m.stats2, d_a, Write::Add, d_a, m.proj.d_bias)?; // 6
    b.matmul_backward(d_a, m.o, &m.proj, InputGrad::Plain(m.d_o))?; // 5
    b.query_attention_backward(m.heads, m.q_out, m.kv_out, m.p, Mask::NONE, m.d_o, m.d_q, m.d_kv)?; // 4
    b.matmul_backward(m.d_kv, m.tokens, &m.kv, InputGrad::Plain(s.d_ln))?; // 3
    b.matmul_backward(m.d_q, m.probe, &m.q, m.d_probe)?; // 2
    b.layernorm_backward(s.d_ln, last, &m.norm, m.stats, s.d_x, Write::Assign, s.d_branch, d_bias) // 1
}

/// On entry, `above.d_x` holds the gradient of the block's output (and `above.d_branch` that of its MLP branch). On
/// return, `s` holds those of its input.
fn block(b: &mut dyn Backend, a: &Block, s: &BlockScratch) -> Result<()> {
    let above = &a.above;
    b.matmul_backward(above.d_branch, a.act, &a.fc2, a.mlp.gradient(above))?; // 6
    mlp(b, a)?; // 5
    let d_bias = a.proj.d_bias;
    b.layernorm_backward(
        above.d_ln,
        &a.mid,
        &a.norm2,
        a.stats2,
        above.d_x,
        Write::Add,
        above.d_branch,
        d_bias,
    )?; // 4
    b.matmul_backward(above.d_branch, a.o, &a.proj, InputGrad::Plain(above.d_o))?; // 3
    attention(b, a, s)?; // 2
    b.layernorm_backward(s.d_ln, &a.x, &a.norm1, a.stats1, s.d_x, Write::Add, s.d_branch, a.bias_below) // 1
}

/// From the gradient of what fc2 reads to `above.d_ln`. A GELU is done: fc2's product took it back.
fn mlp(b: &mut dyn Backend, a: &Block) -> Result<()> {
    let s = &a.above;
    match &a.mlp {
        Mlp::Dense(_) => b.matmul_backward(s.d_pre, a.ln2, &a.fc1, InputGrad::Plain(s.d_ln)), // 1
        Mlp::Gated(gate) => {
            if let Some((norm, stats)) = &gate.norm {
                let (join, d) = (Join::Ready(gate.hidden), s.d_hidden);
                b.layernorm_backward(s.d_act, &join, norm, *stats, d, Write::Assign, d, None)?; // 3
            }
            b.swiglu_backward(s.d_hidden, gate.pre, gate.dropout, s.d_pre, a.fc1.d_bias)?; // 2
            b.matmul_backward(s.d_pre, a.ln2, &a.fc1, InputGrad::Plain(s.d_ln)) // 1
        }
    }
}

/// From `above.d_o` to `d_ln`. Below a block of class tokens alone, the stream has the rows of all tokens again.
fn attention(b: &mut dyn Backend, a: &Block, s: &BlockScratch) -> Result<()> {
    let d_o = a.above.d_o;
    match &a.attention {
        Attention::Full { qkv, qkv_out, lse } => {
            // The bias is added before q and k are turned: its gradient is the sum of what was turned back.
            let (dropout, d_bias) = (a.attention_dropout, qkv.d_bias.filter(|_| a.rope.is_none()));
            b.attention_backward(a.heads, *qkv_out, a.o, *lse, dropout, d_o, s.d_qkv, d_bias)?; // 3
            if let Some(rope) = &a.rope {
                b.rotate(rope, a.heads, s.d_qkv.column_range(0, 2 * d_o.cols), true)?; // 2
            }
            b.matmul_backward(s.d_qkv, a.ln1, qkv, InputGrad::Plain(s.d_ln)) // 1
        }
        Attention::ClassToken(c) => {
            let (q, kv, dropout) = (c.q_out, c.kv_out, a.attention_dropout);
            b.query_attention_backward(a.heads, q, kv, c.p, dropout, d_o, c.d_q, c.d_kv)?; // 5
            if let Some(rope) = &a.rope {
                b.rotate(rope, a.heads, c.d_kv.column_range(0, d_o.cols), true)?; // 4
            }
            b.matmul_backward(c.d_kv, a.ln1, &c.kv, InputGrad::Plain(s.d_ln))?; // 3
            b.matmul_backward(c.d_q, c.ln1, &c.q, InputGrad::Add(c.d_ln1))?; // 2
            b.pool_backward(c.pool, a.above.d_x, s.d_x, Write::Assign) // 1
        }
    }
}

fn stem(b: &mut dyn Backend, a: &Stem, s: &BlockScratch) -> Result<()> {
    let (d_x, d_y) = match &a.norm {
        Some(n) => {
            let d_y = if s.d_embed == s.d_x { n.d_x } else { s.d_embed };
            b.layernorm_backward(
                s.d_x,
                &Join::Ready(a.x),
                &n.norm,
                n.stats,
                n.d_x,
                Write::Assign,
                d_y,
                None,
            )?; // 4
            (n.d_x, d_y)
        }
        None => (s.d_x, s.d_embed),
    };
    b.embed_backward(&a.embed, d_x, d_y)?; // 3
    b.matmul_backward(d_y, a.patches, &a.patch_embed, InputGrad::None) // 2
}
