//! Fine-tuning from outside: from a weights file to a model for other pictures, with frozen parts, in sweeps,
//! resumed.

use crate::support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use image::RgbImage;

use support::{Done, command, names, outcome, path, scratch, stripes, vitrum};
use vitrum::recipe::{HeadPolicy, MomentType, OptimName, Recipe};
use vitrum::vit::config::QkvBias;
use vitrum::vit::{ModelConfig, ParamLayout};
use vitrum::weights::safetensors::SafeTensors;
use vitrum::weights::{self, Numbering, Tensors};

/// A small model that was trained on the three classes of [`stripes`], for a few steps.
fn pretrained() -> &'static str {
    static RUN: OnceLock<String> = OnceLock::new();
    RUN.get_or_init(|| {
        let out = path("pretrained");
        let data = format!("data.train={}", stripes());
        let sets = [
            &data,
            "model.image=16",
            "model.patch=4",
            "model.width=24",
            "model.depth=2",
            "model.heads=3",
            "model.posemb=learned",
            "augment.crop=pad",
            "train.batch=16",
            "train.steps=12",
        ];
        let mut args = vec!["train", "demo", "--out", &out];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        vitrum(&args).ok();
        out
    })
}

/// Two of the classes of [`stripes`], and a third that the model has not seen.
fn other_classes() -> &'static str {
    static DATA: OnceLock<String> = OnceLock::new();
    DATA.get_or_init(|| {
        let root = scratch().join("other");
        for split in ["train", "val"] {
            for (from, to) in [("across", "new"), ("checks", "checks"), ("down", "down")] {
                let dir = root.join(split).join(to);
                std::fs::create_dir_all(&dir).unwrap();
                for name in names(Path::new(stripes()).join(split).join(from)) {
                    let source = Path::new(stripes()).join(split).join(from).join(&name);
                    std::fs::copy(source, dir.join(&name)).unwrap();
                }
            }
        }
        root.display().to_string()
    })
}

/// A short run on `data` from [`pretrained`]. `more` are settings (`KEY=VALUE`) and flags with their values.
fn finetune(out: &str, data: &str, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> =
        ["finetune", "--weights", pretrained(), "--data", data, "--out", out].map(String::from).to_vec();
    let settings = [
        "train.batch=16",
        "train.micro_batch=8",
        "train.steps=12",
        "train.log_every=4",
        "train.eval_every=4",
        "optim.ema=0.9",
    ];
    let mut flag = false;
    for more in settings.iter().chain(more) {
        if !flag && !more.starts_with("--") {
            args.push("--set".into());
        }
        flag = more.starts_with("--") && !["--resume", "--json", "--dry-run"].contains(more);
        args.push((*more).into());
    }
    args
}

fn run(out: &str, data: &str, more: &[&str]) -> Done {
    vitrum(&finetune(out, data, more)).ok()
}

/// Tensors of a run's last checkpoint.
fn tensors(run: &str) -> Tensors {
    let file = Path::new(run).join("checkpoints/last/model.safetensors");
    weights::open(&file, &Default::default()).unwrap().tensors.all().unwrap()
}

/// Names of the tensors that are not the same in both, to the bit.
fn changed(before: &Tensors, after: &Tensors) -> Vec<String> {
    let bits = |t: &weights::Tensor| t.values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let differs = |name: &&String| before.get(*name).is_none_or(|b| bits(b) != bits(&after[*name]));
    after.keys().filter(differs).cloned().collect()
}

// ---- Any folder ----

