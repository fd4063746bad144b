//! What the commands read and print, from outside: `eval`, `predict`, `inspect` on what a run leaves, and the files of
//! `grad` and `replay`. Values are compared in `reference.rs`; here it is formats, and that the ways in agree.

use crate::support;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use support::{names, path, scratch, stripes, train, vitrum};
use vitrum::weights::safetensors::{Dtype, SafeTensors, View, write};

/// A trained run, made once.
fn trained() -> &'static str {
    static RUN: OnceLock<String> = OnceLock::new();
    RUN.get_or_init(|| {
        let out = path("trained");
        vitrum(&train(&out, &["train.steps=60"])).ok();
        out
    })
}

/// The ways to name its best weights.
fn ways() -> [String; 3] {
    ["", "/checkpoints/best", "/checkpoints/best/model.safetensors"].map(|way| format!("{}{way}", trained()))
}

#[test]
fn eval_gives_the_same_numbers_whatever_names_the_weights() {
    let mut seen = Vec::new();
    for weights in ways().iter().chain(&ways()) {
        let json = vitrum(&["eval", "--weights", weights, "--data", stripes(), "--json"]).ok().json();
        assert_eq!(json["images"], 40);
        seen.push(["top1", "top5", "loss"].map(|key| json[key].as_f64().unwrap()));
    }
    assert!(seen.iter().all(|numbers| *numbers == seen[0]), "{seen:?}");
    let [top1, top5, loss] = seen[0];
    assert!((0.0..=1.0).contains(&top1) && top5 == 1.0 && loss > 0.0, "{seen:?}");

    let text = vitrum(&["eval", "--weights", trained(), "--data", stripes()]).ok().stdout;
    assert!(text.starts_with("40 images   top-1 ") && text.lines().count() == 1, "{text}");
}

/// The run's own evaluation of its best step is what `eval` measures afterwards.
#[test]
fn eval_agrees_with_the_run() {
    let json = vitrum(&["eval", "--weights", trained(), "--data", stripes(), "--json"]).ok().json();
    let best = std::fs::read_link(Path::new(trained()).join("checkpoints/best")).unwrap();
    let step: u64 = best.to_str().unwrap().rsplit('-').next().unwrap().parse().unwrap();
    let metrics = support::metrics(trained());
    let line = metrics.iter().find(|l| l["step"] == step && l.get("eval").is_some()).unwrap();
    let near = |key: &str| (json[key].as_f64().unwrap() - line["eval"][key].as_f64().unwrap()).abs() < 1e-6;
    assert!(near("top1") && near("loss"), "{json} and {line}");
}

#[test]
fn eval_can_leave_out_a_short_last_batch() {
    // 96 training pictures in batches of 64.
    let data = format!("{}/train", stripes());
    let images = |more: &[&str]| {
        let args = [&["eval", "--weights", trained(), "--data", &data, "--json"], more].concat();
        vitrum(&args).ok().json()["images"].as_u64().unwrap()
    };
    assert_eq!((images(&[]), images(&["--drop-last"])), (96, 64));
}

#[test]
fn predict_names_the_classes_with_probabilities_that_sum_to_one() {
    let picture = format!("{}/val/across/000.png", stripes());
    let large = path("large.png");
    image::RgbImage::from_pixel(90, 50, image::Rgb([200, 10, 10])).save(&large).unwrap();
    let json =
        vitrum(&["predict", "--weights", trained(), &picture, &large, "--json", "--top", "3"]).ok().json();
    let predictions = json["predictions"].as_array().unwrap();
    assert_eq!((predictions.len(), predictions[1]["image"].as_str().unwrap()), (2, large.as_str()));
    for prediction in predictions {
        let top = prediction["top"].as_array().unwrap();
        let probabilities: Vec<f64> = top.iter().map(|p| p["probability"].as_f64().unwrap()).collect();
        assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{prediction}");
        assert!(probabilities.is_sorted_by(|a, b| a >= b), "{prediction}");
        for entry in top {
            let class = entry["class"].as_u64().unwrap() as usize;
            assert_eq!(entry["name"], ["across", "checks", "down"][class]);
        }
    }
    let one = vitrum(&["predict", "--weights", trained(), &picture, "--json"]).ok().json();
    assert_eq!(one["predictions"][0], predictions[0], "a picture's neighbours change nothing");

    let text = vitrum(&["predict", "--weights", trained(), &picture, "--top", "1"]).ok().stdout;
    let likeliest = predictions[0]["top"][0]["name"].as_str().unwrap();
    assert!(text.starts_with(&picture) && text.contains(likeliest) && text.lines().count() == 2, "{text}");
}

