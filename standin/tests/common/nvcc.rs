//! nvcc, where there is one: tests of PTX compile their kernels with it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The compiler that the product's build would take, from the same places. `None`, with a printed line: there is none.
pub fn nvcc() -> Option<PathBuf> {
    let found = places().into_iter().find(|place| place.is_file());
    if found.is_none() {
        println!("skipped: no nvcc; `scripts/install-nvcc` fetches it");
    }
    found
}

fn places() -> Vec<PathBuf> {
    let folder = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut places = Vec::new();
    if let Some(asked) = folder("VITRUM_NVCC") {
        return vec![asked.clone(), asked.join("nvcc"), asked.join("bin/nvcc")];
    }
    places
        .extend(["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(folder).map(|home| home.join("bin/nvcc")));
    places
        .extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|folder| folder.join("nvcc")));
    places.push("/usr/local/cuda/bin/nvcc".into());
    let cache = folder("VITRUM_CACHE").or_else(|| folder("HOME").map(|home| home.join(".cache/vitrum")));
    let versions = cache.and_then(|cache| fs::read_dir(cache.join("nvcc")).ok());
    let mut versions: Vec<PathBuf> =
        versions.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    versions.sort();
    places.extend(versions.into_iter().rev().map(|version| version.join("nvidia/cu13/bin/nvcc")));
    places
}

/// The PTX of a source, with the flags of the product's kernels.
pub fn ptx(nvcc: &Path, source: &str, target: &str) -> String {
    static COMPILED: AtomicUsize = AtomicUsize::new(0);
    let number = COMPILED.fetch_add(1, Ordering::Relaxed);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ptx-{}-{number}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let (from, to) = (folder.join("source.cu"), folder.join("source.ptx"));
    fs::write(&from, source).unwrap();
    let output = Command::new(nvcc)
        .args(["-std=c++17", "-O3", "-lineinfo", "-ptx", "-arch", target, "-o"])
        .args([&to, &from])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = fs::read_to_string(&to).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    text
}
