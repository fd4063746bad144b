//! Label lists beside pictures: a table in the folder that names pictures and their classes, such as
//! `metadata.csv` of the HuggingFace hub, `val.txt` beside ImageNet's flat validation folder, or `labels.csv`
//! beside `images/`.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use crate::data::split::Split;
use crate::error::{Error, Result};
use crate::fail;

use super::folder::Paths;
use super::listing::Listing;
use super::manifest::{self, Form, Table};
use super::split_columns;
use super::strays::{count, named};
use super::{Item, Place};

/// Pictures that tables name.
#[derive(Default)]
pub(super) struct Lists {
    rows: Vec<Row>,
    several: bool,
    notes: Vec<String>,
}

struct Row {
    table: String,
    split: Option<Split>,
    name: String,
    place: Place,
    labels: Vec<String>,
}

/// Takes the pictures with labels in tables out of `paths`, and these tables out of `others`.
pub(super) fn take(root: &Path, paths: &mut Paths, others: &mut Vec<String>) -> Result<Lists> {
    let mut lists = Lists::default();
    let tops: BTreeSet<String> =
        paths.files.iter().filter_map(|(name, _)| Some(name.split_once('/')?.0.to_owned())).collect();
    let mut folders: Vec<(String, Option<Split>)> = tops
        .iter()
        .filter_map(|top| Some((format!("{top}/"), Some(Split::of_word(top)?))))
        .filter(|(prefix, _)| paths.files.iter().any(|(name, _)| name.starts_with(prefix.as_str())))
        .collect();
    if folders.is_empty() {
        folders.push((String::new(), None));
    }
    for (prefix, split) in folders {
        let inside: BTreeSet<&str> = (paths.files.iter())
            .filter_map(|(name, _)| Some(name.strip_prefix(prefix.as_str())?.split_once('/')?.0))
            .collect();
        let is_flat = inside.len() < 2;
        for table in tables(&prefix, split, is_flat, others) {
            // A table without labels says something else about the pictures.
            let form = Form::of(Path::new(&table)).expect("it was found by its ending");
            let file = root.join(&table);
            let Table { rows, several, notes } = match manifest::read(&file, form) {
                Ok(read) => read,
                Err(error) if is_flat && error.hint_text().is_some_and(|hint| hint.contains("WordNet")) => {
                    return Err(error);
                }
                Err(error) if error.message().contains(split_columns::NO_SPLIT) => return Err(error),
                Err(_) => continue,
            };
            let of_table = Split::of(table.rsplit('/').next().unwrap_or_default());
            if lists.match_rows(rows, &table, &prefix, split.or(of_table), paths) {
                lists.several |= several;
                lists.notes.extend(notes.into_iter().map(|note| format!("`{table}`: {note}")));
                others.retain(|name| *name != table);
            }
        }
    }
    Ok(lists)
}

/// Tables that may list the pictures of a folder: `metadata` in any folder; in a folder without class
/// folders, its only table, or the tables at the top that are named like the split.
fn tables(prefix: &str, split: Option<Split>, is_flat: bool, others: &[String]) -> Vec<String> {
    let is_table = |name: &&String| Form::of(Path::new(name)).is_some();
    let here: Vec<&String> = (others.iter().filter(is_table))
        .filter(|name| name.strip_prefix(prefix).is_some_and(|rest| !rest.contains('/')))
        .collect();
    let metadata = ["metadata.csv", "metadata.jsonl"].map(|name| format!("{prefix}{name}"));
    if let Some(name) = metadata.iter().find(|name| here.contains(name)) {
        return vec![name.clone()];
    }
    if !is_flat {
        return Vec::new();
    }
    if !prefix.is_empty() {
        let at_top = others.iter().filter(is_table).filter(|name| !name.contains('/'));
        let of_part: Vec<&String> = at_top.filter(|name| Split::of(name) == split).collect();
        return if here.is_empty() { of_part } else { here }.into_iter().cloned().collect();
    }
    let of_parts: Vec<String> =
        here.iter().filter(|name| Split::of(name).is_some()).map(|n| (*n).clone()).collect();
    match (here.as_slice(), of_parts.is_empty()) {
        ([one], _) => vec![(*one).clone()],
        (_, false) => of_parts,
        _ => Vec::new(),
    }
}

