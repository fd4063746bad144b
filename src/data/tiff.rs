//! TIFF pictures of 8 bits: grey, RGB, palettes, with or without alpha (which is dropped), in strips or
//! tiles, uncompressed or packed with LZW, Deflate or PackBits. Others are refused by name.

use std::borrow::Cow;
use std::io::Cursor;

use tiff::ColorType;
use tiff::decoder::{Decoder, DecodingResult, Limits};

use crate::error::{Error, Result};
use crate::fail;

use super::picture::Picture;
use super::tags::Tags;

/// Tags.
const BITS: u16 = 258;
const COMPRESSION: u16 = 259;
const PHOTOMETRIC: u16 = 262;
const SAMPLES: u16 = 277;
const PLANAR: u16 = 284;
const COLOURS: u16 = 320;

/// Photometric interpretations.
const BLACK_IS_ZERO: u8 = 1;
const PALETTE: u64 = 3;

/// Decodes the first picture of a file, which has `size` (H, W).
pub(super) fn decode(bytes: &[u8], size: (usize, usize), picture: &mut Picture) -> Result<()> {
    let tags = Tags::of(bytes).ok_or_else(|| Error::new("damaged TIFF: no directory"))?;
    let samples = tags.number(SAMPLES).unwrap_or(1) as usize;
    let bits = tags.numbers(BITS).unwrap_or_else(|| vec![1]);
    if bits.iter().any(|bits| *bits != 8) {
        fail!("TIFF with {} bits per sample is not supported", bits[0]);
    }
    if samples > 1 && tags.number(PLANAR) == Some(2) {
        fail!("TIFF with separate planes is not supported");
    }
    if let compression @ 2.. = tags.number(COMPRESSION).unwrap_or(1)
        && !matches!(compression, 5 | 8 | 32_773 | 32_946)
    {
        fail!("TIFF with compression {compression} is not supported");
    }
    // Deflate packs best: 1,032 bytes into one.
    let total = size.0 * size.1 * samples.clamp(1, 16);
    if total / 1100 > bytes.len() {
        fail!("{} bytes cannot hold {}x{} pixels", bytes.len(), size.1, size.0);
    }
    let colours = match tags.number(PHOTOMETRIC) {
        Some(PALETTE) => Some(palette(&tags)?),
        _ => None,
    };
    // The crate does not support palettes, so we have it read the indices as grey.
    let mut bytes = Cow::Borrowed(bytes);
    if colours.is_some() {
        let (at, grey) = tags.encoded(PHOTOMETRIC, BLACK_IS_ZERO).expect("the tag was read");
        bytes.to_mut()[at..at + grey.len()].copy_from_slice(&grey);
    }
    let mut limits = Limits::default();
    limits.decoding_buffer_size = total;
    let mut decoder = Decoder::new(Cursor::new(&bytes[..])).map_err(reason)?.with_limits(limits);
    // Values of a pixel, and whether the first three are its colour.
    let (step, is_rgb) = match decoder.colortype().map_err(reason)? {
        ColorType::Gray(8) => (1, false),
        ColorType::GrayA(8) => (2, false),
        ColorType::Multiband { bit_depth: 8, num_samples } => (usize::from(num_samples), false),
        ColorType::RGB(8) => (3, true),
        ColorType::RGBA(8) => (4, true),
        other => fail!("TIFF with colours {other:?} is not supported"),
    };
    let DecodingResult::U8(values) = decoder.read_image().map_err(reason)? else {
        fail!("TIFF with samples that are no bytes is not supported");
    };
    if values.len() != size.0 * size.1 * step {
        fail!("damaged TIFF: {} values for {}x{} pixels", values.len(), size.1, size.0);
    }
    picture.reset(size)?;
    for (pixel, value) in picture.pixels.chunks_exact_mut(3).zip(values.chunks_exact(step)) {
        pixel.copy_from_slice(&match &colours {
            Some(colours) => colours[usize::from(value[0])],
            None if is_rgb => [value[0], value[1], value[2]],
            None => [value[0]; 3],
        });
    }
    Ok(())
}

/// 256 colours. The tag has all reds, then all greens, then all blues, in 16 bits.
fn palette(tags: &Tags) -> Result<Vec<[u8; 3]>> {
    let values = tags.numbers(COLOURS).filter(|values| values.len() == 3 * 256);
    let values = values.ok_or_else(|| Error::new("damaged TIFF: no palette of 256 colours"))?;
    // The high byte, as Pillow takes it.
    Ok((0..256).map(|i| [0, 1, 2].map(|c| (values[c * 256 + i] >> 8) as u8)).collect())
}

fn reason(error: tiff::TiffError) -> Error {
    Error::new(format!("damaged TIFF: {error}"))
}
