//! Tables of paths and labels: CSV, TSV, one JSON object per line, or lines of `PATH LABEL`.
//!
//! Columns (keys) are found by name: the picture under `path`, `file_name` and similar names; the class under
//! `label`, `class`, `labels` or `classes`; and an optional split under `split`, `subset` or the like. Several labels are separated
//! by `;` or are a JSON array, and make the data set multi-label. Paths are relative to the manifest's folder
//! and may have backslashes. Labels are names; if all are whole numbers from 0 on, they are class indices.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::data::split::Split;
use crate::error::{At, Error, Result};
use crate::{fail, files};

use super::listing::{Labels, Listing};
use super::split_columns;
use super::{Item, Place, Source, Store};

const PATHS: [&str; 9] =
    ["path", "file_name", "filename", "file", "filepath", "image_path", "image", "imageid", "image_id"];
/// `PredictionString` in ImageNet's `LOC_val_solution.csv` is a class and its boxes.
const BOXES: &str = "predictionstring";
const LABELS: [&str; 5] = ["label", "class", "labels", "classes", BOXES];

/// The form of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Separated by this character.
    Columns(char),
    JsonLines,
    /// A path and a label, separated by spaces or a tab.
    Pairs,
}

impl Form {
    /// By the file's extension.
    pub(super) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "csv" => Some(Form::Columns(',')),
            "tsv" => Some(Form::Columns('\t')),
            "jsonl" | "ndjson" => Some(Form::JsonLines),
            "txt" | "lst" => Some(Form::Pairs),
            _ => None,
        }
    }
}

/// One line of a table.
#[derive(Debug, PartialEq)]
pub(super) struct Row {
    line: usize,
    /// With `/`.
    pub(super) path: String,
    pub(super) labels: Vec<String>,
    pub(super) split: Option<Split>,
}

/// What a table says.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) rows: Vec<Row>,
    /// Whether samples may have several labels.
    pub(super) several: bool,
    /// Sentences about columns.
    pub(super) notes: Vec<String>,
}

/// Lists the pictures of a manifest.
pub(super) fn open(path: &Path, form: Form) -> Result<Source> {
    arrange(path, read(path, form)?)
}

pub(super) fn read(path: &Path, form: Form) -> Result<Table> {
    let text = files::read_text(path)?;
    match form {
        Form::Columns(separator) => columns(&text, separator),
        Form::JsonLines => json_lines(&text),
        Form::Pairs => pairs(&text).map(|rows| Table { rows, ..Table::default() }),
    }
    .map_err(|e| e.at(path.display()))
}

/// Normalises a path: `./` and backslashes are other spellings of the same path.
fn plain_path(path: &str) -> String {
    let path = path.trim().replace('\\', "/");
    path.trim_start_matches("./").to_owned()
}

/// Gives each row its split by a column that says it; returns sentences about the columns.
fn give_splits(rows: &mut [Row], values: impl Fn(&str) -> Option<Vec<String>>) -> Result<Vec<String>> {
    let (splits, notes) = split_columns::read(rows.len(), |row| format!("line {}", rows[row].line), values)?;
    rows.iter_mut().zip(splits).for_each(|(row, split)| row.split = split);
    Ok(notes)
}

/// Lines of a path and a label; of more tab-separated columns, the first two.
fn pairs(text: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let columns = match line.contains('\t') {
            true => {
                let mut columns = line.split('\t').map(str::trim);
                columns.next().zip(columns.next())
            }
            false => line.trim().rsplit_once(char::is_whitespace).map(|(path, label)| (path.trim(), label)),
        };
        let Some((path, label)) = columns.filter(|(path, label)| !path.is_empty() && !label.is_empty())
        else {
            if text.lines().all(|line| line.trim().bytes().all(|b| b.is_ascii_digit())) {
                return Err(Error::new("its lines are only numbers and do not name pictures").hint(
                    "make it a list of `PATH LABEL`, with WordNet ids (`n01440764`) as labels: ILSVRC numbers its \
                     classes in an order of its own",
                ));
            }
            return Err(Error::new(format!(
                "not a folder, a tar archive, a CIFAR binary or a manifest: line {} is not `PATH LABEL`",
                index + 1
            ))
            .hint("see `vitrum pack --help` for what can be packed"));
        };
        rows.push(Row {
            line: index + 1,
            path: plain_path(path),
            labels: vec![label.to_owned()],
            split: None,
        });
    }
    Ok(rows)
}

