//! A data set that is open for reading: classes, labels, records by index.
//!
//! [`Dataset::open`] takes whatever the user names: a packed folder (`dataset.json` and its shards), a folder
//! with `train/` and `val/` inside, unpacked pictures ([`source`](super::source)), or `demo` and `demo-hard`,
//! which are drawn and packed into the cache folder on first use.

mod chosen;
pub(super) mod integrity;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::error::{At, Error, Result};
use crate::{fail, files, terminal};

use super::classes::Known;
use super::demo;
use super::place::{Place, say};
use super::shard::{Kind, Record, Shard, ShardWriter};
use super::source::{Source, count, named};
pub use super::split::Split;
pub(super) use chosen::is_held_out;

/// The file that makes a folder a packed data set.
pub const MANIFEST: &str = "dataset.json";
const FIRST_SHARD: &str = "00000.safetensors";

/// `dataset.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout: 1.
    pub version: u32,
    /// `raw` or `jpeg`, as in `vitrum pack --format`.
    pub format: String,
    /// (H, W) of all pictures, for raw pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<(usize, usize)>,
    /// Whether pictures were turned by their EXIF orientation when they were packed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exif: bool,
    /// Number of records in all shards.
    pub records: usize,
    /// Records of the source that could not be used.
    pub skipped: usize,
    /// Names in the order of the labels.
    pub classes: Vec<String>,
    /// The shards, in the order of the records.
    pub shards: Vec<ShardEntry>,
}

/// One shard in `dataset.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// File name, in the folder of `dataset.json`.
    pub file: String,
    /// Number of records in the shard.
    pub records: usize,
    /// xxh3-64 of the file, in hex.
    pub checksum: String,
}

impl Manifest {
    /// The version that this program writes and reads.
    pub const VERSION: u32 = 1;

    /// Reads `dataset.json` of a folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let manifest: Manifest = serde_json::from_str(&files::read_text(&path)?).at(path.display())?;
        if manifest.version != Self::VERSION {
            return Err(Error::new(format!(
                "{}: layout version {}, this program reads version {}",
                path.display(),
                manifest.version,
                Self::VERSION
            ))
            .hint("pack the data set again with this version of vitrum"));
        }
        if let Some(entry) = manifest.shards.iter().find(|s| s.file.contains(['/', '\\'])) {
            fail!("{}: shard `{}` is not in the data set's folder", path.display(), entry.file);
        }
        Ok(manifest)
    }

    /// Whether a folder is a packed data set. Other programs also call files `dataset.json`. Ours lists
    /// shards, or, if it is damaged, has shards beside it.
    pub fn is_in(dir: &Path) -> bool {
        let Ok(text) = std::fs::read(dir.join(MANIFEST)) else { return false };
        match serde_json::from_slice::<serde_json::Value>(&text) {
            Ok(value) => value.get("shards").is_some() || dir.join(FIRST_SHARD).is_file(),
            Err(_) => dir.join(FIRST_SHARD).is_file(),
        }
    }

    /// Writes `dataset.json` into a folder.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self).at(MANIFEST)?;
        text.push(b'\n');
        files::write_atomic(&dir.join(MANIFEST), |out| out.write_all(&text))
    }
}

/// An open data set. Clones share the maps.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Its name in messages: what the user wrote.
    name: String,
    classes: Vec<String>,
    records: Records,
    /// Indices into `records`, if only some are used.
    chosen: Option<Vec<usize>>,
    /// Stored label → label, after [`Dataset::with_classes`].
    relabel: Option<Vec<usize>>,
    /// Whether a sample's label is its own number, after [`Dataset::numbered`].
    numbered: bool,
    /// Number of samples of each class that has any, after [`Dataset::balanced`]; samples are ordered by
    /// class.
    of_classes: Option<Vec<usize>>,
}

#[derive(Clone, Debug)]
enum Records {
    Packed {
        shards: Arc<Vec<Shard>>,
        /// Index of each shard's first record, then the total.
        starts: Vec<usize>,
    },
    /// Unpacked pictures.
    Listed { source: Arc<Source>, split: Split },
    /// Several data sets of the same classes, with weights; `starts` as above.
    Mixture { parts: Arc<Vec<(Dataset, f64)>>, starts: Vec<usize> },
}

