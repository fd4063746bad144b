//! flax trees of vit_jax and big_vision, of every age.
//!
//! They differ in a prefix (optimiser state may be included), in the numbering of sub-modules, in the place
//! of the position embedding, in whether the MAP head is a module of its own, and in whether the blocks are
//! stacked along a leading axis. All are converted to linen's form before the table of
//! [`names`] is used.

use super::{LayoutKind, Plan, Shapes, Source};
use crate::error::{Error, Result};
use crate::fail;
use crate::vit::config::{ModelConfig, PosembJoin};
use crate::vit::names::{self, Form, Numbering};
use crate::weights::container::Container;
use crate::weights::overrides::ModelOverrides;
use crate::weights::store::Store;
use crate::weights::tensor::{Tensor, Tensors, shape_text};

/// The three places where flax code has kept the position embedding, oldest first.
const POSEMB_PLACES: [&str; 3] =
    ["Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding"];

const STACKED_BLOCKS: &str = "Transformer/encoderblock/";
/// Far beyond any model; a wrong shape must not cause a long loop.
const MAX_STACKED: usize = 1024;

pub(super) fn plan(shapes: &Shapes, overrides: &ModelOverrides) -> Result<Plan> {
    let prefix = parameter_prefix(shapes)?;
    let mut plan = Plan::new(LayoutKind::VitJax);
    let mut posemb_place = None;
    for (file_name, shape) in shapes {
        let Some(name) = file_name.strip_prefix(prefix) else { continue };
        let source = |layer, shape: &[usize], form| Source {
            file_name: file_name.clone(),
            layer,
            shape: shape.to_vec(),
            form,
        };
        if let Some(place) = POSEMB_PLACES.iter().find(|place| **place == name) {
            if let Some(other) = posemb_place.replace(*place) {
                fail!("two position embeddings: `{other}` and `{place}`");
            }
            plan.sources.insert("pos_embed".into(), vec![source(None, shape, Form::Same)]);
        } else if let Some(suffix) = name.strip_prefix(STACKED_BLOCKS) {
            let Some((depth, shape)) = shape.split_first() else {
                fail!("tensor `{file_name}` has shape {}", shape_text(shape));
            };
            if *depth > MAX_STACKED {
                fail!("tensor `{file_name}` stacks {depth} blocks");
            }
            for layer in 0..*depth {
                let name = names::to_linen(&format!("Transformer/encoderblock_{layer}/{suffix}"));
                add(&mut plan, file_name, &name, |form| source(Some(layer), shape, form));
            }
        } else {
            let name = inside_map_head(names::to_linen(name));
            add(&mut plan, file_name, &name, |form| source(None, shape, form));
        }
    }

    let map = plan.sources.contains_key("attn_pool.latent");
    let oldest = posemb_place == Some(POSEMB_PLACES[0]);
    plan.join = Some(if oldest { PosembJoin::After } else { PosembJoin::Before });
    if map || !oldest {
        plan.kind = LayoutKind::BigVision;
    }
    plan.heads = heads(&plan)?;
    plan.fold_class_row = !oldest && has_class_row(&plan, overrides);
    if plan.fold_class_row {
        plan.notes.push(
            "the first row of the position embedding is added to the class token, as big_vision does".into(),
        );
    }
    plan.finish()
}

/// A name that is not in the table is kept, so that the comparison with the model can list it.
fn add(plan: &mut Plan, file_name: &str, linen: &str, source: impl FnOnce(Form) -> Source) {
    let (own, form) = names::from_flax(linen).unwrap_or_else(|| (file_name.to_string(), Form::Same));
    plan.sources.entry(own).or_default().push(source(form));
}

/// Newer big_vision checkpoints keep parameters under `params/`, those from the time of `flax.optim` under
/// `opt/target/`; published files have no prefix.
fn parameter_prefix(shapes: &Shapes) -> Result<&'static str> {
    let prefix =
        ["params/", "opt/target/"].into_iter().find(|p| shapes.keys().any(|name| name.starts_with(p)));
    let prefix = prefix.unwrap_or("");
    let towers = [format!("{prefix}img/"), format!("{prefix}txt/")];
    if let Some(name) = shapes.keys().find(|name| towers.iter().any(|t| name.starts_with(t))) {
        return Err(Error::new(format!(
            "`{name}` shows that this file holds two towers, which is not supported yet"
        ))
        .hint("save the image tower's parameters without their `img/` prefix"));
    }
    Ok(prefix)
}

