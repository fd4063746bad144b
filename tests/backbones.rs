//! Today's plain Vision Transformers under the names of timm, transformers and open_clip, against outputs of those
//! programs: logits, pooled features, losses, every gradient, and the files themselves. The tests walk the folder of
//! reference outputs and take every setting from its files. Skipped, with a line, where the folder is absent.

use crate::support;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use vitrum::backend::{self, Device, Loss, LossKind, Recompute};
use vitrum::check::batch_file::BatchFile;
use vitrum::infer::loaded::{LoadedModel, gradients, load_weights};
use vitrum::vit::{LastBlock, Mode, Vit};
use vitrum::weights::safetensors::SafeTensors;
use vitrum::weights::{self, AdaptTarget, Format, ModelFile};

use support::{path, run_on_gpu, stand_in};

/// The cases' folders.
fn cases() -> Vec<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference");
    let folder = std::env::var_os("VITRUM_REFERENCE").map_or(default, PathBuf::from).join("backbones");
    if !folder.is_dir() {
        println!("skipped: no reference outputs at {}", folder.display());
        return Vec::new();
    }
    let found = std::fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.path());
    let mut cases: Vec<_> = found.filter(|path| path.join("io.safetensors").is_file()).collect();
    cases.sort();
    assert!(!cases.is_empty(), "{} has no cases", folder.display());
    cases
}

fn name(case: &Path) -> String {
    case.file_name().unwrap().to_string_lossy().into_owned()
}

/// A case's weights as a repository on the hub holds them: `tensors` as `model.safetensors` beside the configuration, in a
/// folder of the test's own. `None`: the case has no such file.
fn repository(test: &str, case: &Path, tensors: &str, config: Option<&str>) -> Option<PathBuf> {
    let folder = PathBuf::from(path(&format!("{test}-{}-{}", name(case), tensors.replace('.', "-"))));
    let from = case.join(tensors);
    if !from.is_file() {
        return None;
    }
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(from, folder.join("model.safetensors")).unwrap();
    if let Some(config) = config {
        std::fs::copy(case.join(config), folder.join("config.json")).unwrap();
    }
    Some(folder.join("model.safetensors"))
}

/// The programs whose files and outputs a case may have: weights, configuration, gradients, and the outputs' prefix.
const PROGRAMS: [(&str, &str, &str, &str); 2] = [
    ("timm.safetensors", "timm_config.json", "grads.safetensors", "timm"),
    ("hf.safetensors", "hf_config.json", "hf_grads.safetensors", "hf"),
];

fn rel_l2(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "sizes differ");
    let square = |x: f64| x * x;
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - f64::from(*w))).sum();
    let norm: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    (error / norm.max(1e-300)).sqrt()
}

fn f64s(io: &SafeTensors, name: &str) -> Vec<f32> {
    io.f64(name).unwrap().into_iter().map(|x| x as f32).collect()
}

/// The model of a file on the CPU, ready for gradients.
fn load(file: &ModelFile, samples: usize, last_block: LastBlock, recompute: Recompute) -> LoadedModel {
    let mut backend = backend::select(Device::Cpu, &Default::default()).unwrap();
    let (config, normalise) = (file.config.clone(), file.meta.normalise);
    let storage = backend::Storage { recompute, ..backend.storage() };
    let model = Vit::new(config, normalise, samples, Mode::Train, storage, last_block, |_| false);
    backend.allocate(&model.plan()).unwrap();
    load_weights(file, &model, &mut *backend).unwrap();
    LoadedModel { backend, model, meta: file.meta.clone(), unprepared: None, notes: file.notes.clone() }
}

/// The rows of a fused bias that belong to k, whose gradient is rounding noise.
fn without_key(name: &str, values: &[f32]) -> Vec<f32> {
    let third = values.len() / 3;
    match name {
        _ if name.ends_with("attn.qkv.bias") => [&values[..third], &values[2 * third..]].concat(),
        "attn_pool.kv.bias" => values[values.len() / 2..].to_vec(),
        _ => values.to_vec(),
    }
}

