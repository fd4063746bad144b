//! Builds the three libraries with the host's C++ compiler, into `<target>/<profile>/standin/`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    // OUT_DIR is <target>/<profile>/build/<package>-<hash>/out.
    let libraries = out.ancestors().nth(3).expect("cargo's layout").join("standin");
    for folder in ["runtime", "runtime/ptx", "blaslt", "nccl", "include", "bugs", "../kernels"] {
        watch(&here.join(folder));
    }
    println!("cargo:rerun-if-changed={}", here.join("build.sh").display());
    println!("cargo:rerun-if-env-changed=CXX");
    println!("cargo:rerun-if-env-changed=STANDIN_FLAGS");
    println!("cargo:rustc-env=STANDIN_LIBRARIES={}", libraries.display());

    let product = libraries.join("objects");
    build(&here, &libraries, &product, &[]);
    // The planted bugs, in a separate library with the same runtime.
    let bugs: Vec<PathBuf> = fs::read_dir(here.join("bugs"))
        .expect("the package has its bugs")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    build(&here, &libraries.join("bugs"), &product, &bugs);
}

/// Asks cargo to run this script again when a file of a folder changes, appears or disappears.
fn watch(folder: &Path) {
    println!("cargo:rerun-if-changed={}", folder.display());
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        println!("cargo:rerun-if-changed={}", entry.path().display());
    }
}

/// Runs `build.sh`; without kernels it compiles those of the product.
fn build(here: &Path, out: &Path, objects: &Path, kernels: &[PathBuf]) {
    let mut command = Command::new("sh");
    command.arg(here.join("build.sh")).arg(out).args(kernels).env("STANDIN_OBJECTS", objects);
    assert!(
        command.status().is_ok_and(|status| status.success()),
        "the stand-in GPU needs a C++17 compiler (g++ 10 or newer; set `CXX` to choose it)"
    );
}
