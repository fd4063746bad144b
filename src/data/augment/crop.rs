//! Which part of a picture a sample shows.

use std::ops::Range;

use crate::data::picture::{View, Window};
use crate::rng::Stream;

/// Aspect (width over height) of a random window, in both laws; TensorFlow's upper end is exactly 1.33.
const TF_ASPECT: (f32, f32) = (0.75, 1.33);
const TORCH_ASPECT: (f64, f64) = (3.0 / 4.0, 4.0 / 3.0);

/// A window as TensorFlow's `sample_distorted_bounding_box` draws it: the aspect is uniform, and so is the
/// *height* between its limits for the smallest and the largest area. `area` holds shares of the picture. In
/// f32, as in TensorFlow.
pub fn tf_window(draws: &mut Stream, image: (usize, usize), area: (f32, f32)) -> Window {
    const ATTEMPTS: usize = 100;
    let (height, width) = image;
    let pixels = (height * width) as f32;
    let (least, largest) = (area.0 * pixels, area.1 * pixels);
    let rint = |x: f32| x.round_ties_even() as i64;
    for _ in 0..ATTEMPTS {
        let aspect = draws.uniform() * (TF_ASPECT.1 - TF_ASPECT.0) + TF_ASPECT.0;
        let mut h = rint((least / aspect).sqrt());
        let mut h_max = rint((largest / aspect).sqrt());
        if rint(h_max as f32 * aspect) > width as i64 {
            h_max = ((width as f32 + 0.5 - 1e-7) / aspect) as i64;
            if rint(h_max as f32 * aspect) > width as i64 {
                h_max -= 1;
            }
        }
        h_max = h_max.min(height as i64);
        h = h.min(h_max);
        if h < h_max {
            h += draws.below((h_max - h + 1) as usize) as i64;
        }
        let mut w = rint(h as f32 * aspect);
        if ((w * h) as f32) < least {
            h += 1;
            w = rint(h as f32 * aspect);
        }
        if (w * h) as f32 > largest {
            h -= 1;
            w = rint(h as f32 * aspect);
        }
        let covered = (w * h) as f32;
        let fits = w > 0 && h > 0 && w <= width as i64 && h <= height as i64;
        if !fits || covered < least || covered > largest {
            continue;
        }
        let (h, w) = (h as usize, w as usize);
        // The last possible offset is never drawn: TensorFlow's bound is exclusive.
        let offset = |draws: &mut Stream, room: usize| if room > 0 { draws.below(room) } else { 0 };
        let y = offset(draws, height - h);
        let x = offset(draws, width - w);
        return Window { y, x, height: h, width: w };
    }
    Window { y: 0, x: 0, height, width }
}

/// A window as torchvision's `RandomResizedCrop` draws it: uniform area, log-uniform aspect, ten attempts,
/// then the centre with the nearest allowed aspect.
pub fn torch_window(draws: &mut Stream, image: (usize, usize), area: (f32, f32)) -> Window {
    const ATTEMPTS: usize = 10;
    let (height, width) = image;
    let pixels = (height * width) as f64;
    let (low, high) = (TORCH_ASPECT.0.ln(), TORCH_ASPECT.1.ln());
    for _ in 0..ATTEMPTS {
        let share = f64::from(area.0) + f64::from(area.1 - area.0) * draws.uniform_f64();
        let aspect = (low + (high - low) * draws.uniform_f64()).exp();
        let w = (share * pixels * aspect).sqrt().round_ties_even() as usize;
        let h = (share * pixels / aspect).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let (y, x) = (draws.below(height - h + 1), draws.below(width - w + 1));
            return Window { y, x, height: h, width: w };
        }
    }
    let aspect = width as f64 / height as f64;
    let (h, w) = if aspect < TORCH_ASPECT.0 {
        (((width as f64 / TORCH_ASPECT.0).round_ties_even() as usize).min(height), width)
    } else if aspect > TORCH_ASPECT.1 {
        (height, ((height as f64 * TORCH_ASPECT.1).round_ties_even() as usize).min(width))
    } else {
        (height, width)
    };
    Window { y: (height - h) / 2, x: (width - w) / 2, height: h, width: w }
}

