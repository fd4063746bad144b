//! What operations are told besides matrices: the parameters of a layer, what is fused into a product, masks, the sizes of
//! heads and patches, the objective.

use super::Mat;

/// A dense layer's parameters: `y = x·weightᵀ + bias`.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[out, in]`
    pub weight: Mat,
    /// `[1, out]`
    pub bias: Mat,
    /// Gradient of `weight`, in its shape. `None`: frozen.
    pub d_weight: Option<Mat>,
    /// Gradient of `bias`, in its shape. `None`: frozen.
    pub d_bias: Option<Mat>,
}

impl Linear {
    /// The layer that gives outputs `first..first + count` alone: views, no copies.
    pub fn outputs(self, first: usize, count: usize) -> Linear {
        Linear {
            weight: self.weight.row_range(first, count),
            bias: self.bias.column_range(first, count),
            d_weight: self.d_weight.map(|d| d.row_range(first, count)),
            d_bias: self.d_bias.map(|d| d.column_range(first, count)),
        }
    }
}

/// A LayerNorm's parameters.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// Scale, `[1, D]`.
    pub gamma: Mat,
    /// Shift, `[1, D]`.
    pub beta: Mat,
    /// Gradient of `gamma`. `None`: frozen.
    pub d_gamma: Option<Mat>,
    /// Gradient of `beta`. `None`: frozen.
    pub d_beta: Option<Mat>,
    /// Added to the variance.
    pub eps: f32,
}

/// Row statistics that a LayerNorm keeps for its backward; f32 `[R, 1]` each.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Mean of each row.
    pub mean: Mat,
    /// `1/√(variance + eps)` of each row.
    pub rstd: Mat,
}

/// The forms of the Gaussian error linear unit (Hendrycks and Gimpel 2016).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gelu {
    /// `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`: vit_jax, big_vision.
    Tanh,
    /// `0.5·x·(1 + erf(x/√2))`: timm, HuggingFace, DeiT.
    Erf,
    /// `x·σ(1.702·x)`: the CLIP models of OpenAI, DFN and MetaCLIP.
    Quick,
}

/// A dropout mask that is drawn, never stored: the keep decision of an element is a function of
/// (seed, step, site, sample of the global batch, element in the sample); see [`crate::rng`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask {
    /// Probability of being dropped; 0 draws nothing. Kept values are divided by `1 - rate`.
    pub rate: f32,
    /// Which place of the model: the layer and the operation.
    pub site: u32,
}

impl Mask {
    /// Draws nothing and drops nothing.
    pub const NONE: Mask = Mask { rate: 0.0, site: 0 };
}

/// What happens to a matmul's result before it is stored. Forward.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue {
    /// `y = x·Wᵀ`; the bias is added elsewhere.
    None,
    /// `y = x·Wᵀ + b`
    Bias,
    /// `y = x·Wᵀ + b + residual`; `residual` has y's shape and may be y.
    BiasResidual(Mat),
    /// `pre = x·Wᵀ + b; y = dropout(gelu(pre))`; `pre` is stored where a backward is to come.
    BiasGelu {
        /// `[R, M]`: where the pre-activation is stored. `None`: there is no backward.
        pre: Option<Mat>,
        /// Which GELU.
        form: Gelu,
        /// Mask of the result.
        dropout: Mask,
    },
    /// `y = tanh(x·Wᵀ + b)`
    BiasTanh,
}

/// What happens to `d_y·W` before it is stored as the gradient of a matmul's input.
#[derive(Clone, Copy, Debug)]
pub enum InputGrad {
    /// The input needs no gradient.
    None,
    /// `d_x = d_y·W`
    Plain(Mat),
    /// `d_x += d_y·W`
    Add(Mat),
    /// The input was `dropout(gelu(pre))`: `d_pre = dropout'(d_y·W)·gelu'(pre)`.
    Gelu {
        /// `[R, M]`, written.
        d_pre: Mat,
        /// `[R, M]`: the pre-activation that [`Epilogue::BiasGelu`] stored.
        pre: Mat,
        /// Which GELU.
        form: Gelu,
        /// Mask of the forward pass's result.
        dropout: Mask,
    },
    /// The input was `tanh(·)`, and `y` is its value: `d = (d_y·W)·(1 - y²)`.
    Tanh {
        /// The gradient, written.
        d: Mat,
        /// The result of [`Epilogue::BiasTanh`].
        y: Mat,
    },
}

/// Sizes of a multi-head attention over packed `[B, T, 3, H, Dh]` rows. Scores are scaled by `1/√Dh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// T
    pub tokens: usize,
    /// H
    pub heads: usize,
    /// Dh
    pub head_size: usize,
}

/// A residual add in front of a LayerNorm, where the model has dropout, drop-path or LayerScale:
/// `sum = base + drop_path(layer_scale ∘ dropout(branch))`.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    /// `[R, D]`: the residual stream.
    pub base: Mat,
    /// `[R, D]`: the output of a block half.
    pub branch: Mat,
    /// Factors, `[1, D]`, and their gradient. `None`: no LayerScale.
    pub layer_scale: Option<(Mat, Option<Mat>)>,
    /// Mask per element.
    pub dropout: Mask,
    /// Mask per sample.
    pub drop_path: Mask,
    /// T: rows of one sample.
    pub tokens: usize,
}

