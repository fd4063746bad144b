//! What is in a place full of pictures that are not packed: an image folder, a tar archive of the same paths, or the
//! binary files of CIFAR-10 and CIFAR-100.
//!
//! Every source becomes the same thing: class names, and for each split a list of records with a label and a place to
//! read them from. Paths are sorted, so that an archive and its unpacked folder give the same records in the same
//! order. Nothing is decoded here.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{At, Error, Result};
use crate::{fail, files};

use super::dataset::{Split, same_classes};
use super::decode::Format;
use super::shard::{Record, map};

/// Pictures that are not packed.
#[derive(Debug)]
pub struct Source {
    /// Names in the order of the labels.
    pub classes: Vec<String>,
    pub parts: Parts,
    pub store: Store,
}

/// The records, with training and validation told apart or not.
#[derive(Debug)]
pub enum Parts {
    Whole(Vec<Item>),
    Split { train: Vec<Item>, val: Vec<Item> },
}

/// One record of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Path inside the source, with `/`.
    pub name: String,
    pub label: usize,
    place: Place,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// The file of the item's name.
    File,
    /// Bytes of the archive.
    Member { offset: usize, len: usize },
    /// In one of the binaries: 1,024 red, 1,024 green and 1,024 blue values.
    Planes { file: usize, offset: usize },
}

/// Where the records' bytes are.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    kind: StoreKind,
}

#[derive(Debug)]
enum StoreKind {
    Folder,
    Archive(Mmap),
    Binaries(Vec<Mmap>),
}

/// Side of CIFAR's pictures.
const CIFAR_SIDE: usize = 32;
const CIFAR_PIXELS: usize = CIFAR_SIDE * CIFAR_SIDE;

impl Source {
    /// Lists `path`: a folder, a tar archive, a CIFAR binary or a folder of such.
    pub fn open(path: &Path) -> Result<Self> {
        let binaries = cifar_files(path)?;
        let source = if !binaries.is_empty() {
            open_cifar(path, &binaries)
        } else if path.is_dir() {
            open_folder(path)
        } else {
            open_tar(path)
        }?;
        source.check().map_err(|e| e.at(path.display()))?;
        Ok(source)
    }

    /// The records of a split; where splits are not told apart, all of them.
    pub fn items(&self, split: Split) -> &[Item] {
        match (&self.parts, split) {
            (Parts::Whole(items), _) => items,
            (Parts::Split { train, .. }, Split::Train) => train,
            (Parts::Split { val, .. }, Split::Val) => val,
        }
    }

    /// Whether training and validation are told apart.
    pub fn is_split(&self) -> bool {
        matches!(self.parts, Parts::Split { .. })
    }

    /// Refuses a source from which nothing can be learnt.
    fn check(&self) -> Result<()> {
        let items = self.items(Split::Train);
        if items.is_empty() {
            return Err(Error::new("no pictures in class folders").hint(CLASS_FOLDERS));
        }
        let is_picture = |item: &Item| match self.store.read(item) {
            Ok(Record::Encoded(bytes)) => Format::of(&bytes).is_ok(),
            Ok(Record::Raw { .. }) => true,
            Err(_) => false,
        };
        if !items.iter().any(is_picture) {
            fail!("no JPEG or PNG picture among its {} files", items.len());
        }
        let first = items[0].label;
        if items.iter().all(|item| item.label == first) {
            let only = &self.classes[first];
            return Err(Error::new(format!("only one class, `{only}`; a classifier needs two or more"))
                .hint(CLASS_FOLDERS));
        }
        Ok(())
    }
}

const CLASS_FOLDERS: &str = "put the pictures of each class into a folder of its own, `DIR/CLASS/NAME.jpg` or \
                             `DIR/train/CLASS/NAME.jpg` and `DIR/val/CLASS/NAME.jpg`";

