//! What happens to a picture between its decoder and its slot: crop, resize, flip, pixel operations; or, for
//! evaluation, only the protocol's resize. Mixing ([`mix`]) and erasing ([`erase`]) are decided here and
//! carried out on the device.
//!
//! All draws of a sample come from one stream, keyed by (seed, epoch, record, repeat). Which worker prepares
//! the sample, when, and in which batch never changes a pixel.

// The steps of [`train`] and [`evaluate`]. A recipe chooses among them; a user of the library does not call them.
#[doc(hidden)]
pub mod canvas;
#[doc(hidden)]
pub mod color;
#[doc(hidden)]
pub mod crop;
#[doc(hidden)]
pub mod erase;
#[doc(hidden)]
pub mod mirror;
#[doc(hidden)]
pub mod mix;
#[doc(hidden)]
pub mod pil_ops;
#[doc(hidden)]
pub mod randaug;
#[doc(hidden)]
pub mod resize;
#[doc(hidden)]
pub mod tf_ops;
#[doc(hidden)]
pub mod vector;

use crate::backend::Normalise;
use crate::recipe::{AugmentSection, Crop, EvalResize, Interpolation};
use crate::rng::Stream;

use super::picture::{Part, Scale, View, Wanted, Window};
use canvas::Canvas;
use resize::{Filter, Out};

/// Memory that a worker reuses for every sample.
#[derive(Debug, Default)]
pub struct Buffers {
    canvas: Canvas,
    resized: Vec<u8>,
    scratch: resize::ResizeScratch,
    floats: Vec<f32>,
}

/// Destination of a finished sample, `[H, W, 3]`: written once, in order, and never read.
pub enum Target<'a> {
    /// Rounded, or truncated where the recipe or the protocol says so.
    U8(&'a mut [u8]),
    /// Normalised. If a sample is only resized by TensorFlow's rules, its fractions are kept.
    F32(&'a mut [f32], Normalise),
}

impl Target<'_> {
    /// The same destination again, for another try.
    pub fn again(&mut self) -> Target<'_> {
        match self {
            Target::U8(pixels) => Target::U8(pixels),
            Target::F32(values, normalise) => Target::F32(values, *normalise),
        }
    }
}

/// Draws which part of a picture of `of` (H, W) a training sample of `size` shows, and returns it with the smallest
/// decode scale that still leaves the resize something to reduce. This is the first of the sample's draws.
pub fn wanted(
    augment: &AugmentSection,
    of: (usize, usize),
    size: (usize, usize),
    draws: &mut Stream,
) -> Wanted {
    let window = match augment.crop {
        Crop::Tf => crop::tf_window(draws, of, augment.area),
        Crop::Torch => crop::torch_window(draws, of, augment.area),
        Crop::Center | Crop::Pad | Crop::Resize | Crop::ResizeSmall | Crop::Simple => {
            return Wanted::whole(of);
        }
    };
    let scale = if augment.scaled_decode { Scale::least(window, size) } else { Scale::Full };
    Wanted { window, scale }
}

