//! Every buffer, parameter and constant of a pass, by name: what [`super::forward`] and [`super::backward`] read.
//!
//! The graph is built once. All decisions are made here and in [`super::block`]: residual by epilogue or by
//! LayerNorm, the place of the final norm, the masks, and what the last block leaves out. The passes only match on
//! what was built. Shapes: R = B·T rows.

use crate::backend::{
    Embed, Epilogue, Heads, InputGrad, Join, Linear, Mask, Mat, MemoryPlan, Norm, PatchGrid, Pool, Recompute,
    Rope, Stats, Storage,
};

use super::Mode;
use super::block::{Block, Form, Kept, Mlp, MlpGelu, Reuse};
use super::config::{MlpKind, ModelConfig, NormPlace, PoolKind};
use super::params::ParamLayout;

/// One pass of the model.
#[derive(Clone)]
pub struct Graph {
    pub stem: Stem,
    pub blocks: Vec<Block>,
    /// How the last block's output joins the residual stream.
    pub last: Join,
    pub tail: Tail,
    pub head: Head,
    pub scratch: BlockScratch,
    /// Blocks from this one on, and the stem if it is 0, are reached by the backward; `blocks.len()`: none is.
    pub first_trained_block: usize,
    pub train_stem: bool,
    /// The first gradient of the stem, of each block, and of what follows them: final once the backward has
    /// passed it.
    pub gradients_from: Vec<usize>,
}

/// From pixels to tokens.
#[derive(Clone)]
pub struct Stem {
    pub grid: PatchGrid,
    pub patches: Mat,        // [R, ph·pw·3], zero rows for extra tokens
    pub patch_embed: Linear, // its bias is added by `embed`
    pub embed: Embed,
    pub x: Mat, // [R, D]
    /// Normalises `x` into the first block's.
    pub norm: Option<StemNorm>,
}

/// The norm in front of the first block.
#[derive(Clone, Copy)]
pub struct StemNorm {
    pub norm: Norm,
    pub stats: Stats,
    pub y: Mat,   // [R, D] the residual stream
    pub d_x: Mat, // [R, D] gradient of the stem's x
}

/// From tokens to one vector per image.
#[derive(Clone)]
pub enum Tail {
    /// Pool, then normalise: class tokens (where it equals normalising first), and timm's `fc_norm`.
    PoolNorm { pools: Vec<PooledPart>, pooled: Mat, norm: Norm, stats: Stats, y: Mat, d_pooled: Mat },
    /// Normalise: the last block has left the class tokens alone.
    Norm { norm: Norm, stats: Stats, y: Mat },
    /// Normalise every token, then pool.
    NormPool { norm: Norm, stats: Stats, tokens: Mat, pools: Vec<PooledPart>, y: Mat },
    /// Pool alone.
    Pool { pools: Vec<PooledPart>, y: Mat },
    /// Normalise every token, then attend to them with one learned query (big_vision's MAP head).
    Map(Box<MapHead>),
}

/// One pool of several: rows of their matrix if each has a classifier, columns if one classifier reads them all.
#[derive(Clone)]
pub struct PooledPart {
    pub pool: Pool,
    pub y: Mat,   // [B, D]
    pub d_y: Mat, // [B, D]
}

/// `y = a + mlp(layernorm(a))`, `a = attention(probe, tokens)`.
#[derive(Clone)]
pub struct MapHead {
    pub norm: Norm,
    pub stats: Stats,
    pub tokens: Mat, // [R, D] normalised
    pub heads: Heads,
    pub probe: Mat, // [1, D], a parameter
    pub d_probe: InputGrad,
    pub q: Linear,
    pub q_out: Mat, // [1, D]
    pub kv: Linear,
    pub kv_out: Mat, // [R, 2D]
    pub p: Mat,      // [B·H, T]
    pub o: Mat,      // [B, D]
    pub proj: Linear,
    pub a: Mat, // [B, D]
    pub norm2: Norm,
    pub stats2: Stats,
    pub ln: Mat, // [B, D]
    pub fc1: Linear,
    pub gelu: MlpGelu,
    pub act: Mat, // [B, M]
    pub fc2: Linear,
    pub y: Mat,     // [B, D]
    pub d_q: Mat,   // [1, D]
    pub d_o: Mat,   // [B, D]
    pub d_ln: Mat,  // [B, D]
    pub d_pre: Mat, // [B, M]
    pub d_kv: Mat,  // [R, 2D]
}

