//! The operations of RandAugment, bit-identical to big_vision's TensorFlow code (arithmetic as in
//! google-research/big_vision, `pp/autoaugment.py`; TensorFlow 2.15).

use super::canvas::{Canvas, IDENTITY, blend, cut, integer};

/// The value of pixels from outside the picture.
const GREY: u8 = 128;

/// Stretches each channel to [0, 255].
#[inline(always)]
pub fn autocontrast(canvas: &mut Canvas) {
    let ranges = canvas.ranges();
    let mut tables = [IDENTITY; 3];
    for (table, (low, high)) in tables.iter_mut().zip(ranges) {
        if high > low {
            let scale = 255.0 / (f32::from(high) - f32::from(low));
            let offset = -f32::from(low) * scale;
            for i in 0..256 {
                table[i] = cut(i as i32 as f32 * scale + offset);
            }
        }
    }
    canvas.map_channels(&tables);
}

/// `tf.image.rgb_to_grayscale` on u8.
#[inline(always)]
fn grey(pixel: &[u8]) -> u8 {
    const SCALE: f32 = 1.0 / 255.0;
    let (r, g, b) = (f32::from(pixel[0]) * SCALE, f32::from(pixel[1]) * SCALE, f32::from(pixel[2]) * SCALE);
    cut((r * 0.2989 + g * 0.5870 + b * 0.1140) * 255.5)
}

/// Blends grey and the picture.
#[inline(always)]
pub fn color(canvas: &mut Canvas, factor: f32) {
    /// Values of a block of pixels.
    const BLOCK: usize = 48;
    for block in canvas.pixels.chunks_mut(BLOCK) {
        let mut greys = [0u8; BLOCK];
        for (to, pixel) in greys.chunks_exact_mut(3).zip(block.chunks_exact(3)) {
            to.fill(grey(pixel));
        }
        for (value, grey) in block.iter_mut().zip(&greys) {
            *value = blend(f32::from(*grey), f32::from(*value), factor);
        }
    }
}

/// Blends a constant and the picture. The constant should be the mean grey; the original counts pixels
/// instead (google-research/big_vision#109). `fixed` uses the mean.
#[inline(always)]
pub fn contrast(canvas: &mut Canvas, factor: f32, fixed: bool) {
    let pixels = canvas.height * canvas.width;
    let base = if fixed {
        let sum: u64 = canvas.pixels.chunks_exact(3).map(|p| u64::from(grey(p))).sum();
        (sum as f64 / pixels.max(1) as f64 + 0.5) as u8
    } else {
        (pixels as f32 / 256.0) as u8
    };
    blend_with(canvas, base, factor);
}

/// Blends black and the picture.
#[inline(always)]
pub fn brightness(canvas: &mut Canvas, factor: f32) {
    blend_with(canvas, 0, factor);
}

#[inline(always)]
fn blend_with(canvas: &mut Canvas, base: u8, factor: f32) {
    let base = f32::from(base);
    canvas.pixels.iter_mut().for_each(|p| *p = blend(base, f32::from(*p), factor));
}

/// Blends a 3×3 mean (the centre counts five times) and the picture; the border is left unchanged.
#[inline(always)]
pub fn sharpness(canvas: &mut Canvas, factor: f32) {
    const ONE: f32 = 1.0 / 13.0;
    const FIVE: f32 = 5.0 / 13.0;
    let line = canvas.width * 3;
    canvas.spare.copy_from_slice(&canvas.pixels);
    if canvas.width < 3 {
        return;
    }
    for y in 1..canvas.height.saturating_sub(1) {
        let rows = &canvas.spare[(y - 1) * line..][..3 * line];
        let (above, rest) = rows.split_at(line);
        let (middle, below) = rest.split_at(line);
        let out = &mut canvas.pixels[y * line + 3..][..line - 6];
        // Slices of equal length need no bounds checks.
        let n = out.len();
        let (a0, a1, a2) = (&above[..n], &above[3..][..n], &above[6..][..n]);
        let (m0, m1, m2) = (&middle[..n], &middle[3..][..n], &middle[6..][..n]);
        let (b0, b1, b2) = (&below[..n], &below[3..][..n], &below[6..][..n]);
        for i in 0..n {
            // TensorFlow's order and fused products: another order changes the last bit, and that decides the
            // result.
            let mut sum = f32::from(a0[i]) * ONE;
            sum = f32::from(a1[i]).mul_add(ONE, sum);
            sum = f32::from(a2[i]).mul_add(ONE, sum);
            sum = f32::from(m0[i]).mul_add(ONE, sum);
            sum = f32::from(m1[i]).mul_add(FIVE, sum);
            sum = f32::from(m2[i]).mul_add(ONE, sum);
            sum = f32::from(b0[i]).mul_add(ONE, sum);
            sum = f32::from(b1[i]).mul_add(ONE, sum);
            sum = f32::from(b2[i]).mul_add(ONE, sum);
            out[i] = blend(sum.min(255.0).floor(), f32::from(m1[i]), factor);
        }
    }
}

