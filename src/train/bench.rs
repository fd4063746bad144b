//! How fast a model trains or infers: medians over rounds, on synthetic batches or through the loader.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::backend::timed::Timed;
use crate::backend::{self, Backend, Device, Micro, Pixels, Slot, SlotLayout, StepKeys, TargetKind};
use crate::data::{self, Dataset, Loader, LoaderSpec, Split};
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::recipe::{OnBadRecord, Recipe};
use crate::report::format;
use crate::rng::{Domain, Stream};
use crate::vit::{Mode, Vit};

use super::{Trainer, build, run};

/// What to time, and how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Forward, backward, clip and update; else forward only.
    pub train: bool,
    pub device: Device,
    /// Rounds of at least `seconds` and at least two steps; their median is reported.
    pub rounds: usize,
    pub seconds: f64,
    /// Time every operation, too.
    pub profile: bool,
    /// Real pictures through the loader, instead of one synthetic batch.
    pub data: Option<String>,
}

/// One measurement.
pub struct Measured {
    pub device: String,
    pub model: String,
    pub batch: usize,
    pub params: usize,
    pub gelu: String,
    pub ms_per_step: f64,
    pub best_ms: f64,
    pub img_per_s: f64,
    /// Matrix products only; training counts three forward passes. Of the whole model, as others count it.
    pub gflops: f64,
    /// The operations that are done: fewer where the last block works out the class token only.
    pub gflops_done: f64,
    /// Says so.
    pub last_block: Option<String>,
    /// Share of the time in which the step waited for the loader.
    pub data_wait: Option<f64>,
    pub arena_bytes: usize,
    /// `VmHWM`: the most memory the process ever held, as `ru_maxrss` has it.
    pub peak_rss_bytes: Option<u64>,
    /// (operation, calls, seconds) over all rounds.
    pub profile: Vec<(&'static str, usize, f64)>,
    pub steps: usize,
}

/// Times the recipe's model.
pub fn run(recipe: &Recipe, name: &str, options: &Options) -> Result<Measured> {
    let timed = Timed::new(backend::select(options.device, &build::device_options(recipe))?);
    let times = timed.times();
    let backend: Box<dyn Backend> = if options.profile { Box::new(timed) } else { timed.into_inner() };
    let mut subject = Subject::new(recipe, backend, options)?;
    let mut source = Source::new(recipe, &subject, options)?;

    for _ in 0..3 {
        subject.step(&mut source)?;
    }
    times.reset();
    let waited_before = source.waited();
    let (mut rounds, mut steps, start) = (Vec::new(), 0, Instant::now());
    for _ in 0..options.rounds {
        let (begin, mut n) = (Instant::now(), 0);
        while n < 2 || begin.elapsed().as_secs_f64() < options.seconds {
            subject.step(&mut source)?;
            n += 1;
        }
        rounds.push(begin.elapsed().as_secs_f64() / n as f64);
        steps += n;
    }
    let total = start.elapsed().as_secs_f64();
    rounds.sort_by(f64::total_cmp);
    let median = rounds[rounds.len() / 2];
    let model = subject.model();
    let (batch, config) = (recipe.train.batch, &model.config);
    let flops = if options.train { config.train_flops() } else { 2 * config.forward_macs() };
    let rate = |flops: u64| flops as f64 * batch as f64 / median / 1e9;
    Ok(Measured {
        device: subject.backend().describe(),
        model: name.into(),
        batch,
        params: model.layout.count(),
        gelu: format!("{:?}", config.gelu).to_lowercase(),
        ms_per_step: median * 1e3,
        best_ms: rounds[0] * 1e3,
        img_per_s: batch as f64 / median,
        gflops: rate(flops),
        gflops_done: rate(model.flops_done(options.train)),
        last_block: run::last_block_line(model),
        data_wait: options.data.is_some().then(|| (source.waited() - waited_before) / total),
        arena_bytes: subject.backend().allocated_bytes(),
        peak_rss_bytes: peak_rss(),
        profile: if options.profile { times.report() } else { Vec::new() },
        steps,
    })
}

/// What is timed.
enum Subject {
    Train(Box<Trainer>),
    Infer { backend: Box<dyn Backend>, model: Box<Vit> },
}

impl Subject {
    fn new(recipe: &Recipe, mut backend: Box<dyn Backend>, options: &Options) -> Result<Self> {
        if options.train {
            let model = build::model(recipe, Mode::Train, backend.storage())?;
            let optimizer = build::optimizer(recipe, &model, recipe.train.batch)?;
            let collective = Collective::from_env()?;
            let trainer = Trainer::new(backend, model, optimizer, collective, build::options(recipe))?;
            return Ok(Self::Train(Box::new(trainer)));
        }
        let model = build::model(recipe, Mode::Infer, backend.storage())?;
        backend.allocate(&model.plan())?;
        model.init(&mut *backend, recipe.train.seed)?;
        Ok(Self::Infer { backend, model: Box::new(model) })
    }

    fn backend(&self) -> &dyn Backend {
        match self {
            Self::Train(trainer) => &*trainer.backend,
            Self::Infer { backend, .. } => &**backend,
        }
    }

    fn model(&self) -> &Vit {
        match self {
            Self::Train(trainer) => &trainer.model,
            Self::Infer { model, .. } => model,
        }
    }

