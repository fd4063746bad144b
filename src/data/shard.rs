//! One shard of a packed data set: a safetensors file that any reader of that format can open.
//!
//! | tensor | type, shape | |
//! |---|---|---|
//! | `labels` | I64 `[count]`, or U8 `[count, classes]` | class indices, or ones where a sample has a class |
//! | `images` | U8 `[count, H, W, 3]` | raw pixels, or instead of them: |
//! | `data`, `offsets` | U8 `[bytes]`, U64 `[count + 1]` | encoded pictures, one after the other |
//! | `names`, `name_offsets` | U8 `[bytes]`, U64 `[count + 1]` | where each record came from; may be absent |
//!
//! A shard is memory-mapped. Everything that its header and offsets claim is checked when it is opened, so
//! that reading a record cannot fail. Whether its bytes are those that were packed is checked later
//! ([`Shard::sound`]).

use std::borrow::Cow;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{At, Error, Result};
use crate::{fail, files};

/// A record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// `[H, W, 3]` pixels.
    Raw {
        /// RGB, row by row.
        pixels: Cow<'a, [u8]>,
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
    },
    /// A picture file of any supported format.
    Encoded(Cow<'a, [u8]>),
}

/// An open shard.
#[derive(Debug)]
pub struct Shard {
    bytes: Bytes,
    labels: Labels,
    body: Body,
    names: Option<Blob>,
    listed: Option<Listed>,
}

/// The manifest's checksum of a shard, and whether it matches.
#[derive(Debug)]
struct Listed {
    path: PathBuf,
    checksum: String,
    /// The number of its first record in the data set.
    first: usize,
    verdict: OnceLock<Result<()>>,
    /// Another thread compares it; until then the shard counts as sound.
    elsewhere: AtomicBool,
}

/// Class indices of the records.
#[derive(Debug)]
enum Labels {
    One(Vec<u32>),
    /// The classes of record i are `values[ends[i-1]..ends[i]]`.
    Several {
        ends: Vec<usize>,
        values: Vec<u32>,
    },
}

