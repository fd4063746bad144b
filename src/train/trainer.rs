//! The training loop. [`train`] is the whole run, [`Trainer::submit`] one update.
//!
//! The [`Trainer`] owns the device, the model and the optimiser, and counts finished steps. [`super::run`]
//! owns the run directory, its checkpoints and its reports.

use crate::backend::{Arena, Backend, Group, Loss, MemoryPlan, Micro, Slot, StepKeys, StepReport, Write};
use crate::dist::{Collective, Joining};
use crate::error::{Error, Result};
use crate::infer::loaded::load_weights;
use crate::optim::Optimizer;
use crate::recipe::Recipe;
use crate::signals;
use crate::vit::{Mode, Vit};
use crate::watch::{self, Stage};
use crate::weights::ModelFile;

use super::ranks;
use super::run::{Run, RunData, RunOptions, RunSummary};
use super::setup::{Parts, Setup};
use super::state::SharedState;

/// Trains one recipe from its first step, or from its last checkpoint, to its end.
pub fn train(recipe: Recipe, options: &RunOptions) -> Result<RunSummary> {
    let data = RunData::open(&recipe, options)?;
    train_from(None, data.resolve(recipe)?, data, options)
}

/// The run itself, from new weights or from a weights file that has the recipe's model.
pub fn train_from(
    weights: Option<&ModelFile>,
    recipe: Recipe,
    data: RunData,
    options: &RunOptions,
) -> Result<RunSummary> {
    let (group, device) = Collective::join(&Joining {
        device: options.device,
        // Ranks may have found different numbers.
        out: (!options.numbered).then_some(options.out.as_path()),
        deterministic: recipe.train.deterministic,
    })?;
    let options = &RunOptions { device, ..options.clone() };
    let setup = Setup::for_run(recipe, &data, options, &group)?;
    let recipe = setup.recipe.clone();
    let notes = options.notes.iter().chain(&setup.notes).cloned().collect();
    let options = &RunOptions { notes, ..options.clone() };
    let mut trainer = Trainer::new(setup, group, weights)?;
    let mut run = Run::open(recipe, options, data, &mut trainer)?;
    let mut loader = run.loader(&trainer)?;
    ranks::stop_together(&group, run.make_up_evaluation(&mut trainer, &mut loader))?;

    let ending = loop {
        if let Some(ending) = ranks::stop_together(&group, run.check_end(&mut trainer, &loader))? {
            break ending;
        }
        let batch = run.next_batch(&mut trainer, &mut loader)?;
        trainer.optimizer.limits = run.limits();
        let free = trainer.submit(batch).map_err(|e| run.device_failed(&trainer, e))?;
        free.into_iter().for_each(|slot| loader.recycle(slot));
        // The host runs a step ahead of a GPU, unless all submitted steps must finish first.
        let ahead = if run.must_drain(&trainer) { 0 } else { trainer.backend.steps_ahead() };
        run.read_reports(&mut trainer, &loader, ahead)?;
        if trainer.in_flight() > 0 {
            continue;
        }
        run.look_at_checkpoint(&trainer)?;
        if run.must_rewind(&trainer) {
            loader = run.rewind(&mut trainer, loader)?;
            continue;
        }
        if run.evaluation_is_due(trainer.step) {
            ranks::stop_together(&group, run.evaluate(&mut trainer, &mut loader))?;
        }
        if run.checkpoint_is_due(&trainer) {
            run.checkpoint(&mut trainer)?;
        }
    };
    let summary = run.finish(&mut trainer, ending)?;
    // Its graphs end before the communicator that they use.
    drop(trainer);
    group.leave()?;
    Ok(summary)
}

/// A model in training on one device.
pub struct Trainer {
    /// The device.
    pub backend: Box<dyn Backend>,
    /// The architecture, bound to buffers.
    pub model: Vit,
    /// The optimiser, with its groups.
    pub optimizer: Optimizer,
    /// The plan of the allocated memory.
    pub memory: MemoryPlan,
    /// The ranks that train together.
    pub collective: Collective,
    /// The training objective.
    pub loss: Loss,
    /// Samples of a whole batch on this rank; a multiple of the model's micro-batch.
    pub batch: usize,
    /// The run's seed, which keys the masks.
    pub seed: u64,
    /// Finished steps, whose reports were read. Includes skipped steps.
    pub step: u64,
    /// Submitted steps whose reports were not read yet.
    in_flight: u64,
    /// Steps whose update was skipped because the loss or the gradient norm was not finite.
    pub skipped: u64,
    skipped_in_a_row: u64,
    /// The signal that some rank got, as of the last report.
    signal: Option<i32>,
    in_chunks: bool,
    pub(super) state: SharedState,
}

