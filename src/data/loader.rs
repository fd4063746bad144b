//! The loader: workers fill batch slots ahead of the trainer, who takes them in order.
//!
//! Batch `k` of a training run holds samples `k·B ..` of the run, and [`Order`] says which record a sample
//! is. So the position of the next batch is the loader's whole state. The pixels of a sample are a function
//! of (seed, epoch, record, repeat). Workers, ranks and restarts do not change a byte.
//!
//! [`LANES`] batches are prepared at a time. A thread per batch cuts it into pieces for the workers, who take
//! the first batch's pieces first ([`fill`]). While the last pieces of one batch are being made, the other
//! workers already make the next one.

mod fill;

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::{Normalise, Slot};
use crate::error::{Error, Result};
use crate::recipe::{AugmentSection, EvalResize, OnBadRecord};
use crate::signals;
use crate::watch::{self, Stage};

use super::dataset::Dataset;
use super::order::Order;
use fill::Filler;

pub use fill::pixels;

/// Batches prepared at a time, if there are slots for them.
const LANES: usize = 2;

/// The purpose of the batches.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// Shuffled, augmented, endless.
    Train {
        /// What is drawn for each sample.
        augment: AugmentSection,
        /// Seed of the order and of all draws.
        seed: u64,
    },
    /// Every sample once, in order; the last batch may be short ([`Slot::count`]).
    Eval {
        /// The resize and the crop.
        resize: EvalResize,
        /// Share of the resized picture that the centre crop keeps, in (0, 1].
        crop_ratio: f32,
    },
}

/// How to load.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderSpec {
    /// B: samples of a slot.
    pub batch: usize,
    /// (H, W) of a slot's pictures.
    pub image: (usize, usize),
    /// The purpose of the batches.
    pub mode: Mode,
    /// The first batch to deliver.
    pub start_batch: u64,
    /// Worker threads; 0: one per core, at most 16.
    pub workers: usize,
    /// What to do with a record that cannot be decoded.
    pub on_bad_record: OnBadRecord,
    /// Whether pictures are turned by their EXIF orientation.
    pub exif: bool,
}

/// Settings that not every run needs: a rank's part of a run, and f32 slots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Delivery {
    /// This process: each has its own part of every batch.
    pub rank: usize,
    /// The number of processes.
    pub ranks: usize,
    /// Size of the windows in which records are shuffled, for disks that seek; 0: the whole epoch.
    pub shuffle_window: usize,
    /// The model's normalisation, for slots that hold f32.
    pub normalise: Normalise,
}

impl Default for Delivery {
    fn default() -> Self {
        Self { rank: 0, ranks: 1, shuffle_window: 0, normalise: Normalise::INCEPTION }
    }
}

/// Delivers filled slots in order. Dropping it stops its threads.
pub struct Loader {
    ready: Receiver<(u64, Message)>,
    /// Batches that were ready before their turn.
    early: BTreeMap<u64, Message>,
    /// Number of the batch whose turn it is.
    position: u64,
    /// `None` only while the loader is being stopped.
    free: Option<Sender<Slot>>,
    feed: Arc<Mutex<Feed>>,
    stop: Arc<AtomicBool>,
    lanes: Vec<JoinHandle<Option<Slot>>>,
    waited: Duration,
    ended: bool,
    /// A thread is stuck in a read, and nothing waits for that thread any more.
    is_stuck: bool,
    bad: Arc<Mutex<HashSet<usize>>>,
}

/// How often a loader that waits for a batch checks whether to stop, and how long it still waits after a
/// signal: a read from a disk that hangs cannot be cancelled.
const LOOK: Duration = Duration::from_millis(100);
const GRACE: Duration = Duration::from_secs(2);

/// Slots to fill, and what goes into the next one.
struct Feed {
    free: Receiver<Slot>,
    position: u64,
    ended: bool,
}

enum Message {
    Batch(Slot),
    End,
    Failed(Error),
    /// A bug: the thread that made the batch panicked.
    Died,
}

impl Loader {
    /// Starts loading into `slots`, which have the spec's batch and image size.
    pub fn new(dataset: Arc<Dataset>, spec: LoaderSpec, slots: Vec<Slot>) -> Self {
        Self::with(dataset, spec, Delivery::default(), slots)
    }

