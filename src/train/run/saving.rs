//! The checkpoints of a run: what is written into them, and what happens if they cannot be written.

use std::time::Instant;

use crate::backend::Arena;
use crate::error::Result;
use crate::train::checkpoint::About;
use crate::train::{Trainer, about};
use crate::weights::CheckpointMeta;

use super::Run;

impl Run {
    /// Warns before training if the disk cannot hold the checkpoints to keep, and one more while it is
    /// written.
    pub(super) fn warn_of_the_disk(&self, trainer: &Trainer) {
        let arenas = [Arena::Params, Arena::Ema, Arena::Moment1, Arena::Moment2];
        let bytes: usize = arenas.into_iter().map(|arena| trainer.memory.bytes(arena)).sum();
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

    /// Writes a checkpoint of the trainer. Does not save weights that are not finite; [`Run::check_end`] soon
    /// ends such a run.
    pub fn checkpoint(&mut self, trainer: &mut Trainer) -> Result<()> {
        if self.saved_at == Some(trainer.step) {
            return Ok(());
        }
        let Some(metrics) = &self.metrics else {
            self.saved_at = Some(trainer.step);
            return Ok(());
        };
        let began = Instant::now();
        self.state.step = trainer.step;
        self.state.skipped = trainer.skipped;
        self.state.skipped_in_a_row = trainer.skipped_in_a_row();
        self.state.algorithms = trainer.backend.algorithms();
        // A crash of the machine must not lose metrics of steps that the checkpoint includes.
        metrics.sync()?;
        let evaluated =
            self.last_eval.filter(|_| self.data.val.is_some() && self.evaluated_at == trainer.step);
        let meta = CheckpointMeta {
            step: Some(trainer.step),
            epoch: Some(self.epoch(trainer.step)),
            top1: evaluated.map(|report| report.top1),
            ..self.meta.clone()
        };
        let about = About { meta: &meta, facts: about::facts(&meta) };
        if self.checkpoints.save(trainer, &self.state, &about)? {
            self.saved_at = Some(trainer.step);
        } else {
            self.log.warn(&format!(
                "step {}: the weights are not finite, so no checkpoint was written",
                trainer.step
            ));
        }
        self.pace.outside += began.elapsed().as_secs_f64();
        Ok(())
    }
}
