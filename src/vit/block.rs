//! One encoder block: its parameters, its buffers, how its halves join the residual stream, and the two forms of
//! its attention.
//!
//! If only the class token is read after the last block, that block needs the keys and values of all tokens, but
//! only one query per image. Everything after its attention has B rows instead of R = B·T.

use crate::backend::{
    Branch, Epilogue, Gelu, Heads, InputGrad, Join, Linear, Mask, Mat, Norm, Pool, Recompute, Rope, Stats,
};

use super::config::MlpKind;
use super::graph::{BlockScratch, Builder, site};

/// Everything that a block's steps read and write. Q is the number of rows with a query: R, or B class tokens.
#[derive(Clone)]
pub struct Block {
    pub heads: Heads,
    pub attention_dropout: Mask,
    pub norm1: Norm,
    pub attention: Attention,
    /// Turns q and k.
    pub rope: Option<Rope>,
    pub proj: Linear, // D → D
    pub norm2: Norm,
    pub fc1: Linear, // D → M, or 2M
    pub fc2: Linear, // M → D

    pub x: Join,  // [R, D] what enters
    pub ln1: Mat, // [R, D]
    pub stats1: Stats,
    pub o: Mat, // [Q, D]
    pub proj_epilogue: Epilogue,
    pub proj_out: Mat, // the sum itself, or the branch
    pub mid: Join,     // [Q, D] after the attention half
    pub ln2: Mat,      // [Q, D]
    pub stats2: Stats,
    pub mlp: Mlp,
    pub act: Mat, // [Q, M] what fc2 reads
    pub fc2_epilogue: Epilogue,
    pub fc2_out: Mat, // the next block's x, or the branch
    /// Gradients of everything after the attention, Q rows each.
    pub above: BlockScratch,
    /// Gradient of the bias of fc2 in the block below, if that bias is trained: its product reads the gradient of `x`.
    pub bias_below: Option<Mat>,
    /// What the backward pass recomputes first.
    pub recompute: Recompute,
}

/// Which tokens look at the others.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "one per block, and no pass moves it")]
pub enum Attention {
    /// All of them.
    Full {
        qkv: Linear,  // D → 3D
        qkv_out: Mat, // [R, 3D] = [B, T, 3, H, Dh]
        lse: Mat,     // [B·H, T]
    },
    ClassToken(ClassToken),
}

/// One query per image; q and kv are views of one layer, `attn.qkv`.
#[derive(Clone)]
pub struct ClassToken {
    pub pool: Pool,
    pub x: Mat,      // [B, D] the class rows of what enters: the residual stream from here on
    pub q: Linear,   // D → D
    pub ln1: Mat,    // [B, D], a view: the class rows of the block's ln1
    pub q_out: Mat,  // [B, D]
    pub kv: Linear,  // D → 2D
    pub kv_out: Mat, // [R, 2D] = [B, T, 2, H, Dh]
    pub p: Mat,      // [B·H, T]
    pub d_q: Mat,    // [B, D]
    pub d_kv: Mat,   // [R, 2D], a view of the other blocks' d_qkv
    pub d_ln1: Mat,  // [B, D], a view: the class rows of d_ln
}

