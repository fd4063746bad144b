//! The operations as values: what a device is to compute, with named operands.
//!
//! Each operation is a struct, and its documentation is its contract: the formula, the shapes, and what is
//! assigned, added to or left unchanged. [`Op`] is any of them. A device matches on it in
//! [`Backend::execute`](super::Backend::execute). Wrappers of a device (a clock, a rounding, a count of costs)
//! handle all operations alike. The models do not build these values: they call the method of
//! [`Backend`](super::Backend) with the operation's name.
//!
//! Letters as in [`super`]: B samples of the micro-batch, T tokens, R = B·T rows, D width, H heads, Dh head size,
//! C classes. [`super::cost`] has the least work of each operation.

use super::{Epilogue, Heads, InputGrad, Join, Linear, Mask, Mat, Norm, Normalise, PatchGrid, Stats, Write};

/// One operation and its operands.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    // Patch embedding
    /// Pixels to patches.
    Patchify(Patchify),
    /// Bias, extra tokens and positions.
    Embed(Embed<'a>),
    /// Gradients of bias, extra tokens and positions.
    EmbedBackward(EmbedBackward<'a>),
    // Dense layers
    /// A dense layer.
    Matmul(Matmul<'a>),
    /// Gradients of a dense layer.
    MatmulBackward(MatmulBackward<'a>),
    /// A GELU, computed again.
    Gelu(Gelu),
    /// The gate of a SwiGLU.
    Swiglu(Swiglu),
    /// Gradient of the gate of a SwiGLU.
    SwigluBackward(SwigluBackward),
    // LayerNorm and the residual stream
    /// A LayerNorm, after the residual add in front of it.
    LayerNorm(LayerNorm<'a>),
    /// Gradients of a LayerNorm and of the residual add.
    LayerNormBackward(LayerNormBackward<'a>),
    /// A residual add alone.
    Residual(Residual<'a>),
    /// Gradients of a residual add alone.
    ResidualBackward(ResidualBackward<'a>),
    // Attention
    /// Rotary positions.
    Rotate(Rotate<'a>),
    /// Self-attention of all tokens.
    Attention(Attention),
    /// Gradients of a self-attention.
    AttentionBackward(AttentionBackward),
    /// Attention with one query per sample.
    QueryAttention(QueryAttention),
    /// Gradients of an attention with one query.
    QueryAttentionBackward(QueryAttentionBackward),
    // Head
    /// Tokens to one vector per sample.
    Pool(Pool),
    /// Gradient of a pool.
    PoolBackward(PoolBackward),
    /// A factor for all values.
    Scale(Scale),
    /// Loss, metrics and the gradient of the logits.
    Loss(Loss),
    // Update
    /// Clears the sums that [`Backend::report`](super::Backend::report) gives.
    BeginReport,
    /// Adds a micro-batch to the sums of the report.
    AddToReport(AddToReport),
    /// Global norm, clip, optimiser, EMA. Skips itself if the loss or the norm is not finite.
    Update(&'a super::Update<'a>),
}

impl Op<'_> {
    /// The name in a profile. Matrix products are named by their epilogue, because those are separate kernels.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Patchify(_) => "patchify",
            Op::Embed(_) => "embed",
            Op::EmbedBackward(_) => "embed_backward",
            Op::Matmul(op) => match op.epilogue {
                Epilogue::None => "matmul none",
                Epilogue::Bias => "matmul bias",
                Epilogue::BiasResidual(_) => "matmul residual",
                Epilogue::BiasGelu { .. } => "matmul gelu",
                Epilogue::BiasTanh => "matmul tanh",
            },
            Op::MatmulBackward(op) => match op.d_x {
                InputGrad::None => "matmul_backward none",
                InputGrad::Plain(_) => "matmul_backward plain",
                InputGrad::Add(_) => "matmul_backward add",
                InputGrad::Gelu { .. } => "matmul_backward gelu",
                InputGrad::Tanh { .. } => "matmul_backward tanh",
            },
            Op::Gelu(_) => "gelu",
            Op::Swiglu(_) => "swiglu",
            Op::SwigluBackward(_) => "swiglu_backward",
            Op::LayerNorm(_) => "layernorm",
            Op::LayerNormBackward(_) => "layernorm_backward",
            Op::Residual(_) => "residual",
            Op::ResidualBackward(_) => "residual_backward",
            Op::Rotate(_) => "rotate",
            Op::Attention(_) => "attention",
            Op::AttentionBackward(_) => "attention_backward",
            Op::QueryAttention(_) => "query_attention",
            Op::QueryAttentionBackward(_) => "query_attention_backward",
            Op::Pool(_) => "pool",
            Op::PoolBackward(_) => "pool_backward",
            Op::Scale(_) => "scale",
            Op::Loss(_) => "loss",
            Op::BeginReport => "begin_report",
            Op::AddToReport(_) => "add_to_report",
            Op::Update(_) => "update",
        }
    }
}

// Patch embedding -------------------------------------------------------------------------------------------

/// Pixels of the bound batch → `patches: [B·T, patch_len]`: normalised, mixed (mixup, cutmix), cut.
#[derive(Clone, Copy, Debug)]
pub struct Patchify {
    /// How pictures are cut.
    pub grid: PatchGrid,
    /// What pixels become first. f32 slots are normalised already.
    pub normalise: Normalise,
    /// `[B·T, patch_len]`, written.
    pub patches: Mat,
}

/// `x: [B·T, D]`, in place: see [`super::Embed`].
#[derive(Clone, Copy, Debug)]
pub struct Embed<'a> {
    /// What is added.
    pub embed: &'a super::Embed,
    /// `[B·T, D]`, changed in place.
    pub x: Mat,
}

/// Sums the gradients of bias, extra tokens and positions from `d_y = dropout'(d_x)`. With dropout, `d_y` is
/// computed and stored. Without, it must already equal `d_x`: it is `d_x` itself, or a copy in the type that
/// products read.
#[derive(Clone, Copy, Debug)]
pub struct EmbedBackward<'a> {
    /// What the forward pass added, with the places of its gradients.
    pub embed: &'a super::Embed,
    /// `[B·T, D]`: gradient of the embedded tokens, read.
    pub d_x: Mat,
    /// `[B·T, D]`: gradient of the patch products.
    pub d_y: Mat,
}

// Dense layers ----------------------------------------------------------------------------------------------

/// `y: [R, out] = epilogue(x: [R, in])`
#[derive(Clone, Copy, Debug)]
pub struct Matmul<'a> {
    /// `[R, in]`
    pub x: Mat,
    /// Weight and bias; gradients are not touched.
    pub w: &'a Linear,
    /// What happens to the product before it is stored.
    pub epilogue: Epilogue,
    /// `[R, out]`, written.
    pub y: Mat,
}

/// From `d_y: [R, out]`: the gradients of the input, and of weight and bias if they are trained and no earlier
/// operation has made them together with `d_y`.
#[derive(Clone, Copy, Debug)]
pub struct MatmulBackward<'a> {
    /// `[R, out]`
    pub d_y: Mat,
    /// `[R, in]`: the input of the forward pass.
    pub x: Mat,
    /// Weight and bias, with the places of their gradients.
    pub w: &'a Linear,
    /// Where the gradient of `x` goes, and what happens to it first.
    pub d_x: InputGrad,
}

/// `y = dropout(gelu(pre))`: recomputes the output of [`Epilogue::BiasGelu`] from the pre-activation that it kept.
#[derive(Clone, Copy, Debug)]
pub struct Gelu {
    /// `[R, M]`: the input, as the forward pass kept it.
    pub pre: Mat,
    /// Which GELU.
    pub form: super::Gelu,
    /// Mask of the result.
    pub dropout: Mask,
    /// `[R, M]`, written.
    pub y: Mat,
}

/// `y = dropout(silu(g) ∘ u)`, where `pre` is `[g | u]` and `silu(g) = g·σ(g)` (Shazeer 2020, arXiv:2002.05202).
#[derive(Clone, Copy, Debug)]
pub struct Swiglu {
    /// `[R, 2M]`: gates, then values.
    pub pre: Mat,
    /// Mask of the result.
    pub dropout: Mask,
    /// `[R, M]`, written.
    pub y: Mat,
}

/// `d_pre = [d_g | d_u]` from `d_y`. `d_bias: [1, 2M]` is the bias gradient of the product that reads `d_pre` as its
/// `d_y`; `None` if that bias is not trained.
#[derive(Clone, Copy, Debug)]
pub struct SwigluBackward {
    /// `[R, M]`: gradient of the gated values.
    pub d_y: Mat,
    /// `[R, 2M]`, as in the forward pass.
    pub pre: Mat,
    /// Mask of the forward pass's result.
    pub dropout: Mask,
    /// `[R, 2M]`, written.
    pub d_pre: Mat,
    /// `[1, 2M]`: sum of the rows of `d_pre`.
    pub d_bias: Option<Mat>,
}

// LayerNorm and the residual stream -------------------------------------------------------------------------

/// `y = layernorm(join)`, Ba et al. 2016; variance is biased, statistics f32.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// What is normalised, and how it is made.
    pub join: &'a Join,
    /// Scale and shift.
    pub norm: &'a Norm,
    /// `[R, D]`, written.
    pub y: Mat,
    /// Statistics for the backward, written.
    pub stats: Stats,
}

