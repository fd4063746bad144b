//! Packing, opening and loading pictures, as far as a user can see it. Tests with real pictures read
//! `VITRUM_TEST_DATA` (default `../shared/data`); if it is absent they say so and skip.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use vitrum::backend::batch::PlainMemory;
use vitrum::backend::{Pixels, Slot, SlotLayout, TargetKind};
use vitrum::data::dataset::{Dataset, MANIFEST, Manifest, Split, pair};
use vitrum::data::decode::Decoder;
use vitrum::data::loader::{Loader, LoaderSpec, Mode};
use vitrum::data::pack::{self, Format, PackOptions, Target};
use vitrum::data::shard::Record;
use vitrum::data::source::Source;
use vitrum::recipe::{AugmentSection, Crop, EvalResize, OnBadRecord};

fn test_data(name: &str) -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data");
    let dir = std::env::var_os("VITRUM_TEST_DATA").map_or_else(|| default.into(), PathBuf::from);
    let path = dir.join(name);
    if !path.exists() {
        println!("skipped: no {}", path.display());
        return None;
    }
    Some(path)
}

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

fn open(dir: &Path, split: Split) -> Dataset {
    Dataset::open(dir.to_str().unwrap(), split).unwrap()
}

/// Class name and pixels of all records by name.
fn pictures(dataset: &Dataset) -> BTreeMap<String, (String, Vec<u8>)> {
    let picture = |i: usize| {
        let pixels = match dataset.record(i).unwrap() {
            Record::Raw { pixels, .. } => pixels.into_owned(),
            Record::Encoded(bytes) => image::load_from_memory(&bytes).unwrap().into_rgb8().into_raw(),
        };
        (dataset.record_name(i), (dataset.classes()[dataset.label(i)].clone(), pixels))
    };
    (0..dataset.len()).map(picture).collect()
}

/// All files below a folder with their bytes.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                files.insert(path.strip_prefix(dir).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    files
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

#[test]
fn cifar_pictures_are_the_same_from_the_archive_the_folder_and_the_binary() {
    let (Some(tar), Some(binary)) = (test_data("cifar10.tar"), test_data("cifar-10-batches-bin")) else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let packed = pack_with(&tar, &temp.path().join("tar"), DEFAULTS).unwrap();
    assert_eq!((packed.format, packed.image, packed.classes), (Format::Raw, Some((32, 32)), 10));
    assert_eq!(packed.parts, [(Some("train"), 6000, 0), (Some("val"), 1000, 0)]);

    tar::Archive::new(fs::File::open(&tar).unwrap()).unpack(temp.path().join("unpacked")).unwrap();
    pack_with(&temp.path().join("unpacked"), &temp.path().join("folder"), DEFAULTS).unwrap();
    assert!(tree(&temp.path().join("tar")) == tree(&temp.path().join("folder")), "the same bytes");

    pack_with(&binary, &temp.path().join("binary"), DEFAULTS).unwrap();
    let from_binary = open(&temp.path().join("binary"), Split::Val);
    let from_tar = pictures(&open(&temp.path().join("tar"), Split::Val));
    let names = fs::read_to_string(binary.join("test_batch.names.txt")).unwrap();
    assert_eq!(names.lines().count(), from_binary.len());
    for (i, name) in names.lines().enumerate() {
        let (class, pixels) = &from_tar[name.trim()];
        let Record::Raw { pixels: from_binary_pixels, .. } = from_binary.record(i).unwrap() else {
            panic!("raw")
        };
        assert!(pixels[..] == from_binary_pixels[..], "{name}");
        assert_eq!(from_tar.len(), from_binary.len());
        assert_eq!(*class, from_binary.classes()[from_binary.label(i)], "{name}");
    }
    assert_eq!(pack::check(&temp.path().join("tar")).unwrap().faults, Vec::<String>::new());
}

#[test]
fn cifar_100_counts_its_records_by_the_length_of_the_file() {
    let Some(folder) = test_data("cifar-100-binary") else { return };
    let temp = tempfile::tempdir().unwrap();
    for (i, source) in [folder.clone(), folder.join("test.bin")].iter().enumerate() {
        let dest = temp.path().join(i.to_string());
        let packed = pack_with(source, &dest, DEFAULTS).unwrap();
        assert_eq!((packed.classes, packed.parts), (100, vec![(None, 500, 0)]));
        let data = open(&dest, Split::Val);
        let mut per_class = [0; 100];
        (0..data.len()).for_each(|i| per_class[data.label(i)] += 1);
        assert_eq!(per_class, [5; 100]);
        assert!(data.classes().contains(&"mushroom".to_owned()));
    }
    let cut = temp.path().join("cut.bin");
    fs::write(&cut, &fs::read(folder.join("test.bin")).unwrap()[..100_000]).unwrap();
    let error = pack_with(&cut, &temp.path().join("none"), DEFAULTS).unwrap_err().to_string();
    assert!(error.contains("100000 bytes"), "{error}");
}

