//! What a user's name for a data set means: the demo, a packed data set, unpacked pictures, or a mixture.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{At, Error, Result};
use crate::files;
use crate::terminal;

use super::dataset::{self, Dataset, Manifest};
use super::demo;
use super::pack::MINIVAL;
use super::source::{Source, expand};
use super::split::Split;

/// What a user's `spec` means.
pub(super) enum Place {
    Demo(demo::Variant),
    /// The folder of a packed data set.
    Packed(PathBuf),
    /// A folder with packed data sets in it, by split.
    PackedSplit {
        path: PathBuf,
        parts: Vec<(Split, PathBuf)>,
    },
    Unpacked(Arc<Source>),
    /// What the user wrote, and the mixture's parts with their weights.
    Mixture(String, Vec<(Place, f64)>),
}

impl Place {
    pub(super) fn find(spec: &str) -> Result<Self> {
        if let Some(variant) = demo::Variant::parse(spec) {
            return Ok(Place::Demo(variant));
        }
        let path = Path::new(spec);
        if !path.exists() && spec.contains(" + ") {
            return Self::find_mixture(spec);
        }
        if !path.exists() && expand(spec).is_none() {
            return Err(Error::new(format!("{spec}: no such file or folder"))
                .hint("name a packed data set, a folder of class folders, `demo` or `demo-hard`"));
        }
        if Manifest::is_in(path) {
            return Ok(Place::Packed(path.to_owned()));
        }
        let parts = packed_parts(path)?;
        if !parts.is_empty() {
            let has = |split: Split| parts.iter().any(|(part, _)| *part == split);
            if has(Split::Train) && has(Split::Test) && !has(Split::Val) {
                say(&format!("{spec}: no validation part: the test part is taken in its place"));
            }
            return Ok(Place::PackedSplit { path: path.to_owned(), parts });
        }
        let source = Source::open(path)?;
        source.notes().iter().for_each(|note| say(&format!("{spec}: {note}")));
        Ok(Place::Unpacked(Arc::new(source)))
    }

    /// Whether a folder is a packed data set, or has packed parts.
    pub(super) fn is_packed(path: &Path) -> bool {
        Manifest::is_in(path) || packed_parts(path).is_ok_and(|parts| !parts.is_empty())
    }

    /// `3*DIR + DIR`: the weight says how often a part is drawn; the default is 1.
    fn find_mixture(spec: &str) -> Result<Self> {
        let mut parts = Vec::new();
        for term in spec.split(" + ").map(str::trim) {
            let weighted =
                term.split_once('*').and_then(|(w, path)| Some((w.trim().parse().ok()?, path.trim())));
            let (weight, path): (f64, &str) = weighted.unwrap_or((1.0, term));
            if !(weight > 0.0 && weight.is_finite()) {
                return Err(Error::usage(format!("`{term}`: a weight is a number above 0"))
                    .hint("write a mixture as `3*DIR + 1*DIR`"));
            }
            parts.push((Self::find(path)?, weight));
        }
        Ok(Place::Mixture(spec.into(), parts))
    }

    /// The splits that it has; empty if there are none.
    pub(super) fn parts(&self) -> Vec<Split> {
        match self {
            Place::Demo(_) => vec![Split::Train, Split::Val],
            Place::Packed(_) => Vec::new(),
            Place::PackedSplit { parts, .. } => parts.iter().map(|(split, _)| *split).collect(),
            Place::Unpacked(source) => {
                let named =
                    |split| if source.test_is_val() && split == Split::Val { Split::Test } else { split };
                source.lists().filter_map(|(split, _)| split.map(named)).collect()
            }
            Place::Mixture(_, places) => {
                let of_all =
                    |split: &Split| places.iter().all(|(place, _)| place.part(*split) == Some(*split));
                Split::ALL.into_iter().filter(of_all).collect()
            }
        }
    }

    /// The split that stands in for another, if any: the test split for validation if there is no other.
    pub(super) fn part(&self, split: Split) -> Option<Split> {
        let parts = self.parts();
        match split {
            split if parts.contains(&split) => Some(split),
            Split::Val if parts.contains(&Split::Test) => Some(Split::Test),
            _ => None,
        }
    }