/// The classifier.
#[derive(Clone)]
pub struct Head {
    /// The pooled vector, or the representation layer's output.
    pub features: Mat,
    pub d_features: Mat,
    /// `tanh(pooled·Wᵀ + b)`
    pub rep: Option<Rep>,
    /// One per extra token that is classified; their logits are averaged.
    pub heads: Vec<ClassHead>,
    pub logits: Mat,   // [B, C]
    pub d_logits: Mat, // [B, C]
    pub samples: Mat,  // [B, 3]
}

/// One linear classifier; those after the first add their logits to its.
#[derive(Clone, Copy)]
pub struct ClassHead {
    pub linear: Linear,
    pub features: Mat, // [B, D] or [B, R]
    pub epilogue: Epilogue,
    pub d_features: Mat,
}

#[derive(Clone, Copy)]
pub struct Rep {
    pub linear: Linear,
    pub pooled: Mat,   // [B, D]
    pub d_pooled: Mat, // [B, D]
    pub d_pre: Mat,    // [B, R]
}

/// Gradients of a block's buffers: one set for all blocks, and one with B rows instead of R for class tokens alone.
#[derive(Clone, Copy)]
pub struct BlockScratch {
    pub d_x: Mat,      // [R, D] of the residual stream
    pub d_branch: Mat, // [R, D] of a block half; d_x itself where the epilogue adds the residual and products can read it
    pub d_embed: Mat,  // [R, D] of the patch embedding: d_x, or d_branch where products cannot read that
    pub d_ln: Mat,     // [R, D]
    pub d_o: Mat,      // [R, D]
    pub d_qkv: Mat,    // [R, 3D]
    pub d_pre: Mat,    // [R, M], or [R, 2M] for a SwiGLU
    pub d_act: Mat,    // [R, M] of what fc2 reads; no rows where the product makes d_pre
    pub d_hidden: Mat, // [R, M] of what the norm in an MLP reads: d_act itself where there is none
    pub d_pooled: Mat, // [B, D] (of every pooled token)
}

impl BlockScratch {
    /// For `samples` samples; a graph without a backward has the fields, but no memory behind them.
    pub(super) fn new(b: &mut Builder, samples: usize, joined_by_norm: bool) -> BlockScratch {
        let (r, d, m) = (samples * b.config.tokens(), b.config.width, b.config.mlp);
        let d_x = b.stream("d_x", r, d);
        let d_branch = b.branch_of("d_branch", d_x, joined_by_norm);
        let gated = if b.config.mlp_kind == MlpKind::Swiglu { r } else { 0 };
        let normed = b.config.mlp_norm;
        let d_act = b.mat("d_act", if normed { r } else { gated }, m);
        BlockScratch {
            d_x,
            d_branch,
            d_embed: if d_branch.dtype == d_x.dtype { d_x } else { d_branch },
            d_ln: b.mat("d_ln", r, d),
            d_o: b.mat("d_o", r, d),
            d_qkv: b.mat("d_qkv", r, 3 * d),
            d_pre: b.mat("d_pre", r, b.config.fc1_width()),
            d_act,
            d_hidden: if normed { b.mat("d_hidden", r, m) } else { d_act },
            d_pooled: b.mat("d_pooled", samples * b.config.extra_tokens.max(1), b.config.pooled_width()),
        }
    }
}

/// Where in a block a mask is drawn; the site is `layer · SITES + place`.
pub(super) mod site {
    pub(in crate::vit) const PROJ: u32 = 0;
    pub(in crate::vit) const ATTENTION_PATH: u32 = 1;
    pub(in crate::vit) const GELU: u32 = 2;
    pub(in crate::vit) const FC2: u32 = 3;
    pub(in crate::vit) const MLP_PATH: u32 = 4;
    pub(in crate::vit) const PROBABILITIES: u32 = 5;
    pub(in crate::vit) const SITES: u32 = 8;
}

