//! Bad input and full disks, from outside: a clear message, the right exit code, no partial files, no panic.

use crate::support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use support::{Done, Random, command, finish, names, outcome, path, stripes, train, vitrum};
use vitrum::data::Dataset;
use vitrum::train::checkpoint::Checkpoints;
use vitrum::weights;
use vitrum::weights::safetensors::{Dtype, SafeTensors, View, write};

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

/// A run that is refused before it begins: exits with this code, prints these words, makes no folder.
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

/// A record that cannot be decoded stops the run, which can continue without it. With `skip`, it is replaced
/// at once.
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
    let bad = ["down/05.png", "JPEG, PNG, WebP, GIF, BMP and TIFF are supported"];
    let skip = "data.on_bad_record=skip";
    vitrum(&train(&path("skips"), &[&data, "train.steps=4", skip])).ok().says(&bad);
    let stops = path("stops");
    let few = [&data, "train.steps=9", "train.batch=4", "train.micro_batch=4"];
    vitrum(&train(&stops, &few)).exits(1).says(&bad).says(&["after step ", "saved to ", skip, "--resume"]);
    let on = [&data, "train.steps=9", "train.batch=4", "train.micro_batch=4", skip, "--resume"];
    vitrum(&train(&stops, &on)).ok().says(&bad).says(&["resume   from checkpoints/step-"]);

    let packed = path("packed");
    vitrum(&["pack", &broken, &packed]).ok().says(&["skipped ", "05.png: not a picture"]);
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
    // Nobody can create a file below a regular file, not even root.
    let file = path("regular-file");
    fs::write(&file, "text").unwrap();
    let out = format!("{file}/run");
    vitrum(&train(&out, &[])).exits(1).says(&[&out, "hint: "]);
    assert_eq!(fs::read(&file).unwrap(), b"text");

    let before = outcome(trained());
    let holds = "already holds a run";
    vitrum(&train(trained(), &SHORT)).exits(1).says(&[trained(), holds, "hint: ", "--resume"]);
    let other = [&SHORT[..], &["--resume", "model.width=48"]].concat();
    vitrum(&train(trained(), &other)).exits(1).says(&["another recipe: ", "model.width: 24 -> 48", "hint: "]);
    assert_eq!(outcome(trained()), before, "the run is untouched");
}

/// Seeded random places in a file, with one bit for each.
fn flips(length: usize, count: u64, seed: u64) -> Vec<(usize, u8)> {
    let mut random = Random(seed);
    (0..count).map(|_| (random.below(length as u64) as usize, 1 << random.below(8))).collect()
}

#[test]
fn every_flipped_bit_of_a_checkpoint_is_noticed() {
    let run = copy("flipped");
    let folder = Path::new(&run).join("checkpoints/step-8");
    fs::remove_dir_all(Path::new(&run).join("checkpoints/step-5")).unwrap();
    let reads = |name: &str| match name {
        "state.safetensors" => Checkpoints::new(Path::new(&run), 1).newest_state().is_some(),
        "checkpoint.json" => weights::open(&folder.join("model.safetensors"), &Default::default()).is_ok(),
        _ => weights::open(&folder.join(name), &Default::default()).is_ok(),
    };
    for (seed, name) in names(&folder).iter().enumerate() {
        assert!(reads(name), "{name} as it was written");
        let whole = fs::read(folder.join(name)).unwrap();
        for (at, bit) in flips(whole.len(), 40, seed as u64) {
            let mut damaged = whole.clone();
            damaged[at] ^= bit;
            fs::write(folder.join(name), damaged).unwrap();
            assert!(!reads(name), "{name}: bit {bit:#x} of byte {at}");
        }
        fs::write(folder.join(name), whole).unwrap();
    }
}

/// Changes one byte in the middle of a file.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn resume(run: &str) -> Done {
    vitrum(&train(run, &[&SHORT[..], &["--resume"]].concat()))
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_the_bits_are_those_of_a_whole_one() {
    let want = outcome(trained());
    for file in ["model.safetensors", "ema.safetensors", "state.safetensors", "checkpoint.json"] {
        let run = copy(&format!("damaged-{file}"));
        damage(&Path::new(&run).join("checkpoints/last").join(file));
        let line = "resume   checkpoints/step-8 is passed over: ";
        resume(&run).ok().says(&["resume   from checkpoints/step-5", line, file, "damaged"]);
        assert_eq!(outcome(&run), want, "{file}");
    }
    // The file of another step is not damaged in itself.
    let run = copy("mixed");
    let checkpoints = Path::new(&run).join("checkpoints");
    fs::copy(checkpoints.join("step-5/ema.safetensors"), checkpoints.join("step-8/ema.safetensors")).unwrap();
    resume(&run)
        .ok()
        .says(&["step-8 is passed over: ", "ema.safetensors: damaged, or from another checkpoint"]);
    assert_eq!(outcome(&run), want);
    let run = copy("incomplete");
    fs::remove_file(Path::new(&run).join("checkpoints/step-8/state.safetensors")).unwrap();
    resume(&run).ok().says(&["step-8 is passed over: ", "state.safetensors"]);
    assert_eq!(outcome(&run), want);
    let run = copy("renamed");
    let checkpoints = Path::new(&run).join("checkpoints");
    fs::rename(checkpoints.join("step-8"), checkpoints.join("step-9")).unwrap();
    resume(&run).ok().says(&["step-9 is passed over: ", "holds the state of step 8"]);
    assert_eq!(outcome(&run), want);
}

