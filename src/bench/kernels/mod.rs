//! Benchmark of single operations on a GPU, compared with the rates at which the same GPU copies and
//! multiplies.
//!
//! Each operation runs on several sets of operands in turn, which together are larger than any cache. They
//! hold random numbers, because products of zeros are faster. The work is recorded, replayed, and timed by
//! the GPU's events. The two ceilings are measured in the same run, because clocks differ between GPUs and
//! from day to day.

mod cases;
mod products;
mod sizes;

use std::time::Instant;

use half::bf16;
use serde_json::{Value, json};

use crate::backend::cuda::Cuda;
use crate::backend::cuda::driver::Launched;
use crate::backend::dry_run::DryRun;
use crate::backend::timed::Timed;
use crate::backend::{
    Arena, Backend, Cost, DeviceOptions, Dtype, Epilogue, Linear, Mat, MemoryPlan, Micro, Precision, StepKeys,
};
use crate::error::{Error, Result};
use crate::report::table;
use crate::rng::{Domain, Stream};

pub use cases::Traffic;

use cases::{Case, Placed, Room};
use sizes::Sizes;

/// What to time and for how long.
#[derive(Clone, Debug)]
pub struct KernelBench {
    /// The GPU's number.
    pub gpu: usize,
    /// Only operations whose title contains this text.
    pub filter: Option<String>,
    /// Run small sizes once each, to see which kernels are launched.
    pub few: bool,
    /// Rounds of at least `seconds`; their median is reported.
    pub rounds: usize,
    pub seconds: f64,
}

/// The result for one operation.
#[derive(Clone, Debug)]
pub struct Line {
    pub operation: &'static str,
    pub shape: String,
    /// Seconds of one call: the median and the best of the rounds.
    pub seconds: f64,
    pub best: f64,
    /// The minimum cost.
    pub cost: Cost,
    /// The minimum traffic. For a product it is that of the operation, without kernels that run beside it;
    /// otherwise that of its kernels, including the partial sums that they pass on.
    pub bytes: usize,
    pub launches: Vec<(Launched, Traffic)>,
}

/// The results of all operations, and the ceilings.
pub struct Measured {
    pub device: String,
    pub stand_in: bool,
    pub multiprocessors: u32,
    pub ceilings: Ceilings,
    pub lines: Vec<Line>,
    pub wall: f64,
}

/// The best measured rates of the GPU.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes per second of a large copy, read and written.
    pub copy: f64,
    /// FLOP/s of a large product of bf16.
    pub matmul: f64,
}

/// Minimum total bytes of an operation's sets of operands: twice the largest cache of any GPU so far.
const ROTATION: usize = 256 << 20;
/// How many random bf16 numbers are repeated to fill memory; not a multiple of any row.
const PATTERN: usize = (4 << 20) + 10;

/// Times the operations on a GPU.
///
/// # Errors
/// There is no GPU, or it fails.
pub fn run(options: &KernelBench) -> Result<Measured> {
    let start = Instant::now();
    let mut bench = Bench::open(options.gpu, options.few)?;
    let mut lines = Vec::new();
    for at in 0..bench.cases.len() {
        let wanted = |filter: &String| bench.cases[at].title().contains(filter.as_str());
        if options.filter.as_ref().is_none_or(wanted) {
            let ready = bench.prepare(at)?;
            let seconds = bench.rounds(&ready, options)?;
            lines.push(ready.line(&bench.cases[at], &seconds));
        }
    }
    Ok(Measured {
        ceilings: ceilings(&mut bench.cuda)?,
        device: bench.cuda.describe(),
        stand_in: bench.cuda.is_stand_in(),
        multiprocessors: bench.cuda.properties().multiprocessors,
        lines,
        wall: start.elapsed().as_secs_f64(),
    })
}

/// Measures a GPU's ceilings. Overwrites its arenas.
pub fn ceilings(cuda: &mut Cuda) -> Result<Ceilings> {
    let (bytes, side, repeats) = if cuda.is_stand_in() { (1 << 20, 128, 1) } else { (1 << 30, 8192, 20) };
    let copy = cuda.time_copy(bytes, 5, repeats)?;

    let mut plan = MemoryPlan::new(cuda.storage());
    let [x, y] = [0; 2].map(|_| plan.activation("operand", side, side));
    plan.set_bytes(Arena::Params, side * side * 4 + 256 * 4);
    let weight = Mat { arena: Arena::Params, offset: 0, rows: side, cols: side, ld: side, dtype: Dtype::F32 };
    let bias = Mat { offset: side * side * 4, rows: 1, cols: 8, ld: 8, ..weight };
    let w = Linear { weight, bias, d_weight: None, d_bias: None };
    cuda.allocate(&plan)?;
    let pattern = Pattern::new(if cuda.is_stand_in() { 1 << 12 } else { PATTERN });
    pattern.fill(cuda)?;
    cuda.begin_micro(Micro::whole(1))?;
    let mut product = |b: &mut dyn Backend| b.matmul(x, &w, Epilogue::None, y);
    cuda.launches(&mut product)?;
    let matmul = cuda.time_replayed(&mut product, 5, repeats)?;
    Ok(Ceilings {
        copy: 2.0 * bytes as f64 / median(&copy),
        matmul: 2.0 * (side as f64).powi(3) / median(&matmul),
    })
}

fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Random numbers distributed like the activations and the weights of a trained model.
struct Pattern {
    activations: Vec<u8>,
    weights: Vec<u8>,
}

impl Pattern {
    fn new(values: usize) -> Self {
        let mut stream = Stream::new(0, Domain::Init, 0, 0);
        let normal: Vec<f32> = (0..values).map(|_| stream.normal() as f32).collect();
        Self {
            activations: normal.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            weights: normal.iter().take(values / 2).flat_map(|v| (0.02 * v).to_le_bytes()).collect(),
        }
    }

    fn fill(&self, cuda: &mut Cuda) -> Result<()> {
        cuda.fill(Arena::Params, &self.weights)?;
        cuda.fill(Arena::Grads, &self.weights)?;
        cuda.fill(Arena::Activations, &self.activations)
    }
}

/// A GPU and the operations to time on it.
pub struct Bench {
    cuda: Cuda,
    few: bool,
    pattern: Pattern,
    cases: Vec<Case>,
}

/// An operation whose operands are on the GPU and which has run once.
pub struct Ready {
    sets: Vec<Placed>,
    recorded: bool,
    cost: Cost,
    bytes: usize,
    launches: Vec<(Launched, Traffic)>,
}

impl Bench {
    /// Opens a GPU by its number; `few` selects the small sizes.
    ///
    /// # Errors
    /// The GPU cannot be used.
    pub fn open(gpu: usize, few: bool) -> Result<Self> {
        let options = DeviceOptions { precision: Precision::Bf16, deterministic: few, ..Default::default() };
        let cuda = Cuda::open(gpu, &options).map_err(|e| e.at("kernels are timed on a GPU"))?;
        let sizes = if few { Sizes::few() } else { Sizes::real() };
        let pattern = Pattern::new(if few { 1 << 16 } else { PATTERN });
        Ok(Self { cuda, few, pattern, cases: cases::cases(&sizes) })
    }

    /// The names of the operations, with their sizes.
    pub fn titles(&self) -> Vec<String> {
        self.cases.iter().map(Case::title).collect()
    }

    /// Places the operands of an operation, by its index in [`Bench::titles`]. Replaces the operands placed
    /// before.
    pub fn prepare(&mut self, at: usize) -> Result<Ready> {
        let case = &self.cases[at];
        // Enough sets of operands to exceed any cache.
        let mut room = Room { plan: MemoryPlan::new(self.cuda.storage()) };
        let before = room.plan.total_bytes();
        let mut sets = vec![(case.place)(&mut room)];
        let bytes = room.plan.total_bytes() - before;
        let count = if self.few { 1 } else { ROTATION.div_ceil(bytes.max(1)).clamp(1, 64) };
        sets.extend((1..count).map(|_| (case.place)(&mut room)));

        self.cuda.unbind_batch();
        self.cuda.allocate(&room.plan)?;
        self.pattern.fill(&mut self.cuda)?;
        bind(&mut self.cuda, case, &self.pattern)?;
        self.cuda.begin_step(StepKeys { seed: 1, step: 1 })?;
        self.cuda.begin_micro(Micro::whole(case.samples))?;
        for before in sets.iter().filter_map(|set| set.before.as_ref()) {
            before(&mut self.cuda)?;
        }
        // The first run times the alternatives, if there are several.
        (sets[0].run)(&mut self.cuda)?;
        let launches = self.cuda.launches(&mut |b| (sets[0].run)(b))?;

        let cost = self.cost(case, &sets[0])?;
        let least = (case.least)(&launches, cost);
        if least.len() != launches.len() {
            let kernels: Vec<&str> = launches.iter().map(|l| l.kernel).collect();
            return Err(Error::new(format!("{}: no formula for each of {kernels:?}", case.title())));
        }
        let bytes = match case.product {
            true => cost.bytes() as usize,
            false => least.iter().map(|t| t.read + t.written).sum(),
        };
        let launches = launches.into_iter().zip(least).collect();
        Ok(Ready { sets, recorded: case.recorded, cost, bytes, launches })
    }

    /// The operation's minimum cost on a device with this storage.
    fn cost(&self, case: &Case, set: &Placed) -> Result<Cost> {
        let mut counted = Timed::new(Box::new(DryRun::new(self.cuda.storage(), self.cuda.precision())));
        case.batch.into_iter().for_each(|layout| counted.expect_batch(layout));
        (set.run)(&mut counted)?;
        Ok(counted.times().operations().iter().map(|timing| timing.cost).sum())
    }

    /// Seconds that `runs` runs take on the GPU.
    pub fn seconds(&mut self, ready: &Ready, runs: u64) -> Result<f64> {
        let sets = ready.sets.len() as u64;
        let one = self.time(ready, 1, runs.div_ceil(sets) as usize)?[0];
        Ok(one * runs as f64)
    }

