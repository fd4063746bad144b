//! Checks that a data set has not changed. While reading, it compares the checksums of shards; between runs,
//! a digest of the records.
//!
//! A shard's checksum is compared when the first of its records is read. In a set of more than [`AT_ONCE`]
//! bytes a run would wait too long for that, because a shuffled batch touches every shard. So a background
//! thread compares these shards in order. If a shard proves damaged, reading its next record is an error.

use std::sync::Arc;
use std::thread::JoinHandle;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{Dataset, Records, locate};
use crate::data::shard::Shard;
use crate::data::source::Item;
use crate::watch::{self, Stage};

/// Larger packed sets are compared in the background.
const AT_ONCE: usize = 1 << 30;
/// Records of an unpacked set that one checksum of a digest covers.
const CHUNK: usize = 1024;
/// For more files than this, reading all sizes from the file system would delay a resume.
const MOST_SIZES: usize = 200_000;

/// Which records a data set has, with their labels and sizes, but not their pixels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Digest {
    /// Number of records.
    pub records: usize,
    /// Number of records and a checksum (xxh3-64): a shard's own checksum, or that of names, labels and sizes
    /// for other data.
    parts: Vec<(usize, String)>,
    /// For unpacked data: a checksum that does not depend on the order of the records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unordered: Option<String>,
}

impl Digest {
    /// One line for people: xxh3-64 of all parts.
    pub fn short(&self) -> String {
        let mut hash = Xxh3::new();
        self.parts.iter().for_each(|(records, sum)| hash.update(format!("{records} {sum} ").as_bytes()));
        hex(&hash)
    }

    /// Whether another digest is known to have the same records, perhaps in another order.
    pub fn has_records_of(&self, other: &Digest) -> bool {
        self.records == other.records && self.unordered.is_some() && self.unordered == other.unordered
    }

    /// The range of records in which another digest may differ: the first, and the first that is equal again.
    pub fn difference(&self, other: &Digest) -> Option<(usize, usize)> {
        let (mine, others) = (&self.parts, &other.parts);
        let same = mine.iter().zip(others).take_while(|(a, b)| a == b).count();
        if same == mine.len().max(others.len()) {
            return None;
        }
        let first = mine[..same].iter().map(|(records, _)| records).sum();
        let len = mine.get(same).map_or(0, |part| part.0).max(others.get(same).map_or(0, |part| part.0));
        Some((first, first + len))
    }
}

impl Dataset {
    /// Uses shards without comparing their checksums.
    pub fn trust(&self) {
        match &self.records {
            Records::Packed { shards, .. } => shards.iter().for_each(Shard::trust),
            Records::Listed { .. } => {}
            Records::Mixture { parts, .. } => parts.iter().for_each(|(part, _)| part.trust()),
        }
    }

    /// An error if the shard of this sample is known to differ from what was packed.
    pub fn sound(&self, index: usize) -> crate::error::Result<()> {
        match &self.records {
            Records::Packed { shards, starts } => shards[locate(starts, self.place(index)).0].sound(),
            Records::Listed { .. } => Ok(()),
            Records::Mixture { parts, starts } => {
                let (part, at) = locate(starts, self.place(index));
                parts[part].0.sound(at)
            }
        }
    }

    /// Waits until every shard has been compared. Does not wait for a few samples of a large set.
    pub fn verified(&self) -> crate::error::Result<()> {
        match &self.records {
            _ if self.chosen.is_some() => Ok(()),
            Records::Packed { shards, .. } => shards.iter().try_for_each(|shard| {
                watch::progress(Stage::Loader);
                shard.verify()
            }),
            Records::Listed { .. } => Ok(()),
            Records::Mixture { parts, .. } => parts.iter().try_for_each(|(part, _)| part.verified()),
        }
    }

    /// Names, labels and sizes of the records; for packed data, the checksums of its manifest.
    pub fn digest(&self) -> Digest {
        let mut unordered = None;
        let parts = match &self.records {
            Records::Packed { shards, .. } => shards.iter().map(|s| (s.len(), s.listed_checksum())).collect(),
            Records::Listed { source, split } => {
                let items = source.items(*split);
                let sized = items.len() <= MOST_SIZES;
                let line = |item: &Item| {
                    let size = if sized { source.store.size(item) } else { None };
                    format!("{:?} {:?} {size:?}\n", item.name, item.labels())
                };
                let part = |items: &[Item]| {
                    let mut hash = Xxh3::new();
                    items.iter().for_each(|item| hash.update(line(item).as_bytes()));
                    (items.len(), hex(&hash))
                };
                let sum: u64 = (0..self.len())
                    .into_par_iter()
                    .map(|index| xxh3_64(line(&items[self.place(index)]).as_bytes()))
                    .reduce(|| 0, u64::wrapping_add);
                unordered = Some(format!("{sum:016x}"));
                items.par_chunks(CHUNK).map(part).collect()
            }
            Records::Mixture { parts, .. } => {
                let of = |(part, weight): &(Dataset, f64)| {
                    let digest = part.digest();
                    let mut parts = digest.parts;
                    parts.push((0, format!("weight {weight}")));
                    parts
                };
                parts.iter().flat_map(of).collect()
            }
        };
        match &self.chosen {
            None => Digest { records: self.len(), parts, unordered },
            Some(chosen) => {
                let all = Digest { parts, ..Digest::default() }.short();
                let indices: Vec<u8> = chosen.iter().flat_map(|i| (*i as u64).to_le_bytes()).collect();
                let sum = format!("{all}-{:016x}", xxh3_64(&indices));
                Digest { records: chosen.len(), parts: vec![(chosen.len(), sum)], unordered }
            }
        }
    }
}

