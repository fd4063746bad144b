//! Several ranks that train one model, from outside: the same bits, one voice, and nobody left behind.

use crate::support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use support::{
    command, copy, finish, is_ignored, metrics, names, path, process, ranks, stripes, train, vitrum, wait,
};

/// Everything that must not depend on the number of ranks: weights, their moving average, moments, metrics.
#[derive(Debug, PartialEq)]
struct Bits {
    weights: Vec<u8>,
    ema: Vec<u8>,
    /// Moments, counters and the recipe. Without chunks the number of ranks, too.
    state: Vec<u8>,
    metrics: Vec<Value>,
}

fn bits(out: &str) -> Bits {
    let last = Path::new(out).join("checkpoints/last");
    let read = |name: &str| std::fs::read(last.join(name)).unwrap();
    Bits {
        weights: read("model.safetensors"),
        ema: read("ema.safetensors"),
        state: read("state.safetensors"),
        metrics: metrics(out),
    }
}

/// Steps with every kind of randomness, clipping, a moving average, and a batch of 16 in eight chunks: four ranks
/// have two each.
const CHUNKS: [&str; 7] = [
    "--device=cpu",
    "train.steps=6",
    "train.log_every=1",
    "train.eval_every=3",
    "train.micro_batch=0",
    "train.reduce_chunks=8",
    "optim.clip=0.5",
];

fn run(name: &str, count: usize, settings: &[&str]) -> Option<(String, support::Done)> {
    let out = path(name);
    let args = train(&out, settings);
    let done = if count == 1 { vitrum(&args) } else { finish(ranks(&[(count, &args)])?) };
    Some((out, done.ok()))
}

#[test]
fn ranks_have_the_bits_of_one_rank() {
    let kinds = [
        ("mixed", &["train.steps=50", "train.eval_every=25"][..]),
        ("repeated", &["augment.repeats=2", "augment.mix_mode=elem"]),
        ("lion", &["optim.name=lion", "optim.lr=1e-4", "optim.moment=bf16"]),
        ("adafactor", &["optim.name=adafactor"]),
        ("frozen", &["optim.freeze_blocks=1"]),
    ];
    for (kind, more) in kinds {
        let settings = [&CHUNKS[..], more].concat();
        let Some((alone, _)) = run(&format!("{kind}-1"), 1, &settings) else { return };
        let want = bits(&alone);
        let steps = if kind == "mixed" { 50 } else { 6 };
        assert_eq!(want.metrics.len(), steps + 2);
        for count in [2, 4] {
            let Some((out, done)) = run(&format!("{kind}-{count}"), count, &settings) else { return };
            assert_eq!(bits(&out), want, "{count} ranks, {kind}");
            let lines = |text: &str| done.stderr.matches(text).count();
            let (last, end) = (format!("step {steps}/{steps}"), format!("trained {steps} steps"));
            assert_eq!((lines(&last), lines(&end), lines("rank 1: ")), (1, 1, 0));
            let note = format!("ranks    {count} with {} samples of each batch", 16 / count);
            assert!(done.stderr.contains(&note), "{}", done.stderr);
        }
    }
}

#[test]
fn without_chunks_the_loss_is_the_same_and_a_number_of_ranks_has_its_own_bits() {
    let settings = [&CHUNKS[..5], &["augment.mix_group=8", "train.steps=50", "train.eval_every=25"]].concat();
    let Some((two, _)) = run("in-order-2", 2, &settings) else { return };
    let Some((again, _)) = run("in-order-2-again", 2, &settings) else { return };
    assert_eq!(bits(&two), bits(&again));
    let (alone, _) = run("in-order-1", 1, &settings).unwrap();
    let losses = |out: &str| -> Vec<f64> {
        metrics(out).iter().filter_map(|line| line.get("loss").and_then(Value::as_f64)).collect()
    };
    let (two, alone) = (losses(&two), losses(&alone));
    assert_eq!(two.len(), 50);
    assert_eq!(two[0], alone[0], "the first loss needs no sum of gradients");
    for (a, b) in two.iter().zip(&alone) {
        assert!((a - b).abs() < 1e-5, "{two:?} and {alone:?}");
    }
}

