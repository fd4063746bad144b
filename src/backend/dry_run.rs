//! A device that does nothing. With a [`Timed`](super::timed::Timed) in front of it, the operations of a step
//! can be listed and counted on a machine without the memory to run them.

use super::{
    Arena, Backend, Body, Mat, MemoryPlan, Micro, Op, Precision, Slot, SlotLayout, StepKeys, StepReport,
    Storage, Update,
};
use crate::error::{Error, Result};

/// See the module. Reads leave the destination unchanged.
pub struct DryRun {
    storage: Storage,
    precision: Precision,
}

impl DryRun {
    /// Stands for a device that stores and computes like this.
    pub fn new(storage: Storage, precision: Precision) -> Self {
        Self { storage, precision }
    }
}

impl Backend for DryRun {
    fn describe(&self) -> String {
        "nothing is computed".into()
    }

    fn storage(&self) -> Storage {
        self.storage
    }

    fn precision(&self) -> Precision {
        self.precision
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(0)
    }

    fn allocate(&mut self, _plan: &MemoryPlan) -> Result<()> {
        Ok(())
    }

    fn allocated_bytes(&self) -> usize {
        0
    }

    fn write(&mut self, _at: Mat, _values: &[f32]) -> Result<()> {
        Ok(())
    }

    fn read(&mut self, _at: Mat, _values: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn read_arena(&mut self, _arena: Arena) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn write_arena(&mut self, _arena: Arena, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn swap_ema(&mut self) -> Result<()> {
        Ok(())
    }

    fn algorithms(&self) -> Vec<String> {
        Vec::new()
    }

    fn prefer_algorithms(&mut self, _algorithms: &[String]) -> Result<(), String> {
        Ok(())
    }

    /// # Errors
    /// Always: a batch would take memory.
    fn new_slot(&self, _layout: SlotLayout) -> Result<Slot> {
        Err(Error::new("a device that computes nothing takes no batches"))
    }

    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>> {
        Ok(Some(slot))
    }

    fn unbind_batch(&mut self) -> Option<Slot> {
        None
    }

    fn begin_step(&mut self, _keys: StepKeys) -> Result<()> {
        Ok(())
    }

    fn begin_micro(&mut self, _micro: Micro) -> Result<()> {
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

    fn execute(&mut self, _op: &Op) -> Result<()> {
        Ok(())
    }

    fn report(&mut self) -> Result<StepReport> {
        Ok(StepReport::default())
    }
}
