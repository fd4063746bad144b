//! The augmentation section of a recipe. Settings with a notation of their own (RandAugment's, the levels of
//! the AugReg paper) are parsed here, once.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How a picture of another size becomes the model's input, in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Crop {
    /// Pad by `pad` pixels (zeros), then a random window of the input size; larger pictures are first resized
    /// to it.
    Pad,
    /// Random area and aspect, then resize: torchvision's RandomResizedCrop.
    Torch,
    /// Random area and aspect as TensorFlow's `sample_distorted_bounding_box` draws them.
    Tf,
    /// Resize the shorter side, then take the centre.
    Center,
    /// Squash to `resize`, then a random window (big_vision's `resize_crop`).
    Resize,
    /// Shorter side to `resize`, then a random window (big_vision's `resmall_crop`).
    ResizeSmall,
    /// Shorter side to the input's, add 4 pixels of reflection, then a random window (DeiT-III).
    Simple,
}

/// The filter of a resize, for `crop = "torch"` and `"simple"`, and of geometric operations in timm's
/// RandAugment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interpolation {
    /// Linear in each direction.
    Bilinear,
    /// Cubic in each direction, with a = -0.5 as in Pillow.
    Bicubic,
    /// One of the two, drawn for each use.
    Random,
}

/// The contents of an erased box, drawn after normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EraseMode {
    /// Zeros.
    Const,
    /// One normally distributed colour.
    Rand,
    /// A normally distributed value for each element.
    Pixel,
}

/// Which system's mixing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixLaw {
    /// λ = max(a, 1-a); the partner is the sample before.
    BigVision,
    /// λ as drawn; the partner is the sample at the same position from the other end.
    Timm,
}

/// Which samples share a draw of λ and of a box.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MixMode {
    /// All samples of the batch.
    Batch,
    /// A sample and its partner, each the partner of the other (`mix_law = "timm"`).
    Pair,
    /// None.
    Elem,
}

/// Per-sample augmentation on the CPU, and mixing on the device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AugmentSection {
    /// How a window is cut out of a picture and brought to the input size.
    pub crop: Crop,
    /// For `crop = "pad"`: pixels added on each side, 0 to 4096.
    pub pad: usize,
    /// For crops with a random area: smallest and largest share of the picture, in (0, 1].
    pub area: (f32, f32),
    /// For `crop = "tf"` and `"torch"`: decode JPEG at 1/2, 1/4 or 1/8 of its size if the crop is at least
    /// that many times the input's size. Faster, but the pixels differ. Evaluations never do this.
    pub scaled_decode: bool,
    /// For `crop = "resize"` and `"resize_small"`: pixels to resize to before the window is cut, at least
    /// `model.image`.
    pub resize: usize,
    /// The filter for `crop = "torch"` and `"simple"`, and for geometric operations in timm's RandAugment.
    pub interpolation: Interpolation,
    /// Truncate fractions after a resize (big_vision) instead of rounding them.
    pub truncate: bool,
    /// Horizontal flip with probability 1/2.
    pub flip: bool,
    /// A level of the AugReg paper (Steiner et al. 2022): sets `randaugment` and `mixup`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// `tf(2,15)`, `tf_fixed(2,15)`, or timm's `rand-m9-mstd0.5-inc1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub randaugment: Option<RandAugment>,
    /// One of grey, solarised and blurred (Touvron et al. 2022, DeiT III).
    pub three_augment: bool,
    /// torchvision's colour jitter: half-width of brightness, contrast and saturation factors; 0: off.
    pub color_jitter: f32,
    /// Colour of pixels from outside the picture in geometric operations, if a dialect leaves it open.
    pub fill: [u8; 3],
    /// Colour jitter on pixels in `[0, 1]`: the most that is added to or subtracted from all of them, 0 to 1;
    /// 0: off.
    pub brightness: f32,
    /// Contrast about each channel's mean: half-width of the factor's range around 1, 0 to 1; 0: off.
    pub contrast: f32,
    /// Saturation in HSV: half-width of the factor's range around 1, 0 to 1; 0: off.
    pub saturation: f32,
    /// Hue in HSV: largest shift in full turns, 0 to 1; 0: off.
    pub hue: f32,
    /// Random erasing (Zhong et al. 2020): probability; 0: off.
    pub erase: f32,
    /// What fills an erased box.
    pub erase_mode: EraseMode,
    /// Smallest and largest share of the picture that is erased, 0 to 1.
    pub erase_area: (f32, f32),
    /// Samples of each picture, one after the other (repeated augmentation, Hoffer et al. 2020).
    pub repeats: usize,
    /// Beta parameter of mixup (Zhang et al. 2018); 0: off.
    pub mixup: f64,
    /// Beta parameter of CutMix (Yun et al. 2019); 0: off.
    pub cutmix: f64,
    /// Smallest and largest share of each side of a CutMix box, instead of `cutmix`'s rule; [0, 0]: that
    /// rule.
    pub cutmix_minmax: (f32, f32),
    /// Share of the batches (samples, in other modes) that are mixed.
    pub mix_prob: f32,
    /// With both on: the share that gets CutMix.
    pub mix_switch: f32,
    /// With both on: first mixup, then CutMix of the result.
    pub mix_chain: bool,
    /// Which samples share a draw of λ and of a box.
    pub mix_mode: MixMode,
    /// How λ and a sample's partner are chosen.
    pub mix_law: MixLaw,
    /// Samples among which partners are chosen; 0: the rank's batch.
    pub mix_group: usize,
}