    fn step(&mut self, source: &mut Source) -> Result<()> {
        let batch = source.next()?;
        let free = match self {
            Self::Train(trainer) => {
                let (free, report) = trainer.step(batch)?;
                if !report.loss.is_finite() {
                    return Err(Error::new("the loss of the benchmark is not finite"));
                }
                free
            }
            Self::Infer { backend, model } => {
                let free = backend.bind_batch(batch)?;
                backend.begin_step(StepKeys { seed: 0, step: 0 })?;
                let mut pass = |b: &mut dyn Backend| {
                    b.begin_micro(Micro::whole(model.micro_batch))?;
                    model.forward(b, false)
                };
                backend.step(&mut pass, None)?;
                backend.synchronize()?;
                free
            }
        };
        free.into_iter().for_each(|slot| source.recycle(slot));
        Ok(())
    }
}

/// Where batches come from.
enum Source {
    /// Two slots with the same random pixels and labels.
    Synthetic(Vec<Slot>),
    Loader(Box<Loader>),
}

impl Source {
    fn new(recipe: &Recipe, subject: &Subject, options: &Options) -> Result<Self> {
        let config = &subject.model().config;
        let layout = SlotLayout {
            samples: recipe.train.batch,
            image: config.image,
            pixels: Pixels::U8,
            targets: TargetKind::Labels,
        };
        let mut slots = Vec::new();
        for _ in 0..recipe.data.slots {
            slots.push(subject.backend().new_slot(layout)?);
        }
        let Some(spec) = &options.data else {
            for slot in &mut slots {
                let mut draws = Stream::new(0, Domain::Demo, u64::MAX, 0);
                slot.images_u8_mut().iter_mut().for_each(|p| *p = draws.next_u32() as u8);
                slot.labels_mut().iter_mut().for_each(|l| *l = draws.below(config.classes) as i32);
            }
            return Ok(Self::Synthetic(slots));
        };
        let dataset = Dataset::open(spec, Split::Train)?;
        let spec = LoaderSpec {
            batch: recipe.train.batch,
            image: config.image,
            mode: data::Mode::Train { augment: recipe.augment.clone(), seed: recipe.train.seed },
            start_batch: 0,
            workers: recipe.data.workers,
            on_bad_record: OnBadRecord::Skip,
        };
        Ok(Self::Loader(Box::new(Loader::new(Arc::new(dataset), spec, slots))))
    }

    fn next(&mut self) -> Result<Slot> {
        match self {
            Self::Synthetic(slots) => Ok(slots.pop().expect("a step gives back the slot before it")),
            Self::Loader(loader) => loader.next()?.ok_or_else(|| Error::new("the data loader ended")),
        }
    }

    fn recycle(&mut self, slot: Slot) {
        match self {
            Self::Synthetic(slots) => slots.push(slot),
            Self::Loader(loader) => loader.recycle(slot),
        }
    }

    fn waited(&self) -> f64 {
        match self {
            Self::Synthetic(_) => 0.0,
            Self::Loader(loader) => loader.wait_seconds(),
        }
    }
}

impl Measured {
    pub fn text(&self) -> String {
        let mut lines = vec![
            format!("{}, GELU {}", self.device, self.gelu),
            format!(
                "{}   batch {}   {:.1} img/s   {:.1} ms/step (best {:.1})   {:.1} GFLOP/s",
                self.model, self.batch, self.img_per_s, self.ms_per_step, self.best_ms, self.gflops
            ),
        ];
        if let Some(line) = &self.last_block {
            lines.push(format!("{line}: {:.1} GFLOP/s done", self.gflops_done));
        }
        let peak = self.peak_rss_bytes.map_or("unknown".into(), format::bytes);
        lines.push(format!("memory: {} planned, {peak} at the peak", format::bytes(self.arena_bytes as u64)));
        if let Some(wait) = self.data_wait {
            lines.push(format!("data wait {}", format::percent(wait)));
        }
        let total: f64 = self.profile.iter().map(|(_, _, s)| s).sum();
        for (operation, calls, seconds) in &self.profile {
            lines.push(format!(
                "  {operation:<28} {:>8.2} ms/step {:>6.1} %   {:>4} calls",
                seconds / self.steps as f64 * 1e3,
                100.0 * seconds / total,
                calls / self.steps
            ));
        }
        lines.join("\n")
    }

    pub fn json(&self) -> Value {
        let operation = |(name, calls, seconds): &(&str, usize, f64)| json!({"operation": name, "calls": calls, "ms_per_step": seconds / self.steps as f64 * 1e3});
        json!({
            "engine": concat!("vitrum ", env!("CARGO_PKG_VERSION")),
            "device": self.device,
            "model": self.model,
            "batch": self.batch,
            "params": self.params,
            "gelu": self.gelu,
            "ms_per_step": self.ms_per_step,
            "best_ms_per_step": self.best_ms,
            "img_per_s": self.img_per_s,
            "gflops": self.gflops,
            "gflops_done": self.gflops_done,
            "last_block": if self.last_block.is_some() { "class token" } else { "whole" },
            "data_wait": self.data_wait,
            "arena_bytes": self.arena_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "profile": self.profile.iter().map(operation).collect::<Vec<_>>(),
        })
    }
}

fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