#[test]
fn logits_losses_and_every_gradient_equal_those_of_timm_and_transformers() {
    let mut compared = 0;
    for case in cases() {
        let io = SafeTensors::open(&case.join("io.safetensors")).unwrap();
        let batch = BatchFile::open(&case.join("io.safetensors"), false).unwrap();
        let samples = batch.layout.samples;
        for (tensors, config, grads, program) in PROGRAMS {
            let what = format!("{}, {tensors}", name(&case));
            let Some(at) = repository("gradients", &case, tensors, Some(config)) else { continue };
            let mut file =
                weights::open_backbone(&at, &Default::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
            file.set_image(batch.layout.image).unwrap();
            if file.config.classes == 0 {
                features(&what, file, &batch, &f64s(&io, &format!("{program}.pooled_f64")));
                continue;
            }
            let wanted = repository("gradients", &case, grads, Some(config)).unwrap();
            let wanted =
                weights::open(&wanted, &Default::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
            for (last_block, recompute) in [
                (LastBlock::Pruned, Recompute::None),
                (LastBlock::Whole, Recompute::LnGelu),
                (LastBlock::Pruned, Recompute::Block),
            ] {
                let what = format!("{what}, {last_block:?}, {recompute:?}");
                let mut run = load(&file, samples, last_block, recompute);
                let slot = batch.slot(&*run.backend, 0).unwrap();
                let report =
                    gradients(&mut *run.backend, &run.model, Loss::plain(LossKind::Softmax), slot).unwrap();
                let want = io.f64(&format!("{program}.loss_f64")).unwrap()[0];
                assert!(
                    (report.loss - want).abs() <= 1e-5 * want.abs(),
                    "{what}: loss {} for {want}",
                    report.loss
                );
                let mut logits = vec![0.0; samples * run.model.config.classes];
                run.backend.read(run.model.logits(), &mut logits).unwrap();
                let error = rel_l2(&logits, &f64s(&io, &format!("{program}.logits_f64")));
                assert!(error <= 1e-5, "{what}: logits differ by {error:.1e}");
                if program == "timm" {
                    let at = run.model.features();
                    let mut pooled = vec![0.0; at.rows * at.cols];
                    run.backend.read(at, &mut pooled).unwrap();
                    let error = rel_l2(&pooled, &f64s(&io, "timm.features_f64"));
                    assert!(error <= 1e-5, "{what}: features differ by {error:.1e}");
                }
                for param in run.model.layout.parameters() {
                    // transformers has two parameters whose sum is ours: the gradient of each is that of the sum.
                    if param.name == "cls_token" && program == "hf" && file.config.registers > 0 {
                        continue;
                    }
                    let mut got = vec![0.0; param.len()];
                    run.backend.read(param.grad().unwrap(), &mut got).unwrap();
                    let got = without_key(&param.name, &param.to_file_order(&got));
                    let want = without_key(&param.name, &wanted.tensors.values(&param.name).unwrap());
                    let error = rel_l2(&got, &want);
                    assert!(error <= 1e-5, "{what}: gradient of `{}` differs by {error:.1e}", param.name);
                    compared += 1;
                }
            }
        }
    }
    println!("{compared} gradients compared");
}

/// The pooled vector of a model without a classifier.
fn features(what: &str, file: ModelFile, batch: &BatchFile, want: &[f32]) {
    let one = AdaptTarget { classes: Some(1), ..AdaptTarget::default() };
    let (file, _) = weights::adapt(file, &one).unwrap();
    let mut run = load(&file, batch.layout.samples, LastBlock::Pruned, Recompute::None);
    let slot = batch.slot(&*run.backend, 0).unwrap();
    run.backend.bind_batch(slot).unwrap();
    run.backend.begin_micro(backend::Micro::whole(batch.layout.samples)).unwrap();
    run.model.forward(&mut *run.backend, false).unwrap();
    let at = run.model.features();
    let mut got = vec![0.0; at.rows * at.cols];
    run.backend.read(at, &mut got).unwrap();
    let error = rel_l2(&got, want);
    assert!(error <= 1e-5, "{what}: features differ by {error:.1e}");
}

#[test]
fn tables_of_rotary_positions_are_those_of_timm() {
    for case in cases() {
        let acts = SafeTensors::open(&case.join("acts.safetensors")).unwrap();
        if !acts.contains("rope_cos") {
            continue;
        }
        let at = repository("tables", &case, "timm.safetensors", Some("timm_config.json")).unwrap();
        let config = weights::open(&at, &Default::default()).unwrap().config;
        let (dh, half) = (config.head_size(), config.head_size() / 2);
        let table = vitrum::vit::rope::table(&config);
        for (part, file) in ["rope_cos", "rope_sin"].into_iter().enumerate() {
            let want = acts.tensor(file).unwrap();
            assert_eq!(want.shape, [config.patch_grid().patches(), dh], "{}", name(&case));
            for (i, want) in want.values.iter().enumerate() {
                let (row, e) = (i / dh, i % dh);
                let pair = match config.rope.pairs() {
                    backend::RopePairs::Half => e % half,
                    backend::RopePairs::Neighbours => e / 2,
                };
                let got = table[row * dh + part * half + pair];
                assert!((got - want).abs() <= 1e-6, "{}, {file}, {row}, {e}: {got} for {want}", name(&case));
            }
        }
    }
}

#[test]
fn open_clip_files_give_the_logits_of_timm_without_a_config() {
    for case in cases() {
        let Some(at) = repository("openclip", &case, "openclip.safetensors", None) else { continue };
        let batch = BatchFile::open(&case.join("io.safetensors"), false).unwrap();
        let timm = repository("openclip", &case, "timm.safetensors", Some("timm_config.json")).unwrap();
        let timm = weights::open(&timm, &Default::default()).unwrap();
        let sets = [("model.heads", timm.config.heads.to_string()), ("model.gelu", "quick".into())];
        let sets = sets.map(|(key, value)| (key.to_string(), value));
        let file = weights::open(&at, &weights::ModelOverrides::from_sets(&sets).unwrap()).unwrap();
        assert_eq!(file.config.ln_eps, timm.config.ln_eps);
        let mut logits = Vec::new();
        for mut file in [timm, file] {
            file.set_image(batch.layout.image).unwrap();
            let mut run = load(&file, batch.layout.samples, LastBlock::Pruned, Recompute::None);
            let slot = batch.slot(&*run.backend, 0).unwrap();
            gradients(&mut *run.backend, &run.model, Loss::plain(LossKind::Softmax), slot).unwrap();
            let mut values = vec![0.0; batch.layout.samples * run.model.config.classes];
            run.backend.read(run.model.logits(), &mut values).unwrap();
            logits.push(values);
        }
        // open_clip's projection has no bias.
        let timm = repository("openclip", &case, "timm.safetensors", Some("timm_config.json")).unwrap();
        let bias =
            weights::open(&timm, &Default::default()).unwrap().tensors.get("head.bias").unwrap().values;
        let plain: Vec<f32> =
            logits[0].iter().enumerate().map(|(i, logit)| logit - bias[i % bias.len()]).collect();
        let error = rel_l2(&logits[1], &plain);
        assert!(error <= 1e-5, "{}: logits differ by {error:.1e}", name(&case));
    }
}

/// Bits of every tensor of a safetensors file, by name.
fn bits(path: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let file = SafeTensors::open(path).unwrap();
    file.names().map(|name| (name.to_string(), file.bytes(name).unwrap().to_vec())).collect()
}

#[test]
fn conversions_keep_every_bit_or_say_what_timm_cannot_be_given() {
    let (none, mut equal) = (weights::ModelOverrides::default(), 0);
    for case in cases() {
        for (tensors, config, _, _) in PROGRAMS {
            let what = format!("{}, {tensors}", name(&case));
            let Some(from) = repository("convert", &case, tensors, Some(config)) else { continue };
            let own = from.with_file_name("own.safetensors");
            weights::convert(&from, &own, Some(Format::Safetensors), &none).unwrap();
            let [before, after] = [&from, &own].map(|path| weights::open_backbone(path, &none).unwrap());
            assert_eq!(before.config, after.config, "{what}");
            assert_eq!(before.meta.license, after.meta.license, "{what}");
            let values = |file: &ModelFile| file.tensors.all().unwrap();
            let (before, after) = (values(&before), values(&after));
            assert!(before.keys().eq(after.keys()), "{what}");
            for (tensor, value) in &before {
                let same =
                    value.values.iter().zip(&after[tensor].values).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{what}: `{tensor}` changed");
            }
            let to = PathBuf::from(path(&format!("timm-{}-{}", name(&case), tensors.replace('.', "-"))));
            match weights::convert(&from, &to, Some(Format::Timm), &none) {
                Ok(_) if tensors == "timm.safetensors" => {
                    assert_eq!(bits(&to.join("model.safetensors")), bits(&from), "{what}");
                    let again = weights::open_backbone(&to.join("model.safetensors"), &none).unwrap();
                    let first = weights::open_backbone(&from, &none).unwrap().config;
                    assert_eq!((again.config.heads, again.config.gelu), (first.heads, first.gelu), "{what}");
                    equal += 1;
                }
                Ok(_) => {}
                Err(e) => assert!(e.message().contains("cannot be written for timm yet"), "{what}: {e}"),
            }
        }
    }
    println!("{equal} files written as they were");
}

/// Every case on the stand-in GPU, with the residual stream in bf16 and in f32. The tolerances are those of the reference
/// for bf16.
#[test]
fn a_gpu_has_the_logits_and_gradients_of_timm_in_bf16() {
    let Some(folder) = stand_in() else { return };
    for case in cases() {
        let (tensors, config, grads, _) = PROGRAMS[0];
        let weights = repository("gpu", &case, tensors, Some(config)).unwrap();
        let wanted = repository("gpu", &case, grads, Some(config)).unwrap();
        let wanted = weights::open(&wanted, &Default::default()).unwrap().tensors;
        let io = case.join("io.safetensors");
        let logits = f64s(&SafeTensors::open(&io).unwrap(), "timm.logits_f64");
        for residual in ["bf16", "f32"] {
            let what = format!("{}, stream {residual}", name(&case));
            let out = weights.with_file_name(format!("{residual}.safetensors"));
            let args: Vec<&OsStr> = vec![
                "grad".as_ref(),
                "--weights".as_ref(),
                weights.as_ref(),
                "--batch".as_ref(),
                io.as_ref(),
                "--out".as_ref(),
                out.as_ref(),
                "--device".as_ref(),
                "cuda".as_ref(),
                "--residual".as_ref(),
                residual.as_ref(),
            ];
            let done = run_on_gpu(&folder, "checks=on", &args).ok();
            assert!(!done.stderr.contains("stand-in GPU:"), "{what}: {}", done.stderr);
            let got = SafeTensors::open(&out).unwrap();
            let error = rel_l2(&got.values("logits").unwrap(), &logits);
            assert!(error <= 5e-2, "{what}: logits differ by {error:.1e}");
            let mut worst = (0.0, String::new());
            for key in got.names() {
                let Some(name) = key.strip_prefix("grad/") else { continue };
                let values = without_key(name, &got.values(key).unwrap());
                let error = rel_l2(&values, &without_key(name, &wanted.values(name).unwrap()));
                if error > worst.0 {
                    worst = (error, name.to_string());
                }
            }
            println!("{what}: logits {error:.1e}, worst gradient {:.1e} (`{}`)", worst.0, worst.1);
            assert!(worst.0 <= 5e-2, "{what}: gradient of `{}` differs by {:.1e}", worst.1, worst.0);
        }
    }
}
