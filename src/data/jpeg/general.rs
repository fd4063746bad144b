//! Decodes every Huffman-coded 8-bit JPEG, whatever its scans. It collects the coefficients of all scans,
//! then transforms those that a window needs and makes its pixels. Progressive or sequential, components in
//! one scan or in several, any whole ratio of their samplings, grey, YCbCr, RGB, CMYK, YCCK.
//!
//! Pixels equal libjpeg's here as well, hence Pillow's. A component with half of the pixels in a direction is
//! upsampled smoothly; one with a third or a quarter, by copying. Unsupported files are refused by name. If
//! data ends early or is damaged, the following blocks have no colour, up to the next restart marker.
//!
//! Memory is bounded by the picture and by the file: a block takes 128 bytes, and at least one bit of the
//! file.

use crate::error::{Error, Result};
use crate::fail;

use super::huffman::Huffman;
use super::isa::Isa;
use super::rows::{Stretch, colour};
use super::scaled;
use super::scan::{Block, Coding, Grid, Part, read};
use super::{JpegScratch, flat, read_huffman, read_quant, word};
use crate::data::picture::{Scale, Window};

/// Memory that is reused for every picture.
#[derive(Debug, Default)]
pub(super) struct Memory {
    blocks: Vec<Block>,
    /// Samples of each component, as far as the window needs them.
    planes: [Vec<u8>; 4],
    /// A row of pixels of each component, and of each colour.
    lines: [Vec<u8>; 4],
    rgb: [Vec<u8>; 3],
    sums: Vec<u16>,
}

impl Memory {
    pub(super) fn bytes(&self) -> usize {
        self.blocks.capacity() * size_of::<Block>() + self.planes.iter().map(Vec::capacity).sum::<usize>()
    }
}

/// A picture whose coefficients are in a [`JpegScratch`].
#[derive(Debug)]
pub struct Collected {
    /// (H, W)
    size: (usize, usize),
    /// Largest sampling factors, down and across.
    most: (usize, usize),
    is_progressive: bool,
    components: Vec<Component>,
    colours: Colours,
}

#[derive(Debug)]
struct Component {
    id: u8,
    grid: Grid,
    table: usize,
    /// Quantisation factors of the coefficients in zigzag order: those in `table` at the component's first
    /// scan.
    quant: Option<[i16; 64]>,
    /// The lowest bit of each coefficient that has been read.
    lowest: [Option<u8>; 64],
}

/// What the components mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Colours {
    Grey,
    Ycc,
    Rgb,
    /// Inverted, as Adobe stores it and all others do, too.
    Cmyk,
    Ycck,
}

