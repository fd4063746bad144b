//! The CUDA backend without a GPU: the program itself, on the stand-in of `standin/`.
//!
//! `cargo build -p vitrum-standin` (or `cargo test --workspace`) puts the libraries next to the program.
//! Without them, each test prints a line and passes.

use crate::support;

use std::path::Path;

use serde_json::Value;
use support::{
    Outcome, command, finish, metrics, names, on_gpu, outcome, path, run_on_gpu as run, stand_in, stripes,
    train,
};
use vitrum::backend::cuda::images::KERNELS;
use vitrum::rng::{Domain, Stream};
use vitrum::weights::safetensors::{Dtype, SafeTensors, View, write};

/// A short training run on the GPU: 16 tokens, width 64, depth 2, batch 4, with dropout and drop-path.
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
    // The options of the stand-in; then the precision and the filter of each run: f32 and bf16 for the first
    // GPU, bf16 for the others. The second GPU has the least shared memory, the third has a single
    // multiprocessor, so that each block gets several pieces of divided work; the kernels that do this in f32
    // run in f32 too. Nothing is timed: that takes many launches, and tests/card.rs tests the choices.
    let schedules: [(&str, &[&[&str]]); 3] = [
        ("seed=0,defer=1", &[&["auto"]]),
        ("seed=1,defer=2,sm=86", &[&["bf16"]]),
        (
            "seed=2,defer=3,multiprocessors=1",
            &[
                &["bf16"],
                &["f32", "--filter", "layernorm"],
                &["f32", "--filter", "residual_backward"],
                &["f32", "--filter", "embed_backward"],
                &["f32", "--filter", "query_attention_backward"],
            ],
        ),
    ];
    std::thread::scope(|scope| {
        for (card, runs) in schedules {
            let folder = &folder;
            scope.spawn(move || {
                for which in runs {
                    let args = [&["selftest", "--device", "cuda", "--deterministic", "--precision"], *which]
                        .concat();
                    let done = run(folder, &format!("checks=on,threads=1,{card}"), &args).ok();
                    assert!(!done.stderr.contains("stand-in GPU:"), "{card}: {}", done.stderr);
                }
            });
        }
    });
}

#[test]
fn both_engines_of_the_stand_in_give_equal_verdicts() {
    let Some(folder) = stand_in() else { return };
    if KERNELS.is_empty() {
        return println!("skipped: built without nvcc; `scripts/install-nvcc` fetches it");
    }
    // `.ci/run ptx` runs all cases on the second engine.
    for (precision, filter) in [
        ("f32", "layernorm"),
        ("f32", "patchify"),
        ("bf16", "adafactor"),
        ("bf16", "attention: B"),
        ("bf16", "attention_backward: B 5"),
        ("bf16", "loss"),
    ] {
        let args = ["selftest", "--device", "cuda", "--precision", precision, "--filter", filter];
        let [host, ptx] = ["host", "ptx"].map(|engine| {
            let done = run(&folder, &format!("engine={engine}"), &args).ok();
            assert!(!done.stderr.contains("stand-in GPU:"), "{engine}: {}", done.stderr);
            // An operation, its number of cases, its worst error, its tolerance, the verdict.
            let rows = done.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            let table = rows.filter(|row| row.len() > 4 && ["ok", "FAILED"].contains(row.last().unwrap()));
            let verdicts = table.map(|row| [&row[..row.len() - 3], &row[row.len() - 1..]].concat().join(" "));
            verdicts.collect::<Vec<String>>()
        });
        assert!(!host.is_empty(), "{filter}");
        assert_eq!(host, ptx, "{precision}, {filter}");
    }
}

