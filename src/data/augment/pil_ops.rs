//! The operations of timm's RandAugment, 3-Augment and torchvision's colour jitter, as Pillow does them on u8
//! pictures (libImaging; formulas checked against Pillow 13). Bilinear and bicubic transforms use f64, as
//! Pillow does.

use super::canvas::{Canvas, IDENTITY, blend};

/// How a transform interpolates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    Bilinear,
    /// a = -1, unlike in Pillow's resizing.
    Bicubic,
}

/// `convert("L")`
#[inline(always)]
fn grey(pixel: &[u8]) -> u8 {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    ((19_595 * r + 38_470 * g + 7_471 * b + 32_768) >> 16) as u8
}

/// Three equal channels.
#[inline(always)]
pub fn greyscale(canvas: &mut Canvas) {
    canvas.pixels.chunks_exact_mut(3).for_each(|p| p.fill(grey(p)));
}

/// `ImageOps.autocontrast`
#[inline(always)]
pub fn autocontrast(canvas: &mut Canvas) {
    let tables = canvas.ranges().map(|(low, high)| {
        let mut table = IDENTITY;
        if high > low {
            let scale = 255.0 / (f64::from(high) - f64::from(low));
            let offset = -f64::from(low) * scale;
            for (i, to) in table.iter_mut().enumerate() {
                *to = (i as f64 * scale + offset) as u8;
            }
        }
        table
    });
    canvas.map_channels(&tables);
}

/// `ImageEnhance.Color`
#[inline(always)]
pub fn color(canvas: &mut Canvas, factor: f32) {
    for pixel in canvas.pixels.chunks_exact_mut(3) {
        let grey = f32::from(grey(pixel));
        pixel[0] = blend(grey, f32::from(pixel[0]), factor);
        pixel[1] = blend(grey, f32::from(pixel[1]), factor);
        pixel[2] = blend(grey, f32::from(pixel[2]), factor);
    }
}

/// `ImageEnhance.Contrast`: about the rounded mean grey.
#[inline(always)]
pub fn contrast(canvas: &mut Canvas, factor: f32) {
    let sum: u64 = canvas.pixels.chunks_exact(3).map(|p| u64::from(grey(p))).sum();
    let mean = (sum as f64 / (canvas.pixels.len() / 3).max(1) as f64 + 0.5).floor() as f32;
    canvas.pixels.iter_mut().for_each(|p| *p = blend(mean, f32::from(*p), factor));
}

/// `ImageEnhance.Brightness`
#[inline(always)]
pub fn brightness(canvas: &mut Canvas, factor: f32) {
    canvas.pixels.iter_mut().for_each(|p| *p = blend(0.0, f32::from(*p), factor));
}

/// `ImageEnhance.Sharpness`: a blend with the 3×3 mean whose centre counts five times; the border is left
/// unchanged.
#[inline(always)]
pub fn sharpness(canvas: &mut Canvas, factor: f32) {
    let line = canvas.width * 3;
    canvas.spare.copy_from_slice(&canvas.pixels);
    if canvas.width < 3 {
        return;
    }
    for y in 1..canvas.height.saturating_sub(1) {
        let rows = &canvas.spare[(y - 1) * line..][..3 * line];
        let out = &mut canvas.pixels[y * line + 3..][..line - 6];
        for i in 0..out.len() {
            let at = |row: usize, k: usize| u32::from(rows[row * line + i + k]);
            let around =
                at(0, 0) + at(0, 3) + at(0, 6) + at(1, 0) + at(1, 6) + at(2, 0) + at(2, 3) + at(2, 6);
            let smooth = (2 * (around + 5 * at(1, 3)) + 13) / 26;
            out[i] = blend(smooth as f32, at(1, 3) as f32, factor);
        }
    }
}

/// `ImageOps.solarize`; a threshold of 256 changes nothing.
#[inline(always)]
pub fn solarize(canvas: &mut Canvas, threshold: u32) {
    if let Ok(threshold) = u8::try_from(threshold) {
        canvas.solarize(threshold);
    }
}

/// `Image.transform(AFFINE)`: the output point (x, y) shows `(m0·x + m1·y + m2, m3·x + m4·y + m5)`.
/// Coordinates are pixel centres; points outside the picture become `fill`.
#[inline(always)]
pub fn affine(canvas: &mut Canvas, m: [f64; 6], sampling: Sampling, fill: [u8; 3]) {
    let (height, width) = (canvas.height, canvas.width);
    let picture = Source { pixels: &canvas.pixels, height: height as isize, width: width as isize };
    for (y, line) in canvas.spare.chunks_exact_mut(width * 3).enumerate() {
        let y = y as f64 + 0.5;
        for (x, out) in line.chunks_exact_mut(3).enumerate() {
            let x = x as f64 + 0.5;
            let (from_x, from_y) = (m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]);
            let inside = from_x >= 0.0 && from_x < width as f64 && from_y >= 0.0 && from_y < height as f64;
            if !inside {
                out.copy_from_slice(&fill);
            } else if sampling == Sampling::Bilinear {
                picture.bilinear(from_x - 0.5, from_y - 0.5, out);
            } else {
                picture.bicubic(from_x - 0.5, from_y - 0.5, out);
            }
        }
    }
    canvas.swap();
}

