//! Resizing, bit-identical to the reference systems.
//!
//! TensorFlow's bilinear uses 2×2 taps at every scale; its area kernel averages the source pixels that an
//! output pixel covers. Both give floats. Pillow widens its kernel to shrink, with u8 between two passes.
//!
//! A resize can compute just a window of its result, so picture and window bound its memory. A long thin
//! picture, scaled up by its shorter side, would need gigabytes, and a sample shows only a square of it.
//!
//! Loops process each pixel as four values, of which three belong to it. Rows are copied with a margin, so
//! that the fourth can be read, and each pixel is written before the next one overwrites its fourth value.

use std::ops::Range;

use crate::backend::Normalise;
use crate::data::picture::{Part, View, Window};

use super::canvas::cut;
use super::vector::{self, Task};

/// Memory that a worker reuses for every resize.
#[derive(Debug, Default)]
pub struct ResizeScratch {
    columns: PilTaps,
    rows: PilTaps,
    between: Vec<u8>,
    sums: Vec<i32>,
    /// A source row with a margin, or a group of rows side by side.
    line: Vec<u8>,
    /// Source rows after the horizontal pass: the row's index and its values.
    across: [(usize, Vec<f32>); 2],
}

/// Destination of resized values: `[H, W, 3]` in order, on u8's scale.
pub enum Out<'a> {
    /// Rounded to the nearest integer, or truncated.
    U8 { pixels: &'a mut [u8], truncate: bool },
    /// Normalised.
    F32 { values: &'a mut [f32], normalise: Normalise },
}

impl Out<'_> {
    fn len(&self) -> usize {
        match self {
            Out::U8 { pixels, .. } => pixels.len(),
            Out::F32 { values, .. } => values.len(),
        }
    }

    #[inline(always)]
    fn put(&mut self, start: usize, line: &[f32]) {
        match self {
            Out::U8 { pixels, truncate } => {
                let half = if *truncate { 0.0 } else { 0.5 };
                let pixels = &mut pixels[start..start + line.len()];
                pixels.iter_mut().zip(line).for_each(|(p, x)| *p = cut(x + half));
            }
            Out::F32 { values, normalise } => {
                let values = &mut values[start..start + line.len()];
                for (i, (value, x)) in values.iter_mut().zip(line).enumerate() {
                    *value = (x - normalise.mean[i % 3]) / normalise.std[i % 3];
                }
            }
        }
    }
}

/// TensorFlow's `resize(bilinear)`: half-pixel centres, no antialiasing. Every operation rounds to f32.
pub fn tf_bilinear<'a>(
    src: impl Into<Part<'a>>,
    size: (usize, usize),
    scratch: &mut ResizeScratch,
    out: Out,
) {
    assert_eq!(out.len(), size.0 * size.1 * 3);
    vector::run(TfBilinear { src: src.into(), size, scratch, out });
}

struct TfBilinear<'a> {
    src: Part<'a>,
    size: (usize, usize),
    scratch: &'a mut ResizeScratch,
    out: Out<'a>,
}

impl Task for TfBilinear<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let Self { src: Part { view: src, corner, size: part }, size, scratch, mut out } = self;
        let rows = bilinear_taps(src.height, (corner.0, part.0), size.0);
        let columns = bilinear_taps(src.width, (corner.1, part.1), size.1);
        let ResizeScratch { line, across, .. } = scratch;
        for cached in across.iter_mut() {
            cached.0 = usize::MAX;
            cached.1.resize(size.1 * 3 + 1, 0.0);
        }
        let mut values = vec![0f32; size.1 * 3];
        for (y, row) in rows.iter().enumerate() {
            // Rows come in order, so the next row often needs the same source rows.
            if across[1].0 == row.low {
                across.swap(0, 1);
            }
            for (cached, wanted) in across.iter_mut().zip([row.low, row.high]) {
                if cached.0 != wanted {
                    cached.0 = wanted;
                    resize_across(src.row(wanted), &columns, line, &mut cached.1);
                }
            }
            let (above, below) = (&across[0].1, &across[1].1);
            for ((value, above), below) in values.iter_mut().zip(above).zip(below) {
                *value = above + (below - above) * row.weight;
            }
            out.put(y * size.1 * 3, &values);
        }
    }
}

