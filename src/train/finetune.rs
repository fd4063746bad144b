//! Fine-tuning: the same training, from weights that were trained before.
//!
//! A weights file decides which model it is; the recipe decides how it is trained. [`Start`] puts the two together:
//! what the recipe leaves open comes from the file, what it gives is checked against it, and the file is adapted to the
//! pictures and classes of the data. From there on a fine-tuning run is a training run ([`train_from`]).

use std::path::Path;

use crate::backend::Normalise;
use crate::data::Dataset;
use crate::data::classes::Known;
use crate::error::{Error, Result};
use crate::recipe::{FinetuneSection, Recipe, RecipeFile, unit};
use crate::weights::{self, AdaptTarget, ModelFile, ModelOverrides};

use super::advice;
use super::checkpoint::Checkpoints;
use super::run::{RunData, RunOptions, RunSummary};
use super::trainer::train_from;

/// A weights file, read and adapted once. Runs that need the same start from the same copy.
pub struct Start {
    need: Need,
    /// Adapted to the recipe and the data.
    pub weights: ModelFile,
    /// What was done to it, one line each.
    pub notes: Vec<String>,
}

/// What decides the weights that a run starts from.
#[derive(Clone, Debug, PartialEq)]
struct Need {
    path: String,
    overrides: ModelOverrides,
    target: AdaptTarget,
}

/// Fine-tunes as `loaded` says, to the end of the run.
pub fn run(loaded: &RecipeFile, options: &RunOptions) -> Result<RunSummary> {
    if let Some(path) = loaded.recipe.finetune.as_ref().and_then(|finetune| finetune.weights.as_deref()) {
        weights::locate(Path::new(path))?;
    }
    let data = RunData::open(&loaded.recipe, options)?;
    let start = Start::load(&on_from_checkpoint(loaded, options), &data)?;
    start.run(loaded, data, options)
}

/// A run that goes on needs the model of its weights, not their values: where the file has gone, its own checkpoint says
/// which model it is.
fn on_from_checkpoint(loaded: &RecipeFile, options: &RunOptions) -> RecipeFile {
    let mut loaded = loaded.clone();
    let checkpoints = Checkpoints::new(&options.out, 1);
    if let Some(finetune) = &mut loaded.recipe.finetune
        && let Some(path) = &finetune.weights
        && options.resume
        && !Path::new(path).exists()
        && let Some((step, _)) = checkpoints.newest_state()
    {
        finetune.weights = Some(checkpoints.path(step).display().to_string());
    }
    loaded
}

impl Start {
    /// Reads the weights that a recipe names, and makes them fit its pictures and the data's classes.
    ///
    /// Errors: a file that cannot be read; sizes that the recipe gives and the file has not; what [`weights::adapt`]
    /// refuses.
    pub fn load(loaded: &RecipeFile, data: &RunData) -> Result<Start> {
        let need = Need::of(loaded, &data.train)?;
        let mut file = weights::open_backbone(Path::new(&need.path), &need.overrides)?;
        if need.target.image.is_none() {
            file = file.with_known_image()?;
        }
        if let Some(why) = file.unprepared.as_ref().filter(|_| !loaded.gives("eval.resize")) {
            return Err(Error::new(format!(
                "{}: pictures cannot be prepared for evaluation as the file wants: {why}",
                file.path.display()
            ))
            .hint("choose another way, as with `--set eval.resize=center`"));
        }
        agree(loaded, &file)?;
        call_as(&mut file, data.train.classes());
        let layout = file.layout.name();
        let mut notes = vec![format!("{} (layout {layout})", file.path.display())];
        notes.extend(file.notes.iter().cloned());
        let (weights, done) = weights::adapt(file, &need.target)?;
        notes.extend(done);
        Ok(Start { need, weights, notes })
    }

    /// Whether a run with this recipe and data would load the same.
    pub fn fits(&self, loaded: &RecipeFile, data: &RunData) -> bool {
        Need::of(loaded, &data.train).is_ok_and(|need| need == self.need)
    }

    /// The recipe with everything that the file and the data decide.
    pub fn complete(&self, loaded: &RecipeFile, data: &RunData) -> Result<Recipe> {
        agree(loaded, &self.weights)?;
        let mut recipe = loaded.recipe.clone();
        recipe.model = recipe.model.of_file(&self.weights.config);
        if !loaded.gives("eval.resize") {
            recipe.eval.resize = self.weights.meta.resize;
            if !loaded.gives("eval.crop_ratio") {
                recipe.eval.crop_ratio = self.weights.meta.crop_ratio;
            }
        }
        // The file's, with what the recipe gives. Others than the usual ones are written down.
        let normalise = self.weights.meta.normalise;
        if normalise != Normalise::INCEPTION {
            recipe.data.mean = Some(unit(normalise.mean));
            recipe.data.std = Some(unit(normalise.std));
        }
        fit_length(&mut recipe, loaded, data.train.len());
        if !loaded.gives("data.exif") {
            recipe.data.exif = self.weights.meta.exif;
        }
        data.resolve(recipe)
    }

    /// Trains from these weights to the end of the run.
    pub fn run(&self, loaded: &RecipeFile, data: RunData, options: &RunOptions) -> Result<RunSummary> {
        let (recipe, notes) = (self.complete(loaded, &data)?, self.header(loaded, &data)?);
        train_from(Some(&self.weights), recipe, data, &RunOptions { notes, ..options.clone() })
    }