    /// Opens a split; data without splits is opened whole.
    pub(super) fn open(&self, split: Split) -> Result<Dataset> {
        let parts = self.parts();
        let part = match self.part(split) {
            Some(part) => part,
            None if parts.is_empty() => split,
            None => return Err(self.lacks(split, &parts)),
        };
        match self {
            Place::Demo(variant) => dataset::open_demo(*variant, part, &files::cache_dir()),
            Place::Packed(dir) => Dataset::open_packed(dir),
            Place::PackedSplit { parts, .. } => {
                let (_, dir) =
                    parts.iter().find(|(split, _)| *split == part).expect("it is one of the parts");
                Dataset::open_packed(dir)
            }
            Place::Unpacked(source) => {
                if split == Split::Train {
                    source.can_train()?;
                }
                Dataset::listed(source.clone(), part)
            }
            Place::Mixture(name, places) => {
                let open = |(place, weight): &(Place, f64)| Ok((place.open(split)?, *weight));
                Dataset::mixture(name, places.iter().map(open).collect::<Result<_>>()?)
            }
        }
    }

    fn lacks(&self, split: Split, parts: &[Split]) -> Error {
        let name = match self {
            Place::Demo(variant) => variant.name().to_owned(),
            Place::Packed(path) | Place::PackedSplit { path, .. } => path.display().to_string(),
            Place::Unpacked(source) => source.name().to_owned(),
            Place::Mixture(name, _) => name.clone(),
        };
        let has: Vec<&str> = parts.iter().map(|part| part.name()).collect();
        let error =
            Error::new(format!("{name}: it has no {} part, only {}", split.name(), has.join(" and ")));
        match (split, has.as_slice()) {
            (Split::Val, _) => error.hint(format!(
                "`--split {}` measures that part; `data.val` names validation data elsewhere",
                has[0]
            )),
            (Split::Train, _) => {
                error.hint("training needs a part that is called `train`, or data without parts")
            }
            (Split::Test, _) => error.hint(format!("use `--split {}`", has.join("` or `--split "))),
        }
    }
}

/// The packed data sets in a folder, by the names of their folders.
fn packed_parts(path: &Path) -> Result<Vec<(Split, PathBuf)>> {
    let mut parts: Vec<(Split, PathBuf)> = Vec::new();
    if !path.is_dir() {
        return Ok(parts);
    }
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(path).at(path.display())? {
        folders.push(entry.at(path.display())?.path());
    }
    folders.sort();
    let mut beside = Vec::new();
    for folder in folders {
        let named = folder.file_name().and_then(|name| name.to_str()).and_then(Split::of_word);
        if !Manifest::is_in(&folder) {
            continue;
        }
        let Some(split) = named else {
            beside.push(folder);
            continue;
        };
        if let Some((_, other)) = parts.iter().find(|(known, _)| *known == split) {
            let both = format!("`{}` and `{}`", other.display(), folder.display());
            return Err(
                Error::new(format!("{both} are both a {} part", split.name())).hint("move one of them away")
            );
        }
        parts.push((split, folder));
    }
    // A `minival` is named itself wherever it is used.
    for folder in beside.iter().filter(|folder| !parts.is_empty() && !folder.ends_with(MINIVAL)) {
        let names = Split::ALL.map(|split| format!("`{}`", split.name())).join(", ");
        say(&format!("{}: left out, because its name is not one of {names}", folder.display()));
    }
    parts.sort();
    Ok(parts)
}

/// The messages about the data so far.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Prints a line on stderr once per process: data is often opened more than once.
pub(crate) fn say(line: &str) {
    // A name may contain a line break.
    let line = terminal::one_line(line).into_owned();
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if !said.contains(&line) {
        terminal::note(&line);
        said.push(line);
    }
}

/// What was left out of the data that this process has opened, and how the data was read: lines for the log
/// of a run.
pub fn notes() -> Vec<String> {
    SAID.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
