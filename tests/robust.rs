//! Bad input and full disks, from outside: a clear message with the right exit code, nothing half written, no panic.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use support::{Done, command, finish, names, outcome, path, stripes, train, vitrum};
use vitrum::weights::safetensors::{SafeTensors, View, write};

/// A short finished run, made once. Tests that change it take a [`copy`].
fn trained() -> &'static str {
    static RUN: OnceLock<String> = OnceLock::new();
    RUN.get_or_init(|| {
        let out = path("trained");
        vitrum(&train(&out, &SHORT)).ok();
        out
    })
}

const SHORT: [&str; 1] = ["train.steps=8"];

/// A copy of the run, links included.
fn copy(name: &str) -> String {
    let to = path(name);
    assert!(Command::new("cp").args(["-a", trained(), &to]).status().unwrap().success());
    to
}

/// A run that is refused before it begins: this code, these words, and no folder.
#[track_caller]
fn refuses(code: i32, more: &[&str], says: &[&str]) {
    let out = path("refused");
    vitrum(&train(&out, more)).exits(code).says(says).says(&["error: "]);
    assert!(!Path::new(&out).exists(), "{more:?} left {:?}", names(&out));
}

#[test]
fn data_that_cannot_train_is_refused() {
    let empty = path("empty");
    fs::create_dir_all(Path::new(&empty).join("notes")).unwrap();
    refuses(1, &[&format!("data.train={empty}")], &[&empty, "no pictures in class folders", "hint: "]);
    fs::write(Path::new(&empty).join("notes/readme.txt"), "no pictures").unwrap();
    refuses(1, &[&format!("data.train={empty}")], &[&empty, "1 file is left out, no pictures"]);

    let one_class = path("one-class");
    fs::create_dir_all(Path::new(&one_class).join("cat")).unwrap();
    fs::copy(format!("{}/val/down/002.png", stripes()), Path::new(&one_class).join("cat/1.png")).unwrap();
    refuses(1, &[&format!("data.train={one_class}")], &[&one_class, "only one class, `cat`", "hint: "]);

    refuses(1, &["data.train=/no/such/folder"], &["/no/such/folder", "no such file or folder", "hint: "]);
    refuses(1, &["data.val=/no/such/folder"], &["/no/such/folder", "no such file or folder", "hint: "]);
    refuses(
        1,
        &["train.batch=97", "train.micro_batch=0"],
        &["`train.batch` is 97", "96 images", "train.batch=96"],
    );
    refuses(2, &["--overfit", "97"], &["`--overfit 97`", "96 images"]);
    refuses(1, &["model.classes=2"], &["`model.classes` is 2", "3 classes"]);
}

/// A record that does not decode stops the run, which may go on without it; or it is replaced from the start.
#[test]
fn a_record_that_is_no_picture_is_named() {
    let broken = path("broken");
    for split in ["train", "val"] {
        for (class, image) in [("across", "000.png"), ("down", "002.png")] {
            let dir = Path::new(&broken).join(split).join(class);
            fs::create_dir_all(&dir).unwrap();
            for i in 0..12 {
                fs::copy(format!("{}/{split}/{class}/{image}", stripes()), dir.join(format!("{i:02}.png")))
                    .unwrap();
            }
        }
    }
    fs::write(Path::new(&broken).join("train/down/05.png"), b"this is no picture").unwrap();
    let data = format!("data.train={broken}");
    let bad = ["down/05.png", "JPEG, PNG, WebP, GIF and BMP are supported"];
    let skip = "data.on_bad_record=skip";
    vitrum(&train(&path("skips"), &[&data, "train.steps=4", skip])).ok().says(&bad);
    let stops = path("stops");
    let few = [&data, "train.steps=9", "train.batch=4", "train.micro_batch=4"];
    vitrum(&train(&stops, &few)).exits(1).says(&bad).says(&["after step ", "saved to ", skip, "--resume"]);
    let on = [&data, "train.steps=9", "train.batch=4", "train.micro_batch=4", skip, "--resume"];
    vitrum(&train(&stops, &on)).ok().says(&bad).says(&["resume   from checkpoints/step-"]);

    let packed = path("packed");
    vitrum(&["pack", &broken, &packed]).ok().says(&["skipped ", "05.png: no picture"]);
    let strict = path("packed-strictly");
    vitrum(&["pack", &broken, &strict, "--on-bad-record", "error"]).exits(1).says(&["05.png"]);
    assert!(!Path::new(&strict).join("train/dataset.json").exists());
}

