//! Where the time of a step goes: a [`Backend`] in front of another that counts calls and seconds per operation.
//!
//! Matrix products are counted by their epilogue, because those are the kernels that one can work on. Times are those
//! of the calls: a device that works asynchronously has to finish an operation before it returns for them to mean
//! anything.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{
    Arena, Backend, Body, Embed, Epilogue, Gelu, Heads, InputGrad, Join, Linear, Loss, Mask, Mat, MemoryPlan,
    Micro, Norm, Normalise, PatchGrid, Pool, Precision, Slot, SlotLayout, Stats, StepKeys, StepReport,
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

    // Patch embedding -------------------------------------------------------------------------------------------

    fn patchify(&mut self, grid: PatchGrid, normalise: Normalise, patches: Mat) -> Result<()> {
        self.time("patchify", |b| b.patchify(grid, normalise, patches))
    }

    fn embed(&mut self, embed: &Embed, x: Mat) -> Result<()> {
        self.time("embed", |b| b.embed(embed, x))
    }

    fn embed_backward(&mut self, embed: &Embed, d_x: Mat, d_y: Mat) -> Result<()> {
        self.time("embed_backward", |b| b.embed_backward(embed, d_x, d_y))
    }

    // Dense layers ----------------------------------------------------------------------------------------------

    fn matmul(&mut self, x: Mat, w: &Linear, epilogue: Epilogue, y: Mat) -> Result<()> {
        let operation = match epilogue {
            Epilogue::None => "matmul none",
            Epilogue::Bias => "matmul bias",
            Epilogue::BiasResidual(_) => "matmul residual",
            Epilogue::BiasGelu { .. } => "matmul gelu",
            Epilogue::BiasTanh => "matmul tanh",
        };
        self.time(operation, |b| b.matmul(x, w, epilogue, y))
    }

    fn matmul_backward(&mut self, d_y: Mat, x: Mat, w: &Linear, d_x: InputGrad) -> Result<()> {
        let operation = match d_x {
            InputGrad::None => "matmul_backward none",
            InputGrad::Plain(_) => "matmul_backward plain",
            InputGrad::Add(_) => "matmul_backward add",
            InputGrad::Gelu { .. } => "matmul_backward gelu",
            InputGrad::Tanh { .. } => "matmul_backward tanh",
        };
        self.time(operation, |b| b.matmul_backward(d_y, x, w, d_x))
    }

    fn gelu(&mut self, pre: Mat, form: Gelu, dropout: Mask, y: Mat) -> Result<()> {
        self.time("gelu", |b| b.gelu(pre, form, dropout, y))
    }

    // LayerNorm and the residual stream -------------------------------------------------------------------------

    fn layernorm(&mut self, join: &Join, norm: &Norm, y: Mat, stats: Stats) -> Result<()> {
        self.time("layernorm", |b| b.layernorm(join, norm, y, stats))
    }

    fn layernorm_backward(
        &mut self,
        d_y: Mat,
        join: &Join,
        norm: &Norm,
        stats: Stats,
        d_sum: Mat,
        fresh: bool,
        d_branch: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()> {
        self.time("layernorm_backward", |b| {
            b.layernorm_backward(d_y, join, norm, stats, d_sum, fresh, d_branch, d_bias)
        })
    }

    fn residual(&mut self, join: &Join) -> Result<()> {
        self.time("residual", |b| b.residual(join))
    }

    fn residual_backward(
        &mut self,
        join: &Join,
        d_sum: Mat,
        d_branch: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()> {
        self.time("residual_backward", |b| b.residual_backward(join, d_sum, d_branch, d_bias))
    }

    // Attention -------------------------------------------------------------------------------------------------

    fn attention(&mut self, heads: Heads, qkv: Mat, o: Mat, lse: Mat, dropout: Mask) -> Result<()> {
        self.time("attention", |b| b.attention(heads, qkv, o, lse, dropout))
    }

    fn attention_backward(
        &mut self,
        heads: Heads,
        qkv: Mat,
        o: Mat,
        lse: Mat,
        dropout: Mask,
        d_o: Mat,
        d_qkv: Mat,
        d_bias: Option<Mat>,
    ) -> Result<()> {
        self.time("attention_backward", |b| {
            b.attention_backward(heads, qkv, o, lse, dropout, d_o, d_qkv, d_bias)
        })
    }

    fn probe_attention(
        &mut self,
        heads: Heads,
        q: Mat,
        kv: Mat,
        p: Mat,
        o: Mat,
        dropout: Mask,
    ) -> Result<()> {
        self.time("probe_attention", |b| b.probe_attention(heads, q, kv, p, o, dropout))
    }

    fn probe_attention_backward(
        &mut self,
        heads: Heads,
        q: Mat,
        kv: Mat,
        p: Mat,
        dropout: Mask,
        d_o: Mat,
        d_q: Mat,
        d_kv: Mat,
    ) -> Result<()> {
        self.time("probe_attention_backward", |b| {
            b.probe_attention_backward(heads, q, kv, p, dropout, d_o, d_q, d_kv)
        })
    }

    // Head ------------------------------------------------------------------------------------------------------

    fn pool(&mut self, pool: Pool, x: Mat, y: Mat) -> Result<()> {
        self.time("pool", |b| b.pool(pool, x, y))
    }

    fn pool_backward(&mut self, pool: Pool, d_y: Mat, d_x: Mat, fresh: bool) -> Result<()> {
        self.time("pool_backward", |b| b.pool_backward(pool, d_y, d_x, fresh))
    }

    fn scale(&mut self, x: Mat, factor: f32) -> Result<()> {
        self.time("scale", |b| b.scale(x, factor))
    }

    fn loss(&mut self, loss: Loss, logits: Mat, d_logits: Mat, samples: Mat) -> Result<()> {
        self.time("loss", |b| b.loss(loss, logits, d_logits, samples))
    }

    // Update ----------------------------------------------------------------------------------------------------

    fn begin_report(&mut self) -> Result<()> {
        self.time("begin_report", |b| b.begin_report())
    }

    fn add_to_report(&mut self, samples: Mat) -> Result<()> {
        self.time("add_to_report", |b| b.add_to_report(samples))
    }

    fn update(&mut self, update: &Update) -> Result<()> {
        self.time("update", |b| b.update(update))
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