impl Default for AugmentSection {
    fn default() -> Self {
        Self {
            crop: Crop::Tf,
            pad: 0,
            area: (0.05, 1.0),
            scaled_decode: false,
            resize: 0,
            interpolation: Interpolation::Bilinear,
            truncate: false,
            flip: true,
            level: None,
            randaugment: None,
            three_augment: false,
            color_jitter: 0.0,
            fill: [128; 3],
            brightness: 0.0,
            contrast: 0.0,
            saturation: 0.0,
            hue: 0.0,
            erase: 0.0,
            erase_mode: EraseMode::Pixel,
            erase_area: (0.02, 1.0 / 3.0),
            repeats: 1,
            mixup: 0.0,
            cutmix: 0.0,
            cutmix_minmax: (0.0, 0.0),
            mix_prob: 1.0,
            mix_switch: 0.5,
            mix_chain: false,
            mix_mode: MixMode::Batch,
            mix_law: MixLaw::BigVision,
            mix_group: 0,
        }
    }
}

impl AugmentSection {
    /// No augmentation: the centre of each picture.
    pub fn none() -> Self {
        Self { crop: Crop::Center, flip: false, ..Self::default() }
    }

    /// With `level` replaced by the settings that it stands for.
    pub fn effective(&self) -> Self {
        let Some(level) = self.level else { return self.clone() };
        let (magnitude, mixup) = level.settings();
        let randaugment = magnitude.map(|m| RandAugment {
            dialect: Dialect::Tf { fixed: false },
            layers: 2,
            magnitude: m,
            ..RandAugment::default()
        });
        Self { randaugment, mixup, ..self.clone() }
    }

    /// Whether samples are mixed with each other.
    pub(crate) fn mixes(&self) -> bool {
        self.mixup > 0.0 || self.cutmix > 0.0 || self.cutmix_minmax.1 > 0.0
    }

    /// Refuses contradictions, and names the key to change.
    pub(super) fn check(&self) -> Result<()> {
        let of = self.effective();
        if self.level.is_some() {
            let differs = (self.randaugment.is_some() && self.randaugment != of.randaugment)
                || (self.mixup != 0.0 && self.mixup != of.mixup);
            if differs {
                return Err(Error::usage(
                    "`augment.level` sets `augment.randaugment` and `augment.mixup`, which are set \
                                         to something else",
                )
                .hint("remove `augment.level`, or the two others"));
            }
        }
        let sized = matches!(self.crop, Crop::Resize | Crop::ResizeSmall);
        if sized && self.resize == 0 {
            return Err(Error::usage("`augment.crop` resizes first, but `augment.resize` is 0")
                .hint("give the size in pixels, as in `--set augment.resize=448`"));
        }
        if !sized && self.resize > 0 {
            return Err(Error::usage("`augment.resize` is set, but `augment.crop` does not use it")
                .hint("use `--set augment.crop=resize` or `--set augment.crop=resize_small`"));
        }
        if self.scaled_decode && !matches!(self.crop, Crop::Tf | Crop::Torch) {
            return Err(Error::usage("`augment.scaled_decode` is set, but `augment.crop` draws no window")
                .hint("use `--set augment.crop=tf` or `--set augment.crop=torch`"));
        }
        let mutual = self.mix_mode == MixMode::Pair || self.mix_chain;
        if mutual && self.mix_law == MixLaw::BigVision {
            return Err(Error::usage(
                "`mix_mode = \"pair\"` and `mix_chain` need samples that are each other's partners",
            )
            .hint("use `--set augment.mix_law=timm`"));
        }
        if self.mix_chain && (of.mixup == 0.0 || of.cutmix == 0.0) {
            return Err(Error::usage("`augment.mix_chain` needs both `augment.mixup` and `augment.cutmix`")
                .hint("use `--set augment.mixup=0.8` and `--set augment.cutmix=1.0`"));
        }
        if !(1..=64).contains(&self.repeats) {
            return Err(Error::usage(format!("`augment.repeats` is {}", self.repeats)).hint("use 1 to 64"));
        }
        for (key, (low, high)) in [("erase_area", self.erase_area), ("cutmix_minmax", self.cutmix_minmax)] {
            if !(0.0..=high).contains(&low) || high > 1.0 {
                return Err(Error::usage(format!("`augment.{key}` is [{low}, {high}]"))
                    .hint("give the smallest and the largest share, as in `[0.02,0.33]`"));
            }
        }
        Ok(())
    }
}

