//! Named arrays in a file of any format: their names, their shapes, their values as f32.

use std::borrow::Cow;
use std::path::Path;

use super::bytes::Bytes;
use super::layouts::Shapes;
use super::npz::Npz;
use super::refuse_pickle;
use super::safetensors::{Dtype, SafeTensors};
use super::shards::Shards;
use super::tensor::Tensors;
use crate::error::{Error, Result};
use crate::seal;

/// A file whose headers have been read, or tensors in memory.
#[derive(Debug)]
pub(super) enum Container {
    Npz(Npz),
    SafeTensors(SafeTensors),
    Shards(Shards),
    Memory(Tensors),
}

impl Container {
    /// A checkpoint's file is compared with its checksums.
    pub(super) fn open(path: &Path) -> Result<Self> {
        if Shards::is_index(path) {
            return Ok(Self::Shards(Shards::open(path)?));
        }
        let bytes = Bytes::map(path)?;
        seal::check(path, &bytes)?;
        Self::parse(bytes, path)
    }

    /// The first bytes decide the format, not the name.
    pub(super) fn parse(bytes: Bytes, path: &Path) -> Result<Self> {
        match *bytes {
            [b'P', b'K', ..] => Ok(Self::Npz(Npz::parse(bytes, path)?)),
            // The protocol mark of a pickle.
            [0x80, 2..=5, b'}' | b']' | b'c' | 0x8a | b'(' | b'X', ..] => Err(refuse_pickle(path)),
            [0x89, b'H', b'D', b'F', ..] => {
                Err(Error::new(format!("{}: an HDF5 file, which is not supported", path.display()))
                    .hint("give the model's `.npz` or `.safetensors` file"))
            }
            _ => Ok(Self::SafeTensors(SafeTensors::parse(bytes, path)?)),
        }
    }

    pub(super) fn shapes(&self) -> Result<Shapes> {
        match self {
            Self::Npz(npz) => npz.names().map(|n| Ok((n.to_string(), npz.shape(n)?.to_vec()))).collect(),
            Self::SafeTensors(file) => {
                file.names().map(|n| Ok((n.to_string(), file.shape(n)?.to_vec()))).collect()
            }
            Self::Shards(shards) => {
                shards.names().map(|n| Ok((n.to_string(), shards.of(n).shape(n)?.to_vec()))).collect()
            }
            Self::Memory(tensors) => Ok(tensors.iter().map(|(n, t)| (n.clone(), t.shape.clone())).collect()),
        }
    }

    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        match self {
            Self::SafeTensors(file) => file.metadata().get(key).map(String::as_str),
            Self::Shards(shards) => shards.metadata(key),
            Self::Npz(_) | Self::Memory(_) => None,
        }
    }

    /// Row-major values; borrowed if the file stores them in the needed form.
    pub(super) fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        match self {
            Self::Npz(npz) => Ok(Cow::Owned(npz.tensor(name)?.values)),
            Self::SafeTensors(file) => file.values(name),
            Self::Shards(shards) => shards.of(name).values(name),
            Self::Memory(tensors) => Ok(Cow::Borrowed(&tensors[name].values)),
        }
    }

    /// Whether taking one block's share of this array costs no more than that share.
    pub(super) fn is_cheap(&self, name: &str) -> bool {
        match self {
            Self::Npz(_) => false,
            Self::SafeTensors(file) => file.dtype(name).is_ok_and(|t| t == Dtype::F32),
            Self::Shards(shards) => shards.of(name).dtype(name).is_ok_and(|t| t == Dtype::F32),
            Self::Memory(_) => true,
        }
    }

    /// Whether the values have 64 bits, of which f32 keeps 24.
    pub(super) fn is_f64(&self, name: &str) -> bool {
        match self {
            Self::Npz(npz) => npz.is_f64(name).unwrap_or(false),
            Self::SafeTensors(file) => file.dtype(name).is_ok_and(|t| t == Dtype::F64),
            Self::Shards(shards) => shards.of(name).dtype(name).is_ok_and(|t| t == Dtype::F64),
            Self::Memory(_) => false,
        }
    }
}