#[test]
fn photos_keep_their_bytes_and_train_packed_as_well_as_unpacked() {
    let Some(photos) = test_data("imagenet-mini") else { return };
    let temp = tempfile::tempdir().unwrap();
    let dest = temp.path().join("photos");
    let packed = pack_with(&photos, &dest, DEFAULTS).unwrap();
    assert_eq!((packed.format, packed.classes), (Format::Jpeg, 62));
    let (stored, files) = (open(&dest, Split::Train), open(&photos, Split::Train));
    for i in 0..stored.len() {
        assert_eq!(stored.record(i).unwrap(), files.record(i).unwrap());
        assert_eq!((stored.label(i), stored.record_name(i)), (files.label(i), files.record_name(i)));
    }
    let augment = AugmentSection { crop: Crop::Tf, hue: 0.1, ..Default::default() };
    let first = |data: Dataset, augment: AugmentSection, workers| {
        let mode = Mode::Train { augment, seed: 3 };
        let mut loader = loader(data, 64, (64, 48), mode, workers, OnBadRecord::Error);
        let slot = loader.next().unwrap().unwrap();
        (slot.images_u8().to_vec(), slot.labels().to_vec())
    };
    assert!(first(stored, augment.clone(), 1) == first(files, augment, 2));
    for crop in [Crop::Torch, Crop::Center, Crop::Pad] {
        let augment = AugmentSection { crop, pad: 4, ..Default::default() };
        let (pixels, _) = first(open(&dest, Split::Train), augment, 2);
        let mean = pixels.iter().map(|p| f64::from(*p)).sum::<f64>() / pixels.len() as f64;
        assert!((60.0..190.0).contains(&mean), "{crop:?}: mean {mean}");
    }
}

/// A smooth picture, so that decoding at an eighth shows the same content in the same position.
fn save_waves(path: &Path, height: u32, width: u32, seed: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let wave = |at: f32| (127.5 + 110.0 * at.sin()) as u8;
    let pixel = |x: u32, y: u32| {
        let (x, y) = (x as f32, (y + 20 * seed) as f32);
        image::Rgb([wave(x / 30.0), wave(y / 25.0), wave((x + y) / 40.0)])
    };
    image::RgbImage::from_fn(width, height, pixel).save(path).unwrap();
}

#[test]
fn scaled_decoding_shows_the_same_samples_whoever_makes_them() {
    let temp = tempfile::tempdir().unwrap();
    for i in 0..6 {
        // Codings that cannot be decoded at a smaller size stay as they are.
        let (class, ending) = if i % 2 == 0 { ("jpeg", "jpg") } else { ("png", "png") };
        save_waves(&temp.path().join(class).join(format!("{i}.{ending}")), 331, 449, i);
    }
    let image = (32, 24);
    let batch = |augment: AugmentSection, workers| {
        let mode = Mode::Train { augment, seed: 9 };
        let data = open(temp.path(), Split::Train);
        let slot = loader(data, 96, image, mode, workers, OnBadRecord::Error).next().unwrap().unwrap();
        (slot.images_u8().to_vec(), slot.labels().to_vec())
    };
    for crop in [Crop::Tf, Crop::Torch] {
        let full = AugmentSection { crop, ..Default::default() };
        let scaled = AugmentSection { scaled_decode: true, ..full.clone() };
        let (ours, labels) = batch(scaled.clone(), 1);
        assert!((ours.clone(), labels.clone()) == batch(scaled, 2), "{crop:?}: workers change nothing");
        let (expected, expected_labels) = batch(full, 2);
        assert_eq!(labels, expected_labels);
        let (mut changed, mut worst) = (0, 0f64);
        let samples = ours.chunks(image.0 * image.1 * 3).zip(expected.chunks(image.0 * image.1 * 3));
        for ((ours, expected), label) in samples.zip(labels) {
            let off: f64 = ours.iter().zip(expected).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
            let mean = off / ours.len() as f64;
            assert!(label == 0 || mean == 0.0, "{crop:?}: PNG has no smaller form");
            changed += usize::from(mean > 0.0);
            worst = worst.max(mean);
        }
        println!("{crop:?}: {changed} samples differ, by {worst:.2} at most in the mean");
        // An error of half an output pixel in position gives differences of 5 and more where the crop is
        // large.
        assert!(changed > 20 && worst < 1.5, "{crop:?}: {changed} samples, {worst}");
    }
}