/// Class folders with 61 pictures and without a validation part, as a new user would type it.
#[test]
fn any_folder_is_fine_tuned_on_as_it_is() {
    let folder = scratch().join("plain");
    for (class, count) in [("across", 32), ("down", 29)] {
        std::fs::create_dir_all(folder.join(class)).unwrap();
        let from = Path::new(stripes()).join("train").join(class);
        let of_class = names(&from);
        for i in 0..count {
            std::fs::copy(
                from.join(&of_class[i % of_class.len()]),
                folder.join(class).join(format!("{i}.png")),
            )
            .unwrap();
        }
    }
    let out = path("plain-run");
    let data = folder.display().to_string();
    let done = vitrum(&["finetune", "--weights", pretrained(), "--data", &data, "--out", &out]).ok();
    let recipe = std::fs::read_to_string(Path::new(&out).join("recipe.toml")).unwrap();
    for line in ["batch = 32", "micro_batch = 32", "eval_every = 1"] {
        assert!(recipe.lines().any(|l| l == line), "{line}: {recipe}");
    }
    done.says(&["to validate (held out: `data.holdout = 0.1`)", " of 32 = "]);
    let without = path("plain-whole");
    let whole = ["--set", "data.holdout=0", "--steps", "1"];
    let args =
        [&["finetune", "--weights", pretrained(), "--data", &data, "--out", &without], &whole[..]].concat();
    vitrum(&args).ok().says(&["61 images to train on, no validation images"]);
}

// ---- A run ----

#[test]
fn a_fine_tuned_model_evaluates_and_predicts_with_the_new_classes() {
    let out = path("tuned");
    let learn = ["train.steps=60", "optim.name=adamw", "optim.lr=3e-3", "augment.crop=pad"];
    let done = run(&out, other_classes(), &learn);
    // The head keeps the classes whose names match. The log says what was done.
    let done = done.says(&["weights  ", "(layout vitrum)", "2 of 3 classes kept by name"]);
    let log = std::fs::read_to_string(Path::new(&out).join("log.txt")).unwrap();
    assert!(log.contains("kept by name"), "{log}");
    assert!(done.stderr.contains(&format!("vitrum eval --weights {out} --data")), "{}", done.stderr);

    let eval = vitrum(&["eval", "--weights", &out, "--data", other_classes(), "--json"]).ok().json();
    assert_eq!(eval["images"], 40);
    assert!(eval["top1"].as_f64().unwrap() > 0.5, "{eval}");
    let picture = Path::new(other_classes()).join("val/new/000.png").display().to_string();
    let top = vitrum(&["predict", "--weights", &out, &picture, "--json"]).ok().json();
    let classes: Vec<_> = (0..3).map(|i| top["predictions"][0]["top"][i]["name"].as_str().unwrap()).collect();
    assert!(["new", "checks", "down"].iter().all(|name| classes.contains(name)), "{classes:?}");

    // EMA and raw weights are both evaluated.
    let evaluations: Vec<_> = support::metrics(&out).into_iter().filter(|l| !l["eval"].is_null()).collect();
    assert!(!evaluations.is_empty() && evaluations.iter().all(|line| line["eval"]["ema"]["top1"].is_f64()));
}

#[test]
fn the_recipe_in_a_run_directory_gives_the_same_run_again() {
    let (first, second) = (path("first"), path("second"));
    run(&first, other_classes(), &["optim.layer_decay=0.8"]);
    let recipe = Path::new(&first).join("recipe.toml").display().to_string();
    vitrum(&["train", &recipe, "--out", &second]).ok();
    assert_eq!(outcome(&first), outcome(&second));
}

#[test]
fn a_resumed_run_has_the_bits_of_an_unbroken_one() {
    let more = ["train.steps=40", "train.checkpoint_every=5"];
    let unbroken = path("unbroken");
    run(&unbroken, other_classes(), &more);
    let stopped = (0..10).any(|attempt| {
        let out = path(&format!("broken-{attempt}"));
        let args = finetune(&out, other_classes(), &more);
        let mut child = command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let limit = Instant::now() + Duration::from_secs(120);
        while !Path::new(&out).join("checkpoints/last").exists() && child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < limit, "nothing happened for two minutes");
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            return false; // The run ended first.
        }
        run(&out, other_classes(), &["train.steps=40", "train.checkpoint_every=5", "--resume"]);
        assert_eq!(outcome(&out), outcome(&unbroken));
        true
    });
    assert!(stopped, "the run always ended before it was killed");
}

