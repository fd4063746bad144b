//! Weights files: reads every known layout, and writes any that can hold the model.
//!
//! Three questions are kept apart. What is in the container (`npz`, `safetensors`): named arrays. Whose names
//! are these (`layouts`): a plan that says from which pieces of the file each of our tensors is made. Which
//! model is it (`detect`): sizes from shapes, the rest from metadata and from the user. Our own names and
//! shapes are timm's ([`crate::vit::params`]). Reading and converting move values and compute none; only
//! [`adapt()`] computes.

mod adapt;
pub mod augreg;
mod bytes;
mod container;
mod convert;
mod describe;
mod detect;
mod fits;
mod forms;
mod headers;
mod hub;
mod hub_cache;
mod layouts;
mod meta;
pub mod npz;
mod overrides;
pub mod safetensors;
mod shards;
mod store;
mod tensor;
#[cfg(test)]
mod tests;
mod usual;

pub use crate::vit::names::Numbering;
pub use adapt::{AdaptTarget, HeadPolicy, PosembDialect, RepLayer, adapt};
pub use convert::{Format, convert};
pub use describe::describe;
pub use layouts::{LayoutKind, from_flax_tensors, to_flax_tensors};
pub use meta::{CheckpointMeta, META_KEY, MODEL_KEY};
pub use overrides::ModelOverrides;
pub use store::{Store, check_bytes};
pub use tensor::{Tensor, Tensors};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use self::bytes::Bytes;
use self::container::Container;
use self::detect::Detected;
use self::fits::Misfits;
use self::headers::Headers;
use self::hub::Hub;
use self::safetensors::{Dtype, Outline, View};
use crate::error::{At, Error, Result};
use crate::seal::SEAL;
use crate::vit::config::{ModelConfig, Posemb};
use crate::vit::params::{Param, ParamLayout, sincos2d};

/// A model in a file.
#[derive(Clone, Debug)]
pub struct ModelFile {
    /// The file that was read.
    pub path: PathBuf,
    /// `classes` is 0 if the file has no classifier; see [`open_backbone`].
    pub config: ModelConfig,
    /// All parameters, under our names, in file order; read when they are needed.
    pub tensors: Store,
    /// Whose names and shapes the file uses.
    pub layout: LayoutKind,
    /// What the file says about classes and the preparation of pictures.
    pub meta: CheckpointMeta,
    /// If false, only the number of patches is known, and `config.image` is one row of them. See
    /// [`ModelFile::set_image`].
    pub grid_known: bool,
    /// Why pictures cannot be prepared as the file says, if they cannot.
    pub unprepared: Option<String>,
    /// What had to be assumed, for the user.
    pub notes: Vec<String>,
}

/// Whether `path` is not a path but a model's name: a short name of [`augreg`], or one of the HuggingFace
/// hub.
pub fn is_model_name(path: &Path) -> bool {
    augreg::is_short_name(path) || hub_cache::is_name(path)
}

/// The file that `path` means. Nothing is read: a wrong path is reported before anything slow happens.
///
/// Errors
/// There is no such file.
pub fn locate(path: &Path) -> Result<PathBuf> {
    let file = augreg::resolve(path)?;
    if !file.exists() {
        return Err(Error::new(format!("{}: no such file or folder", file.display()))
            .hint("give a weights file, a checkpoint folder or a run directory"));
    }
    Ok(file)
}

/// Opens the weights at `path`: a weights file, a HuggingFace or checkpoint folder, a run directory (its best
/// checkpoint, else its last), a short name of [`augreg`], or a model's name on the HuggingFace hub. The
/// model follows from the tensors, then the file's metadata, then a `config.json` beside it, then
/// `overrides`.
///
/// Errors (exit 1) name file and tensor: damaged or foreign files, hybrids and Mixers, missing or left-over
/// tensors. Values in `overrides` that give no valid model are usage errors (exit 2). Values are checked when
/// they are read.
pub fn open(path: &Path, overrides: &ModelOverrides) -> Result<ModelFile> {
    let file = open_backbone(path, overrides)?;
    if file.config.classes == 0 {
        return Err(Error::new(format!(
            "{}: no `head.weight`: features without a classifier",
            file.path.display()
        ))
        .hint("`vitrum finetune` gives it a head for your classes, `vitrum features` needs none"));
    }
    Ok(file)
}

