//! The sample being augmented, and the operations that all dialects share: tables, histograms, fills.

/// Pixels `[H, W, 3]`, and a second buffer for operations that cannot work in place.
#[derive(Debug, Default)]
pub struct Canvas {
    pub height: usize,
    pub width: usize,
    pub pixels: Vec<u8>,
    pub spare: Vec<u8>,
}

impl Canvas {
    /// Sets the size (H, W); the caller then writes the pixels.
    pub fn reset(&mut self, (height, width): (usize, usize)) {
        (self.height, self.width) = (height, width);
        self.pixels.resize(height * width * 3, 0);
        self.spare.resize(height * width * 3, 0);
    }

    /// Makes the contents of `spare` the picture.
    #[inline(always)]
    pub fn swap(&mut self) {
        std::mem::swap(&mut self.pixels, &mut self.spare);
    }

    /// Applies one table to all channels.
    #[inline(always)]
    pub fn map(&mut self, table: &[u8; 256]) {
        self.pixels.iter_mut().for_each(|p| *p = table[usize::from(*p)]);
    }

    /// Applies a table per channel.
    #[inline(always)]
    pub fn map_channels(&mut self, tables: &[[u8; 256]; 3]) {
        for pixel in self.pixels.chunks_exact_mut(3) {
            pixel[0] = tables[0][usize::from(pixel[0])];
            pixel[1] = tables[1][usize::from(pixel[1])];
            pixel[2] = tables[2][usize::from(pixel[2])];
        }
    }

    /// Minimum and maximum of each channel.
    #[inline(always)]
    pub fn ranges(&self) -> [(u8, u8); 3] {
        // 48 values are 16 pixels, so each lane keeps one channel.
        let (mut low, mut high) = ([255u8; 48], [0u8; 48]);
        let chunks = self.pixels.chunks_exact(48);
        for (i, value) in chunks.remainder().iter().enumerate() {
            (low[i], high[i]) = (*value, *value);
        }
        for chunk in chunks {
            for i in 0..48 {
                low[i] = low[i].min(chunk[i]);
                high[i] = high[i].max(chunk[i]);
            }
        }
        std::array::from_fn(|c| {
            let lanes = || (c..48).step_by(3);
            (lanes().map(|i| low[i]).min().unwrap_or(0), lanes().map(|i| high[i]).max().unwrap_or(0))
        })
    }

    #[inline(always)]
    pub fn histograms(&self) -> [[u32; 256]; 3] {
        let mut counts = [[0u32; 256]; 3];
        for pixel in self.pixels.chunks_exact(3) {
            counts[0][usize::from(pixel[0])] += 1;
            counts[1][usize::from(pixel[1])] += 1;
            counts[2][usize::from(pixel[2])] += 1;
        }
        counts
    }

    /// Pillow's `equalize`; TensorFlow's version gives the same.
    #[inline(always)]
    pub fn equalize(&mut self) {
        let histograms = self.histograms();
        let mut tables = [IDENTITY; 3];
        for (table, counts) in tables.iter_mut().zip(&histograms) {
            even_out(counts, table);
        }
        self.map_channels(&tables);
    }

    #[inline(always)]
    pub fn invert(&mut self) {
        self.pixels.iter_mut().for_each(|p| *p = 255 - *p);
    }

    /// Inverts values of at least `threshold`.
    #[inline(always)]
    pub fn solarize(&mut self, threshold: u8) {
        self.pixels.iter_mut().for_each(|p| *p = if *p < threshold { *p } else { 255 - *p });
    }

    /// Adds to values below 128, up to 255.
    #[inline(always)]
    pub fn solarize_add(&mut self, add: u8) {
        self.pixels.iter_mut().for_each(|p| *p = if *p < 128 { p.saturating_add(add) } else { *p });
    }

    /// Keeps the top `bits`, at most 8.
    #[inline(always)]
    pub fn posterize(&mut self, bits: u32) {
        let mask = ((0xFF00u32 >> bits) & 0xFF) as u8;
        self.pixels.iter_mut().for_each(|p| *p &= mask);
    }

    /// Fills the part of the rectangle that lies within the picture.
    pub fn fill(&mut self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, value: u8) {
        let columns = columns.start.min(self.width)..columns.end.min(self.width);
        for y in rows.start.min(self.height)..rows.end.min(self.height) {
            let row = &mut self.pixels[y * self.width * 3..][..self.width * 3];
            row[columns.start * 3..columns.end.max(columns.start) * 3].fill(value);
        }
    }
}

/// The table that spreads a channel's values evenly. Leaves `table` unchanged if there is nothing to spread.
#[inline(always)]
fn even_out(counts: &[u32; 256], table: &mut [u8; 256]) {
    let (mut pixels, mut last) = (0, 0);
    for count in counts {
        pixels += count;
        last = if *count > 0 { *count } else { last };
    }
    let step = (pixels - last) / 255;
    if step == 0 {
        return;
    }
    let mut before = [0f64; 256];
    let mut total = step / 2;
    for (to, count) in before.iter_mut().zip(counts) {
        *to = f64::from(total);
        total += count;
    }
    // Exact: a non-integer quotient of numbers below 2^32 is further from the next integer than f64 rounds.
    for (to, total) in table.iter_mut().zip(&before) {
        *to = cut((total / f64::from(step)).floor() as f32);
    }
}

pub const IDENTITY: [u8; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        table[i] = i as u8;
        i += 1;
    }
    table
};

/// `a + factor·(b - a)` in f32, clamped to [0, 255] and truncated, as in both PIL and TensorFlow's models (a
/// factor inside [0, 1] needs no clamping).
#[inline(always)]
pub fn blend(a: f32, b: f32, factor: f32) -> u8 {
    cut(a + factor * (b - a))
}

/// `x as u8`, in a form that compilers vectorise; they compile the cast lane by lane.
#[inline(always)]
pub fn cut(x: f32) -> u8 {
    integer(x.clamp(0.0, 255.0).floor()) as u8
}

/// An integer in [0, 2^23): the bits above 2^23 of a float that is too large for fractions.
#[inline(always)]
pub fn integer(x: f32) -> u32 {
    const ROOM: f32 = 8_388_608.0;
    (x + ROOM).to_bits().wrapping_sub(ROOM.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_is_what_the_language_does() {
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-40, -1e9, 1e9];
        let steps = (-3000..30_000).map(|i| i as f32 / 100.0);
        let edges = (0..=256).flat_map(|i| {
            let x = i as f32;
            [x, x.next_down(), x.next_up()]
        });
        for x in steps.chain(edges).chain(odd) {
            assert_eq!(cut(x), x as u8, "{x}");
        }
        assert_eq!([0.0, 1.0, 8_388_607.0].map(integer), [0, 1, 8_388_607]);
    }

    #[test]
    fn ranges_see_every_pixel() {
        let mut canvas = Canvas::default();
        canvas.reset((5, 7));
        for at in 0..35 {
            canvas.pixels.fill(100);
            canvas.pixels[at * 3..at * 3 + 3].copy_from_slice(&[7, 200, 101]);
            assert_eq!(canvas.ranges(), [(7, 100), (100, 200), (100, 101)], "pixel {at}");
        }
    }

    #[test]
    fn posterize_keeps_the_top_bits() {
        let mut canvas = Canvas::default();
        canvas.reset((1, 1));
        for (bits, expected) in [(0, 0), (1, 128), (4, 0xF0), (8, 0xFF)] {
            canvas.pixels.fill(0xFF);
            canvas.posterize(bits);
            assert_eq!(canvas.pixels[0], expected, "{bits} bits");
        }
    }
}