/// Makes a training sample of `size` (H, W) from the part of a picture that is [`wanted`].
pub fn train(
    augment: &AugmentSection,
    part: Part,
    size: (usize, usize),
    draws: &mut Stream,
    buffers: &mut Buffers,
    mut target: Target,
) {
    let Buffers { canvas, resized, scratch, floats } = buffers;
    let flip = augment.flip && draws.chance(0.5);
    let is_plain = augment.randaugment.is_none()
        && !augment.three_augment
        && augment.color_jitter == 0.0
        && color::Jitter::new(augment).is_none();
    canvas.reset(size);
    // Crops without a window of their own use the whole picture.
    let picture = part.view;

    // 1. A view of the sample's size, in the picture itself if possible.
    let view = match augment.crop {
        Crop::Tf => {
            if let (true, Target::F32(values, normalise)) = (is_plain, &mut target) {
                floats.resize(values.len(), 0.0);
                let out = Out::F32 { values: floats, normalise: *normalise };
                resize::tf_bilinear(part, size, scratch, out);
                return write_floats(floats, size.1, flip, values);
            }
            let truncate = augment.truncate;
            if let (true, false, Target::U8(pixels)) = (is_plain, flip, &mut target) {
                return resize::tf_bilinear(part, size, scratch, Out::U8 { pixels, truncate });
            }
            let out = Out::U8 { pixels: &mut canvas.spare, truncate };
            resize::tf_bilinear(part, size, scratch, out);
            View::new(&canvas.spare, size.0, size.1)
        }
        Crop::Torch => {
            let filter = filter(augment.interpolation, draws);
            if let (true, false, Target::U8(pixels)) = (is_plain, flip, &mut target) {
                return resize::pil(part, size, filter, scratch, pixels);
            }
            resize::pil(part, size, filter, scratch, &mut canvas.spare);
            View::new(&canvas.spare, size.0, size.1)
        }
        Crop::Center => {
            let whole = shorter(picture, size, Filter::Bicubic);
            whole.window(Window::centre(whole.size, size), resized, scratch)
        }
        Crop::Pad => {
            let whole = shorter(picture, size, Filter::Bicubic);
            let framed = crop::Framed::draw(whole.size, size, augment.pad, draws);
            let (seen, origin) = whole.around(framed.seen(), resized, scratch);
            if let (true, false, Target::U8(pixels)) = (is_plain, flip, &mut target) {
                return framed.padded(seen, origin, pixels);
            }
            framed.padded(seen, origin, &mut canvas.spare);
            View::new(&canvas.spare, size.0, size.1)
        }
        Crop::Resize => {
            let whole = (augment.resize, augment.resize);
            squash(picture, whole, true, resized, scratch).shows(crop::random(whole, size, draws))
        }
        Crop::ResizeSmall => {
            let whole = area(picture, augment.resize);
            whole.window(crop::random(whole.size, size, draws), resized, scratch)
        }
        Crop::Simple => {
            let whole = shorter(picture, size, filter(augment.interpolation, draws));
            let framed = crop::Framed::draw(whole.size, size, crop::SIMPLE_PAD, draws);
            let (seen, origin) = whole.around(framed.seen_reflected(), resized, scratch);
            framed.reflected(seen, origin, &mut canvas.spare);
            View::new(&canvas.spare, size.0, size.1)
        }
    };
    if is_plain {
        return write(view, flip, target);
    }

    // 2. Operations on it.
    mirror::copy(view, flip, &mut canvas.pixels);
    let look = randaug::Look { interpolation: augment.interpolation, fill: augment.fill };
    if let Some(settings) = &augment.randaugment {
        randaug::apply(settings, look, draws, canvas);
    }
    if augment.three_augment {
        randaug::three_augment(draws, canvas);
    }
    // In timm, RandAugment replaces the jitter.
    if augment.color_jitter > 0.0 && augment.randaugment.is_none_or(|r| r.keeps_jitter) {
        randaug::color_jitter(augment.color_jitter, draws, canvas);
    }
    if let Some(jitter) = color::Jitter::new(augment) {
        jitter.apply(draws, &mut canvas.pixels, floats);
    }
    write(View::new(&canvas.pixels, size.0, size.1), false, target);
}

fn filter(interpolation: Interpolation, draws: &mut Stream) -> Filter {
    match interpolation {
        Interpolation::Bilinear => Filter::Bilinear,
        Interpolation::Bicubic => Filter::Bicubic,
        Interpolation::Random => [Filter::Bilinear, Filter::Bicubic][usize::from(draws.chance(0.5))],
    }
}

/// Makes an evaluation sample of `size` (H, W), by the protocol's `resize`.
pub fn evaluate(
    resize: EvalResize,
    crop_ratio: f32,
    picture: View,
    size: (usize, usize),
    buffers: &mut Buffers,
    target: Target,
) {
    let Buffers { resized, scratch, .. } = buffers;
    let down = |s: usize| ((s as f32 / crop_ratio) as usize).max(s);
    let nearest = |s: usize| ((s as f32 / crop_ratio).round() as usize).max(s);
    match resize {
        EvalResize::Squash if picture.size() == size => write(picture, false, target),
        EvalResize::Squash => {
            let out = match target {
                Target::U8(pixels) => Out::U8 { pixels, truncate: false },
                Target::F32(values, normalise) => Out::F32 { values, normalise },
            };
            resize::tf_bilinear(picture, size, scratch, out);
        }
        EvalResize::Center | EvalResize::CenterBilinear => {
            let filter = if resize == EvalResize::Center { Filter::Bicubic } else { Filter::Bilinear };
            let whole = shorter(picture, (down(size.0), down(size.1)), filter);
            let window = Window::centre_rounded(whole.size, size);
            write(whole.window(window, resized, scratch), false, target);
        }
        EvalResize::AreaCenter => {
            let whole = area(picture, nearest(size.0.max(size.1)));
            let window = Window::centre(whole.size, size);
            write(whole.window(window, resized, scratch), false, target);
        }
        EvalResize::SquashCenter => {
            let whole = (nearest(size.0), nearest(size.1));
            let view = squash(picture, whole, true, resized, scratch);
            write(view.shows(Window::centre(whole, size)), false, target);
        }
        EvalResize::SquashSmooth | EvalResize::SquashBicubic => {
            let filter = if resize == EvalResize::SquashSmooth { Filter::Bilinear } else { Filter::Bicubic };
            let (height, width) = (down(size.0), down(size.1));
            resized.resize(height * width * 3, 0);
            resize::pil(picture, (height, width), filter, scratch, resized);
            let view = View::new(resized, height, width);
            write(view.shows(Window::centre_rounded((height, width), size)), false, target);
        }
    }
}