impl Records {
    fn packed(shards: Vec<Shard>) -> Self {
        let mut starts = vec![0];
        starts.extend(shards.iter().scan(0, |end, shard| {
            *end += shard.len();
            Some(*end)
        }));
        Records::Packed { shards: integrity::watch(Arc::new(shards)), starts }
    }

    fn len(&self) -> usize {
        match self {
            Records::Packed { starts, .. } | Records::Mixture { starts, .. } => starts[starts.len() - 1],
            Records::Listed { source, split } => source.items(*split).len(),
        }
    }
}

impl Dataset {
    /// Opens `spec`: a path, `demo` or `demo-hard`, or a mixture of these, `3*DIR + 1*DIR`. If it has splits,
    /// `split` says which to open (for validation, the test split if there is no other); a data set without
    /// splits is opened whole.
    pub fn open(spec: &str, split: Split) -> Result<Self> {
        Place::find(spec)?.open(split)
    }

    /// Combines data sets of the same classes. Training draws from each by its weight; an evaluation uses all
    /// of each.
    pub(super) fn mixture(name: &str, parts: Vec<(Dataset, f64)>) -> Result<Self> {
        let mut starts = vec![0];
        for (part, _) in &parts {
            same_classes(parts[0].0.classes(), part.classes()).map_err(|e| e.at(part.name()))?;
            starts.push(starts[starts.len() - 1] + part.len());
        }
        let classes = parts[0].0.classes.clone();
        let records = Records::Mixture { parts: Arc::new(parts), starts };
        Ok(Self {
            name: name.into(),
            classes,
            records,
            chosen: None,
            relabel: None,
            numbered: false,
            of_classes: None,
        })
    }

    /// Records and weight of each part of a mixture, or of each class of a balanced data set; otherwise one
    /// part with all records.
    pub fn parts(&self) -> Vec<(usize, f64)> {
        if let Some(counts) = &self.of_classes {
            return counts.iter().map(|count| (*count, 1.0)).collect();
        }
        match &self.records {
            Records::Mixture { parts, .. } if self.chosen.is_none() => {
                parts.iter().map(|(part, weight)| (part.len(), *weight)).collect()
            }
            _ => vec![(self.len(), 1.0)],
        }
    }

    /// Opens a folder with a `dataset.json`.
    pub fn open_packed(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read(dir)?;
        let mut shards = Vec::with_capacity(manifest.shards.len());
        let mut first = 0;
        for entry in &manifest.shards {
            let path = dir.join(&entry.file);
            let shard = Shard::open(&path, manifest.classes.len())?;
            if shard.len() != entry.records {
                fail!("{}: {} records, but `{MANIFEST}` says {}", path.display(), shard.len(), entry.records);
            }
            let len = shard.len();
            shards.push(shard.listed(path, &entry.checksum, first));
            first += len;
        }
        let records = Records::packed(shards);
        if records.len() == 0 {
            fail!("{}: the data set is empty", dir.display());
        }
        Ok(Self {
            name: dir.display().to_string(),
            classes: manifest.classes,
            records,
            chosen: None,
            relabel: None,
            numbered: false,
            of_classes: None,
        })
    }

    pub(super) fn listed(source: Arc<Source>, split: Split) -> Result<Self> {
        let name = source.name().to_owned();
        let classes = source.classes.clone();
        Ok(Self {
            name,
            classes,
            records: Records::Listed { source, split },
            chosen: None,
            relabel: None,
            numbered: false,
            of_classes: None,
        })
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.chosen.as_ref().map_or(self.records.len(), Vec::len)
    }

    /// Never true: an empty data set cannot be opened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The data set's name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Class names in the order of the labels.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Class index of a sample.
    pub fn label(&self, index: usize) -> usize {
        if self.numbered {
            return index;
        }
        let stored = self.stored_label(index);
        self.relabel.as_ref().map_or(stored, |number| number[stored])
    }

    fn stored_label(&self, index: usize) -> usize {
        match &self.records {
            Records::Packed { shards, starts } => {
                let (shard, at) = locate(starts, self.place(index));
                shards[shard].label(at)
            }
            Records::Listed { source, split } => source.items(*split)[self.place(index)].label,
            Records::Mixture { parts, starts } => {
                let (part, at) = locate(starts, self.place(index));
                parts[part].0.label(at)
            }
        }
    }