/// Writes `layernorm'(d_y)` to `d_sum`, by `write`: added to the gradient that reaches the residual stream from
/// above, or assigned. Then [`ResidualBackward`].
#[derive(Clone, Copy, Debug)]
pub struct LayerNormBackward<'a> {
    /// `[R, D]`: gradient of the normalised values.
    pub d_y: Mat,
    /// The join of the forward pass.
    pub join: &'a Join,
    /// Scale and shift, with the places of their gradients.
    pub norm: &'a Norm,
    /// Statistics that the forward pass kept.
    pub stats: Stats,
    /// `[R, D]`: gradient of the residual stream.
    pub d_sum: Mat,
    /// Whether `d_sum` is assigned or added to.
    pub write: Write,
    /// `[R, D]`: see [`ResidualBackward`].
    pub d_branch: Mat,
    /// `[1, D]`: see [`ResidualBackward`].
    pub d_bias: Option<Mat>,
}

impl<'a> LayerNormBackward<'a> {
    /// What follows on `d_sum`.
    pub fn residual(&self) -> ResidualBackward<'a> {
        let Self { join, d_sum, d_branch, d_bias, .. } = *self;
        ResidualBackward { join, d_sum, d_branch, d_bias }
    }
}

/// The residual add of [`Join::Branch`] alone (after the last block); nothing for [`Join::Ready`].
#[derive(Clone, Copy, Debug)]
pub struct Residual<'a> {
    /// The sum to make.
    pub join: &'a Join,
}