/// The lines of evaluations among the metrics of a run.
fn evaluations(out: &str) -> Vec<Value> {
    metrics(out).into_iter().filter(|line| !line["eval"].is_null()).collect()
}

#[test]
fn an_evaluation_has_the_same_bits_on_any_number_of_ranks() {
    // Updates too small to change a weight, so that only the evaluations could differ. 39 pictures that can be read, of
    // several classes each: neither batches nor ranks divide them. Ranks without chunks have batches of other sizes.
    let folder = path("shared");
    copy(Path::new(stripes()), Path::new(&folder));
    std::fs::write(Path::new(&folder).join("val/checks/001.png"), "no picture").unwrap();
    let mut list = String::from("path,labels,split\n");
    for split in ["train", "val"] {
        for class in ["across", "checks", "down"] {
            for (i, name) in names(Path::new(&folder).join(split).join(class)).into_iter().enumerate() {
                let more = if i % 3 == 0 { ";third" } else { "" };
                list += &format!("{split}/{class}/{name},{class}{more},{split}\n");
            }
        }
    }
    let file = format!("{folder}/list.csv");
    std::fs::write(&file, list).unwrap();
    let data = format!("data.train={file}");
    let settings = [
        &data,
        "--device=cpu",
        "loss.kind=sigmoid",
        "loss.label_smoothing=0",
        "optim.lr=1e-30",
        "model.init=deit3",
    ];
    let length = ["train.batch=24", "train.micro_batch=0", "train.steps=2", "train.eval_every=1"];
    let settings = [&settings[..], &length].concat();
    let (alone, _) = run("evaluated-1", 1, &settings).unwrap();
    let want = evaluations(&alone);
    assert_eq!((want.len(), &want[0]["eval"]["images"]), (2, &39.into()));
    assert!(want[0]["eval"]["mAP"].is_f64() && want[0]["eval"]["ema"]["mAP"].is_f64(), "{}", want[0]);
    for count in [2, 3, 4] {
        let Some((out, _)) = run(&format!("evaluated-{count}"), count, &settings) else { return };
        assert_eq!(evaluations(&out), want, "{count} ranks");
    }
}