/// Which system's RandAugment (Cubuk et al. 2020).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dialect {
    /// big_vision's TensorFlow code, with its bugs or with them fixed.
    Tf {
        /// Without the bugs.
        fixed: bool,
    },
    /// timm's: each operation with probability `prob`, magnitudes normally distributed about the given one.
    Timm {
        /// `inc1`: a larger magnitude makes every operation stronger.
        increasing: bool,
        /// `mstd`: standard deviation of the magnitude.
        std: f64,
        /// `mmax`: largest magnitude.
        most: f64,
        /// `p`: probability of each operation.
        prob: f64,
    },
}

/// RandAugment's settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RandAugment {
    /// The system whose operations and magnitudes are used.
    pub dialect: Dialect,
    /// Operations per sample.
    pub layers: usize,
    /// On the scale of 10 that timm and big_vision use.
    pub magnitude: f64,
    /// timm's `3a`: colour jitter stays on.
    pub keeps_jitter: bool,
}

impl Default for RandAugment {
    fn default() -> Self {
        Self { dialect: Dialect::Tf { fixed: false }, layers: 2, magnitude: 0.0, keeps_jitter: false }
    }
}

impl FromStr for RandAugment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is not a RandAugment setting: write `tf(2,15)`, `tf_fixed(2,15)` or timm's `rand-m9-mstd0.5-inc1`"
            )
        };
        if let Some(settings) = text.strip_prefix("rand") {
            return timm(settings).ok_or_else(wrong);
        }
        let (name, rest) = text.split_once('(').ok_or_else(wrong)?;
        let (layers, magnitude) = rest.strip_suffix(')').and_then(|r| r.split_once(',')).ok_or_else(wrong)?;
        let fixed = match name.trim() {
            "tf" => false,
            "tf_fixed" => true,
            _ => return Err(wrong()),
        };
        let layers = layers.trim().parse().ok().filter(|n| (1..=16).contains(n)).ok_or_else(wrong)?;
        let magnitude =
            magnitude.trim().parse().ok().filter(|m| (0.0..=30.0).contains(m)).ok_or_else(wrong)?;
        Ok(Self { dialect: Dialect::Tf { fixed }, layers, magnitude, keeps_jitter: false })
    }
}

/// What follows `rand`: `-mM`, `-nN`, `-mstdS`, `-mmaxX`, `-pP`, `-incI`, `-3a`.
fn timm(settings: &str) -> Option<RandAugment> {
    let (mut increasing, mut std, mut most, mut prob) = (false, 0.0, 10.0, 0.5);
    let mut of = RandAugment { magnitude: 10.0, ..RandAugment::default() };
    for part in settings.split('-').filter(|p| !p.is_empty()) {
        if part == "3a" {
            of.keeps_jitter = true;
            continue;
        }
        let digits = part.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(part.len());
        let (key, value) = part.split_at(digits);
        let number: f64 = value.parse().ok().filter(|v: &f64| *v >= 0.0)?;
        match key {
            "m" => of.magnitude = number,
            "n" => of.layers = number as usize,
            "mstd" => std = number,
            "mmax" => most = number,
            "p" => prob = number,
            // Any number counts: timm only asks whether the text is empty.
            "inc" => increasing = true,
            _ => return None,
        }
    }
    of.dialect = Dialect::Timm { increasing, std, most, prob };
    let sane = (1..=16).contains(&of.layers) && prob <= 1.0 && of.magnitude <= 100.0 && most <= 100.0;
    sane.then_some(of)
}

impl fmt::Display for RandAugment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layers, magnitude, .. } = self;
        match self.dialect {
            Dialect::Tf { fixed } => {
                write!(f, "tf{}({layers},{magnitude})", if fixed { "_fixed" } else { "" })
            }
            Dialect::Timm { increasing, std, most, prob } => {
                write!(f, "rand-m{magnitude}-n{layers}-p{prob}-mstd{std}-mmax{most}")?;
                f.write_str(if increasing { "-inc1" } else { "" })?;
                f.write_str(if self.keeps_jitter { "-3a" } else { "" })
            }
        }
    }
}

