//! RandAugment in its dialects, 3-Augment, and torchvision's colour jitter: chooses the operations of a
//! sample and their strength. The operations are in [`tf_ops`] and [`pil_ops`].

use crate::recipe::{Dialect, Interpolation, RandAugment};
use crate::rng::Stream;

use super::canvas::Canvas;
use super::pil_ops::{self, Sampling};
use super::tf_ops;
use super::vector::{self, Task};

/// An operation with its argument: the result of all draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    AutoContrast,
    Equalize,
    Invert,
    /// Degrees.
    Rotate(f64),
    /// Bits to keep.
    Posterize(u32),
    /// Threshold; 256 changes nothing.
    Solarize(u32),
    SolarizeAdd(u8),
    Color(f32),
    Contrast(f32),
    Brightness(f32),
    Sharpness(f32),
    ShearX(f64),
    ShearY(f64),
    /// Pixels.
    TranslateX(f64),
    TranslateY(f64),
    /// Half the side, and the centre (y, x).
    Cutout(usize, (usize, usize)),
    Grey,
    /// Radius.
    Blur(f64),
}

/// big_vision's operations, in the order of its list.
const TF_OPS: usize = 16;
/// timm's: the same without Cutout.
const TIMM_OPS: usize = 15;

/// Draws a sample's operations and applies them.
pub fn apply(settings: &RandAugment, look: Look, draws: &mut Stream, canvas: &mut Canvas) {
    for _ in 0..settings.layers {
        match settings.dialect {
            Dialect::Tf { fixed } => {
                let op = draw_tf(settings.magnitude, (canvas.height, canvas.width), fixed, draws);
                vector::run(TfTask { op, fixed, canvas });
            }
            Dialect::Timm { increasing, std, most, prob } => {
                let index = draws.below(TIMM_OPS);
                // Every layer makes all its draws, so that one layer never changes the draws of another.
                let chosen = draws.uniform_f64() < prob;
                let magnitude = magnitude(settings.magnitude, std, most, draws);
                let op = timm(index, magnitude, increasing, (canvas.height, canvas.width), draws);
                let sampling = look.sampling(draws);
                if chosen {
                    vector::run(PilTask { op, sampling, fill: look.fill, canvas });
                }
            }
        }
    }
}

/// What a dialect leaves to the pipeline.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    pub interpolation: Interpolation,
    pub fill: [u8; 3],
}

impl Look {
    fn sampling(self, draws: &mut Stream) -> Sampling {
        let bicubic = match self.interpolation {
            Interpolation::Bilinear => false,
            Interpolation::Bicubic => true,
            Interpolation::Random => draws.chance(0.5),
        };
        if bicubic { Sampling::Bicubic } else { Sampling::Bilinear }
    }
}

/// timm's: normally distributed about `magnitude`; a deviation above 100 means uniform from 0.
fn magnitude(magnitude: f64, std: f64, most: f64, draws: &mut Stream) -> f64 {
    let drawn = if std > 100.0 {
        magnitude * draws.uniform_f64()
    } else if std > 0.0 {
        magnitude + std * draws.normal()
    } else {
        magnitude
    };
    drawn.clamp(0.0, most)
}

/// `x` or `-x`, with equal probability.
fn signed(x: f64, draws: &mut Stream) -> f64 {
    if draws.chance(0.5) { -x } else { x }
}

/// big_vision's: one of 16 with replacement, always applied; the magnitude is not clamped at 10.
fn draw_tf(magnitude: f64, (height, width): (usize, usize), fixed: bool, draws: &mut Stream) -> Op {
    let level = magnitude / 10.0;
    let enhance = (level * 1.8 + 0.1) as f32;
    match draws.below(TF_OPS) {
        0 => Op::AutoContrast,
        1 => Op::Equalize,
        2 => Op::Invert,
        3 => Op::Rotate(signed(level * 30.0, draws)),
        4 => Op::Posterize((level * 4.0) as u32),
        5 => {
            let threshold = (level * 256.0) as u32;
            // The original compares with a u8, so it takes the threshold modulo 256
            // (google-research/big_vision#110).
            Op::Solarize(if fixed { threshold.min(256) } else { threshold % 256 })
        }
        6 => Op::Color(enhance),
        7 => Op::Contrast(enhance),
        8 => Op::Brightness(enhance),
        9 => Op::Sharpness(enhance),
        10 => Op::ShearX(signed(level * 0.3, draws)),
        11 => Op::ShearY(signed(level * 0.3, draws)),
        12 => Op::TranslateX(signed(level * 100.0, draws)),
        13 => Op::TranslateY(signed(level * 100.0, draws)),
        14 => Op::Cutout((level * 40.0) as usize, (draws.below(height), draws.below(width))),
        _ => Op::SolarizeAdd((level * 110.0).min(255.0) as u8),
    }
}

