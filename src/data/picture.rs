//! Pixels on their way: an owned picture, and a borrowed window of one. Always u8 RGB, row by row.

/// A picture that owns its pixels; workers keep one each and decode into it again and again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    pub height: usize,
    pub width: usize,
    /// `[H, W, 3]`
    pub pixels: Vec<u8>,
}

impl Picture {
    pub fn view(&self) -> View<'_> {
        View::new(&self.pixels, self.height, self.width)
    }
}

/// Which part of a picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub y: usize,
    pub x: usize,
    pub height: usize,
    pub width: usize,
}

impl Window {
    /// All of a picture of (H, W).
    pub fn whole((height, width): (usize, usize)) -> Self {
        Self { y: 0, x: 0, height, width }
    }
}

/// A window of a picture: rows of `width · 3` bytes, `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    data: &'a [u8],
    pub height: usize,
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

    /// The part of `height × width` pixels whose top left corner is `(y, x)`.
    pub fn window(&self, y: usize, x: usize, height: usize, width: usize) -> View<'a> {
        assert!(y + height <= self.height && x + width <= self.width, "the window lies inside the picture");
        Self {
            data: &self.data[(y * self.stride + x * 3).min(self.data.len())..],
            height,
            width,
            stride: self.stride,
        }
    }

    /// The window of `size` in the middle; an odd remainder is at the bottom and right.
    pub fn centre(&self, size: (usize, usize)) -> View<'a> {
        self.window((self.height - size.0) / 2, (self.width - size.1) / 2, size.0, size.1)
    }

    /// The window of `size` in the middle as torchvision places it: half of an odd remainder is rounded to even.
    pub fn centre_rounded(&self, size: (usize, usize)) -> View<'a> {
        let start = |room: usize| (room as f64 / 2.0).round_ties_even() as usize;
        self.window(start(self.height - size.0), start(self.width - size.1), size.0, size.1)
    }

    /// Copies the pixels to `out`, `[H, W, 3]` without gaps.
    pub fn copy_to(&self, out: &mut [u8]) {
        assert_eq!(out.len(), self.height * self.width * 3);
        for (y, row) in out.chunks_exact_mut(self.width * 3).enumerate() {
            row.copy_from_slice(self.row(y));
        }
    }
}
