//! The safetensors container: named arrays with string metadata, mapped for reading and written in one pass.
//!
//! The header is checked against the size of the file when it is opened. So taking a tensor cannot fail, and
//! nothing is allocated beyond what the file holds. f32 values are borrowed from the map. Writing pads the
//! header so that the data starts at a multiple of 64 bytes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use ::safetensors::Dtype;
use ::safetensors::tensor::Metadata;
use half::{bf16, f16};

use super::bytes::Bytes;
use super::tensor::{Tensor, shape_text};
use crate::error::{Error, Result};
use crate::{fail, files};

/// The data starts at a multiple of this many bytes.
const DATA_ALIGN: usize = 64;
/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open file whose header has been checked.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    file: Bytes,
    data_start: usize,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Byte range relative to `data_start`.
    begin: usize,
    bytes: usize,
}

impl SafeTensors {
    /// Maps the file and reads its header. Errors name the file and say whether it is truncated or another
    /// kind of file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(Bytes::map(path)?, path)
    }

    /// `path` is its name in errors.
    pub(super) fn parse(file: Bytes, path: &Path) -> Result<Self> {
        let length = file.len() as u64;
        let broken =
            |why: String| Err(Error::new(format!("{}: not a whole safetensors file: {why}", path.display())));

        let Some(prefix) = file.first_chunk::<8>() else {
            return broken(format!("only {length} bytes"));
        };
        let header = u64::from_le_bytes(*prefix);
        if header > MAX_HEADER_BYTES || header + 8 > length {
            return broken(format!("it announces {header} bytes of header and has {length} in all"));
        }
        let data_start = 8 + header as usize;
        let parsed: Metadata = match serde_json::from_slice(&file[8..data_start]) {
            Ok(parsed) => parsed,
            Err(e) => return broken(format!("its header does not parse: {e}")),
        };
        let (found, expected) = (length - 8 - header, parsed.data_len() as u64);
        if found != expected {
            return broken(format!("it has {found} bytes of data where its header lists {expected}"));
        }

        let mut tensors = BTreeMap::new();
        for (name, info) in parsed.tensors() {
            let (begin, end) = info.data_offsets;
            let entry = Entry { dtype: info.dtype, shape: info.shape.clone(), begin, bytes: end - begin };
            tensors.insert(name, entry);
        }
        let metadata = parsed.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { path: path.into(), file, data_start, metadata, tensors })
    }

    /// `__metadata__`, empty if there is none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// In alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether the file has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of a tensor. An error if there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.shape)
    }

    /// The element type of a tensor. An error if there is no such tensor.
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.entry(name)?.dtype)
    }

    /// Position of a tensor's bytes in the file: offset and length.
    pub fn range(&self, name: &str) -> Result<(usize, usize)> {
        let entry = self.entry(name)?;
        Ok((self.data_start + entry.begin, entry.bytes))
    }

    /// The stored bytes (little-endian).
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (offset, length) = self.range(name)?;
        Ok(&self.file[offset..offset + length])
    }

    /// F32, F16, BF16 or F64 as f32; borrowed if they are stored as f32.
    pub fn values(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let bytes = self.bytes(name)?;
        Ok(match self.entry(name)?.dtype {
            // A header of odd length leaves the data misaligned for f32.
            Dtype::F32 => match bytemuck::try_cast_slice(bytes) {
                Ok(values) => Cow::Borrowed(values),
                Err(_) => Cow::Owned(decode(bytes, f32::from_le_bytes)),
            },
            Dtype::F16 => Cow::Owned(decode(bytes, |b| f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => Cow::Owned(decode(bytes, |b| bf16::from_le_bytes(b).to_f32())),
            Dtype::F64 => Cow::Owned(decode(bytes, |b| f64::from_le_bytes(b) as f32)),
            other => fail!("{}: holds {other}, not floating-point numbers", self.place(name)),
        })
    }

    /// The same with its shape.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(Tensor::new(self.entry(name)?.shape.clone(), self.values(name)?.into_owned()))
    }

    /// F64 or F32 as f64.
    pub fn f64(&self, name: &str) -> Result<Vec<f64>> {
        match self.entry(name)?.dtype {
            Dtype::F64 => Ok(decode(self.bytes(name)?, f64::from_le_bytes)),
            _ => Ok(self.tensor(name)?.values.into_iter().map(f64::from).collect()),
        }
    }

    /// Integers of up to 64 bits as i64.
    pub fn i64(&self, name: &str) -> Result<Vec<i64>> {
        let bytes = self.bytes(name)?;
        Ok(match self.entry(name)?.dtype {
            Dtype::U8 => decode(bytes, |[b]: [u8; 1]| i64::from(b)),
            Dtype::I32 => decode(bytes, |b| i64::from(i32::from_le_bytes(b))),
            Dtype::U32 => decode(bytes, |b| i64::from(u32::from_le_bytes(b))),
            Dtype::I64 => decode(bytes, i64::from_le_bytes),
            other => fail!("{}: holds {other}, not integers", self.place(name)),
        })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::new(format!("{}: no tensor `{name}`", self.path.display())))
    }

    fn place(&self, name: &str) -> String {
        format!("{}: tensor `{name}`", self.path.display())
    }
}

fn decode<const N: usize, T>(bytes: &[u8], one: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.chunks_exact(N).map(|b| one(b.try_into().expect("chunks of N"))).collect()
}

