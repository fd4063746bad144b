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
    let text = text.strip_prefix("Format error decoding ").unwrap_or(&text);
    Error::new(format!("damaged {}", text.trim()))
}

/// Runs a decoder; should it panic, that is the picture's fault and an error.
fn guarded<T>(decode: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| fail!("the decoder failed on this picture"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::reference::{Arrays, path};

    fn decoded(bytes: &[u8]) -> Result<Picture> {
        let mut picture = Picture::default();
        decode_into(bytes, &mut picture)?;
        Ok(picture)
    }

    /// The decoder's chroma upsampling and inverse DCT are not libjpeg's: at most 4 off, by 1.1 in the mean; PNG and grey
    /// JPEG have no such freedom.
    #[test]
    fn pictures_decode_as_pillow_decodes_them() {
        let Some(mut arrays) = Arrays::open("decode/decoded.npz") else { return };
        let files: Vec<String> =
            arrays.names().iter().filter_map(|n| n.strip_suffix(".pil_rgb")).map(str::to_owned).collect();
        assert!(!files.is_empty());
        for file in files {
            let expected = arrays.picture(&format!("{file}.pil_rgb"));
            let ours = decoded(&std::fs::read(path(&format!("decode/{file}")).unwrap()).unwrap()).unwrap();
            assert_eq!((ours.height, ours.width), (expected.height, expected.width), "{file}");
            let off: Vec<u8> =
                ours.pixels.iter().zip(&expected.pixels).map(|(a, b)| a.abs_diff(*b)).collect();
            let worst = *off.iter().max().unwrap();
            let mean = off.iter().map(|d| f64::from(*d)).sum::<f64>() / off.len() as f64;
            println!("{file}: off by {worst} at most, {mean:.3} in the mean");
            let exact = file.ends_with(".png") || file.contains("gray");
            assert!(worst <= if exact { 1 } else { 4 } && mean <= 1.1, "{file}: {worst}, mean {mean}");
            if file.ends_with(".png") {
                assert_eq!(worst, 0, "{file}");
            }
        }
    }

    #[test]
    fn broken_pictures_are_errors_that_say_why() {
        let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");
        let dir =
            std::env::var_os("VITRUM_TEST_DATA").map_or_else(|| default.into(), std::path::PathBuf::from);
        let dir = dir.join("bad-images");
        if !dir.exists() {
            println!("skipped: no {}", dir.display());
            return;
        }
        let bad = [
            ("empty", "empty"),
            ("only_soi", "ends in its header"),
            ("text_named", "not a JPEG or PNG"),
            ("truncated_header", "Not enough bytes"),
            ("dims_zero_height", "0 pixels"),
            ("precision12", "12 bits"),
            ("dims_65500", "over the limit"),
            ("scan_bomb", ""),
            ("webp_named", "WebP"),
            ("arithmetic", "arithmetic coding"),
        ];
        let fine = [
            ("no_eoi", None),
            ("trailing_garbage", None),
            ("png_named", Some((48, 64))),
            ("progressive", None),
            ("grayscale", None),
            ("cmyk", None),
            ("ycck", None),
            ("rgb_stored", None),
            ("exif_orientation3", None),
            ("exif_orientation6", None),
            ("odd_17x13_411", Some((13, 17))),
            ("sampling_440", Some((121, 161))),
            ("restart_markers", None),
            ("one_pixel", Some((1, 1))),
            ("tall_1x5000", Some((5000, 1))),
            ("wide_5000x1", Some((1, 5000))),
            ("good", None),
        ];
        let read = |name: &str| std::fs::read(dir.join(format!("{name}.jpg"))).unwrap();
        for (name, reason) in bad {
            let error = decoded(&read(name)).expect_err(name);
            println!("{name}: {error}");
            assert!(error.to_string().contains(reason), "{name}: {error}");
        }
        let good = decoded(&read("good")).unwrap();
        for (name, size) in fine {
            let picture = decoded(&read(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let size = size.unwrap_or((good.height, good.width));
            assert_eq!((picture.height, picture.width), size, "{name}");
            assert_eq!(picture.pixels.len(), size.0 * size.1 * 3, "{name}");
            // The same scene in another coding must look alike: a mean difference of colours, not of structure.
            if ["rgb_stored", "cmyk", "progressive", "restart_markers", "no_eoi"].contains(&name) {
                let off: f64 =
                    picture.pixels.iter().zip(&good.pixels).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
                let mean = off / good.pixels.len() as f64;
                println!("{name}: {mean:.2} from good.jpg in the mean");
                assert!(mean < 6.0, "{name} is off by {mean} in the mean");
            }
        }
        for (name, how) in
            [("truncated_half", "taken"), ("corrupt_scan", "taken"), ("bomb_8000x8000", "taken")]
        {
            println!("{name}: {how}: {:?}", decoded(&read(name)).map(|p| (p.height, p.width)));
        }
    }
}
