//! Benchmark of the input pipeline: each stage on one core, the whole on all workers, and whether that feeds
//! a model.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::backend::batch::PlainMemory;
use crate::backend::{Pixels, Slot, SlotLayout, TargetKind};
use crate::data::augment::{self, Buffers, Target};
use crate::data::decode::{Decoder, JpegPath};
use crate::data::jpeg::Counts;
use crate::data::picture::Wanted;
use crate::data::shard::Record;
use crate::data::{self, Dataset, Loader, LoaderSpec, Split};
use crate::error::Result;
use crate::recipe::{AugmentSection, Recipe};
use crate::report::format;
use crate::rng::{Domain, Stream};

/// What to measure and for how long.
#[derive(Clone, Debug)]
pub struct DataBench {
    pub data: String,
    /// Rounds of at least `seconds`; medians are reported.
    pub rounds: usize,
    pub seconds: f64,
    /// The GPU to feed.
    pub card: GpuModel,
}

/// GPUs, with the dense bf16 TFLOP/s of their data sheets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum GpuModel {
    A100,
    H100,
    H200,
    B200,
}

impl GpuModel {
    fn flops(self) -> f64 {
        match self {
            GpuModel::A100 => 312e12,
            GpuModel::H100 | GpuModel::H200 => 989e12,
            GpuModel::B200 => 2250e12,
        }
    }
}

/// The share of a GPU's peak that training is assumed to reach: a good one.
const UTILISATION: f64 = 0.5;

/// Seconds per sample of each stage on one core, and the rates of the whole pipeline.
pub struct Measured {
    data: String,
    model: String,
    image: (usize, usize),
    stages: Vec<(&'static str, f64)>,
    /// Seconds per sample of the whole pipeline on one core.
    one_core: f64,
    /// The same, written to a ring of slots that is larger than the last-level cache.
    into_ring: f64,
    /// Samples per second on as many cores as there are workers, none waiting for another: the loader's upper
    /// limit.
    all_cores: f64,
    /// The loader's workers, and its samples per second with all of them and with one.
    workers: usize,
    loader: f64,
    loader_one: f64,
    /// Copying finished samples between buffers: in cache, and over a ring larger than the last-level cache.
    copy_cached: f64,
    copy_ring: f64,
    bytes: f64,
    /// JPEG blocks per record: read; of these, transformed; of these, to fewer than 8×8 samples.
    blocks: [f64; 3],
    card: GpuModel,
    needed: f64,
}

/// Times the recipe's input pipeline on a data set.
pub fn run(recipe: &Recipe, model: &str, options: &DataBench) -> Result<Measured> {
    let dataset = Arc::new(Dataset::open(&options.data, Split::Train)?);
    let config = recipe.model_config(dataset.classes().len())?;
    let image = config.image;
    let augment = recipe.augment.effective();
    let timer = Timer { rounds: options.rounds, seconds: options.seconds };
    let one = OneCore { dataset: &dataset, image, augment: &augment, seed: recipe.train.seed };

    // Time pipelines of increasing length. A stage's time is what it adds.
    let read = timer.per_sample(dataset.len(), |i| one.read(i))?;
    let mut decoder = Decoder::default();
    let decode = timer.per_sample(dataset.len(), |i| one.decode(i, &mut decoder))?;
    let plain = plain(&augment);
    let unaugmented = OneCore { augment: &plain, ..one };
    let mut worker = Worker::new(image, 1);
    let cropped = timer.per_sample(dataset.len(), |i| unaugmented.all(i, &mut worker))?;
    let one_core = timer.per_sample(dataset.len(), |i| one.all(i, &mut worker))?;
    let mut ringed = Worker::new(image, ring_places(image));
    let into_ring = timer.per_sample(dataset.len(), |i| one.all(i, &mut ringed))?;
    drop(ringed);
    let (mut bytes, mut blocks) = (0, Counts::default());
    let counted = dataset.len().min(200);
    for i in 0..counted {
        bytes += one.bytes(i)?;
        one.decode(i, &mut decoder)?;
        let Counts { read, transformed, reduced } = decoder.counts();
        blocks.read += read;
        blocks.transformed += transformed;
        blocks.reduced += reduced;
    }
    let mean = |sum: usize| sum as f64 / counted as f64;

    let workers = match recipe.data.workers {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()).min(16),
        n => n,
    };
    let all_cores = one.on_cores(workers, &timer)?;
    let through = |workers| loader_rate(recipe, &dataset, image, workers, &timer);
    let (loader_one, loader) = (through(1)?, through(workers)?);
    Ok(Measured {
        data: options.data.clone(),
        model: model.into(),
        image,
        stages: vec![
            ("read", read),
            ("decode", (decode - read).max(0.0)),
            ("crop, resize, flip, write", (cropped - decode).max(0.0)),
            ("augment", (one_core - cropped).max(0.0)),
        ],
        one_core,
        into_ring,
        all_cores,
        workers,
        loader,
        loader_one,
        copy_cached: copy_seconds(image, 1, &timer),
        copy_ring: copy_seconds(image, ring_places(image), &timer),
        bytes: mean(bytes),
        blocks: [blocks.read, blocks.transformed, blocks.reduced].map(mean),
        card: options.card,
        needed: options.card.flops() * UTILISATION / config.train_flops() as f64,
    })
}

