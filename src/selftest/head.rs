//! Pooling, scaling, losses, and reports of a step.

use half::bf16;

use crate::backend::{
    Backend, Loss, LossKind, Micro, Pixels, Pool, Rule, Slot, SlotLayout, StepKeys, StepReport, TargetKind,
    Update, Write,
};
use crate::error::Result;

use super::harness::{Case, ELEMENTWISE, Trial, sum_of};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let pools = [
        (3, 60, Pool::Token { tokens: 5, index: 0 }),
        (5, 192, Pool::Token { tokens: 65, index: 1 }),
        (5, 60, Pool::Token { tokens: 1, index: 0 }),
        (3, 60, Pool::Mean { tokens: 5, first: 0 }),
        (1, 192, Pool::Mean { tokens: 197, first: 1 }),
        // Enough values to tell how they were rounded.
        (9, 192, Pool::Mean { tokens: 65, first: 1 }),
        (5, 64, Pool::Mean { tokens: 257, first: 2 }),
        (7, 5, Pool::Mean { tokens: 1, first: 0 }),
    ];
    for (samples, width, p) in pools {
        let title = format!("B {samples} D {width}, {p:?}");
        cases.push(Case::new("pool", title, move |t| pool(t, samples, width, p)));
    }
    for (samples, width, p) in pools {
        for fresh in [true, false] {
            let title = format!("B {samples} D {width}, {p:?}{}", if fresh { ", fresh" } else { "" });
            cases
                .push(Case::new("pool_backward", title, move |t| pool_backward(t, samples, width, p, fresh)));
        }
    }
    for (rows, cols, gap) in [(1, 7, false), (65, 60, true), (257, 10, false)] {
        let title = format!("[{rows}, {cols}]{}", if gap { ", gaps between rows" } else { "" });
        cases.push(Case::new("scale", title, move |t| scale(t, rows, cols, gap)));
    }
    for objective in objectives() {
        cases.push(Case::new(objective.operation(), objective.title(), move |t| loss(t, objective)));
    }
    cases.push(Case::new(
        "report",
        "two micro-batches, one padded, read as late as the device likes",
        report,
    ));
    cases.push(Case::new("report", "more samples and gradients than a block takes at once", report_of_many));
    cases
}

// Pooling --------------------------------------------------------------------------------------------------------

/// T, and the pooled rows of a sample.
fn pooled(pool: Pool) -> (usize, std::ops::Range<usize>) {
    match pool {
        Pool::Token { tokens, index } => (tokens, index..index + 1),
        Pool::Mean { tokens, first } => (tokens, first..tokens),
    }
}

fn pool(t: &mut Trial, samples: usize, width: usize, pool: Pool) -> Result<()> {
    let (tokens, rows) = pooled(pool);
    t.samples(samples, false);
    let x = t.input(samples * tokens, width, 1.0);
    let y = t.output(samples, width);
    let mut expected = vec![0.0; samples * width];
    for (i, y) in expected.iter_mut().enumerate() {
        let (sample, c) = (i / width, i % width);
        *y = rows.clone().map(|row| x.row(sample * tokens + row)[c]).sum::<f64>() / rows.len() as f64;
    }
    t.start()?.pool(pool, x.mat, y.mat)?;
    t.compare("y", &y, &expected, sum_of(rows.len()))
}

fn pool_backward(t: &mut Trial, samples: usize, width: usize, pool: Pool, fresh: bool) -> Result<()> {
    let (tokens, rows) = pooled(pool);
    t.samples(samples, false);
    let d_y = t.input(samples, width, 1.0);
    let size = samples * tokens;
    let d_x = if fresh { t.output(size, width) } else { t.input(size, width, 1.0) };
    let expected: Vec<f64> = (0..size * width)
        .map(|i| {
            let (sample, token, c) = (i / width / tokens, i / width % tokens, i % width);
            let before = if fresh { 0.0 } else { d_x.values[i] };
            let share = if rows.contains(&token) { 1.0 / rows.len() as f64 } else { 0.0 };
            before + share * d_y.row(sample)[c]
        })
        .collect();
    t.start()?.pool_backward(pool, d_y.mat, d_x.mat, Write::add_if(!fresh))?;
    t.compare("d_x", &d_x, &expected, ELEMENTWISE)
}

