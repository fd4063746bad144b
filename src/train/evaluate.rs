//! Evaluation: every image of a data set exactly once, without masks. Gives loss, top-1 and top-5; for
//! multi-label data also mAP.
//!
//! Ranks share the work by batches: of R ranks, rank r has batches r, R + r, 2·R + r, ... The ranks exchange
//! the rows of each of their batches, and all add them in the order of the samples. So neither a batch nor a
//! sum depends on the number of ranks.

use std::time::Instant;

use crate::backend::{Backend, Loss, Mat, Micro, Slot, sample_metric};
use crate::data::Loader;
use crate::dist::Collective;
use crate::error::{Error, Kind, Result};
use crate::report::Scores;
use crate::signals;
use crate::vit::Vit;

use crate::infer::pass::{forward_all, forward_all_of, stopped};
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
    /// As reports show them.
    pub(super) fn scores(&self) -> Scores {
        Scores { loss: self.loss, top1: self.top1, top5: self.top5, map: self.map, images: self.count as u64 }
    }
}

/// The batches of all ranks. Its buffers stop growing after the first batch.
struct Shared<'a> {
    ranks: &'a Collective,
    /// Samples of a batch, and values of a sample's row.
    samples: usize,
    width: usize,
    /// The rows of this rank's batch with zeros after them, their number, and the signal that this rank got,
    /// or 0.
    own: Vec<f32>,
    /// The same of all ranks.
    all: Vec<f32>,
    /// A signal has stopped all ranks.
    stopped: bool,
}

impl<'a> Shared<'a> {
    fn new(ranks: &'a Collective, samples: usize, width: usize) -> Self {
        Self { ranks, samples, width, own: Vec::new(), all: Vec::new(), stopped: false }
    }

    /// Takes the rows of this rank's next batch, and calls `see` with those of each rank's. All ranks call it
    /// equally often.
    ///
    /// # Errors
    /// A signal asked some rank to stop: all ranks get this error after the same batch.
    fn batch(&mut self, rows: &[f32], mut see: impl FnMut(&[f32])) -> Result<()> {
        let Self { ranks, samples, width, own, all, stopped: is_stopped } = self;
        own.clear();
        own.extend_from_slice(rows);
        own.resize(*samples * *width, 0.0);
        own.extend([(rows.len() / *width) as f32, signals::pending().unwrap_or(0) as f32]);
        all.resize(own.len() * ranks.size, 0.0);
        ranks.all_gather(bytemuck::cast_slice(own), bytemuck::cast_slice_mut(all))?;
        let mut last = 0.0f32;
        for of_rank in all.chunks_exact(own.len()) {
            let (rows, [count, signal]) = of_rank.split_last_chunk().expect("a rank sends two more values");
            last = last.max(*signal);
            see(&rows[..*count as usize * *width]);
        }
        *is_stopped = last > 0.0;
        if *is_stopped { Err(stopped(last as i32)) } else { Ok(()) }
    }

    /// Passes the result of a pass on. If a signal ended this rank's reading of the data, the others, which
    /// wait for its next batch, are told.
    fn end(&mut self, result: Result<()>) -> Result<()> {
        let is_signal = |e: &Error| matches!(e.kind(), Kind::Stopped(_));
        if result.as_ref().is_err_and(is_signal) && !self.stopped {
            match self.batch(&[], |_| {}) {
                Err(e) if !is_signal(&e) => return Err(e),
                _ => {}
            }
        }
        result
    }
}

