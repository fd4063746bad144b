//! Decodes encoded bytes to RGB pixels. The content decides the format, not the name.
//!
//! Grey becomes three equal channels, alpha is dropped (not composited), 16 bits become 8, CMYK is converted,
//! and of an animation the first frame is taken. The EXIF orientation is ignored, as in all reference
//! pipelines, unless a [`Decoder`] is told to obey it. [`header`] is read first, and refuses pictures that
//! are too large before anything is allocated for them. Broken input is an error that says what is wrong; a
//! decoder's panic becomes an error, too. A JPEG stream that ends early is accepted if it gives a whole
//! picture (the rest is grey).
//!
//! Our own decoder ([`jpeg`]) reads JPEG, with libjpeg's pixels; [`tiff`] reads
//! TIFF, and the crate `image` the rest. [`JpegPath`] chooses another JPEG decoder by name, for comparisons.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use image::codecs::bmp::BmpDecoder;
use image::codecs::gif::GifDecoder;
use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{ColorType, ImageDecoder, Limits};

use crate::error::{Error, Result};
use crate::fail;

use super::picture::{Part, Picture, Scale, View, Wanted, room};
use super::turn::Turn;
use super::{jpeg, tags, tiff};

pub use super::header::{Format, Header, MAX_PIXELS, header};

/// Which decoder reads JPEG. `VITRUM_JPEG` chooses, for comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JpegPath {
    /// Our decoder.
    Own,
    /// zune-jpeg, through the crate `image`. It does not support all samplings and scans.
    Zune,
    /// libjpeg-turbo, and our decoder for pictures that it refuses.
    #[cfg(feature = "turbojpeg")]
    Turbo,
}

impl JpegPath {
    /// The decoder that this process uses. An unknown name selects our own.
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
            JpegPath::Own => "own",
            JpegPath::Zune => "zune-jpeg, by crate image",
            #[cfg(feature = "turbojpeg")]
            JpegPath::Turbo => "libjpeg-turbo",
        }
    }
}

/// Decodes a whole picture into `picture`, whose memory is reused. A worker keeps a [`Decoder`] instead.
pub fn decode_into(bytes: &[u8], picture: &mut Picture) -> Result<()> {
    let mut decoder = Decoder::default();
    let view = decoder.decode(bytes)?;
    picture.reset(view.size())?;
    view.copy_to(&mut picture.pixels);
    Ok(())
}

/// Memory that a worker reuses for every picture.
#[derive(Debug, Default)]
pub struct Decoder {
    jpeg: jpeg::JpegScratch,
    picture: Picture,
    /// Samples that are not 8-bit RGB yet.
    samples: Vec<u8>,
    /// The picture after turning.
    turned: Vec<u8>,
    exif: bool,
}

/// How a stored picture of a format is turned. Pillow always turns TIFF, and so does every program that reads
/// it with Pillow.
fn turn(format: Format, bytes: &[u8], exif: bool) -> Turn {
    if exif || format == Format::Tiff { Turn::of(tags::orientation(format, bytes)) } else { Turn::default() }
}

/// (H, W) of the picture that a [`Decoder`] makes; `exif`: see [`Decoder::upright`].
pub fn size(bytes: &[u8], exif: bool) -> Result<(usize, usize)> {
    let Header { format, height, width } = header(bytes)?;
    Ok(turn(format, bytes, exif).size((height, width)))
}

impl Decoder {
    /// A decoder that turns pictures by their EXIF orientation if `exif`.
    pub fn upright(exif: bool) -> Self {
        Self { exif, ..Self::default() }
    }

    /// Sets whether pictures are turned from now on.
    pub fn set_exif(&mut self, exif: bool) {
        self.exif = exif;
    }

    /// Whether this decoder turns the picture.
    pub fn turns(&self, bytes: &[u8]) -> bool {
        Format::of(bytes).is_ok_and(|format| turn(format, bytes, self.exif) != Turn::default())
    }

