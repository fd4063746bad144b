//! Resolves the user's settings into what the program uses: the model's sizes and the run's length. Refuses
//! settings that contradict each other or are not implemented yet.

use super::{ClassWeights, Duration, MicroBatch, ModelSection, Recipe, Size};
use crate::error::{Error, Result};
use crate::vit::config::{ModelConfig, PoolKind, Variant};

/// Far above any published model or run, and far below where products of sizes overflow.
const LIMITS: [(&str, usize); 4] =
    [("width", 1 << 16), ("depth", 1 << 10), ("mlp", 1 << 18), ("image", 1 << 13)];
const MOST_CLASSES: usize = 1 << 22;
/// Published models have up to 16.
const MOST_REGISTERS: usize = 1 << 10;
const MOST_BATCH: usize = 1 << 20;

impl Recipe {
    /// The architecture, complete and checked. `classes_of_data` is 0 if no data set has been opened; the
    /// recipe must then give the number of classes.
    pub fn model_config(&self, classes_of_data: usize) -> Result<ModelConfig> {
        let config = self.model.config(self.model.classes(classes_of_data)?)?;
        config.validate()?;
        Ok(config)
    }

    /// Number of updates in the run, with `data_size` pictures per epoch.
    pub fn steps(&self, data_size: usize) -> Result<u64> {
        match (self.train.steps, self.train.epochs) {
            (Some(steps), None) => Ok(steps),
            (None, Some(epochs)) => {
                Ok(Duration::Epochs(epochs).to_steps(0, self.train.batch, data_size).max(1))
            }
            (Some(_), Some(_)) => Err(Error::usage("`train.steps` and `train.epochs` are both set")
                .hint("remove one of them, they exclude each other")),
            (None, None) => Err(Error::usage("the recipe does not say how long to train")
                .hint("set `train.steps` or `train.epochs`, as in `--set train.steps=1000`")),
        }
    }

    /// The recipe with everything that was resolved written into it: sizes, classes, steps.
    pub fn resolved(&self, classes_of_data: usize, data_size: usize) -> Result<Recipe> {
        let config = self.model_config(classes_of_data)?;
        self.check_class_weights(config.classes)?;
        let mut recipe = self.clone();
        recipe.train.steps = Some(self.steps(data_size)?);
        recipe.train.epochs = None;
        recipe.train.checkpoint_every.get_or_insert(self.train.eval_every);
        recipe.augment = recipe.augment.effective();
        recipe.model = ModelSection { variant: recipe.model.variant, ..ModelSection::from(&config) };
        Ok(recipe.in_chunks())
    }

    /// The recipe with what `train.reduce_chunks` decides, if it is set: a chunk is a micro-batch, and samples
    /// are mixed within chunks, so that no rank needs another's.
    pub(crate) fn in_chunks(mut self) -> Self {
        if let Some(chunks) = self.train.reduce_chunks {
            let samples = self.train.batch / chunks;
            self.train.micro_batch = MicroBatch::Samples(samples);
            if self.augment.mixes() && self.augment.mix_group == 0 {
                self.augment.mix_group = samples;
            }
        }
        self
    }

    /// Refuses settings that cannot be trained, and names the key. Settings that depend on the data (classes,
    /// epochs) are checked when the data is known.
    pub fn validate(&self) -> Result<()> {
        // A weights file may give the rest.
        if self.finetune.is_none() {
            self.model.config(self.model.classes.unwrap_or(1))?.validate()?;
        }
        if self.finetune.is_none() && self.weights.is_some() {
            return Err(Error::usage(
                "`weights` says how to read a weights file, but the run does not start from one",
            )
            .hint("leave it out, or use `vitrum finetune`"));
        }
        if let Some(classes) = self.model.classes {
            self.check_class_weights(classes)?;
        }
        self.steps(1)?;
        self.validate_settings()
    }

    /// Refuses a list of `loss.class_weights` that does not have one number for each of `classes`.
    pub fn check_class_weights(&self, classes: usize) -> Result<()> {
        match &self.loss.class_weights {
            ClassWeights::Given(weights) if weights.len() != classes => Err(Error::usage(format!(
                "`loss.class_weights` has {} numbers, and there are {classes} classes",
                weights.len()
            ))
            .hint(format!("give {classes} numbers, one for each class in their order"))),
            _ => Ok(()),
        }
    }

