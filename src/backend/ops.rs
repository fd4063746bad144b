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
    Patchify(Patchify),
    Embed(Embed<'a>),
    EmbedBackward(EmbedBackward<'a>),
    // Dense layers
    Matmul(Matmul<'a>),
    MatmulBackward(MatmulBackward<'a>),
    Gelu(Gelu),
    // LayerNorm and the residual stream
    LayerNorm(LayerNorm<'a>),
    LayerNormBackward(LayerNormBackward<'a>),
    Residual(Residual<'a>),
    ResidualBackward(ResidualBackward<'a>),
    // Attention
    Attention(Attention),
    AttentionBackward(AttentionBackward),
    QueryAttention(QueryAttention),
    QueryAttentionBackward(QueryAttentionBackward),
    // Head
    Pool(Pool),
    PoolBackward(PoolBackward),
    Scale(Scale),
    Loss(Loss),
    // Update
    /// Clears the sums that [`Backend::report`](super::Backend::report) gives.
    BeginReport,
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
            Op::LayerNorm(_) => "layernorm",
            Op::LayerNormBackward(_) => "layernorm_backward",
            Op::Residual(_) => "residual",
            Op::ResidualBackward(_) => "residual_backward",
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
    pub grid: PatchGrid,
    pub normalise: Normalise,
    pub patches: Mat,
}

/// `x: [B·T, D]`, in place: see [`super::Embed`].
#[derive(Clone, Copy, Debug)]
pub struct Embed<'a> {
    pub embed: &'a super::Embed,
    pub x: Mat,
}

/// Sums the gradients of bias, extra tokens and positions from `d_y = dropout'(d_x)`. With dropout, `d_y` is
/// computed and stored. Without, it must already equal `d_x`: it is `d_x` itself, or a copy in the type that
/// products read.
#[derive(Clone, Copy, Debug)]
pub struct EmbedBackward<'a> {
    pub embed: &'a super::Embed,
    pub d_x: Mat,
    pub d_y: Mat,
}

// Dense layers ----------------------------------------------------------------------------------------------

/// `y: [R, out] = epilogue(x: [R, in])`
#[derive(Clone, Copy, Debug)]
pub struct Matmul<'a> {
    pub x: Mat,
    pub w: &'a Linear,
    pub epilogue: Epilogue,
    pub y: Mat,
}

/// From `d_y: [R, out]`: the gradients of the input, and of weight and bias if they are trained and no earlier
/// operation has made them together with `d_y`.
#[derive(Clone, Copy, Debug)]
pub struct MatmulBackward<'a> {
    pub d_y: Mat,
    pub x: Mat,
    pub w: &'a Linear,
    pub d_x: InputGrad,
}

/// `y = dropout(gelu(pre))`: recomputes the output of [`Epilogue::BiasGelu`] from the pre-activation that it kept.
#[derive(Clone, Copy, Debug)]
pub struct Gelu {
    pub pre: Mat,
    pub form: super::Gelu,
    pub dropout: Mask,
    pub y: Mat,
}

// LayerNorm and the residual stream -------------------------------------------------------------------------

/// `y = layernorm(join)`, Ba et al. 2016; variance is biased, statistics f32.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    pub join: &'a Join,
    pub norm: &'a Norm,
    pub y: Mat,
    pub stats: Stats,
}

/// Writes `layernorm'(d_y)` to `d_sum`, by `write`: added to the gradient that reaches the residual stream from
/// above, or assigned. Then [`ResidualBackward`].
#[derive(Clone, Copy, Debug)]
pub struct LayerNormBackward<'a> {
    pub d_y: Mat,
    pub join: &'a Join,
    pub norm: &'a Norm,
    pub stats: Stats,
    pub d_sum: Mat,
    pub write: Write,
    pub d_branch: Mat,
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
    pub join: &'a Join,
}

/// `d_branch`, the gradient that the products of a block half read, from `d_sum`. For [`Join::Branch`] also the
/// gradient of the LayerScale. For [`Join::Ready`] the gradient is `d_sum` itself: it is converted if `d_branch`
/// has another type; otherwise there is nothing to do. `d_bias: [1, D]` is the bias gradient of the product that
/// reads the result as its `d_y`; `None` if that bias is not trained.
#[derive(Clone, Copy, Debug)]
pub struct ResidualBackward<'a> {
    pub join: &'a Join,
    pub d_sum: Mat,
    pub d_branch: Mat,
    pub d_bias: Option<Mat>,
}

// Attention -------------------------------------------------------------------------------------------------

/// `o: [B·T, H·Dh]` and `lse: [B·H, T]` from `qkv: [B·T, 3·H·Dh]`; dropout on the probabilities.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub heads: Heads,
    pub qkv: Mat,
    pub o: Mat,
    pub lse: Mat,
    pub dropout: Mask,
}

/// `d_qkv` from `d_o`. `d_bias: [1, 3·H·Dh]` is the bias gradient of the product that reads `d_qkv` as its `d_y`;
/// `None` if that bias is not trained.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackward {
    pub heads: Heads,
    pub qkv: Mat,
    pub o: Mat,
    pub lse: Mat,
    pub dropout: Mask,
    pub d_o: Mat,
    pub d_qkv: Mat,
    pub d_bias: Option<Mat>,
}

/// One query per sample, `q: [B, H·Dh]`, or one for all, `q: [1, H·Dh]`, over `kv: [B·T, 2·H·Dh]`. Gives
/// `o: [B, H·Dh]`, and `p: [B·H, T]`, dense: the probabilities before dropout. The masks equal those of the first
/// token's query in [`Attention`].
#[derive(Clone, Copy, Debug)]
pub struct QueryAttention {
    pub heads: Heads,
    pub q: Mat,
    pub kv: Mat,
    pub p: Mat,
    pub o: Mat,
    pub dropout: Mask,
}

/// `d_q`, shaped as `q` (summed over the samples where they share it), and `d_kv` from `d_o`.
#[derive(Clone, Copy, Debug)]
pub struct QueryAttentionBackward {
    pub heads: Heads,
    pub q: Mat,
    pub kv: Mat,
    pub p: Mat,
    pub dropout: Mask,
    pub d_o: Mat,
    pub d_q: Mat,
    pub d_kv: Mat,
}

// Head ------------------------------------------------------------------------------------------------------

/// `y: [B, D]` from `x: [B·T, D]`.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    pub pool: super::Pool,
    pub x: Mat,
    pub y: Mat,
}

/// `d_x: [B·T, D]` from `d_y`, assigned (with zeros for tokens that are not pooled) or added to, by `write`.
#[derive(Clone, Copy, Debug)]
pub struct PoolBackward {
    pub pool: super::Pool,
    pub d_y: Mat,
    pub d_x: Mat,
    pub write: Write,
}

/// `x ← factor·x`
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    pub x: Mat,
    pub factor: f32,
}

/// Per-sample loss, top-1 and top-5 into `samples: [B, 3]`, and `d_logits = ∂(Σ loss / mean_over)/∂logits`.
/// Padding samples (past the slot's count) contribute nothing. `d_logits` may be `logits`.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    pub loss: super::Loss,
    pub logits: Mat,
    pub d_logits: Mat,
    pub samples: Mat,
}

// Update ----------------------------------------------------------------------------------------------------

/// Adds the `samples: [B, 3]` of a micro-batch to the step's report, in order.
#[derive(Clone, Copy, Debug)]
pub struct AddToReport {
    pub samples: Mat,
}
