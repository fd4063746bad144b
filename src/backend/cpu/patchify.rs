//! Pixels of the bound batch → the patch matrix: normalised, mixed, cut.
//!
//! Pixels in one row of one patch are contiguous in the image and in the matrix; everything works on such
//! runs.

use super::compute::Compute;
use super::view::RowsMut;
use crate::backend::batch::{Erase, MixBox};
use crate::backend::{Normalise, PatchGrid, Pixels, Slot};

/// The images of a batch slot and how they are mixed.
pub(super) struct Pictures<'a> {
    source: Source<'a>,
    image_len: usize,
    partner: &'a [u32],
    lambda: &'a [f32],
    boxes: &'a [MixBox],
    pixel_lambda: &'a [f32],
    erase: &'a [Erase],
}

#[derive(Clone, Copy)]
enum Source<'a> {
    U8(&'a [u8]),
    /// Already normalised.
    F32(&'a [f32]),
}

impl<'a> Pictures<'a> {
    pub(super) fn new(slot: &'a Slot) -> Self {
        let source = match slot.layout().pixels {
            Pixels::U8 => Source::U8(slot.images_u8()),
            Pixels::F32 => Source::F32(slot.images_f32()),
        };
        Self {
            source,
            image_len: slot.layout().image_len(),
            partner: slot.partner(),
            lambda: slot.lambda(),
            boxes: slot.boxes(),
            pixel_lambda: slot.pixel_lambda(),
            erase: slot.erase(),
        }
    }
}

/// Fills `patches: [B·T, patch_len]` with samples `first..` of the batch; rows of extra tokens become zero.
pub(super) fn patchify(
    c: &Compute,
    grid: PatchGrid,
    normalise: Normalise,
    pictures: &Pictures,
    first: usize,
    patches: RowsMut,
) {
    // Mean and deviation of each value of a run: the channels repeat.
    let run = grid.patch.1 * 3;
    let mean: Vec<f32> = (0..run).map(|i| normalise.mean[i % 3]).collect();
    let std: Vec<f32> = (0..run).map(|i| normalise.std[i % 3]).collect();
    let reader = Reader { source: pictures.source, mean: &mean, std: &std };

    c.for_each_item(patches.blocks(grid.tokens()), |(start, mut rows)| {
        let sample = first + start / grid.tokens();
        let partner = pictures.partner[sample] as usize;
        let cut = pictures.boxes[sample];
        let mix = Mix {
            own: (sample * pictures.image_len, pictures.erase[sample]),
            partner: (partner * pictures.image_len, pictures.erase[partner]),
            lambda: if is_empty(cut) { pictures.lambda[sample] } else { pictures.pixel_lambda[sample] },
            cut,
        };
        for token in 0..grid.extra {
            rows.row(token).fill(0.0);
        }
        let mut other = vec![0.0; run];
        let (patch_h, patch_w) = grid.patch;
        for patch in 0..grid.patches() {
            let (y0, x0) = (patch / grid.grid().1 * patch_h, patch % grid.grid().1 * patch_w);
            let row = rows.row(grid.extra + patch);
            for (i, out) in row.chunks_exact_mut(run).enumerate() {
                mix.fill(&reader, grid.image.1, (y0 + i, x0), out, &mut other);
            }
        }
    });
}

/// Reads runs of normalised values.
struct Reader<'a> {
    source: Source<'a>,
    mean: &'a [f32],
    std: &'a [f32],
}

impl Reader<'_> {
    /// The values starting at `at`, a multiple of 3.
    fn read(&self, at: usize, out: &mut [f32]) {
        match self.source {
            Source::U8(pixels) => {
                let pixels = pixels[at..at + out.len()].iter();
                for ((out, pixel), (mean, std)) in
                    out.iter_mut().zip(pixels).zip(self.mean.iter().zip(self.std))
                {
                    *out = (f32::from(*pixel) - mean) / std;
                }
            }
            Source::F32(values) => out.copy_from_slice(&values[at..at + out.len()]),
        }
    }
}

