//! What a device must be able to do: some twenty fused operations over memory that is planned once.
//!
//! There is no autograd and no graph here. The model ([`crate::vit`]) calls these operations in a straight line,
//! forward and then backward; a backend only executes them. Operands are [`Mat`] handles into flat arenas that
//! [`Backend::allocate`] makes before the first step: a step allocates nothing, and every operation may be recorded
//! in a CUDA graph. Whatever changes between steps (learning rates, seeds, the bound batch) reaches the device
//! through [`Backend::begin_step`], [`Backend::begin_micro`] and [`Backend::bind_batch`].
//!
//! Nothing here knows what a Vision Transformer is. Letters: B samples of the micro-batch, T tokens, R = B·T rows,
//! D width, H heads, Dh head size, M mlp width, C classes.
//!
//! Gradient contract: in one backward pass each element of a parameter's gradient is produced by exactly one operation
//! (two operations may share a parameter by disjoint views, [`Linear::outputs`]). It is assigned in the first micro-batch
//! of a step and added to in the others ([`Micro::accumulate`]).
//!
//! A bias gradient is the sum over the rows of the matrix that [`Backend::matmul_backward`] gets as its `d_y`. Operations
//! that make such a matrix are told where that sum will be wanted (`d_bias`): a device may make it there, from values that
//! it holds anyway, and then leaves it out of the product. The product has to follow, with that `d_y` as it was left.

pub mod batch;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod mask;
pub mod memory;
pub mod rounded;
pub mod timed;

pub use batch::{Erase, HostMemory, MixBox, Pixels, Slot, SlotLayout, TargetKind};
pub use device::{Device, decide, planned, select};
pub use memory::{Arena, Dtype, Mat, MemoryPlan, Recompute, Storage};

use crate::error::Result;

/// The numbers that a run computes with. Statistics, losses, master weights, gradients and moments are f32 in each.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 on a GPU, f32 on the CPU.
    #[default]
    Auto,
    /// IEEE single precision throughout.
    F32,
    /// f32 in memory; matrix products round their operands to 10 bits of mantissa.
    Tf32,
    /// bf16 activations and matrix operands, f32 accumulation.
    Bf16,
}

/// What the residual stream and its gradient are stored in, where activations are bf16. In other precisions it is f32, like
/// everything else, and there is nothing to choose.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Residual {
    /// bf16.
    #[default]
    Auto,
    /// A sum is rounded to bf16 wherever it is stored: the least memory traffic.
    Bf16,
    /// What a block adds to the stream is rounded, the stream is not: gradients nearer to those of f32, for twice the bytes
    /// of x, mid and d_x.
    F32,
}

impl Residual {
    /// What it comes to in a precision. Where everything is stored in f32 it says nothing.
    pub fn settled(self, precision: Precision) -> Residual {
        match (precision, self) {
            (Precision::Bf16, Residual::Auto) => Residual::Bf16,
            (Precision::Bf16, given) => given,
            _ => Residual::Auto,
        }
    }
}

/// How a device is to be opened.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub precision: Precision,
    pub residual: Residual,
    /// CPU threads; 0: one per core.
    pub threads: usize,
    /// Record a step once and replay it.
    pub graph: bool,
    /// Wait after every kernel, so that an error names it.
    pub check_launches: bool,
    /// Take matrix product algorithms by rule, not by timing.
    pub deterministic: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            precision: Precision::Auto,
            residual: Residual::Auto,
            threads: 0,
            graph: true,
            check_launches: false,
            deterministic: false,
        }
    }
}

impl Options {
    /// Everything by default, with this many CPU threads.
    pub fn threads(threads: usize) -> Self {
        Self { threads, ..Self::default() }
    }
}

/// A dense layer's parameters: `y = x·weightᵀ + bias`.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    pub weight: Mat,           // [out, in]
    pub bias: Mat,             // [1, out]
    pub d_weight: Option<Mat>, // None: frozen
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
    pub gamma: Mat, // [1, D]
    pub beta: Mat,  // [1, D]
    pub d_gamma: Option<Mat>,
    pub d_beta: Option<Mat>,
    pub eps: f32,
}

/// Row statistics that a LayerNorm keeps for its backward; f32 `[R, 1]` each.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    pub mean: Mat,
    pub rstd: Mat,
}

/// The two forms of the Gaussian error linear unit (Hendrycks and Gimpel 2016).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gelu {
    /// `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`: vit_jax, big_vision.
    Tanh,
    /// `0.5·x·(1 + erf(x/√2))`: timm, HuggingFace, DeiT.
    Erf,
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
    BiasGelu { pre: Option<Mat>, form: Gelu, dropout: Mask },
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
    Gelu { d_pre: Mat, pre: Mat, form: Gelu, dropout: Mask },
    /// The input was `tanh(·)`, and `y` is its value: `d = (d_y·W)·(1 - y²)`.
    Tanh { d: Mat, y: Mat },
}

