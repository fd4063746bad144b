//! Whole runs of the program, from outside: stopped, killed, resumed, diverging, learning.

use crate::support;

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use support::{
    Outcome, Random, command, finish, is_ignored, metrics, names, outcome, path, settings, stripes, train,
    vitrum, wait,
};
use vitrum::backend::{self, Device};
use vitrum::dist::Collective;
use vitrum::recipe::Recipe;
use vitrum::train::{DataShape, Setup, Trainer};
use vitrum::weights::safetensors::SafeTensors;

/// A run that goes through without a break.
fn unbroken(name: &str, more: &[&str]) -> Outcome {
    let out = path(name);
    vitrum(&train(&out, more)).ok();
    outcome(&out)
}

fn start(args: &[String]) -> Child {
    command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Polls until `arrived`, or until the process ends by itself.
fn watch(child: &mut Child, mut arrived: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(120);
    while !arrived() && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < limit, "nothing happened for two minutes");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn lines(run: &str) -> usize {
    std::fs::read(Path::new(run).join("metrics.jsonl"))
        .map_or(0, |t| t.iter().filter(|b| **b == b'\n').count())
}

fn has_hidden_checkpoint(run: &str) -> bool {
    names(Path::new(run).join("checkpoints")).iter().any(|name| name.starts_with(".step-"))
}

#[test]
fn resume_after_kill_has_the_bits_of_an_unbroken_run() {
    const KILLS: usize = 20;
    let want = unbroken("unbroken", &[]);
    let mut random = Random(20);
    let (mut kills, mut in_a_checkpoint, mut before_any, mut runs) = (0, 0, 0, 0);
    while kills < KILLS || in_a_checkpoint == 0 || before_any == 0 {
        runs += 1;
        assert!(
            runs < 100,
            "{kills} kills, {in_a_checkpoint} in a checkpoint, {before_any} before the first"
        );
        let out = path(&format!("killed-{runs}"));
        for _ in 0..1 + random.below(3) {
            let mut child = start(&train(&out, &["--resume"]));
            // One in three waits until a checkpoint is written, the others until a moment between two lines.
            let from = lines(&out);
            let more = random.below(5) as usize;
            watch(&mut child, || {
                Path::new(&out).join("metrics.jsonl").exists() && lines(&out) >= from.min(8) + more
            });
            match random.below(3) {
                0 => watch(&mut child, || has_hidden_checkpoint(&out)),
                _ => std::thread::sleep(Duration::from_micros(random.below(15_000))),
            }
            child.kill().unwrap();
            if wait(child).code != 128 + 9 {
                break;
            }
            kills += 1;
            in_a_checkpoint += usize::from(has_hidden_checkpoint(&out));
            before_any += usize::from(!Path::new(&out).join("checkpoints/last").exists());
        }
        vitrum(&train(&out, &["--resume"])).ok();
        assert_eq!(outcome(&out), want, "run {runs}, after {kills} kills");
    }
    println!("{kills} kills: {in_a_checkpoint} in a checkpoint, {before_any} before the first; {runs} runs");
}

#[test]
fn a_signal_saves_the_run_and_resume_has_the_bits_of_an_unbroken_run() {
    // Long enough that a signal arrives on a busy machine.
    let long = ["train.steps=240"];
    let want = unbroken("not-stopped", &long);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        if is_ignored(signal) {
            println!("skipped: this process ignores the signal {}", signal.as_raw());
            continue;
        }
        let stopped = (0..20).any(|attempt| {
            let out = path(&format!("stopped-{code}-{attempt}"));
            let mut child = start(&train(&out, &long));
            watch(&mut child, || lines(&out) > 0);
            let _ = kill_process(Pid::from_child(&child), signal);
            let done = wait(child);
            if done.code == 0 {
                return false; // The run ended before the signal.
            }
            let done =
                done.exits(code).says(&["stopped at step ", "saved to ", "hint: ", "vitrum train --resume "]);
            let saved = done.stderr.split("saved to ").nth(1).unwrap().lines().next().unwrap();
            let last = std::fs::canonicalize(Path::new(&out).join("checkpoints/last")).unwrap();
            assert_eq!(std::fs::canonicalize(saved).unwrap(), last);
            vitrum(&train(&out, &[&long[..], &["--resume"]].concat())).ok();
            assert_eq!(outcome(&out), want);
            true
        });
        assert!(stopped, "the run always ended before the signal");
    }
}