#[test]
fn inspect_describes_a_run_a_checkpoint_and_its_data() {
    let mut all = Vec::new();
    for weights in ways() {
        let json = vitrum(&["inspect", &weights, "--json"]).ok().json();
        let sizes = ["width", "depth", "heads", "mlp", "classes"].map(|key| json[key].as_u64().unwrap());
        assert_eq!(sizes, [24, 2, 3, 96, 3]);
        assert_eq!(json["class_names"], serde_json::json!(["across", "checks", "down"]));
        all.push(json);
    }
    assert!(all.iter().all(|json| *json == all[0]), "{all:?}");
    let text = vitrum(&["inspect", trained()]).ok().stdout;
    assert!(text.contains("width: 24\n") && text.contains("patch: 4x4\n"), "{text}");

    let data = vitrum(&["inspect", stripes(), "--json"]).ok().json();
    assert_eq!((&data["train"]["records"], &data["val"]["records"]), (&96.into(), &40.into()), "{data}");
    let ema = format!("{}/checkpoints/last/ema.safetensors", trained());
    assert_eq!(vitrum(&["inspect", &ema, "--json"]).ok().json()["width"], 24);
}

#[test]
fn a_packed_data_set_trains_as_its_pictures_do() {
    let packed = path("packed");
    vitrum(&["pack", stripes(), &packed]).ok();
    let (folder, shards) = (path("of-folder"), path("of-shards"));
    vitrum(&train(&folder, &[])).ok();
    vitrum(&train(&shards, &[&format!("data.train={packed}")])).ok();
    assert_eq!(support::metrics(&folder), support::metrics(&shards));
}

/// The folder of reference outputs, or a line that says that it is not there.
fn reference() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference");
    let folder = std::env::var_os("VITRUM_REFERENCE").map_or(default, PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    println!("skipped: no reference outputs at {}", folder.display());
    None
}

/// The reference's pictures as the model takes them.
fn normalised(pixels: &[u8]) -> Vec<f32> {
    pixels.iter().map(|p| (f32::from(*p) - 127.5) / 127.5).collect()
}

fn i32_view(labels: &[i64], shape: &[usize]) -> View<'static> {
    let bytes: Vec<u8> = labels.iter().flat_map(|l| (*l as i32).to_le_bytes()).collect();
    View::new("labels", Dtype::I32, shape, bytes)
}

fn near(got: f64, want: f64, bound: f64) -> bool {
    (got - want).abs() <= bound * want.abs().max(1.0)
}

#[test]
fn grad_takes_every_form_of_labels_and_writes_f32() {
    let Some(folder) = reference().map(|f| f.join("vit")) else { return };
    let mut cases = 0;
    for case in names(&folder).iter().filter(|name| folder.join(name).join("config.json").exists()) {
        let config = std::fs::read(folder.join(case).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let smoothing = config["label_smoothing"].as_f64().unwrap();
        let weights = folder.join(case).join("params.npz").display().to_string();
        let io = SafeTensors::open(&folder.join(case).join("io.safetensors")).unwrap();
        let shape = io.shape("images_u8").unwrap().to_vec();
        let (images, labels) = (normalised(io.bytes("images_u8").unwrap()), io.i64("labels").unwrap());
        let multi = io.tensor("multilabels").unwrap();
        let classes = multi.shape[1];
        let (off, on) = (smoothing / classes as f64, 1.0 - smoothing);
        let smooth: Vec<f32> = (0..shape[0] * classes)
            .map(|i| (off + if labels[i / classes] as usize == i % classes { on } else { 0.0 }) as f32)
            .collect();

        let grad = |what: &str, targets: View<'_>, more: &[&str]| {
            let (batch, out) = (path(&format!("{case}-{what}-batch")), path(&format!("{case}-{what}-grad")));
            write(
                Path::new(&batch),
                &Default::default(),
                vec![View::f32("images", &shape, &images), targets],
            )
            .unwrap();
            let args = ["grad", "--weights", &weights, "--batch", &batch, "--out", &out];
            let done = vitrum(&[&args[..], more].concat()).ok();
            assert!(done.stdout.is_empty(), "{}", done.stdout);
            let file = SafeTensors::open(Path::new(&out)).unwrap();
            assert!(file.names().all(|name| file.dtype(name).unwrap() == Dtype::F32));
            assert_eq!(file.shape("logits").unwrap(), [shape[0], classes]);
            assert_eq!(file.shape("loss").unwrap(), [1]);
            assert!(file.names().all(|n| n == "logits" || n == "loss" || n.starts_with("grad/")));
            file
        };
        let smoothed = smoothing.to_string();
        let hard = grad("i64", View::i64("labels", &[shape[0]], &labels), &[]);
        let same = grad("i32", i32_view(&labels, &[shape[0]]), &[]);
        assert!(
            hard.names().all(|n| hard.bytes(n).unwrap() == same.bytes(n).unwrap()),
            "{case}: I32 and I64"
        );
        let targets = View::f32("targets", &multi.shape, &smooth);
        let files = [
            ("ce", hard),
            ("ce_smooth", grad("smooth", i32_view(&labels, &[shape[0]]), &["--label-smoothing", &smoothed])),
            ("ce_smooth", grad("soft", targets, &[])),
            ("bce", grad("multi", View::f32("targets", &multi.shape, &multi.values), &["--loss", "sigmoid"])),
        ];
        for (loss, file) in files {
            let got = file.f64("loss").unwrap()[0];
            let want = io.f64(&format!("loss.{loss}.f64")).unwrap()[0];
            assert!(near(got, want, 1e-5), "{case}: {loss}: {got}, not {want}");
            let head = file.shape("grad/head.weight").unwrap();
            assert_eq!(head[0], classes, "{case}: timm's names and shapes");
        }
        cases += 1;
    }
    assert!(cases > 0, "the reference folder has no cases");
}