fn columns(text: &str, separator: char) -> Result<Table> {
    // Spreadsheets write semicolons where the comma is the decimal mark.
    let first = text.lines().next().unwrap_or_default();
    let semicolons = separator == ',' && first.contains(';') && !first.contains(',');
    let separator = if semicolons { ';' } else { separator };
    let mut records = fields(text, separator)?.into_iter();
    let Some((_, head)) = records.next() else { fail!("the manifest is empty") };
    let find =
        |names: &[&str]| head.iter().position(|h| names.contains(&h.trim().to_ascii_lowercase().as_str()));
    let (Some(path), Some(label)) = (find(&PATHS), find(&LABELS)) else {
        return Err(Error::new(format!("its columns are {}", head.join(", ")))
            .hint("the first line names a column `path` (or `file_name`) and a column `label`"));
    };
    // A plural name says that there may be several, even if no row has more than one.
    let is_boxes = head[label].trim().eq_ignore_ascii_case(BOXES);
    let mut several = head[label].trim().to_ascii_lowercase().ends_with('s') && head[label].trim() != "class";
    let (mut rows, mut table) = (Vec::new(), Vec::new());
    for (line, record) in records {
        if record.len() == 1 && record[0].trim().is_empty() {
            continue;
        }
        if record.len() != head.len() {
            fail!("line {line} has {} columns, the first line {}", record.len(), head.len());
        }
        let labels: Vec<String> = match is_boxes {
            true => record[label].split_whitespace().next().map(str::to_owned).into_iter().collect(),
            false => {
                record[label].split(';').map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect()
            }
        };
        several |= labels.len() > 1;
        rows.push(Row { line, path: plain_path(&record[path]), labels, split: None });
        table.push(record);
    }
    let column = |name: &str| {
        let column = find(&[name])?;
        Some(table.iter().map(|record: &Vec<String>| record[column].clone()).collect())
    };
    let notes = give_splits(&mut rows, column)?;
    Ok(Table { rows, several, notes })
}

/// Splits a table into records with their line numbers (RFC 4180: quotes may enclose separators, line breaks
/// and doubled quotes).
fn fields(text: &str, separator: char) -> Result<Vec<(usize, Vec<String>)>> {
    let (mut records, mut record, mut field) = (Vec::new(), Vec::new(), String::new());
    let (mut line, mut first_line, mut quoted) = (1, 1, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        line += usize::from(c == '\n');
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                field.push('"');
                chars.next();
            }
            '"' if quoted => quoted = false,
            '"' if field.is_empty() => quoted = true,
            c if quoted => field.push(c),
            '\r' if chars.peek() == Some(&'\n') => {}
            '\n' => {
                record.push(std::mem::take(&mut field));
                records.push((first_line, std::mem::take(&mut record)));
                first_line = line;
            }
            c if c == separator => record.push(std::mem::take(&mut field)),
            c => field.push(c),
        }
    }
    if quoted {
        fail!("a quote that is opened in the record of line {first_line} is never closed");
    }
    if !field.is_empty() || !record.is_empty() {
        record.push(field);
        records.push((first_line, record));
    }
    Ok(records)
}

