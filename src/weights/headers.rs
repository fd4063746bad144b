//! Everything that is known about a file before any values are read.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::container::Container;
use super::detect::{Detected, detect};
use super::hub::Hub;
use super::layouts::{self, LayoutKind, Plan, Shapes};
use super::meta::{CheckpointMeta, META_KEY, MODEL_KEY};
use super::overrides::ModelOverrides;
use crate::backend::{Gelu, Normalise};
use crate::error::{Error, Result};
use crate::fail;
use crate::recipe::DataSection;
use crate::vit::config::{ModelConfig, PoolKind};

#[derive(Debug)]
pub(super) struct Headers {
    pub(super) plan: Plan,
    pub(super) detected: Detected,
    /// H, if the file or a `config.json` gives it.
    pub(super) heads: Option<usize>,
    pub(super) meta: CheckpointMeta,
    /// See [`super::ModelFile::unprepared`].
    pub(super) unprepared: Option<String>,
}

/// The configuration in a file's metadata.
pub(super) struct Stored {
    pub(super) config: ModelConfig,
    /// False if the writer did not know the image size and left it out.
    pub(super) grid_known: bool,
}

impl Headers {
    pub(super) fn read(
        container: &Container,
        path: &Path,
        hub: Hub,
        overrides: &ModelOverrides,
    ) -> Result<Self> {
        let (shapes, aliases) = renamed(container.shapes()?, overrides)?;
        let mut plan = layouts::plan(&shapes, overrides)?;
        plan.rename_sources(&aliases);
        let stored = match container.metadata(MODEL_KEY) {
            Some(text) => Some(parse_stored(text)?),
            None => None,
        };
        if stored.is_some() && plan.kind == LayoutKind::Timm {
            plan.kind = LayoutKind::Vitrum;
        }
        let stored_heads = stored.as_ref().map(|s| s.config.heads);
        let unnamed = stored.is_none() && !hub.named;
        let heads = hub.heads.or(plan.heads).or(stored_heads).or(hub.usual.heads);
        let mut meta = match container.metadata(META_KEY) {
            Some(text) => serde_json::from_str(text).map_err(|e| parse_error(META_KEY, e))?,
            None => CheckpointMeta::of_layout(plan.kind),
        };
        let detected = detect(&plan, stored, &hub, overrides)?;
        if unnamed && overrides.gelu.is_none() {
            plan.notes.extend(doubt(&detected.config));
        }
        // What a file says about itself overrides what tensors and names suggest.
        let own = container.metadata(META_KEY).is_some();
        if !own && (plan.imagenet || named_after_imagenet(path)) {
            meta.normalise = Normalise::imagenet();
        }
        let says_mean = own || hub.normalise.is_some();
        let asked = overrides.mean.is_none();
        if plan.kind == LayoutKind::Timm && asked && !says_mean && meta.normalise == Normalise::INCEPTION {
            plan.notes.push(
                "nothing says with which mean and deviation its pictures were fed: assumed 0.5 and 0.5, ImageNet's \
                 are `--set data.mean=[0.485,0.456,0.406] --set data.std=[0.229,0.224,0.225]`"
                    .into(),
            );
        }
        plan.notes.extend(hub.complete(&mut meta, detected.config.classes));
        meta.loss = overrides.loss.or(meta.loss);
        meta.normalise = DataSection { mean: overrides.mean, std: overrides.std, ..DataSection::default() }
            .normalise(meta.normalise);
        plan.notes.extend(hub.notes.iter().cloned());
        if detected.config.classes == 0 {
            meta.classes = None;
        }
        if let Some(names) = meta.classes.as_ref().filter(|names| names.len() != detected.config.classes) {
            fail!("{} class names for {} classes", names.len(), detected.config.classes);
        }
        Ok(Self { plan, detected, heads, meta, unprepared: hub.unprepared })
    }
}

/// The note about a GELU that neither tensors nor names show, of models that come with several.
fn doubt(config: &ModelConfig) -> Option<String> {
    let taken = match config.gelu {
        Gelu::Erf => "erf",
        Gelu::Tanh => "tanh",
        Gelu::Quick => "quick",
    };
    let others = match () {
        () if config.norm_pre => "CLIP's of OpenAI, DFN and MetaCLIP want `--set model.gelu=quick`",
        () if config.pool == PoolKind::Map && config.extra_tokens == 0 => {
            "some SigLIPs want the other one of `--set model.gelu=erf` and `--set model.gelu=tanh`"
        }
        () => return None,
    };
    Some(format!("nothing says which GELU it has: {taken} is taken; {others}"))
}

/// Beginnings of the names of DeiT's, MAE's and DINO's own files; their pictures had ImageNet's mean.
fn named_after_imagenet(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let start = |mark: &str| name.starts_with(mark);
    ["deit", "mae_", "dino_", "dino-"].into_iter().any(start)
}

fn parse_error(key: &str, e: serde_json::Error) -> Error {
    Error::new(format!("metadata `{key}` does not parse: {e}"))
}

fn parse_stored(text: &str) -> Result<Stored> {
    let mut value: Value = serde_json::from_str(text).map_err(|e| parse_error(MODEL_KEY, e))?;
    let grid_known = value.get("image").is_some();
    if let (false, Some(fields)) = (grid_known, value.as_object_mut()) {
        fields.insert("image".into(), fields.get("patch").cloned().unwrap_or(json!([1, 1])));
    }
    let config = serde_json::from_value(value).map_err(|e| parse_error(MODEL_KEY, e))?;
    Ok(Stored { config, grid_known })
}

/// Excludes and renames as the user says. Also returns the file's names of the renamed tensors.
fn renamed(shapes: Shapes, overrides: &ModelOverrides) -> Result<(Shapes, BTreeMap<String, String>)> {
    if overrides.exclude.is_empty() && overrides.rename.is_empty() {
        return Ok((shapes, BTreeMap::new()));
    }
    let mut out = Shapes::new();
    let mut aliases = BTreeMap::new();
    for (name, shape) in shapes {
        let mut new = name.clone();
        for (pattern, replacement) in &overrides.rename {
            new = pattern.replace(&new, replacement.as_str()).into_owned();
        }
        // Messages use the new names.
        if overrides.exclude.iter().any(|pattern| pattern.is_match(&name) || pattern.is_match(&new)) {
            continue;
        }
        if let Some(other) = aliases.insert(new.clone(), name.clone()) {
            fail!("`weights.rename` gives `{other}` and `{name}` the same name `{new}`");
        }
        out.insert(new, shape);
    }
    Ok((out, aliases))
}
