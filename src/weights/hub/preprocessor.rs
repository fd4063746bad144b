//! transformers' `preprocessor_config.json`: resize, crop, rescale, normalise; each can be off.

use serde_json::Value;

use super::{Hub, IMAGENET_MEAN, IMAGENET_STD, colour, normalise};
use crate::error::{Error, Result};
use crate::fail;
use crate::recipe::EvalResize;

/// Defaults of a class of image processors.
struct Kind {
    name: &'static str,
    /// Whether a size with one number means both sides; else the shorter one.
    square: bool,
    size: usize,
    bicubic: bool,
    crop: Option<usize>,
    mean: [f64; 3],
    std: [f64; 3],
}

const HALF: [f64; 3] = [0.5; 3];
const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

const KINDS: [Kind; 6] = [
    Kind { name: "ViT", square: true, size: 224, bicubic: false, crop: None, mean: HALF, std: HALF },
    Kind { name: "DeiT", square: true, size: 256, bicubic: true, crop: Some(224), mean: HALF, std: HALF },
    Kind {
        name: "Bit",
        square: false,
        size: 224,
        bicubic: true,
        crop: Some(224),
        mean: CLIP_MEAN,
        std: CLIP_STD,
    },
    Kind { name: "Siglip", square: true, size: 224, bicubic: true, crop: None, mean: HALF, std: HALF },
    // It resizes in f32, without rounding to whole values first.
    Kind {
        name: "DINOv3ViT",
        square: true,
        size: 224,
        bicubic: false,
        crop: None,
        mean: IMAGENET_MEAN,
        std: IMAGENET_STD,
    },
    Kind {
        name: "CLIP",
        square: false,
        size: 224,
        bicubic: true,
        crop: Some(224),
        mean: CLIP_MEAN,
        std: CLIP_STD,
    },
];

/// Steps that are obeyed; any other step that is on is refused. Pictures always become RGB.
const STEPS: [&str; 5] = ["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"];

/// Sides of a picture.
#[derive(Clone, Copy, PartialEq)]
enum Size {
    Shorter(usize),
    Both(usize, usize),
}

/// Fills in how pictures are prepared. An unsupported preparation is an error only when a picture is to be
/// fed.
pub(super) fn read(hub: &mut Hub, json: &Value) -> Result<()> {
    let kind = ["image_processor_type", "feature_extractor_type"].iter().find_map(|key| json[*key].as_str());
    let bare = kind.map(|name| {
        let name = name.trim_end_matches("Pil").trim_end_matches("Fast");
        name.strip_suffix("ImageProcessor").or(name.strip_suffix("FeatureExtractor")).unwrap_or(name)
    });
    let known = bare.map_or(Some(&KINDS[0]), |name| KINDS.iter().find(|k| k.name == name));
    let Some(known) = known else {
        hub.unprepared =
            Some(format!("`image_processor_type` is `{}`, which is not known", kind.unwrap_or_default()));
        return Ok(());
    };
    let on = |key: &str, default: bool| match &json[key] {
        Value::Null => Ok(default),
        Value::Bool(on) => Ok(*on),
        other => Err(Error::new(format!("`{key}` is {other}, not true or false"))),
    };

    // In units of u8 pixels, whichever steps are off.
    let unit = match (on("do_rescale", true)?, &json["rescale_factor"]) {
        (false, _) => 1.0,
        (true, Value::Null) => 1.0 / 255.0,
        (true, factor) => match factor.as_f64().filter(|f| *f > 0.0 && f.is_finite()) {
            Some(factor) => factor,
            None => fail!("`rescale_factor` is {factor}"),
        },
    };
    let (mean, std) = match on("do_normalize", true)? {
        true => (
            colour(json, "image_mean")?.unwrap_or(known.mean),
            colour(json, "image_std")?.unwrap_or(known.std),
        ),
        false => ([0.0; 3], [1.0; 3]),
    };
    hub.normalise = Some(normalise(mean, std, unit)?);

    match geometry(known, json, &on)? {
        Ok((resize, kept, of)) => {
            hub.resize = Some(resize);
            hub.crop(kept.0, of);
            if json["absent"] == true {
                return Ok(());
            }
            let image = hub.image.unwrap_or(kept);
            hub.pictures = Some(kept);
            if image != kept {
                hub.unprepared = Some(format!(
                    "it makes pictures of {}x{}, and the model takes {}x{}",
                    kept.0, kept.1, image.0, image.1
                ));
            }
        }
        Err(reason) => hub.unprepared = Some(reason),
    }
    Ok(())
}

