//! A JPEG decoder. Its pixels are bit-identical to libjpeg's (accurate transform, "fancy" upsampling), hence
//! to Pillow's and OpenCV's. It can decode a window of the picture, and at a half, a quarter or an eighth of
//! the size.
//!
//! Photo collections consist of baseline pictures, grey or YCbCr with full or halved chroma, in one scan.
//! These are decoded while they are read. Work that the window does not need is skipped: rows below it
//! entirely, and transforms and colours of everything beside it. Everything else (progressive, several scans,
//! other samplings, CMYK, RGB, damage) goes to [`general`], which collects all coefficients first. Files that
//! neither supports (arithmetic, lossless, 12 bits) are refused by name.
//!
//! [`parse`] reads the segments of the common kind (ITU-T T.81, annex B), [`huffman`] reads bits and codes,
//! [`isa`] transforms, [`rows`] makes pixels, [`scaled`] has what is different in a smaller picture, and
//! [`scan`] reads any scan.

mod block;
mod general;
mod huffman;
mod isa;
mod rows;
mod scaled;
mod scan;
#[cfg(test)]
mod written;

use super::picture::{Scale, Window};
use crate::error::Result;
use huffman::{Bits, Huffman};
use isa::{Isa, Portable};
use rows::Output;
use scaled::Layout;

pub use general::Collected;

/// Memory that a worker reuses for every picture.
#[derive(Debug, Default)]
pub struct JpegScratch {
    dc: [Huffman; 4],
    ac: [Huffman; 4],
    /// Samples of each component: the last row of the previous row of blocks, then a row of blocks.
    planes: [Vec<u8>; 3],
    /// Lines of one component on their way to pixels.
    lines: rows::Lines,
    general: general::Memory,
    counts: Counts,
}

/// The work for the last picture, for `vitrum bench`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks of 8×8 samples whose codes were read.
    pub read: usize,
    /// Blocks that were transformed.
    pub transformed: usize,
    /// Blocks that were transformed to fewer than 8×8 samples.
    pub reduced: usize,
}

/// A picture of the common kind.
#[derive(Clone, Debug)]
pub struct Frame<'a> {
    pub height: usize,
    pub width: usize,
    components: [Component; 3],
    /// 1 or 3
    count: usize,
    /// Quantisation factors of each component, in zigzag order.
    quant: [[i16; 64]; 3],
    /// MCUs between restart markers; 0: none.
    restart: usize,
    scan: &'a [u8],
}

#[derive(Clone, Copy, Debug, Default)]
struct Component {
    id: u8,
    /// Blocks of an MCU, across and down.
    across: usize,
    down: usize,
    quant: usize,
    dc: usize,
    ac: usize,
}

/// Reads the segments up to the scan. `None` if the picture is not of the common kind.
pub fn parse<'a>(bytes: &'a [u8], scratch: &mut JpegScratch) -> Option<Frame<'a>> {
    scratch.dc.iter_mut().chain(&mut scratch.ac).for_each(Huffman::clear);
    let mut tables = [[0i16; 64]; 4];
    let mut frame = None;
    let (mut restart, mut jfif, mut adobe) = (0, false, None);
    let mut at = 2;
    loop {
        while bytes.get(at..at + 2)? == [0xFF, 0xFF] {
            at += 1;
        }
        let &[0xFF, marker] = bytes.get(at..at + 2)? else { return None };
        let length = usize::from(word(bytes.get(at + 2..)?)?);
        let body = bytes.get(at + 4..at + 2 + length)?;
        at += 2 + length;
        match marker {
            0xC0 | 0xC1 if frame.is_none() => frame = Some(read_frame(body)?),
            0xC4 => read_huffman(body, &mut scratch.dc, &mut scratch.ac)?,
            0xDB => read_quant(body, &mut tables)?,
            0xDD => restart = usize::from(word(body)?),
            0xDA => {
                let mut frame: Frame = frame?;
                read_scan(body, &mut frame)?;
                let coded = frame.components[..frame.count].iter();
                let defined = |c: &Component| scratch.dc[c.dc].is_defined() && scratch.ac[c.ac].is_defined();
                if !coded.clone().all(defined) {
                    return None;
                }
                for (quant, component) in frame.quant.iter_mut().zip(coded) {
                    *quant = tables[component.quant];
                    if quant[0] == 0 {
                        return None;
                    }
                }
                // Three channels are YCbCr unless a segment says otherwise.
                let ids = [0, 1, 2].map(|i| frame.components[i].id);
                let is_rgb = !jfif && (adobe == Some(0) || (adobe.is_none() && &ids == b"RGB"));
                if frame.count == 3 && is_rgb {
                    return None;
                }
                let scan = bytes.get(at..)?;
                // Every block takes at least two bits. A shorter file is truncated, and gets no memory.
                let (mcu, across, down) = (frame.mcu(), frame.mcus_across(), frame.mcus_down());
                let blocks: usize = frame.components[..frame.count].iter().map(|c| c.across * c.down).sum();
                if scan.len() * 4 < across * down * blocks || mcu.0 * mcu.1 == 0 {
                    return None;
                }
                return Some(Frame { restart, scan, ..frame });
            }
            0xE0 => jfif |= body.starts_with(b"JFIF\0"),
            0xEE if body.starts_with(b"Adobe") => adobe = body.get(11).copied(),
            0xE1..=0xEF | 0xFE => {}
            _ => return None,
        }
    }
}