#[test]
fn settings_that_make_no_run_are_wrong_usage() {
    refuses(2, &["train.batch=0"], &["`train.batch` is 0", "hint: "]);
    refuses(2, &["train.steps=0"], &["`train.steps` is 0", "hint: "]);
    refuses(2, &["train.steps=many"], &["`train.steps` is the text `many`"]);
    refuses(2, &["train.stesp=60"], &["unknown key `train.stesp`", "hint: did you mean `train.steps`?"]);
    refuses(2, &["--set", "train.steps"], &["`--set train.steps`", "hint: "]);
    refuses(2, &["model.heads=5"], &["`model.heads` is 5", "does not divide", "hint: "]);
    refuses(2, &["model.patch=5"], &["patch height 5", "does not divide", "hint: "]);
    refuses(2, &["train.micro_batch=5"], &["`train.micro_batch` is 5", "does not divide", "hint: "]);
    refuses(2, &["optim.lr=-1"], &["`optim.lr` is -1", "hint: "]);
    refuses(2, &["model.depth=0"], &["`model.depth` is 0", "hint: "]);

    let (recipe, out) = (path("mine.toml"), path("refused"));
    let of_file = |text: &str| {
        fs::write(&recipe, text).unwrap();
        let done = vitrum(&["train", &recipe, "--out", &out]);
        assert!(!Path::new(&out).exists());
        done
    };
    of_file("[model]\nwidth = \"wide\"\n").exits(2).says(&["mine.toml, line 2", "`model.width`"]);
    of_file("[model]\nvariant = \"Ti/16\"\n[data]\ntrain = \"/no/such/folder\"\n[train]\nsteps = 5\n")
        .exits(1)
        .says(&["/no/such/folder", "no such file or folder"]);
    of_file("[model\n").exits(2).says(&["mine.toml, line 1"]);
    vitrum(&["train", "/no/such/recipe.toml", "--out", &out])
        .exits(2)
        .says(&["/no/such/recipe.toml", "hint: "]);
}

#[test]
fn a_folder_that_cannot_hold_a_run_is_refused() {
    // Below a regular file nobody can write, root neither.
    let file = path("regular-file");
    fs::write(&file, "text").unwrap();
    let out = format!("{file}/run");
    vitrum(&train(&out, &[])).exits(1).says(&[&out, "hint: "]);
    assert_eq!(fs::read(&file).unwrap(), b"text");

    let before = outcome(trained());
    let holds = "holds a run already";
    vitrum(&train(trained(), &SHORT)).exits(1).says(&[trained(), holds, "hint: ", "--resume"]);
    let other = [&SHORT[..], &["--resume", "model.width=48"]].concat();
    vitrum(&train(trained(), &other)).exits(1).says(&[
        "another recipe",
        "width = 24",
        "width = 48",
        "hint: ",
    ]);
    assert_eq!(outcome(trained()), before, "the run is untouched");
}

#[test]
fn a_damaged_checkpoint_is_not_resumed() {
    let resume = |run: &str| vitrum(&train(run, &[&SHORT[..], &["--resume"]].concat()));
    for file in ["model.safetensors", "ema.safetensors", "state.safetensors"] {
        let run = copy(&format!("truncated-{file}"));
        let damaged = Path::new(&run).join("checkpoints/last").join(file);
        let whole = fs::read(&damaged).unwrap();
        fs::write(&damaged, &whole[..whole.len() - 100]).unwrap();
        let done = resume(&run).exits(1).says(&[file, "not a whole safetensors file", "hint: "]);
        assert!(!done.stderr.contains("starting fresh"), "{}", done.stderr);
        assert_eq!(fs::read(&damaged).unwrap().len(), whole.len() - 100, "it is left as it was");
    }
    let run = copy("with-nan");
    let model = Path::new(&run).join("checkpoints/last/model.safetensors");
    put_nan(&model, "head.bias");
    resume(&run).exits(1).says(&["model.safetensors", "`head.bias` holds NaN", "hint: "]);
}

