//! Weights in and out: `vitrum convert` between all layouts, and what it refuses.

use crate::support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use support::models::{assert_same, folder, json, sample, saved, tiny};
use support::vitrum;
use vitrum::backend::{Device, DeviceOptions, Pixels, SlotLayout, StepKeys, TargetKind};
use vitrum::infer::loaded::LoadedModel;
use vitrum::vit::Mode;
use vitrum::vit::config::{ModelConfig, NormPlace, PoolKind, Posemb, PosembJoin, QkvBias};
use vitrum::weights::safetensors::{SafeTensors, View, write};
use vitrum::weights::{
    self, AdaptTarget, CheckpointMeta, Format, HeadPolicy, ModelFile, ModelOverrides, Tensor, Tensors,
};

/// The folder of reference outputs. A test without it says so and passes.
fn reference() -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/reference");
    let dir = PathBuf::from(std::env::var_os("VITRUM_REFERENCE").unwrap_or(default.into()));
    if !dir.is_dir() {
        println!("skipped: no reference data at {} (set VITRUM_REFERENCE)", dir.display());
        return None;
    }
    Some(dir)
}

fn sets(pairs: &[(&str, &str)]) -> ModelOverrides {
    let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    ModelOverrides::from_sets(&pairs).unwrap()
}

/// Heads and image size of a reference case, for layouts that cannot store them.
fn of_case(case: &Path) -> ModelOverrides {
    let config = json(&case.join("config.json"));
    let image = format!("{}x{}", config["image"][0], config["image"][1]);
    sets(&[("model.heads", &config["heads"].to_string()), ("model.image", &image)])
}

const FORMATS: [(Format, &str); 4] = [
    (Format::Safetensors, "a.safetensors"),
    (Format::Timm, "b.safetensors"),
    (Format::Hf, "c"),
    (Format::Npz, "d.npz"),
];

// ---- Round trips ----

#[test]
fn the_reference_weights_go_round_through_every_layout_to_the_bit() {
    let Some(reference) = reference() else { return };
    let dir = folder("round");
    let mut sources = Vec::new();
    for case in
        std::fs::read_dir(reference.join("vit")).unwrap().flatten().map(|e| e.path()).filter(|p| p.is_dir())
    {
        let overrides = of_case(&case);
        for file in
            ["params.npz", "params_linen.npz"].map(|f| case.join(f)).into_iter().filter(|f| f.exists())
        {
            sources.push((file, case.join("params.npz"), overrides.clone()));
        }
        let elsewhere = reference.join("weights").join(case.file_name().unwrap());
        let hf = dir.join("hf");
        if elsewhere.join("hf.safetensors").exists() {
            std::fs::create_dir_all(&hf).unwrap();
            std::fs::copy(elsewhere.join("hf.safetensors"), hf.join("model.safetensors")).unwrap();
            std::fs::copy(elsewhere.join("hf_config.json"), hf.join("config.json")).unwrap();
            sources.push((hf, case.join("params.npz"), overrides.clone()));
        }
        if elsewhere.join("timm.safetensors").exists() {
            sources.push((elsewhere.join("timm.safetensors"), case.join("params.npz"), overrides));
        }
    }
    assert!(sources.len() >= 5, "the reference folder has few weights");
    let mut written = 0;
    for (source, published, overrides) in &sources {
        let place = source.display();
        let first = weights::open(source, overrides).unwrap();
        let tensors = first.tensors.all().unwrap();
        for (format, name) in FORMATS {
            let out = dir.join(name);
            if let Err(e) = weights::convert(source, &out, Some(format), overrides) {
                let holds_not = first.config.rep_size > 0 || first.config.pool != PoolKind::Token;
                assert!(holds_not && format != Format::Npz && format != Format::Safetensors, "{place}: {e}");
                continue;
            }
            written += 1;
            let back = weights::open(&out, overrides).unwrap();
            assert_same(&back.tensors.all().unwrap(), &tensors);
            if format != Format::Npz {
                assert_eq!(back.config, first.config, "{place} as {name}");
                // A HuggingFace folder prepares pictures as transformers does, whatever the model was trained
                // with. Its sizes are whole pixels, so the crop ratio is exact for them.
                let CheckpointMeta { resize, crop_ratio, .. } =
                    if format == Format::Hf { &back.meta } else { &first.meta };
                let meta = CheckpointMeta { resize: *resize, crop_ratio: *crop_ratio, ..first.meta.clone() };
                assert_eq!((back.meta, back.grid_known), (meta, true));
            }
            // By every route, the final `.npz` holds the arrays of the published one.
            let end = dir.join("end.npz");
            weights::convert(&out, &end, None, overrides).unwrap();
            let (got, expected) = (npz_tensors(&end), npz_tensors(published));
            assert_same(&got, &expected);
        }
    }
    assert!(written >= 3 * sources.len(), "only {written} files were written");
}

