//! Image models of transformers besides its ViT, and CLIP's image tower in OpenAI's names: one table of names for each.
//!
//! A file may hold a text tower too, which is left out. A classifier of transformers pools in its own way; what it does
//! not read is left out as well.

use super::{LayoutKind, Plan, Shapes, Source};
use crate::backend::Gelu;
use crate::error::Result;
use crate::fail;
use crate::vit::config::{PoolKind, PosembJoin, RopeKind};
use crate::vit::names::{Form, block_of};
use crate::weights::usual::{Rotary, Usual};

use Form::{Dense, Same};

/// (ours, theirs, form). `.*` stands for `.weight` and `.bias`.
type Row = (&'static str, &'static str, Form);

/// The names of one kind of model.
pub(super) struct Family {
    /// In messages.
    name: &'static str,
    kind: LayoutKind,
    /// What may stand in front of all names.
    prefixes: &'static [&'static str],
    stem: &'static [Row],
    /// What stands in front of a block's number.
    blocks: &'static str,
    block: &'static [Row],
    ln_eps: f32,
    gelu: Option<Gelu>,
    rope: RopeKind,
}

const fn third(part: usize) -> Form {
    Form::Rows { part, parts: 3 }
}

const fn half(part: usize) -> Form {
    Form::Rows { part, parts: 2 }
}

const ONE: Form = Form::Leading { axes: 1 };
const TWO: Form = Form::Leading { axes: 2 };

const DINOV2: Family = Family {
    name: "DINOv2 of transformers",
    kind: LayoutKind::HuggingFace,
    prefixes: &["dinov2_with_registers.", "dinov2.", ""],
    stem: &[
        ("cls_token", "embeddings.cls_token", Same),
        ("reg_token", "embeddings.register_tokens", Same),
        ("pos_embed", "embeddings.position_embeddings", Same),
        ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*", Same),
        ("norm.*", "layernorm.*", Same),
        ("head.*", "classifier.*", Same),
    ],
    blocks: "encoder.layer.",
    block: &[
        ("norm1.*", "norm1.*", Same),
        ("attn.qkv.*", "attention.attention.query.*", third(0)),
        ("attn.qkv.*", "attention.attention.key.*", third(1)),
        ("attn.qkv.*", "attention.attention.value.*", third(2)),
        ("attn.proj.*", "attention.output.dense.*", Same),
        ("ls1.gamma", "layer_scale1.lambda1", Same),
        ("norm2.*", "norm2.*", Same),
        ("mlp.fc1.*", "mlp.fc1.*", Same),
        ("mlp.fc2.*", "mlp.fc2.*", Same),
        ("mlp.fc1.*", "mlp.weights_in.*", Same),
        ("mlp.fc2.*", "mlp.weights_out.*", Same),
        ("ls2.gamma", "layer_scale2.lambda1", Same),
    ],
    ln_eps: 1e-6,
    gelu: None,
    rope: RopeKind::None,
};

const DINOV3_STEM: [Row; 4] = [
    ("cls_token", "embeddings.cls_token", Same),
    ("reg_token", "embeddings.register_tokens", Same),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.*", Same),
    ("norm.*", "norm.*", Same),
];

const DINOV3: Family = Family {
    name: "DINOv3 of transformers",
    kind: LayoutKind::HuggingFace,
    prefixes: &["model.", "dinov3_vit.", ""],
    stem: &DINOV3_STEM,
    blocks: "layer.",
    block: &[
        ("norm1.*", "norm1.*", Same),
        ("attn.qkv.*", "attention.q_proj.*", third(0)),
        ("attn.qkv.*", "attention.k_proj.*", third(1)),
        ("attn.qkv.*", "attention.v_proj.*", third(2)),
        ("attn.proj.*", "attention.o_proj.*", Same),
        ("ls1.gamma", "layer_scale1.lambda1", Same),
        ("norm2.*", "norm2.*", Same),
        ("mlp.fc1.*", "mlp.up_proj.*", Same),
        ("mlp.fc2.*", "mlp.down_proj.*", Same),
        ("ls2.gamma", "layer_scale2.lambda1", Same),
    ],
    ln_eps: 1e-5,
    gelu: None,
    rope: RopeKind::Dinov3,
};