/// Evaluates all batches of the ranks' loaders, which hold at most the model's micro-batch. Every rank gets
/// the same report, except for its speed. Adds every picture to `seen`, if it is given, as it must be on all
/// ranks or on none: the loader's slots then hold one label per picture.
///
/// # Errors
/// A batch cannot be read or computed; a signal asked some rank to stop, and all stop.
pub fn evaluate(
    b: &mut dyn Backend,
    model: &Vit,
    loader: &mut Loader,
    loss: Loss,
    ranks: &Collective,
    mut seen: Option<&mut Seen>,
) -> Result<EvalReport> {
    let start = Instant::now();
    let mut report = EvalReport::default();
    let (micro, samples) = (Micro::whole(model.micro_batch), model.sample_metrics());
    let body = |b: &mut dyn Backend| {
        b.begin_micro(micro)?;
        model.forward(b, false)?;
        model.loss(b, loss)
    };
    // A row that ranks exchange: the metrics of a sample, and where pictures are looked at its logits and label.
    let (logits, labelled) = (model.logits(), seen.is_some());
    let both: [Mat; 2] = [samples, logits];
    let width = if labelled { samples.cols + logits.cols + 1 } else { samples.cols };
    let mut shared = Shared::new(ranks, samples.rows, width);
    let (mut own, mut batch): (Vec<f32>, u64) = (Vec::new(), 0);
    let passed = forward_all_of(
        b,
        loader,
        usize::MAX,
        &body,
        if labelled { &both } else { &both[..1] },
        |slot| (slot.count, if labelled { slot.labels()[..slot.count].to_vec() } else { Vec::new() }),
        |(count, labels), values| {
            own.clear();
            for sample in 0..count {
                own.extend_from_slice(&values[0][sample * samples.cols..][..samples.cols]);
                if labelled {
                    own.extend_from_slice(&values[1][sample * logits.cols..][..logits.cols]);
                    own.push(labels[sample] as f32);
                }
            }
            shared.batch(&own, |rows| {
                for row in rows.chunks_exact(width) {
                    report.loss += f64::from(row[sample_metric::LOSS]);
                    report.top1 += f64::from(row[sample_metric::TOP1]);
                    report.top5 += f64::from(row[sample_metric::TOP5]);
                }
                report.count += rows.len() / width;
                if let Some(seen) = seen.as_deref_mut() {
                    let of_samples = rows.chunks_exact(width).map(|row| &row[samples.cols..]);
                    seen.add(batch, of_samples);
                }
                batch += 1;
            })
        },
    );
    shared.end(passed)?;
    let n = report.count.max(1) as f64;
    report.loss /= n;
    report.top1 /= n;
    report.top5 /= n;
    report.img_per_s = report.count as f64 / start.elapsed().as_secs_f64().max(1e-9);
    Ok(report)
}

/// The average precision of each class's logits, averaged over the classes that occur. Reads all batches of
/// the ranks' loaders, whose slots hold dense targets. The first rank computes it, and all get it.
///
/// # Errors
/// Those of [`evaluate`].
pub fn mean_average_precision(
    b: &mut dyn Backend,
    model: &Vit,
    loader: &mut Loader,
    ranks: &Collective,
) -> Result<f64> {
    let (micro, rows) = (Micro::whole(model.micro_batch), model.logits());
    let classes = rows.cols;
    let mut answers = vec![Vec::new(); classes];
    let body = |b: &mut dyn Backend| {
        b.begin_micro(micro)?;
        model.forward(b, false)
    };
    let truth = |slot: &Slot| slot.targets()[..slot.count * classes].to_vec();
    let mut shared = Shared::new(ranks, rows.rows, 2 * classes);
    let mut own = Vec::new();
    let passed = forward_all(b, loader, usize::MAX, &body, rows, truth, |truth, logits| {
        own.clear();
        for (truth, logits) in truth.chunks_exact(classes).zip(logits.chunks_exact(classes)) {
            own.extend_from_slice(logits);
            own.extend_from_slice(truth);
        }
        shared.batch(&own, |rows| {
            for row in rows.chunks_exact(2 * classes).filter(|_| ranks.is_first()) {
                let (logits, truth) = row.split_at(classes);
                for (class, answers) in answers.iter_mut().enumerate() {
                    answers.push((logits[class], truth[class] > 0.5));
                }
            }
        })
    });
    shared.end(passed)?;
    let precisions: Vec<f64> = answers.into_iter().filter_map(average_precision).collect();
    let mean = precisions.iter().sum::<f64>() / precisions.len().max(1) as f64;
    let mut bytes = mean.to_le_bytes().to_vec();
    ranks.broadcast(&mut bytes)?;
    Ok(f64::from_le_bytes(bytes.try_into().expect("the first rank sends one number")))
}
