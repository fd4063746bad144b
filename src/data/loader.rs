//! The loader: a thread that fills batch slots ahead of the trainer, in order, with a few workers of its own.
//!
//! Batch `k` of a training run holds samples `k·B ..` of the run, and [`Order`] says which record a sample is, so that the
//! position of the next batch is the loader's whole state. What a sample looks like is a function of (seed, epoch, record,
//! repeat). Neither workers nor ranks nor restarts change a byte.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::backend::{MixBox, Normalise, Pixels, Slot, TargetKind};
use crate::error::{Error, Result};
use crate::recipe::{AugmentSection, EvalResize, OnBadRecord};
use crate::rng::{Domain, Stream};

use super::augment::{self, Buffers, Target, erase, mix};
use super::dataset::Dataset;
use super::decode::Decoder;
use super::order::{Cache, Order};
use super::picture::{View, Window};
use super::shard::Record;

/// What the batches are for.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// Shuffled, augmented, without end.
    Train { augment: AugmentSection, seed: u64 },
    /// Every sample once, in order; the last batch may be short ([`Slot::count`]).
    Eval { resize: EvalResize, crop_ratio: f32 },
}

/// How to load.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderSpec {
    /// B: samples of a slot.
    pub batch: usize,
    /// (H, W) of a slot's pictures.
    pub image: (usize, usize),
    pub mode: Mode,
    /// The first batch to deliver.
    pub start_batch: u64,
    /// Worker threads; 0: one per core, at most 16.
    pub workers: usize,
    pub on_bad_record: OnBadRecord,
}

/// Beyond what every run needs: parts of a run, and special slots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Delivery {
    /// This process, of how many: each has its own part of every batch.
    pub rank: usize,
    pub ranks: usize,
    /// Records within which neighbours are shuffled, for disks that seek; 0: the whole epoch.
    pub shuffle_window: usize,
    /// Of the model: for slots that hold f32.
    pub normalise: Normalise,
}

impl Default for Delivery {
    fn default() -> Self {
        Self { rank: 0, ranks: 1, shuffle_window: 0, normalise: Normalise::INCEPTION }
    }
}

/// Delivers filled slots in order. Dropping it stops its threads.
pub struct Loader {
    ready: Receiver<Message>,
    /// `None` only while the loader is being stopped.
    free: Option<Sender<Slot>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Slot>>>,
    waited: Duration,
    ended: bool,
    bad: Arc<Mutex<HashSet<usize>>>,
}

enum Message {
    Batch(Slot),
    End,
    Failed(Error),
}

impl Loader {
    /// Starts loading into `slots`, which have the spec's batch and image size.
    pub fn new(dataset: Arc<Dataset>, spec: LoaderSpec, slots: Vec<Slot>) -> Self {
        Self::with(dataset, spec, Delivery::default(), slots)
    }

    /// The same for a part of a run, or for slots of f32.
    pub fn with(dataset: Arc<Dataset>, mut spec: LoaderSpec, delivery: Delivery, slots: Vec<Slot>) -> Self {
        assert!(delivery.rank < delivery.ranks, "a rank is one of the ranks");
        assert!(!slots.is_empty(), "a loader needs at least one slot");
        for slot in &slots {
            assert_eq!(
                (slot.layout().samples, slot.layout().image),
                (spec.batch, spec.image),
                "slot and loader"
            );
        }
        let (free, free_slots) = channel();
        let (done, ready) = channel();
        slots.into_iter().for_each(|slot| free.send(slot).expect("the receiver lives"));
        let stop = Arc::new(AtomicBool::new(false));
        let bad = Arc::new(Mutex::new(HashSet::new()));
        let order = match &mut spec.mode {
            Mode::Train { augment, seed } => {
                *augment = augment.effective();
                Order::new(&dataset.parts(), *seed, delivery.shuffle_window, augment.repeats)
            }
            Mode::Eval { .. } => Order::new(&[(dataset.len(), 1.0)], 0, 0, 1),
        };
        let filler = Filler { dataset, spec, delivery, order, stop: stop.clone(), bad: bad.clone() };
        let thread = std::thread::Builder::new()
            .name("loader".into())
            .spawn(move || filler.run(free_slots, done))
            .expect("the system starts a thread");
        Self {
            ready,
            free: Some(free),
            stop,
            thread: Some(thread),
            waited: Duration::ZERO,
            ended: false,
            bad,
        }
    }

