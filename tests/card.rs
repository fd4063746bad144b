//! Errors of a real GPU's driver and cuBLASLt that a stand-in GPU reproduces.

use crate::support;

use std::path::Path;

use serde_json::Value;
use support::{Done, finish, metrics, on_gpu, path, run_on_gpu as run, stand_in, train};

/// Two steps of a small model, with timed algorithms, in a cache of their own.
fn two_steps(folder: &Path, name: &str, options: &str, more: &[&str]) -> (Done, Vec<f64>) {
    let out = path(name);
    let size = ["model.width=64", "model.heads=2", "model.depth=2", "train.steps=2"];
    let pace = [
        "train.log_every=1",
        "train.eval_every=2",
        "train.batch=4",
        "train.micro_batch=0",
        "--device",
        "cuda",
    ];
    let args = train(&out, &size.iter().chain(&pace).chain(more).copied().collect::<Vec<_>>());
    let mut command = on_gpu(folder, options, &args);
    command.env("VITRUM_CACHE", path(&format!("{name}-cache")));
    let done = finish(command).ok();
    assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);
    let losses = metrics(&out).iter().filter_map(|line| line["loss"].as_f64()).collect();
    (done, losses)
}

fn near(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 0.01 * b.abs()), "{a:?} is not {b:?}");
}

/// Results of a self-test by `operation: case`.
fn results(done: &Done) -> Vec<(String, bool, String)> {
    let result = |r: &Value| {
        let title = format!("{}: {}", r["operation"].as_str().unwrap(), r["case"].as_str().unwrap());
        (title, r["passed"].as_bool().unwrap(), r["note"].as_str().unwrap().to_string())
    };
    done.json()["results"].as_array().unwrap().iter().map(result).collect()
}

// The GPU and its context ---------------------------------------------------------------------------------------------

#[test]
fn a_self_test_opens_the_card_once_for_each_precision() {
    let Some(folder) = stand_in() else { return };
    let contexts = path("contexts");
    let options = format!("checks=off,contexts={contexts}");
    run(&folder, &options, &["selftest", "--device", "cuda", "--filter", "embed"]).ok();
    let lines = std::fs::read_to_string(&contexts).unwrap();
    let made = |what: &str| lines.lines().filter(|line| line.contains(what)).count();
    assert_eq!((made("\"context\":\"made\""), made("\"cublaslt\":\"made\"")), (3, 3), "{lines}");
    assert_eq!(made("destroyed"), 0, "{lines}");
}

#[test]
fn what_breaks_the_card_ends_its_group_and_no_other() {
    let Some(folder) = stand_in() else { return };
    // Each process of the self-test breaks at its ninth launch.
    let args = ["selftest", "--device", "cuda", "--precision", "f32", "--filter", "backward", "--json"];
    let done = run(&folder, "checks=off,fail_launch=9,fail_code=700", &args).exits(1);
    let results = results(&done);
    let groups = [
        "embed_backward",
        "matmul_backward",
        "layernorm_backward",
        "attention_backward",
        "swiglu_backward",
        "pool_backward",
    ];
    for group in groups {
        let of_group = || results.iter().filter(|(title, ..)| title.starts_with(group));
        assert!(of_group().any(|(_, passed, _)| *passed), "nothing of {group} has run: {results:?}");
    }
    let broke = results
        .iter()
        .filter(|(_, _, note)| note.contains("ILLEGAL_ADDRESS") && !note.starts_with("not run"));
    assert_eq!(broke.count(), groups.len(), "{results:?}");
    assert!(results.iter().any(|(_, _, note)| note.starts_with("not run")), "{results:?}");
}

