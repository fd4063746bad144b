//! Weights files from elsewhere: in several parts, without some biases, and malicious ones.

use crate::support;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use support::models::{assert_same, bare, folder, json, picture, sample, saved, settings_of, tiny};
use support::{path, vitrum};
use vitrum::vit::config::{ModelConfig, QkvBias};
use vitrum::weights::safetensors::{Dtype, SafeTensors, View, write};
use vitrum::weights::{self, CheckpointMeta, Format, ModelOverrides, Numbering, Tensor, Tensors};

/// Splits a folder's `model.safetensors` into parts as transformers does; returns the index.
fn split(hf: &Path, parts: usize) -> PathBuf {
    let whole = hf.join("model.safetensors");
    let file = SafeTensors::open(&whole).unwrap();
    let names: Vec<&str> = file.names().collect();
    let mut map = serde_json::Map::new();
    for (i, chunk) in names.chunks(names.len().div_ceil(parts)).enumerate() {
        let part = format!("model-{:05}-of-{parts:05}.safetensors", i + 1);
        let tensors: Vec<Tensor> = chunk.iter().map(|name| file.tensor(name).unwrap()).collect();
        let views =
            chunk.iter().zip(&tensors).map(|(name, t)| View::f32(*name, &t.shape, &t.values)).collect();
        write(&hf.join(&part), &BTreeMap::new(), views).unwrap();
        map.extend(chunk.iter().map(|name| (name.to_string(), part.clone().into())));
    }
    drop(file);
    std::fs::remove_file(whole).unwrap();
    let index = hf.join("model.safetensors.index.json");
    let text = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map }).to_string();
    std::fs::write(&index, text).unwrap();
    index
}

#[test]
fn a_huggingface_folder_in_parts_is_one_model() {
    let dir = folder("parts");
    let (source, tensors) = saved(&dir, &tiny());
    let hf = dir.join("hf");
    weights::convert(&source, &hf, Some(Format::Hf), &ModelOverrides::default()).unwrap();
    let index = split(&hf, 3);
    for path in [&hf, &index] {
        let file = weights::open(path, &ModelOverrides::default()).unwrap();
        assert_same(&file.tensors.all().unwrap(), &tensors);
        assert_eq!((file.config.heads, file.layout), (3, weights::LayoutKind::HuggingFace));
        let shown = vitrum(&["inspect", path.to_str().unwrap(), "--json"]).ok().json();
        assert_eq!((&shown["kind"], &shown["missing"]), (&"weights".into(), &serde_json::json!([])));
    }
    let back = dir.join("back.safetensors");
    vitrum(&["convert", hf.to_str().unwrap(), back.to_str().unwrap()]).ok();
    assert_same(&weights::open(&back, &ModelOverrides::default()).unwrap().tensors.all().unwrap(), &tensors);

    // What can be wrong with an index.
    let never = dir.join("never.safetensors");
    let refused = |says: &[&str]| {
        vitrum(&["convert", hf.to_str().unwrap(), never.to_str().unwrap()]).exits(1).says(says);
        assert!(!never.exists());
    };
    let good = json(&index);
    let changed = |to: &str| {
        let mut bad = good.clone();
        bad["weight_map"]["classifier.bias"] = to.into();
        std::fs::write(&index, bad.to_string()).unwrap();
    };
    changed("model-00009-of-00003.safetensors");
    refused(&["the part `model-00009-of-00003.safetensors` is not beside it", "fetch all parts"]);
    changed("model-00003-of-00003.safetensors");
    refused(&["`model-00003-of-00003.safetensors` has no tensor `classifier.bias`"]);
    for outside in ["../own.safetensors", "/etc/passwd", "..", ""] {
        changed(outside);
        refused(&["is not a file beside it"]);
    }
    for text in ["{}", "{\"weight_map\": {}}", "[1]", "{\"weight_map\": "] {
        std::fs::write(&index, text).unwrap();
        refused(&["model.safetensors.index.json"]);
    }
    std::fs::write(&index, good.to_string()).unwrap();
    let part = hf.join("model-00002-of-00003.safetensors");
    let whole = std::fs::read(&part).unwrap();
    std::fs::write(&part, &whole[..whole.len() - 4]).unwrap();
    refused(&["model-00002-of-00003.safetensors: not a whole safetensors file"]);
}