    /// The next batch; `None` after the last one of an evaluation. The slot comes back through [`Loader::recycle`].
    #[expect(clippy::should_implement_trait, reason = "a slot is lent, and an end may be an error")]
    pub fn next(&mut self) -> Result<Option<Slot>> {
        if self.ended {
            return Ok(None);
        }
        let start = Instant::now();
        let message = self.ready.recv();
        self.waited += start.elapsed();
        match message {
            Ok(Message::Batch(slot)) => Ok(Some(slot)),
            Ok(Message::End) => {
                self.ended = true;
                Ok(None)
            }
            Ok(Message::Failed(error)) => {
                self.ended = true;
                Err(error)
            }
            Err(_) => panic!("the loader thread died"),
        }
    }

    /// Gives a slot back for another batch.
    pub fn recycle(&self, slot: Slot) {
        // After an evaluation's last batch nobody waits for slots any more; they are kept for `into_slots`.
        if let Some(free) = &self.free {
            let _ = free.send(slot);
        }
    }

    /// Seconds that [`Loader::next`] has waited in total.
    pub fn wait_seconds(&self) -> f64 {
        self.waited.as_secs_f64()
    }

    /// Records that could not be decoded so far.
    pub fn bad_records(&self) -> usize {
        self.bad.lock().expect("no worker panics with the lock").len()
    }

    /// Stops loading and returns the slots that are not with the caller, for another loader.
    pub fn into_slots(mut self) -> Vec<Slot> {
        self.shut_down()
    }

    fn shut_down(&mut self) -> Vec<Slot> {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.free.take());
        let mut slots = match self.thread.take().map(JoinHandle::join) {
            Some(Ok(slots)) => slots,
            _ => Vec::new(),
        };
        slots.extend(self.ready.try_iter().filter_map(|message| match message {
            Message::Batch(slot) => Some(slot),
            _ => None,
        }));
        slots
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// The loader's thread.
struct Filler {
    dataset: Arc<Dataset>,
    spec: LoaderSpec,
    delivery: Delivery,
    order: Order,
    stop: Arc<AtomicBool>,
    /// Records that could not be decoded, each warned of once.
    bad: Arc<Mutex<HashSet<usize>>>,
}

impl Filler {
    /// Fills slot after slot until told to stop or done; returns the slots that are free by then.
    fn run(self, free: Receiver<Slot>, done: Sender<Message>) -> Vec<Slot> {
        let workers = match self.spec.workers {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()).min(16),
            n => n,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(workers)
            .thread_name(|i| format!("loader-{i}"))
            .build();
        let pool = match pool {
            Ok(pool) => pool,
            Err(e) => {
                let _ = done
                    .send(Message::Failed(Error::new(format!("cannot start {workers} loader threads: {e}"))));
                return free.iter().collect();
            }
        };
        for position in self.spec.start_batch.. {
            if self.past_the_end(position) {
                let _ = done.send(Message::End);
                break;
            }
            let Ok(mut slot) = free.recv() else { break };
            slot.position = position;
            if self.stop.load(Ordering::Relaxed) {
                return std::iter::once(slot).chain(free.iter()).collect();
            }
            self.ask_ahead(position + 1);
            let message = match pool.install(|| self.fill(&mut slot)) {
                Ok(()) => Message::Batch(slot),
                Err(error) => Message::Failed(error),
            };
            let failed = matches!(message, Message::Failed(_));
            if done.send(message).is_err() || failed {
                break;
            }
        }
        free.iter().collect()
    }

    /// Has the system read the records of a batch while the one before it is made.
    fn ask_ahead(&self, position: u64) {
        let Mode::Train { augment, .. } = &self.spec.mode else { return };
        if self.dataset.image().is_some() {
            return; // small records: the system reads ahead as well as we
        }
        let mut cache = Cache::default();
        for i in 0..self.spec.batch {
            let number = self.number(position, i, augment.repeats);
            self.dataset.will_need(self.order.at_with(number, &mut cache).record);
        }
    }

    fn past_the_end(&self, position: u64) -> bool {
        matches!(self.spec.mode, Mode::Eval { .. })
            && position.saturating_mul((self.spec.batch * self.delivery.ranks) as u64)
                >= self.dataset.len() as u64
    }

