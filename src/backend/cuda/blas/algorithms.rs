//! The algorithms that timing has chosen, in a file of the cache folder: one per card, library version and precision.
//!
//! Two runs that share the file use the same algorithms and so give the same bits. A file that cannot be read or written
//! costs one warning and the time to choose again, never the run.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::backend::Precision;
use crate::files;
use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;

/// The file and what it says.
pub(super) struct Algorithms {
    path: Option<PathBuf>,
    /// Shape → the words of its algorithm.
    entries: BTreeMap<String, [u64; 8]>,
    changed: bool,
}

impl Algorithms {
    pub(super) fn open(card: &str, version: usize, precision: Precision) -> Self {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let card: String = card.chars().map(plain).collect();
        let name = format!("{card}-cublaslt-{version}-{precision:?}.json").to_lowercase();
        let path = Some(files::cache_dir().join("matmul").join(name));
        let entries = path.as_ref().filter(|path| path.is_file()).and_then(|path| {
            let text = std::fs::read_to_string(path).map_err(|e| e.to_string());
            let entries = text.and_then(|text| serde_json::from_str(&text).map_err(|e| e.to_string()));
            entries
                .map_err(|why| eprintln!("warning: {}: {why}; algorithms are chosen anew", path.display()))
                .ok()
        });
        Self { path, entries: entries.unwrap_or_default(), changed: false }
    }

    pub(super) fn get(&self, key: &str) -> Option<cublasLtMatmulAlgo_t> {
        self.entries.get(key).map(|words| cublasLtMatmulAlgo_t { data: *words })
    }

    pub(super) fn put(&mut self, key: String, algorithm: cublasLtMatmulAlgo_t) {
        self.entries.insert(key, algorithm.data);
        self.changed = true;
    }

    pub(super) fn save(&mut self) {
        let (true, Some(path)) = (std::mem::take(&mut self.changed), &self.path) else { return };
        let text = serde_json::to_string_pretty(&self.entries).expect("plain data is JSON");
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).map_err(|e| e.to_string());
        let written = written.and_then(|()| {
            files::write_atomic(path, |to| std::io::Write::write_all(to, text.as_bytes()))
                .map_err(|e| e.to_string())
        });
        if let Err(why) = written {
            eprintln!("warning: {}: {why}; the next run chooses algorithms again", path.display());
        }
    }
}
