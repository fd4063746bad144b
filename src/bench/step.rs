//! Benchmark of training and inference: medians over rounds, on synthetic batches or through the loader.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::backend::cuda::Cuda;
use crate::backend::timed::{Timed, Timing};
use crate::backend::{
    self, Backend, Choice, Cost, Device, Micro, Pixels, Precision, Slot, SlotLayout, StepKeys, TargetKind,
};
use crate::data::{self, Dataset, Delivery, Loader, LoaderSpec, Split};
use crate::dist::{Collective, Joining};
use crate::error::{Error, Result};
use crate::recipe::{MicroBatch, OnBadRecord, Recipe};
use crate::report::format;
use crate::rng::{Domain, Stream};
use crate::vit::{Mode, Vit};

use super::kernels::{self, Ceilings};
use crate::train::scaling::Row;
use crate::train::{DataShape, Setup, Trainer, header, setup};

/// What to time and for how long.
#[derive(Clone, Debug)]
pub struct StepBench {
    /// Time forward, backward, clip and update. If false, forward only.
    pub train: bool,
    pub device: Device,
    /// Rounds of at least `seconds` and at least two steps; their median is reported.
    pub rounds: usize,
    pub seconds: f64,
    /// Also time every operation.
    pub profile: bool,
    /// A data set to load pictures from, instead of synthetic batches.
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
    /// GFLOP/s of the whole model, matrix products only, as is usual; training counts as three forward
    /// passes.
    pub gflops: f64,
    /// GFLOP/s of the operations that were computed: fewer if the last block computes only the class token.
    pub gflops_done: f64,
    /// The line about a pruned last block.
    pub last_block: Option<String>,
    /// Share of the time that steps waited for the loader.
    pub data_wait: Option<f64>,
    pub arena_bytes: usize,
    /// Seconds from the start of the process to the end of the first step.
    pub first_step: Option<f64>,
    pub on_gpu: Option<OnGpu>,
    /// `VmHWM`: the process's peak memory, the same as `ru_maxrss`.
    pub peak_rss_bytes: Option<u64>,
    /// The chosen way of each product and its epilogue, if the device timed several.
    pub products: Vec<Choice>,
    /// Times of operations, over all rounds.
    pub profile: Vec<Timing>,
    pub steps: usize,
    /// The ranks that shared the step.
    pub ranks: usize,
    /// What several ranks gain, in the words of `vitrum plan --gpus`.
    pub row: Option<Row>,
}

/// Measurements that exist only on a GPU.
pub struct OnGpu {
    pub stand_in: bool,
    /// Bytes in use after the last step, by all programs. A run allocates before its first steps and never
    /// after.
    pub memory_bytes: usize,
    /// Dense bf16 FLOP/s of the data sheet; `None` for an unknown GPU.
    pub data_sheet: Option<f64>,
    /// Measured after the steps.
    pub ceilings: Ceilings,
}

/// Dense bf16 FLOP/s of NVIDIA's data sheets, by words in the GPU's name. The first match wins.
const DATA_SHEETS: [(&[&str], f64); 17] = [
    (&["H100", "PCIe"], 756e12),
    (&["H100", "NVL"], 835e12),
    (&["H100"], 989e12),
    (&["H200", "NVL"], 835e12),
    (&["H200"], 989e12),
    (&["GH200"], 989e12),
    (&["B200"], 2250e12),
    (&["GB200"], 2500e12),
    (&["A100"], 312e12),
    (&["A800"], 312e12),
    (&["A30"], 165e12),
    (&["A10"], 125e12),
    (&["L40S"], 362e12),
    (&["L40"], 181e12),
    (&["L4"], 121e12),
    (&["4090"], 165e12),
    (&["3090"], 71e12),
];

fn data_sheet(device: &str) -> Option<f64> {
    let words: Vec<&str> = device.split(|c: char| !c.is_alphanumeric()).collect();
    let fits = |wanted: &&[&str]| wanted.iter().all(|word| words.contains(word));
    DATA_SHEETS.iter().find(|(wanted, _)| fits(wanted)).map(|(_, flops)| *flops)
}