/// A random window of a picture with a margin around it.
#[derive(Clone, Copy, Debug)]
pub struct Framed {
    /// (H, W) of the picture.
    of: (usize, usize),
    pad: usize,
    /// (y, x) of the window in the padded picture, and its (H, W).
    at: (usize, usize),
    size: (usize, usize),
}

impl Framed {
    /// A window of `size` of a picture of `of` with `pad` pixels on each side.
    pub fn draw(of: (usize, usize), size: (usize, usize), pad: usize, draws: &mut Stream) -> Self {
        let y = draws.below(of.0 + 2 * pad - size.0 + 1);
        let x = draws.below(of.1 + 2 * pad - size.1 + 1);
        Self { of, pad, at: (y, x), size }
    }

    /// The rows and columns of the window that show the picture.
    fn shown(&self) -> (Range<usize>, Range<usize>) {
        let shown = |start: usize, end: usize, n: usize| {
            let first = self.pad.saturating_sub(start).min(n);
            first..(end + self.pad).saturating_sub(start).clamp(first, n)
        };
        (shown(self.at.0, self.of.0, self.size.0), shown(self.at.1, self.of.1, self.size.1))
    }

    /// The part of the picture that is visible; it may be empty.
    pub fn seen(&self) -> Window {
        let (rows, columns) = self.shown();
        Window {
            y: (self.at.0 + rows.start).saturating_sub(self.pad),
            x: (self.at.1 + columns.start).saturating_sub(self.pad),
            height: rows.len(),
            width: columns.len(),
        }
    }

    /// Copies the window to `out`, with black around the picture. `picture` starts at `origin` of the whole
    /// picture.
    pub fn padded(&self, picture: View, origin: (usize, usize), out: &mut [u8]) {
        let (rows, columns) = self.shown();
        let line = self.size.1 * 3;
        if rows.is_empty() || columns.is_empty() {
            return out.fill(0);
        }
        out[..rows.start * line].fill(0);
        out[rows.end * line..].fill(0);
        let out = &mut out[rows.start * line..rows.end * line];
        let seen = self.seen();
        let (first_row, first_column) = (seen.y - origin.0, seen.x - origin.1);
        match picture.whole_rows(first_row, rows.len()) {
            // If rows have the same length on both sides, one copy takes them all. It also copies pixels from
            // the other ends of the rows, which are then blackened.
            Some(from) if picture.width == self.size.1 => {
                let (skipped, from_column) = (columns.start * 3, first_column * 3);
                let len = from.len() - skipped.max(from_column);
                out[skipped..skipped + len].copy_from_slice(&from[from_column..from_column + len]);
            }
            _ => {
                for (y, out) in out.chunks_exact_mut(line).enumerate() {
                    let row = &picture.row(first_row + y)[first_column * 3..][..columns.len() * 3];
                    out[columns.start * 3..columns.end * 3].copy_from_slice(row);
                }
            }
        }
        for out in out.chunks_exact_mut(line) {
            blacken(out, columns.start * 3, columns.end * 3);
        }
    }

    /// The part of the picture that is needed if its reflection surrounds it.
    pub fn seen_reflected(&self) -> Window {
        let range = |start: usize, size: usize, of: usize| {
            let places = || (start..start + size).map(|at| reflect(at, self.pad, of));
            let (first, last) = (places().min().unwrap_or(0), places().max().unwrap_or(0));
            (first, last + 1 - first)
        };
        let (y, height) = range(self.at.0, self.size.0, self.of.0);
        let (x, width) = range(self.at.1, self.size.1, self.of.1);
        Window { y, x, height, width }
    }

    /// As [`Framed::padded`], with the picture's reflection instead of black; the edge itself is not
    /// repeated.
    pub fn reflected(&self, picture: View, origin: (usize, usize), out: &mut [u8]) {
        let Self { of, pad, at, size } = *self;
        for (y, line) in out.chunks_exact_mut(size.1 * 3).enumerate() {
            let row = picture.row(reflect(at.0 + y, pad, of.0) - origin.0);
            for (x, pixel) in line.chunks_exact_mut(3).enumerate() {
                let from = (reflect(at.1 + x, pad, of.1) - origin.1) * 3;
                pixel.copy_from_slice(&row[from..from + 3]);
            }
        }
    }
}