#[test]
fn a_card_is_chosen_by_its_number() {
    let Some(folder) = stand_in() else { return };
    let two = "checks=off,cards=2";
    let doctor = run(&folder, two, &["doctor"]).ok();
    assert!(
        doctor.stdout.contains("\ncuda:0: ") && doctor.stdout.contains("\ncuda:1: "),
        "{}",
        doctor.stdout
    );
    for device in ["cuda:1", "gpu:1", "1"] {
        let args = ["selftest", "--device", device, "--precision", "f32", "--filter", "scale"];
        let done = run(&folder, two, &args).ok();
        assert!(done.stdout.starts_with("cuda:1, "), "{}", done.stdout);
    }
    let args = ["selftest", "--device", "cuda:2", "--filter", "scale"];
    let done = run(&folder, two, &args).exits(1);
    done.says(&["error: ", "there is no GPU 2", "`cuda:0` to `cuda:1`", "hint: `vitrum doctor`"]);
    let done = run(&folder, two, &["selftest", "--device", "tpu"]).exits(2);
    done.says(&["a device is `auto`, `cpu`, `cuda` or `cuda:N`"]);
}

#[test]
fn a_card_whose_translator_is_wrong_is_refused_in_words() {
    let Some(folder) = stand_in() else { return };
    for sm in [100, 120] {
        let args = ["selftest", "--device", "cuda", "--filter", "scale"];
        let done = run(&folder, &format!("checks=off,sm={sm},driver=13000"), &args).exits(1);
        done.says(&[
            "is not supported with this driver",
            "hint: update NVIDIA's driver to one for CUDA 13.3",
        ]);
        run(&folder, &format!("checks=off,sm={sm},driver=13030"), &args).ok();
    }
    // By default the program uses the CPU, and says why.
    let args = ["selftest", "--filter", "scale"];
    run(&folder, "sm=100,driver=13000", &args).ok().says(&["note: computing on the CPU", "not supported"]);
}

#[test]
fn a_driver_that_does_not_start_is_one_sentence() {
    let Some(folder) = stand_in() else { return };
    for (code, says) in
        [(34, "is a stub"), (100, "finds no GPU"), (803, "does not match"), (4242, "code 4242")]
    {
        let done = run(&folder, &format!("init_code={code}"), &["selftest", "--device", "cuda"]).exits(1);
        done.says(&[says]);
    }
}

#[test]
fn a_code_without_a_name_is_told_as_a_number() {
    let Some(folder) = stand_in() else { return };
    let args = ["selftest", "--device", "cuda", "--precision", "f32", "--filter", "scale"];
    let done = run(&folder, "checks=off,fail_launch=1,fail_code=4242", &args).exits(1);
    assert!(done.stdout.contains("the driver's code 4242"), "{}", done.stdout);
}

/// A development package's `libcuda.so`, found before the driver's own `libcuda.so.1`.
#[test]
fn the_drivers_own_library_comes_before_a_stub() {
    let Some(folder) = stand_in() else { return };
    let mixed = path("mixed");
    std::fs::create_dir_all(&mixed).unwrap();
    let link = |from: &str, to: &str| {
        let _ = std::os::unix::fs::symlink(folder.join(from), Path::new(&mixed).join(to));
    };
    link("libcublasLt.so", "libcuda.so"); // a library without any function of the driver
    link("libcuda.so", "libcuda.so.1");
    link("libcublasLt.so", "libcublasLt.so.13");
    let args = ["selftest", "--device", "cuda", "--precision", "f32", "--filter", "scale"];
    run(Path::new(&mixed), "checks=off", &args).ok();
}

// Products ------------------------------------------------------------------------------------------------------------