#[test]
fn attention_fits_the_shared_memory_of_every_card() {
    let Some(folder) = stand_in() else { return };
    // sm_86 is one of the schedules above, sm_90 the others. Only addresses are checked: GPUs differ in which
    // kernels run.
    for sm in [80, 89, 100, 120] {
        for filter in ["attention: B 1 T", "attention_backward: B 1 T"] {
            let which = ["--deterministic", "--precision", "bf16", "--filter", filter];
            let args = [&["selftest", "--device", "cuda"], &which[..]].concat();
            let done = run(&folder, &format!("checks=bounds,sm={sm},driver=13030"), &args).ok();
            assert!(done.stdout.contains(&format!("(sm_{sm})")), "{}", done.stdout);
        }
    }
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

#[test]
fn training_without_branches_follows_the_cpu_whatever_the_stream_is_stored_in() {
    follows_the_cpu("plain", &["model.dropout=0", "model.drop_path=0", "train.micro_batch=2"]);
}

#[test]
fn training_with_a_map_head_and_layer_scale_follows_the_cpu() {
    follows_the_cpu("map", &["model.pool=map", "model.layer_scale=0.1", "train.recompute=ln+gelu"]);
}

#[test]
fn training_with_class_weights_follows_the_cpu() {
    let weights = ["loss.class_weights=[0.25,3,1.5]", "loss.label_smoothing=0.1"];
    follows_the_cpu("weighted", &weights);
    follows_the_cpu("weighted-sigmoid", &[&weights[..], &["loss.kind=sigmoid"]].concat());
}

fn follows_the_cpu(name: &str, more: &[&str]) {
    let Some(folder) = stand_in() else { return };
    let on_cpu = path(&format!("cpu-{name}"));
    finish(command(&small(&on_cpu, &[&["--device", "cpu"][..], more].concat()))).ok();
    let cpu = (series(&on_cpu, "loss"), series(&on_cpu, "grad_norm"));
    assert_eq!(cpu.0.len(), 12);
    for (precision, residual, tolerance) in
        [("f32", "auto", 1e-4), ("bf16", "bf16", 0.05), ("bf16", "f32", 0.05)]
    {
        let out = path(&format!("cuda-{name}-{precision}-{residual}"));
        let settings = [format!("train.precision={precision}"), format!("train.residual={residual}")];
        let args = small(&out, &[&["--device", "cuda", &settings[0], &settings[1]][..], more].concat());
        let done = run(&folder, "checks=on", &args).ok();
        assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);
        for (name, ours, theirs) in
            [("loss", series(&out, "loss"), &cpu.0), ("grad_norm", series(&out, "grad_norm"), &cpu.1)]
        {
            assert_eq!(ours.len(), theirs.len());
            for (step, (a, b)) in ours.iter().zip(theirs).enumerate() {
                assert!(
                    (a - b).abs() <= tolerance * b.abs(),
                    "{precision}, stream {residual}, {name} of step {}: {a}, not {b}",
                    step + 1
                );
            }
        }
    }
}

/// `VITRUM_CPU_ROUNDS=bf16` emulates a GPU in experiments, so its gradients must be those of a GPU. The model
/// has a single token, because the GPU also rounds probabilities inside attention, and those of one token are
/// 1.
#[test]
fn a_cpu_that_rounds_has_the_gradients_of_bf16() {
    let Some(folder) = stand_in() else { return };
    let batch = batch_of_noise();
    for pool in ["gap", "map"] {
        let weights = path(&format!("rounds-{pool}"));
        let one_token = ["--device", "cpu", "model.patch=16", &format!("model.pool={pool}")];
        finish(command(&small(&weights, &one_token))).ok();
        let gradients = |device: &str, rounds: &str, residual: &str| -> Vec<f32> {
            gradients(&folder, [&weights, &batch], device, rounds, residual)
        };
        let unrounded = gradients("cpu", "", "auto");
        for (residual, rounds) in [("bf16", "bf16"), ("f32", "bf16-residual-f32")] {
            let gpu = gradients("cuda", "", residual);
            let (f32, rounded) = (apart(&unrounded, &gpu), apart(&gradients("cpu", rounds, "auto"), &gpu));
            assert!(rounded < 0.01 * f32, "{pool}, {rounds}: {rounded:e} from the GPU's, f32 {f32:e}");
        }
    }
}

/// All gradients of a batch, in the order of their names.
fn gradients(
    folder: &Path,
    [weights, batch]: [&str; 2],
    device: &str,
    rounds: &str,
    residual: &str,
) -> Vec<f32> {
    let out = format!("{weights}-{device}-{rounds}-{residual}.safetensors");
    let files = ["grad", "--weights", weights, "--batch", batch, "--out", &out];
    let mut command =
        // Unfused results are rounded once more: here everything is fused, whatever the timing says.
        on_gpu(folder, "checks=off,slow_kernels=500", &[&files[..], &["--device", device, "--residual", residual]].concat());
    command.env("VITRUM_CPU_ROUNDS", rounds);
    finish(command).ok();
    let file = SafeTensors::open(Path::new(&out)).unwrap();
    let mut names: Vec<&str> = file.names().filter(|name| name.starts_with("grad/")).collect();
    names.sort_unstable();
    names.iter().flat_map(|name| file.values(name).unwrap().into_owned()).collect()
}

