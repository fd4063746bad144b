//! One shard of a packed data set: a safetensors file that any reader of that format opens.
//!
//! | tensor | type, shape | |
//! |---|---|---|
//! | `labels` | I64 `[count]` | class indices |
//! | `images` | U8 `[count, H, W, 3]` | raw pixels, or instead of them: |
//! | `data`, `offsets` | U8 `[bytes]`, U64 `[count + 1]` | encoded pictures, one after the other |
//! | `names`, `name_offsets` | U8 `[bytes]`, U64 `[count + 1]` | where each record came from; may be absent |
//!
//! A shard is mapped, never read whole; everything that its header and offsets claim is checked when it is opened,
//! so that taking a record cannot fail.

use std::borrow::Cow;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{At, Error, Result};
use crate::{fail, files};

/// A record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// `[H, W, 3]` pixels.
    Raw { pixels: Cow<'a, [u8]>, height: usize, width: usize },
    /// A picture file of any supported format.
    Encoded(Cow<'a, [u8]>),
}

/// An open shard.
#[derive(Debug)]
pub struct Shard {
    bytes: Bytes,
    labels: Vec<u32>,
    body: Body,
    names: Option<Blob>,
}

/// Where a shard's bytes are.
#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

#[derive(Debug)]
enum Body {
    Raw { start: usize, height: usize, width: usize },
    Encoded(Blob),
}

/// Variable-length pieces: `offsets` count from `start`.
#[derive(Debug)]
struct Blob {
    start: usize,
    offsets: Vec<u64>,
}

impl Blob {
    fn range(&self, index: usize) -> Range<usize> {
        self.start + self.offsets[index] as usize..self.start + self.offsets[index + 1] as usize
    }
}

impl Shard {
    /// Maps a shard file and checks it. `classes` bounds the labels.
    pub fn open(path: &Path, classes: usize) -> Result<Self> {
        let bytes = map(path)?;
        Self::parse(Bytes::Mapped(bytes), classes).map_err(|e| damaged(e.at(path.display())))
    }

    /// A shard that lives in memory.
    pub fn from_bytes(bytes: Vec<u8>, classes: usize) -> Result<Self> {
        Self::parse(Bytes::Owned(bytes), classes)
    }

    fn parse(bytes: Bytes, classes: usize) -> Result<Self> {
        let all: &[u8] = bytes.as_slice();
        let tensors =
            SafeTensors::deserialize(all).map_err(|e| Error::new(format!("not a whole shard: {e}")))?;
        // Where a tensor lies in the file.
        let start = |data: &[u8]| data.as_ptr() as usize - all.as_ptr() as usize;
        let tensor = |name: &str, dtype: Dtype| {
            let view = tensors.tensor(name).map_err(|_| Error::new(format!("no tensor `{name}`")))?;
            if view.dtype() != dtype {
                fail!("tensor `{name}` is {:?}, not {dtype:?}", view.dtype());
            }
            Ok(view)
        };
        let words = |name: &str, len: usize| {
            let view = tensor(name, Dtype::U64)?;
            if view.shape() != [len] {
                fail!("tensor `{name}` has shape {:?}, not [{len}]", view.shape());
            }
            Ok(view
                .data()
                .chunks_exact(8)
                .map(|b| u64::from_le_bytes(b.try_into().unwrap()))
                .collect::<Vec<_>>())
        };
        let blob = |data: &str, offsets: &str, count: usize| {
            let view = tensor(data, Dtype::U8)?;
            let words = words(offsets, count + 1)?;
            let whole = words.first() == Some(&0)
                && words.windows(2).all(|w| w[0] <= w[1])
                && words.last() == Some(&(view.data().len() as u64));
            if !whole {
                fail!("`{offsets}` do not divide `{data}`");
            }
            Ok(Blob { start: start(view.data()), offsets: words })
        };

        let labels = read_labels(&tensors)?;
        if let Some(label) = labels.iter().find(|l| **l as usize >= classes) {
            fail!("label {label} in a data set of {classes} classes");
        }
        let count = labels.len();
        let body = if tensors.names().contains(&"images") {
            let view = tensor("images", Dtype::U8)?;
            match *view.shape() {
                [n, height, width, 3] if n == count => Body::Raw { start: start(view.data()), height, width },
                ref shape => fail!("tensor `images` has shape {shape:?}, not [{count}, H, W, 3]"),
            }
        } else {
            Body::Encoded(blob("data", "offsets", count)?)
        };
        let names = match tensors.names().contains(&"names") {
            true => Some(blob("names", "name_offsets", count)?),
            false => None,
        };
        Ok(Self { bytes, labels, body, names })
    }

    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    pub fn label(&self, index: usize) -> usize {
        self.labels[index] as usize
    }

    /// The name of a record, if the shard has names.
    pub fn name(&self, index: usize) -> Option<String> {
        let range = self.names.as_ref()?.range(index);
        Some(String::from_utf8_lossy(&self.bytes.as_slice()[range]).into_owned())
    }

    pub fn record(&self, index: usize) -> Record<'_> {
        let bytes = self.bytes.as_slice();
        match &self.body {
            Body::Raw { start, height, width } => {
                let len = height * width * 3;
                let pixels = &bytes[start + index * len..][..len];
                Record::Raw { pixels: pixels.into(), height: *height, width: *width }
            }
            Body::Encoded(blob) => Record::Encoded(bytes[blob.range(index)].into()),
        }
    }

    /// (H, W) of all records, where they are raw pixels.
    pub fn image(&self) -> Option<(usize, usize)> {
        match self.body {
            Body::Raw { height, width, .. } => Some((height, width)),
            Body::Encoded(_) => None,
        }
    }

    /// The checksum that `dataset.json` holds: xxh3-64 of the whole file, in hex.
    pub fn checksum(&self) -> String {
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(self.bytes.as_slice()))
    }

    /// Bytes of the file.
    pub fn byte_len(&self) -> usize {
        self.bytes.as_slice().len()
    }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