    /// Decodes a whole picture.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<View<'_>> {
        Ok(self.part(bytes, Wanted::whole)?.view)
    }

    /// Decodes the part that `choose` picks; `choose` gets the picture's (H, W) and is called once. If no
    /// decoder can decode this picture at the chosen scale, the part comes at full size.
    pub fn part(&mut self, bytes: &[u8], choose: impl FnOnce((usize, usize)) -> Wanted) -> Result<Part<'_>> {
        let (Decoded { wanted: Wanted { window, scale }, is_whole }, turn) = guarded(|| {
            let header = header(bytes)?;
            let stored = (header.height, header.width);
            let turn = turn(header.format, bytes, self.exif);
            let Wanted { window, scale } = choose(turn.size(stored));
            let wanted = Wanted { window: turn.stored(window, stored), scale };
            Ok((self.decode_part(bytes, header, wanted)?, turn))
        })?;
        let mut view = self.picture.view();
        if is_whole {
            view = view.shows(scale.window(window));
        }
        Ok(turn.upright(Part::scaled(view, window, scale), &mut self.turned))
    }

    /// Checks whether a picture can be kept as it is. A plain JPEG is checked by its structure alone
    /// ([`jpeg::seems_whole`]); everything else, and a JPEG with anything unusual, by decoding it. Only
    /// [`Decoder::decode`] finds damage inside a complete scan.
    pub fn verify(&mut self, bytes: &[u8]) -> Result<()> {
        let seems_whole = guarded(|| {
            let is_jpeg = header(bytes)?.format == Format::Jpeg;
            Ok(is_jpeg && jpeg::seems_whole(bytes, &mut self.jpeg))
        })?;
        if seems_whole { Ok(()) } else { self.decode(bytes).map(drop) }
    }

    /// What our own JPEG decoder did for the last picture.
    pub fn counts(&self) -> jpeg::Counts {
        self.jpeg.counts()
    }

    /// Bytes of memory that are kept for the next picture.
    pub fn memory(&self) -> usize {
        self.jpeg.memory() + self.picture.pixels.capacity() + self.samples.capacity() + self.turned.capacity()
    }

    fn decode_part(&mut self, bytes: &[u8], header: Header, wanted: Wanted) -> Result<Decoded> {
        self.jpeg.forget_counts();
        let Header { format, height, width } = header;
        let size = (height, width);
        match (format, JpegPath::chosen()) {
            #[cfg(feature = "turbojpeg")]
            (Format::Jpeg, JpegPath::Turbo)
                if turbo(bytes, size, wanted.scale, &mut self.picture).is_some() =>
            {
                return Ok(Decoded { wanted, is_whole: true });
            }
            (Format::Jpeg, path) if path != JpegPath::Zune => {
                self.own_jpeg(bytes, size, wanted)?;
                return Ok(Decoded { wanted, is_whole: false });
            }
            (Format::Tiff, _) => tiff::decode(bytes, size, &mut self.picture)?,
            _ => self.read(open(format, bytes)?, size)?,
        }
        Ok(Decoded { wanted: Wanted { scale: Scale::Full, ..wanted }, is_whole: true })
    }

    /// Decodes the window at the scale by the fast path, if it supports this picture.
    fn own_jpeg(&mut self, bytes: &[u8], size: (usize, usize), wanted: Wanted) -> Result<()> {
        let Self { jpeg: scratch, picture, .. } = self;
        let window = wanted.scale.window(wanted.window);
        let common = jpeg::parse(bytes, scratch).filter(|frame| (frame.height, frame.width) == size);
        if let Some(frame) = common {
            picture.reset((window.height, window.width))?;
            if frame.decode(wanted.scale, window, scratch, &mut picture.pixels).is_some() {
                return Ok(());
            }
        }
        let collected = jpeg::collect(bytes, size, scratch)?;
        picture.reset((window.height, window.width))?;
        collected.decode(wanted.scale, window, scratch, &mut picture.pixels);
        Ok(())
    }

    /// Reads a whole picture with the crate `image`.
    fn read(&mut self, decoder: Box<dyn ImageDecoder + '_>, size: (usize, usize)) -> Result<()> {
        let Self { picture, samples, .. } = self;
        let (width, height) = decoder.dimensions();
        if (height as usize, width as usize) != size {
            fail!("damaged: its header says {}x{} pixels, its data {width}x{height}", size.1, size.0);
        }
        picture.reset(size)?;
        let colours = decoder.color_type();
        if colours == ColorType::Rgb8 {
            return decoder.read_image(&mut picture.pixels).map_err(reason);
        }
        let step = usize::from(colours.bytes_per_pixel());
        room(samples, size.0 * size.1 * step)?;
        decoder.read_image(samples).map_err(reason)?;
        // The high bytes of 16-bit samples, rounded.
        let deep = |pixel: &[u8], at: usize| {
            let value = u32::from(u16::from_ne_bytes([pixel[at * 2], pixel[at * 2 + 1]]));
            ((value + 128) / 257) as u8
        };
        let convert: &dyn Fn(&[u8]) -> [u8; 3] = match colours {
            ColorType::L8 | ColorType::La8 => &|pixel| [pixel[0]; 3],
            ColorType::Rgba8 => &|pixel| [pixel[0], pixel[1], pixel[2]],
            ColorType::L16 | ColorType::La16 => &|pixel| [deep(pixel, 0); 3],
            ColorType::Rgb16 | ColorType::Rgba16 => &|pixel| [0, 1, 2].map(|c| deep(pixel, c)),
            other => fail!("pixels of type {other:?} are not supported"),
        };
        for (pixel, from) in picture.pixels.chunks_exact_mut(3).zip(samples.chunks_exact(step)) {
            pixel.copy_from_slice(&convert(from));
        }
        Ok(())
    }
}

