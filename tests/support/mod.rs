//! Shared by the tests of the program: running it, and a small data set that is drawn on the spot.

#![allow(unreachable_pub)]

pub mod models;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use image::{Rgb, RgbImage};
use rustix::process::Pid;
use serde_json::Value;

/// The result of a finished process.
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Done {
    /// Succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// Exited with this code, without a panic.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// Printed all of these on stderr.
    #[track_caller]
    pub fn says(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.stderr.contains(text), "`{text}` is not in: {}", self.stderr);
        }
        self
    }

    /// Printed all of these on stdout.
    #[track_caller]
    pub fn prints(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.stdout.contains(text), "`{text}` is not in: {}", self.stdout);
        }
        self
    }

    /// The JSON object on stdout.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }
}

/// The program with these arguments. It uses a cache of the calling file, and no settings from the environment.
#[track_caller]
pub fn command<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vitrum"));
    command.args(args).env("VITRUM_CACHE", cache()).stdin(Stdio::null());
    command.env_remove("VITRUM_ISA").env_remove("VITRUM_CPU_ROUNDS");
    command
}

/// The program as several ranks under the `mpirun` on PATH: `programs` has the number of ranks and the arguments
/// of each part. `None`, and a line, where there is no `mpirun`.
#[track_caller]
pub fn ranks(programs: &[(usize, &[String])]) -> Option<Command> {
    let Ok(version) = Command::new("mpirun").arg("--version").output() else {
        println!("skipped: there is no `mpirun` on PATH");
        return None;
    };
    let mut mpirun = Command::new("mpirun");
    if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
        mpirun.args(["--allow-run-as-root", "--oversubscribe"]);
    }
    for (part, (count, args)) in programs.iter().enumerate() {
        mpirun.args((part > 0).then_some(":")).args(["-n", &count.to_string()]);
        mpirun.arg(env!("CARGO_BIN_EXE_vitrum")).args(*args);
    }
    mpirun.env("VITRUM_CACHE", cache()).stdin(Stdio::null());
    mpirun.env_remove("VITRUM_ISA").env_remove("VITRUM_CPU_ROUNDS");
    Some(mpirun)
}

/// The process of a rank whose command line has `out`.
pub fn process(rank: usize, out: &str) -> Option<Pid> {
    let ours = [format!("OMPI_COMM_WORLD_RANK={rank}"), format!("PMI_RANK={rank}")];
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
        let has = |bytes: &[u8], text: &str| bytes.split(|b| *b == 0).any(|part| part == text.as_bytes());
        let environment = read("environ");
        let is_it = ours.iter().any(|text| has(&environment, text)) && has(&read("cmdline"), out);
        Pid::from_raw(if is_it { pid } else { 0 })
    })
}

/// Copies a folder.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// Runs the program to its end.
#[track_caller]
pub fn vitrum<S: AsRef<OsStr>>(args: &[S]) -> Done {
    finish(command(args))
}

pub fn finish(mut command: Command) -> Done {
    wait(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// The stand-in's folder, if it was built.
pub fn stand_in() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_BIN_EXE_vitrum")).parent().unwrap().join("standin");
    let library = folder.join("libcuda.so");
    if !library.is_file() || !folder.join("libcublasLt.so").is_file() {
        println!("skipped: no stand-in GPU; `cargo build -p vitrum-standin` builds it");
        return None;
    }
    // A library built from old kernels would fail in confusing ways.
    let changed = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).unwrap();
    for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels")).unwrap() {
        let file = file.unwrap().path();
        assert!(
            changed(&file) <= changed(&library),
            "{} is newer than the stand-in GPU: `cargo build -p vitrum-standin` builds it again",
            file.display()
        );
    }
    Some(folder)
}

/// The program on a stand-in with these options. Those in VITRUM_STANDIN_FIRST come before them: `defer=2` repeats a
/// test with another order of the GPU's work.
#[track_caller]
pub fn on_gpu<S: AsRef<OsStr>>(folder: &Path, options: &str, args: &[S]) -> Command {
    let mut command = command(args);
    let first = std::env::var("VITRUM_STANDIN_FIRST").unwrap_or_default();
    command.env("LD_LIBRARY_PATH", folder).env("VITRUM_STANDIN", format!("{first},{options}"));
    command
}

#[track_caller]
pub fn run_on_gpu<S: AsRef<OsStr>>(folder: &Path, options: &str, args: &[S]) -> Done {
    finish(on_gpu(folder, options, args))
}

/// Whether this process ignores a signal, as what `nohup` or a script's `&` started does. What it starts ignores it, too.
pub fn is_ignored(signal: rustix::process::Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map_or("0", str::trim);
    u64::from_str_radix(mask, 16).unwrap_or(0) >> (signal.as_raw() - 1) & 1 == 1
}

