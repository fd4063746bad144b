//! Tests every layout against the reference files, and against malicious files.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::npz::tests::{npy, write_npz};
use super::safetensors::SafeTensors;
use super::*;
use crate::backend::Gelu;
use crate::recipe::EvalResize;
use crate::rng::{Domain, Stream};
use crate::vit::config::{NormPlace, PoolKind, PosembJoin};
use crate::vit::params::initial_values;

/// The folder of reference outputs. A test without it says so and passes.
pub(super) fn reference() -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/reference");
    let dir = PathBuf::from(std::env::var_os("VITRUM_REFERENCE").unwrap_or(default.into()));
    if !dir.is_dir() {
        println!("skipped: no reference data at {} (set VITRUM_REFERENCE)", dir.display());
        return None;
    }
    Some(dir)
}

/// Folders of `reference/KIND`, with their names.
fn cases(kind: &str) -> Vec<(String, PathBuf)> {
    let Some(dir) = reference() else { return Vec::new() };
    let mut cases: Vec<_> = std::fs::read_dir(dir.join(kind))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), p))
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "no cases in {kind}");
    cases
}

fn model_npz(path: &Path) -> Vec<PathBuf> {
    ["params.npz", "params_linen.npz"].into_iter().map(|f| path.join(f)).filter(|p| p.exists()).collect()
}

/// `--set` for what a file cannot say: here, a grid that is not square.
fn image_of(case: &Path) -> ModelOverrides {
    let config: Value = serde_json::from_slice(&std::fs::read(case.join("config.json")).unwrap()).unwrap();
    let side = |i: usize| config["image"][i].as_u64().unwrap() as usize;
    ModelOverrides { image: Some((side(0), side(1))), ..Default::default() }
}

/// A small model with every value different.
pub(super) fn sample(config: &ModelConfig) -> Tensors {
    let layout = ParamLayout::new(config, |_| false);
    let mut s = Stream::new(7, Domain::Init, 1 << 40, 0);
    let tensor = |p: &Param, s: &mut Stream| {
        Tensor::new(p.shape.clone(), (0..p.len()).map(|_| s.normal() as f32).collect())
    };
    layout.parameters().map(|p| (p.name.clone(), tensor(p, &mut s))).collect()
}

pub(super) fn tiny() -> ModelConfig {
    let mut config = ModelConfig::variant("testing/4", 16, 3).unwrap();
    (config.width, config.heads, config.mlp, config.depth) = (12, 3, 20, 2);
    config
}

pub(super) fn write_flax(path: &Path, prefix: &str, tensors: &Tensors) {
    let members: Vec<_> = tensors
        .iter()
        .map(|(name, t)| {
            (format!("{prefix}{name}"), npy("<f4", false, &t.shape, bytemuck::cast_slice(&t.values)))
        })
        .collect();
    write_npz(path, false, &members);
}

fn bits(tensors: &Tensors) -> Vec<(&str, &[usize], Vec<u32>)> {
    tensors
        .iter()
        .map(|(n, t)| (n.as_str(), t.shape.as_slice(), t.values.iter().map(|v| v.to_bits()).collect()))
        .collect()
}

#[track_caller]
pub(super) fn assert_same(a: &Tensors, b: &Tensors) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (x, y) in bits(a).into_iter().zip(bits(b)) {
        assert!(x == y, "`{}` differs", x.0);
    }
}

