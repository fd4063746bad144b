//! One pass of a data set through a loaded model: every picture once, its outputs handed on row by row.
//!
//! What `eval`, `features` and `probe` have in common. A row comes with the number of its record, so that pictures that
//! cannot be decoded, and are left out, shift nothing.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Backend, Mat, Micro, Slot, StepKeys};
use crate::data::{self, Dataset, Loader, LoaderSpec};
use crate::error::{Error, Result};
use crate::recipe::{EvalResize, OnBadRecord, PROTOCOLS};

use super::loaded::LoadedModel;

/// Which rows of the model are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// `[C]`
    Logits,
    /// What the head reads: `[D]`, or `[R]` behind a representation layer.
    Features,
}

/// How pictures are prepared, and which are taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Protocol {
    pub resize: EvalResize,
    pub crop_ratio: f32,
    /// The name that it was asked for by: some systems agree, and share their settings.
    pub asked: Option<&'static str>,
    /// Leave out a last batch that is not full, as google-research/vision_transformer does.
    pub drop_last: bool,
}

impl Protocol {
    /// The protocol of that name; an unknown name is wrong usage.
    pub fn named(name: &str) -> Result<Self> {
        let found = PROTOCOLS.into_iter().find(|(known, ..)| *known == name);
        let (asked, resize, crop_ratio) = found.ok_or_else(|| {
            let known = PROTOCOLS.map(|(name, ..)| format!("`{name}`")).join(", ");
            Error::usage(format!("there is no protocol `{name}`"))
                .hint(format!("use one of {known}; `vitrum eval` takes `all` as well"))
        })?;
        Ok(Self { resize, crop_ratio, asked: Some(asked), drop_last: false })
    }

    /// Its name, where it has one.
    pub fn name(&self) -> Option<&'static str> {
        let same = |(_, resize, ratio): &(&str, EvalResize, f32)| {
            *resize == self.resize && (*ratio - self.crop_ratio).abs() < 1e-6
        };
        self.asked.or_else(|| PROTOCOLS.into_iter().find(same).map(|(name, ..)| name))
    }
}

/// How a pass went.
#[derive(Clone, Copy, Debug)]
pub struct PassReport {
    /// Pictures that were seen.
    pub images: usize,
    pub img_per_s: f64,
}

impl LoadedModel {
    /// The protocol that the file's own metadata names, or its layout. An error where the file names one that is not
    /// built.
    pub fn protocol(&self) -> Result<Protocol> {
        match &self.unprepared {
            Some(why) => Err(Error::new(format!("pictures cannot be prepared as the file wants: {why}"))
                .hint("choose another way to prepare them, as with `--protocol timm`")),
            None => Ok(Protocol {
                resize: self.meta.resize,
                crop_ratio: self.meta.crop_ratio,
                asked: None,
                drop_last: false,
            }),
        }
    }

    /// Values in a row of `output`.
    pub fn row_len(&self, output: Output) -> usize {
        match output {
            Output::Logits => self.model.config.classes,
            Output::Features => self.model.features().cols,
        }
    }

    /// Hands the row of every picture of `data` to `see`, with the picture's number in the data set.
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
        // No operation of a forward pass reads labels: they carry the record's number.
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
            },
        )?;
        Ok(PassReport { images, img_per_s: images as f64 / start.elapsed().as_secs_f64().max(1e-9) })
    }
}

/// Runs the loader dry: `body` on every batch, and what it left in `rows` handed to `see`, with what `note` took down of the batch.
/// Batches behind the first `batches` are left out.
///
/// A GPU waits little: the next batch is on its way up while it computes, and the next pass is asked for as soon as the rows of the
/// one before have come down, before the host looks at them.
pub(crate) fn forward_all<T>(
    b: &mut dyn Backend,
    loader: &mut Loader,
    batches: usize,
    body: &dyn Fn(&mut dyn Backend) -> Result<()>,
    rows: Mat,
    note: impl Fn(&Slot) -> T,
    mut see: impl FnMut(T, &[f32]),
) -> Result<()> {
    let mut values = vec![0.0; rows.rows * rows.cols];
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
            b.read(rows, &mut values)?;
        }
        if next.is_some() {
            b.step(&mut |b| body(b), None)?;
        }
        asked = next;
        match done {
            Some(noted) => see(noted, &values),
            None if asked.is_none() => break,
            None => {}
        }
    }
    b.unbind_batch().into_iter().for_each(|free| loader.recycle(free));
    Ok(())
}
