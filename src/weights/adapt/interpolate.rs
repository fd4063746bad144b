//! Resampling of grids, one axis at a time, as SciPy, torch and TensorFlow do it.
//!
//! An [`Axis`] lists for each output the inputs of its weighted sum. Weights and sums are f64 and are rounded
//! once, so the result is nearer to each of the originals than these are to each other.

use super::pinv::pinv;

/// A resampling method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resampling {
    /// Linear, first and last samples aligned (`scipy.ndimage.zoom(order=1)`).
    Corners,
    /// The same with SciPy's zeros past the end.
    CornersWithZeros,
    /// Linear between half-pixel centres, two taps (torch `bilinear`, `tf.image.resize`).
    Linear,
    /// Keys' cubic with a = -0.75 between half-pixel centres, four taps (torch `bicubic`).
    Cubic,
    /// Keys' cubic with a = -0.5, widened when shrinking (torch `bicubic`, `antialias=True`).
    CubicAntialiased,
}

impl Resampling {
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Corners => "linear, corners aligned",
            Self::CornersWithZeros => "linear, corners aligned, SciPy's zeros kept",
            Self::Linear => "bilinear, no antialiasing",
            Self::Cubic => "bicubic, no antialiasing",
            Self::CubicAntialiased => "bicubic, antialiased",
        }
    }
}

/// One axis of a resize: for each output its inputs and their weights. An output without inputs is zero.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    from: usize,
    taps: Vec<Vec<(usize, f64)>>,
}

impl Axis {
    /// From `from` samples to `to`; both at least 1.
    pub(super) fn new(how: Resampling, from: usize, to: usize) -> Self {
        let taps = |i: usize| match how {
            Resampling::Corners => corners(i, from, to, false),
            Resampling::CornersWithZeros => corners(i, from, to, true),
            Resampling::Linear => {
                let x = ((i as f64 + 0.5) * (from as f64 / to as f64) - 0.5).max(0.0);
                between(x, from)
            }
            Resampling::Cubic => {
                let x = (i as f64 + 0.5) * (from as f64 / to as f64) - 0.5;
                let at = |k: i64| (x.floor() as i64 + k).clamp(0, from as i64 - 1) as usize;
                (-1..=2).map(|k| (at(k), cubic(x - x.floor() - k as f64, -0.75))).collect()
            }
            Resampling::CubicAntialiased => antialiased(i, from, to),
        };
        Self { from, taps: (0..to).map(taps).collect() }
    }

    /// pinv(Rᵀ) where R, `[to, from]`, is this axis as a matrix; it has the same shape.
    pub(super) fn pinv_of_transpose(&self) -> Self {
        let to = self.taps.len();
        let mut transposed = vec![0.0; self.from * to];
        for (i, taps) in self.taps.iter().enumerate() {
            taps.iter().for_each(|(j, weight)| transposed[j * to + i] += weight);
        }
        let inverse = pinv(&transposed, self.from, to);
        let row = |values: &[f64]| values.iter().copied().enumerate().collect();
        Self { from: self.from, taps: inverse.chunks(self.from).map(row).collect() }
    }
}

/// SciPy's coordinate is the product of an index and a rounded quotient, and may exceed the last sample by
/// one ulp.
fn corners(i: usize, from: usize, to: usize, zeros: bool) -> Vec<(usize, f64)> {
    let step = if to > 1 { (from - 1) as f64 / (to - 1) as f64 } else { 0.0 };
    let (x, last) = (i as f64 * step, (from - 1) as f64);
    if zeros && x > last { Vec::new() } else { between(x.min(last), from) }
}

/// The two samples around `x` in [0, from).
fn between(x: f64, from: usize) -> Vec<(usize, f64)> {
    let low = (x.floor() as usize).min(from - 1);
    let t = x - low as f64;
    vec![(low, 1.0 - t), ((low + 1).min(from - 1), t)]
}

/// Keys 1981.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
}

/// Two samples of the coarser grid on each side, normalised so that they sum to one.
fn antialiased(i: usize, from: usize, to: usize) -> Vec<(usize, f64)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let center = scale * (i as f64 + 0.5);
    let support = 2.0 * stretch;
    let begin = (center - support + 0.5).max(0.0) as usize;
    let end = ((center + support + 0.5) as usize).min(from);
    let mut taps: Vec<(usize, f64)> =
        (begin..end).map(|j| (j, cubic((j as f64 - center + 0.5) / stretch, -0.5))).collect();
    let sum: f64 = taps.iter().map(|(_, weight)| weight).sum();
    taps.iter_mut().for_each(|(_, weight)| *weight /= sum);
    taps
}