/// A level of the AugReg paper. The configurations and the released files name two of them differently:
/// `light1` is the first light level of the configurations and the second of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Level(usize);

/// Names in big_vision's configurations and in the released files; magnitude; α of mixup.
type LevelRow = (&'static str, &'static str, Option<f64>, f64);

const LEVELS: [LevelRow; 7] = [
    ("none", "none", None, 0.0),
    ("light1", "light0", Some(0.0), 0.0),
    ("light2", "light1", Some(10.0), 0.2),
    ("medium1", "medium1", Some(15.0), 0.2),
    ("medium2", "medium2", Some(15.0), 0.5),
    ("strong1", "strong1", Some(20.0), 0.5),
    ("strong2", "strong2", Some(20.0), 0.8),
];

impl Level {
    /// Magnitude of `tf(2,m)`, and α of mixup.
    pub fn settings(self) -> (Option<f64>, f64) {
        (LEVELS[self.0].2, LEVELS[self.0].3)
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let find = |name: &str, column: fn(&LevelRow) -> &'static str| {
            LEVELS.iter().position(|level| column(level) == name)
        };
        let found = match text.split_once(':') {
            Some(("config", name)) => find(name, |l| l.0),
            Some(("released", name)) => find(name, |l| l.1),
            Some(_) => None,
            None => match (find(text, |l| l.0), find(text, |l| l.1)) {
                (Some(a), Some(b)) if a != b => {
                    return Err(format!(
                        "`{text}` means two levels: write `config:{text}` as in big_vision's configurations, or \
                         `released:{text}` as in the names of the released files"
                    ));
                }
                (a, b) => a.or(b),
            },
        };
        let names = || LEVELS.map(|l| l.0).join(", ");
        found
            .map(Level)
            .ok_or_else(|| format!("there is no level `{text}`: {} or, of the files, light0", names()))
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "config:{}", LEVELS[self.0].0)
    }
}

/// Both are strings in a recipe.
macro_rules! is_a_string {
    ($($type:ty),*) => { $(
        impl TryFrom<String> for $type {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    )* };
}
is_a_string!(RandAugment, Level);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn randaugment_is_read_and_written() {
        let parsed: RandAugment = "rand-m9-mstd0.5-inc1".parse().unwrap();
        let timm = Dialect::Timm { increasing: true, std: 0.5, most: 10.0, prob: 0.5 };
        assert_eq!((parsed.dialect, parsed.layers, parsed.magnitude), (timm, 2, 9.0));
        for text in ["tf(2,15)", "tf_fixed(3,10)", "rand-m9-mstd0.5-inc1", "rand-m7-n4-3a", "rand"] {
            let parsed: RandAugment = text.parse().unwrap();
            assert_eq!(parsed.to_string().parse::<RandAugment>().unwrap(), parsed, "{text}");
        }
        for text in ["", "tf", "tf(2)", "tf(0,3)", "tg(2,3)", "rand-q3", "rand-m", "tf(2,NaN)"] {
            assert!(text.parse::<RandAugment>().is_err(), "{text}");
        }
    }

    #[test]
    fn levels_have_two_names_and_an_ambiguous_one_is_refused() {
        let level = |text: &str| text.parse::<Level>();
        assert_eq!(level("light0").unwrap().settings(), (Some(0.0), 0.0));
        assert_eq!(level("light2").unwrap().settings(), (Some(10.0), 0.2));
        assert_eq!(level("config:light1").unwrap(), level("released:light0").unwrap());
        assert_eq!(level("released:light1").unwrap(), level("light2").unwrap());
        assert_eq!(level("strong2").unwrap().settings(), (Some(20.0), 0.8));
        assert!(level("light1").unwrap_err().contains("config:light1"));
        assert!(level("light3").is_err());
        let augment = AugmentSection { level: Some(level("medium1").unwrap()), ..Default::default() };
        let effective = augment.effective();
        assert_eq!((effective.randaugment.unwrap().to_string(), effective.mixup), ("tf(2,15)".into(), 0.2));
        assert!(augment.check().is_ok() && effective.check().is_ok());
        assert!(AugmentSection { mixup: 0.3, ..effective }.check().is_err());
    }

    #[test]
    fn decoding_smaller_needs_a_crop_that_draws_a_window() {
        let of = |crop| AugmentSection { crop, scaled_decode: true, ..Default::default() };
        assert!(of(Crop::Tf).check().is_ok() && of(Crop::Torch).check().is_ok());
        let error = of(Crop::Simple).check().unwrap_err();
        assert!(error.message().contains("`augment.scaled_decode`"), "{error}");
    }
}
