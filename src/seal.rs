//! `checkpoint.json`: what a checkpoint is, and the checksums of its files and of itself.
//!
//! It is written last, and whoever opens a file of the folder compares ([`check`]): a bit that flipped on a disk or on the
//! way, a file that was cut, and a file of another step or another run are errors that name the file and the place.
//! Checksums are xxh3-128 of blocks, so that all cores share the work: of a file in the page cache, gigabytes per second
//! and core.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, Result};
use crate::files;

/// The file's name.
pub const SEAL: &str = "checkpoint.json";
/// Bytes that a checksum covers.
const BLOCK: usize = 64 << 20;
/// The checksum of the file itself: of its text without this key.
const OWN: &str = "xxh3";

/// Writes `checkpoint.json` over the files of a folder. `facts` are the checkpoint's, an object; they come first.
pub fn write(dir: &Path, names: &[&str], facts: Value) -> Result<()> {
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

/// A `checkpoint.json` whose own checksum is right.
pub struct Seal {
    body: Map<String, Value>,
}

impl Seal {
    /// That of a folder; `None` where it has none: a checkpoint of before, or no checkpoint of ours.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(SEAL);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = files::read(&path)?;
        let damaged = || {
            Error::new(format!("{}: damaged: it is not what was written", path.display()))
                .hint("take another checkpoint of the run, or a copy of this one")
        };
        let body: Value = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
        // Two marks, of which no single fault removes both: somebody else's file of that name is none of our business.
        let has = |word: &[u8]| bytes.windows(word.len()).any(|part| part == word);
        if !has(b"vitrum") && !has(b"\"block_bytes\"") {
            return Ok(None);
        }
        let Value::Object(mut body) = body else { return Err(damaged()) };
        body.shift_remove(OWN);
        // Compared as a whole: every byte counts, blanks and the checksum too.
        if text(&body).as_bytes() != bytes {
            return Err(damaged());
        }
        Ok(Some(Self { body }))
    }

    /// What it says of the checkpoint besides its files.
    pub fn facts(&self) -> Map<String, Value> {
        let is_fact = |(key, _): &(&String, &Value)| !["block_bytes", "files"].contains(&key.as_str());
        self.body.iter().filter(is_fact).map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// The names of its files.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.body.get("files").and_then(Value::as_object).into_iter().flat_map(Map::keys).map(String::as_str)
    }

    /// Compares a file's bytes. A file that is not listed is none of the checkpoint's.
    pub fn check(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(entry) = self.body.get("files").and_then(|files| files.get(&*name)) else { return Ok(()) };
        let damaged = |what: String| {
            Err(Error::new(format!("{}: damaged, or of another checkpoint: {what}", path.display()))
                .hint("take another checkpoint of the run, or a copy of this one"))
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
                damaged(format!("bytes {start} to {end} are not those that {SEAL} has the checksum of"))
            }
        }
    }
}

/// Compares the bytes of a file with the `checkpoint.json` beside it, if there is one.
pub fn check(path: &Path, bytes: &[u8]) -> Result<()> {
    match Seal::read(path.parent().unwrap_or(Path::new("")))? {
        Some(seal) => seal.check(path, bytes),
        None => Ok(()),
    }
}

/// The whole file: the body, and the checksum of its text as the last key.
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
            message.ends_with("bytes 0 to 1000 are not those that checkpoint.json has the checksum of"),
            "{message}"
        );
        let message = check(&path, &bytes[..999]).unwrap_err().message().to_string();
        assert!(message.ends_with("it has 999 bytes, and checkpoint.json says 1000"), "{message}");
        check(&dir.path().join("b"), &bytes).unwrap();
        assert_ne!(sums(&bytes, 400)[1], sums(&bytes, 400)[0]);
        assert_eq!(sums(&bytes, 400).len(), 3);
    }
}