/// Sizes of a multi-head attention over packed `[B, T, 3, H, Dh]` rows. Scores are scaled by `1/√Dh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub tokens: usize,
    pub heads: usize,
    pub head_size: usize,
}

/// A residual add in front of a LayerNorm, where the model has dropout, drop-path or LayerScale:
/// `sum = base + drop_path(layer_scale ∘ dropout(branch))`.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    pub base: Mat,                               // [R, D]
    pub branch: Mat,                             // [R, D]
    pub layer_scale: Option<(Mat, Option<Mat>)>, // [1, D] and its gradient
    pub dropout: Mask,                           // per element
    pub drop_path: Mask,                         // per sample
    pub tokens: usize,                           // T: rows of one sample
}

/// What a LayerNorm reads: a sum that is already there, or one that it makes first.
#[derive(Clone, Copy, Debug)]
pub enum Join {
    /// The residual was added by the matmul's epilogue (or there is none): read `sum`.
    Ready(Mat),
    /// Compute and store `sum` from the branch, then read it.
    Branch { sum: Mat, branch: Branch },
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
    pub image: (usize, usize),
    pub patch: (usize, usize),
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
    pub mean: [f32; 3],
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
    pub tokens: usize,                                 // T
    pub extra: usize,                                  // E: 0, 1 or 2
    pub bias: (Mat, Option<Mat>),                      // [1, D] and its gradient
    pub extra_tokens: [Option<(Mat, Option<Mat>)>; 2], // [1, D] each
    pub posemb: (Mat, Option<Mat>),                    // [T - posemb_first, D]
    pub posemb_first: usize, // 0: extra tokens have position rows; E: they have none
    pub dropout: Mask,
}

/// Reduces `[B, T, D]` to `[B, D]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// Row `index` of each sample.
    Token { tokens: usize, index: usize },
    /// Mean over rows `first..tokens`.
    Mean { tokens: usize, first: usize },
}

/// The training objective over `[B, C]` logits; targets come from the bound batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// `-Σ_c w_c·y_c·log_softmax(z)_c`, where w is 1 without class weights.
    Softmax,
    /// `Σ_c (1 + (w_c-1)·y_c)·softplus(z_c) - w_c·y_c·z_c`: binary cross-entropy, summed over classes; without class weights
    /// `Σ_c softplus(z_c) - y_c·z_c`.
    Sigmoid,
}

/// Per-sample results of [`Backend::loss`], columns of its `[B, 3]` output.
pub mod sample_metric {
    /// The sample's loss.
    pub const LOSS: usize = 0;
    /// 1 if the arg max is a true class.
    pub const TOP1: usize = 1;
    /// 1 if a true class is among the five largest.
    pub const TOP5: usize = 2;
}

/// Which part of the bound batch the following operations work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Micro {
    /// First sample, as an index into the bound slot.
    pub first: usize,
    /// B: samples in the micro-batch.
    pub samples: usize,
    /// Index of the slot's first sample in the global batch; keys the masks.
    pub global_first: u64,
    /// Gradients are added to (true) or assigned (false).
    pub accumulate: bool,
    /// Samples over which the loss is averaged: the whole batch, for gradients that are the mean of all micro-batches.
    pub mean_over: usize,
}

impl Micro {
    /// A batch of `samples` that is taken in one pass, on one rank.
    pub fn whole(samples: usize) -> Self {
        Self { first: 0, samples, global_first: 0, accumulate: false, mean_over: samples }
    }
}

/// Keys of everything random inside a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKeys {
    pub seed: u64,
    /// Updates already done.
    pub step: u64,
}

/// How an optimiser turns a gradient into an update `u`; the caller's group scalars then give
/// `θ ← θ - lr·u - decay·θ`. State is f32 unless said otherwise. The constants are f64, because `1 - beta2` in f32
/// would already be wrong in the fifth digit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `m ← g + momentum·m`; `u = m`, or `g + momentum·m` with Nesterov. With `bf16` the stored m is rounded, and the
    /// momentum is `bf16(momentum)` as JAX has it (spec: Optax `trace`).
    Sgd { momentum: f64, nesterov: bool, bf16: bool },
    /// Kingma and Ba 2015; decoupled decay is Loshchilov and Hutter 2019. `bf16` rounds the first moment.
    Adam { beta1: f64, beta2: f64, eps: f64, bf16: bool },
    /// Chen et al. 2023: `u = sign(beta1·m + (1-beta1)·g)`, then `m ← beta2·m + (1-beta2)·g`.
    Lion { beta1: f64, beta2: f64, bf16: bool },
    /// Shazeer and Stern 2018 in big_vision's form: the second moment, factored where [`Factor::factored`] says so,
    /// decays by `min(beta2_cap, 1 - t^-decay_power)`; then momentum as an EMA without bias correction. `clip_rms` limits
    /// the root mean square of one tensor's update before the momentum.
    Adafactor { momentum: f64, beta2_cap: f64, decay_power: f64, clip_rms: Option<f64>, bf16: bool },
}

