//! Memory over time. A file of its own: a test beside it in the same process would be counted, too.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use vitrum::backend::batch::PlainMemory;
use vitrum::backend::{Pixels, Slot, SlotLayout, TargetKind};
use vitrum::data::pack::{self, Format, PackOptions};
use vitrum::data::picture::View;
use vitrum::data::{Dataset, Loader, LoaderSpec, Mode, Split, encode_png};
use vitrum::recipe::{AugmentSection, Crop, OnBadRecord};

const SAMPLES: usize = 8;

/// JPEGs of many sizes in two classes, packed.
fn photographs(dir: &Path) -> Dataset {
    for i in 0..24usize {
        let (height, width) = (60 + i * 9, 300 - i * 7);
        let pixels: Vec<u8> = (0..height * width * 3).map(|p| (p * (i + 3) / 7 % 251) as u8).collect();
        let folder = dir.join("source").join(["a", "b"][i % 2]);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{i}.png")), encode_png(View::new(&pixels, height, width)).unwrap())
            .unwrap();
    }
    let options = PackOptions {
        format: Some(Format::Jpeg),
        size: None,
        quality: Some(90),
        on_bad_record: OnBadRecord::Error,
        exif: false,
        minival: 0.0,
    };
    let dest = dir.join("packed");
    pack::pack(&dir.join("source"), &dest, options, &AtomicUsize::new(0)).unwrap();
    Dataset::open(dest.to_str().unwrap(), Split::Train).unwrap()
}

/// Memory that is no file's, in KiB.
fn anonymous() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix("kB")?.trim().parse().ok())
}

#[test]
fn a_loader_takes_no_more_memory_after_a_thousand_batches_than_after_fifty() {
    let temp = tempfile::tempdir().unwrap();
    let data = photographs(temp.path());
    let layout =
        SlotLayout { samples: SAMPLES, image: (32, 32), pixels: Pixels::U8, targets: TargetKind::Labels };
    let slot = || Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout);
    let augment = AugmentSection {
        crop: Crop::Torch,
        randaugment: Some("tf(2,15)".parse().unwrap()),
        mixup: 0.2,
        ..Default::default()
    };
    let spec = LoaderSpec {
        batch: SAMPLES,
        image: layout.image,
        mode: Mode::Train { augment, seed: 1 },
        start_batch: 0,
        workers: 2,
        on_bad_record: OnBadRecord::Error,
        exif: false,
    };
    let mut loader = Loader::new(Arc::new(data), spec, vec![slot(), slot(), slot()]);
    let mut after = |batches: usize| {
        for _ in 0..batches {
            let slot = loader.next().unwrap().unwrap();
            loader.recycle(slot);
        }
        anonymous()
    };
    let (Some(early), Some(late)) = (after(50), after(950)) else {
        println!("skipped: no /proc/self/status");
        return;
    };
    println!("{early} KiB after 50 batches, {late} KiB after 1,000");
    // A leak of one pixel row a sample would be ten times this.
    assert!(late < early + 1024, "{early} KiB after 50 batches, {late} KiB after 1,000");
}
