//! timm's state dict, which is also our own layout. Read too: old spellings, those of timm's Eva class (DINOv3, EVA-02,
//! Perception Encoder), and the DINO models in Meta's own names.

use super::{LayoutKind, Plan, Shapes, Source};
use crate::error::Result;
use crate::fail;
use crate::vit::config::{PosembJoin, RopeKind};
use crate::vit::names::{Form, block_of};
use crate::weights::usual::{Rotary, Usual};

/// Tensors that no forward pass reads: tables that follow from the configuration, and parts of a pre-training.
const UNREAD: [&str; 5] = ["rope.", "rope_embed.", "local_cls_norm.", "projectors.", "norm_pretrain."];

const fn part(part: usize, parts: usize) -> Form {
    Form::Rows { part, parts }
}

/// (ours, theirs, form) inside a block, without `.weight` and `.bias`.
const BLOCK: [(&str, &str, Form); 8] = [
    ("attn.qkv", "attn.q_proj", part(0, 3)),
    ("attn.qkv", "attn.k_proj", part(1, 3)),
    ("attn.qkv", "attn.v_proj", part(2, 3)),
    ("mlp.fc1", "mlp.fc1_g", part(0, 2)),
    ("mlp.fc1", "mlp.fc1_x", part(1, 2)),
    ("mlp.fc1", "mlp.w12", Form::Same),
    ("mlp.fc1", "mlp.w1", part(0, 2)),
    ("mlp.fc1", "mlp.w2", part(1, 2)),
];

pub(super) fn plan(shapes: &Shapes) -> Result<Plan> {
    let mut plan = Plan::new(LayoutKind::Timm);
    let mut shapes = plan.without_pretext(shapes);
    let has = |mark: &str| shapes.keys().any(|name| name.contains(mark));
    // DeiT's and DeiT-III's own.
    plan.imagenet |= has("dist_token") || (has(".gamma_1") && !has(".attn.q_bias") && !has("reg_token"));
    plan.key_without_bias = has(".attn.q_proj.");
    let (dinov3, registers) = (has("storage_tokens"), has("register_tokens"));
    if dinov3 {
        let rope = Some(Rotary::of(RopeKind::Dinov3));
        plan.usual = Usual { ln_eps: Some(1e-5), rope, ..Usual::default() };
        plan.imagenet = true;
    }
    if registers {
        // As in transformers: a row for the class token, and registers that join afterwards.
        plan.fold_class_row = true;
        plan.join = Some(PosembJoin::Before);
        plan.imagenet = true;
    }
    let unread =
        |name: &str| UNREAD.iter().any(|start| name.starts_with(start)) || name.ends_with(".qkv.bias_mask");
    let masked = has(".qkv.bias_mask");
    let count = shapes.len();
    shapes.retain(|name, _| !unread(name));
    if shapes.len() < count {
        plan.notes.push(format!("{} tensors left out: no forward pass reads them", count - shapes.len()));
    }
    for (name, shape) in &shapes {
        for (own, form) in own_names(name, masked) {
            let source = Source { file_name: name.clone(), layer: None, shape: shape.clone(), form };
            let sources = plan.sources.entry(own).or_default();
            if let Some(other) = sources.iter().find(|s| s.form.part() == form.part()) {
                fail!("`{}` and `{name}` are the same tensor", other.file_name);
            }
            sources.push(source);
        }
    }
    plan.finish()
}

/// A name in a file → ours, and which part of it. `masked`: the third of a `qkv.bias` that belongs to k counts as zero.
fn own_names(name: &str, masked: bool) -> Vec<(String, Form)> {
    if let (true, Some(layer)) = (masked, name.strip_suffix("qkv.bias")) {
        let third = |first| Form::Slice { first, count: 1, of: 3 };
        return vec![(format!("{layer}q_bias"), third(0)), (format!("{layer}v_bias"), third(2))];
    }
    vec![own_name(name)]
}

fn own_name(name: &str) -> (String, Form) {
    if ["register_tokens", "storage_tokens"].contains(&name) {
        return ("reg_token".into(), Form::Same);
    }
    // The representation layer of timm before 0.6.
    if let Some(rest) = name.strip_prefix("pre_logits.fc.") {
        return (format!("pre_logits.{rest}"), Form::Same);
    }
    let Some((block, rest)) = block_of(name, "blocks.", '.') else { return (name.to_string(), Form::Same) };
    match rest.rsplit_once('.') {
        Some(("mlp.w3", leaf)) => return (format!("blocks.{block}.mlp.fc2.{leaf}"), Form::Same),
        Some((module, leaf)) => {
            if let Some((own, _, form)) = BLOCK.iter().find(|(_, theirs, _)| *theirs == module) {
                return (format!("blocks.{block}.{own}.{leaf}"), *form);
            }
        }
        None if rest == "gamma_1" => return (format!("blocks.{block}.ls1.gamma"), Form::Same),
        None if rest == "gamma_2" => return (format!("blocks.{block}.ls2.gamma"), Form::Same),
        None => {}
    }
    (name.to_string(), Form::Same)
}
