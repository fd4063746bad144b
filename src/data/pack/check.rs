//! `vitrum pack --check`: compares a packed data set with its `dataset.json`, down to every picture.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::data::dataset::{MANIFEST, Manifest, ShardEntry};
use crate::data::decode::Decoder;
use crate::data::shard::{Record, Shard};
use crate::error::{Error, Result};
use crate::fail;

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Number of shards that were read.
    pub shards: usize,
    /// Number of records that were read.
    pub records: usize,
    /// One sentence for each fault.
    pub faults: Vec<String>,
}

/// Checks a packed data set, or all of them in the folders of `dir`.
pub fn check(dir: &Path) -> Result<Checked> {
    let mut sets: Vec<PathBuf> = match Manifest::is_in(dir) {
        true => vec![dir.to_owned()],
        false => {
            let parts = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
            parts.filter(|part| Manifest::is_in(part)).collect()
        }
    };
    sets.sort();
    if sets.is_empty() {
        return Err(Error::new(format!("{}: no packed data set", dir.display()))
            .hint("pack one with `vitrum pack SOURCE DEST`"));
    }
    let mut checked = Checked::default();
    for set in sets {
        let manifest = Manifest::read(&set)?;
        let mut first = 0;
        for entry in &manifest.shards {
            checked.shards += 1;
            let checked_shard = check_shard(&set.join(&entry.file), entry, manifest.classes.len(), first);
            first += entry.records;
            match checked_shard {
                Ok(faults) => {
                    checked.records += entry.records;
                    checked.faults.extend(faults);
                }
                Err(error) => checked.faults.push(error.message().to_owned()),
            }
        }
        let listed: usize = manifest.shards.iter().map(|s| s.records).sum();
        if listed != manifest.records {
            checked.faults.push(format!(
                "{}: `records` is {}, but its shards have {listed}",
                set.join(MANIFEST).display(),
                manifest.records
            ));
        }
    }
    Ok(checked)
}

/// Faults of single records; an error if the shard as a whole is wrong.
fn check_shard(path: &Path, entry: &ShardEntry, classes: usize, first: usize) -> Result<Vec<String>> {
    let shard = Shard::open(path, classes)?.listed(path.into(), &entry.checksum, first);
    shard.verify()?;
    if shard.len() != entry.records {
        fail!("{}: {} records, not {}", path.display(), shard.len(), entry.records);
    }
    let fault = |decoder: &mut Decoder, index: usize| match shard.record(index) {
        Record::Raw { .. } => None,
        Record::Encoded(bytes) => decoder.decode(&bytes).err().map(|e| {
            let name = shard.name(index).unwrap_or_default();
            format!("{}: record {index} `{name}`: {}", path.display(), e.message())
        }),
    };
    Ok((0..shard.len()).into_par_iter().map_init(Decoder::default, fault).flatten().collect())
}