impl Store {
    /// Reads a record.
    pub fn read(&self, item: &Item) -> Result<Record<'_>> {
        match (&self.kind, &item.place) {
            (StoreKind::Folder, Place::File) => {
                let bytes = fs::read(self.path.join(&item.name)).map_err(|e| Error::new(e.to_string()))?;
                Ok(Record::Encoded(Cow::Owned(bytes)))
            }
            (StoreKind::Archive(archive), Place::Member { offset, len }) => {
                Ok(Record::Encoded(Cow::Borrowed(&archive[*offset..*offset + *len])))
            }
            (StoreKind::Binaries(files), Place::Planes { file, offset }) => {
                let planes = &files[*file][*offset..*offset + 3 * CIFAR_PIXELS];
                let pixels = (0..CIFAR_PIXELS).flat_map(|i| [0, 1, 2].map(|c| planes[c * CIFAR_PIXELS + i]));
                Ok(Record::Raw { pixels: pixels.collect(), height: CIFAR_SIDE, width: CIFAR_SIDE })
            }
            _ => unreachable!("an item is read from the store that listed it"),
        }
    }

    /// As the user wrote it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How messages call a record: its file, or its path in the archive.
    pub fn display(&self, item: &Item) -> String {
        match self.kind {
            StoreKind::Folder => self.path.join(&item.name).display().to_string(),
            StoreKind::Archive(_) | StoreKind::Binaries(_) => item.name.clone(),
        }
    }

    /// `folder`, `tar` or `cifar`.
    pub fn kind(&self) -> &'static str {
        match self.kind {
            StoreKind::Folder => "folder",
            StoreKind::Archive(_) => "tar",
            StoreKind::Binaries(_) => "cifar",
        }
    }
}

/// Relative paths with `/`: what a folder or an archive contains.
#[derive(Debug, Default)]
struct Paths {
    files: Vec<(String, Place)>,
    folders: BTreeSet<String>,
}

fn open_folder(path: &Path) -> Result<Source> {
    let mut paths = Paths::default();
    walk(path, "", 0, &mut paths)?;
    arrange(paths, Store { path: path.to_owned(), kind: StoreKind::Folder }).map_err(|e| e.at(path.display()))
}

/// Collects what is below `root/inside`. Symbolic links are followed, to a limited depth.
fn walk(root: &Path, inside: &str, depth: usize, paths: &mut Paths) -> Result<()> {
    const DEEPEST: usize = 16;
    let dir = root.join(inside);
    for entry in fs::read_dir(&dir).at(dir.display())? {
        let entry = entry.at(dir.display())?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
            return Err(Error::new(format!("{}: the name is not UTF-8", entry.path().display()))
                .hint("rename the file"));
        };
        let path = if inside.is_empty() { name } else { format!("{inside}/{name}") };
        let kind = entry.file_type().at(entry.path().display())?;
        let is_dir = kind.is_dir() || (kind.is_symlink() && entry.path().is_dir());
        if !is_dir {
            paths.files.push((path, Place::File));
        } else if depth < DEEPEST {
            walk(root, &path, depth + 1, paths)?;
            paths.folders.insert(path);
        }
    }
    Ok(())
}

