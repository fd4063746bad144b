//! The list of an image folder's files. Walking a folder of a million files takes minutes, so a long list is kept in the
//! cache folder, and is good as long as no folder that was walked has changed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::error::{At, Error, Result};
use crate::files;

use super::{Paths, Place};

/// Shorter lists are not worth a file.
const LEAST: usize = 1000;

/// What the cache holds.
#[derive(Serialize, Deserialize)]
struct Index {
    root: String,
    /// Folders below the root (which is ""), with their times of change in nanoseconds.
    folders: Vec<(String, u64)>,
    files: Vec<String>,
}

/// Relative paths of all files and folders below `root`.
pub(super) fn paths(root: &Path) -> Result<Paths> {
    let key = fs::canonicalize(root).at(root.display())?.display().to_string();
    let cached =
        files::cache_dir().join(format!("index/{:016x}.json", xxhash_rust::xxh3::xxh3_64(key.as_bytes())));
    let index = match read(&cached, &key, root) {
        Some(index) => index,
        None => {
            let mut index = Index { root: key, folders: Vec::new(), files: Vec::new() };
            walk(root, "", 0, &mut index)?;
            if index.files.len() >= LEAST {
                // A cache that cannot be written is no reason to stop.
                let _ = write(&cached, &index);
            }
            index
        }
    };
    let folders: BTreeSet<String> =
        index.folders.into_iter().map(|(name, _)| name).filter(|n| !n.is_empty()).collect();
    Ok(Paths { files: index.files.into_iter().map(|name| (name, Place::File)).collect(), folders })
}

/// The index in the cache, if it is of this folder and nothing has changed.
fn read(cached: &PathBuf, key: &str, root: &Path) -> Option<Index> {
    let index: Index = serde_json::from_slice(&fs::read(cached).ok()?).ok()?;
    let unchanged = |(name, time): &(String, u64)| changed(&root.join(name)) == Some(*time);
    (index.root == key && index.folders.iter().all(unchanged)).then_some(index)
}

fn write(cached: &Path, index: &Index) -> Result<()> {
    files::create_dir(cached.parent().unwrap_or(Path::new(".")))?;
    let text = serde_json::to_vec(index).at(cached.display())?;
    files::write_atomic(cached, |out| out.write_all(&text))
}

/// When names in a folder last changed.
fn changed(folder: &Path) -> Option<u64> {
    let time = fs::metadata(folder).ok()?.modified().ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_nanos() as u64)
}

/// Collects what is below `root/inside`. Symbolic links are followed, to a limited depth.
fn walk(root: &Path, inside: &str, depth: usize, index: &mut Index) -> Result<()> {
    const DEEPEST: usize = 16;
    let dir = root.join(inside);
    // Before the names are read: a change in between makes the index old, not wrong.
    index.folders.push((inside.to_owned(), changed(&dir).unwrap_or(0)));
    for entry in fs::read_dir(&dir).at(dir.display())? {
        let entry = entry.at(dir.display())?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
            return Err(Error::new(format!("{}: the name is not UTF-8", entry.path().display()))
                .hint("rename the file"));
        };
        let path = if inside.is_empty() { name } else { format!("{inside}/{name}") };
        let kind = entry.file_type().at(entry.path().display())?;
        let is_dir = kind.is_dir() || (kind.is_symlink() && entry.path().is_dir());
        if !is_dir {
            index.files.push(path);
        } else if depth < DEEPEST {
            walk(root, &path, depth + 1, index)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_good_until_a_folder_changes() {
        let temp = tempfile::tempdir().unwrap();
        let (root, cached) = (temp.path().join("pictures"), temp.path().join("cache.json"));
        fs::create_dir_all(root.join("cat/deep")).unwrap();
        fs::write(root.join("cat/a.jpg"), b"x").unwrap();
        let make = || {
            let mut index = Index { root: "key".into(), folders: Vec::new(), files: Vec::new() };
            walk(&root, "", 0, &mut index).unwrap();
            index
        };
        write(&cached, &make()).unwrap();
        assert_eq!(read(&cached, "key", &root).unwrap().files, ["cat/a.jpg"]);
        assert!(read(&cached, "other", &root).is_none());
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(root.join("cat/deep/b.jpg"), b"x").unwrap();
        assert!(read(&cached, "key", &root).is_none(), "a new file in a folder");
        let mut files = make().files;
        files.sort();
        assert_eq!(files, ["cat/a.jpg", "cat/deep/b.jpg"]);
        fs::write(&cached, b"{").unwrap();
        assert!(read(&cached, "key", &root).is_none(), "a damaged cache");
    }
}
