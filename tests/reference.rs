//! The model and the trainer against outputs of the real implementations: logits, losses, every gradient, optimiser
//! trajectories, a whole short training run. Skipped, with a line, where the reference folder is absent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vitrum::backend::{self, Device, Loss, LossKind, Pixels, Slot, SlotLayout, TargetKind};
use vitrum::check::{batch_file::BatchFile, replay};
use vitrum::infer::loaded::{LoadedModel, gradients, load_weights};
use vitrum::vit::{LastBlock, Mode, Vit};
use vitrum::weights::safetensors::{SafeTensors, View, write};
use vitrum::weights::{self, Numbering, Tensor, Tensors};

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

fn folders(of: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> =
        std::fs::read_dir(of).unwrap().flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    all.sort();
    all
}

fn rel_l2(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "sizes differ");
    let square = |x: f64| x * x;
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
    let norm: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    (error / norm.max(1e-300)).sqrt()
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The three losses of `vit/`: name, objective, whether targets are smoothed.
const LOSSES: [(&str, LossKind, bool); 3] = [
    ("ce", LossKind::Softmax, false),
    ("ce_smooth", LossKind::Softmax, true),
    ("bce", LossKind::Sigmoid, false),
];

/// The batch of a case, with the targets of one loss, as u8 pixels.
fn slot(run: &LoadedModel, io: &SafeTensors, loss: &str) -> Slot {
    let shape = io.shape("images_u8").unwrap();
    let targets = match loss {
        "bce" => TargetKind::Dense { classes: run.model.config.classes },
        _ => TargetKind::Labels,
    };
    let layout = SlotLayout { samples: shape[0], image: (shape[1], shape[2]), pixels: Pixels::U8, targets };
    let mut slot = run.backend.new_slot(layout).unwrap();
    slot.images_u8_mut().copy_from_slice(io.bytes("images_u8").unwrap());
    match loss {
        "bce" => slot.targets_mut().copy_from_slice(&io.tensor("multilabels").unwrap().values),
        _ => {
            let labels = io.i64("labels").unwrap();
            slot.labels_mut().iter_mut().zip(labels).for_each(|(to, label)| *to = label as i32);
        }
    }
    slot
}

/// Gradients as the reference names them.
fn flax_gradients(run: &mut LoadedModel, numbering: Numbering) -> Tensors {
    let mut own = Tensors::new();
    for param in run.model.layout.parameters() {
        let mut values = vec![0.0; param.len()];
        run.backend.read(param.grad().unwrap(), &mut values).unwrap();
        own.insert(param.name.clone(), Tensor::new(param.shape.clone(), param.to_file_order(&values)));
    }
    weights::to_flax_tensors(&run.model.config, numbering, &own).unwrap()
}

/// A file's model on the CPU, ready for gradients, with or without what nobody reads of its last block.
fn open(path: &Path, samples: usize, image: (usize, usize), last_block: LastBlock) -> LoadedModel {
    let mut file = weights::open(path, &Default::default()).unwrap();
    file.set_image(image).unwrap();
    let mut backend = backend::select(Device::Cpu, &Default::default()).unwrap();
    let (config, normalise, storage) = (file.config.clone(), file.meta.normalise, backend.storage());
    let model = Vit::new(config, normalise, samples, Mode::Train, storage, last_block, |_| false);
    backend.allocate(&model.plan()).unwrap();
    load_weights(&file, &model, &mut *backend).unwrap();
    LoadedModel { backend, model, meta: file.meta, unprepared: None, notes: file.notes }
}