fn apart(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn a_residual_stream_in_f32_brings_gradients_nearer_to_those_of_f32() {
    let Some(folder) = stand_in() else { return };
    let run = path("deep");
    let deep = ["--device", "cpu", "model.depth=16", "model.pool=gap", "model.posemb=learned"];
    finish(command(&small(&run, &deep))).ok();
    let weights = shaken(&run);
    let batch = batch_of_noise();
    let gradients =
        |device: &str, residual: &str| gradients(&folder, [&weights, &batch], device, "", residual);
    let exact = gradients("cpu", "auto");
    let [bf16, f32] = ["bf16", "f32"].map(|residual| apart(&exact, &gradients("cuda", residual)));
    println!("of {:e}: bf16 {bf16:e}, f32 {f32:e}", apart(&exact, &vec![0.0; exact.len()]));
    assert!(f32 < 0.5 * bf16, "{f32:e} with the stream in f32, {bf16:e} in bf16");
}

/// The last weights of a run with noise added, like those of a long training: after twelve steps most
/// branches are still too weak to change the stream.
fn shaken(run: &str) -> String {
    let at = Path::new(run).join("checkpoints/last/model.safetensors");
    let file = SafeTensors::open(&at).unwrap();
    let mut noise = Stream::new(5, Domain::Init, 0, 0);
    let tensors: Vec<(&str, Vec<f32>)> = file
        .names()
        .map(|name| {
            let values = file.values(name).unwrap();
            (name, values.iter().map(|v| v + 0.05 * noise.normal() as f32).collect())
        })
        .collect();
    let views = tensors.iter().map(|(name, v)| View::f32(*name, file.shape(name).unwrap(), v)).collect();
    let shaken = format!("{run}-shaken.safetensors");
    write(Path::new(&shaken), file.metadata(), views).unwrap();
    shaken
}

/// Four images of 16 by 16 pixels.
fn batch_of_noise() -> String {
    let batch = path("batch.safetensors");
    let mut noise = Stream::new(6, Domain::Init, 0, 0);
    let pixels: Vec<u8> = (0..4 * 16 * 16 * 3).map(|_| (noise.next_u32() >> 24) as u8).collect();
    let labels: Vec<u8> = [0i32, 1, 2, 1].iter().flat_map(|l| l.to_le_bytes()).collect();
    let views = vec![
        View::new("images_u8", Dtype::U8, &[4, 16, 16, 3], pixels),
        View::new("labels", Dtype::I32, &[4], labels),
    ];
    write(Path::new(&batch), &Default::default(), views).unwrap();
    batch
}

/// A run on the GPU without failures.
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
    // Somewhere after the first checkpoint: find the launch by trying later and later ones.
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

#[test]
fn the_self_test_ends_with_whole_steps() {
    let Some(folder) = stand_in() else { return };
    let args = ["selftest", "--device", "cuda", "--filter", "training", "--json"];
    let done = run(&folder, "checks=on", &args).ok();
    assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);
    let proofs = done.json()["training"].as_array().unwrap().clone();
    let devices: Vec<&str> = proofs.iter().map(|proof| proof["device"].as_str().unwrap()).collect();
    assert!(devices[0].ends_with(", f32") && devices[1].ends_with(", bf16"), "{devices:?}");
    assert!(devices[2].ends_with(", bf16, residual stream in f32"), "{devices:?}");
    assert!(proofs.iter().all(|proof| proof["repeats"] == true), "{proofs:?}");
}