fn scale(t: &mut Trial, rows: usize, cols: usize, gap: bool) -> Result<()> {
    let x = t.input_with_gap(rows, cols, 1.0, gap);
    let expected: Vec<f64> = x.values.iter().map(|x| 0.3f32 as f64 * x).collect();
    t.start()?.scale(x.mat, 0.3)?;
    t.compare("x", &x, &expected, ELEMENTWISE)
}

// Losses ---------------------------------------------------------------------------------------------------------

/// One setting of [`loss`](crate::backend::Backend::loss).
#[derive(Clone, Copy)]
struct Objective {
    kind: LossKind,
    classes: usize,
    targets: Targets,
    smoothing: f32,
    mixed: bool,
    /// Classes have weights.
    weighted: bool,
    /// The gradient overwrites the logits.
    in_place: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Targets {
    Labels,
    /// Any number of classes per sample, including none.
    MultiHot,
    /// A distribution.
    Soft,
}

fn objectives() -> Vec<Objective> {
    let mut objectives = Vec::new();
    let mut i = 0;
    for kind in [LossKind::Softmax, LossKind::Sigmoid] {
        for classes in [1, 3, 7, 10, 1001] {
            for targets in [Targets::Labels, Targets::MultiHot, Targets::Soft] {
                for smoothing in [0.0, 0.125] {
                    for mixed in [false, true] {
                        i += 1;
                        let in_place = i % 3 == 0;
                        objectives.push(Objective {
                            kind,
                            classes,
                            targets,
                            smoothing,
                            mixed,
                            weighted: false,
                            in_place,
                        });
                    }
                }
            }
        }
    }
    // More classes than the threads of a block handle at once.
    for kind in [LossKind::Softmax, LossKind::Sigmoid] {
        for (classes, targets, in_place) in [(2051, Targets::Soft, true), (5003, Targets::Labels, false)] {
            let (smoothing, mixed, weighted) = (0.125, true, false);
            objectives.push(Objective { kind, classes, targets, smoothing, mixed, weighted, in_place });
        }
    }
    for kind in [LossKind::Softmax, LossKind::Sigmoid] {
        for classes in [1, 3, 10, 1001, 5003] {
            for (i, targets) in [Targets::Labels, Targets::MultiHot, Targets::Soft].into_iter().enumerate() {
                for (smoothing, mixed) in [(0.0, i == 1), (0.125, i != 1)] {
                    let in_place = (i + classes) % 2 == 0;
                    objectives.push(Objective {
                        kind,
                        classes,
                        targets,
                        smoothing,
                        mixed,
                        weighted: true,
                        in_place,
                    });
                }
            }
        }
    }
    // Softmax over a single class has no choice to make.
    objectives.retain(|o| o.classes > 1 || o.kind == LossKind::Sigmoid);
    objectives
}

impl Objective {
    fn operation(&self) -> &'static str {
        match self.kind {
            LossKind::Softmax => "loss softmax",
            LossKind::Sigmoid => "loss sigmoid",
        }
    }

    fn title(&self) -> String {
        let targets = match self.targets {
            Targets::Labels => "labels",
            Targets::MultiHot => "multi-hot targets",
            Targets::Soft => "soft targets",
        };
        let smoothing = if self.smoothing > 0.0 { ", smoothing" } else { "" };
        let mixed = if self.mixed { ", mixed" } else { "" };
        let weighted = if self.weighted { ", class weights" } else { "" };
        let in_place = if self.in_place { ", in place" } else { "" };
        format!("{} classes, {targets}{smoothing}{mixed}{weighted}{in_place}", self.classes)
    }

    fn layout(&self) -> SlotLayout {
        let targets = match self.targets {
            Targets::Labels => TargetKind::Labels,
            _ => TargetKind::Dense { classes: self.classes },
        };
        SlotLayout { samples: SLOT, image: (1, 1), pixels: Pixels::U8, targets }
    }
}

/// Samples of the slot, real ones, and those of the micro-batch, whose last two are padding.
const SLOT: usize = 9;
const COUNT: usize = 7;
const FIRST: usize = 2;
const SAMPLES: usize = 7;

