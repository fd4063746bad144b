//! The CUDA kernels as a whole: how many there are, whether each barrier is needed and tested, and what
//! benchmarks report about them. Without a GPU, kernels run on the stand-in of `standin/`.

use crate::support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use serde_json::Value;
use support::{run_on_gpu, stand_in, vitrum};
use vitrum::backend::cuda::images::{KERNELS, TARGETS};

/// Kernels of each source, counting every instance. An instance costs machine code for each target, build
/// time, and a row in each table, so a new one must be listed here.
const INSTANCES: [(&str, usize); 22] = [
    ("activation", 14),
    ("adafactor", 6),
    ("attention_backward", 16),
    ("attention_backward_head", 2),
    ("attention_forward", 8),
    ("attention_forward_hopper", 1),
    ("attention_keep", 1),
    ("attention_plain", 6),
    ("column_sums", 3),
    ("embed", 6),
    ("layernorm", 64),
    ("loss", 8),
    ("patchify", 4),
    ("pool", 6),
    ("product", 8),
    ("query_attention", 6),
    ("ranks", 5),
    ("report", 3),
    ("residual", 11),
    ("rotate", 2),
    ("swiglu", 4),
    ("update", 10),
];

#[test]
fn instances_of_kernels_are_counted() {
    let mut found: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for kernel in KERNELS {
        found.entry(kernel.file).or_default().insert(kernel.name);
    }
    if found.is_empty() {
        return println!("skipped: built without nvcc; `scripts/install-nvcc` fetches it");
    }
    let found: Vec<(&str, usize)> = found.into_iter().map(|(file, names)| (file, names.len())).collect();
    assert_eq!(found, INSTANCES, "kernels of each source");
    // Hopper's own for Hopper, the others for each target.
    let machine_code = TARGETS.iter().filter(|target| target.starts_with("sm_")).count();
    let targets = |file: &str| if file.ends_with("_hopper") { 1 } else { machine_code };
    let all: usize = INSTANCES.iter().map(|(file, count)| count * targets(file)).sum();
    assert_eq!(KERNELS.len(), all, "each kernel once for each target");
}

/// Cases of `vitrum selftest` that reach the barriers of a source: the precision, and filters that are tried
/// in turn.
const CASES: [(&str, &str, &[&str]); 12] = [
    ("adafactor.cu", "bf16", &["adafactor"]),
    ("attention_backward.cu", "bf16", &["attention_backward: "]),
    ("attention_backward_head.cu", "bf16", &["attention_backward: "]),
    ("attention_forward.cu", "bf16", &["attention: "]),
    ("attention_forward_hopper.cu", "bf16", &["attention: B 2 T 197", "attention: B 5 T 65"]),
    ("attention_plain.cu", "f32", &["attention: B 3 T 65 H 5", "attention_backward: B 3 T 65 H 5"]),
    ("attention_tile.cuh", "bf16", &["attention: "]),
    ("column_sums.cu", "bf16", &["layernorm_backward: "]),
    ("layernorm.cu", "bf16", &["layernorm_backward: "]),
    ("loss.cu", "bf16", &["loss softmax: 10 classes", "loss sigmoid: 10 classes"]),
    ("query_attention.cu", "bf16", &["query_attention"]),
    ("reduce.cuh", "bf16", &["loss softmax: 10 classes", "query_attention", "layernorm_backward: "]),
];

#[test]
fn every_barrier_of_the_kernels_is_missed_when_it_is_left_out() {
    let Some(folder) = stand_in() else { return };
    // With all its barriers a kernel passes: `every_kernel_equals_float64_under_three_schedules`.
    let is_missed = |file: &str, line: usize| {
        let (_, precision, filters) = CASES
            .iter()
            .find(|(name, ..)| *name == file)
            .unwrap_or_else(|| panic!("`CASES` does not say what tests the barriers of kernels/{file}"));
        // One multiprocessor: a barrier may exist for a block's next round.
        let options = format!("checks=on,threads=1,multiprocessors=1,skip_barrier=kernels/{file}:{line}");
        filters.iter().any(|filter| {
            // Nothing is timed: that takes many launches.
            let which = ["--precision", precision, "--filter", filter];
            let mut args = [&["selftest", "--device", "cuda", "--deterministic"], &which[..]].concat();
            let mut options = options.clone();
            if file.ends_with("_hopper.cu") {
                args.extend(["--kernels", "hopper"]);
                options += ",engine=ptx";
            }
            let done = run_on_gpu(&folder, &options, &args);
            assert!([0, 1].contains(&done.code), "{file}:{line}: {}", done.stderr);
            // Either the stand-in reports an error, or a value is wrong.
            done.code == 1
        })
    };
    // Without nvcc there is nothing that runs Hopper's.
    let runs = |(file, _): &(String, usize)| !(KERNELS.is_empty() && file.ends_with("_hopper.cu"));
    let sites = Mutex::new(barriers().into_iter().filter(runs).collect::<Vec<_>>());
    let unnoticed = Mutex::new(Vec::new());
    let next = || sites.lock().unwrap().pop();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((file, line)) = next() {
                    if !is_missed(&file, line) {
                        unnoticed.lock().unwrap().push(format!("kernels/{file}:{line}"));
                    }
                }
            });
        }
    });
    let unnoticed = unnoticed.into_inner().unwrap();
    assert!(unnoticed.is_empty(), "barriers that nothing misses, or nothing tests: {unnoticed:?}");
}

