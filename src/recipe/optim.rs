//! The `optim` and `schedule` sections of a recipe: the optimiser, its parameter groups, and the learning rate
//! over time.

use serde::{Deserialize, Serialize};

use super::Duration;

/// The rule that turns gradients into updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimName {
    /// Stochastic gradient descent with momentum (vit_jax's fine-tuning).
    Sgd,
    /// Adam (Kingma and Ba 2015, arXiv:1412.6980). The same as `AdamW`: decay is always decoupled.
    Adam,
    /// Adam with decoupled decay (Loshchilov and Hutter 2019, arXiv:1711.05101).
    AdamW,
    /// The sign of an average of gradients (Chen et al. 2023, arXiv:2302.06675).
    Lion,
    /// Factored second moments (Shazeer and Stern 2018, arXiv:1804.04235), as in big_vision.
    Adafactor,
}

/// How weight decay is applied: `θ ← θ - decay·θ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayMode {
    /// decay = lr · weight_decay (PyTorch, Optax).
    Torch,
    /// decay = schedule · weight_decay, not multiplied by lr (big_vision).
    BigVision,
}

/// Which parameters are decayed, unless a group says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayOn {
    /// Every parameter.
    All,
    /// Matrices of dense layers and the patch kernel (big_vision's `.*/kernel`).
    Kernels,
    /// Everything but 1-D tensors, biases, tokens and position embedding (timm).
    Timm,
}

/// Type of the stored first moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentType {
    /// 4 bytes per parameter.
    F32,
    /// 2 bytes per parameter. The stored moment is rounded; the update uses the value before rounding.
    Bf16,
}

/// How layers are numbered. Both ways count the stem as 0, block i as i + 1 and the head as L + 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerNumbering {
    /// timm: the final norm belongs to the last block; a norm or an attention pool after the pooling, to the
    /// head.
    Timm,
    /// BEiT, MAE: the final norm belongs to the head.
    Beit,
}

/// The optimiser. `lr` is the head's rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimSection {
    /// The rule that turns gradients into updates.
    pub name: OptimName,
    /// Base learning rate, from 0 up: the head's, which `schedule` changes over time.
    pub lr: f64,
    /// The batch size that `lr` is meant for: `lr` is multiplied by `train.batch` / this number. 0: `lr` is used
    /// as given.
    pub lr_scale_batch: usize,
    /// For `sgd` and `adafactor`: μ of the momentum, in [0, 1).
    pub momentum: f64,
    /// For `sgd`: Nesterov's form of the momentum.
    pub nesterov: bool,
    /// For `adam` and `adamw`: decay of the first moment; for `lion`: weight of the moment in the update. In
    /// [0, 1).
    pub beta1: f64,
    /// For `adam` and `adamw`: decay of the second moment; for `lion`: decay of its moment. In [0, 1).
    pub beta2: f64,
    /// For `adam` and `adamw`: added to the root of the second moment; above 0.
    pub eps: f64,
    /// Type of the stored first moment (for `sgd`: of the momentum), `f32` or `bf16`.
    pub moment: MomentType,
    /// Strength of the decay, from 0 up. `decay_mode` says what multiplies it.
    pub weight_decay: f64,
    /// Whether the decay is multiplied by the learning rate (`torch`) or only by the schedule (`big_vision`).
    pub decay_mode: DecayMode,
    /// The parameters that are decayed, unless a group says otherwise.
    pub decay_on: DecayOn,
    /// Largest global norm of the gradient, over all trained parameters; 0: no clipping.
    pub clip: f32,
    /// Clip as PyTorch does: multiply by `min(1, clip/(norm + 1e-6))`.
    pub clip_torch: bool,
    /// Multiplies the learning rate of everything but the head (and representation layer), from 0 up.
    pub backbone_lr_mult: f64,
    /// Each layer's rate is this share of the rate of the layer above it (Bao et al. 2022, arXiv:2106.08254);
    /// from 0 up; 1: off.
    pub layer_decay: f64,
    /// How layers are counted for `layer_decay`.
    pub layer_numbering: LayerNumbering,
    /// Train only the head (and representation layer).
    pub freeze_backbone: bool,
    /// Leave the stem and this many blocks unchanged.
    pub freeze_blocks: usize,
    /// Decay of an exponential moving average of the weights, in [0, 1); 0: no average.
    pub ema: f64,
    /// For `adafactor`: largest decay of the second moment, in [0, 1). Step t uses
    /// `min(beta2_cap, 1 - t^-decay_power)`.
    pub beta2_cap: f64,
    /// For `adafactor`: power of t in the decay of the second moment; above 0.
    pub decay_power: f64,
    /// For `adafactor`: smallest size of an axis whose second moment is factored.
    pub min_factor: usize,
    /// For `adafactor`: largest root mean square of one tensor's update; 0: no limit.
    pub clip_rms: f64,
    /// Parameters with settings of their own. The first group whose pattern matches a name applies.
    pub groups: Vec<GroupSection>,
}

