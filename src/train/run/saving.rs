//! The checkpoints of a run: what is written into them, and what happens if they cannot be written.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::train::checkpoint::{ARENAS, About, Outcome};
use crate::train::{Trainer, about};
use crate::weights::CheckpointMeta;

use super::Run;

impl Run {
    /// Warns before training if the disk cannot hold the checkpoints to keep, and one more while it is
    /// written.
    pub(super) fn warn_of_the_disk(&self, trainer: &Trainer) {
        let bytes: usize = ARENAS.iter().map(|arena| trainer.whole_bytes(*arena)).sum();
        let kept = self.recipe.train.keep + usize::from(self.data.val.is_some());
        let every = self.recipe.train.checkpoint_every.unwrap_or(self.recipe.train.eval_every).max(1);
        let to_come =
            usize::try_from(self.steps.saturating_sub(trainer.step).div_ceil(every)).unwrap_or(usize::MAX);
        let count = (kept + 1).min(to_come.max(1));
        let directory = self.directory.as_ref();
        if let Some(warning) = directory.and_then(|d| d.too_small_for(count, bytes as u64)) {
            self.log.warn(&warning);
        }
    }

    /// Begins a checkpoint of the trainer, which a thread writes while training goes on, unless there is one of
    /// this step. Waits for the checkpoint before. All ranks call it after the same step.
    ///
    /// # Errors
    /// The device or another rank failed. A checkpoint that cannot be written is a warning.
    pub fn checkpoint(&mut self, trainer: &mut Trainer) -> Result<()> {
        if self.saved_at == Some(trainer.step) || self.writer.step() == Some(trainer.step) {
            return Ok(());
        }
        let began = Instant::now();
        self.settle()?;
        trainer.weights_agree()?;
        self.state.step = trainer.step;
        self.state.skipped = trainer.skipped;
        self.state.skipped_in_a_row = trainer.skipped_in_a_row();
        self.state.algorithms = trainer.backend.algorithms();
        // A crash of the machine must not lose metrics of steps that the checkpoint includes.
        if let Some(metrics) = &mut self.metrics {
            metrics.sync();
        }
        let evaluated =
            self.last_eval.filter(|_| self.data.val.is_some() && self.evaluated_at == trainer.step);
        let meta = CheckpointMeta {
            step: Some(trainer.step),
            epoch: Some(self.epoch(trainer.step)),
            top1: evaluated.map(|report| report.top1),
            ..self.meta.clone()
        };
        let about = About { meta: &meta, facts: about::facts(&meta) };
        self.writer.begin(trainer, &self.state, &about)?;
        self.pace.outside += began.elapsed().as_secs_f64();
        Ok(())
    }

    /// Learns what became of the last checkpoint, if its thread has ended. Several ranks ask together when the
    /// next one begins.
    pub fn look_at_checkpoint(&mut self, trainer: &Trainer) -> Result<()> {
        if trainer.collective.size == 1 && self.writer.is_done() { self.settle() } else { Ok(()) }
    }

    /// Waits until the checkpoint that was begun last is written, and warns if it could not be. Earlier ones are
    /// untouched then, so training goes on.
    pub(super) fn settle(&mut self) -> Result<()> {
        let Some((step, outcome)) = self.writer.settle()? else { return Ok(()) };
        self.unsaved = None;
        match outcome {
            Outcome::Saved => self.saved_at = Some(step),
            Outcome::NotFinite => self
                .log
                .warn(&format!("step {step}: the weights are not finite, so no checkpoint was written")),
            Outcome::Failed(error) => {
                let last = self.last_whole();
                self.log.warn(&format!("{}; training goes on, {last}", error.message()));
                self.unsaved = Some(error);
            }
        }
        Ok(())
    }

    /// Saves the trainer and waits for it, because the run ends.
    ///
    /// # Errors
    /// The checkpoint could not be written, or another rank failed.
    pub(super) fn save_now(&mut self, trainer: &mut Trainer) -> Result<()> {
        self.checkpoint(trainer)?;
        self.settle()?;
        match self.unsaved.take() {
            None => Ok(()),
            Some(error) => {
                let last = self.last_whole();
                let hint = error.hint_text().map(|hint| format!("{hint}; ")).unwrap_or_default();
                Err(Error::new(format!("{}; {last}", error.message()))
                    .hint(format!("{hint}{}", self.how_to_go_on())))
            }
        }
    }

    fn last_whole(&self) -> String {
        match self.saved_at {
            Some(step) => format!("the last whole checkpoint is {}", self.checkpoints.path(step).display()),
            None => "there is no whole checkpoint yet".into(),
        }
    }

    /// The place of the last checkpoint, for messages.
    pub(super) fn saved(&self) -> String {
        self.saved_at.map_or("no checkpoint was written yet".into(), |step| {
            format!("saved to {}", self.checkpoints.path(step).display())
        })
    }
}
