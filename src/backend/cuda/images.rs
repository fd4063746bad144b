//! The kernels that `build.rs` has compiled and embedded, and what the compiler said about them.

/// One kernel for one target.
#[derive(Clone, Copy, Debug)]
pub struct KernelReport {
    /// Stem of its source in `kernels/`.
    pub file: &'static str,
    pub name: &'static str,
    pub target: &'static str,
    /// Declared with `HOT_KERNEL`: on the path of every step.
    pub hot: bool,
    pub registers: u32,
    pub spill_bytes: u32,
    pub stack_bytes: u32,
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Kernels in the program, each counted once.
pub fn kernel_count() -> usize {
    let mut names: Vec<_> = KERNELS.iter().map(|k| k.name).collect();
    names.sort_unstable();
    names.dedup();
    names.len()
}

/// One line for `doctor`.
pub fn summary() -> String {
    match WHY_NONE {
        None => format!("embedded for {} ({} kernels)", TARGETS.join(", "), kernel_count()),
        Some(why) => format!("none embedded (built without nvcc: {why})"),
    }
}