/// Times the recipe's model. Of several ranks, only the first gets the result.
///
/// # Errors
/// The device or the ranks cannot be had, the recipe does not fit them, or a step fails.
pub fn run(recipe: &Recipe, name: &str, options: &StepBench) -> Result<Option<Measured>> {
    let (group, device) = match options.train {
        true => Collective::join(&Joining {
            device: options.device,
            // A benchmark has no directory: ranks on GPUs meet in the one that they were started in.
            out: Some(Path::new(".")),
            deterministic: recipe.train.deterministic,
        })?,
        false => (Collective::ALONE, options.device),
    };
    let device_options = backend::DeviceOptions {
        threads: group.threads(recipe.train.threads),
        ..setup::device_options(recipe)
    };
    let timed = Timed::new(backend::select(device, &device_options)?);
    let times = timed.times();
    let backend: Box<dyn Backend> = if options.profile { Box::new(timed) } else { timed.into_inner() };
    let (mut subject, recipe) = Subject::new(recipe, backend, options, &group)?;
    let mut source = Source::new(&recipe, &subject, options, &group)?;
    let Rounds { seconds, steps, data_wait, first_step } =
        time(&mut subject, &mut source, options, &group, || times.reset())?;
    let median = slowest(&group, seconds[seconds.len() / 2])?;
    let model = subject.model();
    let (batch, config) = (recipe.train.batch, &model.config);
    let flops = if options.train { config.train_flops() } else { 2 * config.forward_macs() };
    let rate = |flops: u64| flops as f64 * batch as f64 / median / 1e9;
    let device = subject.backend().describe();
    let memory_bytes =
        if subject.backend().storage().has_device_memory() { Some(Cuda::used_memory()?) } else { None };
    let mut measured = Measured {
        device,
        model: name.into(),
        batch,
        params: model.layout.count(),
        gelu: format!("{:?}", config.gelu).to_lowercase(),
        ms_per_step: median * 1e3,
        best_ms: seconds[0] * 1e3,
        img_per_s: batch as f64 / median,
        gflops: rate(flops),
        gflops_done: rate(model.flops_done(options.train)),
        last_block: header::last_block_line(model),
        data_wait: options.data.is_some().then_some(data_wait),
        arena_bytes: subject.backend().allocated_bytes(),
        first_step,
        on_gpu: None,
        peak_rss_bytes: peak_rss(),
        products: subject.backend().choices(),
        profile: if options.profile { times.report() } else { Vec::new() },
        steps,
        ranks: group.size,
        row: None,
    };
    drop((source, subject));
    if group.size > 1 {
        let alone = alone(&recipe, options, &device_options, &group)?;
        measured.row = Some(measured.row_of(alone, &group)?);
        group.leave()?;
    } else if let Some(memory_bytes) = memory_bytes {
        measured.on_gpu = Some(on_gpu(options.device, &measured.device, memory_bytes)?);
    }
    Ok(group.is_first().then_some(measured))
}

/// What was timed.
struct Rounds {
    /// Seconds per step of each round, in ascending order.
    seconds: Vec<f64>,
    steps: usize,
    /// Share of the time that steps waited for the loader.
    data_wait: f64,
    /// Seconds from the start of the process to the end of the first step.
    first_step: Option<f64>,
}

/// Warms up, calls `begin`, and times the rounds. Ranks that step together make equally many steps.
fn time(
    subject: &mut Subject,
    source: &mut Source,
    options: &StepBench,
    group: &Collective,
    begin: impl FnOnce(),
) -> Result<Rounds> {
    subject.step(source)?;
    subject.wait()?;
    let first_step = since_start();
    let warm = Instant::now();
    for _ in 0..2 {
        subject.step(source)?;
    }
    subject.wait()?;
    let each = slowest(group, warm.elapsed().as_secs_f64() / 2.0)?;
    let agreed = (group.size > 1).then(|| ((options.seconds / each).ceil() as usize).max(2));
    begin();
    let waited_before = source.waited();
    let (mut seconds, mut steps, start) = (Vec::new(), 0, Instant::now());
    for _ in 0..options.rounds {
        let (begin, mut n) = (Instant::now(), 0);
        let is_done = |n: usize| match agreed {
            Some(steps) => n == steps,
            None => n >= 2 && begin.elapsed().as_secs_f64() >= options.seconds,
        };
        while !is_done(n) {
            subject.step(source)?;
            n += 1;
        }
        seconds.push(begin.elapsed().as_secs_f64() / n as f64);
        steps += n;
    }
    let total = start.elapsed().as_secs_f64();
    seconds.sort_by(f64::total_cmp);
    Ok(Rounds { seconds, steps, data_wait: (source.waited() - waited_before) / total, first_step })
}

