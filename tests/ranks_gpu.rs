//! Several ranks on GPUs, each a process on the stand-in GPU, through NCCL's stand-in: the same bits for any number
//! of ranks, and the bits of a GPU alone.

use crate::support;

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use support::{metrics, on_gpu, outcome, path, run_on_gpu, stand_in, train, wait};

const OPTIONS: &str = "checks=bounds,threads=1,cards=4";

/// Everything random, accumulation, clipping, an average, and eight chunks: four ranks have two each.
const CHUNKS: [&str; 8] = [
    "--device=cuda",
    "train.steps=8",
    "train.log_every=1",
    "train.eval_every=4",
    "train.checkpoint_every=4",
    "train.micro_batch=0",
    "train.reduce_chunks=8",
    "optim.clip=0.5",
];

/// A run on `count` ranks, as torchrun starts them; its directory.
fn run(folder: &Path, name: &str, count: usize, settings: &[&str]) -> String {
    let out = path(name);
    let args = train(&out, settings);
    if count == 1 {
        run_on_gpu(folder, OPTIONS, &args).ok();
        return out;
    }
    let start = |rank: usize| {
        let mut command = on_gpu(folder, OPTIONS, &args);
        let size = count.to_string();
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", &size).env("LOCAL_WORLD_SIZE", &size);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let ranks: Vec<_> = (0..count).map(start).collect();
    for (rank, done) in ranks.into_iter().map(wait).enumerate() {
        assert_eq!(done.code, 0, "rank {rank} of {count}, {name}: {}", done.stderr);
    }
    out
}

#[test]
fn ranks_on_gpus_have_the_bits_of_one_rank() {
    let Some(folder) = stand_in() else { return };
    let kinds = [
        ("bf16", &[][..]),
        ("f32", &["train.precision=f32", "train.steps=4"]),
        ("adafactor", &["optim.name=adafactor", "train.steps=4"]),
        ("not-recorded", &["train.graph=false", "train.steps=4"]),
    ];
    for (kind, more) in kinds {
        let settings = [&CHUNKS[..], more].concat();
        let want = outcome(&run(&folder, &format!("{kind}-1"), 1, &settings));
        for count in [2, 4] {
            let got = outcome(&run(&folder, &format!("{kind}-{count}"), count, &settings));
            assert_eq!(got.metrics, want.metrics, "{count} ranks, {kind}");
            assert!(got.files == want.files, "weights, average and state: {count} ranks, {kind}");
        }
    }
}

#[test]
fn without_chunks_ranks_on_gpus_have_the_loss_of_one_rank() {
    let Some(folder) = stand_in() else { return };
    let settings =
        [&CHUNKS[..6], &["augment.mix_group=4", "train.precision=f32", "train.micro_batch=4"]].concat();
    let losses = |out: &str| -> Vec<f64> {
        metrics(out).iter().filter_map(|line| line.get("loss").and_then(Value::as_f64)).collect()
    };
    let alone = losses(&run(&folder, "in-order-1", 1, &settings));
    for count in [2, 4] {
        let name = format!("in-order-{count}");
        let ranks = losses(&run(&folder, &name, count, &settings));
        let again = outcome(&run(&folder, &format!("{name}-again"), count, &settings));
        assert_eq!(again, outcome(&path(&name)), "{count} ranks twice");
        assert_eq!(ranks.len(), 8);
        for (a, b) in ranks.iter().zip(&alone) {
            assert!((a - b).abs() < 1e-5, "{count} ranks: {ranks:?} and {alone:?}");
        }
    }
}