#[test]
fn a_signal_during_an_evaluation_saves_the_run_which_is_resumed_with_it() {
    // 2,000 pictures to validate with: most of the run's time.
    let more = ["data.train=demo", "train.log_every=8"];
    let want = unbroken("evaluated", &more);
    let stopped = (0..20).any(|attempt| {
        let out = path(&format!("evaluating-{attempt}"));
        let mut child = start(&train(&out, &more));
        // The line of step 8, which is evaluated next.
        watch(&mut child, || lines(&out) > 0);
        let _ = kill_process(Pid::from_child(&child), Signal::TERM);
        let done = wait(child);
        if done.code == 0 || !done.stderr.contains("stopped during an evaluation") {
            return false;
        }
        done.exits(143).says(&["after step 8, saved to ", "hint: ", "vitrum train --resume "]);
        vitrum(&train(&out, &[&more[..], &["--resume"]].concat())).ok();
        assert_eq!(outcome(&out), want);
        true
    });
    assert!(stopped, "no signal arrived during an evaluation");
}

#[test]
fn threads_and_workers_change_no_bit() {
    let run = |name: &str, threads: usize, workers: usize| {
        let out = path(name);
        let more = [format!("train.threads={threads}"), format!("data.workers={workers}")];
        vitrum(&train(&out, &[&more[0], &more[1]])).ok();
        let mut outcome = outcome(&out);
        // The recipe in the state's metadata names the threads.
        outcome.files.retain(|(name, ..)| name != "state.safetensors");
        outcome
    };
    let one = run("one", 1, 1);
    for n in [2, 3] {
        assert_eq!(run(&format!("threads-{n}"), n, 1), one, "{n} threads");
        assert_eq!(run(&format!("workers-{n}"), 1, n), one, "{n} workers");
    }
}

/// The mean training loss of the first and the last line.
fn first_and_last_loss(run: &str) -> (f64, f64) {
    let losses: Vec<f64> = metrics(run).iter().filter_map(|line| line["loss"].as_f64()).collect();
    (losses[0], *losses.last().unwrap())
}

#[test]
fn every_instruction_set_learns() {
    let known = ["scalar", "avx2", "avx512"];
    let machine = vitrum(&["doctor", "--json"]).ok().json()["isa"].as_str().unwrap().to_owned();
    let best = known.iter().position(|isa| *isa == machine).unwrap();
    for isa in &known[..=best] {
        let out = path(isa);
        let mut command = command(&train(&out, &["train.steps=60", "augment.mixup=0"]));
        finish({
            command.env("VITRUM_ISA", isa);
            command
        })
        .ok()
        .says(&[isa]);
        let (first, last) = first_and_last_loss(&out);
        assert!(last < 0.8 * first, "{isa}: loss {first}, then {last}");
    }
    println!("instruction sets: {}", known[..=best].join(", "));
}

/// Three kinds of stripes at any phase and colour: chance is 33 %.
#[test]
fn a_short_run_learns() {
    let out = path("learns");
    let more = ["train.steps=300", "train.eval_every=100", "model.dropout=0", "model.attention_dropout=0"];
    vitrum(&train(&out, &more)).ok();
    let eval = metrics(&out).into_iter().rfind(|line| line.get("eval").is_some()).unwrap();
    let top1 = eval["eval"]["top1"].as_f64().unwrap();
    assert_eq!(eval["step"], 300);
    assert!(top1 >= 0.9, "{eval}");
    let (first, last) = first_and_last_loss(&out);
    assert!(last < 0.6 * first, "loss {first}, then {last}");
}