/// A model without these biases computes the same as one with zeros, and no update adds one.
#[test]
fn q_k_and_v_may_lack_a_bias() {
    let dir = folder("no-bias");
    let config = ModelConfig { width: 64, heads: 1, qkv_bias: QkvBias::None, ..tiny() };
    let (own, tensors) = saved(&dir, &config);
    assert!(!tensors.contains_key("blocks.0.attn.qkv.bias"));
    let mut with_zeros = tensors.clone();
    for block in 0..2 {
        with_zeros.insert(format!("blocks.{block}.attn.qkv.bias"), Tensor::new([192], vec![0.0; 192]));
    }
    let zeros = dir.join("zeros.safetensors");
    let other = ModelConfig { qkv_bias: QkvBias::All, ..config.clone() };
    weights::save(&zeros, &other, &with_zeros, &CheckpointMeta::default()).unwrap();

    let batch = dir.join("batch.safetensors");
    let pixels: Vec<f32> = (0..2 * 16 * 16 * 3).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let views = vec![View::f32("images", &[2, 16, 16, 3], &pixels), View::i64("labels", &[2], &[0, 2])];
    write(&batch, &BTreeMap::new(), views).unwrap();
    let gradients = |weights: &Path| {
        let out = dir.join("gradients.safetensors");
        let files = [weights, &batch, &out].map(|p| p.to_str().unwrap());
        let args = ["grad", "--weights", files[0], "--batch", files[1], "--out", files[2], "--device", "cpu"];
        vitrum(&args).ok();
        let file = SafeTensors::open(&out).unwrap();
        file.names().map(|n| (n.to_string(), file.tensor(n).unwrap())).collect::<Tensors>()
    };
    let (without, mut with) = (gradients(&own), gradients(&zeros));
    with.retain(|name, _| !name.ends_with("attn.qkv.bias"));
    assert_same(&without, &with);

    // The same with updates, which start from the file's tensors and add none.
    let (batches, run) = (dir.join("batches.safetensors"), dir.join("run.safetensors"));
    let pixels: Vec<f32> = (0..2 * 2 * 16 * 16 * 3).map(|i| (i * 53 % 97) as f32 / 48.0 - 1.0).collect();
    let views =
        vec![View::f32("images", &[2, 2, 16, 16, 3], &pixels), View::i64("labels", &[2, 2], &[0, 2, 1, 1])];
    write(&batches, &BTreeMap::new(), views).unwrap();
    let files = [&own, &batches, &run].map(|p| p.to_str().unwrap());
    vitrum(&["replay", "--weights", files[0], "--batches", files[1], "--out", files[2], "--device", "cpu"])
        .ok();
    let after = SafeTensors::open(&run).unwrap();
    let trained: Vec<&str> = after.names().filter_map(|name| name.strip_prefix("final/")).collect();
    assert_eq!(trained, tensors.keys().map(String::as_str).collect::<Vec<_>>());

    // Files of timm and HuggingFace show it by missing tensors; a file that lacks only some is broken.
    let bare = dir.join("bare.safetensors");
    let store = |tensors: &Tensors| {
        let views = tensors.iter().map(|(n, t)| View::f32(n, &t.shape, &t.values)).collect();
        write(&bare, &BTreeMap::new(), views).unwrap();
        weights::open(&bare, &ModelOverrides::default())
    };
    assert_eq!(store(&tensors).unwrap().config.qkv_bias, QkvBias::None);
    with_zeros.remove("blocks.1.attn.qkv.bias");
    let error = store(&with_zeros).map(|_| ()).unwrap_err();
    assert!(error.message().contains("missing: `blocks.1.attn.qkv.bias` [192]"), "{error}");
    let hf = dir.join("hf");
    weights::convert(&own, &hf, Some(Format::Hf), &ModelOverrides::default()).unwrap();
    assert_eq!(json(&hf.join("config.json"))["qkv_bias"], false);
    let shown = vitrum(&["inspect", hf.to_str().unwrap(), "--json"]).ok().json();
    assert_eq!((&shown["qkv_bias"], &shown["missing"]), (&"none".into(), &serde_json::json!([])));
    vitrum(&["convert", own.to_str().unwrap(), dir.join("never.npz").to_str().unwrap()])
        .exits(1)
        .says(&["q, k and v of vit_jax's model always have a bias"]);
    assert!(!dir.join("never.npz").exists());
}

