//! Fine-tuning: training that starts from trained weights.
//!
//! The weights file decides the model; the recipe decides the training. [`Start`] joins the two. Keys that
//! the recipe leaves open come from the file; keys that it gives are checked against the file; the weights
//! are adapted to the pictures and classes of the data. After that, a fine-tuning run is a training run
//! ([`train_from`]).

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

/// A weights file, read and adapted once. Runs that need the same weights share the copy.
pub struct Start {
    need: Need,
    /// Adapted to the recipe and the data.
    pub weights: ModelFile,
    /// What the adaptation did, one line each.
    pub notes: Vec<String>,
}

/// Everything that determines the weights that a run starts from.
#[derive(Clone, Debug, PartialEq)]
struct Need {
    path: String,
    overrides: ModelOverrides,
    target: AdaptTarget,
}

/// Runs the fine-tuning that `loaded` describes, to its end.
pub fn run(loaded: &RecipeFile, options: &RunOptions) -> Result<RunSummary> {
    if let Some(path) = loaded.recipe.finetune.as_ref().and_then(|finetune| finetune.weights.as_deref()) {
        weights::locate(Path::new(path))?;
    }
    let data = RunData::open(&loaded.recipe, options)?;
    let start = Start::load(&on_from_checkpoint(loaded, options), &data)?;
    start.run(loaded, data, options)
}

/// A resumed run needs the architecture of its weights file, not the values. If the file no longer exists,
/// the run's own checkpoint replaces it.
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
    /// Reads the weights that a recipe names, and adapts them to its pictures and the data's classes.
    ///
    /// Errors: the file cannot be read; the recipe gives sizes that are not the file's; those of
    /// [`weights::adapt`].
    pub fn load(loaded: &RecipeFile, data: &RunData) -> Result<Start> {
        let need = Need::of(loaded, &data.train)?;
        let mut file = weights::open_backbone(Path::new(&need.path), &need.overrides)?;
        if need.target.image.is_none() {
            file = file.with_known_image()?;
        }
        if let Some(why) = file.unprepared.as_ref().filter(|_| !loaded.gives("eval.resize")) {
            return Err(Error::new(format!(
                "{}: pictures cannot be prepared for evaluation as this file requires: {why}",
                file.path.display()
            ))
            .hint("choose another way, such as `--set eval.resize=center`"));
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

    /// Whether a run with this recipe and data would load the same weights.
    pub fn fits(&self, loaded: &RecipeFile, data: &RunData) -> bool {
        Need::of(loaded, &data.train).is_ok_and(|need| need == self.need)
    }

    /// The recipe, completed with everything that the file and the data decide.
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
        // The file's normalisation, overridden by the recipe. Values other than the default are written to
        // the recipe.
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

    /// Lines for the run's header: where the weights come from, and suggestions.
    pub fn header(&self, loaded: &RecipeFile, data: &RunData) -> Result<Vec<String>> {
        let advice = advice::lines(&self.complete(loaded, data)?, data.train.len());
        let weights = self.notes.iter().map(|note| format!("weights  {note}"));
        Ok(weights.chain(advice.into_iter().map(|line| format!("advice   {line}"))).collect())
    }
}

/// Renames the model's classes to the data's names for them, because the head is kept by name.
fn call_as(file: &mut ModelFile, own: &[String]) {
    let Some(names) = file.meta.classes.clone() else { return };
    let known = Known::new(names.len(), Some(&names));
    let called = file.meta.classes.as_mut().expect("the names are there");
    own.iter()
        .filter_map(|name| Some((name, known.find(name)?)))
        .for_each(|(name, class)| called[class].clone_from(name));
}

/// The error for a fine-tuning run that names no weights.
pub fn names_none(loaded: &RecipeFile) -> Error {
    Error::usage(format!("`{}` starts from trained weights, but none are given", loaded.name))
        .hint(format!("give them: `vitrum finetune {} --weights FILE --data DIR`", loaded.name))
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

/// The recipe's answers to what a weights file may leave open.
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
        rope: given("rope").then_some(m.rope),
        rope_theta: m.rope_theta,
        rope_ref: m.rope_ref.map(|grid| (grid.height, grid.width)),
        rope_offset: given("rope_offset").then_some(m.rope_offset),
        rope_indexing: given("rope_indexing").then_some(m.rope_indexing),
        map_heads: m.map_heads,
        map_tokens: given("map_tokens").then_some(m.map_tokens),
        mean: loaded.recipe.data.mean,
        std: loaded.recipe.data.std,
        ..ModelOverrides::from_sets(&patterns)?
    })
}

/// Sets batch size, evaluation and log intervals from the number of pictures, if the recipe does not give
/// them. So any folder can be fine-tuned without settings.
fn fit_length(recipe: &mut Recipe, loaded: &RecipeFile, images: usize) {
    /// The batch size of published transfers.
    const BATCH: usize = 512;
    const WHOLE: usize = 32;
    /// Log lines per run.
    const LINES: u64 = 50;
    let train = &mut recipe.train;
    if !loaded.gives("train.batch") {
        // A multiple of a reasonable micro-batch.
        train.batch = BATCH.min(if images < WHOLE { images } else { images / WHOLE * WHOLE });
    }
    let epoch = (images / train.batch.max(1)).max(1) as u64;
    let steps =
        train.steps.unwrap_or_else(|| (train.epochs.unwrap_or(1.0) * epoch as f64).ceil() as u64).max(1);
    if !loaded.gives("train.eval_every") {
        // Once per epoch, at most twenty times.
        train.eval_every = epoch.max(steps.div_ceil(20));
    }
    if !loaded.gives("train.log_every") {
        train.log_every = (steps / LINES).clamp(1, 100);
    }
}

/// Refuses sizes in the recipe that differ from the file's: they cannot be changed.
fn agree(loaded: &RecipeFile, file: &ModelFile) -> Result<()> {
    let c = &file.config;
    let m = loaded.recipe.model.sizes()?;
    let model = &loaded.recipe.model;
    let given = |key: &str| loaded.gives(&format!("model.{key}"));
    let pairs = [
        ("width", m.width, c.width),
        ("depth", m.depth, c.depth),
        ("heads", m.heads, c.heads),
        ("mlp", m.mlp, c.mlp),
        ("extra_tokens", loaded.recipe.model.extra_tokens, c.extra_tokens),
        ("registers", given("registers").then_some(model.registers), c.registers),
    ];
    let differs = pairs.into_iter().find_map(|(key, wanted, found)| {
        wanted.filter(|wanted| *wanted != found).map(|wanted| (key, wanted, found))
    });
    let Some((key, wanted, found)) = differs else { return Ok(()) };
    let hint = match &loaded.recipe.model.variant {
        Some(variant) => format!(
            "`{}` is a recipe for {variant}: give weights of that model, or omit the recipe to take the model \
             from the file",
            loaded.name
        ),
        None => format!("remove `model.{key}`: the file decides it"),
    };
    Err(Error::new(format!("{}: the model has {key} {found}, the recipe says {wanted}", file.path.display()))
        .hint(hint))
}
