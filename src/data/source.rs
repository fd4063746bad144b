//! Lists unpacked pictures: an image folder ([`folder`]), tar archives ([`archive`], [`webdataset`]), the
//! binary files of CIFAR-10 and CIFAR-100 ([`cifar`]), or a table of paths and labels ([`manifest`]).
//!
//! Every source gives the same kind of list ([`listing`]): class names, and for each split the records, each
//! with a label and a place to read it from. Paths are sorted, so that an archive and its unpacked folder
//! give the same records in the same order. Files that are not data ([`strays`]) are left out with a line.
//! Nothing is decoded here.

mod archive;
mod cifar;
mod folder;
mod index;
mod listing;
mod lists;
mod manifest;
mod packing;
#[cfg(feature = "parquet")]
mod parquet;
mod split_columns;
mod strays;
mod webdataset;

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::fail;

use super::decode::Format;
use super::shard::Record;
use super::split::Split;
use folder::Paths;
use index::Index;
use listing::{Labels, Listing};
pub(super) use strays::{count, named};

/// Unpacked pictures.
#[derive(Debug)]
pub struct Source {
    /// Names in the order of the labels.
    pub classes: Vec<String>,
    /// The records, by split.
    pub parts: Parts,
    /// Where the pictures lie.
    pub store: Store,
    /// As the user wrote it.
    name: String,
    is_multi_label: bool,
    notes: Vec<String>,
}

/// The records, with or without splits.
#[derive(Debug, Default)]
pub struct Parts {
    is_split: bool,
    /// The test split also serves for validation.
    test_is_val: bool,
    /// By [`Split`]; without splits, all records are in the first.
    lists: [Vec<Item>; 3],
}

/// One record of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Path inside the source, with `/`.
    pub name: String,
    /// The first label, if there are several.
    pub label: usize,
    /// All labels, if samples may have several or none.
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
    kind: &'static str,
    /// Archives or binaries.
    maps: Vec<Mmap>,
    #[cfg(feature = "parquet")]
    parquet: parquet::Files,
}

/// Side of CIFAR's pictures.
const CIFAR_SIDE: usize = 32;
const CIFAR_PIXELS: usize = CIFAR_SIDE * CIFAR_SIDE;

impl Source {
    /// Lists `path`: a folder, a tar archive, a CIFAR binary, a table, or a folder of these. In a path that
    /// does not exist, `{000..009}` stands for these numbers.
    pub fn open(path: &Path) -> Result<Self> {
        let mut source = if path.is_dir() { open_folder(path) } else { open_file(path) }?;
        source.name = path.display().to_string();
        source.check().map_err(|e| e.at(path.display()))?;
        Ok(source)
    }

    /// What the user wrote.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether samples may have several labels, or none.
    pub fn is_multi_label(&self) -> bool {
        self.is_multi_label
    }

    /// What was left out or decided, in sentences.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The records of a split; without splits, all of them. If there is no validation split, the test split
    /// takes its place.
    pub fn items(&self, split: Split) -> &[Item] {
        let Parts { is_split, test_is_val, lists } = &self.parts;
        match split {
            _ if !is_split => &lists[0],
            Split::Test if *test_is_val => &lists[Split::Val as usize],
            split => &lists[split as usize],
        }
    }

    /// Whether there are splits.
    pub fn is_split(&self) -> bool {
        self.parts.is_split
    }

    /// Whether the test split serves for validation.
    pub fn test_is_val(&self) -> bool {
        self.parts.test_is_val
    }

    /// Every split that has records, once; without splits, all records and no name.
    pub fn lists(&self) -> impl Iterator<Item = (Option<Split>, &[Item])> {
        let parts = Split::ALL.into_iter().zip(&self.parts.lists).filter(|(_, items)| !items.is_empty());
        parts.map(|(split, items)| (self.parts.is_split.then_some(split), items.as_slice()))
    }

    /// Refuses a source without pictures.
    fn check(&self) -> Result<()> {
        let items: Vec<&Item> = self.lists().flat_map(|(_, items)| items).collect();
        if items.is_empty() {
            // What was left out is the best hint.
            let why = self.notes.first().map_or(String::new(), |note| format!(": {note}"));
            return Err(Error::new(format!("no pictures in class folders{why}")).hint(CLASS_FOLDERS));
        }
        let is_picture = |item: &&&Item| match self.store.read(item) {
            Ok(Record::Encoded(bytes)) => Format::of(&bytes).is_ok(),
            Ok(Record::Raw { .. }) => true,
            Err(_) => false,
        };
        if !items.iter().any(|item| is_picture(&item)) {
            fail!("no picture among its {} files", items.len());
        }
        Ok(())
    }