/// Source and line of every barrier in the kernels.
fn barriers() -> Vec<(String, usize)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap().to_string();
        for (i, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap();
            if code.contains("block_sync();") || code.contains("warp_sync();") {
                found.push((file.clone(), i + 1));
            }
        }
    }
    assert!(found.len() > 25, "only {} barriers were found", found.len());
    found
}

/// A change of a kernel's PTX that the sources do not show, as a mistake in `kernels/ptx.cuh` would be: what it is, the
/// kernel's source, the case that must notice it, and the changed text.
type Mutant = (&'static str, &'static str, &'static str, fn(&str) -> String);

const MUTANTS: [Mutant; 8] = [
    ("pairs are cut off instead of rounded", "pool", "pool: ", |ptx| {
        ptx.replace("cvt.rn.bf16x2.f32", "cvt.rz.bf16x2.f32")
    }),
    ("pairs are cut off instead of rounded", "activation", "gelu", |ptx| {
        ptx.replace("cvt.rn.bf16x2.f32", "cvt.rz.bf16x2.f32")
    }),
    ("the halves of pairs are swapped", "pool", "pool: ", |ptx| {
        let packed = |line: &str| {
            let (head, operands) = line.split_once("cvt.rn.bf16x2.f32 ")?;
            let [d, high, low] =
                operands.strip_suffix(';')?.split(", ").collect::<Vec<_>>().try_into().ok()?;
            Some(format!("{head}cvt.rn.bf16x2.f32 {d}, {low}, {high};"))
        };
        ptx.lines().map(|line| packed(line).unwrap_or(line.to_string()) + "\n").collect()
    }),
    ("one matrix is not transposed", "attention_forward", "attention: B", |ptx| {
        ptx.replacen(".x4.trans.shared", ".x4.shared", 1)
    }),
    ("a product takes its second matrix from the first", "attention_forward", "attention: B", |ptx| {
        let mixed = |line: &str| {
            let (head, operands) = line.split_once("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 ")?;
            let [d, a, _, c] = operands.split("}, {").collect::<Vec<_>>().try_into().ok()?;
            let two = a.split(", ").take(2).collect::<Vec<_>>().join(", ");
            Some(format!(
                "{head}mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d}}}, {{{a}}}, {{{two}}}, {{{c}"
            ))
        };
        ptx.lines().map(|line| mixed(line).unwrap_or(line.to_string()) + "\n").collect()
    }),
    ("copies fill with zeros", "attention_forward", "attention: B", |ptx| {
        let empty = |line: &str| {
            let (head, _) = line.split_once("], 16, ")?;
            Some(format!("{head}], 16, 0;"))
        };
        ptx.lines().map(|line| empty(line).unwrap_or(line.to_string()) + "\n").collect()
    }),
    ("copies are not waited for", "attention_forward", "attention: B", |ptx| {
        ptx.replace("cp.async.wait_group 0;", "").replace("cp.async.wait_group 1;", "cp.async.wait_group 2;")
    }),
    ("an exponential is a logarithm", "loss", "loss softmax: 10 classes", |ptx| {
        ptx.replace("ex2.approx.ftz.f32", "lg2.approx.ftz.f32")
    }),
];

#[test]
fn what_only_the_ptx_shows_is_noticed() {
    let Some(folder) = stand_in() else { return };
    if KERNELS.is_empty() {
        return println!("skipped: built without nvcc; `scripts/install-nvcc` fetches it");
    }
    let kept = folder.join("../../kernels").canonicalize().unwrap();
    let mut passed = BTreeSet::new();
    for (number, (what, source, filter, mutate)) in MUTANTS.iter().enumerate() {
        let changed = support::scratch().join(format!("mutant-{number}"));
        fs::create_dir_all(&changed).unwrap();
        let mut count = 0;
        for entry in fs::read_dir(&kept).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let is_mutated = name.strip_prefix(source).is_some_and(|rest| rest.len() == "-.ptx".len() + 16);
            if name.ends_with(".ptx") && is_mutated {
                let text = fs::read_to_string(&path).unwrap();
                let mutant = mutate(&text);
                count += usize::from(mutant != text);
                fs::write(changed.join(name), mutant).unwrap();
            } else if name.ends_with(".ptx") || name.ends_with(".fatbin") {
                std::os::unix::fs::symlink(&path, changed.join(name)).unwrap();
            }
        }
        assert!(count > 0, "{what}: nothing in {source}.cu changes");
        let args = ["selftest", "--device", "cuda", "--precision", "bf16", "--filter", filter];
        // Unchanged, it passes.
        if passed.insert(filter) {
            run_on_gpu(&folder, "engine=ptx", &args).ok();
        }
        let done = run_on_gpu(&folder, &format!("engine=ptx,ptx={}", changed.display()), &args);
        assert_eq!(done.code, 1, "{what} in {source}.cu: {}{}", done.stdout, done.stderr);
    }
}

