//! Detects a file's layout, and how its tensors become ours. Names alone decide, not the container.

mod closest;
mod families;
mod flax;
pub(super) mod huggingface;
mod other;
mod timm;

use std::collections::BTreeMap;

use super::overrides::ModelOverrides;
use super::tensor::shape_text;
use crate::backend::Gelu;
use crate::error::Result;
use crate::fail;
use crate::recipe::EvalResize;
use crate::vit::config::{InitScheme, PosembJoin};
use crate::vit::names::Form;
use crate::weights::usual::Usual;

pub use flax::{from_flax_tensors, to_flax_tensors};

/// Which program's names and shapes a file uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayoutKind {
    /// Our own: timm's names, with the configuration in the metadata.
    Vitrum,
    /// flax names of google-research/vision_transformer, in either numbering.
    VitJax,
    /// flax names of big_vision.
    BigVision,
    /// timm's state dict.
    Timm,
    /// transformers: ViT and DeiT, DINOv2 and DINOv3, the image towers of SigLIP and CLIP.
    #[serde(rename = "huggingface")]
    HuggingFace,
    /// CLIP's image tower in OpenAI's and open_clip's names.
    OpenClip,
}

impl LayoutKind {
    /// Its name in `vitrum inspect`.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
    }

    /// GELU form, LayerNorm epsilon and initialisation of the code that the layout comes from.
    pub(super) fn defaults(self) -> (Gelu, f32, InitScheme) {
        match self {
            LayoutKind::VitJax | LayoutKind::Vitrum => (Gelu::Tanh, 1e-6, InitScheme::VitJax),
            LayoutKind::BigVision => (Gelu::Tanh, 1e-6, InitScheme::BigVision),
            LayoutKind::Timm => (Gelu::Erf, 1e-6, InitScheme::Timm),
            LayoutKind::HuggingFace => (Gelu::Erf, 1e-12, InitScheme::Timm),
            LayoutKind::OpenClip => (Gelu::Erf, 1e-5, InitScheme::Timm),
        }
    }

    /// How that code resizes pictures for evaluation: the method, and the share of the resized picture that
    /// is kept.
    pub(super) fn eval_protocol(self) -> (EvalResize, f32) {
        match self {
            LayoutKind::VitJax | LayoutKind::Vitrum => (EvalResize::Squash, 1.0),
            LayoutKind::HuggingFace => (EvalResize::SquashSmooth, 1.0),
            LayoutKind::BigVision => (EvalResize::AreaCenter, 0.875),
            LayoutKind::Timm => (EvalResize::Center, 0.9),
            LayoutKind::OpenClip => (EvalResize::Center, 1.0),
        }
    }
}

/// Shapes under the names of a file.
pub(super) type Shapes = BTreeMap<String, Vec<usize>>;

/// Where each of our tensors is in a file, and what the names alone say about the model.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) kind: LayoutKind,
    /// Our name → its parts, in order.
    pub(super) sources: BTreeMap<String, Vec<Source>>,
    /// Our name → our shape.
    pub(super) shapes: Shapes,
    /// H, if a shape gives it.
    pub(super) heads: Option<usize>,
    /// If the layout decides it; else the rows of the position embedding do.
    pub(super) join: Option<PosembJoin>,
    /// The position embedding has a row that must be added to the class token: big_vision reading an older
    /// file.
    pub(super) fold_class_row: bool,
    /// Whether the model may lack the bias of k alone.
    pub(super) key_without_bias: bool,
    /// Our tensors of zeros that the file lacks, with their shapes.
    pub(super) zeros: Shapes,
    /// What the names imply.
    pub(super) usual: Usual,
    /// Channels of the stored patch kernel, if they are not the three of our pictures.
    pub(super) channels: Option<usize>,
    /// Whether the names show that its pictures had ImageNet's mean and deviation.
    pub(super) imagenet: bool,
    /// What reading it assumes or leaves out, for the user.
    pub(super) notes: Vec<String>,
}

/// A piece of a file that becomes (part of) one of our tensors.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) file_name: String,
    /// Index into a leading depth axis, if a file stacks the blocks.
    pub(super) layer: Option<usize>,
    pub(super) shape: Vec<usize>,
    pub(super) form: Form,
}

/// Detects the layout. Refuses an unsupported model by its name.
pub(super) fn plan(shapes: &Shapes, overrides: &ModelOverrides) -> Result<Plan> {
    let (shapes, note) = families::image_tower(shapes);
    let shapes = &unwrapped(shapes);
    other::refuse(shapes)?;
    refuse_empty(shapes)?;
    let any = |test: &dyn Fn(&str) -> bool| shapes.keys().any(|name| test(name));
    let mut plan = if let Some(family) = families::of(shapes) {
        family.plan(shapes)?
    } else if any(&|n| n.contains("embeddings.patch_embeddings.projection.")) {
        huggingface::plan(shapes)?
    } else if any(&|n| n.starts_with("patch_embed.") || n.starts_with("blocks.")) {
        timm::plan(shapes)?
    } else if any(&|n| n.contains("embedding/kernel") || n.contains("Transformer/")) {
        flax::plan(shapes, overrides)?
    } else {
        return Err(closest::refuse(shapes));
    };
    plan.notes.extend(note);
    // Names with a prefix that the layout lacks, such as a wrapper's.
    if plan.shapes.contains_key("patch_embed.proj.weight") { Ok(plan) } else { Err(closest::refuse(shapes)) }
}