fn npz_tensors(path: &Path) -> Tensors {
    let npz = weights::npz::Npz::open(path).unwrap();
    npz.names().map(|name| (name.to_string(), npz.tensor(name).unwrap())).collect()
}

#[test]
fn every_architecture_goes_round_or_is_refused_and_nothing_is_written() {
    use Format::{Hf, Npz, Safetensors, Timm};
    let dir = folder("architectures");
    let fixed = Posemb::Sincos2d;
    let (before, gap) = (PosembJoin::Before, PoolKind::Gap);
    let average = ModelConfig { pool: gap, extra_tokens: 0, ..tiny() };
    let cases: [(&str, ModelConfig, &[Format]); 12] = [
        ("plain", tiny(), &[Safetensors, Timm, Hf, Npz]),
        ("no bias of q, k, v", ModelConfig { qkv_bias: QkvBias::None, ..tiny() }, &[Safetensors, Timm, Hf]),
        ("oblong", ModelConfig { image: (8, 24), patch: (4, 8), ..tiny() }, &[Safetensors, Timm, Hf, Npz]),
        ("representation layer", ModelConfig { rep_size: 5, ..tiny() }, &[Safetensors, Npz]),
        ("LayerScale", ModelConfig { layer_scale: 1e-4, ..tiny() }, &[Safetensors, Timm]),
        ("distilled", ModelConfig { extra_tokens: 2, ..tiny() }, &[Safetensors, Timm]),
        ("average", average.clone(), &[Safetensors, Timm, Npz]),
        (
            "average, then norm",
            ModelConfig { norm: NormPlace::After, ..average.clone() },
            &[Safetensors, Timm],
        ),
        ("average with a class token", ModelConfig { pool: gap, ..tiny() }, &[Safetensors, Timm, Npz]),
        ("attention", ModelConfig { pool: PoolKind::Map, ..average.clone() }, &[Safetensors, Timm, Npz]),
        ("fixed", ModelConfig { posemb: fixed, posemb_join: before, ..average }, &[Safetensors, Timm, Npz]),
        ("positions first", ModelConfig { posemb_join: before, ..tiny() }, &[Safetensors, Timm, Npz]),
    ];
    for (name, config, held) in cases {
        let (source, tensors) = saved(&dir, &config);
        for (format, out) in FORMATS {
            let out = dir.join(name).with_extension(out);
            let written = weights::convert(&source, &out, Some(format), &ModelOverrides::default());
            if !held.contains(&format) {
                let error = written.map(|_| ()).expect_err(name);
                assert_eq!(error.exit_code(), 1, "{name}: {error}");
                assert!(error.message().contains("own.safetensors: cannot be written as"), "{name}: {error}");
                assert!(!out.exists(), "{name}: {}", out.display());
                continue;
            }
            let (_, notes) = written.unwrap_or_else(|e| panic!("{name} as {format:?}: {e}"));
            // The settings that the notes give for reading it back.
            let pairs: Vec<(String, String)> = notes
                .iter()
                .flat_map(|note| note.split(['`', ' ']))
                .filter_map(|word| word.split_once('='))
                .map(|(key, value)| (key.to_string(), value.to_string()))
                .collect();
            assert!(format == Npz || pairs.is_empty(), "{name}: {notes:?}");
            let back = weights::open(&out, &ModelOverrides::from_sets(&pairs).unwrap()).unwrap();
            if format == Npz && name == "positions first" {
                // The row that vit_jax has for the class token is zero.
                let posemb = back.tensors.get("pos_embed").unwrap().values;
                assert_eq!(
                    (&posemb[..12], &posemb[12..]),
                    (&[0.0; 12][..], &tensors["pos_embed"].values[..])
                );
                continue;
            }
            assert_same(&back.tensors.all().unwrap(), &tensors);
            let same = ModelConfig {
                // No tensor shows these, and none of them changes what the model computes.
                layer_scale: config.layer_scale,
                init: config.init,
                posemb_join: config.posemb_join,
                ..back.config
            };
            assert_eq!(same, config, "{name} as {format:?}");
        }
    }
}

