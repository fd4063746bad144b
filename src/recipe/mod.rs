//! The whole configuration of a run as one typed tree: what a recipe file says, plus `--set path=value`.
//!
//! The default of every key is here, in `optim.rs` or in `augment.rs`, and nowhere else. [`Recipe::load`] (in
//! `load.rs`) reads a built-in recipe or a file, applies overrides, and points at a wrong key.
//! [`Recipe::model_config`] and its siblings resolve the user's settings into what the rest of the program
//! uses. The resolved recipe is written into the run directory and loads to the same run again.

#![forbid(unsafe_code)]

mod augment;
mod class_weights;
mod compare;
mod duration;
mod head;
mod load;
mod meant;
mod micro_batch;
mod optim;
mod resolve;
mod settings;
mod size;

pub use augment::{
    AugmentSection, Crop, Dialect, EraseMode, Interpolation, Level, MixLaw, MixMode, RandAugment,
};
pub use class_weights::ClassWeights;
pub use compare::Difference;
pub use duration::Duration;
pub use head::{BuiltIn, built_in};
pub use load::{BUILT_IN, RecipeFile, keys};
pub(crate) use meant::meant;
pub use micro_batch::MicroBatch;
pub use optim::{
    DecayMode, DecayOn, GroupSection, LayerNumbering, MomentType, OptimName, OptimSection, ScheduleKind,
    ScheduleSection,
};
pub use resolve::GivenSizes;
pub use settings::{Section, SetIn, Setting, Word, sections, sections_at};
pub use size::Size;

use serde::{Deserialize, Serialize};

use crate::backend::{Gelu, Kernels, LossKind, Normalise, Precision, Recompute, Residual};
use crate::vit::config::{
    DropPathMode, InitScheme, MapTokens, MlpKind, NormPlace, PoolKind, Posemb, PosembJoin, QkvBias,
    RopeIndexing, RopeKind,
};

/// The recipe of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// The architecture, for `vitrum train` and `vitrum plan`. For commands that read a weights file, such as
    /// `vitrum finetune` and `vitrum eval`: what the file does not say.
    pub model: ModelSection,
    /// The pictures of a run and how they are loaded, for `vitrum train` and `vitrum finetune`. Commands that
    /// prepare pictures for a weights file, such as `vitrum eval`, also take `data.mean` and `data.std`.
    pub data: DataSection,
    /// Augmentation of training pictures, for `vitrum train` and `vitrum finetune`; `vitrum preview` draws it.
    pub augment: AugmentSection,
    /// The optimiser and its parameter groups, for `vitrum train`, `vitrum finetune` and `vitrum plan`.
    pub optim: OptimSection,
    /// The learning rate over time, for `vitrum train` and `vitrum finetune`.
    pub schedule: ScheduleSection,
    /// The training objective, for `vitrum train` and `vitrum finetune`. For a weights file that does not say it,
    /// as in `vitrum eval`: `loss.kind`.
    pub loss: LossSection,
    /// Length, batches, output and device of a run, for `vitrum train`, `vitrum finetune` and `vitrum plan`.
    pub train: TrainSection,
    /// How the evaluations of `vitrum train` and `vitrum finetune` prepare pictures, and what counts as better.
    pub eval: EvalSection,
    /// If given, the run starts from trained weights, as `vitrum finetune` does: `model` may omit what their file
    /// says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finetune: Option<FinetuneSection>,
    /// How to read the names in a weights file: `vitrum finetune`, and every other command that reads one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<WeightsSection>,
}

