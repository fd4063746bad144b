//! Vectors of f32: one trait, three instruction sets, so that each kernel is written once.
//!
//! A value of a [`Simd`] type is a proof: it exists only where the processor has its instructions.
//! [`Isa::run`] creates one and passes it to a [`Task`] across a `#[target_feature]` boundary. Everything the
//! task calls must be `#[inline(always)]` (and not a closure), or it would be compiled without the features.
//! The whole body of an operation is one such task, so the choice costs one branch per task and nothing per
//! element.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::compute::Isa;
use super::gemm::tile::{Tile, TileFn, tile};

/// Vector arithmetic on `LANES` values. Methods on pointers are unsafe; the arithmetic is safe because `self` proves
/// that the instructions exist.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Values of a vector.
    const LANES: usize;
    /// Most rows of a matmul tile, which is two vectors wide: its accumulators fill the register file.
    const MR: usize;
    type V: Copy;

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `from` must be valid for reads of `LANES` values.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// # Safety
    /// `to` must be valid for writes of `LANES` values.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// The first `n` lanes; the others are zero.
    /// # Safety
    /// `n <= LANES`, and `from` must be valid for reads of `n` values.
    unsafe fn load_head(self, from: *const f32, n: usize) -> Self::V;
    /// Stores the first `n` lanes only.
    /// # Safety
    /// `n <= LANES`, and `to` must be valid for writes of `n` values.
    unsafe fn store_head(self, to: *mut f32, v: Self::V, n: usize);
    /// `v` in the first `n` lanes, `other` in the rest.
    fn keep_head(self, v: Self::V, n: usize, other: Self::V) -> Self::V;

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `1/a` for `1 ≤ a < 2^126`, to two units in the last place.
    fn recip(self, a: Self::V) -> Self::V {
        self.div(self.splat(1.0), a)
    }
    /// `a·b + c`; rounded once if the instruction set has a fused form.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a·b`
    fn nfma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: a NaN in `b` survives.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`: a NaN in `b` survives.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    fn abs(self, a: Self::V) -> Self::V;
    /// `if a < b { x } else { y }`, lane by lane.
    fn select_less(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `a·2^n` for whole `n` in -252..=252, with gradual underflow.
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V;
    /// `(m, e)` with `a = m·2^e` and m in [1, 2), for normal positive a.
    fn split_exponent(self, a: Self::V) -> (Self::V, Self::V);
    /// Sum of the lanes.
    fn sum(self, a: Self::V) -> f32;
    /// The largest lane.
    fn largest(self, a: Self::V) -> f32;

    /// `to[c·to_ld + r] = from[r·from_ld + c]` for r, c in 0..8.
    /// # Safety
    /// Eight rows of eight values must be readable at `from` and writable at `to`.
    unsafe fn transpose8(self, from: *const f32, from_ld: usize, to: *mut f32, to_ld: usize);

    /// The matmul micro-kernel for `rows` in `1..=MR` and one or two vectors of columns.
    fn tile(self, rows: usize, vectors: usize) -> TileFn;
}

/// Work that is compiled once per instruction set.
pub trait Task {
    type Out;
    /// Implementations must be `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