/// Builds a [`Graph`]: looks parameters up by name and places activations in the plan.
pub(super) struct Builder<'a> {
    pub(super) config: &'a ModelConfig,
    layout: &'a ParamLayout,
    pub(super) plan: &'a mut MemoryPlan,
    pub(super) samples: usize,
}

impl Builder<'_> {
    pub(super) fn linear(&self, name: &str) -> Linear {
        let weight = self.layout.get(&format!("{name}.weight"));
        let (bias, d_bias) = self.layout.bias(name);
        Linear { weight: weight.mat(), bias, d_weight: weight.grad(), d_bias }
    }

    pub(super) fn norm(&self, name: &str) -> Norm {
        let gamma = self.layout.get(&format!("{name}.weight"));
        let beta = self.layout.get(&format!("{name}.bias"));
        Norm {
            gamma: gamma.mat(),
            beta: beta.mat(),
            d_gamma: gamma.grad(),
            d_beta: beta.grad(),
            eps: self.config.ln_eps,
        }
    }

    pub(super) fn param(&self, name: &str) -> (Mat, Option<Mat>) {
        let param = self.layout.get(name);
        (param.mat(), param.grad())
    }

    /// The angles by which q and k are turned, if the model has rotary positions.
    pub(super) fn rope(&self) -> Option<Rope> {
        let pairs = self.config.rope.pairs();
        self.layout.find("rope").map(|table| Rope { table: table.mat(), pairs })
    }

    pub(super) fn mat(&mut self, name: impl Into<String>, rows: usize, cols: usize) -> Mat {
        self.plan.activation(name, rows, cols)
    }

    /// A part of the residual stream, or of its gradient.
    pub(super) fn stream(&mut self, name: impl Into<String>, rows: usize, cols: usize) -> Mat {
        self.plan.stream(name, rows, cols)
    }

    /// The buffer for the gradient of a block half: its own if the half is a branch, or if products cannot read the
    /// stream's type; otherwise the gradient of the stream.
    pub(super) fn branch_of(&mut self, name: &str, d_x: Mat, joined_by_norm: bool) -> Mat {
        let Storage { activations, residual, .. } = self.plan.storage();
        if joined_by_norm || activations != residual { self.mat(name, d_x.rows, d_x.cols) } else { d_x }
    }

    pub(super) fn stats(&mut self, name: &str, rows: usize) -> Stats {
        Stats {
            mean: self.plan.statistics(format!("{name} mean"), rows, 1),
            rstd: self.plan.statistics(format!("{name} rstd"), rows, 1),
        }
    }

    pub(super) fn mask(&self, rate: f32, layer: usize, place: u32) -> Mask {
        Mask { rate, site: layer as u32 * site::SITES + place }
    }

    /// R
    pub(super) fn rows(&self) -> usize {
        self.samples * self.config.tokens()
    }

    /// Rows that a sample has in a matrix: T, or 1 for class tokens alone.
    pub(super) fn tokens_of(&self, mat: Mat) -> usize {
        mat.rows / self.samples
    }

    pub(super) fn recompute(&self) -> Recompute {
        self.plan.storage().recompute
    }
}

/// Rows `index·rows..` of a matrix; of one without memory, itself.
fn part(of: Mat, index: usize, rows: usize) -> Mat {
    match of.rows {
        0 => of,
        _ => Mat { offset: of.offset + index * rows * of.ld * of.dtype.bytes(), rows, ..of },
    }
}

