//! The data engine beyond folders and tars of class folders, as far as a user can see it: manifests,
//! WebDataset, several labels, held-out records, mixtures, packs that are killed, files that are cut while
//! they are read, `preview` and `bench`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use vitrum::backend::batch::PlainMemory;
use vitrum::backend::{Pixels, Slot, SlotLayout, TargetKind};
use vitrum::data::dataset::{Dataset, Manifest, Split, pair};
use vitrum::data::loader::{Delivery, Loader, LoaderSpec, Mode};
use vitrum::data::pack::{self, PackOptions};
use vitrum::recipe::{AugmentSection, Crop, OnBadRecord};

const DEFAULTS: PackOptions = PackOptions {
    format: None,
    size: None,
    quality: None,
    on_bad_record: OnBadRecord::Skip,
    exif: false,
    minival: 0.0,
};

fn pack_with(source: &Path, dest: &Path, options: PackOptions) -> vitrum::error::Result<pack::Packed> {
    pack::pack(source, dest, options, &AtomicUsize::new(0))
}

fn open(path: &Path) -> Dataset {
    Dataset::open(path.to_str().unwrap(), Split::Train).unwrap()
}

fn vitrum(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vitrum")).args(arguments).output().unwrap()
}

/// A picture of one colour and this size as PNG bytes.
fn png(side: u32, colour: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let picture = image::RgbImage::from_pixel(side, side, image::Rgb([colour, 255 - colour, 7]));
    picture.write_to(&mut std::io::Cursor::new(&mut bytes), image::ImageFormat::Png).unwrap();
    bytes
}

fn write(path: PathBuf, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Class folders `c0`, `c1`, ... with `per_class` pictures each.
fn folder(root: &Path, classes: usize, per_class: usize) {
    for (class, i) in (0..classes).flat_map(|c| (0..per_class).map(move |i| (c, i))) {
        write(root.join(format!("c{class}/{i:04}.png")), &png(8, (class * 40 + i) as u8));
    }
}

fn tar_of(path: &Path, members: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        // Written directly: `set_path` refuses names that an attacker would use.
        header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.finish().unwrap();
}

#[test]
fn manifests_name_pictures_labels_and_splits() {
    let temp = tempfile::tempdir().unwrap();
    for i in 0..6 {
        write(temp.path().join(format!("pictures/{i}.png")), &png(8, i * 30));
    }
    let csv = "path,label,split\npictures/0.png,cat,train\n\"pictures/1.png\",dog,train\npictures/2.png,cat,val\n\
               pictures/3.png,dog,val\n";
    fs::write(temp.path().join("table.csv"), csv).unwrap();
    let (train, val) = pair(temp.path().join("table.csv").to_str(), None).unwrap();
    assert_eq!((train.len(), val.unwrap().len()), (2, 2));
    assert_eq!(train.classes(), ["cat", "dog"]);
    let dest = temp.path().join("packed");
    pack_with(&temp.path().join("table.csv"), &dest, DEFAULTS).unwrap();
    assert_eq!(open(&dest).record_name(1), "pictures/1.png");

    let lines = "{\"path\": \"pictures/0.png\", \"labels\": [\"red\", \"big\"]}\n{\"path\": \"pictures/1.png\", \
                 \"labels\": []}\n{\"path\": \"pictures/2.png\", \"labels\": [\"big\"]}\n";
    fs::write(temp.path().join("table.jsonl"), lines).unwrap();
    let dest = temp.path().join("several");
    pack_with(&temp.path().join("table.jsonl"), &dest, DEFAULTS).unwrap();
    let data = open(&dest);
    assert!(data.is_multi_label());
    assert_eq!(data.classes(), ["big", "red"]);
    let labels = |i: usize| data.labels(i).collect::<Vec<_>>();
    assert_eq!((labels(0), labels(1), labels(2)), (vec![0, 1], vec![], vec![0]));

    // Several classes do not exclude each other.
    let train = format!("data.train={}", dest.display());
    let run = |out: &str, loss: &str| {
        let out = temp.path().join(out);
        let arguments = ["train", "mini/cifar10", "--out", out.to_str().unwrap(), "--set", &train];
        vitrum(
            &[&arguments[..], &["--set", "train.batch=2", "--set", "train.steps=1", "--set", loss]].concat(),
        )
    };
    let refused = run("softmax", "loss.kind=softmax");
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && words.contains("several classes"), "{words}");
    assert!(words.contains("--set loss.kind=sigmoid"), "{words}");
    let trained = run("sigmoid", "loss.kind=sigmoid");
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));

    let reason = |name: &str, text: &str| {
        let path = temp.path().join(name);
        fs::write(&path, text).unwrap();
        pack_with(&path, &temp.path().join("none"), DEFAULTS).unwrap_err().to_string()
    };
    assert!(reason("a.csv", "name,kind\nx,y\n").contains("its columns are name, kind"));
    assert!(reason("b.csv", "path,label\na.png,cat,more\n").contains("line 2 has 3 columns"));
    assert!(reason("c.csv", "path,label\n../a.png,cat\n").contains("leaves the manifest's folder"));
    assert!(reason("d.csv", "path,label\na.png,cat\na.png,dog\n").contains("occurs twice"));
    assert!(reason("e.csv", "path,label,split\na.png,cat,blue\n").contains("no split `blue`"));
    assert!(reason("f.jsonl", "{\"path\": \"a\"}\n").contains("line 1 has no `label`"));
    // A missing picture is a bad record with its name.
    let missing = "path,label\npictures/0.png,cat\npictures/9.png,cat\npictures/1.png,dog\n";
    fs::write(temp.path().join("missing.csv"), missing).unwrap();
    let packed = pack_with(&temp.path().join("missing.csv"), &temp.path().join("some"), DEFAULTS).unwrap();
    assert_eq!(packed.parts, [(None, 2, 1)]);
}

