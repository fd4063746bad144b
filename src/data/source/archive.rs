//! Tar archives: class folders inside them, or WebDataset's naming, where the files of a sample share all of their name but
//! the last part: `0001.jpg` and `0001.cls`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::data::dataset::Split;
use crate::data::shard::map;
use crate::error::{At, Error, Result};
use crate::fail;

use super::{Item, Parts, Paths, Place, Source, Store, StoreKind, arrange, is_val};

/// The archives of a folder that has nothing else to train on, sorted.
pub(super) fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).at(path.display())? {
        let entry = entry.at(path.display())?.path();
        if entry.extension().is_some_and(|e| e == "tar") {
            found.push(entry);
        }
    }
    found.sort();
    Ok(found)
}

/// One archive, or the archives of a folder.
pub(super) fn open(path: &Path, files: &[PathBuf]) -> Result<Source> {
    let mut maps = Vec::new();
    let mut members = Vec::new();
    let mut folders = BTreeSet::new();
    for (archive, file) in files.iter().enumerate() {
        let bytes = open_one(file)?;
        let mut reader = tar::Archive::new(std::io::Cursor::new(&bytes[..]));
        for entry in reader.entries_with_seek().at(file.display())? {
            let entry = entry.at(file.display())?;
            let Ok(name) = String::from_utf8(entry.path_bytes().into_owned()) else {
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                return Err(Error::new(format!("{}: `{name}` is no UTF-8 path", file.display()))
                    .hint("pack the archive again with plain names"));
            };
            let name = name.trim_start_matches("./").trim_end_matches('/').to_owned();
            let is_inside = !name.starts_with('/') && !name.split('/').any(|part| part == "..");
            if !is_inside {
                return Err(Error::new(format!("{}: `{name}` leaves the archive", file.display()))
                    .hint("an archive of pictures has plain relative paths"));
            }
            let (offset, len) = (entry.raw_file_position() as usize, entry.size() as usize);
            let kind = entry.header().entry_type();
            if kind.is_dir() {
                folders.insert(name);
            } else if kind.is_symlink() || kind.is_hard_link() {
                return Err(Error::new(format!("{}: `{name}` is a link", file.display()))
                    .hint("make the archive with `tar --dereference --hard-dereference`"));
            } else if kind.is_file() {
                if offset.checked_add(len).is_none_or(|end| end > bytes.len()) {
                    return Err(Error::new(format!("{}: the archive ends inside `{name}`", file.display()))
                        .hint("it was cut short: copy or download it again"));
                }
                members.push((name, Place::Member { archive, offset, len }));
            }
        }
        maps.push(bytes);
    }
    let store = Store { path: path.to_owned(), kind: StoreKind::Archives(maps) };
    if members.iter().any(|(name, _)| name.ends_with(".cls")) {
        return web_dataset(members, files, store);
    }
    let mut paths = Paths { files: members, folders };
    strip_common_folder(&mut paths);
    arrange(paths, store).map_err(|e| e.at(path.display()))
}

fn open_one(path: &Path) -> Result<Mmap> {
    let archive = map(path)?;
    if archive.starts_with(&[0x1F, 0x8B]) || archive.starts_with(b"BZh") || archive.starts_with(b"\xFD7zXZ") {
        return Err(Error::new(format!("{}: the archive is compressed", path.display()))
            .hint("decompress it first, for example with `gunzip`"));
    }
    if archive.get(257..262) != Some(b"ustar") {
        return Err(Error::new(format!(
            "{}: not a folder, a tar archive, a CIFAR binary or a manifest",
            path.display()
        ))
        .hint("see `vitrum pack --help` for what can be packed"));
    }
    Ok(archive)
}

/// Samples are what shares a name up to its extension; the class is in the member `cls`, as a number or a name. Archives
/// named like a split are that split.
fn web_dataset(members: Vec<(String, Place)>, files: &[PathBuf], store: Store) -> Result<Source> {
    /// Extensions of pictures; whatever else a sample has is left alone.
    const PICTURES: [&str; 8] = ["jpg", "jpeg", "png", "webp", "bmp", "gif", "img", "image"];
    let mut samples: BTreeMap<(usize, String), (Option<Place>, Option<String>)> = BTreeMap::new();
    for (name, place) in members {
        let Place::Member { archive, offset, len } = place else { continue };
        let folder_end = name.rfind('/').map_or(0, |i| i + 1);
        let Some((stem, extension)) = name[folder_end..].split_once('.') else { continue };
        let key = (archive, format!("{}{stem}", &name[..folder_end]));
        let sample = samples.entry(key).or_default();
        if extension == "cls" {
            let StoreKind::Archives(maps) = &store.kind else { continue };
            let text = std::str::from_utf8(&maps[archive][offset..offset + len.min(256)]).unwrap_or("");
            sample.1 = Some(text.trim().to_owned());
        } else if PICTURES.contains(&extension.to_ascii_lowercase().as_str()) {
            sample.0 = Some(place);
        }
    }
    let texts: BTreeSet<&str> = samples.values().filter_map(|(_, class)| class.as_deref()).collect();
    let numbers: Option<Vec<usize>> = texts.iter().map(|t| t.parse().ok().filter(|n| *n < 1 << 22)).collect();
    let classes: Vec<String> = match &numbers {
        Some(numbers) => (0..=numbers.iter().max().copied().unwrap_or(0)).map(|n| n.to_string()).collect(),
        None => texts.iter().map(ToString::to_string).collect(),
    };
    let label = |text: &str| match &numbers {
        Some(_) => text.parse().ok(),
        None => classes.iter().position(|c| c == text),
    };
    let (mut train, mut val) = (Vec::new(), Vec::new());
    for ((archive, key), sample) in &samples {
        let name = format!("{}:{key}", files[*archive].file_name().unwrap_or_default().to_string_lossy());
        let (Some(place), Some(text)) = sample else {
            if sample.0.is_some() {
                fail!("{}: sample `{name}` has no `cls` member", store.path.display());
            }
            continue;
        };
        let Some(label) = label(text) else {
            fail!("{}: sample `{name}` has the class `{text}`", store.path.display());
        };
        let list = if is_val(&files[*archive].file_name().unwrap_or_default().to_string_lossy()) {
            &mut val
        } else {
            &mut train
        };
        list.push(Item::new(name, label, place.clone()));
    }
    let parts = match (train.is_empty(), val.is_empty()) {
        (false, false) => Parts::Split { train, val },
        (true, _) => Parts::Whole(val),
        _ => Parts::Whole(train),
    };
    Ok(Source::new(classes, parts, store))
}

/// An archive often has all its paths in one folder named like itself.
fn strip_common_folder(paths: &mut Paths) {
    let Some((top, _)) = paths.files.first().and_then(|(name, _)| name.split_once('/')) else { return };
    let top = format!("{top}/");
    let is_split =
        [Split::Train, Split::Val].iter().any(|s| s.folders().contains(&top.trim_end_matches('/')));
    let deep = |name: &String| name.strip_prefix(&top).is_some_and(|rest| rest.contains('/'));
    if is_split || !paths.files.iter().all(|(name, _)| deep(name)) {
        return;
    }
    paths.files.iter_mut().for_each(|(name, _)| *name = name[top.len()..].to_owned());
    paths.folders =
        paths.folders.iter().filter_map(|name| name.strip_prefix(&top)).map(str::to_owned).collect();
}