/// Partners stay among the real samples; the third sample is not mixed.
const PARTNER: [u32; SLOT] = [6, 5, 4, 3, 2, 1, 0, 7, 8];
const LAMBDA: [f32; SLOT] = [0.75, 0.5, 0.3125, 1.0, 0.875, 0.59375, 0.125, 1.0, 1.0];

fn loss(t: &mut Trial, o: Objective) -> Result<()> {
    let classes = o.classes;
    let mean_over = 11;
    t.micro(Micro { first: FIRST, samples: SAMPLES, global_first: 20, gradients: Write::Assign, mean_over });

    let mut logits = t.normal(SAMPLES * classes, 3.0);
    // The first row's logits would overflow; the second's are nearly equal.
    logits[..classes].iter_mut().for_each(|z| *z = bf16::from_f64(60.0 * *z).to_f64());
    logits[classes..2 * classes].iter_mut().for_each(|z| *z = bf16::from_f64(5.0 + 0.01 * *z).to_f64());
    let logits = t.given(SAMPLES, classes, logits);
    let separate = t.output(SAMPLES, classes);
    let d_logits = if o.in_place { logits.clone() } else { separate };
    let samples = t.statistics_output(SAMPLES, 3);

    // Each sample's own target.
    let mut stream = t.stream();
    let labels: Vec<i32> = (0..SLOT).map(|_| stream.below(classes) as i32).collect();
    let own: Vec<f32> = (0..SLOT * classes)
        .map(|i| match o.targets {
            Targets::Labels => f32::from(u8::from(labels[i / classes] == (i % classes) as i32)),
            Targets::MultiHot => f32::from(u8::from(stream.chance(0.4) && i / classes != 4)),
            Targets::Soft if classes > 1 => bf16::from_f32(stream.range(0.0, 2.0 / classes as f32)).to_f32(),
            Targets::Soft => 0.75,
        })
        .collect();

    // From a rare class to a common one; 1 for a loss without weights.
    let weights: Vec<f64> = match o.weighted {
        true => (0..classes).map(|_| bf16::from_f32(2f32.powf(stream.range(-4.0, 3.0))).to_f64()).collect(),
        false => vec![1.0; classes],
    };
    let largest = weights.iter().copied().fold(0.0, f64::max);
    let class_weights = o.weighted.then(|| t.statistics(1, classes, weights.clone()).mat);

    let (mut losses, mut gradient) = (vec![0.0; SAMPLES * 3], vec![0.0; SAMPLES * classes]);
    for row in 0..COUNT - FIRST {
        let (sample, partner) = (FIRST + row, PARTNER[FIRST + row] as usize);
        let lambda = if o.mixed { f64::from(LAMBDA[sample]) } else { 1.0 };
        let smoothing = f64::from(o.smoothing);
        let y: Vec<f64> = (0..classes)
            .map(|c| {
                let [own, other] = [sample, partner].map(|s| f64::from(own[s * classes + c]));
                let mixed = lambda * own + (1.0 - lambda) * other;
                (1.0 - smoothing) * mixed + smoothing / classes as f64
            })
            .collect();
        let z = logits.row(row);
        let (loss, d) = match o.kind {
            LossKind::Softmax => softmax(z, &y, &weights),
            LossKind::Sigmoid => sigmoid(z, &y, &weights),
        };
        let mut order: Vec<usize> = (0..classes).collect();
        order.sort_by(|a, b| z[*b].total_cmp(&z[*a]));
        let hit = |top: usize| order.iter().take(top).any(|c| own[sample * classes + c] != 0.0);
        losses[row * 3..][..3].copy_from_slice(&[
            loss,
            f64::from(u8::from(hit(1))),
            f64::from(u8::from(hit(5))),
        ]);
        for (to, d) in gradient[row * classes..][..classes].iter_mut().zip(d) {
            *to = d / mean_over as f64;
        }
    }

    let backend = t.start()?;
    let mut slot = backend.new_slot(o.layout())?;
    match o.targets {
        Targets::Labels => slot.labels_mut().copy_from_slice(&labels),
        _ => slot.targets_mut().copy_from_slice(&own),
    }
    if o.mixed {
        slot.partner_mut().copy_from_slice(&PARTNER);
        slot.lambda_mut().copy_from_slice(&LAMBDA);
    }
    spoil_padding(&mut slot, o.targets);
    backend.bind_batch(slot)?;
    let loss = Loss { kind: o.kind, label_smoothing: o.smoothing, class_weights };
    backend.loss(loss, logits.mat, d_logits.mat, samples.mat)?;

    let got = t.take(&samples)?;
    let column = |values: &[f64], c: usize| values.iter().skip(c).step_by(3).copied().collect::<Vec<_>>();
    // A loss near zero is a difference of logits: its error has the size of the logits' rounding.
    t.judge("loss", &column(&got, 0), &column(&losses, 0), 1, sum_of(classes));
    t.judge("top-1", &column(&got, 1), &column(&losses, 1), 1, 0.0);
    t.judge("top-5", &column(&got, 2), &column(&losses, 2), 1, 0.0);
    // A probability near 1 minus a target of 1 keeps the rounding of both, and so do multiples of it.
    t.compare_rows("d_logits", &d_logits, &gradient, 0.1 * largest / mean_over as f64, 2.0 * ELEMENTWISE)
}

