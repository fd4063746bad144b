//! Columns of a table that say which split a row belongs to: `split`, columns that look like it, and flags such as
//! `is_train`.

use std::collections::BTreeSet;

use crate::data::split::Split;
use crate::error::{Error, Result};
use crate::fail;

/// How the error for an unknown split begins.
pub(super) const NO_SPLIT: &str = "there is no split";

/// The column of the split.
const SPLIT: &str = "split";
/// Columns that are the split's if each of their values is one.
const PERHAPS_SPLIT: [&str; 8] =
    ["subset", "set", "partition", "phase", "usage", "fold", "data_split", "part"];
/// Columns that say for each row whether it is of one split.
const FLAGS: [(&str, Split); 7] = [
    ("is_train", Split::Train),
    ("is_training", Split::Train),
    ("is_val", Split::Val),
    ("is_valid", Split::Val),
    ("is_validation", Split::Val),
    ("is_test", Split::Test),
    ("is_testing", Split::Test),
];

/// The columns that are looked at, in lower case.
#[cfg(feature = "parquet")]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    [SPLIT].into_iter().chain(PERHAPS_SPLIT).chain(FLAGS.map(|(name, _)| name))
}

/// The split of each row, by the first column that holds splits, else by the [`FLAGS`]; and sentences about the
/// columns that look like splits and are not used. `place` names a row, and `values` are those of a column, one for
/// each row.
///
/// # Errors
/// An unknown value in the column [`SPLIT`]; any other column then holds something else.
pub(super) fn read(
    rows: usize,
    place: impl Fn(usize) -> String,
    values: impl Fn(&str) -> Option<Vec<String>>,
) -> Result<(Vec<Option<Split>>, Vec<String>)> {
    let filled =
        |name: &str| values(name).filter(|values| values.iter().any(|value| !value.trim().is_empty()));
    let mut found: Option<(String, Vec<Option<Split>>)> = None;
    let mut notes = Vec::new();
    let mut offer = |name: String, splits: Result<Vec<Option<Split>>>| {
        match (&found, splits) {
        (_, Err(why)) => notes.push(format!(
            "column `{name}` is not used: {}; a column `split` with `train` and `val` says which rows validate",
            why.message()
        )),
        (Some((used, same)), Ok(splits)) if *same != splits => {
            notes.push(format!("column `{name}` is not used: the splits are those of `{used}`"));
        }
        (Some(_), Ok(_)) => {}
        (None, Ok(splits)) => found = Some((name, splits)),
    }
    };
    for name in [SPLIT].into_iter().chain(PERHAPS_SPLIT) {
        let Some(values) = filled(name) else { continue };
        let of = |(row, value): (usize, &String)| split_of(value).map_err(|e| e.at(place(row)));
        match values.iter().enumerate().map(of).collect::<Result<Vec<_>>>() {
            Err(error) if name == SPLIT => return Err(error),
            splits => offer(name.to_owned(), splits),
        }
    }
    let mut flags: Vec<(&str, Split, Vec<bool>)> = Vec::new();
    for (name, split) in FLAGS {
        let Some(values) = filled(name) else { continue };
        let of = |(row, value): (usize, &String)| {
            flag_of(value).ok_or_else(|| Error::new(format!("{}: `{value}` is neither 0 nor 1", place(row))))
        };
        match values.iter().enumerate().map(of).collect::<Result<Vec<_>>>() {
            Ok(values) => flags.push((name, split, values)),
            Err(why) => offer(name.to_owned(), Err(why)),
        }
    }
    if !flags.is_empty() {
        let names = flags.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join("`, `");
        offer(names.clone(), (0..rows).map(|row| of_flags(row, &place, &flags)).collect());
        if let Some((used, splits)) = &found
            && *used == names
            && let Some(rest) = rest(&flags)
        {
            let count = |split| splits.iter().filter(|of| **of == Some(split)).count();
            notes.push(format!(
                "splits by column `{names}`: {} rows for train, {} for val, {} for test; a row of none is for {}",
                count(Split::Train),
                count(Split::Val),
                count(Split::Test),
                rest.name()
            ));
        }
    }
    Ok((found.map_or_else(|| vec![None; rows], |(_, splits)| splits), notes))
}

/// A sentence about rows without a split, where others have one.
pub(super) fn blank(splits: impl Iterator<Item = Option<Split>>) -> Option<String> {
    let splits: Vec<Option<Split>> = splits.collect();
    let blank = splits.iter().filter(|split| split.is_none()).count();
    (1..splits.len())
        .contains(&blank)
        .then(|| format!("{blank} of {} rows have no split: they are used for training", splits.len()))
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

fn flag_of(value: &str) -> Option<bool> {
    match value.trim().to_ascii_lowercase().as_str() {
        "1" | "1.0" | "true" | "t" | "yes" => Some(true),
        "0" | "0.0" | "false" | "f" | "no" => Some(false),
        _ => None,
    }
}

/// The split of a row that has none of the flags: the first without a flag of its own.
fn rest(flags: &[(&str, Split, Vec<bool>)]) -> Option<Split> {
    Split::ALL.into_iter().find(|split| flags.iter().all(|(_, of, _)| of != split))
}

fn of_flags(
    row: usize,
    place: impl Fn(usize) -> String,
    flags: &[(&str, Split, Vec<bool>)],
) -> Result<Option<Split>> {
    let set: BTreeSet<Split> =
        flags.iter().filter(|(.., values)| values[row]).map(|(_, split, _)| *split).collect();
    match (set.first(), set.len()) {
        (Some(split), 1) => Ok(Some(*split)),
        (None, _) if rest(flags).is_some() => Ok(rest(flags)),
        (None, _) => fail!("{} is of no split", place(row)),
        _ => fail!("{} is of two splits", place(row)),
    }
}