/// With an empty cache, as a first user has it.
#[test]
fn a_short_run_on_the_demo_shows_a_falling_loss() {
    let out = path("demo");
    let short = ["train.steps=60", "train.batch=64", "train.log_every=10", "model.depth=2"];
    let sets = short.iter().flat_map(|setting| ["--set", setting]);
    let args: Vec<&str> = ["train", "--out", &out].into_iter().chain(sets).collect();
    let done = vitrum(&args).ok();
    let (first, last) = first_and_last_loss(&out);
    assert!(last < first - 0.05, "loss {first}, then {last}");
    assert!(done.stdout.is_empty(), "{}", done.stdout);
    let done = done.says(&["trained 60 steps", "checkpoints/last", "vitrum eval", "vitrum predict"]);
    // The suggested commands work as printed.
    let eval = done.stderr.lines().find(|line| line.contains("vitrum eval")).unwrap();
    let eval: Vec<&str> = eval.split("vitrum ").nth(1).unwrap().split(' ').collect();
    assert!(vitrum(&eval).ok().stdout.starts_with("2,000 images"), "{eval:?}");
}

#[test]
fn overfit_learns_by_heart_or_fails() {
    let out = path("overfit");
    let more = ["--overfit", "16"];
    vitrum(&train(&out, &more)).ok().says(&["reached the overfit target"]);
    let (_, last) = first_and_last_loss(&out);
    assert!(last < 0.01, "loss {last}");
    let step = metrics(&out).last().unwrap()["step"].as_u64().unwrap();
    assert!(step <= 300, "{step} steps");
    // The run remembers that it is an overfit run.
    vitrum(&["train", "--resume", &out]).ok().says(&["reached the overfit target"]);
    vitrum(&train(&out, &[&more[..], &["--resume"]].concat())).ok().says(&["reached the overfit target"]);
    vitrum(&train(&out, &["--overfit", "8", "--resume"]))
        .exits(2)
        .says(&["was started with `--overfit 16`", "hint: "]);

    let out = path("overfit-not");
    let more = ["--overfit", "16", "optim.lr=0"];
    let what = ["did not overfit 16 images", "after 300 steps", "hint: "];
    vitrum(&train(&out, &more)).exits(1).says(&what);
}

#[test]
fn a_dry_run_shows_the_recipe_and_writes_nothing() {
    let out = path("dry");
    let done = vitrum(&train(&out, &["--dry-run"])).ok();
    for text in ["width 24", "24 steps of 16", "memory ", "[model]", "checkpoint_every = 5"] {
        assert!(done.stdout.contains(text), "`{text}` is not in: {}", done.stdout);
    }
    assert!(!Path::new(&out).exists());
}

#[test]
fn a_run_allocates_what_the_plan_says() {
    let cases: [&[&str]; 6] = [
        &[],
        &["optim.ema=0", "train.micro_batch=0"],
        &["optim.name=sgd", "optim.moment=bf16"],
        &["optim.name=adafactor", "model.pool=map", "model.layer_scale=0.1"],
        &["optim.groups=[{pattern='.*qkv.*', frozen=true}]", "model.pool=token", "model.posemb=learned"],
        &[
            "optim.name=lion",
            "model.rep_size=20",
            "model.posemb=sincos2d",
            "model.pool=gap",
            "loss.kind=sigmoid",
            "loss.class_weights=[1,2,3]",
        ],
    ];
    for more in cases {
        let set: Vec<String> = settings().into_iter().chain(more.iter().map(|s| s.to_string())).collect();
        let mut args = vec!["plan".to_owned(), "demo".into(), "--json".into()];
        args.extend(set.iter().flat_map(|s| ["--set".to_owned(), s.clone()]));
        let plan = vitrum(&args).ok().json();

        let recipe = Recipe::read(Some("demo"), &set).unwrap().recipe.resolved(3, 96).unwrap();
        let backend = backend::select(Device::Cpu, &backend::DeviceOptions::threads(1)).unwrap();
        let setup = Setup::on(backend, &recipe, DataShape::labels(96)).unwrap();
        let trainer = Trainer::new(setup, Collective::ALONE, None).unwrap();
        let memory = &plan["memory"];
        assert_eq!(memory["total_bytes"], trainer.backend.allocated_bytes(), "{more:?}");
        let parts = ["params", "grads", "optimizer", "ema", "activations"];
        let sum: u64 = parts.iter().map(|part| memory[format!("{part}_bytes")].as_u64().unwrap()).sum();
        assert_eq!(memory["total_bytes"], sum, "{more:?}");
    }
}

