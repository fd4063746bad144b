//! The command line from outside: exit codes and messages that need no training.

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use predicates::prelude::*;
use predicates::str::{contains, is_empty, starts_with};

fn vitrum(args: &[&str]) -> Assert {
    Command::new(env!("CARGO_BIN_EXE_vitrum")).args(args).assert()
}

/// Wrong usage: exit 2, nothing on stdout, and these two lines on stderr.
fn refused(args: &[&str], error: &str, hint: &str) {
    let text = format!("error: {error}\nhint: {hint}\n");
    vitrum(args).code(2).stdout(is_empty()).stderr(text);
}

#[test]
fn without_a_command_the_help_is_printed() {
    for args in [&[][..], &["--help"]] {
        let help = contains("Usage: vitrum").and(contains("train").and(contains("doctor")));
        vitrum(args).success().stdout(help);
    }
    vitrum(&["--version"]).success().stdout(format!("vitrum {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn train_help_lists_the_built_in_recipes() {
    let help = contains("`vitrum recipes` says what each expects");
    for name in ["demo", "demo-hard", "mini/cifar10", "b16/imagenet21k"] {
        vitrum(&["train", "--help"]).success().stdout(help.clone().and(contains(name)));
    }
    // A title is wrapped, not cut.
    vitrum(&["recipes"])
        .success()
        .stdout(contains("Oxford Flowers (102 classes, 1,020 pictures): 500 steps"));
}

#[test]
fn unknown_commands_and_flags_are_wrong_usage() {
    vitrum(&["trian"]).code(2).stdout(is_empty()).stderr(contains("'train'"));
    vitrum(&["train", "--no-such-flag"]).code(2).stderr(contains("--no-such-flag"));
    vitrum(&["eval"]).code(2).stderr(contains("--weights"));
    vitrum(&["train", "--device", "tpu"])
        .code(2)
        .stderr(contains("a device is `auto`, `cpu`, `cuda` or `cuda:N`"));
    vitrum(&["train", "--overfit", "0"]).code(2);
    vitrum(&["predict", "--weights", "x.safetensors"]).code(2).stderr(contains("IMAGE"));
    let protocol = ["eval", "--weights", "x", "--data", "y", "--protocol", "vit"];
    vitrum(&protocol).code(2).stderr(contains("there is no protocol `vit`").and(contains("`vit_jax`")));
    let probe = ["probe", "--weights", "x", "--data", "y"];
    vitrum(&[&probe[..], &["--l2", "-1"]].concat()).code(2);
    vitrum(&[&probe[..], &["--l2", "0"]].concat()).code(2).stderr(contains("above 0"));
    vitrum(&[&probe[..], &["--shots", "1,0"]].concat()).code(2).stderr(contains("`--shots`"));
    vitrum(&[&probe[..], &["--method", "svm"]].concat()).code(2).stderr(contains("ridge, fewshot, knn"));
}

#[test]
fn a_negative_number_is_a_value() {
    for (flag, value, says) in [
        ("--lr", "-1", "`optim.lr` is -1"),
        ("--lr", "-0.5", "`optim.lr` is -0.5"),
        ("--seed", "-3", "`train.seed` is -3"),
        ("--lr", "-1e-3", "write `--lr=-1e-3`"),
        ("--lr=-1e-3", "--dry-run", "`optim.lr` is -0.001"),
        ("--overfit", "-2", "'-2' for '--overfit"),
    ] {
        vitrum(&["train", flag, value]).code(2).stderr(contains(says));
    }
    vitrum(&["predict", "--weights", "x", "--threshold", "-1", "y"]).code(2).stderr(contains("from 0 to 1"));
    refused(&["train", "-1"], "`vitrum train` has no flag `-1`", "`vitrum train --help` lists its flags");
}

/// Flags of other programs, settings without `--set`, typing errors.
#[test]
fn a_flag_that_is_none_is_answered_with_what_can_be_typed() {
    for (args, hint) in [
        ("train --weight-decay 0.1", "it is a setting of the recipe: `--set optim.weight_decay=0.1`"),
        ("train --optim.lr=0.1", "it is a setting of the recipe: `--set optim.lr=0.1`"),
        ("train --micro-batch", "it is a setting of the recipe: `--set train.micro_batch=VALUE`"),
        ("finetune --drop-path 0.1", "it is a setting of the recipe: `--set model.drop_path=0.1`"),
        ("train --imgsz 64 --epochs 2", "here it is `--image 64`"),
        ("finetune --pretrained m.npz", "here it is `--weights m.npz`"),
        ("train --opt lion", "here it is `--set optim.name=lion`"),
        ("train --stepz 3", "did you mean `--steps`?"),
        ("eval --nothing-like-it", "`vitrum eval --help` lists its flags"),
    ] {
        let words: Vec<&str> = args.split(' ').collect();
        let flag = words[1].split('=').next().unwrap();
        refused(&words, &format!("`vitrum {}` has no flag `{flag}`", words[0]), hint);
    }
    // Hints work when typed.
    for (flag, value) in
        [("--weight-decay", "0.1"), ("--imgsz", "64"), ("--opt", "lion"), ("--smoothing", "0.1")]
    {
        let said = String::from_utf8(vitrum(&["train", flag, value]).get_output().stderr.clone()).unwrap();
        let typed = said.split('`').rev().nth(1).unwrap();
        let words: Vec<&str> =
            ["train", "demo"].into_iter().chain(typed.split(' ')).chain(["--dry-run"]).collect();
        vitrum(&words).success();
    }
}

/// Each everyday flag equals the `--set` in its help.
#[test]
fn everyday_flags_are_settings() {
    let recipe = |args: &[&str]| {
        let words = [&["train", "demo", "--dry-run"], args].concat();
        String::from_utf8(vitrum(&words).success().get_output().stdout.clone()).unwrap()
    };
    let plain = recipe(&[]);
    for (flag, set) in [
        (["--steps", "77"], "train.steps=77"),
        (["--epochs", "2.5"], "train.epochs=2.5"),
        (["--batch", "96"], "train.batch=96"),
        (["--lr", "0.25"], "optim.lr=0.25"),
        (["--seed", "5"], "train.seed=5"),
        (["--image", "48"], "model.image=48"),
        (["--name", "mine"], "train.name=mine"),
        (["--data", "demo-hard"], "data.train=demo-hard"),
    ] {
        let by_flag = recipe(&flag);
        assert_eq!(by_flag, recipe(&["--set", set]), "{set}");
        assert_ne!(by_flag, plain, "{set}");
        let (key, value) = set.split_once('=').unwrap();
        let help = format!("`--set {key}=");
        vitrum(&["train", "--help"]).success().stdout(contains(help.as_str()));
        // `--set` comes last and wins.
        let other = format!("{key}={}", if value.parse::<f64>().is_ok() { "64" } else { "demo" });
        assert_eq!(recipe(&[flag[0], flag[1], "--set", &other]), recipe(&["--set", &other]), "{set}");
    }
    refused(
        &["train", "--name", "a/b"],
        "`train.name` is `a/b`, which is not a folder name",
        "give a plain name, or the whole path with `--out DIR`",
    );
}

#[test]
fn a_path_that_is_something_else_is_said_first() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("model.safetensors"), b"").unwrap();
    let model = model.to_str().unwrap();
    refused(
        &["train", model],
        &format!("{model}: a model, not a recipe"),
        &format!("`vitrum finetune --weights {model} --data DIR` trains it further"),
    );
    for (command, more) in
        [("eval", &[][..]), ("finetune", &[]), ("features", &["--out", "x"]), ("probe", &[])]
    {
        let words = [&[command, "--weights", "no-such.npz", "--data", "no-such-data"], more].concat();
        vitrum(&words).code(1).stderr(starts_with("error: no-such.npz: no such file or folder"));
    }
    for end in ["onnx", "pt", "pth", "PTH"] {
        let to = temp.path().join(format!("x.{end}"));
        vitrum(&["convert", model, to.to_str().unwrap()])
            .code(2)
            .stderr(contains("are not written").and(contains("--to")));
    }
}