/// A tensor to write; borrows its values if it can.
#[derive(Clone, Debug)]
pub struct View<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl<'a> View<'a> {
    /// Panics if the bytes do not fill the shape.
    pub fn new(
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        let view = Self { name: name.into(), dtype, shape: shape.to_vec(), bytes: bytes.into() };
        let bits = shape.iter().product::<usize>() * dtype.bitsize();
        assert_eq!(
            bits,
            view.bytes.len() * 8,
            "`{}` {}: wrong number of bytes",
            view.name,
            shape_text(shape)
        );
        view
    }

    /// A tensor of f32. Panics if `shape` and the number of values differ.
    pub fn f32(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        Self::new(name, Dtype::F32, shape, bytemuck::cast_slice(values))
    }

    /// A tensor of f64. Panics if `shape` and the number of values differ.
    pub fn f64(name: impl Into<String>, shape: &[usize], values: &'a [f64]) -> Self {
        Self::new(name, Dtype::F64, shape, bytemuck::cast_slice(values))
    }

    /// A tensor of i64. Panics if `shape` and the number of values differ.
    pub fn i64(name: impl Into<String>, shape: &[usize], values: &'a [i64]) -> Self {
        Self::new(name, Dtype::I64, shape, bytemuck::cast_slice(values))
    }
}

/// A file before its values are known: the header, and where each tensor lies.
pub struct Outline {
    /// The first bytes of the file: the header and its length.
    pub header: Vec<u8>,
    /// The bytes of each tensor in the file, by name.
    pub places: BTreeMap<String, Range<usize>>,
    /// Size of the whole file.
    pub bytes: usize,
}

impl Outline {
    /// The outline of a file with these tensors. Wider types come first, so that every tensor is aligned to
    /// its type; otherwise the order is kept.
    pub fn new(metadata: &BTreeMap<String, String>, tensors: &[(&str, Dtype, &[usize])]) -> Self {
        let mut tensors = tensors.to_vec();
        tensors.sort_by_key(|(_, dtype, _)| std::cmp::Reverse(dtype.bitsize()));
        let mut header = serde_json::Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), serde_json::json!(metadata));
        }
        let (mut offset, mut places) = (0, BTreeMap::new());
        for (name, dtype, shape) in tensors {
            let end = offset + shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let info = serde_json::json!({
                "dtype": dtype.to_string(), "shape": shape, "data_offsets": [offset, end],
            });
            assert!(header.insert(name.into(), info).is_none(), "`{name}` is written twice");
            places.insert(name.to_string(), offset..end);
            offset = end;
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize((8 + text.len()).next_multiple_of(DATA_ALIGN) - 8, b' ');
        let header = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        let start = header.len();
        places.values_mut().for_each(|place| *place = start + place.start..start + place.end);
        Self { bytes: start + offset, header, places }
    }
}

/// Writes a complete file or none, as its [`Outline`] says.
pub fn write(path: &Path, metadata: &BTreeMap<String, String>, mut tensors: Vec<View<'_>>) -> Result<()> {
    let named: Vec<_> = tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())).collect();
    let outline = Outline::new(metadata, &named);
    tensors.sort_by_key(|t| outline.places[&t.name].start);
    files::write_atomic(path, |out| {
        out.write_all(&outline.header)?;
        tensors.iter().try_for_each(|t| out.write_all(&t.bytes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_the_data_is_aligned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let half: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let views = vec![
            View::new("u", Dtype::U8, &[3], vec![1, 2, 3]),
            View::f32("b/weight", &[2, 1], &[f32::MIN_POSITIVE, -0.0]),
            View::new("h", Dtype::BF16, &[2], half),
            View::f64("d", &[1], &[0.1]),
            View::i64("i", &[2], &[-1, i64::MAX]),
        ];
        write(&path, &metadata, views).unwrap();

        let file = SafeTensors::open(&path).unwrap();
        assert_eq!(file.metadata(), &metadata);
        assert_eq!(file.names().collect::<Vec<_>>(), ["b/weight", "d", "h", "i", "u"]);
        let b = file.tensor("b/weight").unwrap();
        assert_eq!((b.shape.as_slice(), b.values[0]), (&[2, 1][..], f32::MIN_POSITIVE));
        assert_eq!(b.values[1].to_bits(), (-0.0f32).to_bits());
        assert_eq!(file.tensor("h").unwrap().values, [1.5, -2.0]);
        assert_eq!(file.f64("d").unwrap(), [0.1]);
        assert_eq!(file.i64("i").unwrap(), [-1, i64::MAX]);
        assert_eq!(file.i64("u").unwrap(), [1, 2, 3]);
        assert_eq!(file.data_start % 64, 0);
        for (name, size) in [("d", 8), ("i", 8), ("b/weight", 4), ("h", 2)] {
            assert_eq!(file.range(name).unwrap().0 % size, 0, "{name}");
        }
        let official = std::fs::read(&path).unwrap();
        assert_eq!(::safetensors::SafeTensors::deserialize(&official).unwrap().len(), 5);
    }

    #[test]
    fn errors_name_the_file_and_the_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write(&path, &BTreeMap::new(), vec![View::i64("step", &[1], &[3])]).unwrap();
        let file = SafeTensors::open(&path).unwrap();
        let message = file.tensor("step").unwrap_err().message().to_string();
        assert!(
            message.ends_with("a.safetensors: tensor `step`: holds I64, not floating-point numbers"),
            "{message}"
        );
        assert!(file.bytes("absent").unwrap_err().message().ends_with("a.safetensors: no tensor `absent`"));

        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let message = SafeTensors::open(&path).unwrap_err().message().to_string();
        assert!(message.contains("it has 7 bytes of data where its header lists 8"), "{message}");
    }
}