fn damaged(error: Error) -> Error {
    error.hint("the shard is damaged or was cut short: pack the data set again")
}

/// Maps a file for reading. An empty file is an error.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).at(path.display())?;
    if file.metadata().at(path.display())?.len() == 0 {
        fail!("{}: the file is empty", path.display());
    }
    // SAFETY: the map is read only. That nobody changes or cuts a data set's files while a program reads them is the
    // one assumption that every mapped reader makes; a pack never writes into an existing file, it renames new ones.
    unsafe { Mmap::map(&file) }.at(path.display())
}

/// `labels` as I64 or I32.
fn read_labels(tensors: &SafeTensors) -> Result<Vec<u32>> {
    let view = tensors.tensor("labels").map_err(|_| Error::new("no tensor `labels`"))?;
    if view.shape().len() != 1 {
        fail!("tensor `labels` has shape {:?}, not [count]", view.shape());
    }
    let wide: Vec<i64> = match view.dtype() {
        Dtype::I64 => {
            view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
        }
        Dtype::I32 => {
            view.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()).into()).collect()
        }
        other => fail!("tensor `labels` is {other:?}, not I64 or I32"),
    };
    wide.into_iter()
        .map(|l| u32::try_from(l).map_err(|_| Error::new(format!("label {l} is no class index"))))
        .collect()
}

/// What a shard under construction holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// u8 pixels of one size (H, W).
    Raw(usize, usize),
    /// Encoded pictures.
    Encoded,
}

/// Collects the records of one shard in memory and writes it.
#[derive(Debug)]
pub struct ShardWriter {
    kind: Kind,
    labels: Vec<i64>,
    data: Vec<u8>,
    offsets: Vec<u64>,
    names: Vec<u8>,
    name_offsets: Vec<u64>,
}