#[test]
fn an_npz_says_what_to_set_when_it_is_read_back() {
    let dir = folder("lost");
    let config = ModelConfig { gelu: vitrum::backend::Gelu::Erf, ln_eps: 1e-12, image: (8, 32), ..tiny() };
    let (source, _) = saved(&dir, &config);
    let out = dir.join("out.npz");
    let done = vitrum(&["convert", source.to_str().unwrap(), out.to_str().unwrap()]).ok();
    let settings = "--set model.gelu=erf --set model.ln_eps=1e-12 --set model.image=8x32";
    done.says(&["warning: an `.npz` holds tensors only", settings]);
}

#[test]
fn a_grid_that_nobody_knows_stays_out_of_the_metadata() {
    let dir = folder("grid");
    let (source, tensors) = saved(&dir, &ModelConfig { image: (8, 24), ..tiny() });
    let (npz, own, hf) = (dir.join("a.npz"), dir.join("a.safetensors"), dir.join("a-hf"));
    let none = ModelOverrides::default();
    weights::convert(&source, &npz, None, &none).unwrap();
    weights::convert(&npz, &own, Some(Format::Safetensors), &none).unwrap();
    let mut back = weights::open(&own, &none).unwrap();
    assert!(!back.grid_known);
    assert_same(&back.tensors.all().unwrap(), &tensors);
    back.set_image((8, 24)).unwrap();
    let error = weights::convert(&npz, &hf, Some(Format::Hf), &none).map(|_| ()).unwrap_err();
    assert!(error.hint_text().unwrap().contains("--set model.image="), "{error}");
    assert!(!hf.exists());
    weights::convert(&npz, &hf, Some(Format::Hf), &sets(&[("model.image", "8x24")])).unwrap();
    assert_eq!(json(&hf.join("config.json"))["image_size"], serde_json::json!([8, 24]));
}

// ---- HuggingFace ----