#[test]
fn every_product_is_right_where_cublaslt_refuses_it() {
    let Some(folder) = stand_in() else { return };
    std::thread::scope(|scope| {
        for (options, precision, filter) in [
            ("heuristic=refusal", "bf16", "matmul"),
            ("heuristic=refusal", "f32", "matmul"),
            ("heuristic=nothing", "bf16", "matmul none"),
            ("heuristic=unfit", "bf16", "matmul none"),
            // Only plain products.
            ("refuse_epilogues=4+36+164+192+208+256+512", "bf16", "erf, dropout"),
            ("tensor_cores=truncate", "bf16", "matmul none"),
            ("tensor_cores=truncate", "tf32", "matmul none"),
            ("thin=invalid", "bf16", "matmul"),
            ("thin=unsupported", "f32", "matmul"),
            ("fail_algorithm=0", "bf16", "matmul none"),
        ] {
            let folder = &folder;
            scope.spawn(move || {
                let which = ["--precision", precision, "--filter", filter];
                let args = [&["selftest", "--device", "cuda", "--deterministic"], &which[..]].concat();
                let done = run(folder, &format!("checks=off,threads=1,{options}"), &args).ok();
                assert!(!done.stderr.contains("stand-in GPU:"), "{options}: {}", done.stderr);
            });
        }
    });
}

/// Sizes that the CPU trains but no kernel supports.
#[test]
fn attention_that_the_kernels_have_no_room_for_is_refused_in_words() {
    let Some(folder) = stand_in() else { return };
    let refused = |name: &str, more: &[&str], words: &str| {
        let all =
            [&["train.batch=1", "train.micro_batch=1", "train.steps=1", "--device", "cuda"], more].concat();
        let done = run(&folder, "checks=off", &train(&path(name), &all)).exits(1);
        assert!(done.stderr.contains(words) && done.stderr.contains("hint:"), "{}", done.stderr);
    };
    refused(
        "wide-heads",
        &["model.width=144", "model.heads=1"],
        "heads of 144 values are not supported on CUDA",
    );
    // 46 × 46 patches: a bit for each pair of 2,116 tokens, 64 times.
    let many = ["model.image=184", "model.patch=4", "model.width=64", "model.heads=64", "model.depth=1"];
    refused(
        "many-pairs",
        &[&many[..], &["model.attention_dropout=0.1"]].concat(),
        "attention dropout needs 35 MiB of scratch for one image of 2116 tokens and 64 heads",
    );
}

/// cuBLASLt 12.0 and 13.10, the oldest and the newest that are known: all that a step sets and asks for exists in both.
#[test]
fn the_oldest_cublaslt_does_what_the_newest_does() {
    let Some(folder) = stand_in() else { return };
    for precision in ["f32", "bf16"] {
        let more = [&format!("train.precision={precision}")[..], "train.deterministic=true"];
        let losses = ["120000", "131000"].map(|version| {
            let name = format!("cublaslt-{version}-{precision}");
            two_steps(&folder, &name, &format!("checks=on,blaslt={version}"), &more).1
        });
        assert_eq!(losses[0], losses[1], "{precision}");
    }
}

/// A class token's query is one row; a model of one class has one column.
#[test]
fn a_model_of_one_row_and_one_column_trains_where_cublaslt_has_no_vectors() {
    let Some(folder) = stand_in() else { return };
    let more = ["model.pool=map", "train.precision=bf16"];
    let (_, want) = two_steps(&folder, "thin-taken", "checks=on", &more);
    for thin in ["invalid", "unsupported"] {
        let (_, got) = two_steps(&folder, &format!("thin-{thin}"), &format!("checks=on,thin={thin}"), &more);
        near(&got, &want);
    }
}

/// 129 tokens of one image: k is not a multiple of two, and its half is a multiple of the stage's depth.
#[test]
fn splits_that_the_library_gets_wrong_are_not_taken() {
    let Some(folder) = stand_in() else { return };
    let more = [
        "model.image=32x64",
        "model.patch=4",
        "model.pool=token",
        "model.posemb=learned",
        "model.posemb_join=after",
        "train.batch=1",
        "train.precision=f32",
        "train.prune_last_block=false",
    ];
    let (_, want) = two_steps(&folder, "split-right", "checks=off", &more);
    // By rule, the first algorithm offered is used: without the fault, the split one.
    let options = "checks=off,split_fault=1,first_algorithm=1";
    let by_rule = [&more[..], &["train.deterministic=true"]].concat();
    let (done, got) = two_steps(&folder, "split-wrong", &format!("{options},blaslt=130101"), &by_rule);
    near(&got, &want);
    assert!(!done.stderr.contains("computes wrongly"), "known by its configuration: {}", done.stderr);
    // A library that is wrong and not known to be: the comparison detects it.
    let (done, got) = two_steps(&folder, "split-unknown", &format!("{options},blaslt=130800"), &by_rule);
    near(&got, &want);
    done.says(&["offers an algorithm that computes wrongly"]);
}

