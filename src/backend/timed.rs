//! Where the time of a step goes: a [`Backend`] in front of another that counts calls and seconds per operation.
//!
//! Operations go by [`Op::name`], which tells matrix products apart by their epilogue. Times are those of the calls: a device that works asynchronously has to finish an operation before it returns for them to mean
//! anything.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{
    Arena, Backend, Body, Mat, MemoryPlan, Micro, Op, Precision, Slot, SlotLayout, StepKeys, StepReport,
    Storage, Update,
};
use crate::error::Result;

/// See the module.
pub struct Timed {
    inner: Box<dyn Backend>,
    times: Times,
}

/// What a [`Timed`] has counted: a handle that stays when the backend has gone into a trainer.
#[derive(Clone, Default)]
pub struct Times {
    /// In the order in which the operations were first called.
    entries: Arc<Mutex<Vec<Entry>>>,
}

struct Entry {
    operation: &'static str,
    calls: usize,
    seconds: f64,
}

impl Timed {
    pub fn new(inner: Box<dyn Backend>) -> Self {
        Self { inner, times: Times::default() }
    }

    /// Without the clock.
    pub fn into_inner(self) -> Box<dyn Backend> {
        self.inner
    }

    pub fn times(&self) -> Times {
        self.times.clone()
    }

    fn time<R>(&mut self, operation: &'static str, call: impl FnOnce(&mut dyn Backend) -> R) -> R {
        let start = Instant::now();
        let result = call(&mut *self.inner);
        // A failure shows in the next operation's own result.
        let _ = self.inner.synchronize();
        self.times.add(operation, start.elapsed().as_secs_f64());
        result
    }
}

impl Times {
    /// `(operation, calls, seconds)` since the start or the last [`Times::reset`], the longest first.
    pub fn report(&self) -> Vec<(&'static str, usize, f64)> {
        let mut report: Vec<_> = self.lock().iter().map(|e| (e.operation, e.calls, e.seconds)).collect();
        report.sort_by(|a, b| b.2.total_cmp(&a.2));
        report
    }

    /// Forgets what was counted so far: after the warm-up.
    pub fn reset(&self) {
        self.lock().clear();
    }

    fn add(&self, operation: &'static str, seconds: f64) {
        let mut entries = self.lock();
        match entries.iter_mut().find(|entry| entry.operation == operation) {
            Some(entry) => {
                entry.calls += 1;
                entry.seconds += seconds;
            }
            None => entries.push(Entry { operation, calls: 1, seconds }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        // A count is whole at any moment: a panic elsewhere spoils nothing.
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

    // Batches ---------------------------------------------------------------------------------------------------

    fn new_slot(&self, layout: SlotLayout) -> Result<Slot> {
        self.inner.new_slot(layout)
    }

    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>> {
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
        self.time("begin_micro", |b| b.begin_micro(micro))
    }

    /// Never recorded: every operation passes the clock.
    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        body(self)?;
        update.map_or(Ok(()), |update| self.update(update))
    }

    /// Every operation is waited for.
    fn steps_ahead(&self) -> u64 {
        0
    }

    fn synchronize(&mut self) -> Result<()> {
        self.inner.synchronize()
    }

    // Operations and reports ------------------------------------------------------------------------------------

    fn execute(&mut self, op: &Op) -> Result<()> {
        self.time(op.name(), |b| b.execute(op))
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
            times.report().iter().map(|(operation, calls, _)| (*operation, *calls)).collect();
        counts.sort_unstable();
        assert_eq!(counts, [("read", 1), ("scale", 3), ("write", 1)]);
        assert!(times.report().is_sorted_by(|a, b| a.2 >= b.2) && times.report().iter().all(|e| e.2 >= 0.0));
        times.reset();
        assert!(times.report().is_empty());
    }
}
