//! Weights files: every known layout comes in, ours goes out.
//!
//! Three questions are kept apart. What is in the container (`npz`, `safetensors`): named arrays. Whose names are
//! these (`layouts`, `names`): a plan that says from which pieces of the file each of our tensors is made. Which model
//! is that (`detect`): sizes from shapes, the rest from metadata and from the user. Our own names and shapes are
//! timm's ([`crate::vit::params`]); conversions move values and compute none.

mod adapt;
mod detect;
mod layouts;
mod meta;
pub mod names;
pub mod npz;
pub mod safetensors;
mod tensor;
#[cfg(test)]
mod tests;

pub use adapt::{AdaptTarget, HeadPolicy, PosembDialect, RepLayer, adapt};
pub use detect::ModelOverrides;
pub use layouts::{LayoutKind, from_flax_tensors, to_flax_tensors};
pub use meta::{CheckpointMeta, META_KEY, MODEL_KEY};
pub use names::{Numbering, flax_names_of};
pub use tensor::{Tensor, Tensors};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::detect::{Detected, detect};
use self::layouts::{Plan, Shapes};
use self::npz::Npz;
use self::safetensors::{SafeTensors, View};
use crate::error::{At, Error, Result};
use crate::fail;
use crate::vit::config::{ModelConfig, Posemb};
use crate::vit::params::{Param, ParamLayout, sincos2d};

/// A model as a file holds it.
#[derive(Clone, Debug)]
pub struct ModelFile {
    /// The file that was read.
    pub path: PathBuf,
    pub config: ModelConfig,
    /// All parameters, under our names, in file order.
    pub tensors: Tensors,
    pub layout: LayoutKind,
    pub meta: CheckpointMeta,
    /// False: only the number of patches is known, and `config.image` is one row of them. See
    /// [`ModelFile::set_image`].
    pub grid_known: bool,
    /// What had to be assumed, to be told to the user.
    pub notes: Vec<String>,
}

/// Reads the weights at `path`: a weights file, a checkpoint folder, or a run directory (its best checkpoint, else its
/// last). Tensors, then the file's metadata, then `overrides` say which model it is.
///
/// Errors (exit 1) name file and tensor: damaged or foreign files, hybrids and Mixers, missing or left-over tensors,
/// NaN. Values in `overrides` that make no model are wrong usage (exit 2).
pub fn open(path: &Path, overrides: &ModelOverrides) -> Result<ModelFile> {
    let path = resolve(path)?;
    let mut source = Source::open(&path)?;
    read_model(&mut source, &path, overrides).map_err(|e| e.at(path.display()))
}

fn read_model(source: &mut Source, path: &Path, overrides: &ModelOverrides) -> Result<ModelFile> {
    let Headers { mut plan, detected, meta, .. } = Headers::read(source, overrides)?;
    let Detected { config, grid_known, heads_assumed } = detected;
    let layout = plan.kind;

    // timm wants the fixed table as a tensor, so our files hold it. It is not a parameter.
    let table = if config.posemb == Posemb::Sincos2d { plan.take("pos_embed") } else { None };
    compare(&ParamLayout::new(&config, |_| false), &plan.shapes)?;
    if let Some(table) = table {
        let shape = table.shapes["pos_embed"].clone();
        let stored =
            table.load(|name| source.tensor(name))?.remove("pos_embed").expect("the plan has one tensor");
        // Compared by shape first: the size of the table must not come from the metadata alone.
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4;
        if shape != [1, config.posemb_rows(), config.width]
            || !stored.values.iter().zip(&sincos2d(&config)).all(near)
        {
            return Err(Error::new("`pos_embed` is not the sincos2d table of this model")
                .hint("use `--set model.posemb=learned`"));
        }
    }
    let tensors = plan.load(|name| source.tensor(name))?;

    let mut notes = Vec::new();
    if heads_assumed {
        notes.push(format!(
            "the file does not say how many heads it has: assumed {} (width / 64); `--set model.heads=N` says otherwise",
            config.heads
        ));
    }
    Ok(ModelFile { path: path.into(), config, tensors, layout, meta, grid_known, notes })
}

impl ModelFile {
    /// Sets the size of the input. A number of tokens that does not match the position embedding is an error.
    pub fn set_image(&mut self, image: (usize, usize)) -> Result<()> {
        let config = ModelConfig { image, ..self.config.clone() };
        config.validate()?;
        if let Some(posemb) = self.tensors.get("pos_embed") {
            detect::check_rows(&config, posemb.shape[1]).map_err(|e| e.at(self.path.display()))?;
        }
        self.config = config;
        self.grid_known = true;
        Ok(())
    }
}

