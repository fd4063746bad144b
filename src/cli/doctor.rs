//! `vitrum doctor`: what this machine offers and what Vitrum will use. It never fails: describing a machine
//! that lacks something is its purpose.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{print, print_json};
use crate::backend::DeviceOptions;
use crate::backend::cpu::compute::Isa;
use crate::backend::cpu::main_memory::MainMemory;
use crate::backend::cuda::device::{self, DeviceProperties};
use crate::backend::cuda::{Cuda, images, libraries};
use crate::data::decode::JpegPath;
use crate::error::{Error, Result};
use crate::files;
use crate::report::format;

#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let machine = Machine::look();
    if args.json { print_json(&machine.json()) } else { print(&machine.text()) }
}

struct Machine {
    processor: String,
    cores: usize,
    /// The instruction set that the CPU kernels will use, or why it is unknown.
    isa: std::result::Result<Isa, String>,
    memory: Option<MainMemory>,
    cache: std::path::PathBuf,
    cache_writable: bool,
    /// The GPUs that the kernel driver lists, usable or not.
    gpus: std::result::Result<Vec<String>, String>,
    /// The visible GPUs, by the number that `--device cuda:N` takes.
    visible: Vec<DeviceProperties>,
    cuda: std::result::Result<Gpu, Unusable>,
    /// The version of NCCL, or why several ranks on GPUs cannot talk.
    nccl: std::result::Result<String, Unusable>,
}

/// A GPU that Vitrum will use.
struct Gpu {
    properties: DeviceProperties,
    cublaslt: usize,
}

/// Why no GPU can be used, and what to do about it.
struct Unusable {
    reason: String,
    hint: Option<String>,
}

impl Machine {
    fn look() -> Self {
        let cache = files::cache_dir();
        Self {
            processor: processor().unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            isa: Isa::from_env().map_err(|e| e.message().into()),
            memory: MainMemory::now(),
            cache_writable: writable(&cache),
            cache,
            gpus: gpus(),
            visible: device::gpus().unwrap_or_default(),
            cuda: look_for_cuda(),
            nccl: libraries::nccl_version().map_err(Unusable::from),
        }
    }

    fn text(&self) -> String {
        let available = Isa::available().iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
        let isa = match &self.isa {
            Ok(isa) => format!("{} (this processor has {available}; `VITRUM_ISA` overrides)", isa.name()),
            Err(reason) => format!("none: {reason}"),
        };
        let memory = match &self.memory {
            Some(m) => format!("{}, {} available", format::bytes(m.total), format::bytes(m.available)),
            None => "unknown".into(),
        };
        let cache = if self.cache_writable { "writable" } else { "not writable: set `VITRUM_CACHE=DIR`" };
        let gpu = match (&self.cuda, &self.gpus) {
            (Ok(gpu), _) => gpu.text(),
            (Err(_), Ok(names)) => names.join(", "),
            (Err(_), Err(reason)) => format!("none, {reason}"),
        };
        let device = match &self.cuda {
            Ok(_) => "will compute on: cuda".into(),
            Err(Unusable { reason, hint }) => {
                let hint = hint.as_ref().map_or(String::new(), |hint| format!("; {hint}"));
                format!("will compute on: cpu (no CUDA: {reason}{hint})")
            }
        };
        let nccl = match &self.nccl {
            Ok(version) => version.clone(),
            Err(Unusable { reason, hint }) => {
                let hint = hint.as_ref().map_or(String::new(), |hint| format!("; {hint}"));
                format!("none: {reason}{hint}")
            }
        };
        let gpus = self.visible.iter().filter(|_| self.visible.len() > 1);
        let gpus: String = gpus.map(|gpu| format!("\ncuda:{}: {}", gpu.ordinal, gpu_text(gpu))).collect();
        let plural = if self.cores == 1 { "" } else { "s" };
        [
            format!("vitrum: {}", env!("CARGO_PKG_VERSION")),
            format!("processor: {}, {} core{plural}", self.processor, self.cores),
            format!("instruction set: {isa}"),
            format!("memory: {memory}"),
            format!("cache: {} ({cache})", self.cache.display()),
            format!("jpeg decoder: {}", JpegPath::chosen().describe()),
            format!("kernels: {}", images::summary()),
            format!("needs: {}", needs()),
            format!("gpu: {gpu}{gpus}"),
            format!("nccl (for ranks on several GPUs): {nccl}"),
            device,
        ]
        .join("\n")
    }