/// The longest of the ranks' times in seconds: a step ends with its slowest rank.
fn slowest(group: &Collective, seconds: f64) -> Result<f64> {
    let all = group.gather_number(nanoseconds(seconds))?;
    Ok(all.into_iter().max().map_or(seconds, |longest| longest as f64 / 1e9))
}

fn nanoseconds(seconds: f64) -> u64 {
    (1e9 * seconds) as u64
}

/// Seconds of a step that each rank makes by itself with its part of the batch, all at the same time: the mean
/// over the ranks.
fn alone(
    recipe: &Recipe,
    options: &StepBench,
    device: &backend::DeviceOptions,
    group: &Collective,
) -> Result<f64> {
    let mut recipe = recipe.clone();
    recipe.train.batch /= group.size;
    recipe.train.reduce_chunks = None;
    let backend = backend::select(options.device, device)?;
    let (mut subject, recipe) = Subject::new(&recipe, backend, options, &Collective::ALONE)?;
    let mut source = Source::new(&recipe, &subject, options, &Collective::ALONE)?;
    group.barrier()?;
    let rounds = time(&mut subject, &mut source, options, &Collective::ALONE, || {})?;
    let median = rounds.seconds[rounds.seconds.len() / 2];
    let all = group.gather_number(nanoseconds(median))?;
    Ok(all.iter().sum::<u64>() as f64 / 1e9 / group.size as f64)
}

/// How many ranks run on this rank's machine.
fn ranks_here(group: &Collective) -> Result<usize> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let own = xxhash_rust::xxh3::xxh3_64(name.as_bytes());
    Ok(group.gather_number(own)?.into_iter().filter(|host| *host == own).count())
}

/// Measures the GPU's ceilings. The model must have been dropped.
fn on_gpu(on: Device, device: &str, memory_bytes: usize) -> Result<OnGpu> {
    let options = backend::DeviceOptions { precision: Precision::Bf16, ..backend::DeviceOptions::default() };
    let gpu = on.gpu().expect("a step was timed on a GPU");
    let mut cuda = Cuda::open(gpu, &options)?;
    Ok(OnGpu {
        stand_in: cuda.is_stand_in(),
        memory_bytes,
        data_sheet: data_sheet(device),
        ceilings: kernels::ceilings(&mut cuda)?,
    })
}

/// The object of the timing.
enum Subject {
    Train(Box<Trainer>),
    Infer { backend: Box<dyn Backend>, model: Box<Vit> },
}