#[test]
fn a_stream_in_f32_is_resumed_to_the_bit_and_changed_only_in_words() {
    let Some(folder) = stand_in() else { return };
    let (unbroken, out) = (path("stream"), path("stream-resumed"));
    let args = |out: &str, more: &[&str]| {
        small(out, &[&["--device", "cuda", "train.residual=f32"][..], more].concat())
    };
    run(&folder, "checks=off", &args(&unbroken, &[])).ok();
    // It breaks after a checkpoint.
    let broken = [400, 900, 1400].map(|launch| {
        run(&folder, &format!("checks=off,fail_launch={launch}"), &resumed(&args(&out, &[]))).code
    });
    assert_eq!(broken[0], 1, "no launch failed");
    // `auto` resolves to the run's own setting.
    let auto = small(&out, &["--device", "cuda", "--resume"]);
    let done = run(&folder, "checks=off", &auto).ok();
    assert!(!done.stderr.contains("no longer bit-identical"), "{}", done.stderr);
    assert_eq!(outcome(&out), outcome(&unbroken));
    let recipe = std::fs::read_to_string(Path::new(&out).join("recipe.toml")).unwrap();
    assert!(recipe.contains("residual = \"f32\""), "{recipe}");

    let on = small(&out, &["--device", "cuda", "--resume", "train.residual=bf16"]);
    run(&folder, "checks=off", &on).ok().says(&["in bf16, after bf16 with the residual stream in f32"]);

    // In f32 the key has no effect, and does no harm.
    let f32 = path("stream-of-f32");
    let resume = |more: &[&str]| {
        run(&folder, "checks=off", &small(&f32, &[&["--device", "cuda"], more].concat())).ok()
    };
    resume(&["train.precision=f32"]);
    for more in [&["--resume", "train.residual=bf16"][..], &["--resume"]] {
        let done = resume(more);
        assert!(
            done.stderr.contains(", f32\n") && !done.stderr.contains("no longer bit-identical"),
            "{}",
            done.stderr
        );
    }
}

/// One operation of the GPU, as written to the stand-in's `order` file.
struct Operation {
    what: String,
    bytes: u64,
    stream: u64,
    after: Value,
}

impl Operation {
    /// How many operations of a stream this one must follow; for its own stream, this includes itself.
    fn after(&self, stream: u64) -> u64 {
        self.after.get(stream.to_string()).and_then(Value::as_u64).unwrap_or(0)
    }
}

fn operations(file: &str) -> Vec<Operation> {
    let operation = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let number = |key: &str| line[key].as_u64().unwrap();
        Operation {
            what: line["what"].as_str().unwrap().to_owned(),
            bytes: number("bytes"),
            stream: number("stream"),
            after: line["after"].clone(),
        }
    };
    std::fs::read_to_string(file).unwrap().lines().map(operation).collect()
}

#[test]
fn a_batch_is_copied_beside_the_step_before_it() {
    let Some(folder) = stand_in() else { return };
    let steps = 12;
    for graph in ["train.graph=true", "train.graph=false"] {
        let (out, order) = (path(&format!("beside-{graph}")), path(&format!("order-{graph}")));
        let args = small(&out, &["--device", "cuda", "train.checkpoint_every=12", graph]);
        let done = run(&folder, &format!("checks=on,order={order}"), &args).ok();
        assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);

        let (mut uploads, mut reports, mut begins) = (0, 0, Vec::new());
        let all = operations(&order);
        let compute = all.iter().find(|o| o.what == "report_begin").unwrap().stream;
        for operation in &all {
            if operation.what == "report_begin" {
                begins.push(operation.after(compute));
            }
            if begins.len() == steps {
                break; // the last step is waited for, and evaluated
            }
            reports += u32::from(operation.what == "a copy from the card" && !begins.is_empty());
            if operation.what != "a copy to the card" || operation.stream == compute {
                continue;
            }
            // Batch n + 1, after step n was submitted.
            uploads += 1;
            assert!(operation.bytes > 4 * 16 * 16 * 3, "a batch has four pictures and more");
            let n = begins.len();
            // The first step loads kernels and makes tables, and the host waits for that.
            if n >= 2 {
                assert!(operation.after(compute) < begins[n - 1], "batch {} waits for step {n}", n + 1);
                assert!(operation.after(compute) >= begins[n - 2], "its place is read by step {}", n - 1);
            }
        }
        // Exactly one report per step except the last is copied to the host.
        assert_eq!((uploads, begins.len(), reports), (steps, steps, steps as u32 - 1), "{graph}");
        // Patches are made from batches that have arrived.
        let copies = all.iter().map(|o| o.stream).find(|s| *s != compute).unwrap();
        let patchify = all.iter().filter(|o| o.what.starts_with("patchify"));
        for (n, patchify) in patchify.take(steps).enumerate() {
            assert!(patchify.after(copies) > n as u64, "step {} reads its own batch", n + 1);
        }
    }
}