#[inline(always)]
fn resize_across(row: &[u8], columns: &[BilinearTap], line: &mut Vec<u8>, out: &mut [f32]) {
    line.clear();
    line.extend_from_slice(row);
    line.push(0);
    for (x, column) in columns.iter().enumerate() {
        let left: [u8; 4] = line[column.low * 3..column.low * 3 + 4].try_into().unwrap();
        let right: [u8; 4] = line[column.high * 3..column.high * 3 + 4].try_into().unwrap();
        let mut four = [0f32; 4];
        for i in 0..4 {
            let (a, b) = (f32::from(left[i]), f32::from(right[i]));
            four[i] = a + (b - a) * column.weight;
        }
        out[x * 3..x * 3 + 4].copy_from_slice(&four);
    }
}

struct BilinearTap {
    low: usize,
    high: usize,
    /// The weight of `high`.
    weight: f32,
}

/// The taps for a part of `from` pixels that begins at `part.0` and is `part.1` long.
fn bilinear_taps(from: usize, part: (f64, f64), to: usize) -> Vec<BilinearTap> {
    let (start, length) = (part.0 as f32, part.1 as f32);
    let scale = length / to as f32;
    let tap = |i: usize| {
        let source = (i as f32 + 0.5) * scale - 0.5 + start;
        let floor = source.floor();
        let low = floor.max(0.0) as usize;
        // TensorFlow clamps only the upper neighbour; below the first centre both taps are pixel 0.
        let high = ((floor + 1.0) as usize).min(from - 1);
        BilinearTap { low: low.min(from - 1), high, weight: source - floor }
    };
    (0..to).map(tap).collect()
}

/// TensorFlow's `resize(area)`: the mean of the covered pixels, edges by their share. Computes only `window`
/// of the `whole` (H, W) output pixels.
pub fn tf_area(src: View, whole: (usize, usize), window: Window, mut out: Out) {
    let Window { y, x, height, width } = window;
    assert_eq!(out.len(), height * width * 3);
    let rows = area_taps(src.height, whole.0, y..y + height);
    let columns = area_taps(src.width, whole.1, x..x + width);
    let scale = 1.0 / ((src.height as f32 / whole.0 as f32) * (src.width as f32 / whole.1 as f32));
    let mut values = vec![0f32; width * 3];
    for (y, row) in rows.iter().enumerate() {
        for (pixel, column) in values.chunks_exact_mut(3).zip(&columns) {
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
            pixel.iter_mut().zip(total).for_each(|(p, sum)| *p = sum * scale);
        }
        out.put(y * width * 3, &values);
    }
}

/// For each output of a range, the source pixels that it covers and how much of each.
fn area_taps(from: usize, to: usize, range: Range<usize>) -> Vec<Vec<(usize, f32)>> {
    // For larger sizes, TensorFlow's f32 positions are wrong by a visible part of an output pixel's area.
    const LARGEST_IN_F32: usize = 1 << 16;
    let scale = from as f32 / to as f32;
    let place = |i: usize| match to {
        ..=LARGEST_IN_F32 => f64::from(i as f32 * scale),
        _ => i as f64 * (from as f64 / to as f64),
    };
    let taps = |i: usize| {
        let (start, end) = (place(i), place(i + 1));
        let covered = |k: isize| {
            let at = k as f64;
            let share = match (at < start, at + 1.0 > end) {
                (true, true) => scale,
                (true, false) => (at + 1.0 - start) as f32,
                (false, true) => (end - at) as f32,
                (false, false) => 1.0,
            };
            (k.clamp(0, from as isize - 1) as usize, share)
        };
        (start.floor() as isize..end.ceil() as isize).map(covered).collect()
    };
    range.map(taps).collect()
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

/// Values of a row that are summed at a time.
const BLOCK: usize = 32;
/// Fractional bits of Pillow's integer weights.
const PIL_BITS: u32 = 22;

/// Bytes of rows that wait between the horizontal and the vertical pass. More are made as needed.
const BETWEEN: usize = 32 << 20;

/// Pillow's `resize`: antialiased, first horizontal, then vertical, with u8 in between. `part` is Pillow's
/// argument `box`: the kernel also reads the view's pixels beside it. `out` is `[H, W, 3]`.
pub fn pil<'a>(
    src: impl Into<Part<'a>>,
    size: (usize, usize),
    filter: Filter,
    scratch: &mut ResizeScratch,
    out: &mut [u8],
) {
    pil_window(src, size, Window::whole(size), filter, scratch, out);
}