fn loader(
    data: Dataset,
    batch: usize,
    image: (usize, usize),
    mode: Mode,
    workers: usize,
    on_bad_record: OnBadRecord,
) -> Loader {
    let layout = SlotLayout { samples: batch, image, pixels: Pixels::U8, targets: TargetKind::Labels };
    let slot = || Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout);
    let spec = LoaderSpec { batch, image, mode, start_batch: 0, workers, on_bad_record, exif: false };
    Loader::new(Arc::new(data), spec, vec![slot(), slot()])
}

#[test]
fn sizes_are_what_was_asked_for() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    small_folder(&source, 40, 60);
    let size_of = |data: &Dataset, i: usize| match data.record(i).unwrap() {
        Record::Raw { height, width, .. } => (height, width),
        Record::Encoded(bytes) => {
            let picture = image::load_from_memory(&bytes).unwrap();
            (picture.height() as usize, picture.width() as usize)
        }
    };
    let cases = [
        (None, None, None, (40, 60), true),
        (Some(Format::Jpeg), None, None, (40, 60), false),
        (None, Some(Target::Shorter(32)), None, (32, 32), true),
        (Some(Format::Raw), Some(Target::Exactly(20, 24)), None, (20, 24), true),
        (Some(Format::Jpeg), Some(Target::Shorter(20)), None, (20, 30), false),
        (Some(Format::Jpeg), Some(Target::Exactly(16, 50)), Some(80), (16, 50), false),
        (None, None, Some(50), (40, 60), false),
    ];
    for (k, (format, size, quality, expected, raw)) in cases.into_iter().enumerate() {
        let dest = temp.path().join(k.to_string());
        pack_with(&source, &dest, PackOptions { format, size, quality, ..DEFAULTS }).unwrap();
        let data = open(&dest, Split::Train);
        assert!((0..6).all(|i| size_of(&data, i) == expected), "case {k}");
        assert_eq!(data.image().is_some(), raw, "case {k}");
        assert_eq!(Manifest::read(&dest).unwrap().format, if raw { "raw" } else { "jpeg" }, "case {k}");
    }
    // If the size fits, no pixel and no byte changes.
    let untouched = temp.path().join("untouched");
    let options = PackOptions { format: Some(Format::Jpeg), size: Some(Target::Shorter(40)), ..DEFAULTS };
    pack_with(&source, &untouched, options).unwrap();
    assert_eq!(
        open(&untouched, Split::Train).record(0).unwrap(),
        open(&source, Split::Train).record(0).unwrap()
    );

    save_png(&source.join("dog/other.png"), 41, 60, 1);
    let options = PackOptions { format: Some(Format::Raw), ..DEFAULTS };
    let error = pack_with(&source, &temp.path().join("none"), options).unwrap_err().to_string();
    assert!(error.contains("60x41") && error.contains("--size"), "{error}");
}

/// Less common JPEGs, as libjpeg writes them, with its pixels as PNG (`tests/pictures/odd_jpeg.py`).
#[test]
fn odd_jpegs_have_libjpegs_pixels() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/odd");
    let mut decoders = [Decoder::default(), Decoder::default()];
    let mut compared = 0;
    for (file, png) in tree(&dir).into_iter().filter(|(file, _)| file.extension().is_some_and(|e| e == "png"))
    {
        let jpeg = fs::read(dir.join(file.with_extension("jpg"))).unwrap();
        let [ours, theirs] = &mut decoders;
        let (ours, theirs) = (ours.decode(&jpeg).unwrap(), theirs.decode(&png).unwrap());
        assert_eq!(ours.size(), theirs.size(), "{file:?}");
        assert!((0..ours.height).all(|y| ours.row(y) == theirs.row(y)), "{file:?}");
        compared += 1;
    }
    assert_eq!(compared, 24);
}