    /// All class indices of a sample: exactly one, unless samples may have several labels.
    pub fn labels(&self, index: usize) -> impl Iterator<Item = usize> {
        let stored = match &self.records {
            Records::Packed { shards, starts } => {
                let (shard, at) = locate(starts, self.place(index));
                shards[shard].labels(at)
            }
            Records::Listed { source, split } => source.items(*split)[self.place(index)].labels(),
            Records::Mixture { parts, starts } => {
                let (part, at) = locate(starts, self.place(index));
                parts[part].0.labels(at).collect()
            }
        };
        stored.into_iter().map(|label| self.relabel.as_ref().map_or(label, |number| number[label]))
    }

    /// Number of samples of each class: C counts.
    pub fn class_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.classes.len()];
        (0..self.len()).flat_map(|index| self.labels(index)).for_each(|label| counts[label] += 1);
        counts
    }

    /// Whether samples may have several labels, or none.
    pub fn is_multi_label(&self) -> bool {
        match &self.records {
            Records::Packed { shards, .. } => shards.iter().any(Shard::is_multi_label),
            Records::Listed { source, .. } => source.is_multi_label(),
            Records::Mixture { parts, .. } => parts.iter().any(|(part, _)| part.is_multi_label()),
        }
    }

    /// Where a sample came from, for messages.
    pub fn record_name(&self, index: usize) -> String {
        let place = self.place(index);
        match &self.records {
            Records::Packed { shards, starts } => {
                let (shard, at) = locate(starts, place);
                shards[shard].name(at).unwrap_or_else(|| format!("record {place}"))
            }
            Records::Listed { source, split } => source.items(*split)[place].name.clone(),
            Records::Mixture { parts, starts } => {
                let (part, at) = locate(starts, place);
                format!("{}: {}", parts[part].0.name(), parts[part].0.record_name(at))
            }
        }
    }

    /// The file of a sample, if it has one of its own.
    pub fn file(&self, index: usize) -> Option<PathBuf> {
        match &self.records {
            Records::Packed { .. } => None,
            Records::Listed { source, split } => source.store.file(&source.items(*split)[self.place(index)]),
            Records::Mixture { parts, starts } => {
                let (part, at) = locate(starts, self.place(index));
                parts[part].0.file(at)
            }
        }
    }

    /// The stored bytes of a sample. Fails if an unpacked file cannot be read or a shard is damaged.
    pub fn record(&self, index: usize) -> Result<Record<'_>> {
        match &self.records {
            Records::Packed { shards, starts } => {
                let (shard, at) = locate(starts, self.place(index));
                shards[shard].sound()?;
                Ok(shards[shard].record(at))
            }
            Records::Listed { source, split } => source.store.read(&source.items(*split)[self.place(index)]),
            Records::Mixture { parts, starts } => {
                let (part, at) = locate(starts, self.place(index));
                parts[part].0.record(at)
            }
        }
    }

    /// Asks the system to read a packed sample's bytes into memory soon.
    pub fn will_need(&self, index: usize) {
        match &self.records {
            Records::Packed { shards, starts } => {
                let (shard, at) = locate(starts, self.place(index));
                shards[shard].will_need(at);
            }
            Records::Listed { .. } => {}
            Records::Mixture { parts, starts } => {
                let (part, at) = locate(starts, self.place(index));
                parts[part].0.will_need(at);
            }
        }
    }

    /// Asks the processor to read a packed sample's pixels into its cache soon, if they are few.
    pub fn prefetch(&self, index: usize) {
        match &self.records {
            Records::Packed { shards, starts } => {
                let (shard, at) = locate(starts, self.place(index));
                shards[shard].prefetch(at);
            }
            Records::Listed { .. } => {}
            Records::Mixture { parts, starts } => {
                let (part, at) = locate(starts, self.place(index));
                parts[part].0.prefetch(at);
            }
        }
    }

    /// (H, W) of the pictures, if all are known to have the same.
    pub fn image(&self) -> Option<(usize, usize)> {
        match &self.records {
            Records::Packed { shards, .. } => {
                let first = shards.first()?.image()?;
                shards.iter().all(|s| s.image() == Some(first)).then_some(first)
            }
            Records::Listed { .. } => None,
            Records::Mixture { parts, .. } => {
                let first = parts[0].0.image()?;
                parts.iter().all(|(part, _)| part.image() == Some(first)).then_some(first)
            }
        }
    }

    /// Bytes of the mapped shards; 0 for unpacked data.
    pub fn byte_len(&self) -> usize {
        match &self.records {
            Records::Packed { shards, .. } => shards.iter().map(Shard::byte_len).sum(),
            Records::Listed { .. } => 0,
            Records::Mixture { parts, .. } => parts.iter().map(|(part, _)| part.byte_len()).sum(),
        }
    }

    /// Renumbers the labels for a model with these classes, matched as [`classes`](super::classes) says.
    pub fn with_classes(mut self, classes: &[String]) -> Result<Self> {
        let matching = Known::new(classes.len(), Some(classes)).matching(&self.classes);
        self.relabel = Some(matching.map_err(|e| e.at(&self.name))?.numbers);
        self.classes = classes.to_vec();
        Ok(self)
    }

    /// The same for training's classes, of which it has all or some, by their exact names; a line names those
    /// that it lacks.
    pub fn among(self, classes: &[String]) -> Result<Self> {
        if self.classes == classes {
            return Ok(self);
        }
        if let Some(lacks) = lacking(classes, &self.classes).map_err(|e| e.at(&self.name))? {
            say(&format!("{}: {lacks}", self.name));
        }
        self.with_classes(classes)
    }

    /// Makes each sample's label its own number, for a pass that must know which sample it sees.
    pub fn numbered(mut self) -> Self {
        self.numbered = true;
        self
    }

    fn place(&self, index: usize) -> usize {
        self.chosen.as_ref().map_or(index, |chosen| chosen[index])
    }
}

