//! The JSON files beside weights in folders of the HuggingFace hub: `config.json` of timm ([`timm`]) or
//! transformers ([`transformers`]), and `preprocessor_config.json` ([`preprocessor`]). They say what tensors
//! cannot.
//!
//! A key that says how the model computes or how its pictures are prepared is obeyed, compared with the
//! tensors, or refused by name. An absent key has the library's default.

mod architecture;
mod names;
mod preprocessor;
mod timm;
mod transformers;

use std::path::Path;

use serde_json::Value;

use self::names::Names;
pub(super) use self::names::placeholder;
use super::meta::CheckpointMeta;
use super::usual::Usual;
use crate::backend::{Gelu, LossKind, Normalise};
use crate::error::{At, Error, Result};
use crate::recipe::EvalResize;
use crate::vit::config::PoolKind;
use crate::{fail, files};

/// What a file's folder says about its model.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Hub {
    pub(super) heads: Option<usize>,
    pub(super) gelu: Option<Gelu>,
    pub(super) ln_eps: Option<f32>,
    pub(super) pool: Option<PoolKind>,
    /// Properties of the named architecture, unless the file's own metadata differs.
    pub(super) usual: Usual,
    /// Whether there is a norm behind the last block, if the file says it.
    pub(super) final_norm: Option<bool>,
    /// The activation is SiLU, which only the gate of a SwiGLU has.
    pub(super) silu: bool,
    /// Whether the model's config gives an architecture.
    pub(super) named: bool,
    /// (H, W) that the model is built for: its positions must fit.
    pub(super) image: Option<(usize, usize)>,
    /// (H, W) of the pictures that it was last fed with; its positions may differ.
    pub(super) pictures: Option<(usize, usize)>,
    /// Sizes that the tensors must have: key, value, and which size of the model it is.
    pub(super) sizes: Vec<(&'static str, usize, SizeOf)>,
    /// Class names, whether or not they fit the head.
    names: Names,
    pub(super) loss: Option<LossKind>,
    license: Option<String>,
    pub(super) normalise: Option<Normalise>,
    pub(super) resize: Option<EvalResize>,
    pub(super) crop_ratio: Option<f32>,
    /// Why pictures cannot be prepared as the files say.
    pub(super) unprepared: Option<String>,
    pub(super) notes: Vec<String>,
}

/// Which of a model's sizes a key gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SizeOf {
    Width,
    Depth,
    Mlp,
    Classes,
    Patch,
}

impl Hub {
    pub(super) fn beside(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut out = Self::default();
        let config = folder.join("config.json");
        let kind = match read(&config)? {
            Some(json) => out.read_config(&json).map_err(|e| e.at(config.display()))?,
            None => None,
        };
        let preprocessor = folder.join("preprocessor_config.json");
        let prepares = read(&preprocessor)?;
        if let Some(json) = &prepares {
            preprocessor::read(&mut out, json).map_err(|e| e.at(preprocessor.display()))?;
        } else if let Some(kind) = kind.filter(|_| out.resize.is_none()) {
            preprocessor::read(&mut out, &transformers::preprocessor_of(kind))?;
        }
        Ok(out)
    }

    /// Reads a `config.json`. Returns its type if it is one of transformers.
    fn read_config(&mut self, json: &Value) -> Result<Option<&'static transformers::Type>> {
        if json["pretrained_cfg"].is_object() || json["architecture"].is_string() {
            return timm::read(self, json).map(|()| None);
        }
        let kind = transformers::kind(json, &mut self.notes)?;
        match kind {
            Some(kind) => transformers::read(self, json, kind)?,
            None => self.notes.push(
                "config.json is not used: it has none of timm's `architecture`, transformers' `model_type` or the \
                 keys of its ViT"
                    .into(),
            ),
        }
        Ok(kind)
    }

    /// Writes the folder's settings into the metadata of a file whose head has `classes` classes. Returns a note
    /// about their names.
    pub(super) fn complete(&self, meta: &mut CheckpointMeta, classes: usize) -> Option<String> {
        let (names, note) = self.names.of_head(classes);
        meta.classes = names.or(meta.classes.take());
        meta.loss = self.loss.or(meta.loss);
        meta.license = self.license.clone().or(meta.license.take());
        meta.normalise = self.normalise.unwrap_or(meta.normalise);
        meta.resize = self.resize.unwrap_or(meta.resize);
        meta.crop_ratio = self.crop_ratio.unwrap_or(meta.crop_ratio);
        note
    }

    /// Pictures are prepared so that `kept` pixels of `of` remain, with an exact ratio for them.
    fn crop(&mut self, kept: usize, of: usize) {
        let share = kept as f32 / of as f32;
        let exact = |share: f32| (kept as f32 / share) as usize == of;
        self.crop_ratio = Some(if exact(share) { share } else { share.next_down() });
    }
}

fn read(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let json: Value = serde_json::from_str(&files::read_text(path)?).at(path.display())?;
    if !json.is_object() {
        return Err(Error::new(format!("{}: not a JSON object", path.display())));
    }
    Ok(Some(json))
}

/// A number above 0; `None` if the key is absent.
fn number(json: &Value, key: &str) -> Result<Option<usize>> {
    match &json[key] {
        Value::Null => Ok(None),
        value => match value.as_u64().filter(|n| *n > 0) {
            Some(n) => Ok(Some(n as usize)),
            None => fail!("`{key}` is {value}, not a number above 0"),
        },
    }
}

/// In these files values are for pixels in [0, 1]. One number stands for three.
fn colour(json: &Value, key: &str) -> Result<Option<[f64; 3]>> {
    let wrong = || Error::new(format!("`{key}` is {}, not three numbers", json[key]));
    let values: Vec<f64> = match &json[key] {
        Value::Null => return Ok(None),
        Value::Array(items) => items.iter().map(Value::as_f64).collect::<Option<_>>().ok_or_else(wrong)?,
        one => vec![one.as_f64().ok_or_else(wrong)?],
    };
    let three = match values[..] {
        [one] => [one; 3],
        [r, g, b] => [r, g, b],
        _ => return Err(wrong()),
    };
    Ok(Some(three))
}

/// Mean and deviation for pixels in which one step of u8 is `unit`.
fn normalise(mean: [f64; 3], std: [f64; 3], unit: f64) -> Result<Normalise> {
    if std.iter().any(|s| !(*s > 0.0 && s.is_finite())) || mean.iter().any(|m| !m.is_finite()) {
        fail!("a mean of {mean:?} and a deviation of {std:?} cannot prepare pictures");
    }
    let most = 255.0 * unit;
    if mean.iter().any(|m| !(-most..=2.0 * most).contains(m)) {
        fail!("a mean of {mean:?} cannot prepare pictures whose values go from 0 to {most}");
    }
    let pixels = |values: [f64; 3]| values.map(|v| (v / unit) as f32);
    Ok(Normalise { mean: pixels(mean), std: pixels(std) })
}

const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];

impl Normalise {
    /// torchvision's: DeiT, DINO, MAE and most of timm's models.
    pub(super) fn imagenet() -> Self {
        normalise(IMAGENET_MEAN, IMAGENET_STD, 1.0 / 255.0).expect("constants")
    }
}

/// The model's activation by the name that PyTorch libraries use.
fn activation(key: &str, name: &str) -> Result<Gelu> {
    match name {
        "gelu" => Ok(Gelu::Erf),
        "quick_gelu" => Ok(Gelu::Quick),
        "gelu_tanh" | "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_accurate" => Ok(Gelu::Tanh),
        other => fail!("`{key}` is `{other}`; only forms of GELU are supported"),
    }
}
