//! The vector work of the JPEG decoder, portable and for AVX2: inverse cosine transforms, and the
//! interleaving of three channels. Both give the same bits.
//!
//! The transform is libjpeg's accurate integer one (`islow`: Loeffler, Ligtenberg and Moschytz 1989, with 13
//! fractional bits, and 2 more between its passes), written as the matrix product that it is. All sums are of
//! integers, so order and form do not change the result.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::block::{load, store, transpose};
use super::scaled;

/// The operations that the decoder needs from an instruction set. A value proves that the processor has it.
pub(super) trait Isa: Copy {
    /// Coefficients (dequantised, row by row) to 8×8 samples in rows of `stride` bytes.
    fn idct(self, coefficients: &[i16; 64], out: &mut [u8], stride: usize);
    /// To the 4×4 samples of half the size ([`scaled`]).
    fn idct4(self, coefficients: &[i16; 64], out: &mut [u8], stride: usize);
    /// `out[3·i..]` becomes `r[i], g[i], b[i]`. All three have the same length, `out` three times that.
    fn interleave(self, r: &[u8], g: &[u8], b: &[u8], out: &mut [u8]);
}

/// √2·cos(k·π/16) in various sums, times 2^13: rows of the odd half, for inputs 1, 3, 5, 7.
const ODD: [[i16; 4]; 4] = [
    [11363, 9633, 6437, 2260],
    [9633, -2259, -11362, -6436],
    [6437, -11362, 2261, 9633],
    [2260, -6436, 9633, -11363],
];
/// The even half, for inputs 2 and 6.
const EVEN: [[i16; 2]; 2] = [[10703, 4433], [4433, -10704]];
const ONE: i16 = 1 << 13;

#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Isa for Portable {
    #[inline(always)]
    fn idct(self, coefficients: &[i16; 64], out: &mut [u8], stride: usize) {
        let columns = transpose(pass::<11>(load(coefficients)));
        store(transpose(pass::<18>(columns)), out, stride);
    }

    #[inline(always)]
    fn idct4(self, coefficients: &[i16; 64], out: &mut [u8], stride: usize) {
        scaled::idct4(coefficients, out, stride);
    }

    #[inline(always)]
    fn interleave(self, r: &[u8], g: &[u8], b: &[u8], out: &mut [u8]) {
        for (i, pixel) in out.chunks_exact_mut(3).enumerate() {
            pixel.copy_from_slice(&[r[i], g[i], b[i]]);
        }
    }
}

/// One pass down the columns of eight rows. Values beyond 16 bits are clamped, as in the vector form.
#[inline(always)]
fn pass<const SHIFT: u32>(x: [[i32; 8]; 8]) -> [[i32; 8]; 8] {
    let mut out = [[0; 8]; 8];
    for column in 0..8 {
        let x = |row: usize| x[row][column];
        let pair = |c: [i16; 2]| x(2).wrapping_mul(c[0].into()).wrapping_add(x(6).wrapping_mul(c[1].into()));
        let (sum, difference) = ((x(0) + x(4)) << 13, (x(0) - x(4)) << 13);
        let (a, b) = (pair(EVEN[0]), pair(EVEN[1]));
        let round = 1 << (SHIFT - 1);
        let even = [
            sum.wrapping_add(a).wrapping_add(round),
            difference.wrapping_add(b).wrapping_add(round),
            difference.wrapping_sub(b).wrapping_add(round),
            sum.wrapping_sub(a).wrapping_add(round),
        ];
        for k in 0..4 {
            let odd = (0..4).fold(0i32, |s, i| s.wrapping_add(x(2 * i + 1).wrapping_mul(ODD[k][i].into())));
            let cut = |v: i32| (v >> SHIFT).clamp(i16::MIN.into(), i16::MAX.into());
            out[k][column] = cut(even[k].wrapping_add(odd));
            out[7 - k][column] = cut(even[k].wrapping_sub(odd));
        }
    }
    out
}

