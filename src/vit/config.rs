//! The architecture of a Vision Transformer as plain values, the named variants, and the counts that follow
//! from them.
//!
//! Dosovitskiy et al. 2021 (arXiv:2010.11929); variants as in google-research/vision_transformer, big_vision
//! and timm.

use serde::{Deserialize, Serialize};

use crate::backend::{Gelu, PatchGrid};
use crate::error::{Error, Result};

/// How the tokens become one vector per image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolKind {
    /// The class token.
    Token,
    /// Global average over the patch tokens.
    Gap,
    /// Multi-head attention pooling by one learned probe (big_vision).
    Map,
}

/// The place of the final LayerNorm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormPlace {
    /// Normalise every token, then pool: vit_jax, big_vision.
    Before,
    /// Pool, then normalise: timm's `fc_norm`.
    After,
}

/// Where the position embedding comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Posemb {
    /// A parameter, one row per token.
    Learned,
    /// Fixed sines and cosines of the grid coordinates (big_vision); not a parameter.
    Sincos2d,
}

/// Whether the extra tokens have rows in the position embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PosembJoin {
    /// Added after the extra tokens join the sequence; they have rows too: vit_jax, timm.
    After,
    /// Added before they join; they have no rows: big_vision, DeiT-III.
    Before,
}

/// How the drop-path rate depends on depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropPathMode {
    /// From 0 in the first block to the full rate in the last (timm, DeiT).
    Linear,
    /// The same in every block (DeiT-III).
    Constant,
}

/// How a new model's parameters are initialised: the columns of the table in `docs/numerics.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitScheme {
    /// google-research/vision_transformer.
    VitJax,
    /// big_vision.
    BigVision,
    /// timm's default.
    Timm,
    /// timm's `jax`: as vit_jax, with q, k and v drawn as one matrix.
    TimmJax,
    /// timm's `jax_nlhb`: as `jax`, with a head bias of -ln C.
    TimmJaxNlhb,
    /// timm's `moco` (MoCo v3).
    TimmMoco,
    /// DeiT-III.
    Deit3,
}

/// The architecture of one model, fully explicit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// (H, W) of the input in pixels.
    pub image: (usize, usize),
    /// (height, width) of a patch.
    pub patch: (usize, usize),
    /// D
    pub width: usize,
    /// L
    pub depth: usize,
    /// H
    pub heads: usize,
    /// M
    pub mlp: usize,
    /// Whether q, k and v of the blocks have a bias. Older files without this key have one.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    /// C
    pub classes: usize,
    /// How the tokens become one vector.
    pub pool: PoolKind,
    /// The place of the final LayerNorm.
    pub norm: NormPlace,
    /// 0, 1 (class) or 2 (class and distillation).
    pub extra_tokens: usize,
    /// Where the position embedding comes from.
    pub posemb: Posemb,
    /// Whether the extra tokens have rows in the position embedding.
    pub posemb_join: PosembJoin,
    /// Width of the tanh layer before the head; 0 for none.
    pub rep_size: usize,
    /// Initial value of LayerScale; 0 for none (Touvron et al. 2021, arXiv:2103.17239).
    pub layer_scale: f32,
    /// The GELU of the MLPs.
    pub gelu: Gelu,
    /// Added to the variance in every LayerNorm.
    pub ln_eps: f32,
    /// Dropout after the position embedding, the attention output, the GELU and the second dense layer.
    pub dropout: f32,
    /// Dropout on attention probabilities.
    pub attention_dropout: f32,
    /// Stochastic depth (Huang et al. 2016), per sample and branch.
    pub drop_path: f32,
    /// How `drop_path` depends on depth.
    pub drop_path_mode: DropPathMode,
    /// How new parameters are drawn.
    pub init: InitScheme,
    /// Initial value of the head's bias.
    pub head_bias: f32,
}

fn yes() -> bool {
    true
}

/// Width, depth, mlp, heads of a named variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// The part before the slash, such as `B`.
    pub name: &'static str,
    /// D
    pub width: usize,
    /// L
    pub depth: usize,
    /// M
    pub mlp: usize,
    /// H
    pub heads: usize,
}

const fn variant(name: &'static str, width: usize, depth: usize, mlp: usize, heads: usize) -> Variant {
    Variant { name, width, depth, mlp, heads }
}

