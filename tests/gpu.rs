//! The CUDA backend without a GPU: the program itself, on the stand-in of `standin/`.
//!
//! The libraries lie beside the program once `cargo build -p vitrum-standin` (or `cargo test --workspace`) has made
//! them; where they are absent each test says so and passes.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::{Done, Outcome, command, finish, metrics, names, outcome, path, train};

/// The stand-in's folder, if it was built.
fn stand_in() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_BIN_EXE_vitrum")).parent().unwrap().join("standin");
    let library = folder.join("libcuda.so");
    if !library.is_file() || !folder.join("libcublasLt.so").is_file() {
        println!("skipped: no stand-in GPU; `cargo build -p vitrum-standin` builds it");
        return None;
    }
    // A library of yesterday's kernels would fail in ways that help nobody.
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

/// The program on a stand-in with these options.
fn on_gpu<S: AsRef<std::ffi::OsStr>>(folder: &Path, options: &str, args: &[S]) -> Command {
    let mut command = command(args);
    command.env("LD_LIBRARY_PATH", folder).env("VITRUM_STANDIN", options);
    command
}

fn run<S: AsRef<std::ffi::OsStr>>(folder: &Path, options: &str, args: &[S]) -> Done {
    finish(on_gpu(folder, options, args))
}

/// A short training run on the GPU: 16 tokens, width 64, depth 2, batch 4, dropout and drop-path at work.
fn small(out: &str, more: &[&str]) -> Vec<String> {
    let size = ["model.width=64", "model.heads=2", "train.batch=4", "train.micro_batch=4", "train.steps=12"];
    let pace =
        ["train.log_every=1", "train.eval_every=12", "train.checkpoint_every=4", "train.deterministic=true"];
    let all: Vec<&str> = size.iter().chain(&pace).chain(more).copied().collect();
    train(out, &all)
}

/// `field` of each training line.
fn series(run: &str, field: &str) -> Vec<f64> {
    metrics(run).iter().filter_map(|line| line.get(field).and_then(Value::as_f64)).collect()
}

#[test]
fn every_kernel_equals_float64_under_three_schedules() {
    let Some(folder) = stand_in() else { return };
    std::thread::scope(|scope| {
        for seed in [0, 1, 2] {
            let options = format!("checks=on,threads=1,seed={seed}");
            let folder = &folder;
            scope.spawn(move || {
                // f32 and bf16 under the first, the precision of real runs under the others.
                let precision = if seed == 0 { "auto" } else { "bf16" };
                let args = ["selftest", "--device", "cuda", "--precision", precision];
                let done = run(folder, &options, &args).ok();
                assert!(!done.stderr.contains("stand-in GPU:"), "seed {seed}: {}", done.stderr);
            });
        }
    });
}

#[test]
fn training_follows_the_cpu() {
    follows_the_cpu("gap", &[]);
}

#[test]
fn training_with_the_class_token_alone_follows_the_cpu() {
    let token = ["model.pool=token", "model.posemb=learned", "model.posemb_join=after"];
    follows_the_cpu("token", &token);
    follows_the_cpu("token-recomputed", &[&token[..], &["train.recompute=block"]].concat());
}

fn follows_the_cpu(name: &str, more: &[&str]) {
    let Some(folder) = stand_in() else { return };
    let on_cpu = path(&format!("cpu-{name}"));
    finish(command(&small(&on_cpu, &[&["--device", "cpu"][..], more].concat()))).ok();
    let cpu = (series(&on_cpu, "loss"), series(&on_cpu, "grad_norm"));
    assert_eq!(cpu.0.len(), 12);
    for (precision, tolerance) in [("f32", 1e-4), ("bf16", 0.05)] {
        let out = path(&format!("cuda-{name}-{precision}"));
        let precision = format!("train.precision={precision}");
        let args = small(&out, &[&["--device", "cuda", &precision][..], more].concat());
        let done = run(&folder, "checks=on", &args).ok();
        assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);
        for (name, ours, theirs) in
            [("loss", series(&out, "loss"), &cpu.0), ("grad_norm", series(&out, "grad_norm"), &cpu.1)]
        {
            assert_eq!(ours.len(), theirs.len());
            for (step, (a, b)) in ours.iter().zip(theirs).enumerate() {
                assert!(
                    (a - b).abs() <= tolerance * b.abs(),
                    "{precision}, {name} of step {}: {a}, not {b}",
                    step + 1
                );
            }
        }
    }
}

/// A run on the GPU that nothing disturbs.
fn undisturbed(folder: &Path, name: &str, more: &[&str]) -> Outcome {
    let out = path(name);
    let more: Vec<&str> = ["--device", "cuda"].iter().chain(more).copied().collect();
    run(folder, "checks=off", &small(&out, &more)).ok();
    outcome(&out)
}

#[test]
fn a_recorded_step_has_the_bits_of_its_launches_one_by_one() {
    let Some(folder) = stand_in() else { return };
    let recorded = undisturbed(&folder, "recorded", &[]);
    let launched = undisturbed(&folder, "launched", &["train.graph=false"]);
    assert_eq!(recorded.metrics, launched.metrics);
    assert_eq!(recorded.files[0], launched.files[0]);
    let checked = undisturbed(&folder, "checked", &["train.graph=false", "train.check_launches=true"]);
    assert_eq!(recorded.files[0], checked.files[0]);
}

