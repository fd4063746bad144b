//! Where the time of a step goes: a [`Backend`] in front of another that counts calls and seconds per
//! operation, and the minimum cost of the operations ([`super::cost`]).
//!
//! Operations are listed by [`Op::name`], which distinguishes matrix products by their epilogue. Times are
//! those of the calls. They mean something only if the device finishes an operation before it returns.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::cost::{Cost, Setting};
use super::{
    Arena, Backend, Body, Group, Health, HostMemory, Mat, MemoryPlan, Micro, Op, Pixels, Precision, Slot,
    SlotLayout, StepKeys, StepReport, Storage, TargetKind, Update, Write,
};
use crate::error::Result;

/// See the module.
pub struct Timed {
    inner: Box<dyn Backend>,
    times: Times,
    setting: Setting,
}

/// What a [`Timed`] has counted: a handle that remains usable after the backend has moved into a trainer.
#[derive(Clone, Default)]
pub struct Times {
    /// In the order of the operations' first calls.
    entries: Arc<Mutex<Vec<Timing>>>,
}

/// All calls of one operation, or of another method of [`Backend`].
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Its name: [`Op::name`](super::Op::name), or that of the method.
    pub operation: &'static str,
    /// How often it was called.
    pub calls: usize,
    /// Seconds in all calls together.
    pub seconds: f64,
    /// Zero where the method is not an operation.
    pub cost: Cost,
}

impl Timed {
    /// Measures all calls of `inner`.
    pub fn new(inner: Box<dyn Backend>) -> Self {
        let (storage, pixels, targets) = (inner.storage(), Pixels::U8, TargetKind::Labels);
        let setting = Setting { storage, pixels, targets, gradients: Write::Assign };
        Self { inner, times: Times::default(), setting }
    }

    /// Assumes such batches for the cost until one is bound.
    pub fn expect_batch(&mut self, layout: SlotLayout) {
        (self.setting.pixels, self.setting.targets) = (layout.pixels, layout.targets);
    }

    /// The backend without the clock.
    pub fn into_inner(self) -> Box<dyn Backend> {
        self.inner
    }

    /// The times so far. They go on counting while the backend is used.
    pub fn times(&self) -> Times {
        self.times.clone()
    }

    fn time<R>(&mut self, method: &'static str, call: impl FnOnce(&mut dyn Backend) -> R) -> R {
        self.time_work(method, Cost::default(), call)
    }

    fn time_work<R>(
        &mut self,
        operation: &'static str,
        cost: Cost,
        call: impl FnOnce(&mut dyn Backend) -> R,
    ) -> R {
        let start = Instant::now();
        let result = call(&mut *self.inner);
        // A failure shows in the next operation's own result.
        let _ = self.inner.synchronize();
        self.times.add(Timing { operation, calls: 1, seconds: start.elapsed().as_secs_f64(), cost });
        result
    }
}

impl Times {
    /// Everything since the start or the last [`Times::reset`], longest first.
    pub fn report(&self) -> Vec<Timing> {
        let mut report = self.lock().clone();
        report.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        report
    }

    /// Only the operations, in the order of their first calls.
    pub fn operations(&self) -> Vec<Timing> {
        self.lock().iter().filter(|timing| timing.cost != Cost::default()).copied().collect()
    }

    /// Discards the counts so far: called after the warm-up.
    pub fn reset(&self) {
        self.lock().clear();
    }