#[test]
fn a_run_whose_checkpoints_are_all_damaged_does_not_start_over() {
    for (name, gone) in [("only", true), ("all", false)] {
        let run = copy(name);
        let checkpoints = Path::new(&run).join("checkpoints");
        damage(&checkpoints.join("step-8/model.safetensors"));
        match gone {
            true => fs::remove_dir_all(checkpoints.join("step-5")).unwrap(),
            false => damage(&checkpoints.join("step-5/state.safetensors")),
        }
        let before = fs::read(Path::new(&run).join("metrics.jsonl")).unwrap();
        let done = resume(&run).exits(1).says(&["damaged", "step-8/model.safetensors", "hint: "]);
        assert!(!done.stderr.contains("starting from the beginning"), "{}", done.stderr);
        assert_eq!(fs::read(Path::new(&run).join("metrics.jsonl")).unwrap(), before);
    }
}

#[test]
fn every_command_that_opens_a_checkpoint_notices_damage() {
    let run = copy("best-damaged");
    damage(&Path::new(&run).join("checkpoints/best/model.safetensors"));
    let picture = format!("{}/val/across/000.png", stripes());
    let (out, weights) = (path("of-damaged"), run.as_str());
    let commands: [&[&str]; 6] = [
        &["eval", "--weights", weights, "--data", stripes()],
        &["predict", "--weights", weights, &picture],
        &["features", "--weights", weights, "--data", stripes(), "--out", &out],
        &["finetune", "--weights", weights, "--data", stripes(), "--out", &out],
        &["convert", weights, &format!("{out}.npz")],
        &["inspect", weights],
    ];
    for command in commands {
        vitrum(command).exits(1).says(&["model.safetensors: damaged, or from another checkpoint", "hint: "]);
        assert!(!Path::new(&out).exists(), "{command:?}");
    }
}

#[test]
fn checkpoints_of_before_are_read_with_a_line_and_their_arenas_are_measured() {
    let run = copy("of-before");
    let checkpoints = Path::new(&run).join("checkpoints");
    for step in ["step-5", "step-8"] {
        fs::remove_file(checkpoints.join(step).join("checkpoint.json")).unwrap();
    }
    resume(&run).ok().says(&["step-8: no `checkpoint.json`"]);
    vitrum(&["predict", "--weights", &run, &format!("{}/val/across/000.png", stripes())])
        .ok()
        .says(&["no `checkpoint.json`"]);

    // 64 bytes of an arena are missing, but the file is valid.
    let short = checkpoints.join("step-8/state.safetensors");
    let state = SafeTensors::open(&short).unwrap();
    let arena = |name: &str, less: usize| {
        let bytes = state.bytes(name).unwrap();
        bytes[..bytes.len() - less].to_vec()
    };
    let (moment1, moment2) = (arena("moment1", 64), arena("moment2", 0));
    let view =
        |name: &str, bytes: &[u8]| View::new(name.to_owned(), Dtype::U8, &[bytes.len()], bytes.to_vec());
    let views = vec![view("moment1", &moment1), view("moment2", &moment2)];
    write(&short, &state.metadata().clone(), views).unwrap();
    resume(&run).ok().says(&["step-8 is passed over: ", "`moment1` has ", "bytes, but the optimiser needs"]);

    let run = copy("with-nan");
    let checkpoints = Path::new(&run).join("checkpoints");
    fs::remove_file(checkpoints.join("step-8/checkpoint.json")).unwrap();
    put_nan(&checkpoints.join("step-8/model.safetensors"), "head.bias");
    resume(&run).ok().says(&["model.safetensors", "`head.bias` holds NaN"]);
}