/// Computes only `window` of the `whole` (H, W) pixels that [`pil`] would make.
pub fn pil_window<'a>(
    src: impl Into<Part<'a>>,
    whole: (usize, usize),
    window: Window,
    filter: Filter,
    scratch: &mut ResizeScratch,
    out: &mut [u8],
) {
    assert_eq!(out.len(), window.height * window.width * 3);
    assert!(window.y + window.height <= whole.0 && window.x + window.width <= whole.1);
    vector::run(Pil { src: src.into(), whole, window, filter, between: BETWEEN, scratch, out });
}

struct Pil<'a> {
    src: Part<'a>,
    whole: (usize, usize),
    window: Window,
    filter: Filter,
    between: usize,
    scratch: &'a mut ResizeScratch,
    out: &'a mut [u8],
}

impl Task for Pil<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let Self { src: Part { view: src, corner, size: part }, whole, window, filter, scratch, out, .. } =
            self;
        let ResizeScratch { columns, rows, between, line, sums, .. } = scratch;
        let (across, down) = (window.x..window.x + window.width, window.y..window.y + window.height);
        columns.fill(src.width, (corner.1, part.1), whole.1, across, filter);
        rows.fill(src.height, (corner.0, part.0), whole.0, down, filter);
        // The size does not change.
        let (keeps_columns, keeps_rows) =
            (corner.1 == 0.0 && part.1 == whole.1 as f64, corner.0 == 0.0 && part.0 == whole.0 as f64);
        let length = window.width * 3;
        // One extra byte per row, for the fourth value of its last pixel.
        let stride = length + 1;
        // Number of source rows held between the passes; usually all that are needed.
        let most = (self.between / stride).max(TOGETHER);
        let mut held = 0..0;
        let mut hold = |wanted: Range<usize>, between: &mut Vec<u8>| {
            let kept = if keeps_columns { Err(window.x) } else { Ok(&*columns) };
            resize_rows(src, wanted, kept, length, line, between);
        };
        if keeps_rows {
            for (first, targets) in (window.y..).step_by(most).zip(out.chunks_mut(most * length)) {
                hold(first..first + targets.len() / length, between);
                for (target, row) in targets.chunks_exact_mut(length).zip(between.chunks_exact(stride)) {
                    target.copy_from_slice(&row[..length]);
                }
            }
            return;
        }
        let last = rows.span().end;
        for (y, target) in out.chunks_exact_mut(length).enumerate() {
            let (from, weights) = rows.tap(y);
            if weights.len() > most {
                // Piece by piece.
                sums.clear();
                sums.resize(length, 1 << (PIL_BITS - 1));
                for (piece, weights) in weights.chunks(most).enumerate() {
                    let first = from + piece * most;
                    held = first..first + weights.len();
                    hold(held.clone(), between);
                    for (weight, row) in weights.iter().zip(between.chunks_exact(stride)) {
                        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += weight * i32::from(*value));
                    }
                }
                target.iter_mut().zip(&*sums).for_each(|(to, sum)| *to = clip(*sum));
                continue;
            }
            if from < held.start || from + weights.len() > held.end {
                held = from..(from + most).min(last);
                hold(held.clone(), between);
            }
            let sources = &between[(from - held.start) * stride..][..weights.len() * stride];
            let mut columns = target.chunks_exact_mut(BLOCK);
            for (block, target) in columns.by_ref().enumerate() {
                let mut sum = [1i32 << (PIL_BITS - 1); BLOCK];
                for (k, weight) in weights.iter().enumerate() {
                    let at = k * stride + block * BLOCK;
                    let values: &[u8; BLOCK] = sources[at..at + BLOCK].try_into().unwrap();
                    for i in 0..BLOCK {
                        sum[i] += weight * i32::from(values[i]);
                    }
                }
                for i in 0..BLOCK {
                    target[i] = clip(sum[i]);
                }
            }
            let rest = columns.into_remainder();
            let start = length - rest.len();
            for (i, target) in rest.iter_mut().enumerate() {
                let column = |k: usize| i32::from(sources[k * stride + start + i]);
                let taps = weights.iter().enumerate().map(|(k, weight)| weight * column(k));
                *target = clip((1 << (PIL_BITS - 1)) + taps.sum::<i32>());
            }
        }
    }
}

