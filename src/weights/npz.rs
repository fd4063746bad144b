//! NumPy's `.npz`: a ZIP archive (ZIP64 too, stored or deflated) of `.npy` arrays.
//!
//! The headers of all members are read first; values are read by name. Pickled objects are never unpickled. A
//! shape is accepted only if the archive holds enough bytes for it, so that a false header cannot request
//! memory.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use zip::read::ZipFile;
use zip::{CompressionMethod, ZipArchive};

use super::bytes::Bytes;
use super::tensor::{Tensor, from_fortran};
use crate::error::{At, Error, Result};
use crate::fail;

/// deflate cannot expand more than this.
const MAX_DEFLATE_RATIO: u64 = 1032;
/// Weights hardly compress. An archive that exceeds both limits when unpacked is made to exhaust memory.
const MAX_UNPACKED: u64 = 1 << 30;
const MAX_UNPACKED_RATIO: u64 = 200;
/// NumPy writes about 120 bytes.
const MAX_HEADER_BYTES: usize = 1 << 16;

/// An open archive whose headers have been read.
pub struct Npz {
    path: PathBuf,
    archive: ZipArchive<Cursor<Bytes>>,
    members: BTreeMap<String, Member>,
}

impl std::fmt::Debug for Npz {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Npz({})", self.path.display())
    }
}

struct Member {
    index: usize,
    header: NpyHeader,
    /// Bytes before the values.
    header_bytes: usize,
}

/// The contents of an `.npy` header.
#[derive(Clone, Debug, PartialEq)]
struct NpyHeader {
    descr: String,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl Npz {
    /// Reads the directory and the header of every array. Errors name the file and the member.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(Bytes::map(path)?, path)
    }

    /// `path` is its name in errors.
    pub(super) fn parse(bytes: Bytes, path: &Path) -> Result<Self> {
        let length = bytes.len() as u64;
        let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| {
            Error::new(format!("{}: not a whole `.npz` archive: {e}", path.display()))
                .hint("the file may be truncated: compare its size with the original's")
        })?;
        let mut members = BTreeMap::new();
        let (mut stored, mut unpacked) = (0u64, 0u64);
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).at(path.display())?;
            let file_name = entry.name().at(path.display())?.into_owned();
            if file_name.ends_with(".pkl") {
                return Err(super::refuse_pickle(path));
            }
            let Some(name) = file_name.strip_suffix(".npy") else { continue };
            // Members that share bytes would let a small file request much memory.
            stored = stored.saturating_add(entry.compressed_size());
            if stored > length {
                fail!("{}: its members are longer than the file", path.display());
            }
            unpacked = unpacked.saturating_add(entry.size());
            if unpacked > MAX_UNPACKED && unpacked / MAX_UNPACKED_RATIO > length {
                fail!(
                    "{}: {length} bytes that unpack to more than {unpacked}: weights do not compress like that",
                    path.display()
                );
            }
            let (header, header_bytes) =
                read_header(&mut entry).map_err(|e| e.at(format!("{}: tensor `{name}`", path.display())))?;
            let room = Room::of(&entry, header_bytes);
            let member = Member { index, header, header_bytes };
            member.check(room).map_err(|e| e.at(format!("{}: tensor `{name}`", path.display())))?;
            members.insert(name.to_string(), member);
        }
        Ok(Self { path: path.into(), archive, members })
    }

    /// In alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// The shape of an array. An error if there is no such array.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.member(name)?.header.shape)
    }

    /// Reads one array of any floating-point type as f32, row-major.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let member = self.member(name)?;
        // The directory is shared; the position belongs to this reader.
        member
            .read(self.archive.clone())
            .map_err(|e| e.at(format!("{}: tensor `{name}`", self.path.display())))
    }

    /// Whether the values have 64 bits, of which f32 keeps 24.
    pub(super) fn is_f64(&self, name: &str) -> Result<bool> {
        Ok(self.member(name)?.header.descr.ends_with("f8"))
    }

    fn member(&self, name: &str) -> Result<&Member> {
        self.members
            .get(name)
            .ok_or_else(|| Error::new(format!("{}: no tensor `{name}`", self.path.display())))
    }
}

