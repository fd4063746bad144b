//! Evaluating a model from outside: protocols, labels from a file, features, probes.

use crate::support;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use support::models::settings_of;
use support::{Done, names, path, scratch, stripes, train, vitrum};
use vitrum::data::classes::By;
use vitrum::data::{Dataset, Split, imagenet};
use vitrum::infer::score::Truth;
use vitrum::weights::safetensors::SafeTensors;
use vitrum::weights::{self, CheckpointMeta, ModelOverrides};

/// A run on [`stripes`]: three classes, 16 pixels, 40 pictures to validate.
fn trained() -> &'static str {
    static RUN: OnceLock<String> = OnceLock::new();
    RUN.get_or_init(|| {
        let out = path("trained");
        vitrum(&train(&out, &["train.steps=120", "model.dropout=0", "model.attention_dropout=0"])).ok();
        out
    })
}

fn eval(more: &[&str]) -> Done {
    vitrum(&[&["eval", "--weights", trained(), "--data", stripes()], more].concat())
}

fn numbers(json: &Value) -> [f64; 3] {
    ["top1", "top5", "loss"].map(|key| json[key].as_f64().unwrap())
}

fn file(name: &str, text: &str) -> String {
    let path = scratch().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// The classes of the validation pictures in the data set's order: by class, by name.
fn labels() -> Vec<usize> {
    let val = Path::new(stripes()).join("val");
    let classes = names(&val);
    classes.iter().enumerate().flat_map(|(i, class)| vec![i; names(val.join(class)).len()]).collect()
}

#[test]
fn drop_last_leaves_out_the_short_batch_alone() {
    let data = scratch().join("one-broken");
    let classes = names(Path::new(stripes()).join("val"));
    for (class, folder) in classes.iter().enumerate() {
        let (from, to) = (Path::new(stripes()).join("val").join(folder), data.join("val").join(folder));
        std::fs::create_dir_all(&to).unwrap();
        for (i, name) in names(&from).iter().enumerate() {
            // The first batch contains a picture that cannot be decoded.
            match (class, i) {
                (0, 3) => std::fs::write(to.join(name), b"no picture").unwrap(),
                _ => drop(std::fs::copy(from.join(name), to.join(name)).unwrap()),
            }
        }
    }
    let data = data.display().to_string();
    let images = |more: &[&str]| {
        let args = ["eval", "--weights", trained(), "--data", &data, "--batch", "16", "--json"];
        vitrum(&[&args[..], more].concat()).ok().json()["images"].as_u64().unwrap()
    };
    assert_eq!((images(&[]), images(&["--drop-last"])), (39, 31));
}

#[test]
fn every_protocol_measures_every_picture_once() {
    let all = eval(&["--protocol", "all", "--json"]).ok().json();
    let all = all["protocols"].as_array().unwrap().clone();
    assert!(all.len() >= 4, "{all:?}");
    for one in &all {
        assert_eq!(one["images"], 40, "{one}");
        let name = one["protocol"].as_str().unwrap();
        let alone = eval(&["--protocol", name, "--json"]).ok().json();
        assert_eq!(numbers(&alone), numbers(one), "{name}");
    }
    // The run's own protocol equals vit_jax's: the default and `--protocol vit_jax` give the same numbers.
    assert_eq!(numbers(&eval(&["--json"]).ok().json()), numbers(&all[0]));
    assert_eq!(all[0]["protocol"], "vit_jax");
    // timm's protocol enlarges and crops the 16 pixels, which gives other numbers.
    let timm = all.iter().find(|one| one["protocol"] == "timm").unwrap();
    assert_ne!(timm["loss"], all[0]["loss"]);
    let table = eval(&["--protocol", "all"]).ok().stdout;
    assert_eq!(table.lines().count(), 2 + all.len(), "{table}");
}

#[test]
fn accuracy_per_class_adds_up() {
    let json = eval(&["--json"]).ok().json();
    let classes = json["per_class"].as_array().unwrap();
    let sum = |key: &str, by: &dyn Fn(&Value) -> f64| {
        classes.iter().map(|c| c[key].as_f64().unwrap() * by(c)).sum::<f64>()
    };
    assert_eq!(sum("images", &|_| 1.0), 40.0);
    let hits = sum("top1", &|class| class["images"].as_f64().unwrap());
    assert!((hits / 40.0 - json["top1"].as_f64().unwrap()).abs() < 1e-9, "{json}");
    assert_eq!(classes[1]["name"], "checks");
    let text = eval(&["--per-class"]).ok().stdout;
    assert!(text.lines().count() == 6 && text.contains("checks"), "{text}");
}

#[test]
fn labels_from_a_file_replace_the_data_sets_own() {
    let own = numbers(&eval(&["--json"]).ok().json());
    let classes = ["across", "checks", "down"];
    let with = |name: &str, text: String| eval(&["--json", "--labels", &file(name, &text)]).ok().json();
    let lines = |line: &dyn Fn(usize) -> String| labels().iter().map(|l| line(*l) + "\n").collect::<String>();
    assert_eq!(numbers(&with("names.txt", lines(&|label| classes[label].into()))), own);
    assert_eq!(numbers(&with("numbers.txt", lines(&|label| label.to_string()))), own);
    let json = serde_json::to_string(&labels()).unwrap();
    assert_eq!(numbers(&with("labels.json", json.clone())), own);
    // Names in JSON, in order or by picture; a byte order mark.
    let data = Dataset::open(stripes(), Split::Val).unwrap();
    let named: Vec<&str> = labels().iter().map(|label| classes[*label]).collect();
    let by = |key: &dyn Fn(&str) -> String| {
        let one = |i: usize| (key(&data.record_name(i)), Value::from(named[i]));
        let all: serde_json::Map<String, Value> = (0..data.len()).map(one).collect();
        Value::Object(all).to_string()
    };
    let base = |name: &str| name.rsplit('/').next().unwrap().to_string();
    for text in [
        serde_json::json!(named).to_string(),
        by(&|name| name.into()),
        by(&base),
        format!("\u{feff}{json}"),
        format!("\u{feff}{}", lines(&|label| classes[label].into())),
    ] {
        assert_eq!(numbers(&with("other.json", text)), own);
    }
    // Any of several labels is right. A picture without a label does not count.
    let any = with("any.txt", lines(&|_| "0,1,2".into()));
    assert_eq!((any["top1"].as_f64(), any["images"].as_u64()), (Some(1.0), Some(40)));
    let some = with("some.txt", lines(&|label| if label == 0 { String::new() } else { label.to_string() }));
    let count = labels().iter().filter(|label| **label > 0).count();
    assert_eq!(
        (some["images"].as_u64(), some["unlabelled"].as_u64()),
        (Some(count as u64), Some(40 - count as u64))
    );

    let short = file("short.txt", "0\n1\n");
    eval(&["--labels", &short]).exits(1).says(&["short.txt: labels for 2 pictures", "has 40", "hint: "]);
    let wrong = file("wrong.txt", &lines(&|_| "zebra".into()));
    eval(&["--labels", &wrong]).exits(1).says(&["wrong.txt: line 1: `zebra` is not a class of the model"]);
    eval(&["--labels", "no-such-file"]).exits(1).says(&["no-such-file"]);
    for nothing in ["\n".repeat(40), format!("[{}[]]", "[],".repeat(39))] {
        let nothing = file("nothing.txt", &nothing);
        eval(&["--labels", &nothing]).exits(1).says(&["nothing.txt: no picture has a label", "hint: "]);
    }
    let other = file("other.json", "{\"elsewhere.png\": 0}");
    eval(&["--labels", &other])
        .exits(1)
        .says(&["other.json: no entry for the picture `val/across/", "hint: "]);
    let wrong = file("wrong.json", &serde_json::json!(["across", "zebra"]).to_string());
    eval(&["--labels", &wrong]).exits(1).says(&["wrong.json: entry 1 of the list: `zebra`", "0 to 2"]);
    // Two classes of one name.
    let twins = with_classes("twins.safetensors", Some(&["across", "across", "down"]));
    let on = |more: &[&str]| vitrum(&[&["eval", "--weights", &twins, "--data", stripes()], more].concat());
    on(&[]).exits(1).says(&["the model has 2 classes called `across`: numbers 0, 1", "`--labels FILE`"]);
    let twice = file("twice.txt", &lines(&|label| classes[label].into()));
    on(&["--labels", &twice]).exits(1).says(&["2 classes called `across`: numbers 0, 1"]);
    on(&["--labels", &file("numbers.txt", &lines(&|label| label.to_string()))]).ok();
}

#[test]
fn features_are_what_the_head_reads() {
    let out = path("features.safetensors");
    let args = ["features", "--weights", trained(), "--data", stripes(), "--out", &out];
    vitrum(&args).ok().says(&["24 features of 40 images"]);
    let stored = SafeTensors::open(Path::new(&out)).unwrap();
    assert_eq!(stored.shape("features").unwrap(), [40, 24]);
    let want: Vec<i64> = labels().iter().map(|label| *label as i64).collect();
    assert_eq!(stored.i64("labels").unwrap(), want);
    assert_eq!(stored.metadata()["classes"], "[\"across\",\"checks\",\"down\"]");

    // The head on top of them gives the accuracy that `eval` measures.
    let model = vitrum::weights::open(Path::new(trained()), &Default::default()).unwrap();
    let [weight, bias] = ["head.weight", "head.bias"].map(|name| model.tensors.get(name).unwrap().values);
    let features = stored.tensor("features").unwrap().values;
    let right = features.chunks(24).zip(labels()).filter(|(x, label)| {
        let logit = |c: usize| bias[c] + x.iter().zip(&weight[c * 24..]).map(|(x, w)| x * w).sum::<f32>();
        (0..3).all(|c| c == *label || logit(c) < logit(*label))
    });
    let top1 = eval(&["--json"]).ok().json()["top1"].as_f64().unwrap();
    assert_eq!(right.count() as f64 / 40.0, top1);

    vitrum(&[&args[..], &["--split", "train"]].concat()).ok().says(&["of 96 images"]);
    vitrum(&["features", "--weights", trained(), "--data", "/no/such", "--out", &out]).exits(1);
}

#[test]
fn probes_find_in_the_features_what_training_put_there() {
    let probe = |more: &[&str]| {
        let args = [&["probe", "--weights", trained(), "--data", stripes(), "--json"], more].concat();
        vitrum(&args).ok().json()
    };
    let ridge = probe(&[]);
    assert_eq!((ridge["train_images"].as_u64(), ridge["images"].as_u64()), (Some(96), Some(40)));
    assert!(ridge["results"]["top1"].as_f64().unwrap() > 0.6, "{ridge}");
    assert_eq!(probe(&["--l2", "2.5"])["results"]["l2"], 2.5);
    let few = probe(&["--method", "fewshot", "--shots", "1,10", "--seeds", "2"]);
    let shots = few["results"]["shots"].as_array().unwrap();
    assert_eq!((shots.len(), shots[1]["top1"].as_array().unwrap().len()), (2, 2), "{few}");
    assert!(shots[1]["mean"].as_f64().unwrap() > 0.5, "{few}");
    let knn = probe(&["--method", "knn", "--k", "5"]);
    assert!(knn["results"][0]["top1"].as_f64().unwrap() > 0.5, "{knn}");
    assert_eq!(probe(&["--images", "30"])["train_images"], 30);
    // A part with some of the classes is measured by their names, by both commands.
    let some = scratch().join("some-to-test");
    for (part, classes) in [("train", &["across", "checks", "down"][..]), ("test", &["checks", "down"])] {
        for class in classes {
            let from = Path::new(stripes()).join(if part == "test" { "val" } else { part }).join(class);
            let to = some.join(part).join(class);
            std::fs::create_dir_all(&to).unwrap();
            names(&from).iter().for_each(|name| {
                let _ = std::fs::copy(from.join(name), to.join(name)).unwrap();
            });
        }
    }
    let some = some.display().to_string();
    let lacks = "the test part: it has no class `across`, 1 of 3 classes";
    let of_some = |args: &[&str]| {
        let args = [args, &["--weights", trained(), "--data", &some, "--split", "test", "--json"]].concat();
        vitrum(&args).ok().says(&[lacks]).json()
    };
    let all = eval(&["--json"]).ok().json();
    assert_eq!(
        of_some(&["eval"])["per_class"].as_array().unwrap()[..],
        all["per_class"].as_array().unwrap()[1..]
    );
    // Even one class.
    let one = Path::new(stripes()).join("val").join("down");
    let alone = scratch().join("alone");
    std::fs::create_dir_all(&alone).unwrap();
    std::os::unix::fs::symlink(&one, alone.join("down")).unwrap();
    let alone = ["eval", "--weights", trained(), "--data", alone.to_str().unwrap(), "--json"];
    assert_eq!(vitrum(&alone).ok().json()["per_class"][0], all["per_class"][2]);
    let knn = of_some(&["probe", "--method", "knn", "--k", "5"]);
    assert_eq!((knn["train_images"].as_u64(), knn["images"].as_u64()), (Some(96), Some(26)));
    assert!(knn["results"][0]["top1"].as_f64().unwrap() > 0.5, "{knn}");
    // A data set without a validation part cannot be scored on.
    let train = Path::new(stripes()).join("train").display().to_string();
    vitrum(&["probe", "--weights", trained(), "--data", &train]).exits(1).says(&["no validation part"]);
}

/// A model of 1,000 classes without names is assumed to be ImageNet's. So are folders named by WordNet ids,
/// even if only some exist.
#[test]
fn folders_named_after_wordnet_ids_meet_the_published_heads() {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let folder = std::env::var_os("VITRUM_TEST_DATA").map_or(default, PathBuf::from).join("imagenet-mini");
    if !folder.is_dir() {
        println!("skipped: no pictures at {}", folder.display());
        return;
    }
    let data = Dataset::open(folder.to_str().unwrap(), Split::Val).unwrap();
    let mut truth = Truth::of(&data, 1000, None).unwrap();
    assert_eq!(truth.matching.take().unwrap().by, By::Name);
    let class = |i: usize| imagenet::class_of(&data.classes()[data.label(i)]).unwrap();
    let expected: Vec<usize> = (0..data.len()).map(class).collect();
    let list = file("imagenet.json", &serde_json::to_string(&expected).unwrap());
    assert_eq!(truth, Truth::read(Path::new(&list), &data, 1000, None).unwrap());
    assert!(expected.iter().any(|class| *class > 500));
    let error = Truth::of(&data, 999, None).unwrap_err();
    assert!(error.message().contains("the model has 999"), "{error}");
}

// ---- Classes ----

/// Links the validation pictures of some classes of [`stripes`] under other folder names.
fn renamed(name: &str, folders: &[(&str, &str)]) -> String {
    let root = scratch().join(name);
    for (from, to) in folders {
        let (from, to) = (Path::new(stripes()).join("val").join(from), root.join("val").join(to));
        std::fs::create_dir_all(&to).unwrap();
        for name in names(&from) {
            std::fs::copy(from.join(&name), to.join(&name)).unwrap();
        }
        // A training part, so that the other part is a validation part.
        let train = root.join("train").join(to.file_name().unwrap());
        std::fs::create_dir_all(&train).unwrap();
        std::fs::copy(to.join(&names(&to)[0]), train.join("0.png")).unwrap();
    }
    root.display().to_string()
}

/// The trained model without class names, or with other names.
fn with_classes(name: &str, classes: Option<&[&str]>) -> String {
    let file = weights::open(Path::new(trained()), &ModelOverrides::default()).unwrap();
    let classes = classes.map(|names| names.iter().map(|n| n.to_string()).collect());
    let path = scratch().join(name);
    weights::save(
        &path,
        &file.config,
        &file.tensors.all().unwrap(),
        &CheckpointMeta { classes, ..file.meta },
    )
    .unwrap();
    path.display().to_string()
}

#[test]
fn classes_meet_by_name_by_number_or_by_place_and_one_line_says_which() {
    let top1 = |done: &Done| done.json()["top1"].as_f64().unwrap();
    let own = eval(&["--json"]).ok();
    own.says(&["classes  3 of the data are among the model's 3, by name"]);
    let expected = top1(&eval(&["--json"]).ok());
    let on = |weights: &str, data: &str| vitrum(&["eval", "--weights", weights, "--data", data, "--json"]);

    // Two of three classes: the share of hits among their pictures.
    let some = renamed("some", &[("down", "down"), ("checks", "checks")]);
    let of_some = on(trained(), &some).ok();
    let per_class = eval(&["--json"]).ok().json();
    let (mut images, mut hits) = (0.0, 0.0);
    for class in &per_class["per_class"].as_array().unwrap()[1..] {
        images += class["images"].as_f64().unwrap();
        hits += class["images"].as_f64().unwrap() * class["top1"].as_f64().unwrap();
    }
    assert_eq!(of_some.json()["images"].as_f64(), Some(images));
    assert!((top1(&of_some) - hits / images).abs() < 1e-9);
    of_some.says(&["2 of the data are among the model's 3, by name"]);

    let bare = with_classes("bare.safetensors", None);
    let numbers = renamed("numbers", &[("across", "0"), ("checks", "1"), ("down", "2")]);
    let by_number = on(&bare, &numbers).ok();
    assert_eq!((top1(&by_number), &by_number.json()["classes_matched"]), (expected, &"number".into()));
    let by_place = on(&bare, stripes()).ok();
    assert_eq!((top1(&by_place), &by_place.json()["classes_matched"]), (expected, &"place".into()));

    // WordNet's folders and a model with English names, in another order.
    let english = with_classes(
        "english.safetensors",
        Some(&["goldfish, Carassius auratus", "tench", "great white shark"]),
    );
    let wordnet =
        renamed("wordnet", &[("across", "n01443537"), ("checks", "n01440764"), ("down", "n01484850")]);
    let by_list = on(&english, &wordnet).ok();
    assert_eq!((top1(&by_list), &by_list.json()["classes_matched"]), (expected, &"name".into()));

    // Names that disagree do not match, even with equal counts.
    let others = renamed("others", &[("across", "ant"), ("checks", "bee"), ("down", "cow")]);
    on(trained(), &others).exits(1).says(&["a class `ant`", "it has `across` and 3 in all"]);
}

#[test]
fn a_sigmoid_model_says_how_likely_each_class_is_by_itself() {
    let list = scratch().join("several.csv");
    let val = Path::new(stripes()).join("val");
    let mut text = String::from("path,labels\n");
    for class in ["across", "checks"] {
        for name in names(val.join(class)) {
            text += &format!("stripes/val/{class}/{name},{class};picture\n");
        }
    }
    std::fs::write(&list, text).unwrap();
    let (list, out) = (list.display().to_string(), path("several"));
    let data = format!("data.train={list}");
    let sets = [
        &data,
        "model.image=16",
        "train.batch=16",
        "train.steps=120",
        "loss.kind=sigmoid",
        "loss.label_smoothing=0",
        "augment.mixup=0",
        "model.dropout=0",
    ];
    vitrum(&train(&out, &sets)).ok();
    let picture = val.join("across").join(&names(val.join("across"))[0]).display().to_string();
    let shown = |more: &[&str]| {
        let json = vitrum(&[&["predict", "--weights", &out, &picture, "--json"], more].concat()).ok().json();
        json["predictions"][0]["top"].as_array().unwrap().clone()
    };
    let all = shown(&[]);
    let of = |name: &str| all.iter().find(|c| c["name"] == name).unwrap()["probability"].as_f64().unwrap();
    assert!(of("picture") > 0.8 && of("across") > 0.5 && of("checks") < 0.5, "{all:?}");
    assert_eq!(shown(&["--threshold", "0.5"]).len(), 2);
    assert_eq!(shown(&["--threshold", "0.5", "--top", "1"]).len(), 1);

    let json = vitrum(&["eval", "--weights", &out, "--data", &list, "--json"]).ok().json();
    assert_eq!(json["loss_kind"], "sigmoid");
    assert!(json["mAP"].as_f64().unwrap() > 0.9 && json["f1"].as_f64().unwrap() > 0.8, "{json}");
    let text = vitrum(&["eval", "--weights", &out, "--data", &list, "--per-class"]).ok().stdout;
    assert!(text.contains("mAP") && text.contains("F1") && text.contains("  AP\n"), "{text}");
    let of_classes = json["per_class"].as_array().unwrap();
    let mean = of_classes.iter().map(|class| class["AP"].as_f64().unwrap()).sum::<f64>() / 3.0;
    assert!((json["mAP"].as_f64().unwrap() - mean).abs() < 1e-9, "{json}");

    // A format that holds no loss is told it.
    let npz = path("several.npz");
    let lost = vitrum(&["convert", &out, &npz]).ok();
    let mut told = settings_of(&lost.stderr);
    told.extend(["--protocol", "vit_jax"].map(String::from));
    assert!(told.contains(&"loss.kind=sigmoid".into()), "{}", lost.stderr);
    lost.says(&["its pictures are prepared with `--protocol vit_jax`"]);
    let told: Vec<&str> = told.iter().map(String::as_str).collect();
    let silent: Vec<&str> =
        told.chunks(2).filter(|pair| pair[1] != "loss.kind=sigmoid").flatten().copied().collect();
    let shares_of_npz = |more: &[&str]| {
        let args = [&["predict", "--weights", &npz, &picture, "--json"], more].concat();
        let json = vitrum(&args).ok().json();
        json["predictions"][0]["top"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["probability"].as_f64().unwrap())
            .sum()
    };
    let sum: f64 = all.iter().map(|c| c["probability"].as_f64().unwrap()).sum();
    let (as_softmax, as_sigmoid): (f64, f64) = (shares_of_npz(&silent), shares_of_npz(&told));
    assert!(
        (as_softmax - 1.0).abs() < 1e-6 && (as_sigmoid - sum).abs() < 1e-4,
        "{as_softmax} {as_sigmoid} {sum}"
    );
    let of_npz = [&["eval", "--weights", &npz, "--data", &list, "--json"], &told[..]].concat();
    let done = vitrum(&of_npz).ok();
    assert!(!done.stderr.contains("does not say"), "{}", done.stderr);
    let of_npz = done.json();
    vitrum(&[&["eval", "--weights", &npz, "--data", &list], &silent[..]].concat())
        .ok()
        .says(&["note: the file does not say its head's loss: assumed softmax", "--set loss.kind=sigmoid"]);
    assert_eq!((&of_npz["mAP"], &of_npz["loss_kind"]), (&json["mAP"], &"sigmoid".into()));
    let features = path("several-npz-features");
    let args = ["features", "--weights", &npz, "--data", &list, "--out", &features];
    vitrum(&[&args, &told[..]].concat()).ok();
    // `convert` writes it into a format that holds it.
    let kept = path("several-kept.safetensors");
    vitrum(&[&["convert", &npz, &kept], &told[..told.len() - 2]].concat()).ok();
    let kept = ["eval", "--weights", &kept, "--data", &list, "--protocol", "vit_jax", "--json"];
    assert_eq!(vitrum(&kept).ok().json()["mAP"], json["mAP"]);
    vitrum(&["eval", "--weights", &npz, "--data", &list, "--set", "loss.kind=bce"])
        .exits(2)
        .says(&["`loss.kind` is `bce`", "--set loss.kind=sigmoid"]);

    // Every label counts, not only a picture's first.
    let counts = vitrum(&["inspect", &list, "--json"]).ok().json();
    let [across, checks] = ["across", "checks"].map(|class| names(val.join(class)).len());
    let all = across + checks;
    assert_eq!(counts["records_per_class"], serde_json::json!([across, checks, all]), "{counts}");
    let images: Vec<_> = of_classes.iter().map(|class| class["images"].as_u64().unwrap() as usize).collect();
    assert_eq!(images, [across, checks, all]);
    let features = path("several-features");
    vitrum(&["features", "--weights", &out, "--data", &list, "--out", &features]).ok();
    let file = SafeTensors::open(Path::new(&features)).unwrap();
    assert_eq!(file.shape("labels").unwrap(), [all, 3]);
    let ones = file.i64("labels").unwrap();
    let of_class = |class: usize| ones.chunks_exact(3).map(|row| row[class] as usize).sum::<usize>();
    assert_eq!([0, 1, 2].map(of_class), [across, checks, all]);
    let ridge = ["probe", "--weights", &out, "--data", &list];
    vitrum(&ridge).exits(1).says(&["hint: "]);
}

#[test]
fn the_part_that_is_measured_is_named_and_never_training_unasked() {
    eval(&[]).ok().says(&["the val part of", "(40 images)"]);
    eval(&["--split", "train"]).ok().says(&["the train part of", "(96 images)"]);
    eval(&["--split", "test"]).exits(1).says(&["no test part, only train and val"]);
    let json = eval(&["--split", "train", "--json"]).ok().json();
    assert_eq!((json["split"].as_str(), json["images"].as_u64()), (Some("train"), Some(96)));
    let alone = scratch().join("train-alone");
    std::fs::create_dir_all(&alone).unwrap();
    std::os::unix::fs::symlink(Path::new(stripes()).join("train"), alone.join("training")).unwrap();
    let alone = alone.display().to_string();
    let args = ["eval", "--weights", trained(), "--data", &alone];
    vitrum(&args).exits(1).says(&["no val part, only train", "--split train"]);
    vitrum(&[&args[..], &["--split", "train"]].concat()).ok().says(&["(96 images)"]);
    let whole = format!("{}/val", stripes());
    vitrum(&["eval", "--weights", trained(), "--data", &whole]).ok().says(&["all of", "has no parts"]);
}

#[test]
fn predict_goes_through_folders_and_patterns_and_past_bad_files() {
    let folder = scratch().join("to-predict");
    let from = Path::new(stripes()).join("val/checks");
    std::fs::create_dir_all(folder.join("deep")).unwrap();
    for (from_name, to) in names(&from).iter().zip(["1.png", "3.png", "deep/4.png"]) {
        std::fs::copy(from.join(from_name), folder.join(to)).unwrap();
    }
    let folder = folder.display().to_string();
    let predict = |more: &[&str]| vitrum(&[&["predict", "--weights", trained(), "--json"], more].concat());
    let seen = |done: Done| {
        let json = done.json();
        let images = json["predictions"].as_array().unwrap().iter();
        images
            .map(|p| p["image"].as_str().unwrap().rsplit('/').next().unwrap().to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(seen(predict(&[&folder]).ok()), ["1.png", "3.png", "4.png"]);
    assert_eq!(seen(predict(&[&format!("{folder}/*.png")]).ok()), ["1.png", "3.png"]);
    let of_val = seen(predict(&[stripes(), "--split", "val"]).ok());
    assert_eq!(of_val.len(), 40);
    // Every kind of data set that `eval` takes; those without parts are taken whole.
    let (packed, tar, table) = (path("to-predict-packed"), path("to-predict.tar"), path("to-predict.csv"));
    vitrum(&["pack", stripes(), &packed]).ok();
    let archive = std::process::Command::new("tar").args(["-C", stripes(), "-cf", &tar, "."]).status();
    assert!(archive.unwrap().success());
    let rows: String = ["train", "val"]
        .into_iter()
        .flat_map(|part| names(Path::new(stripes()).join(part)).into_iter().map(move |class| (part, class)))
        .flat_map(|(part, class)| {
            let files = names(Path::new(stripes()).join(part).join(&class));
            files.into_iter().map(move |file| format!("stripes/{part}/{class}/{file},{class},{part}\n"))
        })
        .collect();
    std::fs::write(&table, format!("path,label,split\n{rows}")).unwrap();
    for data in [&packed, &tar, &table] {
        assert_eq!(seen(predict(&[data, "--split", "val"]).ok()), of_val, "{data}");
        assert_eq!(seen(predict(&[data]).ok()).len(), 136, "{data}");
    }
    let one = |args: &[&str]| predict(args).ok().json()["predictions"].as_array().unwrap()[7]["top"].clone();
    assert_eq!(one(&[&packed, "--split", "val"]), one(&[stripes(), "--split", "val"]));
    let paths = file("paths.txt", "stripes/val/down/002.png\n");
    predict(&[&paths]).exits(1).says(&["is not `PATH LABEL`", &format!("- < {paths}`")]);
    predict(&["/no/such", "--split", "val"]).exits(1).says(&["/no/such: no such file or folder"]);
    let whole = predict(&[&format!("{}/train", stripes()), "--split", "val"]).exits(1);
    whole.says(&["the data has no parts", "hint: leave out `--split`"]);
    std::fs::write(format!("{folder}/2.png"), b"junk").unwrap();
    // The same answers as rows, and as pictures of the pictures.
    let saved = path("predicted");
    let out = vitrum(&[
        "predict",
        "--weights",
        trained(),
        "--csv",
        "--top",
        "2",
        "--save",
        &saved,
        stripes(),
        "--split",
        "val",
    ])
    .ok();
    let rows: Vec<String> = out.stdout.lines().map(str::to_owned).collect();
    assert_eq!(rows[0], "image,rank,class,name,probability");
    assert_eq!(rows.len(), 1 + 2 * of_val.len());
    let files = std::fs::read_dir(&saved).unwrap().count();
    assert_eq!(files, of_val.len());
    let done = predict(&[&folder]).exits(1).says(&["2.png", "1 of 4 pictures could not be read"]);
    assert_eq!(seen(done), ["1.png", "3.png", "4.png"]);
}