/// The contents of a decoder's picture.
struct Decoded {
    /// The part, with the scale at which it was decoded.
    wanted: Wanted,
    /// Whether the whole picture was decoded, not only the wanted part.
    is_whole: bool,
}

/// A general decoder, ready to read a picture whose header has been checked.
fn open(format: Format, bytes: &[u8]) -> Result<Box<dyn ImageDecoder + '_>> {
    let cursor = Cursor::new(bytes);
    let mut decoder: Box<dyn ImageDecoder + '_> = match format {
        Format::Jpeg => Box::new(JpegDecoder::new(cursor).map_err(reason)?),
        Format::Png => Box::new(PngDecoder::with_limits(cursor, Limits::default()).map_err(reason)?),
        Format::WebP => Box::new(WebPDecoder::new(cursor).map_err(reason)?),
        Format::Gif => Box::new(GifDecoder::new(cursor).map_err(reason)?),
        Format::Bmp => Box::new(BmpDecoder::new(cursor).map_err(reason)?),
        Format::Tiff => fail!("TIFF has a decoder of its own"),
    };
    let (width, height) = decoder.dimensions();
    let total = decoder.total_bytes();
    // A frame of an animation may be larger than its picture.
    let mut limits = Limits::default();
    limits.max_alloc = Some(2 * total + (1 << 20));
    decoder.set_limits(limits).map_err(reason)?;
    // The densest codes of these formats: runs in BMP and GIF; Deflate packs 1,032 bytes into one; WebP uses
    // less than a bit per pixel.
    let densest = if format == Format::WebP { 1 << 20 } else { 32 * 1032 };
    if total / densest > bytes.len() as u64 {
        fail!("{} bytes cannot hold {width}x{height} pixels", bytes.len());
    }
    // The decoders allocate unconditionally; a failed allocation must be an error here.
    if Vec::<u8>::new().try_reserve_exact(total as usize * 2).is_err() {
        fail!("no memory for {width}x{height} pixels");
    }
    Ok(decoder)
}

/// libjpeg-turbo; a warning that leaves a picture is ignored. CMYK is left to the other decoders.
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

fn reason(error: image::ImageError) -> Error {
    let text = error.to_string();
    let text = text.strip_prefix("Format error decoding ").unwrap_or(&text);
    Error::new(format!("damaged {}", text.trim()))
}