/// Whether the file is of the kind that is decoded here and seems complete: its segments are valid, and its
/// scan reaches the end-of-image marker with the right restart markers. The codes are not read.
pub fn seems_whole(bytes: &[u8], scratch: &mut JpegScratch) -> bool {
    let Some(frame) = parse(bytes, scratch) else { return false };
    let mcus = frame.mcus_across() * frame.mcus_down();
    let expected = (mcus - 1).checked_div(frame.restart).unwrap_or(0);
    let (mut rest, mut restarts) = (frame.scan, 0);
    while let Some(at) = rest.iter().position(|byte| *byte == 0xFF) {
        match rest.get(at + 1) {
            Some(0) => rest = &rest[at + 2..],
            Some(0xFF) => rest = &rest[at + 1..],
            Some(0xD9) => return restarts == expected,
            Some(marker) if restarts < expected && usize::from(*marker) == 0xD0 + restarts % 8 => {
                restarts += 1;
                rest = &rest[at + 2..];
            }
            _ => return false,
        }
    }
    false
}

fn word(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?))
}

fn read_frame(body: &[u8]) -> Option<Frame<'static>> {
    let &[8, h1, h0, w1, w0, count, ref components @ ..] = body else { return None };
    let (height, width) = (u16::from_be_bytes([h1, h0]), u16::from_be_bytes([w1, w0]));
    let count = usize::from(count);
    if !matches!(count, 1 | 3) || components.len() != count * 3 || height == 0 || width == 0 {
        return None;
    }
    let mut frame = Frame {
        height: height.into(),
        width: width.into(),
        components: Default::default(),
        count,
        quant: [[0; 64]; 3],
        restart: 0,
        scan: &[],
    };
    for (component, spec) in frame.components.iter_mut().zip(components.chunks_exact(3)) {
        let (across, down) = (usize::from(spec[1] >> 4), usize::from(spec[1] & 15));
        *component = Component { id: spec[0], across, down, quant: usize::from(spec[2]), dc: 0, ac: 0 };
        if component.quant > 3 {
            return None;
        }
    }
    let ids = frame.components.map(|c| c.id);
    if count == 3 && (ids[0] == ids[1] || ids[0] == ids[2] || ids[1] == ids[2]) {
        return None;
    }
    if count == 1 {
        // A scan of one component is not interleaved: its blocks come one by one.
        (frame.components[0].across, frame.components[0].down) = (1, 1);
        return Some(frame);
    }
    let [luma, cb, cr] = frame.components.map(|c| (c.across, c.down));
    let halved = matches!(luma, (1, 1) | (2, 1) | (1, 2) | (2, 2)) && cb == (1, 1) && cr == (1, 1);
    halved.then_some(frame)
}

fn read_quant(mut body: &[u8], tables: &mut [[i16; 64]; 4]) -> Option<()> {
    while let [head, rest @ ..] = body {
        let table = tables.get_mut(usize::from(head & 15))?;
        let is_wide = head >> 4 != 0;
        let (factors, after) = rest.split_at_checked(if is_wide { 128 } else { 64 })?;
        if is_wide {
            // Products are taken modulo 2^16.
            table
                .iter_mut()
                .zip(factors.chunks_exact(2))
                .for_each(|(to, f)| *to = i16::from_be_bytes([f[0], f[1]]));
        } else {
            table.iter_mut().zip(factors).for_each(|(factor, byte)| *factor = i16::from(*byte));
        }
        body = after;
    }
    Some(())
}

