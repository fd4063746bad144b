//! HuggingFace: a folder that `ViTForImageClassification.from_pretrained` loads, including class names; for a
//! model without a classifier, one for `ViTModel`.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::backend::{Gelu, LossKind};
use crate::error::{At, Error, Result};
use crate::fail;
use crate::recipe::unit;
use crate::vit::config::{MlpKind, ModelConfig, NormPlace, PoolKind, Posemb, PosembJoin, QkvBias, RopeKind};
use crate::weights::hub::placeholder;
use crate::weights::layouts::huggingface::file_names;
use crate::weights::safetensors::{self, View};
use crate::weights::{CheckpointMeta, ModelFile, Tensors, metadata};

use super::{prepared, write_json};

pub(super) fn check(file: &ModelFile) -> Result<()> {
    let c = &file.config;
    let without = |what: &str| Err(Error::new(format!("its ViT has no {what}")).hint("use `--to timm`"));
    match () {
        () if c.pool != PoolKind::Token => without("average or attention pooling in front of the classifier"),
        () if c.extra_tokens != 1 => without("distillation token"),
        () if c.registers > 0 => without("registers"),
        () if c.rope != RopeKind::None => without("rotary positions"),
        () if c.mlp_kind != MlpKind::Dense => without("SwiGLU"),
        () if c.norm_pre => without("norm in front of the first block"),
        () if c.qkv_bias == QkvBias::Qv => without("bias of q and v alone"),
        () if !c.patch_bias => {
            Err(Error::new("its ViT has a bias in the patch embedding, and this model has none")
                .hint("use `--to timm`"))
        }
        () if c.norm == NormPlace::None => without("model without a final norm"),
        () if c.layer_scale > 0.0 => without("LayerScale"),
        () if c.posemb == Posemb::Sincos2d => without("fixed position embedding"),
        () if c.posemb_join == PosembJoin::Before => {
            without("position embedding that leaves the class token out")
        }
        () if c.rep_size > 0 && c.classes > 0 => {
            Err(Error::new("its classifier has no representation layer (`pre_logits`)")
                .hint("keep it with `--to safetensors`"))
        }
        () if c.rep_size > 0 && c.rep_size != c.width => {
            fail!("its pooler is as wide as the model, but this one has width {}", c.rep_size)
        }
        () if !file.grid_known => {
            Err(Error::new("the size of the pictures is not known, and transformers needs it")
                .hint("give it, as in `--set model.image=224x384`"))
        }
        () => Ok(()),
    }
}

pub(super) fn write(file: &ModelFile, tensors: &Tensors, to: &Path) -> Result<Option<String>> {
    let base = file.config.classes == 0;
    let mut views = Vec::new();
    for (own, tensor) in tensors {
        let names = file_names(own, base);
        if names.is_empty() {
            fail!("{}: `{own}` has no name in a HuggingFace model", to.display());
        }
        let mut shape = tensor.shape.clone();
        shape[0] /= names.len();
        let parts = tensor.values.chunks(tensor.values.len() / names.len());
        views.extend(names.into_iter().zip(parts).map(|(name, part)| View::f32(name, &shape, part)));
    }
    let metadata = metadata(&file.config, file.grid_known, &file.meta).at(to.display())?;
    super::folder(to)?;
    safetensors::write(&to.join("model.safetensors"), &metadata, views)?;
    write_json(&to.join("config.json"), &config_json(&file.config, &file.meta))?;
    let (preprocessor, note) = preprocessor_json(file);
    write_json(&to.join("preprocessor_config.json"), &preprocessor)?;
    Ok(note)
}

/// One number if both sides are equal, as transformers writes it.
fn side((height, width): (usize, usize)) -> Value {
    if height == width { json!(height) } else { json!([height, width]) }
}

fn config_json(c: &ModelConfig, meta: &CheckpointMeta) -> Value {
    let names = meta.classes.as_deref();
    let architecture = if c.classes == 0 { "ViTModel" } else { "ViTForImageClassification" };
    let mut out = json!({
        "architectures": [architecture],
        "model_type": "vit",
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "hidden_act": match c.gelu {
            Gelu::Erf => "gelu",
            Gelu::Tanh => "gelu_pytorch_tanh",
            Gelu::Quick => "quick_gelu",
        },
        "layer_norm_eps": exact(c.ln_eps),
        "hidden_dropout_prob": exact(c.dropout),
        "attention_probs_dropout_prob": exact(c.attention_dropout),
        "initializer_range": 0.02,
        "image_size": side(c.image),
        "patch_size": side(c.patch),
        "num_channels": 3,
        "qkv_bias": c.qkv_bias == QkvBias::All,
        "encoder_stride": c.patch.0,
        "dtype": "float32",
    });
    if c.classes > 0 {
        let name = |i: usize| names.and_then(|n| n.get(i)).cloned().unwrap_or_else(|| placeholder(i));
        let id2label: Map<String, Value> = (0..c.classes).map(|i| (i.to_string(), json!(name(i)))).collect();
        let label2id: Map<String, Value> = (0..c.classes).map(|i| (name(i), json!(i))).collect();
        out["id2label"] = id2label.into();
        out["label2id"] = label2id.into();
        if meta.loss == Some(LossKind::Sigmoid) {
            out["problem_type"] = json!("multi_label_classification");
        }
    } else {
        out["pooler_output_size"] = json!(c.width);
        out["pooler_act"] = json!("tanh");
    }
    out
}

/// The shortest decimal of the f32, not its exact f64 value: 1e-12.
fn exact(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}

/// Also returns what transformers cannot do as in the model's evaluation.
fn preprocessor_json(file: &ModelFile) -> (Value, Option<String>) {
    let (height, width) = file.config.image;
    let how = prepared(&file.meta);
    let resized = |side: usize| ((side as f32 / how.crop_ratio) as usize).max(side);
    let cropped = how.crop_ratio < 1.0;
    // The two programs treat the shorter side and the crop of rectangles differently.
    let centre = how.centre && height == width;
    let name = match (centre, cropped) {
        (true, _) => "BitImageProcessor",
        (false, true) => "DeiTImageProcessor",
        (false, false) => "ViTImageProcessor",
    };
    let mut out = json!({
        "image_processor_type": name,
        "do_resize": true,
        "size": if centre {
            json!({ "shortest_edge": resized(height) })
        } else {
            json!({ "height": resized(height), "width": resized(width) })
        },
        "resample": if how.bicubic { 3 } else { 2 },
        "do_center_crop": centre || cropped,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": unit(file.meta.normalise.mean),
        "image_std": unit(file.meta.normalise.std),
    });
    if centre || cropped {
        out["crop_size"] = json!({ "height": height, "width": width });
    }
    let exact = how.exact && centre == how.centre;
    (out, (!exact).then(|| super::other_resize(file.meta.resize, "transformers")))
}
