//! Compiles `kernels/*.cu` with nvcc and embeds the result; without nvcc the program is built without CUDA kernels.
//! With or without, it reads from the kernels how they must be launched ([`contracts`]), and from a recipe's types what
//! their documentation says ([`settings`]).
//!
//! Each file becomes one fat binary: machine code for Ampere (sm_80) and Hopper (sm_90a), and PTX
//! (compute_90) that the driver translates for newer GPUs. Files are compiled in parallel, and only if they,
//! a header, the flags or nvcc have changed: binaries are kept in `target/kernels`, shared by all profiles.
//! The PTX that a binary embeds is kept beside it for the stand-in GPU, which can run it, and so is the report of
//! `ptxas`. A spill in a kernel declared with `HOT_KERNEL` is a warning, and so is code that ptxas made slower than
//! it was written ([`ptxas::slowed`]); under `VITRUM_STRICT=1` they are errors.

#[path = "build/contracts.rs"]
mod contracts;
#[path = "build/ptxas.rs"]
mod ptxas;
#[path = "build/settings.rs"]
mod settings;

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use contracts::Contracts;
use ptxas::Kernel;

/// The targets of every file.
const TARGETS: [(&str, &str); 3] =
    [("compute_80", "sm_80"), ("compute_90a", "sm_90a"), (EMBEDDED_PTX, EMBEDDED_PTX)];

/// The target whose PTX is embedded.
const EMBEDDED_PTX: &str = "compute_90";

/// The only target of files with Hopper's own instructions. Their PTX would run on nothing newer, so it is kept and
/// not embedded.
const HOPPER: [(&str, &str); 1] = [("compute_90a", "sm_90a")];
const HOPPER_FILES: &str = "_hopper";
const HOPPER_HEADER: &str = "hopper.cuh";

const FLAGS: [&str; 5] = ["-std=c++17", "-O3", "-Xptxas", "-v", "-lineinfo"];

/// Makes images a fifth as large. Drivers from CUDA 12.4 on can unpack them, and older drivers cannot run
/// images of this nvcc anyway.
const SMALL: &str = "--compress-mode=size";
const FIRST_SMALL: (u32, u32) = (13, 0);

/// The oldest nvcc that supports the targets and the language.
const OLDEST_NVCC: (u32, u32) = (12, 4);

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    // Where nvcc is named, it is not searched for.
    let search: &[&str] = match env::var_os("VITRUM_NVCC") {
        Some(_) => &[],
        None => &["CUDA_HOME", "CUDA_PATH", "VITRUM_CACHE", "PATH"],
    };
    for variable in ["VITRUM_NVCC", "VITRUM_STRICT"].iter().chain(search) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    name_the_commit();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let sources = sources();
    let contracts = Contracts::read(&sources).unwrap_or_else(|why| panic!("{why}"));
    fs::write(out.join("contracts.rs"), contracts.rust()).expect("OUT_DIR is writable");
    fs::write(out.join("settings.rs"), settings::rust()).expect("OUT_DIR is writable");
    let build = match find_nvcc() {
        Ok((nvcc, version)) => Build {
            nvcc: Some(version),
            ..compile_all(&nvcc, version, &kernel_cache(&out), &sources, &contracts)
        },
        Err(why) => {
            println!("cargo::warning=built without CUDA kernels: {why}; `scripts/install-nvcc` fetches nvcc");
            Build { why_none: Some(why), ..Build::default() }
        }
    };
    fs::write(out.join("images.rs"), build.source()).expect("OUT_DIR is writable");
}

/// Checkpoints name the commit that made them, in release builds only: other builds are not redone with every
/// commit.
fn name_the_commit() {
    println!("cargo::rerun-if-env-changed=VITRUM_COMMIT");
    if env::var_os("VITRUM_COMMIT").is_some() || env::var("PROFILE").is_ok_and(|profile| profile != "release")
    {
        return;
    }
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
    };
    if let (Some(commit), Some(log)) =
        (git(&["rev-parse", "--short=12", "HEAD"]), git(&["rev-parse", "--git-path", "logs/HEAD"]))
    {
        println!("cargo::rustc-env=VITRUM_COMMIT={commit}");
        println!("cargo::rerun-if-changed={log}");
    }
}

/// What is embedded in the program.
#[derive(Default)]
struct Build {
    /// File stem → fat binary.
    images: BTreeMap<String, PathBuf>,
    kernels: Vec<Kernel>,
    why_none: Option<String>,
    nvcc: Option<(u32, u32)>,
}