fn json_lines(text: &str) -> Result<Table> {
    let (mut rows, mut objects, mut several) = (Vec::new(), Vec::new(), false);
    for (index, text) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let line = index + 1;
        let value: Value = serde_json::from_str(text).at(format!("line {line}"))?;
        let find = |names: &[&str]| names.iter().find_map(|name| value.get(*name));
        let Some(path) = find(&PATHS).and_then(Value::as_str) else {
            fail!("line {line} has no `path`");
        };
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let labels: Option<Vec<String>> = match find(&LABELS) {
            Some(Value::Array(labels)) => {
                several = true;
                labels.iter().map(text).collect()
            }
            Some(label) => text(label).map(|l| vec![l]),
            None => None,
        };
        let Some(labels) = labels else { fail!("line {line} has no `label` that is a text or a number") };
        rows.push(Row { line, path: plain_path(path), labels, split: None });
        objects.push(value);
    }
    let column = |name: &str| {
        let get = |object: &Value| {
            let mut fields = object.as_object()?.iter();
            fields.find(|(key, _)| key.trim().eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
        };
        let value = |object: &Value| match get(object) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text,
            Some(other) => other.to_string(),
        };
        let is_there = objects.iter().any(|object| get(object).is_some());
        is_there.then(|| objects.iter().map(value).collect())
    };
    let notes = give_splits(&mut rows, column)?;
    Ok(Table { rows, several, notes })
}