#[test]
fn every_flipped_bit_of_a_shard_is_noticed_when_it_is_read() {
    let packed = path("flipped-shards");
    vitrum(&["pack", stripes(), &packed]).ok();
    let train_part = Path::new(&packed).join("train");
    let shard = train_part.join("00000.safetensors");
    let whole = fs::read(&shard).unwrap();
    let read = || -> vitrum::error::Result<()> {
        let data = Dataset::open_packed(&train_part)?;
        (0..data.len()).try_for_each(|i| data.record(i).map(drop))
    };
    read().unwrap();
    for (at, bit) in flips(whole.len(), 60, 60) {
        let mut damaged = whole.clone();
        damaged[at] ^= bit;
        // Replace the file instead of writing into it: it may be mapped.
        fs::remove_file(&shard).unwrap();
        fs::write(&shard, damaged).unwrap();
        assert!(read().is_err(), "bit {bit:#x} of byte {at}");
    }
    let mut damaged = whole.clone();
    let pixel = whole.len() - 20_000;
    damaged[pixel] ^= 1;
    fs::remove_file(&shard).unwrap();
    fs::write(&shard, damaged).unwrap();
    let says = ["00000.safetensors: damaged: the checksum is ", "it holds the records 0 to 95"];
    let data = format!("data.train={packed}");
    vitrum(&train(&path("of-damaged-data"), &[&data, "data.on_bad_record=skip"])).exits(1).says(&says);
    vitrum(&["pack", &packed, "--check"]).exits(1).says(&says);
    vitrum(&train(&path("of-trusted-data"), &[&data, "data.verify=false", SHORT[0]])).ok();
}