#[track_caller]
pub(super) fn assert_fails(result: Result<ModelFile>, code: i32, parts: &[&str]) {
    let error = result.map(|_| ()).expect_err("should be refused");
    let text = error.to_string();
    assert_eq!(error.exit_code(), code, "{text}");
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

#[test]
fn published_files_give_the_models_of_their_cases() {
    for (name, case) in cases("vit") {
        let expected: Value =
            serde_json::from_slice(&std::fs::read(case.join("config.json")).unwrap()).unwrap();
        for path in model_npz(&case) {
            let file = open(&path, &image_of(&case)).unwrap();
            let c = &file.config;
            let found = json!({
                "image": c.image, "patch": c.patch, "width": c.width, "depth": c.depth, "heads": c.heads,
                "mlp": c.mlp, "classes": c.classes, "pool": c.pool, "posemb": c.posemb, "gelu": c.gelu,
                "rep_size": if c.rep_size > 0 { json!(c.rep_size) } else { Value::Null }, "dropout": c.dropout,
            });
            for (key, value) in found.as_object().unwrap() {
                assert_eq!(value, &expected[key], "{name}: {key}");
            }
            assert_eq!(c.ln_eps, expected["ln_eps"].as_f64().unwrap() as f32);
            assert_eq!((file.layout, file.grid_known), (LayoutKind::VitJax, true));
            assert_eq!((c.norm, c.posemb_join), (NormPlace::Before, PosembJoin::After));
            // The case's own `config.json` is of neither library.
            assert!(
                file.notes.iter().all(|note| note.starts_with("config.json is not used")),
                "{:?}",
                file.notes
            );

            let described = describe(&path, &ModelOverrides::default()).unwrap();
            for key in ["width", "depth", "heads", "patch", "classes", "pool"] {
                assert_eq!(described[key], expected[key], "{name}: {key}");
            }
            assert_eq!(described["params"], ParamLayout::new(c, |_| false).count());
        }
    }
}

#[test]
fn a_grid_that_is_not_square_is_known_once_the_image_is() {
    for (_, case) in cases("vit") {
        let mut file = open(&case.join("params.npz"), &ModelOverrides::default()).unwrap();
        let image = image_of(&case).image.unwrap();
        let square = image.0 * file.config.patch.1 == image.1 * file.config.patch.0;
        assert_eq!(file.grid_known, square);
        if !square {
            assert_eq!(describe(&file.path, &ModelOverrides::default()).unwrap()["image"], "unknown");
        }
        let (ph, pw) = file.config.patch;
        let error = file.set_image((image.0 + ph, image.1 + pw)).unwrap_err();
        assert!(error.message().contains("the position embedding has"), "{error}");
        file.set_image(image).unwrap();
        assert_eq!((file.config.image, file.grid_known), (image, true));
    }
}

#[test]
fn npz_maps_to_timm_to_the_bit() {
    for (name, case) in cases("weights") {
        let npz_case = case.join("../../vit").join(&name);
        let ours = open(&npz_case.join("params.npz"), &image_of(&npz_case)).unwrap();
        let heads = ModelOverrides { heads: Some(ours.config.heads), ..image_of(&npz_case) };
        let timm = open(&case.join("timm.safetensors"), &heads).unwrap();
        assert_same(&ours.tensors.all().unwrap(), &timm.tensors.all().unwrap());
        assert_eq!(timm.layout, LayoutKind::Timm);
        assert_eq!((timm.config.gelu, timm.config.ln_eps), (Gelu::Erf, 1e-6));
        let like_ours = ModelConfig { gelu: Gelu::Tanh, init: ours.config.init, ..timm.config.clone() };
        assert_eq!(like_ours, ours.config);
        assert_eq!(describe(&timm.path, &ModelOverrides::default()).unwrap()["heads"], "unknown");
    }
}

#[test]
fn both_numberings_hold_the_same_tensors() {
    for (_, case) in cases("vit") {
        if let [published, linen] = model_npz(&case).as_slice() {
            let [a, b] = [published, linen].map(|p| open(p, &ModelOverrides::default()).unwrap());
            assert_same(&a.tensors.all().unwrap(), &b.tensors.all().unwrap());
            assert_eq!(a.config, b.config);
        }
    }
}

#[test]
fn flax_and_ours_go_round_to_the_bit() {
    for (_, case) in cases("vit") {
        for (path, numbering) in model_npz(&case).into_iter().zip([Numbering::Published, Numbering::Linen]) {
            let npz = npz::Npz::open(&path).unwrap();
            let names: Vec<String> = npz.names().map(String::from).collect();
            let stored: Tensors = names.into_iter().map(|n| (n.clone(), npz.tensor(&n).unwrap())).collect();
            let file = open(&path, &image_of(&case)).unwrap();
            let back = to_flax_tensors(&file.config, numbering, &file.tensors.all().unwrap()).unwrap();
            assert_same(&back, &stored);
            assert_same(&from_flax_tensors(&back).unwrap(), &file.tensors.all().unwrap());
        }
    }
}

#[test]
fn stored_gradients_map_to_our_names() {
    for (_, case) in cases("vit") {
        let file = SafeTensors::open(&case.join("grads.safetensors")).unwrap();
        let stored: Tensors = file.names().map(|n| (n.to_string(), file.tensor(n).unwrap())).collect();
        let config = open(&case.join("params.npz"), &image_of(&case)).unwrap().config;
        let ours = from_flax_tensors(&stored).unwrap();
        let shapes = ours.iter().map(|(n, t)| (n.clone(), t.shape.clone())).collect();
        Misfits::of(&ParamLayout::new(&config, |_| false), &shapes).refuse().unwrap();
        assert_same(&to_flax_tensors(&config, Numbering::Published, &ours).unwrap(), &stored);
    }
}

#[test]
fn what_is_saved_is_read_back_with_its_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let mut variants = vec![tiny()];
    variants.push(ModelConfig { image: (8, 24), rep_size: 5, gelu: Gelu::Erf, ln_eps: 1e-12, ..tiny() });
    variants.push(ModelConfig { extra_tokens: 2, layer_scale: 1e-5, drop_path: 0.1, ..tiny() });
    variants.push(ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, norm: NormPlace::After, ..tiny() });
    variants.push(ModelConfig { pool: PoolKind::Map, extra_tokens: 0, image: (12, 20), ..tiny() });
    variants.push(ModelConfig { posemb: Posemb::Sincos2d, posemb_join: PosembJoin::Before, ..tiny() });
    variants.push(ModelConfig { posemb_join: PosembJoin::Before, patch: (2, 8), ..tiny() });
    for config in variants {
        let meta = CheckpointMeta {
            classes: Some(["a", "b", "ç"].map(String::from).into()),
            step: Some(70),
            top1: Some(0.1 + 0.2),
            crop_ratio: 0.875,
            ..Default::default()
        };
        let tensors = sample(&config);
        save(&path, &config, &tensors, &meta).unwrap();
        let file = open(&path, &ModelOverrides::default()).unwrap();
        assert_eq!((&file.config, &file.meta), (&config, &meta));
        assert_eq!((file.layout, file.grid_known), (LayoutKind::Vitrum, true));
        assert_same(&file.tensors.all().unwrap(), &tensors);
        // timm needs the table in the file if the model has one.
        assert!(SafeTensors::open(&path).unwrap().contains("pos_embed"));
        let described = describe(&path, &ModelOverrides::default()).unwrap();
        assert_eq!(described["heads"], 3);
        assert_eq!(described["params"], ParamLayout::new(&config, |_| false).count());
        assert_eq!(described["provenance"]["step"], 70);
    }
}

