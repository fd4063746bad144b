//! Configurations beside weights, timm's and HuggingFace's: obeyed or refused by name.

use crate::support;

use std::collections::BTreeMap;
use std::path::Path;

use support::models::{bare, folder, json, picture, saved, settings_of, tiny};
use support::vitrum;
use vitrum::vit::config::ModelConfig;
use vitrum::weights::safetensors::{SafeTensors, View, write};
use vitrum::weights::{self, Format, ModelOverrides, Tensor, Tensors};

#[test]
fn a_timm_configuration_is_obeyed_or_refused_by_name() {
    let dir = folder("timm-config");
    bare(&dir, &ModelConfig { width: 64, heads: 1, image: (16, 32), ..tiny() }, &|_| ());
    let path = dir.to_str().unwrap();
    let card = serde_json::json!({
        "architecture": "vit_tiny_patch16_224", "num_classes": 3, "global_pool": "avg",
        "model_args": { "num_heads": 4, "global_pool": "avg", "fc_norm": false, "act_layer": "gelu_tanh" },
        "pretrained_cfg": {
            "input_size": [3, 16, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.8,
            "interpolation": "bicubic", "crop_mode": "squash", "label_names": ["n01440764", "n01443537", "hen"],
        },
    });
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut card = card.clone();
        change(&mut card);
        std::fs::write(dir.join("config.json"), card.to_string()).unwrap();
        vitrum(&["inspect", path, "--json"])
    };
    let shown = with(&|_| ()).ok().json();
    let expected = serde_json::json!([4, "gap", "before", "tanh", 1e-6, [16, 32], "n01440764"]);
    let fields = ["heads", "pool", "norm", "gelu", "ln_eps", "image"].map(|key| shown[key].clone());
    assert_eq!(serde_json::json!([&fields[..], &[shown["class_names"][0].clone()]].concat()), expected);
    let prepared = &shown["provenance"];
    assert_eq!(
        (&prepared["resize"], prepared["crop_ratio"].as_f64().map(|r| (r * 1e6).round())),
        (&"squash_bicubic".into(), Some(8e5))
    );
    assert!((prepared["normalise"]["mean"][0].as_f64().unwrap() - 123.675).abs() < 1e-4);
    let picture = picture(&dir);
    let top = vitrum(&["predict", "--weights", path, &picture]).ok().stdout;
    assert!(["tench", "goldfish", "hen"].iter().all(|name| top.contains(name)), "{top}");

    let size = with(&|c| c["model_args"]["img_size"] = serde_json::json!([32, 16])).ok().json();
    assert_eq!(size["image"], serde_json::json!([32, 16]), "the model's own comes first");
    let silent = with(&|c| c["pretrained_cfg"] = serde_json::json!({})).ok().json();
    assert_eq!((&silent["image"], &silent["provenance"]["crop_ratio"]), (&"unknown".into(), &0.875.into()));
    let clip = with(&|c| c["architecture"] = "vit_base_patch16_clip_224".into()).ok().json();
    assert_eq!(clip["ln_eps"], 1e-5);

    for (says, change) in [
        (
            "learned frequencies",
            &(|c: &mut serde_json::Value| c["architecture"] = "vit_base_patch16_rope_mixed_224".into())
                as &dyn Fn(&mut serde_json::Value),
        ),
        ("`global_pool` is `avgmax`", &|c| c["model_args"]["global_pool"] = "avgmax".into()),
        ("`act_layer` is `relu`", &|c| c["model_args"]["act_layer"] = "relu".into()),
        ("`norm_layer` is \"rmsnorm\"", &|c| c["model_args"]["norm_layer"] = "rmsnorm".into()),
        ("`final_norm` is false", &|c| c["model_args"]["final_norm"] = false.into()),
        ("`magic` is 3", &|c| c["model_args"]["magic"] = 3.into()),
        ("`num_classes` is 7, the tensors say 3", &|c| c["num_classes"] = 7.into()),
        ("`crop_pct` is 0", &|c| c["pretrained_cfg"]["crop_pct"] = 0.into()),
        ("`std` is [1,2]", &|c| c["pretrained_cfg"]["std"] = serde_json::json!([1, 2])),
    ] {
        with(change).exits(1).says(&["config.json", says]);
    }
    // An error that concerns only pictures stops no other command.
    for (key, value) in [("crop_mode", "border"), ("interpolation", "lanczos")] {
        let shown = with(&|c| c["pretrained_cfg"][key] = value.into()).ok().json();
        assert!(shown["unprepared"].as_str().unwrap().contains(value), "{shown}");
        vitrum(&["predict", "--weights", path, &picture]).exits(1).says(&[value, "--protocol timm"]);
        vitrum(&["predict", "--weights", path, &picture, "--protocol", "timm"]).ok();
        let out = dir.join("out.safetensors");
        vitrum(&["convert", path, out.to_str().unwrap()]).ok();
        let data = support::stripes();
        let tune = [
            "finetune",
            "--weights",
            path,
            "--data",
            data,
            "--out",
            "never",
            "--dry-run",
            "--set",
            "train.batch=16",
            "--set",
            "train.micro_batch=0",
        ];
        let refused = vitrum(&tune).exits(1).says(&[value]);
        vitrum(&[tune.map(String::from).to_vec(), settings_of(&refused.stderr)].concat()).ok();
    }
}

