//! What happens to one picture between its decoder and its slot: crop, resize, flip, colour; or, for evaluation, only
//! the resize that the protocol wants. Mixing ([`mix`]) is decided here per batch and done on the device.
//!
//! All draws of a sample come from one stream, keyed by (seed, epoch, record): who prepares the sample, when, and
//! beside which others never changes a pixel.

pub mod color;
pub mod crop;
pub mod mix;
pub mod resize;

use crate::recipe::{AugmentSection, Crop, EvalResize};
use crate::rng::Stream;

use super::picture::{View, Window};
use resize::Filter;

/// Memory that a worker uses again for every sample.
#[derive(Debug, Default)]
pub struct Buffers {
    sample: Vec<u8>,
    resized: Vec<u8>,
    between: Vec<u8>,
    floats: Vec<f32>,
}

/// Which part of a picture of `of` (H, W) a training sample shows: the first of its draws.
pub fn window(augment: &AugmentSection, of: (usize, usize), draws: &mut Stream) -> Window {
    match augment.crop {
        Crop::Tf => crop::tf_window(draws, of, augment.area),
        Crop::Torch => crop::torch_window(draws, of, augment.area),
        Crop::Center | Crop::Pad => Window::whole(of),
    }
}

/// Makes a training sample of `size` (H, W). `out`, `[H, W, 3]`, is written once, in order, and never read.
pub fn train(
    augment: &AugmentSection,
    picture: View,
    size: (usize, usize),
    draws: &mut Stream,
    buffers: &mut Buffers,
    out: &mut [u8],
) {
    let Buffers { sample, resized, between, floats } = buffers;
    sample.resize(out.len(), 0);
    match augment.crop {
        Crop::Tf => resize::tf_bilinear(picture, size, |i, value| sample[i] = resize::to_u8(value)),
        Crop::Torch => resize::pil(picture, size, Filter::Bilinear, between, sample),
        Crop::Center => cover(picture, size, resized, between).centre(size).copy_to(sample),
        Crop::Pad => {
            let picture = cover(picture, size, resized, between);
            crop::padded(picture, size, augment.pad, draws, sample);
        }
    }
    let flip = augment.flip && draws.chance(0.5);
    if let Some(jitter) = color::Jitter::new(augment) {
        jitter.apply(draws, sample, floats);
    }
    if flip {
        mirror(sample, size.1, out);
    } else {
        out.copy_from_slice(sample);
    }
}

/// Makes an evaluation sample of `size` (H, W), by the protocol's `resize`; `out` as in [`train`].
pub fn evaluate(
    resize: EvalResize,
    crop_ratio: f32,
    picture: View,
    size: (usize, usize),
    buffers: &mut Buffers,
    out: &mut [u8],
) {
    let Buffers { resized, between, .. } = buffers;
    match resize {
        EvalResize::Squash if picture.size() == size => picture.copy_to(out),
        EvalResize::Squash => resize::tf_bilinear(picture, size, |i, value| out[i] = resize::to_u8(value)),
        EvalResize::Center => {
            let side = |s: usize| ((s as f32 / crop_ratio) as usize).max(s);
            cover(picture, (side(size.0), side(size.1)), resized, between).centre(size).copy_to(out);
        }
    }
}

/// The picture itself if it has `size`, else a copy whose shorter side was resized so that it just covers `size`.
fn cover<'a>(
    picture: View<'a>,
    size: (usize, usize),
    resized: &'a mut Vec<u8>,
    between: &mut Vec<u8>,
) -> View<'a> {
    let target = resize::covering(picture.size(), size);
    if target == picture.size() {
        return picture;
    }
    resized.resize(target.0 * target.1 * 3, 0);
    resize::pil(picture, target, Filter::Bicubic, between, resized);
    View::new(resized, target.0, target.1)
}

/// Writes rows of `width` pixels the other way round.
fn mirror(pixels: &[u8], width: usize, out: &mut [u8]) {
    for (to, from) in out.chunks_exact_mut(width * 3).zip(pixels.chunks_exact(width * 3)) {
        for (to, from) in to.chunks_exact_mut(3).zip(from.chunks_exact(3).rev()) {
            to.copy_from_slice(from);
        }
    }
}