/// Copies a view to its destination.
fn write(view: View, flip: bool, target: Target) {
    match target {
        Target::U8(pixels) => mirror::copy(view, flip, pixels),
        Target::F32(values, normalise) => {
            for (y, line) in values.chunks_exact_mut(view.width * 3).enumerate() {
                let row = view.row(y);
                for (x, pixel) in line.chunks_exact_mut(3).enumerate() {
                    let x = if flip { view.width - 1 - x } else { x };
                    for c in 0..3 {
                        pixel[c] = (f32::from(row[x * 3 + c]) - normalise.mean[c]) / normalise.std[c];
                    }
                }
            }
        }
    }
}

fn write_floats(floats: &[f32], width: usize, flip: bool, out: &mut [f32]) {
    for (to, from) in out.chunks_exact_mut(width * 3).zip(floats.chunks_exact(width * 3)) {
        if !flip {
            to.copy_from_slice(from);
            continue;
        }
        for (to, from) in to.chunks_exact_mut(3).zip(from.chunks_exact(3).rev()) {
            to.copy_from_slice(from);
        }
    }
}

/// A picture at another size, of which only the needed part is computed.
#[derive(Clone, Copy)]
struct Resized<'a> {
    picture: View<'a>,
    /// (H, W)
    size: (usize, usize),
    law: Law,
}

#[derive(Clone, Copy)]
enum Law {
    Pil(Filter),
    Area,
}

impl<'a> Resized<'a> {
    fn window(
        self,
        window: Window,
        pixels: &'a mut Vec<u8>,
        scratch: &mut resize::ResizeScratch,
    ) -> View<'a> {
        let Self { picture, size, law } = self;
        if size == picture.size() {
            return picture.shows(window);
        }
        pixels.resize(window.height * window.width * 3, 0);
        match law {
            Law::Pil(filter) => resize::pil_window(picture, size, window, filter, scratch, pixels),
            Law::Area => resize::tf_area(picture, size, window, Out::U8 { pixels, truncate: true }),
        }
        View::new(pixels, window.height, window.width)
    }

    /// Pixels that include `window`, and where they begin: all of the picture if its size does not change.
    fn around(
        self,
        window: Window,
        pixels: &'a mut Vec<u8>,
        scratch: &mut resize::ResizeScratch,
    ) -> (View<'a>, (usize, usize)) {
        if self.size == self.picture.size() || window.height * window.width == 0 {
            return (self.picture, (0, 0));
        }
        (self.window(window, pixels, scratch), (window.y, window.x))
    }
}

/// A picture whose shorter side just covers `size`.
fn shorter(picture: View, size: (usize, usize), filter: Filter) -> Resized {
    Resized { picture, size: resize::covering(picture.size(), size), law: Law::Pil(filter) }
}

/// big_vision's `resize_small`: the shorter side by areas, rounded to u8.
fn area(picture: View, side: usize) -> Resized {
    Resized { picture, size: resize::small(picture.size(), side), law: Law::Area }
}

