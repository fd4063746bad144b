//! Parquet files with a column of encoded pictures, as on the HuggingFace hub: `image` is a group with
//! `bytes`, or the bytes themselves; `label` is a number or a text. Files named like a split belong to that
//! split.
//!
//! Pictures are read one row group at a time, and the last group is kept: a pack reads in order, and training
//! directly from Parquet is not supported.

use std::borrow::Cow;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde_json::Value;

use crate::error::{At, Error, Result};
use crate::fail;

use super::listing::{Labels, Listing};
use super::{Item, Place, Source, Store};
use crate::data::split::Split;

const IMAGES: [&str; 3] = ["image", "img", "bytes"];
const LABELS: [&str; 4] = ["label", "labels", "fine_label", "class"];

/// The pictures of one row group, by file and group.
type Group = ((usize, usize), Arc<Vec<Vec<u8>>>);

/// Open files, and the row group that was read last.
#[derive(Debug, Default)]
pub(super) struct Files {
    paths: Vec<PathBuf>,
    last: Mutex<Option<Group>>,
}

/// The Parquet file that `path` is, or those of the folder, sorted.
pub(super) fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    let is_parquet = |path: &Path| path.extension().is_some_and(|e| e == "parquet");
    if !path.is_dir() {
        return Ok(if is_parquet(path) { vec![path.to_owned()] } else { Vec::new() });
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).at(path.display())? {
        let entry = entry.at(path.display())?.path();
        if is_parquet(&entry) {
            found.push(entry);
        }
    }
    found.sort();
    Ok(found)
}

fn reader(path: &Path) -> Result<SerializedFileReader<File>> {
    SerializedFileReader::new(File::open(path).at(path.display())?).at(path.display())
}

/// A projection to the first column with one of these names.
fn projection(reader: &SerializedFileReader<File>, names: &[&str]) -> Result<Type> {
    let root = reader.metadata().file_metadata().schema();
    let fields: &[TypePtr] = root.get_fields();
    let Some(field) = names.iter().find_map(|name| fields.iter().find(|f| f.name() == *name)) else {
        let columns: Vec<&str> = fields.iter().map(|f| f.name()).collect();
        fail!("its columns are {}, and none is called {}", columns.join(", "), names.join(" or "));
    };
    Type::group_type_builder(root.name()).with_fields(vec![field.clone()]).build().at("its schema")
}

/// Lists rows and labels; no picture is read.
pub(super) fn open(path: &Path, files: &[PathBuf]) -> Result<Source> {
    let mut rows = Vec::new();
    let mut names: Option<Vec<String>> = None;
    for (file, path) in files.iter().enumerate() {
        let reader = reader(path)?;
        names = names.or_else(|| class_names(&reader));
        let labels = projection(&reader, &LABELS).map_err(|e| e.at(path.display()))?;
        for group in 0..reader.num_row_groups() {
            let group_reader = reader.get_row_group(group).at(path.display())?;
            let iterator = group_reader.get_row_iter(Some(labels.clone())).at(path.display())?;
            for (row, record) in iterator.enumerate() {
                let record = record.at(path.display())?;
                let text = match record.get_column_iter().next() {
                    Some((_, Field::Str(text))) => text.clone(),
                    Some((_, field)) => field.to_string(),
                    None => String::new(),
                };
                rows.push((Place::Row { file, group, row }, text));
            }
        }
    }
    let mut listing = Listing::default();
    let numbers: Option<Vec<usize>> =
        rows.iter().map(|(_, t)| t.parse().ok().filter(|n| *n < 1 << 22)).collect();
    // If the file names its classes, a number is the index of its name.
    let names = names.filter(|names| numbers.as_ref().is_some_and(|ns| ns.iter().all(|n| *n < names.len())));
    names.iter().flatten().for_each(|name| listing.give(name.clone()));
    for (i, (place, text)) in rows.into_iter().enumerate() {
        let Place::Row { file, group, row } = place else { continue };
        let label = match (&numbers, &names) {
            (Some(numbers), Some(_)) => numbers[i],
            _ => listing.label(&text),
        };
        let name = files[file].file_name().unwrap_or_default().to_string_lossy().into_owned();
        let split = if path.is_dir() { Split::of(&name) } else { None };
        listing.push(split, Item::new(format!("{name}:{group}:{row}"), label, place));
    }
    let files = Files { paths: files.to_vec(), last: Mutex::default() };
    let labels = if names.is_some() { Labels::Given } else { Labels::NamesOrIndices };
    listing.finish(labels, Store { parquet: files, ..Store::new(path, "parquet") })
}

