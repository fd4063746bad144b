//! Resizing as the reference systems do it, to the last bit.
//!
//! TensorFlow's bilinear takes 2×2 taps whatever the scale and its area kernel averages what an output pixel covers;
//! both give floats. Pillow widens its kernel when it shrinks and keeps u8 between its two passes.

use crate::data::picture::View;

/// TensorFlow's `resize(bilinear)`: half-pixel centres, no antialiasing. Calls `put(index, value)` for every value of
/// `[H, W, 3]` in order, on the scale of the input. Every operation rounds to f32.
pub fn tf_bilinear(src: View, size: (usize, usize), mut put: impl FnMut(usize, f32)) {
    let rows = bilinear_taps(src.height, size.0);
    let columns = bilinear_taps(src.width, size.1);
    let mut index = 0;
    for row in &rows {
        let (top, bottom) = (src.row(row.low), src.row(row.high));
        for column in &columns {
            for channel in 0..3 {
                let (left, right) = (column.low * 3 + channel, column.high * 3 + channel);
                let along = |line: &[u8]| {
                    let (a, b) = (f32::from(line[left]), f32::from(line[right]));
                    a + (b - a) * column.weight
                };
                let (above, below) = (along(top), along(bottom));
                put(index, above + (below - above) * row.weight);
                index += 1;
            }
        }
    }
}

struct BilinearTap {
    low: usize,
    high: usize,
    /// Of `high`.
    weight: f32,
}

fn bilinear_taps(from: usize, to: usize) -> Vec<BilinearTap> {
    let scale = from as f32 / to as f32;
    let tap = |i: usize| {
        let source = (i as f32 + 0.5) * scale - 0.5;
        let floor = source.floor();
        let low = floor.max(0.0) as usize;
        // TensorFlow clamps the upper neighbour only; below the first centre both taps are pixel 0.
        let high = ((floor + 1.0) as usize).min(from - 1);
        BilinearTap { low: low.min(from - 1), high, weight: source - floor }
    };
    (0..to).map(tap).collect()
}

/// TensorFlow's `resize(area)`: the mean of the covered pixels, edges by their share. `put` as in [`tf_bilinear`].
pub fn tf_area(src: View, size: (usize, usize), mut put: impl FnMut(usize, f32)) {
    let rows = area_taps(src.height, size.0);
    let columns = area_taps(src.width, size.1);
    let scale = 1.0 / ((src.height as f32 / size.0 as f32) * (src.width as f32 / size.1 as f32));
    let mut index = 0;
    for row in &rows {
        for column in &columns {
            let mut total = [0f32; 3];
            for (y, down) in row {
                let line = src.row(*y);
                let mut along = [0f32; 3];
                for (x, across) in column {
                    for (sum, value) in along.iter_mut().zip(&line[x * 3..x * 3 + 3]) {
                        *sum += f32::from(*value) * across;
                    }
                }
                for (sum, value) in total.iter_mut().zip(along) {
                    *sum += value * down;
                }
            }
            for sum in total {
                put(index, sum * scale);
                index += 1;
            }
        }
    }
}

/// For each output, the source pixels that it covers and how much of each.
fn area_taps(from: usize, to: usize) -> Vec<Vec<(usize, f32)>> {
    let scale = from as f32 / to as f32;
    let taps = |i: usize| {
        let (start, end) = (i as f32 * scale, (i + 1) as f32 * scale);
        let covered = |k: isize| {
            let at = k as f32;
            let share = match (at < start, at + 1.0 > end) {
                (true, true) => scale,
                (true, false) => at + 1.0 - start,
                (false, true) => end - at,
                (false, false) => 1.0,
            };
            (k.clamp(0, from as isize - 1) as usize, share)
        };
        (start.floor() as isize..end.ceil() as isize).map(covered).collect()
    };
    (0..to).map(taps).collect()
}

/// Kernels of Pillow's resampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Bilinear,
    /// a = -0.5
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Filter::Bilinear => (1.0 - x).max(0.0),
            Filter::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Filter::Bicubic => 0.0,
        }
    }
}

/// Bits behind the point of Pillow's integer weights.
const PIL_BITS: u32 = 22;

/// Pillow's `resize`: antialiased, across and then down, u8 in between. `out` is `[H, W, 3]`; `between` is scratch.
pub fn pil(src: View, size: (usize, usize), filter: Filter, between: &mut Vec<u8>, out: &mut [u8]) {
    assert_eq!(out.len(), size.0 * size.1 * 3);
    let columns = pil_taps(src.width, size.1, filter);
    let rows = pil_taps(src.height, size.0, filter);
    let line = size.1 * 3;
    // Only the source rows that some output needs: for a window all of them, and no more.
    between.resize(src.height * line, 0);
    for (y, target) in between.chunks_exact_mut(line).enumerate() {
        let row = src.row(y);
        if src.width == size.1 {
            target.copy_from_slice(row);
            continue;
        }
        for (pixel, tap) in target.chunks_exact_mut(3).zip(&columns) {
            let mut sum = [1i32 << (PIL_BITS - 1); 3];
            for (source, weight) in row[tap.from * 3..].chunks_exact(3).zip(&tap.weights) {
                for (sum, value) in sum.iter_mut().zip(source) {
                    *sum += weight * i32::from(*value);
                }
            }
            pixel.iter_mut().zip(sum).for_each(|(p, s)| *p = clip(s));
        }
    }
    if src.height == size.0 {
        out.copy_from_slice(between);
        return;
    }
    let mut sums = vec![0i32; line];
    for (target, tap) in out.chunks_exact_mut(line).zip(&rows) {
        sums.fill(1 << (PIL_BITS - 1));
        for (source, weight) in between[tap.from * line..].chunks_exact(line).zip(&tap.weights) {
            sums.iter_mut().zip(source).for_each(|(sum, value)| *sum += weight * i32::from(*value));
        }
        target.iter_mut().zip(&sums).for_each(|(t, s)| *t = clip(*s));
    }
}