/// Every picture is stored lying on its side, with the orientation that turns it upright.
#[test]
fn exif_turns_pictures_in_training_evaluation_and_packs_if_it_is_asked_for() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    small_folder(&source, 24, 36);
    let plain = open(&source, Split::Train);
    let stored: Vec<Vec<u8>> = pictures(&plain).into_values().map(|(_, pixels)| pixels).collect();
    for file in tree(&source).into_keys() {
        let mut bytes = fs::read(source.join(&file)).unwrap();
        let exif = b"\0\0\0\x1AeXIfMM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0\0\0\0\0";
        bytes.splice(33..33, *exif);
        fs::write(source.join(file), bytes).unwrap();
    }
    // A quarter turn clockwise: the first row is the first column from below.
    let upright = |pixels: &[u8]| -> Vec<u8> {
        let places = (0..36).flat_map(|y| (0..24).map(move |x| ((23 - x) * 36 + y) * 3));
        places.flat_map(|at| pixels[at..at + 3].to_vec()).collect()
    };
    let augment = AugmentSection { crop: Crop::Center, flip: false, ..Default::default() };
    let modes =
        [Mode::Eval { resize: EvalResize::Center, crop_ratio: 1.0 }, Mode::Train { augment, seed: 1 }];
    for (mode, exif) in modes.into_iter().flat_map(|mode| [(mode.clone(), false), (mode, true)]) {
        let image = if exif { (36, 24) } else { (24, 36) };
        let layout = SlotLayout { samples: 6, image, pixels: Pixels::U8, targets: TargetKind::Labels };
        let slot = Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout);
        let spec = LoaderSpec {
            batch: 6,
            image,
            mode,
            start_batch: 0,
            workers: 1,
            on_bad_record: OnBadRecord::Error,
            exif,
        };
        let slot = Loader::new(Arc::new(plain.clone()), spec, vec![slot]).next().unwrap().unwrap();
        for picture in slot.images_u8()[..6 * 24 * 36 * 3].chunks(24 * 36 * 3) {
            let same = |from: &Vec<u8>| if exif { picture == upright(from) } else { picture == *from };
            assert!(stored.iter().any(same), "exif {exif}");
        }
    }
    for (exif, format) in
        [(false, Format::Raw), (true, Format::Raw), (false, Format::Jpeg), (true, Format::Jpeg)]
    {
        let dest = temp.path().join(format!("{exif}-{}", format.name()));
        let packed =
            pack_with(&source, &dest, PackOptions { format: Some(format), exif, ..DEFAULTS }).unwrap();
        let (data, raw) = (open(&dest, Split::Train), format == Format::Raw);
        assert_eq!(packed.image, raw.then_some(if exif { (36, 24) } else { (24, 36) }));
        assert_eq!(Manifest::read(&dest).unwrap().exif, exif);
        for (i, (_, pixels)) in pictures(&data).into_values().enumerate() {
            let expected = if exif { upright(&stored[i]) } else { stored[i].clone() };
            let off: f64 = pixels.iter().zip(&expected).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
            // Pictures that are turned and kept as files become JPEGs.
            let most = if exif && !raw { 12.0 } else { 0.0 };
            assert!(off / expected.len() as f64 <= most, "{exif} {format:?}: {off}");
        }
    }
}

#[test]
fn bad_records_are_skipped_or_fatal_and_a_failed_pack_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    small_folder(&source, 32, 32);
    fs::write(source.join("cat/broken.jpg"), b"\xFF\xD8\xFF\xE0 and no more").unwrap();
    fs::write(source.join("dog/page.png"), b"<html>").unwrap();
    let dest = temp.path().join("new/parent/dest");
    let packed = pack_with(&source, &dest, DEFAULTS).unwrap();
    assert_eq!(packed.parts, [(None, 6, 2)]);
    let manifest = Manifest::read(&dest).unwrap();
    assert_eq!((manifest.records, manifest.skipped, manifest.classes.len()), (6, 2, 2));

    let strict = PackOptions { on_bad_record: OnBadRecord::Error, ..DEFAULTS };
    let before = tree(temp.path());
    let error = pack_with(&source, &temp.path().join("other/dest"), strict).unwrap_err();
    assert!(error.message().contains("cat/broken.jpg"), "{error}");
    assert_eq!(error.exit_code(), 1);
    assert!(before == tree(temp.path()) && !temp.path().join("other").exists(), "nothing is left");

    let stopped =
        pack::pack(&source, &temp.path().join("other"), DEFAULTS, &AtomicUsize::new(2)).unwrap_err();
    assert_eq!(stopped.exit_code(), 130);
    assert!(before == tree(temp.path()));

    let error = pack_with(&source, &dest, DEFAULTS).unwrap_err();
    assert!(error.message().contains("already holds something"), "{error}");
    assert!(before == tree(temp.path()));
}

