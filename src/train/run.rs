//! A run and its directory: the data it reads, the reports it writes, its checkpoints, and how it ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Device, Loss, LossKind, Pixels, Slot, SlotLayout, StepReport, TargetKind};
use crate::data::{self, Dataset, Delivery, Loader, LoaderSpec};
use crate::error::{Error, Result};
use crate::files;
use crate::recipe::{AugmentSection, Metric, MicroBatch, OnBadRecord, Recipe, ScheduleKind};
use crate::report::{EvalLine, Log, MetricsFile, Progress, Scores, StepLine};
use crate::weights::CheckpointMeta;

use super::checkpoint::{Best, Checkpoints, RunState, Sums};
use super::evaluate::{EvalReport, evaluate};
use super::header::{memory_lines, model_lines};
use super::{Trainer, build, signals};

/// What the command line says about a run, besides the recipe.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The recipe's name, for the header.
    pub recipe_name: String,
    pub out: PathBuf,
    pub resume: bool,
    /// Learn this many images by heart: a check of the whole machinery.
    pub overfit: Option<usize>,
    pub device: Device,
    /// Lines for the header: where the weights come from, and what was done to them.
    pub notes: Vec<String>,
}

/// Images to train on, and to validate with. Clones share them.
#[derive(Clone)]
pub struct RunData {
    pub train: Arc<Dataset>,
    pub val: Option<Arc<Dataset>>,
    /// Training images that are evaluated as well, without augmentation: the gap to `val` shows overfitting.
    train_part: Arc<Dataset>,
    overfit: Option<usize>,
    /// `data.train` and `data.val`, as the recipe has them.
    names: (Option<String>, Option<String>),
}

/// An overfit run has this many steps to reach [`OVERFIT_LOSS`].
const OVERFIT_STEPS: u64 = 300;
const OVERFIT_LOSS: f64 = 0.01;
/// Training images that are evaluated beside the validation set, without augmentation.
const TRAIN_EVAL_IMAGES: usize = 2000;

impl RunData {
    /// Opens what `data.train` and `data.val` name.
    pub fn open(recipe: &Recipe, options: &RunOptions) -> Result<Self> {
        let spec = recipe.data.train.as_deref();
        let (mut train, mut val) = data::pair(spec, recipe.data.val.as_deref())?;
        if let Some(n) = options.overfit {
            if n > train.len() {
                return Err(Error::usage(format!(
                    "`--overfit {n}`, but the data set has {} images",
                    train.len()
                ))
                .hint(format!("use `--overfit {}` or less", train.len())));
            }
            train = train.take(n);
            val = None;
        }
        let part = val.as_ref().map_or(TRAIN_EVAL_IMAGES, Dataset::len).min(TRAIN_EVAL_IMAGES);
        let train_part = train.clone().take(part);
        Ok(Self {
            train: Arc::new(train),
            val: val.map(Arc::new),
            train_part: Arc::new(train_part),
            overfit: options.overfit,
            names: (recipe.data.train.clone(), recipe.data.val.clone()),
        })
    }

    /// Whether a recipe names these data sets.
    pub fn is_of(&self, recipe: &Recipe) -> bool {
        self.names == (recipe.data.train.clone(), recipe.data.val.clone())
    }

    /// What a slot holds of a sample's classes.
    pub fn targets(&self) -> TargetKind {
        build::targets(&self.train, self.val.as_deref())
    }

    /// Fills in what the data decides (classes, an overfit run's settings), and checks what depends on its size.
    pub fn resolve(&self, mut recipe: Recipe) -> Result<Recipe> {
        let images = self.train.len();
        if self.overfit.is_some() {
            overfit(&mut recipe, images);
        }
        if recipe.train.batch > images {
            return Err(Error::new(format!(
                "`train.batch` is {}, but the data set has {images} images",
                recipe.train.batch
            ))
            .hint(format!("use `--set train.batch={}` or less", whole_micro_batches(&recipe, images))));
        }
        // Softmax makes classes compete: a sample with two of them, or with none, has no right answer.
        if self.train.is_multi_label() && recipe.loss.kind == LossKind::Softmax {
            return Err(Error::new(format!(
                "{}: its samples may have several classes, and `loss.kind = \"softmax\"` is for exactly one",
                self.train.name()
            ))
            .hint("use `--set loss.kind=sigmoid`"));
        }
        recipe.resolved(self.train.classes().len(), images)
    }
}

