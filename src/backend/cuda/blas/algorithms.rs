//! The algorithms that timing has chosen, in a file of the cache folder: one per card, library version and precision.
//!
//! Two runs that share the file use the same algorithms and so give the same bits. A file that cannot be read or written
//! costs one warning and the time to choose again, never the run. A checkpoint names those of its run, and a resumed run
//! prefers them to the file's.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::backend::Precision;
use crate::files;
use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;

/// The file and what it says, and what this run uses.
pub(super) struct Algorithms {
    path: Option<PathBuf>,
    /// Card, library and precision: algorithms of others mean nothing here.
    of: String,
    /// Shape → the words of its algorithm.
    entries: BTreeMap<String, [u64; 8]>,
    changed: bool,
    /// The same for the shapes of this run, those of its checkpoint included.
    used: BTreeMap<String, [u64; 8]>,
}

impl Algorithms {
    pub(super) fn open(card: &str, version: usize, precision: Precision) -> Self {
        let of = format!("{card}, cuBLASLt {version}, {precision:?}");
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
        Self { path, of, entries: entries.unwrap_or_default(), changed: false, used: BTreeMap::new() }
    }

    /// The run's algorithms in words, for a checkpoint: whose they are, then one line per shape.
    pub(super) fn in_words(&self) -> Vec<String> {
        let line = |(key, words): (&String, &[u64; 8])| {
            let words: Vec<String> = words.iter().map(|word| format!("{word:x}")).collect();
            format!("{key}: {}", words.join(" "))
        };
        std::iter::once(self.of.clone()).chain(self.used.iter().map(line)).collect()
    }

    /// Takes over what [`Algorithms::in_words`] gave in another process, or says why that is of no use.
    pub(super) fn prefer(&mut self, in_words: &[String]) -> Result<(), String> {
        let Some((of, lines)) = in_words.split_first() else {
            return Err("the checkpoint names no algorithms".into());
        };
        if *of != self.of {
            return Err(format!(
                "the algorithms of the checkpoint are those of {of}, and this is {}",
                self.of
            ));
        }
        let parse = |line: &String| {
            let (key, words) = line.rsplit_once(": ")?;
            let words: Option<Vec<u64>> = words.split(' ').map(|w| u64::from_str_radix(w, 16).ok()).collect();
            Some((key.to_owned(), <[u64; 8]>::try_from(words?).ok()?))
        };
        let parsed: Option<BTreeMap<_, _>> = lines.iter().map(parse).collect();
        self.used = parsed.ok_or("the algorithms of the checkpoint cannot be read")?;
        Ok(())
    }

    /// Does the run's checkpoint name one for this shape? Asked before the shape is first met.
    pub(super) fn is_preferred(&self, key: &str) -> bool {
        self.used.contains_key(key)
    }

    pub(super) fn get(&self, key: &str) -> Option<cublasLtMatmulAlgo_t> {
        let words = self.used.get(key).or_else(|| self.entries.get(key))?;
        Some(cublasLtMatmulAlgo_t { data: *words })
    }

    /// The run takes this one for a shape.
    pub(super) fn take(&mut self, key: String, algorithm: cublasLtMatmulAlgo_t) {
        self.used.insert(key, algorithm.data);
    }

    /// The run takes this one after timing it, and others may have it, too.
    pub(super) fn put(&mut self, key: String, algorithm: cublasLtMatmulAlgo_t) {
        self.entries.insert(key.clone(), algorithm.data);
        self.changed = true;
        self.take(key, algorithm);
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
