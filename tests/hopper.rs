//! `train.kernels = hopper`: kernels with Hopper's own instructions, on the stand-in GPU, which runs their PTX.
//!
//! Without the stand-in, or in a build without nvcc, each test that needs them prints a line and passes.

use crate::support;

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use support::{outcome, path, run_on_gpu, stand_in, train};
use vitrum::backend::cuda::images::KERNELS;

/// The stand-in's folder, if the program has kernels for it to run as PTX.
fn with_ptx() -> Option<PathBuf> {
    if KERNELS.is_empty() {
        println!("skipped: built without nvcc; `scripts/install-nvcc` fetches it");
        return None;
    }
    stand_in()
}

/// What each launch of a kernel counted.
fn counted(file: &str, kernel: &str) -> Vec<Value> {
    let lines = fs::read_to_string(file).unwrap();
    let all = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    all.filter(|line| line["kernel"] == kernel).collect()
}

fn attention(options: &str, kernels: &str, filter: &str) -> support::Done {
    let folder = stand_in().unwrap();
    let what =
        ["selftest", "--device", "cuda", "--precision", "bf16", "--filter", filter, "--kernels", kernels];
    run_on_gpu(&folder, &format!("engine=ptx,{options}"), &what)
}

const FORWARD: &str = "attention_forward_hopper_bf16_d64";

/// All checks on, several schedules, many blocks and one.
#[test]
fn attention_is_that_of_float64() {
    if with_ptx().is_none() {
        return;
    }
    for options in ["checks=on", "checks=on,seed=7,multiprocessors=1"] {
        let done = attention(options, "hopper", "attention: B").ok();
        assert!(!done.stderr.contains("stand-in GPU:"), "{options}: {}", done.stderr);
    }
}

/// A head of `tokens` reads Q, K and V once, writes O and lse once, and leaves no bank of shared memory waiting; it
/// issues at most 42 % of the instructions of the portable kernel at 197 tokens.
#[test]
fn attention_moves_what_its_formula_says() {
    if with_ptx().is_none() {
        return;
    }
    let mut instructions = Vec::new();
    for (kernels, kernel) in [("hopper", FORWARD), ("portable", "attention_forward_bf16_d64")] {
        let file = path(&format!("counters-{kernels}"));
        attention(&format!("checks=off,counters={file}"), kernels, "attention: B 2 T 197 H 2 Dh 64").ok();
        let lines = counted(&file, kernel);
        assert!(!lines.is_empty(), "{kernel} was not launched");
        instructions.push(lines[0]["instructions"].as_u64().unwrap());
        if kernel != FORWARD {
            continue;
        }
        let (heads, tokens) = (4, 197);
        for line in &lines {
            assert_eq!(line["global_read"]["bytes"], heads * tokens * 3 * 128, "{line}");
            assert_eq!(line["global_write"]["bytes"], heads * tokens * (128 + 4), "{line}");
            for access in ["shared_read", "shared_write"] {
                assert_eq!(line[access]["wavefronts"], line[access]["ideal"], "{access}: {line}");
            }
        }
    }
    let [hopper, portable] = instructions[..] else { unreachable!("two kernels") };
    assert!(100 * hopper <= 42 * portable, "{hopper} instructions, the portable kernel {portable}");
}