impl Build {
    fn source(&self) -> String {
        let mut text = String::from("pub(super) static IMAGES: &[(&str, &[u8])] = &[\n");
        for (name, path) in &self.images {
            writeln!(text, "    ({name:?}, image!({:?})),", path.display().to_string()).unwrap();
        }
        text += "];\n/// The compiler's report on every kernel, once for each target that has machine code.\npub static KERNELS: &[KernelReport] = &[\n";
        for k in &self.kernels {
            writeln!(
                text,
                "    KernelReport {{ file: {:?}, name: {:?}, target: {:?}, hot: {}, registers: {}, spill_bytes: {}, stack_bytes: {} }},",
                k.file, k.name, k.target, k.hot, k.registers, k.spill_bytes, k.stack_bytes
            )
            .unwrap();
        }
        let targets: Vec<&str> = TARGETS.iter().map(|(_, code)| *code).collect();
        writeln!(text, "];\n/// The targets that have machine code, and the one that has PTX.\npub static TARGETS: &[&str] = &{targets:?};").unwrap();
        writeln!(
            text,
            "/// Version of the compiler.\npub static NVCC: Option<(u32, u32)> = {:?};",
            self.nvcc
        )
        .unwrap();
        writeln!(
            text,
            "/// Why there are no kernels, if there are none.\npub static WHY_NONE: Option<&str> = {:?};",
            self.why_none
        )
        .unwrap();
        text
    }
}

/// `target/kernels`, from `target/PROFILE/build/vitrum-HASH/out`.
fn kernel_cache(out: &Path) -> PathBuf {
    let cache = out.ancestors().nth(4).unwrap_or(out).join("kernels");
    fs::create_dir_all(&cache).expect("the target folder is writable");
    cache
}

/// nvcc from `VITRUM_NVCC` (nvcc or its folder), `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda`, or
/// Vitrum's cache.
fn find_nvcc() -> Result<(PathBuf, (u32, u32)), String> {
    let asked = env::var_os("VITRUM_NVCC").map(PathBuf::from);
    let found = match &asked {
        Some(path) => {
            let candidates = [path.clone(), path.join("nvcc"), path.join("bin/nvcc")];
            candidates
                .into_iter()
                .find(|p| p.is_file())
                .ok_or(format!("VITRUM_NVCC={} is not nvcc", path.display()))?
        }
        None => places().into_iter().find(|p| p.is_file()).ok_or("no nvcc was found")?,
    };
    let text =
        Command::new(&found).arg("--version").output().map_err(|e| format!("{}: {e}", found.display()))?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    let version = nvcc_version(&text).ok_or(format!("{} does not say its version", found.display()))?;
    if version < OLDEST_NVCC {
        let ((a, b), (c, d)) = (version, OLDEST_NVCC);
        return Err(format!("{} is version {a}.{b}, older than {c}.{d}", found.display()));
    }
    Ok((found, version))
}

fn places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(|name| env::var_os(name).filter(|v| !v.is_empty()))
        .map(|folder| PathBuf::from(folder).join("bin/nvcc"))
        .collect();
    places
        .extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|folder| folder.join("nvcc")));
    places.push("/usr/local/cuda/bin/nvcc".into());
    let cache = env::var_os("VITRUM_CACHE")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/vitrum")));
    if let Some(versions) = cache.and_then(|cache| fs::read_dir(cache.join("nvcc")).ok()) {
        let mut versions: Vec<PathBuf> = versions.flatten().map(|entry| entry.path()).collect();
        versions.sort();
        places.extend(versions.into_iter().rev().map(|v| v.join("nvidia/cu13/bin/nvcc")));
    }
    places
}

/// From `Cuda compilation tools, release 13.0, V13.0.88`.
fn nvcc_version(text: &str) -> Option<(u32, u32)> {
    let release = text.split("release ").nth(1)?.split(',').next()?;
    let (major, minor) = release.split_once('.')?;
    Some((major.parse().ok()?, minor.trim().parse().ok()?))
}

/// File names and texts of the kernels and their headers, by name.
fn sources() -> Vec<(String, String)> {
    let entries =
        fs::read_dir("kernels").map(|entries| entries.flatten().collect()).unwrap_or_else(|_| Vec::new());
    let names = entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> =
        names.filter(|name| name.ends_with(".cu") || name.ends_with(".cuh")).collect();
    names.sort();
    let read = |name: &String| {
        fs::read_to_string(Path::new("kernels").join(name)).unwrap_or_else(|e| panic!("kernels/{name}: {e}"))
    };
    names.into_iter().map(|name| (name.clone(), read(&name))).collect()
}