/// Reads all scans.
pub(super) fn collect(bytes: &[u8], size: (usize, usize), scratch: &mut JpegScratch) -> Result<Collected> {
    let JpegScratch { dc, ac, general: Memory { blocks, .. }, .. } = scratch;
    dc.iter_mut().chain(&mut *ac).for_each(Huffman::clear);
    let mut tables = [[0i16; 64]; 4];
    let mut picture: Option<Collected> = None;
    let (mut restart, mut jfif, mut adobe) = (0, false, None);
    let mut at = 2;
    while let Some((marker, body, end)) = next_segment(bytes, at) {
        at = end;
        match marker {
            0xC0..=0xC2 if picture.is_none() => {
                picture = Some(Collected::read(body, marker == 0xC2, bytes.len(), blocks)?);
            }
            0xC0..=0xC2 => fail!("damaged JPEG: two frame headers"),
            0xC4 => {
                read_huffman(body, dc, ac).ok_or_else(|| damaged("a Huffman table is not a valid code"))?
            }
            0xDB => {
                read_quant(body, &mut tables).ok_or_else(|| damaged("a quantisation table is truncated"))?
            }
            0xDD => restart = word(body).ok_or_else(|| damaged("a restart interval is truncated"))?.into(),
            0xDA => {
                let Some(picture) = &mut picture else { fail!("damaged JPEG: a scan without a frame") };
                let (places, coding) = picture.scan(body, &tables)?;
                let parts = places.iter().map(|(component, codes)| {
                    let part = Part {
                        grid: picture.components[*component].grid,
                        dc: &dc[usize::from(codes >> 4)],
                        ac: &ac[usize::from(codes & 15)],
                    };
                    let (needs_dc, needs_ac) = match coding {
                        Coding::Sequential => (true, true),
                        Coding::Progressive { from: 0, is_first, .. } => (is_first, false),
                        Coding::Progressive { .. } => (false, true),
                    };
                    if (needs_dc && !part.dc.is_defined()) || (needs_ac && !part.ac.is_defined()) {
                        fail!("damaged JPEG: a scan without its Huffman table");
                    }
                    Ok(part)
                });
                let parts = parts.collect::<Result<Vec<_>>>()?;
                at += read(&bytes[at..], coding, &parts, picture.mcus(), restart, blocks);
                if !picture.is_progressive && picture.missing().is_none() {
                    break;
                }
            }
            0xE0 => jfif |= body.starts_with(b"JFIF\0"),
            0xEE if body.starts_with(b"Adobe") => adobe = body.get(11).copied(),
            0xCC | 0xDE | 0xDF | 0xC3 | 0xC5..=0xCB | 0xCD..=0xCF => {
                fail!("lossless, hierarchical and arithmetic JPEG are not supported")
            }
            _ => {}
        }
    }
    let Some(mut picture) = picture else { fail!("the JPEG ends in its header, after {at} bytes") };
    if let Some(missing) = picture.missing() {
        let count = picture.components.len();
        fail!("the JPEG ends before component {} of {count}", missing + 1);
    }
    if picture.size != size {
        fail!("damaged JPEG: two sizes");
    }
    picture.colours = picture.colours(jfif, adobe);
    Ok(picture)
}

fn damaged(what: &str) -> Error {
    Error::new(format!("damaged JPEG: {what}"))
}

/// The next marker that has a body, its body, and where the body ends. `None` at the end of the picture or of
/// the data.
fn next_segment(bytes: &[u8], mut at: usize) -> Option<(u8, &[u8], usize)> {
    loop {
        // Fill bytes, and leftovers of a damaged scan.
        while bytes.get(at)? != &0xFF || matches!(bytes.get(at + 1)?, 0 | 0xFF) {
            at += 1;
        }
        match bytes[at + 1] {
            0xD9 => return None,
            0x01 | 0xD0..=0xD8 => at += 2,
            marker => {
                let length = usize::from(word(&bytes[at + 2..])?);
                let end = at + 2 + length.max(2);
                return Some((marker, bytes.get(at + 4..end)?, end));
            }
        }
    }
}

