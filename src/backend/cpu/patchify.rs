//! Pixels of the bound batch → the patch matrix: normalised, mixed, cut.
//!
//! A run of pixels that lies in one row of one patch is contiguous in the image and in the matrix; everything works
//! on such runs.

use super::compute::Compute;
use super::view::RowsMut;
use crate::backend::batch::MixBox;
use crate::backend::{Normalise, PatchGrid, Pixels, Slot};

/// The pictures of a batch slot and how they are mixed.
pub(super) struct Pictures<'a> {
    source: Source<'a>,
    image_len: usize,
    partner: &'a [u32],
    lambda: &'a [f32],
    boxes: &'a [MixBox],
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
        }
    }
}

/// Fills `patches: [B·T, patch_len]` with samples `first..` of the batch; the rows of extra tokens become zero.
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
        let mix = Mix {
            own: sample * pictures.image_len,
            partner: pictures.partner[sample] as usize * pictures.image_len,
            lambda: pictures.lambda[sample],
            cut: pictures.boxes[sample],
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
    /// The values from `at` on, a multiple of 3.
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

/// How one sample comes about: offsets of its two pictures, and what is taken from which.
struct Mix {
    own: usize,
    partner: usize,
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
        reader.read(self.own + at, out);

        let cut = self.cut;
        if cut.y0 < cut.y1 && cut.x0 < cut.x1 {
            if (usize::from(cut.y0)..usize::from(cut.y1)).contains(&y) {
                let end = x + out.len() / 3;
                let (from, to) = (usize::from(cut.x0).clamp(x, end), usize::from(cut.x1).clamp(x, end));
                let inside = &mut out[(from - x) * 3..(to - x) * 3];
                reader.read(self.partner + at + (from - x) * 3, inside);
            }
        } else if self.lambda != 1.0 {
            reader.read(self.partner + at, other);
            for (out, other) in out.iter_mut().zip(other) {
                *out = self.lambda * *out + (1.0 - self.lambda) * *other;
            }
        }
    }
}