fn hex(hash: &Xxh3) -> String {
    format!("{:016x}", hash.digest())
}

/// Has large sets compared by a background thread: see the head of this file.
pub(super) fn watch(shards: Arc<Vec<Shard>>) -> Arc<Vec<Shard>> {
    let bytes: usize = shards.iter().map(Shard::byte_len).sum();
    if bytes <= AT_ONCE {
        return shards;
    }
    shards.iter().for_each(Shard::verified_elsewhere);
    if beside(&shards).is_err() {
        // Without a thread each shard is compared before its first record is used.
        shards.iter().for_each(Shard::verified_here);
    }
    shards
}

/// Compares one shard after the other in a background thread.
fn beside(shards: &Arc<Vec<Shard>>) -> std::io::Result<JoinHandle<()>> {
    let (watched, count) = (Arc::downgrade(shards), shards.len());
    std::thread::Builder::new().name("checksums".into()).spawn(move || {
        for index in 0..count {
            // A data set that has been dropped needs no check.
            let Some(shards) = watched.upgrade() else { return };
            let _ = shards[index].verify();
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::shard::{Kind, ShardWriter};

    /// Ten records of one class each, from `first` on.
    fn packed(first: usize) -> Vec<u8> {
        let mut writer = ShardWriter::new(Kind::Encoded);
        (first..first + 10).for_each(|i| writer.push(i, &format!("name {i}"), &[i as u8; 64]));
        let mut bytes = Vec::new();
        writer.write(&mut bytes).unwrap();
        bytes
    }

    /// Shards as a manifest lists them; one bit of `flipped`'s first record is flipped.
    fn listed(flipped: Option<usize>) -> Vec<Shard> {
        let shard = |number: usize| {
            let mut bytes = packed(10 * number);
            let checksum = Shard::from_bytes(bytes.clone(), 30).unwrap().checksum();
            if flipped == Some(number) {
                let at = bytes.windows(64).position(|bytes| bytes == [10 * number as u8; 64]).unwrap();
                bytes[at] ^= 1;
            }
            let name = format!("0000{number}.safetensors");
            Shard::from_bytes(bytes, 30).unwrap().listed(name.into(), &checksum, 10 * number)
        };
        (0..3).map(shard).collect()
    }

    fn dataset(shards: Vec<Shard>) -> Dataset {
        Dataset {
            name: "test".into(),
            classes: (0..30).map(|c| c.to_string()).collect(),
            records: Records::packed(shards),
            chosen: None,
            relabel: None,
            numbered: false,
            of_classes: None,
        }
    }

    #[test]
    fn a_damaged_shard_is_found_before_its_first_record() {
        let whole = dataset(listed(None));
        assert!((0..30).all(|i| whole.sound(i).is_ok()) && whole.verified().is_ok());

        let damaged = dataset(listed(Some(1)));
        assert!((0..30).all(|i| damaged.sound(i).is_ok() != (10..20).contains(&i)));
        let error = damaged.verified().unwrap_err().to_string();
        assert!(error.contains("00001.safetensors: damaged: the checksum is "), "{error}");
        assert!(error.contains("it holds the records 10 to 19") && error.contains("data.verify=false"));

        let trusted = dataset(listed(Some(1)));
        trusted.trust();
        assert!((0..30).all(|i| trusted.sound(i).is_ok()) && trusted.verified().is_ok());
    }

    #[test]
    fn large_sets_are_compared_beside_the_run() {
        let shards = Arc::new(listed(Some(2)));
        shards.iter().for_each(Shard::verified_elsewhere);
        assert!(shards.iter().all(|shard| shard.sound().is_ok()), "nobody has compared them yet");
        beside(&shards).unwrap().join().unwrap();
        let sound: Vec<bool> = shards.iter().map(|shard| shard.sound().is_ok()).collect();
        assert_eq!(sound, [true, true, false]);
    }

    #[test]
    fn digests_tell_where_records_differ() {
        let (ours, same) = (dataset(listed(None)).digest(), dataset(listed(None)).digest());
        assert_eq!((ours.records, ours.difference(&same)), (30, None));
        let mut shards = listed(None);
        shards[1] = Shard::from_bytes(packed(20), 30).unwrap();
        assert_eq!(ours.difference(&dataset(shards).digest()), Some((10, 20)));
        let mut shards = listed(None);
        shards.truncate(2);
        assert_eq!(ours.difference(&dataset(shards).digest()), Some((20, 30)));
        // A part of the same records is another set.
        assert!(ours.difference(&dataset(listed(None)).take(29).digest()).is_some());
    }
}