impl Block {
    pub(super) fn new(
        b: &mut Builder,
        l: usize,
        kept: &[Kept],
        next_x: Mat,
        scratch: &BlockScratch,
    ) -> Block {
        let (c, k) = (b.config, &kept[l]);
        let (attention, above) = Attention::new(b, l, k, scratch);
        let name = |part: &str| format!("blocks.{l}.{part}");
        let gelu_mask = b.mask(c.dropout, l, site::GELU);
        let stream = k.stream();
        let (proj_epilogue, proj_out, mid, fc2_epilogue, fc2_out) = match k.branches {
            None => {
                let mid = Join::Ready(k.mid);
                (Epilogue::BiasResidual(stream), k.mid, mid, Epilogue::BiasResidual(k.mid), next_x)
            }
            Some([attention, mlp]) => {
                let branch = Branch {
                    base: stream,
                    branch: attention,
                    layer_scale: (c.layer_scale > 0.0).then(|| b.param(&name("ls1.gamma"))),
                    dropout: b.mask(c.dropout, l, site::PROJ),
                    drop_path: b.mask(c.drop_path_rate(l), l, site::ATTENTION_PATH),
                    tokens: b.tokens_of(stream),
                };
                (Epilogue::Bias, attention, Join::Branch { sum: k.mid, branch }, Epilogue::Bias, mlp)
            }
        };
        Block {
            heads: Heads { tokens: c.tokens(), heads: c.heads, head_size: c.head_size() },
            attention_dropout: b.mask(c.attention_dropout, l, site::PROBABILITIES),
            norm1: b.norm(&name("norm1")),
            attention,
            rope: b.rope(),
            proj: b.linear(&name("attn.proj")),
            norm2: b.norm(&name("norm2")),
            fc1: b.linear(&name("mlp.fc1")),
            fc2: b.linear(&name("mlp.fc2")),
            x: if l == 0 { Join::Ready(k.x) } else { Self::join_behind(b, l - 1, kept, k.x) },
            ln1: k.ln1,
            stats1: k.stats1,
            o: k.o,
            proj_epilogue,
            proj_out,
            mid,
            ln2: k.ln2,
            stats2: k.stats2,
            mlp: match c.mlp_kind {
                MlpKind::Dense => Mlp::Dense(MlpGelu { pre: k.pre, form: c.gelu, dropout: gelu_mask }),
                MlpKind::Swiglu => Mlp::Gated(Gate {
                    pre: k.pre,
                    dropout: gelu_mask,
                    hidden: k.normed.map_or(k.act, |(hidden, _)| hidden),
                    norm: k.normed.map(|(_, stats)| (b.norm(&name("mlp.norm")), stats)),
                }),
            },
            act: k.act,
            fc2_epilogue,
            fc2_out,
            above,
            bias_below: l
                .checked_sub(1)
                .and_then(|below| b.linear(&format!("blocks.{below}.mlp.fc2")).d_bias),
            // Without a backward there is nothing to compute again.
            recompute: if k.has_backward { b.recompute() } else { Recompute::None },
        }
    }

    /// How the MLP half of block `l` joins the stream. The result, `sum`, is the next block's x.
    pub(super) fn join_behind(b: &Builder, l: usize, kept: &[Kept], sum: Mat) -> Join {
        let (c, k) = (b.config, &kept[l]);
        match k.branches {
            None => Join::Ready(sum),
            Some([_, mlp]) => Join::Branch {
                sum,
                branch: Branch {
                    base: k.mid,
                    branch: mlp,
                    layer_scale: (c.layer_scale > 0.0).then(|| b.param(&format!("blocks.{l}.ls2.gamma"))),
                    dropout: b.mask(c.dropout, l, site::FC2),
                    drop_path: b.mask(c.drop_path_rate(l), l, site::MLP_PATH),
                    tokens: b.tokens_of(sum),
                },
            },
        }
    }
}

/// What stands between the two layers of an MLP.
#[derive(Clone, Copy)]
#[allow(clippy::large_enum_variant, reason = "one per block, and no pass moves it")]
pub enum Mlp {
    /// A GELU, at the end of fc1.
    Dense(MlpGelu),
    /// An operation of its own, and perhaps a LayerNorm.
    Gated(Gate),
}

impl Mlp {
    /// Where the gradient of what fc2 reads goes: through the GELU at once, or to a buffer of its own.
    pub fn gradient(&self, above: &BlockScratch) -> InputGrad {
        match self {
            Mlp::Dense(gelu) => gelu.gradient(above.d_pre),
            Mlp::Gated(_) => InputGrad::Plain(above.d_act),
        }
    }
}

/// `act = norm(dropout(silu(g) ∘ u))` of `pre = [g | u]`.
#[derive(Clone, Copy)]
pub struct Gate {
    pub pre: Mat, // [Q, 2M]
    pub dropout: Mask,
    pub hidden: Mat, // [Q, M]; `act` itself without a norm
    pub norm: Option<(Norm, Stats)>,
}

/// The GELU between the two dense layers of an MLP, with dropout on its output.
#[derive(Clone, Copy)]
pub struct MlpGelu {
    /// `[Q, M]`: what fc1 gives, kept for the backward. Without a backward it has no rows.
    pub pre: Mat,
    pub form: Gelu,
    pub dropout: Mask,
}

impl MlpGelu {
    /// The end of fc1.
    pub fn epilogue(&self) -> Epilogue {
        let Self { pre, form, dropout } = *self;
        Epilogue::BiasGelu { pre: (pre.rows > 0).then_some(pre), form, dropout }
    }