/// The architecture. A `variant` sets width, depth, heads, mlp and patch; single keys override it. Some keys
/// also accept the names of other code bases (`hidden_size`, `num_heads`, ...): `ALIASES` in `load.rs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// Sizes by name, `SIZE/PATCH`, such as `B/16`. The sizes are `mu`, `Ti`, `S`, `M`, `B`, `L`, `So400m`, `H`,
    /// `g`, `g-opt`, `G`, `G-opt` and `e`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// The input in pixels: `224` or `"224x160"` (height x width), at most 8192. Must be a multiple of
    /// `patch`.
    pub image: Size,
    /// Side of a patch in pixels: `16` or `"16x8"` (height x width). Default: the variant's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<Size>,
    /// D, values per token; a multiple of `heads`. Default: the variant's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// L, the number of blocks. Default: the variant's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// H, attention heads per block. Default: the variant's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// M, the hidden layer of a block's MLP. Default: the variant's, else 4 · width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mlp: Option<usize>,
    /// Form of the MLPs: `dense`, or `swiglu`, whose first layer gives `mlp` gates and `mlp` values.
    pub mlp_kind: MlpKind,
    /// Whether the MLPs have a LayerNorm in front of their last layer.
    pub mlp_norm: bool,
    /// Which of the projections to q, k and v have a bias: `all`, `none` or `qv`.
    pub qkv_bias: QkvBias,
    /// Number of outputs of the head. Default: the number of the training data's classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
    /// How the tokens become one vector per picture: `token`, `gap`, `map` or `token_gap`.
    pub pool: PoolKind,
    /// Whether the final LayerNorm comes `before` or `after` the pooling, or there is `none`.
    pub norm: NormPlace,
    /// Heads of the MAP pooling. Default: `heads`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map_heads: Option<usize>,
    /// Which tokens the MAP pooling reads: `all` or `patches`.
    pub map_tokens: MapTokens,
    /// Class tokens: 0, 1 (class) or 2 (class and distillation). Default: 1 for `pool = "token"` and
    /// `"token_gap"`, else 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extra_tokens: Option<usize>,
    /// Register tokens (Darcet et al. 2023, arXiv:2309.16588).
    pub registers: usize,
    /// Learned position embedding, fixed sines and cosines (`sincos2d`), or `none`.
    pub posemb: Posemb,
    /// Whether the extra tokens have rows in the position embedding (`after`) or not (`before`).
    pub posemb_join: PosembJoin,
    /// Rotary positions of q and k: `none`, `dinov3` or `eva`.
    pub rope: RopeKind,
    /// Base of their frequencies. Default: 100 for `dinov3`, 10000 for `eva`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f32>,
    /// The grid of patches to whose size `eva` scales the coordinates: `16` or `"16x24"`. Default: no scaling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_ref: Option<Size>,
    /// What `eva` adds to the coordinates.
    pub rope_offset: f32,
    /// Whether the first half of the angles belongs to rows (`ij`) or columns (`xy`).
    pub rope_indexing: RopeIndexing,
    /// Whether the patch embedding has a bias.
    pub patch_bias: bool,
    /// Whether all tokens are normalised in front of the first block (CLIP).
    pub norm_pre: bool,
    /// Width of a tanh layer before the head (`pre_logits`); 0: none.
    pub rep_size: usize,
    /// Initial value of LayerScale (Touvron et al. 2021, arXiv:2103.17239), such as 1e-4; 0: no LayerScale.
    pub layer_scale: f32,
    /// Form of the GELU: `tanh` (vit_jax), `erf` (timm) or `quick` (OpenAI's CLIP).
    pub gelu: Gelu,
    /// Added to the variance in every LayerNorm; above 0.
    pub ln_eps: f32,
    /// Dropout rate after the position embedding, the attention output, the GELU and the second dense layer;
    /// in [0, 1).
    pub dropout: f32,
    /// Dropout rate of attention probabilities, in [0, 1).
    pub attention_dropout: f32,
    /// Stochastic depth (Huang et al. 2016, arXiv:1603.09382): rate at which a sample skips half a block, in
    /// [0, 1).
    pub drop_path: f32,
    /// Whether `drop_path` grows from 0 in the first block, or is the same in all.
    pub drop_path_mode: DropPathMode,
    /// How a new model's parameters are drawn.
    pub init: InitScheme,
    /// Initial value of the head's bias. For `loss.kind = "sigmoid"`, -ln C starts at the base rate of C
    /// classes.
    pub head_bias: f32,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
            variant: None,
            image: Size::square(224),
            patch: None,
            width: None,
            depth: None,
            heads: None,
            mlp: None,
            mlp_kind: MlpKind::Dense,
            mlp_norm: false,
            qkv_bias: QkvBias::All,
            classes: None,
            pool: PoolKind::Token,
            norm: NormPlace::Before,
            map_heads: None,
            map_tokens: MapTokens::All,
            extra_tokens: None,
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
        }
    }
}

/// What to do with a record that cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRecord {
    /// Name it, count it, and continue with a replacement sample.
    Skip,
    /// Stop and name it.
    Error,
}

