//! The list of an image folder's files. Walking a folder of a million files takes minutes, so a long list is
//! kept in the cache folder. It is valid as long as no folder that was walked has changed.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::error::{At, Error, Result};
use crate::files;

use super::strays::{self, RECIPE};

/// Shorter lists are not cached.
const LEAST: usize = 1000;

/// Contents of a folder, as relative paths with `/`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Index {
    root: String,
    /// Folders that were walked (the root is ""), with their modification times in nanoseconds.
    folders: Vec<(String, u64)>,
    /// Pictures.
    pub(super) files: Vec<String>,
    /// Empty folders.
    pub(super) empty: Vec<String>,
    /// Files that are not pictures, outside hidden folders.
    pub(super) others: Vec<String>,
    /// Folders that are never data, with `/`, and why.
    pub(super) strays: Vec<String>,
    /// Run directories.
    pub(super) runs: Vec<String>,
    /// Links to one of their own parent folders.
    pub(super) cut: Vec<String>,
}

/// Lists everything below `root`, sorted.
pub(super) fn list(root: &Path) -> Result<Index> {
    let key = fs::canonicalize(root).at(root.display())?.display().to_string();
    let cached =
        files::cache_dir().join(format!("index/{:016x}.json", xxhash_rust::xxh3::xxh3_64(key.as_bytes())));
    if let Some(index) = read(&cached, &key, root) {
        return Ok(index);
    }
    let index = walk(root, key)?;
    if index.files.len() >= LEAST {
        // An unwritable cache is no reason to stop.
        let _ = write(&cached, &index);
    }
    Ok(index)
}

fn walk(root: &Path, key: String) -> Result<Index> {
    let mut index = Index { root: key, ..Index::default() };
    let mut walk = Walk { root, real: fs::canonicalize(root).at(root.display())?, chain: Vec::new() };
    walk.folder("", false, &mut index)?;
    for list in [
        &mut index.files,
        &mut index.empty,
        &mut index.others,
        &mut index.strays,
        &mut index.runs,
        &mut index.cut,
    ] {
        list.sort();
    }
    Ok(index)
}

/// The cached index, if it is of this folder and nothing has changed.
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

/// When the names in a folder last changed.
fn changed(folder: &Path) -> Option<u64> {
    let time = fs::metadata(folder).ok()?.modified().ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_nanos() as u64)
}

struct Walk<'a> {
    root: &'a Path,
    /// The root with links resolved.
    real: PathBuf,
    /// Device and inode of the folders on the way down.
    chain: Vec<(u64, u64)>,
}

impl Walk<'_> {
    /// Collects the contents of `root/inside`. Follows links to folders, except to an ancestor. Below a link,
    /// follows only links that leave the root: everything inside the root is listed at its own place.
    fn folder(&mut self, inside: &str, below_link: bool, index: &mut Index) -> Result<()> {
        let dir = self.root.join(inside);
        let about = fs::metadata(&dir).at(dir.display())?;
        let identity = (about.dev(), about.ino());
        if self.chain.contains(&identity) {
            index.cut.push(inside.to_owned());
            return Ok(());
        }
        self.chain.push(identity);
        // The time is taken before the names are read: a change in between makes the index outdated, not
        // wrong.
        index.folders.push((inside.to_owned(), changed(&dir).unwrap_or(0)));
        let mut is_empty = true;
        for entry in fs::read_dir(&dir).at(dir.display())? {
            let entry = entry.at(dir.display())?;
            is_empty = false;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                return Err(Error::new(format!("{}: the name is not UTF-8", entry.path().display()))
                    .hint("rename the file"));
            };
            let path = if inside.is_empty() { name.clone() } else { format!("{inside}/{name}") };
            let kind = entry.file_type().at(entry.path().display())?;
            let is_link = kind.is_symlink();
            let is_dir = kind.is_dir() || (is_link && entry.path().is_dir());
            if !is_dir {
                // Only regular files are read: reading a pipe might never end.
                let head = || if entry.path().is_file() { head(&entry.path()) } else { Vec::new() };
                match !strays::is_junk(&name) && strays::is_picture(&name, head) {
                    true => index.files.push(path),
                    false => index.others.push(path),
                }
            } else if strays::is_junk(&name) {
                index.strays.push(format!("{path}/"));
            } else if entry.path().join(RECIPE).is_file() {
                // Checked again, in case it is no longer a run.
                index.folders.push((path.clone(), changed(&entry.path()).unwrap_or(0)));
                index.runs.push(format!("{path}/"));
            } else if is_link && below_link && self.is_inside(&entry.path()) {
                index.cut.push(path);
            } else {
                self.folder(&path, below_link || is_link, index)?;
            }
        }
        self.chain.pop();
        if is_empty && !inside.is_empty() {
            index.empty.push(inside.to_owned());
        }
        Ok(())
    }

    fn is_inside(&self, link: &Path) -> bool {
        fs::canonicalize(link).is_ok_and(|target| target.starts_with(&self.real))
    }
}

/// The first bytes of a file.
fn head(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    let read = File::open(path).and_then(|mut file| file.read(&mut bytes)).unwrap_or(0);
    bytes.truncate(read);
    bytes
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
        let make = || walk(&root, "key".into()).unwrap();
        write(&cached, &make()).unwrap();
        assert_eq!(read(&cached, "key", &root).unwrap().files, ["cat/a.jpg"]);
        assert!(read(&cached, "other", &root).is_none());
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(root.join("cat/deep/b.jpg"), b"x").unwrap();
        assert!(read(&cached, "key", &root).is_none(), "a new file in a folder");
        assert_eq!(make().files, ["cat/a.jpg", "cat/deep/b.jpg"]);
        fs::write(&cached, b"{").unwrap();
        assert!(read(&cached, "key", &root).is_none(), "a damaged cache");
    }
    #[test]
    fn links_are_followed_and_never_back() {
        use std::os::unix::fs::symlink;
        let temp = tempfile::tempdir().unwrap();
        let (root, outside) = (temp.path().join("pictures"), temp.path().join("outside"));
        for dir in [root.join("cat"), root.join("dog"), outside.clone()] {
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("a.jpg"), b"x").unwrap();
        }
        symlink("..", root.join("cat/up")).unwrap();
        symlink(&outside, root.join("dog/more")).unwrap();
        // The linked folder leads back inside the root, which is listed already.
        symlink(&root, outside.join("home")).unwrap();
        let index = walk(&root, "key".into()).unwrap();
        assert_eq!(index.files, ["cat/a.jpg", "dog/a.jpg", "dog/more/a.jpg"]);
        assert_eq!(index.cut, ["cat/up", "dog/more/home"]);
        // Folders that link to each other: following every link would list them in every order.
        let mesh = temp.path().join("mesh");
        for i in 0..12 {
            fs::create_dir_all(mesh.join(format!("c{i}"))).unwrap();
            fs::write(mesh.join(format!("c{i}/a.jpg")), b"x").unwrap();
            for k in (0..12).filter(|k| *k != i) {
                symlink(format!("../c{k}"), mesh.join(format!("c{i}/to{k}"))).unwrap();
            }
        }
        assert_eq!(walk(&mesh, "key".into()).unwrap().files.len(), 12 + 12 * 11);
    }
}