#[test]
fn a_profile_counts_the_operations_that_the_plan_lists() {
    let recipe = path("of-a-profile.toml");
    let text = "[model]\nvariant = \"mu/16\"\nimage = 32\nclasses = 1000\n[train]\nbatch = 4\nsteps = 10\n";
    std::fs::write(&recipe, text).unwrap();
    let plan = vitrum(&["plan", &recipe, "--device", "cpu", "--json"]).ok().json();
    let what =
        ["bench", "--what", "train", "--model", "mu/16", "--batch", "4", "--device", "cpu", "--profile"];
    let how = ["--set", "model.image=32", "--rounds", "1", "--seconds", "0", "--json"];
    let profile = vitrum(&[&what[..], &how].concat()).ok().json();
    let operations = profile["profile"].as_array().unwrap();
    // Calls that are not operations have no cost.
    assert!(operations.iter().any(|o| o["operation"] == "begin_step" && o["bytes_per_step"].is_null()));
    let planned = plan["operations_of_a_step"].as_array().unwrap();
    assert_eq!(operations.iter().filter(|o| !o["bytes_per_step"].is_null()).count(), planned.len());
    for planned in planned {
        let timed = operations.iter().find(|o| o["operation"] == planned["operation"]).unwrap();
        let bytes = planned["read_bytes"].as_u64().unwrap() + planned["written_bytes"].as_u64().unwrap();
        assert_eq!(timed["flops_per_step"].as_f64(), planned["flops"].as_f64(), "{planned}");
        assert_eq!(timed["bytes_per_step"].as_f64().unwrap(), bytes as f64, "{planned}");
    }
}

#[test]
fn a_run_that_rounds_says_so_and_another_way_to_round_is_refused() {
    let run = |out: &str, rounds: &str, more: &[&str]| {
        let mut command = command(&train(&path(out), &[&["train.steps=2"][..], more].concat()));
        command.env("VITRUM_CPU_ROUNDS", rounds);
        finish(command)
    };
    let with = |rounds: &str| run(&format!("rounds-{rounds}"), rounds, &[]);
    with("bf16").ok().says(&["device   cpu", ", rounds to bf16 (VITRUM_CPU_ROUNDS)"]);
    let others = "results are no longer bit-identical to the original run: this is a run with";
    let resumed = |rounds: &str| run("rounds-bf16", rounds, &["--resume"]).ok();
    assert!(!resumed("bf16").stderr.contains(others));
    resumed("").says(&["original run: this is a run without VITRUM_CPU_ROUNDS=bf16"]);
    resumed("bf16-residual-f32").says(&[others, "=bf16-residual-f32, after one with VITRUM_CPU_ROUNDS=bf16"]);
    with("bf16-residual-f32").ok().says(&["all but the residual stream"]);
    with("f16").exits(2).says(&["`VITRUM_CPU_ROUNDS=f16`", "hint: use `bf16` or `bf16-residual-f32`"]);
}

#[test]
fn a_loss_that_is_not_finite_is_skipped_then_stops_the_run() {
    for (name, lr) in [("diverged", "1e30"), ("overflowed", "1e39")] {
        let out = path(name);
        let set = format!("optim.lr={lr}");
        let more =
            [&set, "optim.clip=0", "schedule.warmup=4", "train.log_every=1", "train.checkpoint_every=1"];
        let done = vitrum(&train(&out, &more)).exits(1);
        let metrics = metrics(&out);
        let last = metrics.iter().rfind(|line| line.get("lr").is_some()).unwrap();
        assert_eq!(last["skipped"], 3);
        let step = format!("step {}, learning rate {lr}", last["step"], lr = lr.replace("1e", "1.000e"));
        let done = done.says(&[&step, "not finite in 3 steps in a row", "hint: lower `optim.lr`"]);
        let good = done.stderr.split("last good checkpoint: ").nth(1).unwrap().lines().next().unwrap();

        let file = SafeTensors::open(&Path::new(good).join("model.safetensors")).unwrap();
        for tensor in file.names() {
            let finite = file.tensor(tensor).unwrap().values.iter().all(|x| x.is_finite());
            assert!(finite, "{good}: `{tensor}`");
        }
        let kept = good.rsplit('-').next().unwrap().parse::<u64>().unwrap();
        assert!(kept <= last["step"].as_u64().unwrap() - 3, "saved at step {kept}, among the skipped ones");
    }
}