/// What the hub stores beside the schema.
fn class_names(reader: &SerializedFileReader<File>) -> Option<Vec<String>> {
    let pairs = reader.metadata().file_metadata().key_value_metadata()?;
    let text = pairs.iter().find(|pair| pair.key == "huggingface")?.value.as_ref()?;
    let about: Value = serde_json::from_str(text).ok()?;
    let features = about.get("info")?.get("features")?;
    let names = LABELS.iter().find_map(|label| features.get(*label)?.get("names")?.as_array())?;
    names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}

impl Files {
    /// The encoded bytes of a row's picture.
    pub(super) fn read(&self, file: usize, group: usize, row: usize) -> Result<Cow<'_, [u8]>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let pictures = match &*last {
            Some((key, pictures)) if *key == (file, group) => pictures.clone(),
            _ => {
                let pictures = Arc::new(self.read_group(file, group)?);
                *last = Some(((file, group), pictures.clone()));
                pictures
            }
        };
        drop(last);
        match pictures.get(row) {
            Some(bytes) => Ok(Cow::Owned(bytes.clone())),
            None => Err(Error::new(format!("row group {group} has no row {row}"))),
        }
    }

    fn read_group(&self, file: usize, group: usize) -> Result<Vec<Vec<u8>>> {
        let path = &self.paths[file];
        let reader = reader(path)?;
        let images = projection(&reader, &IMAGES).map_err(|e| e.at(path.display()))?;
        let group_reader = reader.get_row_group(group).at(path.display())?;
        let rows = group_reader.get_row_iter(Some(images)).at(path.display())?;
        rows.map(|row| Ok(picture(&row.at(path.display())?).unwrap_or_default())).collect()
    }
}

/// The bytes of the row's one column: the column itself, or its field `bytes`.
fn picture(row: &Row) -> Option<Vec<u8>> {
    match row.get_column_iter().next()?.1 {
        Field::Bytes(bytes) => Some(bytes.data().to_vec()),
        Field::Group(group) => match group.get_column_iter().find(|(name, _)| *name == "bytes")?.1 {
            Field::Bytes(bytes) => Some(bytes.data().to_vec()),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use parquet::column::writer::ColumnWriter;
    use parquet::data_type::ByteArray;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;
    use crate::data::shard::Record;

    /// A PNG of one pixel.
    fn png(colour: u8) -> Vec<u8> {
        crate::data::encode_png(crate::data::picture::View::new(&[colour; 3], 1, 1)).unwrap()
    }

    #[test]
    fn pictures_and_labels_come_from_their_rows() {
        let temp = tempfile::tempdir().unwrap();
        let schema = "message m { optional group image { optional binary bytes; optional binary path (UTF8); } \
                      optional int64 label; }";
        for (file, first) in [("train-0.parquet", 0u8), ("test-0.parquet", 100)] {
            let schema = Arc::new(parse_message_type(schema).unwrap());
            let out = File::create(temp.path().join(file)).unwrap();
            let mut writer = SerializedFileWriter::new(out, schema, Default::default()).unwrap();
            for group in 0..2u8 {
                let mut rows = writer.next_row_group().unwrap();
                let mut index = 0;
                while let Some(mut column) = rows.next_column().unwrap() {
                    match column.untyped() {
                        ColumnWriter::ByteArrayColumnWriter(column) => {
                            let value =
                                |i: u8| if index == 0 { png(first + group * 10 + i) } else { vec![b'x'] };
                            let values: Vec<ByteArray> = (0..3).map(|i| value(i).into()).collect();
                            column.write_batch(&values, Some(&[2; 3]), None).unwrap();
                        }
                        ColumnWriter::Int64ColumnWriter(column) => {
                            column.write_batch(&[0, 1, 0], Some(&[1; 3]), None).unwrap();
                        }
                        _ => panic!("another column"),
                    }
                    column.close().unwrap();
                    index += 1;
                }
                rows.close().unwrap();
            }
            writer.close().unwrap();
        }
        let source = Source::open(temp.path()).unwrap();
        assert_eq!((source.classes.len(), source.is_split()), (2, true));
        for (split, first) in [(Split::Train, 0), (Split::Val, 100)] {
            let items = source.items(split);
            assert_eq!(items.iter().map(|i| i.label).collect::<Vec<_>>(), [0, 1, 0, 0, 1, 0]);
            // Backwards, too: the group that was read last is not the one that is needed next.
            for (i, item) in items.iter().enumerate().rev() {
                let colour = first + i as u8 / 3 * 10 + i as u8 % 3;
                assert_eq!(
                    source.store.read(item).unwrap(),
                    Record::Encoded(png(colour).into()),
                    "{}",
                    item.name
                );
            }
        }
        fs::write(temp.path().join("val-9.parquet"), b"PAR1 and no more").unwrap();
        assert!(Source::open(temp.path()).unwrap_err().message().contains("val-9.parquet"));
    }
}