/// How a sample is made: offsets of its two images, what is erased from each, and how they are mixed.
struct Mix {
    own: (usize, Erase),
    partner: (usize, Erase),
    /// Weight of the own pixels outside the cut, of the partner's inside.
    lambda: f32,
    cut: MixBox,
}

impl Mix {
    /// The run that starts at pixel (y, x) of an image `width` pixels wide. `other` is scratch as long as `out`.
    fn fill(
        &self,
        reader: &Reader,
        width: usize,
        (y, x): (usize, usize),
        out: &mut [f32],
        other: &mut [f32],
    ) {
        let at = (y * width + x) * 3;
        let read = |(start, erase): (usize, Erase), out: &mut [f32]| {
            reader.read(start + at, out);
            for column in columns(erase.cut, y, x, out.len() / 3) {
                let colour =
                    erase.colour(y - usize::from(erase.cut.y0), x + column - usize::from(erase.cut.x0));
                out[column * 3..column * 3 + 3].copy_from_slice(&colour);
            }
        };
        read(self.own, out);
        let inside = columns(self.cut, y, x, out.len() / 3);
        if inside.is_empty() && self.lambda == 1.0 {
            return;
        }
        read(self.partner, other);
        let inside = inside.start * 3..inside.end * 3;
        if self.lambda == 1.0 {
            out[inside.clone()].copy_from_slice(&other[inside]);
            return;
        }
        for (i, (out, other)) in out.iter_mut().zip(other).enumerate() {
            let lambda = if inside.contains(&i) { 1.0 - self.lambda } else { self.lambda };
            *out = lambda * *out + (1.0 - lambda) * *other;
        }
    }
}

fn is_empty(cut: MixBox) -> bool {
    cut.y0 >= cut.y1 || cut.x0 >= cut.x1
}

/// Which of the `count` pixels starting at (y, x) are in the box.
fn columns(cut: MixBox, y: usize, x: usize, count: usize) -> std::ops::Range<usize> {
    if is_empty(cut) || !(usize::from(cut.y0)..usize::from(cut.y1)).contains(&y) {
        return 0..0;
    }
    let clamp = |column: u16| usize::from(column).clamp(x, x + count) - x;
    clamp(cut.x0)..clamp(cut.x1)
}

#[cfg(test)]
mod tests {
    use crate::backend::cpu::testbed::*;
    use crate::backend::{
        Backend, Erase, Linear, Micro, MixBox, Normalise, PatchGrid, Pixels, Slot, SlotLayout, TargetKind,
    };
    use crate::rng::{Domain, Stream};