    /// Everything but the model and the length of the run.
    pub(super) fn validate_settings(&self) -> Result<()> {
        if let Some(mean) = self.data.mean.filter(|mean| mean.iter().any(|m| !(-1.0..=2.0).contains(m))) {
            return Err(Error::usage(format!("`data.mean` is {mean:?}, and pixels go from 0 to 1"))
                .hint("divide by 255, as in `--set data.mean=[0.485,0.456,0.406]`"));
        }
        if let Some(std) = self.data.std.filter(|std| std.iter().any(|s| !(*s > 0.0 && s.is_finite()))) {
            return Err(Error::usage(format!("`data.std` is {std:?}"))
                .hint("give numbers above 0, as in `--set data.std=[0.229,0.224,0.225]`"));
        }
        self.check_train()?;
        self.check_loss()?;
        self.check_data_and_augment()?;
        self.check_optim()
    }

    fn check_train(&self) -> Result<()> {
        let t = &self.train;
        if t.batch == 0 || t.batch > MOST_BATCH {
            return Err(Error::usage(format!("`train.batch` is {}", t.batch))
                .hint(format!("use 1 to {MOST_BATCH}, as in `--set train.batch=128`")));
        }
        if let MicroBatch::Samples(micro_batch @ 1..) = t.micro_batch
            && !t.batch.is_multiple_of(micro_batch)
        {
            let fits = (1..=micro_batch).rev().find(|m| t.batch.is_multiple_of(*m)).unwrap_or(1);
            return Err(Error::usage(format!(
                "`train.micro_batch` is {micro_batch}, which does not divide `train.batch` {}",
                t.batch
            ))
            .hint(format!("use `--set train.micro_batch={fits}`, or 0 for the whole batch")));
        }
        if let Some(chunks) = t.reduce_chunks {
            let (batch, divides) = (t.batch, chunks > 0 && t.batch.is_multiple_of(chunks));
            if !chunks.is_power_of_two() || !divides {
                let fits = 1usize << batch.trailing_zeros().min(chunks.max(1).ilog2());
                return Err(Error::usage(format!(
                    "`train.reduce_chunks` is {chunks}, which is not a power of two that divides `train.batch` {batch}"
                ))
                .hint(format!("use `--set train.reduce_chunks={fits}`")));
            }
            let of_chunk = batch / chunks;
            if let MicroBatch::Samples(micro_batch @ 1..) = t.micro_batch
                && micro_batch != of_chunk
            {
                return Err(Error::usage(format!(
                    "`train.micro_batch` is {micro_batch}, but each of the {chunks} chunks of `train.reduce_chunks` is a \
                     micro-batch of {of_chunk} samples"
                ))
                .hint("leave it out, or use `--set train.micro_batch=0`"));
            }
        }
        let counts = [
            ("train.steps", t.steps),
            ("train.log_every", Some(t.log_every)),
            ("train.eval_every", Some(t.eval_every)),
            ("train.checkpoint_every", t.checkpoint_every),
            ("train.keep", Some(t.keep as u64)),
            ("train.max_skipped", Some(t.max_skipped)),
        ];
        if let Some((key, _)) = counts.into_iter().find(|(_, count)| *count == Some(0)) {
            return Err(Error::usage(format!("`{key}` is 0")).hint("use a number from 1 up"));
        }
        if let Some(epochs) = t.epochs {
            within("train.epochs", epochs, f64::MIN_POSITIVE, 1e9)?;
        }
        within("train.spike_score", t.spike_score, 0.0, f64::MAX)?;
        within("train.spike_window", t.spike_window as f64, 4.0, 100_000.0)?;
        within("train.timeout", t.timeout.unwrap_or(1.0), 0.1, 1e9)?;
        within("train.threads", t.threads as f64, 0.0, 4096.0)?;
        within("train.min_delta", t.min_delta, 0.0, f64::MAX)
    }

