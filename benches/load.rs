//! Loading weights: time until every value has been read once, and what it costs in memory.
//!
//!     cargo bench --bench load                      L/16 with random weights in every layout (5 GB of temporary files)
//!     cargo bench --bench load -- --model B/16      another size
//!     cargo bench --bench load -- FILE...           these files
//!     cargo bench --bench load -- --keep DIR        leaves the files in DIR, for `tests/interop/load.py`
//!
//! Each file is written just before, so it is in the page cache. `read` opens a file and sums all its tensors; `load`
//! puts the model on the device as `vitrum eval` does. Memory is anonymous memory (`RssAnon`): pages of a mapped file
//! belong to the kernel.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;
use vitrum::backend::Device;
use vitrum::rng::{Domain, Stream};
use vitrum::train::loaded::Loaded;
use vitrum::vit::{Mode, ModelConfig, ParamLayout};
use vitrum::weights::{self, CheckpointMeta, Format, ModelOverrides, Tensor, Tensors};

fn main() {
    let mut args = std::env::args().skip(1).filter(|a| a != "--bench");
    let (mut model, mut keep, mut files) = ("L/16".to_string(), None, Vec::new());
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // `cargo test --benches`: that it runs.
            "--test" => model = "Ti/16".into(),
            "--model" => model = args.next().expect("--model B/16"),
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
    println!(
        "{:<28} {:>9} {:>9} {:>9} {:>16} {:>14}",
        "file", "size", "read", "load", "memory after", "of the size"
    );
    files.iter().for_each(|file| measure(file));
}

/// The model in every layout.
fn write(model: &str, dir: &Path) -> Vec<PathBuf> {
    let config = ModelConfig::variant(model, 224, 1000).unwrap();
    let random = |(i, p): (usize, &vitrum::vit::Param)| {
        let mut s = Stream::new(1, Domain::Init, i as u64, 0);
        // A block of draws, over and over: only that the values differ matters here.
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

fn measure(path: &Path) {
    let file = if path.is_dir() { path.join("model.safetensors") } else { path.into() };
    let size = std::fs::metadata(&file).unwrap().len();
    let best_of_three = |run: &dyn Fn()| {
        let time = |_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        };
        (0..3).map(time).fold(f64::INFINITY, f64::min)
    };
    let read = best_of_three(&|| {
        let model = weights::open(path, &ModelOverrides::default()).unwrap();
        let sums = model.tensors.names().map(|name| sum(&model.tensors.values(name).unwrap()));
        assert!(sums.sum::<f32>().is_finite());
    });
    let before = anonymous();
    let start = Instant::now();
    let loaded = Loaded::open(path, &ModelOverrides::default(), Device::Cpu, 1, Mode::Infer, None).unwrap();
    let load = start.elapsed().as_secs_f64();
    let memory = anonymous().saturating_sub(before);
    drop(loaded);
    println!(
        "{:<28} {:>6} MB {:>8.3}s {:>8.3}s {:>13} MB {:>13.2}x",
        path.file_name().unwrap().to_string_lossy(),
        size >> 20,
        read,
        load,
        memory >> 20,
        memory as f64 / size as f64
    );
}

/// In lanes, so that it is bound by memory as a library's sum is.
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