impl Collected {
    /// From a frame header; `file` bytes hold the whole picture. `blocks` become zeros.
    fn read(body: &[u8], is_progressive: bool, file: usize, blocks: &mut Vec<Block>) -> Result<Self> {
        let &[_, h1, h0, w1, w0, count, ref specs @ ..] = body else { fail!("damaged JPEG: a short frame") };
        let size = (usize::from(h1) << 8 | usize::from(h0), usize::from(w1) << 8 | usize::from(w0));
        let count = usize::from(count);
        if !matches!(count, 1 | 3 | 4) {
            fail!("JPEG with {count} components is not supported");
        }
        if specs.len() < count * 3 || size.0 == 0 || size.1 == 0 {
            fail!("damaged JPEG: a frame of {}x{} pixels with {} bytes", size.1, size.0, body.len());
        }
        let factors = |spec: &[u8]| match count {
            // A single component is not interleaved, so its factors have no effect.
            1 => (1, 1),
            _ => (usize::from(spec[1] & 15), usize::from(spec[1] >> 4)),
        };
        let specs = || specs.chunks_exact(3).take(count);
        let most = (
            specs().map(|s| factors(s).0).max().unwrap_or_default(),
            specs().map(|s| factors(s).1).max().unwrap_or_default(),
        );
        let mut picture = Self { size, most, is_progressive, components: vec![], colours: Colours::Grey };
        let mcus = (most.0 <= 4 && most.1 <= 4).then(|| picture.mcus());
        let mut start = 0;
        for spec in specs() {
            let (down, across) = factors(spec);
            let Some(mcus) = mcus.filter(|_| down > 0 && across > 0 && spec[2] <= 3) else {
                fail!("damaged JPEG: sampling {across}x{down}, table {}", spec[2]);
            };
            if most.0 % down != 0 || most.1 % across != 0 {
                fail!(
                    "JPEG with fractional sampling ({across}x{down} beside {}x{}) is not supported",
                    most.1,
                    most.0
                );
            }
            if picture.components.iter().any(|c| c.id == spec[0]) {
                fail!("two of the JPEG's components have the number {}", spec[0]);
            }
            let samples = ((size.0 * down).div_ceil(most.0), (size.1 * across).div_ceil(most.1));
            picture.components.push(Component {
                id: spec[0],
                grid: Grid {
                    mcu: (down, across),
                    used: (samples.0.div_ceil(8), samples.1.div_ceil(8)),
                    stride: mcus.1 * across,
                    start,
                },
                table: spec[2].into(),
                quant: None,
                lowest: [None; 64],
            });
            start += mcus.0 * down * mcus.1 * across;
        }
        if start > file.saturating_mul(8) {
            fail!("{file} bytes cannot hold {}x{} pixels", size.1, size.0);
        }
        blocks.clear();
        if blocks.try_reserve_exact(start).is_err() {
            fail!("no memory for the coefficients of {}x{} pixels", size.1, size.0);
        }
        blocks.resize(start, [0; 64]);
        Ok(picture)
    }

    /// MCUs of a scan with several components, down and across.
    fn mcus(&self) -> (usize, usize) {
        (self.size.0.div_ceil(8 * self.most.0), self.size.1.div_ceil(8 * self.most.1))
    }

    /// The first component for which no data has been read.
    fn missing(&self) -> Option<usize> {
        self.components.iter().position(|c| c.lowest[0].is_none())
    }

    /// The components of a scan, each with the numbers of its tables, and the scan's parameters.
    fn scan(&mut self, body: &[u8], tables: &[[i16; 64]; 4]) -> Result<(Vec<(usize, u8)>, Coding)> {
        let short = || damaged("a short scan header");
        let count = usize::from(*body.first().ok_or_else(short)?);
        let (specs, rest) = body[1..].split_at_checked(count * 2).ok_or_else(short)?;
        let &[from, to, bits, ..] = rest else { return Err(short()) };
        let mut places: Vec<(usize, u8)> = vec![];
        for spec in specs.chunks_exact(2) {
            let place = self.components.iter().position(|c| c.id == spec[0]);
            let place = place.filter(|p| places.iter().all(|(other, _)| other != p));
            match place {
                Some(place) if spec[1] & 0xCC == 0 => places.push((place, spec[1])),
                _ => fail!("damaged JPEG: a scan of component {} with codes {:#04x}", spec[0], spec[1]),
            }
        }
        let blocks: usize = places.iter().map(|(c, _)| self.components[*c].grid.mcu).map(|m| m.0 * m.1).sum();
        if count == 0 || (count > 1 && blocks > 10) {
            fail!("JPEG with {blocks} blocks in an MCU is not supported");
        }
        let (high, low) = (bits >> 4, bits & 15);
        let coding = match self.is_progressive {
            // Some writers leave the range at zero.
            false => Coding::Sequential,
            true => {
                Coding::Progressive { from: from.into(), to: to.into(), low: low.into(), is_first: high == 0 }
            }
        };
        let (from, to) = if self.is_progressive { (from, to) } else { (0, 63) };
        let low = if self.is_progressive { low } else { 0 };
        let fits = to < 64 && from <= to && low <= 13 && (high == 0 || high == low + 1);
        let is_apart = (from > 0 && count == 1) || to == 0;
        if self.is_progressive && !(fits && is_apart) {
            fail!("damaged JPEG: a scan of coefficients {from} to {to} of {count} components");
        }
        for (place, _) in &places {
            let component = &mut self.components[*place];
            component.quant.get_or_insert(tables[component.table]);
            // Each bit may come once, which also bounds the work.
            let before = if high == 0 || !self.is_progressive { None } else { Some(high) };
            for lowest in &mut component.lowest[usize::from(from)..=usize::from(to)] {
                if *lowest != before {
                    fail!("damaged JPEG: two scans have the same of component {}", place + 1);
                }
                *lowest = Some(low);
            }
        }
        Ok((places, coding))
    }

