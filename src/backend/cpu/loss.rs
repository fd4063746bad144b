//! Cross-entropy and sigmoid loss on mixed and smoothed targets, their gradient, and whether the sample was a hit.
//!
//! The target of a sample is `(1-s)·(λ·own + (1-λ)·partner's) + s/C`; it is evaluated class by class and never
//! stored. Exponentials are f32 of differences to the largest logit, sums are f64.

use super::compute::Compute;
use super::view::{Rows, RowsMut};
use crate::backend::sample_metric::{LOSS, TOP1, TOP5};
use crate::backend::{Loss, LossKind, Slot, TargetKind};
use crate::error::{Error, Result};

/// The targets of a batch slot and how they are mixed.
pub(super) struct Targets<'a> {
    kind: Kind<'a>,
    partner: &'a [u32],
    lambda: &'a [f32],
    /// Samples that are real.
    count: usize,
}

#[derive(Clone, Copy)]
enum Kind<'a> {
    Labels(&'a [i32]),
    Dense(Rows<'a>),
}

impl<'a> Targets<'a> {
    /// Fails on a label that is not one of `classes`; -1 is no class at all.
    pub(super) fn new(slot: &'a Slot, classes: usize) -> Result<Self> {
        let layout = slot.layout();
        let kind = match layout.targets {
            TargetKind::Labels => {
                let labels = slot.labels();
                let wrong = labels[..slot.count].iter().find(|l| **l < -1 || **l >= classes as i32);
                if let Some(label) = wrong {
                    return Err(Error::new(format!(
                        "label {label} in a batch for a model of {classes} classes"
                    ))
                    .hint("set `model.classes` to the number of classes of the data"));
                }
                Kind::Labels(labels)
            }
            TargetKind::Dense { classes: given } => {
                assert_eq!(given, classes, "targets and logits differ in classes");
                Kind::Dense(Rows::dense(slot.targets(), layout.samples, classes))
            }
        };
        Ok(Self { kind, partner: slot.partner(), lambda: slot.lambda(), count: slot.count })
    }
}

impl Kind<'_> {
    /// What sample `sample` itself says about class `class`.
    #[inline(always)]
    fn own(&self, sample: usize, class: usize) -> f64 {
        match self {
            Kind::Labels(labels) => f64::from(u8::from(labels[sample] == class as i32)),
            Kind::Dense(targets) => f64::from(targets.row(sample)[class]),
        }
    }
}

/// Losses and hits of samples `first..` of the batch into `samples: [B, 3]`; the gradient, times `scale`, into
/// `d_logits: [B, C]`. `logits: None` means that `d_logits` holds them.
pub(super) fn forward_backward(
    c: &Compute,
    loss: Loss,
    targets: &Targets,
    first: usize,
    scale: f64,
    logits: Option<Rows>,
    d_logits: RowsMut,
    samples: RowsMut,
) {
    let classes = d_logits.cols;
    let keep = 1.0 - f64::from(loss.label_smoothing);
    let floor = f64::from(loss.label_smoothing) / classes as f64;

    let tasks: Vec<_> = d_logits.blocks(1).into_iter().zip(samples.blocks(1)).collect();
    c.for_each_item(tasks, |((row, mut d_logits), (_, mut result))| {
        let (z, result) = (d_logits.row(0), result.row(0));
        let sample = first + row;
        if sample >= targets.count {
            z.fill(0.0);
            result.fill(0.0);
            return;
        }
        if let Some(logits) = logits {
            z.copy_from_slice(logits.row(row));
        }
        let kind = targets.kind;
        (result[TOP1], result[TOP5]) = hits(z, |class| kind.own(sample, class) != 0.0);

        let (lambda, partner) = (f64::from(targets.lambda[sample]), targets.partner[sample] as usize);
        let total = if lambda == 1.0 {
            let target = |class| keep * kind.own(sample, class) + floor;
            in_place(loss.kind, z, target, scale)
        } else {
            let mixed = |class| lambda * kind.own(sample, class) + (1.0 - lambda) * kind.own(partner, class);
            in_place(loss.kind, z, |class| keep * mixed(class) + floor, scale)
        };
        result[LOSS] = total as f32;
    });
}

/// The loss of one sample; logits become their gradient times `scale`.
#[inline(always)]
fn in_place(kind: LossKind, z: &mut [f32], target: impl Fn(usize) -> f64, scale: f64) -> f64 {
    match kind {
        LossKind::Softmax => softmax(z, target, scale),
        LossKind::Sigmoid => sigmoid(z, target, scale),
    }
}

/// `-Σ y·log_softmax(z)`, gradient `Σy·softmax(z) - y`.
#[inline(always)]
fn softmax(z: &mut [f32], target: impl Fn(usize) -> f64, scale: f64) -> f64 {
    let largest = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (mut mass, mut below, mut sum) = (0.0, 0.0, 0.0);
    for (class, z) in z.iter_mut().enumerate() {
        let y = target(class);
        if y != 0.0 {
            mass += y;
            below += y * (f64::from(largest) - f64::from(*z));
        }
        *z = (*z - largest).exp();
        sum += f64::from(*z);
    }
    for (class, z) in z.iter_mut().enumerate() {
        *z = (scale * (f64::from(*z) * (mass / sum) - target(class))) as f32;
    }
    mass * sum.ln() + below
}

/// `Σ softplus(z) - y·z`, gradient `σ(z) - y`.
#[inline(always)]
fn sigmoid(z: &mut [f32], target: impl Fn(usize) -> f64, scale: f64) -> f64 {
    let mut loss = 0.0;
    for (class, z) in z.iter_mut().enumerate() {
        let y = target(class);
        let small = f64::from((-z.abs()).exp());
        loss += f64::from(z.max(0.0)) + small.ln_1p();
        if y != 0.0 {
            loss -= y * f64::from(*z);
        }
        let probability = if *z >= 0.0 { 1.0 / (1.0 + small) } else { small / (1.0 + small) };
        *z = (scale * (probability - y)) as f32;
    }
    loss
}

/// Whether a true class has the largest logit, and one of the five largest; of equal logits the first class counts.
fn hits(z: &[f32], truth: impl Fn(usize) -> bool) -> (f32, f32) {
    let mut best = [(f32::NEG_INFINITY, usize::MAX); 5];
    for (class, z) in z.iter().enumerate() {
        if *z > best[4].0 {
            let place = best.iter().position(|(b, _)| z > b).expect("it beats the fifth");
            best[place..].rotate_right(1);
            best[place] = (*z, class);
        }
    }
    let hit = |(_, class): &(f32, usize)| *class != usize::MAX && truth(*class);
    (f32::from(u8::from(hit(&best[0]))), f32::from(u8::from(best.iter().any(hit))))
}