/// The data of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// A packed data set, an image folder, or `demo` / `demo-hard`. If it has `train/` and `val/`, both are
    /// used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<String>,
    /// The validation images: a data set as in `train`. Default: those that `train` brings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
    /// If there are no validation images: the share of the training images that is held out for validation, 0
    /// to 0.9, chosen by a hash of their names. Default: a tenth for a run that starts from trained weights,
    /// else none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holdout: Option<f64>,
    /// Draw equally often from each class, however few images it has.
    pub balance: bool,
    /// What training does with a picture that cannot be decoded. Evaluations leave it out and say so.
    pub on_bad_record: OnBadRecord,
    /// Turn pictures by their EXIF orientation, in training and evaluation. Off, as in timm and torchvision.
    pub exif: bool,
    /// Threads that decode and augment pictures, at most 4096; 0: one per core, at most 16.
    pub workers: usize,
    /// Batch slots in flight between loader and device, 2 to 64.
    pub slots: usize,
    /// Records per window of the shuffle (for disks that seek); 0: one shuffle of the whole epoch.
    pub shuffle_window: usize,
    /// Compare packed shards with their checksums when they are first read.
    pub verify: bool,
    /// Resume on data that has changed since the run began. Never stored: each resume must set it again.
    #[serde(skip_serializing_if = "is_false")]
    pub accept_changes: bool,
    /// Type of the pixels in a slot. `f32` keeps the fractions of a resize, for comparisons with references.
    pub pixels: SlotPixels,
    /// Subtracted from pixels in [0, 1], per channel (RGB), in training and evaluation. Default: that of the
    /// weights that a run starts from, else 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<[f64; 3]>,
    /// Divides the pixels after `mean` is subtracted, per channel; above 0. Default: that of the weights that
    /// a run starts from, else 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<[f64; 3]>,
}

fn is_false(truth: &bool) -> bool {
    !truth
}

/// See [`DataSection::pixels`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotPixels {
    /// One byte per channel.
    U8,
    /// Single precision.
    F32,
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            train: None,
            val: None,
            holdout: None,
            balance: false,
            on_bad_record: OnBadRecord::Error,
            exif: false,
            workers: 0,
            slots: 3,
            shuffle_window: 0,
            verify: true,
            accept_changes: false,
            pixels: SlotPixels::U8,
            mean: None,
            std: None,
        }
    }
}

impl DataSection {
    /// `otherwise`, overridden by the keys that are set.
    pub fn normalise(&self, otherwise: Normalise) -> Normalise {
        let pixels = |values: [f64; 3]| values.map(|v| (v * 255.0) as f32);
        Normalise {
            mean: self.mean.map_or(otherwise.mean, pixels),
            std: self.std.map_or(otherwise.std, pixels),
        }
    }
}

/// Converts values for u8 pixels to values for pixels in [0, 1]: the shortest decimals that convert back
/// exactly.
pub fn unit(values: [f32; 3]) -> [f64; 3] {
    values.map(|value| {
        let exact = f64::from(value) / 255.0;
        let short = (1..17).map(|digits| format!("{exact:.digits$}").parse().unwrap_or(exact));
        short.into_iter().find(|short| (short * 255.0) as f32 == value).unwrap_or(exact)
    })
}

/// The training objective. Evaluations use neither smoothing nor weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossSection {
    /// Softmax cross-entropy, or a sigmoid per class.
    pub kind: LossKind,
    /// Share of each target that is spread evenly over all classes, 0 to 1.
    pub label_smoothing: f32,
    /// Weight of each class: `none`, `balanced` (rare classes count more), or one number above 0 per class,
    /// in their order.
    pub class_weights: ClassWeights,
}

impl Default for LossSection {
    fn default() -> Self {
        Self { kind: LossKind::Softmax, label_smoothing: 0.0, class_weights: ClassWeights::None }
    }
}

