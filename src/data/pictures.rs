//! Pictures as users name them on a command line: files, folders, patterns that no shell has expanded, lists.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{At, Error, Result};
use crate::recipe::EvalResize;

use super::dataset::{self, Dataset};
use super::place::{Place, say};
use super::source::{is_named, pictures_below};
use super::split::Split;

/// A picture that a user names.
#[derive(Clone, Debug)]
pub enum Named {
    File(PathBuf),
    /// A record that has no file of its own, by its number in the data set.
    Record(Arc<Dataset>, usize),
}

impl Named {
    /// Its path, or its record's name behind the name of the data set.
    pub fn name(&self) -> String {
        match self {
            Named::File(path) => path.display().to_string(),
            Named::Record(data, index) => format!("{}: {}", data.name(), data.record_name(*index)),
        }
    }

    /// Its pixels, prepared as by [`super::read_image`].
    pub fn read(&self, image: (usize, usize), how: (EvalResize, f32), exif: bool) -> Result<Vec<u8>> {
        match self {
            Named::File(path) => super::read_image(path, image, how, exif),
            Named::Record(data, index) => data
                .record(*index)
                .and_then(|r| super::prepare(&r, image, how, exif))
                .map_err(|e| e.at(self.name())),
        }
    }
}

/// The pictures that `words` name, in their order: a file, a folder's pictures, a pattern with `*` and `?`, or `-`
/// for the lines of `list`. A packed data set, an archive or a table stands for its pictures; with a `split` any data
/// set stands for those of that part. A missing file is reported by whoever reads it.
pub fn named(
    words: &[PathBuf],
    split: Option<Split>,
    list: impl FnOnce() -> Result<String>,
) -> Result<Vec<Named>> {
    let mut found = Vec::new();
    let mut list = Some(list);
    for word in words {
        if word.as_os_str() == "-" {
            let Some(list) = list.take() else { continue };
            let text = list()?;
            // A byte order mark, as editors on other systems write.
            let lines = text.trim_start_matches('\u{feff}').lines().map(|line| line.trim_end_matches('\r'));
            for line in lines.filter(|line| !line.is_empty()) {
                add(Path::new(line), split, &mut found)?;
            }
        } else {
            add(word, split, &mut found)?;
        }
    }
    if found.is_empty() {
        return Err(Error::new("there are no pictures to look at")
            .hint("name files, a folder, a pattern, or `-` for a list"));
    }
    Ok(found)
}

fn add(word: &Path, split: Option<Split>, found: &mut Vec<Named>) -> Result<()> {
    let pattern = word.to_string_lossy();
    let is_other_data = is_named(word) || Place::is_packed(word);
    let is_data = is_other_data || word.is_dir() || !word.exists() && !pattern.contains(['*', '?']);
    if is_other_data || split.is_some() && is_data {
        return add_data(&pattern, split, found);
    }
    if word.is_dir() {
        return add_folder(word, found);
    }
    if word.exists() || !pattern.contains(['*', '?']) {
        found.push(Named::File(word.to_owned()));
        return Ok(());
    }
    let start = if word.is_absolute() { PathBuf::from("/") } else { PathBuf::new() };
    let parts: Vec<&str> = pattern.split('/').filter(|part| !part.is_empty()).collect();
    let mut matches = Vec::new();
    expand(&start, &parts, &mut matches)?;
    if matches.is_empty() {
        return Err(Error::new(format!("{pattern}: no file matches")));
    }
    matches.iter().try_for_each(|path| add(path, split, found))
}

fn add_folder(folder: &Path, found: &mut Vec<Named>) -> Result<()> {
    let (pictures, others) = pictures_below(folder)?;
    if others > 0 {
        let which = if others == 1 { "1 file that is not a picture" } else { "files that are not pictures" };
        let number = if others == 1 { String::new() } else { format!("{others} ") };
        say(&format!("{}: left out {number}{which}", folder.display()));
    }
    found.extend(pictures.into_iter().map(Named::File));
    Ok(())
}

/// The pictures of a data set: of one part, or all.
fn add_data(spec: &str, split: Option<Split>, found: &mut Vec<Named>) -> Result<()> {
    let data = match split {
        Some(split) => dataset::measured(spec, Some(split)).map(|(data, _)| vec![data]),
        None => dataset::all_parts(spec),
    }
    .map_err(|e| match spec.ends_with(".txt") && e.message().contains("PATH LABEL") {
        true => e.hint(format!(
            "a list of paths alone is read from stdin, as in `vitrum predict --weights FILE - < {spec}`"
        )),
        false => e,
    })?;
    for data in data.into_iter().map(Arc::new) {
        found.extend((0..data.len()).map(|index| match data.file(index) {
            Some(path) => Named::File(path),
            None => Named::Record(data.clone(), index),
        }));
    }
    Ok(())
}

/// The files that match a pattern, sorted. Goes through the path component by component.
fn expand(folder: &Path, parts: &[&str], found: &mut Vec<PathBuf>) -> Result<()> {
    let Some((part, rest)) = parts.split_first() else {
        found.push(folder.to_owned());
        return Ok(());
    };
    if !part.contains(['*', '?']) {
        let next = folder.join(part);
        return if next.exists() { expand(&next, rest, found) } else { Ok(()) };
    }
    let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if !here.is_dir() {
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(here).at(here.display())? {
        let name = entry.at(here.display())?.file_name();
        let fits = name.to_str().is_some_and(|name| {
            let hidden = name.starts_with('.') && !part.starts_with('.');
            !hidden && matches(&part.chars().collect::<Vec<_>>(), &name.chars().collect::<Vec<_>>())
        });
        if fits {
            names.push(name);
        }
    }
    names.sort();
    names.into_iter().try_for_each(|name| expand(&folder.join(name), rest, found))
}

/// `*` matches any characters, `?` exactly one.
fn matches(pattern: &[char], name: &[char]) -> bool {
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            // The last star takes one more character.
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, n) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_name_files_folders_patterns_and_lists() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["a/1.jpg", "a/2.png", "a/b/3.jpg", "a/notes.txt", ".h/4.jpg"] {
            let path = temp.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        }
        let found = |words: &[&str]| {
            let words: Vec<PathBuf> =
                words.iter().map(|w| if *w == "-" { w.into() } else { temp.path().join(w) }).collect();
            let list = || Ok(format!("\u{feff}{0}/a/2.png\r\n\n{0}/none.jpg\n", temp.path().display()));
            let paths = named(&words, None, list).map_err(|e| e.to_string())?;
            let short = |picture: &Named| {
                let name = picture.name();
                Path::new(&name).strip_prefix(temp.path()).unwrap().display().to_string()
            };
            Ok::<_, String>(paths.iter().map(short).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(found(&["a"]).unwrap(), "a/1.jpg a/2.png a/b/3.jpg");
        assert_eq!(found(&["a/*.jpg", "a/?.png"]).unwrap(), "a/1.jpg a/2.png");
        assert_eq!(found(&["*/b"]).unwrap(), "a/b/3.jpg");
        assert_eq!(found(&["-", "a/1.jpg"]).unwrap(), "a/2.png none.jpg a/1.jpg");
        assert!(found(&["a/*.gif"]).unwrap_err().contains("no file matches"));
        let name = |text: &str| text.chars().collect::<Vec<_>>();
        assert!(matches(&name("a*b*c"), &name("axxbyyc")) && !matches(&name("a*b"), &name("abx")));
    }
}