/// All named sizes. A variant is written `NAME/PATCH`, such as `B/16`.
pub const VARIANTS: [Variant; 14] = [
    variant("testing", 10, 1, 10, 2),
    variant("mu", 32, 1, 128, 2),
    variant("Ti", 192, 12, 768, 3),
    variant("S", 384, 12, 1536, 6),
    variant("M", 512, 12, 2048, 8),
    variant("B", 768, 12, 3072, 12),
    variant("L", 1024, 24, 4096, 16),
    variant("So400m", 1152, 27, 4304, 16),
    variant("H", 1280, 32, 5120, 16),
    variant("g", 1408, 40, 6144, 16),
    variant("g-opt", 1536, 40, 6144, 16),
    variant("G", 1664, 48, 8192, 16),
    variant("G-opt", 1536, 48, 8192, 16),
    variant("e", 1792, 56, 15360, 16),
];

impl Variant {
    /// Splits `B/16` into its sizes and its patch side.
    pub fn parse(text: &str) -> Result<(Variant, usize)> {
        let known = || VARIANTS.map(|v| v.name).join(", ");
        let wrong = || {
            Error::usage(format!("`{text}` is not a model variant"))
                .hint(format!("write `SIZE/PATCH`, such as `B/16`; sizes: {}", known()))
        };
        let (name, patch) = text.split_once('/').ok_or_else(wrong)?;
        let patch: usize = patch.parse().ok().filter(|p| *p > 0).ok_or_else(wrong)?;
        let sizes = VARIANTS.into_iter().find(|v| v.name == name).ok_or_else(wrong)?;
        Ok((sizes, patch))
    }
}

impl ModelConfig {
    /// A named variant with vit_jax's choices: class token, learned positions, tanh GELU, epsilon 1e-6.
    pub fn variant(text: &str, image: usize, classes: usize) -> Result<Self> {
        let (v, patch) = Variant::parse(text)?;
        Ok(Self {
            image: (image, image),
            patch: (patch, patch),
            width: v.width,
            depth: v.depth,
            heads: v.heads,
            mlp: v.mlp,
            qkv_bias: true,
            classes,
            pool: PoolKind::Token,
            norm: NormPlace::Before,
            extra_tokens: 1,
            posemb: Posemb::Learned,
            posemb_join: PosembJoin::After,
            rep_size: 0,
            layer_scale: 0.0,
            gelu: Gelu::Tanh,
            ln_eps: 1e-6,
            dropout: 0.0,
            attention_dropout: 0.0,
            drop_path: 0.0,
            drop_path_mode: DropPathMode::Linear,
            init: InitScheme::VitJax,
            head_bias: 0.0,
        })
    }

    /// The model of the tests, in which no two sizes are equal.
    #[doc(hidden)]
    pub fn tiny() -> Self {
        Self {
            image: (8, 12),
            width: 24,
            depth: 2,
            heads: 3,
            mlp: 20,
            init: InitScheme::Deit3,
            ..Self::variant("testing/4", 8, 5).expect("the variant is one of the table")
        }
    }