/// Shard, and index in the shard, of a record.
fn locate(starts: &[usize], index: usize) -> (usize, usize) {
    let shard = starts.partition_point(|start| *start <= index) - 1;
    (shard, index - starts[shard])
}

/// Opens training and validation data as a recipe names them. `train` alone gives both if it has both; `val`
/// overrides where validation samples come from. Its classes are those of `train`, or some of them.
pub fn pair(train: Option<&str>, val: Option<&str>) -> Result<(Dataset, Option<Dataset>)> {
    let train_spec = train
        .ok_or_else(|| Error::usage("no training data").hint("name it: `--data DIR`, or `--data demo`"))?;
    let place = Place::find(train_spec)?;
    let train = place.open(Split::Train)?;
    let val = match val {
        Some(spec) => Some(Dataset::open(spec, Split::Val)?),
        None if place.part(Split::Val).is_some() => Some(place.open(Split::Val)?),
        None => None,
    };
    let val = val.map(|val| val.among(train.classes())).transpose()?;
    Ok((train, val))
}

/// Opens the data that `eval`, `predict` and the like measure, and says which split it is (none for a data
/// set without splits). Without `split` that is validation; training data is measured only on request.
pub fn measured(spec: &str, split: Option<Split>) -> Result<(Dataset, Option<Split>)> {
    let place = Place::find(spec)?;
    let parts = place.parts();
    let named = match (split, parts.is_empty()) {
        (None | Some(Split::Train), true) => None,
        (Some(split), true) => {
            return Err(Error::new(format!(
                "{spec}: the data has no parts, so there is no {} part",
                split.name()
            ))
            .hint("leave out `--split` to measure all of it"));
        }
        (split, false) => Some(split.unwrap_or(Split::Val)),
    };
    let dataset = match named {
        None => place.open(Split::Val)?,
        Some(split) => place.open(split)?,
    };
    Ok((dataset, named.and_then(|split| place.part(split))))
}

/// Every part of a data set.
pub(super) fn all_parts(spec: &str) -> Result<Vec<Dataset>> {
    let place = Place::find(spec)?;
    let parts = place.parts();
    if parts.is_empty() {
        Ok(vec![place.open(Split::Val)?])
    } else {
        parts.into_iter().map(|part| place.open(part)).collect()
    }
}

/// Fails if two class lists differ, and says how.
fn same_classes(train: &[String], val: &[String]) -> Result<()> {
    if train == val { Ok(()) } else { Err(other_classes(train, val)) }
}

