//! The choices made by timing, in a file of the cache folder: one file per GPU, library version and
//! precision. It holds the algorithm of each product, and for each product with work around it the way: fused
//! into the product, or a plain product and our kernels.
//!
//! Two runs that share the file make the same choices and so produce the same bits. If the file cannot be
//! read or written, the run gives one warning and chooses again; it does not fail. A checkpoint stores the
//! choices of its run, and a resumed run prefers them to the file's.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::backend::Precision;
use crate::files;
use crate::terminal;
use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;

/// The file, its contents, and the choices that this run uses.
pub(super) struct Algorithms {
    path: Option<PathBuf>,
    /// GPU, library and precision: choices made for others do not apply.
    of: String,
    entries: Choices,
    changed: bool,
    /// The same for the shapes of this run, including those of its checkpoint.
    used: Choices,
}

#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Choices {
    /// Product → the words of its algorithm.
    algorithms: BTreeMap<String, [u64; 8]>,
    /// Product with the work around it → its way.
    ways: BTreeMap<String, Chosen>,
}

/// The name of the chosen way, and the time of each one.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(in crate::backend::cuda) struct Chosen {
    pub(in crate::backend::cuda) way: String,
    pub(in crate::backend::cuda) microseconds: BTreeMap<String, f32>,
}

/// Prefix of a checkpoint's lines that name a way.
const WAY: &str = "way of ";

impl Algorithms {
    pub(super) fn open(gpu: &str, version: usize, precision: Precision) -> Self {
        let of = format!("{gpu}, cuBLASLt {version}, {precision:?}");
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let gpu: String = gpu.chars().map(plain).collect();
        let name = format!("{gpu}-cublaslt-{version}-{precision:?}-choices.json").to_lowercase();
        let path = Some(files::cache_dir().join("matmul").join(name));
        let entries = path.as_ref().filter(|path| path.is_file()).and_then(|path| {
            let text = std::fs::read_to_string(path).map_err(|e| e.to_string());
            let entries = text.and_then(|text| serde_json::from_str(&text).map_err(|e| e.to_string()));
            entries
                .map_err(|why| {
                    terminal::warn(&format!("{}: {why}; algorithms are chosen again", path.display()))
                })
                .ok()
        });
        Self { path, of, entries: entries.unwrap_or_default(), changed: false, used: Choices::default() }
    }

    /// The run's choices as text, for a checkpoint: first GPU, library and precision, then one line per
    /// product and per way.
    pub(super) fn in_words(&self) -> Vec<String> {
        let algorithm = |(key, words): (&String, &[u64; 8])| {
            let words: Vec<String> = words.iter().map(|word| format!("{word:x}")).collect();
            format!("{key}: {}", words.join(" "))
        };
        let way = |(key, chosen): (&String, &Chosen)| format!("{WAY}{key}: {}", chosen.way);
        std::iter::once(self.of.clone())
            .chain(self.used.algorithms.iter().map(algorithm))
            .chain(self.used.ways.iter().map(way))
            .collect()
    }

    /// Adopts the output of [`Algorithms::in_words`] from another process, or says why it does not apply.
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
        let mut choices = Choices::default();
        for line in lines {
            choices.read(line).ok_or("the algorithms of the checkpoint cannot be read")?;
        }
        self.used = choices;
        Ok(())
    }

    /// Whether the run's checkpoint names an algorithm for this shape. Call it before the shape first occurs.
    pub(super) fn is_preferred(&self, key: &str) -> bool {
        self.used.algorithms.contains_key(key)
    }

    pub(super) fn get(&self, key: &str) -> Option<cublasLtMatmulAlgo_t> {
        let words = self.used.algorithms.get(key).or_else(|| self.entries.algorithms.get(key))?;
        Some(cublasLtMatmulAlgo_t { data: *words })
    }

    /// Stores the fastest, for later runs.
    pub(super) fn put(&mut self, key: String, algorithm: cublasLtMatmulAlgo_t) {
        let before = self.entries.algorithms.insert(key, algorithm.data);
        self.changed |= before != Some(algorithm.data);
    }

    /// Marks it as used by the run.
    pub(super) fn take(&mut self, key: String, algorithm: cublasLtMatmulAlgo_t) {
        self.used.algorithms.insert(key, algorithm.data);
    }

    /// The way that the checkpoint or the file names.
    pub(super) fn way(&self, key: &str) -> Option<&Chosen> {
        self.used.ways.get(key).or_else(|| self.entries.ways.get(key))
    }

    /// Stores the fastest, for later runs.
    pub(super) fn put_way(&mut self, key: &str, chosen: &Chosen) {
        let before = self.entries.ways.insert(key.to_string(), chosen.clone());
        self.changed |= before.as_ref() != Some(chosen);
    }

    /// Marks it as used by the run.
    pub(super) fn take_way(&mut self, key: String, chosen: Chosen) {
        self.used.ways.insert(key, chosen);
    }

    /// The ways of this run.
    pub(super) fn ways(&self) -> impl Iterator<Item = (&String, &Chosen)> {
        self.used.ways.iter()
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
            terminal::warn(&format!("{}: {why}; the next run chooses algorithms again", path.display()));
        }
    }
}

impl Choices {
    /// A line of [`Algorithms::in_words`].
    fn read(&mut self, line: &str) -> Option<()> {
        let (key, value) = line.rsplit_once(": ")?;
        if let Some(key) = key.strip_prefix(WAY) {
            let chosen = Chosen { way: value.to_string(), microseconds: BTreeMap::new() };
            self.ways.insert(key.to_string(), chosen);
            return Some(());
        }
        let words: Option<Vec<u64>> = value.split(' ').map(|w| u64::from_str_radix(w, 16).ok()).collect();
        self.algorithms.insert(key.to_owned(), words?.try_into().ok()?);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_carries_every_choice() {
        let mut run = Algorithms::open("Test GPU", 1, Precision::Bf16);
        let words = [1, 2, 3, u64::MAX, 0, 0, 0, 9];
        run.put("tn m4".into(), cublasLtMatmulAlgo_t { data: words }); // tried and not used
        run.take("tn m8".into(), cublasLtMatmulAlgo_t { data: words });
        let times = BTreeMap::from([("fused".to_string(), 1.5)]);
        run.take_way("gelu m8".into(), Chosen { way: "plain".into(), microseconds: times });
        let mut resumed = Algorithms::open("Test GPU", 1, Precision::Bf16);
        resumed.prefer(&run.in_words()).unwrap();
        assert_eq!(resumed.get("tn m8").unwrap().data, words);
        assert!(resumed.get("tn m4").is_none());
        assert_eq!(resumed.way("gelu m8").unwrap().way, "plain");
        assert_eq!(resumed.in_words(), run.in_words());

        let mut other = Algorithms::open("Another GPU", 1, Precision::Bf16);
        assert!(other.prefer(&run.in_words()).is_err());
        assert!(resumed.prefer(&["Test GPU, cuBLASLt 1, Bf16".into(), "no value".into()]).is_err());
    }
}
