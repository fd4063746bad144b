//! Turns the samples of a row of MCUs into RGB pixels: chroma upsampling and colour conversion.
//!
//! Upsampling is libjpeg's "fancy" one: in each halved direction, a sample counts three quarters and its
//! nearer neighbour one quarter, with alternating rounding. Colour is BT.601 with 16 fractional bits. A row
//! of pixels may need the chroma row below it, which belongs to the next row of MCUs. It then waits for that
//! row, and the last rows of samples are kept above the new ones.

use super::Window;
use super::isa::Isa;
use super::scaled::Layout;

/// Lines of samples that belong to one row of pixels.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// Sums of two chroma rows, with a neighbour at either end.
    sums: Vec<u16>,
    /// Chroma at full width, one after the other.
    chroma: [Vec<u8>; 2],
    rgb: [Vec<u8>; 3],
}

/// Writes the pixels of a window row by row.
pub(super) struct Output<'a> {
    window: Window,
    /// The window's first column in the planes.
    x: usize,
    /// Width of the decoded part in pixels, whole MCUs.
    width: usize,
    /// Chroma columns of the planes that belong to the picture; beyond them, the last one is repeated.
    chroma_end: usize,
    /// Chroma rows of the picture.
    chroma_rows: usize,
    layout: Layout,
    /// The next row of the picture to be written.
    next: usize,
    lines: &'a mut Lines,
}

impl<'a> Output<'a> {
    /// The planes begin at column `x` of the picture and are `width` pixels wide.
    pub(super) fn new(layout: Layout, window: Window, x: usize, width: usize, lines: &'a mut Lines) -> Self {
        let halved = layout.halved;
        let chroma_width = layout.width.div_ceil(halved.1);
        let Lines { sums, chroma, rgb } = &mut *lines;
        sums.resize(width / halved.1 + 2, 0);
        chroma.iter_mut().for_each(|line| line.resize(width, 0));
        rgb.iter_mut().for_each(|line| line.resize(window.width, 0));
        Self {
            window,
            x: window.x - x,
            width,
            chroma_end: (chroma_width - x / halved.1).min(width / halved.1),
            chroma_rows: layout.height.div_ceil(halved.0),
            layout,
            next: window.y,
            lines,
        }
    }

    /// Bytes of a row of component `c`.
    pub(super) fn stride(&self, c: usize) -> usize {
        if c == 0 { self.width } else { self.width / self.layout.halved.1 }
    }

    /// Bytes of a component's plane: one row kept, and a row of MCUs.
    pub(super) fn plane_len(&self, c: usize) -> usize {
        let rows = self.layout.mcu.0 / if c == 0 { 1 } else { self.layout.halved.0 };
        self.stride(c) * (1 + rows)
    }

    /// Writes the rows that are complete once `mcu_row` is in the planes, and keeps the planes' last rows for
    /// the next call.
    #[inline(always)]
    pub(super) fn rows<I: Isa>(
        &mut self,
        isa: I,
        planes: &mut [Vec<u8>; 3],
        mcu_row: usize,
        is_last: bool,
        out: &mut [u8],
    ) {
        let Layout { mcu: (mcu_height, _), halved, is_grey, .. } = self.layout;
        let top = mcu_row * mcu_height;
        // The last row waits for the chroma below it, if it needs that.
        let waits = usize::from(halved.0 == 2 && !is_last);
        let end = (top + mcu_height - waits).min(self.window.y + self.window.height);
        while self.next < end {
            let y = self.next;
            let line = self.window.width * 3;
            let out = &mut out[(y - self.window.y) * line..][..line];
            let luma = &planes[0][(y + 1 - top) * self.width + self.x..][..self.window.width];
            if is_grey {
                isa.interleave(luma, luma, luma, out);
            } else {
                self.chroma(planes, y, mcu_row);
                let Lines { chroma: [cb, cr], rgb, .. } = &mut *self.lines;
                let span = self.x..self.x + self.window.width;
                colour(luma, &cb[span.clone()], &cr[span], rgb);
                isa.interleave(&rgb[0], &rgb[1], &rgb[2], out);
            }
            self.next += 1;
        }
        for (c, plane) in planes.iter_mut().enumerate().take(if is_grey { 1 } else { 3 }) {
            let stride = self.stride(c);
            let len = self.plane_len(c);
            plane.copy_within(len - stride..len, 0);
        }
    }