struct Source<'a> {
    pixels: &'a [u8],
    height: isize,
    width: isize,
}

impl Source<'_> {
    /// Offset of a pixel; columns beyond the edge repeat the edge.
    #[inline(always)]
    fn at(&self, x: isize, y: isize) -> usize {
        ((y * self.width + x.clamp(0, self.width - 1)) * 3) as usize
    }

    #[inline(always)]
    fn value(&self, at: usize, channel: usize) -> f64 {
        f64::from(self.pixels[at + channel])
    }

    #[inline(always)]
    fn bilinear(&self, x: f64, y: f64, out: &mut [u8]) {
        let (left, top) = (x.floor(), y.floor());
        let (dx, dy) = (x - left, y - top);
        let (left, top) = (left as isize, top as isize);
        let upper = top.clamp(0, self.height - 1);
        // A row outside the picture repeats the nearest row inside.
        let lower = if (0..self.height).contains(&(top + 1)) { top + 1 } else { upper };
        let places =
            [self.at(left, upper), self.at(left + 1, upper), self.at(left, lower), self.at(left + 1, lower)];
        for (channel, out) in out.iter_mut().enumerate() {
            let [a, b, c, d] = places.map(|at| self.value(at, channel));
            let (above, below) = (a + (b - a) * dx, c + (d - c) * dx);
            *out = (above + (below - above) * dy) as u8;
        }
    }

    #[inline(always)]
    fn bicubic(&self, x: f64, y: f64, out: &mut [u8]) {
        let (left, top) = (x.floor(), y.floor());
        let (dx, dy) = (x - left, y - top);
        let (left, top) = (left as isize - 1, top as isize - 1);
        let cubic = |p: [f64; 4], d: f64| {
            let (p1, p2) = (p[1], -p[0] + p[2]);
            let (p3, p4) = (2.0 * (p[0] - p[1]) + p[2] - p[3], -p[0] + p[1] - p[2] + p[3]);
            p1 + d * (p2 + d * (p3 + d * p4))
        };
        for (channel, out) in out.iter_mut().enumerate() {
            let mut rows = [0.0; 4];
            for k in 0..4 {
                let y = if k == 0 { top.clamp(0, self.height - 1) } else { top + k as isize };
                rows[k] = if (0..self.height).contains(&y) {
                    let p = [0, 1, 2, 3].map(|i| self.value(self.at(left + i, y), channel));
                    cubic(p, dx)
                } else {
                    rows[k - 1]
                };
            }
            *out = cubic(rows, dy) as u8;
        }
    }
}

/// `Image.rotate`: counter-clockwise about the centre.
#[inline(always)]
pub fn rotate(canvas: &mut Canvas, degrees: f64, sampling: Sampling, fill: [u8; 3]) {
    let degrees = degrees.rem_euclid(360.0);
    if degrees == 0.0 {
        return;
    }
    let angle = -degrees.to_radians();
    let rounded = |v: f64| (v * 1e15).round_ties_even() / 1e15;
    let (a, b) = (rounded(angle.cos()), rounded(angle.sin()));
    let (d, e) = (rounded(-angle.sin()), rounded(angle.cos()));
    let (x, y) = (canvas.width as f64 / 2.0, canvas.height as f64 / 2.0);
    let (c, f) = (a * -x + b * -y + x, d * -x + e * -y + y);
    affine(canvas, [a, b, c, d, e, f], sampling, fill);
}

/// `ImageFilter.GaussianBlur`: three box blurs across, then three down, with boxes of a fractional width
/// (Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering").
pub fn gaussian_blur(canvas: &mut Canvas, radius: f64) {
    const PASSES: usize = 3;
    let sigma2 = radius as f32 * radius as f32 / PASSES as f32;
    // Pillow's arithmetic: f32 variables, f64 square root.
    let length = (12.0 * f64::from(sigma2) + 1.0).sqrt() as f32;
    let whole = ((length - 1.0) / 2.0).floor();
    let mut rest = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * sigma2);
    rest /= 6.0 * (sigma2 - (whole + 1.0) * (whole + 1.0));
    let radius = whole + rest;
    for _ in 0..PASSES {
        box_blur(canvas, radius, true);
    }
    for _ in 0..PASSES {
        box_blur(canvas, radius, false);
    }
}