fn compile_all(
    nvcc: &Path,
    version: (u32, u32),
    cache: &Path,
    sources: &[(String, String)],
    contracts: &Contracts,
) -> Build {
    let small = (version >= FIRST_SMALL).then_some(SMALL);
    let (kernels, headers): (Vec<_>, Vec<_>) = sources.iter().partition(|(name, _)| name.ends_with(".cu"));

    // A change of any header recompiles everything: headers are few and small. Hopper's is for its own files.
    let (of_hopper, headers): (Vec<_>, Vec<_>) =
        headers.into_iter().partition(|(name, _)| name == HOPPER_HEADER);
    let mut base = DefaultHasher::new();
    (FLAGS, small, TARGETS, nvcc, fs::metadata(nvcc).map(|m| m.len()).ok()).hash(&mut base);
    headers.hash(&mut base);

    let jobs: Vec<Job> = kernels
        .into_iter()
        .map(|(name, source)| {
            let asserts = contracts.asserts(name);
            let mut hash = base.clone();
            (source, &asserts).hash(&mut hash);
            let stem = name.trim_end_matches(".cu").to_owned();
            if stem.ends_with(HOPPER_FILES) {
                (&of_hopper, HOPPER).hash(&mut hash);
            }
            let image = cache.join(format!("{stem}-{:016x}.fatbin", hash.finish()));
            Job { file: Path::new("kernels").join(name), stem, asserts, image, small }
        })
        .collect();

    let queue = Mutex::new(jobs.iter().filter(|job| !job.done()));
    let failures = Mutex::new(Vec::new());
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let Some(job) = queue.lock().unwrap().next() else { break };
                    if let Err(why) = job.compile(nvcc) {
                        failures.lock().unwrap().push(why);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "nvcc failed:\n{}", failures.join("\n"));

    let hot: Vec<&str> = contracts.kernels.iter().filter(|k| k.hot).map(|k| k.name.as_str()).collect();
    let reports: Vec<(&str, String)> = jobs.iter().map(|job| (job.stem.as_str(), job.report())).collect();
    let kernels: Vec<Kernel> =
        reports.iter().flat_map(|(file, report)| ptxas::kernels(file, report, &hot)).collect();
    let slowed = reports.iter().flat_map(|(file, report)| ptxas::slowed(file, report));
    warn(&ptxas::spills(&kernels).into_iter().chain(slowed).collect::<Vec<_>>());
    Build { images: jobs.into_iter().map(|job| (job.stem, job.image)).collect(), kernels, ..Build::default() }
}

struct Job {
    file: PathBuf,
    stem: String,
    /// For the end of the file.
    asserts: String,
    image: PathBuf,
    small: Option<&'static str>,
}

impl Job {
    fn report_path(&self) -> PathBuf {
        self.image.with_extension("ptxas")
    }

    /// The very text that the image embeds: the stand-in GPU finds it by the image beside it.
    fn ptx_path(&self) -> PathBuf {
        self.image.with_extension("ptx")
    }

    fn done(&self) -> bool {
        self.image.is_file() && self.report_path().is_file() && self.ptx_path().is_file()
    }

    fn compile(&self, nvcc: &Path) -> Result<(), String> {
        // Written under another name first: a killed build leaves no half-written image.
        let part = self.image.with_extension(format!("{}.part", std::process::id()));
        // Where nvcc leaves what it makes on the way, of which the embedded PTX is kept.
        let kept = self.image.with_extension(format!("{}.keep", std::process::id()));
        let done = self.compile_into(nvcc, &part, &kept);
        let _ = fs::remove_dir_all(&kept);
        let _ = fs::remove_file(&part);
        done
    }

    fn compile_into(&self, nvcc: &Path, part: &Path, kept: &Path) -> Result<(), String> {
        fs::create_dir_all(kept).map_err(|e| format!("{}: {e}", kept.display()))?;
        let whole = kept.join(format!("{}.cu", self.stem));
        let text = format!("#include \"{}\"\n{}", self.file.display(), self.asserts);
        fs::write(&whole, text).map_err(|e| format!("{}: {e}", whole.display()))?;
        let mut command = Command::new(nvcc);
        command.args(FLAGS).args(self.small).args(["-I.", "-fatbin", "-o"]).arg(part).arg(&whole);
        command.args(["--keep", "--keep-dir"]).arg(kept);
        let of_hopper = self.stem.ends_with(HOPPER_FILES);
        for (virtual_, real) in if of_hopper { &HOPPER[..] } else { &TARGETS[..] } {
            command.args(["-gencode", &format!("arch={virtual_},code={real}")]);
        }
        let output = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(format!("{}:\n{said}", self.file.display()));
        }
        // nvcc names it after the target where there are several.
        let ptx = match of_hopper {
            true => kept.join(format!("{}.ptx", self.stem)),
            false => kept.join(format!("{}.{EMBEDDED_PTX}.ptx", self.stem)),
        };
        fs::rename(&ptx, self.ptx_path()).map_err(|e| format!("{}: {e}", ptx.display()))?;
        fs::write(self.report_path(), said).map_err(|e| e.to_string())?;
        fs::rename(part, &self.image).map_err(|e| e.to_string())
    }

    /// What `ptxas -v` said.
    fn report(&self) -> String {
        fs::read_to_string(self.report_path()).unwrap_or_default()
    }
}

/// Prints them as warnings, or fails under `VITRUM_STRICT=1`.
fn warn(lines: &[String]) {
    let strict = env::var("VITRUM_STRICT").is_ok_and(|v| v == "1");
    assert!(!strict || lines.is_empty(), "{}", lines.join("\n"));
    lines.iter().for_each(|line| println!("cargo::warning={line}"));
}
