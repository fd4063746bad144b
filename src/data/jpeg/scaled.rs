//! Decodes at a half, a quarter or an eighth of the size: the layout of a frame at that scale, and transforms
//! that make 4×4, 2×2 or 1 samples of a block instead of 8×8.
//!
//! Each of these samples is the mean of the samples of the full transform that it covers, one direction after
//! the other. The mean of two neighbours is also a sum over coefficients, and so is the mean of four.
//! Coefficients whose cosine has the mean zero there (the fifth of eight for two samples, all even ones for
//! four) drop out and are not read. This is libjpeg's pruning of the transform of Loeffler, Ligtenberg and
//! Moschytz 1989, and bit-identical to it: constants of 13 bits, and sums of integers, whose order does not
//! matter.
//!
//! Pixels are those of libjpeg's `scale_num/8`, hence of Pillow's `Image.draft`.

use super::Frame;
use super::block::{load, store, transpose};
use crate::data::picture::Scale;

/// Sizes of a frame at a scale, in samples.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) height: usize,
    pub(super) width: usize,
    /// (height, width) of an MCU.
    pub(super) mcu: (usize, usize),
    /// Side of a block of each component.
    pub(super) sides: [usize; 3],
    /// (down, across): 2 if chroma has half of the samples, and is upsampled.
    pub(super) halved: (usize, usize),
    /// Whether upsampling uses neighbours.
    pub(super) is_smooth: bool,
    pub(super) is_grey: bool,
}

impl Layout {
    pub(super) fn new(frame: &Frame, scale: Scale) -> Self {
        let side = 8 / scale.divisor();
        let (height, width) = scale.size((frame.height, frame.width));
        let (down, across) = (frame.components[0].down, frame.components[0].across);
        // Chroma that is halved in both directions needs no upsampling, because its blocks get twice the
        // side. libjpeg does this only if it works in both directions at once.
        let doubled = scale != Scale::Full && (down, across) == (2, 2);
        let (chroma, halved) = if doubled { (side * 2, (1, 1)) } else { (side, (down, across)) };
        let is_narrow = halved.1 == 2 && width.div_ceil(2) <= 2;
        Self {
            height,
            width,
            mcu: (down * side, across * side),
            sides: [side, chroma, chroma],
            halved,
            // Narrow pictures, and those with one sample per block, are upsampled by copying.
            is_smooth: side > 1 && !is_narrow,
            is_grey: frame.count == 1,
        }
    }
}

/// √2·(sum of cos((2x + 1)·k·π/16) over the samples x of a group), times 2^13: of the first and of the second
/// pair of samples, for coefficients k = 1, 3, 5, 7. In the other half of the samples the signs are turned.
pub(super) const ODD4: [[i16; 4]; 2] = [[20995, 7373, -4926, -4176], [8697, -17799, 11893, -1730]];
/// The same for k = 2 and 6, first pair; the second has the opposite signs.
pub(super) const EVEN4: [i16; 2] = [15137, -6270];
/// The same for the first four samples, for k = 1, 3, 5, 7.
const ODD2: [i16; 4] = [29692, -10426, 6967, -5906];

/// Shifts of the passes: the 13 bits of the constants and the bits of a group's size (as a power of 2), minus
/// or plus the 2 bits between the passes, and 3 of the transform.
pub(super) const SHIFTS4: (u32, u32) = (13 + 1 - 2, 13 + 1 + 2 + 3);
const SHIFTS2: (u32, u32) = (13 + 2 - 2, 13 + 2 + 2 + 3);

/// Coefficients (dequantised, row by row) to 4×4 samples in rows of `stride` bytes.
#[inline(always)]
pub(super) fn idct4(coefficients: &[i16; 64], out: &mut [u8], stride: usize) {
    let columns = transpose(pass4::<{ SHIFTS4.0 }, 8>(load(coefficients)));
    store(transpose(pass4::<{ SHIFTS4.1 }, 4>(columns)), out, stride);
}