/// AVX2, and the bit instructions of the processors that have it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// `None` if the processor lacks it.
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt");
        has.then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl Isa for Avx2 {
    #[inline(always)]
    fn idct(self, coefficients: &[i16; 64], out: &mut [u8], stride: usize) {
        // SAFETY: `self` exists only where the processor has AVX2 (`Avx2::detect`).
        let rows = unsafe { idct_avx2(bytemuck::cast(*coefficients)) };
        let rows: [[u8; 8]; 8] = bytemuck::cast(rows);
        for (y, row) in rows.iter().enumerate() {
            out[y * stride..][..8].copy_from_slice(row);
        }
    }

    #[inline(always)]
    fn idct4(self, coefficients: &[i16; 64], out: &mut [u8], stride: usize) {
        // SAFETY: `self` exists only where the processor has AVX2 (`Avx2::detect`).
        let rows = unsafe { idct4_avx2(bytemuck::cast(*coefficients)) };
        let rows: [[u8; 4]; 4] = bytemuck::cast(rows);
        for (y, row) in rows.iter().enumerate() {
            out[y * stride..][..4].copy_from_slice(row);
        }
    }

    #[inline(always)]
    fn interleave(self, r: &[u8], g: &[u8], b: &[u8], out: &mut [u8]) {
        let whole = out.len() / 48;
        let chunks = r.chunks_exact(16).zip(g.chunks_exact(16)).zip(b.chunks_exact(16));
        for (((r, g), b), out) in chunks.zip(out.chunks_exact_mut(48)) {
            let load = |x: &[u8]| bytemuck::cast::<[u8; 16], __m128i>(x.try_into().unwrap());
            // SAFETY: `self` exists only where the processor has AVX2 (`Avx2::detect`).
            let pixels = unsafe { interleave_avx2([load(r), load(g), load(b)]) };
            out.copy_from_slice(&bytemuck::cast::<_, [u8; 48]>(pixels));
        }
        let from = whole * 16;
        Portable.interleave(&r[from..], &g[from..], &b[from..], &mut out[whole * 48..]);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn idct_avx2(rows: [__m128i; 8]) -> [__m128i; 4] {
    let columns = transpose_avx2(pass_avx2::<11>(rows));
    let rows = transpose_avx2(pass_avx2::<18>(columns));
    // To i8 and from there to u8: this adds 128 and clamps at both ends.
    let middle = _mm_set1_epi8(i8::MIN);
    std::array::from_fn(|i| _mm_xor_si128(_mm_packs_epi16(rows[2 * i], rows[2 * i + 1]), middle))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn idct4_avx2(rows: [__m128i; 8]) -> __m128i {
    let [r0, r1, r2, r3] = pass4_avx2::<{ scaled::SHIFTS4.0 as i32 }>(rows);
    let none = _mm_setzero_si128();
    let columns = transpose_avx2([r0, r1, r2, r3, none, none, none, none]);
    // Only four lanes of these are used.
    let [c0, c1, c2, c3] = pass4_avx2::<{ scaled::SHIFTS4.1 as i32 }>(columns);
    let (left, right) = (_mm_unpacklo_epi16(c0, c1), _mm_unpacklo_epi16(c2, c3));
    let (top, bottom) = (_mm_unpacklo_epi32(left, right), _mm_unpackhi_epi32(left, right));
    _mm_xor_si128(_mm_packs_epi16(top, bottom), _mm_set1_epi8(i8::MIN))
}

/// Rows `a` and `b` of a pass, their values in pairs.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn pairs_avx2(a: __m128i, b: __m128i) -> __m256i {
    _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b))
}

/// Of each pair, `a` times the first plus `b` times the second.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn times_avx2(pairs: __m256i, a: i16, b: i16) -> __m256i {
    _mm256_madd_epi16(pairs, _mm256_set1_epi32(i32::from(a as u16) | i32::from(b) << 16))
}