impl ShardWriter {
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            labels: Vec::new(),
            data: Vec::new(),
            offsets: vec![0],
            names: Vec::new(),
            name_offsets: vec![0],
        }
    }

    /// `bytes` are the pixels or the encoded picture.
    pub fn push(&mut self, label: usize, name: &str, bytes: &[u8]) {
        if let Kind::Raw(height, width) = self.kind {
            assert_eq!(bytes.len(), height * width * 3, "a raw record has the shard's size");
        }
        self.labels.push(label as i64);
        self.data.extend_from_slice(bytes);
        self.offsets.push(self.data.len() as u64);
        self.names.extend_from_slice(name.as_bytes());
        self.name_offsets.push(self.names.len() as u64);
    }

    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Bytes of pictures so far.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Writes the shard, whole or not at all, and returns its checksum.
    pub fn write_file(&self, path: &Path) -> Result<String> {
        let mut checksum = String::new();
        files::write_atomic(path, |out| {
            let mut hashing = Hashing { out, hash: Xxh3::new() };
            self.write(&mut hashing)?;
            checksum = format!("{:016x}", hashing.hash.digest());
            Ok(())
        })?;
        Ok(checksum)
    }

    /// Writes the safetensors file: header length, header, tensors in the header's order.
    pub fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let count = self.labels.len();
        let words = |w: &[u64]| w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let labels: Vec<u8> = self.labels.iter().flat_map(|l| l.to_le_bytes()).collect();
        let (offsets, name_offsets) = (words(&self.offsets), words(&self.name_offsets));
        // Wide types first, so that every tensor is aligned to its type.
        let mut tensors = vec![("labels", "I64", vec![count], &labels)];
        match self.kind {
            Kind::Raw(height, width) => {
                tensors.push(("name_offsets", "U64", vec![count + 1], &name_offsets));
                tensors.push(("images", "U8", vec![count, height, width, 3], &self.data));
            }
            Kind::Encoded => {
                tensors.push(("name_offsets", "U64", vec![count + 1], &name_offsets));
                tensors.push(("offsets", "U64", vec![count + 1], &offsets));
                tensors.push(("data", "U8", vec![self.data.len()], &self.data));
            }
        }
        tensors.push(("names", "U8", vec![self.names.len()], &self.names));

        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!({ "format": "vitrum-shard-1" }));
        let mut end = 0;
        for (name, dtype, shape, data) in &tensors {
            let place = [end, end + data.len()];
            header.insert(
                (*name).into(),
                serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": place }),
            );
            end += data.len();
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize((8 + header.len()).next_multiple_of(64) - 8, b' '); // tensors start at a multiple of 64
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        tensors.iter().try_for_each(|(_, _, _, data)| out.write_all(data))
    }
}

/// Passes bytes on and hashes them.
struct Hashing<'a> {
    out: &'a mut dyn Write,
    hash: Xxh3,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded() -> Vec<u8> {
        let mut writer = ShardWriter::new(Kind::Encoded);
        writer.push(1, "cat/a.png", b"first");
        writer.push(0, "dog/b.png", b"");
        writer.push(1, "cat/c.png", b"third one");
        let mut bytes = Vec::new();
        writer.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_shard_gives_back_what_was_pushed() {
        let shard = Shard::from_bytes(encoded(), 2).unwrap();
        assert_eq!(shard.len(), 3);
        let records: Vec<_> =
            (0..3).map(|i| (shard.label(i), shard.name(i).unwrap(), shard.record(i))).collect();
        assert_eq!(records[0], (1, "cat/a.png".into(), Record::Encoded(b"first"[..].into())));
        assert_eq!(records[1], (0, "dog/b.png".into(), Record::Encoded(b""[..].into())));
        assert_eq!(records[2], (1, "cat/c.png".into(), Record::Encoded(b"third one"[..].into())));

        let mut writer = ShardWriter::new(Kind::Raw(2, 1));
        writer.push(0, "x", &[1, 2, 3, 4, 5, 6]);
        writer.push(4, "y", &[7, 8, 9, 10, 11, 12]);
        let mut bytes = Vec::new();
        writer.write(&mut bytes).unwrap();
        let shard = Shard::from_bytes(bytes, 5).unwrap();
        assert_eq!(shard.image(), Some((2, 1)));
        assert_eq!(
            shard.record(1),
            Record::Raw { pixels: [7, 8, 9, 10, 11, 12][..].into(), height: 2, width: 1 }
        );
    }

    #[test]
    fn a_shard_cut_anywhere_is_an_error_and_never_a_panic() {
        let whole = encoded();
        for len in 0..whole.len() {
            assert!(Shard::from_bytes(whole[..len].to_vec(), 2).is_err(), "cut at {len} of {}", whole.len());
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let whole = encoded();
        let error = |bytes: Vec<u8>, classes| Shard::from_bytes(bytes, classes).unwrap_err().to_string();
        assert!(error(whole.clone(), 1).contains("label 1 in a data set of 1 classes"));
        let text = String::from_utf8_lossy(&whole).into_owned();
        let swap = |from: &str, to: &str| {
            let at = text.find(from).unwrap();
            let mut bytes = whole.clone();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            bytes
        };
        assert!(error(swap("\"labels\"", "\"lebals\""), 2).contains("no tensor `labels`"));
        assert!(
            error(swap("\"dtype\":\"U8\",\"shape\":[14]", "\"dtype\":\"I8\",\"shape\":[14]"), 2)
                .contains("`data` is I8")
        );
        // The second offset of `data` beyond the third.
        let mut bytes = whole.clone();
        let at =
            whole.windows(16).position(|w| w == [5u64.to_le_bytes(), 5u64.to_le_bytes()].concat()).unwrap();
        bytes[at] = 200;
        assert!(error(bytes, 2).contains("`offsets` do not divide `data`"));
    }
}
