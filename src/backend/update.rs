//! An update of the parameters as a backend receives it: the rule, the slices of the flat buffers and their
//! scalars; and the report of a step.

use super::{Dtype, Shards, Storage, cuda};

/// How an optimiser turns a gradient into an update `u`; the group's scalars then give
/// `θ ← θ - lr·u - decay·θ`. State is f32 unless stated otherwise. The constants are f64, because `1 - beta2`
/// in f32 would already be wrong in the fifth digit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `m ← g + momentum·m`; `u = m`, or `g + momentum·m` with Nesterov. With `bf16` the stored m is rounded,
    /// and the momentum is `bf16(momentum)`, as in JAX (spec: Optax `trace`).
    Sgd {
        /// Decay of m.
        momentum: f64,
        /// Whether `u = g + momentum·m`.
        nesterov: bool,
        /// Whether the first moment is stored in bf16.
        bf16: bool,
    },
    /// Kingma and Ba 2015; decoupled decay is Loshchilov and Hutter 2019. `bf16` rounds the first moment.
    Adam {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
        /// Whether the first moment is stored in bf16.
        bf16: bool,
    },
    /// Chen et al. 2023: `u = sign(beta1·m + (1-beta1)·g)`, then `m ← beta2·m + (1-beta2)·g`.
    Lion {
        /// Weight of m in the update.
        beta1: f64,
        /// Decay of m.
        beta2: f64,
        /// Whether the first moment is stored in bf16.
        bf16: bool,
    },
    /// Shazeer and Stern 2018 in big_vision's form: the second moment, factored where [`Factor::factored`] says so,
    /// decays by `min(beta2_cap, 1 - t^-decay_power)`; then momentum as an EMA without bias correction. `clip_rms` limits
    /// the root mean square of one tensor's update before the momentum.
    Adafactor {
        /// Decay of the momentum.
        momentum: f64,
        /// Largest decay of the second moment.
        beta2_cap: f64,
        /// Power of t in the second moment's decay.
        decay_power: f64,
        /// Largest root mean square of an update. `None`: no limit.
        clip_rms: Option<f64>,
        /// Whether the first moment is stored in bf16.
        bf16: bool,
    },
}

impl Rule {
    /// What the first moment is stored in.
    pub fn first_moment(&self) -> Dtype {
        let (Rule::Sgd { bf16, .. }
        | Rule::Adam { bf16, .. }
        | Rule::Lion { bf16, .. }
        | Rule::Adafactor { bf16, .. }) = *self;
        if bf16 { Dtype::Bf16 } else { Dtype::F32 }
    }

    /// Whether an update treats each element by itself, so that ranks can divide it anywhere.
    pub fn is_elementwise(&self) -> bool {
        !matches!(self, Rule::Adafactor { .. })
    }

    /// f32 values of second moments: Adam's mirror the gradients, Adafactor's are its statistics, others have
    /// none.
    pub fn second_moments(&self, segments: &[Segment]) -> usize {
        match self {
            Rule::Sgd { .. } | Rule::Lion { .. } => 0,
            Rule::Adam { .. } => segments.iter().map(|segment| segment.len).sum(),
            Rule::Adafactor { .. } => {
                segments.iter().filter_map(|s| s.factor.as_ref()).map(|f| f.state_len()).sum()
            }
        }
    }
}

/// One tensor's slice of the flat buffers. Offsets and lengths are in elements and include padding, which stays zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The parameter's name.
    pub name: String,
    /// Offset in the parameter arena.
    pub param: usize,
    /// Offset in the gradient arena; moments mirror it.
    pub grad: usize,
    /// Number of elements.
    pub len: usize,
    /// Index into [`Update::groups`].
    pub group: usize,
    /// For Adafactor: how the tensor is viewed and where its statistics lie in `Moment2`.
    pub factor: Option<Factor>,
}

/// A tensor viewed as `[outer0, outer1, rows, cols]`. An element lies at the sum of its indices times their
/// strides, counted from the segment's start. If `factored`, `Moment2` holds the statistics
/// `[outer0, outer1, rows]` and then `[outer0, outer1, cols]`, starting at `state`, in the same index order;
/// otherwise it holds the whole tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factor {
    /// Sizes of the two outer axes; 1 where there is none.
    pub outer: [usize; 2],
    /// Size of the axis that row statistics keep.
    pub rows: usize,
    /// Size of the axis that column statistics keep.
    pub cols: usize,
    /// Strides of the outer axes.
    pub outer_stride: [usize; 2],
    /// Stride of `rows`.
    pub row_stride: usize,
    /// Stride of `cols`.
    pub col_stride: usize,
    /// First element of the statistics in `Moment2`.
    pub state: usize,
    /// Whether the statistics are means over rows and columns instead of a value per element.
    pub factored: bool,
}

impl Factor {
    /// Values of the tensor.
    pub fn len(&self) -> usize {
        self.outer[0] * self.outer[1] * self.rows * self.cols
    }

    /// Whether the tensor has no values.
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
    /// Learning rate.
    pub lr: f32,
    /// Already multiplied by lr (torch) or by the relative schedule (big_vision).
    pub decay: f32,
}

/// One optimiser update over the flat buffers.
#[derive(Clone, Debug)]
pub struct Update<'a> {
    /// From gradient to update.
    pub rule: Rule,
    /// The tensors to update.
    pub segments: &'a [Segment],
    /// The scalars of each group.
    pub groups: &'a [GroupScalars],
    /// Updates done including this one (Adam's t), from 1.
    pub t: u64,
    /// Limit of the gradient's global norm; above it the gradient is multiplied by `max/norm`.
    pub clip: Option<f32>,
    /// PyTorch's factor `min(1, max/(norm + 1e-6))` instead of Optax's.
    pub clip_torch: bool,
    /// EMA of the weights: `e ← d·e + (1-d)·θ`, in the same pass. It starts as a copy of the weights, so
    /// frozen weights need no pass.
    pub ema_decay: Option<f64>,
    /// Above these nothing is updated. Only a device whose reports the host reads at once takes limits.
    pub limits: Limits,
}

/// What a step may have before its update is skipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// The mean loss over the batch.
    pub loss: f64,
    /// The global norm of the gradient before clipping.
    pub norm: f64,
}

impl Limits {
    /// Whatever is finite.
    pub const NONE: Limits = Limits { loss: f64::INFINITY, norm: f64::INFINITY };

    /// Whether a step with these is updated.
    pub fn allow(&self, loss: f64, norm: f64) -> bool {
        self.allow_loss(loss) && self.allow_norm(norm)
    }

    /// The same for the loss alone.
    pub fn allow_loss(&self, loss: f64) -> bool {
        loss.is_finite() && loss <= self.loss
    }

    /// The same for the norm alone.
    pub fn allow_norm(&self, norm: f64) -> bool {
        norm.is_finite() && norm <= self.norm
    }
}

/// What a step reports.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Mean loss over the batch.
    pub loss: f64,
    /// Share of samples whose largest logit belongs to a true class.
    pub top1: f64,
    /// Share of samples with a true class among the five largest logits.
    pub top5: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// The update was skipped because the loss or the norm was not finite, or above [`Update::limits`].
    pub skipped: bool,
    /// The signal that some rank of a group got, or 0.
    pub signal: i32,
}

/// Bytes of [`super::Arena::Update`] for an optimiser on a device with this storage. `shards` if each rank
/// updates its own.
pub fn update_bytes(storage: Storage, rule: Rule, segments: &[Segment], shards: Option<&Shards>) -> usize {
    if storage.has_device_memory() { cuda::update_bytes(rule, segments, shards) } else { 0 }
}
