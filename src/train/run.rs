//! A run: its reports, its checkpoints, and how it ends. [`super::directory`] owns its directory,
//! [`super::run_data`] its data.

mod evaluations;
mod rewinding;
mod saving;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::backend::{Device, Health, Limits, Slot, SlotLayout, StepReport};
use crate::data::{self, Delivery, Loader, LoaderSpec};
use crate::error::{Error, Kind, Result};
use crate::recipe::{Metric, OnSpike, Recipe};
use crate::report::{GpuLine, Log, MetricsFile, Progress, StepLine};
use crate::watch::{self, Watch};
use crate::weights::CheckpointMeta;
use crate::{files, signals};

use super::checkpoint::{Checkpoints, RunState, Sums, Writer};
use super::directory::{Directory, host};
use super::evaluate::EvalReport;
use super::header::{memory_lines, model_lines, word};
use super::pace::{FirstSteps, Pace};
use super::report::{Reporter, event_file};
use super::resume::{self, Now};
use super::run_data::OVERFIT_LOSS;
use super::{Trainer, about, ranks, samples, setup};

pub use super::directory::default_out;
pub use super::run_data::RunData;

/// The command line's options for a run, besides the recipe.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The recipe's name, for the header.
    pub recipe_name: String,
    /// The run directory.
    pub out: PathBuf,
    /// The directory must be new. If `out` exists, a number is added.
    pub numbered: bool,
    /// Go on from the newest checkpoint in `out`.
    pub resume: bool,
    /// Overfit this many images, as a check of the whole program.
    pub overfit: Option<usize>,
    /// Where to compute.
    pub device: Device,
    /// Lines for the header: where the weights come from and how they were adapted.
    pub notes: Vec<String>,
}

