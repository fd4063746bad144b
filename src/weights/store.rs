//! Our tensors, each made from its file when it is needed.
//!
//! A file is memory-mapped, and most tensors of a safetensors file are used directly from the map, so loading
//! a model costs no memory besides the device's own. Tensors that [`adapt`](super::adapt()) computes are kept
//! here and take precedence over the file's.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::container::Container;
use super::layouts::{Plan, Shapes, Source};
use super::tensor::{Tensor, Tensors};
use crate::error::{Error, Result};

/// The tensors of a model under our names. Clones share the file.
#[derive(Clone, Debug)]
pub struct Store {
    /// The file's name in errors.
    path: PathBuf,
    container: Arc<Container>,
    plan: Arc<Plan>,
    /// Shapes of all tensors, changed or not.
    shapes: Shapes,
    changed: Tensors,
    /// Arrays that hold all blocks and must be decoded as a whole.
    stacked: Arc<Mutex<BTreeMap<String, Arc<[f32]>>>>,
}

impl Store {
    pub(super) fn new(path: &Path, container: Arc<Container>, plan: Plan) -> Self {
        let (shapes, plan) = (plan.shapes.clone(), Arc::new(plan));
        Self { path: path.into(), container, plan, shapes, changed: Tensors::new(), stacked: Arc::default() }
    }

    /// In alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shapes.keys().map(String::as_str)
    }

    /// Whether the model has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    /// `None`: there is no such tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.shapes.get(name).map(Vec::as_slice)
    }

    pub(super) fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    /// Values in file order ([`Tensor`]). NaN and infinity are errors that name the tensor. Panics if there
    /// is no such tensor.
    pub fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        assert!(self.contains(name), "no tensor `{name}`");
        match self.changed.get(name) {
            Some(tensor) => Ok(Cow::Borrowed(&tensor.values)),
            None => self.read(name),
        }
    }

    /// Shape and values; see [`Store::values`].
    pub fn get(&self, name: &str) -> Result<Tensor> {
        Ok(Tensor::new(self.shapes[name].clone(), self.values(name)?.into_owned()))
    }

    /// All tensors, in memory.
    pub fn all(&self) -> Result<Tensors> {
        self.names().map(|name| Ok((name.to_string(), self.get(name)?))).collect()
    }

    pub(super) fn insert(&mut self, name: &str, tensor: Tensor) {
        self.shapes.insert(name.into(), tensor.shape.clone());
        self.changed.insert(name.into(), tensor);
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.shapes.remove(name);
        self.changed.remove(name);
    }

    /// Names of the file's arrays with numbers that f32 cannot hold.
    pub(super) fn rounded(&self) -> impl Iterator<Item = &str> {
        let names = self.plan.sources.values().flatten().map(|s| s.file_name.as_str());
        names.filter(|name| self.container.is_f64(name))
    }

    /// Channels of the stored patch kernel, if it had to be converted to three.
    pub(super) fn channels(&self) -> Option<usize> {
        self.plan.channels
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let plan = &*self.plan;
        if let Some(shape) = plan.zeros.get(name) {
            return Ok(vec![0.0; shape.iter().product()].into());
        }
        let values = match plan.sources[name].as_slice() {
            [one] => one.form.own_values(self.part(one)?, &one.shape),
            parts => {
                let mut values = Vec::with_capacity(self.shapes[name].iter().product());
                for part in parts {
                    values.extend_from_slice(&part.form.own_values(self.part(part)?, &part.shape));
                }
                values.into()
            }
        };
        Ok(match (name, plan.channels) {
            ("pos_embed", _) if plan.fold_class_row => {
                let width = plan.shapes[name][2];
                values[width..].to_vec().into()
            }
            ("cls_token", _) if plan.fold_class_row => {
                let posemb = self.part(&plan.sources["pos_embed"][0])?;
                values.iter().zip(posemb.iter()).map(|(c, row)| c + row).collect()
            }
            ("patch_embed.proj.weight", Some(channels)) => {
                let shape = &plan.shapes[name];
                three_channels(&values, channels, shape[2] * shape[3]).into()
            }
            _ => values,
        })
    }

    /// What one array of the file contributes, as stored.
    fn part(&self, source: &Source) -> Result<Cow<'_, [f32]>> {
        let name = source.file_name.as_str();
        let len: usize = source.shape.iter().product();
        let values = match source.layer {
            None => self.container.values(name)?,
            Some(layer) if self.container.is_cheap(name) => match self.container.values(name)? {
                Cow::Borrowed(all) => Cow::Borrowed(&all[layer * len..][..len]),
                Cow::Owned(all) => all[layer * len..][..len].to_vec().into(),
            },
            Some(layer) => {
                let mut stacked = self.stacked.lock().unwrap_or_else(|e| e.into_inner());
                let all = match stacked.get(name) {
                    Some(all) => all.clone(),
                    None => {
                        let all: Arc<[f32]> = self.container.values(name)?.into();
                        stacked.insert(name.into(), all.clone());
                        all
                    }
                };
                all[layer * len..][..len].to_vec().into()
            }
        };
        match non_finite(&values) {
            None => Ok(values),
            Some(value) => Err(Error::new(format!("{}: tensor `{name}` holds {value}", self.path.display()))
                .hint("the weights are broken: take an earlier checkpoint")),
        }
    }
}

/// Everything that reading a file does, on bytes in memory, for tests and fuzzers that search for bytes that
/// make it panic. `name` is its name in errors.
pub fn check_bytes(bytes: &[u8], name: &Path) -> Result<()> {
    super::open_bytes(bytes.into(), name)?.tensors.all().map(|_| ())
}

/// The first value that is NaN or infinite.
fn non_finite(values: &[f32]) -> Option<f32> {
    /// In f32 values: a chunk takes a few microseconds.
    const CHUNK: usize = 1 << 16;
    let broken = |chunk: &[f32]| chunk.iter().fold(false, |broken, v| broken | !v.is_finite());
    let any = if values.len() > 4 * CHUNK { values.par_chunks(CHUNK).any(broken) } else { broken(values) };
    if any { values.iter().copied().find(|v| !v.is_finite()) } else { None }
}

/// `[D, channels, pixels]` → `[D, 3, pixels]`: kernels are repeated in turn and scaled by channels / 3, so
/// that a picture without colour gives the same result as before. timm's rule in the other direction
/// (`adapt_input_conv`).
fn three_channels(values: &[f32], channels: usize, pixels: usize) -> Vec<f32> {
    let scale = channels as f32 / 3.0;
    let kernels = values.chunks(channels * pixels);
    kernels
        .flat_map(|kernel| (0..3).map(|c| &kernel[c % channels * pixels..][..pixels]))
        .flat_map(|plane| plane.iter().map(move |v| v * scale))
        .collect()
}