#[test]
fn a_bad_record_in_an_unpacked_folder_is_replaced_left_out_or_fatal() {
    let temp = tempfile::tempdir().unwrap();
    small_folder(temp.path(), 32, 32);
    fs::write(temp.path().join("cat/1.png"), b"nothing").unwrap();
    let data = || open(temp.path(), Split::Train);
    let plain = AugmentSection { crop: Crop::Pad, flip: false, ..Default::default() };
    let training = Mode::Train { augment: plain, seed: 0 };
    let evaluation = Mode::Eval { resize: EvalResize::Squash, crop_ratio: 1.0 };

    let mut skipping = loader(data(), 6, (32, 32), training.clone(), 2, OnBadRecord::Skip);
    let slot = skipping.next().unwrap().unwrap();
    assert_eq!(slot.labels().iter().sum::<i32>(), 3, "the next cat takes its place");
    assert_eq!(skipping.bad_records(), 1);

    let mut skipping = loader(data(), 4, (32, 32), evaluation.clone(), 2, OnBadRecord::Skip);
    let first = skipping.next().unwrap().unwrap();
    assert_eq!((first.count, &first.labels()[..3]), (3, &[0, 0, 1][..]));
    let second = skipping.next().unwrap().unwrap();
    assert_eq!((second.count, &second.labels()[..2]), (2, &[1, 1][..]));
    assert!(skipping.next().unwrap().is_none());

    for mode in [training, evaluation] {
        let error = loader(data(), 6, (32, 32), mode, 2, OnBadRecord::Error).next().err().expect("an error");
        assert!(error.message().contains("cat/1.png"), "{error}");
    }
}

#[test]
fn folders_that_cannot_be_a_data_set_say_why() {
    let temp = tempfile::tempdir().unwrap();
    let dir = |name: &str| temp.path().join(name);
    let reason = |path: &Path| {
        let opened = Dataset::open(path.to_str().unwrap(), Split::Train).unwrap_err();
        if path.exists() {
            let packed = pack_with(path, &dir("dest"), DEFAULTS).unwrap_err();
            assert_eq!(packed.message(), opened.message());
            assert!(!dir("dest").exists());
        }
        assert_eq!(opened.exit_code(), 1);
        opened.to_string()
    };
    assert!(reason(&dir("absent")).contains("no such file or folder"));
    fs::create_dir(dir("empty")).unwrap();
    assert!(reason(&dir("empty")).contains("no pictures in class folders"));
    save_png(&dir("flat/a.png"), 8, 8, 1);
    assert!(reason(&dir("flat")).contains("no pictures in class folders"));
    save_png(&dir("one/cat/a.png"), 8, 8, 1);
    assert!(reason(&dir("one")).contains("only one class, `cat`"));
    fs::create_dir_all(dir("text/a")).unwrap();
    fs::create_dir_all(dir("text/b")).unwrap();
    fs::write(dir("text/a/1.txt"), "one").unwrap();
    fs::write(dir("text/b/2.txt"), "two").unwrap();
    assert!(reason(&dir("text")).contains("no pictures in class folders: 2 files are left out"));
    small_folder(&dir("differ/train"), 8, 8);
    small_folder(&dir("differ/val"), 8, 8);
    fs::rename(dir("differ/val/dog"), dir("differ/val/cow")).unwrap();
    let text = reason(&dir("differ"));
    assert!(text.contains("only in training: `dog`; only in validation: `cow`"), "{text}");
    // A class without training pictures is refused in folders, and the hint works; in a table it has a line.
    small_folder(&dir("more/train"), 8, 8);
    small_folder(&dir("more/val"), 8, 8);
    save_png(&dir("more/val/emu/a.png"), 8, 8, 1);
    let text = reason(&dir("more"));
    assert!(text.contains("the validation data has 1 class without training pictures: `emu`"), "{text}");
    fs::create_dir(dir("more/train/emu")).unwrap();
    let said = |path: &Path| Source::open(path).unwrap().notes().join("\n");
    assert!(said(&dir("more")).contains("1 class has no training picture: `emu`"), "{}", said(&dir("more")));
    let rows =
        "path,label,split\ntrain/cat/0.png,cat,train\ntrain/dog/0.png,dog,train\nval/emu/a.png,emu,val\n";
    fs::write(dir("more/list.csv"), rows).unwrap();
    let listed = said(&dir("more/list.csv"));
    assert!(listed.contains("1 class has no training picture: `emu`"), "{listed}");
    fs::write(dir("file.txt"), "text").unwrap();
    assert!(reason(&dir("file.txt")).contains("not a folder, a tar archive"));
    fs::write(dir("archive.tar.gz"), b"\x1F\x8B\x08\x00").unwrap();
    assert!(reason(&dir("archive.tar.gz")).contains("compressed"));
}

