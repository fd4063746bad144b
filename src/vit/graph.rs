//! Every buffer, parameter and constant of a pass, by name: what [`super::forward`] and [`super::backward`] read.
//!
//! The graph is built once. All decisions fall here (residual by epilogue or by LayerNorm, where the final norm stands,
//! which masks), so that the passes have no `if`. Shapes: R = B·T rows.

use crate::backend::{
    Branch, Embed, Epilogue, Gelu, Heads, InputGrad, Join, Linear, Mask, Mat, MemoryPlan, Norm, PatchGrid,
    Pool, Recompute, Stats,
};

use super::Mode;
use super::config::{ModelConfig, NormPlace, PoolKind};
use super::params::ParamLayout;

/// One pass of the model.
#[derive(Clone)]
pub struct Graph {
    pub stem: Stem,
    pub blocks: Vec<Block>,
    /// The last block's output joins the residual stream here.
    pub last: Join,
    pub tail: Tail,
    pub head: Head,
    pub scratch: Scratch,
    /// Blocks from this one on, and the stem if it is 0, are reached by the backward; `blocks.len()`: none is.
    pub first_trained_block: usize,
    pub train_stem: bool,
}

/// From pixels to tokens.
#[derive(Clone)]
pub struct Stem {
    pub grid: PatchGrid,
    pub patches: Mat,        // [R, ph·pw·3], zero rows for extra tokens
    pub patch_embed: Linear, // its bias is added by `embed`
    pub embed: Embed,
    pub x: Mat, // [R, D]
}

/// One encoder block: parameters, kept activations, and how its halves join the residual stream.
#[derive(Clone)]
pub struct Block {
    pub heads: Heads,
    pub attention_dropout: Mask,
    pub norm1: Norm,
    pub qkv: Linear,  // D → 3D
    pub proj: Linear, // D → D
    pub norm2: Norm,
    pub fc1: Linear, // D → M
    pub fc2: Linear, // M → D

    pub x: Join,  // [R, D] what enters
    pub ln1: Mat, // [R, D]
    pub stats1: Stats,
    pub qkv_out: Mat, // [R, 3D] = [B, T, 3, H, Dh]
    pub o: Mat,       // [R, D]
    pub lse: Mat,     // [B·H, T]
    pub proj_epilogue: Epilogue,
    pub proj_out: Mat, // the sum itself, or the branch
    pub mid: Join,     // [R, D] after the attention half
    pub ln2: Mat,      // [R, D]
    pub stats2: Stats,
    pub gelu: Epilogue, // keeps pre: [R, M]
    pub act: Mat,       // [R, M]
    pub fc2_epilogue: Epilogue,
    pub fc2_out: Mat, // the next block's x, or the branch
    /// What the backward works out again first.
    pub recompute: Recompute,
}

impl Block {
    /// The pre-activation, the form and the mask of the MLP's GELU.
    pub fn gelu_parts(&self) -> (Mat, Gelu, Mask) {
        let Epilogue::BiasGelu { pre, form, dropout } = self.gelu else { unreachable!("the MLP has a GELU") };
        (pre, form, dropout)
    }
}

/// From tokens to one vector per image.
#[derive(Clone)]
pub enum Tail {
    /// Pool, then normalise: class tokens (where it equals normalising first), and timm's `fc_norm`.
    PoolNorm { pools: Vec<(Pool, Mat)>, pooled: Mat, norm: Norm, stats: Stats, y: Mat },
    /// Normalise every token, then pool.
    NormPool { norm: Norm, stats: Stats, tokens: Mat, pool: Pool, y: Mat },
    /// Normalise every token, then attend to them with one learned query (big_vision's MAP head).
    Map(Box<MapHead>),
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
    pub gelu: Epilogue,
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
    pub heads: Vec<(Linear, Mat, Epilogue, Mat)>, // parameters, features, epilogue, gradient of the features
    pub logits: Mat,   // [B, C]
    pub d_logits: Mat, // [B, C]
    pub samples: Mat,  // [B, 3]
}