    fn json(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "processor": self.processor,
            "cores": self.cores,
            "isa": self.isa.as_ref().map(|isa| isa.name()).ok(),
            "isa_error": self.isa.as_ref().err(),
            "isa_available": Isa::available().iter().map(|isa| isa.name()).collect::<Vec<_>>(),
            "memory_bytes": self.memory.as_ref().map(|m| m.total),
            "memory_available_bytes": self.memory.as_ref().map(|m| m.available),
            "cache": self.cache.display().to_string(),
            "cache_writable": self.cache_writable,
            "jpeg_decoder": JpegPath::chosen().describe(),
            "kernels": images::kernel_count(),
            "kernel_targets": if images::WHY_NONE.is_none() { images::TARGETS } else { &[] },
            "kernels_reason": images::WHY_NONE,
            "gpus": self.gpus.as_ref().cloned().unwrap_or_default(),
            "gpu_reason": self.gpus.as_ref().err(),
            "device": if self.cuda.is_ok() { "cuda" } else { "cpu" },
            "device_reason": self.cuda.as_ref().err().map(|e| &e.reason),
            "cards": self.visible.iter().map(gpu_text).collect::<Vec<_>>(),
            "cuda": self.cuda.as_ref().ok().map(Gpu::json),
            "nccl": self.nccl.as_ref().ok(),
            "nccl_reason": self.nccl.as_ref().err().map(|e| &e.reason),
        })
    }
}

/// Opens the GPU as a run would.
fn look_for_cuda() -> std::result::Result<Gpu, Unusable> {
    match Cuda::open(0, &DeviceOptions::default()) {
        Ok(cuda) => Ok(Gpu { properties: cuda.properties().clone(), cublaslt: cuda.cublaslt_version() }),
        Err(e) => Err(e.into()),
    }
}

impl From<Error> for Unusable {
    fn from(e: Error) -> Self {
        Self { reason: e.message().into(), hint: e.hint_text().map(Into::into) }
    }
}

impl Gpu {
    fn text(&self) -> String {
        let driver = libraries::dotted(self.properties.driver_version);
        format!("{}, driver for CUDA {driver}, cuBLASLt {}", gpu_text(&self.properties), self.cublaslt)
    }

    fn json(&self) -> Value {
        let (major, minor) = self.properties.capability;
        json!({
            "name": self.properties.name,
            "capability": format!("{major}.{minor}"),
            "multiprocessors": self.properties.multiprocessors,
            "memory_bytes": self.properties.total_memory,
            "driver": libraries::dotted(self.properties.driver_version),
            "cublaslt": self.cublaslt,
        })
    }
}

fn gpu_text(gpu: &DeviceProperties) -> String {
    let DeviceProperties { name, capability: (major, minor), multiprocessors, total_memory, .. } = gpu;
    let memory = format::bytes(*total_memory as u64);
    format!("{name}, sm_{major}{minor}, {multiprocessors} multiprocessors, {memory}")
}

/// The minimum versions that a GPU run needs.
fn needs() -> String {
    let driver = libraries::dotted(libraries::oldest_driver());
    format!(
        "for a GPU: Ampere (sm_80) or newer, a driver for CUDA {driver} or newer, cuBLASLt {} or newer; \
         to build: nvcc 12.4 or newer",
        libraries::OLDEST_CUBLASLT / 10_000
    )
}

fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    field(&text, "model name")
}

/// The NVIDIA GPUs that the kernel driver lists, or why there are none. Does not use the CUDA library.
fn gpus() -> std::result::Result<Vec<String>, String> {
    let folder = Path::new("/proc/driver/nvidia/gpus");
    let Ok(entries) = fs::read_dir(folder) else {
        return Err("no NVIDIA driver is loaded (`/proc/driver/nvidia` is absent)".into());
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("information")).ok())
        .map(|text| field(&text, "Model").unwrap_or_else(|| "an unnamed NVIDIA GPU".into()))
        .collect();
    names.sort();
    if names.is_empty() { Err("the NVIDIA driver lists no GPU".into()) } else { Ok(names) }
}

/// The value of a `name: value` line.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// Whether files can be created in `folder`. Creates one to find out, because permissions alone do not tell
/// (read-only and special file systems, root). The folder itself stays; a run would create it too.
fn writable(folder: &Path) -> bool {
    let probe = folder.join(format!(".doctor.{}", std::process::id()));
    let written = fs::create_dir_all(folder).and_then(|()| fs::write(&probe, b"vitrum"));
    let _ = fs::remove_file(&probe);
    written.is_ok()
}
