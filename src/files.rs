//! Files: errors name the file, and writes are atomic.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, ErrorKind, Seek, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{At, Error, Result};

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).at(path.display())
}

/// Reads a whole UTF-8 file, without the byte order mark that editors on other systems write.
pub fn read_text(path: &Path) -> Result<String> {
    let mut text = fs::read_to_string(path).at(path.display())?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// Opens a file for buffered reading.
pub fn open(path: &Path) -> Result<BufReader<File>> {
    Ok(BufReader::new(File::open(path).at(path.display())?))
}

/// Maps a whole file into memory. The kernel reads its pages on first access and owns them.
pub fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).at(path.display())?;
    // SAFETY: the map is only read. No other process may shorten a file while it is mapped. Our own writers
    // replace a file by renaming a finished one (`write_atomic`), which leaves the mapped file unchanged.
    unsafe { Mmap::map(&file) }.at(path.display())
}

/// Creates a folder and its parents.
pub fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).at(path.display())
}

/// A new file. Archive writers also seek.
pub trait WriteSeek: Write + Seek {}

impl WriteSeek for BufWriter<File> {}

/// Writes a file atomically: a reader sees the old content or the new, never a part. Writes a temporary file
/// in the same folder, syncs it and renames it. On any failure (such as a full disk) it removes the temporary
/// file.
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut dyn WriteSeek) -> std::io::Result<()>,
) -> Result<()> {
    let path = &regular(path)?;
    let temporary = temporary_name(path);
    let result = (|| {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        fs::rename(&temporary, path)
    })();
    if let Err(e) = result {
        let _ = fs::remove_file(&temporary);
        return Err(cannot_write(path, &e));
    }
    if let Some(parent) = path.parent() {
        sync_dir(parent);
    }
    Ok(())
}

/// The error for a file that could not be written.
pub fn cannot_write(path: &Path, e: &std::io::Error) -> Error {
    let error = Error::new(format!("{}: {e}", path.display()));
    match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            error.hint("the disk is full: free some space; nothing was replaced")
        }
        ErrorKind::FileTooLarge => error.hint("raise the limit with `ulimit -f`; nothing was replaced"),
        _ => error,
    }
}

/// Where a file is to be written: a link's target. A device or a pipe is refused, because a rename would replace it.
fn regular(path: &Path) -> Result<PathBuf> {
    let Ok(there) = fs::metadata(path) else { return Ok(path.to_owned()) };
    if !there.is_file() {
        let what = if there.is_dir() { "a folder" } else { "a device or a pipe" };
        return Err(
            Error::new(format!("{}: {what}, not a regular file", path.display())).hint("name another file")
        );
    }
    if fs::symlink_metadata(path).is_ok_and(|link| link.is_symlink()) {
        fs::canonicalize(path).at(path.display())
    } else {
        Ok(path.to_owned())
    }
}

/// Makes a rename inside `dir` durable. Best effort: some file systems cannot sync a folder.
pub fn sync_dir(dir: &Path) {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    if let Ok(handle) = File::open(dir) {
        let _ = handle.sync_all();
    }
}

/// Puts the folder `new` at `place` in one step, so that a process that is killed leaves the old one or the new
/// one. The old one, if there is one, is then removed.
///
/// # Errors
/// The rename fails; then the old one is untouched.
pub fn replace_dir(new: &Path, place: &Path) -> Result<()> {
    if place.exists() {
        let here = rustix::fs::CWD;
        match rustix::fs::renameat_with(here, new, here, place, rustix::fs::RenameFlags::EXCHANGE) {
            Ok(()) => {
                let _ = fs::remove_dir_all(new);
                return Ok(());
            }
            // Not every file system can exchange two names.
            Err(_) => {
                let old = temporary_name(&place.with_extension("old"));
                let _ = fs::remove_dir_all(&old);
                fs::rename(place, &old).at(place.display())?;
                fs::rename(new, place).at(place.display())?;
                let _ = fs::remove_dir_all(&old);
                return Ok(());
            }
        }
    }
    fs::rename(new, place).at(place.display())
}

/// Removes the leftovers of killed writers from a folder: files, links and folders called `.NAME.PID.tmp`. No
/// other process may be writing there. Leaves all other names alone. Best effort.
pub fn sweep(dir: &Path) {
    let is_ours = |name: &str| {
        let stem = name.strip_prefix('.').and_then(|n| n.strip_suffix(".tmp"));
        let parts = stem.and_then(|stem| stem.rsplit_once('.'));
        parts.is_some_and(|(name, pid)| {
            !name.is_empty() && !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit())
        })
    };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_ours) {
            let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
        }
    }
}

fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// The cache folder: `$VITRUM_CACHE`, else `~/.cache/vitrum`.
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("VITRUM_CACHE").filter(|d| !d.is_empty()) {
        return PathBuf::from(dir);
    }
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_else(std::env::temp_dir);
    home.join(".cache/vitrum")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_where_a_link_points_and_never_over_a_device() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "before").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        write_atomic(&link, |out| out.write_all(b"after")).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"after");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [&socket, dir.path()] {
            let refused = write_atomic(path, |out| out.write_all(b"after")).unwrap_err();
            assert!(refused.message().ends_with("not a regular file"), "{refused}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing is left behind");
    }
}