/// What a LayerNorm reads: a sum that is already there, or one that it makes first.
#[derive(Clone, Copy, Debug)]
pub enum Join {
    /// The residual was added by the matmul's epilogue (or there is none): read `sum`.
    Ready(Mat),
    /// Compute and store `sum` from the branch, then read it.
    Branch {
        /// `[R, D]`, written.
        sum: Mat,
        /// What is added.
        branch: Branch,
    },
}

impl Join {
    /// The residual stream after the join.
    pub fn sum(&self) -> Mat {
        match *self {
            Join::Ready(sum) | Join::Branch { sum, .. } => sum,
        }
    }
}

/// The patch grid of an image, and how the patch matrix is laid out: `[B, T, patch_h·patch_w·3]` with `extra`
/// zero rows in front of each sample's patches; within a patch the order is row, column, channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchGrid {
    /// (H, W) in pixels.
    pub image: (usize, usize),
    /// (height, width) of a patch in pixels.
    pub patch: (usize, usize),
    /// E: tokens in front of the patches.
    pub extra: usize,
}

impl PatchGrid {
    /// Patches down and across. A remainder of pixels at the right and bottom is dropped (VALID padding).
    pub fn grid(&self) -> (usize, usize) {
        (self.image.0 / self.patch.0, self.image.1 / self.patch.1)
    }
    /// N
    pub fn patches(&self) -> usize {
        self.grid().0 * self.grid().1
    }
    /// T
    pub fn tokens(&self) -> usize {
        self.extra + self.patches()
    }
    /// Values of one patch.
    pub fn patch_len(&self) -> usize {
        self.patch.0 * self.patch.1 * 3
    }
}

/// `value = (pixel - mean) / std` per channel, in units of 0..255.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Normalise {
    /// Mean of each channel (RGB).
    pub mean: [f32; 3],
    /// Divisor of each channel (RGB).
    pub std: [f32; 3],
}

impl Normalise {
    /// [-1, 1]: vit_jax, big_vision, timm's AugReg cards.
    pub const INCEPTION: Normalise = Normalise { mean: [127.5; 3], std: [127.5; 3] };
}

/// What is added to the patch embedding's matmul output, in place: the bias on patch rows, the extra tokens on
/// extra rows, the position embedding on every row from `posemb_first` on; then dropout.
#[derive(Clone, Copy, Debug)]
pub struct Embed {
    /// T
    pub tokens: usize,
    /// E: the rows of all of `extra_tokens`.
    pub extra: usize,
    /// `[1, D]` and its gradient.
    pub bias: (Mat, Option<Mat>),
    /// The class token, the distillation token and the registers, in this order, as far as the model has them: a row for
    /// each token, and their gradients.
    pub extra_tokens: [Option<(Mat, Option<Mat>)>; 3],
    /// `[T - posemb_first, D]` and its gradient.
    pub posemb: (Mat, Option<Mat>),
    /// 0: extra tokens have position rows; E: they have none; T: no token has one.
    pub posemb_first: usize,
    /// Mask of the sum.
    pub dropout: Mask,
}

/// Which elements of a head rotary positions turn together (Su et al. 2021, arXiv:2104.09864).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// Elements j and j + Dh/2: DINOv3.
    Half,
    /// Elements 2j and 2j + 1: EVA.
    Neighbours,
}

/// The angles of rotary positions: pair j of every head of patch n turns by angle j of row n.
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// f32 `[N, Dh]`: the cosines of the Dh/2 angles, then their sines.
    pub table: Mat,
    /// Which elements are a pair.
    pub pairs: RopePairs,
}

/// Reduces `[B, T, D]` to `[B, D]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// Row `index` of each sample.
    Token {
        /// T
        tokens: usize,
        /// The row within each sample.
        index: usize,
    },
    /// Mean over rows `first..tokens`.
    Mean {
        /// T
        tokens: usize,
        /// The first row of each sample that counts.
        first: usize,
    },
}

/// The training objective over `[B, C]` logits; targets come from the bound batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// The formula.
    pub kind: LossKind,
    /// Targets become `(1-s)·y + s/C`.
    pub label_smoothing: f32,
    /// f32 `[1, C]`: what class c of the mixed and smoothed target counts.
    pub class_weights: Option<Mat>,
}

impl Loss {
    /// Plain targets, all classes the same: what evaluations report.
    pub fn plain(kind: LossKind) -> Loss {
        Loss { kind, label_smoothing: 0.0, class_weights: None }
    }
}

/// The formula of a [`Loss`]: y are targets, z logits, w class weights, c goes over classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// `-Σ_c w_c·y_c·log_softmax(z)_c`, where w is 1 without class weights.
    Softmax,
    /// `Σ_c (1 + (w_c-1)·y_c)·softplus(z_c) - w_c·y_c·z_c`: binary cross-entropy, summed over classes; without class weights
    /// `Σ_c softplus(z_c) - y_c·z_c`.
    Sigmoid,
}

/// Per-sample results of [`super::ops::Loss`], columns of its `[B, 3]` output.
pub mod sample_metric {
    /// The sample's loss.
    pub const LOSS: usize = 0;
    /// 1 if the arg max is a true class.
    pub const TOP1: usize = 1;
    /// 1 if a true class is among the five largest.
    pub const TOP5: usize = 2;
}

/// How an operation leaves its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// In place of what was there.
    Assign,
    /// Added to what was there.
    Add,
}

impl Write {
    /// [`Write::Add`] if `adds`.
    pub fn add_if(adds: bool) -> Self {
        if adds { Write::Add } else { Write::Assign }
    }

    /// Whether what was there stays a part of the result.
    pub fn adds(self) -> bool {
        self == Write::Add
    }
}