/// The classes of `train` that `val` lacks, in words; none if it has all. Fails if `val` has others.
pub(super) fn lacking(train: &[String], val: &[String]) -> Result<Option<String>> {
    if !val.iter().all(|class| train.contains(class)) {
        return Err(other_classes(train, val));
    }
    let without: Vec<&String> = train.iter().filter(|class| !val.contains(class)).collect();
    let text =
        || format!("it has no class {}, {} of {} classes", named(&without), without.len(), train.len());
    Ok((!without.is_empty()).then(text))
}

fn other_classes(train: &[String], val: &[String]) -> Error {
    let only = |of: &[String], other: &[String]| -> Vec<String> {
        of.iter().filter(|class| !other.contains(class)).cloned().collect()
    };
    let (in_train, in_val) = (only(train, val), only(val, train));
    if in_train.is_empty() {
        return Error::new(format!(
            "the validation data has {} without training pictures: {}",
            count(in_val.len(), "class"),
            named(&in_val)
        ))
        .hint(
            "move it out of the validation data, or train on pictures of it (an empty training folder of that name \
             makes it a class that no picture teaches)",
        );
    }
    Error::new(format!(
        "the validation data has {} classes and the training data {}; only in training: {}; only in validation: {}",
        val.len(),
        train.len(),
        named(&in_train),
        named(&in_val)
    ))
    .hint("give both the same class folders (an empty folder counts as a class)")
}

/// The demo, from `cache` or drawn now.
pub(super) fn open_demo(variant: demo::Variant, split: Split, cache: &Path) -> Result<Dataset> {
    // One drawing at a time in this process; other processes do no harm (see `store_demo`).
    static DRAWING: Mutex<()> = Mutex::new(());
    let _guard = DRAWING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let dir = cache.join(format!("{}-v{}", variant.name(), demo::VERSION)).join(split.name());
    let mut dataset = match Dataset::open_packed(&dir) {
        Ok(dataset) if dataset.len() == demo::len(split) => dataset,
        _ => draw_demo(variant, split, &dir)?,
    };
    dataset.name = variant.name().into();
    Ok(dataset)
}

/// Draws the demo and packs it into `dir`. If that fails it stays in memory, after one warning.
fn draw_demo(variant: demo::Variant, split: Split, dir: &Path) -> Result<Dataset> {
    let pixels = demo::draw_all(variant, split);
    let mut writer = ShardWriter::new(Kind::Raw(demo::SIDE, demo::SIDE));
    for (index, picture) in pixels.chunks_exact(demo::SIDE * demo::SIDE * 3).enumerate() {
        let label = demo::label(index);
        writer.push(label, &format!("{}/{index}", demo::CLASSES[label]), picture);
    }
    drop(pixels);
    match store_demo(&writer, dir).and_then(|()| Dataset::open_packed(dir)) {
        Ok(dataset) => Ok(dataset),
        Err(error) => {
            terminal::warn(&format!("the demo data is not kept in the cache folder: {}", error.message()));
            let mut bytes = Vec::new();
            writer.write(&mut bytes).at("demo data")?;
            let classes = demo::CLASSES.map(String::from).to_vec();
            let shard = Shard::from_bytes(bytes, classes.len())?;
            Ok(Dataset {
                name: variant.name().into(),
                classes,
                records: Records::packed(vec![shard]),
                chosen: None,
                relabel: None,
                numbered: false,
                of_classes: None,
            })
        }
    }
}