/// The output pixel (x, y) shows the nearest pixel to `(a·(x, y, 1), b·(x, y, 1))`; points outside become
/// grey.
#[inline(always)]
pub fn affine(canvas: &mut Canvas, a: [f32; 3], b: [f32; 3]) {
    let size = (canvas.height, canvas.width);
    let (line, end) = (size.1 * 3, canvas.pixels.len());
    // Points outside use the pixel after the last. Pixels are copied with a fourth byte, which the next one
    // overwrites.
    canvas.pixels.extend([GREY; 4]);
    canvas.spare.push(0);
    let mut places = [0i32; RUN];
    for y in 0..size.0 {
        for x0 in (0..size.1).step_by(RUN) {
            let count = RUN.min(size.1 - x0);
            source_places(x0, y, size, a, b, &mut places);
            let places = &places[..count];
            let out = &mut canvas.spare[y * line + x0 * 3..][..count * 3 + 1];
            let (first, last) = (places[0] as usize, places[count - 1] as usize);
            // Most rows of a shear or a shift are rows of the picture.
            if last < end && places.windows(2).fold(true, |all, two| all & (two[1] - two[0] == 3)) {
                out[..count * 3].copy_from_slice(&canvas.pixels[first..][..count * 3]);
                continue;
            }
            for (x, place) in places.iter().enumerate() {
                let four: [u8; 4] = canvas.pixels[*place as usize..][..4].try_into().unwrap();
                out[x * 3..][..4].copy_from_slice(&four);
            }
        }
    }
    canvas.pixels.truncate(end);
    canvas.spare.truncate(end);
    canvas.swap();
}

/// Pixels whose positions are computed at a time.
const RUN: usize = 32;

/// Offsets of the source pixels of [`RUN`] pixels from (x0, y) on; an offset of the picture's length means
/// outside.
#[inline(always)]
fn source_places(
    x0: usize,
    y: usize,
    (height, width): (usize, usize),
    a: [f32; 3],
    b: [f32; 3],
    places: &mut [i32; RUN],
) {
    let y = y as f32;
    let (right, bottom) = (width as f32, height as f32);
    let outside = (height * width * 3) as i32;
    debug_assert!(height * width < 1 << 23, "f32 can distinguish a sample's pixels");
    for (i, place) in places.iter_mut().enumerate() {
        let x = (x0 + i) as i32 as f32;
        // Rounded first, half away from zero, then compared with the borders.
        let from_x = (a[0] * x + a[1] * y + a[2]).round();
        let from_y = (b[0] * x + b[1] * y + b[2]).round();
        let inside = from_x >= 0.0 && from_x < right && from_y >= 0.0 && from_y < bottom;
        let at = (integer(from_y * right + from_x) as i32).wrapping_mul(3);
        *place = if inside { at } else { outside };
    }
}

/// Rotates by `degrees` about the centre.
#[inline(always)]
pub fn rotate(canvas: &mut Canvas, degrees: f64) {
    // All in f32, as in TensorFlow.
    let radians = degrees.to_radians() as f32;
    let (w, h) = ((canvas.width as f32 - 1.0), (canvas.height as f32 - 1.0));
    let (sin, cos) = (radians.sin(), radians.cos());
    let x0 = (w - (cos * w - sin * h)) / 2.0;
    let y0 = (h - (sin * w + cos * h)) / 2.0;
    affine(canvas, [cos, -sin, x0], [sin, cos, y0]);
}