#[test]
fn logits_losses_and_every_gradient_equal_the_reference() {
    let Some(folder) = reference() else { return };
    let mut compared = 0;
    for case in folders(&folder.join("vit")) {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let config = json(&case.join("config.json"));
        let io = SafeTensors::open(&case.join("io.safetensors")).unwrap();
        let side = |i: usize| config["image"][i].as_u64().unwrap() as usize;
        let samples = io.shape("images_u8").unwrap()[0];
        let path = case.join("params.npz");

        let mut files: BTreeMap<&str, Tensors> = BTreeMap::new();
        let stored = SafeTensors::open(&case.join("grads.safetensors")).unwrap();
        files.insert("ce", stored.names().map(|n| (n.to_string(), stored.tensor(n).unwrap())).collect());
        if let Ok(other) = SafeTensors::open(&case.join("grads_other_losses.safetensors")) {
            for key in other.names() {
                let (loss, name) = key.split_once(':').unwrap();
                let loss = LOSSES.iter().find(|l| l.0 == loss).unwrap().0;
                files.entry(loss).or_default().insert(name.to_string(), other.tensor(key).unwrap());
            }
        }

        for last_block in [LastBlock::Pruned, LastBlock::Whole] {
            let mut run = open(&path, samples, (side(0), side(1)), last_block);
            for (loss, kind, smooth) in LOSSES {
                let label_smoothing =
                    if smooth { config["label_smoothing"].as_f64().unwrap() as f32 } else { 0.0 };
                let batch = slot(&run, &io, loss);
                let report = gradients(
                    &mut *run.backend,
                    &run.model,
                    Loss { label_smoothing, ..Loss::plain(kind) },
                    batch,
                )
                .unwrap();
                let want = io.f64(&format!("loss.{loss}.f64")).unwrap()[0];
                assert!(
                    (report.loss - want).abs() <= 1e-5 * want.abs(),
                    "{name}, {last_block:?}: loss {loss}: {} for {want}",
                    report.loss
                );

                let mut logits = vec![0.0; samples * run.model.config.classes];
                run.backend.read(run.model.logits(), &mut logits).unwrap();
                let want: Vec<f32> = io.f64("logits_f64").unwrap().iter().map(|x| *x as f32).collect();
                let error = rel_l2(&logits, &want);
                assert!(error <= 1e-5, "{name}, {last_block:?}: logits differ by {error:.1e}");

                let Some(wanted) = files.get(loss) else { continue };
                let got = flax_gradients(&mut run, Numbering::Published);
                let largest = wanted.values().flat_map(|t| &t.values).fold(0.0f32, |m, v| m.max(v.abs()));
                if loss == "ce" {
                    assert_eq!(
                        got.len(),
                        wanted.len(),
                        "{name}, {last_block:?}: every parameter has a gradient"
                    );
                }
                for (tensor, want) in wanted {
                    let got = &got[tensor];
                    assert_eq!(got.shape, want.shape, "{name}, {last_block:?}: {tensor}");
                    if tensor.ends_with("key/bias") {
                        let noise = got.values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                        assert!(
                            noise <= 1e-6 * largest,
                            "{name}, {last_block:?}: {loss}: `{tensor}` is {noise:.1e}, not zero"
                        );
                        continue;
                    }
                    let error = rel_l2(&got.values, &want.values);
                    assert!(
                        error <= 1e-5,
                        "{name}, {last_block:?}: {loss}: gradient of `{tensor}` differs by {error:.1e}"
                    );
                    compared += 1;
                }
            }
        }
    }
    println!("{compared} gradients compared");
    assert!(compared > 0, "the reference folder has no cases");
}

