//! Parquet files with a column of encoded pictures, as on the HuggingFace hub: `image` is a group with
//! `bytes`, or the bytes themselves; `label` is a number or a text. A column may say each row's split, as in tables;
//! else files named like a split belong to that split.
//!
//! Pictures are read one row group at a time, and the last group is kept: a pack reads in order, and training
//! directly from Parquet is not supported.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde_json::Value;

use crate::error::{At, Error, Result};
use crate::fail;

use super::listing::{Labels, Listing};
use super::split_columns;
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

/// A projection to the column of this name, in any case, if there is one of plain values.
fn plain_column(reader: &SerializedFileReader<File>, name: &str) -> Result<Option<Type>> {
    let root = reader.metadata().file_metadata().schema();
    let is_it = |field: &&TypePtr| field.is_primitive() && field.name().trim().eq_ignore_ascii_case(name);
    let found = root.get_fields().iter().find(is_it);
    let only =
        |field: &TypePtr| Type::group_type_builder(root.name()).with_fields(vec![field.clone()]).build();
    found.map(only).transpose().at("its schema")
}

/// The values of the one column of a projection, as texts, by row group. A null is an empty text.
fn texts(
    reader: &SerializedFileReader<File>,
    column: &Type,
) -> std::result::Result<Vec<Vec<String>>, ParquetError> {
    let text = |row: Row| match row.get_column_iter().next() {
        Some((_, Field::Str(text))) => text.clone(),
        Some((_, Field::Null)) | None => String::new(),
        Some((_, field)) => field.to_string(),
    };
    let of_group = |group: usize| {
        let group = reader.get_row_group(group)?;
        let rows = group.get_row_iter(Some(column.clone()))?;
        rows.map(|row| row.map(text)).collect()
    };
    (0..reader.num_row_groups()).map(of_group).collect()
}

/// Lists rows, labels and splits; no picture is read.
pub(super) fn open(path: &Path, files: &[PathBuf]) -> Result<Source> {
    let mut rows = Vec::new();
    let mut names: Option<Vec<String>> = None;
    let mut columns: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (file, path) in files.iter().enumerate() {
        let reader = reader(path)?;
        names = names.or_else(|| class_names(&reader));
        let labels = projection(&reader, &LABELS).map_err(|e| e.at(path.display()))?;
        let first = rows.len();
        for (group, texts) in texts(&reader, &labels).at(path.display())?.into_iter().enumerate() {
            for (row, text) in texts.into_iter().enumerate() {
                rows.push((Place::Row { file, group, row }, text));
            }
        }
        for name in split_columns::names() {
            let Some(column) = plain_column(&reader, name)? else { continue };
            let texts = texts(&reader, &column).at(path.display())?;
            // A file without the column has no splits.
            let values = columns.entry(name).or_default();
            values.resize(first, String::new());
            values.extend(texts.into_iter().flatten());
        }
    }
    columns.values_mut().for_each(|values| values.resize(rows.len(), String::new()));
    let place = |row: usize| match &rows[row].0 {
        Place::Row { file, group, row } => format!("{}, group {group}, row {row}", files[*file].display()),
        _ => format!("row {row}"),
    };
    let (splits, notes) = split_columns::read(rows.len(), place, |name| columns.get(name).cloned())?;
    let mut listing = Listing::default();
    listing.notes = notes;
    let numbers: Option<Vec<usize>> =
        rows.iter().map(|(_, t)| t.parse().ok().filter(|n| *n < 1 << 22)).collect();
    // If the file names its classes, a number is the index of its name.
    let names = names.filter(|names| numbers.as_ref().is_some_and(|ns| ns.iter().all(|n| *n < names.len())));
    names.iter().flatten().for_each(|name| listing.give(name.clone()));
    let mut given = Vec::new();
    for (i, (place, text)) in rows.into_iter().enumerate() {
        let Place::Row { file, group, row } = place else { continue };
        let label = match (&numbers, &names) {
            (Some(numbers), Some(_)) => numbers[i],
            _ => listing.label(&text),
        };
        let name = files[file].file_name().unwrap_or_default().to_string_lossy().into_owned();
        let split = splits[i].or_else(|| Split::of(&name).filter(|_| path.is_dir()));
        given.push(split);
        listing.push(split, Item::new(format!("{name}:{group}:{row}"), label, place));
    }
    listing.notes.extend(split_columns::blank(given.into_iter()));
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

    #[test]
    fn a_column_says_the_split_as_in_tables() {
        let temp = tempfile::tempdir().unwrap();
        let write = |file: &str, column: &str, values: &[&str]| {
            let schema = format!(
                "message m {{ required binary bytes; required int64 label; required binary {column} (UTF8); }}"
            );
            let schema = Arc::new(parse_message_type(&schema).unwrap());
            let out = File::create(temp.path().join(file)).unwrap();
            let mut writer = SerializedFileWriter::new(out, schema, Default::default()).unwrap();
            let mut rows = writer.next_row_group().unwrap();
            let mut of_splits = false;
            while let Some(mut column) = rows.next_column().unwrap() {
                match column.untyped() {
                    ColumnWriter::ByteArrayColumnWriter(column) => {
                        let value = |text: &&str| match of_splits {
                            true => ByteArray::from(text.as_bytes().to_vec()),
                            false => png(0).into(),
                        };
                        let values: Vec<ByteArray> = values.iter().map(value).collect();
                        column.write_batch(&values, None, None).unwrap();
                        of_splits = true;
                    }
                    ColumnWriter::Int64ColumnWriter(column) => {
                        let labels: Vec<i64> = (0..values.len() as i64).map(|i| i % 2).collect();
                        column.write_batch(&labels, None, None).unwrap();
                    }
                    _ => panic!("another column"),
                }
                column.close().unwrap();
            }
            rows.close().unwrap();
            writer.close().unwrap();
            temp.path().join(file)
        };
        let lens = |path: &Path| {
            let source = Source::open(path).unwrap();
            (Split::ALL.map(|split| source.items(split).len()), source.notes().join("\n"))
        };
        let file = write("all.parquet", "Split", &["train", "validation", "train", "test", "train"]);
        assert_eq!(lens(&file).0, [3, 1, 1]);
        let file = write("flags.parquet", "is_train", &["1", "0", "1"]);
        let (parts, notes) = lens(&file);
        assert_eq!(parts, [2, 1, 0]);
        assert!(notes.contains("splits by column `is_train`: 2 rows for train, 1 for val"), "{notes}");
        let file = write("fold.parquet", "fold", &["1", "2", "3"]);
        let (parts, notes) = lens(&file);
        // Without splits, every part is the whole.
        assert_eq!(parts, [3, 3, 3]);
        assert!(notes.contains("column `fold` is not used"), "{notes}");
        let file = write("odd.parquet", "split", &["train", "later"]);
        let error = Source::open(&file).unwrap_err();
        assert!(error.message().contains("group 0, row 1: there is no split `later`"), "{error}");
    }
}
