//! Tar archives: with class folders inside, one archive per class (perhaps all inside one archive), or with
//! WebDataset's naming ([`webdataset`]).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::data::shard::map;
use crate::data::split::Split;
use crate::error::{At, Error, Result};

use super::folder::{self, Paths};
use super::listing::{Labels, Listing};
use super::strays::{self, count};
use super::{Place, Source, Store, webdataset};

/// One archive, or a class's archive inside another.
pub(super) struct Archive {
    /// Path in the data set, with `/`.
    pub(super) name: String,
    /// The number of its map.
    pub(super) map: usize,
    /// In the order of the archive; a name may occur twice.
    pub(super) members: Vec<Member>,
    folders: BTreeSet<String>,
}

/// A file in an archive.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) offset: usize,
    pub(super) len: usize,
}

impl Archive {
    /// The name without folder and extension.
    fn stem(&self) -> &str {
        let base = self.name.rsplit('/').next().unwrap_or_default();
        base.strip_suffix(".tar").unwrap_or(base)
    }

    /// The split that its folder or its name indicates.
    pub(super) fn split(&self) -> Option<Split> {
        let of_folder = self.name.split_once('/').and_then(|(folder, _)| Split::of_word(folder));
        of_folder.or_else(|| Split::of(self.stem()))
    }
}

/// One archive (`files` is `path` itself), or those of the folder `path`, by their relative names.
pub(super) fn open(path: &Path, files: &[(String, PathBuf)], mut listing: Listing) -> Result<Source> {
    let mut store = Store::new(path, "tar");
    let mut archives = read(files, &mut store)?;
    let is_alone = files.len() == 1 && !path.is_dir();
    if archives.iter().any(|archive| webdataset::is_sample_list(archive, &store)) {
        webdataset::list(&archives, &store, is_alone, &mut listing)?;
        return listing.finish(Labels::NamesOrIndices, store);
    }
    let classes = if is_alone { class_archives(&archives, &store)? } else { Vec::new() };
    let is_alone = is_alone && classes.is_empty();
    if !classes.is_empty() {
        archives = classes;
    }
    let paths = paths(archives, &store, is_alone, &mut listing);
    folder::arrange(paths, path, &mut listing).map_err(|e| e.at(path.display()))?;
    listing.finish(Labels::Names, store)
}