/// Resizes some rows horizontally with the taps of their columns, or copies them from a column on. Each
/// result has `length` values and one more.
#[inline(always)]
fn resize_rows(
    src: View,
    rows: Range<usize>,
    columns: Result<&PilTaps, usize>,
    length: usize,
    line: &mut Vec<u8>,
    between: &mut Vec<u8>,
) {
    let stride = length + 1;
    between.resize(rows.len().next_multiple_of(TOGETHER) * stride, 0);
    for (group, targets) in between.chunks_exact_mut(TOGETHER * stride).enumerate() {
        let first = rows.start + group * TOGETHER;
        let group = first..(first + TOGETHER).min(rows.end);
        let columns = match columns {
            Ok(columns) => columns,
            Err(column) => {
                for (target, y) in targets.chunks_exact_mut(stride).zip(group) {
                    target[..length].copy_from_slice(&src.row(y)[column * 3..][..length]);
                }
                continue;
            }
        };
        let span = columns.span();
        line.resize(span.len() * FOURS, 0);
        for (at, y) in group.enumerate() {
            lay_out(&src.row(y)[span.start * 3..span.end * 3], at, line);
        }
        for x in 0..length / 3 {
            let (from, weights) = columns.tap(x);
            let taps = &line[(from - span.start) * FOURS..][..weights.len() * FOURS];
            // Sums stay in registers from tap to tap.
            let mut sum = [1i32 << (PIL_BITS - 1); FOURS];
            for (values, weight) in taps.chunks_exact(FOURS).zip(weights) {
                let values: &[u8; FOURS] = values.try_into().unwrap();
                for i in 0..FOURS {
                    sum[i] += weight * i32::from(values[i]);
                }
            }
            let pixels: [u8; FOURS] = sum.map(clip);
            for (at, four) in pixels.chunks_exact(4).enumerate() {
                targets[at * stride + x * 3..][..4].copy_from_slice(four);
            }
        }
    }
}

/// Rows that are resized together: the values of one pixel of each, four by four.
const TOGETHER: usize = 4;
const FOURS: usize = TOGETHER * 4;

/// Writes a row's pixels beside those of the other rows of its group.
#[inline(always)]
fn lay_out(row: &[u8], at: usize, line: &mut [u8]) {
    let last = row.len() / 3 - 1;
    // Each pixel is stored with the next one's first value, which is ignored.
    for (to, x) in line.chunks_exact_mut(FOURS).zip(0..last) {
        to[at * 4..at * 4 + 4].copy_from_slice(&row[x * 3..x * 3 + 4]);
    }
    line[last * FOURS + at * 4..][..3].copy_from_slice(&row[last * 3..]);
}

#[inline(always)]
fn clip(sum: i32) -> u8 {
    (sum >> PIL_BITS).clamp(0, 255) as u8
}

