//! Encoded bytes to RGB pixels, by content and not by name.
//!
//! Grey becomes three equal channels, alpha is dropped (not composited), 16 bits become 8, CMYK is converted, an animation
//! is its first frame, and the EXIF orientation is ignored, as all reference pipelines do. The header is read first, and a
//! picture of more than [`MAX_PIXELS`] is refused before anything is allocated for it. Broken input is an error that says
//! what is wrong; a decoder's panic becomes one too. A JPEG stream that ends early but whose decoder makes a whole picture
//! of it (the rest is grey) is taken.
//!
//! Common JPEG goes to our own decoder ([`jpeg`](super::jpeg)), whose pixels are libjpeg's; what that does not take goes
//! to crate `image`, or, in a build with the feature `turbojpeg`, to libjpeg-turbo. [`JpegPath`] chooses by name.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use image::codecs::bmp::BmpDecoder;
use image::codecs::gif::GifDecoder;
use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{ColorType, DynamicImage, ImageDecoder, Limits};

use crate::error::{Error, Result};
use crate::fail;

use super::jpeg;
use super::picture::{Part, Picture, Scale, View, Wanted};

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
    WebP,
    Gif,
    Bmp,
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
            return Ok(Format::WebP);
        } else if starts(b"GIF87a") || starts(b"GIF89a") {
            return Ok(Format::Gif);
        } else if starts(b"BM") {
            return Ok(Format::Bmp);
        } else if starts(b"II*\0") || starts(b"MM\0*") {
            format!("a TIFF picture; {SUPPORTED}")
        } else if bytes.get(4..8) == Some(b"ftyp") {
            format!("an AVIF or HEIF picture; {SUPPORTED}")
        } else {
            let head: Vec<String> = bytes.iter().take(4).map(|b| format!("{b:02X}")).collect();
            format!("no picture, starts with {}; {SUPPORTED}", head.join(" "))
        };
        Err(Error::new(other))
    }
}

const SUPPORTED: &str = "JPEG, PNG, WebP, GIF and BMP are supported";

/// Who decodes JPEG. `VITRUM_JPEG` chooses, for comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JpegPath {
    /// Our decoder, and one of the others for what it does not take.
    Own,
    /// Crate `image`, which is zune-jpeg. Pixels differ by up to 4.
    Zune,
    /// libjpeg-turbo.
    #[cfg(feature = "turbojpeg")]
    Turbo,
}

impl JpegPath {
    /// The one that this process uses. An unknown name is our own decoder.
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<JpegPath> = OnceLock::new();
        *CHOSEN.get_or_init(|| match std::env::var("VITRUM_JPEG").as_deref() {
            Ok("zune") => JpegPath::Zune,
            #[cfg(feature = "turbojpeg")]
            Ok("turbo") => JpegPath::Turbo,
            _ => JpegPath::Own,
        })
    }

    /// For `vitrum doctor` and `vitrum bench`.
    pub fn describe(self) -> &'static str {
        match self {
            JpegPath::Own if cfg!(feature = "turbojpeg") => "own (baseline), libjpeg-turbo for the rest",
            JpegPath::Own => "own (baseline), zune-jpeg for the rest",
            JpegPath::Zune => "zune-jpeg, by crate image",
            #[cfg(feature = "turbojpeg")]
            JpegPath::Turbo => "libjpeg-turbo",
        }
    }
}

/// Reads the size and checks it against [`MAX_PIXELS`]; decodes nothing.
pub fn header(bytes: &[u8]) -> Result<Header> {
    guarded(|| {
        let format = Format::of(bytes)?;
        let (height, width) = match format {
            Format::Jpeg => check_jpeg(bytes)?,
            _ => open(format, bytes)?.0,
        };
        Ok(Header { format, height, width })
    })
}

/// Decodes a whole picture into `picture`, whose memory is used again. A worker keeps a [`Decoder`] instead.
pub fn decode_into(bytes: &[u8], picture: &mut Picture) -> Result<()> {
    let mut decoder = Decoder { picture: std::mem::take(picture), ..Decoder::default() };
    let decoded = decoder.decode(bytes).map(drop);
    *picture = decoder.picture;
    decoded
}

/// Memory that a worker decodes into again and again.
#[derive(Debug, Default)]
pub struct Decoder {
    jpeg: jpeg::Scratch,
    picture: Picture,
}

