//! Weights in several files: a HuggingFace folder whose `model.safetensors.index.json` says which part holds
//! a tensor.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::safetensors::SafeTensors;
use crate::error::{At, Error, Result};
use crate::{fail, files};

/// Beside the parts, where a model in one file has `model.safetensors`.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The open parts. Only tensors that the index lists exist, as in transformers.
#[derive(Debug)]
pub(super) struct Shards {
    parts: Vec<SafeTensors>,
    /// Tensor → its part.
    tensors: BTreeMap<String, usize>,
}

impl Shards {
    /// Whether `path` is such an index, by its name: JSON and a safetensors header may start with the same
    /// byte.
    pub(super) fn is_index(path: &Path) -> bool {
        path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(".safetensors.index.json"))
    }

    /// Opens every part that the index at `path` names. Errors name the index, or the part that is missing or
    /// broken.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let index: Value = serde_json::from_slice(&files::read(path)?).at(path.display())?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let Some(map) = index["weight_map"].as_object().filter(|map| !map.is_empty()) else {
            fail!("{}: no `weight_map`, which says what part holds a tensor", path.display());
        };
        let mut parts: Vec<SafeTensors> = Vec::new();
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (tensor, part) in map {
            let part = part.as_str().unwrap_or_default();
            // The index comes from an untrusted source and must not lead out of its folder.
            if Path::new(part).file_name() != Some(part.as_ref()) {
                fail!(
                    "{}: tensor `{tensor}` lies in `{part}`, which is not a file beside it",
                    path.display()
                );
            }
            let number = match numbers.get(part) {
                Some(number) => *number,
                None => {
                    let file = folder.join(part);
                    if !file.is_file() {
                        let message = format!("{}: the part `{part}` is not beside it", path.display());
                        return Err(Error::new(message).hint("fetch all parts of the model into one folder"));
                    }
                    parts.push(SafeTensors::open(&file)?);
                    numbers.insert(part, parts.len() - 1);
                    parts.len() - 1
                }
            };
            if !parts[number].contains(tensor) {
                fail!("{}: `{part}` has no tensor `{tensor}`", path.display());
            }
            tensors.insert(tensor.clone(), number);
        }
        Ok(Self { parts, tensors })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The part that holds a tensor. Panics if there is no such tensor.
    pub(super) fn of(&self, name: &str) -> &SafeTensors {
        &self.parts[self.tensors[name]]
    }

    /// From the first part that has such a key.
    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.parts.iter().find_map(|part| part.metadata().get(key)).map(String::as_str)
    }
}
