//! Loading weights: time until every value has been read once, and what it costs in memory.
//!
//!     cargo bench -p vitrum-benches --bench load                      L/16 with random weights in every layout (5 GB of temporary files)
//!     cargo bench -p vitrum-benches --bench load -- --model B/16      another size
//!     cargo bench -p vitrum-benches --bench load -- FILE...           these files
//!     cargo bench -p vitrum-benches --bench load -- --keep DIR        leaves the files in DIR
//!     cargo bench -p vitrum-benches --bench load -- --json FILE       one run, one JSON object: for `benches/load.py`, which compares with torch
//!
//! Each file is written just before, so it is in the page cache. `read` opens a file and sums all its
//! tensors; `load` puts the model on the device as `vitrum eval` does; `run` classifies one image; `export`
//! writes the same layout again, synced. Memory is anonymous memory (`RssAnon`): pages of a mapped file
//! belong to the kernel.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;
use vitrum::backend::{Device, DeviceOptions};
use vitrum::infer::loaded::LoadedModel;
use vitrum::rng::{Domain, Stream};
use vitrum::vit::{Mode, ModelConfig, ParamLayout};
use vitrum::weights::{self, CheckpointMeta, Format, ModelOverrides, Tensor, Tensors};

fn main() {
    let mut args = std::env::args().skip(1).filter(|a| a != "--bench");
    let (mut model, mut keep, mut files, mut json) = ("L/16".to_string(), None, Vec::new(), false);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // `cargo test --benches` only checks that it runs.
            "--test" => model = "Ti/16".into(),
            "--model" => model = args.next().expect("--model B/16"),
            "--json" => json = true,
            "--keep" => keep = Some(PathBuf::from(args.next().expect("--keep DIR"))),
            file => files.push(PathBuf::from(file)),
        }
    }
    let temporary = tempfile::tempdir().unwrap();
    let dir = keep.unwrap_or(temporary.path().into());
    if files.is_empty() {
        std::fs::create_dir_all(&dir).unwrap();
        files = write(&model, &dir);
    }
    if json {
        return files.iter().for_each(|file| println!("{}", measure(file, 1).json()));
    }
    let head = ["size", "read", "load", "run", "export", "memory", "of the size"];
    println!("{:<20} {}", "file", head.map(|title| format!("{title:>11}")).join(" "));
    files.iter().for_each(|file| println!("{}", measure(file, 3).text()));
}

/// The model in every layout.
fn write(model: &str, dir: &Path) -> Vec<PathBuf> {
    let config = ModelConfig::variant(model, 224, 1000).unwrap();
    let random = |(i, p): (usize, &vitrum::vit::Param)| {
        let mut s = Stream::new(1, Domain::Init, i as u64, 0);
        // Repeats one block of draws: only different values matter here.
        let block: Vec<f32> = (0..4096).map(|_| s.normal() as f32 * 0.02).collect();
        (p.name.clone(), Tensor::new(p.shape.clone(), block.iter().copied().cycle().take(p.len()).collect()))
    };
    let own = dir.join("own.safetensors");
    let tensors: Tensors =
        ParamLayout::new(&config, |_| false).parameters().enumerate().map(random).collect();
    weights::save(&own, &config, &tensors, &CheckpointMeta::default()).unwrap();
    drop(tensors);
    let others = [("timm.safetensors", Format::Timm), ("hf", Format::Hf), ("vit_jax.npz", Format::Npz)];
    let mut files = vec![own.clone()];
    for (name, format) in others {
        weights::convert(&own, &dir.join(name), Some(format), &ModelOverrides::default()).unwrap();
        files.push(dir.join(name));
    }
    files
}

/// What one file takes. Times in seconds, sizes in bytes.
struct Measured {
    name: String,
    size: u64,
    read: f64,
    load: f64,
    run: f64,
    export: f64,
    memory: u64,
}

/// `read` is the best of this many.
fn measure(path: &Path, reads: usize) -> Measured {
    let file = if path.is_dir() { path.join("model.safetensors") } else { path.into() };
    let size = std::fs::metadata(&file).unwrap().len();
    let none = ModelOverrides::default();
    let sum_all = || {
        let model = weights::open(path, &none).unwrap();
        let sums = model.tensors.names().map(|name| sum(&model.tensors.values(name).unwrap()));
        assert!(sums.sum::<f32>().is_finite());
    };
    let read = (0..reads).map(|_| seconds(sum_all).0).fold(f64::INFINITY, f64::min);
    let before = anonymous();
    let (load, mut loaded) = seconds(|| {
        LoadedModel::open(path, &none, (Device::Cpu, &DeviceOptions::default()), 1, Mode::Infer, None)
            .unwrap()
    });
    let memory = anonymous().saturating_sub(before);
    let temporary = tempfile::tempdir_in(path.parent().unwrap()).unwrap();
    let picture = temporary.path().join("grey.png");
    image::RgbImage::from_pixel(224, 224, image::Rgb([127; 3])).save(&picture).unwrap();
    let protocol = loaded.protocol().unwrap();
    let run = seconds(|| loaded.predict(&picture, protocol).unwrap()).0;
    drop(loaded);
    let (out, format) = match path.extension() {
        None => (temporary.path().join("hf"), Format::Hf),
        Some(end) if end == "npz" => (temporary.path().join("out.npz"), Format::Npz),
        Some(_) => (temporary.path().join("out.safetensors"), Format::Safetensors),
    };
    let export = seconds(|| weights::convert(path, &out, Some(format), &none).unwrap()).0;
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    Measured { name, size, read, load, run, export, memory }
}

fn seconds<T>(run: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = run();
    (start.elapsed().as_secs_f64(), result)
}

impl Measured {
    fn text(&self) -> String {
        let times = [self.read, self.load, self.run, self.export].map(|s| format!("{s:>9.3} s"));
        let mib = |bytes: u64| format!("{:>7} MiB", bytes >> 20);
        let share = self.memory as f64 / self.size as f64;
        format!(
            "{:<20} {} {} {} {share:>10.2}x",
            self.name,
            mib(self.size),
            times.join(" "),
            mib(self.memory)
        )
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "file": self.name, "bytes": self.size, "read": self.read, "load": self.load, "run": self.run,
            "export": self.export, "anonymous_bytes": self.memory,
        })
    }
}

/// In lanes, so that it is limited by memory like a library's sum.
fn sum(values: &[f32]) -> f32 {
    let chunk = |values: &[f32]| {
        let mut lanes = [0f32; 16];
        let chunks = values.chunks_exact(16);
        let rest: f32 = chunks.remainder().iter().sum();
        chunks.for_each(|c| lanes.iter_mut().zip(c).for_each(|(lane, v)| *lane += v));
        rest + lanes.iter().sum::<f32>()
    };
    values.par_chunks(1 << 16).map(chunk).sum()
}

/// Bytes of anonymous memory of this process.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("Linux says RssAnon");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