/// One tensor's slice of the flat buffers. Offsets and lengths are in elements and include padding, which stays zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub name: String,
    /// Offset in the parameter arena.
    pub param: usize,
    /// Offset in the gradient arena; moments mirror it.
    pub grad: usize,
    pub len: usize,
    /// Index into [`Update::groups`].
    pub group: usize,
    /// For Adafactor: how the tensor is viewed and where its statistics lie in `Moment2`.
    pub factor: Option<Factor>,
}

/// A tensor seen as `[outer0, outer1, rows, cols]`, whose element lies at the sum of its indices times their strides
/// from the segment's start. Factored over rows and cols, `Moment2` holds the statistics `[outer0, outer1, rows]` and then
/// `[outer0, outer1, cols]` from `state` on, with the same index order; with `factored` false it holds the tensor in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factor {
    pub outer: [usize; 2],
    pub rows: usize,
    pub cols: usize,
    pub outer_stride: [usize; 2],
    pub row_stride: usize,
    pub col_stride: usize,
    pub state: usize,
    pub factored: bool,
}

impl Factor {
    /// Values of the tensor.
    pub fn len(&self) -> usize {
        self.outer[0] * self.outer[1] * self.rows * self.cols
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of `Moment2`.
    pub fn state_len(&self) -> usize {
        if self.factored { self.outer[0] * self.outer[1] * (self.rows + self.cols) } else { self.len() }
    }
}

/// The scalars of one parameter group for one update: `θ ← θ - lr·u - decay·θ`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupScalars {
    pub lr: f32,
    /// Already multiplied by lr (torch) or by the relative schedule (big_vision).
    pub decay: f32,
}

/// One optimiser update over the flat buffers.
#[derive(Clone, Debug)]
pub struct Update<'a> {
    pub rule: Rule,
    pub segments: &'a [Segment],
    pub groups: &'a [GroupScalars],
    /// Updates done including this one (Adam's t), from 1.
    pub t: u64,
    /// Largest global norm of the gradient; `factor = max/norm` above it.
    pub clip: Option<f32>,
    /// PyTorch's factor `min(1, max/(norm + 1e-6))` instead of Optax's.
    pub clip_torch: bool,
    /// EMA of the weights: `e ← d·e + (1-d)·θ`, in the same pass. It starts as a copy of the weights, so that frozen
    /// ones need no pass.
    pub ema_decay: Option<f64>,
}

/// What a step reports.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Mean loss over the batch.
    pub loss: f64,
    pub top1: f64,
    pub top5: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// The update was skipped because the loss or the norm was not finite.
    pub skipped: bool,
}

/// Work that can be done in several ways, and the one that a device has chosen by timing.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Choice {
    /// The matrix product with what is around it.
    pub product: String,
    pub way: String,
    /// What each way took; empty where the choice is that of a checkpoint.
    pub microseconds: std::collections::BTreeMap<String, f32>,
}

/// A pass of operations over a backend.
pub type Body<'a> = &'a mut dyn FnMut(&mut dyn Backend) -> Result<()>;

/// A device. Operations panic on shapes that do not fit together (the caller's mistake) and return an error when the
/// device fails.
pub trait Backend: Send {
    /// One line for the header of a run: `cpu, 2 threads, avx512`.
    fn describe(&self) -> String;

    // Memory ----------------------------------------------------------------------------------------------------