/// Hands every parameter of `layout` to `write`, in memory order ([`Param::from_file_order`]). Nothing is written
/// unless every parameter is there in the right shape and nothing is left over.
pub fn load_into(
    file: &ModelFile,
    layout: &ParamLayout,
    mut write: impl FnMut(&Param, &[f32]) -> Result<()>,
) -> Result<()> {
    let shapes = file.tensors.iter().map(|(name, t)| (name.clone(), t.shape.clone())).collect();
    compare(layout, &shapes).map_err(|e| e.at(file.path.display()))?;
    for param in layout.parameters() {
        write(param, &param.from_file_order(&file.tensors[&param.name].values))?;
    }
    Ok(())
}

/// Writes a model in our own layout: timm's names and shapes, so that its `load_state_dict` takes them as they are,
/// and the whole configuration in the metadata. A whole file or none.
pub fn save(path: &Path, config: &ModelConfig, tensors: &Tensors, meta: &CheckpointMeta) -> Result<()> {
    let shapes = tensors.iter().map(|(name, t)| (name.clone(), t.shape.clone())).collect();
    compare(&ParamLayout::new(config, |_| false), &shapes).map_err(|e| e.at(path.display()))?;
    let table;
    let mut views: Vec<View<'_>> =
        tensors.iter().map(|(name, t)| View::f32(name, &t.shape, &t.values)).collect();
    if config.posemb == Posemb::Sincos2d {
        table = sincos2d(config);
        views.push(View::f32("pos_embed", &[1, config.posemb_rows(), config.width], &table));
    }
    let metadata = BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        (MODEL_KEY.to_string(), serde_json::to_string(config).at(path.display())?),
        (META_KEY.to_string(), serde_json::to_string(meta).at(path.display())?),
    ]);
    safetensors::write(path, &metadata, views)
}

/// What a weights file is, from its headers alone: layout, sizes, heads (or `"unknown"`), provenance.
pub fn describe(path: &Path) -> Result<serde_json::Value> {
    let path = resolve(path)?;
    let source = Source::open(&path)?;
    // Any number of heads does: it is reported only where the file has one.
    let any_heads = ModelOverrides { heads: Some(1), ..Default::default() };
    let headers = Headers::read(&source, &any_heads).map_err(|e| e.at(path.display()))?;
    let config = &headers.detected.config;
    let params: usize = headers
        .plan
        .shapes
        .iter()
        .filter(|(name, _)| config.posemb == Posemb::Learned || *name != "pos_embed")
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    let unknown = || serde_json::json!("unknown");
    let mut provenance = serde_json::to_value(&headers.meta).at(path.display())?;
    let class_names = provenance.as_object_mut().and_then(|p| p.remove("classes"));
    Ok(serde_json::json!({
        "kind": "weights",
        "path": path.display().to_string(),
        "layout": headers.plan.kind,
        "width": config.width,
        "depth": config.depth,
        "heads": headers.heads.map_or_else(unknown, Into::into),
        "mlp": config.mlp,
        "patch": config.patch,
        "image": if headers.detected.grid_known { serde_json::json!(config.image) } else { unknown() },
        "classes": config.classes,
        "class_names": class_names,
        "params": params,
        "pool": config.pool,
        "norm": config.norm,
        "extra_tokens": config.extra_tokens,
        "rep_size": config.rep_size,
        "posemb": config.posemb,
        "posemb_join": config.posemb_join,
        "layer_scale": config.layer_scale > 0.0,
        "gelu": config.gelu,
        "ln_eps": config.ln_eps.to_string().parse::<f64>().unwrap_or(f64::from(config.ln_eps)),
        "provenance": provenance,
    }))
}

/// The weights file that a user means by `path`.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.into());
    }
    let weights = "model.safetensors";
    if path.join(weights).is_file() {
        return Ok(path.join(weights));
    }
    let checkpoints = path.join("checkpoints");
    let named = ["best", "last"].map(|name| checkpoints.join(name)).into_iter().find_map(|pointer| {
        let folder = match std::fs::read_to_string(&pointer) {
            Ok(step) => checkpoints.join(step.trim()),
            Err(_) => pointer,
        };
        Some(folder.join(weights)).filter(|file| file.is_file())
    });
    named.ok_or_else(|| {
        Error::new(format!(
            "{}: no `{weights}` and no `checkpoints/best` or `checkpoints/last`",
            path.display()
        ))
        .hint("give a weights file, a checkpoint folder or a run directory")
    })
}

