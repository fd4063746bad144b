//! The architecture of a Vision Transformer as plain values, the named variants, and the counts that follow
//! from them.
//!
//! Dosovitskiy et al. 2021 (arXiv:2010.11929); variants as in google-research/vision_transformer, big_vision
//! and timm.

use serde::{Deserialize, Serialize};

use crate::backend::{Gelu, PatchGrid};
use crate::error::{Error, Result};

pub use super::rope::{RopeIndexing, RopeKind};

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
    /// The class token and the mean of the patch tokens, one after the other: twice the width (DINOv2's classifiers).
    #[serde(rename = "token_gap")]
    TokenGap,
}

/// The place of the final LayerNorm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormPlace {
    /// Normalise every token, then pool: vit_jax, big_vision.
    Before,
    /// Pool, then normalise: timm's `fc_norm`.
    After,
    /// The model has no norm after its last block.
    None,
}

/// Where the position embedding comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Posemb {
    /// A parameter, one row per token.
    Learned,
    /// Fixed sines and cosines of the grid coordinates (big_vision); not a parameter.
    Sincos2d,
    /// Nothing is added to the tokens.
    None,
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

/// Which of q, k and v have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum QkvBias {
    /// All three.
    All,
    /// None of them.
    None,
    /// q and v (EVA, DINOv3).
    Qv,
}

impl<'de> Deserialize<'de> for QkvBias {
    /// By name; `true` and `false`, as older files have it, are `all` and `none`.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Words;
        impl serde::de::Visitor<'_> for Words {
            type Value = QkvBias;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("`all`, `none` or `qv`")
            }
            fn visit_bool<E>(self, all: bool) -> std::result::Result<QkvBias, E> {
                Ok(if all { QkvBias::All } else { QkvBias::None })
            }
            fn visit_str<E: serde::de::Error>(self, word: &str) -> std::result::Result<QkvBias, E> {
                match word {
                    "all" | "true" => Ok(QkvBias::All),
                    "none" | "false" => Ok(QkvBias::None),
                    "qv" => Ok(QkvBias::Qv),
                    other => Err(E::unknown_variant(other, &["all", "none", "qv"])),
                }
            }
        }
        deserializer.deserialize_any(Words)
    }
}

/// The two layers of a block's MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MlpKind {
    /// `fc2(gelu(fc1(x)))`
    #[default]
    Dense,
    /// `fc2(silu(g) ∘ u)`, where fc1 gives `[g | u]` (Shazeer 2020, arXiv:2002.05202).
    Swiglu,
}

/// Which tokens the probe of a MAP head attends to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MapTokens {
    /// All of them: big_vision, Perception Encoder.
    #[default]
    All,
    /// The patches (timm's VisionTransformer).
    Patches,
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
    /// The form of the MLPs.
    #[serde(default)]
    pub mlp_kind: MlpKind,
    /// Whether the MLPs have a LayerNorm in front of their last layer.
    #[serde(default)]
    pub mlp_norm: bool,
    /// Which of q, k and v of the blocks have a bias. Older files without this key have all.
    #[serde(default = "all")]
    pub qkv_bias: QkvBias,
    /// C
    pub classes: usize,
    /// How the tokens become one vector.
    pub pool: PoolKind,
    /// The place of the final LayerNorm.
    pub norm: NormPlace,
    /// Heads of a MAP head; `None`: as many as the blocks have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map_heads: Option<usize>,
    /// Which tokens a MAP head attends to.
    #[serde(default)]
    pub map_tokens: MapTokens,
    /// 0, 1 (class) or 2 (class and distillation).
    pub extra_tokens: usize,
    /// Learned tokens after the class token that no head reads (Darcet et al. 2023, arXiv:2309.16588).
    #[serde(default)]
    pub registers: usize,
    /// Where the position embedding comes from.
    pub posemb: Posemb,
    /// Whether the extra tokens have rows in the position embedding.
    pub posemb_join: PosembJoin,
    /// Rotary positions of q and k.
    #[serde(default)]
    pub rope: RopeKind,
    /// Base of the frequencies; `None`: 100 for `dinov3`, 10000 for `eva`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f32>,
    /// (h, w): the grid to whose size `eva` scales the coordinates; `None`: they are not scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_ref: Option<(usize, usize)>,
    /// What `eva` adds to the coordinates.
    #[serde(default)]
    pub rope_offset: f32,
    /// Which coordinate the first half of the angles belongs to.
    #[serde(default)]
    pub rope_indexing: RopeIndexing,
    /// Whether the patch embedding has a bias.
    #[serde(default = "yes")]
    pub patch_bias: bool,
    /// Whether all tokens are normalised in front of the first block (CLIP).
    #[serde(default)]
    pub norm_pre: bool,
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