/// Zeros everything before `start` and from `end` on.
#[inline(always)]
fn blacken(row: &mut [u8], start: usize, end: usize) {
    const WORD: usize = 16;
    let from_end = row.len() - end;
    if row.len() < WORD || start > WORD || from_end > WORD {
        row[..start].fill(0);
        row[end..].fill(0);
        return;
    }
    // For few bytes a mask is faster than a call.
    let all = u128::MAX;
    let head = &mut row[..WORD];
    let kept =
        u128::from_le_bytes((&*head).try_into().unwrap()) & all.checked_shl(8 * start as u32).unwrap_or(0);
    head.copy_from_slice(&kept.to_le_bytes());
    let at = row.len() - WORD;
    let tail = &mut row[at..];
    let kept =
        u128::from_le_bytes((&*tail).try_into().unwrap()) & all.checked_shr(8 * from_end as u32).unwrap_or(0);
    tail.copy_from_slice(&kept.to_le_bytes());
}

/// Pixels of reflection around DeiT-III's "simple random crop".
pub const SIMPLE_PAD: usize = 4;

/// A window of `size` (H, W) anywhere in a picture of `of`, which is at least as large.
pub fn random(of: (usize, usize), size: (usize, usize), draws: &mut Stream) -> Window {
    let y = draws.below(of.0 - size.0 + 1);
    let x = draws.below(of.1 - size.1 + 1);
    Window { y, x, height: size.0, width: size.1 }
}