/// To 2×2 samples.
#[inline(always)]
pub(super) fn idct2(coefficients: &[i16; 64], out: &mut [u8], stride: usize) {
    let columns = transpose(pass2::<{ SHIFTS2.0 }, 8>(load(coefficients)));
    store(transpose(pass2::<{ SHIFTS2.1 }, 2>(columns)), out, stride);
}

/// Values beyond 16 bits are clamped, as in the vector form.
#[inline(always)]
fn cut<const SHIFT: u32>(sum: i32) -> i32 {
    (sum.wrapping_add(1 << (SHIFT - 1)) >> SHIFT).clamp(i16::MIN.into(), i16::MAX.into())
}

/// Weighted sum of coefficients 1, 3, 5 and 7 of a column.
#[inline(always)]
fn odd<const W: usize>(x: &[[i32; W]; 8], column: usize, weights: [i16; 4]) -> i32 {
    (0..4).fold(0, |sum: i32, i| sum.wrapping_add(x[2 * i + 1][column].wrapping_mul(weights[i].into())))
}

/// Eight rows to four, down each column.
#[inline(always)]
fn pass4<const SHIFT: u32, const W: usize>(x: [[i32; W]; 8]) -> [[i32; W]; 4] {
    let mut out = [[0; W]; 4];
    for c in 0..W {
        let mean = x[0][c] << 14;
        let even = (x[2][c] * i32::from(EVEN4[0])).wrapping_add(x[6][c] * i32::from(EVEN4[1]));
        for (k, base) in [mean.wrapping_add(even), mean.wrapping_sub(even)].into_iter().enumerate() {
            let odd = odd(&x, c, ODD4[k]);
            out[k][c] = cut::<SHIFT>(base.wrapping_add(odd));
            out[3 - k][c] = cut::<SHIFT>(base.wrapping_sub(odd));
        }
    }
    out
}