#[test]
fn a_folder_of_other_things_is_no_run_directory() {
    let folder = path("thesis");
    fs::create_dir_all(&folder).unwrap();
    fs::write(Path::new(&folder).join("thesis.tex"), "text").unwrap();
    for more in [&[][..], &["--resume"]] {
        vitrum(&train(&folder, more)).exits(1).says(&[&folder, "`thesis.tex`", "hint: ", "--out"]);
        assert_eq!(names(&folder), ["thesis.tex"]);
    }
    // In its own folders a run removes only what it wrote.
    let run = copy("with-guests");
    let checkpoints = Path::new(&run).join("checkpoints");
    for name in ["notes.tmp", ".step-3.99.tmp"] {
        fs::create_dir_all(checkpoints.join(name)).unwrap();
    }
    fs::write(Path::new(&run).join(".recipe.toml.99.tmp"), "half").unwrap();
    resume(&run).ok();
    assert!(checkpoints.join("notes.tmp").is_dir() && !checkpoints.join(".step-3.99.tmp").exists());
    assert!(!Path::new(&run).join(".recipe.toml.99.tmp").exists());
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
fn a_run_without_its_best_checkpoint_names_another_one() {
    let run = copy("best-gone");
    let checkpoints = Path::new(&run).join("checkpoints");
    let best = fs::canonicalize(checkpoints.join("best")).unwrap();
    let others: Vec<_> = names(&checkpoints).into_iter().filter(|name| name.starts_with("step-")).collect();
    assert!(others.len() > 1, "{others:?}");
    let says = |why: &str| {
        let done = vitrum(&["eval", "--weights", &run, "--data", stripes()]).exits(1);
        done.says(&["checkpoints/best: it is ", best.file_name().unwrap().to_str().unwrap(), why])
    };
    fs::remove_file(best.join("model.safetensors")).unwrap();
    let done = says("which has no `model.safetensors`");
    let typed = done.stderr.split("`--weights ").nth(1).unwrap().split('`').next().unwrap();
    assert!(Path::new(typed).join("model.safetensors").is_file(), "{typed}");
    vitrum(&["eval", "--weights", typed, "--data", stripes()]).ok();
    fs::remove_dir_all(&best).unwrap();
    says("which does not exist");
    // Without a best one, the last one is meant.
    fs::remove_file(checkpoints.join("best")).unwrap();
    fs::remove_file(checkpoints.join("last")).unwrap();
    std::os::unix::fs::symlink(Path::new(typed).file_name().unwrap(), checkpoints.join("last")).unwrap();
    vitrum(&["eval", "--weights", &run, "--data", stripes()]).ok();
}

#[test]
fn pictures_and_data_that_do_not_fit_the_weights_are_named() {
    let text = path("picture.png");
    fs::write(&text, "no picture").unwrap();
    let predict = |picture: &str| vitrum(&["predict", "--weights", trained(), picture]);
    predict(&text).exits(1).says(&[&text, "JPEG, PNG, WebP, GIF, BMP and TIFF are supported"]);
    predict("/no/such/picture.png").exits(1).says(&["/no/such/picture.png"]);
    let empty = path("no-pictures");
    fs::create_dir_all(&empty).unwrap();
    predict(&empty).exits(1).says(&["no pictures to look at", "hint: "]);

    let eval = |data: &str| vitrum(&["eval", "--weights", trained(), "--data", data]);
    let two = path("two-classes");
    for class in ["across", "down"] {
        let dir = Path::new(&two).join(class);
        fs::create_dir_all(&dir).unwrap();
        fs::copy(format!("{}/val/down/002.png", stripes()), dir.join("1.png")).unwrap();
    }
    // Two of the model's three classes, by name.
    eval(&two).ok().says(&["2 of the data are among the model's 3, by name"]);
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

/// A limit on file sizes simulates a disk that fills up between two checkpoints.
#[test]
fn a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole() {
    // The limit would also stop the run's page, which is larger and only a warning.
    let want = path("enough-space");
    vitrum(&train(&want, &["train.report=false"])).ok();

    let out = path("too-little-space");
    let run = train(&out, &["train.report=false", "--resume"]);
    // The run is killed after its first checkpoint, and resumed with less space than a second checkpoint
    // needs.
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

    let done = limited(&run, "ulimit -f 32").exits(1);
    let whole = format!("the last whole checkpoint is {}", checkpoints.join(&step).display());
    let done = done.says(&["warning: checkpoint at step ", "training goes on, ", "step 24/24", &whole]);
    done.says(&["error: checkpoint at step 24: ", "safetensors: File too large", "hint: ", "--resume"]);
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

/// On a separate file system, if this machine lets the test make one.
#[test]
fn a_full_disk_keeps_the_last_checkpoint_and_training_goes_on() {
    let (disk, rescued) = (path("disk"), path("rescued"));
    fs::create_dir_all(&disk).unwrap();
    let can = Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none", &disk]).output();
    if !can.is_ok_and(|done| done.status.success()) {
        println!("skipped: this machine does not let a test mount a file system");
        return;
    }
    // One checkpoint of this model takes 270 KiB: the first fits, a second one does not.
    let run = train(&format!("{disk}/run"), &["train.checkpoint_every=2", "train.eval_every=100"]);
    let program = command(&run);
    let script = format!(
        "mount -t tmpfs -o size=440k none {disk} && \"$0\" \"$@\"; code=$?; cp -a {disk}/run {rescued}; exit $code"
    );
    let mut shell = Command::new("unshare");
    shell.args(["-rm", "bash", "-c", &script]).arg(program.get_program()).args(&run);
    shell.envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))));
    finish(shell).exits(1).says(&[
        "warning: checkpoint at step 4",
        "No space left on device",
        "step 24/24",
        "error: checkpoint at step 24",
        "hint: the disk is full",
    ]);

    let checkpoints = Path::new(&rescued).join("checkpoints");
    assert_eq!(names(&checkpoints), ["last", "step-2"]);
    for name in names(checkpoints.join("last")).iter().filter(|name| name.ends_with(".safetensors")) {
        SafeTensors::open(&checkpoints.join("last").join(name)).unwrap();
    }
    let args = train(&rescued, &["train.checkpoint_every=2", "train.eval_every=100", "--resume"]);
    vitrum(&args).ok().says(&["from checkpoints/step-2"]);
}

#[test]
fn a_share_to_hold_out_is_never_ignored_in_silence() {
    let steps = ["train.steps=1", "data.holdout=0.3"];
    let said = |more: &[&str]| {
        let out = path("never-held-out");
        let _ = std::fs::remove_dir_all(&out);
        vitrum(&train(&out, &[&steps[..], more].concat())).ok()
    };
    let no_effect = "note: `data.holdout = 0.3` has no effect: ";
    said(&[]).says(&[no_effect, "validates on the 40 pictures of a part of their own"]);
    let log = std::fs::read_to_string(path("never-held-out/log.txt")).unwrap();
    assert!(log.contains(no_effect), "{log}");
    let whole = format!("data.train={}/train", stripes());
    let own = format!("data.val={}/val", stripes());
    said(&[&whole, &own]).says(&[no_effect, "validates on the 40 pictures"]);
    let out = path("never-held-out");
    fs::remove_dir_all(&out).unwrap();
    vitrum(&train(&out, &["data.holdout=0.3", "--overfit", "4"]))
        .says(&[no_effect, "a run with `--overfit` has no validation"]);
    let held = said(&[&whole]).says(&["to validate (held out: `data.holdout = 0.3`)"]);
    assert!(!held.stderr.contains("has no effect"), "{}", held.stderr);
    said(&[&whole, "data.holdout=1e-9"]).says(&["has no effect: it would hold out none of the 96 pictures"]);
}
