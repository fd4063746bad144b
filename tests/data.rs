//! Packing, opening and loading pictures, as far as a user can see it. Tests with real pictures read
//! `VITRUM_TEST_DATA` (default `../shared/data`) and skip with a line where it is absent.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use vitrum::backend::batch::PlainMemory;
use vitrum::backend::{Pixels, Slot, SlotLayout, TargetKind};
use vitrum::data::dataset::{Dataset, MANIFEST, Manifest, Split, pair};
use vitrum::data::loader::{Loader, LoaderSpec, Mode};
use vitrum::data::pack::{self, Format, Options, Target};
use vitrum::data::shard::Record;
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

const DEFAULTS: Options =
    Options { format: None, size: None, quality: None, on_bad_record: OnBadRecord::Skip };

fn pack_with(source: &Path, dest: &Path, options: Options) -> vitrum::error::Result<pack::Packed> {
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
    assert_eq!(packed.parts, [(Some(Split::Train), 6000, 0), (Some(Split::Val), 1000, 0)]);

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
