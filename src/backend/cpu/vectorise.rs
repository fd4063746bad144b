//! Plain loops, compiled once per instruction set.
//!
//! Operations that only stream memory need no hand-written vectors: their loops are written over fixed arrays, and
//! [`vectorised`] compiles them for the widest registers of the machine. Sums run in [`LANES`] partial sums that are
//! combined in a fixed order, so that a sum does not depend on how the loop was compiled.

use super::compute::Isa;

/// Partial sums of a vectorised sum.
pub(super) const LANES: usize = 16;

/// Runs `job` as code for `isa`. What `job` calls must be `#[inline(always)]`, or it is compiled for the baseline.
#[inline(always)]
pub(super) fn vectorised<R>(isa: Isa, job: impl FnOnce() -> R) -> R {
    match isa {
        Isa::Scalar => job(),
        // SAFETY: an `Isa` other than `Scalar` exists only where the processor has it (`Isa::best`, `Isa::from_env`).
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(job) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(job) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => job(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<R>(job: impl FnOnce() -> R) -> R {
    job()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<R>(job: impl FnOnce() -> R) -> R {
    job()
}

/// `S` sums of `term` over the elements of `N` equally long slices.
#[inline(always)]
pub(super) fn sums<const N: usize, const S: usize>(
    inputs: [&[f32]; N],
    term: impl Fn([f32; N]) -> [f32; S],
) -> [f32; S] {
    let len = inputs[0].len();
    let inputs = inputs.map(|input| input[..len].as_chunks::<LANES>());
    let mut partial = [[0.0; LANES]; S];
    for i in 0..len / LANES {
        let chunk = inputs.map(|(whole, _)| &whole[i]);
        for lane in 0..LANES {
            let terms = term(chunk.map(|values| values[lane]));
            for s in 0..S {
                partial[s][lane] += terms[s];
            }
        }
    }
    for lane in 0..len % LANES {
        let terms = term(inputs.map(|(_, rest)| rest[lane]));
        for s in 0..S {
            partial[s][lane] += terms[s];
        }
    }
    partial.map(|mut lanes| {
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        lanes[0]
    })
}
