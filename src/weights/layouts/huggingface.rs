//! transformers: `ViTForImageClassification`, `ViTModel`, and the DeiT models that share their names.
//!
//! q, k and v are separate layers; everything else has our shapes. A base model is saved without the prefix
//! (`vit.`, `deit.`) and has a pooler, which is the representation layer. transformers 5 uses other names in
//! memory than in the files that it writes. Both are read; the files' names are written.

use super::{LayoutKind, Plan, Shapes, Source};
use crate::error::Result;
use crate::fail;
use crate::vit::names::{Form, block_of};

const STEM_AND_HEAD: [(&str, &str); 15] = [
    ("cls_token", "embeddings.cls_token"),
    ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
    ("patch_embed.proj.bias", "embeddings.patch_embeddings.projection.bias"),
    ("norm.weight", "layernorm.weight"),
    ("norm.bias", "layernorm.bias"),
    ("pre_logits.weight", "pooler.dense.weight"),
    ("pre_logits.bias", "pooler.dense.bias"),
    ("head.weight", "classifier.weight"),
    ("head.bias", "classifier.bias"),
    ("head.weight", "cls_classifier.weight"),
    ("head.bias", "cls_classifier.bias"),
    ("head_dist.weight", "distillation_classifier.weight"),
    ("head_dist.bias", "distillation_classifier.bias"),
];

const fn rows(part: usize) -> Form {
    Form::Rows { part, parts: 3 }
}

/// (ours, in files, in the memory of transformers 5, form), without `.weight` and `.bias`.
const BLOCK: [(&str, &str, &str, Form); 8] = [
    ("norm1", "layernorm_before", "layernorm_before", Form::Same),
    ("attn.qkv", "attention.attention.query", "attention.q_proj", rows(0)),
    ("attn.qkv", "attention.attention.key", "attention.k_proj", rows(1)),
    ("attn.qkv", "attention.attention.value", "attention.v_proj", rows(2)),
    ("attn.proj", "attention.output.dense", "attention.o_proj", Form::Same),
    ("norm2", "layernorm_after", "layernorm_after", Form::Same),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1", Form::Same),
    ("mlp.fc2", "output.dense", "mlp.fc2", Form::Same),
];

pub(super) fn plan(shapes: &Shapes) -> Result<Plan> {
    let mut plan = Plan::new(LayoutKind::HuggingFace);
    let shapes = &plan.without_pretext(shapes);
    plan.imagenet |=
        shapes.keys().any(|name| without_prefix(name).starts_with("embeddings.distillation_token"));
    let classifier = shapes.keys().any(|name| name.contains("classifier."));
    for (name, shape) in shapes {
        if classifier && without_prefix(name).starts_with("pooler.") {
            plan.notes.push(format!("`{name}` left out: a pooler takes no part in the classification"));
            continue;
        }
        let (own, form) = own_name(name).unwrap_or_else(|| (name.clone(), Form::Same));
        let source = Source { file_name: name.clone(), layer: None, shape: shape.clone(), form };
        let sources = plan.sources.entry(own).or_default();
        if let Some(other) = sources.iter().find(|s| s.form == form) {
            fail!("`{}` and `{name}` are the same tensor", other.file_name);
        }
        sources.push(source);
    }
    plan.finish()
}

fn without_prefix(name: &str) -> &str {
    name.strip_prefix("vit.").or_else(|| name.strip_prefix("deit.")).unwrap_or(name)
}

/// A name in a file → ours, and which part of it.
pub(super) fn own_name(name: &str) -> Option<(String, Form)> {
    let name = without_prefix(name);
    if let Some((own, _)) = STEM_AND_HEAD.iter().find(|(_, theirs)| *theirs == name) {
        return Some((own.to_string(), Form::Same));
    }
    let (block, suffix) = block_of(name, "encoder.layer.", '.').or_else(|| block_of(name, "layers.", '.'))?;
    let (module, leaf) = suffix.rsplit_once('.').filter(|(_, leaf)| ["weight", "bias"].contains(leaf))?;
    let (own, _, _, form) = BLOCK.iter().find(|(_, file, memory, _)| *file == module || *memory == module)?;
    Some((format!("blocks.{block}.{own}.{leaf}"), *form))
}

/// Our name → the names of its parts in a file, in order; empty if the layout has no such tensor. `base`: for
/// a `ViTModel`, whose names have no prefix.
pub(in crate::weights) fn file_names(own: &str, base: bool) -> Vec<String> {
    let prefix = if base { "" } else { "vit." };
    if let Some((block, suffix)) = block_of(own, "blocks.", '.') {
        let Some((module, leaf)) = suffix.rsplit_once('.') else { return Vec::new() };
        let parts = BLOCK.iter().filter(|(ours, ..)| *ours == module);
        return parts.map(|(_, file, ..)| format!("{prefix}encoder.layer.{block}.{file}.{leaf}")).collect();
    }
    // The class token, positions, patches, final norm and pooler belong to the base model; distilled models
    // are DeiT's.
    let of_deit = own == "dist_token" || own.starts_with("head_dist.");
    let found = STEM_AND_HEAD.iter().find(|(ours, _)| *ours == own && !of_deit);
    found
        .map(|(_, file)| if own.starts_with("head.") { file.to_string() } else { format!("{prefix}{file}") })
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways_with_and_without_a_prefix() {
        for own in
            ["cls_token", "blocks.7.attn.qkv.bias", "blocks.0.mlp.fc2.weight", "norm.bias", "head.weight"]
        {
            for base in [true, false] {
                for (part, file) in file_names(own, base).iter().enumerate() {
                    let (back, form) = own_name(file).unwrap();
                    assert_eq!((back.as_str(), form.part().0), (own, part), "{file}");
                }
            }
        }
        assert_eq!(file_names("blocks.0.attn.qkv.weight", false).len(), 3);
        assert!(
            ["dist_token", "blocks.0.ls1.gamma", "attn_pool.latent"]
                .iter()
                .all(|n| file_names(n, true).is_empty())
        );
        assert_eq!(
            own_name("vit.layers.3.attention.v_proj.weight"),
            Some(("blocks.3.attn.qkv.weight".into(), rows(2)))
        );
    }
}