impl Decoder {
    /// Decodes a whole picture.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<View<'_>> {
        Ok(self.part(bytes, Wanted::whole)?.view)
    }

    /// Decodes the part that `choose` picks, told the picture's (H, W). It is asked once. Where nothing can decode this
    /// picture at the scale that it allows, the part comes at full size.
    pub fn part(&mut self, bytes: &[u8], choose: impl FnOnce((usize, usize)) -> Wanted) -> Result<Part<'_>> {
        let Decoded { wanted: Wanted { window, scale }, is_whole } =
            guarded(|| self.decode_part(bytes, choose))?;
        let mut view = self.picture.view();
        if is_whole {
            let w = scale.window(window);
            view = view.window(w.y, w.x, w.height, w.width);
        }
        Ok(Part::scaled(view, window, scale))
    }

    /// Whether a picture can be kept as it is: a plain JPEG by its structure alone ([`jpeg::seems_whole`]), everything
    /// else, and a JPEG with anything odd about it, by decoding it. What is damaged inside a scan that is whole is found
    /// by [`Decoder::decode`] only.
    pub fn verify(&mut self, bytes: &[u8]) -> Result<()> {
        let seems_whole = guarded(|| {
            let is_jpeg = Format::of(bytes)? == Format::Jpeg;
            if is_jpeg {
                check_jpeg(bytes)?;
            }
            Ok(is_jpeg && jpeg::seems_whole(bytes, &mut self.jpeg))
        })?;
        if seems_whole { Ok(()) } else { self.decode(bytes).map(drop) }
    }

    /// What our own JPEG decoder did of the last picture.
    pub fn counts(&self) -> jpeg::Counts {
        self.jpeg.counts()
    }

    fn decode_part(
        &mut self,
        bytes: &[u8],
        choose: impl FnOnce((usize, usize)) -> Wanted,
    ) -> Result<Decoded> {
        self.jpeg.forget_counts();
        let format = Format::of(bytes)?;
        if format != Format::Jpeg {
            let (size, decoder) = open(format, bytes)?;
            let wanted = choose(size);
            read(size, decoder, &mut self.picture)?;
            return Ok(Decoded::whole_at_full_size(wanted));
        }
        let size = check_jpeg(bytes)?;
        let wanted = choose(size);
        let path = JpegPath::chosen();
        if path == JpegPath::Own && self.own_jpeg(bytes, size, wanted).is_some() {
            return Ok(Decoded { wanted, is_whole: false });
        }
        #[cfg(feature = "turbojpeg")]
        if path != JpegPath::Zune && turbo(bytes, size, wanted.scale, &mut self.picture).is_some() {
            return Ok(Decoded { wanted, is_whole: true });
        }
        let (size, decoder) = open(format, bytes)?;
        read(size, decoder, &mut self.picture)?;
        Ok(Decoded::whole_at_full_size(wanted))
    }

    fn own_jpeg(&mut self, bytes: &[u8], size: (usize, usize), wanted: Wanted) -> Option<()> {
        let frame = jpeg::parse(bytes, &mut self.jpeg)?;
        if (frame.height, frame.width) != size {
            return None;
        }
        let window = wanted.scale.window(wanted.window);
        let Picture { height, width, pixels } = &mut self.picture;
        (*height, *width) = (window.height, window.width);
        pixels.resize(window.height * window.width * 3, 0);
        frame.decode(wanted.scale, window, &mut self.jpeg, pixels)
    }
}

/// What is in a decoder's picture.
struct Decoded {
    /// With the scale at which it was decoded.
    wanted: Wanted,
    /// The whole picture, not only what was wanted of it.
    is_whole: bool,
}

impl Decoded {
    fn whole_at_full_size(wanted: Wanted) -> Self {
        Self { wanted: Wanted { scale: Scale::Full, ..wanted }, is_whole: true }
    }
}

/// The size of a picture, checked, and a general decoder that is ready to read it.
fn open(format: Format, bytes: &[u8]) -> Result<((usize, usize), Box<dyn ImageDecoder + '_>)> {
    let cursor = Cursor::new(bytes);
    let decoder: Box<dyn ImageDecoder + '_> = match format {
        Format::Jpeg => Box::new(JpegDecoder::new(cursor).map_err(reason)?),
        Format::Png => Box::new(PngDecoder::with_limits(cursor, Limits::default()).map_err(reason)?),
        Format::WebP => Box::new(WebPDecoder::new(cursor).map_err(reason)?),
        Format::Gif => Box::new(GifDecoder::new(cursor).map_err(reason)?),
        Format::Bmp => Box::new(BmpDecoder::new(cursor).map_err(reason)?),
    };
    let (width, height) = decoder.dimensions();
    check_size(u64::from(height), u64::from(width))?;
    // Deflate makes at most 1,032 bytes of one: a header that claims more lies.
    if format == Format::Png && decoder.total_bytes() / 32 / 1032 > bytes.len() as u64 {
        fail!("{} bytes cannot hold {width}x{height} pixels", bytes.len());
    }
    Ok(((height as usize, width as usize), decoder))
}