impl RunOptions {
    /// A new run in `out`, on the GPU if there is one.
    pub fn new(recipe_name: impl Into<String>, out: impl Into<PathBuf>) -> Self {
        Self {
            recipe_name: recipe_name.into(),
            out: out.into(),
            numbered: false,
            resume: false,
            overfit: None,
            device: Device::Auto,
            notes: Vec::new(),
        }
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps of the recipe are done.
    Finished,
    /// The validation metric stopped improving.
    EarlyStop,
    /// An overfit run reached its target loss.
    Learned,
}

/// The result of a finished run.
#[derive(Clone, Debug)]
pub struct RunSummary {
    /// The run directory.
    pub out: PathBuf,
    /// Updates that were done, over all resumes.
    pub steps: u64,
    /// Why the run ended.
    pub ending: Ending,
    /// Seconds of this process.
    pub seconds: f64,
    /// The last evaluation, if there was any.
    pub last: Option<EvalReport>,
    /// Step and metric of the best evaluation. Larger is better: a loss is negative here.
    pub best: Option<(u64, f64)>,
    /// Whether there are validation images.
    pub has_val: bool,
    /// The validation images were held out of the training images.
    pub held_out: bool,
    /// Files with a few validation images.
    pub samples: Vec<PathBuf>,
    /// What `best` is measured by.
    pub metric: Metric,
}

/// Everything of a run except the trainer.
pub struct Run {
    /// Updates of the whole run.
    pub steps: u64,
    recipe: Recipe,
    options: RunOptions,
    data: RunData,
    checkpoints: Checkpoints,
    state: RunState,
    writer: Writer,
    /// The last whole checkpoint.
    saved_at: Option<u64>,
    /// Why the checkpoint that was begun last could not be written.
    unsaved: Option<Error>,
    /// The checkpoint that the run went back to last, and how often.
    rewinds: Option<(u64, u64)>,
    meta: CheckpointMeta,
    /// `None` on other ranks than the first.
    metrics: Option<MetricsFile>,
    /// `None` on other ranks than the first, and without `train.report`.
    reporter: Option<Reporter>,
    log: Log,
    progress: Progress,
    last_eval: Option<EvalReport>,
    /// The step of `last_eval`.
    evaluated_at: u64,
    start: Instant,
    first_steps: FirstSteps,
    pace: Pace,
    /// Holds the directory's lock until the run is dropped. `None` on other ranks than the first.
    directory: Option<Directory>,
    /// Dropped last.
    _watch: Watch,
}

impl Run {
    /// Takes the run directory, restores the last checkpoint if asked to resume, and prints the header. Only
    /// the first rank uses files; the others get the state from it.
    pub fn open(
        mut recipe: Recipe,
        options: &RunOptions,
        data: RunData,
        trainer: &mut Trainer,
    ) -> Result<Self> {
        let mut options = options.clone();
        let group = trainer.collective;
        if options.numbered && group.is_first() {
            options.out = Directory::numbered(&options.out)?;
        }
        options.out = group.share_path(options.out)?;
        let out = &options.out;
        let directory = group.is_first().then(|| Directory::open(out, options.resume)).transpose()?;
        if group.is_first() {
            watch::forget(out);
        }
        let accept = std::mem::take(&mut recipe.data.accept_changes);
        let checkpoints = Checkpoints::new(out, recipe.train.keep);
        let digest = data.digest();
        let ranks = (group.size > 1).then_some(group.size);
        let now = Now { recipe: &recipe, data: &data, digest: &digest, accept, ranks };
        if group.size > 1 {
            group.agree("a program", &about::program())?;
        }
        group.agree("a recipe", recipe.to_toml_of("").as_bytes())?;
        group.agree("data", format!("{digest:?}").as_bytes())?;
        let (mut state, mut notes) = (None, Vec::new());
        if options.resume
            && group.is_first()
            && let Some(resumed) = checkpoints.resume(trainer, |state| now.fits(state).map(drop))?
        {
            notes.extend(resumed.notes);
            notes.extend(now.fits(&resumed.state)?);
            notes.extend(now.of_schedule(&resumed.state, trainer)?);
            state = Some(resume::go_on(resumed.state, &recipe)?);
        }
        ranks::share_state(trainer, &mut state)?;
        let resumed = state.as_ref().map(|s| s.step);
        let preferred = state.as_ref().map_or(Ok(()), |s| trainer.backend.prefer_algorithms(&s.algorithms));
        let mut state = state.unwrap_or_default();
        if state.recipe_name.is_empty() {
            state.recipe_name = options.recipe_name.clone();
        }
        let text = recipe.to_toml_of(&state.recipe_name);
        let (log, metrics) = if group.is_first() {
            files::write_atomic(&out.join("recipe.toml"), |w| w.write_all(text.as_bytes()))?;
            let mut metrics = MetricsFile::open(&out.join("metrics.jsonl"), resumed)?;
            metrics.events = event_file(out, &recipe, resumed)?;
            (Log::to_file(&out.join("log.txt"))?, Some(metrics))
        } else {
            (Log::stderr(), None)
        };
        let steps = recipe.train.steps.expect("a resolved recipe has its steps");
        let meta = CheckpointMeta {
            classes: Some(data.train.classes().to_vec()),
            normalise: trainer.model.normalise,
            resize: recipe.eval.resize,
            crop_ratio: recipe.eval.crop_ratio,
            loss: Some(recipe.loss.kind),
            recipe: Some(state.recipe_name.clone()),
            data: Some(format!(
                "{}, {} records, {}",
                recipe.data.train.as_deref().unwrap_or_default(),
                digest.train.records,
                digest.train.short()
            )),
            made_by: Some(about::made_by()),
            exif: recipe.data.exif,
            ..CheckpointMeta::default()
        };
        let reports = group.is_first() && recipe.train.report;
        let reporter = reports.then(|| Reporter::new(&recipe, out, &meta, trainer));
        (state.recipe, state.data, state.overfit) = (text, Some(digest), data.overfit);
        // With chunks the bytes of a checkpoint are the same for any number of ranks.
        state.ranks = ranks.filter(|_| recipe.train.reduce_chunks.is_none());
        let run = Self {
            steps,
            writer: Writer::new(checkpoints.clone(), trainer, directory.as_ref().map(Directory::holder)),
            checkpoints,
            saved_at: resumed,
            unsaved: None,
            rewinds: None,
            meta,
            metrics,
            reporter,
            progress: Progress::new(&log, steps, trainer.step),
            log,
            last_eval: None,
            evaluated_at: 0,
            start: Instant::now(),
            first_steps: FirstSteps::new(trainer.step),
            pace: Pace::new(0.0),
            state,
            data,
            _watch: Watch::start(watch::Settings {
                out: options.out.clone(),
                rank: group.rank,
                ranks: group.size,
                timeout: recipe.train.timeout.map(Duration::from_secs_f64),
                host: host(),
            })?,
            options,
            recipe,
            directory,
        };
        run.print_header(trainer, resumed);
        notes.iter().for_each(|note| run.log.line(&format!("resume   {note}")));
        if let Err(why) = preferred {
            run.log.line(&format!("         results are no longer bit-identical to the original run: {why}"));
        }
        run.warn_of_the_disk(trainer);
        signals::install()?;
        Ok(run)
    }

