//! timm's `config.json`: the architecture's name, the arguments of its constructor, and how to feed it.

use serde_json::Value;

use super::names::Names;
use super::{Hub, IMAGENET_MEAN, IMAGENET_STD, SizeOf, activation, architecture, colour, normalise, number};
use crate::error::{Error, Result};
use crate::fail;
use crate::recipe::EvalResize;
use crate::vit::config::{MapTokens, PoolKind, RopeIndexing, RopeKind};
use crate::weights::usual::Rotary;

/// Arguments that follow from the tensors, or that only training uses.
const SILENT: [&str; 39] = [
    "embed_dim",
    "depth",
    "mlp_ratio",
    "patch_size",
    "qkv_bias",
    "init_values",
    "class_token",
    "no_embed_class",
    "reg_tokens",
    "pre_norm",
    "qk_norm",
    "fc_norm",
    "pos_embed",
    "in_chans",
    "num_classes",
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "weight_init",
    "fix_init",
    "dynamic_img_size",
    "dynamic_img_pad",
    "strict_img_size",
    "qkv_fused",
    "swiglu_mlp",
    "swiglu_align_to",
    "mlp_layer",
    "scale_mlp",
    "scale_attn_inner",
    "use_abs_pos_emb",
    "num_reg_tokens",
    "use_fc_norm",
    "use_pre_transformer_norm",
    "use_post_transformer_norm",
    "attn_pool_mlp_ratio",
    "attn_type",
];

pub(super) fn read(hub: &mut Hub, json: &Value) -> Result<()> {
    // The first files had one object for both.
    let card = if json["pretrained_cfg"].is_object() { &json["pretrained_cfg"] } else { json };
    if let Some(name) = json["architecture"].as_str().or(card["architecture"].as_str()) {
        hub.usual = architecture::usual(name)?;
        hub.named = true;
    }
    let pool = ["global_pool"].iter().find_map(|key| json[*key].as_str());
    hub.pool = pool.map(|pool| self::pool("global_pool", pool)).transpose()?.flatten();
    if let Value::Object(arguments) = &json["model_args"] {
        for (key, value) in arguments {
            argument(hub, key, value).map_err(|e| e.at("`model_args`"))?;
        }
    }
    // The card may be that of the model before its fine-tuning.
    for object in [json, &json["model_args"]] {
        // timm writes 0 for a model without a head.
        let classes = if object["num_classes"] == 0 { Some(0) } else { number(object, "num_classes")? };
        hub.sizes.extend(classes.map(|classes| ("num_classes", classes, SizeOf::Classes)));
    }
    let of_model = Names::read(&[json]);
    hub.names = if of_model == Names::default() { Names::read(&[card]) } else { of_model };
    hub.license = card["license"].as_str().map(String::from);
    prepare(hub, card)
}

fn argument(hub: &mut Hub, key: &str, value: &Value) -> Result<()> {
    let wrong = || Error::new(format!("`{key}` is {value}"));
    let standard = |default: Value| {
        let same = *value == default || value.is_null();
        if same { Ok(()) } else { Err(Error::new(format!("`{key}` is {value}, which is not supported"))) }
    };
    match key {
        "num_heads" => hub.heads = Some(value.as_u64().filter(|h| *h > 0).ok_or_else(wrong)? as usize),
        "global_pool" => hub.pool = pool(key, value.as_str().ok_or_else(wrong)?)?,
        "img_size" if value.is_null() => {}
        "img_size" => hub.image = Some(sides(value).ok_or_else(wrong)?),
        "act_layer" if value.is_null() => {}
        "act_layer" if value == "silu" => hub.silu = true,
        "act_layer" => hub.gelu = Some(activation(key, value.as_str().ok_or_else(wrong)?)?),
        "norm_layer" if value.is_null() => {}
        "norm_layer" => match value.as_str() {
            Some("layernorm" | "layernormfp32") => {}
            _ => fail!("`{key}` is {value}; only LayerNorm is supported"),
        },
        "attn_pool_num_heads" if value.is_null() => {}
        "attn_pool_num_heads" => {
            hub.usual.map_heads = Some(value.as_u64().filter(|h| *h > 0).ok_or_else(wrong)? as usize)
        }
        "pool_include_prefix" => {
            let all = value.as_bool().ok_or_else(wrong)?;
            hub.usual.map_tokens = Some(if all { MapTokens::All } else { MapTokens::Patches });
        }
        "use_rot_pos_emb" | "rope_type" | "rope_temperature" | "rope_grid_offset" | "rope_grid_indexing"
        | "rope_rotate_half" | "ref_feat_shape" => rotary(hub, key, value).ok_or_else(wrong)?,
        "final_norm" => hub.final_norm = Some(value.as_bool().ok_or_else(wrong)?),
        "proj_bias" => standard(true.into())?,
        "scale_attn_norm" | "scale_mlp_norm" | "use_post_norm" | "dynamic_rope" => standard(false.into())?,
        key if SILENT.contains(&key) => {}
        key => fail!("`{key}` is {value}, an argument that is not supported"),
    }
    Ok(())
}