/// The `--set` options that make the optimiser of one reference trajectory (`make/make_optim.py`).
fn optim_settings(kind: &str, o: &serde_json::Value) -> Vec<String> {
    let number = |key: &str| o[key].as_f64().unwrap();
    let mut set = vec![
        format!("schedule.total={}", o["total_steps"]),
        format!("schedule.warmup={}", o["warmup"]),
        "schedule.kind=cosine".to_string(),
    ];
    let mut add = |text: &str| set.extend(text.split(' ').map(str::to_string));
    let clip = number("clip");
    if kind.starts_with("sgd") {
        add(&format!("optim.name=sgd optim.momentum=0.9 optim.lr={} optim.clip={clip}", number("base_lr")));
        if kind.contains("bf16") {
            add("optim.moment=bf16");
        }
        return set;
    }
    if kind.starts_with("adamw") || kind == "torch_adamw" {
        add(&format!(
            "optim.name=adamw optim.lr={} optim.weight_decay={}",
            number("adam_lr"),
            number("wd_torch")
        ));
        match kind {
            "adamw_kernels" => add(&format!("optim.beta2=0.95 optim.clip={clip}")),
            _ => add("optim.clip=0 optim.decay_on=all"),
        }
        return set;
    }
    // big_vision's chain.
    add(&format!("optim.lr={} optim.weight_decay={} optim.clip={clip}", number("bv_lr"), number("wd_bv")));
    add("optim.decay_mode=big_vision optim.decay_on=kernels");
    match kind {
        "bv_adam" => add("optim.name=adam"),
        "bv_adam_bf16" => add("optim.name=adam optim.moment=bf16"),
        "bv_adafactor" => add("optim.name=adafactor optim.beta2_cap=0.95 optim.moment=bf16"),
        "bv_adafactor_f32" => add("optim.name=adafactor"),
        "bv_sgd_nesterov" => add("optim.name=sgd optim.momentum=0.9 optim.nesterov=true"),
        "bv_frozen" => {
            add("optim.name=adam");
            let head = format!(
                "{{pattern='head/.*', schedule={{kind='linear', warmup={}, total={}}}}}",
                o["warmup"], o["total_steps"]
            );
            let norm = format!(
                "{{pattern='Transformer/encoder_norm/.*', schedule={{kind='rsqrt', timescale=7.0, warmup=2, total={}}}}}",
                o["total_steps"]
            );
            set.push(format!("optim.groups=[{head}, {norm}, {{pattern='.*', frozen=true}}]"));
        }
        "bv_lr_mults" => {
            add("optim.name=adam");
            set.push(
                "optim.groups=[{pattern='head/kernel', lr_mult=3.0, decay_mult=1.0}, {pattern='head/bias', lr_mult=3.0, decay_mult=0.5}, \
                 {pattern='.*/kernel', lr_mult=0.25, decay_mult=1.0}, {pattern='.*/bias', lr_mult=0.25, decay_mult=0.5}, \
                 {pattern='.*', lr_mult=0.25, decay_mult=0.0}]"
                    .to_string(),
            );
        }
        "bv_rsqrt_cooldown" => {
            add("optim.name=adam");
            set.retain(|s| !s.starts_with("schedule.kind") && !s.starts_with("schedule.total"));
            set.extend(
                ["schedule.kind=rsqrt", "schedule.timescale=5", "schedule.cooldown=4"].map(str::to_string),
            );
        }
        other => panic!("the reference has an optimiser that this test does not know: `{other}`"),
    }
    set
}

