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
    /// Of `bugs/hopper`: its kernels take tensor maps, too.
    hopper: bool,
}

fn bugs() -> Vec<Bug> {
    bugs_of("bugs")
}

fn bugs_of(folder: &str) -> Vec<Bug> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
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
    let hopper = text.contains("hopper.cuh");
    let not_as_ptx = text.lines().find_map(|line| line.strip_prefix("// ptx: ")).map(str::to_owned);
    Bug {
        not_as_ptx,
        hopper,
        name,
        grid: value("grid"),
        block: value("block"),
        shared: value("shared"),
        n: value("n"),
        marks,
    }
}

/// Runs one kernel of a bug's file on fresh memory, as the host's function or from a PTX text; the error code, the
/// results.
fn run(bug: &Bug, which: &str, seed: u32, ptx: Option<&str>) -> (i32, String, Vec<f32>) {
    let gpu = Gpu::open(&standin_bugs(), &format!("checks=on,seed={seed},threads=2"));
    let module = ptx.map_or(gpu.module(), |text| {
        gpu.configure("engine=ptx");
        gpu.load_ptx(text).unwrap_or_else(|code| panic!("code {code}: {}", gpu.report()))
    });
    let x: Vec<f32> = (0..bug.n).map(|i| i as f32).collect();
    let (x, y) = (gpu.upload(&x), gpu.allocate(4 * bug.n as usize).unwrap());
    let mut args = vec![arg(x), arg(y), arg(bug.n)];
    if bug.hopper {
        args.extend([tensor_map(&gpu, x, bug.n), tensor_map(&gpu, y, bug.n)]);
    }
    let function = gpu.function_of(module, &format!("{}_{which}", bug.name));
    let mut code =
        gpu.launch_function(function, std::ptr::null_mut(), bug.grid, bug.block, bug.shared, &args);
    if code == 0 {
        code = gpu.wait();
    }
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

/// A map of f32 values as rows of 64 bf16 numbers, for boxes of 8 rows that are swizzled by 128 bytes.
fn tensor_map(gpu: &Gpu, base: u64, count: u32) -> Vec<u8> {
    #[repr(align(64))]
    struct Map([u8; 128]);
    let mut map = Map([0; 128]);
    let (size, strides, bytes) = ([64u64, u64::from(count) / 32], [128u64], [64u32, 8]);
    let (bf16, swizzle_128) = (9, 3);
    let code = cu!(gpu, cuTensorMapEncodeTiled(
        map.0.as_mut_ptr() => *mut u8, bf16 => i32, 2 => u32, base => u64, size.as_ptr() => *const u64,
        strides.as_ptr() => *const u64, bytes.as_ptr() => *const u32, [1u32, 1].as_ptr() => *const u32,
        0 => i32, swizzle_128 => i32, 0 => i32, 0 => i32));
    assert_eq!(code, 0);
    map.0.to_vec()
}

/// The PTX of the bugs that nvcc leaves in; they share one compilation.
fn bugs_as_ptx() -> Option<&'static (Vec<Bug>, String)> {
    static COMPILED: OnceLock<Option<(Vec<Bug>, String)>> = OnceLock::new();
    COMPILED.get_or_init(compile_bugs).as_ref()
}

fn compile_bugs() -> Option<(Vec<Bug>, String)> {
    let nvcc = nvcc::nvcc()?;
    let (bugs, others): (Vec<Bug>, Vec<Bug>) = bugs().into_iter().partition(|bug| bug.not_as_ptx.is_none());
    for bug in others {
        println!("{} is not tested as PTX: {}", bug.name, bug.not_as_ptx.unwrap());
    }
    let text = compile(&nvcc, &bugs, "../kernels/ptx.cuh", "bugs", "compute_90");
    Some((bugs, text))
}

/// The bugs about instructions that only Hopper has, and only PTX shows.
fn hopper_bugs() -> Option<&'static (Vec<Bug>, String)> {
    static COMPILED: OnceLock<Option<(Vec<Bug>, String)>> = OnceLock::new();
    let compiled = COMPILED.get_or_init(|| {
        let nvcc = nvcc::nvcc()?;
        let bugs = bugs_of("bugs/hopper");
        let text = compile(&nvcc, &bugs, "bugs/hopper/hopper.cuh", "bugs/hopper", "compute_90a");
        Some((bugs, text))
    });
    compiled.as_ref()
}

/// The bugs of a folder in one text, each in a namespace of its own.
fn compile(nvcc: &Path, bugs: &[Bug], header: &str, folder: &str, target: &str) -> String {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut source = format!("#include {:?}\n", here.join(header).canonicalize().unwrap());
    for bug in bugs {
        let file = here.join(folder).join(format!("{}.cu", bug.name));
        source += &format!("namespace {} {{\n#include {file:?}\n}}\n", bug.name);
    }
    nvcc::ptx(nvcc, &source, target)
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

#[test]
fn every_planted_bug_of_hopper_is_caught_where_it_is() {
    let Some((bugs, text)) = hopper_bugs() else { return };
    assert!(bugs.len() >= 20);
    assert_caught(bugs, Some(text));
}

#[test]
fn every_mended_twin_of_hopper_passes() {
    let Some((bugs, text)) = hopper_bugs() else { return };
    assert_silent(bugs, Some(text));
}

fn assert_caught(bugs: &[Bug], ptx: Option<&str>) {
    let mut missed = Vec::new();
    for bug in bugs {
        for seed in [0, 1, 2] {
            let (code, report, _) = run(bug, "broken", seed, ptx);
            let found = bug.marks.iter().any(|(line, phrases)| {
                // A bug noticed at a return has no line except that of whoever waits.
                let place = format!("{}.cu:{line}", bug.name);
                let placed = report.contains(&place)
                    || ["asynchronous copies in flight", "bulk stores in flight", "products in flight"]
                        .iter()
                        .any(|left| report.contains(left));
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
