//! Colour jitter: TensorFlow's four `tf.image` operations on f32 pixels in [0, 1].

use crate::recipe::AugmentSection;
use crate::rng::Stream;

/// Half-widths of the jitter; 0 turns an operation off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Jitter {
    brightness: f32,
    contrast: f32,
    saturation: f32,
    hue: f32,
}

impl Jitter {
    /// `None` if nothing is jittered.
    pub fn new(augment: &AugmentSection) -> Option<Self> {
        let AugmentSection { brightness, contrast, saturation, hue, .. } = *augment;
        let any = [brightness, contrast, saturation, hue].iter().any(|x| *x > 0.0);
        any.then_some(Self { brightness, contrast, saturation, hue })
    }

    /// Jitters u8 pixels `[.., 3]` in place: brightness, contrast, saturation, hue in this order, clamped
    /// after each.
    pub fn apply(&self, draws: &mut Stream, pixels: &mut [u8], scratch: &mut Vec<f32>) {
        scratch.clear();
        scratch.extend(pixels.iter().map(|p| f32::from(*p) / 255.0));
        let mut step = |width: f32, middle: f32, operation: fn(&mut [f32], f32)| {
            if width > 0.0 {
                operation(scratch, middle + draws.range(-width, width));
                scratch.iter_mut().for_each(|x| *x = x.clamp(0.0, 1.0));
            }
        };
        step(self.brightness, 0.0, brightness);
        step(self.contrast, 1.0, contrast);
        step(self.saturation, 1.0, saturation);
        step(self.hue, 0.0, hue);
        pixels.iter_mut().zip(scratch).for_each(|(p, x)| *p = (*x * 255.0 + 0.5) as u8);
    }
}

/// `x + delta`
pub fn brightness(pixels: &mut [f32], delta: f32) {
    pixels.iter_mut().for_each(|x| *x += delta);
}

/// `(x - mean)·factor + mean`, with the mean of each channel over the picture.
pub fn contrast(pixels: &mut [f32], factor: f32) {
    let mut sums = [0f64; 3];
    for pixel in pixels.chunks_exact(3) {
        sums.iter_mut().zip(pixel).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    let count = (pixels.len() / 3).max(1) as f64;
    let means = sums.map(|sum| (sum / count) as f32);
    for pixel in pixels.chunks_exact_mut(3) {
        pixel.iter_mut().zip(means).for_each(|(x, mean)| *x = (*x - mean) * factor + mean);
    }
}

/// Multiplies the saturation of HSV, at most to 1.
pub fn saturation(pixels: &mut [f32], factor: f32) {
    through_hsv(pixels, |[h, s, v]| [h, (s * factor).clamp(0.0, 1.0), v]);
}

/// Rotates the hue of HSV by `delta` turns.
pub fn hue(pixels: &mut [f32], delta: f32) {
    through_hsv(pixels, |[h, s, v]| [(h + delta).rem_euclid(1.0), s, v]);
}

fn through_hsv(pixels: &mut [f32], change: impl Fn([f32; 3]) -> [f32; 3]) {
    for pixel in pixels.chunks_exact_mut(3) {
        let rgb = from_hsv(change(to_hsv([pixel[0], pixel[1], pixel[2]])));
        pixel.copy_from_slice(&rgb);
    }
}

/// Hue in turns [0, 1).
fn to_hsv([r, g, b]: [f32; 3]) -> [f32; 3] {
    let v = r.max(g).max(b);
    let spread = v - r.min(g).min(b);
    if v <= 0.0 || spread <= 0.0 {
        return [0.0, 0.0, v];
    }
    let sixth = if v == r {
        (g - b) / spread
    } else if v == g {
        2.0 + (b - r) / spread
    } else {
        4.0 + (r - g) / spread
    };
    [(sixth / 6.0).rem_euclid(1.0), spread / v, v]
}

fn from_hsv([h, s, v]: [f32; 3]) -> [f32; 3] {
    let sixth = h * 6.0;
    let pure = [(sixth - 3.0).abs() - 1.0, 2.0 - (sixth - 2.0).abs(), 2.0 - (sixth - 4.0).abs()];
    pure.map(|d| (1.0 - s + s * d.clamp(0.0, 1.0)) * v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::reference::{Arrays, json};
    use crate::rng::{Domain, Stream};

    #[test]
    fn the_operations_are_tensorflows() {
        let Some(table) = json("augment/tf_image_color.json") else { return };
        let mut arrays = Arrays::open("augment/tf_image_color.npz").unwrap();
        let mut compared = 0;
        for case in table["ops"].as_array().unwrap() {
            let (key, name) = (case["key"].as_str().unwrap(), case["fn"].as_str().unwrap());
            let operation = match name {
                "tf.image.adjust_brightness" => brightness,
                "tf.image.adjust_contrast" => contrast,
                "tf.image.adjust_saturation" => saturation,
                "tf.image.adjust_hue" => hue,
                _ => continue,
            };
            let input = arrays.picture(&format!("image{}", case["image"]));
            let mut pixels: Vec<f32> = input.pixels.iter().map(|p| f32::from(*p) / 255.0).collect();
            operation(&mut pixels, case["value"].as_f64().unwrap() as f32);
            if case["dtype"] == "float32" {
                let (_, expected) = arrays.get::<f32>(key);
                let worst = pixels.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst <= 2e-6, "{key}: off by {worst}");
            } else {
                // TensorFlow's way back to u8; f32 rounding may fall on either side of an integer.
                let expected = arrays.picture(key).pixels;
                let ours = pixels.iter().map(|x| (x * 255.5).floor().clamp(0.0, 255.0));
                let differing = ours.zip(&expected).filter(|(a, b)| *a != f32::from(**b)).count();
                assert!(differing * 1000 <= expected.len(), "{key}: {differing} values differ");
            }
            compared += 1;
        }
        assert!(compared > 20, "{compared} cases");
    }

    #[test]
    fn jitter_stays_within_its_limits() {
        let augment = AugmentSection { brightness: 0.2, ..Default::default() };
        let jitter = Jitter::new(&augment).unwrap();
        let (mut low, mut high) = (255, 0);
        for sample in 0..500 {
            let mut pixels = [128, 128, 128];
            jitter.apply(&mut Stream::new(1, Domain::Augment, 0, sample), &mut pixels, &mut Vec::new());
            assert!(pixels[0] == pixels[1] && pixels[1] == pixels[2], "one delta for all channels");
            (low, high) = (low.min(pixels[0]), high.max(pixels[0]));
        }
        assert!((77..=80).contains(&low) && (176..=179).contains(&high), "{low}..{high}");
        assert_eq!(Jitter::new(&AugmentSection::default()), None);
    }
}
