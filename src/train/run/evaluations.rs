//! The evaluations of a run: which weights, on which data, and what becomes of their scores.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Loss, Pixels, SlotLayout, TargetKind};
use crate::data::{self, Dataset, Delivery, Loader, LoaderSpec};
use crate::error::{Kind, Result};
use crate::recipe::{Metric, OnBadRecord};
use crate::report::EvalLine;
use crate::train::Trainer;
use crate::train::checkpoint::Best;
use crate::train::evaluate::{EvalReport, evaluate, mean_average_precision};
use crate::train::report::Seen;

use super::Run;

/// The evaluations of a step.
struct Evaluations {
    /// On a part of the training images.
    part: EvalReport,
    val: Option<EvalReport>,
    /// On the validation images, with the weights' EMA.
    ema: Option<EvalReport>,
}

impl Run {
    /// Evaluates the validation images, some training images without augmentation, and the validation images
    /// with the weights' EMA.
    ///
    /// A signal to any rank ends it at once, on all ranks. The run is saved without it, and begins with it when
    /// it is resumed.
    pub fn evaluate(&mut self, trainer: &mut Trainer, training: &mut Loader) -> Result<()> {
        match self.evaluate_now(trainer, training) {
            Ok(()) => self.state.owes_evaluation = false,
            Err(error) if matches!(error.kind(), Kind::Stopped(_)) && trainer.skipped_in_a_row() == 0 => {
                self.state.owes_evaluation = true;
                let step = trainer.step;
                self.save_now(trainer)?;
                let error = error.at(format!("after step {step}, {}", self.saved()));
                return Err(error.hint(self.how_to_go_on()));
            }
            Err(error) => return Err(self.device_failed(trainer, error)),
        }
        Ok(())
    }

    /// Does the evaluation that the checkpoint lacks, if it lacks one; the checkpoint is then written again.
    pub fn make_up_evaluation(&mut self, trainer: &mut Trainer, training: &mut Loader) -> Result<()> {
        if self.state.owes_evaluation {
            self.evaluate(trainer, training)?;
            if self.checkpoint_is_due(trainer) {
                self.saved_at = None;
                self.checkpoint(trainer)?;
            }
        }
        Ok(())
    }

    fn evaluate_now(&mut self, trainer: &mut Trainer, training: &mut Loader) -> Result<()> {
        let began = Instant::now();
        if let Some(free) = trainer.backend.unbind_batch() {
            training.recycle(free);
        }
        if self.data.val.is_some() && trainer.optimizer.ema_decay().is_some() {
            trainer.backend.gather_ema()?;
        }
        let mut seen = self.sees(trainer);
        let Evaluations { part: on_part, val: on_val, ema: on_ema } =
            self.evaluate_all(trainer, seen.as_mut())?;
        let report = on_val.unwrap_or(on_part);
        let best = on_val.is_some_and(|report| self.record_best(trainer.step, &report));
        let line = EvalLine {
            step: trainer.step,
            epoch: self.epoch(trainer.step),
            scores: report.scores(),
            classes: trainer.model.config.classes,
            gap: on_val.map(|val| on_part.top1 - val.top1),
            ema: on_ema.as_ref().map(EvalReport::scores),
            best,
            img_per_s: report.img_per_s,
            seconds: began.elapsed().as_secs_f64(),
        };
        self.metrics.iter_mut().for_each(|metrics| metrics.eval(&line));
        self.progress.eval(&line);
        if let (Some(reporter), Some(metrics)) = (&mut self.reporter, &mut self.metrics) {
            reporter.evaluated(trainer, &self.data, seen, metrics, &self.log);
        }
        (self.last_eval, self.evaluated_at) = (Some(report), trainer.step);
        self.pace.outside += began.elapsed().as_secs_f64();
        Ok(())
    }

    /// What the page shows of the validation pictures, to be filled on all ranks. One label per picture is needed.
    fn sees(&self, trainer: &Trainer) -> Option<Seen> {
        let one_label = self.data.shape().targets == TargetKind::Labels;
        let val = self.data.val.as_ref().filter(|_| self.recipe.train.report && one_label)?;
        Some(Seen::new(self.recipe.loss.kind, trainer.model.micro_batch, val.len()))
    }

    fn evaluate_all(&self, trainer: &mut Trainer, seen: Option<&mut Seen>) -> Result<Evaluations> {
        let part = self.evaluate_on(trainer, &self.data.train_part, None)?;
        let val = self.data.val.as_ref().map(|val| self.evaluate_on(trainer, val, seen)).transpose()?;
        let ema = self.data.val.as_ref().filter(|_| trainer.optimizer.ema_decay().is_some());
        let ema = ema.map(|val| self.evaluate_ema_on(trainer, val)).transpose()?;
        Ok(Evaluations { part, val, ema })
    }

    fn evaluate_ema_on(&self, trainer: &mut Trainer, dataset: &Arc<Dataset>) -> Result<EvalReport> {
        trainer.backend.swap_ema()?;
        let report = self.evaluate_on(trainer, dataset, None);
        trainer.backend.swap_ema()?;
        report
    }

    fn evaluate_on(
        &self,
        trainer: &mut Trainer,
        dataset: &Arc<Dataset>,
        seen: Option<&mut Seen>,
    ) -> Result<EvalReport> {
        let loss = Loss::plain(trainer.loss.kind);
        let (model, recipe, group) = (&trainer.model, &self.recipe, trainer.collective);
        let layout = SlotLayout {
            samples: model.micro_batch,
            image: model.config.image,
            pixels: Pixels::U8,
            targets: self.data.shape().targets,
        };
        let spec = LoaderSpec {
            batch: model.micro_batch,
            image: model.config.image,
            mode: data::Mode::Eval { resize: recipe.eval.resize, crop_ratio: recipe.eval.crop_ratio },
            start_batch: 0,
            workers: group.threads(recipe.data.workers),
            on_bad_record: OnBadRecord::Skip,
            exif: recipe.data.exif,
        };
        let delivery = Delivery { rank: group.rank, ranks: group.size, ..Delivery::default() };
        let loader = |trainer: &Trainer| -> Result<Loader> {
            let slots = (0..2).map(|_| trainer.backend.new_slot(layout)).collect::<Result<_>>()?;
            Ok(Loader::with(dataset.clone(), spec.clone(), delivery, slots))
        };
        let mut batches = loader(trainer)?;
        let mut report = evaluate(&mut *trainer.backend, model, &mut batches, loss, &group, seen)?;
        if dataset.is_multi_label() {
            drop(batches);
            let mut batches = loader(trainer)?;
            let map = mean_average_precision(&mut *trainer.backend, &trainer.model, &mut batches, &group)?;
            report.map = Some(map);
        }
        Ok(report)
    }

    /// Records an evaluation. Returns whether it is the best so far.
    fn record_best(&mut self, step: u64, report: &EvalReport) -> bool {
        let metric = match self.recipe.eval.metric {
            Metric::Top1 => report.top1,
            Metric::Loss => -report.loss,
            Metric::Map => report.map.unwrap_or(f64::NAN),
        };
        let better = self.state.best.is_none_or(|b| metric > b.metric + self.recipe.train.min_delta);
        if better && metric.is_finite() {
            self.state.best = Some(Best { step, metric });
            self.state.stale_evals = 0;
        } else {
            self.state.stale_evals += 1;
        }
        self.state.best.is_some_and(|b| b.step == step)
    }
}