    /// fc2's backward, fused with the GELU's derivative, into `d_pre: [Q, M]`.
    pub fn gradient(&self, d_pre: Mat) -> InputGrad {
        let Self { pre, form, dropout } = *self;
        InputGrad::Gelu { d_pre, pre, form, dropout }
    }
}

impl Attention {
    /// Attention, and the gradients of what follows it. Those of a class token have their own memory only if they are
    /// needed at the same time as those of all tokens.
    fn new(b: &mut Builder, l: usize, k: &Kept, scratch: &BlockScratch) -> (Attention, BlockScratch) {
        let (d, tokens) = (b.config.width, b.config.tokens());
        let qkv = b.linear(&format!("blocks.{l}.attn.qkv"));
        match k.attention {
            KeptAttention::Full { qkv: qkv_out, lse } => (Attention::Full { qkv, qkv_out, lse }, *scratch),
            KeptAttention::ClassToken { x, q, kv, p } => {
                // B, or 0 where there is no backward.
                let samples = scratch.d_x.rows / tokens;
                let class = ClassToken {
                    pool: Pool::Token { tokens, index: 0 },
                    x,
                    q: qkv.outputs(0, d),
                    ln1: k.ln1.every_row(tokens),
                    q_out: q,
                    kv: qkv.outputs(d, 2 * d),
                    kv_out: kv,
                    p,
                    d_q: b.mat("class d_q", samples, d),
                    d_kv: scratch.d_qkv.column_range(0, 2 * d),
                    d_ln1: scratch.d_ln.every_row(tokens),
                };
                let d_x = b.stream("class d_x", samples, d);
                let few = |of: Mat| of.first_rows(samples.min(of.rows));
                let above = BlockScratch {
                    d_x,
                    d_branch: b.branch_of("class d_branch", d_x, k.branches.is_some()),
                    d_ln: scratch.d_ln.first_rows(samples),
                    d_o: scratch.d_o.first_rows(samples),
                    d_pre: scratch.d_pre.first_rows(samples),
                    d_act: few(scratch.d_act),
                    d_hidden: few(scratch.d_hidden),
                    ..*scratch
                };
                (Attention::ClassToken(class), above)
            }
        }
    }
}

/// The activations of one block.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub(super) x: Mat,
    ln1: Mat,
    stats1: Stats,
    attention: KeptAttention,
    o: Mat,
    mid: Mat,
    ln2: Mat,
    stats2: Stats,
    /// What fc1 gives, for the backward; without one it has no rows, unless the MLP is gated.
    pre: Mat,
    /// What the norm in front of fc2 reads, and its statistics.
    normed: Option<(Mat, Stats)>,
    act: Mat,
    has_backward: bool,
    /// Outputs of the two halves before they join the stream; only where the model has masks or LayerScale.
    branches: Option<[Mat; 2]>,
}

#[derive(Clone, Copy)]
enum KeptAttention {
    Full { qkv: Mat, lse: Mat },
    ClassToken { x: Mat, q: Mat, kv: Mat, p: Mat },
}

/// Which buffers a block has.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// What follows the attention has a row for the class token alone.
    pub(super) class_token: bool,
    pub(super) has_backward: bool,
    /// Both halves leave a branch, which joins the stream in the next LayerNorm.
    pub(super) has_branches: bool,
}

/// Buffers that a block shares with another one.
#[derive(Clone, Copy)]
pub(super) enum Reuse {
    /// None: the block is the first.
    Nothing,
    /// Those that the backward computes again before it reads them.
    Recomputed(Kept),
    /// All of them: neither block has a backward.
    Everything(Kept),
}