/// Eight rows to two.
#[inline(always)]
fn pass2<const SHIFT: u32, const W: usize>(x: [[i32; W]; 8]) -> [[i32; W]; 2] {
    let mut out = [[0; W]; 2];
    for c in 0..W {
        let (mean, odd) = (x[0][c] << 15, odd(&x, c, ODD2));
        out[0][c] = cut::<SHIFT>(mean.wrapping_add(odd));
        out[1][c] = cut::<SHIFT>(mean.wrapping_sub(odd));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::jpeg::{JpegScratch, parse};
    use crate::data::picture::Window;
    use crate::data::reference::{Arrays, pictures, seeded};

    const SCALES: [Scale; 3] = [Scale::Half, Scale::Quarter, Scale::Eighth];

    /// `window` of the picture at `scale`; the whole picture without one.
    fn decoded(
        bytes: &[u8],
        scale: Scale,
        window: Option<Window>,
        scratch: &mut JpegScratch,
    ) -> Option<(Window, Vec<u8>)> {
        let frame = parse(bytes, scratch)?;
        let window = window.unwrap_or(Window::whole(scale.size((frame.height, frame.width))));
        let mut out = vec![0; window.height * window.width * 3];
        frame.decode(scale, window, scratch, &mut out)?;
        Some((window, out))
    }

    fn fixtures() -> Arrays {
        Arrays::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pictures/scaled_jpeg.npz").as_ref())
    }

    #[test]
    fn pixels_are_libjpeg_turbos() {
        let (mut arrays, mut scratch) = (fixtures(), JpegScratch::default());
        let names: Vec<String> =
            arrays.names().iter().filter_map(|n| n.strip_suffix(".jpg")).map(str::to_owned).collect();
        assert_eq!(names.len(), 15, "five samplings, three sizes");
        for name in names {
            let (_, bytes) = arrays.get::<u8>(&format!("{name}.jpg"));
            for scale in SCALES {
                let expected = arrays.picture(&format!("{name}.{}", scale.divisor()));
                let (window, ours) = decoded(&bytes, scale, None, &mut scratch).expect("a common JPEG");
                assert_eq!(
                    (window.height, window.width),
                    (expected.height, expected.width),
                    "{name} {scale:?}"
                );
                let first = ours.iter().zip(&expected.pixels).position(|(a, b)| a != b);
                assert_eq!(first, None, "{name} {scale:?}: the first value that differs");
            }
        }
    }

    /// Checksums by `tests/pictures/scaled_jpeg.py`, Pillow 13.0 with libjpeg-turbo 3.2.0.
    #[test]
    fn photographs_have_the_pixels_of_pillows_draft() {
        let photos = pictures(&["imagenet-mini"]);
        if photos.is_empty() {
            return;
        }
        let mut scratch = JpegScratch::default();
        for (scale, expected) in SCALES.into_iter().zip([0x4a1f_7b80, 0x14f1_b28f, 0xfa1f_660a]) {
            // Adler-32 (RFC 1950).
            let (mut a, mut b) = (1, 0);
            for (name, bytes) in &photos {
                let (_, pixels) = decoded(bytes, scale, None, &mut scratch).expect(name);
                for pixel in pixels {
                    a = (a + u32::from(pixel)) % 65521;
                    b = (b + a) % 65521;
                }
            }
            assert_eq!(b << 16 | a, expected, "{scale:?} of {} photographs", photos.len());
        }
    }

    #[test]
    fn a_window_has_the_pixels_of_the_whole_picture() {
        let (mut arrays, mut scratch, mut draws) = (fixtures(), JpegScratch::default(), seeded(3));
        let names: Vec<String> = arrays.names().into_iter().filter(|n| n.ends_with(".jpg")).collect();
        let small = names.iter().map(|name| (name.clone(), arrays.get::<u8>(name).1)).collect::<Vec<_>>();
        for (name, bytes) in small.into_iter().chain(pictures(&["imagenet-mini", "bad-images"])) {
            for scale in SCALES {
                let Some((of, all)) = decoded(&bytes, scale, None, &mut scratch) else { continue };
                for _ in 0..6 {
                    let (height, width) = (1 + draws.below(of.height), 1 + draws.below(of.width));
                    let (y, x) = (draws.below(of.height - height + 1), draws.below(of.width - width + 1));
                    let window = Window { y, x, height, width };
                    let (_, out) = decoded(&bytes, scale, Some(window), &mut scratch).unwrap();
                    for (row, ours) in out.chunks_exact(width * 3).enumerate() {
                        let expected = &all[((y + row) * of.width + x) * 3..][..width * 3];
                        assert!(ours == expected, "{name} {scale:?}: row {row} of {window:?}");
                    }
                    let counts = scratch.counts();
                    assert!(counts.read >= counts.transformed && counts.transformed >= counts.reduced);
                    assert!(counts.reduced > 0);
                }
            }
        }
    }

    #[test]
    fn constants_are_sums_of_cosines() {
        let sum = |samples: std::ops::Range<usize>, k: usize| {
            let cosine = |x: usize| ((2 * x + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos();
            (2f64.sqrt() * samples.map(cosine).sum::<f64>() * 8192.0).round() as i16
        };
        for (pair, (odd, sign)) in ODD4.into_iter().zip([1, -1]).enumerate() {
            let samples = pair * 2..pair * 2 + 2;
            assert_eq!([1, 3, 5, 7].map(|k| sum(samples.clone(), k)), odd);
            assert_eq!([2, 6].map(|k| sum(samples.clone(), k)), EVEN4.map(|c| sign * c));
            assert_eq!(sum(samples, 4), 0);
        }
        assert_eq!([1, 3, 5, 7].map(|k| sum(0..4, k)), ODD2);
        assert_eq!([2, 4, 6].map(|k| sum(0..4, k)), [0; 3]);
    }
}
