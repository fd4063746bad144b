//! timm: our own file, if timm has the same model, with the constructor's arguments in the metadata.

use std::path::Path;

use serde_json::{Value, json};

use super::{mlp_ratio, other_resize, prepared, write_json};
use crate::backend::Gelu;
use crate::error::{At, Error, Result};
use crate::fail;
use crate::recipe::unit;
use crate::vit::config::{MlpKind, ModelConfig, NormPlace, PoolKind, Posemb, PosembJoin, QkvBias, RopeKind};
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
    let without = |what: &str| {
        Err(Error::new(format!("{what} cannot be written for timm yet"))
            .hint("keep it with `--to safetensors`"))
    };
    match () {
        () if config.rope != RopeKind::None => without("rotary positions"),
        () if config.qkv_bias == QkvBias::Qv => without("a bias of q and v alone"),
        () if config.mlp_norm => without("a norm inside the MLP"),
        () if config.pool == PoolKind::TokenGap => without("a classifier of class token and mean"),
        () if config.posemb == Posemb::None => without("a model without positions"),
        () if config.map_heads() != config.heads => without("attention pooling with heads of its own"),
        // timm has both or neither.
        () if config.norm_pre == config.patch_bias => {
            without("`norm_pre` beside a bias of the patches, or neither")
        }
        () => Ok(()),
    }?;
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
        "qkv_bias": c.qkv_bias == QkvBias::All,
        "reg_tokens": c.registers,
        "pre_norm": c.norm_pre,
        "final_norm": c.norm != NormPlace::None,
        "global_pool": pool(c),
        "fc_norm": c.norm == NormPlace::After && c.pool == PoolKind::Gap,
        "no_embed_class": c.posemb_join == PosembJoin::Before,
        "act_layer": act(c),
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
    let config = json!({
        "architecture": architecture(c),
        "num_classes": c.classes,
        "num_features": c.width,
        "global_pool": pool(c),
        "model_args": arguments,
        "pretrained_cfg": card,
    });
    let note = if !how.exact {
        Some(other_resize(file.meta.resize, "timm"))
    } else if c.ln_eps != epsilon(c) {
        Some(format!("its norms have an epsilon of {:e}, and timm's of {:e}", c.ln_eps, epsilon(c)))
    } else {
        None
    };
    (config, note)
}

/// The architecture whose constructor takes the arguments: its name decides what they cannot.
fn architecture(c: &ModelConfig) -> &'static str {
    match c.mlp_kind {
        MlpKind::Swiglu => "vit_giant_patch14_dinov2",
        MlpKind::Dense if c.extra_tokens == 2 => "deit_base_distilled_patch16_224",
        MlpKind::Dense if c.ln_eps == 1e-5 => "vit_base_patch16_clip_224",
        MlpKind::Dense => "vit_base_patch16_224",
    }
}

/// The epsilon that the architecture has.
fn epsilon(c: &ModelConfig) -> f32 {
    if architecture(c) == "vit_base_patch16_clip_224" { 1e-5 } else { 1e-6 }
}

fn act(c: &ModelConfig) -> &'static str {
    match (c.mlp_kind, c.gelu) {
        (MlpKind::Swiglu, _) => "silu",
        (_, Gelu::Tanh) => "gelu_tanh",
        (_, Gelu::Erf) => "gelu",
        (_, Gelu::Quick) => "quick_gelu",
    }
}

fn pool(c: &ModelConfig) -> &'static str {
    match c.pool {
        PoolKind::Token => "token",
        PoolKind::Gap => "avg",
        PoolKind::Map => "map",
        PoolKind::TokenGap => unreachable!("refused by `check`"),
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
    let mlp = if c.mlp_kind == MlpKind::Swiglu { "mlp_layer=timm.layers.SwiGLUPacked, " } else { "" };
    let module = if c.extra_tokens == 2 { "deit" } else { "vision_transformer" };
    format!(
        "timm.models.{module}.{class}(img_size=({}, {}), patch_size=({}, {}), embed_dim={}, depth={}, num_heads={}, \
         mlp_ratio={:?}, qkv_bias={}, num_classes={}, {tokens}reg_tokens={}, pre_norm={}, final_norm={}, \
         global_pool='{pool}', fc_norm={}, no_embed_class={}, init_values={scale}, act_layer='{}', {mlp}norm_layer=functools.partial(torch.nn.LayerNorm, eps={:e}))",
        c.image.0,
        c.image.1,
        c.patch.0,
        c.patch.1,
        c.width,
        c.depth,
        c.heads,
        mlp_ratio(c),
        truth(c.qkv_bias == QkvBias::All),
        c.classes,
        c.registers,
        truth(c.norm_pre),
        truth(c.norm != NormPlace::None),
        truth(c.norm == NormPlace::After && c.pool == PoolKind::Gap),
        truth(c.posemb_join == PosembJoin::Before),
        act(c),
        c.ln_eps,
    )
}
