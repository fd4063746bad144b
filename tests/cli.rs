//! The command line from outside: exit codes and messages that need no training.

use regex_lite::Regex;

use crate::support::{command, finish, vitrum};

/// Wrong usage: exit 2, nothing on stdout, and these two lines on stderr.
#[track_caller]
fn refused(args: &[&str], error: &str, hint: &str) {
    let done = vitrum(args).exits(2);
    assert_eq!(done.stderr, format!("error: {error}\nhint: {hint}\n"));
    assert_eq!(done.stdout, "");
}

#[test]
fn without_a_command_the_help_is_printed() {
    for args in [&[][..], &["--help"]] {
        vitrum(args).ok().prints(&["Usage: vitrum", "train", "doctor"]);
    }
    assert_eq!(vitrum(&["--version"]).ok().stdout, format!("vitrum {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn train_help_lists_the_built_in_recipes() {
    let mut wanted = vec!["`vitrum recipes` says what each expects"];
    wanted.extend(["demo", "demo-hard", "mini/cifar10", "b16/imagenet21k"]);
    vitrum(&["train", "--help"]).ok().prints(&wanted);
    // A title is wrapped, not cut.
    vitrum(&["recipes"]).ok().prints(&["Oxford Flowers (102 classes, 1,020 pictures): 500 steps"]);
}

#[test]
fn unknown_commands_and_flags_are_wrong_usage() {
    assert_eq!(vitrum(&["trian"]).exits(2).says(&["'train'"]).stdout, "");
    vitrum(&["train", "--no-such-flag"]).exits(2).says(&["--no-such-flag"]);
    vitrum(&["eval"]).exits(2).says(&["--weights"]);
    vitrum(&["train", "--device", "tpu"]).exits(2).says(&["a device is `auto`, `cpu`, `cuda` or `cuda:N`"]);
    vitrum(&["train", "--overfit", "0"]).exits(2);
    vitrum(&["predict", "--weights", "x.safetensors"]).exits(2).says(&["IMAGE"]);
    let protocol = ["eval", "--weights", "x", "--data", "y", "--protocol", "vit"];
    vitrum(&protocol).exits(2).says(&["there is no protocol `vit`", "`vit_jax`"]);
    let probe = ["probe", "--weights", "x", "--data", "y"];
    vitrum(&[&probe[..], &["--l2", "-1"]].concat()).exits(2);
    vitrum(&[&probe[..], &["--l2", "0"]].concat()).exits(2).says(&["above 0"]);
    vitrum(&[&probe[..], &["--shots", "1,0"]].concat())
        .exits(2)
        .says(&["`--shots 0`: expected a whole number from 1 up"]);
    vitrum(&[&probe[..], &["--method", "svm"]].concat()).exits(2).says(&["ridge, fewshot, knn"]);
}

#[test]
fn a_negative_number_is_a_value() {
    for (flag, value, says) in [
        ("--lr", "-1", "`optim.lr` is -1"),
        ("--lr", "-0.5", "`optim.lr` is -0.5"),
        ("--seed", "-3", "`train.seed` is -3"),
        ("--lr", "-1e-3", "`optim.lr` is -0.001"),
        ("--lr=-1e-3", "--dry-run", "`optim.lr` is -0.001"),
        ("--overfit", "-2", "`--overfit -2`: expected a whole number from 1 up"),
    ] {
        vitrum(&["train", flag, value]).exits(2).says(&[says]);
    }
    vitrum(&["predict", "--weights", "x", "--threshold", "-1", "y"]).exits(2).says(&["from 0 to 1"]);
    refused(
        &["doctor", "now"],
        "`vitrum doctor` takes no argument `now`",
        "`vitrum doctor --help` shows what it takes",
    );
    refused(
        &["--device", "cpu", "train"],
        "`--device` comes before the command",
        "write it after, as in `vitrum train --device ...`",
    );
    assert!(!vitrum(&["bench", "--batch", "0"]).exits(2).stderr.contains("hint"));
    refused(&["train", "-1"], "`vitrum train` has no flag `-1`", "`vitrum train --help` lists its flags");
}

/// Numbers as other programs and spreadsheets write them: the answer shows what to type, and that works.
#[test]
fn numbers_in_other_spellings_are_answered_with_ours() {
    for (words, error, hint) in [
        ("--steps 1e3", "`train.steps` is 1000.0, expected a whole number from 0 up", "1000"),
        ("--steps 1,000", "`train.steps` is the text `1,000`, expected a whole number from 0 up", "1000"),
        ("--batch 2k", "`train.batch` is the text `2k`, expected a whole number from 0 up", "2000"),
        ("--lr 0,001", "`optim.lr` is the text `0,001`, expected a number", "0.001"),
        (
            "--set loss.label_smoothing=10%",
            "`loss.label_smoothing` is the text `10%`, expected a number",
            "0.1",
        ),
        ("--overfit 1e1", "`--overfit 1e1`: expected a whole number from 1 up", "10"),
    ] {
        let words: Vec<&str> = ["train", "demo", "--dry-run"].into_iter().chain(words.split(' ')).collect();
        let said = vitrum(&words).exits(2).says(&[&format!("error: {error}\n")]).stderr;
        let typed = said.split('`').rev().nth(1).unwrap();
        assert!(typed.ends_with(hint), "{said}");
        let wrong = words.last().unwrap().rsplit('=').next().unwrap();
        let right: Vec<String> = words.iter().map(|word| word.replace(wrong, hint)).collect();
        vitrum(&right).ok();
    }
    for (words, error) in [
        (
            "eval --weights x --data y --batch 99999999999",
            "`--batch 99999999999`: expected a whole number from 1 to 65535",
        ),
        ("bench --seconds -1", "`--seconds -1`: expected a number from 0 up"),
        ("probe --weights x --data y --k -1", "`--k -1`: expected a whole number from 1 up"),
        ("pack x y --minival -0.1", "`--minival -0.1`: expected a number from 0 to 0.9"),
        ("train --seed 99999999999999999999", "expected a whole number from 0 to 9223372036854775807"),
        (
            "train --set augment.fill=[0,0,300]",
            "`augment.fill` is a list with 300, expected whole numbers from 0 to 255",
        ),
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        vitrum(&words).exits(2).says(&[error]);
    }
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
        let said = vitrum(&["train", flag, value]).stderr;
        let typed = said.split('`').rev().nth(1).unwrap();
        let words: Vec<&str> =
            ["train", "demo"].into_iter().chain(typed.split(' ')).chain(["--dry-run"]).collect();
        vitrum(&words).ok();
    }
}

/// Each everyday flag equals the `--set` in its help.
#[test]
fn everyday_flags_are_settings() {
    let recipe = |args: &[&str]| {
        let words = [&["train", "demo", "--dry-run"], args].concat();
        vitrum(&words).ok().stdout
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
        vitrum(&["train", "--help"]).ok().prints(&[&format!("`--set {key}=")]);
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
        let said = vitrum(&words).exits(1).stderr;
        assert!(said.starts_with("error: no-such.npz: no such file or folder"), "{said}");
    }
    for end in ["onnx", "pt", "pth", "PTH"] {
        let to = temp.path().join(format!("x.{end}"));
        vitrum(&["convert", model, to.to_str().unwrap()]).exits(2).says(&["are not written", "--to"]);
    }
}

/// A name from the HuggingFace hub is looked up in the local cache and never fetched.
#[test]
fn a_hub_name_is_opened_where_the_hub_keeps_it() {
    let temp = tempfile::tempdir().unwrap();
    let inspect = || {
        let mut command = command(&["inspect", "owner/vit-tiny"]);
        command.env("HF_HUB_CACHE", temp.path());
        finish(command).exits(1)
    };
    inspect().says(&["`hf download owner/vit-tiny` fetches it"]);
    let model = temp.path().join("models--owner--vit-tiny");
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::create_dir_all(model.join("snapshots/abc")).unwrap();
    std::fs::write(model.join("refs/main"), "abc").unwrap();
    std::fs::write(model.join("snapshots/abc/model.safetensors"), b"not one").unwrap();
    inspect().says(&["snapshots/abc/model.safetensors"]);
}

#[test]
fn what_is_not_built_yet_says_so() {
    let attention = ["predict", "--weights", "x", "--attention", "maps", "a.png"];
    vitrum(&attention).exits(2).says(&["error: `vitrum predict --attention` is not built yet"]);
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
    train(
        "model.pool=mean",
        "`model.pool` cannot be `mean`",
        "use one of `token`, `gap`, `map`, `token_gap`",
    );
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
    vitrum(&["train", path.to_str().unwrap()]).exits(2).says(&[&place, "        ^^^^^"]);
    vitrum(&["plan", "no/such/recipe"]).exits(2).says(&["error: there is no recipe"]);
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
        let done = vitrum(&["inspect", &path(name)]).exits(1).says(&["error: ", &path(name)]);
        assert_eq!(done.stdout, "");
    }
}