/// Parameters whose (timm or flax) name matches `pattern`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroupSection {
    /// A regular expression that must match the whole name.
    pub pattern: String,
    /// Multiplies the learning rate, from 0 up, instead of `backbone_lr_mult` and `layer_decay`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_mult: Option<f64>,
    /// Multiplies `weight_decay`; if given, these parameters are decayed whatever `decay_on` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_mult: Option<f64>,
    /// Leave these parameters unchanged. They have no gradient and do not count in the norm.
    pub frozen: bool,
    /// A schedule for these parameters. Default: that of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleSection>,
}

impl Default for OptimSection {
    fn default() -> Self {
        Self {
            name: OptimName::AdamW,
            lr: 1e-3,
            lr_scale_batch: 0,
            momentum: 0.9,
            nesterov: false,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            moment: MomentType::F32,
            weight_decay: 0.0,
            decay_mode: DecayMode::Torch,
            decay_on: DecayOn::Kernels,
            clip: 1.0,
            clip_torch: false,
            backbone_lr_mult: 1.0,
            layer_decay: 1.0,
            layer_numbering: LayerNumbering::Timm,
            freeze_backbone: false,
            freeze_blocks: 0,
            ema: 0.0,
            beta2_cap: 0.999,
            decay_power: 0.8,
            min_factor: 32,
            clip_rms: 0.0,
            groups: Vec::new(),
        }
    }
}

/// The shape of the curve between warm-up and cool-down. Formulas are in `docs/numerics.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// The base rate throughout.
    Constant,
    /// vit_jax, big_vision: warm-up, then half a cosine down to `end`.
    Cosine,
    /// Warm-up, then a line (or a power of it) down to `end`.
    Linear,
    /// big_vision: `1/sqrt(1 + (t + shift - warmup)/timescale)`.
    Rsqrt,
    /// big_vision: multiples of the base rate, `mults`, from `boundaries` on.
    Stair,
    /// timm's cosine, per update.
    TimmCosine,
}

/// The learning rate over time, as a function of the number of updates already done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleSection {
    /// The shape of the curve.
    pub kind: ScheduleKind,
    /// Length of the linear rise from 0 (`timm_cosine`: from `warmup_lr`) at the start.
    pub warmup: Duration,
    /// Length of the linear fall to 0 at the end, which multiplies the curve (`timm_cosine`: of the end at `min_lr`,
    /// after the cosine).
    pub cooldown: Duration,
    /// Length of the curve. Default: the run's. If it is longer, the run ends before the curve does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<Duration>,
    /// For `cosine` and `linear`: rate at the end. Absolute, except that under `decay_mode = "big_vision"`
    /// the whole schedule, including this value, is relative to `lr`.
    pub end: f64,
    /// For `linear`: exponent of the remaining share of the curve.
    pub power: f64,
    /// For `rsqrt`: updates after the warm-up until the rate has fallen by √2 (without a shift); above 0.
    pub timescale: f64,
    /// For `rsqrt`: updates by which the curve is moved to the left.
    pub shift: f64,
    /// For `stair`: updates at which the rate changes, in ascending order.
    pub boundaries: Vec<u64>,
    /// For `stair`: multiples of the base rate, one from each boundary on.
    pub mults: Vec<f64>,
    /// For `timm_cosine`: rate at the first update.
    pub warmup_lr: f64,
    /// For `timm_cosine`: rate at the end of the curve.
    pub min_lr: f64,
    /// For `timm_cosine`: start the cosine after the warm-up instead of beneath it.
    pub warmup_prefix: bool,
}

impl Default for ScheduleSection {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Cosine,
            warmup: Duration::Steps(0),
            cooldown: Duration::Steps(0),
            total: None,
            end: 0.0,
            power: 1.0,
            timescale: 10_000.0,
            shift: 0.0,
            boundaries: Vec::new(),
            mults: Vec::new(),
            warmup_lr: 0.0,
            min_lr: 0.0,
            warmup_prefix: false,
        }
    }
}