fn start(mut command: Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn lines(out: &str) -> usize {
    std::fs::read_to_string(Path::new(out).join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

const LONG: [&str; 4] =
    ["train.steps=2000", "train.eval_every=1000", "train.checkpoint_every=1000", "train.keep=1"];

#[test]
fn a_signal_to_one_rank_saves_the_run_and_other_ranks_continue_it() {
    if is_ignored(Signal::TERM) {
        println!("skipped: this process ignores SIGTERM");
        return;
    }
    let out = path("stopped");
    let settings = [&CHUNKS[..], &LONG, &["train.steps=400", "train.eval_every=200"]].concat();
    let settings = |more: &[&'static str]| [&settings[..], more].concat();
    let mut resume = &[][..];
    for (count, at) in [(4, 10), (2, 40)] {
        let Some(command) = ranks(&[(count, &train(&out, &settings(resume)))]) else { return };
        let child = start(command);
        until("some steps", Duration::from_secs(60), || lines(&out) >= at);
        kill_process(process(1, &out).expect("rank 1 is running"), Signal::TERM).unwrap();
        let done = wait(child).exits(143).says(&["stopped at step ", "saved to ", "vitrum train --resume "]);
        assert_eq!(done.stderr.matches("stopped at step ").count(), 1, "{}", done.stderr);
        assert!(process(0, &out).is_none() && process(1, &out).is_none());
        resume = &["--resume"];
    }
    vitrum(&train(&out, &settings(resume))).ok().says(&["resume   from checkpoints/step-"]);
    let (alone, _) = run("not-stopped", 1, &settings(&[])).unwrap();
    assert_eq!(bits(&out), bits(&alone));
}

#[test]
fn a_signal_to_one_rank_during_an_evaluation_stops_all_and_the_resumed_run_makes_up_for_it() {
    if is_ignored(Signal::TERM) {
        println!("skipped: this process ignores SIGTERM");
        return;
    }
    // 2,000 pictures to validate with: most of the run's time.
    let settings = [&CHUNKS[..], &["data.train=demo"]].concat();
    let (alone, _) = run("evaluated-alone", 1, &settings).unwrap();
    for attempt in 0..20 {
        let out = path(&format!("evaluating-{attempt}"));
        let Some(command) = ranks(&[(2, &train(&out, &settings))]) else { return };
        let mut child = start(command);
        // The line of step 3, which is evaluated next.
        until("three steps", Duration::from_secs(60), || lines(&out) >= 3);
        process(1, &out).map(|rank| kill_process(rank, Signal::TERM));
        until("the end", Duration::from_secs(60), || child.try_wait().unwrap().is_some());
        let done = wait(child);
        if done.code == 0 || !done.stderr.contains("stopped during an evaluation") {
            continue;
        }
        done.exits(143).says(&["after step ", "saved to ", "vitrum train --resume "]);
        let resume = train(&out, &[&settings[..], &["--resume"]].concat());
        finish(ranks(&[(4, &resume)]).unwrap()).ok();
        assert_eq!(bits(&out), bits(&alone));
        return;
    }
    panic!("no signal arrived during an evaluation");
}

#[test]
fn a_killed_rank_ends_the_others() {
    let out = path("killed");
    let Some(command) = ranks(&[(2, &train(&out, &[&CHUNKS[..], &LONG].concat()))]) else { return };
    let mut child = start(command);
    until("five steps", Duration::from_secs(60), || lines(&out) >= 5);
    kill_process(process(1, &out).expect("rank 1 is running"), Signal::KILL).unwrap();
    until("mpirun ends", Duration::from_secs(20), || child.try_wait().unwrap().is_some());
    assert_ne!(wait(child).code, 0);
    until("rank 0 ends", Duration::from_secs(5), || process(0, &out).is_none());
}

#[test]
fn an_error_of_one_rank_ends_all() {
    // One picture cannot be read, so one of two ranks fails in the first epoch while the other one waits.
    let folder = path("broken");
    copy(Path::new(stripes()), Path::new(&folder));
    std::fs::write(Path::new(&folder).join("train/checks/001.png"), "no picture").unwrap();
    let mut by_rank = [0, 0];
    for seed in 0..4 {
        let out = path(&format!("broken-{seed}"));
        let seed = format!("train.seed={seed}");
        let data = format!("data.train={folder}");
        let settings = [&CHUNKS[..], &[&data, &seed, "data.on_bad_record=error"]].concat();
        let Some(command) = ranks(&[(2, &train(&out, &settings))]) else { return };
        let mut child = start(command);
        until("the end", Duration::from_secs(60), || child.try_wait().unwrap().is_some());
        let done = wait(child).exits(1).says(&["error: ", "001.png"]);
        by_rank[usize::from(done.stderr.contains("rank 1: error: "))] += 1;
    }
    println!("errors of rank 0 and of rank 1: {by_rank:?}");
}

#[test]
fn ranks_that_do_not_fit_together_are_refused() {
    let refused = |parts: &[(usize, &[&str])], code: i32, texts: &[&str]| {
        let out = path("refused");
        let args: Vec<_> = parts.iter().map(|(count, more)| (*count, train(&out, more))).collect();
        let parts: Vec<_> = args.iter().map(|(count, args)| (*count, args.as_slice())).collect();
        let Some(command) = ranks(&parts) else { return };
        finish(command).exits(code).says(texts);
        assert!(!Path::new(&out).join("recipe.toml").exists(), "no run began");
    };
    let cpu = "--device=cpu";
    refused(&[(2, &["--device=cuda:1"])], 2, &["`--device cuda:1` is one GPU, and ", " started 2 ranks"]);
    refused(&[(3, &[cpu])], 2, &["`train.batch` is 16, which 3 ranks cannot share", "train.batch=18"]);
    refused(
        &[(4, &[cpu])],
        2,
        &["`train.micro_batch` is 8, which does not divide the 4", "train.micro_batch=4"],
    );
    let chunks = ["train.micro_batch=0", "train.reduce_chunks=2"];
    refused(&[(4, &[cpu, chunks[0], chunks[1]])], 2, &["`train.reduce_chunks` is 2, which 4 ranks"]);
    refused(&[(2, &[cpu, "augment.mix_group=3"])], 2, &["`augment.mix_group` is 3", "augment.mix_group=8"]);
    refused(&[(2, &[cpu, "--sweep=optim.lr=1e-3,1e-4"])], 2, &["`--sweep` runs in one process"]);
    let (one, other) = ([cpu], [cpu, "optim.lr=1e-4"]);
    refused(&[(1, &one), (1, &other)], 1, &["rank 1 has a recipe other than rank 0's"]);
    let plan = ["plan", "demo"].map(String::from);
    if let Some(command) = ranks(&[(2, &plan)]) {
        let done = finish(command).exits(2).says(&["runs in one process, and ", " started 2 ranks"]);
        assert_eq!(done.stdout, "");
    }
}

#[test]
fn bench_times_the_step_of_all_ranks() {
    let model = ["--set", "model.image=32", "--set", "model.patch=4", "--set", "model.depth=2"];
    let args =
        [&["bench", "--device", "cpu", "--batch", "8", "--rounds", "2", "--seconds", "0.05"], &model[..]]
            .concat();
    let args = |more: &[&str]| -> Vec<String> { args.iter().chain(more).map(|s| s.to_string()).collect() };
    let Some(command) = ranks(&[(2, &args(&["--json"]))]) else { return };
    let json = finish(command).ok().json();
    let (row, of) = (&json["row"], |value: &Value| value.as_f64().unwrap());
    assert_eq!((&json["ranks"], &row["ranks"], &row["batch_per_rank"]), (&2.into(), &2.into(), &4.into()));
    assert_eq!(row["loader_img_per_s_per_node"], row["img_per_s"]);
    assert!((of(&row["img_per_s"]) * of(&row["ms_per_step"]) / 8e3 - 1.0).abs() < 1e-9, "{row}");
    assert!((of(&json["img_per_s"]) / of(&row["img_per_s"]) - 1.0).abs() < 1e-9, "{json}");
    let text = finish(ranks(&[(2, &args(&[]))]).unwrap()).ok().stdout;
    assert!(text.contains("2 ranks, each also by itself") && text.contains("exposed ms"), "{text}");
    assert_eq!(text.matches("img/s per node").count(), 1, "one rank speaks: {text}");
    for (more, what) in [(["--what", "infer"], "infer"), (["--what", "data"], "data")] {
        let done = finish(ranks(&[(2, &args(&more))]).unwrap()).exits(2).says(&["runs in one process"]);
        assert_eq!(done.stdout, "", "{what}");
    }
    finish(ranks(&[(3, &args(&[]))]).unwrap())
        .exits(2)
        .says(&["which 3 ranks cannot share", "train.batch=9"]);
    // One process has no row.
    let alone = vitrum(&args(&["--json"])).ok().json();
    assert_eq!((&alone["ranks"], &alone["row"]), (&1.into(), &Value::Null));
}

#[test]
fn launchers_without_mpi_are_told_what_to_do() {
    let under = |variables: &[(&str, &str)]| {
        let mut command = command(&train(&path("launched"), &["--device=cpu"]));
        finish({
            command.envs(variables.iter().copied());
            command
        })
    };
    let torchrun = [("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")];
    under(&torchrun).exits(2).says(&["torchrun started 2 ranks", "`mpirun -n 2 vitrum train ...`"]);
    let srun = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2")];
    under(&srun).exits(2).says(&["srun started the ranks without MPI", "srun --mpi=pmix"]);
    let broken = [("OMPI_COMM_WORLD_SIZE", "2")];
    under(&broken).exits(2).says(&["`OMPI_COMM_WORLD_RANK` is not set"]);
}

#[test]
fn chunks_on_one_rank_are_checked() {
    let refused = |settings: &[&str], texts: &[&str]| {
        let args = train(&path("chunks"), &[&["--device=cpu"], settings].concat());
        vitrum(&args).exits(2).says(texts);
    };
    refused(&["train.reduce_chunks=3"], &["`train.reduce_chunks` is 3", "train.reduce_chunks=2"]);
    refused(&["train.reduce_chunks=32"], &["`train.reduce_chunks` is 32", "train.reduce_chunks=16"]);
    refused(&["train.reduce_chunks=4"], &["each of the 4 chunks", "micro-batch of 4 samples"]);
}
