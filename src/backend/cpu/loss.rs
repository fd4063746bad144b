//! Softmax cross-entropy and sigmoid loss on mixed and smoothed targets, their gradient, and top-1 and top-5
//! hits.
//!
//! The target of a sample is `(1-s)·(λ·own + (1-λ)·partner's) + s/C`; it is computed class by class and never
//! stored. Exponentials are f32, of differences from the largest logit; sums are f64. Class weights, if any,
//! multiply the target (softmax) or its positive term (sigmoid); without them nothing is multiplied by 1.

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
    /// Real samples.
    count: usize,
    /// One weight per class.
    weights: Option<&'a [f32]>,
}

#[derive(Clone, Copy)]
enum Kind<'a> {
    Labels(&'a [i32]),
    Dense(Rows<'a>),
}

impl<'a> Targets<'a> {
    /// Fails on a label that is not one of `classes`; -1 means no class.
    pub(super) fn new(slot: &'a Slot, classes: usize, weights: Option<&'a [f32]>) -> Result<Self> {
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
        Ok(Self { kind, partner: slot.partner(), lambda: slot.lambda(), count: slot.count, weights })
    }
}

impl Kind<'_> {
    /// The sample's own target for class `class`.
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
    let some = 8;
    let tasks: Vec<_> = d_logits.blocks(some).into_iter().zip(samples.blocks(some)).collect();
    c.for_each_item(tasks, |((start, mut d_logits), (_, mut results))| {
        for r in 0..d_logits.rows {
            let (z, result) = (d_logits.row(r), results.row(r));
            if first + start + r >= targets.count {
                z.fill(0.0);
                result.fill(0.0);
                continue;
            }
            if let Some(logits) = logits {
                z.copy_from_slice(logits.row(start + r));
            }
            one_sample(loss, targets, first + start + r, scale, z, result);
        }
    });
}

/// Turns the logits `z` of a sample into their gradient, and fills in its loss and hits.
fn one_sample(loss: Loss, targets: &Targets, sample: usize, scale: f64, z: &mut [f32], result: &mut [f32]) {
    let Targets { kind, partner, lambda, weights, .. } = *targets;
    (result[TOP1], result[TOP5]) = hits(z, |class| kind.own(sample, class) != 0.0);

    let keep = 1.0 - f64::from(loss.label_smoothing);
    let floor = f64::from(loss.label_smoothing) / z.len() as f64;
    let (lambda, partner) = (f64::from(lambda[sample]), partner[sample] as usize);
    let total = if lambda == 1.0 {
        in_place(loss.kind, z, |class| keep * kind.own(sample, class) + floor, weights, scale)
    } else {
        let mixed = |class| lambda * kind.own(sample, class) + (1.0 - lambda) * kind.own(partner, class);
        in_place(loss.kind, z, |class| keep * mixed(class) + floor, weights, scale)
    };
    result[LOSS] = total as f32;
}