/// Index in a line of `n` pixels of index `at` of the padded line.
fn reflect(at: usize, pad: usize, n: usize) -> usize {
    let period = (2 * n as isize - 2).max(1);
    let place = (at as isize - pad as isize).rem_euclid(period);
    (place.min(period - place) as usize).min(n - 1)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::data::reference::json;
    use crate::rng::{Domain, Stream};

    const DRAWS: u64 = 20_000;

    /// Compares draws with a reference histogram: χ² over the bins that have enough in them, and the mean.
    fn same_law(what: &str, reference: &Value, draws: &[f64]) {
        let hist: Vec<f64> =
            reference["hist"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let (low, high) = (reference["range"][0].as_f64().unwrap(), reference["range"][1].as_f64().unwrap());
        let mut ours = vec![0.0; hist.len()];
        for x in draws {
            let bin = (x - low) / (high - low) * hist.len() as f64;
            ours[(bin as usize).min(hist.len() - 1)] += 1.0;
        }
        let scale = draws.len() as f64 / hist.iter().sum::<f64>();
        let (mut chi2, mut bins) = (0.0, 0.0);
        for (a, b) in ours.iter().zip(&hist).filter(|(a, b)| **a + **b > 20.0) {
            // Both sides are samples: the variance of the difference is the sum of both.
            chi2 += (a - b * scale).powi(2) / (a + b * scale * scale);
            bins += 1.0;
        }
        // Wilson and Hilferty 1931: the cube root of χ²/n is nearly normal; 3.7 deviations are p = 1e-4.
        let limit = bins * (1.0f64 - 2.0 / (9.0 * bins) + 3.7 * (2.0 / (9.0 * bins)).sqrt()).powi(3);
        println!("{what}: chi2 {chi2:.1} over {bins} bins, limit {limit:.1}");
        assert!(chi2 < limit, "{what}: chi2 {chi2} over {bins} bins");
        let n = draws.len() as f64;
        let mean = draws.iter().sum::<f64>() / n;
        let std = (draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
        let expected = reference["mean"].as_f64().unwrap();
        let error = std * (2.0 / n).sqrt();
        assert!((mean - expected).abs() < 4.0 * error, "{what}: mean {mean}, expected {expected}");
    }

    fn windows(draw: impl Fn(&mut Stream) -> Window) -> Vec<Window> {
        (0..DRAWS).map(|i| draw(&mut Stream::new(3, Domain::Augment, 0, i))).collect()
    }

    fn shares(windows: &[Window], f: impl Fn(&Window) -> f64) -> Vec<f64> {
        windows.iter().map(f).collect()
    }

    #[test]
    fn tf_windows_follow_tensorflows_law() {
        let Some(reference) = json("augment/inception_crop_tf.json") else { return };
        for (case, stats) in reference["stats"].as_object().unwrap() {
            let number = |v: &Value| v.as_f64().unwrap();
            let image = (number(&stats["image"][0]) as usize, number(&stats["image"][1]) as usize);
            let area = (number(&stats["area_range"][0]) as f32, number(&stats["area_range"][1]) as f32);
            let drawn = windows(|s| tf_window(s, image, area));
            let pixels = (image.0 * image.1) as f64;
            let check = |key: &str, f: &dyn Fn(&Window) -> f64| {
                same_law(&format!("{case} {key}"), &stats[key], &shares(&drawn, f));
            };
            check("area", &|w| (w.height * w.width) as f64 / pixels);
            check("aspect_w_over_h", &|w| w.width as f64 / w.height as f64);
            check("height_fraction", &|w| w.height as f64 / image.0 as f64);
        }
    }

    #[test]
    fn torch_windows_follow_torchvisions_law() {
        let Some(reference) = json("augment/random_resized_crop_timm.json") else { return };
        for (case, stats) in reference["stats"].as_object().unwrap() {
            let (height, width) = case.split_once('x').unwrap();
            let image = (height.parse().unwrap(), width.parse().unwrap());
            let scale = |i: usize| stats["scale"][i].as_f64().unwrap() as f32;
            let drawn = windows(|s| torch_window(s, image, (scale(0), scale(1))));
            let pixels = (image.0 * image.1) as f64;
            same_law(
                &format!("{case} area"),
                &stats["area"],
                &shares(&drawn, |w| (w.height * w.width) as f64 / pixels),
            );
            let aspect = shares(&drawn, |w| w.width as f64 / w.height as f64);
            same_law(&format!("{case} aspect"), &stats["aspect_w_over_h"], &aspect);
        }
    }

    #[test]
    fn windows_lie_inside_extreme_pictures() {
        for image in [(1, 1), (1, 5000), (5000, 1), (2, 3), (17, 13)] {
            for i in 0..200 {
                let mut s = Stream::new(5, Domain::Augment, 1, i);
                for w in [tf_window(&mut s, image, (0.05, 1.0)), torch_window(&mut s, image, (0.08, 1.0))] {
                    assert!(w.height >= 1 && w.width >= 1, "{image:?} {w:?}");
                    assert!(w.y + w.height <= image.0 && w.x + w.width <= image.1, "{image:?} {w:?}");
                }
            }
        }
    }

    #[test]
    fn reflection_does_not_repeat_the_edge() {
        let line = |n| (0..n + 6).map(|at| reflect(at, 3, n)).collect::<Vec<_>>();
        assert_eq!(line(5), [3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1]);
        assert_eq!(line(1), [0; 7]);
        assert_eq!(line(2), [1, 0, 1, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn a_padded_window_shows_the_picture_where_it_is_and_black_elsewhere() {
        let pixels: Vec<u8> = (0..4 * 5 * 3).map(|i| i as u8 + 1).collect();
        let picture = View::new(&pixels, 4, 5);
        let mut offsets = std::collections::BTreeSet::new();
        for i in 0..300 {
            let mut out = vec![99; 4 * 5 * 3];
            let framed = Framed::draw((4, 5), (4, 5), 2, &mut Stream::new(1, Domain::Augment, 0, i));
            framed.padded(picture, (0, 0), &mut out);
            // Draws the same offsets again, then looks up every pixel one by one.
            let mut s = Stream::new(1, Domain::Augment, 0, i);
            let (y0, x0) = (s.below(5), s.below(5));
            offsets.insert((y0, x0));
            for y in 0..4 {
                for x in 0..5 {
                    let (sy, sx) = ((y + y0) as isize - 2, (x + x0) as isize - 2);
                    let inside = (0..4).contains(&sy) && (0..5).contains(&sx);
                    let expected = if inside { pixels[(sy as usize * 5 + sx as usize) * 3] } else { 0 };
                    assert_eq!(out[(y * 5 + x) * 3], expected, "offset {y0},{x0} pixel {y},{x}");
                }
            }
        }
        assert_eq!(offsets.len(), 25, "every offset is drawn");
        let mut out = vec![0; 4 * 5 * 3];
        let framed = Framed::draw((4, 5), (4, 5), 0, &mut Stream::new(1, Domain::Augment, 0, 0));
        framed.padded(picture, (0, 0), &mut out);
        assert_eq!(out, pixels);
    }
}
