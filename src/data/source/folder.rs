//! Turns paths with `/` into splits and classes: `CLASS/...`, or `train/CLASS/...` beside `val/CLASS/...`.
//! The paths come from an image folder or an archive.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::data::dataset::lacking;
use crate::data::split::Split;
use crate::error::{Error, Result};

use super::listing::Listing;
use super::strays::{count, named};
use super::{Item, Place};

/// Relative paths: the contents of a folder or an archive.
#[derive(Debug, Default)]
pub(super) struct Paths {
    /// Pictures.
    pub(super) files: Vec<(String, Place)>,
    /// Empty folders: classes without a picture.
    pub(super) empty: BTreeSet<String>,
}

/// A folder at the top.
#[derive(Debug, Default)]
struct Top<'a> {
    /// Pictures directly inside.
    direct: usize,
    /// Pictures in all.
    all: usize,
    /// Folders inside, with pictures or empty.
    inside: BTreeSet<&'a str>,
}

type Tops<'a> = BTreeMap<&'a str, Top<'a>>;

impl Paths {
    fn tops(&self) -> Tops<'_> {
        let mut tops = Tops::new();
        for (name, _) in &self.files {
            let Some((top, rest)) = name.split_once('/') else { continue };
            let top = tops.entry(top).or_default();
            top.all += 1;
            match rest.split_once('/') {
                Some((inside, _)) => drop(top.inside.insert(inside)),
                None => top.direct += 1,
            }
        }
        for name in &self.empty {
            let (top, rest) = name.split_once('/').unwrap_or((name, ""));
            let top = tops.entry(top).or_default();
            if let Some(inside) = rest.split('/').next().filter(|inside| !inside.is_empty()) {
                top.inside.insert(inside);
            }
        }
        tops
    }
}

/// The top folders that are splits; none if they are classes. A split's folder contains class folders;
/// without them it is a class of that name.
fn parts(tops: &Tops, root: &Path) -> Result<Vec<(Split, String)>> {
    let full: Vec<&str> = tops.iter().filter(|(_, top)| top.all > 0).map(|(name, _)| *name).collect();
    let is_part = |name: &&str| !tops[name].inside.is_empty();
    let of_one_word = full.iter().copied().filter(|name| Split::of_word(name).is_some()).filter(is_part);
    let mut folders: Vec<&str> = of_one_word.collect();
    // A longer name may be a class (`train station`). It counts as a split only if every folder has a split's
    // name, or if two splits are named.
    let all_named = !full.is_empty() && full.iter().all(|name| Split::of(name).is_some());
    let named_parts: BTreeSet<Split> =
        full.iter().filter(|n| is_part(n)).filter_map(|n| Split::of(n)).collect();
    if folders.is_empty() && named_parts.len() > 1 && named_parts.contains(&Split::Train) {
        folders = full.iter().copied().filter(is_part).filter(|name| Split::of(name).is_some()).collect();
    } else if folders.is_empty() && all_named {
        folders = full.iter().copied().filter(is_part).collect();
        if folders.is_empty() && (full.len() > 1 || Split::of_word(full[0]).is_some()) {
            return Err(Error::new(format!(
                "{} {} named like parts of a data set, and {} no class folders inside",
                named(&full),
                if full.len() == 1 { "is" } else { "are" },
                if full.len() == 1 { "has" } else { "have" },
            ))
            .hint("put the pictures of each class into a folder of its own, `DIR/train/CLASS/NAME.jpg`"));
        }
    }
    if folders.is_empty() {
        return no_parts_of_another_name(tops, &full, root).map(|()| Vec::new());
    }
    let mut parts: Vec<(Split, String)> = Vec::new();
    for name in &folders {
        let split = Split::of(name).expect("it was found by its name");
        if let Some((_, other)) = parts.iter().find(|(known, _)| *known == split) {
            return Err(Error::new(format!("`{other}` and `{name}` are both a {} part", split.name()))
                .hint("keep one of them, or move the pictures of both into one"));
        }
        parts.push((split, (*name).to_owned()));
    }
    // A single folder with a split's name among others may be a class, or a split may have another name.
    let others: Vec<&str> =
        full.iter().copied().filter(|name| !folders.contains(name) && Split::of(name).is_none()).collect();
    if parts.len() == 1 && !others.is_empty() {
        let part = folders[0];
        return Err(Error::new(format!(
            "`{part}` has class folders inside, and {} {} beside it: is `{part}` a part of the data or a class?",
            named(&others),
            if others.len() == 1 { "lies" } else { "lie" }
        ))
        .hint(format!(
            "{}, call the parts `train`, `val` and `test`, or move the others away",
            name_it(root, part)
        )));
    }
    parts.sort();
    Ok(parts)
}

/// How to use one folder of a data set alone; inside an archive it cannot be named.
fn name_it(root: &Path, folder: &str) -> String {
    let path = root.join(folder);
    match path.is_dir() {
        true => format!("name `{}` itself as the data", path.display()),
        false => format!("unpack it and name its folder `{folder}` as the data"),
    }
}