/// Two rows of sums, narrowed to 16 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn pack_avx2(a: __m256i, b: __m256i) -> [__m128i; 2] {
    let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
    [_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both)]
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn pass4_avx2<const SHIFT: i32>(x: [__m128i; 8]) -> [__m128i; 4] {
    let (x13, x57) = (pairs_avx2(x[1], x[3]), pairs_avx2(x[5], x[7]));
    // Twice 2^13 is 2^14.
    let mean = times_avx2(pairs_avx2(x[0], x[0]), ONE, ONE);
    let mean = _mm256_add_epi32(mean, _mm256_set1_epi32(1 << (SHIFT - 1)));
    let even = times_avx2(pairs_avx2(x[2], x[6]), scaled::EVEN4[0], scaled::EVEN4[1]);
    let bases = [_mm256_add_epi32(mean, even), _mm256_sub_epi32(mean, even)];
    let odds = scaled::ODD4
        .map(|[c1, c3, c5, c7]| _mm256_add_epi32(times_avx2(x13, c1, c3), times_avx2(x57, c5, c7)));
    let low = |k: usize| _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(bases[k], odds[k]));
    let high = |k: usize| _mm256_srai_epi32::<SHIFT>(_mm256_sub_epi32(bases[k], odds[k]));
    let [r0, r1] = pack_avx2(low(0), low(1));
    let [r2, r3] = pack_avx2(high(1), high(0));
    [r0, r1, r2, r3]
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn pass_avx2<const SHIFT: i32>(x: [__m128i; 8]) -> [__m128i; 8] {
    let pair = |a: usize, b: usize| pairs_avx2(x[a], x[b]);
    let times = |pairs: __m256i, a: i16, b: i16| times_avx2(pairs, a, b);
    let (x04, x26, x13, x57) = (pair(0, 4), pair(2, 6), pair(1, 3), pair(5, 7));
    let round = _mm256_set1_epi32(1 << (SHIFT - 1));
    let sum = _mm256_add_epi32(times(x04, ONE, ONE), round);
    let difference = _mm256_add_epi32(times(x04, ONE, -ONE), round);
    let (a, b) = (times(x26, EVEN[0][0], EVEN[0][1]), times(x26, EVEN[1][0], EVEN[1][1]));
    let even = [
        _mm256_add_epi32(sum, a),
        _mm256_add_epi32(difference, b),
        _mm256_sub_epi32(difference, b),
        _mm256_sub_epi32(sum, a),
    ];
    let odd: [__m256i; 4] = std::array::from_fn(|k| {
        let [c1, c3, c5, c7] = ODD[k];
        _mm256_add_epi32(times(x13, c1, c3), times(x57, c5, c7))
    });
    let low = |k: usize| _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(even[k], odd[k]));
    let high = |k: usize| _mm256_srai_epi32::<SHIFT>(_mm256_sub_epi32(even[k], odd[k]));
    let [r0, r1] = pack_avx2(low(0), low(1));
    let [r2, r3] = pack_avx2(low(2), low(3));
    let [r4, r5] = pack_avx2(high(3), high(2));
    let [r6, r7] = pack_avx2(high(1), high(0));
    [r0, r1, r2, r3, r4, r5, r6, r7]
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn transpose_avx2(r: [__m128i; 8]) -> [__m128i; 8] {
    let lo = |a, b| _mm_unpacklo_epi16(a, b);
    let hi = |a, b| _mm_unpackhi_epi16(a, b);
    let words = [
        lo(r[0], r[1]),
        hi(r[0], r[1]),
        lo(r[2], r[3]),
        hi(r[2], r[3]),
        lo(r[4], r[5]),
        hi(r[4], r[5]),
        lo(r[6], r[7]),
        hi(r[6], r[7]),
    ];
    let lo = |a: usize, b: usize| _mm_unpacklo_epi32(words[a], words[b]);
    let hi = |a: usize, b: usize| _mm_unpackhi_epi32(words[a], words[b]);
    // Pairs of rows 0-3 and 4-7 for columns 0-1, 2-3, 4-5, 6-7.
    let halves = [(lo(0, 2), lo(4, 6)), (hi(0, 2), hi(4, 6)), (lo(1, 3), lo(5, 7)), (hi(1, 3), hi(5, 7))];
    std::array::from_fn(|column| {
        let (top, bottom) = halves[column / 2];
        match column % 2 {
            0 => _mm_unpacklo_epi64(top, bottom),
            _ => _mm_unpackhi_epi64(top, bottom),
        }
    })
}