fn arrange(path: &Path, Table { rows, several, notes }: Table) -> Result<Source> {
    let mut listing = Listing::new(several);
    listing.notes = notes;
    let mut seen = BTreeSet::new();
    listing.notes.extend(split_columns::blank(rows.iter().map(|row| row.split)));
    for row in &rows {
        let at = || format!("{}, line {}", path.display(), row.line);
        if row.path.is_empty() {
            fail!("{}: no path", at());
        }
        if row.path.split('/').any(|part| part == "..") {
            return Err(Error::new(format!("{}: `{}` leaves the manifest's folder", at(), row.path))
                .hint("put the manifest above the pictures, or give absolute paths"));
        }
        if !seen.insert(row.path.as_str()) {
            fail!("{}: `{}` occurs twice", at(), row.path);
        }
        if row.labels.is_empty() && !several {
            fail!("{}: `{}` has no label", at(), row.path);
        }
        let labels: Vec<usize> = row.labels.iter().map(|word| listing.label(word)).collect();
        let mut item = Item::new(row.path.clone(), labels.first().copied().unwrap_or(0), Place::File);
        if several {
            item.several = Some(labels.iter().map(|l| *l as u32).collect());
        }
        listing.push(row.split, item);
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    listing.finish(Labels::NamesOrIndices, Store::new(folder, "folder"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_hold_separators_line_ends_and_quotes() {
        let records = fields("path,label\r\n\"a,\"\"b\"\".jpg\",cat\n\"two\nlines.jpg\",dog", ',').unwrap();
        assert_eq!(records[1], (2, vec!["a,\"b\".jpg".to_owned(), "cat".into()]));
        assert_eq!(records[2], (3, vec!["two\nlines.jpg".to_owned(), "dog".into()]));
        assert!(fields("path,label\n\"a", ',').is_err());
    }

    #[test]
    fn rows_have_one_label_or_several() {
        let Table { rows, several, .. } =
            columns("filename\tclass\n1.jpg\tcat\n\n2.jpg\tdog\n", '\t').unwrap();
        assert_eq!((rows.len(), several, rows[1].labels.as_slice()), (2, false, &["dog".to_owned()][..]));
        let Table { rows, several, .. } =
            columns("path,labels,split\na,cat;dog,train\nb,,val\n", ',').unwrap();
        assert!(several && rows[1].labels.is_empty() && rows[1].split == Some(Split::Val));
        let text = "{\"path\": \"a\", \"label\": 3}\n{\"image\": \"b\", \"label\": \"4\"}\n";
        let Table { rows, several, .. } = json_lines(text).unwrap();
        assert_eq!((rows[0].labels[0].as_str(), rows[1].path.as_str(), several), ("3", "b", false));
        let text = "path,label,subset\na,cat,Training\nb,dog,Validation\nc,cat,TESTING\nd,dog,\n";
        let splits = |text: &str| {
            columns(text, ',').map(|table| table.rows.iter().map(|r| r.split).collect::<Vec<_>>())
        };
        let named = vec![Some(Split::Train), Some(Split::Val), Some(Split::Test), None];
        assert_eq!(splits(text).unwrap(), named);
        assert_eq!(splits(&text.replace(',', ";")).unwrap(), named);
        // A column of this name may hold something else; one that is called `split` may not.
        assert_eq!(splits(&text.replace("TESTING", "indoor")).unwrap(), [None; 4]);
        assert!(splits(&text.replace("TESTING", "indoor").replace("subset", "split")).is_err());
        let text = "{\"path\": \"a\", \"label\": 3, \"set\": \"val\"}\n{\"path\": \"b\", \"label\": 4}\n";
        let Table { rows, .. } = json_lines(text).unwrap();
        assert_eq!([rows[0].split, rows[1].split], [Some(Split::Val), None]);
        for text in ["", "path\na", "path,label\na", "a,b\n1,2"] {
            assert!(columns(text, ',').is_err(), "{text:?}");
        }
        for text in
            ["{", "{\"path\": 1, \"label\": 2}", "{\"path\": \"a\"}", "{\"path\": \"a\", \"label\": [{}]}"]
        {
            assert!(json_lines(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn columns_that_look_like_splits_are_obeyed_or_named() {
        use Split::{Test, Train, Val};
        let read = |text: &str| {
            let table = columns(text, ',').unwrap();
            (table.rows.iter().map(|row| row.split).collect::<Vec<_>>(), table.notes.join("\n"))
        };
        for (head, values, expected) in [
            ("is_train", ["1", "0", "1"], [Train, Val, Train]),
            ("is_valid", ["False", "True", "False"], [Train, Val, Train]),
            ("is_test", ["0", "0", "yes"], [Train, Train, Test]),
            ("is_train,is_val", ["1,0", "0,1", "0,0"], [Train, Val, Test]),
            ("is_val,is_test", ["1,0", "0,1", "0,0"], [Val, Test, Train]),
        ] {
            let rows = values.iter().enumerate().map(|(i, value)| format!("{i},cat,{value}\n"));
            let (splits, notes) = read(&format!("path,label,{head}\n{}", rows.collect::<String>()));
            assert_eq!(splits, expected.map(Some), "{head}");
            assert!(
                notes.starts_with(&format!("splits by column `{}`: ", head.replace(',', "`, `"))),
                "{notes}"
            );
            assert_eq!(notes.lines().count(), 1);
        }
        let whole = columns("path,label,is_train,is_val,is_test\na,b,1,0,0\nc,d,0,0,1\n", ',').unwrap();
        assert_eq!((whole.rows[1].split, whole.notes.len()), (Some(Test), 0), "nothing is left open");
        for (head, values, why) in [
            ("fold", ["0", "1"], "column `fold` is not used: line 2: there is no split `0`"),
            ("is_train", ["1", "maybe"], "column `is_train` is not used: line 3: `maybe` is neither 0 nor 1"),
            ("is_train,is_val", ["1,1", "0,1"], "`is_train`, `is_val` is not used: line 2 is of two splits"),
            ("phase", ["full", "new"], "column `phase` is not used: line 2: there is no split `full`"),
        ] {
            let (splits, notes) =
                read(&format!("path,label,{head}\na,cat,{}\nb,dog,{}\n", values[0], values[1]));
            assert!(
                splits == [None; 2] && notes.contains(why) && notes.lines().count() == 1,
                "{head}: {notes}"
            );
        }
        // The first column that holds splits wins; another is named unless it says the same.
        let (splits, notes) = read("path,label,is_valid,split\na,cat,0,train\nb,dog,0,val\n");
        assert_eq!(splits, [Some(Train), Some(Val)]);
        assert_eq!(notes, "column `is_valid` is not used: the splits are those of `split`");
        assert_eq!(read("path,label,is_valid,split\na,cat,0,train\nb,dog,1,val\n").1, "");
        assert_eq!(
            read("path,label,fold\na,cat,\nb,dog,\n"),
            (vec![None; 2], String::new()),
            "nothing in it"
        );
        let lines = "{\"path\": \"a\", \"label\": 1, \"is_valid\": true}\n{\"path\": \"b\", \"label\": 2, \"is_valid\": false}\n";
        let rows = json_lines(lines).unwrap().rows;
        assert_eq!([rows[0].split, rows[1].split], [Some(Val), Some(Train)]);
    }
}
