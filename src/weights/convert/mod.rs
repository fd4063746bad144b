//! Converts any layout to any other that can hold the model: bit-identically, or not at all.
//!
//! What a layout cannot hold is found before anything is written. Everything that is not a tensor (the form
//! of GELU, epsilon, the pooling) goes into the metadata. If the format has none, the result says which
//! settings to give when it is read back.

mod hf;
mod npz;
mod timm;

use std::path::Path;

use super::{CheckpointMeta, LayoutKind, ModelFile, ModelOverrides, Tensors, open_backbone};
use crate::error::{At, Error, Result};
use crate::recipe::EvalResize;
use crate::vit::config::ModelConfig;
use crate::{fail, files};

/// The format to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Our own: timm's names, the whole configuration in the metadata
    Safetensors,
    /// A folder that timm opens as `local-dir:`; where OUT ends in `.safetensors`, its state dict alone
    Timm,
    /// A folder for `from_pretrained` of transformers
    Hf,
    /// The published format of vit_jax
    Npz,
}

/// Writes the model of `from` to `to`. Without a `format`, the ending of the name decides (`.npz`, else
/// safetensors). Returns the model's layout and notes for the user, one line each.
pub fn convert(
    from: &Path,
    to: &Path,
    format: Option<Format>,
    overrides: &ModelOverrides,
) -> Result<(LayoutKind, Vec<String>)> {
    refuse_ending(to)?;
    let by_name = if to.extension().is_some_and(|e| e == "npz") { Format::Npz } else { Format::Safetensors };
    let format = format.unwrap_or(by_name);
    // timm's is a folder, too, or only the state dict.
    let folder = match format {
        Format::Hf => true,
        Format::Timm => to.extension().is_none_or(|end| end != "safetensors"),
        Format::Safetensors | Format::Npz => false,
    };
    if !folder && to.is_dir() {
        return Err(Error::new(format!("{}: is a folder", to.display()))
            .hint("give the file to write, or `--to hf` for a HuggingFace folder"));
    }
    if folder && to.is_file() {
        return Err(Error::new(format!(
            "{}: is a file; `--to {}` makes a folder",
            to.display(),
            if format == Format::Hf { "hf" } else { "timm" }
        )));
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
            let written = if folder { timm::write_folder } else { timm::write };
            notes.extend(written(&file, &tensors, to)?);
        }
        Format::Hf => {
            hf::check(&file).map_err(refused)?;
            notes.extend(hf::write(&file, &tensors, to)?);
        }
        Format::Npz => {
            let flax = npz::tensors(&file, &tensors).map_err(refused)?;
            notes.extend(npz::lost(&file, &flax).map_err(refused)?);
            npz::write(to, &flax)?;
        }
    }
    Ok((file.layout, notes))
}

/// A folder for a model's files: a new one, or one that holds a model already and nothing else.
fn folder(to: &Path) -> Result<()> {
    let own = [
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "README.md",
        ".gitattributes",
        ".git",
    ];
    let entries = std::fs::read_dir(to).into_iter().flatten().flatten();
    let other = entries.map(|entry| entry.file_name()).find(|name| !own.iter().any(|own| name == own));
    if let Some(other) = other {
        return Err(Error::new(format!(
            "{} holds other things: `{}`",
            to.display(),
            other.to_string_lossy()
        ))
        .hint("name a new folder"));
    }
    files::create_dir(to)
}

/// A file that is named like another program's would be mistaken for one.
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

/// How a PyTorch library would prepare pictures for evaluation.
struct Prepared {
    /// Shorter side and centre, else both sides.
    centre: bool,
    bicubic: bool,
    crop_ratio: f32,
    /// Whether this matches what Vitrum does exactly, not only approximately.
    exact: bool,
}

fn prepared(meta: &CheckpointMeta) -> Prepared {
    let (centre, bicubic, exact) = match meta.resize {
        EvalResize::Center => (true, true, true),
        EvalResize::CenterBilinear => (true, false, true),
        EvalResize::SquashBicubic => (false, true, true),
        EvalResize::SquashSmooth => (false, false, true),
        EvalResize::Squash | EvalResize::SquashCenter => (false, false, false),
        EvalResize::AreaCenter => (true, false, false),
    };
    let crop_ratio = if meta.resize == EvalResize::Squash { 1.0 } else { meta.crop_ratio };
    Prepared { centre, bicubic, crop_ratio, exact }
}

fn other_resize(resize: EvalResize, library: &str) -> String {
    let name =
        serde_json::to_value(resize).map_or_else(|_| String::new(), |v| v.to_string().replace('"', ""));
    format!(
        "the model was measured with the resize `{name}`, which {library} cannot do: it will prepare pictures in the \
         nearest way, and accuracy may differ a little"
    )
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).at(path.display())? + "\n";
    files::write_atomic(path, |out| out.write_all(text.as_bytes()))
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

/// Hidden layers per width, if that is whole or short enough to be exact.
fn mlp_ratio(config: &ModelConfig) -> f64 {
    config.fc1_width() as f64 / config.width as f64
}
