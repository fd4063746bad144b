//! The JSON files that lie beside weights in folders of the HuggingFace hub: `config.json` of transformers or of timm,
//! and `preprocessor_config.json`. They say what tensors cannot; a key that is absent says nothing.

use std::path::Path;

use serde_json::Value;

use super::meta::CheckpointMeta;
use crate::backend::{Gelu, Normalise};
use crate::error::{At, Error, Result};
use crate::{fail, files};

/// What the folder of a file says about its model.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Hub {
    pub(super) heads: Option<usize>,
    pub(super) gelu: Option<Gelu>,
    pub(super) ln_eps: Option<f32>,
    /// (H, W)
    pub(super) image: Option<(usize, usize)>,
    /// In the order of the logits.
    pub(super) classes: Option<Vec<String>>,
    pub(super) normalise: Option<Normalise>,
    pub(super) crop_ratio: Option<f32>,
}

/// Of a class that has no other.
pub(super) fn placeholder(class: usize) -> String {
    format!("LABEL_{class}")
}

impl Hub {
    pub(super) fn beside(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut out = Self::default();
        let config = folder.join("config.json");
        if let Some(json) = read(&config)? {
            out.read_config(&json).map_err(|e| e.at(config.display()))?;
        }
        let preprocessor = folder.join("preprocessor_config.json");
        if let Some(json) = read(&preprocessor)? {
            out.normalise = normalise(&json["image_mean"], &json["image_std"]).or(out.normalise);
        }
        Ok(out)
    }

    fn read_config(&mut self, json: &Value) -> Result<()> {
        let number = |key: &str| json[key].as_u64().map(|n| n as usize).filter(|n| *n > 0);
        // timm's own: the architecture's name and how to feed it.
        let card = &json["pretrained_cfg"];
        if card.is_object() {
            self.normalise = normalise(&card["mean"], &card["std"]);
            self.crop_ratio = card["crop_pct"].as_f64().filter(|r| *r > 0.0 && *r <= 1.0).map(|r| r as f32);
            return Ok(());
        }
        // Some other program's file of that name.
        if !json["model_type"].is_string() {
            return Ok(());
        }
        self.heads = number("num_attention_heads");
        self.ln_eps = json["layer_norm_eps"].as_f64().map(|e| e as f32);
        self.image = match &json["image_size"] {
            Value::Array(sides) => match sides.as_slice() {
                [h, w] => h.as_u64().zip(w.as_u64()).map(|(h, w)| (h as usize, w as usize)),
                _ => None,
            },
            side => side.as_u64().map(|s| (s as usize, s as usize)),
        };
        self.gelu = match json["hidden_act"].as_str() {
            None => None,
            Some("gelu") => Some(Gelu::Erf),
            Some("gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_accurate") => Some(Gelu::Tanh),
            Some(other) => fail!("`hidden_act` is `{other}`; only forms of GELU are built"),
        };
        self.classes = self::classes(&json["id2label"]);
        Ok(())
    }

    /// Writes into a file's own metadata what the folder says.
    pub(super) fn complete(self, meta: &mut CheckpointMeta) {
        meta.classes = self.classes.or(meta.classes.take());
        meta.normalise = self.normalise.unwrap_or(meta.normalise);
        meta.crop_ratio = self.crop_ratio.unwrap_or(meta.crop_ratio);
    }
}

fn read(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let json: Value = serde_json::from_slice(&files::read(path)?).at(path.display())?;
    if !json.is_object() {
        return Err(Error::new(format!("{}: not a JSON object", path.display())));
    }
    Ok(Some(json))
}

/// Names by number; `None` where they are only numbers again, or not all there.
fn classes(id2label: &Value) -> Option<Vec<String>> {
    let labels = id2label.as_object()?;
    let name = |i: usize| labels.get(&i.to_string())?.as_str().map(String::from);
    let names: Vec<String> = (0..labels.len()).map(name).collect::<Option<_>>()?;
    let only_numbers = names.iter().enumerate().all(|(i, name)| *name == placeholder(i));
    if only_numbers { None } else { Some(names) }
}

/// In these files values are of pictures in [0, 1].
fn normalise(mean: &Value, std: &Value) -> Option<Normalise> {
    let three = |value: &Value| {
        let values: Vec<f32> =
            value.as_array()?.iter().filter_map(Value::as_f64).map(|v| (v * 255.0) as f32).collect();
        <[f32; 3]>::try_from(values).ok()
    };
    let (mean, std) = (three(mean)?, three(std)?);
    std.iter().all(|s| *s > 0.0).then_some(Normalise { mean, std })
}