#[test]
fn a_finished_run_stays_as_it_is_when_it_is_resumed() {
    for (name, more) in [
        ("finished", vec![]),
        (
            "stopped-early",
            vec!["train.patience=1", "train.min_delta=1", "train.eval_every=4", "train.steps=400"],
        ),
        ("learned", vec!["--overfit", "16"]),
    ] {
        let out = path(name);
        vitrum(&train(&out, &more)).ok();
        let want = outcome(&out);
        vitrum(&train(&out, &[&more[..], &["--resume"]].concat())).ok();
        assert_eq!(outcome(&out), want, "{name}");
    }
    assert_eq!(metrics(&path("stopped-early")).last().unwrap()["step"], 8);
    assert_eq!(
        names(Path::new(stripes()).join("train")),
        ["across", "checks", "down"],
        "the data is untouched"
    );
}

// ---- Resuming ----

/// A run of 8 steps whose last checkpoint is removed, so that it resumes from step 5.
fn at_step_5(name: &str, more: &[&str]) -> String {
    let out = path(name);
    vitrum(&train(&out, &[&["train.steps=8"], more].concat())).ok();
    let checkpoints = Path::new(&out).join("checkpoints");
    std::fs::remove_dir_all(checkpoints.join("step-8")).unwrap();
    let _ = std::fs::remove_file(checkpoints.join("best"));
    out
}

#[test]
fn a_directory_alone_says_how_its_run_goes_on() {
    let want = path("alone-unbroken");
    vitrum(&train(&want, &["train.steps=8"])).ok();
    let want = outcome(&want);
    let out = at_step_5("alone", &[]);
    vitrum(&["train", "--resume", &out]).ok().says(&["(demo)", "from checkpoints/step-5"]);
    assert_eq!(outcome(&out), want);
    // `inspect` shows everything that a checkpoint stores.
    let told = vitrum(&["inspect", &out]).ok().stdout;
    for line in [
        "provenance.recipe: demo",
        "provenance.step: 8",
        "provenance.top1: ",
        "provenance.made_by: vitrum ",
        "checkpoint.epoch: 1.333",
        "checkpoint.data: ",
        "checkpoint.command: ",
        "--resume ",
        "checkpoint.host: ",
    ] {
        assert!(told.contains(line), "`{line}` is not in: {told}");
    }
    let none = path("no-run");
    std::fs::create_dir_all(&none).unwrap();
    vitrum(&["train", "--resume", &none]).exits(1).says(&[&none, "no run to continue", "hint: "]);
    vitrum(&["train", "--resume"]).exits(2).says(&["`--resume` without a run", "hint: "]);
    vitrum(&["train", "--resume", &out, "--out", &none]).exits(2).says(&[
        "different directories",
        &out,
        &none,
    ]);
    vitrum(&["train", "--resume", &out, "--overfit", "4"])
        .exits(2)
        .says(&["was started without `--overfit`", "hint: "]);
}

