//! Makes one batch: which records, on which workers, and the slot's contents besides pixels.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::backend::{MixBox, Pixels, Slot, TargetKind};
use crate::data::augment::{self, Buffers, Target, erase, mix};
use crate::data::dataset::Dataset;
use crate::data::decode::Decoder;
use crate::data::order::{Drawn, Order};
use crate::data::picture::{Part, View, Wanted};
use crate::data::shard::Record;
use crate::error::{Error, Result};
use crate::recipe::{AugmentSection, EvalResize, OnBadRecord};
use crate::rng::{Domain, Stream};
use crate::terminal;

use super::{Delivery, LoaderSpec, Mode};

/// Values of pixels that a worker makes at a time. Small pictures come by the dozen, so that the cost of
/// distributing them is negligible.
const PIECE: usize = 96 << 10;

/// State that all batches of a loader share, and the workers.
pub(super) struct Filler {
    dataset: Arc<Dataset>,
    spec: LoaderSpec,
    delivery: Delivery,
    order: Order,
    stop: Arc<AtomicBool>,
    /// Records that could not be decoded; each causes one warning.
    bad: Arc<Mutex<HashSet<usize>>>,
    pool: ThreadPool,
}

impl Filler {
    pub(super) fn new(
        dataset: Arc<Dataset>,
        spec: LoaderSpec,
        delivery: Delivery,
        order: Order,
        stop: Arc<AtomicBool>,
        bad: Arc<Mutex<HashSet<usize>>>,
    ) -> Result<Self> {
        let workers = match spec.workers {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()).min(16),
            n => n,
        };
        let pool = ThreadPoolBuilder::new()
            .num_threads(workers)
            .thread_name(|i| format!("loader-{i}"))
            .build()
            .map_err(|e| threads(workers, &e))?;
        Ok(Self { dataset, spec, delivery, order, stop, bad, pool })
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn past_the_end(&self, position: u64) -> bool {
        matches!(self.spec.mode, Mode::Eval { .. })
            && position.saturating_mul((self.spec.batch * self.delivery.ranks) as u64)
                >= self.dataset.len() as u64
    }

    /// Checks that all data read so far is what was packed.
    pub(super) fn verified(&self) -> Result<()> {
        self.dataset.verified()
    }

    /// Makes the batch of the slot's position.
    pub(super) fn fill(&self, slot: &mut Slot) -> Result<()> {
        match &self.spec.mode {
            Mode::Train { augment, seed } => self.fill_train(slot, augment, *seed),
            Mode::Eval { resize, crop_ratio } => self.fill_eval(slot, *resize, *crop_ratio),
        }
    }

    /// Which records a training batch shows.
    fn drawn(&self, position: u64) -> Vec<Drawn> {
        self.order.of((0..self.spec.batch).map(|i| self.number(position, i)))
    }

    /// The number, within the run, of this rank's sample `i` of a batch. A rank has neighbouring samples, so
    /// that a batch is the same on any number of ranks.
    fn number(&self, position: u64, i: usize) -> u64 {
        let (batch, Delivery { rank, ranks, .. }) = (self.spec.batch, self.delivery);
        (position * ranks as u64 + rank as u64) * batch as u64 + i as u64
    }