#[test]
fn load_into_gives_memory_order_and_refuses_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let config = tiny();
    let tensors = sample(&config);
    save(&path, &config, &tensors, &CheckpointMeta::default()).unwrap();
    let file = open(&path, &ModelOverrides::default()).unwrap();
    let layout = ParamLayout::new(&config, |_| false);
    let mut seen = Tensors::new();
    load_into(&file, &layout, |p, values| {
        seen.insert(p.name.clone(), Tensor::new(p.shape.clone(), p.to_file_order(values)));
        Ok(())
    })
    .unwrap();
    assert_same(&seen, &tensors);

    let other = ModelConfig { depth: 3, classes: 4, extra_tokens: 0, pool: PoolKind::Gap, ..config };
    let mut written = 0;
    let error = load_into(&file, &ParamLayout::new(&other, |_| false), |_, _| {
        written += 1;
        Ok(())
    })
    .unwrap_err();
    assert_eq!(written, 0);
    for part in [
        "missing: `blocks.2.norm1.weight` [12]",
        "wrong shape: `pos_embed` is [1, 17, 12] and should be [1, 16, 12]",
        "`head.weight` is [3, 12] and should be [4, 12]",
        "not part of the model: `cls_token`",
    ] {
        assert!(error.message().contains(part), "{error}");
    }
}