/// `up_proj` is the whole first layer of a dense MLP and the second half of a gated one's.
const DINOV3_GATED: Family = Family {
    block: &[
        ("norm1.*", "norm1.*", Same),
        ("attn.qkv.*", "attention.q_proj.*", third(0)),
        ("attn.qkv.*", "attention.k_proj.*", third(1)),
        ("attn.qkv.*", "attention.v_proj.*", third(2)),
        ("attn.proj.*", "attention.o_proj.*", Same),
        ("ls1.gamma", "layer_scale1.lambda1", Same),
        ("norm2.*", "norm2.*", Same),
        ("mlp.fc1.*", "mlp.gate_proj.*", half(0)),
        ("mlp.fc1.*", "mlp.up_proj.*", half(1)),
        ("mlp.fc2.*", "mlp.down_proj.*", Same),
        ("ls2.gamma", "layer_scale2.lambda1", Same),
    ],
    ..DINOV3
};

const TOWER_BLOCK: [Row; 8] = [
    ("norm1.*", "layer_norm1.*", Same),
    ("attn.qkv.*", "self_attn.q_proj.*", third(0)),
    ("attn.qkv.*", "self_attn.k_proj.*", third(1)),
    ("attn.qkv.*", "self_attn.v_proj.*", third(2)),
    ("attn.proj.*", "self_attn.out_proj.*", Same),
    ("norm2.*", "layer_norm2.*", Same),
    ("mlp.fc1.*", "mlp.fc1.*", Same),
    ("mlp.fc2.*", "mlp.fc2.*", Same),
];

const fn of_in_proj(first: usize, count: usize) -> Form {
    Form::Slice { first, count, of: 3 }
}

const SIGLIP: Family = Family {
    name: "SigLIP of transformers",
    kind: LayoutKind::HuggingFace,
    prefixes: &["vision_model.", ""],
    stem: &[
        ("pos_embed", "embeddings.position_embedding.weight", ONE),
        ("patch_embed.proj.*", "embeddings.patch_embedding.*", Same),
        ("norm.*", "post_layernorm.*", Same),
        ("attn_pool.latent", "head.probe", Same),
        ("attn_pool.q.weight", "head.attention.in_proj_weight", of_in_proj(0, 1)),
        ("attn_pool.q.bias", "head.attention.in_proj_bias", of_in_proj(0, 1)),
        ("attn_pool.kv.weight", "head.attention.in_proj_weight", of_in_proj(1, 2)),
        ("attn_pool.kv.bias", "head.attention.in_proj_bias", of_in_proj(1, 2)),
        ("attn_pool.proj.*", "head.attention.out_proj.*", Same),
        ("attn_pool.norm.*", "head.layernorm.*", Same),
        ("attn_pool.mlp.fc1.*", "head.mlp.fc1.*", Same),
        ("attn_pool.mlp.fc2.*", "head.mlp.fc2.*", Same),
        ("head.*", "classifier.*", Same),
    ],
    blocks: "encoder.layers.",
    block: &TOWER_BLOCK,
    ln_eps: 1e-6,
    // The default of its configuration.
    gelu: Some(Gelu::Tanh),
    rope: RopeKind::None,
};

const CLIP: Family = Family {
    name: "CLIP of transformers",
    kind: LayoutKind::HuggingFace,
    prefixes: &["vision_model.", ""],
    stem: &[
        ("cls_token", "embeddings.class_embedding", TWO),
        ("pos_embed", "embeddings.position_embedding.weight", ONE),
        ("patch_embed.proj.*", "embeddings.patch_embedding.*", Same),
        ("norm_pre.*", "pre_layrnorm.*", Same),
        ("norm.*", "post_layernorm.*", Same),
        ("head.*", "classifier.*", Same),
        ("head.weight", "visual_projection.weight", Same),
    ],
    blocks: "encoder.layers.",
    block: &TOWER_BLOCK,
    ln_eps: 1e-5,
    gelu: None,
    rope: RopeKind::None,
};