    /// Refuses a source that cannot train a classifier, because all of its pictures are of one class.
    pub fn can_train(&self) -> Result<()> {
        let mut labels = self.lists().flat_map(|(_, items)| items).map(|item| item.label);
        let first = labels.next().unwrap_or_default();
        if !self.is_multi_label && labels.all(|label| label == first) {
            let only = &self.classes[first];
            let inside = self.store.path.join(only);
            let has_folders = fs::read_dir(&inside)
                .is_ok_and(|entries| entries.flatten().any(|entry| entry.path().is_dir()));
            let hint = match has_folders {
                true => format!("if the classes are the folders inside, name `{}`", inside.display()),
                false => CLASS_FOLDERS.into(),
            };
            let error = Error::new(format!("only one class, `{only}`; a classifier needs two or more"));
            return Err(error.hint(hint).at(&self.name));
        }
        Ok(())
    }
}

const CLASS_FOLDERS: &str = "put the pictures of each class into a folder of its own, `DIR/CLASS/NAME.jpg` or \
                             `DIR/train/CLASS/NAME.jpg` and `DIR/val/CLASS/NAME.jpg`";

/// Lists the contents of a folder. Pictures in class folders take precedence over whatever lies beside them.
fn open_folder(path: &Path) -> Result<Source> {
    let mut index = index::list(path)?;
    let mut listing = Listing::default();
    listing.note(&index.runs, "folder", "directories of runs");
    listing.note(&index.strays, "folder", "never data");
    listing.note(&index.cut, "link", "leading back to folders that are listed already");
    if !index.files.iter().any(|name| name.contains('/')) {
        #[cfg(feature = "parquet")]
        let tables = parquet::files_of(path)?;
        #[cfg(feature = "parquet")]
        if !tables.is_empty() {
            return parquet::open(path, &tables);
        }
        let binaries = cifar::files_of(path)?;
        if !binaries.is_empty() {
            return cifar::open(path, &binaries);
        }
    }
    let has = |name: &str| index.others.iter().any(|other| other == name);
    if index.files.is_empty() && (has("batches.meta") || has("meta") && has("train") && has("test")) {
        return Err(Error::new(format!("{}: CIFAR as Python pickles, which hold code and are never loaded", path.display()))
            .hint("its authors publish the same pictures as `cifar-10-binary.tar.gz` and `cifar-100-binary.tar.gz`: unpack one"));
    }
    let archives = archives_of(path, &mut index);
    let files = std::mem::take(&mut index.files);
    let empty = std::mem::take(&mut index.empty).into_iter().collect();
    let mut paths = Paths { files: files.into_iter().map(|name| (name, Place::File)).collect(), empty };
    if paths.files.is_empty() && !archives.is_empty() {
        listing.note(&index.others, "file", "no pictures");
        return archive::open(path, &archives, listing);
    }
    if paths.files.is_empty() {
        // Folders that contain nothing else.
        index.others.iter().try_for_each(|name| packing::refuse(&path.join(name)))?;
    }
    let mut store = Store::new(path, "folder");
    let read = archive::read(&archives, &mut store)?;
    let members = archive::paths(read, &store, false, &mut listing);
    paths.files.extend(members.files);
    paths.empty.extend(members.empty);
    paths.files.sort_by(|a, b| a.0.cmp(&b.0));
    let lists = lists::take(path, &mut paths, &mut index.others)?;
    listing.note(&index.others, "file", "no pictures");
    let has_folders = paths.files.iter().any(|(name, _)| name.contains('/'));
    folder::arrange(paths, path, &mut listing).map_err(|e| e.at(path.display()))?;
    lists.add(&mut listing).map_err(|e| e.at(path.display()))?;
    listing.finish(if has_folders { Labels::Names } else { Labels::NamesOrIndices }, store)
}

/// Paths of all pictures below a folder, sorted, whatever folders they are in; and the number of other files.
pub fn pictures_below(folder: &Path) -> Result<(Vec<PathBuf>, usize)> {
    let index = index::list(folder)?;
    Ok((index.files.iter().map(|name| folder.join(name)).collect(), index.others.len()))
}

/// The archives that are data, by relative names: those in a folder without class folders, at its top or in a
/// split's folder. The other archives stay among what is left out.
fn archives_of(path: &Path, index: &mut Index) -> Vec<(String, PathBuf)> {
    let is_archive = |name: &String| strays::ending(name) == "tar" && name.matches('/').count() < 2;
    let below = |prefix: &str| {
        let deeper = |name: &String| name.strip_prefix(prefix).is_some_and(|rest| rest.contains('/'));
        index.files.iter().any(deeper)
    };
    let of_parts = |name: &String| {
        name.split_once('/')
            .is_some_and(|(top, _)| Split::of_word(top).is_some() && !below(&format!("{top}/")))
    };
    let mut found: Vec<String> =
        index.others.iter().filter(|name| is_archive(name) && of_parts(name)).cloned().collect();
    if found.is_empty() && !below("") {
        let at_top = |name: &&String| is_archive(name) && !name.contains('/') && !strays::is_junk(name);
        found = index.others.iter().filter(at_top).cloned().collect();
    }
    index.others.retain(|name| !found.contains(name));
    found.into_iter().map(|name| (name.clone(), path.join(name))).collect()
}

