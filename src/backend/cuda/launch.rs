//! Kernel arguments by address, as the driver expects them.

use std::ffi::c_void;

use crate::backend::{Mask, Micro};

/// What may be passed to a kernel: plain data with the same layout on both sides.
///
/// # Safety
/// The type is `repr(C)` or primitive, and equals the kernel's parameter in size and meaning.
pub(super) unsafe trait Argument: Copy {}

// SAFETY: primitives have the same layout in C++.
unsafe impl Argument for u64 {}
// SAFETY: as above.
unsafe impl Argument for u32 {}
// SAFETY: as above.
unsafe impl Argument for i32 {}
// SAFETY: as above.
unsafe impl Argument for f32 {}
// SAFETY: as above.
unsafe impl Argument for f64 {}

/// `MaskArgs` of `kernels/philox.cuh`: the part of a mask that is the same in every step.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct MaskArgs {
    pub(super) rate: f32,
    pub(super) site: u32,
    /// Index in the global batch of the micro-batch's first sample; the low 32 bits.
    pub(super) first_sample: u32,
}

// SAFETY: three words, as in `kernels/philox.cuh`.
unsafe impl Argument for MaskArgs {}

impl MaskArgs {
    pub(super) fn new(mask: Mask, micro: &Micro) -> Self {
        let first = micro.global_first + micro.first as u64;
        Self { rate: mask.rate, site: mask.site, first_sample: first as u32 }
    }
}

/// The address of an argument that outlives the launch.
pub(super) fn address_of<T: Argument>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// Starts a kernel: `launch!(cuda, "pool_bf16", [blocks, 1, 1], 256, 0, x, ld as u32, ...)?`. Arguments are
/// evaluated once, in the order of the kernel's signature; their types must be exactly those of the kernel.
macro_rules! launch {
    ($cuda:expr, $kernel:expr, $grid:expr, $block:expr, $shared:expr $(, $argument:expr)* $(,)?) => {{
        launch!(@bind [$cuda.gpu] $kernel, $grid, $block, $shared, [$($argument,)*] [])
    }};
    (@bind [$gpu:expr] $kernel:expr, $grid:expr, $block:expr, $shared:expr, [$first:expr, $($rest:expr,)*] [$($done:ident)*]) => {{
        let argument = $first;
        launch!(@bind [$gpu] $kernel, $grid, $block, $shared, [$($rest,)*] [$($done)* argument])
    }};
    (@bind [$gpu:expr] $kernel:expr, $grid:expr, $block:expr, $shared:expr, [] [$($done:ident)*]) => {
        $gpu.launch($kernel, $grid, $block, $shared, &mut [$($crate::backend::cuda::launch::address_of(&$done)),*])
    };
}
pub(super) use launch;

/// Names a kernel's variant for a storage type: `variant!(dtype, "pool")` is `"pool_f32"` or `"pool_bf16"`.
macro_rules! variant {
    ($dtype:expr, $name:literal) => {
        match $dtype {
            $crate::backend::Dtype::F32 => concat!($name, "_f32"),
            $crate::backend::Dtype::Bf16 => concat!($name, "_bf16"),
        }
    };
}
pub(super) use variant;

/// The same for operations between the residual stream and a block: `"residual_f32_bf16"` where only the
/// stream is f32.
macro_rules! stream_variant {
    ($stream:expr, $dtype:expr, $name:literal) => {
        match ($stream, $dtype) {
            ($crate::backend::Dtype::F32, $crate::backend::Dtype::F32) => concat!($name, "_f32"),
            ($crate::backend::Dtype::Bf16, $crate::backend::Dtype::Bf16) => concat!($name, "_bf16"),
            ($crate::backend::Dtype::F32, $crate::backend::Dtype::Bf16) => concat!($name, "_f32_bf16"),
            ($crate::backend::Dtype::Bf16, $crate::backend::Dtype::F32) => {
                unreachable!("the residual stream is never narrower than what is added to it")
            }
        }
    };
}
pub(super) use stream_variant;
