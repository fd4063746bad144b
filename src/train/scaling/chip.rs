//! Devices by their rates, and how long a step should take on one of them: a prediction from the minimum cost
//! of the step's operations, for any recipe.
//!
//! `scripts/predict-gpu` predicts kernel by kernel, for a few models. This is the same for all others, with a
//! few shares instead of tiles; a test compares the two. A measurement replaces it: see [`super::Source`].

use crate::backend::timed::Timing;
use crate::vit::ModelConfig;

/// What a device does at most. The rates of H100, H200 and A100 are those of `scripts/step_model.py`; those of
/// a B200 have an H100's shares of the data sheet, which nobody measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chip {
    /// As `--gpu` takes it.
    pub name: &'static str,
    /// FLOP/s of large products.
    pub product: f64,
    /// Bytes per second of a large copy, reading and writing counted.
    pub copy: f64,
    /// Multiprocessors times their clock: what attention's instructions are issued at.
    pub issue: f64,
    /// Bytes of memory.
    pub memory: f64,
    /// Bytes per second that a ring over NVLink reaches on each GPU.
    pub nvlink: f64,
    /// The same over PCIe.
    pub pcie: f64,
    /// Seconds from one kernel to the next.
    pub gap: f64,
}

/// GPUs that plans know, by the names of `--gpu`.
pub const CHIPS: [Chip; 4] = [
    Chip {
        name: "h100",
        product: 790e12,
        copy: 3.0e12,
        issue: 132.0 * 1.755e9,
        memory: 80e9,
        nvlink: 370e9,
        pcie: 40e9,
        gap: 1.5e-6,
    },
    Chip {
        name: "h200",
        product: 790e12,
        copy: 4.3e12,
        issue: 132.0 * 1.755e9,
        memory: 141e9,
        nvlink: 370e9,
        pcie: 40e9,
        gap: 1.5e-6,
    },
    Chip {
        name: "a100",
        product: 270e12,
        copy: 1.75e12,
        issue: 108.0 * 1.41e9,
        memory: 80e9,
        nvlink: 230e9,
        pcie: 20e9,
        gap: 1.5e-6,
    },
    Chip {
        name: "b200",
        product: 1800e12,
        copy: 7.2e12,
        issue: 148.0 * 1.85e9,
        memory: 180e9,
        nvlink: 740e9,
        pcie: 40e9,
        gap: 1.5e-6,
    },
];

/// A core of a processor. Its rates only divide a measured step into forward, backward and update.
pub const CORE: Chip = Chip {
    name: "cpu",
    product: 80e9,
    copy: 10e9,
    issue: 80e9 / 1300.0,
    memory: f64::INFINITY,
    nvlink: 0.0,
    pcie: 0.0,
    gap: 0.0,
};

/// Shares of a chip's rates that operations reach: the likely case of `scripts/step_model.py`.
pub mod share {
    /// Products, forward and of input gradients, without what short sums lose.
    pub const PRODUCT: f64 = 0.95;
    /// Weight gradients.
    pub const WEIGHT_GRADIENT: f64 = 0.86;
    /// The k at which a product has half of its rate.
    pub const SHORT_K: f64 = 160.0;
    /// Operations limited by memory, of the copy rate.
    pub const COPY: f64 = 0.85;
    /// FLOPs of attention per issued clock for long heads, forward and backward, and the number of tokens at
    /// which half of it is reached: fitted to 197 and 577 tokens with heads of 64.
    pub const ATTENTION: [(f64, f64); 2] = [(1330.0, 126.0), (1105.0, 66.0)];
    /// The two kernels of a product's backward both read d_y, so each moves more than half of the operation's
    /// bytes: on average over a block's layers, and with fc2's GELU, whose factor only one of them reads.
    pub const OF_BACKWARD: [f64; 2] = [0.79, 0.54];
    /// The shortest kernel, in gaps.
    pub const LEAST: f64 = 5.0 / 3.0;
}

/// Seconds of a step on one device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTime {
    /// Forward passes and losses of all micro-batches.
    pub forward: f64,
    /// Backward passes of all micro-batches.
    pub backward: f64,
    /// Gradient norm and update of all parameters.
    pub update: f64,
}

impl StepTime {
    /// Seconds from the operations of a step and their minimum cost.
    pub fn predicted(operations: &[Timing], config: &ModelConfig, chip: &Chip) -> Self {
        let mut time = Self::default();
        for operation in operations {
            let part = match operation.operation {
                "update" => &mut time.update,
                name if name.contains("backward") => &mut time.backward,
                _ => &mut time.forward,
            };
            *part += seconds(operation, config, chip);
        }
        time
    }

    /// Seconds of the whole step.
    pub fn total(&self) -> f64 {
        self.forward + self.backward + self.update
    }

    /// The same step on a device that is slower by a factor.
    pub fn times(&self, factor: f64) -> Self {
        Self {
            forward: self.forward * factor,
            backward: self.backward * factor,
            update: self.update * factor,
        }
    }
}

fn seconds(operation: &Timing, config: &ModelConfig, chip: &Chip) -> f64 {
    let Timing { operation: name, calls, cost, .. } = operation;
    let flops = cost.flops as f64;
    let attention = |(rate, half): (f64, f64)| {
        let tokens = config.tokens() as f64;
        chip.issue * rate * tokens / (tokens + half)
    };
    let forward = chip.product * share::PRODUCT * long_sums(config);
    let moved = cost.bytes() as f64 / (share::COPY * chip.copy);
    let (kernels, work) = match *name {
        "attention" => (1, (flops / attention(share::ATTENTION[0])).max(moved)),
        "attention_backward" => (1, (flops / attention(share::ATTENTION[1])).max(moved)),
        name if name.starts_with("matmul_backward") => {
            let moved = moved * share::OF_BACKWARD[usize::from(name.ends_with("gelu"))];
            let of_weights = flops / 2.0 / (chip.product * share::WEIGHT_GRADIENT);
            (2, (flops / 2.0 / forward).max(moved) + of_weights.max(moved))
        }
        _ => (1, (flops / forward).max(moved)),
    };
    let launches = (kernels * calls) as f64 * chip.gap;
    work.max(share::LEAST * launches) + launches
}

/// The share of the rate that is left by the lengths of a block's sums: D for qkv, proj and fc1, M for fc2.
fn long_sums(config: &ModelConfig) -> f64 {
    let (d, m) = (config.width as f64, config.mlp as f64);
    let (of_width, of_mlp) = (4.0 * d * d + d * m, d * m);
    let time = of_width * (1.0 + share::SHORT_K / d) + of_mlp * (1.0 + share::SHORT_K / m);
    (of_width + of_mlp) / time
}