/// big_vision's `resize`: TensorFlow's bilinear, rounded to u8.
fn squash<'a>(
    picture: View<'a>,
    size: (usize, usize),
    truncate: bool,
    resized: &'a mut Vec<u8>,
    scratch: &mut resize::ResizeScratch,
) -> View<'a> {
    if picture.size() == size {
        return picture;
    }
    resized.resize(size.0 * size.1 * 3, 0);
    resize::tf_bilinear(picture, size, scratch, Out::U8 { pixels: resized, truncate });
    View::new(resized, size.0, size.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::reference::{Arrays, seeded};

    #[test]
    fn area_then_centre_is_big_visions() {
        let Some(mut arrays) = Arrays::open("augment/tf_resize.npz") else { return };
        let mut compared = 0;
        for case in (0..).map(|i| format!("r{i}")) {
            if !arrays.names().contains(&format!("{case}.in")) {
                break;
            }
            let input = arrays.picture(&format!("{case}.in"));
            let small = arrays.picture(&format!("{case}.resize_small_area"));
            let expected = arrays.picture(&format!("{case}.resize_small_then_central_crop"));
            let side = small.height.min(small.width);
            let (mut resized, mut scratch) = (Vec::new(), resize::ResizeScratch::default());
            let ours = area(input.view(), side);
            assert_eq!(ours.size, (small.height, small.width), "{case}");
            ours.window(Window::whole(ours.size), &mut resized, &mut scratch);
            let mut out = vec![0; expected.pixels.len()];
            let size = (expected.height, expected.width);
            let ratio = size.0 as f32 / side as f32;
            let mut buffers = Buffers::default();
            evaluate(EvalResize::AreaCenter, ratio, input.view(), size, &mut buffers, Target::U8(&mut out));
            assert!(resized == small.pixels && out == expected.pixels, "{case}");
            compared += 1;
        }
        assert!(compared > 0);
    }

    /// Sums over Pillow 12's pixels, each value times its position from 1.
    #[test]
    fn squashed_and_centred_pictures_are_pillows() {
        let pixels: Vec<u8> = (0..20 * 30 * 3).map(|i| (i * 31 % 251) as u8).collect();
        let mut buffers = Buffers::default();
        for (resize, ratio, expected) in [
            (EvalResize::SquashBicubic, 8.0 / 12.0, 2_312_224),
            (EvalResize::SquashSmooth, 8.0 / 12.0, 2_316_803),
            (EvalResize::SquashSmooth, 1.0, 2_317_705),
            (EvalResize::CenterBilinear, 8.0 / 12.0, 2_317_322),
            (EvalResize::Center, 8.0 / 12.0, 2_316_146),
        ] {
            let mut out = vec![0; 8 * 8 * 3];
            evaluate(resize, ratio, View::new(&pixels, 20, 30), (8, 8), &mut buffers, Target::U8(&mut out));
            let sum: u64 = out.iter().zip(1..).map(|(value, place)| u64::from(*value) * place).sum();
            assert_eq!(sum, expected, "{resize:?} {ratio}");
        }
    }

    /// The rounding error of u8 slots: at most half a step of 1/127.5.
    #[test]
    fn fractions_are_kept_in_f32_slots_and_rounded_in_u8_slots() {
        let pixels: Vec<u8> = (0..50 * 40 * 3).map(|i| (i * 31 % 256) as u8).collect();
        let picture = View::new(&pixels, 50, 40);
        let mut buffers = Buffers::default();
        for (seed, crop) in (0..8).flat_map(|s| [Crop::Tf, Crop::Torch, Crop::Simple].map(|c| (s, c))) {
            let augment = AugmentSection { crop, ..Default::default() };
            let (mut bytes, mut floats) = (vec![0; 24 * 16 * 3], vec![0.0; 24 * 16 * 3]);
            let part = picture.into();
            train(&augment, part, (24, 16), &mut seeded(seed), &mut buffers, Target::U8(&mut bytes));
            let target = Target::F32(&mut floats, Normalise::INCEPTION);
            train(&augment, part, (24, 16), &mut seeded(seed), &mut buffers, target);
            let worst = floats
                .iter()
                .zip(&bytes)
                .map(|(f, b)| (f * 127.5 + 127.5 - f32::from(*b)).abs())
                .fold(0.0, f32::max);
            let expected = if crop == Crop::Tf { 0.5..=0.501 } else { 0.0..=1e-4 };
            assert!(
                worst <= *expected.end() && (crop != Crop::Tf || worst > 0.3),
                "{crop:?}: off by {worst}"
            );
        }
    }

    #[test]
    fn every_crop_makes_every_size_of_every_picture() {
        let crops =
            [Crop::Pad, Crop::Torch, Crop::Tf, Crop::Center, Crop::Resize, Crop::ResizeSmall, Crop::Simple];
        let mut buffers = Buffers::default();
        for (height, width) in [(1, 1), (1, 200), (90, 2), (17, 13), (64, 64)] {
            let pixels: Vec<u8> = vec![200; height * width * 3];
            for (i, size) in [(8, 8), (5, 12), (16, 7)].into_iter().enumerate() {
                for crop in crops {
                    let resize = if matches!(crop, Crop::Resize | Crop::ResizeSmall) { 20 } else { 0 };
                    let augment = AugmentSection { crop, resize, ..Default::default() };
                    let mut draws = seeded(i as u64);
                    let w = wanted(&augment, (height, width), size, &mut draws).window;
                    let view = View::new(&pixels, height, width).window(w.y, w.x, w.height, w.width);
                    let mut out = vec![0; size.0 * size.1 * 3];
                    train(&augment, view.into(), size, &mut draws, &mut buffers, Target::U8(&mut out));
                    // Areas add up to 1 except for f32's last bit, and their fractions are truncated.
                    let least = if crop == Crop::ResizeSmall { 199 } else { 200 };
                    assert!(
                        out.iter().all(|p| (least..=200).contains(p)),
                        "{crop:?} of {height}x{width} to {size:?}"
                    );
                }
            }
        }
    }
}