    fn fill_train(&self, slot: &mut Slot, augment: &AugmentSection, seed: u64) -> Result<()> {
        let batch = self.spec.batch;
        let order = self.drawn(slot.position);
        if self.dataset.image().is_none() {
            // Asks the system to read the next batch while this one is made. For small records its own
            // read-ahead is enough.
            let next = self.drawn(slot.position + 1);
            next.iter().for_each(|drawn| self.dataset.will_need(drawn.record));
        }
        let made = self.each_sample(slot, batch, |i, buffers, mut target| {
            let WorkerBuffers { decoder, augment: buffers } = buffers;
            decoder.set_exif(self.spec.exif);
            let drawn = order[i];
            if let Some(next) = order.get(i + 1) {
                self.dataset.prefetch(next.record);
            }
            // Records are below 2^40, and repeats are few.
            let key = drawn.record as u64 | (drawn.repeat as u64) << 40;
            let mut draws = Stream::new(seed, Domain::Augment, drawn.epoch, key);
            // A record that cannot be decoded is replaced by the next one that can.
            for step in 0..self.dataset.len() {
                let record = (drawn.record + step) % self.dataset.len();
                let made = self.dataset.record(record).and_then(|stored| {
                    let size = self.spec.image;
                    let part = pixels(&stored, decoder, |of| augment::wanted(augment, of, size, &mut draws))?;
                    augment::train(augment, part, size, &mut draws, buffers, target.again());
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
        let first = self.number(slot.position, 0) as usize;
        let count = self.dataset.len().saturating_sub(first).min(self.spec.batch);
        let made = self.each_sample(slot, count, |i, buffers, mut target| {
            let WorkerBuffers { decoder, augment: buffers } = buffers;
            decoder.set_exif(self.spec.exif);
            let made = self.dataset.record(first + i).and_then(|stored| {
                let view = pixels(&stored, decoder, Wanted::whole)?.view;
                augment::evaluate(resize, crop_ratio, view, self.spec.image, buffers, target.again());
                Ok(())
            });
            match made {
                Ok(()) => Ok(Some(Made { record: first + i, erase: Default::default() })),
                Err(error) => self.bad_record(first + i, error).map(|()| None),
            }
        })?;
        // A record that cannot be decoded is left out, and the others move up.
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

    /// Runs `make(i, buffers, target)` for samples `0..count` of a slot on the workers. If several samples
    /// fail, returns the error of the first of those that ran.
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
        let piece = (PIECE / image_len).max(1);
        let mut made = vec![None; count];
        let failed: Mutex<Option<(usize, Error)>> = Mutex::default();
        let one = |i: usize, made: &mut Option<Made>, target: Target| {
            if self.is_stopped() {
                return;
            }
            match BUFFERS.with_borrow_mut(|buffers| make(i, buffers, target)) {
                Ok(done) => *made = done,
                Err(error) => {
                    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    if failed.as_ref().is_none_or(|(first, _)| i < *first) {
                        *failed = Some((i, error));
                    }
                }
            }
        };
        let (one, normalise) = (&one, self.delivery.normalise);
        // All batches share one queue of pieces: workers take them first come, first served.
        self.pool.in_place_scope(|scope| {
            let made = made.chunks_mut(piece).enumerate();
            match slot.layout().pixels {
                Pixels::U8 => {
                    let pixels = slot.images_u8_mut()[..count * image_len].chunks_mut(piece * image_len);
                    for ((p, made), out) in made.zip(pixels) {
                        scope.spawn(move |_| {
                            for ((i, made), out) in
                                made.iter_mut().enumerate().zip(out.chunks_exact_mut(image_len))
                            {
                                one(p * piece + i, made, Target::U8(out));
                            }
                        });
                    }
                }
                Pixels::F32 => {
                    let values = slot.images_f32_mut()[..count * image_len].chunks_mut(piece * image_len);
                    for ((p, made), out) in made.zip(values) {
                        scope.spawn(move |_| {
                            for ((i, made), out) in
                                made.iter_mut().enumerate().zip(out.chunks_exact_mut(image_len))
                            {
                                one(p * piece + i, made, Target::F32(out, normalise));
                            }
                        });
                    }
                }
            }
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some((_, error)) => Err(error),
            None => Ok(made),
        }
    }

    /// Writes labels, or one-hot or multi-hot targets. Padding is class 0 and is ignored.
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

    /// Stops at a bad record, or warns the first time.
    fn bad_record(&self, record: usize, error: Error) -> Result<()> {
        // If the shard differs from what was packed, the error is about the shard, not about one record.
        self.dataset.sound(record)?;
        let place = format!("{}: `{}`", self.dataset.name(), self.dataset.record_name(record));
        match self.spec.on_bad_record {
            OnBadRecord::Error => Err(error
                .at(place)
                .hint("repair or remove it, or use `--set data.on_bad_record=skip` to skip it")),
            OnBadRecord::Skip => {
                if self.bad.lock().expect("no worker panics with the lock").insert(record) {
                    terminal::warn(&format!("{place} skipped: {}", error.message()));
                }
                Ok(())
            }
        }
    }
}

/// The error for threads that the system refuses to start.
pub(super) fn threads(wanted: usize, why: &dyn std::fmt::Display) -> Error {
    Error::new(format!("cannot start {wanted} threads for the loader: {why}")).hint(
        "use fewer, as in `--set data.workers=1`, or raise the limits that `ulimit -u` and `ulimit -v` show",
    )
}

#[derive(Default)]
struct WorkerBuffers {
    decoder: Decoder,
    augment: Buffers,
}

/// The result for one sample, besides its pixels.
#[derive(Clone, Copy)]
struct Made {
    record: usize,
    /// Box and seed.
    erase: (MixBox, u32),
}

/// Moves the kept pictures to the front and zeros the rest.
fn close_up<T: Copy + Default>(pixels: &mut [T], image_len: usize, kept: &[usize]) {
    for (to, from) in kept.iter().enumerate().filter(|(to, from)| to != *from) {
        pixels.copy_within(from * image_len..(from + 1) * image_len, to * image_len);
    }
    pixels[kept.len() * image_len..].fill(T::default());
}

/// The part of a record that `choose` picks given its (H, W): a view of stored pixels, or decoded. Raw pixels
/// come at full size.
pub fn pixels<'a>(
    record: &'a Record,
    decoder: &'a mut Decoder,
    choose: impl FnOnce((usize, usize)) -> Wanted,
) -> Result<Part<'a>> {
    match record {
        Record::Raw { pixels, height, width } => {
            let w = choose((*height, *width)).window;
            Ok(View::new(pixels, *height, *width).window(w.y, w.x, w.height, w.width).into())
        }
        Record::Encoded(bytes) => decoder.part(bytes, choose),
    }
}
