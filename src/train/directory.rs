//! The directory of a run. It holds one run, and is locked while a process works in it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::dist::rendezvous;
use crate::error::{At, Error, Result};
use crate::files;
use crate::report::format;

/// The file that a working process locks. The file stays; the lock ends with the process, however it ends.
const LOCK: &str = ".lock";

/// A run's directory, owned by this process.
pub struct Directory {
    path: PathBuf,
    /// `None` if the file system has no locks.
    _lock: Option<File>,
}

impl Directory {
    /// Creates a directory at `path`, or at `path-2`, `path-3`, ... if it exists: several runs may start in
    /// one second.
    pub fn numbered(path: &Path) -> Result<PathBuf> {
        if let Some(parent) = path.parent() {
            files::create_dir(parent)?;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for number in 1u32.. {
            let free =
                if number == 1 { path.into() } else { path.with_file_name(format!("{name}-{number}")) };
            match fs::create_dir(&free) {
                Ok(()) => return Ok(free),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::new(format!("{}: {e}", free.display()))),
            }
        }
        unreachable!("numbers do not end")
    }

    /// Takes `path` for one run: creates it if needed, and locks it.
    ///
    /// Errors: another process is working there; without `resume`, a run is there already; the folder holds
    /// other files and no run.
    pub fn open(path: &Path, resume: bool) -> Result<Self> {
        let elsewhere = "choose another folder with `--out DIR`";
        if path.exists() && !path.is_dir() {
            return Err(
                Error::new(format!("{} is a file, and a run needs a folder", path.display())).hint(elsewhere)
            );
        }
        if !has_run(path)
            && let Some(name) = stranger(path)
        {
            return Err(Error::new(format!("{} is not a run directory: it holds `{name}`", path.display()))
                .hint(elsewhere));
        }
        files::create_dir(path).map_err(|e| e.hint(elsewhere))?;
        let lock = lock(path)?;
        if has_run(path) && !resume {
            let (path, quoted) = (path.display(), format!("vitrum train --resume {}", path.display()));
            return Err(Error::new(format!("{path} already holds a run"))
                .hint(format!("`{quoted}` continues it; or choose another folder with `--out DIR`")));
        }
        files::sweep(path);
        Ok(Self { path: path.into(), _lock: lock })
    }

    /// A warning if `checkpoints` checkpoints of `bytes` each will not fit on the disk. Counts those already
    /// there.
    pub fn too_small_for(&self, checkpoints: usize, bytes: u64) -> Option<String> {
        let there = bytes_below(&self.path.join("checkpoints"));
        let needed = (checkpoints as u64 * bytes).saturating_sub(there);
        let disk = rustix::fs::statvfs(&self.path).ok()?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        (needed > free).then(|| {
            format!(
                "the disk of {} has {} left, but {checkpoints} checkpoints of {} need {} more: no more will be written when it is \
                 full; `--set train.keep=1` keeps fewer",
                self.path.display(),
                format::bytes(free),
                format::bytes(bytes),
                format::bytes(needed)
            )
        })
    }
}

fn has_run(path: &Path) -> bool {
    path.join("recipe.toml").exists() || path.join("checkpoints").exists()
}

/// A file in the folder that no run wrote.
fn stranger(path: &Path) -> Option<String> {
    let names = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name());
    // Where its ranks met, and the leftovers of a run that was killed before it wrote its recipe.
    let is_ours = |name: &str| {
        name == LOCK
            || name == rendezvous::FOLDER
            || (name.starts_with(".recipe.toml.") && name.ends_with(".tmp"))
    };
    names.map(|name| name.to_string_lossy().into_owned()).find(|name| !is_ours(name))
}

/// Locks the directory and writes the lock's owner to the lock file.
fn lock(path: &Path) -> Result<Option<File>> {
    let place = path.join(LOCK);
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&place).map_err(|e| {
            Error::new(format!("{}: {e}", place.display())).hint("choose another folder with `--out DIR`")
        })?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let holder = fs::read_to_string(&place).unwrap_or_default();
            let holder =
                holder.lines().next().filter(|line| !line.is_empty()).unwrap_or("another process").to_owned();
            return Err(Error::new(format!("{}: a run is already working there ({holder})", path.display()))
                .hint("wait for it, or stop it: it saves a checkpoint and ends"));
        }
        // Some network file systems have no locks. There the user must ensure one run per directory.
        Err(TryLockError::Error(_)) => return Ok(None),
    }
    let text = format!("process {} on {}\n", std::process::id(), host());
    file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).at(place.display())?;
    Ok(Some(file))
}

/// This machine's name.
pub fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map_or("this machine".into(), |name| name.trim().into())
}

fn bytes_below(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |file| file.len()),
        _ => 0,
    };
    entries.map(size).sum()
}

/// The default run directory: `runs/RECIPE-DATE`.
pub fn default_out(recipe_name: &str) -> PathBuf {
    let stem = Path::new(recipe_name).with_extension("").to_string_lossy().replace(['/', '\\'], "-");
    Path::new("runs").join(format!("{stem}-{}", utc_stamp(now())))
}

/// Seconds since 1970.
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// `20261124-150405` (days to a civil date: Howard Hinnant's algorithm).
pub fn utc_stamp(unix: u64) -> String {
    let (days, seconds) = ((unix / 86_400) as i64, unix % 86_400);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}-{h:02}{m:02}{s:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_the_utc_date() {
        assert_eq!(utc_stamp(0), "19700101-000000");
        assert_eq!(utc_stamp(951_827_696), "20000229-123456");
        assert_eq!(utc_stamp(1_795_532_645), "20261124-150405");
    }

    #[test]
    fn two_runs_of_one_second_have_two_directories() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs/demo-1");
        let names = ["demo-1", "demo-1-2", "demo-1-3"];
        assert_eq!(
            names.map(|_| Directory::numbered(&path).unwrap()),
            names.map(|n| dir.path().join("runs").join(n))
        );
    }

    #[test]
    fn a_directory_is_one_process_s_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let held = Directory::open(&run, false).unwrap();
        let refused = Directory::open(&run, true).err().unwrap();
        let me = format!("a run is already working there (process {} on {})", std::process::id(), host());
        assert!(refused.message().ends_with(&me), "{}", refused.message());
        drop(held);
        fs::write(run.join(".recipe.toml.77.tmp"), "x").unwrap();
        Directory::open(&run, false).unwrap();
        assert!(!run.join(".recipe.toml.77.tmp").exists());
        fs::write(run.join("thesis.tex"), "x").unwrap();
        let refused = Directory::open(&run, true).err().unwrap();
        assert!(refused.message().contains("`thesis.tex`"), "{}", refused.message());
    }

    #[test]
    fn a_file_is_no_place_for_a_run() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        fs::write(&file, "weights").unwrap();
        for resume in [false, true] {
            let refused = Directory::open(&file, resume).err().unwrap();
            assert!(
                refused.message().ends_with("is a file, and a run needs a folder"),
                "{}",
                refused.message()
            );
        }
        assert_eq!(fs::read(&file).unwrap(), b"weights");
    }

    #[test]
    fn a_disk_that_is_too_small_is_told_before() {
        let dir = tempfile::tempdir().unwrap();
        let run = Directory::open(&dir.path().join("run"), false).unwrap();
        assert_eq!(run.too_small_for(4, 1), None);
        let warning = run.too_small_for(4, 1 << 60).unwrap();
        assert!(warning.contains("4 checkpoints of") && warning.contains("train.keep=1"), "{warning}");
    }
}