    fn rounds(&mut self, ready: &Ready, options: &KernelBench) -> Result<Vec<f64>> {
        if options.few {
            return self.time(ready, 1, 1);
        }
        let once = self.time(ready, 1, 2)?[0] * ready.sets.len() as f64;
        let repeats = (options.seconds / once).ceil().clamp(2.0, 10_000.0) as usize;
        self.time(ready, options.rounds, repeats)
    }

    /// Seconds per run, for each round.
    fn time(&mut self, ready: &Ready, rounds: usize, repeats: usize) -> Result<Vec<f64>> {
        let mut all = |b: &mut dyn Backend| ready.sets.iter().try_for_each(|set| (set.run)(b));
        let seconds = match ready.recorded {
            true => self.cuda.time_replayed(&mut all, rounds, repeats)?,
            false => self.cuda.time_launched(&mut all, rounds, repeats)?,
        };
        Ok(seconds.into_iter().map(|s| s / ready.sets.len() as f64).collect())
    }
}

fn bind(cuda: &mut Cuda, case: &Case, pattern: &Pattern) -> Result<()> {
    let Some(layout) = case.batch else { return Ok(()) };
    let mut slot = cuda.new_slot(layout)?;
    for (pixel, byte) in slot.images_u8_mut().iter_mut().zip(pattern.activations.iter().cycle()) {
        *pixel = *byte;
    }
    let mut draws = Stream::new(0, Domain::Demo, 0, 0);
    slot.labels_mut().iter_mut().for_each(|label| *label = draws.below(1000) as i32);
    cuda.bind_batch(slot)?;
    Ok(())
}

impl Ready {
    /// Minimum bytes that a run moves.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn line(self, case: &Case, seconds: &[f64]) -> Line {
        Line {
            operation: case.operation,
            shape: case.shape.clone(),
            seconds: median(seconds),
            best: seconds.iter().copied().fold(f64::INFINITY, f64::min),
            cost: self.cost,
            bytes: self.bytes,
            launches: self.launches,
        }
    }
}

impl Line {
    fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }

    fn flops_per_s(&self) -> f64 {
        self.cost.flops as f64 / self.seconds
    }
}

impl Measured {
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.device);
        if self.stand_in {
            text += "the stand-in GPU computes on the host: these times say nothing about a real GPU\n";
        }
        text += &format!(
            "measured ceilings of this GPU: copy {:.0} GB/s, bf16 product {:.0} TFLOP/s\n\n",
            self.ceilings.copy / 1e9,
            self.ceilings.matmul / 1e12
        );
        let rows: Vec<Vec<String>> = self
            .lines
            .iter()
            .map(|line| {
                let share = |of: f64, ceiling: f64| format!("{:.1} %", 100.0 * of / ceiling);
                let (flops, of_product) = match line.cost.flops {
                    0 => (String::new(), String::new()),
                    _ => (
                        format!("{:.0}", line.flops_per_s() / 1e12),
                        share(line.flops_per_s(), self.ceilings.matmul),
                    ),
                };
                vec![
                    line.operation.to_string(),
                    line.shape.clone(),
                    format!("{:.4}", line.seconds * 1e3),
                    format!("{:.0}", line.bytes_per_s() / 1e9),
                    share(line.bytes_per_s(), self.ceilings.copy),
                    flops,
                    of_product,
                ]
            })
            .collect();
        let head = ["operation", "shape", "ms", "GB/s", "of copy", "TFLOP/s", "of product"];
        text + &table(&head, &rows)
    }

    pub fn json(&self) -> Value {
        let launch = |(l, least): &(Launched, Traffic)| {
            json!({
                "kernel": l.kernel,
                "grid": l.grid,
                "threads": l.threads,
                "shared_bytes": l.shared,
                "least_read_bytes": least.read,
                "least_written_bytes": least.written,
            })
        };
        let line = |line: &Line| {
            let product = line.cost.flops > 0;
            json!({
                "operation": line.operation,
                "shape": line.shape,
                "ms": line.seconds * 1e3,
                "best_ms": line.best * 1e3,
                "bytes": line.bytes,
                "bytes_per_s": line.bytes_per_s(),
                "of_copy": line.bytes_per_s() / self.ceilings.copy,
                "flops": product.then_some(line.cost.flops),
                "flops_per_s": product.then(|| line.flops_per_s()),
                "of_product": product.then(|| line.flops_per_s() / self.ceilings.matmul),
                "launches": line.launches.iter().map(launch).collect::<Vec<_>>(),
            })
        };
        json!({
            "engine": concat!("vitrum ", env!("CARGO_PKG_VERSION")),
            "device": self.device,
            "stand_in": self.stand_in,
            "multiprocessors": self.multiprocessors,
            "copy_bytes_per_s": self.ceilings.copy,
            "product_flops_per_s": self.ceilings.matmul,
            "wall_s": self.wall,
            "operations": self.lines.iter().map(line).collect::<Vec<_>>(),
        })
    }
}
