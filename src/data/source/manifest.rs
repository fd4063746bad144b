//! Tables of paths and labels: CSV, TSV, or one JSON object a line.
//!
//! Columns (keys) are found by name: the picture under `path`, `file`, `filename`, `image` or `image_path`; the class
//! under `label`, `class`, `labels` or `classes`; and a split, if there is one, under `split`. Several labels are separated
//! by `;` or are a JSON array, and make the data set multi-label. Paths are relative to the manifest's folder. A label is a
//! name; where all are whole numbers they are class indices.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::data::dataset::Split;
use crate::error::{At, Error, Result};
use crate::{fail, files};

use super::{Item, Parts, Place, Source, Store, StoreKind};

const PATHS: [&str; 5] = ["path", "file", "filename", "image", "image_path"];
const LABELS: [&str; 4] = ["label", "class", "labels", "classes"];

/// The form of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Separated by this.
    Columns(char),
    JsonLines,
}

impl Form {
    /// By the file's extension.
    pub(super) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "csv" => Some(Form::Columns(',')),
            "tsv" => Some(Form::Columns('\t')),
            "jsonl" | "ndjson" => Some(Form::JsonLines),
            _ => None,
        }
    }
}

/// One line of a table.
#[derive(Debug, PartialEq)]
struct Row {
    line: usize,
    path: String,
    labels: Vec<String>,
    split: Option<String>,
}

/// Lists what a manifest names.
pub(super) fn open(path: &Path, form: Form) -> Result<Source> {
    let text = files::read_text(path)?;
    let (rows, several) = match form {
        Form::Columns(separator) => columns(&text, separator),
        Form::JsonLines => json_lines(&text),
    }
    .map_err(|e| e.at(path.display()))?;
    arrange(path, rows, several)
}

/// Rows, and whether samples may have several labels.
fn columns(text: &str, separator: char) -> Result<(Vec<Row>, bool)> {
    let mut records = fields(text.trim_start_matches('\u{feff}'), separator)?.into_iter();
    let Some((_, head)) = records.next() else { fail!("the manifest is empty") };
    let find =
        |names: &[&str]| head.iter().position(|h| names.contains(&h.trim().to_ascii_lowercase().as_str()));
    let (Some(path), Some(label)) = (find(&PATHS), find(&LABELS)) else {
        return Err(Error::new(format!("its columns are {}", head.join(", ")))
            .hint("the first line names a column `path` and a column `label`"));
    };
    let split = find(&["split"]);
    // The plural says that there may be several, even where no row has more than one.
    let mut several = head[label].trim().to_ascii_lowercase().ends_with('s') && head[label].trim() != "class";
    let mut rows = Vec::new();
    for (line, record) in records {
        if record.len() == 1 && record[0].trim().is_empty() {
            continue;
        }
        if record.len() != head.len() {
            fail!("line {line} has {} columns, the first line {}", record.len(), head.len());
        }
        let labels: Vec<String> =
            record[label].split(';').map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect();
        several |= labels.len() > 1;
        let split = split.map(|i| record[i].trim().to_ascii_lowercase());
        rows.push(Row { line, path: record[path].trim().to_owned(), labels, split });
    }
    Ok((rows, several))
}

/// Splits a table into records with their line numbers (RFC 4180: quotes may hold separators, line ends and, doubled,
/// quotes).
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
    let (mut rows, mut several) = (Vec::new(), false);
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
        let split = value.get("split").and_then(Value::as_str).map(str::to_ascii_lowercase);
        rows.push(Row { line, path: path.to_owned(), labels, split });
    }
    Ok((rows, several))
}

fn arrange(path: &Path, rows: Vec<Row>, several: bool) -> Result<Source> {
    let names: BTreeSet<&str> = rows.iter().flat_map(|r| &r.labels).map(String::as_str).collect();
    let numbers: Option<Vec<usize>> = names.iter().map(|n| n.parse().ok().filter(|n| *n < 1 << 22)).collect();
    let classes: Vec<String> = match numbers.as_deref() {
        Some(numbers) => (0..=numbers.iter().copied().max().unwrap_or(0)).map(|n| n.to_string()).collect(),
        None => names.iter().map(ToString::to_string).collect(),
    };
    let is_numbered = numbers.is_some();
    let label = |name: &str| match is_numbered {
        true => name.parse().expect("all names are numbers"),
        false => classes.binary_search_by(|c| c.as_str().cmp(name)).expect("its class was just collected"),
    };
    let (mut train, mut val, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
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
            fail!("{}: `{}` is there twice", at(), row.path);
        }
        if row.labels.is_empty() && !several {
            fail!("{}: `{}` has no label", at(), row.path);
        }
        let labels: Vec<usize> = row.labels.iter().map(|l| label(l)).collect();
        let mut item = Item::new(row.path.clone(), labels.first().copied().unwrap_or(0), Place::File);
        if several {
            item.several = Some(labels.iter().map(|l| *l as u32).collect());
        }
        match row.split.as_deref() {
            None | Some("train" | "") => train.push(item),
            Some(split) if Split::Val.folders().contains(&split) => val.push(item),
            Some(other) => {
                return Err(Error::new(format!("{}: there is no split `{other}`", at()))
                    .hint("use `train`, `val`, `validation` or `test`"));
            }
        }
    }
    let parts = match (train.is_empty(), val.is_empty()) {
        (false, false) => Parts::Split { train, val },
        (true, _) => Parts::Whole(val),
        _ => Parts::Whole(train),
    };
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let mut source = Source::new(classes, parts, Store { path: folder, kind: StoreKind::Folder });
    source.is_multi_label = several;
    Ok(source)
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
        assert!(several && rows[1].labels.is_empty() && rows[1].split.as_deref() == Some("val"));
        let text = "{\"path\": \"a\", \"label\": 3}\n{\"image\": \"b\", \"label\": \"4\"}\n";
        let (rows, several) = json_lines(text).unwrap();
        assert_eq!((rows[0].labels[0].as_str(), rows[1].path.as_str(), several), ("3", "b", false));
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