impl Graph {
    pub(super) fn new(
        config: &ModelConfig,
        layout: &ParamLayout,
        samples: usize,
        mode: Mode,
        pruned: bool,
        plan: &mut MemoryPlan,
    ) -> Self {
        let mut b = Builder { config, layout, plan, samples };
        let (r, d, depth) = (b.rows(), config.width, config.depth);

        // Depth 0 is the stem, 1..=L are the blocks.
        let first_depth = layout.first_trainable_depth().unwrap_or(depth + 1);
        let first_trained_block = first_depth.saturating_sub(1).min(depth);
        let keeps = |layer: usize| mode == Mode::Train && layer >= first_trained_block;
        // Masks and LayerScale need the branch by itself; otherwise the matmul's epilogue adds the residual.
        let joined_by_norm = config.dropout > 0.0 || config.drop_path > 0.0 || config.layer_scale > 0.0;

        // After `whole` blocks of all tokens, one block of the class token alone, or none.
        let whole = depth - usize::from(pruned);

        let patches = b.mat("patches", r, config.patch_grid().patch_len());
        // The first block without a backward, and the first with one: those after it share their buffers.
        let mut first: [Option<Kept>; 2] = [None, None];
        let kept: Vec<Kept> = (0..depth)
            .map(|l| {
                let form =
                    Form { class_token: l == whole, has_backward: keeps(l), has_branches: joined_by_norm };
                let name = if keeps(l) || form.class_token { format!("block {l}") } else { "shared".into() };
                let first = &mut first[usize::from(keeps(l))];
                let reuse = match *first {
                    None => Reuse::Nothing,
                    Some(kept) if keeps(l) => Reuse::Recomputed(kept),
                    Some(kept) => Reuse::Everything(kept),
                };
                let kept = Kept::new(&mut b, &name, form, reuse);
                first.get_or_insert(kept);
                kept
            })
            .collect();
        let x_last = b.stream("x", if pruned { samples } else { r }, d);

        let with_gradients = if mode == Mode::Train { samples } else { 0 };
        let scratch = BlockScratch::new(&mut b, with_gradients, joined_by_norm);
        let stem = Self::stem(&mut b, patches, kept[0].x, &scratch);
        let next_x = |l: usize| kept.get(l + 1).map_or(x_last, |next| next.x);
        let blocks = (0..depth).map(|l| Block::new(&mut b, l, &kept, next_x(l), &scratch)).collect();
        let last = Block::join_behind(&b, depth - 1, &kept, x_last);

        let tail = Self::tail(&mut b, x_last, &scratch, mode, pruned);
        let head = Self::head(&mut b, &tail, &scratch, mode);
        let train_stem = first_depth == 0;
        let gradients_from = (0..=depth + 1).map(|depth| layout.gradients_from(depth)).collect();
        Self { stem, blocks, last, tail, head, scratch, first_trained_block, train_stem, gradients_from }
    }

    fn stem(b: &mut Builder, patches: Mat, first: Mat, scratch: &BlockScratch) -> Stem {
        let c = b.config;
        let patch_embed = b.linear("patch_embed.proj");
        let has = [c.extra_tokens > 0, c.extra_tokens > 1, c.registers > 0];
        let tokens = ["cls_token", "dist_token", "reg_token"];
        let (x, norm) = if c.norm_pre {
            let x = b.stream("embedded", first.rows, first.cols);
            let like_stream = scratch.d_ln.dtype == x.dtype;
            let d_x =
                if like_stream { scratch.d_ln } else { b.stream("d_embedded", scratch.d_x.rows, x.cols) };
            let norm =
                StemNorm { norm: b.norm("norm_pre"), stats: b.stats("norm_pre", x.rows), y: first, d_x };
            (x, Some(norm))
        } else {
            (first, None)
        };
        // Without a position embedding, no row is added to any token.
        let posemb =
            if c.posemb_rows() > 0 { b.param("pos_embed") } else { (patch_embed.bias.first_rows(0), None) };
        Stem {
            grid: c.patch_grid(),
            patches,
            // `embed_backward` sums the bias gradient over patch rows only.
            patch_embed: Linear { d_bias: None, ..patch_embed },
            embed: Embed {
                tokens: c.tokens(),
                extra: c.patch_grid().extra,
                bias: (patch_embed.bias, patch_embed.d_bias),
                extra_tokens: std::array::from_fn(|i| has[i].then(|| b.param(tokens[i]))),
                posemb,
                posemb_first: c.tokens() - c.posemb_rows(),
                dropout: b.mask(c.dropout, c.depth, 0),
            },
            x,
            norm,
        }
    }

