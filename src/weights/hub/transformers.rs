//! transformers' `config.json`.

use serde_json::{Value, json};

use super::{Hub, IMAGENET_MEAN, IMAGENET_STD, SizeOf, activation, number, placeholder};
use crate::backend::LossKind;
use crate::error::{Error, Result};
use crate::fail;

/// Model types that compute what ours does, and the mean and deviation of their published files.
const TYPES: [(&str, bool); 4] = [("vit", false), ("deit", true), ("vit_mae", true), ("vit_msn", true)];

pub(super) fn read(hub: &mut Hub, json: &Value) -> Result<()> {
    let kind = json["model_type"].as_str().unwrap_or_default();
    if !TYPES.iter().any(|(known, _)| *known == kind) {
        let known = TYPES.map(|(name, _)| format!("`{name}`")).join(", ");
        return Err(Error::new(format!("`model_type` is `{kind}`, which is not supported"))
            .hint(format!("supported are {known}, and timm's files")));
    }
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
    hub.classes = classes(&json["id2label"]);
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

/// Names by number; `None` if they are only numbers again, or incomplete.
fn classes(id2label: &Value) -> Option<Vec<String>> {
    let labels = id2label.as_object()?;
    let name = |i: usize| labels.get(&i.to_string())?.as_str().map(String::from);
    let names: Vec<String> = (0..labels.len()).map(name).collect::<Option<_>>()?;
    let only_numbers = names.iter().enumerate().all(|(i, name)| *name == placeholder(i));
    if only_numbers { None } else { Some(names) }
}