/// Waits for a process; one that a signal ended has the code `128 + signal`, as in a shell.
pub fn wait(child: Child) -> Done {
    use std::os::unix::process::ExitStatusExt;
    let output = child.wait_with_output().unwrap();
    let signal = output.status.signal().unwrap_or(0);
    Done {
        code: output.status.code().unwrap_or(128 + signal),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A folder of the calling file's tests, empty at the start of this process.
#[track_caller]
pub fn scratch() -> &'static Path {
    static FOLDERS: Mutex<BTreeMap<&str, &Path>> = Mutex::new(BTreeMap::new());
    let file = Location::caller().file();
    FOLDERS.lock().unwrap().entry(file).or_insert_with(|| {
        let name = Path::new(file).file_stem().unwrap();
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Box::leak(dir.into_boxed_path())
    })
}

#[track_caller]
fn cache() -> PathBuf {
    scratch().join("cache")
}

/// `scratch()/name` as text, for arguments.
#[track_caller]
pub fn path(name: &str) -> String {
    scratch().join(name).display().to_string()
}

/// An image folder of three classes that differ in the direction of their stripes: 96 PNG files to train on
/// and 40 to validate with, 16x16 pixels, each with its own colours, phase and noise. It is in the folder of the calling
/// file's tests.
#[track_caller]
pub fn stripes() -> &'static str {
    static DRAWN: Mutex<BTreeMap<String, &str>> = Mutex::new(BTreeMap::new());
    let folder = path("stripes");
    DRAWN.lock().unwrap().entry(folder.clone()).or_insert_with(|| {
        let mut random = Random(7);
        for (split, count) in [("train", 96), ("val", 40)] {
            for i in 0..count {
                let (class, name) = (i % 3, ["across", "checks", "down"][i % 3]);
                let dir = Path::new(&folder).join(split).join(name);
                std::fs::create_dir_all(&dir).unwrap();
                stripe(class, &mut random).save(dir.join(format!("{i:03}.png"))).unwrap();
            }
        }
        folder.leak()
    })
}

fn stripe(class: usize, random: &mut Random) -> RgbImage {
    let (shift, dark, light) = (random.below(4), random.below(60), 140 + random.below(60));
    RgbImage::from_fn(16, 16, |x, y| {
        let along = |at: u32| (u64::from(at) + shift) / 2 % 2;
        let on = match class {
            0 => along(y) == 1,
            1 => along(x) == along(y),
            _ => along(x) == 1,
        };
        let base = if on { light } else { dark };
        Rgb(std::array::from_fn(|_| (base + random.below(40)) as u8))
    })
}

/// The settings of a small run on [`stripes`], as `--set` takes them: a ViT of width 24, depth 2, 3 heads on
/// 16 tokens, batches of 16 in two parts, six steps to an epoch, and every kind of randomness.
#[track_caller]
pub fn settings() -> Vec<String> {
    let stripes = stripes();
    let settings = [
        "data.train=STRIPES model.image=16 model.patch=4 model.width=24 model.depth=2 model.heads=3",
        "model.dropout=0.1 model.attention_dropout=0.1 model.drop_path=0.1 augment.crop=pad augment.pad=2",
        "augment.mixup=0.2 augment.mix_prob=0.5 augment.brightness=0.1 optim.lr=3e-3 optim.ema=0.9",
        "train.batch=16 train.micro_batch=8 train.steps=24 train.log_every=4 train.eval_every=8",
        "train.checkpoint_every=5",
    ];
    settings.iter().flat_map(|line| line.split(' ')).map(|s| s.replace("STRIPES", stripes)).collect()
}

/// The arguments of a run with [`settings`]; those in `more` (`KEY=VALUE`, or a flag) come last and win.
#[track_caller]
pub fn train(out: &str, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["train", "demo", "--out", out].map(str::to_owned).to_vec();
    for more in settings().iter().map(String::as_str).chain(more.iter().copied()) {
        if !more.starts_with("--") && more.contains('=') {
            args.push("--set".into());
        }
        args.push(more.into());
    }
    args
}

/// Everything that a run computed: the bytes of its last checkpoint's files, and its metrics without the
/// times.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub metrics: Vec<Value>,
    /// Name, checksum and size.
    pub files: Vec<(String, u64, usize)>,
    /// The entries of the folder of checkpoints.
    pub checkpoints: Vec<String>,
}

pub fn outcome(run: &str) -> Outcome {
    let last = Path::new(run).join("checkpoints/last");
    let file = |name: &str| {
        let bytes = std::fs::read(last.join(name)).unwrap();
        (name.to_owned(), xxhash_rust::xxh3::xxh3_64(&bytes), bytes.len())
    };
    Outcome {
        metrics: metrics(run),
        files: ["model.safetensors", "ema.safetensors", "state.safetensors"].map(file).to_vec(),
        checkpoints: names(last.parent().unwrap()),
    }
}

/// The lines of `metrics.jsonl`, without what depends on the clock or on the GPU's temperature.
pub fn metrics(run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(Path::new(run).join("metrics.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        remove_times(&mut line);
        line
    };
    text.lines().map(timeless).collect()
}

fn remove_times(value: &mut Value) {
    let Some(fields) = value.as_object_mut() else { return };
    for key in ["seconds", "img_per_s", "data_wait", "gpu"] {
        fields.remove(key);
    }
    fields.values_mut().for_each(remove_times);
}

/// The names in a folder, sorted.
pub fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// SplitMix64 (Steele et al. 2014): the same numbers in every run of the tests.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