/// The same, but accepts a file without a classifier: it has 0 classes until [`adapt()`] gives it some.
pub fn open_backbone(path: &Path, overrides: &ModelOverrides) -> Result<ModelFile> {
    let path = locate(path)?;
    let container = Container::open(&path)?;
    let mut file =
        read_model(container, &path, Hub::beside(&path)?, overrides).map_err(|e| e.at(path.display()))?;
    file.notes.extend(unsealed(path.parent().unwrap_or(Path::new(""))));
    Ok(file)
}

/// The note for a checkpoint folder without checksums.
pub fn unsealed(dir: &Path) -> Option<String> {
    let is_one = dir.join("state.safetensors").is_file() && !dir.join(SEAL).is_file();
    is_one.then(|| {
        format!("{}: no `{SEAL}`: a checkpoint of an earlier version, read without checksums", dir.display())
    })
}

/// A file in memory.
fn open_bytes(bytes: Bytes, name: &Path) -> Result<ModelFile> {
    read_model(Container::parse(bytes, name)?, name, Hub::default(), &ModelOverrides::default())
}

fn read_model(container: Container, path: &Path, hub: Hub, overrides: &ModelOverrides) -> Result<ModelFile> {
    let container = Arc::new(container);
    let Headers { mut plan, detected, meta, unprepared, .. } =
        Headers::read(&container, path, hub, overrides)?;
    let Detected { config, grid_known, heads_assumed } = detected;
    let (layout, mut notes) = (plan.kind, std::mem::take(&mut plan.notes));
    if heads_assumed {
        notes.push(format!(
            "the file does not say how many heads it has: assumed {} (width / 64); change it with `--set model.heads=N`",
            config.heads
        ));
    }
    // timm needs the fixed table as a tensor, so our files hold it. It is not a parameter.
    let table = config.posemb == Posemb::Sincos2d && plan.shapes.contains_key("pos_embed");
    let mut parameters = plan.shapes.clone();
    if table {
        parameters.remove("pos_embed");
    }
    Misfits::of(&ParamLayout::new(&config, |_| false), &parameters).refuse()?;
    let mut tensors = Store::new(path, container, plan);
    if table {
        check_table(&tensors, &config)?;
        tensors.remove("pos_embed");
    }
    Ok(ModelFile { path: path.into(), config, tensors, layout, meta, grid_known, unprepared, notes })
}

/// A stored table must be the one that the model computes.
fn check_table(tensors: &Store, config: &ModelConfig) -> Result<()> {
    let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4;
    // Shapes are compared first: the size of the table must not come from the metadata alone.
    if tensors.shape("pos_embed") != Some(&[1, config.posemb_rows(), config.width])
        || !tensors.values("pos_embed")?.iter().zip(&sincos2d(config)).all(near)
    {
        return Err(Error::new("`pos_embed` is not the sincos2d table of this model")
            .hint("use `--set model.posemb=learned`"));
    }
    Ok(())
}

impl ModelFile {
    /// An error unless the size of the pictures is known: the number of patches alone does not give it.
    pub fn with_known_image(self) -> Result<Self> {
        if self.grid_known {
            return Ok(self);
        }
        let ((ph, pw), patches) = (self.config.patch, self.config.patch_grid().patches());
        let (why, height, width) = match self.tensors.shape("pos_embed") {
            Some(_) => {
                // The grid nearest to a square.
                let rows = (1..=patches.isqrt()).rev().find(|h| patches.is_multiple_of(*h)).unwrap_or(1);
                let why = format!("its {patches} positions are not a square");
                (why, rows * ph, patches / rows * pw)
            }
            None => {
                let near = |side: usize| (224 / side).max(1) * side;
                ("it has no position embedding to tell".into(), near(ph), near(pw))
            }
        };
        let size = if height == width { height.to_string() } else { format!("{height}x{width}") };
        Err(Error::new(format!(
            "{}: the size of the pictures that it was trained on (`model.image`) is not known: {why}",
            self.path.display()
        ))
        .hint(format!("give it, as in `--set model.image={size}`")))
    }

    /// Sets the size of the input. It is an error if the number of tokens does not match the position
    /// embedding.
    pub fn set_image(&mut self, image: (usize, usize)) -> Result<()> {
        let config = ModelConfig { image, ..self.config.clone() };
        detect::validate(&config)?;
        if let Some(shape) = self.tensors.shape("pos_embed") {
            detect::check_rows(&config, shape[1]).map_err(|e| e.at(self.path.display()))?;
        }
        self.config = config;
        self.grid_known = true;
        Ok(())
    }
}