/// What is left out or changed in the kernel's PTX: its name, the text, what it becomes, and whether the last one is
/// meant instead of all.
const OMISSIONS: [(&str, &str, &str, bool); 13] = [
    ("the fence before O is stored", "fence.proxy.async.shared::cta;", "", false),
    ("the wait for S", "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", false),
    ("the wait for O", "wgmma.wait_group.sync.aligned 0;", "", true),
    ("the fence of registers", "wgmma.fence.sync.aligned;", "", false),
    ("the fence of P", "wgmma.fence.sync.aligned;", "", true),
    (
        "the wait for a stage",
        "mbarrier.try_wait.parity.shared::cta.b64 done, [",
        "setp.eq.b32 done, 0, 0; } // [",
        true,
    ),
    (
        "the announced bytes",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [",
        "mbarrier.arrive.shared::cta.b64 _, [",
        false,
    ),
    ("the arrivals that free a stage", "mbarrier.arrive.shared::cta.b64 _, [", "// [", false),
    ("the swizzle of the values", SWIZZLED, "274878038016", true),
    ("the transposition of the values", "add, 1, 1, 1; }", "add, 1, 1, 0; }", false),
    ("adding to a product", "setp.ne.b32 add", "setp.eq.b32 add", false),
    ("the mask of keys", "0fFF800000, %p", "0f00000000, %p", false),
    ("the wait before a stage is freed", "cp.async.bulk.wait_group.read 0;", "", false),
];
/// The high bits of a descriptor: 128 bytes of swizzle, 1024 bytes from eight rows to the next.
const SWIZZLED: &str = "4611686293305360384";

#[test]
fn whatever_the_kernel_lacks_is_noticed() {
    let Some(folder) = with_ptx() else { return };
    let kept = folder.join("../../kernels").canonicalize().unwrap();
    for (number, (what, part, becomes, last)) in OMISSIONS.into_iter().enumerate() {
        let changed = support::scratch().join(format!("omission-{number}"));
        fs::create_dir_all(&changed).unwrap();
        let mut count = 0;
        for entry in fs::read_dir(&kept).unwrap() {
            let from = entry.unwrap().path();
            let name = from.file_name().unwrap().to_str().unwrap();
            if name.starts_with("attention_forward_hopper-") && name.ends_with(".ptx") {
                let text = fs::read_to_string(&from).unwrap();
                let changed_text = match text.rsplit_once(part).filter(|_| last) {
                    Some((before, after)) => [before, after].join(becomes),
                    None => text.replace(part, becomes),
                };
                count += usize::from(changed_text != text);
                fs::write(changed.join(name), changed_text).unwrap();
            } else if name.ends_with(".ptx") || name.ends_with(".fatbin") {
                std::os::unix::fs::symlink(&from, changed.join(name)).unwrap();
            }
        }
        assert!(count > 0, "{what}: nothing changes");
        // One block takes all heads, so that every stage is used twice.
        let options = format!("checks=on,multiprocessors=1,ptx={}", changed.display());
        let done = attention(&options, "hopper", "attention: B 5 T 65 H 1");
        assert_eq!(done.code, 1, "{what}: {}{}", done.stdout, done.stderr);
    }
}

#[test]
fn a_run_is_the_same_in_every_order_of_work_and_resumed() {
    let Some(folder) = with_ptx() else { return };
    let run = |out: &str, options: &str, more: &[&str]| {
        let size =
            ["model.width=64", "model.heads=1", "train.batch=4", "train.micro_batch=2", "train.steps=12"];
        let pace = ["train.log_every=1", "train.eval_every=12", "train.checkpoint_every=4"];
        let rest = ["train.deterministic=true", "--device", "cuda", "train.kernels=hopper"];
        let args = train(out, &[&size[..], &pace, &rest, more].concat());
        run_on_gpu(&folder, &format!("engine=ptx,{options}"), &args)
    };
    let (whole, again, halves) = (path("whole"), path("again"), path("halves"));
    let counters = path("launches");
    run(&whole, &format!("checks=off,counters={counters}"), &[]).ok();
    assert!(!counted(&counters, FORWARD).is_empty());
    let done = run(&again, "checks=on,defer=3,seed=2", &[]).ok();
    assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);
    assert_eq!(outcome(&again), outcome(&whole));
    // A launch after the first checkpoint breaks the context.
    let broken = run(&halves, "checks=off,fail_launch=900", &[]);
    assert_eq!(broken.code, 1, "the launch was not reached");
    run(&halves, "checks=off", &["--resume"]).ok();
    assert_eq!(outcome(&halves), outcome(&whole));
}

#[test]
fn other_gpus_are_refused_in_one_sentence() {
    let Some(folder) = stand_in() else { return };
    for sm in ["80", "100"] {
        let args = train(&path("other"), &["--device", "cuda", "train.kernels=hopper"]);
        let options = format!("sm={sm},driver=13030");
        let done = run_on_gpu(&folder, &options, &args).exits(1);
        done.says(&[
            "`train.kernels = hopper` needs a GPU of compute capability 9.0",
            "train.kernels=portable",
        ]);
    }
}
