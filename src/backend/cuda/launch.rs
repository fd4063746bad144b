//! How kernels are launched: each takes one struct, and the build reads from `kernels/` which one, the struct's
//! members, and the threads that the kernel was compiled for (`build/contracts.rs`).
//!
//! A launch names its kernel by [`kernel!`] and fills the struct by member names. A name that no kernel has, another
//! kernel's struct, a missing member or one of another type does not compile.

use std::marker::PhantomData;

use super::driver::Address;
use crate::backend::{Mask, Mat, Micro};

/// A struct that a kernel takes.
///
/// # Safety
/// Size, order and meaning of the members are those of the kernel's struct, and every value of it may be copied
/// as bytes.
pub(super) unsafe trait Args: Copy {
    /// The struct's name in `kernels/`.
    const NAME: &'static str;
}

/// `View` of `kernels/types.cuh`: a matrix, or none (address 0).
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(super) struct View {
    pub(super) at: Address,
    /// Elements from one row to the next.
    pub(super) ld: u32,
    pub(super) rows: u32,
    pub(super) cols: u32,
}

const _: () = assert!(size_of::<View>() == 24);

impl View {
    pub(super) const NONE: Self = Self { at: 0, ld: 0, rows: 0, cols: 0 };

    pub(super) fn new(at: Address, mat: Mat) -> Self {
        let word = |n: usize| {
            u32::try_from(n).expect("matrices have fewer than 2^32 rows, columns and elements to a row")
        };
        Self { at, ld: word(mat.ld), rows: word(mat.rows), cols: word(mat.cols) }
    }
}

/// `TensorMap` of `kernels/hopper.cuh`: a matrix as bulk copies take it. [`super::driver::Gpu::tensor_map`] makes it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub(super) struct TensorMap(pub(super) [u64; 16]);

impl MaskArgs {
    pub(super) fn new(mask: Mask, micro: &Micro) -> Self {
        let first = micro.global_first + micro.first as u64;
        Self { rate: mask.rate, site: mask.site, first_sample: first as u32 }
    }
}

/// What the build has read about a kernel.
#[derive(Debug)]
struct Contract {
    name: &'static str,
    args: &'static str,
    threads: u32,
    blocks: u32,
    constants: &'static [(&'static str, u32)],
}

include!(concat!(env!("OUT_DIR"), "/contracts.rs"));

/// A kernel that takes an `A`.
#[derive(Debug)]
pub(super) struct Kernel<A> {
    pub(super) name: &'static str,
    /// Threads of a block: the most that the kernel was compiled for, if [`Kernel::with_threads`] says nothing else.
    pub(super) threads: u32,
    /// Blocks of a multiprocessor that the kernel was compiled for, at least.
    pub(super) blocks: u32,
    constants: &'static [(&'static str, u32)],
    args: PhantomData<fn(A)>,
}

impl<A> Clone for Kernel<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for Kernel<A> {}

impl<A: Args> Kernel<A> {
    /// The kernel of this name. [`kernel!`] calls this while the program is compiled.
    ///
    /// # Panics
    /// There is no such kernel, or it takes another struct.
    pub(super) const fn named(name: &str) -> Self {
        let mut at = 0;
        while at < CONTRACTS.len() {
            let Contract { name: found, args, threads, blocks, constants } = CONTRACTS[at];
            if equal(found, name) {
                assert!(equal(args, A::NAME), "this kernel takes another struct");
                return Self { name: found, threads, blocks, constants, args: PhantomData };
            }
            at += 1;
        }
        panic!("no kernel has this name")
    }

    /// A number that this instance of the kernel was made with: an argument of its macro in `kernels/`.
    ///
    /// # Panics
    /// The macro has no such argument.
    pub(super) const fn constant(&self, name: &str) -> usize {
        let mut at = 0;
        while at < self.constants.len() {
            if equal(self.constants[at].0, name) {
                return self.constants[at].1 as usize;
            }
            at += 1;
        }
        panic!("no number of this name was among the arguments of the kernel's macro")
    }

    /// The same with fewer threads.
    pub(super) fn with_threads(self, threads: u32) -> Self {
        assert!(threads <= self.threads, "{} was compiled for {} threads", self.name, self.threads);
        Self { threads, ..self }
    }
}

const fn equal(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}

/// A kernel by its name, whose parts may be literals of macros: `kernel!("layernorm_bf16_", 3)`.
macro_rules! kernel {
    ($($part:expr),+) => {
        const { $crate::backend::cuda::launch::Kernel::named(concat!($($part),+)) }
    };
}
pub(super) use kernel;

/// A kernel's variant for a storage type: `variant!(dtype, "pool")` is `pool_f32` or `pool_bf16`.
macro_rules! variant {
    ($dtype:expr, $name:literal) => {
        match $dtype {
            $crate::backend::Dtype::F32 => $crate::backend::cuda::launch::kernel!($name, "_f32"),
            $crate::backend::Dtype::Bf16 => $crate::backend::cuda::launch::kernel!($name, "_bf16"),
        }
    };
}
pub(super) use variant;

/// The same for operations between the residual stream and a block: `residual_f32_bf16` where only the stream
/// is f32.
macro_rules! stream_variant {
    ($stream:expr, $dtype:expr, $name:literal) => {
        match ($stream, $dtype) {
            ($crate::backend::Dtype::F32, $crate::backend::Dtype::F32) => {
                $crate::backend::cuda::launch::kernel!($name, "_f32")
            }
            ($crate::backend::Dtype::Bf16, $crate::backend::Dtype::Bf16) => {
                $crate::backend::cuda::launch::kernel!($name, "_bf16")
            }
            ($crate::backend::Dtype::F32, $crate::backend::Dtype::Bf16) => {
                $crate::backend::cuda::launch::kernel!($name, "_f32_bf16")
            }
            ($crate::backend::Dtype::Bf16, $crate::backend::Dtype::F32) => {
                unreachable!("the residual stream is never narrower than what is added to it")
            }
        }
    };
}
pub(super) use stream_variant;
