//! timm: our own file, if timm has the same model, with the constructor's arguments in the metadata.

use std::path::Path;

use serde_json::{Value, json};

use super::{mlp_ratio, other_resize, prepared, write_json};
use crate::backend::Gelu;
use crate::error::{At, Error, Result};
use crate::fail;
use crate::recipe::unit;
use crate::vit::config::{ModelConfig, NormPlace, PoolKind, Posemb, PosembJoin};
use crate::weights::{ModelFile, Tensors, metadata, write_own};

/// Metadata key: the Python expression that builds the model whose `load_state_dict` takes the file.
const PYTHON_KEY: &str = "timm.python";

pub(super) fn check(file: &ModelFile) -> Result<()> {
    let config = &file.config;
    if config.rep_size > 0 {
        return Err(Error::new("timm has no representation layer (`pre_logits`)")
            .hint("keep it with `--to safetensors`, or drop it in a fine-tuning run"));
    }
    if config.posemb == Posemb::Sincos2d && !file.grid_known {
        return Err(Error::new(
            "timm needs the sincos2d table as a tensor, but the size of the pictures is not known",
        )
        .hint("give it, as in `--set model.image=224`"));
    }
    if config.pool == PoolKind::Map && config.extra_tokens == 2 {
        fail!("timm has no distilled model with attention pooling");
    }
    Ok(())
}

pub(super) fn write(file: &ModelFile, tensors: &Tensors, to: &Path) -> Result<Option<String>> {
    let mut metadata = metadata(&file.config, file.grid_known, &file.meta).at(to.display())?;
    metadata.insert(PYTHON_KEY.into(), python(&file.config));
    write_own(to, &file.config, file.grid_known, tensors, &metadata)?;
    Ok(None)
}

/// The folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.
pub(super) fn write_folder(file: &ModelFile, tensors: &Tensors, to: &Path) -> Result<Option<String>> {
    if !file.grid_known {
        return Err(Error::new(format!(
            "{}: timm needs the size of the pictures, which is not known",
            file.path.display()
        ))
        .hint("give it, as in `--set model.image=224x384`"));
    }
    super::folder(to)?;
    write(file, tensors, &to.join("model.safetensors"))?;
    let (config, note) = config_json(file);
    write_json(&to.join("config.json"), &config)?;
    Ok(note)
}

/// Every size is in `model_args`; the architecture's name only says which constructor takes them.
fn config_json(file: &ModelFile) -> (Value, Option<String>) {
    let (c, how) = (&file.config, prepared(&file.meta));
    let mut arguments = json!({
        "img_size": [c.image.0, c.image.1],
        "patch_size": [c.patch.0, c.patch.1],
        "embed_dim": c.width,
        "depth": c.depth,
        "num_heads": c.heads,
        "mlp_ratio": mlp_ratio(c),
        "qkv_bias": c.qkv_bias,
        "global_pool": pool(c),
        "fc_norm": c.norm == NormPlace::After && c.pool == PoolKind::Gap,
        "no_embed_class": c.posemb_join == PosembJoin::Before,
        "act_layer": if c.gelu == Gelu::Tanh { "gelu_tanh" } else { "gelu" },
    });
    if c.layer_scale > 0.0 {
        arguments["init_values"] = json!(c.layer_scale);
    }
    if c.extra_tokens < 2 {
        arguments["class_token"] = json!(c.extra_tokens > 0);
    }
    let mut card = json!({
        "input_size": [3, c.image.0, c.image.1],
        "fixed_input_size": true,
        "interpolation": if how.bicubic { "bicubic" } else { "bilinear" },
        "crop_pct": how.crop_ratio.to_string().parse::<f64>().unwrap_or(1.0),
        "crop_mode": if how.centre { "center" } else { "squash" },
        "mean": unit(file.meta.normalise.mean),
        "std": unit(file.meta.normalise.std),
        "num_classes": c.classes,
        "first_conv": "patch_embed.proj",
        "classifier": if c.extra_tokens == 2 { json!(["head", "head_dist"]) } else { json!("head") },
    });
    if let Some(names) = &file.meta.classes {
        card["label_names"] = json!(names);
    }
    let distilled = c.extra_tokens == 2;
    let config = json!({
        "architecture": if distilled { "deit_base_distilled_patch16_224" } else { "vit_base_patch16_224" },
        "num_classes": c.classes,
        "num_features": c.width,
        "global_pool": pool(c),
        "model_args": arguments,
        "pretrained_cfg": card,
    });
    let note = if !how.exact {
        Some(other_resize(file.meta.resize, "timm"))
    } else if c.ln_eps != 1e-6 {
        Some(format!("its norms have an epsilon of {:e}, and timm's of 1e-6", c.ln_eps))
    } else {
        None
    };
    (config, note)
}

fn pool(c: &ModelConfig) -> &'static str {
    match c.pool {
        PoolKind::Token => "token",
        PoolKind::Gap => "avg",
        PoolKind::Map => "map",
    }
}

fn python(c: &ModelConfig) -> String {
    let truth = |value: bool| if value { "True" } else { "False" };
    let pool = pool(c);
    let (class, tokens) = match c.extra_tokens {
        2 => ("VisionTransformerDistilled", String::new()),
        n => ("VisionTransformer", format!("class_token={}, ", truth(n > 0))),
    };
    let scale = if c.layer_scale > 0.0 { format!("{}", c.layer_scale) } else { "None".into() };
    let module = if c.extra_tokens == 2 { "deit" } else { "vision_transformer" };
    format!(
        "timm.models.{module}.{class}(img_size=({}, {}), patch_size=({}, {}), embed_dim={}, depth={}, num_heads={}, \
         mlp_ratio={:?}, qkv_bias={}, num_classes={}, {tokens}global_pool='{pool}', fc_norm={}, no_embed_class={}, \
         init_values={scale}, act_layer='{}', norm_layer=functools.partial(torch.nn.LayerNorm, eps={:e}))",
        c.image.0,
        c.image.1,
        c.patch.0,
        c.patch.1,
        c.width,
        c.depth,
        c.heads,
        mlp_ratio(c),
        truth(c.qkv_bias),
        c.classes,
        truth(c.norm == NormPlace::After && c.pool == PoolKind::Gap),
        truth(c.posemb_join == PosembJoin::Before),
        if c.gelu == Gelu::Tanh { "gelu_tanh" } else { "gelu" },
        c.ln_eps,
    )
}