/// Length, batches, output and devices of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// Name of the run, and of its directory in `runs`. Default: the recipe's name and the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Length of the run in updates. `steps` and `epochs` exclude each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Length of the run in passes over the training data, above 0. May be a fraction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Samples per update, over all micro-batches and ranks; 1 to 1048576.
    pub batch: usize,
    /// Samples per forward and backward; 0: the whole batch; `"auto"`: as many as fit. Must divide `batch`.
    pub micro_batch: MicroBatch,
    /// Sum the gradients of this many chunks of the batch in a fixed tree, so that 1, 2, 4, ... ranks give
    /// the same bits: a power of two that divides `batch`. Each chunk is a micro-batch. Not on GPUs yet.
    /// Default: micro-batches and ranks are added in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduce_chunks: Option<usize>,
    /// Activations that the backward pass recomputes to save memory: `none`, `ln+gelu` or `block`.
    pub recompute: Recompute,
    /// In a model that reads only the class token, compute only that part of the last block. The result is
    /// the same except for rounding in the last bits, and takes less time. Other models do not change.
    pub prune_last_block: bool,
    /// Number format of activations and matrix products: `auto` (bf16 on a GPU, f32 on the CPU), `f32`,
    /// `tf32` or `bf16`.
    pub precision: Precision,
    /// In bf16: storage of the residual stream and its gradient, `bf16` (`auto`) or `f32`.
    pub residual: Residual,
    /// Seed of every random draw: initial values, order, augmentation, masks.
    pub seed: u64,
    /// Choose matrix product algorithms by rule, not by timing, so that two fresh runs agree to the bit on a
    /// GPU, too.
    pub deterministic: bool,
    /// On a GPU: which kernels to use, `portable` (`auto`) or, on Hopper, `hopper` where there is one for the
    /// sizes at hand. They round differently.
    pub kernels: Kernels,
    /// On a GPU: record the step once and replay it.
    pub graph: bool,
    /// On a GPU: wait after every kernel, so that an error names it. Slow.
    pub check_launches: bool,
    /// Compute threads; 0: one per core. Never changes a bit.
    pub threads: usize,
    /// Updates between two lines of the log, from 1 up.
    pub log_every: u64,
    /// Updates between two evaluations, from 1 up.
    pub eval_every: u64,
    /// Updates between two checkpoints, from 1 up. Default: the value of `eval_every`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<u64>,
    /// Number of newest checkpoints to keep, besides the best; from 1 up.
    pub keep: usize,
    /// Non-finite steps in a row after which the run stops, from 1 up.
    pub max_skipped: u64,
    /// Seconds that a run may stand still, waiting for data, a GPU, other ranks or a disk, before it ends.
    /// Default: ten times the slowest step, at least 60; more before the first step and for checkpoints.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
    /// How many standard deviations a step's loss or gradient norm may lie above the mean of the steps before it;
    /// a step above is reported. 0: never.
    pub spike_score: f64,
    /// Steps over which mean and deviation are taken, from 4 up. Nothing is reported before half of them.
    pub spike_window: usize,
    /// What becomes of such a step besides: `report`, nothing; `skip`, its update is left out (not on GPUs yet).
    pub on_spike: OnSpike,
    /// After this many steps in a row that stand out or are not finite, go back to the last checkpoint before
    /// them and go on without the batches since. 0: never.
    pub rewind_after: u64,
    /// Evaluations without improvement after which the run stops; 0: never.
    pub patience: u64,
    /// Smallest improvement of the validation metric that counts, in its own unit (`top1` and `map`: shares).
    pub min_delta: f64,
    /// Write the run's page, `report.html`, at evaluations and at the end. Evaluations in between are left
    /// out while the pages have taken more than a hundredth of the time.
    pub report: bool,
    /// Write event files for TensorBoard into the run's directory.
    pub tensorboard: bool,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            name: None,
            steps: None,
            epochs: None,
            batch: 128,
            micro_batch: MicroBatch::Samples(0),
            reduce_chunks: None,
            recompute: Recompute::None,
            prune_last_block: true,
            precision: Precision::Auto,
            residual: Residual::Auto,
            seed: 0,
            deterministic: false,
            kernels: Kernels::Auto,
            graph: true,
            check_launches: false,
            threads: 0,
            log_every: 100,
            eval_every: 500,
            checkpoint_every: None,
            keep: 3,
            max_skipped: 3,
            timeout: None,
            spike_score: 8.0,
            spike_window: 100,
            on_spike: OnSpike::Report,
            rewind_after: 0,
            patience: 0,
            min_delta: 0.0,
            report: true,
            tensorboard: true,
        }
    }
}

/// What becomes of a step that stands out, besides a line that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnSpike {
    /// Its update is made.
    Report,
    /// Its update is left out.
    Skip,
}

/// The metric that selects the best checkpoint and early stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// For samples with several labels or none: [`Metric::Map`].
    Top1,
    /// The mean loss over the validation images; smaller is better.
    Loss,
    /// The mean of the classes' average precisions, for samples with several labels or none.
    Map,
}