    fn tail(b: &mut Builder, x: Mat, scratch: &BlockScratch, mode: Mode, pruned: bool) -> Tail {
        let (c, samples, tokens) = (b.config, b.samples, b.config.tokens());
        let d = c.width;
        let mean = Pool::Mean { tokens, first: c.patch_grid().extra };
        let class = Pool::Token { tokens, index: 0 };
        let whole = |pool: Pool, y: Mat, d_y: Mat| vec![PooledPart { pool, y, d_y }];
        // Every pool of the vector that the head reads.
        let pools = |y: Mat, d_y: Mat| match c.pool {
            PoolKind::TokenGap => [(class, 0), (mean, d)]
                .map(|(pool, first)| PooledPart {
                    pool,
                    y: y.column_range(first, d),
                    d_y: d_y.column_range(first, d),
                })
                .to_vec(),
            PoolKind::Token => whole(class, y, d_y),
            _ => whole(mean, y, d_y),
        };
        match (c.pool, c.norm) {
            (PoolKind::Token | PoolKind::Gap | PoolKind::TokenGap, NormPlace::None) if c.extra_tokens < 2 => {
                let y = b.mat("pooled", samples, c.pooled_width());
                Tail::Pool { pools: pools(y, scratch.d_pooled), y }
            }
            (PoolKind::Token, _) if pruned => Tail::Norm {
                norm: b.norm("norm"),
                stats: b.stats("norm", samples),
                y: b.mat("normed", samples, d),
            },
            (PoolKind::Token, _) => {
                let n = c.extra_tokens;
                let pooled = b.stream("pooled", n * samples, d);
                let d_pooled = Self::d_pooled(b, pooled, scratch, mode);
                let part = |index: usize| PooledPart {
                    pool: Pool::Token { tokens, index },
                    y: part(pooled, index, samples),
                    d_y: part(d_pooled, index, samples),
                };
                Tail::PoolNorm {
                    pools: (0..n).map(part).collect(),
                    pooled,
                    norm: b.norm("norm"),
                    stats: b.stats("norm", n * samples),
                    y: b.mat("normed", n * samples, d),
                    d_pooled,
                }
            }
            (PoolKind::Gap, NormPlace::After) => {
                let pooled = b.stream("pooled", samples, d);
                let d_pooled = Self::d_pooled(b, pooled, scratch, mode);
                Tail::PoolNorm {
                    pools: pools(pooled, d_pooled),
                    pooled,
                    norm: b.norm("fc_norm"),
                    stats: b.stats("norm", samples),
                    y: b.mat("normed", samples, d),
                    d_pooled,
                }
            }
            (PoolKind::Gap | PoolKind::TokenGap, _) => {
                let y = b.mat("pooled", samples, c.pooled_width());
                Tail::NormPool {
                    norm: b.norm("norm"),
                    stats: b.stats("norm", x.rows),
                    tokens: b.mat("normed", x.rows, d),
                    pools: pools(y, scratch.d_pooled),
                    y,
                }
            }
            (PoolKind::Map, _) => Tail::Map(Box::new(Self::map_head(b, x, mode))),
        }
    }

    /// The gradient of the pooled rows of the stream. It reuses `d_ln` if that has the stream's type.
    fn d_pooled(b: &mut Builder, pooled: Mat, scratch: &BlockScratch, mode: Mode) -> Mat {
        match mode {
            Mode::Train if scratch.d_ln.dtype == pooled.dtype => scratch.d_ln.first_rows(pooled.rows),
            Mode::Train => b.stream("d_pooled of the stream", pooled.rows, pooled.cols),
            Mode::Infer => pooled.first_rows(0),
        }
    }