    fn fill(&self, slot: &mut Slot) -> Result<()> {
        match &self.spec.mode {
            Mode::Train { augment, seed } => self.fill_train(slot, augment, *seed),
            Mode::Eval { resize, crop_ratio } => self.fill_eval(slot, *resize, *crop_ratio),
        }
    }

    /// The run's number of this rank's sample `i` of a batch. Samples of one record go to different ranks.
    fn number(&self, position: u64, i: usize, repeats: usize) -> u64 {
        let (batch, Delivery { rank, ranks, .. }) = (self.spec.batch, self.delivery);
        let in_batch = if repeats > 1 { i * ranks + rank } else { rank * batch + i };
        position * (batch * ranks) as u64 + in_batch as u64
    }

    fn fill_train(&self, slot: &mut Slot, augment: &AugmentSection, seed: u64) -> Result<()> {
        let (batch, position) = (self.spec.batch, slot.position);
        let made = self.each_sample(slot, batch, |i, buffers, mut target| {
            let WorkerBuffers { decoder, augment: buffers, order } = buffers;
            let drawn = self.order.at_with(self.number(position, i, augment.repeats), order);
            // Records are below 2^40, repeats few.
            let key = drawn.record as u64 | (drawn.repeat as u64) << 40;
            let mut draws = Stream::new(seed, Domain::Augment, drawn.epoch, key);
            // A record that cannot be decoded is replaced by the next one that can.
            for step in 0..self.dataset.len() {
                let record = (drawn.record + step) % self.dataset.len();
                let made = self.dataset.record(record).and_then(|stored| {
                    let view = pixels(&stored, decoder, |of| augment::window(augment, of, &mut draws))?;
                    augment::train(augment, view, self.spec.image, &mut draws, buffers, target.again());
                    Ok(())
                });
                match made {
                    Ok(()) => {
                        let erase = match augment.erase > 0.0 {
                            true => (erase::draw(augment, self.spec.image, &mut draws), draws.next_u32()),
                            false => Default::default(),
                        };
                        return Ok(Some(Made { record, erase }));
                    }
                    Err(error) => self.bad_record(record, error)?,
                }
            }
            Err(Error::new(format!("{}: no record can be decoded", self.dataset.name())))
        })?;
        slot.count = batch;
        self.write_targets(slot, &made);
        mix::fill(slot, augment, seed, self.delivery.rank);
        if augment.erase > 0.0 {
            erase::enter(slot, augment, made.iter().map(|m| m.map_or_else(Default::default, |m| m.erase)));
        }
        Ok(())
    }

    fn fill_eval(&self, slot: &mut Slot, resize: EvalResize, crop_ratio: f32) -> Result<()> {
        let first = self.number(slot.position, 0, 1) as usize;
        let count = self.dataset.len().saturating_sub(first).min(self.spec.batch);
        let made = self.each_sample(slot, count, |i, buffers, mut target| {
            let WorkerBuffers { decoder, augment: buffers, .. } = buffers;
            let made = self.dataset.record(first + i).and_then(|stored| {
                let view = pixels(&stored, decoder, Window::whole)?;
                augment::evaluate(resize, crop_ratio, view, self.spec.image, buffers, target.again());
                Ok(())
            });
            match made {
                Ok(()) => Ok(Some(Made { record: first + i, erase: Default::default() })),
                Err(error) => self.bad_record(first + i, error).map(|()| None),
            }
        })?;
        // A record that cannot be decoded is left out: the others move up.
        let kept: Vec<usize> = (0..count).filter(|i| made[*i].is_some()).collect();
        let image_len = slot.layout().image_len();
        match slot.layout().pixels {
            Pixels::U8 => close_up(slot.images_u8_mut(), image_len, &kept),
            Pixels::F32 => close_up(slot.images_f32_mut(), image_len, &kept),
        }
        slot.count = kept.len();
        let made: Vec<_> = kept.into_iter().map(|i| made[i]).collect();
        self.write_targets(slot, &made);
        slot.clear_mix();
        Ok(())
    }

