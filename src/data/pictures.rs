//! Pictures as users name them on a command line: files, folders, patterns that no shell has expanded, lists.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{At, Error, Result};

use super::place::say;
use super::source::{Source, pictures_below};
use super::split::Split;

/// The picture files that `words` name, in their order: a file, a folder's pictures (of one split, if `split`
/// is given), a pattern with `*` and `?`, or `-` for the lines of `list`. A missing file is reported by
/// whoever reads it.
pub fn named(
    words: &[PathBuf],
    split: Option<Split>,
    list: impl FnOnce() -> Result<String>,
) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut list = Some(list);
    for word in words {
        if word.as_os_str() == "-" {
            let Some(list) = list.take() else { continue };
            let text = list()?;
            for line in text.lines().map(|line| line.trim_end_matches('\r')).filter(|line| !line.is_empty()) {
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

fn add(word: &Path, split: Option<Split>, found: &mut Vec<PathBuf>) -> Result<()> {
    if word.is_dir() {
        return add_folder(word, split, found);
    }
    let pattern = word.to_string_lossy();
    if word.exists() || !pattern.contains(['*', '?']) {
        found.push(word.to_owned());
        return Ok(());
    }
    let start = if word.is_absolute() { PathBuf::from("/") } else { PathBuf::new() };
    let parts: Vec<&str> = pattern.split('/').filter(|part| !part.is_empty()).collect();
    let before = found.len();
    let mut matches = Vec::new();
    expand(&start, &parts, &mut matches)?;
    for path in matches {
        if path.is_dir() { add_folder(&path, split, found)? } else { found.push(path) }
    }
    match found.len() > before {
        true => Ok(()),
        false => Err(Error::new(format!("{pattern}: no file matches"))),
    }
}

fn add_folder(folder: &Path, split: Option<Split>, found: &mut Vec<PathBuf>) -> Result<()> {
    let Some(split) = split else {
        let (pictures, others) = pictures_below(folder)?;
        if others > 0 {
            let which =
                if others == 1 { "1 file that is not a picture" } else { "files that are not pictures" };
            let number = if others == 1 { String::new() } else { format!("{others} ") };
            say(&format!("{}: left out {number}{which}", folder.display()));
        }
        found.extend(pictures);
        return Ok(());
    };
    let source = Source::open(folder)?;
    if source.store.kind() != "folder" || !source.is_split() || source.items(split).is_empty() {
        return Err(Error::new(format!(
            "{}: no folder with pictures of a {} part",
            folder.display(),
            split.name()
        ))
        .hint("leave out `--split` to take all pictures below the folder"));
    }
    found.extend(source.items(split).iter().map(|item| folder.join(&item.name)));
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
            let list = || Ok(format!("{0}/a/2.png\r\n\n{0}/none.jpg\n", temp.path().display()));
            let paths = named(&words, None, list).map_err(|e| e.to_string())?;
            let short = |path: &PathBuf| path.strip_prefix(temp.path()).unwrap().display().to_string();
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