impl Trainer {
    /// Allocates everything that the run needs. The weights are drawn, or come from a file. With a file,
    /// pictures are normalised as the file says.
    pub fn new(setup: Setup, collective: Collective, weights: Option<&ModelFile>) -> Result<Self> {
        let memory = setup.parts.memory();
        let Setup { mut backend, recipe, parts, class_weights, .. } = setup;
        let (in_chunks, is_sharded) = (recipe.train.reduce_chunks.is_some(), parts.is_sharded());
        let Parts { mut model, optimizer, loss, batch, shards, .. } = parts;
        assert_eq!(model.mode, Mode::Train, "a trainer needs a model with gradients");
        assert_eq!(batch % model.micro_batch, 0, "the micro-batch divides the batch");
        backend.allocate(&memory)?;
        if let Some(shards) = &shards {
            backend.join(Group {
                ranks: Box::new(collective),
                comm: collective.comm(),
                shards: shards.clone(),
                is_sharded,
                segments: optimizer.segments().to_vec(),
                samples: batch,
                in_chunks,
            })?;
        }
        let seed = recipe.train.seed;
        match weights {
            None => model.init(&mut *backend, seed)?,
            Some(file) => {
                model.normalise = file.meta.normalise;
                load_weights(file, &model, &mut *backend)?;
            }
        }
        if let Some(place) = model.class_weights {
            backend.write(place, &class_weights.expect("a loss that weighs classes has their weights"))?;
        }
        let mut trainer = Self {
            backend,
            model,
            optimizer,
            memory,
            collective,
            loss,
            batch,
            seed,
            step: 0,
            in_flight: 0,
            skipped: 0,
            skipped_in_a_row: 0,
            signal: None,
            in_chunks,
            state: SharedState::new(shards.filter(|_| is_sharded)),
        };
        trainer.weights_changed()?;
        Ok(trainer)
    }

    /// Call after writing weights from outside: the EMA starts from them.
    pub fn weights_changed(&mut self) -> Result<()> {
        if self.optimizer.ema_decay().is_some() {
            let weights = self.backend.read_arena(Arena::Params)?;
            self.set_whole(Arena::Ema, &weights)?;
        }
        Ok(())
    }

    /// Checks that all ranks have the same weights.
    ///
    /// # Errors
    /// They have not, so that one of them computes wrongly; or another rank failed.
    pub fn weights_agree(&mut self) -> Result<()> {
        let ranks = self.collective;
        if ranks.size == 1 {
            return Ok(());
        }
        let all = ranks.gather_number(self.backend.checksum(Arena::Params)?)?;
        let count = |sum: &u64| all.iter().filter(|s| *s == sum).count();
        let most = *all.iter().max_by_key(|sum| count(sum)).expect("a rank");
        let hint = "continue from the last checkpoint with `--resume`, without the machine that makes errors";
        if 2 * count(&most) <= ranks.size {
            return Err(Error::new(format!(
                "after step {}, the ranks have different weights: the memory or the device of one makes errors",
                self.step
            ))
            .hint(hint));
        }
        let others: Vec<_> =
            (0..ranks.size).filter(|rank| all[*rank] != most).map(|r| r.to_string()).collect();
        if others.is_empty() {
            return Ok(());
        }
        Err(Error::new(format!(
            "after step {}, the weights of rank {} are not those of the other ranks: its memory or its device makes \
             errors",
            self.step,
            others.join(" and rank ")
        ))
        .hint(hint))
    }

    /// Makes one update from one batch and waits for it. Returns the slot that is free again, and the step's
    /// report.
    pub fn step(&mut self, batch: Slot) -> Result<(Option<Slot>, StepReport)> {
        assert_eq!(self.in_flight, 0, "reports of earlier steps are waiting");
        let free = self.submit(batch)?;
        Ok((free, self.report()?))
    }