impl Lists {
    /// Moves the named pictures out of the paths. False if the rows name none that exist.
    fn match_rows(
        &mut self,
        rows: Vec<manifest::Row>,
        table: &str,
        prefix: &str,
        split: Option<Split>,
        paths: &mut Paths,
    ) -> bool {
        let mut found = HashMap::new();
        for (at, (name, _)) in paths.files.iter().enumerate() {
            let Some(rest) = name.strip_prefix(prefix) else { continue };
            let base = rest.rsplit('/').next().unwrap_or(rest);
            let stem = base.rsplit_once('.').map_or(base, |(stem, _)| stem);
            for key in [stem, base, rest] {
                found.insert(key.to_owned(), at);
            }
        }
        let here = |row: &manifest::Row| {
            let base = row.path.rsplit('/').next().unwrap_or(&row.path);
            found.get(row.path.strip_prefix(prefix).unwrap_or(&row.path)).or_else(|| found.get(base)).copied()
        };
        let mut missing = Vec::new();
        let mut taken = BTreeSet::new();
        let before = self.rows.len();
        for row in rows {
            match here(&row) {
                Some(at) if taken.insert(at) => {
                    let (name, place) = paths.files[at].clone();
                    let split = row.split.or(split);
                    self.rows.push(Row { table: table.to_owned(), split, name, place, labels: row.labels });
                }
                _ => missing.push(row.path),
            }
        }
        if self.rows.len() == before {
            return false;
        }
        if !missing.is_empty() {
            let (rows, which) = (count(missing.len(), "row"), named(&missing));
            self.notes
                .push(format!("{rows} of `{table}` left out, which have no picture of their own: {which}"));
        }
        let mut at = 0;
        paths.files.retain(|_| {
            at += 1;
            !taken.contains(&(at - 1))
        });
        true
    }

    /// Lists the records. If other pictures have class folders, a label is the name of one, or its index
    /// among them.
    pub(super) fn add(self, listing: &mut Listing) -> Result<()> {
        let known = listing.sorted_words();
        let are_numbers = |labels: &[String]| labels.iter().all(|l| l.bytes().all(|b| b.is_ascii_digit()));
        let by_place = self.rows.iter().all(|row| are_numbers(&row.labels)) && !are_numbers(&known);
        let mut rows = self.rows;
        rows.sort_by(|a, b| (a.split, &a.name).cmp(&(b.split, &b.name)));
        for row in rows {
            let mut labels = Vec::new();
            for label in &row.labels {
                let word = match known.is_empty() {
                    true => Some(label),
                    false if by_place => label.parse().ok().and_then(|place: usize| known.get(place)),
                    false => known.iter().find(|word| *word == label),
                };
                let Some(word) = word else {
                    return Err(Error::new(format!(
                        "`{}`: `{}` has the label `{label}`, which is not one of the {} class folders",
                        row.table,
                        row.name,
                        known.len()
                    ))
                    .hint("labels are names of class folders, or their indices in sorted order, from 0"));
                };
                labels.push(listing.label(word));
            }
            if labels.is_empty() && !self.several {
                fail!("`{}`: `{}` has no label", row.table, row.name);
            }
            let mut item = Item::new(row.name, labels.first().copied().unwrap_or(0), row.place);
            if self.several {
                item.several = Some(labels.iter().map(|l| *l as u32).collect());
            }
            listing.push(row.split, item);
        }
        listing.several |= self.several;
        listing.notes.extend(self.notes);
        Ok(())
    }
}