/// Maps the files and lists their members.
pub(super) fn read(files: &[(String, PathBuf)], store: &mut Store) -> Result<Vec<Archive>> {
    let mut archives = Vec::new();
    for (name, file) in files {
        let bytes = open_one(file)?;
        store.maps.push(bytes);
        let map = store.maps.len() - 1;
        archives.push(members(name, file, &store.maps[map], 0, map)?);
    }
    Ok(archives)
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

/// Lists an archive that starts `base` bytes into its map.
fn members(name: &str, file: &Path, bytes: &[u8], base: usize, map: usize) -> Result<Archive> {
    let mut archive = Archive { name: name.to_owned(), map, members: Vec::new(), folders: BTreeSet::new() };
    let mut reader = tar::Archive::new(std::io::Cursor::new(bytes));
    for entry in reader.entries_with_seek().at(file.display())? {
        let entry = entry.at(file.display())?;
        let Ok(full) = String::from_utf8(entry.path_bytes().into_owned()) else {
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            return Err(Error::new(format!("{}: `{name}` is not a UTF-8 path", file.display()))
                .hint("pack the archive again with plain names"));
        };
        if full.starts_with('/') || full.split('/').any(|part| part == "..") {
            return Err(Error::new(format!("{}: `{full}` leaves the archive", file.display()))
                .hint("an archive of pictures has plain relative paths"));
        }
        // `tar -C DIR -cf x.tar .` puts `./` in front.
        let parts: Vec<&str> = full.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        let name = parts.join("/");
        let (offset, len) = (entry.raw_file_position() as usize, entry.size() as usize);
        let kind = entry.header().entry_type();
        if name.is_empty() {
            continue;
        }
        if kind.is_dir() {
            archive.folders.insert(name);
        } else if kind.is_symlink() || kind.is_hard_link() {
            return Err(Error::new(format!("{}: `{name}` is a link", file.display()))
                .hint("make the archive with `tar --dereference --hard-dereference`"));
        } else if kind.is_file() {
            if offset.checked_add(len).is_none_or(|end| end > bytes.len()) {
                return Err(Error::new(format!("{}: the archive ends inside `{name}`", file.display()))
                    .hint("it was cut short: copy or download it again"));
            }
            archive.members.push(Member { name, offset: base + offset, len });
        }
    }
    Ok(archive)
}

/// The archives inside ImageNet's training archive, one per class, if there are any.
fn class_archives(archives: &[Archive], store: &Store) -> Result<Vec<Archive>> {
    let is_tar = |name: &str| strays::ending(name) == "tar";
    let mut found = Vec::new();
    for outer in archives {
        let bytes = &store.maps[outer.map];
        for member in outer.members.iter().filter(|m| is_tar(&m.name) && !strays::is_junk_path(&m.name)) {
            let place = store.path.join(&member.name);
            let inner = &bytes[member.offset..member.offset + member.len];
            if inner.get(257..262) != Some(b"ustar") {
                continue;
            }
            let inner = members(&member.name, &place, inner, member.offset, outer.map)?;
            if webdataset::is_sample_list(&inner, store) {
                return Err(Error::new(format!(
                    "{}: an archive of WebDataset archives",
                    store.path.display()
                ))
                .hint(format!("unpack it into a folder, `tar -xf {}`", store.path.display())));
            }
            found.push(inner);
        }
    }
    Ok(found)
}

/// The archives' paths as one tree.
pub(super) fn paths(archives: Vec<Archive>, store: &Store, is_alone: bool, listing: &mut Listing) -> Paths {
    let mut paths = Paths::default();
    let mut known: BTreeSet<String> = BTreeSet::new();
    let (mut others, mut replaced) = (Vec::new(), Vec::new());
    for archive in archives {
        let (files, dropped, twice) = pictures(&archive, store);
        others.extend(dropped.into_iter().map(|name| format!("{}:{name}", archive.name)));
        replaced.extend(twice);
        let (files, empty) = without_common_folder(files, &archive.folders);
        let is_flat = !files.is_empty() && files.keys().all(|name| !name.contains('/'));
        // Prefixes of the paths: the folder of the archive, or the split that its name indicates; and the
        // class, if it holds one.
        let has_parts =
            files.keys().any(|n| n.split_once('/').is_some_and(|(f, _)| Split::of_word(f).is_some()));
        let mut prefix = match (archive.name.rsplit_once('/'), archive.split()) {
            _ if is_alone => String::new(),
            (Some((folder, _)), _) => format!("{folder}/"),
            (None, Some(split)) if !has_parts => format!("{}/", split.name()),
            _ => String::new(),
        };
        if is_flat && Split::of(archive.stem()).is_none() {
            prefix += &format!("{}/", archive.stem());
        }
        for (name, (offset, len)) in files {
            let mut name = format!("{prefix}{name}");
            // The same path in two archives means two pictures.
            if known.contains(&name) {
                let at = name.rfind('/').map_or(0, |i| i + 1);
                name.insert_str(at, &format!("{}:", archive.name.replace('/', ":")));
            }
            known.insert(name.clone());
            paths.files.push((name, Place::Member { archive: archive.map, offset, len }));
        }
        paths.empty.extend(empty.into_iter().map(|name| format!("{prefix}{name}")));
    }
    paths.files.sort_by(|a, b| a.0.cmp(&b.0));
    listing.note(&others, "file", "no pictures");
    if !replaced.is_empty() {
        let pictures = count(replaced.len(), "picture");
        listing.notes.push(format!(
            "{pictures} left out, which {} again later in the archive: {}",
            if replaced.len() == 1 { "comes" } else { "come" },
            strays::named(&replaced)
        ));
    }
    paths
}

type Files = BTreeMap<String, (usize, usize)>;

/// Pictures with place and length, other files, and repeated names: the last one of a name counts, as when
/// `tar` extracts.
fn pictures(archive: &Archive, store: &Store) -> (Files, Vec<String>, Vec<String>) {
    let (mut files, mut others, mut replaced) = (Files::new(), Vec::new(), Vec::new());
    for Member { name, offset, len } in &archive.members {
        let head = || store.maps[archive.map][*offset..*offset + (*len).min(16)].to_vec();
        if strays::is_junk_path(name) || !strays::is_picture(name, head) {
            others.push(name.clone());
        } else if files.insert(name.clone(), (*offset, *len)).is_some() {
            replaced.push(name.clone());
        }
    }
    (files, others, replaced)
}

/// An archive often has all its paths in one folder with the archive's name. Returns the empty folders, too.
fn without_common_folder(files: Files, folders: &BTreeSet<String>) -> (Files, Vec<String>) {
    let has_inside = |folder: &str| {
        let prefix = format!("{folder}/");
        let next = |names: &BTreeSet<String>| {
            names.range(prefix.clone()..).next().is_some_and(|n| n.starts_with(&prefix))
        };
        files.range(prefix.clone()..).next().is_some_and(|(n, _)| n.starts_with(&prefix)) || next(folders)
    };
    let visible = |name: &&String| !strays::is_junk_path(name);
    let empty: Vec<String> =
        folders.iter().filter(visible).filter(|name| !has_inside(name)).cloned().collect();
    let Some((top, _)) = files.keys().next().and_then(|name| name.split_once('/')) else {
        return (files, empty);
    };
    let prefix = format!("{top}/");
    let deep = |name: &String| name.strip_prefix(&prefix).is_some_and(|rest| rest.contains('/'));
    if Split::of_word(top).is_some() || !files.keys().all(deep) {
        return (files, empty);
    }
    let strip = |name: &str| name.strip_prefix(&prefix).map(str::to_owned);
    let empty = empty.iter().filter_map(|name| strip(name)).collect();
    let files = files.iter().filter_map(|(name, place)| Some((strip(name)?, *place))).collect();
    (files, empty)
}
