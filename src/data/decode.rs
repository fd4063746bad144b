//! Encoded bytes to RGB pixels, by content and not by name.
//!
//! Grey becomes three equal channels, alpha is dropped (not composited), 16 bits become 8, CMYK is converted, and the
//! EXIF orientation is ignored, as all reference pipelines do. The header is read first, and a picture of more than
//! [`MAX_PIXELS`] is refused before anything is allocated for it. Broken input is an error that says what is wrong; a
//! decoder's panic becomes one too. A JPEG stream that ends early but whose decoder makes a whole picture of it (the
//! rest is grey) is taken.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::{ColorType, DynamicImage, ImageDecoder};

use crate::error::{Error, Result};
use crate::fail;

use super::picture::Picture;

/// The largest picture that is decoded: 64 Mi pixels, 192 MiB as RGB.
pub const MAX_PIXELS: u64 = 64 << 20;

/// What a picture's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub format: Format,
    pub height: usize,
    pub width: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Jpeg,
    Png,
}

impl Format {
    /// By the first bytes; the error names the format that it is instead, where that is known.
    pub fn of(bytes: &[u8]) -> Result<Self> {
        let starts = |magic: &[u8]| bytes.starts_with(magic);
        let other = if bytes.is_empty() {
            "the file is empty".into()
        } else if starts(b"\xFF\xD8\xFF") || bytes == b"\xFF\xD8" {
            return Ok(Format::Jpeg);
        } else if starts(b"\x89PNG\r\n\x1A\n") {
            return Ok(Format::Png);
        } else if starts(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            "a WebP picture, and only JPEG and PNG are supported".into()
        } else if starts(b"GIF8") {
            "a GIF picture, and only JPEG and PNG are supported".into()
        } else if starts(b"BM") {
            "a BMP picture, and only JPEG and PNG are supported".into()
        } else if starts(b"II*\0") || starts(b"MM\0*") {
            "a TIFF picture, and only JPEG and PNG are supported".into()
        } else if bytes.get(4..8) == Some(b"ftyp") {
            "an AVIF or HEIF picture, and only JPEG and PNG are supported".into()
        } else {
            let head: Vec<String> = bytes.iter().take(4).map(|b| format!("{b:02X}")).collect();
            format!("not a JPEG or PNG picture, starts with {}", head.join(" "))
        };
        Err(Error::new(other))
    }
}

/// Reads the size and checks it against [`MAX_PIXELS`]; decodes nothing.
pub fn header(bytes: &[u8]) -> Result<Header> {
    guarded(|| open(bytes).map(|(header, _)| header))
}

/// Decodes a picture into `picture`, whose memory is used again.
pub fn decode_into(bytes: &[u8], picture: &mut Picture) -> Result<()> {
    guarded(|| {
        let (header, decoder) = open(bytes)?;
        picture.height = header.height;
        picture.width = header.width;
        match decoder.color_type() {
            ColorType::Rgb8 => {
                picture.pixels.resize(header.height * header.width * 3, 0);
                decoder.read_image(&mut picture.pixels).map_err(reason)?;
            }
            ColorType::L8 => {
                let mut grey = vec![0; header.height * header.width];
                decoder.read_image(&mut grey).map_err(reason)?;
                picture.pixels.clear();
                picture.pixels.extend(grey.into_iter().flat_map(|g| [g; 3]));
            }
            _ => picture.pixels = DynamicImage::from_decoder(decoder).map_err(reason)?.into_rgb8().into_raw(),
        }
        Ok(())
    })
}

fn open(bytes: &[u8]) -> Result<(Header, Box<dyn ImageDecoder + '_>)> {
    let format = Format::of(bytes)?;
    let decoder: Box<dyn ImageDecoder + '_> = match format {
        Format::Jpeg => {
            check_jpeg(bytes)?;
            Box::new(JpegDecoder::new(Cursor::new(bytes)).map_err(reason)?)
        }
        Format::Png => Box::new(PngDecoder::new(Cursor::new(bytes)).map_err(reason)?),
    };
    let (width, height) = decoder.dimensions();
    check_size(u64::from(height), u64::from(width))?;
    Ok((Header { format, height: height as usize, width: width as usize }, decoder))
}

fn check_size(height: u64, width: u64) -> Result<()> {
    if height == 0 || width == 0 {
        fail!("the picture is {width}x{height} pixels");
    }
    if height * width > MAX_PIXELS {
        fail!("{width}x{height} pixels are over the limit of {} million", MAX_PIXELS / 1_000_000);
    }
    Ok(())
}

/// Walks a JPEG's segments up to its frame header, for limits and reasons that the decoder does not give.
fn check_jpeg(bytes: &[u8]) -> Result<()> {
    let mut at = 2;
    loop {
        let marker = match bytes.get(at..at + 2) {
            Some([0xFF, 0xFF]) => {
                at += 1; // fill bytes
                continue;
            }
            Some([0xFF, marker]) => *marker,
            Some(_) => fail!("damaged JPEG: no marker at byte {at}"),
            None => fail!("the JPEG ends in its header, after {} bytes", bytes.len()),
        };
        if matches!(marker, 0x01 | 0xD0..=0xD8) {
            at += 2;
            continue;
        }
        let length = match bytes.get(at + 2..at + 4) {
            Some(&[high, low]) => usize::from(high) << 8 | usize::from(low),
            _ => fail!("the JPEG ends in its header, after {} bytes", bytes.len()),
        };
        match marker {
            // Start of frame: precision, height, width, components.
            0xC0..=0xCF if !matches!(marker, 0xC4 | 0xC8 | 0xCC) => {
                let Some(&[precision, h1, h0, w1, w0, _components]) = bytes.get(at + 4..at + 10) else {
                    fail!("the JPEG ends in its header, after {} bytes", bytes.len());
                };
                if matches!(marker, 0xC9..=0xCF) {
                    fail!("arithmetic coding is not supported");
                }
                if matches!(marker, 0xC3 | 0xC5..=0xC7) {
                    fail!("lossless and hierarchical JPEG are not supported");
                }
                if precision != 8 {
                    fail!("JPEG with {precision} bits per sample is not supported");
                }
                return check_size(u64::from(h1) << 8 | u64::from(h0), u64::from(w1) << 8 | u64::from(w0));
            }
            0xD9 | 0xDA => fail!("the JPEG has no picture in it"),
            _ => at += 2 + length,
        }
    }
}

fn reason(error: image::ImageError) -> Error {
    let text = error.to_string();
    Error::new(text.strip_prefix("Format error decoding ").unwrap_or(&text).trim().to_owned())
}

/// Runs a decoder; should it panic, that is the picture's fault and an error.
fn guarded<T>(decode: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| fail!("the decoder failed on this picture"))
}