#[test]
fn an_algorithm_that_computes_wrongly_is_found_and_another_taken() {
    let Some(folder) = stand_in() else { return };
    for precision in ["f32", "bf16"] {
        let precision = format!("train.precision={precision}");
        let (_, want) = two_steps(&folder, "all-right", "checks=off", &[&precision]);
        let wrong = "checks=off,first_algorithm=1,wrong_algorithm=1";
        let (done, got) = two_steps(&folder, "one-wrong", wrong, &[&precision, "train.deterministic=true"]);
        near(&got, &want);
        done.says(&["offers an algorithm that computes wrongly"]);
        // With timing it may or may not win.
        let (_, got) = two_steps(&folder, "one-wrong-timed", wrong, &[&precision]);
        near(&got, &want);
        for run in ["all-right", "one-wrong", "one-wrong-timed"] {
            std::fs::remove_dir_all(path(run)).unwrap();
        }
    }
}

#[test]
fn a_remembered_algorithm_that_cannot_be_launched_is_replaced() {
    let Some(folder) = stand_in() else { return };
    let more = ["train.precision=f32"];
    let (_, want) = two_steps(&folder, "remembered", "checks=off,algorithms=1", &more);
    std::fs::rename(path("remembered-cache"), path("replaced-cache")).unwrap();
    let (_, got) = two_steps(&folder, "replaced", "checks=off,fail_algorithm=0", &more);
    near(&got, &want);
}

#[test]
fn fused_or_apart_is_decided_by_the_clock() {
    let Some(folder) = stand_in() else { return };
    let bench = |name: &str, options: &str| {
        let args = ["bench", "--model", "Ti/16", "--batch", "1", "--device", "cuda", "--json"];
        let short = ["--seconds", "0.01", "--set", "model.image=32", "--set", "model.depth=2"];
        let mut command = on_gpu(&folder, &format!("checks=off,{options}"), &[&args[..], &short].concat());
        command.env("VITRUM_CACHE", path(name));
        finish(command).ok().json()["products"].as_array().unwrap().clone()
    };
    // So slow that no pause of a busy machine outweighs it. The time that bias sums add to a kernel is lost in noise,
    // so `beside` may win where kernels are slow.
    for (options, hopeless) in [("slow_epilogue=3000", "fused"), ("slow_kernels=20000", "apart")] {
        let cache = format!("not-{hopeless}");
        let products = bench(&cache, options);
        for kind in ["BiasGelu", "GeluGrad", "BiasGrad"] {
            let of_kind: Vec<&Value> =
                products.iter().filter(|p| p["product"].as_str().unwrap().contains(kind)).collect();
            assert!(!of_kind.is_empty(), "{options}: no {kind} in {products:?}");
            for product in of_kind {
                let times = product["microseconds"].as_object().unwrap();
                assert!(times.len() > 1, "{product}");
                let way = product["way"].as_str().unwrap();
                assert_ne!(way, hopeless, "{options}: {product}");
                let chosen = times[way].as_f64().unwrap();
                assert!(times.values().all(|t| chosen <= t.as_f64().unwrap()), "{product}");
            }
        }
        // One of the ways computes bias gradients in LayerNorm's and attention's kernels.
        assert!(products.iter().any(|p| p["microseconds"].get("beside").is_some()), "{products:?}");
        // The choice is kept: nothing is timed again, and the times are the earlier ones.
        assert_eq!(bench(&cache, options), products, "{options}");
    }
}
