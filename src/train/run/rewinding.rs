//! What a run does about steps that stand out: it says so, and after several in a row it goes back to the last
//! good checkpoint and passes over the batches since.

use crate::backend::StepReport;
use crate::data::Loader;
use crate::error::{Error, Result};
use crate::report::{MetricsFile, RewindLine, SpikeLine};
use crate::train::checkpoint::RunState;
use crate::train::report::event_file;
use crate::train::{Trainer, ranks, resume};

use super::Run;

/// How often a run goes back to one checkpoint before it counts as diverged.
const MOST_REWINDS: u64 = 3;

impl Run {
    /// Reports a step that stands out.
    pub(super) fn look_for_spike(&mut self, step: u64, report: &StepReport) {
        let train = &self.recipe.train;
        let Some(spike) = self.state.spikes.look(report, train) else { return };
        let score =
            |score: f64| format!("{score:.1} deviations above the mean of {} steps", train.spike_window);
        let what = match spike.loss_score > train.spike_score {
            true => format!("the loss {:.4} is {}", spike.loss, score(spike.loss_score)),
            false => format!("the gradient's norm {:.3e} is {}", spike.grad_norm, score(spike.norm_score)),
        };
        let then = if spike.skipped { ": its update is left out" } else { "" };
        self.log.warn(&format!("step {step}: {what}{then}"));
        let line = SpikeLine {
            step,
            loss: spike.loss,
            loss_score: spike.loss_score,
            grad_norm: spike.grad_norm,
            norm_score: spike.norm_score,
            skipped: spike.skipped,
        };
        self.metrics.iter_mut().for_each(|metrics| metrics.spike(&line));
    }

    /// Whether so many steps in a row stood out, or were not finite, that the run goes back. All submitted steps
    /// are finished then.
    pub fn must_rewind(&self, trainer: &Trainer) -> bool {
        let after = self.recipe.train.rewind_after;
        after > 0 && self.state.spikes.in_a_row >= after && trainer.in_flight() == 0
    }

    /// Goes back to the last good checkpoint, and goes on behind the batches that were read since. Returns the
    /// loader for it. All ranks do it after the same step.
    ///
    /// # Errors
    /// The run was there too often; the checkpoint cannot be read.
    pub fn rewind(&mut self, trainer: &mut Trainer, loader: Loader) -> Result<Loader> {
        self.settle()?;
        let from = trainer.step;
        let Some(to) = self.saved_at else {
            self.log.warn(&format!("step {from}: there is no checkpoint to go back to; training goes on"));
            self.state.spikes.in_a_row = 0;
            return Ok(loader);
        };
        let again = self.rewinds.filter(|(step, _)| *step == to).map_or(1, |(_, times)| times + 1);
        if again > MOST_REWINDS {
            return Err(Error::new(format!(
                "step {from}: {} steps in a row stand out, and the run went back to {} {MOST_REWINDS} times already",
                self.state.spikes.in_a_row,
                self.checkpoints.path(to).display()
            ))
            .hint("lower `optim.lr`, lengthen `schedule.warmup`, or set `optim.clip=1`"));
        }
        let end = self.state.spikes.batch_after(from);
        drop(loader);
        drop(trainer.backend.unbind_batch());
        let mut state: Option<RunState> = None;
        if trainer.collective.is_first() {
            let resumed = self.checkpoints.resume(trainer, |_| Ok(()))?;
            resumed.iter().flat_map(|resumed| &resumed.notes).for_each(|note| self.log.warn(note));
            state = resumed.map(|resumed| resumed.state);
        }
        ranks::share_state(trainer, &mut state)?;
        let state = state.ok_or_else(|| Error::new("the checkpoint to go back to is gone"))?;
        let state = resume::go_on(state, &self.recipe)?;
        let to = state.step;
        let start = state.spikes.batch_after(to);
        // What the checkpoint says about the run's settings is older than what the run knows.
        self.state = RunState {
            recipe: std::mem::take(&mut self.state.recipe),
            data: self.state.data.take(),
            ranks: self.state.ranks,
            ..state
        };
        self.state.spikes.passed_over.push((start, end));
        (self.saved_at, self.rewinds) = (Some(to), Some((to, again)));
        (self.last_eval, self.evaluated_at) = (None, 0);
        self.log.warn(&format!(
            "step {from}: back to checkpoints/step-{to}, and on without the {} batches since",
            end - start
        ));
        if self.metrics.is_some() {
            let mut metrics = MetricsFile::open(&self.options.out.join("metrics.jsonl"), Some(to))?;
            metrics.events = event_file(&self.options.out, &self.recipe, Some(to))?;
            metrics.rewind(&RewindLine { step: to + 1, from, first_batch: start, batches: end - start });
            self.metrics = Some(metrics);
        }
        self.progress.tick(to);
        self.loader(trainer)
    }
}