    /// Refuses architectures that cannot be computed. Errors name the key.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String, hint: String| Err(Error::usage(message).hint(hint));
        let sizes = [
            ("image", self.image.0.min(self.image.1)),
            ("patch", self.patch.0.min(self.patch.1)),
            ("width", self.width),
            ("depth", self.depth),
            ("heads", self.heads),
            ("mlp", self.mlp),
            ("classes", self.classes),
        ];
        if let Some((key, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return wrong(format!("`model.{key}` is 0"), format!("set it with `--set model.{key}=...`"));
        }
        if !self.width.is_multiple_of(self.heads) {
            let fits = (1..=self.width)
                .filter(|h| self.width.is_multiple_of(*h))
                .min_by_key(|h| h.abs_diff(self.heads));
            return wrong(
                format!(
                    "`model.heads` is {}, which does not divide `model.width` {}",
                    self.heads, self.width
                ),
                format!("use `--set model.heads={}`", fits.unwrap_or(1)),
            );
        }
        for (axis, image, patch) in
            [("height", self.image.0, self.patch.0), ("width", self.image.1, self.patch.1)]
        {
            if image % patch != 0 {
                return wrong(
                    format!("the patch {axis} {patch} does not divide the image {axis} {image}"),
                    format!(
                        "use `--set model.image={}` or another `model.patch`",
                        (image / patch).max(1) * patch
                    ),
                );
            }
        }
        if self.posemb == Posemb::Sincos2d && !self.width.is_multiple_of(4) {
            return wrong(
                format!("`model.posemb = \"sincos2d\"` needs a width divisible by 4, not {}", self.width),
                "use `--set model.posemb=learned`".into(),
            );
        }
        if self.posemb == Posemb::Sincos2d && self.extra_tokens > 0 && self.posemb_join == PosembJoin::After {
            return wrong(
                "`model.posemb = \"sincos2d\"` has no rows for extra tokens".into(),
                "use `--set model.posemb_join=before`".into(),
            );
        }
        if self.extra_tokens > 2 {
            return wrong(format!("`model.extra_tokens` is {}", self.extra_tokens), "use 0, 1 or 2".into());
        }
        if self.pool == PoolKind::Token && self.extra_tokens == 0 {
            return wrong(
                "`model.pool = \"token\"` needs a class token".into(),
                "use `--set model.extra_tokens=1` or `--set model.pool=gap`".into(),
            );
        }
        if self.extra_tokens == 2 && (self.pool != PoolKind::Token || self.rep_size > 0) {
            return wrong(
                "a distillation token needs `model.pool = \"token\"` and no representation layer".into(),
                "use `--set model.extra_tokens=1`".into(),
            );
        }
        if self.pool == PoolKind::Map && self.norm == NormPlace::After {
            return wrong(
                "`model.pool = \"map\"` always normalises before pooling".into(),
                "use `--set model.norm=before`".into(),
            );
        }
        let rates = [
            ("dropout", self.dropout),
            ("attention_dropout", self.attention_dropout),
            ("drop_path", self.drop_path),
        ];
        for (key, rate) in rates {
            if !(0.0..1.0).contains(&rate) {
                return wrong(format!("`model.{key}` is {rate}"), "use a rate in [0, 1)".into());
            }
        }
        if !(self.ln_eps > 0.0 && self.ln_eps.is_finite()) {
            return wrong(format!("`model.ln_eps` is {}", self.ln_eps), "use 1e-6".into());
        }
        if !(self.layer_scale >= 0.0 && self.layer_scale.is_finite()) {
            return wrong(
                format!("`model.layer_scale` is {}", self.layer_scale),
                "use 0 for none, or 1e-4".into(),
            );
        }
        Ok(())
    }

    /// The grid of patches.
    pub fn patch_grid(&self) -> PatchGrid {
        PatchGrid { image: self.image, patch: self.patch, extra: self.extra_tokens }
    }

    /// T
    pub fn tokens(&self) -> usize {
        self.patch_grid().tokens()
    }

    /// Dh
    pub fn head_size(&self) -> usize {
        self.width / self.heads
    }

    /// Rows of the position embedding.
    pub fn posemb_rows(&self) -> usize {
        match self.posemb_join {
            PosembJoin::After => self.tokens(),
            PosembJoin::Before => self.patch_grid().patches(),
        }
    }

    /// The drop-path rate of block `layer`.
    pub fn drop_path_rate(&self, layer: usize) -> f32 {
        match self.drop_path_mode {
            DropPathMode::Constant => self.drop_path,
            DropPathMode::Linear if self.depth > 1 => self.drop_path * layer as f32 / (self.depth - 1) as f32,
            DropPathMode::Linear => 0.0,
        }
    }

    /// Whether only the class token is read after the last block.
    pub fn reads_class_token_alone(&self) -> bool {
        self.pool == PoolKind::Token && self.extra_tokens == 1
    }

    /// Multiply-adds of the forward pass that are saved if only the class token goes through the end of the
    /// last block: queries, attention, projection and MLP of the other tokens.
    pub fn pruned_macs(&self) -> u64 {
        let [t, d, m] = [self.tokens(), self.width, self.mlp].map(|n| n as u64);
        (t - 1) * (2 * d * d + 2 * t * d + 2 * d * m)
    }

    /// Multiply-adds of one image's forward pass, matrix products only, with all tokens in every block.
    pub fn forward_macs(&self) -> u64 {
        let (n, t) = (self.patch_grid().patches() as u64, self.tokens() as u64);
        let (d, m, c, l) = (self.width as u64, self.mlp as u64, self.classes as u64, self.depth as u64);
        let block = 4 * t * d * d + 2 * t * t * d + 2 * t * d * m;
        let rep = self.rep_size as u64;
        let head = if rep > 0 { d * rep + rep * c } else { d * c * self.extra_tokens.max(1) as u64 };
        let map =
            if self.pool == PoolKind::Map { 2 * t * d * d + 2 * d * d + 2 * t * d + 2 * d * m } else { 0 };
        n * self.patch_grid().patch_len() as u64 * d + l * block + map + head
    }

    /// Floating-point operations of one image's training step: 3 forward passes, 2 per multiply-add;
    /// recomputation does not count.
    pub fn train_flops(&self) -> u64 {
        6 * self.forward_macs()
    }
}