/// The bytes of a shard.
#[derive(Debug)]
enum Bytes {
    /// The map, and the file's name for [`guard`].
    Mapped(Mmap, &'static str),
    Owned(Vec<u8>),
}

#[derive(Debug)]
enum Body {
    Raw { start: usize, height: usize, width: usize },
    Encoded(Blob),
}

/// Variable-length pieces; `offsets` count from `start`.
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
        // Names outlive their maps, because a signal handler cannot ask whether they still exist.
        let name = Box::leak(path.display().to_string().into_boxed_str());
        Self::parse(Bytes::Mapped(bytes, name), classes).map_err(|e| damaged(e.at(path.display())))
    }

    /// A shard in memory.
    pub fn from_bytes(bytes: Vec<u8>, classes: usize) -> Result<Self> {
        Self::parse(Bytes::Owned(bytes), classes)
    }

    fn parse(bytes: Bytes, classes: usize) -> Result<Self> {
        let all: &[u8] = bytes.as_slice();
        let tensors =
            SafeTensors::deserialize(all).map_err(|e| Error::new(format!("not a whole shard: {e}")))?;
        // Position of a tensor in the file.
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

        let labels = Labels::read(&tensors, classes)?;
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
        Ok(Self { bytes, labels, body, names, listed: None })
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no record.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The class of a record; the first if there are several, 0 if there is none.
    pub fn label(&self, index: usize) -> usize {
        self.labels.of(index).first().map_or(0, |label| *label as usize)
    }

    /// All classes of a record.
    pub fn labels(&self, index: usize) -> Vec<usize> {
        self.labels.of(index).iter().map(|label| *label as usize).collect()
    }

    /// Whether a record may have several classes or none.
    pub fn is_multi_label(&self) -> bool {
        matches!(self.labels, Labels::Several { .. })
    }

    /// The name of a record, if the shard has names.
    pub fn name(&self, index: usize) -> Option<String> {
        let range = self.names.as_ref()?.range(index);
        Some(String::from_utf8_lossy(&self.bytes.as_slice()[range]).into_owned())
    }

    /// The stored bytes of a record.
    pub fn record(&self, index: usize) -> Record<'_> {
        if let Bytes::Mapped(_, name) = self.bytes {
            guard::reading(name);
        }
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

    /// Asks the system to read an encoded record into memory soon. A hint: failures are ignored.
    pub fn will_need(&self, index: usize) {
        if let (Bytes::Mapped(map, _), Body::Encoded(blob)) = (&self.bytes, &self.body) {
            let range = blob.range(index);
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
    }

    /// Asks the processor to load raw pixels into its cache soon, if they are few. A hint.
    pub fn prefetch(&self, index: usize) {
        /// Prefetching more would evict data in use.
        const MOST: usize = 16 << 10;
        let Body::Raw { start, height, width } = self.body else { return };
        let len = height * width * 3;
        if len > MOST {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        for line in self.bytes.as_slice()[start + index * len..][..len].chunks(64) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch reads nothing and never faults, whatever the address; this one is inside the
            // map.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
    }

    /// (H, W) of all records, if they are raw pixels.
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

    /// The same shard with the manifest's data: its checksum, and the number of its first record.
    pub(super) fn listed(mut self, path: PathBuf, checksum: &str, first: usize) -> Self {
        let (checksum, verdict, elsewhere) = (checksum.to_owned(), OnceLock::new(), AtomicBool::new(false));
        self.listed = Some(Listed { path, checksum, first, verdict, elsewhere });
        self
    }

    /// The manifest's checksum; for a shard in memory, its own.
    pub fn listed_checksum(&self) -> String {
        self.listed.as_ref().map_or_else(|| self.checksum(), |listed| listed.checksum.clone())
    }

    /// Compares the checksum of the whole file with the manifest's, once.
    pub fn verify(&self) -> Result<()> {
        let Some(listed) = &self.listed else { return Ok(()) };
        let compare = || {
            let found = self.checksum();
            if found == listed.checksum {
                return Ok(());
            }
            let Listed { path, checksum, first, .. } = listed;
            Err(Error::new(format!(
                "{}: damaged: the checksum is {found}, and the manifest says {checksum}; it holds the records {first} to {}",
                path.display(),
                (first + self.len()).saturating_sub(1)
            ))
                .hint("pack the data set again; `--set data.verify=false` trains on it as it is"))
        };
        listed.verdict.get_or_init(compare).clone()
    }

    /// An error if the file is known to differ from what was packed. Compares it now, unless another thread
    /// does.
    pub fn sound(&self) -> Result<()> {
        let Some(listed) = &self.listed else { return Ok(()) };
        match listed.verdict.get() {
            Some(Ok(())) => Ok(()),
            None if listed.elsewhere.load(Ordering::Relaxed) => Ok(()),
            _ => self.verify(),
        }
    }

    /// Uses the file without comparing.
    pub fn trust(&self) {
        if let Some(listed) = &self.listed {
            let _ = listed.verdict.set(Ok(()));
        }
    }

    pub(super) fn verified_elsewhere(&self) {
        self.listed.iter().for_each(|listed| listed.elsewhere.store(true, Ordering::Relaxed));
    }

    pub(super) fn verified_here(&self) {
        self.listed.iter().for_each(|listed| listed.elsewhere.store(false, Ordering::Relaxed));
    }

    /// Bytes of the file.
    pub fn byte_len(&self) -> usize {
        self.bytes.as_slice().len()
    }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map, _) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

fn damaged(error: Error) -> Error {
    error.hint("the shard is damaged or was cut short: pack the data set again")
}

/// Maps a file for reading. An empty file is an error.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    guard::install();
    let file = File::open(path).at(path.display())?;
    if file.metadata().at(path.display())?.len() == 0 {
        fail!("{}: the file is empty", path.display());
    }
    // SAFETY: the map is read only. We assume, as every mapped reader must, that no process changes or
    // truncates a data set's files while they are read. A pack never writes into an existing file; it renames
    // new ones.
    unsafe { Mmap::map(&file) }.at(path.display())
}

impl Labels {
    /// `labels` as I64 or I32 `[count]`, or U8 `[count, classes]`.
    fn read(tensors: &SafeTensors, classes: usize) -> Result<Self> {
        let view = tensors.tensor("labels").map_err(|_| Error::new("no tensor `labels`"))?;
        let data = view.data();
        let wide: Vec<i64> = match (view.dtype(), view.shape()) {
            (Dtype::I64, [_]) => {
                data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
            }
            (Dtype::I32, [_]) => {
                data.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()).into()).collect()
            }
            (Dtype::U8, &[_, columns]) if columns == classes && classes > 0 => {
                let (mut ends, mut values) = (Vec::new(), Vec::new());
                for row in data.chunks_exact(classes) {
                    if let Some(odd) = row.iter().find(|v| **v > 1) {
                        fail!("tensor `labels` has a {odd}, which is neither 0 nor 1");
                    }
                    values.extend((0u32..).zip(row).filter(|(_, v)| **v == 1).map(|(label, _)| label));
                    ends.push(values.len());
                }
                return Ok(Labels::Several { ends, values });
            }
            (dtype, shape) => {
                fail!("tensor `labels` is {dtype:?} {shape:?}, not I64 [count] or U8 [count, {classes}]")
            }
        };
        let label = |l: i64| match u32::try_from(l) {
            Ok(label) if (label as usize) < classes => Ok(label),
            _ => Err(Error::new(format!("label {l} in a data set of {classes} classes"))),
        };
        Ok(Labels::One(wide.into_iter().map(label).collect::<Result<_>>()?))
    }

    fn len(&self) -> usize {
        match self {
            Labels::One(labels) => labels.len(),
            Labels::Several { ends, .. } => ends.len(),
        }
    }

    fn of(&self, index: usize) -> &[u32] {
        match self {
            Labels::One(labels) => &labels[index..=index],
            Labels::Several { ends, values } => {
                &values[if index == 0 { 0 } else { ends[index - 1] }..ends[index]]
            }
        }
    }
}