/// How many bytes of values a member announces, and how many its entry in the archive can hold at most.
#[derive(Clone, Copy)]
struct Room {
    announced: u64,
    possible: u64,
}

impl Room {
    fn of(entry: &ZipFile<'_, Cursor<Bytes>>, header_bytes: usize) -> Self {
        let possible = match entry.compression() {
            CompressionMethod::Stored => entry.compressed_size(),
            _ => entry.compressed_size().saturating_mul(MAX_DEFLATE_RATIO),
        };
        Self { announced: entry.size().saturating_sub(header_bytes as u64), possible }
    }
}

impl Member {
    /// Compares the shape with the available bytes; for other types, which are never read, one byte per
    /// value.
    fn check(&self, room: Room) -> Result<()> {
        let shape = &self.header.shape;
        let Some(count) = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) else {
            fail!("shape {shape:?} is absurd");
        };
        let Ok(scalar) = Scalar::parse(&self.header.descr) else {
            if count as u64 > room.possible {
                fail!("shape {shape:?} needs more than the {} bytes that the archive holds", room.possible);
            }
            return Ok(());
        };
        let needed = count.saturating_mul(scalar.bytes()) as u64;
        if room.announced != needed || needed > room.possible {
            fail!(
                "shape {shape:?} needs {needed} bytes, the archive holds {}",
                room.announced.min(room.possible)
            );
        }
        Ok(())
    }

    fn read(&self, mut archive: ZipArchive<Cursor<Bytes>>) -> Result<Tensor> {
        let scalar = Scalar::parse(&self.header.descr)?;
        let shape = &self.header.shape;
        let mut entry = archive.by_index(self.index).map_err(|e| Error::new(e.to_string()))?;
        entry.read_exact(&mut vec![0; self.header_bytes]).at("cannot be read")?;
        let mut values = scalar.read(&mut entry, shape.iter().product())?;
        // The checksum is checked at the end of the member.
        if entry.read(&mut [0]).at("damaged")? != 0 {
            fail!("more bytes than its shape {shape:?} needs");
        }
        if self.header.fortran_order {
            values = from_fortran(&values, shape);
        }
        Ok(Tensor::new(shape.clone(), values))
    }
}

/// Floating-point types of `.npy`.
#[derive(Clone, Copy)]
struct Scalar {
    kind: ScalarKind,
    big_endian: bool,
}

#[derive(Clone, Copy)]
enum ScalarKind {
    F16,
    Bf16,
    F32,
    F64,
}

impl Scalar {
    fn parse(descr: &str) -> Result<Self> {
        let (order, rest) = descr.split_at_checked(1).unwrap_or_default();
        let kind = match (order, rest) {
            // NumPy does not know bfloat16 and writes it as two opaque bytes.
            ("|" | "<", "V2") => ScalarKind::Bf16,
            ("<" | ">", "f2") => ScalarKind::F16,
            ("<" | ">", "f4") => ScalarKind::F32,
            ("<" | ">", "f8") => ScalarKind::F64,
            ("|", "O") => fail!("holds pickled Python objects, which are never loaded"),
            _ => fail!("holds `{descr}`, not floating-point numbers"),
        };
        Ok(Self { kind, big_endian: order == ">" })
    }

    fn bytes(self) -> usize {
        match self.kind {
            ScalarKind::F16 | ScalarKind::Bf16 => 2,
            ScalarKind::F32 => 4,
            ScalarKind::F64 => 8,
        }
    }

    fn read(self, from: &mut impl Read, count: usize) -> Result<Vec<f32>> {
        match self.kind {
            ScalarKind::F32 => {
                let mut values = vec![0f32; count];
                from.read_exact(bytemuck::cast_slice_mut(&mut values)).at("cannot be read")?;
                if self.big_endian {
                    values.iter_mut().for_each(|v| *v = f32::from_bits(v.to_bits().swap_bytes()));
                }
                Ok(values)
            }
            ScalarKind::F16 => self.convert(from, count, |b| f16::from_le_bytes(b).to_f32()),
            ScalarKind::Bf16 => self.convert(from, count, |b| bf16::from_le_bytes(b).to_f32()),
            ScalarKind::F64 => self.convert(from, count, |b| f64::from_le_bytes(b) as f32),
        }
    }

