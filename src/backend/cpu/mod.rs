//! The CPU backend: every operation of [`Backend`] over buffers in main memory, in f32, on all cores.
//!
//! This file owns the arenas and the bound batch. [`operations`] turns handles into matrices, checks their
//! shapes, and calls one kernel per operation. Kernels split rows over threads in ways that never change a
//! bit of the result, and run with the widest instruction set of the machine ([`compute::Isa`]).

mod activation;
mod arenas;
pub mod attention;
pub mod compute;
mod embed;
pub mod gemm;
mod layernorm;
mod loss;
pub mod main_memory;
pub mod math;
mod operations;
mod patchify;
mod pool;
pub mod query_attention;
mod reduce;
mod residual;
mod rope;
mod round;
mod rowwise;
pub mod simd;
mod sums;
#[cfg(test)]
mod testbed;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod update;
pub mod view;

use arenas::{Access, Arenas};
use compute::{Compute, Isa};

use super::mask::BoundMask;
use super::options::CPU_ROUNDS;
use super::sample_metric::{LOSS, TOP1, TOP5};
use super::{
    Arena, Backend, Body, Group, HostMemory, Mask, Mat, MemoryPlan, Micro, Op, Precision, Slot, SlotLayout,
    StepKeys, StepReport, Storage, Update, Write,
};
use crate::backend::batch::PlainMemory;
use crate::error::{Error, Result};

/// The CPU as a device.
pub struct CpuBackend {
    compute: Compute,
    arenas: Arenas,
    slot: Option<Slot>,
    keys: StepKeys,
    micro: Micro,
    /// Sums over the samples reported so far, in the columns of `samples`.
    sums: [f64; 3],
    outcome: update::Outcome,
    /// The work with other ranks, and with chunks.
    reduction: Option<reduce::Reduction>,
}

impl CpuBackend {
    /// Uses the machine's best instruction set, or the one that `VITRUM_ISA` names; `threads = 0` uses one
    /// per core.
    pub fn new(threads: usize) -> Result<Self> {
        Ok(Self::with(Compute::new(Isa::from_env()?, threads)?))
    }

    /// A backend with given instruction set and threads.
    pub fn with(compute: Compute) -> Self {
        Self {
            compute,
            arenas: Arenas::empty(),
            slot: None,
            keys: StepKeys { seed: 0, step: 0 },
            micro: Micro { first: 0, samples: 0, global_first: 0, gradients: Write::Assign, mean_over: 1 },
            sums: [0.0; 3],
            outcome: update::Outcome::default(),
            reduction: None,
        }
    }