/// A container whose headers have been read.
enum Source {
    Npz(Npz),
    SafeTensors(SafeTensors),
}

impl Source {
    /// Told apart by the first bytes, not by the name.
    fn open(path: &Path) -> Result<Self> {
        let mut start = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(crate::files::open(path)?, 4), &mut start)
            .at(path.display())?;
        match start.as_slice() {
            [b'P', b'K', ..] => Ok(Self::Npz(Npz::open(path)?)),
            // The protocol mark of a pickle.
            [0x80, 2..=5, b'}' | b']' | b'c' | 0x8a, ..] => {
                Err(Error::new(format!("{}: a pickled file, which is never loaded", path.display()))
                    .hint("save its state dict with `safetensors.torch.save_file` and give that file"))
            }
            _ => Ok(Self::SafeTensors(SafeTensors::open(path)?)),
        }
    }

    fn shapes(&self) -> Result<Shapes> {
        match self {
            Self::Npz(npz) => npz.names().map(|n| Ok((n.to_string(), npz.shape(n)?.to_vec()))).collect(),
            Self::SafeTensors(file) => {
                file.names().map(|n| Ok((n.to_string(), file.shape(n)?.to_vec()))).collect()
            }
        }
    }

    fn metadata(&self, key: &str) -> Option<&str> {
        match self {
            Self::Npz(_) => None,
            Self::SafeTensors(file) => file.metadata().get(key).map(String::as_str),
        }
    }

    fn tensor(&mut self, name: &str) -> Result<Tensor> {
        match self {
            Self::Npz(npz) => npz.tensor(name),
            Self::SafeTensors(file) => file.tensor(name),
        }
    }
}

/// Everything that is known before a value is read.
struct Headers {
    plan: Plan,
    detected: Detected,
    /// H, where the file itself says it.
    heads: Option<usize>,
    meta: CheckpointMeta,
}

impl Headers {
    fn read(source: &Source, overrides: &ModelOverrides) -> Result<Self> {
        let mut plan = layouts::plan(&source.shapes()?, overrides)?;
        let parse =
            |key: &str, e: serde_json::Error| Error::new(format!("metadata `{key}` does not parse: {e}"));
        let stored: Option<ModelConfig> = match source.metadata(MODEL_KEY) {
            Some(text) => Some(serde_json::from_str(text).map_err(|e| parse(MODEL_KEY, e))?),
            None => None,
        };
        if stored.is_some() && plan.kind == LayoutKind::Timm {
            plan.kind = LayoutKind::Vitrum;
        }
        let heads = plan.heads.or(stored.as_ref().map(|c| c.heads));
        let meta = match source.metadata(META_KEY) {
            Some(text) => serde_json::from_str(text).map_err(|e| parse(META_KEY, e))?,
            None => CheckpointMeta::of_layout(plan.kind),
        };
        let detected = detect(&plan, stored, overrides)?;
        if let Some(names) = meta.classes.as_ref().filter(|names| names.len() != detected.config.classes) {
            fail!("{} class names for {} classes", names.len(), detected.config.classes);
        }
        Ok(Self { plan, detected, heads, meta })
    }
}

/// Checks that `shapes` are exactly the parameters of `layout`; the error lists both sides.
fn compare(layout: &ParamLayout, shapes: &Shapes) -> Result<()> {
    let mut missing = Vec::new();
    let mut wrong = Vec::new();
    for p in layout.parameters() {
        match shapes.get(&p.name) {
            None => missing.push(format!("`{}` {:?}", p.name, p.shape)),
            Some(shape) if *shape != p.shape => {
                wrong.push(format!("`{}` is {shape:?} and should be {:?}", p.name, p.shape))
            }
            Some(_) => {}
        }
    }
    let known: std::collections::HashSet<&str> = layout.parameters().map(|p| p.name.as_str()).collect();
    let left: Vec<String> =
        shapes.keys().filter(|n| !known.contains(n.as_str())).map(|n| format!("`{n}`")).collect();
    let sides: Vec<String> = [("missing", missing), ("wrong shape", wrong), ("not part of the model", left)]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| format!("{what}: {}", some_of(&names)))
        .collect();
    if sides.is_empty() {
        Ok(())
    } else {
        Err(Error::new(format!("the tensors do not fit the model; {}", sides.join("; "))))
    }
}

fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}
