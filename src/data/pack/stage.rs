//! The folder in which a data set is assembled, and the state that survives a kill.
//!
//! It is beside the destination, hence on the same file system, and is renamed when it is complete. Its
//! `progress.json` lists the complete shards and is replaced after each. A lock keeps a second pack out.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::data::dataset::ShardEntry;
use crate::error::{At, Error, Result};
use crate::files;
use crate::terminal;

const PROGRESS: &str = "progress.json";

/// A complete shard.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Finished {
    /// Folder of its data set.
    pub(super) part: String,
    pub(super) shard: ShardEntry,
    /// Records of the split in this shard and those before, including records that were left out.
    pub(super) done: usize,
    pub(super) skipped: usize,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Progress {
    fingerprint: String,
    shards: Vec<Finished>,
}

/// If it is dropped before it is published, it removes the folder unless it has a complete shard.
pub(super) struct Stage {
    dir: PathBuf,
    progress: Progress,
    /// Holds the lock.
    _lock: File,
    keep: bool,
}

impl Stage {
    /// Makes the folder, or continues with what an earlier run of the same pack (`fingerprint`) left.
    pub(super) fn open(dest: &Path, fingerprint: String) -> Result<Self> {
        let name = dest.file_name().ok_or_else(|| {
            Error::usage(format!("`{}` does not name a folder to pack into", dest.display()))
        })?;
        let mut parent = dest.parent().unwrap_or(Path::new(""));
        while !parent.as_os_str().is_empty() && !parent.is_dir() {
            parent = parent.parent().unwrap_or(Path::new(""));
        }
        let dir = parent.join(format!(".{}.partial", name.to_string_lossy()));
        files::create_dir(&dir)?;
        let lock = File::open(&dir).at(dir.display())?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::new(format!(
                "{}: another `vitrum pack` is already working there",
                dir.display()
            ))
            .hint("wait for it, or choose another destination"));
        }
        let mut progress: Progress = fs::read(dir.join(PROGRESS))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default();
        let is_whole = |f: &Finished| dir.join(&f.part).join(&f.shard.file).is_file();
        if progress.fingerprint != fingerprint || !progress.shards.iter().all(is_whole) {
            // From another pack, or from before its first shard.
            for entry in fs::read_dir(&dir).at(dir.display())? {
                let path = entry.at(dir.display())?.path();
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.at(path.display())?;
            }
            progress = Progress { fingerprint, shards: Vec::new() };
        } else if !progress.shards.is_empty() {
            let records: usize = progress.shards.iter().map(|f| f.shard.records).sum();
            terminal::say(&format!("continuing after {records} records that are already packed"));
        }
        Ok(Self { dir, progress, _lock: lock, keep: false })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// How many of a split's records are done, and how many of these were left out.
    pub(super) fn resume(&self, part: &str) -> (usize, usize) {
        let last = self.progress.shards.iter().rfind(|f| f.part == part);
        last.map_or((0, 0), |f| (f.done, f.skipped))
    }

    /// The complete shards of a split.
    pub(super) fn shards(&self, part: &str) -> Vec<ShardEntry> {
        self.progress.shards.iter().filter(|f| f.part == part).map(|f| f.shard.clone()).collect()
    }

    /// Records that a shard has been written.
    pub(super) fn finish(&mut self, shard: Finished) -> Result<()> {
        self.progress.shards.push(shard);
        let text = serde_json::to_vec(&self.progress).at(PROGRESS)?;
        files::write_atomic(&self.dir.join(PROGRESS), |out| out.write_all(&text))
    }

    /// A failure removes everything. A signal keeps the complete shards, so that the same command can
    /// continue.
    pub(super) fn give_up(mut self, error: Error) -> Error {
        self.keep =
            matches!(error.kind(), crate::error::Kind::Stopped(_)) && !self.progress.shards.is_empty();
        match self.keep {
            true => error.hint("the same command continues after the last complete shard"),
            false => error,
        }
    }

    /// Renames the data set to its destination.
    pub(super) fn publish(self, dest: &Path) -> Result<()> {
        if let Some(parent) = dest.parent().filter(|p| !p.as_os_str().is_empty()) {
            files::create_dir(parent)?;
        }
        let _ = fs::remove_file(self.dir.join(PROGRESS));
        fs::rename(&self.dir, dest)
            .map_err(|e| Error::new(format!("{}: cannot be put in place: {e}", dest.display())))?;
        files::sync_dir(dest.parent().unwrap_or(Path::new("")));
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.keep {
            // After `publish` there is nothing left to remove.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