#[test]
fn resume_after_a_broken_context_has_the_bits_of_an_unbroken_run() {
    let Some(folder) = stand_in() else { return };
    let want = undisturbed(&folder, "unbroken", &[]);
    let out = path("broken");
    let args = small(&out, &["--device", "cuda"]);
    // Somewhere past the first checkpoint: find the launch by trying ever later ones.
    let mut crashed = 0;
    for launch in [400, 900, 1400] {
        let done = run(&folder, &format!("checks=off,fail_launch={launch}"), &resumed(&args));
        if done.code == 0 {
            break;
        }
        let done = done.exits(1).says(&["CUDA_ERROR_LAUNCH_FAILED", "--resume", "train.check_launches=true"]);
        assert!(done.stderr.contains("step"), "{}", done.stderr);
        crashed += 1;
    }
    assert!(crashed > 0, "no launch failed");
    run(&folder, "checks=off", &resumed(&args)).ok();
    assert_eq!(outcome(&out), want);
}

fn resumed(args: &[String]) -> Vec<String> {
    args.iter().cloned().chain(["--resume".to_owned()]).collect()
}

#[test]
fn what_keeps_a_gpu_from_being_used_is_one_sentence() {
    let Some(folder) = stand_in() else { return };
    let cases: [(&str, &[&str]); 5] = [
        ("cards=0", &["the CUDA driver sees no card"]),
        ("driver=11040", &["the CUDA driver is too old", "11.4"]),
        ("sm=75", &["compute capability 7.5"]),
        ("blaslt=110000", &["cuBLASLt is too old"]),
        ("memory=1M", &["the run needs", "train.micro_batch"]),
    ];
    for (options, texts) in cases {
        let out = path("refused");
        let done = run(&folder, options, &small(&out, &["--device", "cuda"])).exits(1).says(texts);
        let errors = done.stderr.lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!(errors, 1, "{options}: {}", done.stderr);
    }
    // A driver without cuBLASLt beside it.
    let alone = path("driver-alone");
    std::fs::create_dir_all(&alone).unwrap();
    std::fs::copy(folder.join("libcuda.so"), Path::new(&alone).join("libcuda.so")).unwrap();
    let done = run(Path::new(&alone), "", &small(&path("refused"), &["--device", "cuda"]));
    done.exits(1).says(&["cuBLASLt was not found"]);
}

#[test]
fn memory_that_runs_out_at_any_allocation_ends_the_run_with_advice() {
    let Some(folder) = stand_in() else { return };
    let mut refused = 0;
    for n in (1..).step_by(5) {
        let options = format!("checks=off,fail_allocation={n}");
        let out = path(&format!("full-{n}"));
        let done = run(&folder, &options, &small(&out, &["--device", "cuda", "train.steps=2"]));
        if done.code == 0 {
            break;
        }
        let done = done.exits(1).says(&["no memory left on the card", "hint:"]);
        assert!(names(Path::new(&out).join("checkpoints")).is_empty(), "{}", done.stderr);
        refused += 1;
    }
    assert!(refused > 0);
}

#[test]
fn a_spoiled_file_of_algorithms_costs_one_warning() {
    let Some(folder) = stand_in() else { return };
    let cache = path("algorithms");
    let folder_of_files = Path::new(&cache).join("matmul");
    let go = |name: &str, options: &str| {
        let args = small(&path(name), &["--device", "cuda", "train.steps=2", "train.deterministic=false"]);
        let mut command = on_gpu(&folder, options, &args);
        finish({
            command.env("VITRUM_CACHE", &cache);
            command
        })
    };
    go("chosen", "checks=off").ok();
    let files = names(&folder_of_files);
    assert_eq!(files.len(), 1, "{files:?}");
    let file = folder_of_files.join(&files[0]);
    let good = std::fs::read(&file).unwrap();

    // The remembered choices are used: the file stays as it is.
    go("remembered", "checks=off").ok();
    assert_eq!(std::fs::read(&file).unwrap(), good);
    // A refused algorithm is chosen anew, without a word.
    let done = go("refused-algorithm", "checks=off,refuse_algorithm=0").ok();
    assert!(!done.stderr.contains("error"), "{}", done.stderr);
    // A file that is no JSON.
    std::fs::write(&file, "{\"half").unwrap();
    let done = go("spoiled", "checks=off").ok();
    assert_eq!(done.stderr.matches("algorithms are chosen anew").count(), 1, "{}", done.stderr);
    // Words that no library ever gave.
    let text = String::from_utf8(good).unwrap();
    let digits = |c: char| if c.is_ascii_digit() { '7' } else { c };
    let spoiled: String = text
        .lines()
        .map(|l| if l.contains(':') { l.to_owned() } else { l.chars().map(digits).collect() } + "\n")
        .collect();
    std::fs::write(&file, spoiled).unwrap();
    go("foreign", "checks=off").ok();
}
