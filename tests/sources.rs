//! What counts as a data set, which split is which, and what is left out: folders, archives, tables and lists
//! as users have them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;

use vitrum::data::dataset::{Dataset, MANIFEST, Split, pair};
use vitrum::data::measured;
use vitrum::data::pack::{self, PackOptions};
use vitrum::data::shard::Record;
use vitrum::data::source::Source;
use vitrum::recipe::OnBadRecord;

const DEFAULTS: PackOptions = PackOptions {
    format: None,
    size: None,
    quality: None,
    on_bad_record: OnBadRecord::Skip,
    minival: 0.0,
    exif: false,
};

fn pack_with(source: &Path, dest: &Path, options: PackOptions) -> vitrum::error::Result<pack::Packed> {
    pack::pack(source, dest, options, &AtomicUsize::new(0))
}

fn save_png(path: &Path, height: u32, width: u32, seed: u8) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let pixel = |x: u32, y: u32| image::Rgb([seed, (x * 7) as u8, (y * 5) as u8 ^ seed]);
    image::RgbImage::from_fn(width, height, pixel).save(path).unwrap();
}

/// Two classes, three pictures each.
fn small_folder(dir: &Path, height: u32, width: u32) {
    for (i, class) in ["cat", "dog"].into_iter().enumerate() {
        for k in 0..3 {
            save_png(&dir.join(class).join(format!("{k}.png")), height, width, (i * 3 + k) as u8 * 40);
        }
    }
}

fn source(path: &Path) -> vitrum::error::Result<Source> {
    Source::open(path)
}

fn why(path: &Path) -> String {
    source(path).unwrap_err().to_string()
}

/// Records of train, val and test.
fn lens(source: &Source) -> [usize; 3] {
    assert!(source.is_split());
    Split::ALL.map(|split| source.items(split).len())
}

fn names(source: &Source, split: Split) -> Vec<&str> {
    source.items(split).iter().map(|item| item.name.as_str()).collect()
}