/// An argument about rotary positions; `None` if its value is not supported.
fn rotary(hub: &mut Hub, key: &str, value: &Value) -> Option<()> {
    let rope = hub.usual.rope.get_or_insert(Rotary::NONE);
    match key {
        "ref_feat_shape" if value.is_null() => rope.reference = None,
        "ref_feat_shape" => rope.reference = Some(sides(value)?),
        "rope_temperature" => rope.theta = Some(value.as_f64()? as f32),
        "rope_grid_offset" => rope.offset = value.as_f64()? as f32,
        "rope_grid_indexing" if value == "ij" => rope.indexing = RopeIndexing::Ij,
        "rope_grid_indexing" if value == "xy" => rope.indexing = RopeIndexing::Xy,
        "rope_type" if value == "dinov3" => rope.kind = RopeKind::Dinov3,
        "rope_type" if value == "cat" => rope.kind = RopeKind::Eva,
        "use_rot_pos_emb" if value == false => *rope = Rotary::NONE,
        // These must agree with the architecture.
        "use_rot_pos_emb" if value == true && rope.kind != RopeKind::None => {}
        "rope_rotate_half" if value.as_bool()? == (rope.kind == RopeKind::Dinov3) => {}
        _ => return None,
    }
    Some(())
}

/// `None`: no pooling, which only a model without a classifier has.
fn pool(key: &str, name: &str) -> Result<Option<PoolKind>> {
    match name {
        "token" => Ok(Some(PoolKind::Token)),
        "avg" => Ok(Some(PoolKind::Gap)),
        "map" => Ok(Some(PoolKind::Map)),
        "" => Ok(None),
        other => fail!("`{key}` is `{other}`; `token`, `avg` and `map` are supported"),
    }
}

/// (H, W) from one number, or from the last two of a list.
fn sides(value: &Value) -> Option<(usize, usize)> {
    let side = |value: &Value| value.as_u64().filter(|s| *s > 0).map(|s| s as usize);
    match value {
        Value::Array(items) => match items.as_slice() {
            [.., h, w] => Some((side(h)?, side(w)?)),
            _ => None,
        },
        one => side(one).map(|s| (s, s)),
    }
}

/// Settings that the card omits default as in timm's `resolve_data_config`.
fn prepare(hub: &mut Hub, card: &Value) -> Result<()> {
    let mean = colour(card, "mean")?.unwrap_or(IMAGENET_MEAN);
    hub.normalise = Some(normalise(mean, colour(card, "std")?.unwrap_or(IMAGENET_STD), 1.0 / 255.0)?);
    let size = &card["input_size"];
    hub.pictures = match size {
        Value::Null => None,
        size => Some(sides(size).ok_or_else(|| Error::new(format!("`input_size` is {size}")))?),
    };
    let ratio = match &card["crop_pct"] {
        Value::Null => Some(0.875),
        ratio => ratio.as_f64().filter(|r| *r > 0.0 && *r <= 1.0),
    };
    let Some(ratio) = ratio else { fail!("`crop_pct` is {}, not a share", card["crop_pct"]) };
    let (interpolation, mode) =
        (card["interpolation"].as_str().unwrap_or("bicubic"), card["crop_mode"].as_str().unwrap_or("center"));
    hub.crop_ratio = Some(ratio as f32);
    hub.resize = match (mode, interpolation) {
        ("center", "bicubic") => Some(EvalResize::Center),
        ("center", "bilinear") => Some(EvalResize::CenterBilinear),
        ("squash", "bicubic") => Some(EvalResize::SquashBicubic),
        ("squash", "bilinear") => Some(EvalResize::SquashSmooth),
        _ => None,
    };
    if hub.resize.is_none() {
        hub.unprepared = Some(format!(
            "`crop_mode` is `{mode}` and `interpolation` is `{interpolation}`; `center` and `squash`, `bicubic` and \
             `bilinear` are supported"
        ));
    }
    Ok(())
}