#[test]
fn a_huggingface_folder_holds_configuration_and_class_names() {
    let dir = folder("hf-names");
    let meta = CheckpointMeta {
        classes: Some(["cat", "dog", "hen"].map(String::from).into()),
        ..Default::default()
    };
    let source = dir.join("own.safetensors");
    weights::save(&source, &tiny(), &sample(&tiny()), &meta).unwrap();
    let out = dir.join("hf");
    vitrum(&["convert", source.to_str().unwrap(), out.to_str().unwrap(), "--to", "hf"]).ok();
    // Once more into the same folder, and never among other things.
    vitrum(&["convert", source.to_str().unwrap(), out.to_str().unwrap(), "--to", "hf"]).ok();
    for to in ["hf", "timm"] {
        let beside = out.parent().unwrap();
        vitrum(&["convert", source.to_str().unwrap(), beside.to_str().unwrap(), "--to", to])
            .exits(1)
            .says(&["holds other things: `", "hint: name a new folder"]);
    }
    let config = json(&out.join("config.json"));
    assert_eq!(config["id2label"], serde_json::json!({"0": "cat", "1": "dog", "2": "hen"}));
    assert_eq!(
        (&config["hidden_act"], &config["layer_norm_eps"]),
        (&"gelu_pytorch_tanh".into(), &1e-6.into())
    );
    assert_eq!((&config["image_size"], &config["patch_size"]), (&16.into(), &4.into()));

    // A user edits the configuration: it takes precedence over the file's metadata.
    let edited =
        serde_json::to_string(&config).unwrap().replace("\"hen\"", "\"cock\"").replace("_pytorch_tanh", "");
    std::fs::write(out.join("config.json"), edited).unwrap();
    let file = weights::open(&out, &ModelOverrides::default()).unwrap();
    assert_eq!(file.config.gelu, vitrum::backend::Gelu::Erf);
    assert_eq!(file.meta.classes.unwrap()[2], "cock");
    let shown = vitrum(&["inspect", out.to_str().unwrap(), "--json"]).ok().json();
    assert_eq!((&shown["layout"], &shown["heads"]), (&"huggingface".into(), &3.into()));
    assert_eq!(shown["missing"], serde_json::json!([]));

    std::fs::write(out.join("config.json"), "{\"model_type\": \"vit\", \"hidden_act\": \"relu\"}").unwrap();
    vitrum(&["inspect", out.to_str().unwrap()]).exits(1).says(&["config.json: `hidden_act` is `relu`"]);
}

#[test]
fn a_model_without_a_classifier_is_read_for_another_head() {
    let dir = folder("base");
    let config = ModelConfig { classes: 0, rep_size: 12, ..tiny() };
    let (source, tensors) = saved(&dir, &config);
    let hf = dir.join("vit-model");
    weights::convert(&source, &hf, Some(Format::Hf), &ModelOverrides::default()).unwrap();
    assert!(SafeTensors::open(&hf.join("model.safetensors")).unwrap().contains("pooler.dense.weight"));
    assert_eq!(json(&hf.join("config.json"))["architectures"][0], "ViTModel");

    let file = weights::open_backbone(&hf, &ModelOverrides::default()).unwrap();
    assert_same(&file.tensors.all().unwrap(), &tensors);
    assert_eq!((file.config.classes, file.config.rep_size), (0, 12));
    let error = weights::open(&hf, &ModelOverrides::default()).map(|_| ()).unwrap_err();
    assert!(error.message().contains("features without a classifier"), "{error}");
    let without = weights::adapt(file.clone(), &AdaptTarget::default()).map(|_| ()).unwrap_err();
    assert!(without.message().contains("it has no head"), "{without}");
    let (file, notes) =
        weights::adapt(file, &AdaptTarget { classes: Some(4), ..Default::default() }).unwrap();
    assert_eq!(notes.last().unwrap(), "head added: 4 classes, all zero");
    assert_eq!(file.tensors.get("head.weight").unwrap(), Tensor::new([4, 12], vec![0.0; 48]));
    assert_eq!(file.config.rep_size, 0);
}

fn logits(file_at: &Path, overrides: &ModelOverrides, io: &SafeTensors) -> Vec<f32> {
    let shape = io.shape("images_u8").unwrap().to_vec();
    let image = (shape[1], shape[2]);
    let on = (Device::Cpu, &DeviceOptions::default());
    let mut run = LoadedModel::open(file_at, overrides, on, shape[0], Mode::Infer, Some(image)).unwrap();
    forward(&mut run, io)
}