/// big_vision's spellings of one model: prefixes, three places of the position embedding, stacked blocks, a
/// MAP head without a module of its own.
#[test]
fn big_vision_files_of_every_age_are_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bv.npz");
    let config =
        ModelConfig { pool: PoolKind::Map, extra_tokens: 0, posemb_join: PosembJoin::Before, ..tiny() };
    let tensors = sample(&config);
    let flax = to_flax_tensors(&config, Numbering::BigVision, &tensors).unwrap();
    let renamed = |from: &str, to: &str| -> Tensors {
        flax.iter().map(|(n, t)| (n.replace(from, to), t.clone())).collect()
    };
    let mut stacked = Tensors::new();
    for (name, tensor) in &flax {
        match crate::vit::names::block_of(name, "Transformer/encoderblock_", '/') {
            None => {
                stacked.insert(name.clone(), tensor.clone());
            }
            Some((layer, suffix)) => {
                let shape = [&[2], tensor.shape.as_slice()].concat();
                let zeros = vec![0.0; 2 * tensor.values.len()];
                let all = stacked
                    .entry(format!("Transformer/encoderblock/{suffix}"))
                    .or_insert(Tensor::new(shape, zeros));
                all.values[layer * tensor.values.len()..][..tensor.values.len()]
                    .copy_from_slice(&tensor.values);
            }
        }
    }
    let files = [
        ("", flax.clone()),
        ("params/", flax.clone()),
        ("opt/target/", flax.clone()),
        ("", renamed("MAPHead_0/", "")),
        ("", renamed("pos_embedding", "Transformer/pos_embedding")),
        ("", renamed("pos_embedding", "Transformer/posembed_input/pos_embedding")),
        ("params/", stacked),
    ];
    for (prefix, tensors_of_file) in files {
        let mut with_state = Tensors::new();
        if !prefix.is_empty() {
            with_state.insert("opt/0/count".into(), Tensor::new([1], vec![3.0]));
        }
        let named = tensors_of_file.iter().map(|(n, t)| (format!("{prefix}{n}"), t.clone()));
        with_state.extend(named);
        write_flax(&path, "", &with_state);
        let file = open(&path, &ModelOverrides::default()).unwrap();
        assert_same(&file.tensors.all().unwrap(), &tensors);
        assert_eq!(file.layout, LayoutKind::BigVision);
        assert_eq!((file.meta.resize, file.meta.crop_ratio), (EvalResize::AreaCenter, 0.875));
        assert_eq!((file.config.pool, file.config.extra_tokens, file.config.heads), (PoolKind::Map, 0, 3));
    }
}

#[test]
fn a_class_row_is_folded_into_the_class_token_where_positions_come_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bv.npz");
    let config = tiny();
    let tensors = sample(&config);
    let mut flax = to_flax_tensors(&config, Numbering::Linen, &tensors).unwrap();
    let posemb = flax.remove("Transformer/posembed_input/pos_embedding").unwrap();
    flax.insert("pos_embedding".into(), posemb.clone());
    write_flax(&path, "", &flax);
    let file = open(&path, &ModelOverrides::default()).unwrap();
    assert_eq!((file.config.posemb_join, file.config.extra_tokens), (PosembJoin::Before, 1));
    assert_eq!(file.tensors.get("pos_embed").unwrap().values, posemb.values[12..]);
    let cls = &file.tensors.get("cls_token").unwrap().values;
    for (i, value) in cls.iter().enumerate() {
        assert_eq!(*value, tensors["cls_token"].values[i] + posemb.values[i]);
    }
    // With a row of zeros for the token, vit_jax's layout holds the same model.
    let folded = file.tensors.all().unwrap();
    let there = to_flax_tensors(&file.config, Numbering::Published, &folded).unwrap();
    write_flax(&path, "", &there);
    let back = open(&path, &ModelOverrides::default()).unwrap();
    assert_eq!(back.config.posemb_join, PosembJoin::After);
    let back = back.tensors.all().unwrap();
    assert_eq!(back["cls_token"], folded["cls_token"]);
    assert_eq!(back["pos_embed"].values[..12], [0.0; 12]);
    assert_eq!(back["pos_embed"].values[12..], folded["pos_embed"].values);
}

#[test]
fn a_file_without_position_embedding_has_the_fixed_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bv.npz");
    let config = ModelConfig {
        pool: PoolKind::Gap,
        extra_tokens: 0,
        posemb: Posemb::Sincos2d,
        posemb_join: PosembJoin::Before,
        rep_size: 12,
        ..tiny()
    };
    let tensors = sample(&config);
    write_flax(&path, "params/", &to_flax_tensors(&config, Numbering::BigVision, &tensors).unwrap());
    let mut file = open(&path, &ModelOverrides::default()).unwrap();
    assert_eq!((file.config.posemb, file.config.posemb_join), (Posemb::Sincos2d, PosembJoin::Before));
    assert_eq!((file.layout, file.grid_known), (LayoutKind::BigVision, false));
    assert_same(&file.tensors.all().unwrap(), &tensors);
    file.set_image((24, 8)).unwrap();
    assert_eq!(file.config.patch_grid().patches(), 12);
}