#[test]
fn an_evaluation_copies_the_next_batch_beside_its_pass() {
    let Some(folder) = stand_in() else { return };
    let weights = path("evaluated");
    finish(command(&small(&weights, &["--device", "cpu"]))).ok();
    let (batch, batches) = (12, 4); // of 40 pictures
    let eval = |device| {
        let files = ["eval", "--weights", &weights, "--data", stripes()];
        [&files[..], &["--batch", "12", "--json", "--device", device]].concat()
    };
    // A first run chooses the algorithms, because that makes more copies.
    run(&folder, "checks=off", &eval("cuda")).ok();
    let order = path("order-eval");
    let on_gpu = run(&folder, &format!("checks=on,order={order}"), &eval("cuda")).ok();
    assert!(!on_gpu.stderr.contains("stand-in GPU:"), "{}", on_gpu.stderr);
    let (on_gpu, on_cpu) = (on_gpu.json(), finish(command(&eval("cpu"))).ok().json());
    assert_eq!(on_gpu["images"], on_cpu["images"]);
    let loss = |report: &Value| report["loss"].as_f64().unwrap();
    assert!((loss(&on_gpu) - loss(&on_cpu)).abs() < 0.01, "{on_gpu} {on_cpu}");

    let all = operations(&order);
    let compute = all.iter().find(|o| o.what.starts_with("patchify")).unwrap().stream;
    let (mut uploads, mut passes, mut read) = (0, 0, 0);
    for operation in &all {
        match operation.what.as_str() {
            "a copy to the card" if operation.stream != compute => {
                assert!(operation.bytes >= batch * 16 * 16 * 3);
                uploads += 1;
            }
            "a copy from the card" => {
                read += 1;
                assert_eq!((uploads, passes), (batches.min(read + 1), read), "when batch {read} is read");
            }
            what => passes += u64::from(what.starts_with("patchify")),
        }
    }
    assert_eq!((uploads, passes, read), (batches, batches, batches));
}

#[test]
fn a_card_holds_exactly_what_the_plan_says() {
    let Some(folder) = stand_in() else { return };
    let cases: [&[&str]; 4] = [
        &["train.precision=f32", "loss.class_weights=balanced"],
        &["train.residual=f32", "model.pool=token", "model.posemb_join=before"],
        &["optim.name=adafactor", "train.micro_batch=2"],
        &[
            "optim.name=sgd",
            "optim.moment=bf16",
            "optim.ema=0",
            "data.pixels=f32",
            "train.deterministic=false",
        ],
    ];
    for (case, more) in cases.iter().enumerate() {
        let out = path(&format!("exact-{case}"));
        let more: Vec<&str> = ["--device", "cuda", "train.steps=3"].iter().chain(*more).copied().collect();
        let args = small(&out, &more);
        let plan = ["plan", "demo", "--json"].map(str::to_owned).into_iter().chain(args[4..].iter().cloned());
        let plan = run(&folder, "checks=off", &plan.collect::<Vec<_>>()).ok().json();
        let total = plan["memory"]["total_bytes"].as_u64().unwrap();

        // A GPU with one byte less refuses the run before it allocates anything; one of exactly this size is
        // enough to the end.
        let less = run(&folder, &format!("checks=off,memory={}", total - 1), &args).exits(1);
        let less = less.says(&["error: the run needs", "hint: "]);
        assert!(!less.stderr.contains("no memory left"), "{}", less.stderr);
        std::fs::remove_dir_all(&out).ok();
        run(&folder, &format!("checks=off,memory={total}"), &args).ok();
    }
}