    fn print_header(&self, trainer: &Trainer, resumed: Option<u64>) {
        let (config, recipe) = (&trainer.model.config, &self.recipe);
        let log = |line: String| self.log.line(&line);
        log(format!("run      {}  ({})", self.options.out.display(), self.state.recipe_name));
        log(format!("device   {}", trainer.backend.describe()));
        for line in model_lines(&trainer.model, recipe.finetune.is_none()) {
            log(line);
        }
        self.options.notes.iter().cloned().for_each(log);
        data::notes().iter().for_each(|note| self.log.file_line(&format!("note: {note}")));
        let held_out = match self.data.held_out {
            Some(share) => format!(" (held out: `data.holdout = {share}`)"),
            None => String::new(),
        };
        let val = self
            .data
            .val
            .as_ref()
            .map_or("no validation images".into(), |v| format!("{} to validate{held_out}", v.len()));
        log(format!(
            "data     {} images to train on, {val}, {} classes, {}x{} px",
            self.data.train.len(),
            config.classes,
            config.image.0,
            config.image.1
        ));
        log(format!(
            "train    {} steps of {} = {:.1} epochs, {} lr {:.2e}, {} schedule{}",
            self.steps,
            recipe.train.batch,
            self.steps as f64 * recipe.train.batch as f64 / self.data.train.len() as f64,
            format!("{:?}", recipe.optim.name).to_lowercase(),
            recipe.optim.lr * trainer.optimizer.batch_scale(),
            word(&recipe.schedule.kind),
            match recipe.train.patience {
                0 => String::new(),
                patience => format!(", stopped after {patience} evaluations without improvement"),
            }
        ));
        for line in memory_lines(&trainer.memory) {
            log(line);
        }
        if let Some(step) = resumed {
            log(format!("resume   from checkpoints/step-{step}"));
        } else if self.options.resume {
            log("resume   no checkpoint found: starting from the beginning".into());
        }
    }

    /// The training loader, from the batch after the last finished step.
    pub fn loader(&self, trainer: &Trainer) -> Result<Loader> {
        let (recipe, config) = (&self.recipe, &trainer.model.config);
        let group = trainer.collective;
        let layout =
            SlotLayout { samples: trainer.batch, ..setup::slot_layout(recipe, self.data.shape().targets) };
        let slots =
            (0..recipe.data.slots).map(|_| trainer.backend.new_slot(layout)).collect::<Result<_>>()?;
        let spec = LoaderSpec {
            batch: trainer.batch,
            image: config.image,
            mode: data::Mode::Train { augment: recipe.augment.clone(), seed: recipe.train.seed },
            start_batch: self.state.spikes.batch_after(trainer.step),
            workers: group.threads(recipe.data.workers),
            on_bad_record: recipe.data.on_bad_record,
            exif: recipe.data.exif,
        };
        let delivery = Delivery {
            rank: group.rank,
            ranks: group.size,
            shuffle_window: recipe.data.shuffle_window,
            normalise: trainer.model.normalise,
        };
        Ok(Loader::with(self.data.train.clone(), spec, delivery, slots))
    }

    /// The next batch. A training loader never ends. If it fails, earlier steps are logged and saved first.
    pub fn next_batch(&mut self, trainer: &mut Trainer, loader: &mut Loader) -> Result<Slot> {
        match loader.next() {
            Ok(slot) => slot.ok_or_else(|| Error::new("the data loader ended before the run")),
            Err(error) => {
                self.read_reports(trainer, loader, 0)?;
                if trainer.step == 0 || trainer.skipped_in_a_row() > 0 {
                    return Err(error);
                }
                // Other ranks do not know of it, and save nothing. The user must see the data's error, even if
                // saving fails as well.
                if trainer.collective.size > 1 {
                    return Err(error.at(format!("after step {}", trainer.step)));
                }
                let saved = match self.save_now(trainer) {
                    Ok(()) => format!("{}, from which `--resume` continues", self.saved()),
                    Err(why) => format!("which could not be saved ({})", why.message()),
                };
                let is_stopped = matches!(error.kind(), Kind::Stopped(_));
                let error = error.at(format!("after step {}, {saved}", trainer.step));
                Err(if is_stopped { error.hint(self.how_to_go_on()) } else { error })
            }
        }
    }

