//! Runs on the stand-in GPU whatever the order in which the GPU does its work: `defer` of `standin/README.md`.
//!
//! Without the stand-in, each test prints a line and passes.

use crate::support;

use serde_json::Value;
use support::{metrics, outcome, path, run_on_gpu as run, stand_in, stripes, train};

/// Of the order; 1 is the stand-in's own. `VITRUM_STANDIN_SEEDS` has a list of others: `.ci/run` tries three.
fn seeds() -> Vec<u32> {
    let seeds = std::env::var("VITRUM_STANDIN_SEEDS").unwrap_or("2".into());
    seeds.split(',').map(|seed| seed.parse().expect("numbers with commas in between")).collect()
}

/// Two tokens wide enough for every bf16 kernel, micro-batches, an average, evaluations and checkpoints.
fn small(out: &str, more: &[&str]) -> Vec<String> {
    let size = ["model.width=64", "model.heads=2", "train.batch=4", "train.micro_batch=2", "train.steps=8"];
    let pace = ["train.log_every=1", "train.eval_every=4", "train.checkpoint_every=4"];
    let rest = ["train.deterministic=true", "--device", "cuda"];
    train(out, &[&size[..], &pace, &rest, more].concat())
}

#[test]
fn no_order_of_the_gpus_work_changes_a_bit() {
    let Some(folder) = stand_in() else { return };
    let train = |name: &str, options: &str, more: &[&str]| {
        let out = path(name);
        let done = run(&folder, &format!("checks=on,{options}"), &small(&out, more)).ok();
        assert!(!done.stderr.contains("stand-in GPU:"), "{options}: {}", done.stderr);
        outcome(&out)
    };
    let at_once = train("at-once", "defer=off", &[]);
    for seed in seeds() {
        assert_eq!(train(&format!("order-{seed}"), &format!("defer={seed}"), &[]), at_once, "order {seed}");
        // Launch by launch; with a single multiprocessor every loop over a grid goes round several times.
        let graph = ["train.graph=false"];
        let launched = train(&format!("launched-{seed}"), &format!("defer={seed}"), &graph);
        assert_eq!(launched.files[0], at_once.files[0], "order {seed}, launch by launch");
    }
    let one = train("one-at-once", "defer=off,multiprocessors=1", &[]);
    assert_eq!(train("one", "defer=4,multiprocessors=1,seed=5", &[]), one);
}

/// The average is evaluated in place of the weights, and products read their own copy in bf16: a stale one would be
/// that of the weights.
#[test]
fn the_average_is_evaluated_with_its_own_copy_in_bf16() {
    let Some(folder) = stand_in() else { return };
    // The average lags far behind weights that move fast.
    let more =
        ["optim.ema=0.9", "optim.lr=0.02", "schedule.warmup=0", "optim.clip=0", "train.precision=bf16"];
    let losses = |line: &Value| ["loss", "top1"].map(|key| line[key].as_f64().unwrap());
    for seed in seeds() {
        let options = format!("checks=on,defer={seed}");
        let out = path(&format!("average-{seed}"));
        let done = run(&folder, &options, &small(&out, &more)).ok();
        assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);
        let lines = metrics(&out);
        let last = lines.iter().rfind(|line| line.get("eval").is_some()).unwrap();
        let own = |file: &str| {
            let weights = format!("{out}/checkpoints/last/{file}.safetensors");
            let files = ["eval", "--weights", &weights, "--data", stripes()];
            let args = [&files[..], &["--batch", "2", "--json", "--device", "cuda"]].concat();
            losses(&run(&folder, &options, &args).ok().json())
        };
        let apart = |a: [f64; 2], b: [f64; 2]| (a[0] - b[0]).abs() + (a[1] - b[1]).abs();
        let (weights, average) = (own("model"), own("ema"));
        assert!(
            apart(weights, average) > 0.05,
            "{weights:?}, {average:?}: the test could not tell them apart"
        );
        let (of_weights, of_average) = (losses(&last["eval"]), losses(&last["eval"]["ema"]));
        assert!(apart(of_average, average) < 1e-3, "the average: {of_average:?}, alone {average:?}");
        assert!(apart(of_weights, weights) < 1e-3, "the weights: {of_weights:?}, alone {weights:?}");
    }
}
