//! Packs a source of pictures into a data set, or into one for each split of the source.
//!
//! All files are written into a hidden folder beside the destination ([`stage`]), `dataset.json` last. The
//! folder is renamed into place when it is complete. So the destination is always complete, a failed pack
//! leaves nothing, and a killed pack can continue after its last complete shard. Records are read, checked
//! and converted in parallel and written in the source's order, so the same source gives the same bytes on
//! any machine. Memory is bounded by one shard and one chunk of records.

mod check;
mod convert;
mod stage;

pub use check::{Checked, check};
pub use convert::{Target, encode_png};

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::recipe::OnBadRecord;
use crate::{fail, files, terminal};

use super::dataset::{Manifest, ShardEntry, is_held_out};
use super::decode::Decoder;
use super::place::say;
use super::shard::{Kind, ShardWriter};
use super::source::{Item, Source};
use super::split::Split;
use convert::Converter;
use stage::{Finished, Stage};

/// How records are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The encoded bytes of each picture, whatever its format.
    Jpeg,
    /// u8 pixels of one size.
    Raw,
}

impl Format {
    /// As in `dataset.json`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Jpeg => "jpeg",
            Format::Raw => "raw",
        }
    }
}

/// The user's options.
#[derive(Clone, Copy, Debug)]
pub struct PackOptions {
    /// Default: raw if all pictures have one size of at most [`LARGEST_RAW_SIDE`], else jpeg.
    pub format: Option<Format>,
    /// Resize each picture to this size. Default: pictures keep their size.
    pub size: Option<Target>,
    /// Re-encode as JPEG of this quality, 1 to 100.
    pub quality: Option<u8>,
    /// What to do with a record that cannot be used.
    pub on_bad_record: OnBadRecord,
    /// Store pictures turned by their EXIF orientation.
    pub exif: bool,
    /// Share of the training records that become a data set of their own, chosen by a hash of their names:
    /// the validation split if the source has none, else `minival`.
    pub minival: f64,
}

/// The result of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// How records are stored.
    pub format: Format,
    /// (H, W), for raw pixels.
    pub image: Option<(usize, usize)>,
    /// Number of classes.
    pub classes: usize,
    /// For each data set: folder (none for a source without splits), records, skipped records.
    pub parts: Vec<(Option<&'static str>, usize, usize)>,
}

/// By default, pictures of one size with sides up to this many pixels are stored raw.
pub const LARGEST_RAW_SIDE: usize = 64;
/// A shard is closed when its pictures reach this many bytes.
const SHARD_BYTES: usize = 128 << 20;
/// The folder of what is held out of the training part of a source that has a validation part.
pub(super) const MINIVAL: &str = "minival";
/// Records that are read and converted at a time.
const CHUNK: usize = 256;

/// Packs `source` into the folder `dest`, which must be empty or not exist. `stop` holds the number of a
/// signal that asks to stop, or 0.
pub fn pack(source: &Path, dest: &Path, options: PackOptions, stop: &AtomicUsize) -> Result<Packed> {
    check_destination(dest)?;
    let name = source.display();
    let source = Source::open(source)?;
    source.can_train()?;
    source.notes().iter().for_each(|note| say(&format!("{name}: {note}")));
    let converter = Converter::new(&source, options)?;
    let parts = parts(&source, options.minival);
    if let Some((Some(empty), _)) = parts.iter().find(|(_, items)| items.is_empty()) {
        return Err(Error::usage(format!(
            "{name}: `--minival {}` holds out none of its {} records, so `{empty}` would be empty",
            options.minival,
            source.items(Split::Train).len()
        ))
        .hint("give a larger share, such as `--minival 0.1`, or leave it out"));
    }
    let mut stage = Stage::open(dest, fingerprint(&source, &parts, &options))?;
    let bar = progress_bar(parts.iter().map(|(_, items)| items.len()).sum());
    let mut packed = Packed {
        format: converter.format(),
        image: converter.image(),
        classes: source.classes.len(),
        parts: vec![],
    };
    for (folder, items) in parts {
        let name = folder.unwrap_or_default();
        files::create_dir(&stage.dir().join(name))?;
        let mut writer =
            PartWriter { source: &source, converter: &converter, stage: &mut stage, name, bar: &bar, stop };
        let (records, skipped) = match writer.write(&items, options.on_bad_record) {
            Ok(counts) => counts,
            Err(error) => {
                bar.finish_and_clear();
                return Err(stage.give_up(error));
            }
        };
        packed.parts.push((folder, records, skipped));
    }
    bar.finish_and_clear();
    stage.publish(dest)?;
    Ok(packed)
}

/// The data sets to make, each with its folder and its records.
fn parts(source: &Source, minival: f64) -> Vec<(Option<&'static str>, Vec<&Item>)> {
    let lists: Vec<_> = source.lists().collect();
    let is_one = lists.len() == 1 && lists[0].0 != Some(Split::Train);
    if is_one && minival == 0.0 {
        return vec![(None, lists[0].1.iter().collect())];
    }
    let train = if source.is_split() { source.items(Split::Train) } else { lists[0].1 };
    let others = lists.iter().filter(|(split, _)| split.is_some_and(|split| split != Split::Train));
    let has_val = lists.iter().any(|(split, _)| *split == Some(Split::Val));
    // By name alone: neither the order nor the number of records moves one from one side to the other.
    let is_minival = |item: &&Item| is_held_out(&item.name, minival);
    let (held, kept): (Vec<&Item>, Vec<&Item>) = train.iter().partition(is_minival);
    let mut parts = Vec::new();
    if !kept.is_empty() {
        parts.push((Some(Split::Train.name()), kept));
    }
    parts.extend(
        others.filter_map(|(split, items)| Some((Some(split.as_ref()?.name()), items.iter().collect()))),
    );
    if minival > 0.0 {
        parts.push((Some(if has_val { MINIVAL } else { Split::Val.name() }), held));
    }
    parts
}