/// The largest batch of at most `images` that the recipe's micro-batch divides.
fn whole_micro_batches(recipe: &Recipe, images: usize) -> usize {
    match recipe.train.micro_batch {
        MicroBatch::Samples(micro) if (1..=images).contains(&micro) => images / micro * micro,
        MicroBatch::Samples(_) | MicroBatch::Auto => images,
    }
}

/// Nothing random, nothing that holds the model back.
fn overfit(recipe: &mut Recipe, images: usize) {
    let model = &mut recipe.model;
    (model.dropout, model.attention_dropout, model.drop_path) = (0.0, 0.0, 0.0);
    recipe.augment = AugmentSection::none();
    recipe.loss.label_smoothing = 0.0;
    recipe.optim.weight_decay = 0.0;
    recipe.schedule.kind = ScheduleKind::Constant;
    recipe.schedule.warmup = crate::recipe::Duration::Steps(10);
    recipe.schedule.total = None;
    recipe.train.batch = recipe.train.batch.min(images);
    recipe.train.micro_batch = MicroBatch::Samples(0);
    recipe.train.log_every = recipe.train.log_every.min(10);
    recipe.train.steps = Some(OVERFIT_STEPS);
    recipe.train.epochs = None;
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Finished,
    /// The validation metric stopped improving.
    EarlyStop,
    /// An overfit run reached its loss.
    Learned,
}

/// What a finished run leaves behind.
#[derive(Clone, Debug)]
pub struct RunSummary {
    pub out: PathBuf,
    pub steps: u64,
    pub ending: Ending,
    pub seconds: f64,
    pub last: Option<EvalReport>,
    pub best: Option<(u64, f64)>,
    pub has_val: bool,
    pub metric: Metric,
}

/// The parts of a run that are not the trainer.
pub struct Run {
    pub steps: u64,
    recipe: Recipe,
    options: RunOptions,
    data: RunData,
    checkpoints: Checkpoints,
    state: RunState,
    saved_at: Option<u64>,
    meta: CheckpointMeta,
    metrics: MetricsFile,
    log: Log,
    progress: Progress,
    last_eval: Option<EvalReport>,
    start: Instant,
    pace: Pace,
}

/// Times since the last line of the log, in this process.
struct Pace {
    since: Instant,
    steps: u64,
    /// Seconds since then that were not spent on steps (evaluation, checkpoints).
    outside: f64,
    /// The loader's waiting time at that line.
    waited: f64,
}

impl Pace {
    fn new(waited: f64) -> Self {
        Self { since: Instant::now(), steps: 0, outside: 0.0, waited }
    }
}

