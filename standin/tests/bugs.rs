//! Every planted bug of `bugs/` is caught at a marked line, and its corrected version passes, under several
//! schedules.

#[macro_use]
mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Gpu, arg};

/// One file of `bugs/`: how to launch it, and where its bug may be reported as what.
struct Bug {
    name: String,
    grid: u32,
    block: u32,
    shared: u32,
    n: u32,
    /// `// BUG phrase or phrase`: line number and phrases.
    marks: Vec<(usize, Vec<String>)>,
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
    Bug { name, grid: value("grid"), block: value("block"), shared: value("shared"), n: value("n"), marks }
}

/// Runs one kernel of a bug's file on fresh memory; the error code, the report, the results.
fn run(bug: &Bug, which: &str, seed: u32) -> (i32, String, Vec<f32>) {
    let gpu = Gpu::open(&standin_bugs(), &format!("checks=on,seed={seed},threads=2"));
    let x: Vec<f32> = (0..bug.n).map(|i| i as f32).collect();
    let (x, y) = (gpu.upload(&x), gpu.allocate(4 * bug.n as usize).unwrap());
    let args = [arg(x), arg(y), arg(bug.n)];
    let mut code = gpu.launch(&format!("{}_{which}", bug.name), bug.grid, bug.block, bug.shared, &args);
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

#[test]
fn every_planted_bug_is_caught_where_it_is() {
    let bugs = bugs();
    assert!(bugs.len() >= 30);
    let mut missed = Vec::new();
    for bug in &bugs {
        for seed in [0, 1, 2] {
            let (code, report, _) = run(bug, "broken", seed);
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
    for bug in bugs() {
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let (code, report, first) = run(&bug, "mended", 0);
        assert_eq!(code, 0, "{}: {report}", bug.name);
        let first = bits(first);
        for seed in [1, 2, 3] {
            let (code, report, results) = run(&bug, "mended", seed);
            assert_eq!(code, 0, "{} (seed {seed}): {report}", bug.name);
            assert_eq!(bits(results), first, "{} (seed {seed})", bug.name);
        }
    }
}
