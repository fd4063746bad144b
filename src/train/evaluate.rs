//! Evaluation: every image of a data set exactly once, without masks. Gives loss, top-1 and top-5; for
//! multi-label data also mAP.

use std::time::Instant;

use crate::backend::{Backend, Loss, Mat, Micro, Slot, sample_metric};
use crate::data::Loader;
use crate::error::Result;
use crate::report::Scores;
use crate::vit::Vit;

use crate::infer::pass::{forward_all, forward_all_of};
use crate::infer::score::average_precision;

use super::report::Seen;

/// The result of an evaluation; means over `count` images.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct EvalReport {
    /// Number of images.
    pub count: usize,
    /// Mean loss, without smoothing and class weights.
    pub loss: f64,
    /// Share of images whose best class is a true one, in [0, 1].
    pub top1: f64,
    /// Share of images with a true class among the best five, in [0, 1].
    pub top5: f64,
    /// Mean over classes of the average precision, for multi-label data.
    pub map: Option<f64>,
    /// Images per second, with loading.
    pub img_per_s: f64,
}

impl EvalReport {
    pub(super) const VALUES: usize = 6;

    /// As reports show them.
    pub(super) fn scores(&self) -> Scores {
        Scores { loss: self.loss, top1: self.top1, top5: self.top5, map: self.map, images: self.count as u64 }
    }

    /// For other ranks. NaN stands for no mean average precision.
    pub(super) fn to_values(self) -> [f64; Self::VALUES] {
        let map = self.map.unwrap_or(f64::NAN);
        [self.count as f64, self.loss, self.top1, self.top5, map, self.img_per_s]
    }

    /// The inverse of [`EvalReport::to_values`].
    pub(super) fn from_values([count, loss, top1, top5, map, img_per_s]: [f64; Self::VALUES]) -> Self {
        let map = (!map.is_nan()).then_some(map);
        Self { count: count as usize, loss, top1, top5, map, img_per_s }
    }
}

/// Evaluates all batches of the loader. Its slots hold at most the model's micro-batch.
pub fn evaluate(b: &mut dyn Backend, model: &Vit, loader: &mut Loader, loss: Loss) -> Result<EvalReport> {
    evaluate_and_see(b, model, loader, loss, None)
}

/// The same, and adds every picture to `seen`, if it is given: the loader's slots then hold one label per picture.
pub fn evaluate_and_see(
    b: &mut dyn Backend,
    model: &Vit,
    loader: &mut Loader,
    loss: Loss,
    mut seen: Option<&mut Seen>,
) -> Result<EvalReport> {
    let start = Instant::now();
    let mut report = EvalReport::default();
    let micro = Micro::whole(model.micro_batch);
    let body = |b: &mut dyn Backend| {
        b.begin_micro(micro)?;
        model.forward(b, false)?;
        model.loss(b, loss)
    };
    let (metrics, logits) = (model.sample_metrics(), model.logits());
    let both: [Mat; 2] = [metrics, logits];
    let labelled = seen.is_some();
    forward_all_of(
        b,
        loader,
        usize::MAX,
        &body,
        if labelled { &both } else { &both[..1] },
        |slot| {
            let labels = if labelled { slot.labels()[..slot.count].to_vec() } else { Vec::new() };
            (slot.count, slot.position, labels)
        },
        |(count, position, labels), values| {
            if let Some(seen) = seen.as_deref_mut() {
                seen.add(position, &labels, &values[1][..count * logits.cols]);
            }
            for sample in values[0].chunks_exact(3).take(count) {
                report.loss += f64::from(sample[sample_metric::LOSS]);
                report.top1 += f64::from(sample[sample_metric::TOP1]);
                report.top5 += f64::from(sample[sample_metric::TOP5]);
            }
            report.count += count;
        },
    )?;
    let n = report.count.max(1) as f64;
    report.loss /= n;
    report.top1 /= n;
    report.top5 /= n;
    report.img_per_s = report.count as f64 / start.elapsed().as_secs_f64().max(1e-9);
    Ok(report)
}

/// The average precision of each class's logits, averaged over the classes that occur. Reads all batches of
/// the loader; its slots hold dense targets.
pub fn mean_average_precision(b: &mut dyn Backend, model: &Vit, loader: &mut Loader) -> Result<f64> {
    let (micro, rows) = (Micro::whole(model.micro_batch), model.logits());
    let classes = rows.cols;
    let mut answers = vec![Vec::new(); classes];
    let body = |b: &mut dyn Backend| {
        b.begin_micro(micro)?;
        model.forward(b, false)
    };
    let truth = |slot: &Slot| slot.targets()[..slot.count * classes].to_vec();
    forward_all(b, loader, usize::MAX, &body, rows, truth, |truth, logits| {
        for (truth, logits) in truth.chunks_exact(classes).zip(logits.chunks_exact(classes)) {
            for (class, answers) in answers.iter_mut().enumerate() {
                answers.push((logits[class], truth[class] > 0.5));
            }
        }
    })?;
    let precisions: Vec<f64> = answers.into_iter().filter_map(average_precision).collect();
    Ok(precisions.iter().sum::<f64>() / precisions.len().max(1) as f64)
}