/// `d_branch`, the gradient that the products of a block half read, from `d_sum`. For [`Join::Branch`] also the
/// gradient of the LayerScale. For [`Join::Ready`] the gradient is `d_sum` itself: it is converted if `d_branch`
/// has another type; otherwise there is nothing to do. `d_bias: [1, D]` is the bias gradient of the product that
/// reads the result as its `d_y`; `None` if that bias is not trained.
#[derive(Clone, Copy, Debug)]
pub struct ResidualBackward<'a> {
    /// The join of the forward pass.
    pub join: &'a Join,
    /// `[R, D]`: gradient of the sum, read.
    pub d_sum: Mat,
    /// `[R, D]`: gradient of the branch, written.
    pub d_branch: Mat,
    /// `[1, D]`: sum of the rows of `d_branch`.
    pub d_bias: Option<Mat>,
}

// Attention -------------------------------------------------------------------------------------------------

/// Turns the pairs of every head by their angles, in place: `(a, b) ← (a·cos - b·sin, b·cos + a·sin)`. The rows of tokens in
/// front of the patches stay as they are. Backward: the same by the negative angles, on the gradient.
#[derive(Clone, Copy, Debug)]
pub struct Rotate<'a> {
    /// The angles; the last N of a sample's T rows are its patches.
    pub rope: &'a super::Rope,
    /// Sizes.
    pub heads: Heads,
    /// `[B·T, P·H·Dh]`: queries and keys, or one of them; changed in place.
    pub x: Mat,
    /// Whether the angles are negated.
    pub back: bool,
}

/// `o: [B·T, H·Dh]` and `lse: [B·H, T]` from `qkv: [B·T, 3·H·Dh]`; dropout on the probabilities.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Sizes.
    pub heads: Heads,
    /// `[B·T, 3·H·Dh]`: queries, keys, values.
    pub qkv: Mat,
    /// `[B·T, H·Dh]`, written.
    pub o: Mat,
    /// f32 `[B·H, T]`: log of the sum of the exponentials of each query's scores, written.
    pub lse: Mat,
    /// Mask of the probabilities.
    pub dropout: Mask,
}