    /// Submits one update from one batch without waiting for it; [`Trainer::report`] returns its result. At
    /// most one step more than [`Backend::steps_ahead`] may be in flight. Returns the slot that is free
    /// again.
    pub fn submit(&mut self, batch: Slot) -> Result<Option<Slot>> {
        let _here = watch::enter(Stage::Step);
        let step = self.submitted();
        let micro_batches = micro_batches(&self.model, self.batch, &self.collective, self.in_chunks);
        let free = self.backend.bind_batch(batch)?;
        self.backend.begin_step(StepKeys { seed: self.seed, step })?;
        self.backend.tell_signal(signals::pending().unwrap_or(0));
        let (model, loss) = (&self.model, self.loss);
        let mut work = |b: &mut dyn Backend| gradients(b, model, loss, &micro_batches);
        self.backend.step(&mut work, Some(&self.optimizer.update(step)))?;
        self.in_flight += 1;
        Ok(free)
    }

    /// Waits for the oldest step in flight, counts it, and returns its report.
    pub fn report(&mut self) -> Result<StepReport> {
        assert!(self.in_flight > 0, "no step is in flight");
        let report = {
            let _here = watch::enter(Stage::Device);
            self.backend.report()?
        };
        self.in_flight -= 1;
        self.count(&report);
        Ok(report)
    }

    /// Submitted steps whose reports were not read yet.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// All submitted steps, including finished ones.
    pub fn submitted(&self) -> u64 {
        self.step + self.in_flight
    }

    /// The signal that asks the run to stop. All ranks get the same answer, that of the last report.
    pub fn asked_to_stop(&self) -> Option<i32> {
        if self.collective.size == 1 { signals::pending() } else { self.signal }
    }

    /// How many of the latest steps in a row were skipped.
    pub fn skipped_in_a_row(&self) -> u64 {
        self.skipped_in_a_row
    }

    /// The error for a diverged run: the step, the learning rate, and what to try.
    pub fn diverged(&self, last_checkpoint: Option<&str>) -> Error {
        let lr = self.optimizer.lr(self.step.saturating_sub(1));
        let what = match self.skipped_in_a_row {
            0 => "the weights are no longer finite".into(),
            n => format!("loss or gradient norm not finite in {n} steps in a row"),
        };
        let from = last_checkpoint
            .map_or("no checkpoint was written yet".into(), |c| format!("last good checkpoint: {c}"));
        Error::new(format!("step {}, learning rate {lr:.3e}: {what}; {from}", self.step))
            .hint("lower `optim.lr`, lengthen `schedule.warmup`, or set `optim.clip=1`")
    }

    fn count(&mut self, report: &StepReport) {
        self.step += 1;
        self.signal = (report.signal != 0).then_some(report.signal);
        if report.skipped {
            self.skipped += 1;
            // An update that was left out because it stood out is no sign that the run diverges.
            let finite = report.loss.is_finite() && report.grad_norm.is_finite();
            self.skipped_in_a_row = if finite { 0 } else { self.skipped_in_a_row + 1 };
        } else {
            self.skipped_in_a_row = 0;
        }
        watch::finished(self.step);
    }

    /// Continues after `step` finished steps, for a resumed run.
    pub fn resume_at(&mut self, step: u64, skipped: u64, skipped_in_a_row: u64) {
        self.step = step;
        self.skipped = skipped;
        self.skipped_in_a_row = skipped_in_a_row;
    }
}

/// The micro-batches of a rank's batch. As chunks they do not add their gradients up.
pub(super) fn micro_batches(
    model: &Vit,
    batch: usize,
    collective: &Collective,
    as_chunks: bool,
) -> Vec<Micro> {
    let micro = |first| Micro {
        first,
        samples: model.micro_batch,
        global_first: (collective.rank * batch) as u64,
        gradients: Write::add_if(first > 0 && !as_chunks),
        mean_over: batch * collective.size,
    };
    (0..batch).step_by(model.micro_batch).map(micro).collect()
}

/// Computes the gradients of a batch and the sums of its report. Several ranks add the samples of all of them
/// in their order in the global batch, as one rank would.
pub(super) fn gradients(b: &mut dyn Backend, model: &Vit, loss: Loss, micro_batches: &[Micro]) -> Result<()> {
    b.begin_report()?;
    for micro in micro_batches {
        b.begin_micro(*micro)?;
        model.forward(b, true)?;
        match model.all_samples {
            None => model.loss(b, loss)?,
            Some(all) => {
                let first = micro.global_first as usize + micro.first;
                model.loss_of(b, loss, all.row_range(first, micro.samples))?;
            }
        }
        if let Some(all) = model.all_samples.filter(|_| Some(micro) == micro_batches.last()) {
            b.gather_rows(all)?;
            for first in (0..all.rows).step_by(micro.samples) {
                b.add_to_report(all.row_range(first, micro.samples))?;
            }
        }
        model.backward(b, true)?;
    }
    Ok(())
}