/// timm's, of 15; levels as in its `auto_augment.py`.
fn timm(
    index: usize,
    magnitude: f64,
    increasing: bool,
    (height, width): (usize, usize),
    draws: &mut Stream,
) -> Op {
    let level = magnitude / 10.0;
    let sign = signed(1.0, draws);
    let enhance =
        if increasing { (1.0 + sign * level * 0.9).max(0.1) as f32 } else { (level * 1.8 + 0.1) as f32 };
    let threshold = ((level * 256.0) as u32).min(256);
    match index {
        0 => Op::AutoContrast,
        1 => Op::Equalize,
        2 => Op::Invert,
        3 => Op::Rotate(sign * level * 30.0),
        4 => {
            let bits = (level * 4.0) as u32;
            Op::Posterize(if increasing { 4 - bits.min(4) } else { bits.min(8) })
        }
        5 => Op::Solarize(if increasing { 256 - threshold } else { threshold }),
        6 => Op::SolarizeAdd(((level * 110.0) as u32).min(128) as u8),
        7 => Op::Color(enhance),
        8 => Op::Contrast(enhance),
        9 => Op::Brightness(enhance),
        10 => Op::Sharpness(enhance),
        11 => Op::ShearX(sign * level * 0.3),
        12 => Op::ShearY(sign * level * 0.3),
        13 => Op::TranslateX(sign * level * 0.45 * width as f64),
        _ => Op::TranslateY(sign * level * 0.45 * height as f64),
    }
}

/// 3-Augment: one of grey, solarized and blurred.
pub fn three_augment(draws: &mut Stream, canvas: &mut Canvas) {
    let radius = 0.1 + 1.9 * f64::from(draws.uniform());
    let op = match draws.below(3) {
        0 => Op::Grey,
        1 => Op::Solarize(128),
        _ => Op::Blur(radius),
    };
    vector::run(PilTask { op, sampling: Sampling::Bilinear, fill: [0; 3], canvas });
}

/// torchvision's `ColorJitter(s, s, s)`: factors from [1-s, 1+s], in random order.
pub fn color_jitter(strength: f32, draws: &mut Stream, canvas: &mut Canvas) {
    let mut factor = || draws.range((1.0 - strength).max(0.0), 1.0 + strength);
    let mut ops = [Op::Brightness(factor()), Op::Contrast(factor()), Op::Color(factor())];
    for last in [2, 1] {
        ops.swap(last, draws.below(last + 1));
    }
    for op in ops {
        vector::run(PilTask { op, sampling: Sampling::Bilinear, fill: [0; 3], canvas });
    }
}

/// One of big_vision's operations.
pub struct TfTask<'a> {
    pub op: Op,
    pub fixed: bool,
    pub canvas: &'a mut Canvas,
}

impl Task for TfTask<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let c = self.canvas;
        match self.op {
            Op::AutoContrast => tf_ops::autocontrast(c),
            Op::Equalize => c.equalize(),
            Op::Invert => c.invert(),
            Op::Rotate(degrees) => tf_ops::rotate(c, degrees),
            Op::Posterize(bits) => tf_ops::posterize(c, bits),
            Op::Solarize(threshold) => pil_ops::solarize(c, threshold),
            Op::SolarizeAdd(add) => c.solarize_add(add),
            Op::Color(factor) => tf_ops::color(c, factor),
            Op::Contrast(factor) => tf_ops::contrast(c, factor, self.fixed),
            Op::Brightness(factor) => tf_ops::brightness(c, factor),
            Op::Sharpness(factor) => tf_ops::sharpness(c, factor),
            Op::ShearX(share) => tf_ops::shear_x(c, share as f32),
            Op::ShearY(share) => tf_ops::shear_y(c, share as f32),
            Op::TranslateX(pixels) => tf_ops::translate_x(c, pixels as f32),
            Op::TranslateY(pixels) => tf_ops::translate_y(c, pixels as f32),
            Op::Cutout(half, centre) => tf_ops::cutout(c, half, centre),
            Op::Grey | Op::Blur(_) => unreachable!("not in this dialect"),
        }
    }
}

/// One of Pillow's operations.
pub struct PilTask<'a> {
    pub op: Op,
    pub sampling: Sampling,
    pub fill: [u8; 3],
    pub canvas: &'a mut Canvas,
}

