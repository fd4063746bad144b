//! vit_jax's `.npz`: stored members, so that NumPy can map or read them, in the numbering of the published
//! files.

use std::io::Write;
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::size;
use crate::backend::{LossKind, Normalise};
use crate::error::{Error, Result};
use crate::files;
use crate::recipe::{PROTOCOLS, unit};
use crate::vit::config::{MlpKind, NormPlace, PoolKind, Posemb, QkvBias, RopeKind};
use crate::weights::container::Container;
use crate::weights::headers::Headers;
use crate::weights::hub::Hub;
use crate::weights::{ModelFile, ModelOverrides, Numbering, Tensors, to_flax_tensors};

/// Under the names of the published files.
pub(super) fn tensors(file: &ModelFile, own: &Tensors) -> Result<Tensors> {
    if file.config.qkv_bias != QkvBias::All {
        return Err(Error::new("q, k and v of vit_jax's model always have a bias, but this one's have none")
            .hint("use `--to timm` or `--to hf`"));
    }
    let c = &file.config;
    let later = [
        (c.registers > 0, "registers"),
        (c.rope != RopeKind::None, "rotary positions"),
        (c.posemb == Posemb::None, "model without positions"),
        (c.norm_pre, "norm in front of the first block"),
        (!c.patch_bias, "patch embedding without a bias"),
        (c.mlp_kind != MlpKind::Dense, "SwiGLU"),
        (c.norm == NormPlace::None, "model without a final norm"),
        (c.pool == PoolKind::TokenGap, "classifier of class token and mean"),
    ];
    if let Some((_, what)) = later.into_iter().find(|(has, _)| *has) {
        return Err(
            Error::new(format!("vit_jax has no {what}")).hint("use `--to timm` or `--to safetensors`")
        );
    }
    to_flax_tensors(&file.config, Numbering::Published, own)
}

/// The settings that a reader of the file needs because the file cannot hold them.
pub(super) fn lost(file: &ModelFile, flax: &Tensors) -> Result<Option<String>> {
    let ModelFile { config, grid_known, meta, .. } = file;
    let container = Container::Memory(flax.clone());
    let headers = Headers::read(&container, Path::new(""), Hub::default(), &ModelOverrides::default())?;
    let (read, prepared) = (headers.detected, headers.meta);
    let mut sets = Vec::new();
    let mut set = |key: &str, ours: String, theirs: String| {
        if ours != theirs {
            sets.push(format!("--set model.{key}={ours}"));
        }
    };
    let name = |value: serde_json::Result<serde_json::Value>| {
        value.ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
    };
    let theirs = &read.config;
    set("gelu", name(serde_json::to_value(config.gelu)), name(serde_json::to_value(theirs.gelu)));
    set("ln_eps", format!("{:e}", config.ln_eps), format!("{:e}", theirs.ln_eps));
    set("pool", name(serde_json::to_value(config.pool)), name(serde_json::to_value(theirs.pool)));
    set("posemb", name(serde_json::to_value(config.posemb)), name(serde_json::to_value(theirs.posemb)));
    if config.pool == PoolKind::Gap {
        set("norm", name(serde_json::to_value(config.norm)), name(serde_json::to_value(theirs.norm)));
    }
    if *grid_known {
        let known = if read.grid_known { size(theirs.image) } else { String::new() };
        set("image", size(config.image), known);
    }
    if meta.normalise != Normalise::INCEPTION {
        let of = |key: &str, values: [f32; 3]| {
            let [r, g, b] = unit(values);
            format!("--set data.{key}=[{r},{g},{b}]")
        };
        sets.push(of("mean", meta.normalise.mean));
        sets.push(of("std", meta.normalise.std));
    }
    if meta.loss == Some(LossKind::Sigmoid) {
        sets.push("--set loss.kind=sigmoid".into());
    }
    let read = (!sets.is_empty()).then(|| format!("read this one with `{}`", sets.join(" ")));
    let gone = meta.classes.as_ref().map(|_| "this one loses the names of the classes".to_string());
    let same = (prepared.resize, prepared.crop_ratio) == (meta.resize, meta.crop_ratio);
    let named =
        PROTOCOLS.into_iter().find(|(_, resize, crop)| (*resize, *crop) == (meta.resize, meta.crop_ratio));
    let fed = (!same).then(|| match named {
        Some((name, ..)) => format!("its pictures are prepared with `--protocol {name}`"),
        None => "this one loses how its pictures are prepared".into(),
    });
    let parts: Vec<String> = read.into_iter().chain(fed).chain(gone).collect();
    Ok((!parts.is_empty()).then(|| format!("an `.npz` holds tensors only; {}", parts.join("; "))))
}

pub(super) fn write(path: &Path, tensors: &Tensors) -> Result<()> {
    /// The limit of the ZIP format without its extension.
    const SMALL: u64 = u32::MAX as u64;
    files::write_atomic(path, |out| {
        let mut zip = ZipWriter::new(out);
        for (name, tensor) in tensors {
            let bytes: &[u8] = bytemuck::cast_slice(&tensor.values);
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Stored)
                .large_file(bytes.len() as u64 > SMALL / 2);
            zip.start_file(format!("{name}.npy"), options)?;
            zip.write_all(&header(&tensor.shape))?;
            zip.write_all(bytes)?;
        }
        zip.finish()?;
        Ok(())
    })
}

/// Version 1.0, padded as NumPy does: magic, version, length and text are a multiple of 64 bytes.
fn header(shape: &[usize]) -> Vec<u8> {
    let sides: String = shape.iter().map(|d| format!("{d}, ")).collect();
    let tuple =
        if shape.len() > 1 { sides.trim_end_matches(", ").to_string() } else { sides.trim_end().into() };
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({tuple}), }}");
    let padded = (10 + text.len() + 1).next_multiple_of(64) - 10 - 1;
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    text.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((text.len() as u16).to_le_bytes());
    out.extend(text.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_numpys() {
        for (shape, tuple) in
            [(&[][..], "()"), (&[3], "(3,)"), (&[3, 4], "(3, 4)"), (&[1, 1, 64], "(1, 1, 64)")]
        {
            let header = header(shape);
            assert_eq!((header.len() % 64, header.last()), (0, Some(&b'\n')));
            let text = String::from_utf8(header[10..].to_vec()).unwrap();
            let expected = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple}, }}");
            assert_eq!(text.trim_end(), expected);
        }
    }
}