/// A name from the HuggingFace hub is looked up in the local cache and never fetched.
#[test]
fn a_hub_name_is_opened_where_the_hub_keeps_it() {
    let temp = tempfile::tempdir().unwrap();
    let inspect = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vitrum"));
        command.args(["inspect", "owner/vit-tiny"]).env("HF_HUB_CACHE", temp.path()).assert()
    };
    inspect().code(1).stderr(contains("`hf download owner/vit-tiny` fetches it"));
    let model = temp.path().join("models--owner--vit-tiny");
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::create_dir_all(model.join("snapshots/abc")).unwrap();
    std::fs::write(model.join("refs/main"), "abc").unwrap();
    std::fs::write(model.join("snapshots/abc/model.safetensors"), b"not one").unwrap();
    inspect().code(1).stderr(contains("snapshots/abc/model.safetensors"));
}

#[test]
fn what_is_not_built_yet_says_so() {
    let attention = ["predict", "--weights", "x", "--attention", "maps", "a.png"];
    vitrum(&attention).code(2).stderr(starts_with("error: `vitrum predict --attention` is not built yet"));
}

#[test]
fn wrong_settings_are_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let train = |set: &str, error: &str, hint: &str| {
        let sizes = ["--set", "model.width=128", "--set", "model.patch=8"];
        let args = ["train", "--out", out.to_str().unwrap(), "--set", set];
        refused(&[&args[..3], &sizes, &args[3..]].concat(), error, hint);
    };
    train("train.stpes=60", "unknown key `train.stpes`", "did you mean `train.steps`?");
    train("train.batch=0", "`train.batch` is 0", "use 1 to 1048576, as in `--set train.batch=128`");
    train(
        "model.heads=5",
        "`model.heads` is 5, which does not divide `model.width` 128",
        "use `--set model.heads=4`",
    );
    train(
        "model.image=30",
        "the patch height 8 does not divide the image height 30",
        "use `--set model.image=24` or another `model.patch`",
    );
    train("model.pool=mean", "`model.pool` cannot be `mean`", "use one of `token`, `gap`, `map`");
    train(
        "train.recompute=all",
        "`train.recompute` cannot be `all`",
        "use one of `none`, `ln+gelu`, `block`",
    );
    assert!(!out.exists());
}

