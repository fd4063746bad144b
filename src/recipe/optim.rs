//! The `optim` and `schedule` sections of a recipe: the optimiser, its parameter groups, and the learning rate
//! over time.

use serde::{Deserialize, Serialize};

use super::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimName {
    Sgd,
    Adam,
    AdamW,
    Lion,
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
    F32,
    Bf16,
}

/// Both count the stem as 0, block i as i + 1 and the head as L + 1.
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
    pub name: OptimName,
    pub lr: f64,
    /// Multiply `lr` by batch / this; 0: never.
    pub lr_scale_batch: usize,
    pub momentum: f64,
    pub nesterov: bool,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// First moments (and SGD momentum) in f32 or bf16.
    pub moment: MomentType,
    pub weight_decay: f64,
    pub decay_mode: DecayMode,
    pub decay_on: DecayOn,
    /// Largest global gradient norm; 0: no clipping.
    pub clip: f32,
    /// Clip as PyTorch does (adds 1e-6 to the norm).
    pub clip_torch: bool,
    /// Multiplies the rate of everything but the head (and representation layer).
    pub backbone_lr_mult: f64,
    /// Each layer's rate is this share of the rate of the layer above it (Bao et al. 2022, arXiv:2106.08254);
    /// 1: off.
    pub layer_decay: f64,
    /// How layers are counted for `layer_decay`.
    pub layer_numbering: LayerNumbering,
    /// Train only the head (and representation layer).
    pub freeze_backbone: bool,
    /// Leave the stem and this many blocks unchanged.
    pub freeze_blocks: usize,
    /// EMA of the weights; 0: none.
    pub ema: f64,
    /// Adafactor: cap and power of the second moment's decay, smallest size of a factored axis, block-RMS
    /// threshold (0: none).
    pub beta2_cap: f64,
    pub decay_power: f64,
    pub min_factor: usize,
    pub clip_rms: f64,
    /// First match wins; a pattern is a regular expression that must match a whole parameter name.
    pub groups: Vec<GroupSection>,
}

/// Parameters whose (timm or flax) name matches `pattern`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroupSection {
    pub pattern: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_mult: Option<f64>,
    /// Multiplies `weight_decay`; if given, these parameters are decayed whatever `decay_on` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_mult: Option<f64>,
    pub frozen: bool,
    /// A schedule for these parameters.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    Constant,
    /// vit_jax, big_vision: warm-up, then half a cosine to 0.
    Cosine,
    /// Warm-up, then a line (or `power`) down to `end`.
    Linear,
    /// big_vision: `1/sqrt(1 + (t + shift - warmup)/timescale)`.
    Rsqrt,
    /// Steps down by `mults` at `boundaries`.
    Stair,
    /// timm's cosine, per update.
    TimmCosine,
}

/// The learning rate over time. All take the number of updates already done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleSection {
    pub kind: ScheduleKind,
    pub warmup: Duration,
    pub cooldown: Duration,
    /// Length of the schedule; default: the run's. If it is longer, the run ends before the curve does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<Duration>,
    /// Cosine and linear: end value. Absolute, except that under `decay_mode = "big_vision"` the whole
    /// schedule, including this value, is relative to `lr`.
    pub end: f64,
    /// Linear: exponent of the remaining fraction.
    pub power: f64,
    /// Rsqrt: both in updates.
    pub timescale: f64,
    pub shift: f64,
    /// Stair: updates at which the rate becomes `mults` of the base.
    pub boundaries: Vec<u64>,
    pub mults: Vec<f64>,
    /// timm: rate at the first update, smallest rate, and whether the cosine starts after the warm-up instead
    /// of beneath it.
    pub warmup_lr: f64,
    pub min_lr: f64,
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