// ---- Sizes, names and parts from elsewhere ----

#[test]
fn pictures_of_an_unknown_size_are_refused_and_the_hint_works_when_typed() {
    let dir = folder("unknown-size");
    let rectangle = bare(&dir, &ModelConfig { width: 64, heads: 1, image: (16, 32), ..tiny() }, &|_| ());
    let fixed = dir.join("fixed.npz");
    let mut config = ModelConfig { width: 64, heads: 1, ..tiny() };
    (config.posemb, config.posemb_join) =
        (vitrum::vit::config::Posemb::Sincos2d, vitrum::vit::config::PosembJoin::Before);
    config.extra_tokens = 0;
    config.pool = vitrum::vit::config::PoolKind::Gap;
    let (own, _) = saved(&dir, &config);
    weights::convert(&own, &fixed, None, &ModelOverrides::default()).unwrap();
    let (picture, data) = (picture(&dir), support::stripes());
    let out = dir.join("out.safetensors").display().to_string();
    for file in [&rectangle, &fixed].map(|p| p.to_str().unwrap()) {
        let commands: [Vec<&str>; 5] = [
            vec!["predict", "--weights", file, &picture],
            vec!["eval", "--weights", file, "--data", data, "--batch", "8"],
            vec!["features", "--weights", file, "--data", data, "--out", &out],
            vec!["probe", "--weights", file, "--data", data, "--method", "knn", "--images", "8"],
            vec![
                "finetune",
                "--weights",
                file,
                "--data",
                data,
                "--out",
                &out,
                "--dry-run",
                "--set",
                "train.batch=16",
                "--set",
                "train.micro_batch=0",
            ],
        ];
        for command in commands {
            let refused = vitrum(&command).exits(1).says(&["`model.image`", "is not known"]);
            // A table of 224 x 224 is large for a test, so the test only asks for a setting that is accepted.
            if file.ends_with(".npz") && command[0] != "predict" {
                continue;
            }
            let mut typed: Vec<String> = command.iter().map(|word| word.to_string()).collect();
            typed.extend(settings_of(&refused.stderr));
            assert!(typed.len() > command.len(), "{}", refused.stderr);
            let done = vitrum(&typed);
            assert!(!done.stderr.contains("is not known"), "{}", done.stderr);
            assert!(
                done.code == 0 || (command[0] == "eval" && done.stderr.contains("classes")),
                "{}",
                done.stderr
            );
        }
    }
}

#[test]
fn models_that_are_not_supported_are_named_and_no_hint_leads_to_another() {
    let dir = folder("not-supported");
    let config = ModelConfig { width: 64, heads: 1, ..tiny() };
    let picture = picture(&dir);
    for (extra, says) in [
        ("attn_pool.probe", "Perception Encoder"),
        ("blocks.0.attn.q_norm.weight", "norms of q and k"),
        ("patch_generator.embedder.weight", "RADIO"),
        ("blocks.0.attn.relative_position_bias_table", "BEiT"),
        ("rope.freqs", "rotary"),
    ] {
        let add = |t: &mut Tensors| drop(t.insert(extra.into(), Tensor::new([1], vec![0.0])));
        let file = bare(&dir, &config, &add);
        for command in [
            ["inspect", file.to_str().unwrap()].to_vec(),
            vec!["predict", "--weights", file.to_str().unwrap(), &picture],
        ] {
            let done = vitrum(&command).exits(1).says(&[extra, says, "not supported"]);
            assert!(settings_of(&done.stderr).is_empty(), "{}", done.stderr);
        }
    }
    // An unknown part of a block changes what the model computes.
    let add = |t: &mut Tensors| drop(t.insert("blocks.0.mlp.gate".into(), Tensor::new([1], vec![0.0])));
    let file = bare(&dir, &config, &add);
    let done = vitrum(&["predict", "--weights", file.to_str().unwrap(), &picture]).exits(1);
    assert!(settings_of(&done.stderr).is_empty(), "{}", done.stderr);
}