/// The same crop, without operations on pixel values.
fn plain(augment: &AugmentSection) -> AugmentSection {
    AugmentSection {
        randaugment: None,
        level: None,
        three_augment: false,
        color_jitter: 0.0,
        brightness: 0.0,
        contrast: 0.0,
        saturation: 0.0,
        hue: 0.0,
        ..augment.clone()
    }
}

/// The rounds of a repeated measurement.
struct Timer {
    rounds: usize,
    seconds: f64,
}

impl Timer {
    /// Median seconds of this thread's CPU time for `work(i)`, over the records in turn. Other load on the
    /// machine does not count.
    fn per_sample(&self, records: usize, mut work: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        let mut next = 0;
        let mut step = |count: usize| -> Result<()> {
            for _ in 0..count {
                work(next)?;
                next = (next + 1) % records;
            }
            Ok(())
        };
        // Read the clock once per some milliseconds of work.
        let start = Instant::now();
        step(8)?;
        let chunk = (4e-3 / (start.elapsed().as_secs_f64() / 8.0).max(1e-9)).clamp(1.0, 1e5) as usize;
        let mut rounds = Vec::new();
        for _ in 0..self.rounds {
            let (start, mut count) = (cpu_seconds(), 0);
            while count == 0 || cpu_seconds() - start < self.seconds {
                step(chunk)?;
                count += chunk;
            }
            rounds.push((cpu_seconds() - start) / count as f64);
        }
        Ok(median(rounds))
    }
}

/// CPU time of the calling thread.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn median(mut rounds: Vec<f64>) -> f64 {
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

/// The stages of one worker.
#[derive(Clone, Copy)]
struct OneCore<'a> {
    dataset: &'a Dataset,
    image: (usize, usize),
    augment: &'a AugmentSection,
    seed: u64,
}

struct Worker {
    decoder: Decoder,
    buffers: Buffers,
    /// Space for several samples, filled in turn.
    ring: Vec<u8>,
    next: usize,
}

impl Worker {
    fn new(image: (usize, usize), places: usize) -> Self {
        Self {
            decoder: Decoder::default(),
            buffers: Buffers::default(),
            ring: vec![1; places * image.0 * image.1 * 3], // not zeros, so that the pages exist before the timing
            next: 0,
        }
    }
}

/// The number of samples that fill 256 MB.
fn ring_places(image: (usize, usize)) -> usize {
    ((256 << 20) / (image.0 * image.1 * 3)).max(1)
}

