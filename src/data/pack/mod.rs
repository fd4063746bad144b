//! From a source of pictures to a packed data set, or two for a source with a split.
//!
//! Everything is written into a hidden folder beside the destination, `dataset.json` last, and renamed into place
//! when it is complete: what is at the destination is whole, and a failed or interrupted pack leaves nothing. Records
//! are read, checked and converted in parallel and written in the source's order, so the same source gives the same
//! bytes on any machine. Memory is bounded by one shard and one chunk of records.

mod check;
mod convert;

pub use check::{Checked, check};
pub use convert::Target;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::recipe::OnBadRecord;
use crate::{fail, files};

use super::dataset::{Manifest, ShardEntry, Split};
use super::shard::{Kind, ShardWriter};
use super::source::{Item, Parts, Source};
use convert::Converter;

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

/// What the user asked for.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Default: raw if all pictures have one size of at most [`LARGEST_RAW_SIDE`], else jpeg.
    pub format: Option<Format>,
    pub size: Option<Target>,
    /// Re-encode as JPEG of this quality, 1 to 100.
    pub quality: Option<u8>,
    pub on_bad_record: OnBadRecord,
}

/// What was packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    pub format: Format,
    /// (H, W), for raw pixels.
    pub image: Option<(usize, usize)>,
    pub classes: usize,
    /// Split (none for a source without), records, skipped records.
    pub parts: Vec<(Option<Split>, usize, usize)>,
}

/// Pictures of one size up to this many pixels on a side are stored raw by default.
pub const LARGEST_RAW_SIDE: usize = 64;
/// A shard is closed when its pictures reach this many bytes.
const SHARD_BYTES: usize = 128 << 20;
/// Records that are read and converted at a time.
const CHUNK: usize = 256;

/// Packs `source` into the folder `dest`, which must not exist or be empty. `stop` holds the number of a signal that
/// asks to stop, or 0.
pub fn pack(source: &Path, dest: &Path, options: Options, stop: &AtomicUsize) -> Result<Packed> {
    check_destination(dest)?;
    let source = Source::open(source)?;
    let converter = Converter::new(&source, options)?;
    let stage = Stage::create(dest)?;
    let parts: Vec<(Option<Split>, &[Item])> = match &source.parts {
        Parts::Whole(items) => vec![(None, items)],
        Parts::Split { train, val } => vec![(Some(Split::Train), train), (Some(Split::Val), val)],
    };
    let bar = progress_bar(parts.iter().map(|(_, items)| items.len()).sum());
    let mut packed = Packed {
        format: converter.format(),
        image: converter.image(),
        classes: source.classes.len(),
        parts: vec![],
    };
    for (split, items) in parts {
        let dir = split.map_or_else(|| stage.dir.clone(), |split| stage.dir.join(split.name()));
        files::create_dir(&dir)?;
        let writer = PartWriter { source: &source, converter: &converter, dir, bar: &bar, stop };
        let (records, skipped) = writer.write(items, options.on_bad_record)?;
        packed.parts.push((split, records, skipped));
    }
    bar.finish_and_clear();
    stage.publish(dest)?;
    Ok(packed)
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
    ProgressBar::new(records as u64).with_style(style.expect("the template is valid"))
}

/// The folder in which a data set is put together. Dropped before it is published, it disappears.
struct Stage {
    dir: PathBuf,
}

impl Stage {
    /// In the nearest folder above `dest` that exists, hence on its file system.
    fn create(dest: &Path) -> Result<Self> {
        let name = dest.file_name().ok_or_else(|| {
            Error::usage(format!("`{}` does not name a folder to pack into", dest.display()))
        })?;
        let mut parent = dest.parent().unwrap_or(Path::new(""));
        while !parent.as_os_str().is_empty() && !parent.is_dir() {
            parent = parent.parent().unwrap_or(Path::new(""));
        }
        let dir = parent.join(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id()));
        files::create_dir(&dir)?;
        Ok(Self { dir })
    }

    fn publish(self, dest: &Path) -> Result<()> {
        if let Some(parent) = dest.parent().filter(|p| !p.as_os_str().is_empty()) {
            files::create_dir(parent)?;
        }
        std::fs::rename(&self.dir, dest)
            .map_err(|e| Error::new(format!("{}: cannot be put in place: {e}", dest.display())))?;
        files::sync_dir(dest.parent().unwrap_or(Path::new("")));
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // After `publish` there is nothing left to remove.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Writes one data set: shards, then `dataset.json`.
struct PartWriter<'a> {
    source: &'a Source,
    converter: &'a Converter,
    dir: PathBuf,
    bar: &'a ProgressBar,
    stop: &'a AtomicUsize,
}

impl PartWriter<'_> {
    /// Returns the numbers of written and of skipped records.
    fn write(&self, items: &[Item], on_bad_record: OnBadRecord) -> Result<(usize, usize)> {
        let kind = self.converter.image().map_or(Kind::Encoded, |(height, width)| Kind::Raw(height, width));
        let mut shards = Vec::new();
        let mut writer = ShardWriter::new(kind);
        let mut skipped = 0;
        for chunk in items.chunks(CHUNK) {
            let converted: Vec<_> = chunk
                .par_iter()
                .map_init(Default::default, |picture, item| {
                    self.source.store.read(item).and_then(|record| self.converter.convert(record, picture))
                })
                .collect();
            for (item, bytes) in chunk.iter().zip(converted) {
                match bytes {
                    Ok(bytes) => writer.push(item.label, &item.name, &bytes),
                    Err(error) => {
                        let path = self.source.store.display(item);
                        if on_bad_record == OnBadRecord::Error {
                            return Err(error
                                .at(path)
                                .hint("leave such records out with `--on-bad-record skip`"));
                        }
                        skipped += 1;
                        self.bar.suspend(|| eprintln!("skipped {path}: {}", error.message()));
                    }
                }
                if writer.bytes() >= SHARD_BYTES {
                    shards.push(
                        self.close(std::mem::replace(&mut writer, ShardWriter::new(kind)), shards.len())?,
                    );
                }
            }
            self.bar.inc(chunk.len() as u64);
            match self.stop.load(Ordering::Relaxed) {
                0 => {}
                signal => return Err(Error::stopped(signal as i32, "stopped; nothing was written")),
            }
        }
        if !writer.is_empty() {
            shards.push(self.close(writer, shards.len())?);
        }
        let records = shards.iter().map(|s| s.records).sum();
        if records == 0 {
            fail!("{}: none of {} records can be used", self.source.store.path().display(), items.len());
        }
        let manifest = Manifest {
            version: Manifest::VERSION,
            format: self.converter.format().name().into(),
            image: self.converter.image(),
            records,
            skipped,
            classes: self.source.classes.clone(),
            shards,
        };
        manifest.write(&self.dir)?;
        Ok((records, skipped))
    }

    fn close(&self, writer: ShardWriter, index: usize) -> Result<ShardEntry> {
        let file = format!("{index:05}.safetensors");
        let checksum = writer.write_file(&self.dir.join(&file))?;
        Ok(ShardEntry { file, records: writer.len(), checksum })
    }
}