    /// Whether all submitted steps must finish before the next one is submitted: an evaluation, a checkpoint
    /// or a signal is due, or the run may end depending on what its steps report.
    pub fn must_drain(&self, trainer: &Trainer) -> bool {
        let step = trainer.submitted();
        self.evaluation_is_due(step)
            || self.is_checkpoint_step(step)
            || trainer.skipped_in_a_row() > 0
            || (self.state.spikes.in_a_row > 0 && self.recipe.train.rewind_after > 0)
            || self.data.overfit.is_some()
            || trainer.asked_to_stop().is_some()
    }

    /// Waits for steps and logs their reports, in order, until at most `ahead` are in flight. While steps are
    /// being skipped, waits for all of them, or until the run has diverged.
    pub fn read_reports(&mut self, trainer: &mut Trainer, loader: &Loader, ahead: u64) -> Result<()> {
        let may_end = 1..self.recipe.train.max_skipped;
        while trainer.in_flight() > ahead
            || (trainer.in_flight() > 0 && may_end.contains(&trainer.skipped_in_a_row()))
        {
            let report = trainer.report().map_err(|e| self.device_failed(trainer, e))?;
            self.look_for_spike(trainer.step, &report);
            self.log(trainer, &report, loader)?;
        }
        Ok(())
    }

    /// What the next step may have without being skipped.
    pub fn limits(&self) -> Limits {
        match self.recipe.train.on_spike {
            OnSpike::Report => Limits::NONE,
            OnSpike::Skip => self.state.spikes.limits(&self.recipe.train),
        }
    }

    /// Counts a step, and writes a line if one is due.
    fn log(&mut self, trainer: &mut Trainer, report: &StepReport, loader: &Loader) -> Result<()> {
        let sums = &mut self.state.window;
        sums.steps += 1;
        sums.loss += report.loss;
        sums.top1 += report.top1;
        self.pace.steps += 1;
        let (sums, pace) = (self.state.window, &self.pace);
        let step = trainer.step;
        let due = step.is_multiple_of(self.recipe.train.log_every) || step == self.steps;
        let batch = self.recipe.train.batch as f64;
        let seconds = (pace.since.elapsed().as_secs_f64() - pace.outside).max(1e-9);
        let waited = loader.wait_seconds() - pace.waited;
        let line = StepLine {
            step,
            epoch: self.epoch(step),
            loss: sums.loss / sums.steps as f64,
            lr: trainer.optimizer.lr(step - 1),
            grad_norm: report.grad_norm,
            top1: sums.top1 / sums.steps as f64,
            img_per_s: pace.steps as f64 * batch / seconds,
            data_wait: waited / seconds,
            mfu: None,
            skipped: trainer.skipped,
            seconds: self.start.elapsed().as_secs_f64(),
            gpu: (due && self.metrics.is_some()).then(|| trainer.backend.health()).flatten().map(gpu_line),
        };
        self.progress.tick(step);
        if let Some(text) = self.first_steps.how_long(step, self.steps, line.seconds) {
            self.log.line(&format!("         {text}"));
        }
        if due {
            self.metrics.iter_mut().for_each(|metrics| metrics.step(&line));
            self.progress.step(&line);
            self.state.last_loss = Some(line.loss);
            self.state.window = Sums::default();
            self.pace = Pace::new(loader.wait_seconds());
        }
        Ok(())
    }

