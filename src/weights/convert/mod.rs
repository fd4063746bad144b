//! From any layout to any other that can hold the model: to the bit, or not at all.
//!
//! What a layout cannot hold is found before anything is written. What is no tensor (the form of GELU, epsilon, how
//! tokens are pooled) goes into the metadata; where there is none, the result says what to give when it is read back.

mod hf;
mod npz;
mod timm;

use std::path::Path;

use super::{LayoutKind, ModelFile, ModelOverrides, Tensors, open_backbone};
use crate::error::{At, Error, Result};
use crate::fail;
use crate::vit::config::ModelConfig;

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Our own: timm's names, the whole configuration in the metadata
    Safetensors,
    /// A state dict for timm's `load_state_dict`
    Timm,
    /// A folder for `from_pretrained` of transformers
    Hf,
    /// The published format of vit_jax
    Npz,
}

/// Writes the model of `from` to `to`; without a `format`, as the end of the name says (`.npz`, else safetensors). Beside
/// the model's layout: what the user should know, one line each.
pub fn convert(
    from: &Path,
    to: &Path,
    format: Option<Format>,
    overrides: &ModelOverrides,
) -> Result<(LayoutKind, Vec<String>)> {
    refuse_ending(to)?;
    let by_name = if to.extension().is_some_and(|e| e == "npz") { Format::Npz } else { Format::Safetensors };
    let format = format.unwrap_or(by_name);
    if format != Format::Hf && to.is_dir() {
        return Err(Error::new(format!("{}: is a folder", to.display()))
            .hint("give the file to write, or `--to hf` for a HuggingFace folder"));
    }
    if format == Format::Hf && to.is_file() {
        return Err(Error::new(format!("{}: is a file; `--to hf` makes a folder", to.display())));
    }
    let file = open_backbone(from, overrides)?;
    let tensors = exact_tensors(&file)?;
    let mut notes = file.notes.clone();
    let refused = |e: Error| e.at(format!("{}: cannot be written as {}", file.path.display(), format.name()));
    match format {
        Format::Safetensors => {
            let metadata = super::metadata(&file.config, file.grid_known, &file.meta).at(to.display())?;
            super::write_own(to, &file.config, file.grid_known, &tensors, &metadata)?;
        }
        Format::Timm => {
            timm::check(&file).map_err(refused)?;
            timm::write(&file, &tensors, to)?;
        }
        Format::Hf => {
            hf::check(&file).map_err(refused)?;
            hf::write(&file, &tensors, to)?;
        }
        Format::Npz => {
            let flax = npz::tensors(&file, &tensors).map_err(refused)?;
            notes.extend(npz::lost(&file.config, file.grid_known, &flax).map_err(refused)?);
            npz::write(to, &flax)?;
        }
    }
    Ok((file.layout, notes))
}

/// A file that is named like another program's would be taken for one.
fn refuse_ending(to: &Path) -> Result<()> {
    let ending = to.extension().and_then(|end| end.to_str()).unwrap_or_default().to_ascii_lowercase();
    let other = [
        "onnx", "pt", "pth", "bin", "ckpt", "h5", "pb", "tflite", "engine", "gguf", "msgpack", "pkl",
        "mlmodel",
    ];
    if !other.contains(&ending.as_str()) {
        return Ok(());
    }
    let plain = to.with_extension("safetensors");
    Err(Error::usage(format!("{}: `.{ending}` files are not written", to.display())).hint(format!(
        "write `{}`, and say for whom by `--to`: `safetensors`, `timm`, `hf` (a folder) or `npz`",
        plain.display()
    )))
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Timm => "timm's safetensors",
            Self::Hf => "a HuggingFace folder",
            Self::Npz => "`.npz`",
        }
    }
}

/// All values, unless reading has changed some.
fn exact_tensors(file: &ModelFile) -> Result<Tensors> {
    if let Some(channels) = file.tensors.channels() {
        return Err(Error::new(format!(
            "{}: the patch kernel takes {channels} channels, and converting computes none for three",
            file.path.display()
        ))
        .hint("`vitrum finetune` adapts it"));
    }
    if let Some(name) = file.tensors.rounded().next() {
        fail!(
            "{}: tensor `{name}` holds 64-bit numbers, which the 32 bits of the other layouts would round",
            file.path.display()
        );
    }
    file.tensors.all()
}

/// `16`, or `4x6`.
fn size((height, width): (usize, usize)) -> String {
    if height == width { height.to_string() } else { format!("{height}x{width}") }
}

/// Hidden layers per width, where that is whole or short enough to be exact.
fn mlp_ratio(config: &ModelConfig) -> f64 {
    config.mlp as f64 / config.width as f64
}
