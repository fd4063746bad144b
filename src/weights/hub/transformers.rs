//! transformers' `config.json`.

use serde_json::{Value, json};

use super::names::Names;
use super::{Hub, IMAGENET_MEAN, IMAGENET_STD, SizeOf, activation, number};
use crate::backend::{Gelu, LossKind};
use crate::error::{Error, Result};
use crate::fail;
use crate::vit::config::RopeKind;
use crate::weights::usual::Rotary;

/// What transformers does with a type of model.
pub(super) struct Type {
    name: &'static str,
    /// Where the image model's keys are, if not at the top.
    nested: Option<&'static str>,
    /// Values of keys that a file may leave out.
    heads: Option<usize>,
    image: Option<usize>,
    gelu: Option<Gelu>,
    ln_eps: Option<f32>,
    /// The class of its image processor, and whether published files have ImageNet's mean and deviation.
    processor: &'static str,
    imagenet: bool,
}

const VIT: Type = Type {
    name: "vit",
    nested: None,
    heads: None,
    image: None,
    gelu: None,
    ln_eps: None,
    processor: "ViTImageProcessor",
    imagenet: false,
};

/// What the code of DINOv2 assumes.
const DINOV2: Type = Type {
    name: "dinov2",
    heads: Some(12),
    image: Some(224),
    gelu: Some(Gelu::Erf),
    ln_eps: Some(1e-6),
    processor: "BitImageProcessor",
    imagenet: true,
    ..VIT
};
const SIGLIP: Type = Type {
    name: "siglip",
    nested: Some("vision_config"),
    gelu: Some(Gelu::Tanh),
    processor: "SiglipImageProcessor",
    imagenet: false,
    ..DINOV2
};
const CLIP: Type = Type {
    name: "clip",
    gelu: Some(Gelu::Quick),
    ln_eps: Some(1e-5),
    processor: "CLIPImageProcessor",
    ..SIGLIP
};

/// Model types that compute what ours does.
const TYPES: [Type; 11] = [
    VIT,
    Type { name: "deit", processor: "DeiTImageProcessor", imagenet: true, ..VIT },
    Type { name: "vit_mae", imagenet: true, ..VIT },
    Type { name: "vit_msn", imagenet: true, ..VIT },
    DINOV2,
    Type { name: "dinov2_with_registers", ..DINOV2 },
    // Positions are rotary: pictures may have any size.
    Type {
        name: "dinov3_vit",
        heads: Some(6),
        image: None,
        ln_eps: Some(1e-5),
        processor: "DINOv3ViTImageProcessor",
        ..DINOV2
    },
    SIGLIP,
    Type { name: "siglip_vision_model", nested: None, ..SIGLIP },
    CLIP,
    Type { name: "clip_vision_model", nested: None, ..CLIP },
];

/// What the code of other types computes.
const OTHERS: [(&str, &str); 3] = [
    (
        "siglip2",
        "batches of pictures of several sizes (NaFlex); SigLIP 2 at a fixed size has the type `siglip`",
    ),
    ("dinov3_convnext", "a convolutional network"),
    ("beit", "relative positions"),
];

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
pub(super) fn kind(json: &Value, notes: &mut Vec<String>) -> Result<Option<&'static Type>> {
    let known = TYPES.map(|kind| format!("`{}`", kind.name)).join(", ");
    let refuse = |key: &str, value: &Value| {
        let what = OTHERS
            .iter()
            .find(|(name, _)| value == name)
            .map_or(String::new(), |(_, what)| format!(": {what}"));
        let shown = value.to_string().replace('"', "`");
        Err(Error::new(format!("`{key}` is {shown}, which is not supported{what}"))
            .hint(format!(
                "supported are {known}, and timm's files; if config.json is another model's than the weights, move it away"
            )))
    };
    let named = |name: &str| TYPES.iter().find(|known| known.name == name);
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
            let is_of = |kind: &&Type| {
                let rest = lower.strip_prefix(&kind.name.replace('_', ""));
                rest.is_some_and(|rest| rest.starts_with("for") || rest.starts_with("model"))
            };
            match TYPES.iter().find(is_of) {
                Some(kind) => kind,
                None => return refuse("architectures", &json["architectures"][0]),
            }
        }
        None if OF_VIT.iter().filter(|key| !json[**key].is_null()).count() >= SEVERAL => &TYPES[0],
        None => return Ok(None),
    };
    notes.push(format!("config.json has no `model_type`: read as `{}` of transformers", kind.name));
    Ok(Some(kind))
}