#[test]
fn inspect_describes_the_demo_without_drawing_it() {
    let mut inspect = command(&["inspect", "demo", "--json"]);
    inspect.env("VITRUM_CACHE", "/proc/none");
    assert_eq!(finish(inspect).ok().json()["train"]["records"], 20_000);
    vitrum(&["inspect", "demo"]).ok().prints(&["image: 32x32\n", "train.records: 20,000\n"]);
}

#[test]
fn doctor_describes_any_machine() {
    let line = Regex::new("(?m)^kernels: (none embedded|embedded for) .*$").unwrap();
    let done = vitrum(&["doctor"]).ok();
    assert!(done.stderr.is_empty() && line.is_match(&done.stdout), "{}{}", done.stderr, done.stdout);
    let json = vitrum(&["doctor", "--json"]).ok().json();
    assert!(json["cores"].as_u64().unwrap() > 0);
    assert!(["scalar", "avx2", "avx512"].contains(&json["isa"].as_str().unwrap()));
}

#[test]
fn doctor_reports_a_wrong_environment_instead_of_failing() {
    let mut doctor = command(&["doctor"]);
    doctor.env("VITRUM_ISA", "mmx").env("VITRUM_CACHE", "/proc/none/vitrum");
    finish(doctor).ok().prints(&["`VITRUM_ISA=mmx`", "not writable"]);
}

/// A reader that closes the pipe early (`vitrum doctor | head -1`) sees no panic.
#[test]
fn a_closed_pipe_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut doctor = command(&["doctor"]);
    let child = doctor.stdout(writer).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