    /// How this device stores activations; plans are made for it.
    fn storage(&self) -> Storage;
    /// What it computes in: never [`Precision::Auto`].
    fn precision(&self) -> Precision;
    /// Bytes that are free for arenas now.
    fn free_memory(&self) -> Result<usize>;
    /// Allocates every arena, zeroed. Called once, before anything else.
    fn allocate(&mut self, plan: &MemoryPlan) -> Result<()>;
    /// Bytes held in arenas: equals [`MemoryPlan::total_bytes`].
    fn allocated_bytes(&self) -> usize;
    /// Writes `rows × cols` values (dense, row by row) into an f32 matrix; padding is left alone.
    fn write(&mut self, at: Mat, values: &[f32]) -> Result<()>;
    /// Reads `rows × cols` values, dense.
    fn read(&mut self, at: Mat, values: &mut [f32]) -> Result<()>;
    /// Reads an arena's raw bytes, padding and all (checkpoints).
    fn read_arena(&mut self, arena: Arena) -> Result<Vec<u8>>;
    /// The inverse of [`Backend::read_arena`]; the length must match.
    fn write_arena(&mut self, arena: Arena, bytes: &[u8]) -> Result<()>;
    /// Exchanges the weights with their EMA (to evaluate it, and back).
    fn swap_ema(&mut self) -> Result<()>;

    // Choices ---------------------------------------------------------------------------------------------------

    /// What the device has chosen by timing and decides bits, in words that [`Backend::prefer_algorithms`] understands.
    /// Nothing where the same work is always done in the same way.
    fn algorithms(&self) -> Vec<String>;
    /// The same for people: where several ways of doing the same work were timed, which one was taken.
    fn choices(&self) -> Vec<Choice> {
        Vec::new()
    }
    /// Takes the choices of a checkpoint, before the first step; or says in one sentence why they are of no use here.
    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String>;

    // Batches ---------------------------------------------------------------------------------------------------

    /// A batch slot in memory that the device can copy from (page-locked on CUDA).
    fn new_slot(&self, layout: SlotLayout) -> Result<Slot>;
    /// Makes `slot` the batch of the following operations, and gives back the one that is no longer needed. A device with
    /// memory of its own copies the slot while earlier steps compute.
    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>>;
    /// Takes the bound batch back, when a run ends.
    fn unbind_batch(&mut self) -> Option<Slot>;

    // The step --------------------------------------------------------------------------------------------------

    fn begin_step(&mut self, keys: StepKeys) -> Result<()>;
    fn begin_micro(&mut self, micro: Micro) -> Result<()>;
    /// Runs `body`, then the update. Called again and again with bodies that do the same work, so that a device may
    /// record the work once and replay it: between two calls only the bound batch, the keys of
    /// [`Backend::begin_step`], and the update's `t` and `groups` differ.
    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()>;
    /// How many steps may usefully be asked for before the report of the one before them is read: 0 where
    /// [`Backend::step`] returns when its work is done.
    fn steps_ahead(&self) -> u64;
    /// Waits until everything that was asked for is done.
    fn synchronize(&mut self) -> Result<()>;

    // Patch embedding -------------------------------------------------------------------------------------------

    /// Pixels of the bound batch → `patches: [B·T, patch_len]`: normalised, mixed (mixup, cutmix), cut.
    fn patchify(&mut self, grid: PatchGrid, normalise: Normalise, patches: Mat) -> Result<()>;
    /// `x: [B·T, D]`, in place: see [`Embed`].
    fn embed(&mut self, embed: &Embed, x: Mat) -> Result<()>;
    /// Sums the gradients of bias, extra tokens and positions from `d_y = dropout'(d_x)`, which is stored where there is a
    /// dropout; without one `d_y` is `d_x` already. It may be `d_x` itself, or the same in the type that products read.
    fn embed_backward(&mut self, embed: &Embed, d_x: Mat, d_y: Mat) -> Result<()>;

    // Dense layers ----------------------------------------------------------------------------------------------

    /// `y: [R, out] = epilogue(x: [R, in])`
    fn matmul(&mut self, x: Mat, w: &Linear, epilogue: Epilogue, y: Mat) -> Result<()>;
    /// From `d_y: [R, out]`: the gradients of weight and bias (where they are trained, and not made with `d_y`) and of the
    /// input.
    fn matmul_backward(&mut self, d_y: Mat, x: Mat, w: &Linear, d_x: InputGrad) -> Result<()>;

    /// `y = dropout(gelu(pre))`: what [`Epilogue::BiasGelu`] stored, from what it kept.
    fn gelu(&mut self, pre: Mat, form: Gelu, dropout: Mask, y: Mat) -> Result<()>;

    // LayerNorm and the residual stream -------------------------------------------------------------------------