/// Samples past the count contain data of an earlier batch.
fn spoil_padding(slot: &mut Slot, targets: Targets) {
    slot.count = COUNT;
    match targets {
        Targets::Labels => slot.labels_mut()[COUNT..].fill(i32::MAX),
        _ => {
            let classes = slot.targets().len() / SLOT;
            slot.targets_mut()[COUNT * classes..].fill(f32::NAN);
        }
    }
}

/// `-Σ w·y·log_softmax(z)`, and its gradient.
fn softmax(z: &[f64], y: &[f64], w: &[f64]) -> (f64, Vec<f64>) {
    let y: Vec<f64> = y.iter().zip(w).map(|(y, w)| w * y).collect();
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = largest + z.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
    let mass: f64 = y.iter().sum();
    let loss = z.iter().zip(&y).map(|(z, y)| y * (lse - z)).sum();
    (loss, z.iter().zip(&y).map(|(z, y)| mass * (z - lse).exp() - y).collect())
}

/// `-Σ w·y·log σ(z) + (1-y)·log(1-σ(z))`, and its gradient.
fn sigmoid(z: &[f64], y: &[f64], w: &[f64]) -> (f64, Vec<f64>) {
    let softplus = |z: f64| z.max(0.0) + (-z.abs()).exp().ln_1p();
    let chance = |z: f64| 1.0 / (1.0 + (-z).exp());
    let classes = || z.iter().zip(y).zip(w).map(|((z, y), w)| (*z, *y, *w));
    let loss = classes().map(|(z, y, w)| w * y * softplus(-z) + (1.0 - y) * softplus(z)).sum();
    // σ(-z) is 1 - σ(z), without its rounding.
    (loss, classes().map(|(z, y, w)| (1.0 - y) * chance(z) - w * y * chance(-z)).collect())
}

// Reports --------------------------------------------------------------------------------------------------------

