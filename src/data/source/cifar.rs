//! CIFAR-10 and CIFAR-100 as their authors publish them: binary files of a label and 3×1,024 values a
//! picture.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{At, Error, Result};
use crate::{fail, files};

use super::listing::{Labels, Listing};
use super::{CIFAR_PIXELS, Item, Place, Source, Store};
use crate::data::shard::map;
use crate::data::split::Split;

/// The CIFAR binaries that `path` is or contains, sorted.
pub(super) fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        let binary = path.extension().is_some_and(|e| e == "bin");
        return Ok(if binary { vec![path.to_owned()] } else { Vec::new() });
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).at(path.display())? {
        let entry = entry.at(path.display())?.path();
        let name = entry.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let known = name == "train.bin" || name == "test.bin" || name.contains("_batch");
        if known && name.ends_with(".bin") {
            found.push(entry);
        }
    }
    found.sort();
    Ok(found)
}

/// CIFAR-10 has a label byte before each picture; CIFAR-100 has a coarse and a fine one, and the fine one
/// counts.
pub(super) fn open(path: &Path, binaries: &[PathBuf]) -> Result<Source> {
    let maps = binaries.iter().map(|file| map(file)).collect::<Result<Vec<_>>>()?;
    let label_bytes = [1, 2].into_iter().find(|n| maps.iter().all(|m| m.len() % (n + 3 * CIFAR_PIXELS) == 0));
    let Some(label_bytes) = label_bytes else {
        let lengths: Vec<_> = maps.iter().map(|m| m.len().to_string()).collect();
        return Err(Error::new(format!(
            "{}: its length of {} bytes is not a multiple of CIFAR-10's 3073 or CIFAR-100's 3074",
            path.display(),
            lengths.join(", ")
        ))
        .hint("the file was cut short or is not a CIFAR binary"));
    };
    let (count, names_file) =
        if label_bytes == 1 { (10, "batches.meta.txt") } else { (100, "fine_label_names.txt") };
    let mut listing = Listing::default();
    cifar_classes(&binaries[0].with_file_name(names_file), count)?.into_iter().for_each(|c| listing.give(c));
    for (file, (binary, bytes)) in binaries.iter().zip(&maps).enumerate() {
        let name = binary.file_name().unwrap_or_default().to_string_lossy();
        // A single file is used whole; of several, those without a split's name are for training.
        let split = if path.is_dir() { Some(Split::of(&name).unwrap_or(Split::Train)) } else { None };
        for (record, start) in (0..bytes.len()).step_by(label_bytes + 3 * CIFAR_PIXELS).enumerate() {
            let offset = start + label_bytes;
            let label = usize::from(bytes[offset - 1]);
            if label >= count {
                fail!("{}: record {record} has label {label}, not below {count}", binary.display());
            }
            listing.push(split, Item::new(format!("{name}:{record}"), label, Place::Planes { file, offset }));
        }
    }
    listing.finish(Labels::Given, Store { maps, ..Store::new(path, "cifar") })
}

/// The lines of the file of names; numbers if there is none.
fn cifar_classes(path: &Path, count: usize) -> Result<Vec<String>> {
    if !path.is_file() {
        return Ok((0..count).map(|i| i.to_string()).collect());
    }
    let text = files::read_text(path)?;
    let names: Vec<String> = text.lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect();
    if names.len() != count {
        fail!("{}: {} class names instead of {count}", path.display(), names.len());
    }
    Ok(names)
}