/// Names without the wrapper in which open_clip puts timm's models.
fn unwrapped(shapes: Shapes) -> Shapes {
    shapes
        .into_iter()
        .map(|(name, shape)| (name.strip_prefix("visual.trunk.").map_or(name.clone(), String::from), shape))
        .collect()
}

/// A tensor of a pretext task that no other task uses: MAE's decoder and mask.
fn of_a_pretext(name: &str) -> bool {
    let name = name.strip_prefix("vit.").unwrap_or(name);
    ["mask_token", "embeddings.mask_token"].contains(&name)
        || ["decoder_", "decoder."].iter().any(|start| name.starts_with(start))
}

fn refuse_empty(shapes: &Shapes) -> Result<()> {
    match shapes.iter().find(|(_, shape)| shape.contains(&0)) {
        Some((name, shape)) => fail!("tensor `{name}` is empty: shape {}", shape_text(shape)),
        None => Ok(()),
    }
}

impl Plan {
    /// Leaves out the tensors of [`of_a_pretext`]; models that have them were fed with ImageNet's mean.
    fn without_pretext(&mut self, shapes: &Shapes) -> Shapes {
        let (pretext, own): (Shapes, Shapes) = shapes
            .iter()
            .map(|(name, shape)| (name.clone(), shape.clone()))
            .partition(|(name, _)| of_a_pretext(name));
        if let Some(first) = pretext.keys().next() {
            self.imagenet = pretext.keys().any(|name| name.contains("decoder"));
            let count = pretext.len();
            self.notes
                .push(format!("`{first}` left out, {count} in all: they served the pre-training alone"));
        }
        own
    }

    pub(super) fn new(kind: LayoutKind) -> Self {
        Self {
            kind,
            sources: BTreeMap::new(),
            shapes: BTreeMap::new(),
            heads: None,
            join: None,
            fold_class_row: false,
            key_without_bias: false,
            zeros: Shapes::new(),
            usual: Usual::default(),
            channels: None,
            imagenet: false,
            notes: Vec::new(),
        }
    }

    /// Gives q and v tensors of their own where the file has no bias of k.
    fn split_biases(&mut self) {
        let of_two = |sources: &Vec<Source>| sources.iter().all(|s| matches!(s.form.part(), (0 | 2, 3)));
        let names: Vec<String> = self
            .sources
            .iter()
            .filter(|(own, sources)| own.ends_with(".attn.qkv.bias") && sources.len() == 2 && of_two(sources))
            .map(|(own, _)| own.clone())
            .collect();
        for name in names {
            for source in self.sources.remove(&name).into_iter().flatten() {
                let part = if source.form.part().0 == 0 { "q_bias" } else { "v_bias" };
                let own = name.replace("qkv.bias", part);
                self.sources.insert(own, vec![Source { form: Form::Same, ..source }]);
            }
        }
    }

    /// Computes our shapes from the sources'. Missing or contradictory parts are errors.
    pub(super) fn finish(mut self) -> Result<Self> {
        if self.key_without_bias {
            self.split_biases();
        }
        self.shapes.extend(self.zeros.clone());
        for (own, sources) in &mut self.sources {
            sources.sort_by_key(|s| s.form.part());
            let (_, parts) = sources[0].form.part();
            let present: Vec<usize> = sources.iter().map(|s| s.form.part().0).collect();
            if present != (0..parts).collect::<Vec<_>>() {
                let names: Vec<String> = sources.iter().map(|s| format!("`{}`", s.file_name)).collect();
                fail!("{} of the {parts} parts of `{own}`: only {}", present.len(), names.join(", "));
            }
            let first = &sources[0];
            let Some(mut shape) = first.form.own_shape(&first.shape) else {
                fail!("tensor `{}` has shape {}", first.file_name, shape_text(&first.shape));
            };
            if let Some(other) = sources.iter().find(|s| s.shape != first.shape) {
                fail!(
                    "tensor `{}` has shape {}, `{}` has {}",
                    first.file_name,
                    shape_text(&first.shape),
                    other.file_name,
                    shape_text(&other.shape)
                );
            }
            if parts > 1 {
                shape[0] *= parts;
            }
            self.shapes.insert(own.clone(), shape);
        }
        if self.fold_class_row {
            self.shapes.get_mut("pos_embed").expect("checked by the layout")[1] -= 1;
        }
        if let Some([_, channels, _, _]) =
            self.shapes.get_mut("patch_embed.proj.weight").map(Vec::as_mut_slice)
            && *channels != 3
        {
            self.notes.push(format!(
                "the patch kernel takes {channels} channels: made one for 3, repeated and scaled as timm does it"
            ));
            self.channels = Some(std::mem::replace(channels, 3));
        }
        Ok(self)
    }

    /// Gives every source its original name in the file, if `aliases` renamed it.
    pub(super) fn rename_sources(&mut self, aliases: &BTreeMap<String, String>) {
        for source in self.sources.values_mut().flatten() {
            if let Some(name) = aliases.get(&source.file_name) {
                source.file_name.clone_from(name);
            }
        }
    }
}