fn open_tar(path: &Path) -> Result<Source> {
    let archive = map(path)?;
    if archive.starts_with(&[0x1F, 0x8B]) || archive.starts_with(b"BZh") || archive.starts_with(b"\xFD7zXZ") {
        return Err(Error::new(format!("{}: the archive is compressed", path.display()))
            .hint("decompress it first, for example with `gunzip`"));
    }
    if archive.get(257..262) != Some(b"ustar") {
        return Err(Error::new(format!(
            "{}: not a folder, a tar archive, or a CIFAR binary",
            path.display()
        ))
        .hint("see `vitrum pack --help` for what can be packed"));
    }
    let mut paths = Paths::default();
    let mut reader = tar::Archive::new(std::io::Cursor::new(&archive[..]));
    for entry in reader.entries_with_seek().at(path.display())? {
        let entry = entry.at(path.display())?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.trim_start_matches("./").trim_end_matches('/').to_owned();
        let (offset, len) = (entry.raw_file_position() as usize, entry.size() as usize);
        if entry.header().entry_type().is_dir() {
            paths.folders.insert(name);
        } else if entry.header().entry_type().is_file() {
            if offset.checked_add(len).is_none_or(|end| end > archive.len()) {
                return Err(Error::new(format!("{}: the archive ends inside `{name}`", path.display()))
                    .hint("it was cut short: copy or download it again"));
            }
            paths.files.push((name, Place::Member { offset, len }));
        }
    }
    strip_common_folder(&mut paths);
    let store = Store { path: path.to_owned(), kind: StoreKind::Archive(archive) };
    arrange(paths, store).map_err(|e| e.at(path.display()))
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

/// Finds splits and classes in the paths.
fn arrange(mut paths: Paths, store: Store) -> Result<Source> {
    let visible = |path: &str| !path.split('/').any(|part| part.starts_with('.') || part == "__MACOSX");
    paths.files.retain(|(name, _)| visible(name));
    paths.folders.retain(|name| visible(name));
    paths.files.sort_by(|a, b| a.0.cmp(&b.0));
    paths.files.dedup_by(|a, b| a.0 == b.0);

    // A split's folder has class folders inside; one that has not is a class of that name.
    let split_prefix = |split: Split| {
        split.folders().iter().map(|name| format!("{name}/")).find(|prefix| {
            let inside = |path: &str| path.strip_prefix(prefix.as_str()).map(str::to_owned);
            paths.files.iter().any(|(name, _)| inside(name).is_some_and(|rest| rest.contains('/')))
                || paths.folders.iter().any(|name| inside(name).is_some())
        })
    };
    match (split_prefix(Split::Train), split_prefix(Split::Val)) {
        (Some(train), Some(val)) => {
            let (classes, train) = part(&paths, &train);
            let (val_classes, val) = part(&paths, &val);
            if !train.is_empty() && !val.is_empty() {
                same_classes(&classes, &val_classes)?;
            }
            Ok(Source { classes, parts: Parts::Split { train, val }, store })
        }
        (one, other) => {
            let (classes, items) = part(&paths, &one.or(other).unwrap_or_default());
            Ok(Source { classes, parts: Parts::Whole(items), store })
        }
    }
}

/// Classes and records below `prefix`: the first folder names the class, whatever lies deeper belongs to it.
fn part(paths: &Paths, prefix: &str) -> (Vec<String>, Vec<Item>) {
    fn class<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
        Some(path.strip_prefix(prefix)?.split_once('/')?.0)
    }
    let folders =
        paths.folders.iter().filter_map(|name| name.strip_prefix(prefix)).filter(|n| !n.contains('/'));
    let of_files = paths.files.iter().filter_map(|(name, _)| class(name, prefix));
    let classes: Vec<String> =
        folders.chain(of_files).collect::<BTreeSet<_>>().into_iter().map(String::from).collect();
    let items = paths.files.iter().filter_map(|(name, place)| {
        let class = class(name, prefix)?;
        let label =
            classes.binary_search_by(|c| c.as_str().cmp(class)).expect("its class was just collected");
        Some(Item { name: name.clone(), label, place: place.clone() })
    });
    let items = items.collect();
    (classes, items)
}

/// The CIFAR binaries that `path` is or has, sorted.
fn cifar_files(path: &Path) -> Result<Vec<PathBuf>> {
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

/// CIFAR-10 has a label byte in front of each picture, CIFAR-100 a coarse and a fine one, of which the fine one counts.
fn open_cifar(path: &Path, binaries: &[PathBuf]) -> Result<Source> {
    let maps = binaries.iter().map(|file| map(file)).collect::<Result<Vec<_>>>()?;
    let label_bytes = [1, 2].into_iter().find(|n| maps.iter().all(|m| m.len() % (n + 3 * CIFAR_PIXELS) == 0));
    let Some(label_bytes) = label_bytes else {
        let lengths: Vec<_> = maps.iter().map(|m| m.len().to_string()).collect();
        return Err(Error::new(format!(
            "{}: a length of {} bytes is a multiple neither of CIFAR-10's 3073 nor of CIFAR-100's 3074",
            path.display(),
            lengths.join(", ")
        ))
        .hint("the file was cut short or is no CIFAR binary"));
    };
    let (count, names_file) =
        if label_bytes == 1 { (10, "batches.meta.txt") } else { (100, "fine_label_names.txt") };
    let classes = cifar_classes(&binaries[0].with_file_name(names_file), count)?;

    let (mut train, mut val) = (Vec::new(), Vec::new());
    for (file, (binary, bytes)) in binaries.iter().zip(&maps).enumerate() {
        let name = binary.file_name().unwrap_or_default().to_string_lossy();
        let list = if name.starts_with("test") { &mut val } else { &mut train };
        for (record, start) in (0..bytes.len()).step_by(label_bytes + 3 * CIFAR_PIXELS).enumerate() {
            let offset = start + label_bytes;
            let label = usize::from(bytes[offset - 1]);
            if label >= count {
                fail!("{}: record {record} has label {label}, not below {count}", binary.display());
            }
            list.push(Item {
                name: format!("{name}:{record}"),
                label,
                place: Place::Planes { file, offset },
            });
        }
    }
    let parts = match (train.is_empty(), val.is_empty()) {
        (false, false) => Parts::Split { train, val },
        (true, _) => Parts::Whole(val),
        (_, true) => Parts::Whole(train),
    };
    Ok(Source { classes, parts, store: Store { path: path.to_owned(), kind: StoreKind::Binaries(maps) } })
}

/// The lines of the file of names, or numbers where there is none.
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