#[derive(Clone, Copy)]
pub struct Rep {
    pub linear: Linear,
    pub pooled: Mat,   // [B, D]
    pub d_pooled: Mat, // [B, D]
    pub d_pre: Mat,    // [B, R]
}

/// Gradients on their way down: one set for all blocks.
#[derive(Clone, Copy)]
pub struct Scratch {
    pub d_x: Mat,      // [R, D] of the residual stream
    pub d_branch: Mat, // [R, D] of a block half; d_x itself where the epilogue adds the residual
    pub d_ln: Mat,     // [R, D]
    pub d_o: Mat,      // [R, D]
    pub d_qkv: Mat,    // [R, 3D]
    pub d_pre: Mat,    // [R, M]
    pub d_pooled: Mat, // [B, D] (of every pooled token)
}

/// Where in a block a mask is drawn; the site is `layer · SITES + place`.
mod site {
    pub(super) const PROJ: u32 = 0;
    pub(super) const ATTENTION_PATH: u32 = 1;
    pub(super) const GELU: u32 = 2;
    pub(super) const FC2: u32 = 3;
    pub(super) const MLP_PATH: u32 = 4;
    pub(super) const PROBABILITIES: u32 = 5;
    pub(super) const SITES: u32 = 8;
}

/// Builds a [`Graph`]: looks parameters up by name and places activations in the plan.
struct Builder<'a> {
    config: &'a ModelConfig,
    layout: &'a ParamLayout,
    plan: &'a mut MemoryPlan,
    samples: usize,
}

impl Builder<'_> {
    fn linear(&self, name: &str) -> Linear {
        let weight = self.layout.get(&format!("{name}.weight"));
        let bias = self.layout.get(&format!("{name}.bias"));
        Linear { weight: weight.mat(), bias: bias.mat(), d_weight: weight.grad(), d_bias: bias.grad() }
    }

    fn norm(&self, name: &str) -> Norm {
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

    fn param(&self, name: &str) -> (Mat, Option<Mat>) {
        let param = self.layout.get(name);
        (param.mat(), param.grad())
    }

    fn mat(&mut self, name: impl Into<String>, rows: usize, cols: usize) -> Mat {
        self.plan.activation(name, rows, cols)
    }

    fn stats(&mut self, name: &str, rows: usize) -> Stats {
        Stats {
            mean: self.plan.statistics(format!("{name} mean"), rows, 1),
            rstd: self.plan.statistics(format!("{name} rstd"), rows, 1),
        }
    }

    fn mask(&self, rate: f32, layer: usize, place: u32) -> Mask {
        Mask { rate, site: layer as u32 * site::SITES + place }
    }

    /// R
    fn rows(&self) -> usize {
        self.samples * self.config.tokens()
    }
}

/// The activations that one block keeps for its backward.
#[derive(Clone, Copy)]
struct Kept {
    x: Mat,
    ln1: Mat,
    stats1: Stats,
    qkv: Mat,
    o: Mat,
    lse: Mat,
    mid: Mat,
    ln2: Mat,
    stats2: Stats,
    pre: Mat,
    act: Mat,
    /// Outputs of the two halves before they join the stream; only where the model has masks or LayerScale.
    branches: Option<[Mat; 2]>,
}

impl Kept {
    fn new(b: &mut Builder, name: &str, branches: bool) -> Kept {
        let (r, d, m) = (b.rows(), b.config.width, b.config.mlp);
        let (heads, tokens) = (b.config.heads, b.config.tokens());
        Kept {
            x: b.mat(format!("{name} x"), r, d),
            ln1: b.mat(format!("{name} ln1"), r, d),
            stats1: b.stats(&format!("{name} ln1"), r),
            qkv: b.mat(format!("{name} qkv"), r, 3 * d),
            o: b.mat(format!("{name} o"), r, d),
            lse: b.plan.statistics(format!("{name} lse"), b.samples * heads, tokens),
            mid: b.mat(format!("{name} mid"), r, d),
            ln2: b.mat(format!("{name} ln2"), r, d),
            stats2: b.stats(&format!("{name} ln2"), r),
            pre: b.mat(format!("{name} pre"), r, m),
            act: b.mat(format!("{name} act"), r, m),
            branches: branches.then(|| {
                [b.mat(format!("{name} attention branch"), r, d), b.mat(format!("{name} mlp branch"), r, d)]
            }),
        }
    }