impl Subject {
    /// The object of the timing, and the recipe as the device resolves it.
    fn new(
        recipe: &Recipe,
        mut backend: Box<dyn Backend>,
        options: &StepBench,
        group: &Collective,
    ) -> Result<(Self, Recipe)> {
        if options.train {
            let setup = Setup::on_rank(backend, recipe, DataShape::labels(recipe.train.batch), group)?;
            let recipe = setup.recipe.clone();
            let trainer = Trainer::new(setup, *group, None)?;
            return Ok((Self::Train(Box::new(trainer)), recipe));
        }
        // In inference, a pass takes a whole batch: there are no gradients to accumulate.
        let mut whole = recipe.clone();
        whole.train.micro_batch = MicroBatch::Samples(recipe.train.batch);
        let model = setup::model(&whole, Mode::Infer, backend.storage())?;
        let mut plan = model.plan();
        plan.set_batch(setup::slot_layout(recipe, TargetKind::Labels));
        backend.allocate(&plan)?;
        model.init(&mut *backend, recipe.train.seed)?;
        Ok((Self::Infer { backend, model: Box::new(model) }, recipe.clone()))
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

    /// Waits until all submitted work has finished.
    fn wait(&mut self) -> Result<()> {
        match self {
            Self::Train(trainer) => trainer.backend.synchronize(),
            Self::Infer { backend, .. } => backend.synchronize(),
        }
    }

    fn step(&mut self, source: &mut Source) -> Result<()> {
        let batch = source.next()?;
        let free = match self {
            Self::Train(trainer) => {
                let free = trainer.submit(batch)?;
                // As in a run, the host is one step ahead of a GPU.
                while trainer.in_flight() > trainer.backend.steps_ahead() {
                    if !trainer.report()?.loss.is_finite() {
                        return Err(Error::new("the loss of the benchmark is not finite"));
                    }
                }
                free
            }
            Self::Infer { backend, model } => {
                // A batch is uploaded while the previous one is computed. Unlike in an evaluation, nothing is
                // downloaded.
                let free = backend.bind_batch(batch)?;
                backend.synchronize()?;
                backend.begin_step(StepKeys { seed: 0, step: 0 })?;
                let mut pass = |b: &mut dyn Backend| {
                    b.begin_micro(Micro::whole(model.micro_batch))?;
                    model.forward(b, false)
                };
                backend.step(&mut pass, None)?;
                free
            }
        };
        free.into_iter().for_each(|slot| source.recycle(slot));
        Ok(())
    }
}

/// The source of batches.
enum Source {
    /// Two slots with the same random pixels and labels.
    Synthetic(Vec<Slot>),
    Loader(Box<Loader>),
}

impl Source {
    fn new(recipe: &Recipe, subject: &Subject, options: &StepBench, group: &Collective) -> Result<Self> {
        let config = &subject.model().config;
        let batch = recipe.train.batch / group.size;
        let layout = SlotLayout {
            samples: batch,
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
            batch,
            image: config.image,
            mode: data::Mode::Train { augment: recipe.augment.clone(), seed: recipe.train.seed },
            start_batch: 0,
            workers: group.threads(recipe.data.workers),
            on_bad_record: OnBadRecord::Skip,
            exif: recipe.data.exif,
        };
        let delivery = Delivery { rank: group.rank, ranks: group.size, ..Delivery::default() };
        Ok(Self::Loader(Box::new(Loader::with(Arc::new(dataset), spec, delivery, slots))))
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
    /// This measurement of several ranks beside the time of the same step on a rank by itself.
    fn row_of(&self, alone: f64, group: &Collective) -> Result<Row> {
        let step = self.ms_per_step / 1e3;
        Ok(Row {
            ranks: group.size,
            batch: self.batch / group.size,
            step,
            hidden: None,
            exposed: (step - alone).max(0.0),
            memory: self.arena_bytes,
            per_node: ranks_here(group)?,
            efficiency: alone / step,
            to_train: None,
        })
    }

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
        if let Some(row) = &self.row {
            lines.push(format!("{} ranks, each also by itself with its part of the batch:", self.ranks));
            lines.push(Row::text(std::slice::from_ref(row)));
        }
        if let Some(seconds) = self.first_step {
            lines.push(format!("{seconds:.2} s from program start to the end of the first step"));
        }
        if let Some(gpu) = &self.on_gpu {
            lines.extend(self.gpu_lines(gpu));
        }
        if let Some(wait) = self.data_wait {
            lines.push(format!("data wait {}", format::percent(wait)));
        }
        if !self.products.is_empty() {
            lines.push("products with their epilogues: the chosen way, then the others".into());
            lines.extend(self.products.iter().map(choice_line));
        }
        let total: f64 = self.profile.iter().map(|timing| timing.seconds).sum();
        for timing in &self.profile {
            lines.push(format!(
                "  {:<28} {:>8.2} ms/step {:>6.1} %   {:>4} calls{}",
                timing.operation,
                timing.seconds / self.steps as f64 * 1e3,
                100.0 * timing.seconds / total,
                timing.calls / self.steps,
                self.achieved(timing)
            ));
        }
        lines.join("\n")
    }

    /// FLOP/s and bytes per second of an operation, from its minimum cost. On a GPU also the share of its
    /// time that the minimum cost would take at the GPU's ceilings.
    fn achieved(&self, timing: &Timing) -> String {
        let Timing { seconds, cost, .. } = timing;
        if *cost == Cost::default() {
            return String::new();
        }
        let flops = match cost.flops {
            0 => String::new(),
            flops => format!("{:.1} GFLOP/s", flops as f64 / seconds / 1e9),
        };
        let of_floor = self
            .floor(timing)
            .map_or(String::new(), |floor| format!("  floor {:>5.1} %", 100.0 * floor / seconds));
        format!(" {flops:>16} {:>8.1} GB/s{of_floor}", cost.bytes() as f64 / seconds / 1e9)
    }

    /// Seconds that the operation's calls would take at the rates of this GPU's large products and copies.
    fn floor(&self, timing: &Timing) -> Option<f64> {
        let gpu = self.on_gpu.as_ref()?;
        Some(timing.cost.floor(gpu.ceilings.matmul, gpu.ceilings.copy))
    }

