//! What is in a place full of pictures that are not packed: an image folder, tar archives ([`archive`]), the binary files
//! of CIFAR-10 and CIFAR-100 ([`cifar`]), or a table of paths and labels ([`manifest`]).
//!
//! Every source becomes the same thing: class names, and for each split a list of records with a label and a place to
//! read them from. Paths are sorted, so that an archive and its unpacked folder give the same records in the same
//! order. Nothing is decoded here.

mod archive;
mod cifar;
mod index;
mod manifest;
#[cfg(feature = "parquet")]
mod parquet;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::fail;

use super::dataset::{Split, same_classes};
use super::decode::Format;
use super::shard::Record;

/// Pictures that are not packed.
#[derive(Debug)]
pub struct Source {
    /// Names in the order of the labels.
    pub classes: Vec<String>,
    pub parts: Parts,
    pub store: Store,
    is_multi_label: bool,
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
    /// Of several, the first.
    pub label: usize,
    /// Where samples may have several labels or none: all of them.
    several: Option<Box<[u32]>>,
    place: Place,
}

impl Item {
    fn new(name: String, label: usize, place: Place) -> Self {
        Self { name, label, several: None, place }
    }

    /// All labels.
    pub fn labels(&self) -> Vec<usize> {
        match &self.several {
            Some(labels) => labels.iter().map(|label| *label as usize).collect(),
            None => vec![self.label],
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// The file of the item's name.
    File,
    /// Bytes of one of the archives.
    Member { archive: usize, offset: usize, len: usize },
    /// In one of the binaries: 1,024 red, 1,024 green and 1,024 blue values.
    Planes { file: usize, offset: usize },
    /// A row of a Parquet file.
    #[cfg(feature = "parquet")]
    Row { file: usize, group: usize, row: usize },
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
    Archives(Vec<Mmap>),
    Binaries(Vec<Mmap>),
    #[cfg(feature = "parquet")]
    Parquet(parquet::Files),
}

/// Side of CIFAR's pictures.
const CIFAR_SIDE: usize = 32;
const CIFAR_PIXELS: usize = CIFAR_SIDE * CIFAR_SIDE;

impl Source {
    /// Lists `path`: a folder, a tar archive, a CIFAR binary or a folder of such.
    pub fn open(path: &Path) -> Result<Self> {
        let (binaries, archives) = (cifar::files_of(path)?, archive::files_of(path)?);
        #[cfg(feature = "parquet")]
        let tables = parquet::files_of(path)?;
        #[cfg(feature = "parquet")]
        if !tables.is_empty() {
            let source = parquet::open(path, &tables)?;
            source.check().map_err(|e| e.at(path.display()))?;
            return Ok(source);
        }
        if cfg!(not(feature = "parquet")) && path.extension().is_some_and(|e| e == "parquet") {
            return Err(Error::new(format!("{}: this build reads no Parquet", path.display()))
                .hint("build with `cargo build --release --features parquet`"));
        }
        let source = if !binaries.is_empty() {
            cifar::open(path, &binaries)
        } else if !archives.is_empty() {
            archive::open(path, &archives)
        } else if path.is_dir() {
            open_folder(path)
        } else if let Some(form) = manifest::Form::of(path) {
            manifest::open(path, form)
        } else {
            archive::open(path, &[path.to_owned()])
        }?;
        source.check().map_err(|e| e.at(path.display()))?;
        Ok(source)
    }

    fn new(classes: Vec<String>, parts: Parts, store: Store) -> Self {
        Self { classes, parts, store, is_multi_label: false }
    }

    /// Whether samples may have several labels, or none.
    pub fn is_multi_label(&self) -> bool {
        self.is_multi_label
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
            fail!("no picture among its {} files", items.len());
        }
        let first = items[0].label;
        if !self.is_multi_label && items.iter().all(|item| item.label == first) {
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
            (StoreKind::Archives(archives), Place::Member { archive, offset, len }) => {
                Ok(Record::Encoded(Cow::Borrowed(&archives[*archive][*offset..*offset + *len])))
            }
            (StoreKind::Binaries(files), Place::Planes { file, offset }) => {
                let planes = &files[*file][*offset..*offset + 3 * CIFAR_PIXELS];
                let pixels = (0..CIFAR_PIXELS).flat_map(|i| [0, 1, 2].map(|c| planes[c * CIFAR_PIXELS + i]));
                Ok(Record::Raw { pixels: pixels.collect(), height: CIFAR_SIDE, width: CIFAR_SIDE })
            }
            #[cfg(feature = "parquet")]
            (StoreKind::Parquet(files), Place::Row { file, group, row }) => {
                Ok(Record::Encoded(files.read(*file, *group, *row)?))
            }
            _ => unreachable!("an item is read from the store that listed it"),
        }
    }

    /// Bytes of a record, where they can be told without reading it.
    pub fn size(&self, item: &Item) -> Option<u64> {
        match &item.place {
            Place::File => fs::metadata(self.path.join(&item.name)).ok().map(|file| file.len()),
            Place::Member { len, .. } => Some(*len as u64),
            _ => None,
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
            _ => item.name.clone(),
        }
    }

    /// `folder`, `tar` or `cifar`.
    pub fn kind(&self) -> &'static str {
        match self.kind {
            StoreKind::Folder => "folder",
            StoreKind::Archives(_) => "tar",
            StoreKind::Binaries(_) => "cifar",
            #[cfg(feature = "parquet")]
            StoreKind::Parquet(_) => "parquet",
        }
    }
}

/// Whether a file is named like the validation part of a data set.
fn is_val(name: &str) -> bool {
    let name = name.to_lowercase();
    let has = |split: Split| split.folders().iter().any(|folder| name.contains(folder));
    has(Split::Val) && !has(Split::Train)
}

/// Relative paths with `/`: what a folder or an archive contains.
#[derive(Debug, Default)]
struct Paths {
    files: Vec<(String, Place)>,
    folders: BTreeSet<String>,
}

fn open_folder(path: &Path) -> Result<Source> {
    let paths = index::paths(path)?;
    arrange(paths, Store { path: path.to_owned(), kind: StoreKind::Folder }).map_err(|e| e.at(path.display()))
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
            Ok(Source::new(classes, Parts::Split { train, val }, store))
        }
        (one, other) => {
            let (classes, items) = part(&paths, &one.or(other).unwrap_or_default());
            Ok(Source::new(classes, Parts::Whole(items), store))
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
        Some(Item::new(name.clone(), label, place.clone()))
    });
    let items = items.collect();
    (classes, items)
}
