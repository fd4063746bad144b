//! Reads a picture file's format and size from its first bytes, before anything is decoded. A picture of more
//! than [`MAX_PIXELS`] is refused here, so that no decoder allocates anything for it.

use crate::error::{Error, Result};
use crate::fail;

use super::tags::Tags;

/// The largest picture that is decoded: 512 MiB as RGB. Pillow has the same limit (twice its
/// `MAX_IMAGE_PIXELS`).
pub const MAX_PIXELS: u64 = 178_956_970;

/// Contents of a picture's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The file format.
    pub format: Format,
    /// Rows of pixels, before any turn by EXIF.
    pub height: usize,
    /// Columns of pixels, before any turn by EXIF.
    pub width: usize,
}

/// Picture formats that can be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JPEG, baseline and progressive.
    Jpeg,
    /// PNG.
    Png,
    /// WebP.
    WebP,
    /// GIF; the first frame.
    Gif,
    /// Windows bitmap.
    Bmp,
    /// TIFF.
    Tiff,
}

impl Format {
    /// Detects the format by the first bytes. The error names the other format, if it is known.
    pub fn of(bytes: &[u8]) -> Result<Self> {
        let starts = |magic: &[u8]| bytes.starts_with(magic);
        let other = if bytes.is_empty() {
            "the file is empty".into()
        } else if starts(b"\xFF\xD8\xFF") || bytes == b"\xFF\xD8" {
            return Ok(Format::Jpeg);
        } else if starts(b"\x89PNG\r\n\x1A\n") {
            return Ok(Format::Png);
        } else if starts(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            return Ok(Format::WebP);
        } else if starts(b"GIF87a") || starts(b"GIF89a") {
            return Ok(Format::Gif);
        } else if starts(b"BM") {
            return Ok(Format::Bmp);
        } else if starts(b"II*\0") || starts(b"MM\0*") {
            return Ok(Format::Tiff);
        } else if starts(b"II+\0") || starts(b"MM\0+") {
            format!("a BigTIFF picture; {SUPPORTED}")
        } else if bytes.get(4..8) == Some(b"ftyp") {
            format!("an AVIF or HEIF picture; {SUPPORTED}")
        } else {
            let head: Vec<String> = bytes.iter().take(4).map(|b| format!("{b:02X}")).collect();
            format!("not a picture, starts with {}; {SUPPORTED}", head.join(" "))
        };
        Err(Error::new(other))
    }
}

const SUPPORTED: &str = "JPEG, PNG, WebP, GIF, BMP and TIFF are supported";

/// Reads the size and checks it against [`MAX_PIXELS`]; decodes and allocates nothing.
pub fn header(bytes: &[u8]) -> Result<Header> {
    let format = Format::of(bytes)?;
    let size = match format {
        Format::Jpeg => return jpeg(bytes),
        Format::Png => {
            bytes.get(12..24).filter(|b| b.starts_with(b"IHDR")).map(|b| (be32(&b[8..]), be32(&b[4..])))
        }
        Format::WebP => webp(bytes),
        Format::Gif => bytes.get(6..10).map(|b| (le16(&b[2..]), le16(b))),
        Format::Bmp => bmp(bytes),
        Format::Tiff => Tags::of(bytes).and_then(|tags| Some((tags.number(257)?, tags.number(256)?))),
    };
    let Some((height, width)) = size else {
        fail!("the {format:?} ends in its header, after {} bytes", bytes.len());
    };
    checked(format, height, width)
}

/// Refuses a picture that is too large or empty.
fn checked(format: Format, height: u64, width: u64) -> Result<Header> {
    if height == 0 || width == 0 {
        let what = if format == Format::Jpeg && height == 0 {
            ": a height after the scan is not supported"
        } else {
            ""
        };
        fail!("the picture is {width}x{height} pixels{what}");
    }
    if height.saturating_mul(width) > MAX_PIXELS {
        return Err(Error::new(format!(
            "{width}x{height} pixels are over the limit of {} million",
            MAX_PIXELS / 1_000_000
        ))
        .hint("make the picture smaller with another program, or remove it"));
    }
    // Both are below the limit.
    Ok(Header { format, height: height as usize, width: width as usize })
}

fn le16(bytes: &[u8]) -> u64 {
    u64::from(bytes[0]) | u64::from(bytes[1]) << 8
}

fn le32(bytes: &[u8]) -> u64 {
    le16(bytes) | le16(&bytes[2..]) << 16
}

fn be32(bytes: &[u8]) -> u64 {
    bytes[..4].iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// (H, W) of the first chunk, which is of one of three kinds.
fn webp(bytes: &[u8]) -> Option<(u64, u64)> {
    let body = bytes.get(20..30)?;
    match bytes.get(12..16)? {
        b"VP8X" => Some((1 + le24(&body[7..]), 1 + le24(&body[4..]))),
        b"VP8L" if body[0] == 0x2F => {
            let bits = le32(&body[1..]);
            Some((1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)))
        }
        b"VP8 " if body[3..6] == [0x9D, 0x01, 0x2A] => {
            Some((le16(&body[8..]) & 0x3FFF, le16(&body[6..]) & 0x3FFF))
        }
        _ => None,
    }
}

fn le24(bytes: &[u8]) -> u64 {
    le16(bytes) | u64::from(bytes[2]) << 16
}

/// (H, W); a negative height means that rows go downwards.
fn bmp(bytes: &[u8]) -> Option<(u64, u64)> {
    if le32(bytes.get(14..18)?) == 12 {
        return bytes.get(18..22).map(|b| (le16(&b[2..]), le16(b)));
    }
    let side = |at: usize| Some((le32(bytes.get(at..at + 4)?) as u32 as i32).unsigned_abs().into());
    Some((side(22)?, side(18)?))
}

