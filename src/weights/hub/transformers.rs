//! transformers' `config.json`.

use serde_json::{Value, json};

use super::names::Names;
use super::{Hub, IMAGENET_MEAN, IMAGENET_STD, SizeOf, activation, number};
use crate::backend::LossKind;
use crate::error::{Error, Result};
use crate::fail;

/// Model types that compute what ours does, and the mean and deviation of their published files.
const TYPES: [(&str, bool); 4] = [("vit", false), ("deit", true), ("vit_mae", true), ("vit_msn", true)];

/// Keys of a ViT's configuration; a file that lacks `model_type` is one if it has several.
const OF_VIT: [&str; 10] = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "id2label",
    "label2id",
];
const SEVERAL: usize = 2;

/// The model's type: `model_type`, else by the class in `architectures`, else ViT's if the keys are. `None` if the
/// file is not a configuration of transformers.
///
/// # Errors
/// The type is not supported.
pub(super) fn kind(json: &Value, notes: &mut Vec<String>) -> Result<Option<&'static str>> {
    let known = TYPES.map(|(name, _)| format!("`{name}`")).join(", ");
    let refuse = |key: &str, value: &Value| {
        Err(Error::new(format!("`{key}` is {}, which is not supported", value.to_string().replace('"', "`")))
            .hint(format!(
                "supported are {known}, and timm's files; if config.json is another model's than the weights, move it away"
            )))
    };
    let named = |name: &str| TYPES.iter().map(|(known, _)| *known).find(|known| *known == name);
    if !json["model_type"].is_null() {
        let Some(kind) = json["model_type"].as_str().and_then(named) else {
            return refuse("model_type", &json["model_type"]);
        };
        return Ok(Some(kind));
    }
    let class = json["architectures"].get(0).and_then(Value::as_str);
    let kind = match class {
        // `ViTMAEForPreTraining`, `DeiTModel`: the type is written without its underscore.
        Some(class) => {
            let lower = class.to_lowercase();
            let is_of = |kind: &&str| {
                let rest = lower.strip_prefix(&kind.replace('_', ""));
                rest.is_some_and(|rest| rest.starts_with("for") || rest.starts_with("model"))
            };
            match TYPES.iter().map(|(kind, _)| *kind).find(|kind| is_of(kind)) {
                Some(kind) => kind,
                None => return refuse("architectures", &json["architectures"][0]),
            }
        }
        None if OF_VIT.iter().filter(|key| !json[**key].is_null()).count() >= SEVERAL => "vit",
        None => return Ok(None),
    };
    notes.push(format!("config.json has no `model_type`: read as `{kind}` of transformers"));
    Ok(Some(kind))
}

pub(super) fn read(hub: &mut Hub, json: &Value) -> Result<()> {
    hub.heads = number(json, "num_attention_heads")?;
    for (key, of) in [
        ("hidden_size", SizeOf::Width),
        ("num_hidden_layers", SizeOf::Depth),
        ("intermediate_size", SizeOf::Mlp),
    ] {
        hub.sizes.extend(number(json, key)?.map(|size| (key, size, of)));
    }
    // A list means patches that are not squares; the tensor has their shape.
    if json["patch_size"].is_number() {
        hub.sizes.extend(number(json, "patch_size")?.map(|size| ("patch_size", size, SizeOf::Patch)));
    }
    hub.ln_eps = json["layer_norm_eps"].as_f64().map(|e| e as f32);
    hub.image = match &json["image_size"] {
        Value::Null => None,
        Value::Array(sides) => match sides.as_slice() {
            [h, w] => h.as_u64().zip(w.as_u64()).map(|(h, w)| (h as usize, w as usize)),
            _ => None,
        },
        _ => number(json, "image_size")?.map(|s| (s, s)),
    };
    if hub.image.is_none() && !json["image_size"].is_null() {
        fail!("`image_size` is {}", json["image_size"]);
    }
    hub.gelu = json["hidden_act"].as_str().map(|name| activation("hidden_act", name)).transpose()?;
    if let Some(other) = json["pooler_act"].as_str().filter(|act| *act != "tanh") {
        fail!("`pooler_act` is `{other}`; only a pooler with `tanh` is supported");
    }
    hub.loss = match json["problem_type"].as_str() {
        Some("multi_label_classification") => Some(LossKind::Sigmoid),
        Some("single_label_classification") => Some(LossKind::Softmax),
        Some(other) => fail!("`problem_type` is `{other}`; only classifiers are supported"),
        None => None,
    };
    for key in ["num_labels", "num_classes"] {
        hub.sizes.extend(number(json, key)?.map(|size| (key, size, SizeOf::Classes)));
    }
    hub.names = Names::read(&[json]);
    Ok(())
}

/// The `preprocessor_config.json` of a typical repository of that type, for a folder that lacks one.
pub(super) fn preprocessor_of(kind: &str) -> Value {
    let mut json = json!({ "image_processor_type": if kind == "deit" { "DeiTImageProcessor" } else { "ViTImageProcessor" } });
    if TYPES.contains(&(kind, true)) {
        json["image_mean"] = json!(IMAGENET_MEAN);
        json["image_std"] = json!(IMAGENET_STD);
    }
    json["absent"] = true.into();
    json
}
