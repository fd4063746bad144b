//! Converts a record on its way into a shard: checks it and keeps its bytes, resizes it, or re-encodes it.

use std::borrow::Cow;
use std::str::FromStr;

use image::ImageEncoder;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use rayon::prelude::*;

use crate::data::augment::resize::{self, Filter};
use crate::data::decode::{self, Decoder, MAX_PIXELS};
use crate::data::picture::{Picture, View, Window};
use crate::data::shard::Record;
use crate::data::source::{Item, Source};
use crate::error::{Error, Result};
use crate::fail;

use super::{Format, LARGEST_RAW_SIDE, PackOptions};

/// `--size`: the shorter side, or height and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Pixels of the shorter side.
    Shorter(usize),
    /// (H, W) in pixels.
    Exactly(usize, usize),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |t: &str| t.parse().ok().filter(|n| (1..=16_384).contains(n));
        let target = match text.split_once('x') {
            None => side(text).map(Target::Shorter),
            Some((height, width)) => side(height).zip(side(width)).map(|(h, w)| Target::Exactly(h, w)),
        };
        target.ok_or_else(|| "write `N` for the shorter side, or `HxW`, in pixels".into())
    }
}

/// Quality of re-encoded JPEG if the user gives none.
const DEFAULT_QUALITY: u8 = 92;

/// The conversion that one pack applies to every record.
pub(super) struct Converter {
    form: Form,
    /// Whether pictures are turned by their EXIF orientation.
    exif: bool,
}

enum Form {
    /// u8 pixels of this size.
    Raw { height: usize, width: usize, resize: bool },
    /// Encoded pictures; if both are `None`, the bytes are kept.
    Encoded { size: Option<Target>, quality: Option<u8> },
}

impl Converter {
    pub(super) fn new(source: &Source, options: PackOptions) -> Result<Self> {
        let exif = options.exif;
        Ok(Self { form: Form::new(source, options)?, exif })
    }

    /// Whether a [`super::Decoder`] for it turns pictures.
    pub(super) fn exif(&self) -> bool {
        self.exif
    }

    pub(super) fn format(&self) -> Format {
        match self.form {
            Form::Raw { .. } => Format::Raw,
            Form::Encoded { .. } => Format::Jpeg,
        }
    }

    /// (H, W) of raw pixels.
    pub(super) fn image(&self) -> Option<(usize, usize)> {
        match self.form {
            Form::Raw { height, width, .. } => Some((height, width)),
            Form::Encoded { .. } => None,
        }
    }

    /// The bytes to store. A picture whose bytes are kept is verified ([`Decoder::verify`]); others are
    /// decoded.
    pub(super) fn convert<'a>(&self, record: Record<'a>, decoder: &mut Decoder) -> Result<Cow<'a, [u8]>> {
        // A picture whose bytes are kept needs no copy.
        match (&self.form, &record) {
            (Form::Encoded { size: None, quality: None }, Record::Encoded(bytes))
                if !self.exif || !decoder.turns(bytes) =>
            {
                decoder.verify(bytes)?;
            }
            (Form::Raw { height, width, .. }, Record::Raw { height: h, width: w, .. })
                if (height, width) == (h, w) => {}
            _ => return self.changed(&record, decoder).map(Cow::Owned),
        }
        match record {
            Record::Raw { pixels, .. } => Ok(pixels),
            Record::Encoded(bytes) => Ok(bytes),
        }
    }

    fn changed(&self, record: &Record, decoder: &mut Decoder) -> Result<Vec<u8>> {
        let turns = matches!(record, Record::Encoded(bytes) if self.exif && decoder.turns(bytes));
        let picture = match record {
            Record::Raw { pixels, height, width } => View::new(pixels, *height, *width),
            Record::Encoded(bytes) => decoder.decode(bytes)?,
        };
        match self.form {
            Form::Raw { height, width, resize } => {
                if !resize && picture.size() != (height, width) {
                    fail!("{} pixels, not {width}x{height}", dimensions(picture.size()));
                }
                Ok(fitted(picture, Target::Exactly(height, width))?.pixels)
            }
            Form::Encoded { size, quality } => {
                let fits = size.is_none_or(|size| goal(picture.size(), size).1 == picture.size());
                match (record, quality) {
                    (Record::Encoded(bytes), None) if fits && !turns => Ok(bytes.to_vec()),
                    // PNG stores raw pixels, which have no encoded form, without loss.
                    (Record::Raw { .. }, None) if fits => encode_png(picture),
                    _ => {
                        let fitted = match size {
                            Some(size) => fitted(picture, size)?,
                            None => fitted(picture, Target::Exactly(picture.height, picture.width))?,
                        };
                        encode_jpeg(&fitted, quality.unwrap_or(DEFAULT_QUALITY))
                    }
                }
            }
        }
    }
}

