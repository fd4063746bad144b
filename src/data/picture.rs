//! Pixels in transit: an owned picture, a borrowed window of one, and a part of a window whose borders may
//! lie inside pixels. Always u8 RGB, row by row.

use crate::error::Result;
use crate::fail;

/// A picture that owns its pixels. Each worker keeps one and decodes into it repeatedly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
    /// `[H, W, 3]`
    pub pixels: Vec<u8>,
}

impl Picture {
    /// The whole picture, borrowed.
    pub fn view(&self) -> View<'_> {
        View::new(&self.pixels, self.height, self.width)
    }

    /// Makes room for (H, W) pixels, which the caller then writes. It is an error if the memory cannot be
    /// allocated.
    pub fn reset(&mut self, (height, width): (usize, usize)) -> Result<()> {
        (self.height, self.width) = (height, width);
        room(&mut self.pixels, height * width * 3)
    }
}

/// Resizes a buffer. Its contents are unspecified.
pub(super) fn room(buffer: &mut Vec<u8>, len: usize) -> Result<()> {
    if buffer.try_reserve_exact(len.saturating_sub(buffer.len())).is_err() {
        fail!("no memory for {len} bytes of pixels");
    }
    buffer.resize(len, 0);
    Ok(())
}

/// A part of a picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First row.
    pub y: usize,
    /// First column.
    pub x: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
}

impl Window {
    /// The window of `size` (H, W) in the middle of a picture of `of`; an odd remainder is at the bottom and
    /// right.
    pub fn centre(of: (usize, usize), size: (usize, usize)) -> Self {
        Self { y: (of.0 - size.0) / 2, x: (of.1 - size.1) / 2, height: size.0, width: size.1 }
    }

    /// The window in the middle, as torchvision places it: half of an odd remainder is rounded to even.
    pub fn centre_rounded(of: (usize, usize), size: (usize, usize)) -> Self {
        let start = |room: usize| (room as f64 / 2.0).round_ties_even() as usize;
        Self { y: start(of.0 - size.0), x: start(of.1 - size.1), height: size.0, width: size.1 }
    }

    /// The whole of a picture of (H, W).
    pub fn whole((height, width): (usize, usize)) -> Self {
        Self { y: 0, x: 0, height, width }
    }
}

/// The factor by which a picture is shrunk in decoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Not shrunk.
    #[default]
    Full = 1,
    /// 1/2 of each side.
    Half = 2,
    /// 1/4 of each side.
    Quarter = 4,
    /// 1/8 of each side.
    Eighth = 8,
}

impl Scale {
    /// Pixels that become one, in each direction.
    pub fn divisor(self) -> usize {
        self as usize
    }

    /// The smallest scale at which `window` still has the pixels of `size` (H, W) in both directions.
    pub fn least(window: Window, size: (usize, usize)) -> Self {
        let covers =
            |s: &Scale| window.height >= size.0 * s.divisor() && window.width >= size.1 * s.divisor();
        [Scale::Eighth, Scale::Quarter, Scale::Half].into_iter().find(covers).unwrap_or_default()
    }

    /// Size (H, W) at this scale of a picture of `of`; a remainder at the edge is one pixel.
    pub fn size(self, of: (usize, usize)) -> (usize, usize) {
        (of.0.div_ceil(self.divisor()), of.1.div_ceil(self.divisor()))
    }

    /// The pixels at this scale that overlap `window`.
    pub fn window(self, window: Window) -> Window {
        let d = self.divisor();
        let (y, x) = (window.y / d, window.x / d);
        let end = self.size((window.y + window.height, window.x + window.width));
        Window { y, x, height: end.0 - y, width: end.1 - x }
    }
}

/// The wanted part of a picture: a window in full pixels, and how small it may be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The part, in pixels at full size.
    pub window: Window,
    /// The smallest scale at which it may be decoded.
    pub scale: Scale,
}

impl Wanted {
    /// The whole of a picture of (H, W), at full size.
    pub fn whole(of: (usize, usize)) -> Self {
        Self { window: Window::whole(of), scale: Scale::Full }
    }
}

/// A window of a picture: rows of `width · 3` bytes, `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    data: &'a [u8],
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
    stride: usize,
}