pub(super) fn read(hub: &mut Hub, whole: &Value, kind: &Type) -> Result<()> {
    let json = match kind.nested {
        Some(key) if whole[key].is_object() => &whole[key],
        Some(key) => fail!("no `{key}` in the configuration of a `{}`", kind.name),
        None => whole,
    };
    hub.named = true;
    hub.heads = number(json, "num_attention_heads")?.or(kind.heads);
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
    hub.ln_eps = json["layer_norm_eps"].as_f64().map(|e| e as f32).or(kind.ln_eps);
    hub.image = match &json["image_size"] {
        Value::Null => kind.image.map(|side| (side, side)),
        Value::Array(sides) => match sides.as_slice() {
            [h, w] => h.as_u64().zip(w.as_u64()).map(|(h, w)| (h as usize, w as usize)),
            _ => None,
        },
        _ => number(json, "image_size")?.map(|s| (s, s)),
    };
    if hub.image.is_none() && !json["image_size"].is_null() {
        fail!("`image_size` is {}", json["image_size"]);
    }
    // A DINOv3 was trained on pictures of this size, and takes others.
    if kind.name == "dinov3_vit" {
        hub.pictures = hub.image.take();
        hub.usual.rope = Some(Rotary {
            theta: json["rope_theta"].as_f64().map(|t| t as f32),
            ..Rotary::of(RopeKind::Dinov3)
        });
        let rescale = &json["pos_embed_rescale"];
        if !rescale.is_null() && *rescale != 1.0 {
            hub.notes.push(format!(
                "config.json: `pos_embed_rescale` is {rescale}: transformers scales rotary positions at random in training; \
                 Vitrum does not, and timm does not either"
            ));
        }
    }
    // What stands between both layers of a SwiGLU is not GELU, whatever the key says.
    let gated = json["use_swiglu_ffn"] == true || json["use_gated_mlp"] == true;
    hub.gelu = match json["hidden_act"].as_str() {
        _ if gated => None,
        Some("silu") => {
            hub.silu = true;
            None
        }
        Some(name) => Some(activation("hidden_act", name)?),
        None => kind.gelu,
    };
    if let Some(other) = json["pooler_act"].as_str().filter(|act| *act != "tanh") {
        fail!("`pooler_act` is `{other}`; only a pooler with `tanh` is supported");
    }
    hub.loss = match whole["problem_type"].as_str() {
        Some("multi_label_classification") => Some(LossKind::Sigmoid),
        Some("single_label_classification") => Some(LossKind::Softmax),
        Some(other) => fail!("`problem_type` is `{other}`; only classifiers are supported"),
        None => None,
    };
    for key in ["num_labels", "num_classes"] {
        hub.sizes.extend(number(whole, key)?.map(|size| (key, size, SizeOf::Classes)));
    }
    hub.names = Names::read(&[whole]);
    hub.license = whole["license"].as_str().map(String::from);
    Ok(())
}

/// The `preprocessor_config.json` of a typical repository of that type, for a folder that lacks one.
pub(super) fn preprocessor_of(kind: &Type) -> Value {
    let mut json = json!({ "image_processor_type": kind.processor });
    if kind.imagenet {
        json["image_mean"] = json!(IMAGENET_MEAN);
        json["image_std"] = json!(IMAGENET_STD);
    }
    if kind.processor == DINOV2.processor {
        json["size"] = json!({ "shortest_edge": 256 });
    }
    json["absent"] = true.into();
    json
}