#[test]
fn optimiser_trajectories_equal_the_reference() {
    let Some(folder) = reference().map(|f| f.join("optim")) else { return };
    let file = weights::open(&folder.join("params.npz"), &Default::default()).unwrap();
    let batches = BatchFile::open(&folder.join("batches.safetensors"), true).unwrap();
    let mut kinds = Vec::new();
    for entry in std::fs::read_dir(&folder).unwrap().flatten() {
        let path = entry.path();
        let stored =
            match path.extension().is_some_and(|e| e == "safetensors").then(|| SafeTensors::open(&path)) {
                Some(Ok(stored)) if stored.contains("traj.losses") => stored,
                _ => continue,
            };
        let kind = stored.metadata()["kind"].clone();
        let settings: serde_json::Value = serde_json::from_str(&stored.metadata()["optim"]).unwrap();
        let bf16 = kind.contains("bf16") || kind == "bv_adafactor";
        let mut file = file.clone();
        file.set_image(batches.layout.image).unwrap();
        let recipe = replay::recipe(&file.config, batches.layout.samples, batches.steps as u64);
        let recipe = recipe.with(&optim_settings(&kind, &settings)).unwrap_or_else(|e| panic!("{kind}: {e}"));
        let got = replay::run(&recipe, &file, &batches, Device::Cpu, |_, _| {}).unwrap();

        let near = |what: &str, got: &[f64], bound: f64| {
            let want = stored.f64(&format!("traj.{what}")).unwrap();
            for (step, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!(
                    (g - w).abs() <= bound * w.abs().max(1.0),
                    "{kind}: {what} at step {step}: {g}, not {w}"
                );
            }
        };
        near("losses", &got.losses, if bf16 { 3e-4 } else { 2e-6 });
        near("grad_norms", &got.grad_norms, if bf16 { 3e-3 } else { 1e-5 });
        near("lrs", &got.lrs, 1e-7); // stored from f32

        let to_flax =
            |tensors| weights::to_flax_tensors(&file.config, Numbering::Published, tensors).unwrap();
        let (end, start) = (to_flax(&got.weights), to_flax(&file.tensors.all().unwrap()));
        let (mut step_error, mut step_norm) = (0.0, 0.0);
        for (name, tensor) in end.iter().filter(|(name, _)| !name.ends_with("/key/bias")) {
            let want = stored.tensor(&format!("final:{name}")).unwrap();
            let error = rel_l2(&tensor.values, &want.values);
            assert!(
                error <= if bf16 { 5e-3 } else { 3e-6 },
                "{kind}: `{name}` differs by {error:.1e} at the end"
            );
            for ((g, w), s) in tensor.values.iter().zip(&want.values).zip(&start[name].values) {
                step_error += f64::from(g - w).powi(2);
                step_norm += f64::from(w - s).powi(2);
            }
        }
        let error = (step_error / step_norm).sqrt();
        assert!(error <= if bf16 { 1e-2 } else { 3e-5 }, "{kind}: the whole step differs by {error:.1e}");
        kinds.push(kind);
    }
    println!("{} trajectories: {}", kinds.len(), kinds.join(", "));
    assert!(!kinds.is_empty(), "the reference folder has no trajectories");
}

#[test]
fn timm_trajectories_equal_the_reference() {
    let Some(folder) = reference().map(|f| f.join("optim")) else { return };
    let stored = SafeTensors::open(&folder.join("torch_adamw.safetensors")).unwrap();
    let lrs = SafeTensors::open(&folder.join("adamw_all.safetensors")).unwrap();
    let o: serde_json::Value = serde_json::from_str(&lrs.metadata()["optim"]).unwrap();
    let batches = BatchFile::open(&folder.join("batches.safetensors"), true).unwrap();
    let mut file = weights::open(&folder.join("params.npz"), &Default::default()).unwrap();
    file.set_image(batches.layout.image).unwrap();
    for (case, extra) in [
        ("adamw_all", vec!["optim.decay_on=all", "optim.clip=0"]),
        ("adamw_timm_groups", vec!["optim.decay_on=timm", "optim.clip=1", "optim.clip_torch=true"]),
    ] {
        let mut set = optim_settings("adamw_all", &o);
        set.extend(extra.into_iter().map(str::to_string));
        let recipe =
            replay::recipe(&file.config, batches.layout.samples, batches.steps as u64).with(&set).unwrap();
        let got = replay::run(&recipe, &file, &batches, Device::Cpu, |_, _| {}).unwrap();
        let want = stored.f64(&format!("{case}.losses_f64")).unwrap();
        for (step, (g, w)) in got.losses.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= 2e-6, "{case}: loss at step {step}: {g}, not {w}");
        }
    }
}