fn forward(run: &mut LoadedModel, io: &SafeTensors) -> Vec<f32> {
    let shape = io.shape("images_u8").unwrap();
    let layout = SlotLayout {
        samples: shape[0],
        image: (shape[1], shape[2]),
        pixels: Pixels::U8,
        targets: TargetKind::Labels,
    };
    let mut slot = run.backend.new_slot(layout).unwrap();
    slot.images_u8_mut().copy_from_slice(io.bytes("images_u8").unwrap());
    let b = &mut *run.backend;
    b.bind_batch(slot).unwrap();
    b.begin_step(StepKeys { seed: 0, step: 0 }).unwrap();
    b.begin_micro(vitrum::backend::Micro::whole(shape[0])).unwrap();
    run.model.forward(b, false).unwrap();
    let mut logits = vec![0.0; shape[0] * run.model.config.classes];
    b.read(run.model.logits(), &mut logits).unwrap();
    logits
}

#[track_caller]
fn assert_near(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let difference: f64 = got.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|b| b * b).sum();
    let error = (difference / norm).sqrt();
    assert!(error <= bound, "{what}: {error:e}");
}

#[test]
fn every_naming_gives_the_logits_of_its_library() {
    let Some(reference) = reference() else { return };
    let dir = folder("logits");
    let mut compared = 0;
    for case in std::fs::read_dir(reference.join("weights")).unwrap().flatten().map(|e| e.path()) {
        if !case.is_dir() {
            continue;
        }
        let vit = reference.join("vit").join(case.file_name().unwrap());
        let (config, expected) =
            (json(&vit.join("config.json")), SafeTensors::open(&case.join("logits.safetensors")).unwrap());
        let io = SafeTensors::open(&vit.join("io.safetensors")).unwrap();
        let heads = config["heads"].to_string();
        let image = format!("{}x{}", config["image"][0], config["image"][1]);
        for name in expected.names().filter(|n| n.ends_with("logits_f64")) {
            let fields: Vec<&str> = name.split('.').collect();
            let gelu = if fields[1].contains("tanh") { "tanh" } else { "erf" };
            let mut set = vec![("model.gelu", gelu), ("model.image", image.as_str())];
            let file = if fields[0] == "timm" {
                set.push(("model.heads", &heads));
                case.join("timm.safetensors")
            } else {
                // The configuration beside the weights gives the number of heads, erf and 1e-12.
                std::fs::copy(case.join("hf.safetensors"), dir.join("model.safetensors")).unwrap();
                std::fs::copy(case.join("hf_config.json"), dir.join("config.json")).unwrap();
                match fields[2] {
                    "eps1e-12" => set.clear(),
                    eps => set.push(("model.ln_eps", eps.trim_start_matches("eps"))),
                }
                dir.clone()
            };
            let got = logits(&file, &sets(&set), &io);
            assert_near(name, &got, &expected.f64(name).unwrap(), 1e-5);
            compared += 1;
        }
    }
    assert!(compared >= 4, "only {compared} sets of logits were compared");
}

/// The model that vit_jax loads for fine-tuning computes the same features.
#[test]
fn an_adapted_model_computes_the_features_of_vit_jax() {
    let Some(reference) = reference() else { return };
    let posemb = reference.join("posemb");
    let after = SafeTensors::open(&posemb.join("finetune_after_load.safetensors")).unwrap();
    let shape = after.shape("images_u8").unwrap().to_vec();
    let file = weights::open(&posemb.join("finetune_pretrained.npz"), &ModelOverrides::default()).unwrap();
    let width = file.config.width;
    let target = AdaptTarget {
        image: Some((shape[1], shape[2])),
        classes: Some(width),
        head: HeadPolicy::Reset,
        ..Default::default()
    };
    let (file, _): (ModelFile, _) = weights::adapt(file, &target).unwrap();
    // With an identity matrix as head, logits are features.
    let mut tensors = file.tensors.all().unwrap();
    let head = tensors.get_mut("head.weight").unwrap();
    (0..width).for_each(|i| head.values[i * width + i] = 1.0);
    let path = folder("features").join("m.safetensors");
    weights::save(&path, &file.config, &tensors, &CheckpointMeta::default()).unwrap();
    let got = logits(&path, &ModelOverrides::default(), &after);
    assert_near("features", &got, &after.f64("features").unwrap(), 1e-5);
}

