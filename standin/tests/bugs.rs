//! Every planted bug of `bugs/` is caught at a marked line, and its corrected version passes, under several
//! schedules: as functions of the host, and as the PTX that nvcc makes of them.

#[macro_use]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::{Gpu, arg, nvcc};

/// One file of `bugs/`: how to launch it, and where its bug may be reported as what.
struct Bug {
    name: String,
    grid: u32,
    block: u32,
    shared: u32,
    n: u32,
    /// `// BUG phrase or phrase`: line number and phrases.
    marks: Vec<(usize, Vec<String>)>,
    /// `// ptx: …`: why nvcc's PTX of it is not tested.
    not_as_ptx: Option<String>,
}

fn bugs() -> Vec<Bug> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("bugs");
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    files.sort();
    files.iter().map(|path| read(path)).collect()
}

fn read(path: &Path) -> Bug {
    let text = fs::read_to_string(path).unwrap();
    let launch = text.lines().find_map(|line| line.strip_prefix("// launch: ")).expect("a launch line");
    let value = |key: &str| -> u32 {
        let part = launch.split(", ").find_map(|part| part.strip_prefix(key)).expect(key);
        part.trim().parse().unwrap()
    };
    let marks = text
        .lines()
        .enumerate()
        .filter_map(|(at, line)| {
            let (_, phrases) = line.split_once("// BUG ")?;
            Some((at + 1, phrases.split(" or ").map(str::to_owned).collect()))
        })
        .collect();
    let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
    let not_as_ptx = text.lines().find_map(|line| line.strip_prefix("// ptx: ")).map(str::to_owned);
    Bug {
        not_as_ptx,
        name,
        grid: value("grid"),
        block: value("block"),
        shared: value("shared"),
        n: value("n"),
        marks,
    }
}

/// Runs one kernel of a bug's file on fresh memory, as the host's function or from a PTX text; the error code, the report, the
/// results.
fn run(bug: &Bug, which: &str, seed: u32, ptx: Option<&str>) -> (i32, String, Vec<f32>) {
    let gpu = Gpu::open(&standin_bugs(), &format!("checks=on,seed={seed},threads=2"));
    let module = ptx.map_or(gpu.module(), |text| {
        gpu.configure("engine=ptx");
        gpu.load_ptx(text).unwrap_or_else(|code| panic!("code {code}: {}", gpu.report()))
    });
    let x: Vec<f32> = (0..bug.n).map(|i| i as f32).collect();
    let (x, y) = (gpu.upload(&x), gpu.allocate(4 * bug.n as usize).unwrap());
    let args = [arg(x), arg(y), arg(bug.n)];
    let function = gpu.function_of(module, &format!("{}_{which}", bug.name));
    let code = gpu.launch_function(function, std::ptr::null_mut(), bug.grid, bug.block, bug.shared, &args);
    let report = if code == 0 { String::new() } else { gpu.report() };
    let results = if code == 0 { gpu.download(y, bug.n as usize) } else { Vec::new() };
    gpu.configure("checks=on");
    assert_eq!(cu!(gpu, standin_reset()), 0);
    gpu.free(x);
    gpu.free(y);
    (code, report, results)
}

fn standin_bugs() -> PathBuf {
    vitrum_standin::libraries().join("bugs")
}

/// The PTX of the bugs that nvcc leaves in; they share one compilation.
fn bugs_as_ptx() -> Option<&'static (Vec<Bug>, String)> {
    static COMPILED: OnceLock<Option<(Vec<Bug>, String)>> = OnceLock::new();
    COMPILED.get_or_init(compile_bugs).as_ref()
}

fn compile_bugs() -> Option<(Vec<Bug>, String)> {
    let nvcc = nvcc::nvcc()?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (bugs, others): (Vec<Bug>, Vec<Bug>) = bugs().into_iter().partition(|bug| bug.not_as_ptx.is_none());
    for bug in others {
        println!("{} is not tested as PTX: {}", bug.name, bug.not_as_ptx.unwrap());
    }
    let mut source = format!("#include {:?}\n", folder.join("../kernels/ptx.cuh").canonicalize().unwrap());
    for bug in &bugs {
        let file = folder.join("bugs").join(format!("{}.cu", bug.name));
        source += &format!("namespace {} {{\n#include {file:?}\n}}\n", bug.name);
    }
    Some((bugs, nvcc::ptx(&nvcc, &source, "compute_90")))
}

#[test]
fn every_planted_bug_is_caught_where_it_is() {
    let bugs = bugs();
    assert!(bugs.len() >= 30);
    assert_caught(&bugs, None);
}

#[test]
fn every_planted_bug_is_caught_in_its_ptx() {
    let Some((bugs, text)) = bugs_as_ptx() else { return };
    assert!(bugs.len() >= 30);
    assert_caught(bugs, Some(text));
}

fn assert_caught(bugs: &[Bug], ptx: Option<&str>) {
    let mut missed = Vec::new();
    for bug in bugs {
        for seed in [0, 1, 2] {
            let (code, report, _) = run(bug, "broken", seed, ptx);
            let found = bug.marks.iter().any(|(line, phrases)| {
                // A bug noticed at a return has no line except that of whoever waits.
                let place = format!("{}.cu:{line}", bug.name);
                let placed = report.contains(&place) || report.contains("asynchronous copies in flight");
                placed && phrases.iter().any(|phrase| report.contains(phrase))
            });
            if code == 0 || !found {
                missed.push(format!("{} (seed {seed}), code {code}: {report}", bug.name));
            }
        }
    }
    assert!(missed.is_empty(), "not caught, or reported as something else:\n{}", missed.join("\n"));
}

#[test]
fn every_mended_twin_passes_and_no_schedule_changes_its_bits() {
    assert_silent(&bugs(), None);
}

#[test]
fn every_mended_twin_passes_as_ptx() {
    let Some((bugs, text)) = bugs_as_ptx() else { return };
    assert_silent(bugs, Some(text));
}

fn assert_silent(bugs: &[Bug], ptx: Option<&str>) {
    for bug in bugs {
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let (code, report, first) = run(bug, "mended", 0, ptx);
        assert_eq!(code, 0, "{}: {report}", bug.name);
        let first = bits(first);
        for seed in [1, 2, 3] {
            let (code, report, results) = run(bug, "mended", seed, ptx);
            assert_eq!(code, 0, "{} (seed {seed}): {report}", bug.name);
            assert_eq!(bits(results), first, "{} (seed {seed})", bug.name);
        }
    }
}
