//! Which part of a picture a sample shows.

use crate::data::picture::View;
use crate::rng::Stream;

/// A window of a picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub y: usize,
    pub x: usize,
    pub height: usize,
    pub width: usize,
}

/// Width over height of a random window, in both laws; TensorFlow's upper end is 1.33 exactly.
const TF_ASPECT: (f32, f32) = (0.75, 1.33);
const TORCH_ASPECT: (f64, f64) = (3.0 / 4.0, 4.0 / 3.0);

/// A window as TensorFlow's `sample_distorted_bounding_box` draws it: the aspect is uniform, and so is the *height*
/// between what the least and the largest area allow. `area` are shares of the picture. In f32, as there.
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

/// A window as torchvision's `RandomResizedCrop` draws it: uniform area, log-uniform aspect, ten attempts, then the
/// centre with the nearest allowed aspect.
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

/// Pads a picture by `pad` black pixels on each side and copies a random window of `size` (H, W) to `out`.
pub fn padded(picture: View, size: (usize, usize), pad: usize, draws: &mut Stream, out: &mut [u8]) {
    // Window offsets, in padded coordinates.
    let y0 = draws.below(picture.height + 2 * pad - size.0 + 1);
    let x0 = draws.below(picture.width + 2 * pad - size.1 + 1);
    // The columns of the window that show the picture.
    let first = pad.saturating_sub(x0).min(size.1);
    let last = (picture.width + pad).saturating_sub(x0).clamp(first, size.1);
    for (y, line) in out.chunks_exact_mut(size.1 * 3).enumerate() {
        let row = (y0 + y).checked_sub(pad).filter(|row| *row < picture.height && first < last);
        let Some(row) = row else {
            line.fill(0);
            continue;
        };
        let from = x0 + first - pad;
        line[..first * 3].fill(0);
        line[first * 3..last * 3].copy_from_slice(&picture.row(row)[from * 3..][..(last - first) * 3]);
        line[last * 3..].fill(0);
    }
}