    fn convert<const N: usize>(
        self,
        from: &mut impl Read,
        count: usize,
        one: impl Fn([u8; N]) -> f32,
    ) -> Result<Vec<f32>> {
        let mut bytes = vec![0; count * N];
        from.read_exact(&mut bytes).at("cannot be read")?;
        let swap = |mut b: [u8; N]| {
            if self.big_endian {
                b.reverse();
            }
            b
        };
        Ok(bytes.chunks_exact(N).map(|b| one(swap(b.try_into().expect("chunks of N")))).collect())
    }
}

/// Reads magic, version and header text; returns the header and the number of bytes read.
fn read_header(from: &mut impl Read) -> Result<(NpyHeader, usize)> {
    let mut start = [0; 8];
    from.read_exact(&mut start).at("no `.npy` header")?;
    if &start[..6] != b"\x93NUMPY" {
        fail!("not an `.npy` array");
    }
    let mut size = [0; 4];
    let size_bytes = match start[6] {
        1 => 2,
        2 | 3 => 4,
        version => fail!("`.npy` version {version} is unknown"),
    };
    from.read_exact(&mut size[..size_bytes]).at("no `.npy` header")?;
    let size = u32::from_le_bytes(size) as usize;
    if size > MAX_HEADER_BYTES {
        fail!("an `.npy` header of {size} bytes");
    }
    let mut text = vec![0; size];
    from.read_exact(&mut text).at("no `.npy` header")?;
    let header = std::str::from_utf8(&text).ok().and_then(|t| HeaderText(t).parse());
    match header {
        Some(header) => Ok((header, 8 + size_bytes + size)),
        None => fail!("cannot read its `.npy` header `{}`", String::from_utf8_lossy(&text).trim()),
    }
}

/// A cursor over the Python dict that NumPy writes: `{'descr': '<f4', 'fortran_order': False, 'shape': (3,
/// 4), }`.
struct HeaderText<'a>(&'a str);

