//! The evaluations of a run: which weights, on which data, and what becomes of their scores.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Loss, Pixels, SlotLayout};
use crate::data::{self, Dataset, Loader, LoaderSpec};
use crate::error::{Kind, Result};
use crate::recipe::{Metric, OnBadRecord};
use crate::report::{EvalLine, Scores};
use crate::train::Trainer;
use crate::train::checkpoint::Best;
use crate::train::evaluate::{EvalReport, evaluate, mean_average_precision};
use crate::train::ranks::{self, Evaluations};

use super::Run;

impl Run {
    /// Evaluates the validation images, some training images without augmentation, and the validation images
    /// with the weights' EMA.
    ///
    /// A signal ends it at once. The run is saved without it, and begins with it when it is resumed.
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
        let group = trainer.collective;
        if self.data.val.is_some() && trainer.optimizer.ema_decay().is_some() {
            trainer.backend.gather_ema()?;
        }
        let own = if group.is_first() { self.evaluate_all(trainer) } else { Ok(Evaluations::default()) };
        let Evaluations { part: on_part, val: on_val, ema: on_ema } = ranks::share_evaluations(&group, own)?;
        let report = on_val.unwrap_or(on_part);
        let best = on_val.is_some_and(|report| self.record_best(trainer.step, &report));
        let line = EvalLine {
            step: trainer.step,
            epoch: self.epoch(trainer.step),
            scores: scores(&report),
            classes: trainer.model.config.classes,
            gap: on_val.map(|val| on_part.top1 - val.top1),
            ema: on_ema.as_ref().map(scores),
            best,
            img_per_s: report.img_per_s,
            seconds: began.elapsed().as_secs_f64(),
        };
        self.metrics.iter_mut().for_each(|metrics| metrics.eval(&line));
        self.progress.eval(&line);
        (self.last_eval, self.evaluated_at) = (Some(report), trainer.step);
        self.pace.outside += began.elapsed().as_secs_f64();
        Ok(())
    }

    fn evaluate_all(&self, trainer: &mut Trainer) -> Result<Evaluations> {
        let part = self.evaluate_on(trainer, &self.data.train_part)?;
        let val = self.data.val.as_ref().map(|val| self.evaluate_on(trainer, val)).transpose()?;
        let ema = self.data.val.as_ref().filter(|_| trainer.optimizer.ema_decay().is_some());
        let ema = ema.map(|val| self.evaluate_ema_on(trainer, val)).transpose()?;
        Ok(Evaluations { part, val, ema })
    }

    fn evaluate_ema_on(&self, trainer: &mut Trainer, dataset: &Arc<Dataset>) -> Result<EvalReport> {
        trainer.backend.swap_ema()?;
        let report = self.evaluate_on(trainer, dataset);
        trainer.backend.swap_ema()?;
        report
    }

    fn evaluate_on(&self, trainer: &mut Trainer, dataset: &Arc<Dataset>) -> Result<EvalReport> {
        let loss = Loss::plain(trainer.loss.kind);
        let (model, recipe) = (&trainer.model, &self.recipe);
        let layout = SlotLayout {
            samples: model.micro_batch,
            image: model.config.image,
            pixels: Pixels::U8,
            targets: self.data.shape().targets,
        };
        let slots = (0..2).map(|_| trainer.backend.new_slot(layout)).collect::<Result<_>>()?;
        let spec = LoaderSpec {
            batch: model.micro_batch,
            image: model.config.image,
            mode: data::Mode::Eval { resize: recipe.eval.resize, crop_ratio: recipe.eval.crop_ratio },
            start_batch: 0,
            workers: recipe.data.workers,
            on_bad_record: OnBadRecord::Skip,
            exif: recipe.data.exif,
        };
        let mut loader = Loader::new(dataset.clone(), spec.clone(), slots);
        let mut report = evaluate(&mut *trainer.backend, model, &mut loader, loss)?;
        if dataset.is_multi_label() {
            drop(loader);
            let slots = (0..2).map(|_| trainer.backend.new_slot(layout)).collect::<Result<_>>()?;
            let mut loader = Loader::new(dataset.clone(), spec, slots);
            report.map = Some(mean_average_precision(&mut *trainer.backend, model, &mut loader)?);
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

fn scores(report: &EvalReport) -> Scores {
    Scores {
        loss: report.loss,
        top1: report.top1,
        top5: report.top5,
        map: report.map,
        images: report.count as u64,
    }
}
