//! `checkpoint.json`: facts about a checkpoint, and the checksums of its files and of itself.
//!
//! It is written last. Every reader of a file in the folder compares its checksum ([`check`]). Flipped bits,
//! truncated files, and files of another step or another run are errors that name the file and the place.
//! Checksums are xxh3-128 of blocks, so that all cores share the work: gigabytes per second and core for a
//! file in the page cache.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, Result};
use crate::files;

/// The file's name.
pub(crate) const SEAL: &str = "checkpoint.json";
/// Bytes per checksum.
const BLOCK: usize = 64 << 20;
/// The key of the file's own checksum, which covers its text without this key.
const OWN: &str = "xxh3";

/// Writes `checkpoint.json` for the files `names` of a folder. `facts` is an object; its keys come first.
pub(crate) fn write(dir: &Path, names: &[&str], facts: Value) -> Result<()> {
    let mut body = facts.as_object().cloned().unwrap_or_default();
    body.insert("block_bytes".into(), BLOCK.into());
    let mut files = Map::new();
    for name in names {
        let bytes = files::map(&dir.join(name))?;
        files.insert((*name).into(), json!({ "bytes": bytes.len(), "xxh3": sums(&bytes, BLOCK) }));
    }
    body.insert("files".into(), files.into());
    files::write_atomic(&dir.join(SEAL), |out| out.write_all(text(&body).as_bytes()))
}

/// A `checkpoint.json` whose own checksum was correct.
pub(crate) struct Seal {
    body: Map<String, Value>,
}

impl Seal {
    /// Reads a folder's `checkpoint.json`. `None` if there is none: an older checkpoint, or not a checkpoint
    /// of ours.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(SEAL);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = files::read(&path)?;
        let damaged = || {
            Error::new(format!("{}: damaged: its checksum does not match", path.display()))
                .hint("use another checkpoint of the run, or a copy of this one")
        };
        let body: Value = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
        // A file of ours has both marks, and no single fault removes both. Without any it is another
        // program's file.
        let has = |word: &[u8]| bytes.windows(word.len()).any(|part| part == word);
        if !has(b"vitrum") && !has(b"\"block_bytes\"") {
            return Ok(None);
        }
        let Value::Object(mut body) = body else { return Err(damaged()) };
        body.shift_remove(OWN);
        // Compare the whole text: every byte counts, including blanks and the checksum.
        if text(&body).as_bytes() != bytes {
            return Err(damaged());
        }
        Ok(Some(Self { body }))
    }

    /// The checkpoint's facts: all keys except the list of files.
    pub(crate) fn facts(&self) -> Map<String, Value> {
        let is_fact = |(key, _): &(&String, &Value)| !["block_bytes", "files"].contains(&key.as_str());
        self.body.iter().filter(is_fact).map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// The names of its files.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.body.get("files").and_then(Value::as_object).into_iter().flat_map(Map::keys).map(String::as_str)
    }

    /// Compares a file's bytes with its checksums. A file that is not listed does not belong to the
    /// checkpoint.
    pub(crate) fn check(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(entry) = self.body.get("files").and_then(|files| files.get(&*name)) else { return Ok(()) };
        let damaged = |what: String| {
            Err(Error::new(format!("{}: damaged, or from another checkpoint: {what}", path.display()))
                .hint("use another checkpoint of the run, or a copy of this one"))
        };
        let (length, block) =
            (number(entry, "bytes"), number(&Value::Object(self.body.clone()), "block_bytes"));
        if length != Some(bytes.len()) {
            let length = length.map_or("an unknown number of".into(), |n| n.to_string());
            return damaged(format!("it has {} bytes, and {SEAL} says {length}", bytes.len()));
        }
        let block = block.unwrap_or(BLOCK).max(1);
        let want: Vec<&str> = entry
            .get("xxh3")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let found = sums(bytes, block);
        let differs = |i: &usize| found.get(*i).map(String::as_str) != want.get(*i).copied();
        match (0..found.len().max(want.len())).find(differs) {
            None => Ok(()),
            Some(i) => {
                let Range { start, end } = i * block..((i + 1) * block).min(bytes.len());
                damaged(format!("the checksum of bytes {start} to {end} does not match {SEAL}"))
            }
        }
    }
}

/// Compares the bytes of a file with the `checkpoint.json` beside it, if there is one.
pub(crate) fn check(path: &Path, bytes: &[u8]) -> Result<()> {
    match Seal::read(path.parent().unwrap_or(Path::new("")))? {
        Some(seal) => seal.check(path, bytes),
        None => Ok(()),
    }
}

/// The text of the whole file: the body, then the checksum of the body's text as the last key.
fn text(body: &Map<String, Value>) -> String {
    let of_body = serde_json::to_string(body).expect("JSON can be written");
    let mut whole = body.clone();
    whole.insert(OWN.into(), hex(of_body.as_bytes()).into());
    serde_json::to_string_pretty(&whole).expect("JSON can be written") + "\n"
}

fn sums(bytes: &[u8], block: usize) -> Vec<String> {
    bytes.par_chunks(block).map(hex).collect()
}

fn hex(bytes: &[u8]) -> String {
    format!("{:032x}", xxh3_128(bytes))
}

fn number(value: &Value, key: &str) -> Option<usize> {
    usize::try_from(value.get(key)?.as_u64()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed() -> (tempfile::TempDir, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..1000u32).map(|i| (i * i) as u8).collect();
        std::fs::write(dir.path().join("a"), &bytes).unwrap();
        write(dir.path(), &["a"], json!({ "format": "vitrum checkpoint", "epoch": 0.1, "step": 7 })).unwrap();
        (dir, bytes)
    }

    #[test]
    fn every_bit_of_the_file_itself_counts() {
        let (dir, bytes) = sealed();
        let seal = Seal::read(dir.path()).unwrap().unwrap();
        assert_eq!((seal.facts()["step"].as_u64(), seal.facts()["epoch"].as_f64()), (Some(7), Some(0.1)));
        seal.check(Path::new("a"), &bytes).unwrap();
        let path = dir.path().join(SEAL);
        let whole = std::fs::read(&path).unwrap();
        for bit in 0..8 * whole.len() {
            let mut text = whole.clone();
            text[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &text).unwrap();
            assert!(Seal::read(dir.path()).is_err(), "bit {bit}: {}", String::from_utf8_lossy(&text));
        }
        std::fs::write(&path, b"{\"iteration\": 5}").unwrap();
        assert!(Seal::read(dir.path()).unwrap().is_none(), "somebody else's");
    }

    #[test]
    fn a_fault_is_placed() {
        let (dir, mut bytes) = sealed();
        let path = dir.path().join("a");
        bytes[500] ^= 1;
        let message = check(&path, &bytes).unwrap_err().message().to_string();
        assert!(
            message.ends_with("the checksum of bytes 0 to 1000 does not match checkpoint.json"),
            "{message}"
        );
        let message = check(&path, &bytes[..999]).unwrap_err().message().to_string();
        assert!(message.ends_with("it has 999 bytes, and checkpoint.json says 1000"), "{message}");
        check(&dir.path().join("b"), &bytes).unwrap();
        assert_ne!(sums(&bytes, 400)[1], sums(&bytes, 400)[0]);
        assert_eq!(sums(&bytes, 400).len(), 3);
    }
}