#[test]
fn a_resumed_run_takes_the_algorithms_of_its_checkpoint() {
    let Some(folder) = stand_in() else { return };
    // The evaluation before the failure multiplies matrices of shapes that training does not use.
    let more = ["--device", "cuda", "train.deterministic=false", "train.eval_every=4"];
    let args = |name: &str| small(&path(name), &more);
    let go = |args: &[String], cache: &str, options: &str| {
        let mut command = on_gpu(&folder, &format!("checks=off,{options}"), args);
        command.env("VITRUM_CACHE", path(cache));
        finish(command)
    };
    go(&args("timed"), "timed-cache", "seed=0").ok();
    let want = outcome(&path("timed"));

    // The same choices until a failure after the first checkpoint; then resume without the file.
    let broken = args("timed-broken");
    go(&broken, "timed-cache", "fail_launch=1400").exits(1);
    assert!(!names(Path::new(&path("timed-broken")).join("checkpoints")).is_empty());
    go(&resumed(&broken), "empty-cache", "seed=0").ok();
    assert_eq!(outcome(&path("timed-broken")), want);
    assert!(names(Path::new(&path("empty-cache")).join("matmul")).is_empty(), "nothing was timed");

    // Another library: the run says so in one line, and times again.
    let other = go(&resumed(&broken), "empty-cache", "blaslt=130100").ok();
    other.says(&["matrix products are timed again", "cuBLASLt 130000", "cuBLASLt 130100"]);
    let same = go(&resumed(&broken), "empty-cache", "seed=0").ok();
    assert!(!same.stderr.contains("timed again"), "{}", same.stderr);
}

#[test]
fn a_micro_batch_that_fits_is_found_and_kept() {
    let Some(folder) = stand_in() else { return };
    let auto = |out: &str, more: &[&str]| {
        let auto = ["--device", "cuda", "train.batch=16", "train.micro_batch=auto", "train.steps=2"];
        small(out, &auto.iter().chain(more).copied().collect::<Vec<_>>())
    };
    let recipe = |out: &str| std::fs::read_to_string(Path::new(out).join("recipe.toml")).unwrap();
    let total = |micro_batch: &str| {
        let args = auto("unused", &[&format!("train.micro_batch={micro_batch}")]);
        let plan = ["plan", "demo", "--json"].map(str::to_owned).into_iter().chain(args[4..].iter().cloned());
        let plan = run(&folder, "checks=off", &plan.collect::<Vec<_>>()).ok().json();
        plan["memory"]["total_bytes"].as_u64().unwrap()
    };

    // The whole batch if it fits; otherwise the largest part that fits, with a tenth to spare.
    let (all, part) = (path("auto-all"), path("auto-part"));
    run(&folder, "checks=off", &auto(&all, &[])).ok().says(&["micro-batches of 16"]);
    assert!(recipe(&all).contains("micro_batch = 16"), "{}", recipe(&all));
    let small_card = format!("checks=off,memory={}", total("4") * 10 / 9 + 100);
    let done = run(&folder, &small_card, &auto(&part, &[])).ok();
    done.says(&["micro-batches of 4"]);
    assert!(recipe(&part).contains("micro_batch = 4\n"), "{}", recipe(&part));
    // A resumed run keeps its setting, even on a GPU with more memory.
    run(&folder, "checks=off", &resumed(&auto(&part, &[]))).ok().says(&["micro-batches of 4"]);

    // The message for a number that does not fit names one that does. The plan shows what `auto` resolves to.
    let small_card = format!("checks=off,memory={}", total("4"));
    let done = run(&folder, &small_card, &auto(&path("refused-16"), &["train.micro_batch=16"])).exits(1);
    done.says(&["error: the run needs", "`--set train.micro_batch=4` is the largest that fits"]);
    let args = auto("unused", &[]);
    let plan = ["plan", "demo"].map(str::to_owned).into_iter().chain(args[4..].iter().cloned());
    let done = run(&folder, "checks=off", &plan.collect::<Vec<_>>()).ok();
    assert!(done.stdout.contains("micro_batch = 16"), "{}", done.stdout);
}