fn all() -> QkvBias {
    QkvBias::All
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
            mlp_kind: MlpKind::Dense,
            mlp_norm: false,
            qkv_bias: QkvBias::All,
            classes,
            pool: PoolKind::Token,
            norm: NormPlace::Before,
            map_heads: None,
            map_tokens: MapTokens::All,
            extra_tokens: 1,
            registers: 0,
            posemb: Posemb::Learned,
            posemb_join: PosembJoin::After,
            rope: RopeKind::None,
            rope_theta: None,
            rope_ref: None,
            rope_offset: 0.0,
            rope_indexing: RopeIndexing::Ij,
            patch_bias: true,
            norm_pre: false,
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
        let extra = self.extra_tokens + self.registers;
        if self.posemb == Posemb::Sincos2d && extra > 0 && self.posemb_join == PosembJoin::After {
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
        if self.pool == PoolKind::TokenGap && self.extra_tokens != 1 {
            return wrong(
                format!("`model.pool = \"token_gap\"` needs one class token, not {}", self.extra_tokens),
                "use `--set model.extra_tokens=1`".into(),
            );
        }
        // Both halves of the pooled vector start at a multiple of 16 bytes.
        if self.pool == PoolKind::TokenGap && !self.width.is_multiple_of(8) {
            return wrong(
                format!("`model.pool = \"token_gap\"` needs a width divisible by 8, not {}", self.width),
                "use `--set model.pool=token`".into(),
            );
        }
        if self.pool == PoolKind::TokenGap && self.norm == NormPlace::After {
            return wrong(
                "`model.pool = \"token_gap\"` normalises before pooling, or not at all".into(),
                "use `--set model.norm=before`".into(),
            );
        }
        if self.extra_tokens == 2
            && (self.pool != PoolKind::Token || self.rep_size > 0 || self.norm == NormPlace::None)
        {
            return wrong(
                "a distillation token needs `model.pool = \"token\"`, a final norm and no representation layer".into(),
                "use `--set model.extra_tokens=1`".into(),
            );
        }
        if self.pool == PoolKind::Map && self.norm != NormPlace::Before {
            return wrong(
                "`model.pool = \"map\"` always normalises before pooling".into(),
                "use `--set model.norm=before`".into(),
            );
        }
        self.validate_map()?;
        self.validate_mlp()?;
        self.validate_attention()?;
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

    fn validate_map(&self) -> Result<()> {
        if self.pool != PoolKind::Map {
            return Ok(());
        }
        if self.mlp_kind != MlpKind::Dense {
            return Err(Error::usage(
                "`model.pool = \"map\"` has a dense MLP, and the blocks have a SwiGLU: not supported",
            )
            .hint("use `--set model.pool=gap`"));
        }
        if self.map_tokens == MapTokens::Patches && self.extra_tokens + self.registers > 0 {
            return Err(Error::usage(
                "a MAP head over the patches alone is not supported where the model has other tokens",
            )
            .hint(
                "use `--set model.map_tokens=all` if the model was trained so, or `--set model.pool=gap`",
            ));
        }
        if !self.width.is_multiple_of(self.map_heads()) || self.map_heads() == 0 {
            return Err(Error::usage(format!(
                "`model.map_heads` is {}, which does not divide `model.width` {}",
                self.map_heads(),
                self.width
            ))
            .hint(format!("use `--set model.map_heads={}`", self.heads)));
        }
        Ok(())
    }

    fn validate_mlp(&self) -> Result<()> {
        if self.mlp_norm && self.mlp_kind == MlpKind::Dense {
            return Err(Error::usage("`model.mlp_norm` needs `model.mlp_kind = \"swiglu\"`: a dense MLP with a norm is not supported")
                .hint("use `--set model.mlp_norm=false`"));
        }
        Ok(())
    }

    fn validate_attention(&self) -> Result<()> {
        if self.qkv_bias == QkvBias::Qv && !self.width.is_multiple_of(8) {
            return Err(Error::usage(format!(
                "`model.qkv_bias = \"qv\"` needs a width divisible by 8, not {}",
                self.width
            ))
            .hint("use `--set model.qkv_bias=all`"));
        }
        if self.rope == RopeKind::None {
            return Ok(());
        }
        if !self.head_size().is_multiple_of(4) {
            return Err(Error::usage(format!(
                "rotary positions need heads whose size is divisible by 4, not {}",
                self.head_size()
            ))
            .hint("change `model.heads`, or use `--set model.rope=none`"));
        }
        if !(self.rope_theta() > 1.0 && self.rope_theta().is_finite() && self.rope_offset.is_finite()) {
            return Err(Error::usage(format!("`model.rope_theta` is {}", self.rope_theta()))
                .hint("leave it out, or use a number above 1, such as 100 or 10000"));
        }
        if self.rope_ref.is_some_and(|(h, w)| h == 0 || w == 0) {
            return Err(Error::usage("`model.rope_ref` has a side of 0")
                .hint("give a grid, as in `--set model.rope_ref=16`"));
        }
        Ok(())
    }

    /// Heads of a MAP head.
    pub fn map_heads(&self) -> usize {
        self.map_heads.unwrap_or(self.heads)
    }

    /// Base of the frequencies of rotary positions.
    pub fn rope_theta(&self) -> f32 {
        self.rope_theta.unwrap_or(if self.rope == RopeKind::Eva { 10_000.0 } else { 100.0 })
    }

    /// Values of the pooled vector.
    pub fn pooled_width(&self) -> usize {
        if self.pool == PoolKind::TokenGap { 2 * self.width } else { self.width }
    }

    /// Outputs of the first layer of an MLP.
    pub fn fc1_width(&self) -> usize {
        if self.mlp_kind == MlpKind::Swiglu { 2 * self.mlp } else { self.mlp }
    }

    /// The grid of patches.
    pub fn patch_grid(&self) -> PatchGrid {
        PatchGrid { image: self.image, patch: self.patch, extra: self.extra_tokens + self.registers }
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
        match (self.posemb, self.posemb_join) {
            (Posemb::None, _) => 0,
            (_, PosembJoin::After) => self.tokens(),
            (_, PosembJoin::Before) => self.patch_grid().patches(),
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
        self.pool == PoolKind::Token && self.extra_tokens == 1 && self.norm != NormPlace::None
    }

    /// Multiply-adds of the forward pass that are saved if only the class token goes through the end of the
    /// last block: queries, attention, projection and MLP of the other tokens.
    pub fn pruned_macs(&self) -> u64 {
        let [t, d, m] = [self.tokens(), self.width, self.mlp + self.fc1_width()].map(|n| n as u64);
        (t - 1) * (2 * d * d + 2 * t * d + d * m)
    }

    /// Multiply-adds of one image's forward pass, matrix products only, with all tokens in every block.
    pub fn forward_macs(&self) -> u64 {
        let (n, t) = (self.patch_grid().patches() as u64, self.tokens() as u64);
        let (d, m, c, l) = (self.width as u64, self.mlp as u64, self.classes as u64, self.depth as u64);
        let block = 4 * t * d * d + 2 * t * t * d + t * d * (m + self.fc1_width() as u64);
        let (rep, pooled) = (self.rep_size as u64, self.pooled_width() as u64);
        let head =
            if rep > 0 { pooled * rep + rep * c } else { pooled * c * self.extra_tokens.max(1) as u64 };
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