/// `d_qkv` from `d_o`. `d_bias: [1, 3·H·Dh]` is the bias gradient of the product that reads `d_qkv` as its `d_y`;
/// `None` if that bias is not trained.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackward {
    /// Sizes.
    pub heads: Heads,
    /// `[B·T, 3·H·Dh]`, as in the forward pass.
    pub qkv: Mat,
    /// `[B·T, H·Dh]`: the forward pass's result.
    pub o: Mat,
    /// f32 `[B·H, T]`, as the forward pass wrote it.
    pub lse: Mat,
    /// Mask of the probabilities, as in the forward pass.
    pub dropout: Mask,
    /// `[B·T, H·Dh]`: gradient of `o`.
    pub d_o: Mat,
    /// `[B·T, 3·H·Dh]`, written.
    pub d_qkv: Mat,
    /// `[1, 3·H·Dh]`: sum of the rows of `d_qkv`.
    pub d_bias: Option<Mat>,
}

/// One query per sample, `q: [B, H·Dh]`, or one for all, `q: [1, H·Dh]`, over `kv: [B·T, 2·H·Dh]`. Gives
/// `o: [B, H·Dh]`, and `p: [B·H, T]`, dense: the probabilities before dropout. The masks equal those of the first
/// token's query in [`Attention`].
#[derive(Clone, Copy, Debug)]
pub struct QueryAttention {
    /// Sizes.
    pub heads: Heads,
    /// `[B, H·Dh]` or `[1, H·Dh]`
    pub q: Mat,
    /// `[B·T, 2·H·Dh]`: keys, values.
    pub kv: Mat,
    /// `[B·H, T]`: probabilities before dropout, written.
    pub p: Mat,
    /// `[B, H·Dh]`, written.
    pub o: Mat,
    /// Mask of the probabilities.
    pub dropout: Mask,
}

/// `d_q`, shaped as `q` (summed over the samples where they share it), and `d_kv` from `d_o`.
#[derive(Clone, Copy, Debug)]
pub struct QueryAttentionBackward {
    /// Sizes.
    pub heads: Heads,
    /// `[B, H·Dh]` or `[1, H·Dh]`, as in the forward pass.
    pub q: Mat,
    /// `[B·T, 2·H·Dh]`, as in the forward pass.
    pub kv: Mat,
    /// `[B·H, T]`, as the forward pass wrote it.
    pub p: Mat,
    /// Mask of the probabilities, as in the forward pass.
    pub dropout: Mask,
    /// `[B, H·Dh]`: gradient of `o`.
    pub d_o: Mat,
    /// Gradient of `q`, in its shape, written.
    pub d_q: Mat,
    /// `[B·T, 2·H·Dh]`, written.
    pub d_kv: Mat,
}

// Head ------------------------------------------------------------------------------------------------------

/// `y: [B, D]` from `x: [B·T, D]`.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// Which rows, and how they are reduced.
    pub pool: super::Pool,
    /// `[B·T, D]`
    pub x: Mat,
    /// `[B, D]`, written.
    pub y: Mat,
}

/// `d_x: [B·T, D]` from `d_y`, assigned (with zeros for tokens that are not pooled) or added to, by `write`.
#[derive(Clone, Copy, Debug)]
pub struct PoolBackward {
    /// Which rows the forward pass took.
    pub pool: super::Pool,
    /// `[B, D]`
    pub d_y: Mat,
    /// `[B·T, D]`
    pub d_x: Mat,
    /// Whether `d_x` is assigned or added to.
    pub write: Write,
}

/// `x ← factor·x`
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Changed in place.
    pub x: Mat,
    /// Multiplies every value.
    pub factor: f32,
}

/// Per-sample loss, top-1 and top-5 into `samples: [B, 3]`, and `d_logits = ∂(Σ loss / mean_over)/∂logits`.
/// Padding samples (past the slot's count) contribute nothing. `d_logits` may be `logits`.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// The objective.
    pub loss: super::Loss,
    /// `[B, C]`
    pub logits: Mat,
    /// `[B, C]`, written. May be `logits`.
    pub d_logits: Mat,
    /// f32 `[B, 3]`, written; columns as in [`super::sample_metric`].
    pub samples: Mat,
}

// Update ----------------------------------------------------------------------------------------------------

/// Adds the `samples: [B, 3]` of a micro-batch to the step's report, in order.
#[derive(Clone, Copy, Debug)]
pub struct AddToReport {
    /// f32 `[B, 3]`, as [`Loss`] wrote it.
    pub samples: Mat,
}