#[inline(always)]
pub fn shear_x(canvas: &mut Canvas, share: f32) {
    affine(canvas, [1.0, share, 0.0], [0.0, 1.0, 0.0]);
}

#[inline(always)]
pub fn shear_y(canvas: &mut Canvas, share: f32) {
    affine(canvas, [1.0, 0.0, 0.0], [share, 1.0, 0.0]);
}

#[inline(always)]
pub fn translate_x(canvas: &mut Canvas, pixels: f32) {
    affine(canvas, [1.0, 0.0, pixels], [0.0, 1.0, 0.0]);
}

#[inline(always)]
pub fn translate_y(canvas: &mut Canvas, pixels: f32) {
    affine(canvas, [1.0, 0.0, 0.0], [0.0, 1.0, pixels]);
}

/// Draws a grey square of half side `half` about `centre` (y, x).
pub fn cutout(canvas: &mut Canvas, half: usize, centre: (usize, usize)) {
    let span = |c: usize| c.saturating_sub(half)..c + half;
    canvas.fill(span(centre.0), span(centre.1), GREY);
}

/// Bits to keep: TensorFlow cannot shift 8 bits by 8, so 0 keeps one.
#[inline(always)]
pub fn posterize(canvas: &mut Canvas, bits: u32) {
    canvas.posterize(bits.max(1));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::augment::vector::{self, Task};
    use crate::data::reference::{Arrays, json};

    struct Op<'a> {
        name: &'a str,
        arg: f64,
        centre: (usize, usize),
        canvas: Canvas,
    }

    impl Task for Op<'_> {
        type Out = Canvas;
        #[inline(always)]
        fn run(mut self) -> Canvas {
            let (c, x) = (&mut self.canvas, self.arg);
            match self.name {
                "AutoContrast" => autocontrast(c),
                "Equalize" => c.equalize(),
                "Invert" => c.invert(),
                "Rotate" => rotate(c, x),
                "Posterize" => posterize(c, x as u32),
                "Solarize" => c.solarize((x as usize % 256) as u8),
                "SolarizeAdd" => c.solarize_add(x as u8),
                "Color" => color(c, x as f32),
                "Contrast" => contrast(c, x as f32, false),
                "Brightness" => brightness(c, x as f32),
                "Sharpness" => sharpness(c, x as f32),
                "ShearX" => shear_x(c, x as f32),
                "ShearY" => shear_y(c, x as f32),
                "TranslateX" => translate_x(c, x as f32),
                "TranslateY" => translate_y(c, x as f32),
                "Cutout" => cutout(c, x as usize, self.centre),
                other => panic!("no operation {other}"),
            }
            self.canvas
        }
    }

    #[test]
    fn every_operation_is_tensorflows_to_the_bit() {
        let Some(table) = json("augment/randaug_ops.json") else { return };
        let mut arrays = Arrays::open("augment/randaug_ops.npz").unwrap();
        let mut wrong = Vec::new();
        let cases = table["ops"].as_array().unwrap();
        for case in cases {
            let key = case["key"].as_str().unwrap();
            let input = arrays.picture(&format!("image{}", case["image"]));
            let make = || {
                let mut canvas = Canvas::default();
                canvas.reset((input.height, input.width));
                canvas.pixels.copy_from_slice(&input.pixels);
                Op {
                    name: case["op"].as_str().unwrap(),
                    arg: case["args"][0].as_f64().unwrap_or(0.0),
                    centre: (
                        case["center_yx"][0].as_u64().unwrap_or(0) as usize,
                        case["center_yx"][1].as_u64().unwrap_or(0) as usize,
                    ),
                    canvas,
                }
            };
            let expected = arrays.picture(key).pixels;
            for (how, out) in [("vector", vector::run(make())), ("portable", make().run())] {
                let off = out.pixels.iter().zip(&expected).filter(|(a, b)| a != b).count();
                if off > 0 {
                    wrong.push(format!("{key} {how}: {off} of {}", expected.len()));
                }
            }
        }
        assert!(wrong.is_empty() && cases.len() > 100, "{} cases; {wrong:#?}", cases.len());
    }
}
