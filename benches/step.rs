//! A whole training step on the CPU (forward, backward, clip, AdamW) at the sizes of the PyTorch comparison.
//!
//! `cargo bench -p vitrum-benches --bench step`; throughput is in floating-point operations of the matrix products (3 x forward).

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vitrum::backend::cpu::CpuBackend;
use vitrum::backend::{Backend, Pixels, Slot, SlotLayout, TargetKind};
use vitrum::dist::Collective;
use vitrum::recipe::Recipe;
use vitrum::rng::{Domain, Stream};
use vitrum::train::{DataShape, Setup, Trainer};

/// Name, variant, image, classes, batch.
const CASES: [(&str, &str, usize, usize, usize); 4] = [
    ("demo", "demo", 32, 10, 128),
    ("ti4_32", "Ti/4", 32, 10, 64),
    ("ti16_224", "Ti/16", 224, 1000, 16),
    ("s16_224", "S/16", 224, 1000, 8),
];

fn trainer(variant: &str, image: usize, classes: usize, batch: usize) -> Trainer {
    let mut set = vec![format!("train.batch={batch}"), "train.steps=1000000".into()];
    let recipe = if variant == "demo" {
        set.push(format!("model.classes={classes}"));
        Recipe::load(Some("demo"), &set).unwrap()
    } else {
        set.extend([
            format!("model.variant={variant}"),
            format!("model.image={image}"),
            format!("model.classes={classes}"),
            "loss.label_smoothing=0.1".into(),
            "optim.weight_decay=0.05".into(),
        ]);
        Recipe::default().with(&set).unwrap()
    };
    let backend: Box<dyn Backend> = Box::new(CpuBackend::new(0).unwrap());
    let setup = Setup::on(backend, &recipe, DataShape::labels(batch)).unwrap();
    Trainer::new(setup, Collective::ALONE, None).unwrap()
}

fn batch_of(trainer: &Trainer) -> Slot {
    let config = &trainer.model.config;
    let layout = SlotLayout {
        samples: trainer.batch,
        image: config.image,
        pixels: Pixels::U8,
        targets: TargetKind::Labels,
    };
    let mut slot = trainer.backend.new_slot(layout).unwrap();
    let mut draws = Stream::new(0, Domain::Demo, u64::MAX, 0);
    slot.images_u8_mut().iter_mut().for_each(|p| *p = draws.next_u32() as u8);
    slot.labels_mut().iter_mut().for_each(|l| *l = draws.below(config.classes) as i32);
    slot
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    for (name, variant, image, classes, batch) in CASES {
        let mut trainer = trainer(variant, image, classes, batch);
        group.throughput(Throughput::Elements(batch as u64 * trainer.model.config.train_flops()));
        let mut slot = Some(batch_of(&trainer));
        group.bench_function(name, |b| {
            b.iter(|| {
                trainer.step(slot.take().expect("the slot came back")).unwrap();
                slot = trainer.backend.unbind_batch();
            });
        });
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