    fn check_loss(&self) -> Result<()> {
        match &self.loss.class_weights {
            ClassWeights::None => Ok(()),
            ClassWeights::Balanced if self.data.balance => Err(Error::usage(
                "`loss.class_weights = \"balanced\"` and `data.balance = true` would correct for rare classes twice",
            )
            .hint("use one of them: `--set data.balance=false`, or `--set loss.class_weights=none`")),
            ClassWeights::Balanced => Ok(()),
            ClassWeights::Given(weights) => {
                // The loss uses them in f32.
                let is_weight = |w: &f64| (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(w);
                match weights.iter().position(|w| !is_weight(w)) {
                    None => Ok(()),
                    Some(index) => {
                        Err(Error::usage(format!("`loss.class_weights[{index}]` is {}", weights[index]))
                            .hint("a weight is a finite number above 0, as in `--set loss.class_weights=[1,2,0.5]`"))
                    }
                }
            }
        }
    }

    fn check_data_and_augment(&self) -> Result<()> {
        let (d, a) = (&self.data, &self.augment);
        within("data.workers", d.workers as f64, 0.0, 4096.0)?;
        within("data.holdout", d.holdout.unwrap_or(0.0), 0.0, 0.9)?;
        within("data.slots", d.slots as f64, 2.0, 64.0)?;
        within("augment.pad", a.pad as f64, 0.0, 4096.0)?;
        let (least, most) = a.area;
        if !(least > 0.0 && least <= most && most <= 1.0) {
            return Err(Error::usage(format!("`augment.area` is [{least}, {most}]")).hint(
                "give the smallest and the largest share of the picture, as in `--set augment.area=[0.05,1.0]`",
            ));
        }
        for (key, value) in [
            ("augment.brightness", a.brightness),
            ("augment.contrast", a.contrast),
            ("augment.saturation", a.saturation),
            ("augment.hue", a.hue),
            ("augment.mix_prob", a.mix_prob),
            ("augment.mix_switch", a.mix_switch),
            ("augment.color_jitter", a.color_jitter),
            ("augment.erase", a.erase),
            ("eval.crop_ratio", self.eval.crop_ratio),
            ("loss.label_smoothing", self.loss.label_smoothing),
        ] {
            within(key, value.into(), 0.0, 1.0)?;
        }
        if self.eval.crop_ratio == 0.0 {
            return Err(Error::usage("`eval.crop_ratio` is 0").hint("use a share above 0, as in 0.875"));
        }
        within("augment.mixup", a.mixup, 0.0, 1e6)?;
        within("augment.cutmix", a.cutmix, 0.0, 1e6)?;
        within("augment.resize", a.resize as f64, 0.0, LIMITS[3].1 as f64)?;
        let least = self.model.image.height.max(self.model.image.width);
        if a.resize > 0 && a.resize < least {
            return Err(Error::usage(format!("`augment.resize` is {}, less than `model.image`", a.resize))
                .hint(format!("use {least} or more")));
        }
        a.check()
    }

    fn check_optim(&self) -> Result<()> {
        let (o, s) = (&self.optim, &self.schedule);
        for (key, value) in [
            ("optim.lr", o.lr),
            ("optim.weight_decay", o.weight_decay),
            ("optim.clip", o.clip.into()),
            ("optim.clip_rms", o.clip_rms),
            ("optim.backbone_lr_mult", o.backbone_lr_mult),
            ("optim.layer_decay", o.layer_decay),
            ("schedule.end", s.end),
            ("schedule.power", s.power),
            ("schedule.warmup_lr", s.warmup_lr),
            ("schedule.min_lr", s.min_lr),
        ] {
            within(key, value, 0.0, f64::MAX)?;
        }
        for (key, value) in
            [("optim.eps", o.eps), ("optim.decay_power", o.decay_power), ("schedule.timescale", s.timescale)]
        {
            within(key, value, f64::MIN_POSITIVE, f64::MAX)?;
        }
        for (key, value) in [
            ("optim.momentum", o.momentum),
            ("optim.beta1", o.beta1),
            ("optim.beta2", o.beta2),
            ("optim.beta2_cap", o.beta2_cap),
            ("optim.ema", o.ema),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::usage(format!("`{key}` is {value}")).hint("it lies in [0, 1)"));
            }
        }
        for (index, group) in o.groups.iter().enumerate() {
            let key = format!("optim.groups[{index}]");
            if let Err(e) = regex_lite::Regex::new(&group.pattern) {
                return Err(Error::usage(format!("`{key}.pattern` is not a regular expression: {e}"))
                    .hint("patterns match whole parameter names, as in `head[.].*`"));
            }
            within(&format!("{key}.lr_mult"), group.lr_mult.unwrap_or(1.0), 0.0, f64::MAX)?;
            within(&format!("{key}.decay_mult"), group.decay_mult.unwrap_or(1.0), 0.0, f64::MAX)?;
        }
        Ok(())
    }
}