/// Identifies a pack, so that a killed one is continued only by the same: the records with their labels, and
/// the conversion.
fn fingerprint(
    source: &Source,
    parts: &[(Option<&'static str>, Vec<&Item>)],
    options: &PackOptions,
) -> String {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    hash.update(format!("{options:?} {:?} {:?}", source.store.path(), source.classes).as_bytes());
    for (folder, items) in parts {
        hash.update(format!("{folder:?} {}", items.len()).as_bytes());
        items.iter().for_each(|item| hash.update(format!("{} {:?}", item.name, item.labels()).as_bytes()));
    }
    format!("{:016x}", hash.digest())
}

fn check_destination(dest: &Path) -> Result<()> {
    if !dest.exists() {
        return Ok(());
    }
    let hint = "choose another folder, or remove it first";
    match std::fs::read_dir(dest).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(Error::new(format!("{}: the folder already holds something", dest.display())).hint(hint))
        }
        Err(e) => Err(Error::new(format!("{}: not a folder to pack into: {e}", dest.display())).hint(hint)),
    }
}

fn progress_bar(records: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("packing {bar:30} {pos}/{len} {per_sec} eta {eta}");
    if !terminal::shows_messages() {
        return ProgressBar::hidden();
    }
    ProgressBar::new(records as u64).with_style(style.expect("the template is valid"))
}

/// Writes one data set: shards, then `dataset.json`.
struct PartWriter<'a> {
    source: &'a Source,
    converter: &'a Converter,
    stage: &'a mut Stage,
    /// Folder inside the stage.
    name: &'static str,
    bar: &'a ProgressBar,
    stop: &'a AtomicUsize,
}

impl PartWriter<'_> {
    /// Returns the numbers of written and of skipped records.
    fn write(&mut self, items: &[&Item], on_bad_record: OnBadRecord) -> Result<(usize, usize)> {
        let (mut done, mut skipped) = self.stage.resume(self.name);
        self.bar.inc(done as u64);
        let mut writer = self.shard();
        for chunk in items[done..].chunks(CHUNK) {
            let converted: Vec<_> = chunk
                .par_iter()
                .map_init(
                    || Decoder::upright(self.converter.exif()),
                    |decoder, item| {
                        self.source
                            .store
                            .read(item)
                            .and_then(|record| self.converter.convert(record, decoder))
                    },
                )
                .collect();
            for (item, bytes) in chunk.iter().zip(converted) {
                match bytes {
                    Ok(bytes) => writer.push_labels(item.labels().into_iter(), &item.name, &bytes),
                    Err(error) => {
                        let path = self.source.store.display(item);
                        if on_bad_record == OnBadRecord::Error {
                            return Err(error
                                .at(path)
                                .hint("leave such records out with `--on-bad-record skip`"));
                        }
                        skipped += 1;
                        self.bar.suspend(|| terminal::say(&format!("skipped {path}: {}", error.message())));
                    }
                }
                done += 1;
                if writer.bytes() >= SHARD_BYTES {
                    let full = std::mem::replace(&mut writer, self.shard());
                    self.close(full, done, skipped)?;
                }
            }
            self.bar.inc(chunk.len() as u64);
            match self.stop.load(Ordering::Relaxed) {
                0 => {}
                signal => return Err(Error::stopped(signal as i32, "stopped; nothing was packed")),
            }
        }
        if !writer.is_empty() {
            self.close(writer, done, skipped)?;
        }
        let shards: Vec<ShardEntry> = self.stage.shards(self.name);
        let records = shards.iter().map(|s| s.records).sum();
        if records == 0 {
            fail!("{}: none of {} records can be used", self.source.name(), items.len());
        }
        let manifest = Manifest {
            version: Manifest::VERSION,
            format: self.converter.format().name().into(),
            image: self.converter.image(),
            exif: self.converter.exif(),
            records,
            skipped,
            classes: self.source.classes.clone(),
            shards,
        };
        manifest.write(&self.stage.dir().join(self.name))?;
        Ok((records, skipped))
    }

    fn shard(&self) -> ShardWriter {
        let kind = self.converter.image().map_or(Kind::Encoded, |(height, width)| Kind::Raw(height, width));
        match self.source.is_multi_label() {
            true => ShardWriter::multi_label(kind, self.source.classes.len()),
            false => ShardWriter::new(kind),
        }
    }

    /// The split has `done` records up to the end of this shard, of which `skipped` were left out.
    fn close(&mut self, writer: ShardWriter, done: usize, skipped: usize) -> Result<()> {
        let file = format!("{:05}.safetensors", self.stage.shards(self.name).len());
        let checksum = writer.write_file(&self.stage.dir().join(self.name).join(&file))?;
        let shard = ShardEntry { file, records: writer.len(), checksum };
        self.stage.finish(Finished { part: self.name.into(), shard, done, skipped })
    }
}