    /// Runs `make(i, buffers, target)` for samples `0..count` of a slot on the workers.
    fn each_sample(
        &self,
        slot: &mut Slot,
        count: usize,
        make: impl Fn(usize, &mut WorkerBuffers, Target) -> Result<Option<Made>> + Sync,
    ) -> Result<Vec<Option<Made>>> {
        thread_local! {
            static BUFFERS: RefCell<WorkerBuffers> = RefCell::default();
        }
        let image_len = slot.layout().image_len();
        let run = |i: usize, target: Target| {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            BUFFERS.with_borrow_mut(|buffers| make(i, buffers, target))
        };
        match slot.layout().pixels {
            Pixels::U8 => slot.images_u8_mut()[..count * image_len]
                .par_chunks_exact_mut(image_len)
                .enumerate()
                .map(|(i, out)| run(i, Target::U8(out)))
                .collect(),
            Pixels::F32 => slot.images_f32_mut()[..count * image_len]
                .par_chunks_exact_mut(image_len)
                .enumerate()
                .map(|(i, out)| run(i, Target::F32(out, self.delivery.normalise)))
                .collect(),
        }
    }

    /// Labels, one-hot or multi-hot targets; padding is class 0, and counts for nothing.
    fn write_targets(&self, slot: &mut Slot, made: &[Option<Made>]) {
        let record = |i: usize| made.get(i).copied().flatten().map(|m| m.record);
        match slot.layout().targets {
            TargetKind::Labels => {
                let label = |i: usize| record(i).map_or(0, |r| self.dataset.label(r));
                slot.labels_mut().iter_mut().enumerate().for_each(|(i, l)| *l = label(i) as i32);
            }
            TargetKind::Dense { classes } => {
                for (i, row) in slot.targets_mut().chunks_exact_mut(classes).enumerate() {
                    row.fill(0.0);
                    if let Some(record) = record(i) {
                        self.dataset.labels(record).for_each(|label| row[label] = 1.0);
                    }
                }
            }
        }
    }