/// The sizes in a `model` section; `None` for those that it omits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenSizes {
    /// D
    pub width: Option<usize>,
    /// L
    pub depth: Option<usize>,
    /// H
    pub heads: Option<usize>,
    /// M
    pub mlp: Option<usize>,
    /// (height, width)
    pub patch: Option<(usize, usize)>,
}

impl ModelSection {
    /// From the recipe, else from the data; an error if both are given and differ.
    fn classes(&self, of_data: usize) -> Result<usize> {
        match (self.classes, of_data) {
            (Some(classes), 0) => Ok(classes),
            (Some(classes), n) if classes == n => Ok(classes),
            (Some(classes), n) => Err(Error::new(format!(
                "`model.classes` is {classes}, but the training data has {n} classes"
            ))
            .hint(format!("remove `model.classes` or use `--set model.classes={n}`"))),
            (None, 0) => {
                Err(Error::usage("`model.classes` is not set and no data set says how many there are")
                    .hint("use `--set model.classes=1000` or `--set data.train=DIR`"))
            }
            (None, n) => Ok(n),
        }
    }

    /// The sizes that the section gives, by a variant or by single keys.
    pub fn sizes(&self) -> Result<GivenSizes> {
        let variant = self.variant.as_deref().map(Variant::parse).transpose()?;
        let of_variant = |f: fn(&Variant) -> usize| variant.as_ref().map(|(v, _)| f(v));
        Ok(GivenSizes {
            width: self.width.or(of_variant(|v| v.width)),
            depth: self.depth.or(of_variant(|v| v.depth)),
            heads: self.heads.or(of_variant(|v| v.heads)),
            // A different width makes another model, so the variant's mlp does not apply.
            mlp: self.mlp.or(of_variant(|v| v.mlp).filter(|_| self.width.is_none())),
            patch: self.patch.map(|p| (p.height, p.width)).or(variant.map(|(_, p)| (p, p))),
        })
    }

    /// The model of a weights file. Regularisation and initialisation keep the settings here: files do not
    /// say how to train the model further.
    pub fn of_file(&self, file: &ModelConfig) -> Self {
        Self {
            variant: self.variant.clone(),
            classes: self.classes.or(Some(file.classes)),
            dropout: self.dropout,
            attention_dropout: self.attention_dropout,
            drop_path: self.drop_path,
            drop_path_mode: self.drop_path_mode,
            init: self.init,
            head_bias: self.head_bias,
            ..Self::from(file)
        }
    }