#[test]
fn webdataset_archives_are_read_and_hostile_ones_refused() {
    let temp = tempfile::tempdir().unwrap();
    let shards = temp.path().join("shards");
    fs::create_dir(&shards).unwrap();
    let (a, b) = (png(8, 10), png(8, 200));
    tar_of(
        &shards.join("train-000.tar"),
        &[("001.png", &a), ("001.cls", b"3"), ("001.json", b"{}"), ("002.png", &b), ("002.cls", b"0\n")],
    );
    tar_of(&shards.join("train-001.tar"), &[("001.png", &b), ("001.cls", b"1")]);
    tar_of(&shards.join("val-000.tar"), &[("x/9.png", &a), ("x/9.cls", b"2")]);
    let (train, val) = pair(shards.to_str(), None).unwrap();
    let val = val.unwrap();
    assert_eq!((train.len(), val.len(), train.classes().len()), (3, 1, 4));
    assert_eq!((0..3).map(|i| train.label(i)).collect::<Vec<_>>(), [3, 0, 1]);
    assert_eq!(train.record_name(2), "train-001.tar:001");
    pack_with(&shards, &temp.path().join("packed"), DEFAULTS).unwrap();

    let reason = |members: &[(&str, &[u8])]| {
        let path = temp.path().join("bad.tar");
        tar_of(&path, members);
        Dataset::open(path.to_str().unwrap(), Split::Train).unwrap_err().to_string()
    };
    assert!(reason(&[("a/../../x.png", &a), ("b/y.png", &b)]).contains("leaves the archive"));
    assert!(reason(&[("/etc/x.png", &a)]).contains("leaves the archive"));
    assert!(reason(&[("1.png", &a), ("2.png", &b), ("2.cls", b"1")]).contains("has no `cls` member"));
    assert!(reason(&[("a/\u{fffd}.png", &a)]).contains("only one class"));
    let path = temp.path().join("link.tar");
    let mut builder = tar::Builder::new(fs::File::create(&path).unwrap());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "a/x.png", "/etc/passwd").unwrap();
    builder.finish().unwrap();
    drop(builder);
    let error = Dataset::open(path.to_str().unwrap(), Split::Train).unwrap_err().to_string();
    assert!(error.contains("is a link"), "{error}");
}

#[test]
fn a_part_is_held_out_by_name_and_always_the_same() {
    let temp = tempfile::tempdir().unwrap();
    folder(&temp.path().join("source"), 3, 60);
    let options = PackOptions { minival: 0.2, ..DEFAULTS };
    let packed = pack_with(&temp.path().join("source"), &temp.path().join("a"), options).unwrap();
    let [(Some("train"), train, 0), (Some("val"), val, 0)] = packed.parts[..] else {
        panic!("{:?}", packed.parts)
    };
    assert_eq!(train + val, 180);
    assert!((20..55).contains(&val), "{val} of 180");
    let names = |dir: &Path| {
        let data = Dataset::open(dir.to_str().unwrap(), Split::Val).unwrap();
        (0..data.len()).map(|i| data.record_name(i)).collect::<Vec<_>>()
    };
    let held = names(&temp.path().join("a"));
    assert!((0..3).all(|c| held.iter().any(|n| n.starts_with(&format!("c{c}/")))), "of every class");
    // Adding records moves none of the others.
    write(temp.path().join("source/c0/another.png"), &png(8, 3));
    pack_with(&temp.path().join("source"), &temp.path().join("b"), options).unwrap();
    let mut later = names(&temp.path().join("b"));
    later.retain(|n| n != "c0/another.png");
    assert_eq!(held, later);
    let none = PackOptions { minival: 1e-9, ..DEFAULTS };
    let error = pack_with(&temp.path().join("source"), &temp.path().join("c"), none).unwrap_err();
    assert!(
        error.message().contains("holds out none of its 181 records, so `val` would be empty"),
        "{error}"
    );
    assert!(!temp.path().join("c").exists());
}