/// Refuses folders with the same subfolders: they are not classes, and nothing says which split each one is.
fn no_parts_of_another_name(tops: &Tops, full: &[&str], root: &Path) -> Result<()> {
    let deep = full.len() > 1 && full.iter().all(|name| tops[name].direct == 0);
    if !deep {
        return Ok(());
    }
    let all: BTreeSet<&str> = full.iter().flat_map(|name| &tops[name].inside).copied().collect();
    let is_common = |sub: &&str| full.iter().all(|name| tops[name].inside.contains(sub));
    let common: Vec<&str> = all.iter().copied().filter(is_common).collect();
    if all.len() > 1 && all.iter().all(|sub| Split::of_word(sub).is_some()) {
        return Err(Error::new(format!(
            "{} have the parts {} inside",
            named(full),
            named(&common_or(&common, &all))
        ))
        .hint("put the parts above the classes: `DIR/train/CLASS/NAME.jpg` and `DIR/val/CLASS/NAME.jpg`"));
    }
    if common.len() > 1 && 2 * common.len() >= all.len() {
        return Err(Error::new(format!(
            "{} have the same folders inside ({}): they look like parts of a data set, but their names do not say which",
            named(full),
            named(&common)
        ))
        .hint(format!(
            "rename them to `train` and `val`, or {}; a table of paths and labels says anything else",
            name_it(root, full[0])
        )));
    }
    Ok(())
}

fn common_or<'a>(common: &[&'a str], all: &BTreeSet<&'a str>) -> Vec<&'a str> {
    if common.is_empty() { all.iter().copied().collect() } else { common.to_vec() }
}

/// Finds splits and classes in the sorted paths of the data set `root`.
pub(super) fn arrange(paths: Paths, root: &Path, listing: &mut Listing) -> Result<()> {
    let tops = paths.tops();
    let parts = parts(&tops, root)?;
    let homeless: Vec<&str> =
        paths.files.iter().map(|(name, _)| name.as_str()).filter(|name| !name.contains('/')).collect();
    listing.note(&homeless, "picture", "in no class folder");
    if parts.is_empty() {
        part(&paths, "", None, listing);
        return Ok(());
    }
    for (name, top) in &tops {
        if top.all > 0 && !parts.iter().any(|(_, part)| part == name) {
            let pictures = count(top.all, "picture");
            listing.notes.push(match Split::of(name) {
                None => format!("`{name}` is not a part of the data set: {pictures} left out"),
                Some(_) if top.inside.is_empty() => {
                    format!("`{name}` has no class folders inside: {pictures} left out")
                }
                Some(split) => match parts.iter().find(|(known, _)| *known == split) {
                    Some((_, part)) => format!("`{name}` lies beside `{part}`, which is the {} part: {pictures} left out", split.name()),
                    None => format!(
                        "`{name}` is not a part's name, which is one word: {pictures} left out; rename it to `{}` to use it",
                        split.name()
                    ),
                },
            });
        }
    }
    let mut classes: BTreeMap<Split, Vec<String>> = BTreeMap::new();
    let of_val = parts.iter().any(|(split, _)| *split == Split::Val);
    for (split, folder) in parts {
        // Pictures without labels are often in one folder of their own.
        if split == Split::Test
            && let Some(train) = classes.get(&Split::Train)
            && are_others(&tops[folder.as_str()].inside, train, of_val)
        {
            let (pictures, inside) =
                (count(tops[folder.as_str()].all, "picture"), &tops[folder.as_str()].inside);
            let inside = named(&inside.iter().copied().collect::<Vec<_>>());
            listing
                .notes
                .push(format!("`{folder}` has other classes than training ({inside}): {pictures} left out"));
            continue;
        }
        classes.insert(split, part(&paths, &format!("{folder}/"), Some(split), listing));
    }
    let Some(train) = classes.get(&Split::Train) else { return Ok(()) };
    for (split, own) in classes.iter().filter(|(split, _)| **split != Split::Train) {
        if let Some(lacks) = lacking(train, own)? {
            listing.notes.push(format!("the {} part: {lacks}", split.name()));
        }
    }
    Ok(())
}

/// Whether a test split has other classes than training. With a validation split, one unknown class is enough;
/// without, all must be unknown.
fn are_others(inside: &BTreeSet<&str>, train: &[String], of_val: bool) -> bool {
    let is_known = |class: &&str| train.iter().any(|known| known == class);
    if of_val { !inside.iter().all(is_known) } else { !inside.iter().any(is_known) }
}

/// Lists the records below `prefix`. The first folder names the class; everything deeper belongs to it.
/// Returns the names of its classes.
fn part(paths: &Paths, prefix: &str, split: Option<Split>, listing: &mut Listing) -> Vec<String> {
    let first = |path: &str| Some(path.strip_prefix(prefix)?.split('/').next()?.to_owned());
    let mut classes: BTreeSet<String> =
        paths.empty.iter().filter_map(|name| first(name)).filter(|name| !name.is_empty()).collect();
    let mut homeless = Vec::new();
    for (name, place) in &paths.files {
        let Some(rest) = name.strip_prefix(prefix) else { continue };
        let Some((class, _)) = rest.split_once('/') else {
            homeless.push(name.as_str());
            continue;
        };
        if !classes.contains(class) {
            classes.insert(class.to_owned());
        }
        let label = listing.label(class);
        listing.push(split, Item::new(name.clone(), label, place.clone()));
    }
    if !prefix.is_empty() {
        listing.note(&homeless, "picture", "in no class folder");
    }
    for class in &classes {
        listing.label(class);
    }
    classes.into_iter().collect()
}