// ---- How pictures are prepared ----

#[test]
fn what_a_library_cannot_do_is_said_and_what_it_can_is_written() {
    use vitrum::recipe::EvalResize;
    let dir = folder("prepared");
    let source = dir.join("own.safetensors");
    let imagenet =
        vitrum::backend::Normalise { mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375] };
    for (resize, crop_ratio, timm, hf) in [
        (EvalResize::SquashBicubic, 1.0, ("squash", "bicubic"), ("ViTImageProcessor", 16, 3)),
        (EvalResize::SquashSmooth, 0.8, ("squash", "bilinear"), ("DeiTImageProcessor", 20, 2)),
        (EvalResize::Center, 0.8, ("center", "bicubic"), ("BitImageProcessor", 20, 3)),
        (EvalResize::CenterBilinear, 1.0, ("center", "bilinear"), ("BitImageProcessor", 16, 2)),
        (EvalResize::Squash, 1.0, ("squash", "bilinear"), ("ViTImageProcessor", 16, 2)),
        (EvalResize::AreaCenter, 0.8, ("center", "bilinear"), ("BitImageProcessor", 20, 2)),
    ] {
        let classes = Some(["cat", "dog", "hen"].map(String::from).into());
        let meta = CheckpointMeta { classes, resize, crop_ratio, normalise: imagenet, ..Default::default() };
        weights::save(&source, &tiny(), &sample(&tiny()), &meta).unwrap();
        let exact = !matches!(resize, EvalResize::Squash | EvalResize::AreaCenter);
        for to in ["timm", "hf"] {
            let out = dir.join(to);
            let done = vitrum(&["convert", source.to_str().unwrap(), out.to_str().unwrap(), "--to", to]).ok();
            assert_eq!(done.stderr.contains("accuracy may differ"), !exact, "{resize:?}: {}", done.stderr);
            let back = weights::open(&out, &ModelOverrides::default()).unwrap();
            assert_eq!((back.meta.normalise, back.config.heads, back.unprepared), (imagenet, 3, None));
            assert_eq!(back.meta.classes.as_deref().unwrap()[2], "hen");
            assert!(
                !exact || (back.meta.resize, back.meta.crop_ratio) == (resize, crop_ratio),
                "{:?}",
                back.meta
            );
        }
        let card = json(&dir.join("timm/config.json"));
        assert_eq!(
            (&card["pretrained_cfg"]["crop_mode"], &card["pretrained_cfg"]["interpolation"]),
            (&timm.0.into(), &timm.1.into())
        );
        assert_eq!(card["pretrained_cfg"]["mean"], serde_json::json!([0.485, 0.456, 0.406]));
        assert_eq!((&card["model_args"]["num_heads"], &card["num_classes"]), (&3.into(), &3.into()));
        let file = json(&dir.join("hf/preprocessor_config.json"));
        let size = file["size"]["height"].as_u64().or(file["size"]["shortest_edge"].as_u64());
        assert_eq!(
            (&file["image_processor_type"], size, &file["resample"]),
            (&hf.0.into(), Some(hf.1), &hf.2.into())
        );
        assert_eq!(file["image_std"], serde_json::json!([0.229, 0.224, 0.225]));
    }
    // The state dict alone, if OUT is a file.
    let alone = dir.join("alone.safetensors");
    vitrum(&["convert", source.to_str().unwrap(), alone.to_str().unwrap(), "--to", "timm"]).ok();
    assert!(alone.is_file());
}

// ---- Names ----