/// Older big_vision versions wrote the MAP head's modules at top level.
fn inside_map_head(name: String) -> String {
    const MODULES: [&str; 4] = ["probe", "MlpBlock_0/", "MultiHeadDotProductAttention_0/", "LayerNorm_0/"];
    let bare = MODULES.iter().any(|m| if m.ends_with('/') { name.starts_with(m) } else { name == *m });
    if bare { format!("MAPHead_0/{name}") } else { name }
}

/// H is an axis of every q kernel.
fn heads(plan: &Plan) -> Result<Option<usize>> {
    let mut found: Option<(usize, &str)> = None;
    for s in plan.sources.values().flatten().filter(|s| matches!(s.form, Form::Heads { .. })) {
        let &[_, heads, _] = s.shape.as_slice() else {
            fail!("tensor `{}` has shape {} instead of [D, H, Dh]", s.file_name, shape_text(&s.shape));
        };
        match found {
            Some((other, name)) if other != heads => {
                fail!("`{name}` has {other} heads and `{}` has {heads}", s.file_name)
            }
            _ => found = Some((heads, &s.file_name)),
        }
    }
    Ok(found.map(|(heads, _)| heads))
}

/// big_vision's own rule: with one row more than a square number of patches, that row is the class token's.
fn has_class_row(plan: &Plan, overrides: &ModelOverrides) -> bool {
    let shape = |own: &str| plan.sources.get(own).map(|s| s[0].shape.as_slice());
    let Some(&[1, rows, _]) = shape("pos_embed") else { return false };
    if let (Some(image), Some(&[ph, pw, _, _])) = (overrides.image, shape("patch_embed.proj.weight")) {
        return rows == (image.0 / ph) * (image.1 / pw) + 1;
    }
    rows > 1 && (rows - 1).isqrt().pow(2) == rows - 1
}

/// Our tensors (weights, or gradients of weights) under flax names and shapes. The exact inverse of
/// [`from_flax_tensors`].
///
/// vit_jax keeps a row of the position embedding for the class token. A model that adds its positions before
/// the token joins gets a row of zeros there. It is an error if the layout cannot hold a tensor.
pub fn to_flax_tensors(config: &ModelConfig, numbering: Numbering, own: &Tensors) -> Result<Tensors> {
    let class_row = config.extra_tokens == 1 && config.posemb_join == PosembJoin::Before;
    if numbering == Numbering::BigVision
        && config.extra_tokens == 1
        && config.posemb_join == PosembJoin::After
        && own.contains_key("pos_embed")
    {
        fail!("big_vision's layout has no place for the class token's row of `pos_embed`");
    }
    let mut flax = Tensors::new();
    for (name, tensor) in own {
        let parts = names::to_flax(name, numbering);
        if parts.is_empty() || name.starts_with("fc_norm.") || name.starts_with("head_dist.") {
            fail!("`{name}` has no place in a flax layout");
        }
        let mut part_shape = tensor.shape.clone();
        part_shape[0] /= parts.len();
        let len = tensor.values.len() / parts.len();
        for (part, (flax_name, form)) in parts.into_iter().enumerate() {
            let values = &tensor.values[part * len..(part + 1) * len];
            flax.insert(flax_name, form.to_flax(values, &part_shape, config.heads));
        }
    }
    if class_row && numbering != Numbering::BigVision {
        for posemb in POSEMB_PLACES.iter().filter_map(|place| flax.remove(*place)).collect::<Vec<_>>() {
            let width = posemb.shape[2];
            let values = [vec![0.0; width], posemb.values].concat();
            flax.insert(POSEMB_PLACES[0].into(), Tensor::new([1, posemb.shape[1] + 1, width], values));
        }
    }
    Ok(flax)
}

/// Tensors under flax names, in any numbering, converted to ours.
pub fn from_flax_tensors(flax: &Tensors) -> Result<Tensors> {
    let shapes: Shapes = flax.iter().map(|(name, t)| (name.clone(), t.shape.clone())).collect();
    super::refuse_empty(&shapes)?;
    let plan = plan(&shapes, &ModelOverrides::default())?;
    Store::new(std::path::Path::new(""), Container::Memory(flax.clone()).into(), plan).all()
}