/// How pictures are prepared for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvalResize {
    /// Squash to the input size, bilinear without antialias (vit_jax).
    Squash,
    /// Shorter side to `image / crop_ratio`, antialiased bicubic, then the centre (timm, DeiT).
    Center,
    /// Shorter side to `image / crop_ratio` by areas, fractions truncated, then the centre (big_vision).
    AreaCenter,
    /// Squash to `image / crop_ratio`, bilinear without antialias, fractions truncated, then the centre
    /// (big_vision's few-shot).
    SquashCenter,
    /// Squash to `image / crop_ratio`, antialiased bilinear, then the centre (HuggingFace: a ratio of 1).
    SquashSmooth,
    /// The same, bicubic.
    SquashBicubic,
    /// As [`EvalResize::Center`], bilinear.
    CenterBilinear,
}

/// The evaluation protocols of published results by name: how to resize, and `crop_ratio`.
pub const PROTOCOLS: [(&str, EvalResize, f32); 9] = [
    ("vit_jax", EvalResize::Squash, 1.0),
    ("big_vision", EvalResize::AreaCenter, 224.0 / 256.0),
    ("big_vision_transfer", EvalResize::AreaCenter, 384.0 / 448.0),
    ("big_vision_fewshot", EvalResize::SquashCenter, 224.0 / 256.0),
    ("timm", EvalResize::Center, 0.9),
    ("timm_384", EvalResize::Center, 1.0),
    ("deit", EvalResize::Center, 0.875),
    ("deit3", EvalResize::Center, 1.0),
    ("hf", EvalResize::SquashSmooth, 1.0),
];

/// How evaluations prepare pictures, and the metric that counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalSection {
    /// The resize and crop of evaluation pictures.
    pub resize: EvalResize,
    /// Share of the resized picture that the centre crop keeps, in (0, 1]. `squash` does not use it.
    pub crop_ratio: f32,
    /// The metric that selects the best checkpoint and early stopping.
    pub metric: Metric,
}

impl Default for EvalSection {
    fn default() -> Self {
        Self { resize: EvalResize::Squash, crop_ratio: 1.0, metric: Metric::Top1 }
    }
}

/// What happens to the classifier of a weights file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HeadPolicy {
    /// Kept if the classes agree. If both sides have names, each class takes the row of its name, and a class
    /// without one starts at zero. Without names, a different number of classes means a new head.
    #[default]
    Auto,
    /// Always a new head of zeros, as in vit_jax, even if the classes agree.
    Reset,
    /// An error unless the classes agree.
    Keep,
}

/// What happens to the tanh layer before the head (`pre_logits`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RepLayer {
    /// Follows the head: kept if any row of the head is kept, else dropped, as in vit_jax's fine-tuning.
    #[default]
    Auto,
    /// Kept, even before a new head.
    Keep,
    /// Left out.
    Drop,
}

/// Which system's resizing of position embeddings and patch kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PosembDialect {
    /// That of the code that the file's layout comes from.
    #[default]
    Auto,
    /// `scipy.ndimage.zoom(order=1)`: linear, corners of both grids aligned. Without SciPy's zeros, see
    /// [`PosembDialect::ScipyZoomExact`].
    VitJax,
    /// The same as [`PosembDialect::VitJax`].
    BigVision,
    /// Exactly SciPy: if the last coordinate exceeds the grid by a rounding error (28 to 48 patches per side,
    /// among others), the last row and column are zero.
    ScipyZoomExact,
    /// timm for its own files: bicubic with antialiasing.
    Timm,
    /// timm reading an `.npz`: bilinear between half-pixel centres, no antialiasing.
    TimmNpz,
    /// HuggingFace and DeiT: bicubic (a = -0.75), no antialiasing.
    Hf,
}

/// The weights that a run starts from. Without this section the model is new.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneSection {
    /// A weights file, a checkpoint folder or a run directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// What happens to the classifier of the file.
    pub head: HeadPolicy,
    /// What happens to the file's layer before the head.
    pub rep_layer: RepLayer,
    /// How position embeddings and patch kernels are resized to another grid.
    pub posemb: PosembDialect,
}

/// Patterns for names in a weights file, in every command that reads one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WeightsSection {
    /// Each `REGEX=>NEW`, applied one after the other.
    pub rename: Vec<String>,
    /// A tensor whose whole name matches one of them is left out.
    pub exclude: Vec<String>,
}