    /// Buffers of a further block, which shares with `first` what the backward works out again.
    fn beside(first: Kept, b: &mut Builder, name: &str) -> Kept {
        let (r, d, m) = (b.rows(), b.config.width, b.config.mlp);
        let (heads, tokens) = (b.config.heads, b.config.tokens());
        match b.plan.storage().recompute {
            Recompute::None => Kept::new(b, name, first.branches.is_some()),
            Recompute::LnGelu => Kept {
                x: b.mat(format!("{name} x"), r, d),
                stats1: b.stats(&format!("{name} ln1"), r),
                qkv: b.mat(format!("{name} qkv"), r, 3 * d),
                o: b.mat(format!("{name} o"), r, d),
                lse: b.plan.statistics(format!("{name} lse"), b.samples * heads, tokens),
                mid: b.mat(format!("{name} mid"), r, d),
                stats2: b.stats(&format!("{name} ln2"), r),
                pre: b.mat(format!("{name} pre"), r, m),
                branches: first.branches.map(|_| {
                    [
                        b.mat(format!("{name} attention branch"), r, d),
                        b.mat(format!("{name} mlp branch"), r, d),
                    ]
                }),
                ..first
            },
            // The MLP's branch joins the stream in the next block, whose backward still reads it.
            Recompute::Block => Kept {
                x: b.mat(format!("{name} x"), r, d),
                branches: first
                    .branches
                    .map(|[attention, _]| [attention, b.mat(format!("{name} mlp branch"), r, d)]),
                ..first
            },
        }
    }
}

impl Graph {
    pub(super) fn new(
        config: &ModelConfig,
        layout: &ParamLayout,
        samples: usize,
        mode: Mode,
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

        let patches = b.mat("patches", r, config.patch_grid().patch_len());
        let shared = (0..depth).any(|l| !keeps(l)).then(|| Kept::new(&mut b, "shared", joined_by_norm));
        let mut first: Option<Kept> = None;
        let kept: Vec<Kept> = (0..depth)
            .map(|l| match (shared, first) {
                (Some(shared), _) if !keeps(l) => shared,
                (_, Some(first)) => Kept::beside(first, &mut b, &format!("block {l}")),
                (_, None) => *first.insert(Kept::new(&mut b, &format!("block {l}"), joined_by_norm)),
            })
            .collect();
        let x_last = b.mat("x", r, d);

        let stem = Self::stem(&b, patches, kept[0].x);
        let blocks: Vec<Block> = (0..depth)
            .map(|l| Self::block(&b, l, &kept, kept.get(l + 1).map_or(x_last, |next| next.x)))
            .collect();
        let last = Self::join_of_block(&b, depth - 1, &kept, x_last);

        let scratch = Self::scratch(&mut b, mode, joined_by_norm);
        let tail = Self::tail(&mut b, x_last, mode);
        let head = Self::head(&mut b, &tail, &scratch, mode);
        let train_stem = first_depth == 0;
        Self { stem, blocks, last, tail, head, scratch, first_trained_block, train_stem }
    }

    fn stem(b: &Builder, patches: Mat, x: Mat) -> Stem {
        let c = b.config;
        let patch_embed = b.linear("patch_embed.proj");
        let tokens = ["cls_token", "dist_token"];
        Stem {
            grid: c.patch_grid(),
            patches,
            // `embed_backward` sums the bias gradient over patch rows only.
            patch_embed: Linear { d_bias: None, ..patch_embed },
            embed: Embed {
                tokens: c.tokens(),
                extra: c.extra_tokens,
                bias: (patch_embed.bias, patch_embed.d_bias),
                extra_tokens: std::array::from_fn(|i| (i < c.extra_tokens).then(|| b.param(tokens[i]))),
                posemb: b.param("pos_embed"),
                posemb_first: c.tokens() - c.posemb_rows(),
                dropout: b.mask(c.dropout, c.depth, 0),
            },
            x,
        }
    }