#[test]
fn replay_writes_a_trajectory() {
    let Some(folder) = reference().map(|f| f.join("optim")) else { return };
    let stored = SafeTensors::open(&folder.join("sgd.safetensors")).unwrap();
    let settings: serde_json::Value = serde_json::from_str(&stored.metadata()["optim"]).unwrap();
    let source = SafeTensors::open(&folder.join("batches.safetensors")).unwrap();
    let (shape, labels) = (source.shape("images_u8").unwrap().to_vec(), source.i64("labels").unwrap());
    let pixels = source.bytes("images_u8").unwrap();
    let images = normalised(pixels);
    let steps = shape[0];

    // U8 pixels with I32 labels, and normalised ones with I64 labels.
    let forms = [
        vec![View::new("images_u8", Dtype::U8, &shape, pixels), i32_view(&labels, &shape[..2])],
        vec![View::f32("images", &shape, &images), View::i64("labels", &shape[..2], &labels)],
    ];
    let weights = folder.join("params.npz").display().to_string();
    for (form, views) in forms.into_iter().enumerate() {
        let (batches, out) = (path(&format!("batches-{form}")), path(&format!("trajectory-{form}")));
        write(Path::new(&batches), &Default::default(), views).unwrap();
        let mut args: Vec<String> = ["replay", "--weights", &weights, "--batches", &batches, "--out", &out]
            .map(str::to_owned)
            .to_vec();
        let set = [
            "optim.name=sgd".to_owned(),
            "optim.momentum=0.9".into(),
            format!("optim.lr={}", settings["base_lr"]),
            format!("optim.clip={}", settings["clip"]),
            "schedule.kind=cosine".into(),
            format!("schedule.total={}", settings["total_steps"]),
            format!("schedule.warmup={}", settings["warmup"]),
        ];
        args.extend(set.into_iter().flat_map(|s| ["--set".to_owned(), s]));
        vitrum(&args).ok();

        let file = SafeTensors::open(Path::new(&out)).unwrap();
        for name in ["losses", "grad_norms", "lrs"] {
            assert_eq!(
                (file.dtype(name).unwrap(), file.shape(name).unwrap()),
                (Dtype::F64, &[steps][..]),
                "{name}"
            );
            let (got, want) = (file.f64(name).unwrap(), stored.f64(&format!("traj.{name}")).unwrap());
            assert!(got.iter().zip(&want).all(|(g, w)| near(*g, *w, 1e-5)), "{name}: {got:?}, not {want:?}");
        }
        let finals: Vec<&str> = file.names().filter_map(|n| n.strip_prefix("final/")).collect();
        assert!(
            finals.contains(&"head.weight") && finals.contains(&"blocks.0.attn.qkv.weight"),
            "{finals:?}"
        );
        assert!(finals.iter().all(|n| file.dtype(&format!("final/{n}")).unwrap() == Dtype::F32));
        assert_eq!(file.names().count(), finals.len() + 3);
    }
    assert!(scratch().join("trajectory-1").exists());
}