impl<'a> View<'a> {
    /// A whole picture, `[H, W, 3]` without gaps.
    pub fn new(pixels: &'a [u8], height: usize, width: usize) -> Self {
        assert_eq!(pixels.len(), height * width * 3, "a picture of {height}×{width} has 3 bytes a pixel");
        Self { data: pixels, height, width, stride: width * 3 }
    }

    /// (H, W)
    pub fn size(&self) -> (usize, usize) {
        (self.height, self.width)
    }

    /// One row, `[W, 3]`.
    pub fn row(&self, y: usize) -> &'a [u8] {
        &self.data[y * self.stride..][..self.width * 3]
    }

    /// `count` rows from `first` on as one slice, if there are no gaps between rows.
    pub fn whole_rows(&self, first: usize, count: usize) -> Option<&'a [u8]> {
        let line = self.width * 3;
        (self.stride == line).then(|| &self.data[first * line..(first + count) * line])
    }

    /// The window of `height × width` pixels whose top left corner is `(y, x)`.
    pub fn window(&self, y: usize, x: usize, height: usize, width: usize) -> View<'a> {
        self.shows(Window { y, x, height, width })
    }

    /// The same, given as a [`Window`].
    pub fn shows(&self, Window { y, x, height, width }: Window) -> View<'a> {
        assert!(y + height <= self.height && x + width <= self.width, "the window lies inside the picture");
        Self {
            data: &self.data[(y * self.stride + x * 3).min(self.data.len())..],
            height,
            width,
            stride: self.stride,
        }
    }

    /// Copies the pixels to `out`, `[H, W, 3]` without gaps.
    pub fn copy_to(&self, out: &mut [u8]) {
        assert_eq!(out.len(), self.height * self.width * 3);
        for (y, row) in out.chunks_exact_mut(self.width * 3).enumerate() {
            row.copy_from_slice(self.row(y));
        }
    }
}

/// A part of a view for a resize to read: its borders may lie inside pixels.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// All pixels that overlap the part.
    pub view: View<'a>,
    /// (y, x) of its upper left corner in the view.
    pub corner: (f64, f64),
    /// (H, W)
    pub size: (f64, f64),
}

impl<'a> Part<'a> {
    /// The part of a picture, decoded at `scale`, that corresponds to `window` in full pixels; `view` shows
    /// [`Scale::window`] of it.
    pub fn scaled(view: View<'a>, window: Window, scale: Scale) -> Self {
        // Eighths of 16-bit numbers: exact in f64 and in f32.
        let at = |n: usize| n as f64 / scale.divisor() as f64;
        let within = |n: usize| at(n % scale.divisor());
        Self {
            view,
            corner: (within(window.y), within(window.x)),
            size: (at(window.height), at(window.width)),
        }
    }
}

impl<'a> From<View<'a>> for Part<'a> {
    /// The whole view.
    fn from(view: View<'a>) -> Self {
        Self { view, corner: (0.0, 0.0), size: (view.height as f64, view.width as f64) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_leaves_the_pixels_of_the_output_in_both_directions() {
        let least = |height, width| Scale::least(Window { y: 5, x: 3, height, width }, (30, 20));
        assert_eq!(least(59, 400), Scale::Full);
        assert_eq!(least(60, 40), Scale::Half);
        assert_eq!(least(1000, 79), Scale::Half);
        assert_eq!(least(120, 80), Scale::Quarter);
        assert_eq!(least(240, 160), Scale::Eighth);
        assert_eq!(least(9999, 9999), Scale::Eighth);
    }

    #[test]
    fn a_scaled_part_has_the_borders_of_its_window() {
        let window = Window { y: 13, x: 8, height: 20, width: 15 };
        let touched = Scale::Quarter.window(window);
        assert_eq!(touched, Window { y: 3, x: 2, height: 6, width: 4 });
        let pixels = [0; 6 * 4 * 3];
        let part = Part::scaled(View::new(&pixels, 6, 4), window, Scale::Quarter);
        assert_eq!((part.corner, part.size), ((0.25, 0.0), (5.0, 3.75)));
        assert_eq!(Scale::Full.window(window), window);
    }
}