    /// Chroma of row `y` at full width, into `lines.chroma`.
    #[inline(always)]
    fn chroma(&mut self, planes: &[Vec<u8>; 3], y: usize, mcu_row: usize) {
        let stride = self.stride(1);
        let Layout { mcu, halved, is_smooth, .. } = self.layout;
        let top = mcu_row * mcu.0 / halved.0;
        let own = y / halved.0;
        let other = match y % 2 {
            0 => own.saturating_sub(1),
            _ => (own + 1).min(self.chroma_rows - 1),
        };
        let end = self.chroma_end;
        let stretch = Stretch { down: halved.0, across: halved.1, is_smooth };
        let Lines { sums, chroma, .. } = &mut *self.lines;
        for (plane, line) in planes[1..].iter().zip(chroma) {
            let row = |row: usize| &plane[(row + 1 - top) * stride..][..stride];
            // If no neighbour is used, its row may be missing.
            let other = if halved.0 == 2 && is_smooth { row(other) } else { row(own) };
            stretch.row(row(own), other, y % 2, end, sums, line);
        }
    }
}

/// How the samples of a component are upsampled to the picture's pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    /// Pixels of one sample, in each direction.
    pub(super) down: usize,
    pub(super) across: usize,
    /// Whether the two pixels of a sample depend on its neighbours. More than two pixels are copies.
    pub(super) is_smooth: bool,
}

impl Stretch {
    /// One row of pixels, from the row of samples that contains it and the other nearest row. `y` is the row
    /// of pixels modulo `down`; `end` samples belong to the picture; `sums` is two longer than a row of
    /// samples.
    #[inline(always)]
    pub(super) fn row(
        self,
        own: &[u8],
        other: &[u8],
        y: usize,
        end: usize,
        sums: &mut [u16],
        line: &mut [u8],
    ) {
        match (self.down, self.across, self.is_smooth) {
            (_, 1, false) | (1, 1, _) => line.copy_from_slice(own),
            (2, 1, true) => {
                let bias = 1 + y as u16;
                for ((sample, near), far) in line.iter_mut().zip(own).zip(other) {
                    *sample = ((3 * u16::from(*near) + u16::from(*far) + bias) >> 2) as u8;
                }
            }
            (1 | 2, 2, true) => {
                let inner = &mut sums[1..=end];
                if self.down == 1 {
                    inner.iter_mut().zip(own).for_each(|(sum, s)| *sum = u16::from(*s));
                } else {
                    for ((sum, near), far) in inner.iter_mut().zip(own).zip(other) {
                        *sum = 3 * u16::from(*near) + u16::from(*far);
                    }
                }
                sums[0] = sums[1];
                sums[end + 1] = sums[end];
                let sums = &sums[..end + 2];
                if self.down == 1 {
                    widen::<2, 1, 2>(sums, line);
                } else {
                    widen::<4, 8, 7>(sums, line);
                }
            }
            _ => {
                for (x, sample) in line.iter_mut().enumerate() {
                    *sample = own[x / self.across];
                }
            }
        }
    }
}

/// Two samples for each of `sums[1..n-1]`: three quarters of itself, and one quarter of the left or right
/// neighbour.
#[inline(always)]
fn widen<const SHIFT: u32, const LEFT: u16, const RIGHT: u16>(sums: &[u16], line: &mut [u8]) {
    let count = sums.len() - 2;
    let (left, own, right) = (&sums[..count], &sums[1..=count], &sums[2..]);
    let pairs = line[..count * 2].chunks_exact_mut(2);
    for (((pair, left), own), right) in pairs.zip(left).zip(own).zip(right) {
        pair[0] = ((3 * own + left + LEFT) >> SHIFT) as u8;
        pair[1] = ((3 * own + right + RIGHT) >> SHIFT) as u8;
    }
}

/// YCbCr to RGB, one channel after the other.
#[inline(always)]
pub(super) fn colour(luma: &[u8], cb: &[u8], cr: &[u8], rgb: &mut [Vec<u8>; 3]) {
    const ROUND: i32 = 1 << 15;
    let [r, g, b] = rgb;
    let n = luma.len();
    let (cb, cr, r, g, b) = (&cb[..n], &cr[..n], &mut r[..n], &mut g[..n], &mut b[..n]);
    for i in 0..n {
        let (y, cb, cr) = (i32::from(luma[i]), i32::from(cb[i]) - 128, i32::from(cr[i]) - 128);
        r[i] = (y + ((91_881 * cr + ROUND) >> 16)).clamp(0, 255) as u8;
        g[i] = (y + ((-22_554 * cb - 46_802 * cr + ROUND) >> 16)).clamp(0, 255) as u8;
        b[i] = (y + ((116_130 * cb + ROUND) >> 16)).clamp(0, 255) as u8;
    }
}