/// For each output pixel, the first source pixel with a weight, and the weights from there on.
#[derive(Debug, Default)]
struct PilTaps {
    /// First source pixel, and end of the weights.
    places: Vec<(usize, usize)>,
    weights: Vec<i32>,
    exact: Vec<f64>,
}

impl PilTaps {
    /// Computes a range of the `to` output pixels for a part of `from` pixels that begins at `part.0` and is
    /// `part.1` long.
    fn fill(&mut self, from: usize, part: (f64, f64), to: usize, range: Range<usize>, filter: Filter) {
        let Self { places, weights, exact } = self;
        places.clear();
        weights.clear();
        let scale = part.1 / to as f64;
        let stretch = scale.max(1.0);
        let support = filter.support() * stretch;
        for i in range {
            let centre = part.0 + (i as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let last = ((centre + support + 0.5) as usize).min(from);
            exact.clear();
            exact.extend((first..last).map(|k| filter.weight((k as f64 - centre + 0.5) / stretch)));
            let sum: f64 = exact.iter().sum();
            weights.extend(exact.iter().map(|w| {
                let w = w / sum * f64::from(1u32 << PIL_BITS);
                (w + if w < 0.0 { -0.5 } else { 0.5 }) as i32
            }));
            places.push((first, weights.len()));
        }
    }

    /// The range of source pixels that have a weight.
    fn span(&self) -> Range<usize> {
        let start = self.places.iter().map(|(first, _)| *first).min().unwrap_or(0);
        let end =
            (0..self.places.len()).map(|i| self.tap(i)).map(|(first, weights)| first + weights.len()).max();
        start..end.unwrap_or(0)
    }

    #[inline(always)]
    fn tap(&self, i: usize) -> (usize, &[i32]) {
        let start = if i == 0 { 0 } else { self.places[i - 1].1 };
        (self.places[i].0, &self.weights[start..self.places[i].1])
    }
}

/// The smallest size with the ratio of `from` (up to rounding down) that covers `size`.
pub fn covering(from: (usize, usize), size: (usize, usize)) -> (usize, usize) {
    if size.0 * from.1 >= size.1 * from.0 {
        (size.0, (from.1 * size.0 / from.0).max(size.1))
    } else {
        ((from.0 * size.1 / from.1).max(size.0), size.1)
    }
}

/// big_vision's `resize_small(n)`: the shorter side becomes n, both are rounded half to even.
pub fn small(from: (usize, usize), shorter: usize) -> (usize, usize) {
    let factor = shorter as f32 / from.0.min(from.1) as f32;
    let side = |n: usize| ((n as f32 * factor).round_ties_even() as usize).max(1);
    (side(from.0), side(from.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::picture::Picture;
    use crate::data::reference::Arrays;

    /// Values as they are.
    fn plain(values: &mut [f32]) -> Out<'_> {
        Out::F32 { values, normalise: Normalise { mean: [0.0; 3], std: [1.0; 3] } }
    }

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
            let check = |got: &[f32], what: &str| {
                let off = got.iter().zip(&expected).position(|(a, b)| a != b);
                assert_eq!(off, None, "{case} {what}");
            };
            let mut out = vec![0.0; expected.len()];
            tf_bilinear(input.view(), size, &mut ResizeScratch::default(), plain(&mut out));
            check(&out, "bilinear");
            let (_, expected) = arrays.get::<f32>(&format!("{case}.area"));
            tf_area(input.view(), size, Window::whole(size), plain(&mut out));
            assert!(out == expected, "{case} area");
            // big_vision's u8 form; a float within 1e-3 of an integer may fall on either side.
            let (_, expected) = arrays.get::<u8>(&format!("{case}.bilinear.bv_u8"));
            let mut cut = vec![0; expected.len()];
            let to = Out::U8 { pixels: &mut cut, truncate: true };
            tf_bilinear(input.view(), size, &mut ResizeScratch::default(), to);
            assert!(cut.iter().zip(&expected).all(|(a, b)| a.abs_diff(*b) <= 1), "{case}");
            let off = cut.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert!(off * 500 <= cut.len(), "{case}: {off} values differ");
        });
    }

    #[test]
    fn pil_is_pillow_to_the_last_bit() {
        for_each_case(|case, input, size| {
            let mut arrays = Arrays::open("augment/torch_pil_resize.npz").unwrap();
            for (filter, name) in [(Filter::Bilinear, "pil_bilinear"), (Filter::Bicubic, "pil_bicubic")] {
                let mut out = vec![0; size.0 * size.1 * 3];
                pil(input.view(), size, filter, &mut ResizeScratch::default(), &mut out);
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
            pil(view, (8, 9), Filter::Bicubic, &mut ResizeScratch::default(), &mut out);
            let mut other = vec![0; 8 * 9 * 3];
            let to = Out::U8 { pixels: &mut other, truncate: false };
            tf_bilinear(view, (8, 9), &mut ResizeScratch::default(), to);
            (out, other)
        };
        assert_eq!(resized(window), resized(copy));
    }

    #[test]
    fn a_part_of_pixels_is_pillows_box() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pictures/scaled_jpeg.npz");
        let mut arrays = Arrays::read(file.as_ref());
        let picture = arrays.picture("part");
        let part = Part { view: picture.view(), corner: (2.5, 1.25), size: (16.125, 20.125) };
        for (name, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
            let expected = arrays.picture(&format!("part.{name}"));
            let mut out = vec![0; expected.pixels.len()];
            pil(part, (expected.height, expected.width), filter, &mut ResizeScratch::default(), &mut out);
            assert_eq!(out, expected.pixels, "{name}");
        }
    }

    #[test]
    fn a_part_of_a_ramp_is_where_it_belongs() {
        let pixels: Vec<u8> = (0..6 * 30 * 3).map(|i| (i / 3 % 30 * 8) as u8).collect();
        let part = Part { view: View::new(&pixels, 6, 30), corner: (0.25, 3.5), size: (4.5, 20.0) };
        let mut out = vec![0.0; 2 * 8 * 3];
        tf_bilinear(part, (2, 8), &mut ResizeScratch::default(), plain(&mut out));
        for (i, value) in out.iter().enumerate() {
            // The position of output pixel x's centre in the ramp.
            let x = 3.5 + ((i / 3 % 8) as f32 + 0.5) * 2.5 - 0.5;
            assert!((value - x * 8.0).abs() < 1e-3, "{i}: {value}");
        }
    }

    #[test]
    fn the_same_size_changes_nothing() {
        let pixels: Vec<u8> = (0..7 * 5 * 3).map(|i| (i * 91 % 256) as u8).collect();
        let view = View::new(&pixels, 7, 5);
        let mut out = vec![0; pixels.len()];
        pil(view, (7, 5), Filter::Bicubic, &mut ResizeScratch::default(), &mut out);
        assert_eq!(out, pixels);
        for truncate in [false, true] {
            out.fill(0);
            tf_bilinear(view, (7, 5), &mut ResizeScratch::default(), Out::U8 { pixels: &mut out, truncate });
            assert_eq!(out, pixels);
            out.fill(0);
            tf_area(view, (7, 5), Window::whole((7, 5)), Out::U8 { pixels: &mut out, truncate });
            assert_eq!(out, pixels);
        }
    }

    #[test]
    fn covering_keeps_the_ratio_and_covers() {
        assert_eq!(covering((375, 500), (224, 224)), (224, 298));
        assert_eq!(covering((500, 375), (224, 224)), (298, 224));
        assert_eq!(covering((100, 100), (32, 64)), (64, 64));
        assert_eq!(covering((1, 5000), (8, 8)), (8, 40000));
    }

    #[test]
    fn a_window_of_the_result_is_that_part_of_the_whole() {
        let mut draws = crate::data::reference::seeded(31);
        for _ in 0..300 {
            let (height, width) = (1 + draws.below(40), 1 + draws.below(40));
            let pixels: Vec<u8> = (0..height * width * 3).map(|_| draws.next_u32() as u8).collect();
            let view = View::new(&pixels, height, width);
            // Sides that do not change have their own code path.
            let side = |own: usize, other: usize| if other.is_multiple_of(4) { own } else { other };
            let whole = (side(height, 1 + draws.below(90)), side(width, 1 + draws.below(90)));
            let (y, x) = (draws.below(whole.0), draws.below(whole.1));
            let window =
                Window { y, x, height: 1 + draws.below(whole.0 - y), width: 1 + draws.below(whole.1 - x) };
            let mut all = vec![0; whole.0 * whole.1 * 3];
            let mut out = vec![0; window.height * window.width * 3];
            let same = |law: &str, all: &[u8], out: &[u8]| {
                for (row, ours) in out.chunks_exact(window.width * 3).enumerate() {
                    let expected = &all[((y + row) * whole.1 + x) * 3..][..ours.len()];
                    assert_eq!(ours, expected, "{law}: {height}x{width} to {whole:?}, {window:?}");
                }
            };
            for filter in [Filter::Bilinear, Filter::Bicubic] {
                let mut scratch = ResizeScratch::default();
                pil(view, whole, filter, &mut scratch, &mut all);
                pil_window(view, whole, window, filter, &mut scratch, &mut out);
                same("window", &all, &out);
                // With room for only a few rows.
                for between in [0, 40 * window.width] {
                    out.fill(0);
                    let (src, scratch, out) = (view.into(), &mut scratch, &mut out[..]);
                    Pil { src, whole, window, filter, between, scratch, out }.run();
                    same("a few rows", &all, out);
                }
            }
            tf_area(view, whole, Window::whole(whole), Out::U8 { pixels: &mut all, truncate: true });
            tf_area(view, whole, window, Out::U8 { pixels: &mut out, truncate: true });
            same("area", &all, &out);
        }
    }

    /// The complete results would have gigabytes.
    #[test]
    fn long_thin_pictures_take_memory_of_their_own_size() {
        let mut scratch = ResizeScratch::default();
        for (height, width) in
            [(60_000, 1), (1, 60_000), (100_000, 2), (2, 100_000), (400_000, 1), (1, 400_000)]
        {
            let along = |i: usize| ((i / width + i % width) / 9000) as u8;
            let pixels: Vec<u8> = (0..height * width).flat_map(|i| [along(i), 20, 90]).collect();
            let view = View::new(&pixels, height, width);
            let whole = covering((height, width), (256, 256));
            let window = Window::centre_rounded(whole, (224, 224));
            let mut out = vec![0; 224 * 224 * 3];
            for filter in [Filter::Bilinear, Filter::Bicubic] {
                pil_window(view, whole, window, filter, &mut scratch, &mut out);
                let middle = (height.max(width) / 2 / 9000) as u8;
                assert!(out.chunks(3).all(|p| p[0].abs_diff(middle) <= 1 && p[1..] == [20, 90]), "{whole:?}");
            }
            tf_area(view, whole, window, Out::U8 { pixels: &mut out, truncate: true });
            assert!(out.chunks(3).all(|p| p[1].abs_diff(20) <= 1 && p[2].abs_diff(90) <= 1), "{whole:?}");
            // The whole picture, squashed to a square, too.
            pil(view, (224, 224), Filter::Bicubic, &mut scratch, &mut out);
            let weights = |taps: &PilTaps| taps.weights.capacity() * 4 + taps.exact.capacity() * 8;
            let kept = [scratch.between.capacity(), scratch.line.capacity(), weights(&scratch.columns)];
            let kept = kept.iter().sum::<usize>() + weights(&scratch.rows);
            assert!(kept < 2 * BETWEEN + 40 * pixels.len(), "{kept} bytes for {height}x{width}");
        }
    }
}