#[test]
fn a_short_training_run_follows_the_reference() {
    let Some(folder) = reference().map(|f| f.join("e2e_short")) else { return };
    let data = SafeTensors::open(&folder.join("data.safetensors")).unwrap();
    let curves = SafeTensors::open(&folder.join("curves.safetensors")).unwrap();
    let images = data.bytes("train_images").unwrap();
    let (labels, order) = (data.i64("train_labels").unwrap(), data.i64("batch_order").unwrap());
    let shape = data.shape("train_images").unwrap().to_vec();
    let image_len: usize = shape[1..].iter().product();
    let (steps, batch) = (data.shape("batch_order").unwrap()[0], data.shape("batch_order").unwrap()[1]);

    // The batches in their order, as `vitrum replay` takes them.
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("batches.safetensors");
    let pixels: Vec<u8> =
        order.iter().flat_map(|i| &images[*i as usize * image_len..][..image_len]).copied().collect();
    let labels: Vec<i64> = order.iter().map(|i| labels[*i as usize]).collect();
    let stacked = [&[steps, batch], &shape[1..]].concat();
    let views = vec![
        View::new("images_u8", safetensors::Dtype::U8, &stacked, pixels),
        View::i64("labels", &[steps, batch], &labels),
    ];
    write(&path, &Default::default(), views).unwrap();
    let batches = BatchFile::open(&path, true).unwrap();
    let mut file = weights::open(&folder.join("params.npz"), &Default::default()).unwrap();
    file.set_image(batches.layout.image).unwrap();

    let common = ["optim.clip=1", "schedule.kind=cosine", "schedule.warmup=6"];
    let adam = ["optim.name=adam", "optim.lr=3e-3", "optim.weight_decay=1e-3", "optim.decay_mode=big_vision"];
    let runs: [(&str, Vec<&str>); 3] = [
        ("sgd", vec!["optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.05"]),
        ("bv_adam", adam.to_vec()),
        ("bv_adam_sigmoid", [&adam[..], &["loss.kind=sigmoid"]].concat()),
    ];
    for (name, own) in runs {
        let set: Vec<String> = common.iter().chain(&own).map(|s| s.to_string()).collect();
        let recipe = replay::recipe(&file.config, batch, steps as u64).with(&set).unwrap();
        let got = replay::run(&recipe, &file, &batches, Device::Cpu, |_, _| {}).unwrap();
        let want = curves.f64(&format!("{name}.f64.loss")).unwrap();
        for (step, (g, w)) in got.losses.iter().zip(&want).enumerate() {
            let bound = match step {
                0..20 => 1e-5f64.max(3e-6 * w),
                20..50 => 1e-4,
                _ => 2e-3,
            };
            assert!((g - w).abs() <= bound, "{name}: loss at step {step}: {g}, not {w}");
        }

        // Test accuracy after the last step.
        let tensors = got.weights;
        let trained = temporary.path().join(format!("{name}.safetensors"));
        weights::save(&trained, &file.config, &tensors, &file.meta).unwrap();
        let test_shape = data.shape("test_images").unwrap();
        let on = (Device::Cpu, &backend::DeviceOptions::default());
        let mut run =
            LoadedModel::open(&trained, &Default::default(), on, test_shape[0], Mode::Train, None).unwrap();
        let layout = SlotLayout {
            samples: test_shape[0],
            image: batches.layout.image,
            pixels: Pixels::U8,
            targets: TargetKind::Labels,
        };
        let mut slot = run.backend.new_slot(layout).unwrap();
        slot.images_u8_mut().copy_from_slice(data.bytes("test_images").unwrap());
        let test_labels = data.i64("test_labels").unwrap();
        slot.labels_mut().iter_mut().zip(test_labels).for_each(|(to, label)| *to = label as i32);
        let loss = Loss::plain(LossKind::Softmax);
        let report = gradients(&mut *run.backend, &run.model, loss, slot).unwrap();
        let want = *curves.f64(&format!("{name}.f64.test_acc")).unwrap().last().unwrap();
        let images = test_shape[0] as f64;
        assert!(
            (report.top1 - want).abs() * images <= 2.01,
            "{name}: test accuracy {}, not {want}",
            report.top1
        );
    }
}