    /// The variant's sizes, overridden by single keys.
    fn config(&self, classes: usize) -> Result<ModelConfig> {
        let missing = |key: &str| {
            Error::usage(format!("the model has no `model.{key}`"))
                .hint(format!("set `model.variant`, as in `\"S/16\"`, or `model.{key}` itself"))
        };
        let GivenSizes { width, depth, heads, mlp, patch } = self.sizes()?;
        let width = width.ok_or_else(|| missing("width"))?;
        let depth = depth.ok_or_else(|| missing("depth"))?;
        let heads = heads.ok_or_else(|| missing("heads"))?;
        let patch = patch.ok_or_else(|| missing("patch"))?;
        let image = (self.image.height, self.image.width);
        let sizes = [width, depth, mlp.unwrap_or(0), image.0.max(image.1)];
        for ((key, most), size) in LIMITS.into_iter().zip(sizes) {
            within(&format!("model.{key}"), size as f64, 0.0, most as f64)?;
        }
        within("model.classes", classes as f64, 0.0, MOST_CLASSES as f64)?;
        within("model.rep_size", self.rep_size as f64, 0.0, LIMITS[2].1 as f64)?;
        within("model.head_bias", self.head_bias.into(), -1e6, 1e6)?;
        let has_class = matches!(self.pool, PoolKind::Token | PoolKind::TokenGap);
        let extra_tokens = self.extra_tokens.unwrap_or(has_class.into());
        within("model.registers", self.registers as f64, 0.0, MOST_REGISTERS as f64)?;
        Ok(ModelConfig {
            image,
            patch,
            width,
            depth,
            heads,
            mlp: mlp.unwrap_or(4 * width),
            mlp_kind: self.mlp_kind,
            mlp_norm: self.mlp_norm,
            qkv_bias: self.qkv_bias,
            classes,
            pool: self.pool,
            norm: self.norm,
            map_heads: self.map_heads,
            map_tokens: self.map_tokens,
            extra_tokens,
            registers: self.registers,
            posemb: self.posemb,
            posemb_join: self.posemb_join,
            rope: self.rope,
            rope_theta: self.rope_theta,
            rope_ref: self.rope_ref.map(|grid| (grid.height, grid.width)),
            rope_offset: self.rope_offset,
            rope_indexing: self.rope_indexing,
            patch_bias: self.patch_bias,
            norm_pre: self.norm_pre,
            rep_size: self.rep_size,
            layer_scale: self.layer_scale,
            gelu: self.gelu,
            ln_eps: self.ln_eps,
            dropout: self.dropout,
            attention_dropout: self.attention_dropout,
            drop_path: self.drop_path,
            drop_path_mode: self.drop_path_mode,
            init: self.init,
            head_bias: self.head_bias,
        })
    }
}

impl From<&ModelConfig> for ModelSection {
    /// Every key with its value: the inverse of [`Recipe::model_config`].
    fn from(config: &ModelConfig) -> Self {
        let size = |(height, width): (usize, usize)| Size { height, width };
        // No `..`, so that the compiler demands a line for each new setting of the model.
        let ModelConfig {
            image,
            patch,
            width,
            depth,
            heads,
            mlp,
            mlp_kind,
            mlp_norm,
            qkv_bias,
            classes,
            pool,
            norm,
            map_heads,
            map_tokens,
            extra_tokens,
            registers,
            posemb,
            posemb_join,
            rope,
            rope_theta,
            rope_ref,
            rope_offset,
            rope_indexing,
            patch_bias,
            norm_pre,
            rep_size,
            layer_scale,
            gelu,
            ln_eps,
            dropout,
            attention_dropout,
            drop_path,
            drop_path_mode,
            init,
            head_bias,
        } = *config;
        Self {
            variant: None,
            image: size(image),
            patch: Some(size(patch)),
            width: Some(width),
            depth: Some(depth),
            heads: Some(heads),
            mlp: Some(mlp),
            mlp_kind,
            mlp_norm,
            qkv_bias,
            classes: Some(classes),
            pool,
            norm,
            map_heads,
            map_tokens,
            extra_tokens: Some(extra_tokens),
            registers,
            posemb,
            posemb_join,
            rope,
            rope_theta,
            rope_ref: rope_ref.map(size),
            rope_offset,
            rope_indexing,
            patch_bias,
            norm_pre,
            rep_size,
            layer_scale,
            gelu,
            ln_eps,
            dropout,
            attention_dropout,
            drop_path,
            drop_path_mode,
            init,
            head_bias,
        }
    }
}

/// NaN is outside every range.
fn within(key: &str, value: f64, least: f64, most: f64) -> Result<()> {
    if (least..=most).contains(&value) && value.is_finite() {
        return Ok(());
    }
    let hint = match (least == f64::MIN_POSITIVE, most == f64::MAX) {
        (true, _) => "use a number above 0".to_string(),
        (false, true) => format!("use a finite number from {least} up"),
        (false, false) => format!("use a number from {least} to {most}"),
    };
    // A value from an f32 is shown as the user wrote it: 1.2, not 1.2000000476837158.
    let short = value as f32;
    let shown = if f64::from(short) == value { short.to_string() } else { value.to_string() };
    Err(Error::usage(format!("`{key}` is {shown}")).hint(hint))
}