impl Isa {
    /// Runs `task` with this instruction set.
    /// # Panics
    /// If the machine does not have it.
    pub fn run<T: Task>(self, task: T) -> T::Out {
        assert!(self <= Isa::best(), "this machine has no {}", self.name());
        match self {
            Isa::Scalar => task.run(Scalar(())),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: by the assert the processor has AVX2 and FMA.
            Isa::Avx2 => unsafe { run_avx2(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: by the assert the processor has AVX-512 F, BW, DQ, VL and AVX2, FMA.
            Isa::Avx512 => unsafe { run_avx512(task) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("the best of this machine is scalar"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<T: Task>(task: T) -> T::Out {
    task.run(Avx2(()))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<T: Task>(task: T) -> T::Out {
    task.run(Avx512(()))
}

/// Rows of the widest micro-kernel of any instruction set.
pub const MAX_MR: usize = 12;
/// Columns of the widest micro-kernel of any instruction set.
pub const MAX_NR: usize = 32;

/// One micro-kernel per number of rows and vectors.
macro_rules! tiles {
    ($f:ident: $($rows:literal)*) => { [$([$f::<$rows, 1>, $f::<$rows, 2>]),*] };
}

// Portable ------------------------------------------------------------------------------------------------------

/// Four lanes in plain Rust, which compilers turn into SSE2 or NEON.
#[derive(Clone, Copy)]
pub struct Scalar(());

type Four = [f32; 4];

#[inline(always)]
fn map1(a: Four, f: impl Fn(f32) -> f32) -> Four {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

#[inline(always)]
fn map2(a: Four, b: Four, f: impl Fn(f32, f32) -> f32) -> Four {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

unsafe fn tile_scalar<const M: usize, const N: usize>(t: &Tile) {
    // SAFETY: the caller's promise about the tile.
    unsafe { tile::<Scalar, M, N>(Scalar(()), t) }
}

impl Simd for Scalar {
    const LANES: usize = 4;
    const MR: usize = 4;
    type V = Four;

    #[inline(always)]
    fn splat(self, x: f32) -> Four {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Four {
        // SAFETY: the caller's promise; an array of f32 may lie anywhere an f32 may.
        unsafe { from.cast::<Four>().read() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Four) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<Four>().write(v) }
    }
    #[inline(always)]
    unsafe fn load_head(self, from: *const f32, n: usize) -> Four {
        let mut v = [0.0; 4];
        for (i, lane) in v.iter_mut().enumerate().take(n) {
            // SAFETY: i < n, and n values are readable by the caller's promise.
            *lane = unsafe { *from.add(i) };
        }
        v
    }
    #[inline(always)]
    unsafe fn store_head(self, to: *mut f32, v: Four, n: usize) {
        for (i, lane) in v.iter().enumerate().take(n) {
            // SAFETY: i < n, and n values are writable by the caller's promise.
            unsafe { *to.add(i) = *lane };
        }
    }
    #[inline(always)]
    fn keep_head(self, v: Four, n: usize, other: Four) -> Four {
        let mut out = other;
        out[..n].copy_from_slice(&v[..n]);
        out
    }
    #[inline(always)]
    fn add(self, a: Four, b: Four) -> Four {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Four, b: Four) -> Four {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Four, b: Four) -> Four {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Four, b: Four) -> Four {
        map2(a, b, |a, b| a / b)
    }
    // Two roundings: without the instruction `f32::mul_add` is a slow call.
    #[inline(always)]
    fn fma(self, a: Four, b: Four, c: Four) -> Four {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn nfma(self, a: Four, b: Four, c: Four) -> Four {
        self.sub(c, self.mul(a, b))
    }
    #[inline(always)]
    fn max(self, a: Four, b: Four) -> Four {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Four, b: Four) -> Four {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Four) -> Four {
        map1(a, f32::abs)
    }
    #[inline(always)]
    fn select_less(self, a: Four, b: Four, x: Four, y: Four) -> Four {
        let mut out = y;
        for i in 0..4 {
            if a[i] < b[i] {
                out[i] = x[i];
            }
        }
        out
    }
    #[inline(always)]
    fn round(self, a: Four) -> Four {
        // Adding 1.5·2^23 leaves no bits for a fraction. The callers' values are below 2^22.
        const SHIFT: f32 = 12_582_912.0;
        map1(a, |a| (a + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn scale2(self, a: Four, n: Four) -> Four {
        map2(a, n, |a, n| {
            let n = n as i32;
            let half = n >> 1;
            let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
            a * power(half) * power(n - half)
        })
    }
    #[inline(always)]
    fn split_exponent(self, a: Four) -> (Four, Four) {
        let mantissa = map1(a, |a| f32::from_bits(a.to_bits() & 0x007f_ffff | 0x3f80_0000));
        (mantissa, map1(a, |a| ((a.to_bits() >> 23) as i32 - 127) as f32))
    }
    #[inline(always)]
    fn sum(self, a: Four) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn largest(self, a: Four) -> f32 {
        a[0].max(a[1]).max(a[2].max(a[3]))
    }
    #[inline(always)]
    unsafe fn transpose8(self, from: *const f32, from_ld: usize, to: *mut f32, to_ld: usize) {
        for r in 0..8 {
            for c in 0..8 {
                // SAFETY: eight rows of eight values on both sides, by the caller's promise.
                unsafe { *to.add(c * to_ld + r) = *from.add(r * from_ld + c) };
            }
        }
    }
    #[inline(always)]
    fn tile(self, rows: usize, vectors: usize) -> TileFn {
        static TILES: [[TileFn; 2]; 4] = tiles!(tile_scalar: 1 2 3 4);
        TILES[rows - 1][vectors - 1]
    }
}

// AVX2 and FMA --------------------------------------------------------------------------------------------------

/// Eight lanes.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx2(());

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const M: usize, const N: usize>(t: &Tile) {
    // SAFETY: the caller's promise about the tile.
    unsafe { tile::<Avx2, M, N>(Avx2(()), t) }
}

/// `HEADS[8 - n..]` starts with n ones.
#[cfg(target_arch = "x86_64")]
static HEADS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn head_mask(_proof: Avx2, n: usize) -> __m256i {
    assert!(n <= 8);
    // SAFETY: `8 - n..16 - n` lies inside the table; the proof says that AVX2 exists.
    unsafe { _mm256_loadu_si256(HEADS.as_ptr().add(8 - n).cast()) }
}

// SAFETY, for all blocks of this impl that say "proof": `self` exists only behind the `avx2,fma` boundary.
#[cfg(target_arch = "x86_64")]
impl Simd for Avx2 {
    const LANES: usize = 8;
    const MR: usize = 6;
    type V = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: proof, and the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m256) {
        // SAFETY: proof, and the caller's promise.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn load_head(self, from: *const f32, n: usize) -> __m256 {
        // SAFETY: proof; masked lanes are not read.
        unsafe { _mm256_maskload_ps(from, head_mask(self, n)) }
    }
    #[inline(always)]
    unsafe fn store_head(self, to: *mut f32, v: __m256, n: usize) {
        // SAFETY: proof; masked lanes are not written.
        unsafe { _mm256_maskstore_ps(to, head_mask(self, n), v) }
    }
    #[inline(always)]
    fn keep_head(self, v: __m256, n: usize, other: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_blendv_ps(other, v, _mm256_castsi256_ps(head_mask(self, n))) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn nfma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    fn select_less(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m256, n: __m256) -> __m256 {
        // SAFETY: proof.
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            // In two halves: a single factor 2^n does not exist below 2^-126.
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high))
        }
    }
    #[inline(always)]
    fn split_exponent(self, a: __m256) -> (__m256, __m256) {
        // SAFETY: proof.
        unsafe {
            let bits = _mm256_castps_si256(a);
            let fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x007f_ffff));
            let mantissa = _mm256_or_si256(fraction, _mm256_set1_epi32(0x3f80_0000));
            let exponent = _mm256_sub_epi32(_mm256_srli_epi32::<23>(bits), _mm256_set1_epi32(127));
            (_mm256_castsi256_ps(mantissa), _mm256_cvtepi32_ps(exponent))
        }
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        // SAFETY: proof.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn largest(self, a: __m256) -> f32 {
        // SAFETY: proof.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn transpose8(self, from: *const f32, from_ld: usize, to: *mut f32, to_ld: usize) {
        // SAFETY: proof; eight rows of eight values on both sides, by the caller's promise.
        unsafe {
            let (r0, r1) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(from_ld)));
            let from = from.add(2 * from_ld);
            let (r2, r3) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(from_ld)));
            let from = from.add(2 * from_ld);
            let (r4, r5) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(from_ld)));
            let from = from.add(2 * from_ld);
            let (r6, r7) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(from_ld)));
            let (a0, a1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
            let (a2, a3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
            let (a4, a5) = (_mm256_unpacklo_ps(r4, r5), _mm256_unpackhi_ps(r4, r5));
            let (a6, a7) = (_mm256_unpacklo_ps(r6, r7), _mm256_unpackhi_ps(r6, r7));
            // Columns 0..4 (low half) and 4..8 (high half) of rows 0..4, then of rows 4..8.
            let (b0, b1) = (_mm256_shuffle_ps::<0x44>(a0, a2), _mm256_shuffle_ps::<0xee>(a0, a2));
            let (b2, b3) = (_mm256_shuffle_ps::<0x44>(a1, a3), _mm256_shuffle_ps::<0xee>(a1, a3));
            let (b4, b5) = (_mm256_shuffle_ps::<0x44>(a4, a6), _mm256_shuffle_ps::<0xee>(a4, a6));
            let (b6, b7) = (_mm256_shuffle_ps::<0x44>(a5, a7), _mm256_shuffle_ps::<0xee>(a5, a7));
            _mm256_storeu_ps(to, _mm256_permute2f128_ps::<0x20>(b0, b4));
            _mm256_storeu_ps(to.add(to_ld), _mm256_permute2f128_ps::<0x20>(b1, b5));
            _mm256_storeu_ps(to.add(2 * to_ld), _mm256_permute2f128_ps::<0x20>(b2, b6));
            _mm256_storeu_ps(to.add(3 * to_ld), _mm256_permute2f128_ps::<0x20>(b3, b7));
            _mm256_storeu_ps(to.add(4 * to_ld), _mm256_permute2f128_ps::<0x31>(b0, b4));
            _mm256_storeu_ps(to.add(5 * to_ld), _mm256_permute2f128_ps::<0x31>(b1, b5));
            _mm256_storeu_ps(to.add(6 * to_ld), _mm256_permute2f128_ps::<0x31>(b2, b6));
            _mm256_storeu_ps(to.add(7 * to_ld), _mm256_permute2f128_ps::<0x31>(b3, b7));
        }
    }
    #[inline(always)]
    fn tile(self, rows: usize, vectors: usize) -> TileFn {
        static TILES: [[TileFn; 2]; 6] = tiles!(tile_avx2: 1 2 3 4 5 6);
        TILES[rows - 1][vectors - 1]
    }
}

// AVX-512 -------------------------------------------------------------------------------------------------------

/// Sixteen lanes.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx512(());

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile_avx512<const M: usize, const N: usize>(t: &Tile) {
    // SAFETY: the caller's promise about the tile.
    unsafe { tile::<Avx512, M, N>(Avx512(()), t) }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn head_bits(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

// SAFETY, for all blocks of this impl that say "proof": `self` exists only behind the `avx512...` boundary.
#[cfg(target_arch = "x86_64")]
impl Simd for Avx512 {
    const LANES: usize = 16;
    const MR: usize = 12;
    type V = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: proof, and the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m512) {
        // SAFETY: proof, and the caller's promise.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn load_head(self, from: *const f32, n: usize) -> __m512 {
        // SAFETY: proof; masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(head_bits(n), from) }
    }
    #[inline(always)]
    unsafe fn store_head(self, to: *mut f32, v: __m512, n: usize) {
        // SAFETY: proof; masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(to, head_bits(n), v) }
    }
    #[inline(always)]
    fn keep_head(self, v: __m512, n: usize, other: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_mask_blend_ps(head_bits(n), other, v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn recip(self, a: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe {
            // 14 bits, and one step of Newton's method.
            let r = _mm512_rcp14_ps(a);
            _mm512_fmadd_ps(_mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0)), r, r)
        }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn nfma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn select_less(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m512, n: __m512) -> __m512 {
        // SAFETY: proof.
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn split_exponent(self, a: __m512) -> (__m512, __m512) {
        // SAFETY: proof.
        unsafe { (_mm512_getmant_ps::<_MM_MANT_NORM_1_2, _MM_MANT_SIGN_SRC>(a), _mm512_getexp_ps(a)) }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: proof.
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        // SAFETY: proof.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    unsafe fn transpose8(self, from: *const f32, from_ld: usize, to: *mut f32, to_ld: usize) {
        // SAFETY: the boundary of AVX-512 enables AVX2 too; the rest is the caller's promise.
        unsafe { Avx2(()).transpose8(from, from_ld, to, to_ld) }
    }
    #[inline(always)]
    fn tile(self, rows: usize, vectors: usize) -> TileFn {
        static TILES: [[TileFn; 2]; 12] = tiles!(tile_avx512: 1 2 3 4 5 6 7 8 9 10 11 12);
        TILES[rows - 1][vectors - 1]
    }
}