impl Run {
    /// Prepares the run directory, restores the last checkpoint if asked, and prints the header.
    pub fn open(recipe: Recipe, options: &RunOptions, data: RunData, trainer: &mut Trainer) -> Result<Self> {
        let out = &options.out;
        let checkpoints = Checkpoints::new(out);
        let has_run = out.join("recipe.toml").exists() || !checkpoints.steps().is_empty();
        if has_run && !options.resume {
            return Err(Error::new(format!("{} holds a run already", out.display()))
                .hint("go on with it by `--resume`, or choose another folder with `--out DIR`"));
        }
        files::create_dir(out).map_err(|e| e.hint("choose another folder with `--out DIR`"))?;
        let text = recipe.to_toml();
        let state = match options.resume {
            true => checkpoints.resume(trainer, |state| same_recipe(&state.recipe, &text))?,
            false => None,
        };
        files::write_atomic(&out.join("recipe.toml"), |w| w.write_all(text.as_bytes()))?;
        let resumed = state.as_ref().map(|s| s.step);
        let preferred = state.as_ref().map_or(Ok(()), |s| trainer.backend.prefer_algorithms(&s.algorithms));
        let log = Log::to_file(&out.join("log.txt"))?;
        let metrics = MetricsFile::open(&out.join("metrics.jsonl"), resumed)?;
        let steps = recipe.train.steps.expect("a resolved recipe has its steps");
        let meta = CheckpointMeta {
            classes: Some(data.train.classes().to_vec()),
            normalise: trainer.model.normalise,
            resize: recipe.eval.resize,
            crop_ratio: recipe.eval.crop_ratio,
            exif: recipe.data.exif,
            ..CheckpointMeta::default()
        };
        let state = state.unwrap_or_else(|| RunState { recipe: text, ..RunState::default() });
        let run = Self {
            steps,
            checkpoints,
            saved_at: resumed,
            meta,
            metrics,
            progress: Progress::new(&log, steps, trainer.step),
            log,
            last_eval: None,
            start: Instant::now(),
            pace: Pace::new(0.0),
            state,
            options: options.clone(),
            data,
            recipe,
        };
        run.print_header(trainer, resumed);
        if let Err(why) = preferred {
            run.log.line(&format!("         the bits are others from here on: {why}"));
        }
        signals::install()?;
        Ok(run)
    }

    fn print_header(&self, trainer: &Trainer, resumed: Option<u64>) {
        let (config, recipe) = (&trainer.model.config, &self.recipe);
        let log = |line: String| self.log.line(&line);
        log(format!("run      {}  ({})", self.options.out.display(), self.options.recipe_name));
        log(format!("device   {}", trainer.backend.describe()));
        for line in model_lines(&trainer.model) {
            log(line);
        }
        self.options.notes.iter().cloned().for_each(log);
        let val = self
            .data
            .val
            .as_ref()
            .map_or("no validation images".into(), |v| format!("{} to validate", v.len()));
        log(format!(
            "data     {} images to train on, {val}, {} classes, {}x{} px",
            self.data.train.len(),
            config.classes,
            config.image.0,
            config.image.1
        ));
        log(format!(
            "train    {} steps of {} = {:.1} epochs, {} lr {:.2e}, {:?} schedule{}",
            self.steps,
            recipe.train.batch,
            self.steps as f64 * recipe.train.batch as f64 / self.data.train.len() as f64,
            format!("{:?}", recipe.optim.name).to_lowercase(),
            recipe.optim.lr * trainer.optimizer.batch_scale(),
            recipe.schedule.kind,
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
            log("resume   no checkpoint found: starting fresh".into());
        }
    }

    /// The training loader, from the batch after the last finished step.
    pub fn loader(&self, trainer: &Trainer) -> Result<Loader> {
        let (recipe, config) = (&self.recipe, &trainer.model.config);
        let layout = build::slot_layout(recipe, self.data.targets());
        let slots =
            (0..recipe.data.slots).map(|_| trainer.backend.new_slot(layout)).collect::<Result<_>>()?;
        let spec = LoaderSpec {
            batch: recipe.train.batch,
            image: config.image,
            mode: data::Mode::Train { augment: recipe.augment.clone(), seed: recipe.train.seed },
            start_batch: trainer.step,
            workers: recipe.data.workers,
            on_bad_record: recipe.data.on_bad_record,
            exif: recipe.data.exif,
        };
        let delivery = Delivery {
            shuffle_window: recipe.data.shuffle_window,
            normalise: trainer.model.normalise,
            ..Delivery::default()
        };
        Ok(Loader::with(self.data.train.clone(), spec, delivery, slots))
    }

    /// The next batch. Training loaders never run dry; where one fails, the steps before it are logged and saved.
    pub fn next_batch(&mut self, trainer: &mut Trainer, loader: &mut Loader) -> Result<Slot> {
        match loader.next() {
            Ok(slot) => slot.ok_or_else(|| Error::new("the data loader ended before the run")),
            Err(error) => {
                self.read_reports(trainer, loader, 0)?;
                if trainer.step == 0 || trainer.skipped_in_a_row() > 0 {
                    return Err(error);
                }
                // What is wrong with the data is what the user has to hear, even where saving fails as well.
                let saved = match self.checkpoint(trainer) {
                    Ok(()) => format!("{}, from where `--resume` goes on", self.saved()),
                    Err(why) => format!("which could not be saved ({})", why.message()),
                };
                Err(error.at(format!("after step {}, {saved}", trainer.step)))
            }
        }
    }

    /// Where the last checkpoint is, for messages.
    fn saved(&self) -> String {
        self.saved_at.map_or("no checkpoint was written yet".into(), |step| {
            format!("saved to {}", self.checkpoints.path(step).display())
        })
    }

    /// Will somebody look at what the step that was asked for last leaves? Then nothing may follow it before that: an
    /// evaluation, a checkpoint, a signal, or a run that may end by what its steps report.
    pub fn is_awaited(&self, trainer: &Trainer) -> bool {
        let step = trainer.asked();
        self.evaluation_is_due(step)
            || self.is_checkpoint_step(step)
            || trainer.skipped_in_a_row() > 0
            || self.data.overfit.is_some()
            || signals::pending().is_some()
    }

    /// Waits for steps and logs their reports, in order, until at most `ahead` are in flight; none where a step was skipped,
    /// up to the one with which the run ends.
    pub fn read_reports(&mut self, trainer: &mut Trainer, loader: &Loader, ahead: u64) -> Result<()> {
        let may_end = 1..self.recipe.train.max_skipped;
        while trainer.in_flight() > ahead
            || (trainer.in_flight() > 0 && may_end.contains(&trainer.skipped_in_a_row()))
        {
            let report = trainer.report().map_err(|e| self.device_failed(trainer, e))?;
            self.log(trainer, &report, loader)?;
        }
        Ok(())
    }

    /// Counts a step, and writes a line when one is due.
    fn log(&mut self, trainer: &Trainer, report: &StepReport, loader: &Loader) -> Result<()> {
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
        };
        self.progress.tick(step);
        if due {
            self.metrics.step(&line)?;
            self.progress.step(&line);
            self.state.last_loss = Some(line.loss);
            self.state.window = Sums::default();
            self.pace = Pace::new(loader.wait_seconds());
        }
        Ok(())
    }