/// How a picture is resized, which part is kept, and its height before the crop; or why it is not supported.
type Geometry = std::result::Result<(EvalResize, (usize, usize), usize), String>;

fn geometry(kind: &Kind, json: &Value, on: &dyn Fn(&str, bool) -> Result<bool>) -> Result<Geometry> {
    let other = json.as_object().into_iter().flatten();
    let other = other
        .filter(|(key, value)| key.starts_with("do_") && **value == true && !STEPS.contains(&key.as_str()));
    if let Some((key, _)) = other.into_iter().next() {
        return Ok(Err(format!("`{key}` is true, which is not supported")));
    }
    if !json["crop_pct"].is_null() {
        return Ok(Err(format!("`crop_pct` is {}, which is not supported", json["crop_pct"])));
    }
    if !on("do_resize", true)? {
        return Ok(Err("`do_resize` is false: pictures would have to be of one size".into()));
    }
    let default = if kind.square { Size::Both(kind.size, kind.size) } else { Size::Shorter(kind.size) };
    let Some(size) = size_of(&json["size"], kind.square, default) else {
        return Ok(Err(format!("`size` is {}, which is not supported", json["size"])));
    };
    let cropped = match on("do_center_crop", kind.crop.is_some())? {
        true => {
            let side = kind.crop.unwrap_or(kind.size);
            match size_of(&json["crop_size"], true, Size::Both(side, side)) {
                Some(Size::Both(h, w)) => Some((h, w)),
                _ => return Ok(Err(format!("`crop_size` is {}, which is not supported", json["crop_size"]))),
            }
        }
        false => None,
    };
    let bicubic = match json["resample"].as_u64() {
        None => kind.bicubic,
        Some(2) => false,
        Some(3) => true,
        Some(other) => {
            return Ok(Err(format!("`resample` is {other}; 2 (bilinear) and 3 (bicubic) are supported")));
        }
    };
    let squash = if bicubic { EvalResize::SquashBicubic } else { EvalResize::SquashSmooth };
    let centre = if bicubic { EvalResize::Center } else { EvalResize::CenterBilinear };
    Ok(match (size, cropped) {
        (Size::Both(h, w), None) => Ok((squash, (h, w), h)),
        (Size::Both(h, w), Some((ch, cw))) if ch <= h && cw <= w && ch * w == cw * h => {
            Ok((squash, (ch, cw), h))
        }
        (Size::Shorter(s), Some((ch, cw))) if ch == cw && ch <= s => Ok((centre, (ch, cw), s)),
        (Size::Shorter(s), None) => Err(format!(
            "`size` makes the shorter side {s} and nothing is cropped: pictures would differ in size"
        )),
        (_, Some((ch, cw))) => Err(format!("`crop_size` of {ch}x{cw} does not fit `size` {}", json["size"])),
    })
}

fn size_of(value: &Value, square: bool, default: Size) -> Option<Size> {
    let side = |value: &Value| value.as_u64().filter(|s| *s > 0).map(|s| s as usize);
    match value {
        Value::Null => Some(default),
        Value::Object(sides) if sides.values().filter(|v| !v.is_null()).count() == 1 => {
            side(&value["shortest_edge"]).map(Size::Shorter)
        }
        Value::Object(sides) if sides.values().filter(|v| !v.is_null()).count() == 2 => {
            Some(Size::Both(side(&value["height"])?, side(&value["width"])?))
        }
        Value::Object(_) => None,
        Value::Array(sides) => match sides.as_slice() {
            [h, w] => Some(Size::Both(side(h)?, side(w)?)),
            _ => None,
        },
        one if square => side(one).map(|s| Size::Both(s, s)),
        one => side(one).map(Size::Shorter),
    }
}