#[test]
fn a_run_goes_on_with_other_settings_that_change_no_step() {
    let out = at_step_5("other-settings", &[]);
    let more = [
        "train.steps=12",
        "train.eval_every=3",
        "train.patience=9",
        "train.log_every=1",
        "train.checkpoint_every=4",
        "train.keep=1",
        "train.micro_batch=4",
        "eval.metric=loss",
        "--resume",
    ];
    vitrum(&train(&out, &more)).ok().says(&[
        "with train.steps: 8 -> 12: the cosine schedule now has that length",
        "with train.micro_batch: 8 -> 4: results are no longer bit-identical to the original run",
        "with eval.metric: \"top1\" -> \"loss\": the search for the best checkpoint starts again",
        "trained 12 steps",
    ]);
    // Resume again with the directory's current recipe.
    vitrum(&["train", "--resume", &out, "--set", "train.steps=13"]).ok().says(&["trained 13 steps"]);
    vitrum(&["train", "--resume", &out, "--set", "train.steps=9"])
        .exits(1)
        .says(&["has already done 13 steps, but `train.steps` is 9", "hint: "]);
    vitrum(&["train", "--resume", &out, "--set", "optim.lr=1", "--set", "model.dropout=0.3"])
        .exits(1)
        .says(&["another recipe: model.dropout: ", " -> 0.3", "optim.lr: 0.003 -> 1.0", "hint: "]);
}

/// [`stripes`] with eight of the 32 pictures of `down` to train on.
fn few_down() -> String {
    let data = path("few-down");
    let copied = std::process::Command::new("cp").args(["-a", stripes(), &data]).status().unwrap();
    assert!(copied.success());
    let down = Path::new(&data).join("train/down");
    names(&down).iter().skip(8).for_each(|name| std::fs::remove_file(down.join(name)).unwrap());
    format!("data.train={data}")
}

#[test]
fn rare_classes_weigh_more_and_the_run_is_resumed_to_the_bit() {
    let data = few_down();
    let balanced = [data.as_str(), "loss.class_weights=balanced"];
    let want = path("weighted-unbroken");
    // 72 / (3 · 32) and 72 / (3 · 8).
    vitrum(&train(&want, &[&balanced[..], &["train.steps=8"]].concat()))
        .ok()
        .says(&["loss     class weights from 0.75 (`across`) to 3 (`down`)"]);
    let out = at_step_5("weighted", &balanced);
    for other in ["loss.class_weights=none", "loss.class_weights=[0.75,0.75,3]"] {
        vitrum(&["train", "--resume", &out, "--set", other])
            .exits(1)
            .says(&["another recipe: loss.class_weights: \"balanced\" -> ", "hint: "]);
    }
    vitrum(&["train", "--resume", &out]).ok().says(&["from checkpoints/step-5", "to 3 (`down`)"]);
    let want = outcome(&want);
    assert_eq!(outcome(&out), want);

    let of = |name: &str, weights: &str| {
        let out = path(name);
        vitrum(&train(&out, &[&data, "train.steps=8", weights])).ok();
        outcome(&out)
    };
    // Its state contains another recipe.
    let by_hand = of("weighted-by-hand", "loss.class_weights=[0.75,0.75,3]");
    assert_eq!((&by_hand.metrics, &by_hand.files[..2]), (&want.metrics, &want.files[..2]));
    let plain = of("weighted-not", "loss.class_weights=none");
    assert_eq!(of("weighted-the-same", "loss.class_weights=[1,1,1]").files[0], plain.files[0]);
    assert_ne!(want.files[0], plain.files[0]);

    // The head starts at zero: each of three classes has probability 1/3, so the loss is ln 3.
    let first = path("weighted-first");
    let pace = ["train.steps=1", "train.log_every=1", "optim.lr=0", "loss.class_weights=[100,100,100]"];
    vitrum(&train(&first, &[&[data.as_str()], &pace[..]].concat())).ok();
    let losses: Vec<f64> = metrics(&first)
        .iter()
        .filter_map(|line| line["loss"].as_f64().or(line["eval"]["loss"].as_f64()))
        .collect();
    let near = |loss: f64, expected: f64| (loss / expected - 1.0).abs() < 1e-5;
    let ln3 = 3f64.ln();
    assert!(near(losses[0], 100.0 * ln3), "training: {losses:?}");
    assert!(losses.len() == 2 && near(losses[1], ln3), "evaluations are not weighted: {losses:?}");

    let none = path("weighted-wrong");
    vitrum(&train(&none, &[&data, "loss.class_weights=[1,2]"])).exits(2).says(&[
        "`loss.class_weights` has 2 numbers, and there are 3 classes",
        "hint: their order is across, checks, down",
    ]);
    assert!(!Path::new(&none).exists());
}

