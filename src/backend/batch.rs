//! A batch slot: host memory that loader workers fill and the device reads. It is passed around by ownership.
//!
//! A slot travels loader → trainer → backend → loader and is never copied on the host. On CUDA its memory is
//! page-locked and the copy engine reads it; on the CPU the operations read it in place.

use crate::error::{Error, Result};

/// The memory of a slot. Implementations: plain aligned memory (CPU), page-locked memory (CUDA).
pub trait HostMemory: Send {
    /// All bytes.
    fn bytes(&self) -> &[u8];
    /// All bytes, to be written.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// How a slot holds its pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pixels {
    /// `[B, H, W, 3]` u8, normalised on the device.
    U8,
    /// `[B, H, W, 3]` f32, already normalised.
    F32,
}

/// What a slot holds as the truth about its samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// One class index per sample, i32.
    Labels,
    /// `[B, C]` f32: multi-hot or soft.
    Dense {
        /// C
        classes: usize,
    },
}

/// What one slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotLayout {
    /// B: the rank's whole batch.
    pub samples: usize,
    /// (H, W)
    pub image: (usize, usize),
    /// How pixels are held.
    pub pixels: Pixels,
    /// What is held as the truth.
    pub targets: TargetKind,
}

/// A rectangle `[y0, y1) × [x0, x1)` of pixels, or empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct MixBox {
    /// First row.
    pub y0: u16,
    /// First column.
    pub x0: u16,
    /// The row after the last.
    pub y1: u16,
    /// The column after the last.
    pub x1: u16,
}

/// What is erased from a sample, after normalisation and before mixing. The device draws the content of the
/// box.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Erase {
    /// The box that is erased; empty: nothing.
    pub cut: MixBox,
    /// Seed of the draws for this sample.
    pub seed: u32,
    /// 0: zeros; 1: one normal colour; 2: a normal draw per value.
    pub mode: u32,
}

impl Erase {
    /// The normalised colour of pixel (y, x) of the box: Box and Muller (1958) on the words of
    /// `philox([y, x, 0, 0], [seed, ERASE_KEY])`, with `y = x = 0` for one colour. Red and green use the
    /// first two words, blue the others.
    pub fn colour(&self, y: usize, x: usize) -> [f32; 3] {
        const ERASE_KEY: u32 = 0x4572_6173;
        let (y, x) = match self.mode {
            0 => return [0.0; 3],
            1 => (0, 0),
            _ => (y as u32, x as u32),
        };
        let words = crate::rng::philox([y, x, 0, 0], [self.seed, ERASE_KEY]);
        let normal = |u: u32, v: u32| {
            let radius = (-2.0 * (1.0 - crate::rng::unit(u)).ln()).sqrt();
            let angle = std::f32::consts::TAU * crate::rng::unit(v);
            (radius * angle.cos(), radius * angle.sin())
        };
        let ((r, g), (b, _)) = (normal(words[0], words[1]), normal(words[2], words[3]));
        [r, g, b]
    }
}

impl SlotLayout {
    /// Values (not bytes) per image.
    pub fn image_len(&self) -> usize {
        self.image.0 * self.image.1 * 3
    }

    fn pixel_bytes(&self) -> usize {
        let size = match self.pixels {
            Pixels::U8 => 1,
            Pixels::F32 => 4,
        };
        self.samples * self.image_len() * size
    }

    fn target_bytes(&self) -> usize {
        match self.targets {
            TargetKind::Labels => self.samples * 4,
            TargetKind::Dense { classes } => self.samples * classes * 4,
        }
    }

    /// Byte offsets of pixels, targets, partner, lambda, boxes, pixel lambda and erased boxes, and the end.
    pub(super) fn offsets(&self) -> [usize; 8] {
        let n = self.samples;
        let sizes = [self.pixel_bytes(), self.target_bytes(), n * 4, n * 4, n * 8, n * 4, n * 16];
        let mut offsets = [0; 8];
        for (i, size) in sizes.into_iter().enumerate() {
            offsets[i + 1] = (offsets[i] + size).next_multiple_of(64);
        }
        offsets
    }

    /// Bytes of host memory that one slot needs.
    pub fn bytes(&self) -> usize {
        self.offsets()[7]
    }
}

/// One batch: pixels, targets, and how samples are mixed.
///
/// Sample i becomes `lambda·x_i + (1-lambda)·x_partner`, both normalised; its target is mixed the same way.
/// Where `boxes` is not empty (cutmix), the partner's pixels replace those inside the box instead, and
/// `lambda` weighs the targets only. `lambda = 1` with an empty box mixes nothing. Chained mixup and cutmix
/// have `pixel_lambda` below 1: pixels outside the box are `pixel_lambda·x_i + (1-pixel_lambda)·x_partner`,
/// pixels inside it the same with the weights exchanged. Without a box, `pixel_lambda` is ignored. Before all
/// this, each sample is erased as its [`Erase`] says.
pub struct Slot {
    memory: Box<dyn HostMemory>,
    layout: SlotLayout,
    /// Real samples; the rest is padding and is ignored.
    pub count: usize,
    /// Position of this batch in the data stream, set by the loader.
    pub position: u64,
}

impl Slot {
    /// `memory` has at least [`SlotLayout::bytes`] bytes, aligned to 64. The slot starts unmixed, with
    /// `count = samples`.
    pub fn new(memory: Box<dyn HostMemory>, layout: SlotLayout) -> Self {
        assert!(memory.bytes().len() >= layout.bytes(), "slot memory is too small");
        assert_eq!(memory.bytes().as_ptr() as usize % 64, 0, "slot memory is not aligned");
        let mut slot = Self { memory, layout, count: layout.samples, position: 0 };
        slot.clear_mix();
        slot
    }