    fn add(&self, one: Timing) {
        let mut entries = self.lock();
        match entries.iter_mut().find(|entry| entry.operation == one.operation) {
            Some(entry) => {
                entry.calls += one.calls;
                entry.seconds += one.seconds;
                entry.cost += one.cost;
            }
            None => entries.push(one),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Timing>> {
        // Every count is consistent at any moment, so a panic elsewhere cannot corrupt it.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Timed {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    // Memory ----------------------------------------------------------------------------------------------------

    fn storage(&self) -> Storage {
        self.inner.storage()
    }

    fn precision(&self) -> Precision {
        self.inner.precision()
    }

    fn free_memory(&self) -> Result<usize> {
        self.inner.free_memory()
    }

    fn allocate(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.time("allocate", |b| b.allocate(plan))
    }

    fn allocated_bytes(&self) -> usize {
        self.inner.allocated_bytes()
    }

    fn write(&mut self, at: Mat, values: &[f32]) -> Result<()> {
        self.time("write", |b| b.write(at, values))
    }

    fn read(&mut self, at: Mat, values: &mut [f32]) -> Result<()> {
        self.time("read", |b| b.read(at, values))
    }

    fn read_arena(&mut self, arena: Arena) -> Result<Vec<u8>> {
        self.time("read_arena", |b| b.read_arena(arena))
    }

    fn write_arena(&mut self, arena: Arena, bytes: &[u8]) -> Result<()> {
        self.time("write_arena", |b| b.write_arena(arena, bytes))
    }

    fn swap_ema(&mut self) -> Result<()> {
        self.time("swap_ema", |b| b.swap_ema())
    }

    // Ranks -----------------------------------------------------------------------------------------------------

    fn join(&mut self, group: Group) -> Result<()> {
        self.inner.join(group)
    }

    fn tell_signal(&mut self, signal: i32) {
        self.inner.tell_signal(signal);
    }

    fn gradients_done(&mut self, from: usize) -> Result<()> {
        self.inner.gradients_done(from)
    }

    fn gather_rows(&mut self, rows: Mat) -> Result<()> {
        self.time("gather_rows", |b| b.gather_rows(rows))
    }

    fn gather_ema(&mut self) -> Result<()> {
        self.time("gather_ema", |b| b.gather_ema())
    }

    // Choices ---------------------------------------------------------------------------------------------------

    fn algorithms(&self) -> Vec<String> {
        self.inner.algorithms()
    }

    fn choices(&self) -> Vec<super::Choice> {
        self.inner.choices()
    }

    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String> {
        self.inner.prefer_algorithms(algorithms)
    }

    fn host_memory(&self, bytes: usize) -> Result<Box<dyn HostMemory>> {
        self.inner.host_memory(bytes)
    }

    fn copy_arena(&mut self, arena: Arena, from: usize, to: &mut [u8]) -> Result<()> {
        self.inner.copy_arena(arena, from, to)
    }

    fn checksum(&mut self, arena: Arena) -> Result<u64> {
        self.inner.checksum(arena)
    }

    fn health(&mut self) -> Option<Health> {
        self.inner.health()
    }

    // Batches ---------------------------------------------------------------------------------------------------

    fn new_slot(&self, layout: SlotLayout) -> Result<Slot> {
        self.inner.new_slot(layout)
    }

    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>> {
        self.expect_batch(slot.layout());
        self.time("bind_batch", |b| b.bind_batch(slot))
    }

    fn unbind_batch(&mut self) -> Option<Slot> {
        self.time("unbind_batch", |b| b.unbind_batch())
    }

    // The step --------------------------------------------------------------------------------------------------

    fn begin_step(&mut self, keys: StepKeys) -> Result<()> {
        self.time("begin_step", |b| b.begin_step(keys))
    }

    fn begin_micro(&mut self, micro: Micro) -> Result<()> {
        self.setting.gradients = micro.gradients;
        self.time("begin_micro", |b| b.begin_micro(micro))
    }

    /// Never recorded: every operation is timed.
    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        body(self)?;
        update.map_or(Ok(()), |update| self.update(update))
    }

    /// The clock waits for every operation.
    fn steps_ahead(&self) -> u64 {
        0
    }

    fn synchronize(&mut self) -> Result<()> {
        self.inner.synchronize()
    }

    // Operations and reports ------------------------------------------------------------------------------------

    fn execute(&mut self, op: &Op) -> Result<()> {
        self.time_work(op.name(), op.cost(&self.setting), |b| b.execute(op))
    }

    fn report(&mut self) -> Result<StepReport> {
        self.time("report", |b| b.report())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::selftest;

    #[test]
    fn it_computes_what_the_device_behind_it_computes() {
        let make = || -> Result<Box<dyn Backend>> { Ok(Box::new(Timed::new(Box::new(CpuBackend::new(1)?)))) };
        for operation in ["matmul gelu", "layernorm_backward", "loss", "update adam", "read, write", "report"]
        {
            let cases = selftest::run(&make, Some(operation));
            assert!(!cases.is_empty());
            assert!(cases.iter().all(|case| case.passed), "{cases:#?}");
        }
    }

    #[test]
    fn calls_are_counted_by_operation_and_forgotten_on_request() {
        let mut timed = Timed::new(Box::new(CpuBackend::new(1).unwrap()));
        let times = timed.times();
        let mut plan = MemoryPlan::new(Storage::CPU);
        let x = plan.activation("x", 2, 3);
        timed.allocate(&plan).unwrap();
        times.reset();
        timed.write(x, &[1.0; 6]).unwrap();
        for _ in 0..3 {
            timed.scale(x, 2.0).unwrap();
        }
        let mut values = [0.0; 6];
        timed.read(x, &mut values).unwrap();
        assert_eq!(values, [8.0; 6]);

        let mut counts: Vec<_> =
            times.report().iter().map(|timing| (timing.operation, timing.calls)).collect();
        counts.sort_unstable();
        assert_eq!(counts, [("read", 1), ("scale", 3), ("write", 1)]);
        let seconds: Vec<f64> = times.report().iter().map(|timing| timing.seconds).collect();
        assert!(seconds.is_sorted_by(|a, b| a >= b) && seconds.iter().all(|s| *s >= 0.0));
        let operations = times.operations();
        assert_eq!((operations.len(), operations[0].calls), (1, 3));
        assert_eq!(
            operations[0].cost,
            Cost { flops: 0, read: 72, written: 72 },
            "read and written, three times"
        );
        times.reset();
        assert!(times.report().is_empty());
    }
}