    /// The same for a rank's part of a run, or for slots of f32.
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
        let lanes = slots.len().min(LANES);
        let (free, free_slots) = channel();
        let (done, ready) = channel();
        slots.into_iter().for_each(|slot| free.send(slot).expect("the receiver lives"));
        let position = spec.start_batch;
        let stop = Arc::new(AtomicBool::new(false));
        let bad = Arc::new(Mutex::new(HashSet::new()));
        let order = match &mut spec.mode {
            Mode::Train { augment, seed } => {
                *augment = augment.effective();
                Order::new(&dataset.parts(), *seed, delivery.shuffle_window, augment.repeats)
            }
            Mode::Eval { .. } => Order::new(&[(dataset.len(), 1.0)], 0, 0, 1),
        };
        let feed = Arc::new(Mutex::new(Feed { free: free_slots, position, ended: false }));
        let filler = Filler::new(dataset, spec, delivery, order, stop.clone(), bad.clone());
        let standing = watch::current();
        let start = |filler: Arc<Filler>| -> Result<Vec<_>> {
            let lane = |i: usize| {
                let (filler, feed, done) = (filler.clone(), feed.clone(), done.clone());
                let standing = standing.clone();
                let thread = std::thread::Builder::new().name(format!("batches-{i}"));
                thread
                    .spawn(move || {
                        watch::work_for(standing);
                        lane(&filler, &feed, &done)
                    })
                    .map_err(|e| fill::threads(lanes, &e))
            };
            // One lane is slower than two but makes the same batches.
            let mut running = vec![lane(0)?];
            running.extend((1..lanes).map_while(|i| lane(i).ok()));
            Ok(running)
        };
        let lanes = filler.map(Arc::new).and_then(start).unwrap_or_else(|error| {
            done.send((position, Message::Failed(error))).expect("the receiver lives");
            Vec::new()
        });
        Self {
            ready,
            early: BTreeMap::new(),
            position,
            free: Some(free),
            feed,
            stop,
            lanes,
            waited: Duration::ZERO,
            ended: false,
            is_stuck: false,
            bad,
        }
    }

    /// The next batch; `None` after the last one of an evaluation. It is an error if a signal asks the
    /// process to stop and no batch arrives. The caller returns the slot through [`Loader::recycle`].
    #[expect(clippy::should_implement_trait, reason = "a slot is lent, and an end may be an error")]
    pub fn next(&mut self) -> Result<Option<Slot>> {
        if self.ended {
            return Ok(None);
        }
        let _here = watch::enter(Stage::Loader);
        let start = Instant::now();
        let mut asked = None;
        let message = loop {
            if let Some(message) = self.early.remove(&self.position) {
                break message;
            }
            match self.ready.recv_timeout(LOOK) {
                Ok((position, message)) => drop(self.early.insert(position, message)),
                Err(RecvTimeoutError::Disconnected) => break Message::Died,
                Err(RecvTimeoutError::Timeout) => {
                    let Some(signal) = signals::pending() else { continue };
                    if asked.get_or_insert_with(Instant::now).elapsed() > GRACE {
                        self.is_stuck = true;
                        let error = Error::stopped(signal, "stopped while waiting for a read of the data");
                        break Message::Failed(error);
                    }
                }
            }
        };
        self.waited += start.elapsed();
        self.position += 1;
        self.ended = !matches!(message, Message::Batch(_));
        match message {
            Message::Batch(slot) => Ok(Some(slot)),
            Message::End => Ok(None),
            Message::Failed(error) => Err(error),
            Message::Died => panic!("a thread of the loader died"),
        }
    }

    /// Gives a slot back for another batch.
    pub fn recycle(&self, slot: Slot) {
        // After an evaluation's last batch no thread waits for slots any more; they are kept for
        // `into_slots`.
        if let Some(free) = &self.free {
            let _ = free.send(slot);
        }
    }

    /// Seconds that [`Loader::next`] has waited in total.
    pub fn wait_seconds(&self) -> f64 {
        self.waited.as_secs_f64()
    }

    /// Number of records that could not be decoded so far.
    pub fn bad_records(&self) -> usize {
        self.bad.lock().expect("no worker panics with the lock").len()
    }

    /// Stops loading and returns the slots that the caller does not hold, for another loader.
    pub fn into_slots(mut self) -> Vec<Slot> {
        self.shut_down()
    }

    fn shut_down(&mut self) -> Vec<Slot> {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.free.take());
        if self.is_stuck {
            return Vec::new();
        }
        let mut slots: Vec<Slot> =
            self.lanes.drain(..).filter_map(|lane| lane.join().unwrap_or_default()).collect();
        let made = std::mem::take(&mut self.early).into_values();
        slots.extend(made.chain(self.ready.try_iter().map(|(_, message)| message)).filter_map(|message| {
            match message {
                Message::Batch(slot) => Some(slot),
                _ => None,
            }
        }));
        slots.extend(self.feed.lock().unwrap_or_else(PoisonError::into_inner).free.try_iter());
        slots
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// Makes batch after batch until the loader stops or the data ends. Returns the slot that it then holds.
fn lane(filler: &Filler, feed: &Mutex<Feed>, done: &Sender<(u64, Message)>) -> Option<Slot> {
    loop {
        let mut slot = {
            // The lane that holds the lock waits for a free slot; the other lane would have to wait for the
            // same.
            let mut feed = feed.lock().unwrap_or_else(PoisonError::into_inner);
            if feed.ended {
                return None;
            }
            if filler.past_the_end(feed.position) {
                feed.ended = true;
                let end = filler.verified().map_or_else(Message::Failed, |()| Message::End);
                let _ = done.send((feed.position, end));
                return None;
            }
            let mut slot = feed.free.recv().ok()?;
            slot.position = feed.position;
            feed.position += 1;
            slot
        };
        if filler.is_stopped() {
            return Some(slot);
        }
        let position = slot.position;
        let filled = catch_unwind(AssertUnwindSafe(|| filler.fill(&mut slot)));
        let (message, left) = match filled {
            Ok(Ok(())) => (Message::Batch(slot), None),
            Ok(Err(error)) => (Message::Failed(error), Some(slot)),
            Err(_) => (Message::Died, Some(slot)),
        };
        if done.send((position, message)).is_err() || left.is_some() {
            return left;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::batch::PlainMemory;
    use crate::backend::{Pixels, SlotLayout, TargetKind};
    use crate::data::dataset::Split;
    use crate::data::shard::Record;
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
            exif: false,
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

    /// All contents of a slot.
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