#[test]
fn a_recipe_file_is_quoted_at_the_line_at_fault() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.toml");
    std::fs::write(&path, "[train]\nbatch = \"big\"\n").unwrap();
    let place = format!("error: {}, line 2, column 9: `train.batch` is the text `big`", path.display());
    vitrum(&["train", path.to_str().unwrap()])
        .code(2)
        .stderr(starts_with(place).and(contains("        ^^^^^")));
    vitrum(&["plan", "no/such/recipe"]).code(2).stderr(starts_with("error: there is no recipe"));
}

#[test]
fn inspect_says_what_it_cannot_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("notes.txt"), "no weights here").unwrap();
    std::fs::write(path("short.safetensors"), [255; 5]).unwrap();
    std::fs::create_dir_all(path("set")).unwrap();
    std::fs::write(path("set/dataset.json"), "{\"version\": 1}").unwrap();
    for name in ["missing", "notes.txt", "short.safetensors", "set", ""] {
        let error = starts_with("error: ").and(contains(path(name))).and(contains("panicked").not());
        vitrum(&["inspect", &path(name)]).code(1).stdout(is_empty()).stderr(error);
    }
}

#[test]
fn inspect_describes_the_demo_without_drawing_it() {
    let mut inspect = Command::new(env!("CARGO_BIN_EXE_vitrum"));
    let inspect = inspect.args(["inspect", "demo", "--json"]).env("VITRUM_CACHE", "/proc/none").assert();
    let json: serde_json::Value = serde_json::from_slice(&inspect.success().get_output().stdout).unwrap();
    assert_eq!(json["train"]["records"], 20_000);
    let text = contains("image: 32x32\n").and(contains("train.records: 20,000\n"));
    vitrum(&["inspect", "demo"]).success().stdout(text);
}

#[test]
fn doctor_describes_any_machine() {
    let line = predicate::str::is_match("(?m)^kernels: (none embedded|embedded for) .*$").unwrap();
    vitrum(&["doctor"]).success().stderr(is_empty()).stdout(line);
    let json = vitrum(&["doctor", "--json"]).success().get_output().stdout.clone();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert!(json["cores"].as_u64().unwrap() > 0);
    assert!(["scalar", "avx2", "avx512"].contains(&json["isa"].as_str().unwrap()));
}

#[test]
fn doctor_reports_a_wrong_environment_instead_of_failing() {
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_vitrum"));
    doctor.arg("doctor").env("VITRUM_ISA", "mmx").env("VITRUM_CACHE", "/proc/none/vitrum");
    doctor.assert().success().stdout(contains("`VITRUM_ISA=mmx`").and(contains("not writable")));
}

/// A reader that closes the pipe early (`vitrum doctor | head -1`) sees no panic.
#[test]
fn a_closed_pipe_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut doctor = std::process::Command::new(env!("CARGO_BIN_EXE_vitrum"));
    let child = doctor.arg("doctor").stdout(writer).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