impl OneCore<'_> {
    fn draws(&self, i: usize) -> Stream {
        Stream::new(self.seed, Domain::Augment, 0, i as u64)
    }

    fn bytes(&self, i: usize) -> Result<usize> {
        Ok(match self.dataset.record(i)? {
            Record::Raw { pixels, .. } => pixels.len(),
            Record::Encoded(bytes) => bytes.len(),
        })
    }

    /// Reads a byte of every page of a record.
    fn read(&self, i: usize) -> Result<()> {
        let record = self.dataset.record(i)?;
        let (Record::Raw { pixels: bytes, .. } | Record::Encoded(bytes)) = &record;
        black_box(bytes.iter().step_by(4096).fold(0u8, |sum, b| sum ^ b));
        Ok(())
    }

    fn wanted(&self, of: (usize, usize), draws: &mut Stream) -> Wanted {
        augment::wanted(self.augment, of, self.image, draws)
    }

    fn decode(&self, i: usize, decoder: &mut Decoder) -> Result<()> {
        if let Record::Encoded(bytes) = self.dataset.record(i)? {
            let mut draws = self.draws(i);
            black_box(decoder.part(&bytes, |of| self.wanted(of, &mut draws))?.size);
        }
        Ok(())
    }

    /// Samples per second of `cores` threads together, each with its own records.
    fn on_cores(&self, cores: usize, timer: &Timer) -> Result<f64> {
        let round = || -> Result<f64> {
            let work = |core: usize| -> Result<f64> {
                let mut worker = Worker::new(self.image, 1);
                let (mut i, mut count) = (core * self.dataset.len() / cores, 0u64);
                let start = Instant::now();
                while count == 0 || start.elapsed().as_secs_f64() < timer.seconds {
                    for _ in 0..16 {
                        self.all(i, &mut worker)?;
                        i = (i + 1) % self.dataset.len();
                    }
                    count += 16;
                }
                Ok(count as f64 / start.elapsed().as_secs_f64())
            };
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..cores).map(|core| scope.spawn(move || work(core))).collect();
                threads.into_iter().map(|thread| thread.join().expect("a stage does not panic")).sum()
            })
        };
        Ok(median((0..timer.rounds).map(|_| round()).collect::<Result<_>>()?))
    }

    fn all(&self, i: usize, worker: &mut Worker) -> Result<()> {
        let Worker { decoder, buffers, ring, next } = worker;
        let len = self.image.0 * self.image.1 * 3;
        let out = &mut ring[*next * len..][..len];
        let mut draws = self.draws(i);
        let record = self.dataset.record(i)?;
        let part = data::pixels(&record, decoder, |of| self.wanted(of, &mut draws))?;
        augment::train(self.augment, part, self.image, &mut draws, buffers, Target::U8(out));
        black_box(&*out);
        *next = (*next + 1) % (ring.len() / len);
        Ok(())
    }
}

/// Seconds to copy a finished sample, in turn into each of `places`. This is the minimum time of the last
/// stage.
fn copy_seconds(image: (usize, usize), places: usize, timer: &Timer) -> f64 {
    let len = image.0 * image.1 * 3;
    let (from, mut to) = (vec![7u8; len], vec![1u8; len * places]);
    timer
        .per_sample(places, |i| {
            to[i * len..(i + 1) * len].copy_from_slice(black_box(&from));
            black_box(&to[i * len]);
            Ok(())
        })
        .expect("copying does not fail")
}

/// Samples per second through the loader.
fn loader_rate(
    recipe: &Recipe,
    dataset: &Arc<Dataset>,
    image: (usize, usize),
    workers: usize,
    timer: &Timer,
) -> Result<f64> {
    let batch = recipe.train.batch.max(64);
    let layout = SlotLayout { samples: batch, image, pixels: Pixels::U8, targets: TargetKind::Labels };
    let mut slots = Vec::new();
    for _ in 0..recipe.data.slots {
        slots.push(Slot::new(Box::new(PlainMemory::new(layout.bytes())?), layout));
    }
    let spec = LoaderSpec {
        batch,
        image,
        mode: data::Mode::Train { augment: recipe.augment.clone(), seed: recipe.train.seed },
        start_batch: 0,
        workers,
        on_bad_record: recipe.data.on_bad_record,
        exif: recipe.data.exif,
    };
    let mut loader = Loader::new(dataset.clone(), spec, slots);
    let mut next = || -> Result<()> {
        if let Some(slot) = loader.next()? {
            loader.recycle(slot);
        }
        Ok(())
    };
    for _ in 0..recipe.data.slots + 1 {
        next()?;
    }
    let mut rounds = Vec::new();
    for _ in 0..timer.rounds {
        let (start, mut batches) = (Instant::now(), 0);
        while batches == 0 || start.elapsed().as_secs_f64() < timer.seconds {
            next()?;
            batches += 1;
        }
        rounds.push((batches * batch) as f64 / start.elapsed().as_secs_f64());
    }
    Ok(median(rounds))
}