/// Writes one NaN into a tensor of the file.
fn put_nan(path: &Path, tensor: &str) {
    let (at, _) = SafeTensors::open(path).unwrap().range(tensor).unwrap();
    let mut bytes = fs::read(path).unwrap();
    bytes[at..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn weights_that_are_none_are_named() {
    let picture = format!("{}/val/across/000.png", stripes());
    let model = Path::new(trained()).join("checkpoints/last/model.safetensors");
    let whole = fs::read(&model).unwrap();
    let files = [
        ("cut.safetensors", whole[..whole.len() / 2].to_vec(), "not a whole safetensors file"),
        ("short.safetensors", whole[..4].to_vec(), "not a whole safetensors file"),
        ("text.safetensors", b"these are no weights at all".to_vec(), "not a whole safetensors file"),
    ];
    let commands = |weights: &str| -> [Done; 3] {
        let out = path("no-features");
        let batch = path("no-batch");
        let done = [
            vitrum(&["eval", "--weights", weights, "--data", stripes()]),
            vitrum(&["predict", "--weights", weights, &picture]),
            vitrum(&["grad", "--weights", weights, "--batch", &batch, "--out", &out]),
        ];
        assert!(!Path::new(&out).exists());
        done
    };
    let shape = [1, 16, 16, 3];
    let views = vec![View::f32("images", &shape, &[0.0; 768]), View::i64("labels", &[1], &[0])];
    write(Path::new(&path("no-batch")), &Default::default(), views).unwrap();
    for (name, bytes, what) in files {
        let weights = path(name);
        fs::write(&weights, bytes).unwrap();
        for done in commands(&weights) {
            assert!(done.exits(1).says(&[&weights, what]).stdout.is_empty());
        }
    }
    let with_nan = path("nan.safetensors");
    fs::copy(&model, &with_nan).unwrap();
    put_nan(Path::new(&with_nan), "blocks.1.mlp.fc1.weight");
    for done in commands(&with_nan) {
        done.exits(1).says(&[&with_nan, "`blocks.1.mlp.fc1.weight` holds NaN"]);
    }
    for done in commands("/no/such/weights") {
        done.exits(1).says(&["/no/such/weights"]);
    }
    for done in commands(stripes()) {
        done.exits(1).says(&[stripes()]);
    }
    vitrum(&["eval", "--weights", trained(), "--data", stripes(), "--set", "model.heads=5"])
        .exits(2)
        .says(&["`model.heads` is 5", "hint: "]);
}

#[test]
fn pictures_and_data_that_do_not_fit_the_weights_are_named() {
    let text = path("picture.png");
    fs::write(&text, "no picture").unwrap();
    let predict = |picture: &str| vitrum(&["predict", "--weights", trained(), picture]);
    predict(&text).exits(1).says(&[&text, "JPEG, PNG, WebP, GIF and BMP are supported"]);
    predict("/no/such/picture.png").exits(1).says(&["/no/such/picture.png"]);
    let empty = path("no-pictures");
    fs::create_dir_all(&empty).unwrap();
    predict(&empty).exits(1).says(&["no picture to look at", "hint: "]);

    let eval = |data: &str| vitrum(&["eval", "--weights", trained(), "--data", data]);
    let two = path("two-classes");
    for class in ["across", "down"] {
        let dir = Path::new(&two).join(class);
        fs::create_dir_all(&dir).unwrap();
        fs::copy(format!("{}/val/down/002.png", stripes()), dir.join("1.png")).unwrap();
    }
    eval(&two).exits(1).says(&["2 classes", "the model 3", "hint: "]);
    let third = Path::new(&two).join("zebra");
    fs::create_dir_all(&third).unwrap();
    fs::copy(format!("{}/val/down/002.png", stripes()), third.join("1.png")).unwrap();
    eval(&two).exits(1).says(&["zebra"]);
    eval("/no/such/data").exits(1).says(&["/no/such/data", "hint: "]);
}

#[test]
fn batches_that_do_not_fit_are_named() {
    let out = path("no-gradients");
    let mut number = 0;
    let mut refuses = |views: Vec<View<'_>>, says: &[&str]| {
        number += 1;
        let batch = path(&format!("batch-{number}"));
        write(Path::new(&batch), &Default::default(), views).unwrap();
        for (command, flag) in [("grad", "--batch"), ("replay", "--batches")] {
            let done = vitrum(&[command, "--weights", trained(), flag, &batch, "--out", &out]).exits(1);
            done.says(&[&batch]).says(if command == "grad" { says } else { &[] });
        }
        assert!(!Path::new(&out).exists());
    };
    let shape = [2, 16, 16, 3];
    let pixels = vec![0.0; 2 * 16 * 16 * 3];
    let images = || View::f32("images", &shape, &pixels);
    refuses(vec![images()], &["neither `labels` nor `targets`"]);
    refuses(vec![View::i64("labels", &[2], &[0, 1])], &["no tensor `images`"]);
    refuses(vec![images(), View::i64("labels", &[3], &[0, 1, 2])], &["`labels`", "2 images"]);
    refuses(vec![images(), View::i64("labels", &[2], &[0, 3])], &["label 3", "3 classes"]);
    refuses(vec![images(), View::f32("labels", &[2], &[0.0, 1.0])], &["`labels` has type F32"]);
    refuses(vec![images(), View::f32("targets", &[2, 4], &[0.25; 8])], &["`targets` has 4 classes"]);
    let flat = View::f32("images", &[2, 768], &pixels);
    refuses(vec![flat, View::i64("labels", &[2], &[0, 1])], &["`images` has shape [2, 768]"]);

    let text = path("batch.txt");
    fs::write(&text, "text").unwrap();
    vitrum(&["grad", "--weights", trained(), "--batch", &text, "--out", &out]).exits(1).says(&[&text]);
}

/// A limit on the size of files stands in for a disk that fills up between two checkpoints.
#[test]
fn a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole() {
    let want = path("enough-space");
    vitrum(&train(&want, &[])).ok();

    let out = path("too-little-space");
    let run = train(&out, &["--resume"]);
    // Killed after its first checkpoint, the run goes on with less space than a second one needs.
    let mut child = command(&run).stderr(std::process::Stdio::null()).spawn().unwrap();
    while !Path::new(&out).join("checkpoints/last").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let checkpoints = Path::new(&out).join("checkpoints");
    let step = fs::read_link(checkpoints.join("last")).unwrap();
    if step == Path::new("step-24") {
        println!("skipped: the run ended before it could be stopped");
        return;
    }
    let before = fs::read(checkpoints.join("last/state.safetensors")).unwrap();

    let done = limited(&run, "trap '' XFSZ; ulimit -f 32").exits(1);
    let done = done.says(&["error: checkpoint at step ", "safetensors: File too large", "hint: "]);
    assert!(!done.stderr.contains("warning"), "{}", done.stderr);
    assert_eq!(fs::read_link(checkpoints.join("last")).unwrap(), step);
    assert_eq!(fs::read(checkpoints.join("last/state.safetensors")).unwrap(), before);
    assert!(!names(&checkpoints).iter().any(|name| name.ends_with(".tmp")), "{:?}", names(&checkpoints));

    vitrum(&run).ok();
    assert_eq!(outcome(&out), outcome(&want));
}

/// The program in a shell that has run `before`.
fn limited(args: &[String], before: &str) -> Done {
    let program = command(args);
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(format!("{before}; exec \"$0\" \"$@\"")).arg(program.get_program()).args(args);
    shell.envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))));
    finish(shell)
}