    /// The colour space, by libjpeg's rules.
    fn colours(&self, jfif: bool, adobe: Option<u8>) -> Colours {
        let ids: Vec<u8> = self.components.iter().map(|c| c.id).collect();
        match (ids.len(), adobe) {
            (1, _) => Colours::Grey,
            (3, Some(0)) if !jfif => Colours::Rgb,
            (3, None) if !jfif && ids == b"RGB" => Colours::Rgb,
            (3, _) => Colours::Ycc,
            (_, None | Some(0)) => Colours::Cmyk,
            _ => Colours::Ycck,
        }
    }
}

/// How a component becomes pixels at a scale.
struct Plane {
    /// Side of a block in samples.
    side: usize,
    stretch: Stretch,
    /// Samples that belong to the picture, down and across.
    samples: (usize, usize),
    /// The first blocks that the window needs, and how many, down and across.
    first: (usize, usize),
    blocks: (usize, usize),
}

impl Plane {
    fn new(picture: &Collected, component: &Component, scale: Scale, window: Window) -> Self {
        let least = 8 / scale.divisor();
        let (down, across) = (picture.most.0 / component.grid.mcu.0, picture.most.1 / component.grid.mcu.1);
        // A block may keep more samples than the scale asks for, and then needs less upsampling.
        let mut side = least;
        while side < 8 && (down * least).is_multiple_of(side * 2) && (across * least).is_multiple_of(side * 2)
        {
            side *= 2;
        }
        let (down, across) = (down * least / side, across * least / side);
        let size = scale.size(picture.size);
        let samples = (size.0.div_ceil(down), size.1.div_ceil(across));
        let is_halved = matches!((down, across), (2, 1) | (1, 2) | (2, 2));
        let is_narrow = across == 2 && samples.1 <= 2;
        let is_smooth = is_halved && least > 1 && !is_narrow;
        // Smooth upsampling reads one sample beyond the window.
        let margin = usize::from(is_smooth);
        let range = |start: usize, count: usize, ratio: usize, of: usize| {
            let first = (start / ratio).saturating_sub(margin) / side;
            let end = ((start + count).div_ceil(ratio) + margin).min(of).div_ceil(side);
            (first, end - first)
        };
        let rows = range(window.y, window.height, down, samples.0);
        let columns = range(window.x, window.width, across, samples.1);
        Self {
            side,
            stretch: Stretch { down, across, is_smooth },
            samples,
            first: (rows.0, columns.0),
            blocks: (rows.1, columns.1),
        }
    }

    /// Samples of a row of the plane.
    fn stride(&self) -> usize {
        self.blocks.1 * self.side
    }

    #[inline(always)]
    fn transform<I: Isa>(&self, isa: I, component: &Component, blocks: &[Block], to: &mut Vec<u8>) {
        let quant = component.quant.unwrap_or([0; 64]);
        let stride = self.stride();
        to.resize(self.blocks.0 * self.side * stride, 0);
        for row in 0..self.blocks.0 {
            for column in 0..self.blocks.1 {
                let Grid { start, stride: across, .. } = component.grid;
                let block = &blocks[start + (self.first.0 + row) * across + self.first.1 + column];
                let to = &mut to[row * self.side * stride + column * self.side..];
                let mean = block[0].wrapping_mul(quant[0]);
                if self.side == 1 {
                    flat::<1>(mean, to, stride);
                    continue;
                }
                let mut coefficients = *block;
                for (k, place) in super::huffman::ZIGZAG.iter().enumerate() {
                    let coefficient = &mut coefficients[usize::from(*place)];
                    *coefficient = coefficient.wrapping_mul(quant[k]);
                }
                match self.side {
                    8 => isa.idct(&coefficients, to, stride),
                    4 => isa.idct4(&coefficients, to, stride),
                    _ => scaled::idct2(&coefficients, to, stride),
                }
            }
        }
    }