#[test]
fn training_and_validation_data_are_found_where_they_are() {
    let temp = tempfile::tempdir().unwrap();
    let both = temp.path().join("both");
    small_folder(&both.join("train"), 8, 8);
    small_folder(&both.join("validation"), 8, 8);
    let packed = temp.path().join("packed");
    pack_with(&both, &packed, DEFAULTS).unwrap();
    assert!(packed.join("val").join(MANIFEST).is_file() && packed.join("train").join(MANIFEST).is_file());
    let single = temp.path().join("single");
    pack_with(&both.join("train"), &single, DEFAULTS).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    for spec in [text(&both), text(&packed)] {
        let (train, val) = pair(Some(&spec), None).unwrap();
        assert_eq!((train.len(), val.map(|v| v.len())), (6, Some(6)), "{spec}");
    }
    assert!(pair(Some(&text(&single)), None).unwrap().1.is_none());
    assert!(pair(Some(&text(&single)), Some(&text(&both))).unwrap().1.is_some());
    let error = pair(Some(&text(&single)), Some("demo")).unwrap_err().to_string();
    assert!(error.contains("10 classes"), "{error}");
    assert_eq!(pair(None, None).unwrap_err().exit_code(), 2);
    let about = vitrum::data::describe(&packed).unwrap();
    assert_eq!(
        (about["val"]["records"].as_u64(), about["train"]["classes"][1].as_str()),
        (Some(6), Some("dog"))
    );
}

#[test]
fn damage_to_a_packed_data_set_is_found() {
    let temp = tempfile::tempdir().unwrap();
    let (source, dest) = (temp.path().join("source"), temp.path().join("dest"));
    small_folder(&source, 16, 16);
    pack_with(&source, &dest, DEFAULTS).unwrap();
    let checked = pack::check(&dest).unwrap();
    assert_eq!((checked.shards, checked.records, checked.faults.len()), (1, 6, 0));

    let shard = dest.join("00000.safetensors");
    let whole = fs::read(&shard).unwrap();
    let spec = dest.to_str().unwrap();
    fs::write(&shard, &whole[..whole.len() - 7]).unwrap();
    let error = Dataset::open(spec, Split::Train).unwrap_err().to_string();
    assert!(error.contains("00000.safetensors") && error.contains("damaged"), "{error}");
    assert_eq!(pack::check(&dest).unwrap().faults.len(), 1);

    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&shard, flipped).unwrap();
    assert!(Dataset::open(spec, Split::Train).is_ok(), "opening does not read every byte");
    assert!(pack::check(&dest).unwrap().faults[0].contains("checksum"));

    fs::write(&shard, whole).unwrap();
    fs::write(dest.join(MANIFEST), "{ \"version\": 1, \"shards\": 3 }").unwrap();
    assert!(Dataset::open(spec, Split::Train).unwrap_err().message().contains(MANIFEST));
    fs::remove_file(dest.join(MANIFEST)).unwrap();
    assert!(pack::check(&dest).unwrap_err().message().contains("no packed data set"));
}

#[test]
fn bad_pictures_of_every_kind_are_named_and_nothing_panics() {
    let Some(bad) = test_data("bad-images") else { return };
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("source");
    let mut files: Vec<_> = fs::read_dir(&bad).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "jpg") && !f.ends_with("bomb_8000x8000.jpg"));
    for (i, file) in files.iter().enumerate() {
        let class = source.join(["odd", "even"][i % 2]);
        fs::create_dir_all(&class).unwrap();
        fs::copy(file, class.join(file.file_name().unwrap())).unwrap();
    }
    let packed = pack_with(&source, &temp.path().join("dest"), DEFAULTS).unwrap();
    assert_eq!(packed.parts, [(None, files.len() - 9, 9)]);
    let data = open(&temp.path().join("dest"), Split::Train);
    let mode = Mode::Train { augment: AugmentSection::default(), seed: 0 };
    let mut loader = loader(data, 64, (24, 40), mode, 2, OnBadRecord::Error);
    assert!(loader.next().unwrap().is_some());
}