impl Measured {
    fn is_fed(&self) -> bool {
        self.loader >= self.needed
    }

    pub fn text(&self) -> String {
        let mut lines = vec![
            format!(
                "{} at {}x{}, JPEG decoder: {}",
                self.data,
                self.image.1,
                self.image.0,
                JpegPath::chosen().describe()
            ),
            format!(
                "{} per record; blocks read {:.0}, transformed {:.0}, of these to fewer samples {:.0}",
                format::bytes(self.bytes as u64),
                self.blocks[0],
                self.blocks[1],
                self.blocks[2]
            ),
        ];
        for (stage, seconds) in &self.stages {
            let share = seconds / self.one_core;
            lines.push(format!("  {stage:<28} {:>9.2} us {:>6.1} %", seconds * 1e6, share * 100.0));
        }
        lines.push(format!(
            "one core       {:>10.0} img/s, {:.0} into a ring of 256 MB",
            1.0 / self.one_core,
            1.0 / self.into_ring
        ));
        lines.push(format!(
            "{:<2} cores       {:>10.0} img/s   {:.2} times one, without the loader",
            self.workers,
            self.all_cores,
            self.all_cores * self.one_core
        ));
        lines.push(format!("loader, 1      {:>10.0} img/s", self.loader_one));
        lines.push(format!(
            "loader, {:<6} {:>10.0} img/s   {:.0} per worker   {:.2} times one",
            self.workers,
            self.loader,
            self.loader / self.workers as f64,
            self.loader / self.loader_one
        ));
        lines.push(format!(
            "only copying   {:>10.0} img/s in cache, {:.0} into a ring of 256 MB",
            1.0 / self.copy_cached,
            1.0 / self.copy_ring
        ));
        lines.push(format!(
            "{} on one {:?} at {:.0} % of its peak consumes {:.0} img/s: {}",
            self.model,
            self.card,
            UTILISATION * 100.0,
            self.needed,
            match self.is_fed() {
                true => "fed".to_owned(),
                false => format!(
                    "needs {:.0} workers like these",
                    self.needed / (self.loader / self.workers as f64)
                ),
            }
        ));
        lines.join("\n")
    }

    pub fn json(&self) -> Value {
        let stages: Vec<Value> =
            self.stages.iter().map(|(name, s)| json!({"stage": name, "us": s * 1e6})).collect();
        json!({
            "engine": concat!("vitrum ", env!("CARGO_PKG_VERSION")),
            "data": self.data,
            "image": self.image,
            "jpeg_decoder": JpegPath::chosen().describe(),
            "bytes_per_record": self.bytes,
            "blocks_read": self.blocks[0],
            "blocks_transformed": self.blocks[1],
            "blocks_reduced": self.blocks[2],
            "stages": stages,
            "img_per_s_one_core": 1.0 / self.one_core,
            "img_per_s_into_ring": 1.0 / self.into_ring,
            "img_per_s_all_cores": self.all_cores,
            "img_per_s_one_worker": self.loader_one,
            "workers": self.workers,
            "img_per_s": self.loader,
            "img_per_s_per_worker": self.loader / self.workers as f64,
            "copy_img_per_s_cached": 1.0 / self.copy_cached,
            "copy_img_per_s_ring": 1.0 / self.copy_ring,
            "model": self.model,
            "card": format!("{:?}", self.card),
            "needed_img_per_s": self.needed,
            "fed": self.is_fed(),
        })
    }
}