/// Runs a decoder. A panic becomes an error about the picture.
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
            // zune-jpeg has another upsampling and transform.
            let (most, mean_most) = if JpegPath::chosen() == JpegPath::Zune { (4, 1.1) } else { (0, 0.0) };
            assert!(worst <= most && mean <= mean_most, "{file}: {worst}, mean {mean}");
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
            let is_scaled = name != "png_named.jpg" && JpegPath::chosen() != JpegPath::Zune;
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
            ("text_named", "not a picture"),
            ("truncated_header", "ends before component 1"),
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
            // The same scene in another coding must look alike: the mean difference comes from colours, not
            // from structure.
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

    /// A TIFF by its specification: tags with type, count and values, then one strip.
    fn tiff(is_little: bool, size: (u16, u16), tags: &[(u16, &[u16])], strip: &[u8]) -> Vec<u8> {
        let word = |n: u16| if is_little { n.to_le_bytes() } else { n.to_be_bytes() };
        let long = |n: u32| if is_little { n.to_le_bytes() } else { n.to_be_bytes() };
        let mut all: Vec<(u16, Vec<u16>)> = vec![
            (256, vec![size.1]),
            (257, vec![size.0]),
            (259, vec![1]),
            (273, vec![]),
            (278, vec![size.0]),
            (279, vec![strip.len() as u16]),
        ];
        all.extend(tags.iter().map(|(tag, values)| (*tag, values.to_vec())));
        all.sort();
        let (mut head, mut far) = (vec![], vec![]);
        let far_at = 8 + 2 + all.len() * 12 + 4;
        head.extend(if is_little { *b"II" } else { *b"MM" });
        head.extend(word(42).into_iter().chain(long(8)).chain(word(all.len() as u16)));
        for (tag, values) in &all {
            head.extend(word(*tag).into_iter().chain(word(if *tag == 273 { 4 } else { 3 })));
            head.extend(long(values.len().max(1) as u32));
            let bytes: Vec<u8> = values.iter().flat_map(|v| word(*v)).collect();
            match bytes.len() {
                // The strip comes last.
                0 => head.extend(long((far_at + 4096) as u32)),
                1..=4 => head.extend(bytes.iter().copied().chain([0; 4]).take(4)),
                _ => {
                    head.extend(long((far_at + far.len()) as u32));
                    far.extend(bytes);
                }
            }
        }
        head.extend([0; 4]);
        far.resize(4096, 0);
        [head, far, strip.to_vec()].concat()
    }

    #[test]
    fn tiff_of_eight_bits_is_read_and_the_rest_refused_by_name() {
        let rgb: Vec<u8> = (0..5 * 4 * 3).map(|i| (i * 7) as u8).collect();
        let with_alpha: Vec<u8> = rgb.chunks(3).flat_map(|p| [p[0], p[1], p[2], 9]).collect();
        let grey: Vec<u8> = rgb.iter().step_by(3).copied().collect();
        let threefold = |f: fn(u8) -> [u8; 3]| grey.iter().flat_map(|g| f(*g)).collect::<Vec<u8>>();
        let colours: Vec<u16> =
            (0..768).map(|i| (i % 256 * 257) as u16 ^ (i / 256 * 0xFF00) as u16).collect();
        let palette = threefold(|g| [g, g ^ 0xFF, g ^ 0xFE]);
        let eight: &[u16] = &[8, 8, 8, 8];
        for is_little in [true, false] {
            let read = |tags: &[(u16, &[u16])], strip: &[u8]| decoded(&tiff(is_little, (5, 4), tags, strip));
            for (tags, strip, expected) in [
                (vec![(258, &eight[..3]), (262, &[2][..]), (277, &[3])], &rgb, rgb.clone()),
                (vec![(258, eight), (262, &[2]), (277, &[4]), (338, &[2])], &with_alpha, rgb.clone()),
                (vec![(258, &[8]), (262, &[1])], &grey, threefold(|g| [g; 3])),
                (vec![(258, &[8]), (262, &[0])], &grey, threefold(|g| [255 - g; 3])),
                (vec![(258, &[8]), (262, &[3]), (320, &colours)], &grey, palette.clone()),
            ] {
                let picture = read(&tags, strip).unwrap_or_else(|e| panic!("{tags:?}: {e}"));
                assert_eq!((picture.height, picture.width), (5, 4));
                assert_eq!(picture.pixels, expected, "{tags:?}");
            }
            for (tags, reason) in [
                (vec![(258, &[16][..]), (262, &[1])], "16 bits per sample"),
                (vec![(258, &[8]), (262, &[3])], "no palette"),
                (vec![(258, eight), (262, &[5]), (277, &[4])], "CMYK"),
                (vec![(258, &eight[..3]), (262, &[2]), (277, &[3]), (284, &[2])], "separate planes"),
            ] {
                let error = read(&tags, &with_alpha).expect_err(reason).to_string();
                assert!(error.contains(reason), "{error}");
            }
            // TIFF is always turned, as in Pillow.
            let turned = read(&[(258, &eight[..3]), (262, &[2]), (277, &[3]), (274, &[6])], &rgb).unwrap();
            assert_eq!((turned.height, turned.width, &turned.pixels[..3]), (4, 5, &rgb[4 * 4 * 3..][..3]));
        }
        let jpeg_inside = tiff(true, (5, 4), &[(258, &[8]), (262, &[1])], &grey);
        let at = jpeg_inside.windows(4).position(|w| w == [3, 1, 3, 0]).unwrap();
        let mut jpeg_inside = jpeg_inside;
        jpeg_inside[at + 8] = 7;
        assert!(decoded(&jpeg_inside).unwrap_err().to_string().contains("compression 7"));
    }

    /// An EXIF block with only the orientation.
    fn exif(orientation: u8) -> Vec<u8> {
        [b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0", &[orientation][..], &[0; 6]].concat()
    }

    #[test]
    fn exif_turns_jpeg_png_and_webp_if_it_is_asked_for() {
        let pixels: Vec<u8> =
            (0..40 * 56 * 3).map(|i| (i / 3 % 56 * 3 + i / 168 * 2 + i % 3 * 20) as u8).collect();
        let stored = View::new(&pixels, 40, 56);
        let mut jpeg = vec![];
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 95);
        image::ImageEncoder::write_image(encoder, &pixels, 56, 40, image::ExtendedColorType::Rgb8).unwrap();
        let mut webp = vec![];
        let encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut webp);
        image::ImageEncoder::write_image(encoder, &pixels, 56, 40, image::ExtendedColorType::Rgb8).unwrap();
        let png = crate::data::encode_png(stored).unwrap();
        for orientation in 0..=9u8 {
            let exif = exif(orientation);
            let segment =
                [b"\xFF\xE1".as_slice(), &(exif.len() as u16 + 8).to_be_bytes(), b"Exif\0\0", &exif];
            let chunk = [&(exif.len() as u32).to_be_bytes()[..], b"eXIf", &exif, &[0; 4]].concat();
            // After the extended header, which has a flag for it.
            let body = [&b"VP8X\x0A\0\0\0\x08\0\0\0\x37\0\0\x27\0\0"[..], &webp[12..], b"EXIF"].concat();
            let body = [body, (exif.len() as u32).to_le_bytes().to_vec(), exif.clone()].concat();
            let length = (body.len() as u32 + 4).to_le_bytes();
            let files = [
                ("jpeg", [&jpeg[..2], &segment.concat(), &jpeg[2..]].concat()),
                ("png", [&png[..33], &chunk, &png[33..]].concat()),
                ("webp", [b"RIFF".as_slice(), &length, b"WEBP", &body].concat()),
            ];
            for (name, bytes) in files {
                let plain = decoded(&bytes).unwrap_or_else(|e| panic!("{name} {orientation}: {e}"));
                assert_eq!((plain.height, plain.width), (40, 56), "{name}");
                let turn = Turn::of(orientation);
                let mut turned = vec![];
                let expected = turn.upright(plain.view().into(), &mut turned).view;
                let mut decoder = Decoder::upright(true);
                assert_eq!(size(&bytes, true).unwrap(), expected.size(), "{name} {orientation}");
                assert_eq!(decoder.turns(&bytes), (2..=8).contains(&orientation), "{name} {orientation}");
                let same = |view: View, expected: View| {
                    view.size() == expected.size() && (0..view.height).all(|y| view.row(y) == expected.row(y))
                };
                assert!(same(decoder.decode(&bytes).unwrap(), expected), "{name} {orientation}");
                let window = Window { y: 7, x: 11, height: 19, width: 24 };
                let part = decoder.part(&bytes, |of| {
                    assert_eq!(of, expected.size());
                    Wanted { window, scale: Scale::Full }
                });
                assert!(same(part.unwrap().view, expected.shows(window)), "{name} {orientation}");
            }
            // At half the size, the smaller picture is turned.
            let bytes = [&jpeg[..2], &segment.concat(), &jpeg[2..]].concat();
            let mut decoders = [Decoder::default(), Decoder::upright(true)];
            let whole = |of| Wanted { window: Window::whole(of), scale: Scale::Half };
            let [plain, upright] = &mut decoders;
            let plain = plain.part(&bytes, whole).unwrap();
            let mut turned = vec![];
            let expected = Turn::of(orientation).upright(plain, &mut turned);
            let upright = upright.part(&bytes, whole).unwrap();
            assert_eq!((upright.corner, upright.size), (expected.corner, expected.size), "{orientation}");
            assert_eq!(upright.view.row(3), expected.view.row(3), "{orientation}");
        }
    }
}