/// A pack that is killed between two shards and started again writes the same bytes as an uninterrupted one.
#[test]
fn a_pack_that_was_stopped_goes_on_to_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    // Noise does not compress: four pictures of 50 MB make two shards.
    for (i, class) in ["a", "b", "a", "b"].into_iter().enumerate() {
        let noise = image::RgbImage::from_fn(4200, 4200, |x, y| {
            let v = (x as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
                ^ (y as u64 + i as u64).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let v = (v ^ v >> 29).wrapping_mul(0x94D0_49BB_1331_11EB);
            image::Rgb([(v >> 8) as u8, (v >> 24) as u8, (v >> 40) as u8])
        });
        let path = source.join(format!("{class}/{i}.bmp"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        noise.save_with_format(path, image::ImageFormat::Bmp).unwrap();
    }
    let whole = temp.path().join("whole");
    pack_with(&source, &whole, DEFAULTS).unwrap();
    let shards = |dir: &Path| {
        let manifest = Manifest::read(dir).unwrap();
        manifest.shards.iter().map(|s| (s.records, s.checksum.clone())).collect::<Vec<_>>()
    };
    assert_eq!(shards(&whole).len(), 2);

    // What a kill leaves: one complete shard, a half-written one, and the list of complete shards.
    let dest = temp.path().join("dest");
    let stage = temp.path().join(".dest.partial");
    let stopped = Command::new(env!("CARGO_BIN_EXE_vitrum"))
        .args(["pack", source.to_str().unwrap(), dest.to_str().unwrap()])
        .stderr(std::process::Stdio::null())
        .spawn()
        .and_then(|mut child| {
            while child.try_wait()?.is_none() {
                if stage.join("progress.json").is_file() {
                    child.kill()?;
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            child.wait()
        })
        .unwrap();
    if !stopped.success() {
        assert!(!dest.exists() && stage.join("00000.safetensors").is_file());
        fs::write(stage.join("00001.safetensors"), b"half of a shard").unwrap();
        let again = vitrum(&["pack", source.to_str().unwrap(), dest.to_str().unwrap()]);
        let stderr = String::from_utf8_lossy(&again.stderr);
        assert!(again.status.success() && stderr.contains("continuing after"), "{stderr}");
    }
    assert_eq!(shards(&dest), shards(&whole));
    assert!(!stage.exists() && !dest.join("progress.json").exists());
}

#[test]
fn a_mixture_is_drawn_by_its_weights() {
    let temp = tempfile::tempdir().unwrap();
    let (large, small) = (temp.path().join("large"), temp.path().join("small"));
    for (root, count, colour) in [(&large, 30, 0), (&small, 3, 250)] {
        for i in 0..count {
            write(root.join(format!("{}/{i}.png", ["a", "b"][i % 2])), &png(8, colour));
        }
    }
    let spec = format!("1*{} + 3*{}", large.display(), small.display());
    let data = Dataset::open(&spec, Split::Train).unwrap();
    assert_eq!((data.len(), data.parts()), (33, vec![(30, 1.0), (3, 3.0)]));
    let mode = Mode::Train { augment: AugmentSection { crop: Crop::Pad, ..Default::default() }, seed: 2 };
    let spec_of = |batch| LoaderSpec {
        batch,
        image: (8, 8),
        mode: mode.clone(),
        start_batch: 0,
        workers: 2,
        on_bad_record: OnBadRecord::Error,
        exif: false,
    };
    let layout = SlotLayout { samples: 400, image: (8, 8), pixels: Pixels::U8, targets: TargetKind::Labels };
    let slot = Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout);
    let delivery = Delivery { shuffle_window: 8, ..Delivery::default() };
    let slot = Loader::with(Arc::new(data), spec_of(400), delivery, vec![slot]).next().unwrap().unwrap();
    let from_small = slot.images_u8().chunks(8 * 8 * 3).filter(|p| p[0] == 250).count();
    assert_eq!(from_small, 300);

    let other = temp.path().join("other");
    folder(&other, 2, 2);
    let error = |spec: String| Dataset::open(&spec, Split::Train).unwrap_err().to_string();
    assert!(error(format!("{} + {}", large.display(), other.display())).contains("only in training: `a`"));
    assert!(error(format!("0*{} + {}", large.display(), small.display())).contains("a number above 0"));
    assert!(error(format!("{} + nowhere", large.display())).contains("no such file"));
}

/// The system sends SIGBUS for a page that is no longer in the file.
#[test]
fn a_shard_that_is_cut_while_it_is_read_is_a_message() {
    let temp = tempfile::tempdir().unwrap();
    folder(&temp.path().join("source"), 2, 60);
    let dest = temp.path().join("dest");
    pack_with(&temp.path().join("source"), &dest, DEFAULTS).unwrap();
    let shard = dest.join("00000.safetensors");
    // Opened and mapped by a long training run, then cut.
    let mut run = Command::new(env!("CARGO_BIN_EXE_vitrum"));
    run.args(["train", "--device", "cpu", "--out"]).arg(temp.path().join("run"));
    for set in [
        "model.variant=Ti/16",
        "model.image=16",
        "model.patch=4",
        "model.depth=1",
        "train.steps=100000",
        "train.batch=8",
        "train.micro_batch=0",
    ] {
        run.args(["--set", set]);
    }
    run.arg("--set").arg(format!("data.train={}", dest.display()));
    let stderr = fs::File::create(temp.path().join("stderr")).unwrap();
    let mut child = run.stderr(stderr).stdout(std::process::Stdio::null()).spawn().unwrap();
    let said = || fs::read_to_string(temp.path().join("stderr")).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    if let Some(status) = child.try_wait().unwrap() {
        panic!("{status}: {}", said());
    }
    fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(100).unwrap();
    let start = std::time::Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed().as_secs() > 60 {
            child.kill().unwrap();
            panic!("still running: {}", said());
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    assert_eq!(status.code(), Some(1), "{}", said());
    assert!(said().contains("00000.safetensors: the file was cut short"), "{}", said());
}

#[test]
fn preview_draws_a_sheet_and_bench_times_the_stages() {
    let temp = tempfile::tempdir().unwrap();
    folder(&temp.path().join("source"), 2, 6);
    let (source, sheet) = (temp.path().join("source"), temp.path().join("sheet.png"));
    let (source, sheet) = (source.to_str().unwrap(), sheet.to_str().unwrap());
    let settings = ["augment.level=medium1", "augment.erase=0.5", "augment.crop=torch", "model.image=32"];
    let mut arguments = vec!["preview", "--data", source, "--out", sheet, "--samples", "9"];
    settings.iter().for_each(|set| arguments.extend(["--set", set]));
    let out = vitrum(&arguments);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let picture = image::open(sheet).unwrap();
    assert!(picture.width() > 8 * 96 && picture.height() > 2 * 96);

    let mut arguments = vec!["bench", "--what", "data", "--data", source, "--json", "--rounds", "1"];
    arguments.extend([
        "--seconds",
        "0.05",
        "--set",
        "model.image=32",
        "--set",
        "augment.randaugment=tf(2,15)",
    ]);
    let out = vitrum(&arguments);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let about: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(about["img_per_s"].as_f64().unwrap() > 0.0 && about["stages"].as_array().unwrap().len() == 4);

    let refused = vitrum(&["preview", "--out", sheet, "--set", "augment.level=light1"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("config:light1"));
}

/// Shards, archives, manifests and pictures with bytes changed at random: an error or a result, never a
/// panic.
#[test]
fn damaged_files_of_every_kind_never_panic() {
    let temp = tempfile::tempdir().unwrap();
    folder(&temp.path().join("source"), 2, 3);
    let dest = temp.path().join("dest");
    pack_with(&temp.path().join("source"), &dest, DEFAULTS).unwrap();
    let picture = png(8, 3);
    tar_of(
        &temp.path().join("a.tar"),
        &[("a/1.png", &picture), ("b/2.png", &picture), ("b/3.png", &picture)],
    );
    let files = [
        dest.join("00000.safetensors"),
        dest.join("dataset.json"),
        temp.path().join("a.tar"),
        temp.path().join("source/c0/0000.png"),
    ];
    let mut state = 88172645463325252u64;
    let mut random = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let read_all = |data: &Dataset| {
        for i in 0..data.len() {
            if let Ok(vitrum::data::shard::Record::Encoded(bytes)) = data.record(i) {
                let _ = vitrum::data::decode::Decoder::default().decode(&bytes);
            }
            let _ = (data.label(i), data.record_name(i));
        }
    };
    for file in files {
        let whole = fs::read(&file).unwrap();
        for _ in 0..150 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random(4) {
                let most = if random(2) == 0 { 600 } else { usize::MAX };
                let at = random(bytes.len().min(most));
                bytes[at] = random(256) as u8;
            }
            if random(3) == 0 {
                bytes.truncate(random(bytes.len() + 1));
            }
            fs::File::create(&file).unwrap().write_all(&bytes).unwrap();
            let place = match file.extension().and_then(|e| e.to_str()) {
                Some("tar") => file.clone(),
                Some("png") => temp.path().join("source"),
                _ => dest.clone(),
            };
            if let Ok(data) = Dataset::open(place.to_str().unwrap(), Split::Train) {
                read_all(&data);
            }
        }
        fs::write(&file, &whole).unwrap();
    }
}