impl Form {
    fn new(source: &Source, options: PackOptions) -> Result<Self> {
        let PackOptions { format, size, quality, exif, .. } = options;
        if format == Some(Format::Raw) && quality.is_some() {
            return Err(Error::usage("`--quality` is for JPEG pictures, and raw pixels have none")
                .hint("leave out `--quality`, or use `--format jpeg`"));
        }
        // Raw pixels need one size: the one that the user gives, or the one that all pictures have.
        let raw = |(height, width), resize| Form::Raw { height, width, resize };
        match (format, size) {
            (Some(Format::Jpeg), _) => Ok(Form::Encoded { size, quality }),
            (Some(Format::Raw), Some(Target::Shorter(n))) => Ok(raw((n, n), true)),
            (Some(Format::Raw), Some(Target::Exactly(h, w))) => Ok(raw((h, w), true)),
            (Some(Format::Raw), None) => match common_size(source, exif) {
                Ok(size) => Ok(raw(size, false)),
                Err(why) => fail_raw(why),
            },
            (None, _) if quality.is_some() => Ok(Form::Encoded { size, quality }),
            (None, size) => match (common_size(source, exif), size) {
                (Ok(common), None) if small(common) => Ok(raw(common, false)),
                (Ok(common), Some(Target::Shorter(n))) if small(common) => Ok(raw((n, n), true)),
                (Ok(common), Some(Target::Exactly(h, w))) if small(common) => Ok(raw((h, w), true)),
                _ => Ok(Form::Encoded { size, quality }),
            },
        }
    }
}

fn small((height, width): (usize, usize)) -> bool {
    height.max(width) <= LARGEST_RAW_SIDE
}

fn fail_raw(why: String) -> Result<Form> {
    Err(Error::new(format!("raw pixels need one size: {why}"))
        .hint("give one with `--size N`, or keep the encoded pictures with `--format jpeg`"))
}

/// The common size (H, W) of all pictures with a readable header; else a sentence that says why there is
/// none.
fn common_size(source: &Source, exif: bool) -> Result<(usize, usize), String> {
    let size = |item: &&Item| match source.store.read(item).ok()? {
        Record::Raw { height, width, .. } => Some((height, width)),
        Record::Encoded(bytes) => decode::size(&bytes, exif).ok(),
    };
    let mut common = None;
    // Photographs usually differ within the first few, so nothing is read twice.
    let items: Vec<&Item> = source.lists().flat_map(|(_, items)| items).collect();
    let (first, rest) = items.split_at(items.len().min(8));
    for chunk in std::iter::once(first).chain(rest.chunks(1024)) {
        let sizes: Vec<_> = chunk.par_iter().map(size).collect();
        for (item, size) in chunk.iter().zip(sizes) {
            let Some(size) = size else { continue };
            let (known, name) = *common.get_or_insert((size, item.name.as_str()));
            if known != size {
                return Err(format!(
                    "`{name}` has {}, `{}` has {}",
                    dimensions(known),
                    item.name,
                    dimensions(size)
                ));
            }
        }
    }
    common.map(|(size, _)| size).ok_or_else(|| "no picture can be read".into())
}

/// Width first, as is customary.
fn dimensions((height, width): (usize, usize)) -> String {
    format!("{width}x{height}")
}

/// The size to resize to, and the size of the part that is kept.
fn goal(from: (usize, usize), target: Target) -> ((usize, usize), (usize, usize)) {
    match target {
        Target::Shorter(n) => {
            let whole = resize::covering(from, (n, n));
            (whole, whole)
        }
        Target::Exactly(h, w) => (resize::covering(from, (h, w)), (h, w)),
    }
}

/// Resizes (antialiased) so that the target is just covered, and keeps the centre.
fn fitted(picture: View, target: Target) -> Result<Picture> {
    let (whole, kept) = goal(picture.size(), target);
    let mut fitted = Picture::default();
    if (kept.0 * kept.1) as u64 > MAX_PIXELS {
        fail!(
            "{} pixels would become {}, over the limit of {} million",
            dimensions(picture.size()),
            dimensions(kept),
            MAX_PIXELS / 1_000_000
        );
    }
    fitted.reset(kept)?;
    let window = Window::centre(whole, kept);
    if whole == picture.size() {
        picture.shows(window).copy_to(&mut fitted.pixels);
    } else {
        let mut scratch = resize::ResizeScratch::default();
        resize::pil_window(picture, whole, window, Filter::Bicubic, &mut scratch, &mut fitted.pixels);
    }
    Ok(fitted)
}

fn encode_jpeg(picture: &Picture, quality: u8) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (width, height) = (picture.width as u32, picture.height as u32);
    JpegEncoder::new_with_quality(&mut bytes, quality)
        .write_image(&picture.pixels, width, height, image::ExtendedColorType::Rgb8)
        .map_err(|e| Error::new(format!("cannot be encoded: {e}")))?;
    Ok(bytes)
}

/// A picture as a PNG file.
pub fn encode_png(picture: View) -> Result<Vec<u8>> {
    let mut pixels = vec![0; picture.height * picture.width * 3];
    picture.copy_to(&mut pixels);
    let mut bytes = Vec::new();
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive)
        .write_image(&pixels, picture.width as u32, picture.height as u32, image::ExtendedColorType::Rgb8)
        .map_err(|e| Error::new(format!("cannot be encoded: {e}")))?;
    Ok(bytes)
}