impl HeaderText<'_> {
    fn parse(mut self) -> Option<NpyHeader> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        self.token("{")?;
        while self.token("}").is_none() {
            let key = self.string()?;
            self.token(":")?;
            match key.as_str() {
                "descr" => descr = Some(self.string()?),
                "fortran_order" => fortran_order = Some(self.boolean()?),
                "shape" => shape = Some(self.shape()?),
                _ => return None,
            }
            if self.token(",").is_none() {
                self.token("}")?;
                break;
            }
        }
        self.0.trim().is_empty().then_some(())?;
        Some(NpyHeader { descr: descr?, fortran_order: fortran_order?, shape: shape? })
    }

    fn token(&mut self, token: &str) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn string(&mut self) -> Option<String> {
        let text = self.0.trim_start();
        let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let (value, rest) = text[1..].split_once(quote)?;
        self.0 = rest;
        Some(value.to_string())
    }

    fn boolean(&mut self) -> Option<bool> {
        self.token("True").map(|()| true).or_else(|| self.token("False").map(|()| false))
    }

    fn shape(&mut self) -> Option<Vec<usize>> {
        self.token("(")?;
        let mut shape = Vec::new();
        while self.token(")").is_none() {
            let text = self.0.trim_start();
            let digits = text.find(|c: char| !c.is_ascii_digit())?;
            shape.push(text[..digits].parse().ok()?);
            // Python 2 wrote `3L`.
            self.0 = text[digits..].strip_prefix('L').unwrap_or(&text[digits..]);
            if self.token(",").is_none() {
                self.token(")")?;
                break;
            }
        }
        Some(shape)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use zip::write::SimpleFileOptions;

    /// An `.npy` file around the given bytes.
    pub(in super::super) fn npy(descr: &str, fortran: bool, shape: &[usize], data: &[u8]) -> Vec<u8> {
        let fortran = if fortran { "True" } else { "False" };
        let dims: String = shape.iter().map(|d| format!("{d}, ")).collect();
        let mut text = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': ({dims}), }}");
        let padded = (10 + text.len() + 1).next_multiple_of(64) - 10 - 1;
        text.extend(std::iter::repeat_n(' ', padded - text.len()));
        text.push('\n');
        let mut out = b"\x93NUMPY\x01\x00".to_vec();
        out.extend((text.len() as u16).to_le_bytes());
        out.extend(text.as_bytes());
        out.extend(data);
        out
    }

    /// Writes an archive of the given members (names without `.npy`).
    pub(in super::super) fn write_npz(path: &Path, deflate: bool, members: &[(String, Vec<u8>)]) {
        let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
        let method = if deflate { CompressionMethod::Deflated } else { CompressionMethod::Stored };
        for (name, bytes) in members {
            let options = SimpleFileOptions::default().compression_method(method).large_file(true);
            zip.start_file(format!("{name}.npy"), options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
    }

    fn one(descr: &str, fortran: bool, shape: &[usize], data: &[u8], deflate: bool) -> Result<Tensor> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.npz");
        write_npz(&path, deflate, &[("a/kernel".into(), npy(descr, fortran, shape, data))]);
        Npz::open(&path)?.tensor("a/kernel")
    }

    #[test]
    fn every_float_type_and_byte_order_reads_to_the_same_values() {
        let values = [1.5f32, -2.0, 0.0, 96.0, -0.25, 3.0];
        let le = |bytes: &mut dyn FnMut(f32) -> Vec<u8>| {
            values.iter().flat_map(|v| bytes(*v)).collect::<Vec<u8>>()
        };
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("<f4", le(&mut |v| v.to_le_bytes().into())),
            (">f4", le(&mut |v| v.to_be_bytes().into())),
            ("<f8", le(&mut |v| f64::from(v).to_le_bytes().into())),
            (">f8", le(&mut |v| f64::from(v).to_be_bytes().into())),
            ("<f2", le(&mut |v| f16::from_f32(v).to_le_bytes().into())),
            (">f2", le(&mut |v| f16::from_f32(v).to_be_bytes().into())),
            ("|V2", le(&mut |v| bf16::from_f32(v).to_le_bytes().into())),
        ];
        for (descr, data) in cases {
            for deflate in [false, true] {
                let read = one(descr, false, &[2, 3], &data, deflate).unwrap();
                assert_eq!(
                    (read.shape.as_slice(), read.values.as_slice()),
                    (&[2, 3][..], &values[..]),
                    "{descr}"
                );
            }
        }
    }

    #[test]
    fn fortran_order_and_scalars() {
        let data: Vec<u8> = [0f32, 3., 1., 4., 2., 5.].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(one("<f4", true, &[2, 3], &data, false).unwrap().values, [0., 1., 2., 3., 4., 5.]);
        assert_eq!(one("<f4", false, &[], &data[..4], false).unwrap(), Tensor::new(vec![], vec![0.0]));
    }

    #[test]
    fn false_shapes_and_foreign_types_are_errors_that_name_the_tensor() {
        let cases: [(&str, &[usize], &str); 5] = [
            ("<f4", &[usize::MAX, 8], "is absurd"),
            ("<f4", &[1 << 40], "needs 4398046511104 bytes, the archive holds 24"),
            ("<f4", &[5], "needs 20 bytes, the archive holds 24"),
            ("|O", &[6], "pickled Python objects"),
            ("<i4", &[6], "holds `<i4`"),
        ];
        for (descr, shape, expected) in cases {
            let message = one(descr, false, shape, &[0; 24], true).unwrap_err().message().to_string();
            assert!(
                message.contains("w.npz: tensor `a/kernel`: ") && message.contains(expected),
                "{message}"
            );
        }
    }
}