fn read_huffman(mut body: &[u8], dc: &mut [Huffman; 4], ac: &mut [Huffman; 4]) -> Option<()> {
    while let [head, rest @ ..] = body {
        let counts: &[u8; 16] = rest.get(..16)?.try_into().ok()?;
        let total: usize = counts.iter().map(|n| usize::from(*n)).sum();
        let symbols = rest.get(16..16 + total).filter(|s| s.len() <= 256)?;
        let index = usize::from(head & 15);
        match head >> 4 {
            0 => dc.get_mut(index)?.define(counts, symbols, true)?,
            1 => ac.get_mut(index)?.define(counts, symbols, false)?,
            _ => return None,
        }
        body = &rest[16 + total..];
    }
    Some(())
}

/// The single scan, of all components in the frame's order.
fn read_scan(body: &[u8], frame: &mut Frame) -> Option<()> {
    let [count, rest @ ..] = body else { return None };
    let count = usize::from(*count);
    if count != frame.count || rest.len() != count * 2 + 3 || rest[count * 2..count * 2 + 2] != [0, 63] {
        return None;
    }
    for (component, spec) in frame.components.iter_mut().zip(rest[..count * 2].chunks_exact(2)) {
        (component.dc, component.ac) = (usize::from(spec[1] >> 4), usize::from(spec[1] & 15));
        if component.id != spec[0] || component.dc > 3 || component.ac > 3 {
            return None;
        }
    }
    Some(())
}

impl Frame<'_> {
    /// (height, width) of an MCU in pixels.
    fn mcu(&self) -> (usize, usize) {
        (self.components[0].down * 8, self.components[0].across * 8)
    }

    fn mcus_across(&self) -> usize {
        self.width.div_ceil(self.mcu().1)
    }

    fn mcus_down(&self) -> usize {
        self.height.div_ceil(self.mcu().0)
    }

    /// Decodes `window`, which lies inside the picture at `scale`, to `out`, `[window.height, window.width,
    /// 3]`. `None` if the scan is damaged or ends too early; the contents of `out` are then unspecified.
    pub fn decode(
        &self,
        scale: Scale,
        window: Window,
        scratch: &mut JpegScratch,
        out: &mut [u8],
    ) -> Option<()> {
        assert_eq!(out.len(), window.height * window.width * 3);
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = isa::Avx2::detect() {
            // SAFETY: `avx2` is the proof that the processor has the features that the function is compiled
            // for.
            return unsafe { decode_avx2(avx2, self, scale, window, scratch, out) };
        }
        decode(Portable, self, scale, window, scratch, out)
    }
}

/// Reads all scans of a picture of any kind, with `size` (H, W). The error says what is damaged or not
/// supported.
pub fn collect(bytes: &[u8], size: (usize, usize), scratch: &mut JpegScratch) -> Result<Collected> {
    scratch.forget_counts();
    general::collect(bytes, size, scratch)
}