/// Reads a whole picture.
fn read(size: (usize, usize), decoder: Box<dyn ImageDecoder + '_>, picture: &mut Picture) -> Result<()> {
    (picture.height, picture.width) = size;
    let pixels = size.0 * size.1;
    match decoder.color_type() {
        ColorType::Rgb8 => {
            picture.pixels.resize(pixels * 3, 0);
            decoder.read_image(&mut picture.pixels).map_err(reason)?;
        }
        ColorType::L8 => {
            let mut grey = vec![0; pixels];
            decoder.read_image(&mut grey).map_err(reason)?;
            picture.pixels.clear();
            picture.pixels.extend(grey.into_iter().flat_map(|g| [g; 3]));
        }
        _ => picture.pixels = DynamicImage::from_decoder(decoder).map_err(reason)?.into_rgb8().into_raw(),
    }
    Ok(())
}

/// By libjpeg-turbo; a warning that leaves a picture is none. CMYK is left to the others.
#[cfg(feature = "turbojpeg")]
fn turbo(bytes: &[u8], of: (usize, usize), scale: Scale, picture: &mut Picture) -> Option<()> {
    let mut decompressor = turbojpeg::Decompressor::new().ok()?;
    let header = decompressor.read_header(bytes).ok()?;
    let is_cmyk = matches!(header.colorspace, turbojpeg::Colorspace::CMYK | turbojpeg::Colorspace::YCCK);
    if is_cmyk || (header.height, header.width) != of {
        return None;
    }
    decompressor.set_scaling_factor(turbojpeg::ScalingFactor::new(1, scale.divisor())).ok()?;
    let (height, width) = scale.size(of);
    picture.pixels.clear();
    picture.pixels.resize(height * width * 3, 128);
    let format = turbojpeg::PixelFormat::RGB;
    let pixels = &mut picture.pixels[..];
    let image = turbojpeg::Image { pixels, width, pitch: width * 3, height, format };
    decompressor.decompress(bytes, image).ok()?;
    (picture.height, picture.width) = (height, width);
    Some(())
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

/// Walks a JPEG's segments up to its frame header, for limits and reasons that no decoder gives. Returns (H, W).
fn check_jpeg(bytes: &[u8]) -> Result<(usize, usize)> {
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
                check_size(height.into(), width.into())?;
                return Ok((height.into(), width.into()));
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
    use crate::data::picture::Window;
    use crate::data::reference::{self, Arrays, path};

    fn decoded(bytes: &[u8]) -> Result<Picture> {
        let mut picture = Picture::default();
        decode_into(bytes, &mut picture)?;
        Ok(picture)
    }

    /// zune-jpeg has another upsampling and transform than libjpeg: at most 4 off, by 1.1 in the mean. In the default build
    /// that concerns progressive pictures, and with libjpeg-turbo none.
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
            let others_are_exact = cfg!(feature = "turbojpeg") || !file.contains("progressive");
            let exact = JpegPath::chosen() != JpegPath::Zune && others_are_exact;
            assert!(worst <= if exact { 0 } else { 4 } && mean <= 1.1, "{file}: {worst}, mean {mean}");
        }
    }

    #[test]
    fn what_cannot_be_decoded_smaller_comes_as_it_is() {
        let pictures = reference::pictures(&["bad-images"]);
        let mut compared = 0;
        for name in ["good.jpg", "progressive.jpg", "cmyk.jpg", "png_named.jpg"] {
            let Some((_, bytes)) = pictures.iter().find(|(path, _)| path.ends_with(&format!("/{name}")))
            else {
                continue;
            };
            let window = Window { y: 3, x: 2, height: 32, width: 40 };
            let mut decoder = Decoder::default();
            let part = decoder.part(bytes, |_| Wanted { window, scale: Scale::Half }).unwrap();
            let is_scaled = match (name, JpegPath::chosen()) {
                ("good.jpg", path) => path != JpegPath::Zune,
                ("progressive.jpg", path) => cfg!(feature = "turbojpeg") && path != JpegPath::Zune,
                _ => false,
            };
            let (corner, size) =
                if is_scaled { ((0.5, 0.0), (16.0, 20.0)) } else { ((0.0, 0.0), (32.0, 40.0)) };
            assert_eq!((part.corner, part.size), (corner, size), "{name}");
            compared += 1;
        }
        assert!(pictures.is_empty() || compared == 4, "{compared} pictures compared");
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
            ("text_named", "no picture"),
            ("truncated_header", "Not enough bytes"),
            ("dims_zero_height", "0 pixels"),
            ("precision12", "12 bits"),
            ("dims_65500", "over the limit"),
            ("scan_bomb", ""),
            ("arithmetic", "arithmetic coding"),
        ];
        let fine = [
            ("no_eoi", None),
            ("trailing_garbage", None),
            ("png_named", Some((48, 64))),
            ("webp_named", Some((48, 64))),
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