#[test]
fn what_the_user_sets_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    save(&path, &tiny(), &sample(&tiny()), &CheckpointMeta::default()).unwrap();
    let set = |key: &str, value: &str| {
        open(&path, &ModelOverrides::from_sets(&[(key.to_string(), value.to_string())]).unwrap())
    };
    assert_eq!(set("model.heads", "6").unwrap().config.heads, 6);
    assert_eq!(set("model.gelu", "erf").unwrap().config.gelu, Gelu::Erf);
    assert_eq!(set("model.ln_eps", "1e-5").unwrap().config.ln_eps, 1e-5);
    assert_eq!(set("model.pool", "gap").unwrap().config.pool, PoolKind::Gap);
    assert_fails(set("model.heads", "5"), 2, &["`model.heads` is 5", "--set model.heads=4"]);
    assert_fails(set("model.pool", "map"), 1, &["missing: `attn_pool.latent`"]);
    assert_fails(set("model.image", "32"), 1, &["17 rows", "32x32", "needs 65"]);
    assert_fails(set("model.image", "18"), 2, &["does not divide"]);
    assert_fails(set("model.posemb", "sincos2d"), 2, &["posemb_join"]);
}

#[test]
fn timm_files_without_metadata_need_heads_that_are_64_wide() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("timm.safetensors");
    let write = |config: &ModelConfig| {
        let tensors = sample(config);
        let views = tensors.iter().map(|(n, t)| View::f32(n, &t.shape, &t.values)).collect();
        safetensors::write(&path, &BTreeMap::new(), views).unwrap();
        tensors
    };
    write(&tiny());
    assert_fails(open(&path, &ModelOverrides::default()), 1, &["timm.safetensors", "--set model.heads=1"]);

    let wide = ModelConfig { width: 128, heads: 2, layer_scale: 1e-4, ..tiny() };
    let tensors = write(&wide);
    let file = open(&path, &ModelOverrides::default()).unwrap();
    assert_eq!((file.config.heads, file.notes.len()), (2, 2));
    assert!(file.config.layer_scale > 0.0);
    assert_same(&file.tensors.all().unwrap(), &tensors);

    // DeiT-III's spelling of LayerScale, and no row for the class token.
    let views = tensors.iter().filter(|(n, _)| *n != "pos_embed").map(|(n, t)| {
        let name = n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2");
        View::f32(name, &t.shape, &t.values)
    });
    let posemb = [0.5; 16 * 128];
    let views = views.chain([View::f32("pos_embed", &[1, 16, 128], &posemb)]).collect();
    safetensors::write(&path, &BTreeMap::new(), views).unwrap();
    let file = open(&path, &ModelOverrides::default()).unwrap();
    assert_eq!((file.config.posemb_join, file.config.image), (PosembJoin::Before, (16, 16)));
    assert_eq!(file.tensors.get("blocks.1.ls2.gamma").unwrap(), tensors["blocks.1.ls2.gamma"]);
}

#[test]
fn other_models_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.npz");
    let flax = to_flax_tensors(&tiny(), Numbering::Published, &sample(&tiny())).unwrap();
    for (name, kind) in [
        ("conv_root/kernel", "hybrid"),
        ("gn_root/scale", "hybrid"),
        ("block1/unit1/conv1/kernel", "hybrid"),
        ("MixerBlock_0/token_mixing/Dense_0/kernel", "MLP-Mixer"),
    ] {
        let mut with = flax.clone();
        with.insert(name.into(), Tensor::new([1], vec![0.0]));
        write_flax(&path, "", &with);
        assert_fails(open(&path, &ModelOverrides::default()), 1, &["w.npz", name, kind]);
        assert_eq!(describe(&path, &ModelOverrides::default()).unwrap_err().exit_code(), 1);
    }
    write_flax(&path, "params/img/", &flax);
    assert_fails(open(&path, &ModelOverrides::default()), 1, &["two towers"]);
    write_flax(&path, "", &Tensors::from([("conv1.weight".into(), Tensor::new([1], vec![0.0]))]));
    assert_fails(open(&path, &ModelOverrides::default()), 1, &["not a Vision Transformer", "`conv1.weight`"]);
}