#[test]
fn a_preprocessor_is_obeyed_or_refused_by_name() {
    let dir = folder("preprocessor");
    let (source, _) = saved(&dir, &tiny());
    let hf = dir.join("hf");
    weights::convert(&source, &hf, Some(Format::Hf), &ModelOverrides::default()).unwrap();
    let (path, picture) = (hf.to_str().unwrap(), picture(&dir));
    let plain = serde_json::json!({
        "image_processor_type": "ViTImageProcessor", "do_resize": true, "size": { "height": 16, "width": 16 },
        "resample": 2, "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    });
    let with = |more: serde_json::Value| {
        let mut file = plain.clone();
        more.as_object().unwrap().iter().for_each(|(key, value)| file[key] = value.clone());
        std::fs::write(hf.join("preprocessor_config.json"), file.to_string()).unwrap();
        let file = weights::open(&hf, &ModelOverrides::default()).unwrap();
        (
            serde_json::to_value(file.meta.resize).unwrap(),
            file.meta.crop_ratio,
            file.meta.normalise,
            file.unprepared,
        )
    };
    let crop = serde_json::json!({ "height": 16, "width": 16 });
    for (more, resize, ratio, mean, std) in [
        (serde_json::json!({}), "squash_smooth", 1.0, 127.5, 127.5),
        (serde_json::json!({ "size": 16, "resample": 3 }), "squash_bicubic", 1.0, 127.5, 127.5),
        (serde_json::json!({ "do_normalize": false }), "squash_smooth", 1.0, 0.0, 255.0),
        (serde_json::json!({ "do_rescale": false }), "squash_smooth", 1.0, 0.5, 0.5),
        (serde_json::json!({ "rescale_factor": 1.0 / 127.5 }), "squash_smooth", 1.0, 63.75, 63.75),
        (
            serde_json::json!({ "size": { "shortest_edge": 20 }, "do_center_crop": true, "crop_size": crop }),
            "center_bilinear",
            0.8,
            127.5,
            127.5,
        ),
        (
            serde_json::json!({ "image_processor_type": "DeiTFeatureExtractor", "size": 20, "crop_size": 16 }),
            "squash_smooth",
            0.8,
            127.5,
            127.5,
        ),
        (
            serde_json::json!({ "image_processor_type": "BitImageProcessor", "size": 20, "crop_size": 16, "resample": 3 }),
            "center",
            0.8,
            127.5,
            127.5,
        ),
        (
            serde_json::json!({ "image_processor_type": "ViTImageProcessorFast" }),
            "squash_smooth",
            1.0,
            127.5,
            127.5,
        ),
    ] {
        let (found, crop_ratio, normalise, unprepared) = with(more.clone());
        assert_eq!((found, crop_ratio, unprepared), (resize.into(), ratio, None), "{more}");
        let near = |a: f32, b: f32| (a - b).abs() < 1e-4;
        assert!(near(normalise.mean[0], mean) && near(normalise.std[1], std), "{more}: {normalise:?}");
    }
    for (more, says) in [
        (serde_json::json!({ "do_resize": false }), "`do_resize` is false"),
        (serde_json::json!({ "resample": 1 }), "`resample` is 1"),
        (serde_json::json!({ "size": { "longest_edge": 16 } }), "`size` is"),
        (serde_json::json!({ "size": { "shortest_edge": 16 } }), "pictures would differ in size"),
        (serde_json::json!({ "size": 12, "do_center_crop": true, "crop_size": 16 }), "`crop_size` of 16x16"),
        (serde_json::json!({ "size": 24 }), "pictures of 24x24, and the model takes 16x16"),
        (serde_json::json!({ "do_pad": true }), "`do_pad` is true"),
        (serde_json::json!({ "crop_pct": 0.9 }), "`crop_pct` is 0.9"),
        (serde_json::json!({ "image_processor_type": "BeitImageProcessor" }), "`BeitImageProcessor`"),
    ] {
        assert!(with(more.clone()).3.is_some_and(|why| why.contains(says)), "{more}");
        vitrum(&["predict", "--weights", path, &picture]).exits(1).says(&[says, "--protocol"]);
        vitrum(&["predict", "--weights", path, &picture, "--protocol", "hf"]).ok();
    }
    // Other kinds of models, and sizes that the tensors do not have.
    let config = json(&hf.join("config.json"));
    for (key, value, says) in [
        ("model_type", serde_json::json!("swin"), "`model_type` is `swin`"),
        ("hidden_size", 24.into(), "`hidden_size` is 24, the tensors say 12"),
        ("intermediate_size", 24.into(), "`intermediate_size` is 24, the tensors say 20"),
        ("patch_size", 8.into(), "`patch_size` is 8, the tensors say 4"),
        ("problem_type", "regression".into(), "`problem_type` is `regression`"),
        ("pooler_act", "gelu".into(), "`pooler_act` is `gelu`"),
    ] {
        let mut changed = config.clone();
        changed[key] = value;
        std::fs::write(hf.join("config.json"), changed.to_string()).unwrap();
        vitrum(&["inspect", path]).exits(1).says(&["config.json", says]);
    }
    let mut changed = config.clone();
    changed["problem_type"] = "multi_label_classification".into();
    std::fs::write(hf.join("config.json"), changed.to_string()).unwrap();
    let loss = weights::open(&hf, &ModelOverrides::default()).unwrap().meta.loss;
    assert_eq!(loss, Some(vitrum::backend::LossKind::Sigmoid));
    // DeiT's mean, if the folder has no such file.
    changed["model_type"] = "deit".into();
    std::fs::write(hf.join("config.json"), changed.to_string()).unwrap();
    std::fs::remove_file(hf.join("preprocessor_config.json")).unwrap();
    let meta = weights::open(&hf, &ModelOverrides::default()).unwrap().meta;
    assert_eq!((meta.normalise.mean[0], meta.crop_ratio), (123.675, 0.875));
}

#[test]
fn a_configuration_without_a_model_type_is_read_or_said_to_be_none() {
    let dir = folder("no-type");
    let (source, _) = saved(&dir, &tiny());
    let hf = dir.join("hf");
    weights::convert(&source, &hf, Some(Format::Hf), &ModelOverrides::default()).unwrap();
    // Only the configuration says what the tensors do not.
    let tensors = SafeTensors::open(&hf.join("model.safetensors")).unwrap();
    let all: Vec<_> = tensors.names().map(|n| (n.to_string(), tensors.tensor(n).unwrap())).collect();
    let views = all.iter().map(|(n, t)| View::f32(n, &t.shape, &t.values)).collect();
    write(&hf.join("model.safetensors"), &BTreeMap::new(), views).unwrap();
    let path = hf.to_str().unwrap();
    let mut config = json(&hf.join("config.json"));
    let fields = config.as_object_mut().unwrap();
    fields.remove("model_type");
    fields["num_attention_heads"] = 2.into();
    fields["layer_norm_eps"] = 1e-3.into();
    fields["id2label"] = serde_json::json!(["ant", "bee", "cow"]);
    fields.remove("label2id");
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut config = config.clone();
        change(&mut config);
        std::fs::write(hf.join("config.json"), config.to_string()).unwrap();
        vitrum(&["inspect", path, "--json"])
    };
    std::fs::remove_file(hf.join("preprocessor_config.json")).unwrap();
    for (class, mean) in
        [(Some("ViTForImageClassification"), 127.5), (Some("DeiTModel"), 123.675), (None, 127.5)]
    {
        let shown =
            with(&|c| c["architectures"] = class.map_or(serde_json::json!(null), |c| [c].into())).ok();
        let shown = shown.json();
        assert_eq!((&shown["heads"], &shown["ln_eps"]), (&2.into(), &1e-3.into()));
        assert_eq!(shown["class_names"], serde_json::json!(["ant", "bee", "cow"]));
        let found = shown["provenance"]["normalise"]["mean"][0].as_f64().unwrap();
        assert!((found - mean).abs() < 1e-3, "{class:?}: {found}");
        let notes = shown["notes"].to_string();
        assert!(notes.contains("no `model_type`: read as"), "{notes}");
    }
    with(&|c| c["architectures"] = ["SwinModel"].into()).exits(1).says(&["`architectures` is `SwinModel`"]);
    with(&|c| c["architectures"] = ["ViTHybridModel"].into()).exits(1).says(&["ViTHybridModel"]);
    with(&|c| c["model_type"] = 3.into()).exits(1).says(&["`model_type` is 3"]);
    let other = with(&|c| *c = serde_json::json!({ "name": "project", "image_size": 3 })).ok().json();
    assert_eq!(other["image"], serde_json::json!([16, 16]), "one key is not enough");
    assert!(other["notes"].to_string().contains("config.json is not used"), "{}", other["notes"]);
}

#[test]
fn class_names_are_used_or_a_line_says_why_not() {
    let dir = folder("names");
    bare(&dir, &ModelConfig { width: 64, heads: 1, ..tiny() }, &|_| ());
    let path = dir.to_str().unwrap();
    let timm =
        serde_json::json!({ "architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {} });
    let hf = serde_json::json!({ "model_type": "vit", "num_attention_heads": 1 });
    let shown = |config: &serde_json::Value, key: &str, value: serde_json::Value| {
        let mut config = config.clone();
        config[key] = value;
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        vitrum(&["inspect", path, "--json"])
    };
    for (config, key, value) in [
        (&timm, "label_names", serde_json::json!({ "0": "ant", "1": "bee", "2": "cow" })),
        (&timm, "id2label", serde_json::json!({ "0": "ant", "1": "bee", "2": "cow" })),
        (
            &timm,
            "pretrained_cfg",
            serde_json::json!({ "label_names": ["ant", "bee", "cow"], "num_classes": 1000 }),
        ),
        (&hf, "id2label", serde_json::json!(["ant", "bee", "cow"])),
        (&hf, "label2id", serde_json::json!({ "ant": 0, "bee": "1", "cow": 2 })),
    ] {
        let names = shown(config, key, value).ok().json()["class_names"].clone();
        assert_eq!(names, serde_json::json!(["ant", "bee", "cow"]), "{key}");
    }
    // What contradicts is not used, by any command; `tests` of the names have every kind.
    shown(&hf, "id2label", serde_json::json!({ "1": "ant", "2": "bee", "3": "cow" })).ok();
    let picture = picture(&dir);
    let said =
        "names are not used: `id2label` names classes up to number 3, counted from 1, and the head has 3";
    let top = vitrum(&["predict", "--weights", path, &picture]).ok().says(&[said]).stdout;
    assert!(!top.contains("ant") && !top.contains("bee"), "{top}");
    // A head of another size belongs to another model.
    for (config, key, value) in [
        (&timm, "num_classes", serde_json::json!(0)),
        (&timm, "model_args", serde_json::json!({ "num_classes": 5 })),
        (&hf, "num_labels", 5.into()),
        (&hf, "num_classes", 5.into()),
    ] {
        let done = shown(config, key, value).exits(1);
        done.says(&["the tensors say 3", "hint: if config.json is another model's", "to 3"]);
    }
}

#[test]
fn heads_that_contradict_are_errors_and_the_hint_works_when_typed() {
    let dir = folder("heads");
    let config = ModelConfig { width: 24, heads: 3, ..tiny() };
    let picture = picture(&dir);
    let says_heads = |heads: usize| {
        let json = serde_json::json!({ "model_type": "vit", "num_attention_heads": heads });
        std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
    };
    let typed = |file: &Path, says: &str| {
        let file = file.to_str().unwrap();
        vitrum(&["inspect", file]).exits(1).says(&[says]);
        let refused = vitrum(&["predict", "--weights", file, &picture]).exits(1).says(&[says, "hint: "]);
        let settings = settings_of(&refused.stderr);
        assert_eq!(settings.len(), 2, "{}", refused.stderr);
        let predict = ["predict", "--weights", file, &picture].map(String::from);
        vitrum(&[&predict[..], &settings].concat()).ok();
    };
    says_heads(5);
    typed(&bare(&dir, &config, &|_| ()), "config.json: 5 heads, which do not divide the width 24");
    let (own, _) = saved(&dir, &config);
    typed(&own, "config.json: 5 heads, the file's own metadata says 3");
    // In an `.npz`, the shapes decide.
    let npz = dir.join("model.npz");
    says_heads(3);
    vitrum(&["convert", own.to_str().unwrap(), npz.to_str().unwrap()]).ok();
    says_heads(4);
    typed(&npz, "config.json: 4 heads, the tensors say 3");
    std::fs::remove_file(dir.join("config.json")).unwrap();
    let npz = npz.to_str().unwrap();
    for command in [vec!["inspect", npz], vec!["predict", "--weights", npz, &picture]] {
        let with = |heads: &'static str| vitrum(&[&command[..], &["--set", heads]].concat());
        with("model.heads=4").exits(2).says(&["`model.heads` is 4, the tensors say 3", "hint: leave it out"]);
        with("model.heads=3").ok();
    }
}

#[test]
fn means_are_known_by_what_the_file_is_or_asked_for() {
    let dir = folder("means");
    let config = ModelConfig { width: 64, heads: 1, ..tiny() };
    let open = |path: &Path, pairs: &[(&str, &str)]| {
        let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        weights::open_backbone(path, &ModelOverrides::from_sets(&pairs).unwrap()).unwrap()
    };
    let imagenet = |file: &weights::ModelFile| file.meta.normalise.mean == [123.675, 116.28, 103.53];
    let plain = open(&bare(&dir, &config, &|_| ()), &[]);
    assert!(
        !imagenet(&plain) && plain.notes.iter().any(|note| note.contains("data.mean")),
        "{:?}",
        plain.notes
    );
    let path = dir.join("model.safetensors");
    let set = [("data.mean", "[0.485,0.456,0.406]"), ("data.std", "0.229,0.224,0.225")];
    assert!(imagenet(&open(&path, &set)));
    std::fs::copy(&path, dir.join("deit_small.safetensors")).unwrap();
    assert!(imagenet(&open(&dir.join("deit_small.safetensors"), &[])));
    let decoder = |t: &mut Tensors| {
        t.insert("mask_token".into(), Tensor::new([1, 1, 64], vec![0.0; 64]));
        t.insert("decoder_embed.weight".into(), Tensor::new([8, 64], vec![0.0; 512]));
    };
    let mae = open(&bare(&dir, &config, &decoder), &[]);
    assert!(imagenet(&mae) && mae.notes.iter().any(|note| note.contains("pre-training")), "{:?}", mae.notes);
    assert!(ModelOverrides::from_sets(&[("data.std".into(), "0,1,1".into())]).is_err());
}