/// Walks a JPEG's segments up to its frame header, and refuses by name what no decoder here reads.
fn jpeg(bytes: &[u8]) -> Result<Header> {
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
                let (height, width) = (u16::from_be_bytes([h1, h0]), u16::from_be_bytes([w1, w0]));
                return checked(Format::Jpeg, height.into(), width.into());
            }
            0xDE => fail!("lossless and hierarchical JPEG are not supported"),
            0xF7 => fail!("JPEG-LS is not supported"),
            0xD9 | 0xDA => fail!("the JPEG contains no picture"),
            _ => at += 2 + length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::decode::Decoder;

    /// A header of each format that claims a size, without the picture's data.
    fn claims(height: u32, width: u32) -> Vec<(&'static str, Vec<u8>)> {
        let (h16, w16) = (height.min(65_535) as u16, width.min(65_535) as u16);
        let mut png = b"\x89PNG\r\n\x1A\n\0\0\0\rIHDR".to_vec();
        png.extend(width.to_be_bytes().into_iter().chain(height.to_be_bytes()));
        png.extend(b"\x08\x02\0\0\0\0\0\0\0");
        let mut gif = b"GIF89a".to_vec();
        gif.extend(w16.to_le_bytes().into_iter().chain(h16.to_le_bytes()).chain([0; 40]));
        let mut bmp = b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
        bmp.extend(width.to_le_bytes().into_iter().chain(height.to_le_bytes()));
        bmp.extend(b"\x01\0\x18\0".iter().chain(&[0; 24]));
        let mut small_bmp = b"BM\0\0\0\0\0\0\0\0\x1A\0\0\0\x0C\0\0\0".to_vec();
        small_bmp.extend(w16.to_le_bytes().into_iter().chain(h16.to_le_bytes()));
        small_bmp.extend(b"\x01\0\x18\0");
        let riff =
            |kind: &[u8], body: &[u8]| [b"RIFF\xFF\0\0\0WEBP", kind, b"\x20\0\0\0", body, &[0; 32]].concat();
        let side = |n: u32| ((n - 1).min(0xFF_FFFF)).to_le_bytes();
        let extended = [&[0; 4][..], &side(width)[..3], &side(height)[..3]].concat();
        let lossless = (width - 1).min(0x3FFF) | (height - 1).min(0x3FFF) << 14;
        let lossy = [
            &[0, 0, 0, 0x9D, 0x01, 0x2A][..],
            &w16.min(0x3FFF).to_le_bytes(),
            &h16.min(0x3FFF).to_le_bytes(),
        ];
        let mut tiff = b"MM\0*\0\0\0\x08\0\x02".to_vec();
        for (tag, value) in [(256u16, width), (257, height)] {
            tiff.extend(tag.to_be_bytes().into_iter().chain([0, 4, 0, 0, 0, 1]).chain(value.to_be_bytes()));
        }
        let mut jpeg = b"\xFF\xD8\xFF\xC2\0\x11\x08".to_vec();
        jpeg.extend(h16.to_be_bytes().into_iter().chain(w16.to_be_bytes()));
        jpeg.extend(b"\x03\x01\x11\0\x02\x11\0\x03\x11\0\xFF\xDA\0\x0C\x03\x01\0\x02\0\x03\0\0\0\0");
        vec![
            ("jpeg", jpeg),
            ("png", png),
            ("gif", gif),
            ("bmp", bmp),
            ("bmp of OS/2", small_bmp),
            ("tiff", [tiff, vec![0; 4]].concat()),
            ("webp", riff(b"VP8X", &extended)),
            ("lossless webp", riff(b"VP8L", &[&[0x2F][..], &lossless.to_le_bytes()].concat())),
            ("lossy webp", riff(b"VP8 ", &lossy.concat())),
        ]
    }

    #[test]
    fn every_format_says_its_size() {
        for (height, width) in [(1, 1), (300, 2), (7, 5000), (16_000, 9_000)] {
            for (name, bytes) in claims(height, width) {
                let header = header(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert_eq!((header.height, header.width), (height as usize, width as usize), "{name}");
            }
        }
    }

    /// A decoder keeps what it has allocated, so its memory shows how much it allocated for a claim.
    #[test]
    fn claims_of_huge_pictures_are_errors_and_no_memory() {
        let mut draws = crate::data::reference::seeded(9);
        let sides = [1, 100, 16_383, 16_384, 65_535, 1 << 20, 0x7FFF_FFFF, 0xFFFF_FFFF];
        let mut random = || match draws.below(3) {
            0 => sides[draws.below(sides.len())],
            1 => 1 + draws.below(70_000) as u32,
            _ => 1 + draws.next_u32() / 2,
        };
        for _ in 0..300 {
            let (height, width) = (random(), random());
            for (name, bytes) in claims(height, width) {
                let is_large = header(&bytes).is_err();
                let mut decoder = Decoder::default();
                let error = decoder.decode(&bytes).expect_err(name);
                if is_large {
                    assert!(error.message().contains("over the limit"), "{name} {width}x{height}: {error}");
                    assert_eq!(decoder.memory(), 0, "{name} {width}x{height}");
                }
                let ratio = if name == "jpeg" { 1100 } else { 1 << 30 };
                assert!(
                    decoder.memory() <= bytes.len() * ratio,
                    "{name} {width}x{height}: {}",
                    decoder.memory()
                );
            }
        }
    }
}