#[test]
fn the_head_is_kept_reset_or_refused_as_the_user_says() {
    // The first update of a warm-up has the rate 0: the checkpoint after one step holds what was loaded.
    let once = ["train.steps=2", "schedule.warmup=1", "train.checkpoint_every=1", "optim.lr=0"];
    let head = |out: &str, data: &str, more: &[&str]| {
        let out = path(out);
        run(&out, data, &[&once, more].concat());
        tensors(&out)["head.weight"].values.clone()
    };
    let old = tensors(pretrained())["head.weight"].values.clone();
    assert_eq!(head("kept", stripes(), &["--head", "keep"]), old);
    assert_eq!(head("auto", stripes(), &[]), old, "the same classes");
    assert!(head("reset", stripes(), &["--head", "reset"]).iter().all(|v| *v == 0.0));
    // `checks` and `down` are rows 1 and 2 of the file. In the new data, `new` comes last.
    let by_name = head("by-name", other_classes(), &[]);
    assert_eq!(by_name[..48], old[24..]);
    assert!(by_name[48..].iter().all(|v| *v == 0.0));

    let out = path("refused");
    vitrum(&finetune(&out, other_classes(), &["--head", "keep"])).exits(1).says(&["no class `new`"]);
    assert!(!Path::new(&out).exists());
}

#[test]
fn a_model_without_biases_of_q_k_and_v_stays_without() {
    let (start, bare) = (tensors(pretrained()), path("bare.safetensors"));
    let file = weights::open(Path::new(pretrained()), &Default::default()).unwrap();
    let config = ModelConfig { qkv_bias: QkvBias::None, ..file.config };
    let kept = start.into_iter().filter(|(name, _)| !name.ends_with("attn.qkv.bias")).collect();
    weights::save(Path::new(&bare), &config, &kept, &file.meta).unwrap();
    let out = path("unbiased");
    let done = run(&out, stripes(), &[&format!("finetune.weights={bare}")]);
    let after = tensors(&out);
    assert_eq!(changed(&kept, &after).len(), kept.len(), "everything moves: {}", done.stderr);
    assert_eq!(after.keys().collect::<Vec<_>>(), kept.keys().collect::<Vec<_>>());
    let recipe = std::fs::read_to_string(Path::new(&out).join("recipe.toml")).unwrap();
    assert!(recipe.contains("qkv_bias = \"none\""), "{recipe}");
}

// ---- Frozen parts ----

#[test]
fn frozen_layers_keep_their_bits_and_take_no_optimiser_memory() {
    let start = tensors(pretrained());
    let bytes = |out: &str| {
        std::fs::metadata(Path::new(out).join("checkpoints/last/state.safetensors")).unwrap().len()
    };
    let trained = |name: &str, more: &[&str]| {
        let out = path(name);
        let header = run(&out, stripes(), more).stderr;
        assert_eq!(header.contains("M of them trained"), !more.is_empty(), "{header}");
        (changed(&start, &tensors(&out)), bytes(&out))
    };
    let (all, most) = trained("free", &[]);
    assert_eq!(all.len(), start.len(), "everything moves: {all:?}");
    let (upper, fewer) = trained("first-block", &["optim.freeze_blocks=1"]);
    let lower =
        |name: &String| name.starts_with("blocks.0.") || name.contains("embed") || name == "cls_token";
    assert_eq!(upper, all.iter().filter(|name| !lower(name)).cloned().collect::<Vec<_>>());
    let (head, least) = trained("head", &["optim.freeze_backbone=true"]);
    assert_eq!(head, ["head.bias", "head.weight"]);
    // Momentum exists only for trained tensors: 3 x 24 + 3 values, in units of 64.
    assert!(fewer < most * 3 / 4 && least < fewer / 4, "{most}, {fewer}, {least}");

    let out = path("too-many");
    let args = finetune(&out, stripes(), &["optim.freeze_blocks=3"]);
    vitrum(&args).exits(2).says(&["`optim.freeze_blocks` is 3, but the model has 2 blocks", "hint: "]);
}

// ---- Sweeps ----