/// Types each hint until the file is read.
#[test]
fn wrapped_names_and_what_lies_beside_them_are_mended_by_the_hints() {
    let dir = folder("wrapped");
    let config = ModelConfig { width: 64, heads: 1, ..tiny() };
    let picture = picture(&dir);
    for prefix in ["module.", "state_dict.", "model.", "module.model."] {
        let wrap = |t: &mut Tensors| {
            *t = t.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect();
            for extra in
                ["ema_step", "optimizer.state", "optimizer.rate", "temperature", "center", "queue.first"]
            {
                t.insert(format!("{prefix}{extra}"), Tensor::new([1], vec![0.0]));
            }
        };
        let file = bare(&dir, &config, &wrap);
        let file = file.to_str().unwrap();
        let out = dir.join("run").display().to_string();
        let commands = [
            vec!["predict", "--weights", file, &picture],
            vec![
                "finetune",
                "--weights",
                file,
                "--data",
                support::stripes(),
                "--out",
                &out,
                "--dry-run",
                "--set",
                "train.batch=16",
                "--set",
                "train.micro_batch=0",
            ],
        ];
        for command in commands {
            let mut typed: Vec<String> = command.iter().map(|word| word.to_string()).collect();
            for _ in 0..3 {
                let done = vitrum(&typed);
                if done.code == 0 {
                    break;
                }
                let hint = done.stderr.split("hint: ").nth(1).unwrap_or_default();
                assert!(!settings_of(hint).is_empty(), "{typed:?}: {}", done.stderr);
                typed.extend(settings_of(hint));
            }
            vitrum(&typed).ok();
            let settings: Vec<String> = typed[command.len()..].to_vec();
            let inspect = [vec!["inspect".to_string(), file.into(), "--json".into()], settings].concat();
            assert_eq!(vitrum(&inspect).ok().json()["unexpected"], serde_json::json!([]));
        }
    }
}

// ---- Files that mean harm ----

#[test]
fn a_pickle_is_refused_with_the_line_that_converts_it() {
    let dir = folder("pickle");
    let (file, out) = (dir.join("pytorch_model.bin"), path("out.safetensors"));
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&file).unwrap());
    zip.start_file("archive/data.pkl", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(b"\x80\x02}.").unwrap();
    zip.finish().unwrap();
    let old = dir.join("old.pth");
    std::fs::write(&old, b"\x80\x02}q\x00.").unwrap();
    let parts = folder("pickles");
    std::fs::write(parts.join("pytorch_model.bin.index.json"), "{}").unwrap();
    for bad in [&file, &old, &dir, &parts].map(|path| path.to_str().unwrap()) {
        vitrum(&["convert", bad, &out]).exits(1).says(&["pickle", "python -c", "weights_only=True"]);
        vitrum(&["inspect", bad]).exits(1).says(&["pickle"]);
    }
    vitrum(&["convert", parts.to_str().unwrap(), &out]).exits(1).says(&["pytorch_model-*.bin"]);
    assert!(!Path::new(&out).exists());
}

/// A safetensors file with this header and so many bytes of data.
fn raw(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0; data]);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn false_offsets_bombs_and_foreign_files_are_errors_that_name_the_file() {
    let dir = folder("bad");
    let bad = dir.join("bad.safetensors");
    let refused = |says: &[&str]| {
        let out = dir.join("out.safetensors");
        let done = vitrum(&["convert", bad.to_str().unwrap(), out.to_str().unwrap()]).exits(1);
        done.says(&["bad.safetensors"]).says(says);
        assert!(!out.exists());
        vitrum(&["inspect", bad.to_str().unwrap()]).exits(1);
    };
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{a}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{b}}}}}"#
        )
    };
    for (a, b) in [("[0,8]", "[4,12]"), ("[0,8]", "[8,4000]"), ("[0,8]", "[0,8]"), ("[8,0]", "[8,16]")] {
        raw(&bad, &two(a, b), 16);
        refused(&["not a whole safetensors file"]);
    }
    std::fs::write(&bad, b"").unwrap();
    refused(&["only 0 bytes"]);
    std::fs::write(&bad, vec![0xff; 64]).unwrap();
    refused(&["announces"]);
    std::fs::write(&bad, b"\x89HDF\r\n\x1a\n and more").unwrap();
    refused(&["HDF5"]);

    // Two gigabytes of zeros in two megabytes.
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&bad).unwrap());
    let options =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (16777216, 32), }";
    zip.start_file("head/kernel.npy", options).unwrap();
    zip.write_all(b"\x93NUMPY\x01\x00").unwrap();
    zip.write_all(&(header.len() as u16).to_le_bytes()).unwrap();
    zip.write_all(header.as_bytes()).unwrap();
    let zeros = vec![0; 1 << 20];
    (0..2048).for_each(|_| zip.write_all(&zeros).unwrap());
    zip.finish().unwrap();
    refused(&["weights do not compress like that"]);
}