#[test]
fn tensors_are_renamed_and_left_out_by_pattern() {
    let dir = folder("rename");
    let config = ModelConfig { width: 64, heads: 1, ..tiny() };
    let tensors = sample(&config);
    let path = dir.join("wrapped.safetensors");
    let mut views: Vec<View> =
        tensors.iter().map(|(n, t)| View::f32(format!("module.{n}"), &t.shape, &t.values)).collect();
    views.push(View::f32("module.ema_step", &[1], &[3.0]));
    write(&path, &BTreeMap::new(), views).unwrap();
    let (wrapped, out) = (path.to_str().unwrap(), dir.join("out.safetensors"));
    let out_text = out.to_str().unwrap();
    let hint = "'weights.rename=^module\\.=>'";
    vitrum(&["convert", wrapped, out_text]).exits(1).says(&[
        "are timm's after `module.`",
        "`module.ema_step`",
        hint,
    ]);
    let rename = "weights.rename=^module\\.=>";
    vitrum(&["convert", wrapped, out_text, "--set", rename])
        .exits(1)
        .says(&["not part of the model: `ema_step`", "--set 'weights.exclude=ema_step'"]);
    assert!(!out.exists());
    vitrum(&["convert", wrapped, out_text, "--set", rename, "--set", "weights.exclude=module\\.ema_.*"]).ok();
    let back = weights::open(&out, &ModelOverrides::default()).unwrap();
    assert_same(&back.tensors.all().unwrap(), &tensors);
    vitrum(&["convert", wrapped, out_text, "--set", "weights.rename=^module"]).exits(2).says(&["REGEX=>NEW"]);
    vitrum(&["convert", wrapped, out_text, "--set", "weights.exclude=("]).exits(2);
    vitrum(&["convert", wrapped, out_text, "--set", "weights.rename=.*=>x"])
        .exits(1)
        .says(&["the same name `x`"]);
}

#[test]
fn inspect_lists_what_is_missing_unexpected_or_of_another_shape() {
    let dir = folder("inspect");
    let mut tensors = sample(&tiny());
    tensors.remove("blocks.1.norm2.bias");
    tensors.insert("extra".into(), Tensor::new([2], vec![0.0; 2]));
    tensors.insert("blocks.0.norm1.bias".into(), Tensor::new([5], vec![0.0; 5]));
    let path = dir.join("m.safetensors");
    let views = tensors.iter().map(|(n, t)| View::f32(n, &t.shape, &t.values)).collect();
    write(&path, &BTreeMap::new(), views).unwrap();
    let json = vitrum(&["inspect", path.to_str().unwrap(), "--json"]).ok().json();
    assert_eq!(json["missing"], serde_json::json!(["`blocks.1.norm2.bias` [12]"]));
    assert_eq!(json["unexpected"], serde_json::json!(["`extra`"]));
    assert_eq!(json["reshaped"], serde_json::json!(["`blocks.0.norm1.bias` is [5] and should be [12]"]));
    let text = vitrum(&["inspect", path.to_str().unwrap()]).ok().stdout;
    assert!(text.contains("missing: `blocks.1.norm2.bias` [12]\n"), "{text}");
}

#[test]
fn an_augreg_file_name_is_explained_and_short_names_are_found() {
    let dir = folder("augreg");
    let stem = "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0";
    let (source, _) = saved(&dir, &tiny());
    let out = dir.join(format!("{stem}.npz"));
    weights::convert(&source, &out, None, &ModelOverrides::default()).unwrap();
    let name = format!("{}/augreg:S/16", dir.display());
    let json = vitrum(&["inspect", &name, "--json"]).ok().json();
    assert_eq!((&json["augreg"]["model"], &json["augreg"]["weight_decay"]), (&"S/16".into(), &0.03.into()));
    vitrum(&["inspect", "howto-i21k-B/16"]).exits(1).says(&[
        "aug_medium1-wd_0.1",
        "curl -L",
        "vit_models/augreg",
    ]);
    vitrum(&["inspect", "augreg:Q/16"]).exits(2).says(&["there are Ti/16"]);
}