    fn bind(&self, mask: Mask) -> BoundMask {
        BoundMask::new(mask, self.keys, self.micro)
    }
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        let threads = self.compute.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu, {threads} thread{plural}, {}", self.compute.isa.name())
    }

    // Memory ----------------------------------------------------------------------------------------------------

    fn storage(&self) -> Storage {
        Storage::CPU
    }

    fn precision(&self) -> Precision {
        Precision::F32
    }

    fn free_memory(&self) -> Result<usize> {
        let memory = main_memory::MainMemory::now()
            .ok_or_else(|| Error::new("/proc/meminfo does not say how much memory is available"))?;
        Ok(memory.available as usize)
    }

    fn allocate(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.arenas = Arenas::new(plan)?;
        Ok(())
    }

    fn allocated_bytes(&self) -> usize {
        self.arenas.total_bytes()
    }

    fn write(&mut self, at: Mat, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), at.rows * at.cols, "write: {} values into {at}", values.len());
        let mut rows = Access::new(&mut self.arenas).write(at);
        for (r, values) in values.chunks_exact(at.cols.max(1)).enumerate() {
            rows.row(r).copy_from_slice(values);
        }
        Ok(())
    }

    fn read(&mut self, at: Mat, values: &mut [f32]) -> Result<()> {
        assert_eq!(values.len(), at.rows * at.cols, "read: {at} into {} values", values.len());
        let rows = Access::new(&mut self.arenas).read(at);
        for (r, values) in values.chunks_exact_mut(at.cols.max(1)).enumerate() {
            values.copy_from_slice(rows.row(r));
        }
        Ok(())
    }

    fn read_arena(&mut self, arena: Arena) -> Result<Vec<u8>> {
        Ok(self.arenas.bytes(arena).to_vec())
    }

    fn write_arena(&mut self, arena: Arena, bytes: &[u8]) -> Result<()> {
        let to = self.arenas.bytes_mut(arena);
        assert_eq!(to.len(), bytes.len(), "write_arena: {arena:?} has another size");
        to.copy_from_slice(bytes);
        Ok(())
    }

    fn copy_arena(&mut self, arena: Arena, from: usize, to: &mut [u8]) -> Result<()> {
        to.copy_from_slice(&self.arenas.bytes(arena)[from..from + to.len()]);
        Ok(())
    }

    fn checksum(&mut self, arena: Arena) -> Result<u64> {
        Ok(xxhash_rust::xxh3::xxh3_64(self.arenas.bytes(arena)))
    }

    fn swap_ema(&mut self) -> Result<()> {
        reduce::swap_ema(self);
        Ok(())
    }

    // Ranks -----------------------------------------------------------------------------------------------------

    fn join(&mut self, group: Group) -> Result<()> {
        self.reduction = Some(reduce::Reduction::new(group));
        Ok(())
    }

    fn tell_signal(&mut self, signal: i32) {
        if let Some(reduction) = &mut self.reduction {
            reduction.signal = signal;
        }
    }

    fn gradients_done(&mut self, from: usize) -> Result<()> {
        reduce::gradients_done(self, from)
    }

    fn gather_rows(&mut self, rows: Mat) -> Result<()> {
        reduce::gather_rows(self, rows)
    }

    fn gather_ema(&mut self) -> Result<()> {
        reduce::gather_ema(self)
    }

    // Choices ---------------------------------------------------------------------------------------------------

    fn algorithms(&self) -> Vec<String> {
        Vec::new()
    }

    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String> {
        match algorithms.first().filter(|word| word.starts_with(CPU_ROUNDS)) {
            Some(rounds) => Err(format!("this is a run without {rounds}")),
            None => Ok(()),
        }
    }

    // Batches ---------------------------------------------------------------------------------------------------

    fn new_slot(&self, layout: SlotLayout) -> Result<Slot> {
        let memory: Box<dyn HostMemory> = Box::new(PlainMemory::new(layout.bytes())?);
        Ok(Slot::new(memory, layout))
    }

    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>> {
        Ok(self.slot.replace(slot))
    }

    fn unbind_batch(&mut self) -> Option<Slot> {
        self.slot.take()
    }

    // The step --------------------------------------------------------------------------------------------------

    fn begin_step(&mut self, keys: StepKeys) -> Result<()> {
        self.keys = keys;
        Ok(())
    }

    fn begin_micro(&mut self, micro: Micro) -> Result<()> {
        assert!(micro.samples > 0 && micro.mean_over > 0, "a micro-batch without samples");
        self.micro = micro;
        Ok(())
    }

    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        body(self)?;
        update.map_or(Ok(()), |update| self.update(update))
    }

    fn steps_ahead(&self) -> u64 {
        0
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    // Operations and reports ------------------------------------------------------------------------------------

    fn execute(&mut self, op: &Op) -> Result<()> {
        operations::execute(self, op)
    }

    fn report(&mut self) -> Result<StepReport> {
        let mean = self.sums.map(|sum| sum / self.micro.mean_over as f64);
        Ok(StepReport {
            loss: mean[LOSS],
            top1: mean[TOP1],
            top5: mean[TOP5],
            grad_norm: self.outcome.grad_norm,
            skipped: self.outcome.skipped,
            signal: self.outcome.signal,
        })
    }
}