    /// `y = layernorm(join)`, Ba et al. 2016; variance is biased, statistics f32.
    fn layernorm(&mut self, join: &Join, norm: &Norm, y: Mat, stats: Stats) -> Result<()>;
    /// `d_sum += layernorm'(d_y)` (`d_sum` enters with the gradient that reaches the residual stream from above, or is
    /// assigned if `fresh`); then [`Backend::residual_backward`].
    fn layernorm_backward(
        &mut self,
        d_y: Mat,
        join: &Join,
        norm: &Norm,
        stats: Stats,
        d_sum: Mat,
        fresh: bool,
        d_branch: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()>;
    /// The residual add of [`Join::Branch`] alone (after the last block); nothing for [`Join::Ready`].
    fn residual(&mut self, join: &Join) -> Result<()>;
    /// `d_branch` from `d_sum`, the gradient that the products of a block half read; for [`Join::Branch`] also that of the
    /// LayerScale. [`Join::Ready`] hands on `d_sum` itself: in the type of `d_branch` if that is another, else there is
    /// nothing to do. `d_bias: [1, D]` is the bias gradient that [`Backend::matmul_backward`] will be asked for with what is
    /// handed on as its `d_y`, if it will be.
    fn residual_backward(
        &mut self,
        join: &Join,
        d_sum: Mat,
        d_branch: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()>;

    // Attention -------------------------------------------------------------------------------------------------

    /// `o: [B·T, H·Dh]` and `lse: [B·H, T]` from `qkv: [B·T, 3·H·Dh]`; dropout on the probabilities.
    fn attention(&mut self, heads: Heads, qkv: Mat, o: Mat, lse: Mat, dropout: Mask) -> Result<()>;
    /// `d_qkv` from `d_o`. `d_bias: [1, 3·H·Dh]` is the bias gradient that [`Backend::matmul_backward`] will be asked for
    /// with `d_qkv` as its `d_y`, if it will be.
    fn attention_backward(
        &mut self,
        heads: Heads,
        qkv: Mat,
        o: Mat,
        lse: Mat,
        dropout: Mask,
        d_o: Mat,
        d_qkv: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()>;
    /// One query per sample, `q: [B, H·Dh]`, or one for all, `q: [1, H·Dh]`, over `kv: [B·T, 2·H·Dh]`: `o: [B, H·Dh]`, and
    /// `p: [B·H, T]`, dense, the probabilities before dropout. The masks are those of the first token's query in
    /// [`Backend::attention`].
    fn probe_attention(&mut self, heads: Heads, q: Mat, kv: Mat, p: Mat, o: Mat, dropout: Mask)
    -> Result<()>;
    /// `d_q`, shaped as `q` (summed over the samples where they share it), and `d_kv` from `d_o`.
    fn probe_attention_backward(
        &mut self,
        heads: Heads,
        q: Mat,
        kv: Mat,
        p: Mat,
        dropout: Mask,
        d_o: Mat,
        d_q: Mat,
        d_kv: Mat,
    ) -> Result<()>;

    // Head ------------------------------------------------------------------------------------------------------

    /// `y: [B, D]` from `x: [B·T, D]`.
    fn pool(&mut self, pool: Pool, x: Mat, y: Mat) -> Result<()>;
    /// `d_x: [B·T, D]` from `d_y`: assigned (zero where the pool does not look) if `fresh`, else added to.
    fn pool_backward(&mut self, pool: Pool, d_y: Mat, d_x: Mat, fresh: bool) -> Result<()>;
    /// `x ← factor·x`
    fn scale(&mut self, x: Mat, factor: f32) -> Result<()>;
    /// Per-sample loss, top-1 and top-5 into `samples: [B, 3]`, and `d_logits = ∂(Σ loss / mean_over)/∂logits`.
    /// Padding samples (past the slot's count) contribute nothing. `d_logits` may be `logits`.
    fn loss(&mut self, loss: Loss, logits: Mat, d_logits: Mat, samples: Mat) -> Result<()>;

    // Update ----------------------------------------------------------------------------------------------------

    /// Clears the sums that [`Backend::report`] gives.
    fn begin_report(&mut self) -> Result<()>;
    /// Adds the `samples: [B, 3]` of a micro-batch to the step's report, in order.
    fn add_to_report(&mut self, samples: Mat) -> Result<()>;
    /// Global norm, clip, optimiser, EMA; [`Backend::step`] calls it after its body. Skips itself if the loss or the norm is not finite.
    fn update(&mut self, update: &Update) -> Result<()>;
    /// The oldest report that was not read yet, and waits for it. Each [`Backend::step`] with an update leaves one, to be
    /// read in order, at most [`Backend::steps_ahead`] steps late. Without a step it is that of the sums as they are.
    fn report(&mut self) -> Result<StepReport>;
}

/// Bytes of [`Arena::Update`] for an optimiser on a device that stores things this way.
pub fn update_bytes(storage: Storage, rule: Rule, segments: &[Segment]) -> usize {
    if storage.is_apart() { cuda::update_bytes(rule, segments) } else { 0 }
}