/// Resizes `grid`, `[rows, columns, width]`, from the axes' input sizes to their output sizes.
pub(super) fn apply(grid: &[f32], width: usize, rows: &Axis, columns: &Axis) -> Vec<f32> {
    assert_eq!(grid.len(), rows.from * columns.from * width, "a grid of another size");
    let mut out = Vec::with_capacity(rows.taps.len() * columns.taps.len() * width);
    let mut line = vec![0f64; columns.from * width];
    let mut cell = vec![0f64; width];
    for row in &rows.taps {
        line.fill(0.0);
        for (i, weight) in row {
            let from = &grid[i * line.len()..][..columns.from * width];
            line.iter_mut().zip(from).for_each(|(sum, v)| *sum += weight * f64::from(*v));
        }
        for column in &columns.taps {
            cell.fill(0.0);
            for (j, weight) in column {
                cell.iter_mut().zip(&line[j * width..]).for_each(|(sum, v)| *sum += weight * v);
            }
            out.extend(cell.iter().map(|v| *v as f32));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that the original programs gave for a 3x3 ramp.
    #[test]
    fn a_ramp_of_three_becomes_five() {
        let ramp: Vec<f32> = (0..9).map(|v| v as f32).collect();
        let first_rows = |how| {
            let axis = Axis::new(how, 3, 5);
            apply(&ramp, 1, &axis, &axis)[..10].to_vec()
        };
        let near = |got: Vec<f32>, expected: [f32; 10]| {
            assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?}");
        };
        near(first_rows(Resampling::Corners), [0.0, 0.5, 1.0, 1.5, 2.0, 1.5, 2.0, 2.5, 3.0, 3.5]);
        near(first_rows(Resampling::Linear), [0.0, 0.4, 1.0, 1.6, 2.0, 1.2, 1.6, 2.2, 2.8, 3.2]);
    }

    #[test]
    fn weights_sum_to_one_and_the_same_size_is_no_change() {
        use Resampling::*;
        for how in [Corners, CornersWithZeros, Linear, Cubic, CubicAntialiased] {
            for (from, to) in [(1, 1), (1, 4), (4, 1), (7, 12), (14, 10), (5, 5)] {
                for taps in Axis::new(how, from, to).taps {
                    assert!(
                        (taps.iter().map(|t| t.1).sum::<f64>() - 1.0).abs() < 1e-12,
                        "{how:?} {from} {to}"
                    );
                }
            }
            let values: Vec<f32> = (0..25).map(|v| (v * v % 7) as f32).collect();
            let axis = Axis::new(how, 5, 5);
            assert_eq!(apply(&values, 1, &axis, &axis), values, "{how:?}");
        }
    }

    #[test]
    fn scipys_zeros_are_there_on_request_only() {
        let grid = vec![1f32; 28 * 28];
        for (how, last) in [(Resampling::Corners, 1.0), (Resampling::CornersWithZeros, 0.0)] {
            let axis = Axis::new(how, 28, 48);
            let out = apply(&grid, 1, &axis, &axis);
            assert_eq!((out[47], out[47 * 48 + 3], out[46 * 48 + 46]), (last, last, 1.0));
            let spared = Axis::new(how, 14, 24);
            assert_eq!(apply(&grid[..14 * 14], 1, &spared, &spared), vec![1.0; 24 * 24]);
        }
    }

    #[test]
    fn a_kernel_resized_up_gives_a_resized_patch_the_same_embedding() {
        let up = Axis::new(Resampling::Linear, 4, 7);
        let back = up.pinv_of_transpose();
        let patch: Vec<f32> = (0..16).map(|v| (v * v % 11) as f32).collect();
        let kernel: Vec<f32> = (0..16).map(|v| (v * 5 % 7) as f32 - 3.0).collect();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let resized = dot(&apply(&patch, 1, &up, &up), &apply(&kernel, 1, &back, &back));
        assert!((resized - dot(&patch, &kernel)).abs() < 1e-3, "{resized}");
    }
}
