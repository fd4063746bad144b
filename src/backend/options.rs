//! How a device is opened: the precision it computes in, and what it may do to be fast.

/// The precision of a run. Statistics, losses, master weights, gradients and moments are f32 in each.
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

/// The type in which the residual stream and its gradient are stored when activations are bf16. In other
/// precisions it is f32, like everything else, and the option has no effect.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Residual {
    /// bf16.
    #[default]
    Auto,
    /// Every sum is rounded to bf16 when it is stored: the least memory traffic.
    Bf16,
    /// What a block adds to the stream is rounded, the stream is not. Gradients are nearer to those of f32,
    /// for twice the bytes of x, mid and d_x.
    F32,
}

impl Residual {
    /// The setting's value in a precision. Where everything is stored in f32 it has no effect.
    pub fn settled(self, precision: Precision) -> Residual {
        match (precision, self) {
            (Precision::Bf16, Residual::Auto) => Residual::Bf16,
            (Precision::Bf16, given) => given,
            _ => Residual::Auto,
        }
    }
}

/// Which of a GPU's kernels are used where there are two for the same work.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Kernels {
    /// Those that run on every GPU: no others have been measured.
    #[default]
    Auto,
    /// Those that run on every GPU from Ampere on.
    Portable,
    /// Those written for Hopper (compute capability 9.0), where there is one for the sizes at hand.
    Hopper,
}

/// The environment variable by which the CPU rounds to bf16 what a GPU stores in it ([`super::rounded`]).
pub const CPU_ROUNDS: &str = "VITRUM_CPU_ROUNDS";

/// How a device is opened.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOptions {
    /// The number format of activations and matrix products.
    pub precision: Precision,
    /// Storage of the residual stream when activations are bf16.
    pub residual: Residual,
    /// CPU threads; 0: one per core.
    pub threads: usize,
    /// Record a step once and replay it.
    pub graph: bool,
    /// Wait after every kernel, so that an error names the kernel.
    pub check_launches: bool,
    /// Choose matrix product algorithms by rule instead of by timing.
    pub deterministic: bool,
    /// Which of a GPU's kernels to use.
    pub kernels: Kernels,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Auto,
            residual: Residual::Auto,
            threads: 0,
            graph: true,
            check_launches: false,
            deterministic: false,
            kernels: Kernels::Auto,
        }
    }
}

impl DeviceOptions {
    /// The defaults, with this many CPU threads.
    pub fn threads(threads: usize) -> Self {
        Self { threads, ..Self::default() }
    }
}
