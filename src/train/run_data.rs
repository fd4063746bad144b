//! A run's data, and the check that it is the data that the run began with.

use std::sync::Arc;

use crate::backend::LossKind;
use crate::data::{self, Dataset, Digest};
use crate::error::{Error, Result};
use crate::recipe::{AugmentSection, Metric, MicroBatch, Recipe, ScheduleKind};

use super::checkpoint::{Checkpoints, RunDigest};
use super::run::RunOptions;
use super::setup::DataShape;

/// Training and validation images. Clones share them.
#[derive(Clone)]
pub struct RunData {
    /// The training images.
    pub train: Arc<Dataset>,
    /// The validation images, if there are any.
    pub val: Option<Arc<Dataset>>,
    /// Training images that are also evaluated, without augmentation. The gap to `val` shows overfitting.
    pub(super) train_part: Arc<Dataset>,
    /// The share of the training images that became validation images, if any.
    pub(super) held_out: Option<f64>,
    pub(super) overfit: Option<usize>,
    /// The recipe's `data.train` and `data.val`.
    names: (Option<String>, Option<String>),
}

/// The number of steps in which an overfit run must reach [`OVERFIT_LOSS`].
const OVERFIT_STEPS: u64 = 300;
pub(super) const OVERFIT_LOSS: f64 = 0.01;
/// How many training images are evaluated besides the validation set.
const TRAIN_EVAL_IMAGES: usize = 2000;
/// Messages list the classes in order if there are at most this many.
const FEW_CLASSES: usize = 20;
/// The default of `data.holdout` for fine-tuning.
const HOLDOUT: f64 = 0.1;

impl RunData {
    /// Opens the data sets that `data.train` and `data.val` name.
    pub fn open(recipe: &Recipe, options: &RunOptions) -> Result<Self> {
        let spec = recipe.data.train.as_deref();
        let (mut train, mut val) = data::pair(spec, recipe.data.val.as_deref())?;
        if !recipe.data.verify {
            train.trust();
            val.iter().for_each(Dataset::trust);
        }
        let saved = if options.resume { Checkpoints::new(&options.out, 1).newest_state() } else { None };
        let saved = saved.map(|(_, state)| state);
        if let Some(digest) = saved.as_ref().and_then(|state| state.data.as_ref())
            && !recipe.data.accept_changes
        {
            // Checked here, because a changed number of classes would cause a less clear error before all
            // records are compared.
            same_classes(&digest.classes, train.classes())?;
        }
        let overfit =
            saved.map_or(Ok(options.overfit), |state| same_overfit(state.overfit, options.overfit))?;
        let mut held_out = None;
        let share = recipe.data.holdout.unwrap_or(if recipe.finetune.is_some() { HOLDOUT } else { 0.0 });
        // Said only to those who asked for it.
        let unused = |why: String| {
            if let Some(share) = recipe.data.holdout.filter(|share| *share > 0.0) {
                data::say(&format!("`data.holdout = {share}` has no effect: {why}"));
            }
        };
        match &val {
            _ if overfit.is_some() => unused("a run with `--overfit` has no validation".into()),
            Some(val) => unused(format!(
                "the run validates on the {} pictures of a part of their own ({})",
                val.len(),
                val.name()
            )),
            None if share > 0.0 => {
                let (kept, held) = train.clone().hold_out(share);
                if kept.is_empty() || held.is_empty() {
                    let all = if kept.is_empty() { "all" } else { "none" };
                    unused(format!("it would hold out {all} of the {} pictures", train.len()));
                } else {
                    (train, val, held_out) = (kept, Some(held), Some(share));
                }
            }
            None => {}
        }
        if let Some(n) = overfit {
            if n > train.len() {
                return Err(Error::usage(format!(
                    "`--overfit {n}`, but the data set has only {} images",
                    train.len()
                ))
                .hint(format!("use `--overfit {}` or less", train.len())));
            }
            train = train.take(n);
            val = None;
        }
        if recipe.data.balance {
            train = train.balanced()?;
        }
        let part = val.as_ref().map_or(TRAIN_EVAL_IMAGES, Dataset::len).min(TRAIN_EVAL_IMAGES);
        let train_part = train.clone().take(part);
        Ok(Self {
            train: Arc::new(train),
            val: val.map(Arc::new),
            held_out,
            train_part: Arc::new(train_part),
            overfit,
            names: (recipe.data.train.clone(), recipe.data.val.clone()),
        })
    }

    /// Whether a recipe names these data sets.
    pub fn is_of(&self, recipe: &Recipe) -> bool {
        self.names == (recipe.data.train.clone(), recipe.data.val.clone())
    }

    /// The digest of classes and records. Takes seconds for a million files.
    pub fn digest(&self) -> RunDigest {
        RunDigest {
            classes: self.train.classes().to_vec(),
            train: self.train.digest(),
            val: self.val.as_ref().map(|val| val.digest()),
        }
    }

