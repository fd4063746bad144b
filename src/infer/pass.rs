//! One pass of a data set through a loaded model: every picture once, with one output row for each.
//!
//! Shared by `eval`, `features` and `probe`. Each row comes with its record's number, so that skipped
//! pictures, which cannot be decoded, do not shift the others.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Backend, Mat, Micro, Slot, StepKeys};
use crate::data::{self, Dataset, Loader, LoaderSpec};
use crate::error::{Error, Result};
use crate::recipe::OnBadRecord;
use crate::signals;

use super::loaded::LoadedModel;
use super::protocol::Protocol;

/// Which output of the model to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// `[C]`
    Logits,
    /// The head's input: `[D]`, or `[R]` with a representation layer.
    Features,
}

/// The result of a pass.
#[derive(Clone, Copy, Debug)]
pub struct PassReport {
    /// Pictures that were processed.
    pub images: usize,
    /// Pictures per second, with loading.
    pub img_per_s: f64,
}

impl LoadedModel {
    /// Number of values in a row of `output`.
    pub fn row_len(&self, output: Output) -> usize {
        match output {
            Output::Logits => self.model.config.classes,
            Output::Features => self.model.features().cols,
        }
    }

    /// Calls `see` with the row of every picture of `data` and the picture's number in the data set.
    pub fn pass(
        &mut self,
        data: &Dataset,
        protocol: Protocol,
        output: Output,
        mut see: impl FnMut(usize, &[f32]),
    ) -> Result<PassReport> {
        let start = Instant::now();
        let batch = self.model.micro_batch;
        let spec = LoaderSpec {
            batch,
            image: self.model.config.image,
            mode: data::Mode::Eval { resize: protocol.resize, crop_ratio: protocol.crop_ratio },
            start_batch: 0,
            workers: 0,
            on_bad_record: OnBadRecord::Skip,
            exif: self.meta.exif,
        };
        let slots = (0..2).map(|_| self.backend.new_slot(self.slot_layout())).collect::<Result<_>>()?;
        // No operation of a forward pass reads labels, so they carry the record's number.
        let mut loader = Loader::new(Arc::new(data.clone().numbered()), spec, slots);
        let model = &self.model;
        let rows = match output {
            Output::Logits => model.logits(),
            Output::Features => model.features(),
        };
        let mut images = 0;
        let body = |b: &mut dyn Backend| {
            b.begin_micro(Micro::whole(batch))?;
            model.forward(b, false)
        };
        let records = |slot: &Slot| slot.labels()[..slot.count].to_vec();
        forward_all(
            &mut *self.backend,
            &mut loader,
            if protocol.drop_last { data.len() / batch } else { usize::MAX },
            &body,
            rows,
            records,
            |records, values| {
                for (record, row) in records.iter().zip(values.chunks_exact(rows.cols)) {
                    see(*record as usize, row);
                }
                images += records.len();
                // Where nobody listens to signals, one ends the process by itself.
                signals::pending().map_or(Ok(()), |signal| Err(stopped(signal)))
            },
        )?;
        Ok(PassReport { images, img_per_s: images as f64 / start.elapsed().as_secs_f64().max(1e-9) })
    }
}

/// The error of a pass that a signal ends.
pub(crate) fn stopped(signal: i32) -> Error {
    Error::stopped(signal, "stopped during an evaluation")
}

/// Runs `body` on every batch of the loader. After each, calls `see` with the values of `rows` and with what
/// `note` returned for the batch; an error of `see` ends the pass. Skips batches after the first `batches`.
///
/// A GPU waits little: the next batch is uploaded while it computes, and the next pass is submitted as soon
/// as the previous rows are downloaded, before the host processes them.
pub(crate) fn forward_all<T>(
    b: &mut dyn Backend,
    loader: &mut Loader,
    batches: usize,
    body: &dyn Fn(&mut dyn Backend) -> Result<()>,
    rows: Mat,
    note: impl Fn(&Slot) -> T,
    mut see: impl FnMut(T, &[f32]) -> Result<()>,
) -> Result<()> {
    forward_all_of(b, loader, batches, body, &[rows], note, |noted, values| see(noted, &values[0]))
}

/// The same with the values of several matrices.
pub(crate) fn forward_all_of<T>(
    b: &mut dyn Backend,
    loader: &mut Loader,
    batches: usize,
    body: &dyn Fn(&mut dyn Backend) -> Result<()>,
    rows: &[Mat],
    note: impl Fn(&Slot) -> T,
    mut see: impl FnMut(T, &[Vec<f32>]) -> Result<()>,
) -> Result<()> {
    let mut values: Vec<Vec<f32>> = rows.iter().map(|rows| vec![0.0; rows.rows * rows.cols]).collect();
    let (mut asked, mut bound): (Option<T>, usize) = (None, 0);
    b.begin_step(StepKeys { seed: 0, step: 0 })?;
    loop {
        let next = match loader.next()? {
            Some(slot) if bound == batches => {
                loader.recycle(slot);
                continue;
            }
            Some(slot) => {
                let noted = note(&slot);
                bound += 1;
                b.bind_batch(slot)?.into_iter().for_each(|free| loader.recycle(free));
                Some(noted)
            }
            None => None,
        };
        let done = asked.take();
        if done.is_some() {
            for (rows, values) in rows.iter().zip(&mut values) {
                b.read(*rows, values)?;
            }
        }
        if next.is_some() {
            b.step(&mut |b| body(b), None)?;
        }
        asked = next;
        match done {
            Some(noted) => see(noted, &values)?,
            None if asked.is_none() => break,
            None => {}
        }
    }
    b.unbind_batch().into_iter().for_each(|free| loader.recycle(free));
    Ok(())
}