    pub fn evaluation_is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.recipe.train.eval_every) || step == self.steps
    }

    /// Never while steps are skipped: the checkpoint before the trouble is worth more.
    pub fn checkpoint_is_due(&self, trainer: &Trainer) -> bool {
        let step = trainer.step;
        let is_best = self.state.best.is_some_and(|best| best.step == step);
        (self.is_checkpoint_step(step) || is_best) && trainer.skipped_in_a_row() == 0
    }

    fn is_checkpoint_step(&self, step: u64) -> bool {
        let every = self.recipe.train.checkpoint_every.unwrap_or(self.recipe.train.eval_every);
        step.is_multiple_of(every) || step == self.steps
    }

    /// Validation images, some training images without augmentation, and the same with the EMA of the weights.
    pub fn evaluate(&mut self, trainer: &mut Trainer, training: &mut Loader) -> Result<()> {
        let began = Instant::now();
        if let Some(free) = trainer.backend.unbind_batch() {
            training.recycle(free);
        }
        let (val, part) = (self.data.val.clone(), self.data.train_part.clone());
        let on_part = self.evaluate_on(trainer, &part)?;
        let on_val = val.as_ref().map(|val| self.evaluate_on(trainer, val)).transpose()?;
        let ema = val.as_ref().filter(|_| trainer.optimizer.ema_decay().is_some());
        let on_ema = ema.map(|val| self.evaluate_ema_on(trainer, val)).transpose()?;
        let report = on_val.unwrap_or(on_part);
        let best = on_val.is_some_and(|report| self.judge(trainer.step, &report));
        let line = EvalLine {
            step: trainer.step,
            epoch: self.epoch(trainer.step),
            scores: scores(&report),
            gap: on_val.map(|val| on_part.top1 - val.top1),
            ema: on_ema.as_ref().map(scores),
            best,
            img_per_s: report.img_per_s,
            seconds: began.elapsed().as_secs_f64(),
        };
        self.metrics.eval(&line)?;
        self.progress.eval(&line);
        self.last_eval = Some(report);
        self.pace.outside += began.elapsed().as_secs_f64();
        Ok(())
    }

    fn evaluate_ema_on(&self, trainer: &mut Trainer, dataset: &Arc<Dataset>) -> Result<EvalReport> {
        trainer.backend.swap_ema()?;
        let report = self.evaluate_on(trainer, dataset);
        trainer.backend.swap_ema()?;
        report
    }

    fn evaluate_on(&self, trainer: &mut Trainer, dataset: &Arc<Dataset>) -> Result<EvalReport> {
        let loss = Loss { label_smoothing: 0.0, ..trainer.loss };
        let (model, recipe) = (&trainer.model, &self.recipe);
        let layout = SlotLayout {
            samples: model.micro_batch,
            image: model.config.image,
            pixels: Pixels::U8,
            targets: self.data.targets(),
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
        let mut loader = Loader::new(dataset.clone(), spec, slots);
        evaluate(&mut *trainer.backend, model, &mut loader, loss)
    }

    /// Is this the best so far?
    fn judge(&mut self, step: u64, report: &EvalReport) -> bool {
        let metric = match self.recipe.eval.metric {
            Metric::Top1 => report.top1,
            Metric::Loss => -report.loss,
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

    fn epoch(&self, step: u64) -> f64 {
        step as f64 * self.recipe.train.batch as f64 / self.data.train.len() as f64
    }

    /// Writes a checkpoint of the trainer as it is. Weights that are not finite are not saved: such a run ends soon, by
    /// [`Run::ended`].
    pub fn checkpoint(&mut self, trainer: &mut Trainer) -> Result<()> {
        if self.saved_at == Some(trainer.step) {
            return Ok(());
        }
        let began = Instant::now();
        self.state.step = trainer.step;
        self.state.skipped = trainer.skipped;
        self.state.skipped_in_a_row = trainer.skipped_in_a_row();
        self.state.algorithms = trainer.backend.algorithms();
        if self.checkpoints.save(trainer, &self.state, &self.meta)? {
            self.saved_at = Some(trainer.step);
        } else {
            self.log
                .warn(&format!("step {}: the weights are not finite, no checkpoint written", trainer.step));
        }
        self.pace.outside += began.elapsed().as_secs_f64();
        Ok(())
    }

    /// Asked before every step, the first of a resumed run too. Divergence and signals are errors.
    pub fn ended(&mut self, trainer: &mut Trainer, loader: &Loader) -> Result<Option<Ending>> {
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
        let Some(signal) = signals::pending() else { return Ok(None) };
        self.read_reports(trainer, loader, 0)?;
        self.checkpoint(trainer)?;
        Err(Error::stopped(signal, format!("stopped at step {}, {}", trainer.step, self.saved()))
            .hint(format!("go on with the same command and `--out {} --resume`", self.options.out.display())))
    }

    /// The device failed in the middle of a step. A card's error is sticky and often comes late: the hint is the command
    /// that repeats the step kernel by kernel.
    pub fn device_failed(&self, trainer: &Trainer, error: Error) -> Error {
        if error.hint_text().is_some() || trainer.backend.describe().starts_with("cpu") {
            return error;
        }
        let error = error.at(format!("after step {}", trainer.step));
        let from = self.saved_at.map_or("the start".into(), |step| format!("checkpoints/step-{step}"));
        let out = self.options.out.display();
        error.hint(format!(
            "nothing up to {from} is lost; `vitrum train {out}/recipe.toml --out {out} --resume --device cuda \
             --set train.graph=false --set train.check_launches=true` goes on from there and names the kernel"
        ))
    }

    fn diverged(&self, trainer: &Trainer) -> Error {
        let last = self.saved_at.map(|step| self.checkpoints.path(step).display().to_string());
        trainer.diverged(last.as_deref())
    }

    fn last_loss_is_learned(&self) -> bool {
        self.state.last_loss.is_some_and(|loss| loss < OVERFIT_LOSS)
    }

    /// Closes the reports and says how it went.
    pub fn finish(mut self, trainer: &mut Trainer, ending: Ending) -> Result<RunSummary> {
        self.checkpoint(trainer)?;
        if self.saved_at != Some(trainer.step) {
            return Err(self.diverged(trainer));
        }
        if self.data.overfit.is_some() && !self.last_loss_is_learned() {
            let loss = self.state.last_loss.unwrap_or(f64::NAN);
            return Err(Error::new(format!(
                "the model did not learn {} images by heart: loss {loss:.4} after {} steps, not below {OVERFIT_LOSS}",
                self.data.overfit.unwrap_or(0),
                trainer.step
            ))
            .hint("look at the images and labels, then at `optim.lr`"));
        }
        Ok(RunSummary {
            out: self.options.out.clone(),
            steps: trainer.step,
            ending,
            seconds: self.start.elapsed().as_secs_f64(),
            last: self.last_eval,
            best: self.state.best.map(|b| (b.step, b.metric)),
            has_val: self.data.val.is_some(),
            metric: self.recipe.eval.metric,
        })
    }
}

fn scores(report: &EvalReport) -> Scores {
    Scores { loss: report.loss, top1: report.top1, top5: report.top5, images: report.count as u64 }
}

/// A run goes on under its own recipe. Keys that change no bit (threads, workers, logging) may differ; and those that change bits
/// only where the user asks for it: what happens to broken records, the precision and the stream's type ([`super::settle`]).
fn same_recipe(saved: &str, now: &str) -> Result<()> {
    let free = [
        "precision",
        "residual",
        "threads",
        "workers",
        "slots",
        "on_bad_record",
        "log_every",
        "checkpoint_every",
        "graph",
        "check_launches",
    ];
    let keep = |text: &str| -> Vec<String> {
        let is_free = |line: &&str| !free.iter().any(|key| line.starts_with(&format!("{key} =")));
        text.lines().filter(is_free).map(str::to_owned).collect()
    };
    let (saved, now) = (keep(saved), keep(now));
    let differs = |(a, b): &(&String, &String)| a != b;
    match saved.iter().zip(&now).find(differs) {
        None if saved.len() == now.len() => Ok(()),
        pair => {
            let (was, is) = pair.map_or(("...".into(), "...".into()), |(a, b)| (a.clone(), b.clone()));
            Err(Error::new(format!("the run was started with another recipe: `{was}`, now `{is}`"))
                .hint("resume with the same recipe and `--set` options, or start anew with another `--out`"))
        }
    }
}

/// `runs/RECIPE-DATE`, where nothing else is named.
pub fn default_out(recipe_name: &str) -> PathBuf {
    let stem = Path::new(recipe_name).with_extension("").to_string_lossy().replace(['/', '\\'], "-");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Path::new("runs").join(format!("{stem}-{}", utc_stamp(now)))
}

/// `20261124-150405` (days to a civil date: Howard Hinnant's algorithm).
fn utc_stamp(unix: u64) -> String {
    let (days, seconds) = ((unix / 86_400) as i64, unix % 86_400);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}-{h:02}{m:02}{s:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_the_utc_date() {
        assert_eq!(utc_stamp(0), "19700101-000000");
        assert_eq!(utc_stamp(951_827_696), "20000229-123456");
        assert_eq!(utc_stamp(1_795_532_645), "20261124-150405");
    }
}