#[test]
fn a_trial_of_a_sweep_has_the_bits_of_the_run_alone() {
    let out = path("sweep");
    let one = path("sweep-of-a-run");
    run(&one, other_classes(), &[]).ok();
    let refused = vitrum(&["train", "--resume", &one, "--sweep", "optim.lr=0.01,0.05"]).exits(2);
    refused.says(&["is a run, and `--sweep` needs a folder", "hint: "]);
    let sweep = ["--sweep", "optim.lr=0.01,0.05", "--sweep", "optim.backbone_lr_mult=1,0.1"];
    let done = run(&out, other_classes(), &sweep);
    for (trial, set) in [
        (1, ["optim.lr=0.01", "optim.backbone_lr_mult=1"]),
        (3, ["optim.lr=0.05", "optim.backbone_lr_mult=1"]),
        (4, ["optim.lr=0.05", "optim.backbone_lr_mult=0.1"]),
    ] {
        let alone = path(&format!("alone-{trial}"));
        run(&alone, other_classes(), &set);
        assert_eq!(outcome(&format!("{out}/trial-{trial}")), outcome(&alone), "{set:?}");
    }
    // One copy of the weights, one table with one best row.
    assert_eq!(done.stderr.matches("trial 4 of 4").count(), 1, "{}", done.stderr);
    let table: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(table.len(), 6, "{}", done.stdout);
    assert!(table[0].contains("optim.lr") && table[0].contains("optim.backbone_lr_mult"), "{}", table[0]);
    assert_eq!(done.stdout.matches("<- best").count(), 1, "{}", done.stdout);
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(Path::new(&out).join("sweep.json")).unwrap()).unwrap();
    let trials = json["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 4);
    assert_eq!(trials[2]["settings"]["optim.lr"], "0.05");
    let best = |trial: &serde_json::Value| trial["best_metric"].as_f64().unwrap();
    let marked = trials.iter().find(|trial| trial["best"] == true).unwrap();
    assert!(trials.iter().all(|trial| best(trial) <= best(marked)));

    // The same command with `--resume` finds every trial finished.
    let again =
        vitrum(&finetune(&out, other_classes(), &[&sweep[..], &["--resume", "--json"]].concat())).ok();
    assert_eq!(again.json()["trials"].as_array().unwrap().len(), 4);
    assert_eq!(again.stderr.matches("resume   from checkpoints/step-12").count(), 4, "{}", again.stderr);
}

#[test]
fn a_trial_that_diverges_is_a_result_and_the_sweep_goes_on() {
    let out = path("diverging");
    let done = run(&out, stripes(), &["optim.clip=0", "--sweep", "optim.lr=1e30,0.01"]);
    let done = done.says(&["trial 1 failed: ", "trial 2 of 2"]);
    assert!(done.stdout.lines().nth(2).unwrap().contains("failed"), "{}", done.stdout);
    assert!(done.stdout.lines().nth(3).unwrap().contains("<- best"), "{}", done.stdout);
}

/// The peak memory of a process in bytes. Calls `meanwhile` repeatedly while the process runs.
fn peak_of(args: &[String], mut meanwhile: impl FnMut()) -> u64 {
    let mut child = command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let kib = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = peak.max(kib.map_or(0, |kib| kib.parse().unwrap()));
        meanwhile();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(child.wait().unwrap().success());
    peak * 1024
}

#[test]
fn four_trials_read_the_weights_once_and_take_the_memory_of_one() {
    let weights = path("wide.safetensors");
    let config = ModelConfig { image: (16, 16), ..ModelConfig::variant("S/8", 16, 3).unwrap() };
    let config = ModelConfig { depth: 6, ..config };
    let layout = ParamLayout::new(&config, |_| false);
    let tensor = |shape: &[usize]| weights::Tensor::new(shape, vec![0.01; shape.iter().product()]);
    let tensors = layout.parameters().map(|p| (p.name.clone(), tensor(&p.shape))).collect();
    weights::save(Path::new(&weights), &config, &tensors, &Default::default()).unwrap();
    let settings =
        ["train.steps=2", "train.batch=4", "train.micro_batch=4", "optim.ema=0", "train.eval_every=2"];
    let from = format!("finetune.weights={weights}");
    let args = |out: &str, more: &[&str]| {
        finetune(&path(out), stripes(), &[&settings[..], &[from.as_str()], more].concat())
    };
    let one = peak_of(&args("one-trial", &[]), || ());
    // Reading them again would fail.
    let started = scratch().join("four-trials/trial-1/recipe.toml");
    let mut removed = false;
    let four = peak_of(&args("four-trials", &["--sweep", "optim.lr=0,1e-5,1e-4,1e-3"]), || {
        removed |= started.exists() && std::fs::remove_file(&weights).is_ok();
    });
    assert!(removed && scratch().join("four-trials/trial-4/checkpoints/last").exists());
    let size = layout.count() as u64 * 4;
    assert!(one > 3 * size, "weights, gradients and momentum: {one} bytes for weights of {size}");
    assert!(four < one + one / 10, "{four} bytes at the peak, {one} of one trial");
}