const OPENAI: Family = Family {
    name: "CLIP in OpenAI's names",
    kind: LayoutKind::OpenClip,
    prefixes: &["visual.", ""],
    stem: &[
        ("cls_token", "class_embedding", TWO),
        ("pos_embed", "positional_embedding", ONE),
        ("patch_embed.proj.*", "conv1.*", Same),
        ("norm_pre.*", "ln_pre.*", Same),
        ("norm.*", "ln_post.*", Same),
        ("head.weight", "proj", Dense),
    ],
    blocks: "transformer.resblocks.",
    block: &[
        ("norm1.*", "ln_1.*", Same),
        ("attn.qkv.weight", "attn.in_proj_weight", Same),
        ("attn.qkv.bias", "attn.in_proj_bias", Same),
        ("attn.proj.*", "attn.out_proj.*", Same),
        ("ls1.gamma", "ls_1.gamma", Same),
        ("norm2.*", "ln_2.*", Same),
        ("mlp.fc1.*", "mlp.c_fc.*", Same),
        ("mlp.fc2.*", "mlp.c_proj.*", Same),
        ("ls2.gamma", "ls_2.gamma", Same),
    ],
    ln_eps: 1e-5,
    gelu: None,
    rope: RopeKind::None,
};

/// Beginnings of names that belong to a text tower, to the loss between both towers, or to no model.
const NOT_OF_THE_IMAGE: [&str; 14] = [
    "text_model.",
    "text.",
    "textual.",
    "text_projection",
    "token_embedding.",
    "logit_scale",
    "logit_bias",
    "transformer.",
    "positional_embedding",
    "ln_final.",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
];

/// The tensors of the image tower, and a note about the others. The names of a model that has no tower stay as they are.
pub(super) fn image_tower(shapes: &Shapes) -> (Shapes, Option<String>) {
    let tower = |name: &&String| {
        name.starts_with("vision_model.")
            || name.starts_with("visual.")
            || name.starts_with("visual_projection.")
    };
    if !shapes.keys().any(|name| tower(&name)) {
        return (shapes.clone(), None);
    }
    let (others, own): (Shapes, Shapes) = shapes
        .iter()
        .map(|(name, shape)| (name.clone(), shape.clone()))
        .partition(|(name, _)| !tower(&name) && NOT_OF_THE_IMAGE.iter().any(|start| name.starts_with(start)));
    let note = others.keys().next().map(|first| {
        format!(
            "`{first}` left out, {} in all: the text half of the model and what joins both halves",
            others.len()
        )
    });
    (own, note)
}

/// The family whose names these are.
pub(super) fn of(shapes: &Shapes) -> Option<&'static Family> {
    let any = |mark: &str| shapes.keys().any(|name| name.contains(mark));
    let scaled = any("layer_scale1.lambda1");
    match () {
        () if any("embeddings.patch_embedding.weight") => {
            Some(if any("embeddings.class_embedding") { &CLIP } else { &SIGLIP })
        }
        () if scaled && any(".attention.attention.query.") => Some(&DINOV2),
        () if scaled && any(".attention.q_proj.") => {
            Some(if any(".mlp.gate_proj.") { &DINOV3_GATED } else { &DINOV3 })
        }
        () if any("transformer.resblocks.") && any("conv1.weight") => Some(&OPENAI),
        () => None,
    }
}

impl Family {
    pub(super) fn plan(&self, shapes: &Shapes) -> Result<Plan> {
        let mut plan = Plan::new(self.kind);
        plan.usual = Usual {
            ln_eps: Some(self.ln_eps),
            gelu: self.gelu,
            rope: Some(Rotary::of(self.rope)),
            ..Usual::default()
        };
        plan.key_without_bias = self.rope == RopeKind::Dinov3;
        let left_out = self.unread(shapes, &mut plan);
        let mut dropped: Vec<&str> = Vec::new();
        for (name, shape) in shapes {
            let bare = self.without_prefix(name);
            if left_out.iter().any(|start| bare.starts_with(start)) {
                continue;
            }
            if bare == "embeddings.mask_token" || bare.ends_with(".position_ids") {
                dropped.push(name);
                continue;
            }
            let mut own = self.own_names(bare);
            if own.is_empty() {
                own.push((name.clone(), Same));
            }
            for (own, form) in own {
                let source = Source { file_name: name.clone(), layer: None, shape: shape.clone(), form };
                let sources = plan.sources.entry(own).or_default();
                if let Some(other) = sources.iter().find(|s| s.form == form) {
                    fail!("`{}` and `{name}` are the same tensor", other.file_name);
                }
                sources.push(source);
            }
        }
        if let Some(first) = dropped.first() {
            plan.notes
                .push(format!("`{first}` left out, {} in all: no forward pass reads them", dropped.len()));
        }
        // A projection to the space that both towers share has no bias.
        if let (Some(weight), false) =
            (plan.sources.get("head.weight"), plan.sources.contains_key("head.bias"))
        {
            let form = weight[0].form;
            let classes = form.own_shape(&weight[0].shape).map_or(0, |shape| shape[0]);
            plan.zeros.insert("head.bias".into(), vec![classes]);
            plan.notes.push(format!(
                "`{}` is read as the head, with a bias of zeros: its {classes} outputs are an embedding, not classes",
                weight[0].file_name
            ));
        }
        if plan.sources.contains_key("reg_token") && plan.sources.contains_key("pos_embed") {
            // transformers adds the positions before it inserts the registers; the class token has a row.
            plan.fold_class_row = true;
            plan.join = Some(PosembJoin::Before);
            plan.notes.push(
                "the class token's row of `position_embeddings` is added to the class token, as timm stores it: the same \
                 function, but one parameter instead of two in training"
                    .into(),
            );
        }
        plan.finish()
    }

