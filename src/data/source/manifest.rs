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
use super::{Item, Place, Source, Store};

const PATHS: [&str; 9] =
    ["path", "file_name", "filename", "file", "filepath", "image_path", "image", "imageid", "image_id"];
/// `PredictionString` in ImageNet's `LOC_val_solution.csv` is a class and its boxes.
const BOXES: &str = "predictionstring";
const LABELS: [&str; 5] = ["label", "class", "labels", "classes", BOXES];

/// How the error for an unknown split begins.
pub(super) const NO_SPLIT: &str = "there is no split";

/// The column of the split.
const SPLIT: &str = "split";
/// Columns that are the split's if each of their values is one.
const PERHAPS_SPLIT: [&str; 5] = ["subset", "set", "partition", "phase", "usage"];

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

/// Lists the pictures of a manifest.
pub(super) fn open(path: &Path, form: Form) -> Result<Source> {
    let (rows, several) = read(path, form)?;
    arrange(path, rows, several)
}

/// The rows of a table, and whether samples may have several labels.
pub(super) fn read(path: &Path, form: Form) -> Result<(Vec<Row>, bool)> {
    let text = files::read_text(path)?;
    // A byte order mark, as editors on other systems write.
    let text = text.trim_start_matches('\u{feff}');
    match form {
        Form::Columns(separator) => columns(text, separator),
        Form::JsonLines => json_lines(text),
        Form::Pairs => pairs(text).map(|rows| (rows, false)),
    }
    .map_err(|e| e.at(path.display()))
}

/// Normalises a path: `./` and backslashes are other spellings of the same path.
fn plain_path(path: &str) -> String {
    let path = path.trim().replace('\\', "/");
    path.trim_start_matches("./").to_owned()
}

/// The split that a value names; none for an empty one.
fn split_of(value: &str) -> Result<Option<Split>> {
    match (value.trim(), Split::of_word(value)) {
        ("", _) => Ok(None),
        (_, Some(split)) => Ok(Some(split)),
        (value, None) => Err(Error::new(format!("{NO_SPLIT} `{value}`"))
            .hint("use `train`, `val` (`validation`, `dev`) or `test`")),
    }
}

/// Gives each row its split, by the first column that holds splits. `values` are those of a column, a value for each row. An
/// unknown value is an error in the column [`SPLIT`]; any other column then holds something else.
fn give_splits(rows: &mut [Row], values: impl Fn(&str) -> Option<Vec<String>>) -> Result<()> {
    for name in [SPLIT].iter().chain(&PERHAPS_SPLIT) {
        let Some(values) = values(name) else { continue };
        let of =
            |(row, value): (&Row, &String)| split_of(value).map_err(|e| e.at(format!("line {}", row.line)));
        match rows.iter().zip(&values).map(of).collect::<Result<Vec<_>>>() {
            Ok(splits) => {
                rows.iter_mut().zip(splits).for_each(|(row, split)| row.split = split);
                return Ok(());
            }
            Err(error) if *name == SPLIT => return Err(error),
            Err(_) => {}
        }
    }
    Ok(())
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

/// Rows, and whether samples may have several labels.
fn columns(text: &str, separator: char) -> Result<(Vec<Row>, bool)> {
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
    give_splits(&mut rows, column)?;
    Ok((rows, several))
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

fn json_lines(text: &str) -> Result<(Vec<Row>, bool)> {
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
        let value = |object: &Value| match object.get(name) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        let is_there = objects.iter().any(|object| object.get(name).is_some());
        is_there.then(|| objects.iter().map(value).collect())
    };
    give_splits(&mut rows, column)?;
    Ok((rows, several))
}

fn arrange(path: &Path, rows: Vec<Row>, several: bool) -> Result<Source> {
    let mut listing = Listing::new(several);
    let mut seen = BTreeSet::new();
    let blank = rows.iter().filter(|row| row.split.is_none()).count();
    if (1..rows.len()).contains(&blank) {
        listing.notes.push(format!(
            "{} of {} rows have no split: they are used for training",
            blank,
            rows.len()
        ));
    }
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
        let (rows, several) = columns("filename\tclass\n1.jpg\tcat\n\n2.jpg\tdog\n", '\t').unwrap();
        assert_eq!((rows.len(), several, rows[1].labels.as_slice()), (2, false, &["dog".to_owned()][..]));
        let (rows, several) = columns("path,labels,split\na,cat;dog,train\nb,,val\n", ',').unwrap();
        assert!(several && rows[1].labels.is_empty() && rows[1].split == Some(Split::Val));
        let text = "{\"path\": \"a\", \"label\": 3}\n{\"image\": \"b\", \"label\": \"4\"}\n";
        let (rows, several) = json_lines(text).unwrap();
        assert_eq!((rows[0].labels[0].as_str(), rows[1].path.as_str(), several), ("3", "b", false));
        let text = "path,label,subset\na,cat,Training\nb,dog,Validation\nc,cat,TESTING\nd,dog,\n";
        let splits =
            |text: &str| columns(text, ',').map(|(rows, _)| rows.iter().map(|r| r.split).collect::<Vec<_>>());
        let named = vec![Some(Split::Train), Some(Split::Val), Some(Split::Test), None];
        assert_eq!(splits(text).unwrap(), named);
        assert_eq!(splits(&text.replace(',', ";")).unwrap(), named);
        // A column of this name may hold something else; one that is called `split` may not.
        assert_eq!(splits(&text.replace("TESTING", "indoor")).unwrap(), [None; 4]);
        assert!(splits(&text.replace("TESTING", "indoor").replace("subset", "split")).is_err());
        let text = "{\"path\": \"a\", \"label\": 3, \"set\": \"val\"}\n{\"path\": \"b\", \"label\": 4}\n";
        let (rows, _) = json_lines(text).unwrap();
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
}