/// On a file system of its own, where this machine lets the test make one.
#[test]
fn a_full_disk_stops_the_run_and_keeps_the_last_checkpoint() {
    let (disk, rescued) = (path("disk"), path("rescued"));
    fs::create_dir_all(&disk).unwrap();
    let can = Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none", &disk]).output();
    if !can.is_ok_and(|done| done.status.success()) {
        println!("skipped: this machine does not let a test mount a file system");
        return;
    }
    // One checkpoint of this model takes 270 KiB: the first fits, and the second beside it does not.
    let run = train(&format!("{disk}/run"), &["train.checkpoint_every=2", "train.eval_every=100"]);
    let program = command(&run);
    let script = format!(
        "mount -t tmpfs -o size=440k none {disk} && \"$0\" \"$@\"; code=$?; cp -a {disk}/run {rescued}; exit $code"
    );
    let mut shell = Command::new("unshare");
    shell.args(["-rm", "bash", "-c", &script]).arg(program.get_program()).args(&run);
    shell.envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))));
    finish(shell).exits(1).says(&[
        "error: checkpoint at step 4",
        "No space left on device",
        "hint: the disk is full",
    ]);

    let checkpoints = Path::new(&rescued).join("checkpoints");
    assert_eq!(names(&checkpoints), ["last", "step-2"]);
    for name in names(checkpoints.join("last")) {
        SafeTensors::open(&checkpoints.join("last").join(name)).unwrap();
    }
    let args = train(&rescued, &["train.checkpoint_every=2", "train.eval_every=100", "--resume"]);
    vitrum(&args).ok().says(&["from checkpoints/step-2"]);
}