#[test]
fn operations_are_timed_and_have_a_formula_for_each_launch() {
    let Some(folder) = stand_in() else { return };
    let args = ["bench", "--what", "kernels", "--device", "cuda", "--few", "--filter", "S/16", "--json"];
    let out = run_on_gpu(&folder, "checks=on", &args).ok().json();
    assert_eq!(out["stand_in"], true);
    assert!(out["copy_bytes_per_s"].as_f64().unwrap() > 0.0);
    assert!(out["product_flops_per_s"].as_f64().unwrap() > 0.0);
    let operations = out["operations"].as_array().unwrap();
    let names: Vec<&str> = operations.iter().map(|o| o["operation"].as_str().unwrap()).collect();
    for wanted in ["layernorm", "layernorm_backward, join", "attention", "attention_backward", "embed"] {
        assert!(names.contains(&wanted), "{wanted} is not in {names:?}");
    }
    for operation in operations {
        let launches = operation["launches"].as_array().unwrap();
        let least = |key: &str| launches.iter().map(|l| l[key].as_u64().unwrap()).sum::<u64>();
        let bytes = least("least_read_bytes") + least("least_written_bytes");
        assert_eq!(operation["bytes"], bytes, "{operation}");
        assert!(operation["ms"].as_f64().unwrap() > 0.0, "{operation}");
    }

    let args =
        ["bench", "--what", "kernels", "--device", "cuda", "--few", "--filter", "Ti/16 [394, 192] → 192"];
    let text = run_on_gpu(&folder, "checks=off", &args).ok().stdout;
    assert!(
        text.contains("these times say nothing about a real GPU") && text.contains("proj, bias, residual"),
        "{text}"
    );
}

#[test]
fn kernels_are_timed_on_a_gpu_or_not_at_all() {
    let args = ["bench", "--what", "kernels", "--few", "--device"];
    vitrum(&[&args[..], &["cpu"]].concat()).exits(2).says(&["times a GPU's kernels"]);
    let done = vitrum(&[&args[..], &["cuda"]].concat());
    // A machine with a GPU times them; without one, one sentence says so.
    if done.code != 0 {
        let done = done.exits(1).says(&["kernels are timed on a GPU"]);
        assert_eq!(done.stderr.lines().filter(|line| line.starts_with("error:")).count(), 1);
    }
}

#[test]
fn a_step_on_a_card_is_measured_against_the_card() {
    let Some(folder) = stand_in() else { return };
    for what in ["train", "infer"] {
        let args = [
            "bench", "--what", what, "--model", "mu/16", "--batch", "4", "--device", "cuda", "--rounds", "1",
        ];
        let size = ["--seconds", "0", "--set", "model.image=32", "--set", "train.deterministic=true"];
        let out = run_on_gpu(&folder, "checks=off", &[&args[..], &size, &["--json"]].concat()).ok().json();
        if what == "infer" {
            // A pass is one batch, regardless of the recipe's micro-batch.
            let parts = ["--set", "train.micro_batch=1", "--json"];
            let parts = run_on_gpu(&folder, "checks=off", &[&args[..], &size, &parts].concat()).ok().json();
            assert_eq!(parts["arena_bytes"], out["arena_bytes"]);
        }
        let card = &out["card"];
        assert_eq!((&card["stand_in"], &card["mfu_data_sheet"]), (&Value::Bool(true), &Value::Null));
        let share = card["mfu_product"].as_f64().unwrap();
        let expected = out["gflops"].as_f64().unwrap() * 1e9 / card["product_flops_per_s"].as_f64().unwrap();
        assert!((share / expected - 1.0).abs() < 1e-9, "{share}, not {expected}");
        assert!(card["memory_bytes"].as_u64() >= out["arena_bytes"].as_u64(), "{out}");
        assert!(out["first_step_s"].as_f64().unwrap() > 0.0);
        let text = run_on_gpu(&folder, "checks=off", &[&args[..], &size].concat()).ok().stdout;
        assert!(
            text.contains("unknown for this GPU") && text.contains("say nothing about a real GPU"),
            "{text}"
        );
    }
}