/// Passes every parameter of `layout` to `write`, in memory order ([`Param::from_file_order`]). Nothing is
/// written unless every parameter has the right shape and no tensor is left over. NaN and infinity are
/// errors.
pub fn load_into(
    file: &ModelFile,
    layout: &ParamLayout,
    mut write: impl FnMut(&Param, &[f32]) -> Result<()>,
) -> Result<()> {
    Misfits::of(layout, file.tensors.shapes()).refuse().map_err(|e| e.at(file.path.display()))?;
    let params: Vec<&Param> = layout.parameters().filter(|p| !p.is_empty()).collect();
    // A few are read at once, because some must be unpacked or transposed. No more than these are in memory.
    for few in params.chunks(2 * rayon::current_num_threads()) {
        let read: Vec<_> = few.par_iter().map(|param| file.tensors.values(&param.name)).collect();
        for (param, values) in few.iter().zip(read) {
            write(param, &param.from_file_order(&values?))?;
        }
    }
    Ok(())
}

/// Writes a model in our own layout: timm's names and shapes, so that its `load_state_dict` takes them
/// unchanged, and the whole configuration in the metadata. Writes a complete file or none.
pub fn save(path: &Path, config: &ModelConfig, tensors: &Tensors, meta: &CheckpointMeta) -> Result<()> {
    let metadata = metadata(config, true, meta).at(path.display())?;
    write_own(path, config, true, tensors, &metadata)
}

/// The configuration as JSON, without the image size if it is unknown.
fn metadata(
    config: &ModelConfig,
    grid_known: bool,
    meta: &CheckpointMeta,
) -> serde_json::Result<BTreeMap<String, String>> {
    let mut model = serde_json::to_value(config)?;
    if !grid_known {
        model.as_object_mut().expect("a configuration is an object").shift_remove("image");
    }
    Ok(BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        (MODEL_KEY.to_string(), model.to_string()),
        (META_KEY.to_string(), serde_json::to_string(meta)?),
    ]))
}

/// The name and the values of a tensor that no parameter holds.
pub type Table = (String, Vec<f32>);

/// A file of [`save`] before the values are known, and the fixed table in it, if it has one.
pub fn outline(config: &ModelConfig, meta: &CheckpointMeta) -> Result<(Outline, Option<Table>)> {
    let metadata = metadata(config, true, meta).at("the weights' metadata")?;
    let layout = ParamLayout::new(config, |_| false);
    let shapes: BTreeMap<&str, &[usize]> =
        layout.parameters().map(|param| (param.name.as_str(), param.shape.as_slice())).collect();
    let mut tensors: Vec<_> = shapes.into_iter().map(|(name, shape)| (name, Dtype::F32, shape)).collect();
    let table = (config.posemb == Posemb::Sincos2d).then(|| (POSITIONS.to_string(), sincos2d(config)));
    let shape = [1, config.posemb_rows(), config.width];
    if table.is_some() {
        tensors.push((POSITIONS, Dtype::F32, &shape));
    }
    Ok((Outline::new(&metadata, &tensors), table))
}

/// The name of the table of positions that a file has although the model does not train it.
const POSITIONS: &str = "pos_embed";

fn write_own(
    path: &Path,
    config: &ModelConfig,
    grid_known: bool,
    tensors: &Tensors,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let shapes = tensors.iter().map(|(name, t)| (name.clone(), t.shape.clone())).collect();
    let layout = ParamLayout::new(config, |_| false);
    Misfits::of(&layout, &shapes).refuse().map_err(|e| e.at(path.display()))?;
    let table;
    let mut views: Vec<View<'_>> =
        tensors.iter().map(|(name, t)| View::f32(name, &t.shape, &t.values)).collect();
    if config.posemb == Posemb::Sincos2d && grid_known {
        table = sincos2d(config);
        views.push(View::f32(POSITIONS, &[1, config.posemb_rows(), config.width], &table));
    }
    safetensors::write(path, metadata, views)
}

/// A pickle can run any code when it is loaded.
fn refuse_pickle(path: &Path) -> Error {
    refuse_pickles(path, &format!("['{}']", path.display()), &path.with_extension("safetensors"))
}

/// The same for a model in several pickles; `files` is the list of them in Python.
fn refuse_pickles(path: &Path, files: &str, to: &Path) -> Error {
    Error::new(format!(
        "{}: a pickled PyTorch file, which is never loaded: it could run any code",
        path.display()
    ))
    .hint(format!(
        "convert it where you trust it: python -c \"import glob, torch, safetensors.torch as s; w = {{}}; \
             [w.update(torch.load(f, map_location='cpu', weights_only=True)) for f in {files}]; \
             w = w.get('model', w.get('state_dict', w)); \
             s.save_file({{k: v.contiguous() for k, v in w.items()}}, '{}')\"",
        to.display()
    ))
}