    /// Row `y` of the picture.
    #[inline(always)]
    fn row(&self, y: usize, plane: &[u8], sums: &mut Vec<u16>, line: &mut Vec<u8>) {
        let stride = self.stride();
        let row = |row: usize| &plane[(row - self.first.0 * self.side) * stride..][..stride];
        let own = y / self.stretch.down;
        let other = match (self.stretch.is_smooth, self.stretch.down, y % 2) {
            (true, 2, 0) => own.saturating_sub(1),
            (true, 2, _) => (own + 1).min(self.samples.0 - 1),
            _ => own,
        };
        let end = (self.samples.1 - self.first.1 * self.side).min(stride);
        sums.resize(stride + 2, 0);
        line.resize(stride * self.stretch.across, 0);
        self.stretch.row(row(own), row(other), y % self.stretch.down, end, sums, line);
    }
}

impl Collected {
    /// Makes the pixels of a window of the picture at `scale`, `[window.height, window.width, 3]`.
    #[inline(always)]
    pub(super) fn paint<I: Isa>(
        &self,
        isa: I,
        scale: Scale,
        window: Window,
        memory: &mut Memory,
        out: &mut [u8],
    ) {
        let Memory { blocks, planes, lines, rgb, sums } = memory;
        let layout: Vec<Plane> =
            self.components.iter().map(|component| Plane::new(self, component, scale, window)).collect();
        for ((plane, component), samples) in layout.iter().zip(&self.components).zip(&mut *planes) {
            plane.transform(isa, component, blocks, samples);
        }
        rgb.iter_mut().for_each(|line| line.resize(window.width, 0));
        for (y, out) in (window.y..).zip(out.chunks_exact_mut(window.width * 3)) {
            for ((plane, samples), line) in layout.iter().zip(&*planes).zip(&mut *lines) {
                plane.row(y, samples, sums, line);
            }
            let line = |c: usize| {
                let plane = &layout[c];
                &lines[c][window.x - plane.first.1 * plane.side * plane.stretch.across..][..window.width]
            };
            match self.colours {
                Colours::Grey => isa.interleave(line(0), line(0), line(0), out),
                Colours::Rgb => isa.interleave(line(0), line(1), line(2), out),
                Colours::Ycc => {
                    colour(line(0), line(1), line(2), rgb);
                    isa.interleave(&rgb[0], &rgb[1], &rgb[2], out);
                }
                Colours::Cmyk => {
                    for (ink, c) in rgb.iter_mut().zip(0..) {
                        ink.iter_mut().zip(line(c)).for_each(|(ink, stored)| *ink = 255 - stored);
                    }
                    under_black(rgb, line(3), out);
                }
                Colours::Ycck => {
                    // Inks are stored as the light that they leave, and inverted once more.
                    colour(line(0), line(1), line(2), rgb);
                    under_black(rgb, line(3), out);
                }
            }
        }
    }
}

/// The rest of `light`, including black, after `inks` take their share: Pillow's conversion.
fn under_black(inks: &[Vec<u8>; 3], light: &[u8], out: &mut [u8]) {
    for (x, pixel) in out.chunks_exact_mut(3).enumerate() {
        let light = u32::from(light[x]);
        for (value, ink) in pixel.iter_mut().zip(inks) {
            let product = u32::from(ink[x]) * light + 128;
            *value = light.saturating_sub((product + (product >> 8)) >> 8) as u8;
        }
    }
}