    /// Beginnings of the names that the classifier does not read; also says how it pools.
    fn unread(&self, shapes: &Shapes, plan: &mut Plan) -> &'static [&'static str] {
        let classifier = shapes.keys().any(|name| self.without_prefix(name).starts_with("classifier."));
        if !classifier {
            return &[];
        }
        let (pool, unread, rule): (_, &[&str], _) = match self.name {
            name if name == SIGLIP.name => (
                PoolKind::Gap,
                &["head."],
                "the classifier reads the mean of the normalised patches, as `SiglipForImageClassification` does; the \
                 attention pooling in the file (`head.probe` and others, which timm reads) is left out",
            ),
            name if name == CLIP.name => (
                PoolKind::Gap,
                &["post_layernorm.", "visual_projection."],
                "the classifier reads the mean of the patches without a norm, as `CLIPForImageClassification` does; \
                 `post_layernorm` (which timm reads, on the class token) is left out",
            ),
            _ => return &[],
        };
        plan.usual.pool = Some(pool);
        plan.notes.push(rule.into());
        unread
    }

    fn without_prefix<'a>(&self, name: &'a str) -> &'a str {
        self.prefixes.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
    }

    /// A name in a file without its prefix → ours, and which part of it; several if one tensor of the file holds several
    /// of ours.
    fn own_names(&self, bare: &str) -> Vec<(String, Form)> {
        let (start, rest, rows) = match block_of(bare, self.blocks, '.') {
            Some((block, rest)) => (format!("blocks.{block}."), rest, self.block),
            None => (String::new(), bare, self.stem),
        };
        let own = |(own, theirs, form): &Row| match (own.strip_suffix('*'), theirs.strip_suffix('*')) {
            (Some(own), Some(theirs)) => {
                let leaf = rest.strip_prefix(theirs).filter(|leaf| ["weight", "bias"].contains(leaf))?;
                Some((format!("{start}{own}{leaf}"), *form))
            }
            _ => (*theirs == rest).then(|| (format!("{start}{own}"), *form)),
        };
        rows.iter().filter_map(own).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_tower_is_left_out_and_a_projection_has_no_bias() {
        let names = [
            "visual.conv1.weight",
            "visual.transformer.resblocks.0.ln_1.bias",
            "transformer.resblocks.0.ln_1.bias",
            "logit_scale",
        ];
        let shapes: Shapes = names.into_iter().map(|name| (name.to_string(), vec![1])).collect();
        let (own, note) = image_tower(&shapes);
        assert_eq!(own.len(), 2);
        assert!(note.unwrap().contains("2 in all"));
        let family = of(&own).unwrap();
        assert_eq!(family.name, OPENAI.name);
        let bare = family.without_prefix("visual.transformer.resblocks.3.mlp.c_fc.bias");
        assert_eq!(family.own_names(bare), [("blocks.3.mlp.fc1.bias".to_string(), Same)]);
    }

    #[test]
    fn one_tensor_may_hold_several_of_ours() {
        let own = SIGLIP.own_names("head.attention.in_proj_bias");
        assert_eq!(
            own,
            [
                ("attn_pool.q.bias".to_string(), of_in_proj(0, 1)),
                ("attn_pool.kv.bias".to_string(), of_in_proj(1, 2))
            ]
        );
    }
}