/// A sweep of training from new weights: AugReg's levels. Each trial equals a single run.
#[test]
fn levels_of_augmentation_are_swept_from_scratch() {
    let out = path("levels");
    let mut args = support::train(&out, &["train.steps=6", "--sweep=augment.level=none,light2"]);
    let done = vitrum(&args).ok().says(&["trial 2 of 2"]);
    assert_eq!(done.stdout.matches("<- best").count(), 1, "{}", done.stdout);
    args = support::train(&path("level-alone"), &["train.steps=6", "augment.level=light2"]);
    vitrum(&args).ok();
    assert_eq!(outcome(&format!("{out}/trial-2")), outcome(&path("level-alone")));
    // The level replaces the recipe's mixup.
    let recipe = std::fs::read_to_string(format!("{out}/trial-1/recipe.toml")).unwrap();
    assert!(recipe.contains("level = \"config:none\"") && recipe.contains("mixup = 0.0"), "{recipe}");
    vitrum(&["finetune", "mini/cifar10", "--data", stripes(), "--sweep", "optim.lr=1,2"])
        .exits(2)
        .says(&["but none are given"]);
}

// ---- Wrong usage ----

#[test]
fn what_cannot_be_fine_tuned_is_refused_before_anything_is_written() {
    let out = path("nothing");
    let refused = |code: i32, args: &[&str], texts: &[&str]| {
        vitrum(args).exits(code).says(texts);
        assert!(!Path::new(&out).exists(), "{args:?} wrote something");
    };
    let base = ["finetune", "--weights", pretrained(), "--data", stripes(), "--out", &out];
    refused(2, &["finetune", "--data", stripes(), "--out", &out], &["but none are given", "--weights FILE"]);
    refused(2, &["train", "b16/cifar10", "--set", "data.train=demo", "--out", &out], &["but none are given"]);
    let missing = ["finetune", "--weights", "no-such-file", "--data", stripes(), "--out", &out];
    refused(1, &missing, &["no-such-file"]);
    refused(2, &base[..3], &["no training data", "--data DIR"]);
    let batch = [&base[..], &["--set", "train.batch=100"]].concat();
    let says = ["`train.batch` is 100", "96 images", "--set train.batch=80"];
    refused(1, &[&batch[..], &["--set", "train.micro_batch=20"]].concat(), &says);
    let preset = [&["finetune", "b16/cifar10"], &base[1..]].concat();
    refused(1, &preset, &["the model has width 24, the recipe says 768", "omit the recipe"]);
    for (sweep, text) in [
        ("optim.lr", "has no values"),
        ("optim.lrr=1,2", "unknown key `optim.lrr`"),
        ("optim.lr=1,x", "`optim.lr` is the text `x`"),
        ("optim.lr=0.1,-1", "`optim.lr` is -1"),
    ] {
        refused(2, &[&base[..], &["--sweep", sweep]].concat(), &[text]);
    }
}

#[test]
fn a_dry_run_shows_what_would_be_done() {
    let out = path("dry");
    let done = run(&out, other_classes(), &["model.image=24", "--dry-run"]);
    let done = done.says(&["position embedding", "4x4 to 6x6"]);
    assert!(done.stdout.contains("[finetune]") && done.stdout.contains("image = 24"), "{}", done.stdout);
    assert!(!Path::new(&out).exists());
}

// ---- Presets ----