#[test]
fn a_run_goes_on_with_its_own_data_alone() {
    let data = path("resumed-data");
    let copied = std::process::Command::new("cp").args(["-a", stripes(), &data]).status().unwrap();
    assert!(copied.success());
    let of = |name: &str| Path::new(&data).join("train").join(name);
    let set = format!("data.train={data}");
    let out = at_step_5("its-own-data", &[&set]);
    let (run, saved) = (Path::new(&out), path("its-own-data-saved"));
    assert!(std::process::Command::new("cp").args(["-a", &out, &saved]).status().unwrap().success());
    let again = || {
        std::fs::remove_dir_all(run).unwrap();
        assert!(std::process::Command::new("cp").args(["-a", &saved, &out]).status().unwrap().success());
    };
    let resume = |more: &[&str]| vitrum(&[&["train", "--resume", &out][..], more].concat());
    let accept = ["--set", "data.accept_changes=true"];
    let refused = |says: &[&str]| {
        resume(&[]).exits(1).says(says).says(&["hint: "]);
        again();
    };

    let (first, second) = (of("across/000.png"), of("across/003.png"));
    std::fs::rename(&first, of("across/new.png")).unwrap();
    refused(&["other training data", "some with other names, labels or sizes", "data.accept_changes=true"]);
    resume(&accept).ok().says(&["resume   on other data: ", "trained 8 steps"]);
    let kept = std::fs::read_to_string(run.join("recipe.toml")).unwrap();
    assert!(!kept.contains("accept_changes"), "{kept}");
    again();
    std::fs::rename(of("across/new.png"), &first).unwrap();

    // Another picture under the same name.
    let mine = std::fs::read(&first).unwrap();
    std::fs::write(&first, [std::fs::read(&second).unwrap(), vec![0]].concat()).unwrap();
    refused(&["other training data", "across/000.png"]);
    std::fs::remove_file(&first).unwrap();
    refused(&["96 records then, 95 now"]);
    std::fs::write(&first, mine).unwrap();
    std::fs::rename(of("across/000.png"), of("down/000.png")).unwrap();
    refused(&["other training data"]);
    std::fs::rename(of("down/000.png"), &first).unwrap();

    for part in ["train", "val"] {
        let at = |name: &str| Path::new(&data).join(part).join(name);
        std::fs::rename(at("across"), at("x")).unwrap();
        std::fs::rename(at("down"), at("across")).unwrap();
        std::fs::rename(at("x"), at("down")).unwrap();
    }
    refused(&["other training data"]);
    for part in ["train", "val"] {
        std::fs::rename(Path::new(&data).join(part).join("down"), Path::new(&data).join(part).join("up"))
            .unwrap();
    }
    refused(&["other classes: class 2 was `down` and is now `up`", "data.accept_changes=true"]);
    std::fs::create_dir(of("zebra")).unwrap();
    std::fs::create_dir(Path::new(&data).join("val/zebra")).unwrap();
    refused(&["other classes: class 2 was `down` and is now `up` (3 classes then, 4 now)"]);

    // The same data in another place.
    let moved = format!("data.train={}", stripes());
    resume(&["--set", &moved]).ok().says(&["trained 8 steps"]);
}

#[test]
fn one_run_has_a_directory_at_a_time() {
    let out = path("busy");
    let mut child = start(&train(&out, &["train.steps=100000", "train.eval_every=100000"]));
    watch(&mut child, || Path::new(&out).join("checkpoints/last").exists());
    let holder = format!("a run is already working there (process {} on ", child.id());
    for more in [&["--resume"][..], &[]] {
        vitrum(&train(&out, &[&["train.steps=100000"], more].concat())).exits(1).says(&[&holder, "hint: "]);
    }
    child.kill().unwrap();
    wait(child);
    // The lock ended with the process.
    let mut child = start(&train(&out, &["train.steps=100000", "train.eval_every=100000", "--resume"]));
    let before = lines(&out);
    watch(&mut child, || lines(&out) > before + 1);
    child.kill().unwrap();
    wait(child).exits(128 + 9).says(&["resume   from checkpoints/step-"]);
}