    fn block(b: &Builder, l: usize, kept: &[Kept], next_x: Mat) -> Block {
        let (c, k) = (b.config, &kept[l]);
        let heads = Heads { tokens: c.tokens(), heads: c.heads, head_size: c.head_size() };
        let name = |part: &str| format!("blocks.{l}.{part}");
        let (proj_epilogue, proj_out, mid, fc2_epilogue, fc2_out) = match k.branches {
            None => {
                let mid = Join::Ready(k.mid);
                (Epilogue::BiasResidual(k.x), k.mid, mid, Epilogue::BiasResidual(k.mid), next_x)
            }
            Some([attention, mlp]) => {
                let branch = Branch {
                    base: k.x,
                    branch: attention,
                    layer_scale: (c.layer_scale > 0.0).then(|| b.param(&name("ls1.gamma"))),
                    dropout: b.mask(c.dropout, l, site::PROJ),
                    drop_path: b.mask(c.drop_path_rate(l), l, site::ATTENTION_PATH),
                    tokens: c.tokens(),
                };
                (Epilogue::Bias, attention, Join::Branch { sum: k.mid, branch }, Epilogue::Bias, mlp)
            }
        };
        Block {
            heads,
            attention_dropout: b.mask(c.attention_dropout, l, site::PROBABILITIES),
            norm1: b.norm(&name("norm1")),
            qkv: b.linear(&name("attn.qkv")),
            proj: b.linear(&name("attn.proj")),
            norm2: b.norm(&name("norm2")),
            fc1: b.linear(&name("mlp.fc1")),
            fc2: b.linear(&name("mlp.fc2")),
            x: if l == 0 { Join::Ready(k.x) } else { Self::join_of_block(b, l - 1, kept, k.x) },
            ln1: k.ln1,
            stats1: k.stats1,
            qkv_out: k.qkv,
            o: k.o,
            lse: k.lse,
            proj_epilogue,
            proj_out,
            mid,
            ln2: k.ln2,
            stats2: k.stats2,
            gelu: Epilogue::BiasGelu { pre: k.pre, form: c.gelu, dropout: b.mask(c.dropout, l, site::GELU) },
            act: k.act,
            fc2_epilogue,
            fc2_out,
            recompute: b.plan.storage().recompute,
        }
    }