#[test]
fn broken_files_are_refused_with_file_and_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.npz");
    let flax = to_flax_tensors(&tiny(), Numbering::Published, &sample(&tiny())).unwrap();
    let opened = |change: &dyn Fn(&mut Tensors)| {
        let mut changed = flax.clone();
        change(&mut changed);
        write_flax(&path, "", &changed);
        // Values are read only when they are needed.
        open(&path, &ModelOverrides::default()).and_then(|file| file.tensors.all().map(|_| file))
    };
    let q = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel";
    let nan = |t: &mut Tensors| t.get_mut(q).unwrap().values[5] = f32::NAN;
    assert_fails(opened(&nan), 1, &["w.npz", q, "NaN"]);
    let infinite = |t: &mut Tensors| t.get_mut("head/bias").unwrap().values[0] = f32::INFINITY;
    assert_fails(opened(&infinite), 1, &["`head/bias` holds inf"]);
    let no_q = |t: &mut Tensors| drop(t.remove(q));
    assert_fails(opened(&no_q), 1, &["2 of the 3 parts of `blocks.1.attn.qkv.weight`"]);
    let no_norm = |t: &mut Tensors| drop(t.remove("Transformer/encoder_norm/bias"));
    assert_fails(opened(&no_norm), 1, &["missing: `norm.bias` [12]"]);
    let extra = |t: &mut Tensors| drop(t.insert("Transformer/extra".into(), Tensor::new([1], vec![0.0])));
    assert_fails(opened(&extra), 1, &["not part of the model: `Transformer/extra`"]);
    let flat = |t: &mut Tensors| t.get_mut(q).unwrap().shape = vec![12, 12];
    assert_fails(opened(&flat), 1, &[q, "[12, 12]"]);
    let heads = |t: &mut Tensors| t.get_mut(q).unwrap().shape = vec![12, 6, 2];
    assert_fails(opened(&heads), 1, &[q]);
    let gap = |t: &mut Tensors| {
        *t = t.iter().map(|(n, v)| (n.replace("block_1/", "block_2/"), v.clone())).collect()
    };
    assert_fails(opened(&gap), 1, &["block 1 is missing"]);
    assert_fails(open(&dir.path().join("absent.npz"), &ModelOverrides::default()), 1, &["absent.npz"]);
    assert_fails(
        open(dir.path(), &ModelOverrides::default()),
        1,
        &["no `checkpoints/best`", "run directory"],
    );

    let path = dir.path().join("m.safetensors");
    save(&path, &tiny(), &sample(&tiny()), &CheckpointMeta::default()).unwrap();
    let whole = SafeTensors::open(&path).unwrap();
    let tensors = sample(&tiny());
    let views = || tensors.iter().map(|(n, t)| View::f32(n, &t.shape, &t.values)).collect();
    for (from, to, expected) in [
        ("\"depth\":2", "\"depth\":99999999999", "the metadata says depth 99999999999, the tensors say 2"),
        ("\"image\":[16,16]", "\"image\":[16,9999999999]", "9999999999 pixels"),
        ("\"heads\":3", "\"heads\":5", "`model.heads` is 5"),
        ("\"heads\":3", "\"heads\":-3", "metadata `vitrum.model` does not parse"),
        ("\"gelu\":\"tanh\"", "\"gelu\":\"relu\"", "unknown variant `relu`"),
    ] {
        let mut metadata = whole.metadata().clone();
        let model = metadata[MODEL_KEY].replace(from, to);
        assert_ne!(model, metadata[MODEL_KEY]);
        metadata.insert(MODEL_KEY.into(), model);
        safetensors::write(&path, &metadata, views()).unwrap();
        assert_fails(open(&path, &ModelOverrides::default()), 1, &["m.safetensors", expected]);
    }
    let meta = CheckpointMeta { classes: Some(vec!["one".into()]), ..Default::default() };
    save(&path, &tiny(), &tensors, &meta).unwrap();
    assert_fails(open(&path, &ModelOverrides::default()), 1, &["1 class names for 3 classes"]);
}