fn open_file(path: &Path) -> Result<Source> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    packing::refuse(path)?;
    let ending = strays::ending(&name);
    #[cfg(feature = "parquet")]
    if ending == "parquet" {
        return parquet::open(path, &[path.to_owned()]);
    }
    if ending == "bin" {
        return cifar::open(path, &[path.to_owned()]);
    }
    if let Some(form) = manifest::Form::of(path) {
        return manifest::open(path, form);
    }
    if !path.exists()
        && let Some(files) = expand(&path.to_string_lossy())
    {
        let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let files: Vec<_> = files.into_iter().map(PathBuf::from).map(|file| (name(&file), file)).collect();
        return archive::open(path, &files, Listing::default());
    }
    archive::open(path, &[(name, path.to_owned())], Listing::default())
}

/// Whether a path has the name of a source that is a file, or stands for several.
pub fn is_named(path: &Path) -> bool {
    let name = path.to_string_lossy();
    ["tar", "bin", "parquet"].contains(&strays::ending(&name).as_str())
        || manifest::Form::of(path).is_some()
        || (!path.exists() && expand(&name).is_some())
}

/// The paths for a path with `{000..009}`, the notation of shells and WebDataset for lists of shards.
pub(super) fn expand(path: &str) -> Option<Vec<String>> {
    const MOST: usize = 100_000;
    let (before, rest) = path.split_once('{')?;
    let (range, after) = rest.split_once('}')?;
    let (from, to) = range.split_once("..")?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !is_number(from) || !is_number(to) {
        return None;
    }
    let (first, last): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
    if last < first || last - first >= MOST {
        return None;
    }
    Some((first..=last).map(|n| format!("{before}{n:0width$}{after}", width = from.len())).collect())
}

impl Store {
    fn new(path: &Path, kind: &'static str) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            maps: Vec::new(),
            #[cfg(feature = "parquet")]
            parquet: parquet::Files::default(),
        }
    }

    /// Reads a record.
    pub fn read(&self, item: &Item) -> Result<Record<'_>> {
        match &item.place {
            Place::File => {
                let bytes = fs::read(self.path.join(&item.name)).map_err(|e| Error::new(e.to_string()))?;
                Ok(Record::Encoded(Cow::Owned(bytes)))
            }
            Place::Member { archive, offset, len } => {
                Ok(Record::Encoded(Cow::Borrowed(&self.maps[*archive][*offset..*offset + *len])))
            }
            Place::Planes { file, offset } => {
                let planes = &self.maps[*file][*offset..*offset + 3 * CIFAR_PIXELS];
                let pixels = (0..CIFAR_PIXELS).flat_map(|i| [0, 1, 2].map(|c| planes[c * CIFAR_PIXELS + i]));
                Ok(Record::Raw { pixels: pixels.collect(), height: CIFAR_SIDE, width: CIFAR_SIDE })
            }
            #[cfg(feature = "parquet")]
            Place::Row { file, group, row } => Ok(Record::Encoded(self.parquet.read(*file, *group, *row)?)),
        }
    }

    /// The file of a record that has one of its own.
    pub fn file(&self, item: &Item) -> Option<PathBuf> {
        (item.place == Place::File).then(|| self.path.join(&item.name))
    }

    /// Bytes of a record, if they are known without reading it.
    pub fn size(&self, item: &Item) -> Option<u64> {
        match &item.place {
            Place::File => fs::metadata(self.path.join(&item.name)).ok().map(|file| file.len()),
            Place::Member { len, .. } => Some(*len as u64),
            _ => None,
        }
    }

    /// The folder or file that the records' names are relative to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name of a record in messages: its file, or its path in the archive.
    pub fn display(&self, item: &Item) -> String {
        match item.place {
            Place::File => self.path.join(&item.name).display().to_string(),
            _ => item.name.clone(),
        }
    }

    /// `folder`, `tar`, `cifar` or `parquet`.
    pub fn kind(&self) -> &'static str {
        self.kind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_stand_for_numbers() {
        assert_eq!(
            expand("a/train-{08..10}.tar").unwrap(),
            ["a/train-08.tar", "a/train-09.tar", "a/train-10.tar"]
        );
        for path in ["a.tar", "{a..b}.tar", "{3..1}.tar", "{1,2}.tar", "{0..99999999999}.tar"] {
            assert_eq!(expand(path), None, "{path}");
        }
    }
}