#[test]
fn runs_that_start_in_one_second_have_directories_of_their_own() {
    let folder = path("crowd");
    std::fs::create_dir_all(&folder).unwrap();
    let args: Vec<String> = train("OUT", &["train.steps=1"]);
    let unnamed: Vec<&String> = args.iter().filter(|a| *a != "--out" && *a != "OUT").collect();
    let children: Vec<Child> = (0..3)
        .map(|_| {
            command(&unnamed)
                .current_dir(&folder)
                .stderr(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    children.into_iter().for_each(|child| drop(wait(child).ok()));
    let runs = names(Path::new(&folder).join("runs"));
    assert_eq!(runs.len(), 3, "{runs:?}");
}

#[test]
fn as_many_checkpoints_are_kept_as_asked_for() {
    let steps = |name: &str, more: &[&str]| {
        let out = path(name);
        vitrum(&train(&out, &[&["train.checkpoint_every=2", "train.eval_every=24"], more].concat())).ok();
        names(Path::new(&out).join("checkpoints"))
            .into_iter()
            .filter(|n| n.starts_with("step"))
            .collect::<Vec<_>>()
    };
    assert_eq!(steps("keep-3", &[]), ["step-20", "step-22", "step-24"]);
    assert_eq!(steps("keep-1", &["train.keep=1"]), ["step-24"]);
    vitrum(&train(&path("keep-0"), &["train.keep=0"])).exits(2).says(&["`train.keep` is 0"]);
}

#[test]
fn a_resume_names_the_change_that_was_made_and_its_hint_works() {
    // A list of pictures without parts, outside the folder of the test's own.
    let list = |name: &str, rows: &[String]| {
        let path = path(name);
        std::fs::write(&path, format!("path,label\n{}", rows.concat())).unwrap();
        path
    };
    let train_part = Path::new(stripes()).join("train");
    let rows: Vec<String> = names(&train_part)
        .iter()
        .flat_map(|class| names(train_part.join(class)).into_iter().map(move |file| (class.clone(), file)))
        .map(|(class, file)| format!("stripes/train/{class}/{file},{class}\n"))
        .collect();
    let data = list("rows.csv", &rows);
    let out = at_step_5("named-change", &[&format!("data.train={data}"), "data.holdout=0.2"]);
    let (run, saved) = (Path::new(&out), path("named-change-saved"));
    let copy =
        |from: &str, to: &str| std::process::Command::new("cp").args(["-a", from, to]).status().unwrap();
    assert!(copy(&out, &saved).success());
    let resume = |more: &[&str]| vitrum(&[&["train", "--resume", &out][..], more].concat());
    let accept = ["--set", "data.accept_changes=true"];
    for (set, says) in [
        ("data.holdout=0.3", "another recipe: data.holdout: 0.2 -> 0.3"),
        ("data.holdout=0", "another recipe: data.holdout: 0.2 -> 0"),
        ("data.balance=true", "another recipe: data.balance: false -> true"),
    ] {
        let set = ["--set", set];
        resume(&set).exits(1).says(&[says, "hint: remove these changes"]);
        resume(&[set, accept].concat()).exits(1).says(&[says]);
    }
    let mut shuffled = rows.clone();
    shuffled.rotate_left(40);
    list("rows.csv", &shuffled);
    let done =
        resume(&[]).exits(1).says(&[&data, "training data in another order: the same ", "accept_changes"]);
    assert!(!done.stderr.contains("names, labels or sizes"), "{}", done.stderr);
    // Two changes: accepting one of them does not help.
    let both = ["--set", "optim.lr=1"];
    resume(&both).exits(1).says(&["in another order", "hint: restore the data", "optim.lr: 0.003 -> 1.0"]);
    resume(&[both, accept].concat()).exits(1).says(&["another recipe: optim.lr"]);
    resume(&accept).ok().says(&["resume   on other data: ", "trained 8 steps"]);
    std::fs::remove_dir_all(run).unwrap();
    assert!(copy(&saved, &out).success());
    list("rows.csv", &rows);
    resume(&[]).ok().says(&["trained 8 steps"]);
}