    /// Sizes and types of what the slot holds.
    pub fn layout(&self) -> SlotLayout {
        self.layout
    }

    /// The whole memory, for the copy engine.
    pub(super) fn memory(&self) -> &[u8] {
        &self.memory.bytes()[..self.layout.bytes()]
    }

    fn part<T: bytemuck::Pod>(&self, index: usize, len: usize) -> &[T] {
        let start = self.layout.offsets()[index];
        bytemuck::cast_slice(&self.memory.bytes()[start..start + len * size_of::<T>()])
    }

    fn part_mut<T: bytemuck::Pod>(&mut self, index: usize, len: usize) -> &mut [T] {
        let start = self.layout.offsets()[index];
        bytemuck::cast_slice_mut(&mut self.memory.bytes_mut()[start..start + len * size_of::<T>()])
    }

    /// `[B, H, W, 3]`. Panics if the slot holds f32 pixels.
    pub fn images_u8(&self) -> &[u8] {
        assert_eq!(self.layout.pixels, Pixels::U8);
        self.part(0, self.layout.samples * self.layout.image_len())
    }
    /// [`Slot::images_u8`], to be written.
    pub fn images_u8_mut(&mut self) -> &mut [u8] {
        assert_eq!(self.layout.pixels, Pixels::U8);
        self.part_mut(0, self.layout.samples * self.layout.image_len())
    }
    /// `[B, H, W, 3]`. Panics if the slot holds u8 pixels.
    pub fn images_f32(&self) -> &[f32] {
        assert_eq!(self.layout.pixels, Pixels::F32);
        self.part(0, self.layout.samples * self.layout.image_len())
    }
    /// [`Slot::images_f32`], to be written.
    pub fn images_f32_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.layout.pixels, Pixels::F32);
        self.part_mut(0, self.layout.samples * self.layout.image_len())
    }
    /// `[B]` class indices. Panics if the slot holds dense targets.
    pub fn labels(&self) -> &[i32] {
        assert_eq!(self.layout.targets, TargetKind::Labels);
        self.part(1, self.layout.samples)
    }
    /// [`Slot::labels`], to be written.
    pub fn labels_mut(&mut self) -> &mut [i32] {
        assert_eq!(self.layout.targets, TargetKind::Labels);
        self.part_mut(1, self.layout.samples)
    }
    /// `[B, C]`. Panics if the slot holds labels.
    pub fn targets(&self) -> &[f32] {
        let TargetKind::Dense { classes } = self.layout.targets else { panic!("the slot holds labels") };
        self.part(1, self.layout.samples * classes)
    }
    /// [`Slot::targets`], to be written.
    pub fn targets_mut(&mut self) -> &mut [f32] {
        let TargetKind::Dense { classes } = self.layout.targets else { panic!("the slot holds labels") };
        self.part_mut(1, self.layout.samples * classes)
    }
    /// `[B]` index within this slot of the sample that is mixed in.
    pub fn partner(&self) -> &[u32] {
        self.part(2, self.layout.samples)
    }
    /// [`Slot::partner`], to be written.
    pub fn partner_mut(&mut self) -> &mut [u32] {
        self.part_mut(2, self.layout.samples)
    }
    /// `[B]` weight of the sample itself.
    pub fn lambda(&self) -> &[f32] {
        self.part(3, self.layout.samples)
    }
    /// [`Slot::lambda`], to be written.
    pub fn lambda_mut(&mut self) -> &mut [f32] {
        self.part_mut(3, self.layout.samples)
    }
    /// `[B]` cutmix boxes.
    pub fn boxes(&self) -> &[MixBox] {
        self.part(4, self.layout.samples)
    }
    /// [`Slot::boxes`], to be written.
    pub fn boxes_mut(&mut self) -> &mut [MixBox] {
        self.part_mut(4, self.layout.samples)
    }

    /// `[B]` weight of the sample's own pixels outside its box.
    pub fn pixel_lambda(&self) -> &[f32] {
        self.part(5, self.layout.samples)
    }
    /// [`Slot::pixel_lambda`], to be written.
    pub fn pixel_lambda_mut(&mut self) -> &mut [f32] {
        self.part_mut(5, self.layout.samples)
    }
    /// `[B]` what is erased from each sample.
    pub fn erase(&self) -> &[Erase] {
        self.part(6, self.layout.samples)
    }
    /// [`Slot::erase`], to be written.
    pub fn erase_mut(&mut self) -> &mut [Erase] {
        self.part_mut(6, self.layout.samples)
    }

    /// Turns off mixing and erasing for all samples.
    pub fn clear_mix(&mut self) {
        self.partner_mut().iter_mut().zip(0u32..).for_each(|(p, i)| *p = i);
        self.lambda_mut().fill(1.0);
        self.boxes_mut().fill(MixBox::default());
        self.pixel_lambda_mut().fill(1.0);
        self.erase_mut().fill(Erase::default());
    }
}

/// Plain host memory, aligned to 64 bytes: slots of the CPU backend.
pub struct PlainMemory {
    words: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl PlainMemory {
    /// `len` zeroed bytes.
    pub fn new(len: usize) -> Result<Self> {
        let words = bytemuck::allocation::try_zeroed_vec(len.div_ceil(64))
            .map_err(|()| Error::new(format!("no memory for {len} bytes")))?;
        Ok(Self { words, len })
    }

    /// No bytes at all.
    pub fn empty() -> Self {
        Self { words: Vec::new(), len: 0 }
    }
}

impl HostMemory for PlainMemory {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut bytemuck::cast_slice_mut(&mut self.words)[..len]
    }
}