#[test]
fn a_run_keeps_its_precision_until_it_is_told_otherwise() {
    let Some(folder) = stand_in() else { return };
    let out = path("moves");
    let short = |more: &[&str]| small(&out, &[&["train.steps=4", "train.checkpoint_every=2"], more].concat());
    let recipe = || std::fs::read_to_string(Path::new(&out).join("recipe.toml")).unwrap();
    run(&folder, "checks=off", &short(&["--device", "cuda"])).ok();
    assert!(recipe().contains("precision = \"bf16\""), "{}", recipe());

    // The CPU cannot do it, and says how to continue.
    let on_cpu = short(&["--device", "cpu", "--resume"]);
    let done = finish(command(&on_cpu)).exits(2);
    done.says(&["computes in bf16", "the CPU computes in f32", "--set train.precision=f32"]);
    let on_cpu = short(&["--device", "cpu", "--resume", "train.precision=f32"]);
    finish(command(&on_cpu)).ok().says(&["in f32, after bf16"]);
    assert!(recipe().contains("precision = \"f32\""), "{}", recipe());
    // Back again: `auto` keeps f32; bf16 must be requested.
    let done = run(&folder, "checks=off", &short(&["--device", "cuda", "--resume"])).ok();
    assert!(!done.stderr.contains("after"), "{}", done.stderr);
    let back = short(&["--device", "cuda", "--resume", "train.precision=bf16"]);
    run(&folder, "checks=off", &back).ok().says(&["in bf16, after f32"]);
}

#[test]
fn a_run_that_diverges_ends_with_the_step_that_tells() {
    let Some(folder) = stand_in() else { return };
    for most in [1, 2, 3] {
        let out = path(&format!("diverged-{most}"));
        let most = format!("train.max_skipped={most}");
        let more = ["--device", "cuda", "optim.lr=1e30", "optim.clip=0", "schedule.warmup=0", &most];
        let said = format!("not finite in {} steps in a row", &most[18..]);
        let done = run(&folder, "checks=off", &small(&out, &more)).exits(1).says(&[&said]);
        let lines = metrics(&out);
        let skipped: Vec<u64> = lines.iter().filter_map(|line| line["skipped"].as_u64()).collect();
        assert_eq!(skipped.last().unwrap().to_string(), most[18..], "{skipped:?}");
        let last = lines.iter().rfind(|line| line.get("lr").is_some()).unwrap();
        done.says(&[&format!("step {}, learning rate", last["step"])]);
    }
}

fn resumed(args: &[String]) -> Vec<String> {
    args.iter().cloned().chain(["--resume".to_owned()]).collect()
}

#[test]
fn what_keeps_a_gpu_from_being_used_is_one_sentence() {
    let Some(folder) = stand_in() else { return };
    let cases: [(&str, &[&str]); 6] = [
        ("cards=0", &["the CUDA driver finds no GPU"]),
        ("driver=11040", &["the CUDA driver is too old", "11.4"]),
        ("sm=75", &["compute capability 7.5"]),
        // Of CUDA 11.8, and of 11.4, which wrote its version in another form.
        ("blaslt=111103", &["cuBLASLt is too old: version 111103, 120000 is needed", "install CUDA 12"]),
        ("blaslt=11605", &["cuBLASLt is too old: version 11605"]),
        ("memory=1M", &["the run needs", "train.micro_batch"]),
    ];
    for (options, texts) in cases {
        let out = path("refused");
        let done = run(&folder, options, &small(&out, &["--device", "cuda"])).exits(1).says(texts);
        let errors = done.stderr.lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!(errors, 1, "{options}: {}", done.stderr);
    }
    // A driver without cuBLASLt next to it.
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
        let done = done.exits(1).says(&["out of memory on the GPU", "hint:"]);
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

    // The remembered choices are used: the file stays unchanged.
    go("remembered", "checks=off").ok();
    assert_eq!(std::fs::read(&file).unwrap(), good);
    // A refused algorithm is chosen again, silently.
    let done = go("refused-algorithm", "checks=off,refuse_algorithm=0").ok();
    assert!(!done.stderr.contains("error"), "{}", done.stderr);
    // A file that is not JSON.
    std::fs::write(&file, "{\"half").unwrap();
    let done = go("spoiled", "checks=off").ok();
    assert_eq!(done.stderr.matches("algorithms are chosen again").count(), 1, "{}", done.stderr);
    // Words that no library produces.
    let text = String::from_utf8(good).unwrap();
    let digits = |c: char| if c.is_ascii_digit() { '7' } else { c };
    let spoiled: String = text
        .lines()
        .map(|l| if l.contains(':') { l.to_owned() } else { l.chars().map(digits).collect() } + "\n")
        .collect();
    std::fs::write(&file, spoiled).unwrap();
    go("foreign", "checks=off").ok();
}