    /// How block `l`'s MLP half joins the stream, giving `sum`: the next block's x.
    fn join_of_block(b: &Builder, l: usize, kept: &[Kept], sum: Mat) -> Join {
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
                    tokens: c.tokens(),
                },
            },
        }
    }

    fn scratch(b: &mut Builder, mode: Mode, joined_by_norm: bool) -> Scratch {
        // An inference graph has the fields, but no memory behind them.
        let (r, samples) = if mode == Mode::Train { (b.rows(), b.samples) } else { (0, 0) };
        let (d, m) = (b.config.width, b.config.mlp);
        let d_x = b.mat("d_x", r, d);
        Scratch {
            d_x,
            d_branch: if joined_by_norm { b.mat("d_branch", r, d) } else { d_x },
            d_ln: b.mat("d_ln", r, d),
            d_o: b.mat("d_o", r, d),
            d_qkv: b.mat("d_qkv", r, 3 * d),
            d_pre: b.mat("d_pre", r, m),
            d_pooled: b.mat("d_pooled", samples * b.config.extra_tokens.max(1), d),
        }
    }

    fn tail(b: &mut Builder, x: Mat, mode: Mode) -> Tail {
        let (c, samples, tokens) = (b.config, b.samples, b.config.tokens());
        let d = c.width;
        let mean = Pool::Mean { tokens, first: c.extra_tokens };
        match (c.pool, c.norm) {
            (PoolKind::Token, _) => {
                let n = c.extra_tokens;
                let pooled = b.mat("pooled", n * samples, d);
                let part_bytes = samples * pooled.ld * pooled.dtype.bytes();
                let part = |i: usize| Mat { offset: pooled.offset + i * part_bytes, rows: samples, ..pooled };
                Tail::PoolNorm {
                    pools: (0..n).map(|index| (Pool::Token { tokens, index }, part(index))).collect(),
                    pooled,
                    norm: b.norm("norm"),
                    stats: b.stats("norm", n * samples),
                    y: b.mat("normed", n * samples, d),
                }
            }
            (PoolKind::Gap, NormPlace::After) => {
                let pooled = b.mat("pooled", samples, d);
                Tail::PoolNorm {
                    pools: vec![(mean, pooled)],
                    pooled,
                    norm: b.norm("fc_norm"),
                    stats: b.stats("norm", samples),
                    y: b.mat("normed", samples, d),
                }
            }
            (PoolKind::Gap, NormPlace::Before) => Tail::NormPool {
                norm: b.norm("norm"),
                stats: b.stats("norm", x.rows),
                tokens: b.mat("normed", x.rows, d),
                pool: mean,
                y: b.mat("pooled", samples, d),
            },
            (PoolKind::Map, _) => Tail::Map(Box::new(Self::map_head(b, x, mode))),
        }
    }

    fn map_head(b: &mut Builder, x: Mat, mode: Mode) -> MapHead {
        let (c, n) = (b.config, b.samples);
        let (d, m, tokens) = (c.width, c.mlp, c.tokens());
        let (probe, d_probe) = b.param("attn_pool.latent");
        // Backward buffers: none for inference.
        let back = |rows: usize| if mode == Mode::Train { rows } else { 0 };
        MapHead {
            norm: b.norm("norm"),
            stats: b.stats("norm", x.rows),
            tokens: b.mat("normed", x.rows, d),
            heads: Heads { tokens, heads: c.heads, head_size: c.head_size() },
            probe,
            d_probe: d_probe.map_or(InputGrad::None, InputGrad::Plain),
            q: b.linear("attn_pool.q"),
            q_out: b.mat("map q", 1, d),
            kv: b.linear("attn_pool.kv"),
            kv_out: b.mat("map kv", x.rows, 2 * d),
            p: b.plan.statistics("map p", n * c.heads, tokens),
            o: b.mat("map o", n, d),
            proj: b.linear("attn_pool.proj"),
            a: b.mat("map a", n, d),
            norm2: b.norm("attn_pool.norm"),
            stats2: b.stats("map norm", n),
            ln: b.mat("map ln", n, d),
            fc1: b.linear("attn_pool.mlp.fc1"),
            gelu: Epilogue::BiasGelu { pre: b.mat("map pre", n, m), form: c.gelu, dropout: Mask::NONE },
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

    fn head(b: &mut Builder, tail: &Tail, scratch: &Scratch, mode: Mode) -> Head {
        let (c, n) = (b.config, b.samples);
        let back = |rows: usize| if mode == Mode::Train { rows } else { 0 };
        let pooled = match tail {
            Tail::PoolNorm { y, .. } | Tail::NormPool { y, .. } => *y,
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
        let part = |of: Mat, i: usize| match of.rows {
            0 => of,
            _ => Mat { offset: of.offset + i * n * of.ld * of.dtype.bytes(), rows: n, ..of },
        };
        let epilogues = [Epilogue::Bias, Epilogue::BiasResidual(logits)];
        let heads = ["head", "head_dist"][..c.extra_tokens.clamp(1, 2)]
            .iter()
            .enumerate()
            .map(|(i, name)| (b.linear(name), part(features, i), epilogues[i], part(d_features, i)))
            .collect();
        Head {
            features: part(features, 0),
            d_features,
            rep,
            heads,
            logits,
            d_logits: b.mat("d_logits", n, c.classes),
            samples: b.plan.statistics("samples", n, 3),
        }
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
            if let Epilogue::BiasGelu { dropout, .. } = &mut block.gelu {
                *dropout = Mask::NONE;
            }
        }
        graph
    }
}