/// The loss of one sample; logits become their gradient times `scale`.
#[inline(always)]
fn in_place(
    kind: LossKind,
    z: &mut [f32],
    target: impl Fn(usize) -> f64,
    weights: Option<&[f32]>,
    scale: f64,
) -> f64 {
    match (kind, weights) {
        (LossKind::Softmax, None) => softmax(z, target, scale),
        (LossKind::Softmax, Some(w)) => softmax(z, |class| f64::from(w[class]) * target(class), scale),
        (LossKind::Sigmoid, None) => sigmoid(z, target, scale),
        (LossKind::Sigmoid, Some(w)) => weighted_sigmoid(z, target, w, scale),
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

/// `-Σ w·y·log σ(z) + (1-y)·log(1-σ(z))`, that is `Σ (1 + (w-1)·y)·softplus(z) - w·y·z`; gradient
/// `(1 + (w-1)·y)·σ(z) - w·y`.
#[inline(always)]
fn weighted_sigmoid(z: &mut [f32], target: impl Fn(usize) -> f64, weights: &[f32], scale: f64) -> f64 {
    let mut loss = 0.0;
    for (class, (z, w)) in z.iter_mut().zip(weights).enumerate() {
        let (y, w) = (target(class), f64::from(*w));
        let (positive, both) = (w * y, 1.0 + (w - 1.0) * y);
        let small = f64::from((-z.abs()).exp());
        loss += both * (f64::from(z.max(0.0)) + small.ln_1p());
        if positive != 0.0 {
            loss -= positive * f64::from(*z);
        }
        let probability = if *z >= 0.0 { 1.0 / (1.0 + small) } else { small / (1.0 + small) };
        *z = (scale * (both * probability - positive)) as f32;
    }
    loss
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

/// Whether a true class has the largest logit, and one of the five largest; of equal logits, the first class
/// wins.
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

#[cfg(test)]
mod tests {
    use crate::backend::cpu::compute::Isa;
    use crate::backend::cpu::testbed::*;
    use crate::backend::{Backend, Loss, LossKind, Mat, Pixels, Slot, SlotLayout, TargetKind};
    use crate::rng::{Domain, Stream};

    fn slot(samples: usize, targets: TargetKind) -> Slot {
        let layout = SlotLayout { samples, image: (1, 1), pixels: Pixels::U8, targets };
        Testbed::new(samples).backend(Isa::Scalar, 1).new_slot(layout).unwrap()
    }

    fn labelled(labels: &[i32]) -> Slot {
        let mut slot = slot(labels.len(), TargetKind::Labels);
        slot.labels_mut().copy_from_slice(labels);
        slot
    }

    fn dense(targets: &[f32], classes: usize) -> Slot {
        let mut slot = slot(targets.len() / classes, TargetKind::Dense { classes });
        slot.targets_mut().copy_from_slice(targets);
        slot
    }

    /// The loss of one sample in f64, written from its definition.
    fn by_definition(kind: LossKind, z: &[f64], y: &[f64], w: &[f64]) -> f64 {
        let classes = z.iter().zip(y).zip(w);
        match kind {
            LossKind::Softmax => {
                let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = largest + z.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
                classes.map(|((z, y), w)| w * y * (lse - z)).sum()
            }
            LossKind::Sigmoid => {
                // -log σ(z) is softplus(-z), and -log(1 - σ(z)) is softplus(z).
                let softplus = |z: f64| z.max(0.0) + (-z.abs()).exp().ln_1p();
                classes.map(|((z, y), w)| w * y * softplus(-z) + (1.0 - y) * softplus(*z)).sum()
            }
        }
    }

    /// Runs the loss in place and with separate logits, and passes (d_logits, samples) to the check.
    fn check(
        b: &mut Testbed,
        logits: &[f32],
        classes: usize,
        loss: Loss,
        slot: impl Fn() -> Slot,
        show: impl Fn(&[f32], &[f32]),
    ) {
        let rows = logits.len() / classes;
        let (z, d) = (b.put(rows, classes, logits), b.room(rows, classes));
        let samples = b.room(rows, 3);
        for out in [d, z] {
            let run = |k: &mut crate::backend::cpu::CpuBackend| {
                k.bind_batch(slot()).unwrap();
                k.loss(loss, z, out, samples).unwrap();
            };
            b.everywhere(&[out, samples], run, |r| show(&r[0], &r[1]));
        }
    }

    #[test]
    fn losses_and_slopes_are_those_of_mixed_and_smoothed_targets() {
        for (samples, classes) in [(1, 2), (5, 7), (3, 1000)] {
            for kind in [LossKind::Softmax, LossKind::Sigmoid] {
                let cases = [(0.0, true), (0.1, true), (0.0, false), (0.2, false)];
                for ((smoothing, labels), weighted) in cases.iter().flat_map(|c| [(*c, false), (*c, true)]) {
                    let logits = normal(1, samples * classes, 3.0);
                    let whole = samples + 2; // the micro-batch starts at sample 2 of the slot
                    let make = || {
                        let mut stream = Stream::new(2, Domain::Demo, 0, 0);
                        let mut slot = if labels {
                            let labels: Vec<i32> = (0..whole).map(|_| stream.below(classes) as i32).collect();
                            labelled(&labels)
                        } else {
                            let targets: Vec<f32> = (0..whole * classes)
                                .map(|_| if stream.chance(0.5) { stream.uniform() } else { 0.0 })
                                .collect();
                            dense(&targets, classes)
                        };
                        for i in 0..whole {
                            slot.partner_mut()[i] = ((i * 3 + 1) % whole) as u32;
                            slot.lambda_mut()[i] = if i % 2 == 0 { 0.7 } else { 1.0 };
                        }
                        slot
                    };
                    let slot = make();
                    let own = |sample: usize, class: usize| {
                        if labels {
                            f64::from(u8::from(slot.labels()[sample] == class as i32))
                        } else {
                            f64::from(slot.targets()[sample * classes + class])
                        }
                    };
                    let target = |sample: usize| -> Vec<f64> {
                        let (lambda, partner) =
                            (f64::from(slot.lambda()[sample]), slot.partner()[sample] as usize);
                        let s = f64::from(smoothing);
                        let mixed = |c| lambda * own(sample, c) + (1.0 - lambda) * own(partner, c);
                        (0..classes).map(|c| (1.0 - s) * mixed(c) + s / classes as f64).collect()
                    };

                    let mut b = Testbed::new(samples);
                    (b.micro.first, b.micro.mean_over) = (2, 9);
                    let weights: Vec<f32> = match weighted {
                        true => (0..classes).map(|c| 0.1 + 0.7 * ((c * 5 + 3) % 7) as f32).collect(),
                        false => vec![1.0; classes],
                    };
                    let class_weights = weighted.then(|| b.put(1, classes, &weights));
                    let loss = Loss { kind, label_smoothing: smoothing, class_weights };
                    check(&mut b, &logits, classes, loss, make, |d_logits, result| {
                        let losses = |z: &[f64]| -> Vec<f64> {
                            let rows = z.chunks(classes).enumerate();
                            rows.map(|(i, z)| by_definition(kind, z, &target(2 + i), &wide(&weights)))
                                .collect()
                        };
                        let got: Vec<f32> = result.chunks(3).map(|r| r[0]).collect();
                        assert_close("loss", &got, &losses(&wide(&logits)), 1e-6);
                        assert_gradient("d_logits", &logits, d_logits, |z| {
                            losses(z).iter().sum::<f64>() / 9.0
                        });
                    });
                }
            }
        }
    }

    /// `F.cross_entropy(weight=)` and `F.binary_cross_entropy_with_logits(pos_weight=)` with
    /// `reduction="none"`, the latter summed over classes, and the gradient of the mean over samples:
    /// PyTorch's formulas, computed in float64. For labels PyTorch's mean divides by the sum of their
    /// weights; ours divides by the number of samples, as PyTorch's does for probabilities.
    #[test]
    fn weighted_losses_are_those_of_pytorch() {
        use LossKind::{Sigmoid, Softmax};
        let logits = [1.5, -0.25, 0.75, -2.0, -1.0, 3.0, 0.5, 0.125];
        let weights = [0.5, 2.0, 1.25, 4.0];
        let soft: &[f32] = &[0.25, 0.5, 0.0, 0.25, 0.0, 0.125, 0.75, 0.125];
        let several: &[f32] = &[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0];
        #[rustfmt::skip]
        let cases = [
            (Softmax, 0.0, None, [1.5832644756956054, 0.29134415054104945], [
                0.37283653110791576, 0.06478927427300708, -0.44888449306463574, 0.011258687683712916,
                0.01583279154713915, -0.1355588716657985, 0.07095764882975444, 0.048768431288905005,
            ]),
            (Softmax, 0.1, None, [1.9859690218588637, 0.7060587000706088], [
                0.3870925403188512, 0.04335268435802248, -0.3923231401831907, -0.03812208449368287,
                0.009533314073554339, -0.06326025019184289, 0.05511090617716147, -0.0013839700588728215,
            ]),
            (Softmax, 0.0, Some(soft), [6.347799608682529, 4.02707162701901], [
                0.5713221028834569, -0.38985823373588796, 0.29939636179011925, -0.48086023093768804,
                0.013358917867898657, 0.6043722020319825, -0.4088794837998947, -0.20885163609998642,
            ]),
            (Sigmoid, 0.0, Some(several), [1.2871628275568174, 6.8663221645407475], [
                -0.04560638095158909, 0.21891174955710097, -0.2005133130153794, 0.05960146101105884,
                0.13447071068499755, 0.4762870634112166, 0.3112296656009273, -0.9375812532524875,
            ]),
            (Sigmoid, 0.0, Some(soft), [5.774140773493276, 4.660087550313667], [
                0.2951888333347191, -0.17163237566434852, 0.3395893495876965, -0.39569744323064704,
                0.13447071068499755, 0.4108229463376187, -0.09916477209889885, 0.11520644419445741,
            ]),
        ];
        for (kind, label_smoothing, targets, losses, gradient) in cases {
            let mut b = Testbed::new(2);
            let class_weights = Some(b.put(1, 4, &weights));
            let make = || targets.map_or_else(|| labelled(&[2, 1]), |targets| dense(targets, 4));
            let loss = Loss { kind, label_smoothing, class_weights };
            check(&mut b, &logits, 4, loss, make, |d_logits, result| {
                assert_close("loss", &[result[0], result[3]], &losses, 1e-6);
                assert_close("d_logits", d_logits, &gradient, 1e-6);
            });
        }
    }

    #[test]
    fn weights_of_one_are_the_loss_without_weights() {
        for kind in [LossKind::Softmax, LossKind::Sigmoid] {
            let logits = normal(4, 5 * 7, 3.0);
            let run = |weights: Option<&[f32]>| {
                let mut b = Testbed::new(5);
                let class_weights = weights.map(|weights| b.put(1, 7, weights));
                let (z, samples) = (b.put(5, 7, &logits), b.room(5, 3));
                let mut backend = b.backend(Isa::Scalar, 1);
                backend.bind_batch(labelled(&[0, 6, 3, 3, -1])).unwrap();
                let loss = Loss { kind, label_smoothing: 0.1, class_weights };
                backend.loss(loss, z, z, samples).unwrap();
                [take(&mut backend, z), take(&mut backend, samples)].concat()
            };
            let plain = run(None);
            assert_eq!(run(Some(&[1.0; 7])), plain);
            assert_ne!(run(Some(&[1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0])), plain);
        }
    }

    #[test]
    fn hits_follow_the_own_label_and_ties_go_to_the_first_class() {
        let logits = [
            [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], // label 0: first
            [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], // label 4: fifth
            [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], // label 5: sixth
            [1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0], // label 2: ties with class 1 and loses
            [1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0], // label 1: ties with class 2 and wins
            [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], // label 5: the sixth of equals
            [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], // no label
            [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], // padding
        ];
        let expected = [(1, 1), (0, 1), (0, 0), (0, 1), (1, 1), (0, 0), (0, 0), (0, 0)];
        let make = || {
            let mut slot = labelled(&[0, 4, 5, 2, 1, 5, -1, 0]);
            slot.count = 7;
            // Mixing must not change what counts as a hit.
            slot.partner_mut().fill(0);
            slot.lambda_mut().fill(0.4);
            slot
        };
        let mut b = Testbed::new(8);
        let loss = Loss::plain(LossKind::Softmax);
        check(&mut b, logits.as_flattened(), 7, loss, make, |d_logits, result| {
            let got: Vec<_> = result.chunks(3).map(|r| (r[1] as i32, r[2] as i32)).collect();
            assert_eq!(got, expected);
            assert!(d_logits[7 * 7..].iter().chain(&result[7 * 3..]).all(|v| *v == 0.0), "padding counts");
        });
    }

    #[test]
    fn several_true_classes_each_count_as_a_hit() {
        let logits = [[1.0, 3.0, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0]];
        let targets = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let mut b = Testbed::new(3);
        let loss = Loss::plain(LossKind::Sigmoid);
        check(
            &mut b,
            logits.as_flattened(),
            4,
            loss,
            || dense(&targets, 4),
            |_, result| {
                let got: Vec<_> = result.chunks(3).map(|r| (r[1] as i32, r[2] as i32)).collect();
                assert_eq!(got, [(1, 1), (0, 1), (0, 0)]);
            },
        );
    }

    #[test]
    fn a_logit_that_is_no_number_makes_a_loss_that_is_none() {
        for kind in [LossKind::Softmax, LossKind::Sigmoid] {
            let mut b = Testbed::new(1);
            let loss = Loss { label_smoothing: 0.1, ..Loss::plain(kind) };
            check(
                &mut b,
                &[1.0, f32::NAN, 0.0],
                3,
                loss,
                || labelled(&[0]),
                |_, result| {
                    assert!(result[0].is_nan());
                },
            );
        }
    }

    #[test]
    fn a_label_outside_the_classes_is_an_error() {
        let mut b = Testbed::new(2);
        let (z, samples): (Mat, Mat) = (b.put(2, 3, &[0.0; 6]), b.room(2, 3));
        let mut backend = b.backend(Isa::Scalar, 1);
        backend.bind_batch(labelled(&[1, 3])).unwrap();
        let loss = Loss::plain(LossKind::Softmax);
        let error = backend.loss(loss, z, z, samples).unwrap_err();
        assert_eq!(error.message(), "label 3 in a batch for a model of 3 classes");
    }

    #[test]
    fn reference_losses_are_met() {
        let Some(file) = Reference::open("kernels/losses.safetensors") else { return };
        for i in (0..).take_while(|i| file.has(&format!("l{i}.logits"))) {
            let get = |name: &str| file.f32(&format!("l{i}.{name}"));
            let shape = file.shape(&format!("l{i}.logits"));
            let (samples, classes) = (shape[0], shape[1]);
            let labels = file.i32(&format!("l{i}.labels"));
            let cases = [
                ("softmax_ce.hard", LossKind::Softmax, 0.0, None),
                ("softmax_ce.smooth0.1", LossKind::Softmax, 0.1, None),
                ("softmax_ce.soft", LossKind::Softmax, 0.0, Some("soft_labels")),
                ("sigmoid_bce.multi", LossKind::Sigmoid, 0.0, Some("multi_labels")),
                ("sigmoid_bce.soft", LossKind::Sigmoid, 0.0, Some("soft_labels")),
            ];
            for (case, kind, label_smoothing, targets) in cases {
                let make = || match targets {
                    None => labelled(&labels),
                    Some(name) => dense(&get(name), classes),
                };
                let mut b = Testbed::new(samples);
                let loss = Loss { label_smoothing, ..Loss::plain(kind) };
                check(&mut b, &get("logits"), classes, loss, make, |d_logits, result| {
                    let expected = |name: &str| file.f64(&format!("l{i}.{case}.{name}"));
                    let got: Vec<f32> = result.chunks(3).map(|r| r[0]).collect();
                    assert_close(&format!("l{i}.{case}.per_example"), &got, &expected("per_example"), 1e-6);
                    assert_close(&format!("l{i}.{case}.dlogits"), d_logits, &expected("dlogits"), 1e-6);
                });
            }
        }
    }
}