    fn map_head(b: &mut Builder, x: Mat, mode: Mode) -> MapHead {
        let (c, n) = (b.config, b.samples);
        let (d, m, tokens) = (c.width, c.mlp, c.tokens());
        let (probe, d_probe) = b.param("attn_pool.latent");
        // Backward buffers: none for inference.
        let back = |rows: usize| if mode == Mode::Train { rows } else { 0 };
        let pre = b.mat("map pre", back(n), m);
        MapHead {
            norm: b.norm("norm"),
            stats: b.stats("norm", x.rows),
            tokens: b.mat("normed", x.rows, d),
            heads: Heads { tokens, heads: c.map_heads(), head_size: d / c.map_heads() },
            probe,
            d_probe: d_probe.map_or(InputGrad::None, InputGrad::Plain),
            q: b.linear("attn_pool.q"),
            q_out: b.mat("map q", 1, d),
            kv: b.linear("attn_pool.kv"),
            kv_out: b.mat("map kv", x.rows, 2 * d),
            p: b.plan.statistics("map p", n * c.map_heads(), tokens),
            o: b.mat("map o", n, d),
            proj: b.linear("attn_pool.proj"),
            a: b.mat("map a", n, d),
            norm2: b.norm("attn_pool.norm"),
            stats2: b.stats("map norm", n),
            ln: b.mat("map ln", n, d),
            fc1: b.linear("attn_pool.mlp.fc1"),
            gelu: MlpGelu { pre, form: c.gelu, dropout: Mask::NONE },
            act: b.mat("map act", n, m),
            fc2: b.linear("attn_pool.mlp.fc2"),
            y: b.mat("pooled", n, d),
            d_q: b.mat("map d_q", back(1), d),
            d_o: b.mat("map d_o", back(n), d),
            d_ln: b.mat("map d_ln", back(n), d),
            d_pre: b.mat("map d_pre", back(n), m),
            d_kv: b.mat("map d_kv", back(x.rows), 2 * d),
        }
    }

    fn head(b: &mut Builder, tail: &Tail, scratch: &BlockScratch, mode: Mode) -> Head {
        let (c, n) = (b.config, b.samples);
        let back = |rows: usize| if mode == Mode::Train { rows } else { 0 };
        let pooled = match tail {
            Tail::PoolNorm { y, .. }
            | Tail::Norm { y, .. }
            | Tail::NormPool { y, .. }
            | Tail::Pool { y, .. } => *y,
            Tail::Map(map) => map.y,
        };
        let logits = b.mat("logits", n, c.classes);
        let (features, d_features, rep) = if c.rep_size > 0 {
            let rep = Rep {
                linear: b.linear("pre_logits"),
                pooled,
                d_pooled: scratch.d_pooled,
                d_pre: b.mat("d_pre_logits", back(n), c.rep_size),
            };
            (b.mat("pre_logits", n, c.rep_size), rep.d_pre, Some(rep))
        } else {
            (pooled, scratch.d_pooled, None)
        };
        let epilogues = [Epilogue::Bias, Epilogue::BiasResidual(logits)];
        let heads = ["head", "head_dist"][..c.extra_tokens.clamp(1, 2)]
            .iter()
            .enumerate()
            .map(|(i, name)| ClassHead {
                linear: b.linear(name),
                features: part(features, i, n),
                epilogue: epilogues[i],
                d_features: part(d_features, i, n),
            })
            .collect();
        Head {
            features: part(features, 0, n),
            d_features,
            rep,
            heads,
            logits,
            d_logits: b.mat("d_logits", n, c.classes),
            samples: b.plan.statistics("samples", n, 3),
        }
    }

    /// The gradients of what follows the last block.
    pub fn above(&self) -> &BlockScratch {
        &self.last_block().above
    }

    /// Gradient of the bias of the last block's fc2, if that bias is trained: its product reads the gradient of the last
    /// sum.
    pub fn last_bias(&self) -> Option<Mat> {
        self.last_block().fc2.d_bias
    }

    fn last_block(&self) -> &Block {
        self.blocks.last().expect("a model has blocks")
    }

    /// The same graph for evaluation: no dropout, no drop-path.
    pub(super) fn without_masks(&self) -> Self {
        let mut graph = self.clone();
        let plain = |join: &mut Join| {
            if let Join::Branch { branch, .. } = join {
                branch.dropout = Mask::NONE;
                branch.drop_path = Mask::NONE;
            }
        };
        graph.stem.embed.dropout = Mask::NONE;
        plain(&mut graph.last);
        for block in &mut graph.blocks {
            plain(&mut block.x);
            plain(&mut block.mid);
            block.attention_dropout = Mask::NONE;
            match &mut block.mlp {
                Mlp::Dense(gelu) => gelu.dropout = Mask::NONE,
                Mlp::Gated(gate) => gate.dropout = Mask::NONE,
            }
        }
        graph
    }
}