#[test]
fn presets_have_the_published_numbers() {
    let read = |name: &str| Recipe::read(Some(name), &[]).unwrap().recipe;
    for (name, lr, steps, warmup) in [
        ("b16/cifar10", 0.01, 1000, 100),
        ("b16/cifar10-differential", 0.01, 1000, 100),
        ("b16/cifar100", 0.03, 10_000, 500),
        ("b16/imagenet2012", 0.003, 20_000, 500),
        ("b16/oxford_pets", 0.003, 500, 100),
        ("b16/oxford_flowers", 0.003, 500, 100),
    ] {
        let recipe = read(name);
        let (optim, train) = (&recipe.optim, &recipe.train);
        assert_eq!((optim.lr, train.steps, train.batch), (lr, Some(steps), 512), "{name}");
        assert_eq!(recipe.schedule.warmup.to_steps(steps, 512, 1), warmup, "{name}");
        assert_eq!((optim.name, optim.momentum, optim.clip), (OptimName::Sgd, 0.9, 1.0), "{name}");
        assert_eq!((optim.moment, optim.weight_decay), (MomentType::Bf16, 0.0), "{name}");
        let tenth = if name.ends_with("differential") { 0.1 } else { 1.0 };
        assert_eq!((optim.backbone_lr_mult, optim.layer_decay), (tenth, 1.0), "{name}");
        let model = recipe.model_config(10).unwrap();
        assert_eq!((model.width, model.image, model.dropout), (768, (384, 384), 0.0), "{name}");
        assert_eq!(recipe.finetune.unwrap().head, HeadPolicy::Reset, "{name}");
    }
}

// ---- vit_jax ----

fn reference() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference");
    let folder = std::env::var_os("VITRUM_REFERENCE").map_or(default, PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    println!("skipped: no reference outputs at {}", folder.display());
    None
}

/// The reference's pictures as a data set of five classes, with enough of others to fill a batch.
fn reference_pictures(after_load: &SafeTensors, classes: usize) -> String {
    let shape = after_load.shape("images_u8").unwrap().to_vec();
    let pixels = after_load.bytes("images_u8").unwrap();
    let (height, width) = (shape[1], shape[2]);
    for split in ["train", "val"] {
        for class in 0..classes {
            let dir = scratch().join("reference").join(split).join(format!("class{class}"));
            std::fs::create_dir_all(&dir).unwrap();
            if let Some(picture) = pixels.chunks(height * width * 3).nth(class) {
                let picture = RgbImage::from_raw(width as u32, height as u32, picture.to_vec()).unwrap();
                picture.save(dir.join("a.png")).unwrap();
            } else if split == "train" {
                RgbImage::new(width as u32, height as u32).save(dir.join("a.png")).unwrap();
            }
        }
    }
    path("reference")
}