/// Every file is renamed into place when it is complete, and `dataset.json` comes last. So two runs that draw
/// the demo at the same time write the same bytes and do not disturb each other.
fn store_demo(writer: &ShardWriter, dir: &Path) -> Result<()> {
    files::create_dir(dir)?;
    let file = FIRST_SHARD.to_owned();
    let checksum = writer.write_file(&dir.join(&file))?;
    let manifest = Manifest {
        version: Manifest::VERSION,
        format: "raw".into(),
        exif: false,
        image: Some((demo::SIDE, demo::SIDE)),
        records: writer.len(),
        skipped: 0,
        classes: demo::CLASSES.map(String::from).to_vec(),
        shards: vec![ShardEntry { file, records: writer.len(), checksum }],
    };
    manifest.write(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_is_drawn_once_and_then_mapped() {
        let cache = tempfile::tempdir().unwrap();
        let drawn = open_demo(demo::Variant::Hard, Split::Val, cache.path()).unwrap();
        assert_eq!((drawn.len(), drawn.image()), (demo::len(Split::Val), Some((32, 32))));
        let shard = cache.path().join(format!("demo-hard-v{}/val/00000.safetensors", demo::VERSION));
        let written = std::fs::metadata(&shard).unwrap().modified().unwrap();
        let mapped = open_demo(demo::Variant::Hard, Split::Val, cache.path()).unwrap();
        assert_eq!(std::fs::metadata(&shard).unwrap().modified().unwrap(), written);
        let mut picture = vec![0; 32 * 32 * 3];
        for index in [0, 7, 1999] {
            demo::draw(demo::Variant::Hard, Split::Val, index, &mut picture);
            for dataset in [&drawn, &mapped] {
                assert_eq!(dataset.label(index), index % 10);
                let record = dataset.record(index).unwrap();
                assert_eq!(record, Record::Raw { pixels: picture[..].into(), height: 32, width: 32 });
            }
        }
        assert_eq!(mapped.record_name(12), "square/12");

        // A damaged cache is drawn again.
        std::fs::write(&shard, b"not a shard").unwrap();
        assert_eq!(open_demo(demo::Variant::Hard, Split::Val, cache.path()).unwrap().len(), 2000);
        assert!(std::fs::metadata(&shard).unwrap().len() > 6_000_000);
    }

    #[test]
    fn the_demo_needs_no_cache() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let dataset = open_demo(demo::Variant::Demo, Split::Val, &file.path().join("below/a/file")).unwrap();
        assert_eq!((dataset.len(), dataset.classes().len()), (2000, 10));
        assert!(matches!(dataset.record(1999).unwrap(), Record::Raw { height: 32, width: 32, .. }));
    }

    #[test]
    fn some_samples_are_taken_from_all_over() {
        let shard = |labels: std::ops::Range<usize>| {
            let mut writer = ShardWriter::new(Kind::Encoded);
            labels.for_each(|label| writer.push(label, &format!("name {label}"), b""));
            let mut bytes = Vec::new();
            writer.write(&mut bytes).unwrap();
            Shard::from_bytes(bytes, 100).unwrap()
        };
        let dataset = Dataset {
            name: "test".into(),
            classes: (0..100).map(|c| c.to_string()).collect(),
            records: Records::packed(vec![shard(0..3), shard(3..3), shard(3..50), shard(50..100)]),
            chosen: None,
            relabel: None,
            numbered: false,
            of_classes: None,
        };
        assert!((0..100).all(|i| dataset.label(i) == i && dataset.record_name(i) == format!("name {i}")));
        let some = dataset.take(20);
        let mut labels: Vec<_> = (0..some.len()).map(|i| some.label(i)).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), 20, "a sample is taken once");
        assert!(labels[0] < 25 && labels[19] > 75, "{labels:?}");
        // A class count that divides the stride must not leave classes out.
        let last_digits: std::collections::HashSet<_> = labels.iter().map(|l| l % 10).collect();
        assert!(last_digits.len() > 5, "{labels:?}");
    }

    #[test]
    fn labels_follow_the_names_of_a_model() {
        let mut writer = ShardWriter::new(Kind::Encoded);
        [0, 1, 2].into_iter().for_each(|label| writer.push(label, "name", b""));
        let mut bytes = Vec::new();
        writer.write(&mut bytes).unwrap();
        let names = |text: &str| text.split(' ').map(str::to_string).collect::<Vec<_>>();
        let dataset = |classes| Dataset {
            name: "test".into(),
            classes,
            records: Records::packed(vec![Shard::from_bytes(bytes.clone(), 3).unwrap()]),
            chosen: None,
            relabel: None,
            numbered: false,
            of_classes: None,
        };
        let renamed = dataset(names("ant bee cat")).with_classes(&names("cat ant bee")).unwrap();
        assert_eq!((0..3).map(|i| renamed.label(i)).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!(renamed.classes(), names("cat ant bee"));
        let error = dataset(names("ant bee cat")).with_classes(&names("ant bee cow")).err().unwrap();
        assert!(error.to_string().contains("`cow`"), "{error}");
    }
}