impl Kept {
    /// Buffers of R rows are shared as far as `reuse` goes. Those of a class token are small, and the block's own.
    pub(super) fn new(b: &mut Builder, name: &str, form: Form, reuse: Reuse) -> Kept {
        let (r, d, m) = (b.rows(), b.config.width, b.config.mlp);
        let (all, recomputed) = match reuse {
            Reuse::Nothing => (None, None),
            Reuse::Recomputed(kept) => (None, Some(kept)),
            Reuse::Everything(kept) => (Some(kept), Some(kept)),
        };
        let at = |least: Recompute| all.or(recomputed.filter(|_| b.recompute() >= least));
        let (by_ln_gelu, by_block) = (at(Recompute::LnGelu), at(Recompute::Block));
        // After the attention.
        let is_small = form.class_token;
        let (name_q, q) = if is_small { (format!("{name} class"), b.samples) } else { (name.to_owned(), r) };
        let (all_q, by_ln_gelu_q, by_block_q) =
            if is_small { (None, None, None) } else { (all, by_ln_gelu, by_block) };
        let gated = b.config.mlp_kind == MlpKind::Swiglu;
        let pre_rows = if form.has_backward || gated { q } else { 0 };
        let fc1 = b.config.fc1_width();
        Kept {
            x: all.map_or_else(|| b.stream(format!("{name} x"), r, d), |k| k.x),
            ln1: by_ln_gelu.map_or_else(|| b.mat(format!("{name} ln1"), r, d), |k| k.ln1),
            stats1: by_block.map_or_else(|| b.stats(&format!("{name} ln1"), r), |k| k.stats1),
            attention: KeptAttention::new(b, name, is_small, by_block.map(|k| k.attention)),
            o: by_block_q.map_or_else(|| b.mat(format!("{name_q} o"), q, d), |k| k.o),
            mid: by_block_q.map_or_else(|| b.stream(format!("{name_q} mid"), q, d), |k| k.mid),
            ln2: by_ln_gelu_q.map_or_else(|| b.mat(format!("{name_q} ln2"), q, d), |k| k.ln2),
            stats2: by_block_q.map_or_else(|| b.stats(&format!("{name_q} ln2"), q), |k| k.stats2),
            pre: by_block_q.map_or_else(|| b.mat(format!("{name_q} pre"), pre_rows, fc1), |k| k.pre),
            normed: b.config.mlp_norm.then(|| {
                let hidden = by_ln_gelu_q.and_then(|k| k.normed).map(|(hidden, _)| hidden);
                let stats = by_block_q.and_then(|k| k.normed).map(|(_, stats)| stats);
                (
                    hidden.unwrap_or_else(|| b.mat(format!("{name_q} hidden"), q, m)),
                    stats.unwrap_or_else(|| b.stats(&format!("{name_q} mlp norm"), q)),
                )
            }),
            has_backward: form.has_backward,
            act: by_ln_gelu_q.map_or_else(|| b.mat(format!("{name_q} act"), q, m), |k| k.act),
            branches: form.has_branches.then(|| {
                let attention = by_block_q.and_then(|k| k.branches).map(|[attention, _]| attention);
                // The MLP's branch joins the stream in the next block, whose backward still reads it.
                let mlp = all_q.and_then(|k| k.branches).map(|[_, mlp]| mlp);
                [
                    attention.unwrap_or_else(|| b.mat(format!("{name_q} attention branch"), q, d)),
                    mlp.unwrap_or_else(|| b.mat(format!("{name_q} mlp branch"), q, d)),
                ]
            }),
        }
    }

    /// The residual stream that the attention half is added to.
    fn stream(&self) -> Mat {
        match self.attention {
            KeptAttention::Full { .. } => self.x,
            KeptAttention::ClassToken { x, .. } => x,
        }
    }
}

impl KeptAttention {
    /// `shared` is that of a block of all tokens.
    fn new(b: &mut Builder, name: &str, class_token: bool, shared: Option<KeptAttention>) -> Self {
        let (r, n, d) = (b.rows(), b.samples, b.config.width);
        let (heads, tokens) = (b.config.heads, b.config.tokens());
        match (class_token, shared) {
            (false, Some(shared)) => shared,
            (false, None) => KeptAttention::Full {
                qkv: b.mat(format!("{name} qkv"), r, 3 * d),
                lse: b.plan.statistics(format!("{name} lse"), n * heads, tokens),
            },
            (true, shared) => KeptAttention::ClassToken {
                x: b.stream(format!("{name} class x"), n, d),
                q: b.mat(format!("{name} class q"), n, d),
                kv: match shared {
                    Some(KeptAttention::Full { qkv, .. }) => qkv.column_range(0, 2 * d),
                    _ => b.mat(format!("{name} kv"), r, 2 * d),
                },
                p: b.plan.statistics(format!("{name} p"), n * heads, tokens),
            },
        }
    }
}
