//! The CPU backend (being written).
pub mod attention;
pub mod compute;
pub mod gemm;
pub mod math;
pub mod probe_attention;
pub mod simd;
pub mod view;

#[cfg(test)]
mod testing;