impl Collected {
    /// Writes the pixels of `window`, which lies inside the picture at `scale`, to `out`, `[window.height,
    /// window.width, 3]`.
    pub fn decode(&self, scale: Scale, window: Window, scratch: &mut JpegScratch, out: &mut [u8]) {
        assert_eq!(out.len(), window.height * window.width * 3);
        let memory = &mut scratch.general;
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = isa::Avx2::detect() {
            // SAFETY: `avx2` is the proof that the processor has the features that the function is compiled
            // for.
            return unsafe { paint_avx2(avx2, self, scale, window, memory, out) };
        }
        self.paint(Portable, scale, window, memory, out);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
fn paint_avx2(
    isa: isa::Avx2,
    picture: &Collected,
    scale: Scale,
    window: Window,
    memory: &mut general::Memory,
    out: &mut [u8],
) {
    picture.paint(isa, scale, window, memory, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
fn decode_avx2(
    isa: isa::Avx2,
    frame: &Frame,
    scale: Scale,
    window: Window,
    scratch: &mut JpegScratch,
    out: &mut [u8],
) -> Option<()> {
    decode(isa, frame, scale, window, scratch, out)
}

#[inline(always)]
fn decode<I: Isa>(
    isa: I,
    frame: &Frame,
    scale: Scale,
    window: Window,
    scratch: &mut JpegScratch,
    out: &mut [u8],
) -> Option<()> {
    let layout = Layout::new(frame, scale);
    let mcu = layout.mcu;
    // Upsampling reads one chroma sample, two pixels, beyond the window.
    let beyond = |halved: usize| if layout.is_smooth && halved == 2 { 2 } else { 0 };
    let margin = (beyond(layout.halved.0), beyond(layout.halved.1));
    let first = (window.y.saturating_sub(margin.0) / mcu.0, window.x.saturating_sub(margin.1) / mcu.1);
    let end = (
        (window.y + window.height + margin.0).div_ceil(mcu.0).min(frame.mcus_down()),
        (window.x + window.width + margin.1).div_ceil(mcu.1).min(frame.mcus_across()),
    );
    let JpegScratch { dc, ac, planes, lines, counts, .. } = scratch;
    let mut output = Output::new(layout, window, first.1 * mcu.1, (end.1 - first.1) * mcu.1, lines);
    for (c, plane) in planes.iter_mut().enumerate().take(frame.count) {
        plane.resize(output.plane_len(c), 0);
    }
    let mut bits = Bits::new(frame.scan);
    let mut means = [0i16; 3];
    let mut coefficients = [0i16; 64];
    let (mut until_restart, mut restarts) = (frame.restart, 0);
    *counts = Counts::default();

    for mcu_row in 0..end.0 {
        for mcu_column in 0..frame.mcus_across() {
            if frame.restart > 0 {
                if until_restart == 0 {
                    bits.restart(restarts)?;
                    restarts += 1;
                    means = [0; 3];
                    until_restart = frame.restart;
                }
                until_restart -= 1;
            }
            let wanted = mcu_row >= first.0 && mcu_column >= first.1 && mcu_column < end.1;
            for c in 0..frame.count {
                let component = frame.components[c];
                let codes = (&dc[component.dc], &ac[component.ac]);
                if !wanted {
                    for _ in 0..component.across * component.down {
                        bits.skip_block(codes, &mut means[c])?;
                    }
                    continue;
                }
                let (side, stride) = (layout.sides[c], output.stride(c));
                for down in 0..component.down {
                    for across in 0..component.across {
                        let column = (mcu_column - first.1) * component.across + across;
                        let to = &mut planes[c][(1 + down * side) * stride + column * side..];
                        if side == 1 {
                            bits.skip_block(codes, &mut means[c])?;
                            flat::<1>(means[c].wrapping_mul(frame.quant[c][0]), to, stride);
                            continue;
                        }
                        let busy = bits.block(codes, &frame.quant[c], &mut means[c], &mut coefficients)?;
                        match (side, busy) {
                            (8, true) => isa.idct(&coefficients, to, stride),
                            (8, false) => flat::<8>(coefficients[0], to, stride),
                            (4, true) => isa.idct4(&coefficients, to, stride),
                            (4, false) => flat::<4>(coefficients[0], to, stride),
                            (_, true) => scaled::idct2(&coefficients, to, stride),
                            (_, false) => flat::<2>(coefficients[0], to, stride),
                        }
                        if busy {
                            coefficients = [0; 64];
                        }
                    }
                }
            }
            counts.read += 1;
            counts.transformed += usize::from(wanted);
        }
        if bits.is_overrun() {
            return None;
        }
        if mcu_row >= first.0 {
            output.rows(isa, planes, mcu_row, mcu_row + 1 == end.0, out);
        }
    }
    let blocks = |is_counted: fn(usize) -> bool| -> usize {
        let components = frame.components[..frame.count].iter().zip(layout.sides);
        components.filter(|(_, side)| is_counted(*side)).map(|(c, _)| c.across * c.down).sum()
    };
    counts.reduced = counts.transformed * blocks(|side| side < 8);
    counts.read *= blocks(|_| true);
    counts.transformed *= blocks(|_| true);
    Some(())
}

/// A block that has only its mean.
#[inline(always)]
fn flat<const SIDE: usize>(mean: i16, out: &mut [u8], stride: usize) {
    // The two passes of each transform round once and otherwise shift exactly.
    let sample = (((i32::from(mean) + 4) >> 3) + 128).clamp(0, 255) as u8;
    for y in 0..SIDE {
        out[y * stride..][..SIDE].fill(sample);
    }
}

impl JpegScratch {
    /// The work for the last picture.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Bytes of memory that are kept for the next picture.
    pub fn memory(&self) -> usize {
        let planes = self.planes.iter().map(Vec::capacity).sum::<usize>();
        planes + self.general.bytes()
    }

    /// The next picture may not be decodable here.
    pub fn forget_counts(&mut self) {
        self.counts = Counts::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::reference::{pictures, seeded};

    fn whole(bytes: &[u8], scratch: &mut JpegScratch) -> Option<(usize, usize, Vec<u8>)> {
        let frame = parse(bytes, scratch)?;
        let (height, width) = (frame.height, frame.width);
        let mut out = vec![0; height * width * 3];
        frame.decode(Scale::Full, Window::whole((height, width)), scratch, &mut out)?;
        Some((height, width, out))
    }

    #[test]
    fn a_window_has_the_pixels_of_the_whole_picture() {
        let mut draws = seeded(1);
        let mut scratch = JpegScratch::default();
        let mut compared = 0;
        for (name, bytes) in pictures(&["imagenet-mini", "bad-images"]) {
            let Some((height, width, all)) = whole(&bytes, &mut scratch) else { continue };
            for _ in 0..6 {
                let (h, w) = (1 + draws.below(height), 1 + draws.below(width));
                let window = Window {
                    y: draws.below(height - h + 1),
                    x: draws.below(width - w + 1),
                    height: h,
                    width: w,
                };
                let mut out = vec![0; h * w * 3];
                let frame = parse(&bytes, &mut scratch).unwrap();
                // Damage below a window goes unnoticed.
                frame.decode(Scale::Full, window, &mut scratch, &mut out).unwrap();
                for (y, row) in out.chunks_exact(w * 3).enumerate() {
                    let expected = &all[((window.y + y) * width + window.x) * 3..][..w * 3];
                    assert!(row == expected, "{name}: row {y} of {window:?}");
                }
                let counts = scratch.counts();
                assert!(counts.transformed <= counts.read && counts.transformed > 0);
                compared += 1;
            }
        }
        println!("{compared} windows compared");
    }

    #[test]
    fn damage_is_none_or_a_picture_and_never_a_panic() {
        let mut draws = seeded(2);
        let mut scratch = JpegScratch::default();
        for (_, bytes) in pictures(&["bad-images"]).into_iter().filter(|(_, b)| b.len() < 40_000) {
            for _ in 0..60 {
                let mut bytes = bytes.clone();
                for _ in 0..1 + draws.below(8) {
                    if !bytes.is_empty() {
                        // Half of the damage hits the tables.
                        let most = if draws.chance(0.5) { 700 } else { usize::MAX };
                        let at = draws.below(bytes.len().min(most));
                        bytes[at] = draws.next_u32() as u8;
                    }
                }
                bytes.truncate(draws.below(bytes.len() * 2 + 1));
                if let Some(frame) = parse(&bytes, &mut scratch).filter(|f| f.height * f.width < 1 << 22) {
                    let scale = [Scale::Full, Scale::Half, Scale::Quarter, Scale::Eighth][draws.below(4)];
                    let window = Window::whole(scale.size((frame.height, frame.width)));
                    let mut out = vec![0; window.height * window.width * 3];
                    let _ = frame.decode(scale, window, &mut scratch, &mut out);
                }
            }
        }
    }

    #[test]
    fn other_pictures_are_left_to_other_decoders() {
        let mut scratch = JpegScratch::default();
        for (name, bytes) in pictures(&["bad-images"]) {
            let file = name.rsplit('/').next().unwrap();
            let ours = ["good", "restart", "grayscale", "sampling_440", "one_pixel", "tall", "wide", "exif"];
            let others =
                ["progressive", "arithmetic", "cmyk", "ycck", "rgb_stored", "precision12", "truncated_half"];
            let taken = whole(&bytes, &mut scratch).is_some();
            assert!(taken || !ours.iter().any(|o| file.starts_with(o)), "{name} is common");
            assert!(!taken || !others.iter().any(|o| file.starts_with(o)), "{name} is not");
        }
    }
}