#[test]
fn fine_tuning_starts_from_what_vit_jax_loads() {
    let Some(folder) = reference().map(|folder| folder.join("posemb")) else { return };
    let want = SafeTensors::open(&folder.join("finetune_after_load.safetensors")).unwrap();
    let classes = want.shape("head/bias").unwrap()[0];
    let side = want.shape("images_u8").unwrap()[1];
    let data = reference_pictures(&want, classes);
    let (file, out) = (folder.join("finetune_pretrained.npz").display().to_string(), path("like-vit-jax"));
    let image = format!("model.image={side}");
    let sets = ["train.batch=4", "train.micro_batch=4", "train.steps=1", "optim.lr=0", &image];
    let mut args = vec!["finetune", "--weights", &file, "--data", &data, "--out", &out, "--head", "reset"];
    sets.iter().for_each(|set| args.extend(["--set", set]));
    vitrum(&args).ok().says(&["position embedding resized", "representation layer of", "all zero"]);

    let file = weights::open(Path::new(&out), &Default::default()).unwrap();
    let own =
        weights::to_flax_tensors(&file.config, Numbering::Published, &file.tensors.all().unwrap()).unwrap();
    let names: BTreeMap<&str, ()> =
        want.names().filter(|n| !["images_u8", "features"].contains(n)).map(|n| (n, ())).collect();
    assert_eq!(own.keys().map(String::as_str).collect::<Vec<_>>(), names.keys().copied().collect::<Vec<_>>());
    for name in names.keys() {
        let (got, want) = (&own[*name], want.tensor(name).unwrap());
        assert_eq!(got.shape, want.shape, "{name}");
        let furthest = got.values.iter().zip(&want.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest <= 1e-6, "{name}: {furthest}");
    }
    // The head's input for the reference's pictures, after the decoder, the resized positions and the model.
    let features = path("features.safetensors");
    vitrum(&["features", "--weights", &out, "--data", &data, "--out", &features]).ok();
    let got = SafeTensors::open(Path::new(&features)).unwrap();
    assert_eq!(got.i64("labels").unwrap(), [0, 1]);
    let (got, want) = (got.tensor("features").unwrap(), want.tensor("features").unwrap());
    assert_eq!(got.shape, want.shape);
    let largest = want.values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    let furthest = got.values.iter().zip(&want.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(furthest <= 1e-5 * largest.max(1.0), "{furthest} of {largest}");

    // The same without fine-tuning: `eval` and similar commands resize positions if asked to.
    let file = folder.join("finetune_pretrained.npz").display().to_string();
    let direct = path("direct.safetensors");
    let args = ["features", "--weights", &file, "--data", &data, "--out", &direct, "--set", &image];
    vitrum(&args).ok().says(&["position embedding resized"]);
}

// ---- How the weights are read ----

/// A file with wrapped names and ImageNet's mean. The run's recipe stores patterns and mean, its checkpoint
/// the mean, and the run can be resumed from them.
#[test]
fn patterns_for_names_and_mean_belong_to_the_run() {
    let file = weights::open(Path::new(pretrained()), &Default::default()).unwrap();
    let tensors = file.tensors.all().unwrap();
    let wrapped = scratch().join("wrapped.safetensors");
    let views = tensors.iter().map(|(name, t)| {
        vitrum::weights::safetensors::View::f32(format!("module.{name}"), &t.shape, &t.values)
    });
    let extra = vitrum::weights::safetensors::View::f32("module.step", &[1], &[1.0]);
    vitrum::weights::safetensors::write(&wrapped, &BTreeMap::new(), views.chain([extra]).collect()).unwrap();
    let out = path("patterns");
    let sets = [
        "weights.rename=^module\\.=>",
        "weights.exclude=ema_.*",
        "weights.exclude=step",
        "data.mean=[0.485,0.456,0.406]",
        "data.std=[0.229,0.224,0.225]",
        "model.heads=3",
        "train.batch=16",
        "train.micro_batch=0",
        "train.steps=2",
        "train.eval_every=2",
    ];
    let weights_file = wrapped.display().to_string();
    let mut args = vec!["finetune", "--weights", &weights_file, "--data", stripes(), "--out", &out];
    sets.iter().for_each(|set| args.extend(["--set", set]));
    vitrum(&args).ok();
    let recipe = Recipe::read(Some(&format!("{out}/recipe.toml")), &[]).unwrap().recipe;
    let patterns = recipe.weights.unwrap();
    assert_eq!(
        (patterns.rename, patterns.exclude),
        (vec!["^module\\.=>".into()], vec!["ema_.*".into(), "step".into()])
    );
    assert_eq!(recipe.data.mean, Some([0.485, 0.456, 0.406]));
    let meta = weights::open(Path::new(&out), &Default::default()).unwrap().meta;
    assert_eq!(meta.normalise.mean, [123.675, 116.28, 103.53]);
    assert_eq!(meta.loss, Some(vitrum::backend::LossKind::Softmax));

    // The next run starts from this one and keeps its mean, unless told otherwise.
    let next = path("patterns-next");
    let mut again = vec!["finetune", "--weights", &out, "--data", stripes(), "--out", &next];
    sets[6..].iter().for_each(|set| again.extend(["--set", set]));
    vitrum(&again).ok();
    let recipe = Recipe::read(Some(&format!("{next}/recipe.toml")), &[]).unwrap().recipe;
    assert_eq!(
        (recipe.data.mean, recipe.data.std),
        (Some([0.485, 0.456, 0.406]), Some([0.229, 0.224, 0.225]))
    );
    vitrum(&[again, vec!["--resume"]].concat()).ok();

    // Without weights there is nothing to rename.
    vitrum(&["train", "demo", "--set", "weights.exclude=x", "--dry-run"])
        .exits(2)
        .says(&["`weights` says how"]);
    let zero = ["train", "demo", "--set", "data.std=[0,1,1]", "--dry-run"];
    vitrum(&zero).exits(2).says(&["`data.std` is [0.0, 1.0, 1.0]"]);
}