    /// Refuses data that differ from `saved`. If `accept` is set, returns a note instead.
    pub fn same_as(&self, saved: &RunDigest, now: &RunDigest, accept: bool) -> Result<Option<String>> {
        let none = Digest::default();
        let compare = || {
            same_classes(&saved.classes, &now.classes)?;
            same_records("training", &self.train, &saved.train, &now.train)?;
            let val = self.val.as_ref().unwrap_or(&self.train);
            let of = |digest: &RunDigest| digest.val.clone().unwrap_or(none.clone());
            same_records("validation", val, &of(saved), &of(now))
        };
        match compare() {
            Err(e) if accept => Ok(Some(format!("on other data: {}", e.message()))),
            compared => compared.map(|()| None),
        }
    }

    /// The properties of the data that the run's parts depend on.
    pub fn shape(&self) -> DataShape {
        DataShape::of(&self.train, self.val.as_deref())
    }

    /// Fills in what the data decides (classes, an overfit run's settings) and checks what depends on its
    /// size.
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
        // Under softmax, classes compete: a sample with two classes, or with none, has no right answer.
        if self.train.is_multi_label() && recipe.loss.kind == LossKind::Softmax {
            return Err(Error::new(format!(
                "{}: its samples may have several classes, but `loss.kind = \"softmax\"` needs exactly one",
                self.train.name()
            ))
            .hint("use `--set loss.kind=sigmoid`"));
        }
        match (recipe.eval.metric, self.train.is_multi_label()) {
            (Metric::Top1, true) => recipe.eval.metric = Metric::Map,
            (Metric::Map, false) => {
                return Err(Error::usage(format!(
                    "`eval.metric = \"map\"`, but the samples of {} have one label each",
                    self.train.name()
                ))
                .hint("use `--set eval.metric=top1`, or `loss`"));
            }
            _ => {}
        }
        let classes = self.train.classes();
        recipe.check_class_weights(classes.len()).map_err(|e| match classes.len() {
            ..=FEW_CLASSES => e.hint(format!("their order is {}", classes.join(", "))),
            _ => e,
        })?;
        recipe.resolved(classes.len(), images)
    }
}

/// The largest batch of at most `images` samples that is a multiple of the recipe's micro-batch.
fn whole_micro_batches(recipe: &Recipe, images: usize) -> usize {
    match recipe.train.micro_batch {
        MicroBatch::Samples(micro) if (1..=images).contains(&micro) => images / micro * micro,
        MicroBatch::Samples(_) | MicroBatch::Auto => images,
    }
}

/// Changes the recipe for an overfit run: no randomness and no regularisation.
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
    (recipe.train.micro_batch, recipe.train.reduce_chunks) = (MicroBatch::Samples(0), None);
    recipe.train.log_every = recipe.train.log_every.min(10);
    recipe.train.steps = Some(OVERFIT_STEPS);
    recipe.train.epochs = None;
}

const ACCEPT: &str = "accept the data as it is now with `--set data.accept_changes=true`";

/// A resumed run keeps its `--overfit`; giving the flag again is optional.
fn same_overfit(began: Option<usize>, now: Option<usize>) -> Result<Option<usize>> {
    match (began, now) {
        (_, None) => Ok(began),
        (Some(began), Some(now)) if began == now => Ok(Some(now)),
        (Some(began), Some(_)) => Err(Error::usage(format!("the run was started with `--overfit {began}`"))
            .hint(format!("omit it or use `--overfit {began}`, or start a new run with another `--out`"))),
        (None, Some(_)) => Err(Error::usage("the run was started without `--overfit`")
            .hint("omit it to continue, or start a new run with another `--out`")),
    }
}

fn same_classes(saved: &[String], now: &[String]) -> Result<()> {
    let name =
        |classes: &[String], i: usize| classes.get(i).map_or("none".into(), |name| format!("`{name}`"));
    let Some(i) = (0..saved.len().max(now.len())).find(|i| saved.get(*i) != now.get(*i)) else {
        return Ok(());
    };
    let error = Error::new(format!(
        "the run was started with other classes: class {i} was {} and is now {} ({} classes then, {} now)",
        name(saved, i),
        name(now, i),
        saved.len(),
        now.len()
    ));
    Err(match saved.len() == now.len() {
        true => error.hint(format!("restore the names and the order of the classes, or {ACCEPT}")),
        false => error.hint("restore the classes, or start a new run with another `--out`"),
    })
}

fn same_records(which: &str, data: &Dataset, saved: &Digest, now: &Digest) -> Result<()> {
    let Some((first, end)) = saved.difference(now) else { return Ok(()) };
    if saved.has_records_of(now) {
        return Err(Error::new(format!(
            "{}: the run was started with its {which} data in another order: the same {} records, of which the first \
             is now `{}`",
            data.name(),
            now.records,
            data.record_name(0)
        ))
        .hint(format!("restore the order of the records, or {ACCEPT}")));
    }
    let from = match first < data.len() {
        true => format!("record {first}, `{}`", data.record_name(first)),
        false => format!("record {first}"),
    };
    let counts = match saved.records == now.records {
        true if data.name().contains(" + ") => {
            format!(
                "{} records, some with other names, labels or sizes, or drawn with other weights",
                now.records
            )
        }
        true => format!("{} records, some with other names, labels or sizes", now.records),
        false => format!("{} records then, {} now", saved.records, now.records),
    };
    Err(Error::new(format!(
        "{}: the run was started with other {which} data: {counts}; the first difference is between {from}, and record {}",
        data.name(),
        end.saturating_sub(1)
    ))
    .hint(format!("restore the records, or {ACCEPT}")))
}
