//! The kernels that `build.rs` compiled and embedded, and the compiler's report on them.

/// One kernel for one target.
#[derive(Clone, Copy, Debug)]
pub struct KernelReport {
    /// Stem of its source in `kernels/`.
    pub file: &'static str,
    /// Its name in that source.
    pub name: &'static str,
    /// `sm_90a`, for example.
    pub target: &'static str,
    /// Declared with `HOT_KERNEL`: runs in every step.
    pub hot: bool,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of registers that a thread stores in memory for want of registers.
    pub spill_bytes: u32,
    /// Bytes of local memory of a thread.
    pub stack_bytes: u32,
}

/// A compiled file as bytes aligned to 64: the driver gets its address and reads words there.
#[allow(unused_macros, reason = "a build without nvcc has no images")]
macro_rules! image {
    ($path:expr) => {{
        #[repr(C, align(64))]
        struct Aligned<B: ?Sized>(B);
        static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &IMAGE.0
    }};
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_lie_where_the_driver_can_read_words() {
        for (file, image) in IMAGES {
            assert!(image.as_ptr().addr().is_multiple_of(64), "{file} lies at {:p}", image.as_ptr());
        }
    }
}