impl Task for PilTask<'_> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let Self { op, sampling, fill, canvas: c } = self;
        match op {
            Op::AutoContrast => pil_ops::autocontrast(c),
            Op::Equalize => c.equalize(),
            Op::Invert => c.invert(),
            Op::Rotate(degrees) => pil_ops::rotate(c, degrees, sampling, fill),
            Op::Posterize(bits) => c.posterize(bits),
            Op::Solarize(threshold) => pil_ops::solarize(c, threshold),
            Op::SolarizeAdd(add) => c.solarize_add(add),
            Op::Color(factor) => pil_ops::color(c, factor),
            Op::Contrast(factor) => pil_ops::contrast(c, factor),
            Op::Brightness(factor) => pil_ops::brightness(c, factor),
            Op::Sharpness(factor) => pil_ops::sharpness(c, factor),
            Op::ShearX(share) => pil_ops::affine(c, [1.0, share, 0.0, 0.0, 1.0, 0.0], sampling, fill),
            Op::ShearY(share) => pil_ops::affine(c, [1.0, 0.0, 0.0, share, 1.0, 0.0], sampling, fill),
            Op::TranslateX(by) => pil_ops::affine(c, [1.0, 0.0, by, 0.0, 1.0, 0.0], sampling, fill),
            Op::TranslateY(by) => pil_ops::affine(c, [1.0, 0.0, 0.0, 0.0, 1.0, by], sampling, fill),
            Op::Grey => pil_ops::greyscale(c),
            Op::Blur(radius) => pil_ops::gaussian_blur(c, radius),
            Op::Cutout(..) => unreachable!("not in this dialect"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::reference::{Arrays, json, seeded};

    /// Tests every operation through the function that workers call, at the arguments that the levels give.
    #[test]
    fn drawn_operations_are_the_references_at_their_magnitude() {
        let Some(table) = json("augment/randaug_ops.json") else { return };
        let mut arrays = Arrays::open("augment/randaug_ops.npz").unwrap();
        let cases = table["ops"].as_array().unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for (seed, magnitude) in (0..400).flat_map(|s| [0.0, 5.0, 10.0, 15.0, 20.0].map(|m| (s, m))) {
            let input = arrays.picture("image0");
            let mut canvas = Canvas::default();
            canvas.reset((input.height, input.width));
            canvas.pixels.copy_from_slice(&input.pixels);
            let op = draw_tf(magnitude, (input.height, input.width), false, &mut seeded(seed));
            let name = format!("{op:?}");
            let name = name.split('(').next().unwrap();
            let sign = match op {
                Op::Rotate(x) | Op::ShearX(x) | Op::ShearY(x) | Op::TranslateX(x) | Op::TranslateY(x) => {
                    if x.is_sign_negative() { "-" } else { "+" }
                }
                // Its centre is drawn. The test beside the operation covers the stored centres.
                Op::Cutout(..) => continue,
                _ => "",
            };
            let key = format!("{name}.m{magnitude}{sign}.image0");
            if cases.iter().all(|c| c["key"] != key.as_str()) {
                continue; // stored once for all magnitudes
            }
            vector::run(TfTask { op, fixed: false, canvas: &mut canvas });
            assert!(canvas.pixels == arrays.picture(&key).pixels, "{key} {op:?}");
            seen.insert(key);
        }
        assert!(seen.len() > 55, "{} operations", seen.len());
    }

    #[test]
    fn timms_levels_are_those_of_its_source() {
        let op = |index, magnitude, increasing| {
            let mut ops: Vec<String> = (0..20)
                .map(|s| format!("{:?}", timm(index, magnitude, increasing, (100, 200), &mut seeded(s))))
                .collect();
            ops.sort();
            ops.dedup();
            ops
        };
        assert_eq!(op(3, 9.0, true), ["Rotate(-27.0)", "Rotate(27.0)"]);
        assert_eq!(op(4, 9.0, true), ["Posterize(1)"]);
        assert_eq!(op(4, 9.0, false), ["Posterize(3)"]);
        assert_eq!(op(5, 9.0, true), ["Solarize(26)"]);
        assert_eq!(op(6, 10.0, true), ["SolarizeAdd(110)"]);
        assert_eq!(op(7, 10.0, true), ["Color(0.1)", "Color(1.9)"]);
        assert_eq!(op(13, 10.0, true), ["TranslateX(-90.0)", "TranslateX(90.0)"]);
        assert_eq!(op(14, 10.0, true), ["TranslateY(-45.0)", "TranslateY(45.0)"]);
        let drawn: Vec<f64> = (0..2000).map(|s| magnitude(9.0, 0.5, 10.0, &mut seeded(s))).collect();
        let mean = drawn.iter().sum::<f64>() / 2000.0;
        assert!((mean - 9.0).abs() < 0.05 && drawn.iter().all(|m| *m <= 10.0), "{mean}");
        let uniform: Vec<f64> = (0..2000).map(|s| magnitude(9.0, 101.0, 10.0, &mut seeded(s))).collect();
        assert!((uniform.iter().sum::<f64>() / 2000.0 - 4.5).abs() < 0.2);
    }

    #[test]
    fn every_dialect_changes_most_samples_and_repeats_itself() {
        for text in ["tf(2,15)", "tf_fixed(2,15)", "rand-m9-mstd0.5-inc1"] {
            let settings: RandAugment = text.parse().unwrap();
            let look = Look { interpolation: Interpolation::Random, fill: [128; 3] };
            let run = |seed| {
                let mut canvas = Canvas::default();
                canvas.reset((24, 17));
                canvas.pixels.iter_mut().enumerate().for_each(|(i, p)| *p = (i * 7 % 231) as u8);
                apply(&settings, look, &mut seeded(seed), &mut canvas);
                canvas.pixels
            };
            let outs: std::collections::BTreeSet<_> = (0..60).map(run).collect();
            assert!(outs.len() > 20, "{text}: {} different samples", outs.len());
            assert!(run(7) == run(7));
        }
    }
}