    fn gpu_lines(&self, gpu: &OnGpu) -> Vec<String> {
        let share = |of: f64| format!("{:.1} % of {:.0} TFLOP/s", 100.0 * self.gflops * 1e9 / of, of / 1e12);
        let data_sheet = gpu.data_sheet.map_or("unknown for this GPU".into(), share);
        let mut lines = vec![
            format!(
                "FLOPs of the model: {data_sheet} (data sheet), {} (a large product on this GPU)",
                share(gpu.ceilings.matmul)
            ),
            format!(
                "GPU: {} in use, copy {:.0} GB/s",
                format::bytes(gpu.memory_bytes as u64),
                gpu.ceilings.copy / 1e9
            ),
        ];
        if gpu.stand_in {
            lines.push(
                "the stand-in GPU computes on the host: these times say nothing about a real GPU".into(),
            );
        }
        lines
    }

    pub fn json(&self) -> Value {
        let on_gpu = self.on_gpu.as_ref().map(|gpu| {
            json!({
                "stand_in": gpu.stand_in,
                "memory_bytes": gpu.memory_bytes,
                "data_sheet_flops_per_s": gpu.data_sheet,
                "mfu_data_sheet": gpu.data_sheet.map(|peak| self.gflops * 1e9 / peak),
                "product_flops_per_s": gpu.ceilings.matmul,
                "mfu_product": self.gflops * 1e9 / gpu.ceilings.matmul,
                "copy_bytes_per_s": gpu.ceilings.copy,
            })
        });
        let steps = self.steps as f64;
        let operation = |timing: &Timing| {
            let Timing { operation, calls, seconds, cost } = timing;
            let is_operation = *cost != Cost::default();
            json!({
                "operation": operation,
                "calls": calls,
                "ms_per_step": seconds / steps * 1e3,
                "flops_per_step": is_operation.then(|| cost.flops as f64 / steps),
                "bytes_per_step": is_operation.then(|| cost.bytes() as f64 / steps),
                "of_floor": self.floor(timing).filter(|_| is_operation).map(|floor| floor / seconds),
            })
        };
        json!({
            "engine": concat!("vitrum ", env!("CARGO_PKG_VERSION")),
            "device": self.device,
            "model": self.model,
            "batch": self.batch,
            "ranks": self.ranks,
            "row": self.row.as_ref().map(Row::json),
            "params": self.params,
            "gelu": self.gelu,
            "ms_per_step": self.ms_per_step,
            "best_ms_per_step": self.best_ms,
            "img_per_s": self.img_per_s,
            "gflops": self.gflops,
            "gflops_done": self.gflops_done,
            "last_block": if self.last_block.is_some() { "class token" } else { "whole" },
            "data_wait": self.data_wait,
            "first_step_s": self.first_step,
            "card": on_gpu,
            "arena_bytes": self.arena_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "products": self.products,
            "profile": self.profile.iter().map(operation).collect::<Vec<_>>(),
        })
    }
}

/// `tn m3072 n788 k768 ...: fused 41.2 us, apart 58.0 us`
fn choice_line(choice: &Choice) -> String {
    let time = |way: &String| {
        choice.microseconds.get(way).map_or(format!("{way} (remembered)"), |us| format!("{way} {us:.1} us"))
    };
    let others = choice.microseconds.keys().filter(|way| **way != choice.way);
    let ways: Vec<String> = std::iter::once(&choice.way).chain(others).map(time).collect();
    format!("  {}: {}", choice.product, ways.join(", "))
}

/// Seconds since this process started, to a hundredth.
fn since_start() -> Option<f64> {
    let (stat, uptime) =
        (std::fs::read_to_string("/proc/self/stat").ok()?, std::fs::read_to_string("/proc/uptime").ok()?);
    // The 22nd field, in hundredths of a second. The second field is a name in brackets that may hold blanks.
    let started: f64 = stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()?;
    Some(uptime.split_whitespace().next()?.parse::<f64>().ok()? - started / 100.0)
}

fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_sheets_are_found_by_the_words_of_a_cards_name() {
        let of = |name: &str| data_sheet(&format!("cuda, {name} (sm_90), bf16"));
        assert_eq!(of("NVIDIA H100 80GB HBM3"), Some(989e12));
        assert_eq!(of("NVIDIA H100 PCIe"), Some(756e12));
        assert_eq!(of("NVIDIA A100-SXM4-80GB"), Some(312e12));
        assert_eq!(of("NVIDIA L40S"), Some(362e12));
        assert_eq!(of("NVIDIA A10G"), None);
        assert_eq!(of("Vitrum stand-in GPU"), None);
    }

    #[test]
    fn a_process_is_older_than_nothing_and_younger_than_the_machine() {
        let seconds = since_start().unwrap();
        assert!((0.0..1e6).contains(&seconds), "{seconds}");
    }
}