    /// Whether the run evaluates after `step` updates: every `train.eval_every`, and at the end.
    pub fn evaluation_is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.recipe.train.eval_every) || step == self.steps
    }

    /// False while steps are being skipped, or stand out and the run may go back: the earlier checkpoint is worth
    /// more.
    pub fn checkpoint_is_due(&self, trainer: &Trainer) -> bool {
        let step = trainer.step;
        let is_best = self.state.best.is_some_and(|best| best.step == step);
        let is_good = trainer.skipped_in_a_row() == 0
            && (self.state.spikes.in_a_row == 0 || self.recipe.train.rewind_after == 0 || step == self.steps);
        (self.is_checkpoint_step(step) || is_best) && is_good
    }

    fn is_checkpoint_step(&self, step: u64) -> bool {
        let every = self.recipe.train.checkpoint_every.unwrap_or(self.recipe.train.eval_every);
        step.is_multiple_of(every) || step == self.steps
    }

    fn epoch(&self, step: u64) -> f64 {
        step as f64 * self.recipe.train.batch as f64 / self.data.train.len() as f64
    }

    /// Whether the run ends now. Called before every step, including the first of a resumed run. Divergence
    /// and signals are errors.
    pub fn check_end(&mut self, trainer: &mut Trainer, loader: &Loader) -> Result<Option<Ending>> {
        if trainer.skipped_in_a_row() >= self.recipe.train.max_skipped {
            return Err(self.diverged(trainer));
        }
        let patience = self.recipe.train.patience;
        if self.data.overfit.is_some() && self.state.window.steps == 0 && self.last_loss_is_learned() {
            return Ok(Some(Ending::Learned));
        }
        if patience > 0 && self.state.stale_evals >= patience {
            return Ok(Some(Ending::EarlyStop));
        }
        if trainer.step >= self.steps {
            return Ok(Some(Ending::Finished));
        }
        let Some(signal) = trainer.asked_to_stop() else { return Ok(None) };
        self.read_reports(trainer, loader, 0)?;
        self.save_now(trainer)?;
        Err(Error::stopped(signal, format!("stopped at step {}, {}", trainer.step, self.saved()))
            .hint(self.how_to_go_on()))
    }

    fn how_to_go_on(&self) -> String {
        format!("continue with `vitrum train --resume {}`", self.options.out.display())
    }

    /// The error for a device that failed during a step. A GPU's error is sticky and often reported late, so
    /// the hint is a command that repeats the step kernel by kernel.
    pub fn device_failed(&self, trainer: &Trainer, error: Error) -> Error {
        if error.hint_text().is_some()
            || matches!(error.kind(), Kind::Stopped(_))
            || !trainer.backend.storage().has_device_memory()
        {
            return error;
        }
        let error = error.at(format!("after step {}", trainer.step));
        let from = self.saved_at.map_or("the start".into(), |step| format!("checkpoints/step-{step}"));
        let out = self.options.out.display();
        error.hint(format!(
            "nothing up to {from} is lost; `vitrum train --resume {out} --device cuda \
             --set train.graph=false --set train.check_launches=true` continues from there and names the kernel"
        ))
    }

    fn diverged(&self, trainer: &Trainer) -> Error {
        let last = self.saved_at.map(|step| self.checkpoints.path(step).display().to_string());
        trainer.diverged(last.as_deref())
    }

    fn last_loss_is_learned(&self) -> bool {
        self.state.last_loss.is_some_and(|loss| loss < OVERFIT_LOSS)
    }

    /// Writes the last checkpoint and returns the summary.
    pub fn finish(&mut self, trainer: &mut Trainer, ending: Ending) -> Result<RunSummary> {
        self.save_now(trainer)?;
        if self.saved_at != Some(trainer.step) {
            return Err(self.diverged(trainer));
        }
        if self.data.overfit.is_some() && !self.last_loss_is_learned() {
            let loss = self.state.last_loss.unwrap_or(f64::NAN);
            return Err(Error::new(format!(
                "the model did not overfit {} images: loss {loss:.4} after {} steps, not below {OVERFIT_LOSS}",
                self.data.overfit.unwrap_or(0),
                trainer.step
            ))
            .hint("check the images and labels, then `optim.lr`"));
        }
        if let Some(reporter) = &mut self.reporter {
            reporter.finish(&self.data, &self.log);
        }
        Ok(RunSummary {
            out: self.options.out.clone(),
            steps: trainer.step,
            ending,
            seconds: self.start.elapsed().as_secs_f64(),
            last: self.last_eval,
            best: self.state.best.map(|b| (b.step, b.metric)),
            has_val: self.data.val.is_some(),
            held_out: self.data.held_out.is_some(),
            samples: match &self.data.val {
                Some(val) if self.directory.is_some() => samples::write(val, &self.options.out),
                _ => Vec::new(),
            },
            metric: self.recipe.eval.metric,
        })
    }
}

fn gpu_line(health: Health) -> GpuLine {
    GpuLine {
        memory: health.memory_used,
        celsius: health.celsius,
        mhz: health.clock_mhz,
        memory_mhz: health.memory_clock_mhz,
        watts: health.watts,
        throttled: health.throttled,
    }
}