/// Handles a mapped file that is cut short, or whose disk fails: the system then sends SIGBUS to the thread
/// that reads.
pub(super) mod guard {
    use std::cell::Cell;
    use std::sync::Once;

    thread_local! {
        static READING: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// Remembers which file this thread reads.
    pub(crate) fn reading(name: &'static str) {
        READING.set(Some(name));
    }

    /// From now on the signal prints a message that names the file, and exits with code 1.
    pub(crate) fn install() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let say = || {
                let stderr = std::io::stderr();
                let write = |text: &str| {
                    let _ = rustix::io::write(&stderr, text.as_bytes());
                };
                write("error: ");
                write(READING.get().unwrap_or("a mapped file"));
                write(": the file was cut short, or its disk failed, while it was read\n");
                write("hint: `vitrum pack DIR --check` says what is left of a data set\n");
                signal_hook::low_level::exit(1);
            };
            // SAFETY: the handler calls only write(2) and _exit(2), and reads a thread-local without a
            // destructor that is initialised at compile time; `stderr()` is a handle without a lock. The
            // handler never returns to the fault.
            let _ = unsafe { signal_hook::low_level::register(signal_hook::consts::SIGBUS, say) };
        });
    }
}

/// The kind of records in a shard under construction.
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
    /// For multi-label samples: the number of classes, and their rows of zeros and ones.
    several: Option<(usize, Vec<u8>)>,
    labels: Vec<i64>,
    data: Vec<u8>,
    offsets: Vec<u64>,
    names: Vec<u8>,
    name_offsets: Vec<u64>,
}

impl ShardWriter {
    /// An empty shard for samples with one label each.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            several: None,
            labels: Vec::new(),
            data: Vec::new(),
            offsets: vec![0],
            names: Vec::new(),
            name_offsets: vec![0],
        }
    }

    /// For samples that may have several of `classes` labels.
    pub fn multi_label(kind: Kind, classes: usize) -> Self {
        Self { several: Some((classes, Vec::new())), ..Self::new(kind) }
    }

    /// As [`ShardWriter::push`], with any number of labels.
    pub fn push_labels(&mut self, labels: impl Iterator<Item = usize>, name: &str, bytes: &[u8]) {
        let labels: Vec<usize> = labels.collect();
        if let Some((classes, rows)) = &mut self.several {
            let start = rows.len();
            rows.resize(start + *classes, 0);
            labels.iter().for_each(|label| rows[start + label] = 1);
        }
        self.push(labels.first().copied().unwrap_or(0), name, bytes);
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

    /// Number of records so far.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no record yet.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Bytes of pictures so far.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Writes the shard, or nothing on failure, and returns its checksum.
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
        let mut tensors = match self.several {
            None => vec![("labels", "I64", vec![count], &labels)],
            Some(_) => Vec::new(),
        };
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
        if let Some((classes, rows)) = &self.several {
            tensors.push(("labels", "U8", vec![count, *classes], rows));
        }

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
    fn several_labels_of_a_record_come_back() {
        let mut writer = ShardWriter::multi_label(Kind::Encoded, 4);
        for labels in [vec![1, 3], vec![], vec![0]] {
            writer.push_labels(labels.into_iter(), "x", b"picture");
        }
        let mut bytes = Vec::new();
        writer.write(&mut bytes).unwrap();
        let shard = Shard::from_bytes(bytes.clone(), 4).unwrap();
        assert!(shard.is_multi_label() && shard.len() == 3);
        assert_eq!([0, 1, 2].map(|i| shard.labels(i)), [vec![1, 3], vec![], vec![0]]);
        assert!(Shard::from_bytes(bytes, 5).is_err(), "rows of another width");
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