fn png(seed: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_pixel(4, 4, image::Rgb([seed, 255 - seed, 7]));
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn tar_bytes(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        // Written directly: `set_path` would normalise the path.
        header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(if name.ends_with('/') {
            tar::EntryType::Directory
        } else {
            tar::EntryType::Regular
        });
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn write(path: PathBuf, bytes: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn parts_have_many_names_and_test_is_validation_only_where_there_is_none() {
    let temp = tempfile::tempdir().unwrap();
    let made = |name: &str, folders: &[&str]| {
        folders.iter().for_each(|folder| small_folder(&temp.path().join(name).join(folder), 4, 4));
        temp.path().join(name)
    };
    for (name, folders, expected) in [
        ("three", &["train", "valid", "test"][..], [6, 6, 6]),
        ("loud", &["TRAIN", "Validation"], [6, 6, 0]),
        ("dev", &["training", "dev"], [6, 6, 0]),
        ("two", &["Training", "Testing"], [6, 6, 6]),
        ("years", &["train2017", "val2017"], [6, 6, 0]),
        ("words", &["pets_train", "pets_val"], [6, 6, 0]),
        ("one", &["train"], [6, 0, 0]),
    ] {
        let source = source(&made(name, folders)).unwrap();
        assert_eq!(
            (lens(&source), &source.classes[..]),
            (expected, &["cat".into(), "dog".into()][..]),
            "{name}"
        );
    }
    let said = |name: &str| source(&temp.path().join(name)).unwrap().notes().join("\n");
    assert!(said("three").contains("6 records of the test part are left out"), "{}", said("three"));
    assert!(said("two").contains("the test part (6 records) is taken in its place"), "{}", said("two"));
    assert_eq!(said("loud"), "");

    let spec = |name: &str| temp.path().join(name).display().to_string();
    let part = |name: &str, split| {
        let (data, part) = measured(&spec(name), split).map_err(|e| e.to_string())?;
        Ok::<_, String>((data.len(), part))
    };
    assert_eq!(part("three", None).unwrap(), (6, Some(Split::Val)));
    assert_eq!(part("three", Some(Split::Test)).unwrap(), (6, Some(Split::Test)));
    assert_eq!(part("two", None).unwrap(), (6, Some(Split::Test)));
    assert_eq!(part("one", Some(Split::Train)).unwrap(), (6, Some(Split::Train)));
    let refused = part("one", None).unwrap_err();
    assert!(refused.contains("no val part, only train") && refused.contains("--split train"), "{refused}");
    assert!(part("one", Some(Split::Test)).unwrap_err().contains("no test part"));
    assert_eq!(part("one/train", None).unwrap(), (6, None));
    assert!(part("one/train", Some(Split::Val)).unwrap_err().contains("no parts"));
    assert!(pair(Some(&spec("one")), None).unwrap().1.is_none());
    assert!(Dataset::open(&spec("one"), Split::Val).is_err(), "training pictures are no validation");

    // A part may lack classes, but has no others.
    for lacking in ["test", "val"] {
        let some = made("some", &["train", "val", "test"]);
        fs::remove_dir_all(some.join(lacking).join("cat")).unwrap();
        let source = source(&some).unwrap();
        assert_eq!(
            (lens(&source)[Split::Val as usize] + lens(&source)[Split::Test as usize], source.classes.len()),
            (9, 2)
        );
        let note = format!("the {lacking} part: it has no class `cat`, 1 of 2 classes");
        assert!(source.notes().contains(&note), "{:?}", source.notes());
        let split = if lacking == "val" { Split::Val } else { Split::Test };
        assert!(source.items(split).iter().all(|item| source.classes[item.label] == "dog"));
        let (train, val) = pair(Some(some.to_str().unwrap()), None).unwrap();
        assert_eq!(train.classes(), val.unwrap().classes());
    }
    // Validation pictures elsewhere, in class folders of which the first is missing.
    let (train, val) = pair(Some(&spec("one/train")), Some(&spec("some/val"))).unwrap();
    let val = val.unwrap();
    assert_eq!((train.classes(), val.class_counts()), (val.classes(), vec![0, 3]));
    assert!((0..3).all(|i| val.label(i) == 1 && val.record_name(i).starts_with("dog/")));

    // Packed splits keep their names, and training data stays training data.
    for (name, folders) in [("three", &["test", "train", "val"][..]), ("one", &["train"])] {
        let dest = temp.path().join("packed").join(name);
        pack_with(&temp.path().join(name), &dest, DEFAULTS).unwrap();
        let mut made: Vec<_> = fs::read_dir(&dest).unwrap().map(|e| e.unwrap().file_name()).collect();
        made.sort();
        assert_eq!(made, folders);
    }
    fs::rename(temp.path().join("packed/three/val"), temp.path().join("packed/three/Valid")).unwrap();
    assert_eq!(part("packed/three", None).unwrap(), (6, Some(Split::Val)));
    assert!(part("packed/one", None).unwrap_err().contains("--split train"));

    // Folders that look like splits but have other names are not guessed.
    assert!(why(&made("folds", &["fold1", "fold2"])).contains("look like parts"));
    assert!(why(&made("both", &["val", "valid"])).contains("both a val part"));
    let inverted = temp.path().join("inverted");
    for path in ["cat/train/1.png", "cat/val/2.png", "dog/train/3.png", "dog/val/4.png"] {
        save_png(&inverted.join(path), 4, 4, 1);
    }
    assert!(why(&inverted).contains("have the parts `train`, `val` inside"), "{}", why(&inverted));
    let odd = made("odd", &["train"]);
    save_png(&odd.join("bus/1.png"), 4, 4, 1);
    assert!(why(&odd).contains("a part of the data or a class?"), "{}", why(&odd));
    assert!(why(&odd).contains(&format!("name `{}` itself", odd.join("train").display())), "{}", why(&odd));
    // In an archive, no folder can be named.
    let archive = temp.path().join("odd.tar");
    let png = png(1);
    let members = ["train/cat/1.png", "train/dog/2.png", "bus/3.png"];
    write(archive.clone(), tar_bytes(&members.map(|name| (name, &png[..]))));
    assert!(
        why(&archive).contains("hint: unpack it and name its folder `train` as the data"),
        "{}",
        why(&archive)
    );
    // Folders beside the parts, and why each is left out.
    for (folder, with_val, without) in [
        (
            "test-images",
            "is not a part's name, which is one word: 6 pictures left out; rename it to `test`",
            None,
        ),
        (
            "val_2",
            "lies beside `val`, which is the val part: 6 pictures left out",
            Some("rename it to `val`"),
        ),
        ("validation_old", "lies beside `val`, which", Some("rename it to `val`")),
        ("val.bak", "lies beside `val`, which", Some("rename it to `val`")),
        ("old train", "lies beside `train`, which", None),
    ] {
        let beside = made(&format!("beside {folder}"), &["train", "val", folder]);
        let said = || source(&beside).unwrap().notes().join("\n");
        assert!(said().contains(&format!("`{folder}` {with_val}")), "{}", said());
        fs::remove_dir_all(beside.join("val")).unwrap();
        assert!(said().contains(without.unwrap_or(with_val)), "{}", said());
    }
    let flat = temp.path().join("flat");
    save_png(&flat.join("train/1.png"), 4, 4, 1);
    save_png(&flat.join("test/2.png"), 4, 4, 1);
    assert!(why(&flat).contains("no class folders inside"), "{}", why(&flat));
    // A third folder with another name does not turn two splits into classes.
    let three = made("three-words", &["seg_train", "seg_test"]);
    save_png(&three.join("seg_pred/all/1.png"), 4, 4, 1);
    assert_eq!(lens(&source(&three).unwrap()), [6, 6, 6]);
    // A class may have such a name.
    fs::rename(flat.join("test"), flat.join("bus")).unwrap();
    assert_eq!(source(&flat).unwrap().classes, ["bus", "train"]);
    // Unlabelled pictures.
    let kaggle = made("kaggle", &["train"]);
    save_png(&kaggle.join("test/1.png"), 4, 4, 1);
    let listed = source(&kaggle).unwrap();
    assert_eq!((lens(&listed), listed.notes().len()), ([6, 0, 0], 1));
    fs::create_dir(kaggle.join("test/images")).unwrap();
    fs::rename(kaggle.join("test/1.png"), kaggle.join("test/images/1.png")).unwrap();
    let listed = source(&kaggle).unwrap();
    assert_eq!((lens(&listed), listed.classes.len()), ([6, 0, 0], 2));
    assert!(listed.notes()[0].contains("other classes than training"), "{:?}", listed.notes());
}

#[test]
fn strays_are_named_and_hide_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data");
    small_folder(&data, 4, 4);
    write(data.join("dog/Thumbs.db"), b"\xD0\xCF");
    write(data.join("cat/.DS_Store"), b"x");
    write(data.join("cat/noname"), png(9));
    write(data.join("@eaDir/thumb.png"), png(1));
    write(data.join("lost+found/x"), b"");
    write(data.join("annotations/1.xml"), b"<x/>");
    write(data.join("extra.tar"), tar_bytes(&[("ape/1.png", &png(1)), ("bee/1.png", &png(2))]));
    write(data.join(MANIFEST), br#"{"labels": [["cat/0.png", 0]]}"#);
    write(data.join("top.png"), png(1));
    write(data.join("runs/first/recipe.toml"), b"");
    write(data.join("runs/first/samples/1.png"), png(1));
    let listed = source(&data).unwrap();
    assert_eq!(listed.classes, ["cat", "dog"]);
    // The first bytes of `noname` make it a picture.
    assert_eq!(listed.items(Split::Train).len(), 7);
    let said = listed.notes().join("\n");
    for part in ["`runs/first/`", "`@eaDir/`", "1 picture is left out, in no class folder: `top.png`"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(
        said.contains("5 files are left out, no pictures: `annotations/1.xml`, `cat/.DS_Store`"),
        "{said}"
    );
    let spec = data.display().to_string();
    assert_eq!(Dataset::open(&spec, Split::Train).unwrap().len(), 7);
    // A broken picture counts as a picture, and is left to `data.on_bad_record`.
    write(data.join("dog/broken.jpg"), b"junk");
    assert_eq!(pack_with(&data, &temp.path().join("packed"), DEFAULTS).unwrap().parts, [(None, 7, 1)]);
    // An empty folder is a class without pictures.
    fs::create_dir(data.join("emu")).unwrap();
    let listed = source(&data).unwrap();
    assert_eq!(listed.classes, ["cat", "dog", "emu"]);
    assert!(listed.notes().join("\n").contains("1 class has no picture: `emu`"));
}

#[test]
fn archives_are_read_as_tar_extracts_them() {
    let temp = tempfile::tempdir().unwrap();
    let (a, b, c) = (png(10), png(100), png(200));
    let tar = |name: &str, members: &[(&str, &[u8])]| {
        let path = temp.path().join(name);
        write(path.clone(), tar_bytes(members));
        path
    };
    let dot = tar("dot.tar", &[("./", b""), ("./cat/", b""), ("./cat/1.png", &a), ("././dog//2.png", &b)]);
    let listed = source(&dot).unwrap();
    assert_eq!((listed.classes.len(), names(&listed, Split::Train)), (2, vec!["cat/1.png", "dog/2.png"]));

    let twice =
        tar("twice.tar", &[("cat/1.png", &a), ("dog/2.png", &b), ("cat/1.png", &c), ("cat/t.txt", b"x")]);
    let listed = source(&twice).unwrap();
    let record = listed.store.read(&listed.items(Split::Train)[0]).unwrap();
    assert_eq!(record, Record::Encoded(c[..].into()), "the last of a name counts");
    let said = listed.notes().join("\n");
    assert!(said.contains("1 picture left out") && said.contains("twice.tar:cat/t.txt"), "{said}");

    // WebDataset: the key ends at the first dot.
    let dots =
        tar("dots.tar", &[("1.v2.png", &a), ("1.v2.cls", b"0"), ("d.x/2.png", &b), ("d.x/2.cls", b"1")]);
    assert_eq!(names(&source(&dots).unwrap(), Split::Train), ["dots.tar:1", "dots.tar:d.x/2"]);
    let collide =
        tar("c.tar", &[("1.a.png", &a), ("1.cls", b"0"), ("1.b.png", &b), ("2.png", &a), ("2.cls", b"1")]);
    assert!(why(&collide).contains("`1.a.png` and `1.b.png` are both the picture of sample `c.tar:1`"));
    let same = tar("s.tar", &[("1.png", &a), ("1.cls", b"0"), ("1.png", &b), ("1.cls", b"1")]);
    assert!(why(&same).contains("two members `1.png`"), "{}", why(&same));
    let json: [&[u8]; 2] = [br#"{"label": 1, "x": 2}"#, br#"{"class": "0"}"#];
    let json = tar(
        "j.tar",
        &[("1.png", &a), ("1.json", json[0]), ("2.jpg", &b), ("2.json", json[1]), ("3.cls", b"1")],
    );
    let listed = source(&json).unwrap();
    assert_eq!(listed.items(Split::Train).iter().map(|i| i.label).collect::<Vec<_>>(), [1, 0]);
    assert!(listed.notes().join("\n").contains("1 sample without a picture left out: `j.tar:3`"));

    // Shards and their splits: by whole words, by folder, by number.
    let shard = tar_bytes(&[("1.png", &a), ("1.cls", b"0"), ("2.png", &b), ("2.cls", b"1")]);
    let shards = |names: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        names.iter().for_each(|name| write(dir.path().join(name), &shard));
        (source(dir.path()).unwrap(), dir)
    };
    assert_eq!(lens(&shards(&["train-0.tar", "train-1.tar", "val-0.tar", "test-0.tar"]).0), [4, 2, 2]);
    assert_eq!(lens(&shards(&["train/0.tar", "val/0.tar"]).0), [2, 2, 0]);
    let (latest, dir) = shards(&["animals-latest-0.tar", "carnival-0.tar", "animals-old-0.tar"]);
    assert!(!latest.is_split() && latest.items(Split::Val).len() == 6);
    fs::rename(dir.path().join("carnival-0.tar"), dir.path().join("animals-old-1.tar")).unwrap();
    let braces = dir.path().join("animals-old-{0..1}.tar").display().to_string();
    assert_eq!(Dataset::open(&braces, Split::Train).unwrap().len(), 4);

    // Class folders in one archive per split, with the same paths in each.
    let dir = temp.path().join("parts");
    for name in ["train", "val"] {
        write(dir.join(format!("{name}.tar")), tar_bytes(&[("cat/1.png", &a), ("dog/1.png", &b)]));
    }
    let listed = source(&dir).unwrap();
    assert_eq!((lens(&listed), listed.classes.len()), ([2, 2, 0], 2));
    let dir = temp.path().join("more");
    for name in ["a", "b"] {
        write(dir.join(format!("{name}.tar")), tar_bytes(&[("cat/1.png", &a), ("dog/1.png", &b)]));
    }
    assert_eq!(source(&dir).unwrap().items(Split::Train).len(), 4, "two archives, four pictures");
}

#[test]
fn raw_imagenet_is_read_as_it_is_published() {
    let temp = tempfile::tempdir().unwrap();
    let (a, b) = (png(10), png(100));
    let class = |id: &str| tar_bytes(&[(&format!("{id}_1.JPEG"), &a), (&format!("{id}_2.JPEG"), &b)]);
    let ids = ["n01440764", "n01443537", "n01484850"];
    let classes = ids.map(class);
    let inner: Vec<(String, &Vec<u8>)> = ids.iter().map(|id| format!("{id}.tar")).zip(&classes).collect();
    let members: Vec<(&str, &[u8])> = inner.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
    let whole = temp.path().join("ILSVRC2012_img_train.tar");
    write(whole.clone(), tar_bytes(&members));
    let listed = source(&whole).unwrap();
    assert_eq!((&listed.classes[..], listed.items(Split::Train).len()), (&ids.map(String::from)[..], 6));
    assert_eq!(listed.items(Split::Train)[3].name, "n01443537/n01443537_2.JPEG");
    assert_eq!(listed.store.read(&listed.items(Split::Train)[3]).unwrap(), Record::Encoded(b[..].into()));

    // Class archives in a folder, and a flat validation split beside a list of labels.
    let root = temp.path().join("imagenet");
    for (name, bytes) in &inner {
        write(root.join("train").join(name), bytes);
    }
    assert_eq!(source(&root.join("train")).unwrap().classes, ids);
    for i in 1..=3 {
        write(root.join(format!("val/ILSVRC2012_val_0000000{i}.JPEG")), png(i));
    }
    let lists = [
        (
            "val.txt",
            "ILSVRC2012_val_00000001.JPEG 2\nILSVRC2012_val_00000002.JPEG 0\nILSVRC2012_val_00000003.JPEG 1\n",
        ),
        (
            "val/labels.csv",
            "path,label\nILSVRC2012_val_00000001.JPEG,n01484850\nILSVRC2012_val_00000002.JPEG,n01440764\n\
                            ILSVRC2012_val_00000003.JPEG,n01443537\n",
        ),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\nILSVRC2012_val_00000002,n01440764 1 2 3 4 n01440764 5 6 7 8 \n\
                                  ILSVRC2012_val_00000003,n01443537 1 2 3 4 \nILSVRC2012_val_00000001,n01484850 1 2 3 4 \n",
        ),
        (
            "val/val_annotations.txt",
            "ILSVRC2012_val_00000001.JPEG\tn01484850\t0\t1\nILSVRC2012_val_00000002.JPEG\tn01440764\t0\t1\n\
                                     ILSVRC2012_val_00000003.JPEG\tn01443537\t0\t1\n",
        ),
    ];
    for (name, text) in lists {
        write(root.join(name), text);
        let listed = source(&root).unwrap();
        assert_eq!((lens(&listed), &listed.classes[..]), ([6, 3, 0], &ids.map(String::from)[..]), "{name}");
        let labels: Vec<usize> = listed.items(Split::Val).iter().map(|item| item.label).collect();
        assert_eq!(labels, [2, 0, 1], "{name}");
        fs::remove_file(root.join(name)).unwrap();
    }
    // ILSVRC's own numbers follow another order: taken as indices they would be wrong.
    write(root.join("ILSVRC2012_validation_ground_truth.txt"), "3\n1\n2\n");
    assert!(why(&root).contains("only numbers"), "{}", why(&root));

    let pickles = temp.path().join("cifar-10-batches-py");
    write(pickles.join("data_batch_1"), b"\x80\x02}q\x01");
    write(pickles.join("batches.meta"), b"\x80\x02}q\x01");
    assert!(why(&pickles).contains("cifar-10-binary.tar.gz"), "{}", why(&pickles));
}

#[test]
fn tables_are_read_as_other_programs_write_them() {
    let temp = tempfile::tempdir().unwrap();
    for (i, path) in ["a/1.png", "a/2.png", "b/3.png", "b/4 x.png"].into_iter().enumerate() {
        save_png(&temp.path().join("img").join(path), 4, 4, i as u8 * 50);
    }
    let table = |name: &str, text: &str| {
        let path = temp.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let rows = ["img/a/1.png", "img/a/2.png", "img/b/3.png", "img/b/4 x.png"];
    for (name, text) in [
        ("1.csv", "\u{feff}file_name,label\nimg/a/1.png,a\nimg/a/2.png,a\nimg/b/3.png,b\nimg/b/4 x.png,b\n"),
        (
            "2.csv",
            "Path,Label\r\n.\\img\\a\\1.png,a\r\nimg\\a\\2.png,a\r\nimg\\b\\3.png,b\r\nimg\\b\\4 x.png,b\r\n",
        ),
        (
            "3.jsonl",
            "\u{feff}{\"file_name\":\"img/a/1.png\",\"label\":\"a\"}\n{\"file_name\":\"img/a/2.png\",\"label\":\"a\"}\n\
                     {\"image\":\"img/b/3.png\",\"label\":\"b\"}\n{\"filename\":\"img/b/4 x.png\",\"label\":\"b\"}",
        ),
        ("4.txt", "img/a/1.png a\nimg/a/2.png a\nimg/b/3.png b\nimg/b/4 x.png b\n"),
        ("5.txt", "img/a/1.png\ta\nimg/a/2.png\ta\nimg/b/3.png\tb\nimg/b/4 x.png\tb\n"),
    ] {
        let path = table(name, text);
        let listed = source(&path).unwrap();
        assert_eq!(
            (names(&listed, Split::Train), &listed.classes[..]),
            (rows.to_vec(), &["a".into(), "b".into()][..])
        );
        let read = |item| listed.store.read(item).is_ok();
        assert!(listed.items(Split::Train).iter().all(read), "{name}");
    }
    let split = "path,label,split\nimg/a/1.png,a,Training\nimg/b/3.png,b,train\nimg/a/2.png,a,dev\nimg/b/4 x.png,b,TEST\n";
    let listed = source(&table("split.csv", split)).unwrap();
    assert_eq!(lens(&listed), [2, 1, 1]);
    assert!(listed.notes()[0].contains("1 record of the test part is left out"), "{:?}", listed.notes());
    let odd = "{\"path\":\"img/a/1.png\",\"label\":1,\"split\":7}";
    assert!(why(&table("odd.jsonl", odd)).contains("no split `7`"));

    // Numbers are indices if they are dense from 0 on, else names.
    let numbered = |labels: [u32; 4]| {
        let rows: Vec<String> =
            rows.iter().zip(labels).map(|(row, label)| format!("{row},{label}")).collect();
        let listed = source(&table("n.csv", &format!("path,label\n{}", rows.join("\n")))).unwrap();
        let labels: Vec<usize> = listed.items(Split::Train).iter().map(|item| item.label).collect();
        (listed.classes.clone(), labels, listed.notes().join("\n"))
    };
    let (classes, labels, said) = numbered([1985, 2004, 1985, 2010]);
    assert_eq!(
        (classes, labels, said),
        (vec!["1985".into(), "2004".into(), "2010".into()], vec![0, 1, 0, 2], String::new())
    );
    let (classes, labels, said) = numbered([3, 0, 1, 3]);
    assert_eq!((classes.len(), labels, &said[..]), (4, vec![3, 0, 1, 3], "1 class has no picture: `2`"));

    // `metadata` in the folder takes precedence over class folders. Without labels it is not a label table.
    let hub = temp.path().join("hub");
    small_folder(&hub.join("train"), 4, 4);
    small_folder(&hub.join("validation"), 4, 4);
    let rows = "file_name,label\ncat/0.png,x\ncat/1.png,y\ndog/0.png,x\n";
    fs::write(hub.join("train/metadata.csv"), rows).unwrap();
    fs::write(hub.join("validation/metadata.csv"), rows).unwrap();
    fs::remove_file(hub.join("train/dog/1.png")).unwrap();
    let remains = why(&hub);
    assert!(
        remains.contains("not one of the 2 class folders"),
        "some pictures are in the table and some are not: {remains}"
    );
    for part in ["train", "validation"] {
        for path in ["cat/2.png", "dog/1.png", "dog/2.png"] {
            let _ = fs::remove_file(hub.join(part).join(path));
        }
    }
    let listed = source(&hub).unwrap();
    assert_eq!((lens(&listed), &listed.classes[..]), ([3, 3, 0], &["x".into(), "y".into()][..]));
    for part in ["train", "validation"] {
        fs::write(hub.join(part).join("metadata.csv"), "file_name,text\ncat/0.png,a cat\n").unwrap();
    }
    assert_eq!(source(&hub).unwrap().classes, ["cat", "dog"]);
}

#[test]
fn numbered_class_folders_are_in_the_order_of_their_numbers() {
    let temp = tempfile::tempdir().unwrap();
    for class in 0..12 {
        save_png(&temp.path().join(format!("{class}/1.png")), 4, 4, class);
    }
    let listed = source(temp.path()).unwrap();
    assert_eq!(listed.classes, (0..12).map(|c| c.to_string()).collect::<Vec<_>>());
    for item in listed.items(Split::Train) {
        assert_eq!(item.name, format!("{}/1.png", item.label));
    }
}

#[test]
fn packings_that_are_not_read_are_named_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    for (name, says) in [
        ("shard-000.tar.gz", ["compressed by gzip", "`gzip -d`"]),
        ("train.TGZ", ["compressed by gzip", "`gzip -d`"]),
        ("train.tar.zst", ["Zstandard", "`zstd -d`"]),
        ("pictures.zip", ["a ZIP archive", "unpack it"]),
        ("train.tfrecord-00000-of-00010", ["TensorFlow records", "WebDataset"]),
        ("imagenet.beton", ["a file of FFCV", "vitrum pack"]),
        ("data.mdb", ["an LMDB database", "class folders"]),
        ("pcam.h5", ["an HDF5 file", "class folders"]),
    ] {
        let folder = dir.path().join(name.replace('.', "-"));
        write(folder.join(name), b"\x1f\x8b");
        for path in [folder.clone(), folder.join(name)] {
            let error = why(&path);
            assert!(says.iter().all(|text| error.contains(text)) && error.contains(name), "{error}");
        }
        // Beside pictures in class folders it is a stray file like others.
        small_folder(&folder, 4, 4);
        assert!(source(&folder).unwrap().notes().iter().any(|note| note.contains(name)));
    }
}

#[test]
fn a_table_with_an_unknown_split_is_an_error_wherever_it_lies() {
    let dir = tempfile::tempdir().unwrap();
    small_folder(dir.path(), 4, 4);
    let rows = |third: &str| {
        format!("file_name,label,split\ncat/0.png,x,train\ndog/0.png,y,train\ncat/1.png,x,{third}\n")
    };
    for name in ["cat/2.png", "dog/1.png", "dog/2.png"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let table = dir.path().join("metadata.csv");
    fs::write(&table, rows("holdout")).unwrap();
    for path in [dir.path(), &table] {
        assert!(why(path).contains("line 4: there is no split `holdout`"), "{}", why(path));
    }
    fs::write(&table, rows("")).unwrap();
    let notes = source(&table).unwrap().notes().join("\n");
    assert!(notes.contains("1 of 3 rows have no split: they are used for training"), "{notes}");
}
