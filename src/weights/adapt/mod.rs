//! Adapts a file's model to another task: another picture size, patch size, or list of classes.
//!
//! This is the only place that computes weights instead of moving them. Each step reports what it did in a
//! note, because the programs that people compare with do it differently: see [`PosembDialect`].

mod head;
mod interpolate;
mod pinv;

use self::interpolate::{Axis, Resampling};
use super::{LayoutKind, ModelFile, Tensor};
use crate::error::{Error, Result};
pub use crate::recipe::{HeadPolicy, PosembDialect, RepLayer};
use crate::vit::config::{ModelConfig, Posemb, PosembJoin};

const KERNEL: &str = "patch_embed.proj.weight";
const POSEMB: &str = "pos_embed";

/// The properties of the adapted model; `None` keeps the file's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdaptTarget {
    /// (H, W) of the pictures.
    pub image: Option<(usize, usize)>,
    /// (height, width) of a patch.
    pub patch: Option<(usize, usize)>,
    /// C. A different number changes the head, by `head`.
    pub classes: Option<usize>,
    /// In the order of the new logits.
    pub class_names: Option<Vec<String>>,
    /// What happens to the head.
    pub head: HeadPolicy,
    /// What happens to the tanh layer before the head.
    pub rep_layer: RepLayer,
    /// How positions and patch kernels are resized.
    pub posemb: PosembDialect,
}

impl PosembDialect {
    /// The meaning of [`PosembDialect::Auto`].
    pub fn of_layout(kind: LayoutKind) -> Self {
        match kind {
            LayoutKind::Vitrum | LayoutKind::VitJax => Self::VitJax,
            LayoutKind::BigVision => Self::BigVision,
            LayoutKind::Timm | LayoutKind::OpenClip => Self::Timm,
            LayoutKind::HuggingFace => Self::Hf,
        }
    }

    fn resolve(self, kind: LayoutKind) -> Self {
        if self == Self::Auto { Self::of_layout(kind) } else { self }
    }

    fn positions(self) -> Resampling {
        match self {
            Self::Auto | Self::VitJax | Self::BigVision => Resampling::Corners,
            Self::ScipyZoomExact => Resampling::CornersWithZeros,
            Self::Timm => Resampling::CubicAntialiased,
            Self::TimmNpz => Resampling::Linear,
            Self::Hf => Resampling::Cubic,
        }
    }

    /// vit_jax and HuggingFace never resize a kernel, so we use the method of the most similar code.
    fn kernels(self) -> Resampling {
        match self {
            Self::Timm | Self::Hf => Resampling::CubicAntialiased,
            _ => Resampling::Linear,
        }
    }

    /// Its name in recipes.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
    }
}

/// Adapts the model of `file` to `target`. Also returns notes for the user about what was done, one line
/// each.
///
/// Errors: a target that is not a valid model (exit 2); a head that `target` keeps but that does not fit; no
/// classes for a file without a head; a grid that must be resized but is unknown.
pub fn adapt(mut file: ModelFile, target: &AdaptTarget) -> Result<(ModelFile, Vec<String>)> {
    let dialect = target.posemb.resolve(file.layout);
    let mut notes = Vec::new();
    let place = file.path.display().to_string();
    resize_patches(&mut file, target, dialect, &mut notes)
        .and_then(|()| head::replace(&mut file, target, &mut notes))
        .map_err(|e| e.at(place))?;
    Ok((file, notes))
}

/// The kernel first, then the grid that follows from it.
fn resize_patches(
    file: &mut ModelFile,
    target: &AdaptTarget,
    dialect: PosembDialect,
    notes: &mut Vec<String>,
) -> Result<()> {
    let old = file.config.clone();
    let patch = target.patch.unwrap_or(old.patch);
    let image = match target.image {
        Some(image) => image,
        None if patch != old.patch && !file.grid_known => return Err(unknown_grid()),
        None => old.image,
    };
    let new = ModelConfig { image, patch, ..old.clone() };
    super::detect::validate(&new)?;

    if patch != old.patch {
        let kernel = file.tensors.get(KERNEL)?;
        file.tensors.insert(KERNEL, resize_kernel(&kernel, patch, dialect.kernels()));
        notes.push(format!(
            "patch kernel resized from {} to {}, pseudo-inverse of {} (FlexiViT)",
            by(old.patch),
            by(patch),
            dialect.kernels().describe()
        ));
    }
    if new.posemb == Posemb::Learned {
        let (from, to) = (old.patch_grid().grid(), new.patch_grid().grid());
        // An unknown grid is stored as one row, so an equal number of patches needs no resize.
        let same = if file.grid_known { from == to } else { from.0 * from.1 == to.0 * to.1 };
        if !same {
            if !file.grid_known {
                return Err(unknown_grid());
            }
            let rows = if old.posemb_join == PosembJoin::After { old.patch_grid().extra } else { 0 };
            let posemb = file.tensors.get(POSEMB)?;
            file.tensors.insert(POSEMB, resize_positions(&posemb, rows, from, to, dialect.positions()));
            notes.push(format!(
                "position embedding resized from {} to {} patches as `{}` does it: {}",
                by(from),
                by(to),
                dialect.name(),
                dialect.positions().describe()
            ));
        }
    }
    file.grid_known |= target.image.is_some();
    file.config = new;
    Ok(())
}

fn unknown_grid() -> Error {
    Error::new("the number of patches is not a square, so the grid of its position embedding is not known")
        .hint("record it first: `vitrum convert FILE known.safetensors --set model.image=HxW`")
}

fn by((height, width): (usize, usize)) -> String {
    format!("{height}x{width}")
}

/// `[1, rows + N, D]` → `[1, rows + N', D]`: the first `rows` belong to extra tokens and are left unchanged.
fn resize_positions(
    posemb: &Tensor,
    rows: usize,
    from: (usize, usize),
    to: (usize, usize),
    how: Resampling,
) -> Tensor {
    let width = posemb.shape[2];
    let (tokens, grid) = posemb.values.split_at(rows * width);
    let axes = (Axis::new(how, from.0, to.0), Axis::new(how, from.1, to.1));
    let resized = interpolate::apply(grid, width, &axes.0, &axes.1);
    Tensor::new([1, rows + to.0 * to.1, width], [tokens, &resized].concat())
}

/// `[D, 3, ph, pw]` → `[D, 3, ph', pw']`, so that a resized patch gives about the same embedding. With R the
/// resize of a patch, the new kernel is pinv(Rᵀ) times the old one (Beyer et al. 2023, FlexiViT,
/// arXiv:2212.08013, section 3.4). R acts on rows and columns separately, and so does its pseudo-inverse.
fn resize_kernel(kernel: &Tensor, to: (usize, usize), how: Resampling) -> Tensor {
    let &[d, channels, height, width] = kernel.shape.as_slice() else {
        panic!("a patch kernel of shape {:?}", kernel.shape)
    };
    let axis = |from: usize, to: usize| {
        if from == to { Axis::new(how, from, to) } else { Axis::new(how, from, to).pinv_of_transpose() }
    };
    let axes = (axis(height, to.0), axis(width, to.1));
    let resize = |one: &[f32]| interpolate::apply(one, 1, &axes.0, &axes.1);
    let values = kernel.values.chunks(height * width).flat_map(resize).collect();
    Tensor::new([d, channels, to.0, to.1], values)
}

#[cfg(test)]
mod tests;