/// For each of the three output vectors, which byte of red, green and blue goes where; 255 gives a zero.
#[cfg(target_arch = "x86_64")]
const INTERLEAVE: [[[u8; 16]; 3]; 3] = {
    let mut tables = [[[255; 16]; 3]; 3];
    let mut at = 0;
    while at < 48 {
        tables[at / 16][at % 3][at % 16] = (at / 3) as u8;
        at += 1;
    }
    tables
};

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn interleave_avx2(channels: [__m128i; 3]) -> [__m128i; 3] {
    std::array::from_fn(|i| {
        let part = |c: usize| _mm_shuffle_epi8(channels[c], bytemuck::cast(INTERLEAVE[i][c]));
        _mm_or_si128(_mm_or_si128(part(0), part(1)), part(2))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Domain, Stream};

    /// The transform by its definition, in f64.
    fn definition(coefficients: &[i16; 64]) -> [f64; 64] {
        let scale = |k: usize| if k == 0 { 0.5f64.sqrt() } else { 1.0 };
        let cosine = |x: usize, k: usize| ((2 * x + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos();
        std::array::from_fn(|i| {
            let (y, x) = (i / 8, i % 8);
            let mut sum = 0.0;
            for (k, c) in coefficients.iter().enumerate() {
                let (v, u) = (k / 8, k % 8);
                sum += scale(u) * scale(v) * f64::from(*c) * cosine(x, u) * cosine(y, v);
            }
            sum / 4.0 + 128.0
        })
    }

    fn blocks() -> Vec<[i16; 64]> {
        let mut draws = Stream::new(1, Domain::Demo, 0, 0);
        let mut blocks: Vec<[i16; 64]> = (0..200)
            .map(|i| {
                std::array::from_fn(|k| {
                    let width = 600 / (1 + (k / 8 + k % 8) * (1 + i % 5));
                    draws.below(2 * width + 1) as i16 - width as i16
                })
            })
            .collect();
        blocks.push([0; 64]);
        blocks.push(std::array::from_fn(|k| if k == 0 { -1024 } else { 0 }));
        blocks
    }

    #[test]
    fn the_transform_is_the_inverse_cosine_transform() {
        for block in blocks() {
            let mut out = [0; 64];
            Portable.idct(&block, &mut out, 8);
            for (ours, exact) in out.iter().zip(definition(&block)) {
                assert!((f64::from(*ours) - exact.clamp(0.0, 255.0)).abs() < 0.6, "{ours} {exact}");
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn avx2_has_the_bits_of_the_portable_form() {
        let Some(avx2) = Avx2::detect() else { return };
        let mut draws = Stream::new(2, Domain::Demo, 0, 0);
        // Extreme coefficients, too: damaged files have them.
        let wild = (0..500).map(|_| std::array::from_fn(|_| draws.next_u32() as i16));
        for block in blocks().into_iter().chain(wild.collect::<Vec<_>>()) {
            let (mut a, mut b) = ([0; 80], [0; 80]);
            Portable.idct(&block, &mut a, 10);
            avx2.idct(&block, &mut b, 10);
            assert_eq!(a, b);
            Portable.idct4(&block, &mut a, 10);
            avx2.idct4(&block, &mut b, 10);
            assert_eq!(a, b);
        }
        for width in [0, 1, 15, 16, 17, 100] {
            let channel = |c: usize| (0..width).map(|i| (i * 3 + c) as u8).collect::<Vec<_>>();
            let (mut a, mut b) = (vec![0; width * 3], vec![0; width * 3]);
            Portable.interleave(&channel(0), &channel(1), &channel(2), &mut a);
            avx2.interleave(&channel(0), &channel(1), &channel(2), &mut b);
            assert!(a == b && a.iter().enumerate().all(|(i, v)| *v == i as u8), "width {width}");
        }
    }
}
