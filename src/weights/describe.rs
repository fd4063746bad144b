//! Describes a weights file from its headers alone.

use std::path::Path;

use serde_json::{Value, json};

use super::container::Container;
use super::detect::NO_HEADS;
use super::fits::Misfits;
use super::headers::Headers;
use super::hub::Hub;
use super::{ModelOverrides, augreg, locate, unsealed};
use crate::error::{At, Result};
use crate::seal::Seal;
use crate::vit::config::Posemb;
use crate::vit::params::ParamLayout;

/// Layout, sizes, heads (or `"unknown"`), provenance, and the tensors that are missing, unexpected or of a
/// different shape than the model needs.
pub fn describe(path: &Path, overrides: &ModelOverrides) -> Result<Value> {
    let path = locate(path)?;
    let container = Container::open(&path)?;
    let hub = Hub::beside(&path)?;
    let headers = match Headers::read(&container, &path, hub.clone(), overrides) {
        // Nothing else that is said here depends on it.
        Err(e) if e.message().starts_with(NO_HEADS) => {
            Headers::read(&container, &path, hub, &ModelOverrides { heads: Some(1), ..overrides.clone() })
        }
        read => read,
    }
    .map_err(|e| e.at(path.display()))?;
    let config = &headers.detected.config;
    let mut shapes = headers.plan.shapes.clone();
    if config.posemb == Posemb::Sincos2d {
        shapes.remove("pos_embed");
    }
    let params: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
    let misfits = Misfits::of(&ParamLayout::new(config, |_| false), &shapes);
    let unknown = || json!("unknown");
    let mut provenance = serde_json::to_value(&headers.meta).at(path.display())?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let name = path.file_name().unwrap_or_default();
    let checkpoint = Seal::read(folder)?.filter(|s| s.files().any(|f| name == f)).map(|seal| seal.facts());
    let notes: Vec<String> = headers.plan.notes.iter().cloned().chain(unsealed(folder)).collect();
    let class_names = provenance.as_object_mut().and_then(|p| p.remove("classes"));
    Ok(json!({
        "kind": "weights",
        "path": path.display().to_string(),
        "layout": headers.plan.kind,
        "width": config.width,
        "depth": config.depth,
        "heads": overrides.heads.or(headers.heads).map_or_else(unknown, Into::into),
        "mlp": config.mlp,
        "mlp_kind": config.mlp_kind,
        "mlp_norm": config.mlp_norm,
        "qkv_bias": config.qkv_bias,
        "patch_bias": config.patch_bias,
        "norm_pre": config.norm_pre,
        "patch": config.patch,
        "image": if headers.detected.grid_known { json!(config.image) } else { unknown() },
        "classes": config.classes,
        "class_names": class_names,
        "params": params,
        "pool": config.pool,
        "norm": config.norm,
        "extra_tokens": config.extra_tokens,
        "registers": config.registers,
        "rope": config.rope,
        "rep_size": config.rep_size,
        "posemb": config.posemb,
        "posemb_join": config.posemb_join,
        "layer_scale": config.layer_scale > 0.0,
        "gelu": config.gelu,
        "ln_eps": config.ln_eps.to_string().parse::<f64>().unwrap_or(f64::from(config.ln_eps)),
        "missing": misfits.missing,
        "unexpected": misfits.unexpected,
        "reshaped": misfits.reshaped,
        "notes": notes,
        "unprepared": headers.unprepared,
        "augreg": augreg::Name::of_file(&path).map(|name| name.describe()),
        "provenance": provenance,
        "checkpoint": checkpoint,
    }))
}