    /// Stops at a bad record, or warns of it the first time.
    fn bad_record(&self, record: usize, error: Error) -> Result<()> {
        let place = format!("{}: `{}`", self.dataset.name(), self.dataset.record_name(record));
        match self.spec.on_bad_record {
            OnBadRecord::Error => {
                Err(error.at(place).hint("use `--set data.on_bad_record=skip` to go on without it"))
            }
            OnBadRecord::Skip => {
                if self.bad.lock().expect("no worker panics with the lock").insert(record) {
                    eprintln!("warning: {place} skipped: {}", error.message());
                }
                Ok(())
            }
        }
    }
}

#[derive(Default)]
struct WorkerBuffers {
    decoder: Decoder,
    augment: Buffers,
    order: Cache,
}

/// What became of a sample, besides its pixels.
#[derive(Clone, Copy)]
struct Made {
    record: usize,
    /// Box and seed.
    erase: (MixBox, u32),
}

/// Moves the pictures that are kept to the front; what is behind them becomes zero.
fn close_up<T: Copy + Default>(pixels: &mut [T], image_len: usize, kept: &[usize]) {
    for (to, from) in kept.iter().enumerate().filter(|(to, from)| to != *from) {
        pixels.copy_within(from * image_len..(from + 1) * image_len, to * image_len);
    }
    pixels[kept.len() * image_len..].fill(T::default());
}

/// The window of a record that `choose` picks, told its (H, W): a part of what is stored, or decoded.
pub fn pixels<'a>(
    record: &'a Record,
    decoder: &'a mut Decoder,
    choose: impl FnOnce((usize, usize)) -> Window,
) -> Result<View<'a>> {
    match record {
        Record::Raw { pixels, height, width } => {
            let w = choose((*height, *width));
            Ok(View::new(pixels, *height, *width).window(w.y, w.x, w.height, w.width))
        }
        Record::Encoded(bytes) => decoder.window(bytes, choose),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::batch::PlainMemory;
    use crate::backend::{Pixels, SlotLayout};
    use crate::data::dataset::Split;
    use crate::recipe::Crop;

    fn slots(count: usize, samples: usize, targets: TargetKind) -> Vec<Slot> {
        let layout = SlotLayout { samples, image: (32, 32), pixels: Pixels::U8, targets };
        (0..count).map(|_| Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout)).collect()
    }

    fn demo(split: Split) -> Arc<Dataset> {
        Arc::new(Dataset::open("demo", split).unwrap())
    }

    fn spec(mode: Mode, batch: usize, workers: usize) -> LoaderSpec {
        LoaderSpec {
            batch,
            image: (32, 32),
            mode,
            start_batch: 0,
            workers,
            on_bad_record: OnBadRecord::Error,
        }
    }

    fn training(seed: u64) -> Mode {
        let augment = AugmentSection {
            crop: Crop::Pad,
            pad: 2,
            mixup: 0.2,
            mix_prob: 0.5,
            hue: 0.1,
            ..Default::default()
        };
        Mode::Train { augment, seed }
    }

    /// Everything that a slot says.
    type Content = (u64, usize, Vec<u8>, Vec<i32>, Vec<u32>, Vec<f32>);

    fn content(slot: &Slot) -> Content {
        let (labels, partner, lambda) = (slot.labels(), slot.partner(), slot.lambda());
        let pixels = slot.images_u8().to_vec();
        (slot.position, slot.count, pixels, labels.to_vec(), partner.to_vec(), lambda.to_vec())
    }

    fn take(loader: &mut Loader, batches: usize) -> Vec<Content> {
        let mut taken = Vec::new();
        for _ in 0..batches {
            let slot = loader.next().unwrap().expect("a batch");
            taken.push(content(&slot));
            loader.recycle(slot);
        }
        taken
    }

    #[test]
    fn workers_slots_and_restarts_change_nothing() {
        let data = Arc::new(Dataset::open("demo", Split::Train).unwrap().take(100));
        let load = |workers, count, start_batch, batches| {
            let spec = LoaderSpec { start_batch, ..spec(training(5), 24, workers) };
            take(&mut Loader::new(data.clone(), spec, slots(count, 24, TargetKind::Labels)), batches)
        };
        let batches = load(1, 1, 0, 12);
        assert!(batches == load(2, 3, 0, 12), "two workers");
        assert!(batches == load(3, 2, 0, 12), "three workers");
        assert!(batches[7..] == load(2, 2, 7, 5), "from batch 7 on");
        assert_eq!(batches.iter().map(|b| b.0).collect::<Vec<_>>(), (0..12).collect::<Vec<_>>());
        assert!(
            batches.iter().any(|b| b.5[0] < 1.0) && batches.iter().any(|b| b.5[0] == 1.0),
            "some are mixed"
        );
    }

    #[test]
    fn an_epoch_visits_every_sample_once_even_if_it_ends_inside_a_batch() {
        let data = Arc::new(Dataset::open("demo", Split::Val).unwrap().take(70));
        let plain = AugmentSection { crop: Crop::Pad, flip: false, ..Default::default() };
        let mode = Mode::Train { augment: plain, seed: 1 };
        let mut loader = Loader::new(data.clone(), spec(mode, 20, 2), slots(2, 20, TargetKind::Labels));
        let stream: Vec<Vec<u8>> = take(&mut loader, 7)
            .into_iter()
            .flat_map(|b| b.2.chunks(32 * 32 * 3).map(<[u8]>::to_vec).collect::<Vec<_>>())
            .collect();
        let mut all: Vec<Vec<u8>> = (0..70)
            .map(|i| match data.record(i).unwrap() {
                Record::Raw { pixels, .. } => pixels.into_owned(),
                Record::Encoded(_) => panic!("the demo is raw"),
            })
            .collect();
        all.sort();
        let sorted = |part: &[Vec<u8>]| {
            let mut part = part.to_vec();
            part.sort();
            part
        };
        assert!(sorted(&stream[..70]) == all && sorted(&stream[70..140]) == all);
        assert!(stream[..70] != stream[70..140], "another order");
    }

    #[test]
    fn an_evaluation_gives_every_sample_once_in_order_and_then_ends() {
        let data = demo(Split::Val);
        let mode = Mode::Eval { resize: EvalResize::Squash, crop_ratio: 1.0 };
        let targets = TargetKind::Dense { classes: 10 };
        let mut loader = Loader::new(data.clone(), spec(mode, 300, 2), slots(2, 300, targets));
        let mut seen = 0;
        while let Some(slot) = loader.next().unwrap() {
            for i in 0..slot.count {
                let image = &slot.images_u8()[i * 3072..(i + 1) * 3072];
                let Record::Raw { pixels, .. } = data.record(seen).unwrap() else { panic!("raw") };
                assert!(image == &pixels[..], "sample {seen}");
                let row = &slot.targets()[i * 10..(i + 1) * 10];
                assert!(row.iter().enumerate().all(|(c, y)| *y == f32::from(u8::from(c == seen % 10))));
                seen += 1;
            }
            assert!(slot.images_u8()[slot.count * 3072..].iter().all(|p| *p == 0), "padding");
            loader.recycle(slot);
        }
        assert_eq!(seen, 2000);
        assert!(loader.next().unwrap().is_none(), "and stays at the end");
        assert_eq!(loader.into_slots().len(), 2);
    }

    #[test]
    fn ranks_share_a_batch_without_overlap_and_with_the_same_pixels() {
        let data = Arc::new(Dataset::open("demo", Split::Train).unwrap().take(100));
        let load = |batch: usize, rank: usize, ranks: usize| {
            let delivery = Delivery { rank, ranks, ..Delivery::default() };
            let slots = slots(2, batch, TargetKind::Labels);
            take(&mut Loader::with(data.clone(), spec(training(5), batch, 2), delivery, slots), 5)
        };
        let whole = load(24, 0, 1);
        for ranks in [2, 4] {
            let parts: Vec<_> = (0..ranks).map(|rank| load(24 / ranks, rank, ranks)).collect();
            for (k, batch) in whole.iter().enumerate() {
                let pixels: Vec<u8> = parts.iter().flat_map(|p| p[k].2.clone()).collect();
                let labels: Vec<i32> = parts.iter().flat_map(|p| p[k].3.clone()).collect();
                assert!(pixels == batch.2 && labels == batch.3, "batch {k} of {ranks} ranks");
                assert!(parts.iter().all(|p| p[k].5[0] == batch.5[0]), "one λ for all ranks");
            }
        }
        let mode = Mode::Eval { resize: EvalResize::Squash, crop_ratio: 1.0 };
        let seen: usize = (0..3)
            .map(|rank| {
                let delivery = Delivery { rank, ranks: 3, ..Delivery::default() };
                let slots = slots(2, 8, TargetKind::Labels);
                let mut loader = Loader::with(data.clone(), spec(mode.clone(), 8, 2), delivery, slots);
                let mut seen = 0;
                while let Some(slot) = loader.next().unwrap() {
                    seen += slot.count;
                    loader.recycle(slot);
                }
                seen
            })
            .sum();
        assert_eq!(seen, 100);
    }

    #[test]
    fn slots_of_f32_hold_the_same_samples_normalised() {
        let data = Arc::new(Dataset::open("demo", Split::Train).unwrap().take(40));
        let make = |pixels| {
            let layout = SlotLayout { samples: 8, image: (32, 32), pixels, targets: TargetKind::Labels };
            let slot = Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout);
            Loader::new(data.clone(), spec(training(2), 8, 2), vec![slot]).next().unwrap().unwrap()
        };
        let (bytes, floats) = (make(Pixels::U8), make(Pixels::F32));
        let normal = |p: &u8| (f32::from(*p) - 127.5) / 127.5;
        assert!(bytes.images_u8().iter().map(normal).eq(floats.images_f32().iter().copied()));
    }

    #[test]
    fn erased_boxes_travel_with_the_batch() {
        let augment = AugmentSection { crop: Crop::Pad, erase: 0.5, ..Default::default() };
        let mode = Mode::Train { augment, seed: 4 };
        let mut loader = Loader::new(demo(Split::Train), spec(mode, 64, 2), slots(2, 64, TargetKind::Labels));
        let slot = loader.next().unwrap().unwrap();
        let erased = slot.erase().iter().filter(|e| e.cut.y1 > e.cut.y0).count();
        assert!((16..48).contains(&erased), "{erased} of 64");
        assert!(slot.erase().windows(2).any(|e| e[0].seed != e[1].seed) && slot.erase()[0].mode == 2);
    }

    #[test]
    fn dropping_a_loader_ends_it_whatever_it_is_doing() {
        for held in 0..3 {
            let mut loader =
                Loader::new(demo(Split::Train), spec(training(1), 64, 2), slots(3, 64, TargetKind::Labels));
            let mine: Vec<_> = (0..held).map(|_| loader.next().unwrap().unwrap()).collect();
            assert_eq!(loader.into_slots().len() + mine.len(), 3);
        }
        drop(Loader::new(demo(Split::Train), spec(training(1), 64, 1), slots(1, 64, TargetKind::Labels)));
    }
}