fn clip(sum: i32) -> u8 {
    (sum >> PIL_BITS).clamp(0, 255) as u8
}

struct PilTap {
    from: usize,
    weights: Vec<i32>,
}

fn pil_taps(from: usize, to: usize, filter: Filter) -> Vec<PilTap> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let tap = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let last = ((centre + support + 0.5) as usize).min(from);
        let weights: Vec<f64> =
            (first..last).map(|k| filter.weight((k as f64 - centre + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |w: &f64| {
            let w = w / sum * f64::from(1u32 << PIL_BITS);
            (w + if w < 0.0 { -0.5 } else { 0.5 }) as i32
        };
        PilTap { from: first, weights: weights.iter().map(fixed).collect() }
    };
    (0..to).map(tap).collect()
}

/// The smallest size with the ratio of `from` (up to rounding down) that covers `size`.
pub fn covering(from: (usize, usize), size: (usize, usize)) -> (usize, usize) {
    if size.0 * from.1 >= size.1 * from.0 {
        (size.0, (from.1 * size.0 / from.0).max(size.1))
    } else {
        ((from.0 * size.1 / from.1).max(size.0), size.1)
    }
}

/// A float on the scale 0..255 as u8, to the nearest.
pub fn to_u8(value: f32) -> u8 {
    (value + 0.5) as u8 // `as` saturates
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::picture::Picture;
    use crate::data::reference::Arrays;

    /// Calls `check(name of the input, input, output size)` for each input of `tf_resize.npz`.
    fn for_each_case(mut check: impl FnMut(&str, &Picture, (usize, usize))) {
        let Some(mut arrays) = Arrays::open("augment/tf_resize.npz") else { return };
        let inputs: Vec<String> = arrays.names().into_iter().filter(|n| n.ends_with(".in")).collect();
        assert!(!inputs.is_empty());
        for input in inputs {
            let case = input.trim_end_matches(".in");
            let size = arrays.get::<f32>(&format!("{case}.bilinear")).0;
            check(case, &arrays.picture(&input), (size[0], size[1]));
        }
    }

    #[test]
    fn tf_bilinear_and_tf_area_are_tensorflows_to_the_last_bit() {
        for_each_case(|case, input, size| {
            let mut arrays = Arrays::open("augment/tf_resize.npz").unwrap();
            let (_, expected) = arrays.get::<f32>(&format!("{case}.bilinear"));
            tf_bilinear(input.view(), size, |i, value| assert_eq!(value, expected[i], "{case} bilinear {i}"));
            let (_, expected) = arrays.get::<f32>(&format!("{case}.area"));
            tf_area(input.view(), size, |i, value| assert_eq!(value, expected[i], "{case} area {i}"));
        });
    }

    #[test]
    fn pil_is_pillow_to_the_last_bit() {
        for_each_case(|case, input, size| {
            let mut arrays = Arrays::open("augment/torch_pil_resize.npz").unwrap();
            for (filter, name) in [(Filter::Bilinear, "pil_bilinear"), (Filter::Bicubic, "pil_bicubic")] {
                let mut out = vec![0; size.0 * size.1 * 3];
                pil(input.view(), size, filter, &mut Vec::new(), &mut out);
                assert!(out == arrays.picture(&format!("{case}.{name}")).pixels, "{case} {name}");
            }
        });
    }

    #[test]
    fn a_window_is_resized_as_a_picture_of_its_own() {
        let pixels: Vec<u8> = (0..30 * 20 * 3).map(|i| (i * 37 % 251) as u8).collect();
        let window = View::new(&pixels, 30, 20).window(3, 5, 17, 11);
        let mut copy = vec![0; 17 * 11 * 3];
        window.copy_to(&mut copy);
        let copy = View::new(&copy, 17, 11);
        let resized = |view: View| {
            let mut out = vec![0; 8 * 9 * 3];
            pil(view, (8, 9), Filter::Bicubic, &mut Vec::new(), &mut out);
            tf_bilinear(view, (8, 9), |i, value| out[i] ^= to_u8(value));
            out
        };
        assert_eq!(resized(window), resized(copy));
    }

    #[test]
    fn the_same_size_changes_nothing() {
        let pixels: Vec<u8> = (0..7 * 5 * 3).map(|i| (i * 91 % 256) as u8).collect();
        let view = View::new(&pixels, 7, 5);
        let mut out = vec![0; pixels.len()];
        pil(view, (7, 5), Filter::Bicubic, &mut Vec::new(), &mut out);
        assert_eq!(out, pixels);
        tf_bilinear(view, (7, 5), |i, value| assert_eq!(value, f32::from(pixels[i])));
        tf_area(view, (7, 5), |i, value| assert_eq!(value, f32::from(pixels[i])));
    }

    #[test]
    fn covering_keeps_the_ratio_and_covers() {
        assert_eq!(covering((375, 500), (224, 224)), (224, 298));
        assert_eq!(covering((500, 375), (224, 224)), (298, 224));
        assert_eq!(covering((100, 100), (32, 64)), (64, 64));
        assert_eq!(covering((1, 5000), (8, 8)), (8, 40000));
    }
}