    const NORMALISE: Normalise = Normalise { mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375] };

    fn slot(samples: usize, image: (usize, usize), pixels: Pixels) -> Slot {
        let layout = SlotLayout { samples, image, pixels, targets: TargetKind::Labels };
        let bench = Testbed::new(samples);
        let mut slot = bench.backend(crate::backend::cpu::compute::Isa::Scalar, 1).new_slot(layout).unwrap();
        let mut stream = Stream::new(1, Domain::Demo, 0, 0);
        match pixels {
            Pixels::U8 => slot.images_u8_mut().iter_mut().for_each(|p| *p = stream.below(256) as u8),
            Pixels::F32 => slot.images_f32_mut().iter_mut().for_each(|p| *p = stream.range(-3.0, 3.0)),
        }
        slot
    }

    /// The value of a pixel after normalisation and mixing, in f64 and written from the contract.
    fn pixel(slot: &Slot, sample: usize, (y, x): (usize, usize), channel: usize) -> f64 {
        let value = |sample: usize| {
            let erase = slot.erase()[sample];
            let [y0, x0, y1, x1] = [erase.cut.y0, erase.cut.x0, erase.cut.y1, erase.cut.x1].map(usize::from);
            if (y0..y1).contains(&y) && (x0..x1).contains(&x) {
                return f64::from(erase.colour(y - y0, x - x0)[channel]);
            }
            let i = sample * slot.layout().image_len() + (y * slot.layout().image.1 + x) * 3 + channel;
            match slot.layout().pixels {
                Pixels::U8 => {
                    let (mean, std) = (f64::from(NORMALISE.mean[channel]), f64::from(NORMALISE.std[channel]));
                    (f64::from(slot.images_u8()[i]) - mean) / std
                }
                Pixels::F32 => f64::from(slot.images_f32()[i]),
            }
        };
        let (partner, lambda) = (slot.partner()[sample] as usize, f64::from(slot.lambda()[sample]));
        let MixBox { y0, x0, y1, x1 } = slot.boxes()[sample];
        let (rows, columns) = (usize::from(y0)..usize::from(y1), usize::from(x0)..usize::from(x1));
        if !rows.is_empty() && !columns.is_empty() {
            let outside = f64::from(slot.pixel_lambda()[sample]);
            let own = if rows.contains(&y) && columns.contains(&x) { 1.0 - outside } else { outside };
            return own * value(sample) + (1.0 - own) * value(partner);
        }
        lambda * value(sample) + (1.0 - lambda) * value(partner)
    }

    #[test]
    fn patches_are_normalised_mixed_and_cut() {
        // The last image has a remainder below and at the right.
        for (image, patch, extra) in [((8, 12), (4, 4), 1), ((6, 4), (3, 2), 0), ((5, 9), (2, 4), 2)] {
            for pixels in [Pixels::U8, Pixels::F32] {
                let samples = 5;
                let grid = PatchGrid { image, patch, extra };
                let make = || {
                    let mut slot = slot(samples, image, pixels);
                    slot.partner_mut().copy_from_slice(&[4, 0, 1, 1, 0]);
                    slot.lambda_mut().copy_from_slice(&[1.0, 0.3, 0.7, 0.25, 0.5]);
                    slot.boxes_mut()[2] = MixBox { y0: 1, x0: 1, y1: 4, x1: 4 };
                    slot.boxes_mut()[3] = MixBox { y0: 0, x0: 0, y1: 99, x1: 2 };
                    slot.boxes_mut()[4] = MixBox { y0: 2, x0: 3, y1: 2, x1: 4 }; // empty
                    slot.pixel_lambda_mut()[3] = 0.6;
                    let cut = MixBox { y0: 1, x0: 1, y1: 3, x1: 99 };
                    slot.erase_mut()[1] = Erase { cut, seed: 9, mode: 2 };
                    slot.erase_mut()[0] = Erase { cut, seed: 8, mode: 1 };
                    slot.erase_mut()[3] = Erase { cut, seed: 7, mode: 0 };
                    slot
                };
                let mut b = Testbed::new(samples - 1);
                b.micro.first = 1;
                let patches = b.room((samples - 1) * grid.tokens(), grid.patch_len());
                let run = |k: &mut crate::backend::cpu::CpuBackend| {
                    assert!(k.bind_batch(make()).unwrap().is_none());
                    k.patchify(grid, NORMALISE, patches).unwrap();
                };
                b.everywhere(&[patches], run, |r| {
                    let slot = make();
                    for (i, got) in r[0].iter().enumerate() {
                        let (row, at) = (i / grid.patch_len(), i % grid.patch_len());
                        let (sample, token) = (1 + row / grid.tokens(), row % grid.tokens());
                        let expected = if token < extra {
                            0.0
                        } else {
                            let (down, across) =
                                ((token - extra) / grid.grid().1, (token - extra) % grid.grid().1);
                            let y = down * patch.0 + at / (patch.1 * 3);
                            let x = across * patch.1 + at / 3 % patch.1;
                            pixel(&slot, sample, (y, x), at % 3)
                        };
                        let error = (f64::from(*got) - expected).abs();
                        assert!(error <= 3e-7 * expected.abs().max(0.5), "value {i}: {got}, not {expected}");
                    }
                });
            }
        }
    }

    #[test]
    fn erased_boxes_hold_standard_normal_values() {
        let erase = Erase { cut: MixBox::default(), seed: 5, mode: 2 };
        let values: Vec<f64> =
            (0..10_000).flat_map(|i| erase.colour(i / 100, i % 100).map(f64::from)).collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        let one = Erase { mode: 1, ..erase };
        assert!(
            one.colour(0, 0) == one.colour(3, 9) && one.colour(0, 0) != Erase { seed: 6, ..one }.colour(0, 0)
        );
        assert_eq!(Erase { mode: 0, ..erase }.colour(1, 2), [0.0; 3]);
    }

    #[test]
    fn inception_values_are_those_of_the_reference_systems_to_the_bit() {
        let (grid, mut b) = (PatchGrid { image: (16, 16), patch: (16, 16), extra: 0 }, Testbed::new(1));
        let patches = b.room(1, grid.patch_len());
        let make = || {
            let mut slot = slot(1, grid.image, Pixels::U8);
            slot.images_u8_mut().iter_mut().enumerate().for_each(|(i, p)| *p = (i % 256) as u8);
            slot
        };
        let run = |k: &mut crate::backend::cpu::CpuBackend| {
            k.bind_batch(make()).unwrap();
            k.patchify(grid, Normalise::INCEPTION, patches).unwrap();
        };
        b.everywhere(&[patches], run, |r| {
            for (i, got) in r[0].iter().enumerate() {
                assert_eq!(*got, ((i % 256) as f32 - 127.5) / 127.5, "pixel {}", i % 256);
            }
        });
    }

    #[test]
    fn a_bound_batch_comes_back_when_the_next_is_bound() {
        let bench = Testbed::new(2);
        let mut backend = bench.backend(crate::backend::cpu::compute::Isa::Scalar, 1);
        let mut first = slot(2, (4, 4), Pixels::U8);
        first.position = 7;
        assert!(backend.bind_batch(first).unwrap().is_none());
        let back = backend.bind_batch(slot(2, (4, 4), Pixels::U8)).unwrap();
        assert_eq!(back.map(|slot| slot.position), Some(7));
        assert!(backend.unbind_batch().is_some());
        assert!(backend.unbind_batch().is_none());
    }

    #[test]
    fn the_patch_embedding_is_that_of_the_reference() {
        let Some(file) = Reference::open("kernels/patch_embed.safetensors") else { return };
        for i in (0..).take_while(|i| file.has(&format!("p{i}.x"))) {
            let get = |name: &str| file.f32(&format!("p{i}.{name}"));
            let (image, kernel) = (file.shape(&format!("p{i}.x")), file.shape(&format!("p{i}.w")));
            let grid = PatchGrid { image: (image[1], image[2]), patch: (kernel[0], kernel[1]), extra: 0 };
            let (samples, len, width) = (image[0], grid.patch_len(), kernel[3]);
            // The file's kernel is [in, out], ours [out, in].
            let w = get("w");
            let ours: Vec<f32> = (0..width * len).map(|i| w[i % len * width + i / len]).collect();
            let rows = samples * grid.patches();

            let mut b = Testbed::new(samples);
            b.micro = Micro { first: 0, ..b.micro };
            let linear = Linear {
                weight: b.put(width, len, &ours),
                bias: b.put(1, width, &get("b")),
                d_weight: Some(b.room(width, len)),
                d_bias: Some(b.room(1, width)),
            };
            let (patches, y, d_y) = (b.room(rows, len), b.room(rows, width), b.put(rows, width, &get("dy")));
            let run = |k: &mut crate::backend::cpu::CpuBackend| {
                let mut slot = slot(samples, grid.image, Pixels::F32);
                slot.images_f32_mut().copy_from_slice(&get("x"));
                k.bind_batch(slot).unwrap();
                k.patchify(grid, NORMALISE, patches).unwrap();
                k.matmul(patches, &linear, crate::backend::Epilogue::Bias, y).unwrap();
                k.matmul_backward(d_y, patches, &linear, crate::backend::InputGrad::None).unwrap();
            };
            b.everywhere(&[y, linear.d_weight.unwrap(), linear.d_bias.unwrap()], run, |r| {
                let dw = file.f64(&format!("p{i}.dw"));
                let dw: Vec<f64> = (0..width * len).map(|i| dw[i % len * width + i / len]).collect();
                assert_close("y", &r[0], &file.f64(&format!("p{i}.y")), 1e-6);
                assert_close("dw", &r[1], &dw, 1e-6);
                assert_close("db", &r[2], &file.f64(&format!("p{i}.db")), 1e-6);
            });
        }
    }
}