fn report(t: &mut Trial) -> Result<()> {
    // Seven real samples in two micro-batches of four; the mean is over the real ones.
    let micro = |first| Micro {
        first,
        samples: 4,
        global_first: 0,
        gradients: Write::add_if(first > 0),
        mean_over: 7,
    };
    t.micro(micro(0));
    let mut rows = Vec::new();
    let mut stream = t.stream();
    for sample in 0..8 {
        let loss = bf16::from_f32(stream.range(0.0, 5.0)).to_f64();
        let row = [loss, f64::from(u8::from(sample % 3 == 0)), f64::from(u8::from(sample % 2 == 0))];
        rows.extend(if sample < 7 { row } else { [0.0; 3] });
    }
    let halves = [t.statistics(4, 3, rows[..12].to_vec()), t.statistics(4, 3, rows[12..].to_vec())];
    let weight = t.param(5, 7, 0.0, 1.0);
    let grad = t.grad(&weight, true);
    let norm = grad.values.iter().map(|g| g * g).sum::<f64>().sqrt();
    let column = |c: usize| rows.iter().skip(c).step_by(3).sum::<f64>() / 7.0;
    let expected = [column(0), column(1), column(2), norm];
    let late = |c: usize| rows[12..].iter().skip(c).step_by(3).sum::<f64>() / 7.0;
    let without_first = [late(0), late(1), late(2), norm];
    let first_half: Vec<f32> = rows[..12].iter().map(|v| *v as f32).collect();

    t.start()?;
    let backend = t.backend();
    // Steps are submitted as far ahead as the device allows; the samples change only when no step is in
    // flight. Without segments nothing is updated.
    let mut got: Vec<StepReport> = Vec::new();
    for step in 0..5 {
        backend.begin_step(StepKeys { seed: 1, step })?;
        let mut body = |backend: &mut dyn Backend| {
            backend.begin_report()?;
            for (i, half) in halves.iter().enumerate() {
                backend.begin_micro(micro(4 * i))?;
                backend.add_to_report(half.mat)?;
            }
            Ok(())
        };
        let update = Update {
            rule: Rule::Lion { beta1: 0.9, beta2: 0.99, bf16: false },
            segments: &[],
            groups: &[],
            t: step + 1,
            clip: None,
            clip_torch: false,
            limits: crate::backend::Limits::NONE,
            ema_decay: None,
        };
        backend.step(&mut body, Some(&update))?;
        while step + 1 - got.len() as u64 > backend.steps_ahead() {
            got.push(backend.report()?);
        }
        if step == 2 {
            while got.len() < 3 {
                got.push(backend.report()?);
            }
            backend.write(halves[0].mat, &[0.0; 12])?;
        }
    }
    while got.len() < 5 {
        got.push(backend.report()?);
    }
    for (step, got) in got.iter().enumerate() {
        let expected = if step < 3 { &expected } else { &without_first };
        let name = format!("report of step {step}");
        t.judge(&name, &[got.loss, got.top1, got.top5, got.grad_norm], expected, 4, ELEMENTWISE);
        t.expect("the update was not skipped", !got.skipped);
    }
    // The harness compares memory that no operation wrote with its initial contents.
    t.backend().write(halves[0].mat, &first_half)
}

/// Work that the threads of a block, and the blocks of a GPU, must process in several rounds.
fn report_of_many(t: &mut Trial) -> Result<()> {
    const SAMPLES: usize = 300;
    t.samples(SAMPLES, true);
    let mean_over = SAMPLES + 3;
    let mut stream = t.stream();
    let rows = (0..SAMPLES).flat_map(|sample| {
        let loss = bf16::from_f32(stream.range(0.0, 5.0)).to_f64();
        [loss, f64::from(u8::from(sample % 3 == 0)), f64::from(u8::from(sample % 2 == 0))]
    });
    let rows: Vec<f64> = rows.collect();
    let samples = t.statistics(SAMPLES, 3, rows.clone());
    // 8 · 148 blocks of 256 threads with four values each take 1.2 million.
    let weight = t.param(1250, 1000, 0.0, 1.0);
    let grad = t.grad(&weight, true);
    let norm = grad.values.iter().map(|g| g * g).sum::<f64>().sqrt();
    let column = |c: usize| rows.iter().skip(c).step_by(3).sum::<f64>() / mean_over as f64;

    let backend = t.start()?;
    backend.begin_report()?;
    backend.add_to_report(samples.mat)?;
    backend.update(&Update {
        rule: Rule::Lion { beta1: 0.9, beta2: 0.99, bf16: false },
        segments: &[],
        groups: &[],
        t: 1,
        clip: None,
        clip_torch: false,
        limits: crate::backend::Limits::NONE,
        ema_decay: None,
    })?;
    let got = backend.report()?;
    for (name, got, expected) in [
        ("loss", got.loss, column(0)),
        ("top-1", got.top1, column(1)),
        ("top-5", got.top5, column(2)),
        ("norm", got.grad_norm, norm),
    ] {
        t.judge(name, &[got], &[expected], 1, ELEMENTWISE);
    }
    t.expect("the update was not skipped", !got.skipped);
    Ok(())
}