#[test]
fn sixty_four_bit_numbers_and_other_channels_are_read_but_not_converted() {
    let dir = folder("exact");
    let config = ModelConfig { width: 64, heads: 1, ..tiny() };
    let tensors = sample(&config);
    let wide: Vec<f64> = tensors["norm.bias"].values.iter().map(|v| f64::from(*v) + 1e-12).collect();
    let grey: Vec<f32> = (0..64 * 16).map(|i| (i % 7) as f32 - 3.0).collect();
    let path = dir.join("m.safetensors");
    let store = |replaced: View<'static>, name: &str| {
        let others =
            tensors.iter().filter(|(n, _)| *n != name).map(|(n, t)| View::f32(n, &t.shape, &t.values));
        write(&path, &BTreeMap::new(), others.chain([replaced]).collect()).unwrap();
        let file = weights::open(&path, &ModelOverrides::default()).unwrap();
        let out = dir.join("out.safetensors");
        let error = weights::convert(&path, &out, None, &ModelOverrides::default()).map(|_| ()).unwrap_err();
        assert!(!out.exists());
        (file, error)
    };
    let bytes: Vec<u8> = wide.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (file, error) = store(View::new("norm.bias", Dtype::F64, &[64], bytes), "norm.bias");
    assert!(error.message().contains("`norm.bias` holds 64-bit numbers"), "{error}");
    assert_eq!(file.tensors.values("norm.bias").unwrap()[3], wide[3] as f32);

    let kernel = "patch_embed.proj.weight";
    let bytes: Vec<u8> = grey.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (file, error) = store(View::new(kernel, Dtype::F32, &[64, 1, 4, 4], bytes), kernel);
    assert!(error.message().contains("takes 1 channels"), "{error}");
    let three = file.tensors.get(kernel).unwrap();
    assert_eq!(three.shape, [64, 3, 4, 4]);
    for (pixel, value) in grey.iter().enumerate() {
        let (d, at) = (pixel / 16, pixel % 16);
        let sum: f32 = (0..3).map(|c| three.values[(d * 3 + c) * 16 + at]).sum();
        assert!((sum - value).abs() < 1e-6);
    }
    assert!(file.notes.iter().any(|n| n.contains("made one for 3")), "{:?}", file.notes);
}

#[test]
fn a_hybrid_and_a_mixer_are_refused_by_name() {
    let dir = folder("others");
    let flax = weights::to_flax_tensors(&tiny(), Numbering::Published, &sample(&tiny())).unwrap();
    let bad = dir.join("bad.safetensors");
    for (name, kind) in
        [("conv_root/kernel", "hybrid"), ("MixerBlock_0/token_mixing/Dense_0/bias", "MLP-Mixer")]
    {
        let views = flax.iter().map(|(n, t)| View::f32(n, &t.shape, &t.values));
        write(&bad, &BTreeMap::new(), views.chain([View::f32(name, &[1], &[0.0])]).collect()).unwrap();
        vitrum(&["convert", bad.to_str().unwrap(), &path("never.npz")]).exits(1).says(&[kind, name]);
    }
}

/// Checks that `vitrum convert` refuses the file with this message and writes nothing.
#[track_caller]
fn refused(file: &Path, says: &[&str]) {
    let out = file.with_file_name("never.safetensors");
    vitrum(&["convert", file.to_str().unwrap(), out.to_str().unwrap()]).exits(1).says(says);
    assert!(!out.exists(), "{} was written", out.display());
}