    /// What the head of a run says about its weights, and what might be tried.
    pub fn header(&self, loaded: &RecipeFile, data: &RunData) -> Result<Vec<String>> {
        let advice = advice::lines(&self.complete(loaded, data)?, data.train.len());
        let weights = self.notes.iter().map(|note| format!("weights  {note}"));
        Ok(weights.chain(advice.into_iter().map(|line| format!("advice   {line}"))).collect())
    }
}

/// Gives the model's classes the names that the data has for them: a head is kept by name.
fn call_as(file: &mut ModelFile, own: &[String]) {
    let Some(names) = file.meta.classes.clone() else { return };
    let known = Known::new(names.len(), Some(&names));
    let called = file.meta.classes.as_mut().expect("the names are there");
    own.iter()
        .filter_map(|name| Some((name, known.find(name)?)))
        .for_each(|(name, class)| called[class].clone_from(name));
}

/// A run that is to start from trained weights, and no weights.
pub fn names_none(loaded: &RecipeFile) -> Error {
    Error::usage(format!("`{}` starts from trained weights, and names none", loaded.name))
        .hint(format!("give them, as in `vitrum finetune {} --weights FILE --data DIR`", loaded.name))
}

impl Need {
    fn of(loaded: &RecipeFile, data: &Dataset) -> Result<Need> {
        let FinetuneSection { weights, head, rep_layer, posemb } =
            loaded.recipe.finetune.clone().unwrap_or_default();
        let path = weights.ok_or_else(|| names_none(loaded))?;
        let image = loaded.recipe.model.image;
        let target = AdaptTarget {
            image: loaded.gives("model.image").then_some((image.height, image.width)),
            patch: loaded.recipe.model.sizes()?.patch,
            classes: Some(data.classes().len()),
            class_names: Some(data.classes().to_vec()),
            head,
            rep_layer,
            posemb,
        };
        Ok(Need { path, overrides: overrides(loaded)?, target })
    }
}

/// What the recipe says about how to read the file: the keys that a file may leave open.
fn overrides(loaded: &RecipeFile) -> Result<ModelOverrides> {
    let names = loaded.recipe.weights.clone().unwrap_or_default();
    let of = |key: &str, values: Vec<String>| {
        values.into_iter().map(|value| (key.to_string(), value)).collect::<Vec<_>>()
    };
    let patterns = [of("weights.exclude", names.exclude), of("weights.rename", names.rename)].concat();
    let m = &loaded.recipe.model;
    let given = |key: &str| loaded.gives(&format!("model.{key}"));
    Ok(ModelOverrides {
        heads: m.heads,
        gelu: given("gelu").then_some(m.gelu),
        ln_eps: given("ln_eps").then_some(m.ln_eps),
        pool: given("pool").then_some(m.pool),
        norm: given("norm").then_some(m.norm),
        posemb: given("posemb").then_some(m.posemb),
        posemb_join: given("posemb_join").then_some(m.posemb_join),
        mean: loaded.recipe.data.mean,
        std: loaded.recipe.data.std,
        ..ModelOverrides::from_sets(&patterns)?
    })
}

/// What a recipe leaves open of batch and pace follows from the number of pictures: any folder can be fine-tuned on as it is.
fn fit_length(recipe: &mut Recipe, loaded: &RecipeFile, images: usize) {
    /// That of published transfers.
    const BATCH: usize = 512;
    const WHOLE: usize = 32;
    /// Lines of the log in a run.
    const LINES: u64 = 50;
    let train = &mut recipe.train;
    if !loaded.gives("train.batch") {
        // A whole number of micro-batches that are worth their name.
        train.batch = BATCH.min(if images < WHOLE { images } else { images / WHOLE * WHOLE });
    }
    let epoch = (images / train.batch.max(1)).max(1) as u64;
    let steps =
        train.steps.unwrap_or_else(|| (train.epochs.unwrap_or(1.0) * epoch as f64).ceil() as u64).max(1);
    if !loaded.gives("train.eval_every") {
        // Once an epoch, and no more than twenty times.
        train.eval_every = epoch.max(steps.div_ceil(20));
    }
    if !loaded.gives("train.log_every") {
        train.log_every = (steps / LINES).clamp(1, 100);
    }
}

/// Sizes that the recipe gives must be the file's: they cannot be changed.
fn agree(loaded: &RecipeFile, file: &ModelFile) -> Result<()> {
    let c = &file.config;
    let m = loaded.recipe.model.sizes()?;
    let pairs = [
        ("width", m.width, c.width),
        ("depth", m.depth, c.depth),
        ("heads", m.heads, c.heads),
        ("mlp", m.mlp, c.mlp),
        ("extra_tokens", loaded.recipe.model.extra_tokens, c.extra_tokens),
    ];
    let differs = pairs.into_iter().find_map(|(key, wanted, found)| {
        wanted.filter(|wanted| *wanted != found).map(|wanted| (key, wanted, found))
    });
    let Some((key, wanted, found)) = differs else { return Ok(()) };
    let hint = match &loaded.recipe.model.variant {
        Some(variant) => format!(
            "`{}` is a recipe for {variant}: give such weights, or leave the recipe out to take the model from \
             the file",
            loaded.name
        ),
        None => format!("leave `model.{key}` out: the file decides it"),
    };
    Err(Error::new(format!("{}: the model has {key} {found}, the recipe says {wanted}", file.path.display()))
        .hint(hint))
}
