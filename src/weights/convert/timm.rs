//! timm: our own file, where timm has the same model, and the constructor's arguments in the metadata.

use std::path::Path;

use super::mlp_ratio;
use crate::backend::Gelu;
use crate::error::{At, Error, Result};
use crate::fail;
use crate::vit::config::{ModelConfig, NormPlace, PoolKind, Posemb, PosembJoin};
use crate::weights::{ModelFile, Tensors, metadata, write_own};

/// Metadata key: the Python expression that makes the model whose `load_state_dict` takes the file.
const PYTHON_KEY: &str = "timm.python";

pub(super) fn check(file: &ModelFile) -> Result<()> {
    let config = &file.config;
    if config.rep_size > 0 {
        return Err(Error::new("timm has no representation layer (`pre_logits`)")
            .hint("keep it with `--to safetensors`, or drop it in a fine-tuning run"));
    }
    if config.posemb == Posemb::Sincos2d && !file.grid_known {
        return Err(Error::new(
            "timm wants the sincos2d table as a tensor, and the size of the pictures is not known",
        )
        .hint("give it, as in `--set model.image=224`"));
    }
    if config.pool == PoolKind::Map && config.extra_tokens == 2 {
        fail!("timm has no distilled model with attention pooling");
    }
    Ok(())
}

pub(super) fn write(file: &ModelFile, tensors: &Tensors, to: &Path) -> Result<()> {
    let mut metadata = metadata(&file.config, file.grid_known, &file.meta).at(to.display())?;
    metadata.insert(PYTHON_KEY.into(), python(&file.config));
    write_own(to, &file.config, file.grid_known, tensors, &metadata)
}

fn python(c: &ModelConfig) -> String {
    let truth = |value: bool| if value { "True" } else { "False" };
    let pool = match c.pool {
        PoolKind::Token => "token",
        PoolKind::Gap => "avg",
        PoolKind::Map => "map",
    };
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