#[test]
fn a_file_that_was_cut_off_is_an_error_and_nothing_is_written() {
    let dir = folder("cut");
    let (own, _) = saved(&dir, &tiny());
    let npz = dir.join("whole.npz");
    weights::convert(&own, &npz, None, &ModelOverrides::default()).unwrap();
    for (whole, name) in [(&own, "cut.safetensors"), (&npz, "cut.npz")] {
        let (bytes, cut) = (std::fs::read(whole).unwrap(), dir.join(name));
        for share in [1, 30, 50, 99] {
            std::fs::write(&cut, &bytes[..bytes.len() * share / 100]).unwrap();
            refused(&cut, &[name, "not a whole"]);
        }
    }
}

#[test]
fn values_shapes_and_names_that_make_no_model_are_errors_and_nothing_is_written() {
    let dir = folder("broken");
    let bad = dir.join("bad.safetensors");
    let config = ModelConfig { width: 64, heads: 1, ..tiny() };
    let broken = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = sample(&config);
        change(&mut tensors);
        let views = tensors.iter().map(|(n, t)| View::f32(n, &t.shape, &t.values)).collect();
        write(&bad, &BTreeMap::new(), views).unwrap();
    };
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        broken(&|t| t.get_mut("blocks.1.mlp.fc2.weight").unwrap().values[1000] = value);
        refused(&bad, &["bad.safetensors", &format!("`blocks.1.mlp.fc2.weight` holds {shown}")]);
    }
    broken(&|t| t.get_mut("blocks.0.attn.proj.weight").unwrap().shape = vec![32, 128]);
    refused(&bad, &["wrong shape: `blocks.0.attn.proj.weight` is [32, 128] and should be [64, 64]"]);
    broken(&|t| {
        *t = t
            .iter()
            .map(|(n, t)| (n.replace("blocks.", "stage.").replace("patch_embed", "stem"), t.clone()))
            .collect()
    });
    refused(&bad, &["are timm's", "the first that is not is `stage.0.attn.proj.bias`", "weights.rename"]);
    broken(&|t| *t = Tensors::from([("conv1.weight".into(), Tensor::new([1], vec![0.0]))]));
    refused(&bad, &["not a Vision Transformer's weights", "`conv1.weight`"]);
}

/// NumPy writes arrays in the order and with the bytes that they have in memory.
#[test]
fn an_npz_of_another_order_or_byte_order_is_the_same_model() {
    let dir = folder("orders");
    let (own, tensors) = saved(&dir, &tiny());
    let (plain, other) = (dir.join("plain.npz"), dir.join("other.npz"));
    weights::convert(&own, &plain, None, &ModelOverrides::default()).unwrap();
    let npz = weights::npz::Npz::open(&plain).unwrap();
    for (big, fortran) in [(true, false), (false, true), (true, true)] {
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&other).unwrap());
        for name in npz.names() {
            let tensor = npz.tensor(name).unwrap();
            zip.start_file(format!("{name}.npy"), zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(&npy(&tensor, big, fortran)).unwrap();
        }
        zip.finish().unwrap();
        let file = weights::open(&other, &ModelOverrides::default()).unwrap();
        assert_same(&file.tensors.all().unwrap(), &tensors);
    }
}

fn npy(tensor: &Tensor, big: bool, fortran: bool) -> Vec<u8> {
    let (order, fortran_order) = (if big { '>' } else { '<' }, if fortran { "True" } else { "False" });
    let sides: String = tensor.shape.iter().map(|d| format!("{d}, ")).collect();
    let header =
        format!("{{'descr': '{order}f4', 'fortran_order': {fortran_order}, 'shape': ({sides}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    // The first index changes fastest: the position of a value, digit by digit, from the first axis on.
    let in_rows = |mut at: usize| {
        let digits: Vec<usize> = tensor.shape.iter().map(|side| (at % side, at /= side).0).collect();
        digits.iter().zip(&tensor.shape).fold(0, |place, (digit, side)| place * side + digit)
    };
    for at in 0..tensor.values.len() {
        let value = tensor.values[if fortran { in_rows(at) } else { at }];
        bytes.extend(if big { value.to_be_bytes() } else { value.to_le_bytes() });
    }
    bytes
}