#[test]
fn a_run_directory_gives_its_best_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = dir.path().join("checkpoints");
    for step in ["step-1", "step-2"] {
        let folder = checkpoints.join(step);
        std::fs::create_dir_all(&folder).unwrap();
        let meta = CheckpointMeta { recipe: Some(step.into()), ..Default::default() };
        save(&folder.join("model.safetensors"), &tiny(), &sample(&tiny()), &meta).unwrap();
    }
    let step = |path: &Path| open(path, &ModelOverrides::default()).unwrap().meta.recipe.unwrap();
    std::os::unix::fs::symlink("step-2", checkpoints.join("last")).unwrap();
    assert_eq!(step(dir.path()), "step-2");
    std::os::unix::fs::symlink("step-1", checkpoints.join("best")).unwrap();
    assert_eq!(step(dir.path()), "step-1");
    std::fs::remove_file(checkpoints.join("best")).unwrap();
    std::fs::write(checkpoints.join("best"), "step-1\n").unwrap();
    assert_eq!(step(dir.path()), "step-1");
    assert_eq!(step(&checkpoints.join("step-2")), "step-2");
    // A checkpoint that no longer exists: the last one has other weights.
    std::fs::write(checkpoints.join("best"), "step-9").unwrap();
    assert_fails(
        open(dir.path(), &ModelOverrides::default()),
        1,
        &["checkpoints/best: it is", "step-9`, which does not exist", "checkpoints/step-2"],
    );
}

/// Damage anywhere gives an error or a model, never a panic, and never much memory.
#[test]
fn damaged_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["w.npz", "packed.npz", "w.safetensors", "hf.safetensors"].map(|name| dir.path().join(name));
    let config = ModelConfig { depth: 1, width: 4, heads: 1, mlp: 4, patch: (2, 2), image: (4, 4), ..tiny() };
    let tensors = sample(&config);
    let flax = to_flax_tensors(&config, Numbering::Published, &tensors).unwrap();
    write_flax(&paths[0], "", &flax);
    let member = |(name, t): (&String, &Tensor)| {
        (name.clone(), npy("<f4", false, &t.shape, bytemuck::cast_slice(&t.values)))
    };
    write_npz(&paths[1], true, &flax.iter().map(member).collect::<Vec<_>>());
    save(&paths[2], &config, &tensors, &CheckpointMeta::default()).unwrap();
    let folder = dir.path().join("hf");
    convert(&paths[2], &folder, Some(Format::Hf), &ModelOverrides::default()).unwrap();
    std::fs::rename(folder.join("model.safetensors"), &paths[3]).unwrap();

    let mut s = Stream::new(3, Domain::Split, 0, 0);
    for path in &paths {
        let whole = std::fs::read(path).unwrap();
        check_bytes(&whole, path).unwrap();
        let mut refused = 0;
        for round in 0..1000 {
            let bytes = damaged(&whole, round, &mut s);
            refused += usize::from(check_bytes(&bytes, path).is_err());
        }
        assert!(refused > 300, "{}: only {refused} of 1000 were refused", path.display());
    }
}

/// Cuts, flips bits, repeats or moves a piece, or writes a number that breaks readers. Half of the changes
/// hit the first bytes, where headers are.
fn damaged(whole: &[u8], round: usize, s: &mut Stream) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for _ in 0..1 + round % 3 {
        let mut below = |n: usize| s.next_u32() as usize % n.max(1);
        let near = if round.is_multiple_of(2) { bytes.len() } else { bytes.len().min(3000) };
        let at = below(near);
        match below(6) {
            0 => bytes.truncate(at),
            1 => {
                let piece = bytes[at..(at + below(64)).min(bytes.len())].to_vec();
                let to = below(near);
                bytes.splice(to..to, piece);
            }
            2 => drop(bytes.drain(at..(at + below(16)).min(bytes.len()))),
            3 => {
                let number = [0u64, 1, u64::MAX, 1 << 63, 1 << 31, 0xffff][below(6)].to_le_bytes();
                let end = (at + [1, 2, 4, 8][below(4)]).min(bytes.len());
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            4 => {
                let digits = b"9876543210,[]{}\":'()";
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = digits[below(digits.len())];
                }
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << below(8);
                }
            }
        }
    }
    bytes
}

#[test]
fn initial_values_fit_the_layout_that_files_have() {
    let config = tiny();
    let layout = ParamLayout::new(&config, |_| false);
    for (i, p) in layout.params.iter().enumerate() {
        let memory = initial_values(&config, p, i, 1);
        assert_eq!(p.from_file_order(&p.to_file_order(&memory)), memory, "{}", p.name);
    }
}