/// The mean over `2·radius + 1` pixels along rows or columns; the outermost two count by the fraction.
fn box_blur(canvas: &mut Canvas, radius: f32, across: bool) {
    let whole = radius as usize;
    let weight = ((1u32 << 24) as f32 / (radius * 2.0 + 1.0)) as u32;
    let outer = ((1u32 << 24) - (2 * whole as u32 + 1) * weight) / 2;
    let (height, width) = (canvas.height, canvas.width);
    let (lines, length, step, stride) =
        if across { (height, width, 3, width * 3) } else { (width, height, width * 3, 3) };
    for line in 0..lines {
        for channel in 0..3 {
            let start = line * stride + channel;
            let at =
                |i: isize| u32::from(canvas.pixels[start + i.clamp(0, length as isize - 1) as usize * step]);
            let whole = whole as isize;
            let mut sum: u32 = (-whole..=whole).map(at).sum();
            for i in 0..length as isize {
                let edges = at(i - whole - 1) + at(i + whole + 1);
                let blurred = (sum * weight).wrapping_add(edges * outer).wrapping_add(1 << 23) >> 24;
                canvas.spare[start + i as usize * step] = blurred as u8;
                sum = sum + at(i + whole + 1) - at(i - whole);
            }
        }
    }
    canvas.swap();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::reference::{Arrays, json};

    #[test]
    fn every_operation_is_pillows() {
        let Some(table) = json("augment/pil_ops.json") else { return };
        let mut arrays = Arrays::open("augment/pil_ops.npz").unwrap();
        let input = match arrays.names().contains(&"image0".to_owned()) {
            true => arrays.picture("image0"),
            false => Arrays::open("augment/randaug_ops.npz").unwrap().picture("image0"),
        };
        let mut wrong = Vec::new();
        for case in table["ops"].as_array().unwrap() {
            let (key, name) = (case["key"].as_str().unwrap(), case["op"].as_str().unwrap());
            let x = case["args"][0].as_f64().unwrap_or(0.0);
            let mut canvas = Canvas::default();
            canvas.reset((input.height, input.width));
            canvas.pixels.copy_from_slice(&input.pixels);
            let c = &mut canvas;
            let fill = [case["fill"].as_u64().unwrap_or(0) as u8; 3];
            let sampling = if key.ends_with("bicubic") { Sampling::Bicubic } else { Sampling::Bilinear };
            let size = (input.height as f64, input.width as f64);
            match name {
                "AutoContrast" => autocontrast(c),
                "Equalize" => c.equalize(),
                "Invert" => c.invert(),
                "Rotate" => rotate(c, x, sampling, fill),
                "Posterize" => c.posterize(x as u32),
                "Solarize" => solarize(c, x as u32),
                "SolarizeAdd" => c.solarize_add(x as u8),
                "Color" => color(c, x as f32),
                "Contrast" => contrast(c, x as f32),
                "Brightness" => brightness(c, x as f32),
                "Sharpness" => sharpness(c, x as f32),
                "ShearX" => affine(c, [1.0, x, 0.0, 0.0, 1.0, 0.0], sampling, fill),
                "ShearY" => affine(c, [1.0, 0.0, 0.0, x, 1.0, 0.0], sampling, fill),
                "TranslateXRel" => affine(c, [1.0, 0.0, x * size.1, 0.0, 1.0, 0.0], sampling, fill),
                "TranslateYRel" => affine(c, [1.0, 0.0, 0.0, 0.0, 1.0, x * size.0], sampling, fill),
                other => panic!("no operation {other}"),
            }
            let expected = arrays.picture(key).pixels;
            let worst = c.pixels.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            // A transform may truncate a value that misses an integer only by f64's last bit.
            let allowed = u8::from(key.contains("bilinear") || key.contains("bicubic"));
            if worst > allowed {
                wrong.push(format!("{key}: off by {worst}"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn a_blur_keeps_what_is_flat_and_spreads_a_point_evenly() {
        let mut canvas = Canvas::default();
        canvas.reset((21, 31));
        canvas.pixels.fill(77);
        gaussian_blur(&mut canvas, 1.3);
        assert!(canvas.pixels.iter().all(|p| *p == 77));
        canvas.pixels.fill(0);
        canvas.pixels[(10 * 31 + 15) * 3] = 255;
        gaussian_blur(&mut canvas, 2.0);
        let at = |y: usize, x: usize| i32::from(canvas.pixels[(y * 31 + x) * 3]);
        let sum: i32 = (0..21).flat_map(|y| (0..31).map(move |x| (y, x))).map(|(y, x)| at(y, x)).sum();
        assert!((225..=285).contains(&sum), "the sum stays: {sum}");
        let peak = 255.0 / (2.0 * std::f64::consts::PI * 4.0);
        assert!((f64::from(at(10, 15)) - peak).abs() < 2.0, "{} near {peak}", at(10, 15));
        assert!((0..10).all(|d| at(10, 15 - d) == at(10, 15 + d)));
    }
}
